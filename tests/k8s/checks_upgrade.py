"""What is true when runx is upgraded, taken back, and taken away, while pods run."""

import contextlib
import json
import pathlib
import re
import shutil

import images
from checks_node import (DAEMONSET, NAMESPACE, SELECTOR, handlers, helm, installer, installers_log, is_ready, labels, programs,
                         values)
from images import TICK
from session import SLEEP, check, container, pod, sh


def changed(directory):
    """Other programs, as far as their digests know: what comes behind a program's end is not read."""
    with open(directory / "containerd-shim-runx-v1", "ab") as shim:
        shim.write(b"another version")


def shim_of(s, name):
    """The set of programs that a pod's shim is of."""
    sandbox, sets, shims = s.cluster.sandbox(name), set(), []
    for pid in s.cluster.processes():
        with contextlib.suppress(OSError):
            words = pathlib.Path("/proc", str(pid), "cmdline").read_text().split("\0")
            if words[0].endswith("/containerd-shim-runx-v1"):
                shims.append(words)
                if sandbox in words:
                    sets.add(pathlib.Path(words[0]).parent.name)
    assert len(sets) == 1, (name, sandbox, shims)
    return sets.pop()


def healthy(s):
    ask = ["wget", "-q", "-O", "-", "http://127.0.0.1:49983/health"]
    return s.kubectl("exec", "with-agent", "--", *ask, check=False).returncode == 0


def answers(s):
    """What shows that pods of each kind still work."""
    assert s.kubectl("exec", "upgraded", "--", "echo", "answer").stdout == "answer\n"
    assert healthy(s)
    seen = len(s.logs("module").splitlines())
    s.until("the module goes on", lambda: len(s.logs("module").splitlines()) > seen)
    assert s.logs("upgraded") == "started\n"
    # Whose shim it is, and that nothing was started again.
    return {name: s.get("pod", name)["status"]["containerStatuses"][0] for name in ("upgraded", "module", "with-agent")}


@check
def an_upgrade_under_running_pods_loses_none_and_new_ones_have_the_new_programs(s):
    node = s.cluster.node
    images.load_installer(s.cluster, 2, changed)
    (first,), current = programs(s)
    assert first == current
    restarts, before = node.starts, node.files()
    old = [pod("upgraded", sh(f"echo started; {SLEEP}")), pod("module", container(TICK)),
           pod("with-agent", sh(SLEEP), annotations={"runx.dev/agent": "true"})]
    with s.pods(*old):
        for one in old:
            s.ready(one["metadata"]["name"])
        s.until("the agent answers", lambda: healthy(s))
        state = answers(s)
        print(helm(s, "upgrade", "--wait", release=values(image={**values()["installer"]["image"], "tag": "2"})).stdout)
        s.kubectl("-n", NAMESPACE, "rollout", "status", DAEMONSET, "--timeout=120s")
        assert "upgraded; containerd was not restarted" in installers_log(s), installers_log(s)
        both, second = programs(s)
        assert second != first and both == {first, second}, (first, second, both)
        assert (node.starts, node.files()) == (restarts, before)
        assert answers(s) == state
        with s.pods(pod("newer", sh(SLEEP))):
            s.ready("newer")
            assert shim_of(s, "newer") == second
            assert {shim_of(s, name) for name in ("upgraded", "module", "with-agent")} == {first}
            # An old pod's container that ends is started again by the old shim, with the programs that it has.
            assert s.kubectl("exec", "newer", "--", "echo", "answer").stdout == "answer\n"
        assert programs(s)[0] == {first, second}
    # The last of its shims has ended.
    s.until("the old programs are removed", lambda: programs(s) == ({second}, second), 120)
    helm(s, "rollback", "1", "--wait")
    s.kubectl("-n", NAMESPACE, "rollout", "status", DAEMONSET, "--timeout=120s")
    s.until("the first programs are current again", lambda: programs(s)[1] == first)
    assert (node.starts, node.files()) == (restarts, before)
    with s.pods(pod("rolled-back", sh(SLEEP))):
        s.ready("rolled-back")
        assert shim_of(s, "rolled-back") == first


@check
def an_upgrade_to_a_damaged_image_fails_with_the_nodes_name_and_is_taken_back(s):
    node = s.cluster.node
    images.load_installer(s.cluster, 3, changed, damaged=True)
    restarts, before, (sets, current) = node.starts, node.files(), programs(s)

    def nothing_has_come_of_it():
        # Sets of earlier checks may go meanwhile.
        left, now = programs(s)
        assert (node.starts, node.files(), now) == (restarts, before, current) and left <= sets, (left, now, sets, current)
    release = dict(values(image={**values()["installer"]["image"], "tag": "3"}), hooks={"timeoutSeconds": 5})
    with s.pods(pod("outlasts", sh(SLEEP))):
        s.ready("outlasts")
        failed = helm(s, "upgrade", release=release, check=False)
        assert failed.returncode != 0 and "post-upgrade" in failed.stderr, failed
        # What the hook's job has written, helm says.
        found = re.search(r"Not ready: node \(kubectl (logs runx-node-\S+ --namespace \S+) says why\)", failed.stderr)
        assert found, failed
        s.kubectl(*found[1].split())
        s.until("the installer says why", lambda: "containerd-shim-runx-v1 is not what" in installers_log(s))
        nothing_has_come_of_it()
        with s.pods(pod("meanwhile", sh(SLEEP))):
            s.ready("meanwhile")
        # The hook waits for it.
        helm(s, "rollback", "1")
        assert is_ready(installer(s))
        assert not s.kubectl("-n", NAMESPACE, "get", "job", "-o", "name").stdout
        assert s.kubectl("exec", "outlasts", "--", "echo", "answer").stdout == "answer\n"
    nothing_has_come_of_it()


def gone(s):
    """Everything that the release has made."""
    kinds = ("runtimeclass,clusterrole,clusterrolebinding,validatingadmissionpolicy,validatingadmissionpolicybinding,"
             "serviceaccount,daemonset,pod,configmap,secret")
    found = json.loads(s.kubectl("get", kinds, "--all-namespaces", "-l", "app.kubernetes.io/instance=runx", "-o", "json").stdout)
    return not found["items"]


def forced_uninstall(node, program):
    try:
        return node.run(program, "uninstall", "--force")
    except AssertionError as e:
        if "at work" in str(e):
            return None
        raise


def runx_is_taken_away_only_when_no_pod_uses_it_or_by_force(s):
    """The last one: afterwards the node is what it was."""
    node = s.cluster.node
    last = pod("last", sh("trap 'exit 0' TERM; while :; do echo still; sleep 1; done"))
    with s.pods(last):
        s.ready("last")
        state = s.get("pod", "last")["status"]["containerStatuses"][0]
        helm(s, "upgrade", release=values(mode="uninstall"))
        s.until("the labels are gone", lambda: labels(s) == {})
        s.until("it says why it waits", lambda: "running pods of this node use runx: default/last" in installers_log(s))
        assert "runx" in handlers(s) or s.cluster.containerd_version < (2, 0)
        assert not is_ready(installer(s)) and s.kubectl("exec", "last", "--", "echo", "answer").stdout == "answer\n"
        name = installer(s)["metadata"]["name"]

        def refused():
            done = s.kubectl("-n", NAMESPACE, "exec", name, "--", "/runx-node", "uninstall", check=False)
            assert done.returncode == 1, done
            return None if "at work" in done.stderr else done
        said = s.until("nobody else is at work", refused)
        assert "default/last" in said.stderr, said
        # By hand, since containerd's restart cuts off what is executed through it.
        program = s.cluster.directory / "runx-node"
        shutil.copy(s.cluster.dist / "runx-node", program)
        forced = s.until("nobody else is at work", lambda: forced_uninstall(node, program))
        assert "but for 1 sets of programs that shims run from" in forced, forced
        # containerd has forgotten the handler, and executes nothing more in the pod; but it runs on.
        assert node.files() == s.files_before, node.files()
        s.until("the node names no such handler", lambda: "runx" not in handlers(s))
        seen = len(s.logs("last"))
        s.until("the pod goes on", lambda: len(s.logs("last")) > seen)
        assert s.get("pod", "last")["status"]["containerStatuses"][0] == state
    try:
        s.until("the installer is done", lambda: is_ready(installer(s)))
    except AssertionError:
        print(installers_log(s), *sorted(path for path in (node.root / "opt/runx").rglob("*")), sep="\n")
        raise
    assert not list((node.root / "opt/runx").iterdir()), list((node.root / "opt/runx").rglob("*"))
    assert node.files() == s.files_before
    with s.pods(pod("runcs", sh(SLEEP), runtime=None)):
        s.ready("runcs")
    helm(s, "uninstall", "--wait")
    s.until("all of the release is gone", lambda: gone(s))
    s.until("its pods are gone", lambda: not s.kubectl("-n", NAMESPACE, "get", "pods", "-l", SELECTOR, "-o", "name").stdout)
