"""Volumes that outlive pods, mounts that propagate, and users of a pod's own."""

import re

from cluster import NODE
from session import SLEEP, Skipped, check, pod, sh


def host_path(name, path, kind="DirectoryOrCreate"):
    return {"name": name, "hostPath": {"path": path, "type": kind}}


def mounted(name, at="/data", **more):
    return {"volumeMounts": [{"name": name, "mountPath": at, **more}]}


@check
def a_stateful_set_finds_its_volume_again(s):
    volume = {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": "disk"}, "spec": {
        "capacity": {"storage": "1Gi"}, "accessModes": ["ReadWriteOnce"], "storageClassName": "by-hand",
        "persistentVolumeReclaimPolicy": "Retain", "hostPath": {"path": "/srv/disk", "type": "DirectoryOrCreate"},
        "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [
            {"key": "kubernetes.io/hostname", "operator": "In", "values": [NODE]}]}]}}}}
    main = sh(f"hostname >>/data/starts; cat /data/starts; {SLEEP}", **mounted("data"))
    template = pod("stateful", main, restartPolicy="Always")
    claim = {"metadata": {"name": "data"}, "spec": {"accessModes": ["ReadWriteOnce"], "storageClassName": "by-hand",
                                                    "resources": {"requests": {"storage": "1Gi"}}}}
    the_set = {"apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": {"name": "stateful"}, "spec": {
        "replicas": 1, "serviceName": "stateful", "selector": {"matchLabels": {"app": "stateful"}},
        "template": {"metadata": template["metadata"], "spec": template["spec"]}, "volumeClaimTemplates": [claim]}}
    made_of_it = {"apiVersion": "v1", "kind": "PersistentVolumeClaim",
                  "metadata": {"name": "data-stateful-0"}, "spec": claim["spec"]}
    with s.pods(volume, made_of_it, the_set):
        s.until("its pod is there", lambda: s.kubectl("get", "pod", "stateful-0", check=False).returncode == 0)
        s.ready("stateful-0")
        first = s.get("pod", "stateful-0")["metadata"]["uid"]
        assert s.logs("stateful-0") == "stateful-0\n"
        s.kubectl("exec", "stateful-0", "--", "sh", "-c", "echo kept >/data/file && chmod 640 /data/file")
        s.kubectl("delete", "pod", "stateful-0", "--wait=true", "--timeout=60s")

        def again():
            done = s.kubectl("get", "pod", "stateful-0", "-o", "jsonpath={.metadata.uid}", check=False)
            return done.returncode == 0 and done.stdout != first
        s.until("there is another pod of its name", again)
        s.ready("stateful-0")
        assert s.logs("stateful-0") == "stateful-0\nstateful-0\n"
        assert s.kubectl("exec", "stateful-0", "--", "sh", "-c", "cat /data/file; stat -c %a /data/file").stdout == "kept\n640\n"


@check
def mounts_propagate_into_containers_and_out_of_them_where_that_is_asked_for(s):
    node = s.cluster.node
    (node.root / "srv/shared").mkdir(exist_ok=True)
    volume = {"volumes": [host_path("shared", "/srv/shared", "Directory")]}

    def reader(name, mode):
        return pod(name, sh(SLEEP, **mounted("shared", **({"mountPropagation": mode} if mode else {}))), **volume)
    writer = pod("writer", sh(SLEEP, **mounted("shared", mountPropagation="Bidirectional"), securityContext={"privileged": True}),
                 **volume)
    look = "cat /data/*/file 2>/dev/null; true"
    with s.pods(reader("receiver", "HostToContainer"), reader("apart", None), writer):
        for name in ("receiver", "apart", "writer"):
            s.ready(name)
        try:
            # What is mounted on the node later.
            node.run("sh", "-c", "mkdir -p /srv/shared/of-node && mount -t tmpfs tmpfs /srv/shared/of-node && "
                                 "echo of the node >/srv/shared/of-node/file")
            seen = {name: s.kubectl("exec", name, "--", "sh", "-c", look).stdout for name in ("receiver", "apart", "writer")}
            assert seen == {"receiver": "of the node\n", "apart": "", "writer": "of the node\n"}, seen
            # What is mounted by a container.
            s.kubectl("exec", "writer", "--", "sh", "-c", "mkdir /data/of-pod && mount -t tmpfs tmpfs /data/of-pod && "
                                                          "echo of a pod >/data/of-pod/file")
            assert node.run("cat", "/srv/shared/of-pod/file") == "of a pod\n"
            assert s.kubectl("exec", "receiver", "--", "cat", "/data/of-pod/file").stdout == "of a pod\n"
            assert s.kubectl("exec", "apart", "--", "sh", "-c", "cat /data/of-pod/file", check=False).returncode != 0
            # And what is not asked for stays inside.
            inside = s.kubectl("exec", "receiver", "--", "grep", "-c", " /data", "/proc/self/mountinfo").stdout
            assert inside == "3\n", inside
        finally:
            node.run("sh", "-c", "for name in of-node of-pod; do umount /srv/shared/$name; done 2>/dev/null; true")
    assert "/srv/shared" not in node.run("cat", "/proc/self/mountinfo")


def runs_or_why_not(s, name):
    """Of a pod with users of its own: `None` while nothing is known."""
    one = s.get("pod", name)
    if one["status"]["phase"] == "Running":
        return "runs"
    events = s.kubectl("get", "events", "--field-selector", f"involvedObject.name={name}", "-o",
                       "jsonpath={range .items[*]}{.message}{\"\\n\"}{end}").stdout
    return next((line for line in events.splitlines() if "user namespaces" in line or "idmap" in line), None)


def root_on_the_node(s, name):
    """Who root of a pod with users of its own, which says that, is on its node."""
    found = s.until("it runs, or somebody says why not", lambda: runs_or_why_not(s, name))
    if found != "runs":
        # runc with the same containerd decides whether this machine can.
        raise Skipped(found)
    s.ready(name)
    user, mapped = s.logs(name).splitlines()[:2]
    inside, outside, count = map(int, mapped.split())
    assert user == "0" and (inside, count) == (0, 65536) and outside >= 65536, s.logs(name)
    return outside


@check
def a_pod_has_users_of_its_own(s):
    main = sh(f"id -u; cat /proc/self/uid_map; touch /data/file; {SLEEP}", **mounted("data"))
    with s.pods(pod("own-users", main, hostUsers=False, volumes=[{"name": "data", "emptyDir": {}}])):
        outside = root_on_the_node(s, "own-users")
        # Root of the pod is nobody's root on the node, also by the kernel's word.
        container = s.get("pod", "own-users")["status"]["containerStatuses"][0]["containerID"].rpartition("/")[2]
        cgroup = next(path for path in s.cluster.cgroups() if path.name == container)
        pid = (cgroup / "cgroup.procs").read_text().split()[0]
        with open(f"/proc/{pid}/status") as status:
            assert re.search(rf"^Uid:\s+{outside}\s", status.read(), re.M)
        assert s.kubectl("exec", "own-users", "--", "stat", "-c", "%u", "/data/file").stdout == "0\n"
