"""What happens to pods while they live: restarts of what drives them, other limits, hooks, and the rest of their fields."""

import json
import os
import pathlib
import shutil
import subprocess

import cluster as clusters
import tools
from images import BOX, TICK
from session import SLEEP, Skipped, check, container, pod, sh


def group_of(s, name, file, index=0):
    """A file in the cgroup of a pod's container, in the hierarchy that has it."""
    id = s.get("pod", name)["status"]["containerStatuses"][index]["containerID"].rpartition("/")[2]
    return next(path / file for path in s.cluster.cgroups() if path.name == id and (path / file).exists())


def statuses(s, *names):
    return {name: s.get("pod", name)["status"]["containerStatuses"] for name in names}


def agent_is_healthy(s, name):
    ask = ["wget", "-q", "-O", "-", "http://127.0.0.1:49983/health"]
    return s.kubectl("exec", name, "--", *ask, check=False).returncode == 0


@check
def pods_of_every_kind_outlive_restarts_of_containerd_and_the_kubelet(s):
    both = pod("of-both", sh(f"echo started; {SLEEP}"), container(TICK, name="module"))
    with_agent = pod("agents", sh(SLEEP), annotations={"runx.dev/agent": "true"})
    with s.pods(both, with_agent):
        for name in ("of-both", "agents"):
            s.ready(name)
        s.until("the agent answers", lambda: agent_is_healthy(s, "agents"))
        before = statuses(s, "of-both", "agents")

        def all_goes_on():
            s.until("the node is ready", s.cluster.node_is_ready)
            s.until("commands run", lambda: s.kubectl("exec", "of-both", "-c", "main", "--", "true", check=False).returncode == 0)
            seen = len(s.logs("of-both", "-c", "module"))
            s.until("the module goes on", lambda: len(s.logs("of-both", "-c", "module")) > seen)
            s.until("the agent answers still", lambda: agent_is_healthy(s, "agents"))
            assert s.logs("of-both", "-c", "main") == "started\n"
            assert statuses(s, "of-both", "agents") == before

        assert s.cluster.node.restart_containerd()
        all_goes_on()
        kubelet = next(child for child in s.cluster.children if child[0] == "kubelet")
        tools.end(kubelet[1], 20)
        s.cluster.children.remove(kubelet)
        s.cluster.start_kubelet()
        all_goes_on()
        # What ends while nobody looks is seen afterwards.
        assert s.cluster.node.restart_containerd()
        s.kubectl("exec", "of-both", "-c", "main", "--", "kill", "-TERM", "1")
        s.until("its end is seen", lambda: any("terminated" in one["state"] for one in statuses(s, "of-both")["of-both"]))


@check
def the_limits_of_a_running_container_are_changed_in_place(s):
    def resources(cpu, memory):
        return {"requests": {"cpu": cpu, "memory": memory}, "limits": {"cpu": cpu, "memory": memory}}

    with s.pods(pod("resized", sh(SLEEP, resources=resources("100m", "64Mi")))):
        s.ready("resized")
        v2 = clusters.is_v2()
        memory = group_of(s, "resized", "memory.max" if v2 else "memory.limit_in_bytes")
        cpu = group_of(s, "resized", "cpu.max" if v2 else "cpu.cfs_quota_us")
        first = s.get("pod", "resized")["status"]["containerStatuses"][0]["containerID"]
        assert memory.read_text().strip() == str(64 << 20) and cpu.read_text().split()[0] == "10000"
        patch = {"spec": {"containers": [{"name": "main", "resources": resources("250m", "96Mi")}]}}
        s.kubectl("patch", "pod", "resized", "--subresource", "resize", "--patch", json.dumps(patch))

        def state():
            status = s.get("pod", "resized")["status"]
            refused = next((one for one in status.get("conditions", []) if one["type"].startswith("PodResize")
                            and one.get("reason") in ("Infeasible", "Error")), None)
            if refused:
                # By the kubelet, whatever the runtime is.
                raise Skipped(refused.get("message", refused["reason"]))
            return memory.read_text().strip() == str(96 << 20) and cpu.read_text().split()[0] == "25000"
        s.until("the cgroup has them", state)
        one = s.get("pod", "resized")["status"]["containerStatuses"][0]
        assert (one["containerID"], one["restartCount"]) == (first, 0)
        s.until("the status tells them", lambda: s.get("pod", "resized")["status"]["containerStatuses"][0].get(
            "resources", {}).get("limits", {}).get("memory") == "96Mi")


@check
def a_sidecar_and_the_hooks_of_a_lifecycle_run_in_their_order(s):
    volume = {"volumeMounts": [{"name": "shared", "mountPath": "/shared"}]}
    sidecar = sh(f"echo sidecar >>/shared/order; {SLEEP}", name="sidecar", restartPolicy="Always",
                 startupProbe={"exec": {"command": ["grep", "-q", "sidecar", "/shared/order"]}, "periodSeconds": 1}, **volume)
    hooks = {"postStart": {"exec": {"command": ["sh", "-c", "echo after the start >>/shared/order"]}},
             "preStop": {"exec": {"command": ["sh", "-c", "echo before the stop >>/kept/order"]}}}
    main = sh(f"echo main >>/shared/order; {SLEEP}", lifecycle=hooks, terminationMessagePath="/dev/last",
              volumeMounts=[*volume["volumeMounts"], {"name": "kept", "mountPath": "/kept"}])
    kept = s.cluster.node.root / "srv/kept"
    kept.mkdir(exist_ok=True)
    volumes = [{"name": "shared", "emptyDir": {}}, {"name": "kept", "hostPath": {"path": "/srv/kept"}}]
    with s.pods(pod("hooked", main, initContainers=[sidecar], volumes=volumes, terminationGracePeriodSeconds=10)):
        s.ready("hooked")
        order = s.kubectl("exec", "hooked", "-c", "main", "--", "cat", "/shared/order").stdout.splitlines()
        assert order[0] == "sidecar" and sorted(order[1:]) == ["after the start", "main"], order
    assert (kept / "order").read_text() == "before the stop\n"
    shutil.rmtree(kept)


@check
def the_last_words_of_a_container_are_its_message(s):
    last = sh("echo the disk is full >/dev/last; exit 3", terminationMessagePath="/dev/last")
    falls_back = sh("echo only this; exit 4", name="other", terminationMessagePolicy="FallbackToLogsOnError")
    with s.pods(pod("last-words", last, falls_back)):
        s.phase("last-words", "Failed")
        ended = {one["name"]: one["state"]["terminated"] for one in s.get("pod", "last-words")["status"]["containerStatuses"]}
        assert (ended["main"]["exitCode"], ended["main"]["message"]) == (3, "the disk is full\n"), ended
        assert (ended["other"]["exitCode"], ended["other"]["message"]) == (4, "only this\n"), ended


@check
def mounts_below_a_read_only_one_are_read_only_where_that_is_asked_for(s):
    handlers = s.get("node", clusters.NODE)["status"].get("runtimeHandlers", [])
    can = next((one.get("features", {}).get("recursiveReadOnlyMounts") for one in handlers if one["name"] == "runx"), None)
    if s.cluster.containerd_version < (2, 0):
        raise Skipped("containerd before 2.0 does not tell the kubelet what handlers can")
    assert can, handlers
    top = s.cluster.node.root / "srv/recursive"
    (top / "below").mkdir(parents=True, exist_ok=True)
    s.cluster.node.run("mount", "-t", "tmpfs", "below", "/srv/recursive/below")
    mount = {"name": "top", "mountPath": "/top", "readOnly": True}
    volumes = [{"name": "top", "hostPath": {"path": "/srv/recursive"}}]
    try:
        main = sh(f"touch /top/below/x && echo writable; {SLEEP}", volumeMounts=[mount])
        with s.pods(pod("not-recursive", main, volumes=volumes)):
            s.ready("not-recursive")
            s.until("it was written", lambda: s.logs("not-recursive") == "writable\n")
        main = sh(f"touch /top/below/y; touch /top/z; {SLEEP}", volumeMounts=[{**mount, "recursiveReadOnly": "Enabled"}])
        with s.pods(pod("recursive", main, volumes=volumes)):
            s.ready("recursive")
            s.until("both are refused", lambda: s.logs("recursive").count("Read-only file system") == 2)
    finally:
        s.cluster.node.run("umount", "/srv/recursive/below")
        shutil.rmtree(top)


@check
def a_volume_that_is_a_block_device_is_one(s):
    disk = s.cluster.node.root / "srv/disk"
    with open(disk, "wb") as file:
        file.write(b"the first bytes\n")
        file.truncate(1 << 20)
    found = subprocess.run(["losetup", "--find", "--show", disk], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if found.returncode != 0:
        raise Skipped(f"no loop device: {found.stderr.strip()}")
    device = found.stdout.strip()
    spec = {"capacity": {"storage": "1Mi"}, "accessModes": ["ReadWriteOnce"], "volumeMode": "Block", "storageClassName": "by-hand"}
    node = {"required": {"nodeSelectorTerms": [{"matchExpressions": [
        {"key": "kubernetes.io/hostname", "operator": "In", "values": [clusters.NODE]}]}]}}
    volume = {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": "disk"},
              "spec": {**spec, "local": {"path": device}, "nodeAffinity": node}}
    claim = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "disk"},
             "spec": {**{key: spec[key] for key in ("accessModes", "volumeMode", "storageClassName")}, "volumeName": "disk",
                      "resources": {"requests": {"storage": "1Mi"}}}}
    main = container(BOX, "sh", "-c", f"head -c 16 /dev/xvda; echo written | dd of=/dev/xvda bs=512 seek=1 conv=notrunc,fsync; {SLEEP}",
                     volumeDevices=[{"name": "disk", "devicePath": "/dev/xvda"}])
    try:
        with s.pods(volume, claim, pod("of-a-disk", main, volumes=[{"name": "disk", "persistentVolumeClaim": {"claimName": "disk"}}])):
            s.ready("of-a-disk")
            s.until("it was read", lambda: s.logs("of-a-disk").startswith("the first bytes\n"))
            s.until("it was written", lambda: pathlib.Path(disk).read_bytes()[512:520] == b"written\n")
            # Others than the one that was given it cannot.
            number = os.stat(device).st_rdev
            refused = s.kubectl("exec", "of-a-disk", "--", "sh", "-c",
                                f"mknod /dev/other b {os.major(number)} {(os.minor(number) + 1) % 8}; head -c 1 /dev/other", check=False)
            assert refused.returncode != 0, refused
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
        disk.unlink()
