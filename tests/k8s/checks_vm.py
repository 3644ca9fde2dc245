"""What is true of a node with cgroup version 2 whose systemd, containerd and kubelet are as everywhere: the virtual machine.
The other node is there without runx."""

import re
import urllib.request

from checks_node import (DROP_IN, NAMESPACE, SELECTOR, WANTED, handlers, helm, installer, installers_log, is_ready, labels,
                         values)
from checks_storage import root_on_the_node
from checks_upgrade import gone
from images import BOX, TICK
from session import SLEEP, Session, container, pod, sh

CHECKS = []
# Most often the machine is emulated.
PATIENCE = 8
MEMORY, CPU = 48 << 20, 20
LIMITS = {"limits": {"memory": str(MEMORY), "cpu": f"{CPU * 10}m"}}
# What shows after all of it whether anything has stayed, without what asks for this. Each execution takes its time there.
REMAINS = r"""
for process in /proc/[0-9]*; do
    read -r cgroup <$process/cgroup || continue
    words=
    # As one word, since what is between them is no space. A pod's loop sleeps now and then.
    read -r words <$process/cmdline
    case $cgroup:$words in *control*|*:|*:sleep1) ;; *) echo "process $words" ;; esac
done 2>/dev/null
findmnt --raw --noheadings --output TARGET | sed 's/^/mount /'
find /sys/fs/cgroup -type d ! -path '*control*' | sed 's/^/cgroup /'
systemctl list-units --all --plain --no-legend 'runx*' --state=active,failed,activating | sed 's/^/unit /'
systemctl --failed --plain --no-legend | sed 's/^/failed unit /'
ls /sys/class/net /run/netns | sed 's/^/network /'
find / /run /usr/local -xdev '(' -path /usr -o -path /var/lib/containerd ')' -prune -o -name '*runx*' -print | sed 's/^/file /'
"""


def session(cluster):
    return Session(cluster, cluster.vm, PATIENCE)


def check(function):
    CHECKS.append(function)
    return function


def basis(function):
    function.is_basis = True
    return check(function)


def wanted(**installer):
    """The chart's values. What has to be within a time gets more of it."""
    return {**values(timeoutSeconds=300, **installer), "hooks": {"timeoutSeconds": 600}}


def remains(s):
    code, said = s.node.shell(REMAINS, timeout=300)
    assert code == 0, said
    return {line.strip() for line in said.decode(errors="replace").splitlines() if line.strip()}


def starts_of_containerd(s):
    told = s.node.run("journalctl", "--no-pager", "--output=cat", "--unit=containerd.service", "_PID=1")
    return len(re.findall(r"^Started containerd", told, re.M))


def status(s, name, index=0):
    return s.get("pod", name)["status"]["containerStatuses"][index]


def cgroup(s, name, which="main"):
    """That of a pod's container, as the kernel has it for its first process."""
    found = next(one for one in s.get("pod", name)["status"]["containerStatuses"] if one["name"] == which)
    one = found["containerID"].rpartition("/")[2]
    words = s.node.run("sh", "-c", f"ctr --namespace k8s.io task ls | grep ^{one}").split()
    return one, words[1], s.node.run("sed", "s/^0:://", f"/proc/{words[1]}/cgroup").strip()


@basis
def the_charts_daemonset_installs_runx_with_the_real_systemd(s):
    node = s.node
    assert node.run("stat", "--file-system", "--format=%T", "/sys/fs/cgroup") == "cgroup2fs\n"
    s.files_before, s.remains_before, starts = node.files(), remains(s), starts_of_containerd(s)
    helm(s, "install", release=wanted())
    s.kubectl("label", "node", node.name, f"{WANTED}=yes")
    s.until("it is installed", lambda: is_ready(installer(s) or {"status": {}}))
    assert labels(s)["runx.dev/ready"] == "true", labels(s)
    assert "installed; containerd was restarted" in installers_log(s), installers_log(s)
    assert starts_of_containerd(s) == starts + 1, installers_log(s)
    # Once before, and once with the handler; units that have done their work are gone.
    told = node.run("journalctl", "--no-pager", "--output=cat", "_PID=1")
    assert len(re.findall(r"^Finished runx-node\S+ - runx-node reads containerd's configuration", told, re.M)) >= 2, told
    left = [line for line in remains(s) if line.startswith(("unit", "failed unit"))]
    assert not left, left
    after = node.files()
    if s.cluster.containerd_version >= (2, 0):
        assert set(after) - set(s.files_before) == {DROP_IN} and b"SystemdCgroup = true" in after[DROP_IN], after
        assert {name: after[name] for name in s.files_before} == s.files_before
        s.until("the node names the handler", lambda: "runx" in handlers(s) and "runc" in handlers(s))
    # Pods of the class go here, and not to the other node.
    assert s.get("runtimeclass", "runx")["scheduling"]["nodeSelector"] == {"runx.dev/ready": "true"}
    assert "runx.dev/ready" not in s.get("node", s.cluster.node.name)["metadata"]["labels"]


@basis
def pods_start_on_it(s):
    """All that are looked at below, at once: each takes its time there."""
    serve = "mkdir /www; echo served >/www/index.html; echo started; httpd -p 8080 -h /www"
    # Enough to be throttled.
    busy = "n=0; while [ $n -lt 200000 ]; do n=$((n + 1)); done"
    s.apply(pod("limited", sh(f"{serve}; {busy}; {SLEEP}", resources=LIMITS), container(TICK, name="module", resources=LIMITS)),
            pod("hungry", container(BOX, *"dd if=/dev/zero of=/dev/null bs=200M count=1".split(), resources=LIMITS)),
            # The kernel is too old for memory-backed volumes of others' users, such as a token's.
            pod("own-users", sh(f"id -u; cat /proc/self/uid_map; {SLEEP}"), hostUsers=False, automountServiceAccountToken=False))
    s.ready("limited")
    assert s.get("pod", "limited")["spec"]["nodeName"] == s.node.name


@check
def a_pod_is_talked_to(s):
    s.until("it is in the log", lambda: s.logs("limited", "-c", "main") == "started\n")
    s.until("the module says something", lambda: "tick" in s.logs("limited", "-c", "module"))
    done = s.kubectl("exec", "-i", "limited", "-c", "main", "--", "sh", "-c", "cat; exit 7", input="some\ninput\n", check=False)
    assert (done.returncode, done.stdout) == (7, "some\ninput\n"), done
    with s.forwarded("limited", 8080) as (port,), urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=120) as answer:
        assert answer.read() == b"served\n"


@check
def limits_are_cgroups_of_systemds_slices(s):
    for which in ("main", "module"):
        one, _, path = cgroup(s, "limited", which)
        uid = s.get("pod", "limited")["metadata"]["uid"].replace("-", "_")
        # Requests are what limits are, so that it is of the best class, which has no slice of its own.
        assert re.fullmatch(rf"/kubepods\.slice/kubepods-pod{uid}\.slice/cri-containerd-{one}\.scope(/.*)?", path), path
        shown = s.node.run("systemctl", "show", "--property=MemoryMax,CPUQuotaPerSecUSec,Slice", f"cri-containerd-{one}.scope")
        assert set(shown.split()) == {f"MemoryMax={MEMORY}", f"CPUQuotaPerSecUSec={CPU * 10}ms", f"Slice=kubepods-pod{uid}.slice"}, shown
    inside = s.kubectl("exec", "limited", "-c", "main", "--", "sh", "-c",
                       "cd /sys/fs/cgroup; cat memory.max cpu.max; cat /proc/self/cgroup").stdout
    assert inside == f"{MEMORY}\n{CPU * 1000} 100000\n0::/\n", inside

    def throttled():
        told = s.kubectl("exec", "limited", "-c", "main", "--", "cat", "/sys/fs/cgroup/cpu.stat").stdout
        return int(re.search(r"^nr_throttled (\d+)$", told, re.M)[1])
    s.until("it is throttled", throttled)


@check
def a_pod_without_memory_says_so(s):
    s.phase("hungry", "Failed")
    ended = status(s, "hungry")["state"]["terminated"]
    assert (ended["reason"], ended["exitCode"]) == ("OOMKilled", 137), ended


@check
def a_pod_has_users_of_its_own(s):
    outside = root_on_the_node(s, "own-users")
    _, pid, _ = cgroup(s, "own-users")
    assert re.search(rf"^Uid:\s+{outside}\s", s.node.run("cat", f"/proc/{pid}/status"), re.M)


@check
def pods_outlive_a_restart_of_containerd_by_systemd(s):
    before = s.get("pod", "limited")["status"]["containerStatuses"]
    s.node.run("systemctl", "restart", "containerd.service", timeout=300)
    s.until("it is executed in", lambda: s.kubectl("exec", "limited", "-c", "main", "--", "echo", "answer", check=False
                                                   ).stdout == "answer\n")
    seen = len(s.logs("limited", "-c", "module"))
    s.until("the module goes on", lambda: len(s.logs("limited", "-c", "module")) > seen)
    assert s.get("pod", "limited")["status"]["containerStatuses"] == before
    s.until("the installer is ready", lambda: is_ready(installer(s)))


@check
def helm_test_passes_for_all_three_kinds(s):
    print(helm(s, "test", "--timeout=20m").stdout)
    told = s.kubectl("-n", NAMESPACE, "get", "events", "--field-selector", "reason=Scheduled", "-o",
                     "jsonpath={range .items[*]}{.message}{\"\\n\"}{end}").stdout
    for kind in ("native", "agent", "wasm"):
        assert f"assigned {NAMESPACE}/runx-test-{kind} to {s.node.name}" in told, told


def runx_is_taken_away_without_a_trace(s):
    """The last one."""
    node = s.node
    s.kubectl("delete", "pod", "limited", "hungry", "own-users", "--ignore-not-found", "--timeout=400s", timeout=420)
    starts = starts_of_containerd(s)
    helm(s, "upgrade", release=wanted(mode="uninstall"))
    s.until("the labels are gone", lambda: labels(s) == {})
    s.until("the installer is done", lambda: "uninstall" in installers_log(s) and is_ready(installer(s)))
    assert node.files() == s.files_before and starts_of_containerd(s) == starts + 1, installers_log(s)
    s.until("the node names no such handler", lambda: "runx" not in handlers(s))
    helm(s, "uninstall", "--wait", "--timeout=10m")
    s.until("all of the release is gone", lambda: gone(s))
    s.until("its pods are gone", lambda: not s.kubectl("-n", NAMESPACE, "get", "pods", "-l", SELECTOR, "-o", "name").stdout)
    # Directories that the DaemonSet's volumes and shims have made.
    expected = s.remains_before | {"file /opt/runx", "file /run/containerd/runx", "file /var/lib/runx"}
    try:
        s.until("all is as it was", lambda: remains(s) == expected)
    except AssertionError:
        now = remains(s)
        print("left:", *sorted(now - expected), "missing:", *sorted(expected - now), sep="\n  ")
        raise
    assert node.run("ls", "-A", "/opt/runx") == "" and node.files() == s.files_before
    # Compiled modules, for when it is installed again; what is counted until the node boots, and compiled filters.
    assert node.run("ls", "-A", "/var/lib/runx") == "wasm\n"
    assert set(node.run("ls", "-A", "/run/containerd/runx/k8s.io").split()) <= {".seccomp", ".starts"}
