"""A Kubernetes cluster of one node on this machine, with directories, ports, addresses and cgroups of its own.

containerd and the kubelet run on the node (node.py), the control plane beside it; if it is asked for, a virtual machine is
another node (vm_node.py). Everything that is made is removed by `Cluster.stop`.
"""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import tempfile
import time

import certificates
import node as nodes
import tools
import vm_node
from tools import Missing, say

NODE = nodes.Node.name
# The kubelet sets these, and wants no other values; a bridge makes the machine a router.
SYSCTLS = ("vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops", "kernel/keys/root_maxkeys",
           "kernel/keys/root_maxbytes", "net/ipv4/ip_forward")
# The last parts of addresses: of the pods of this machine where there is another node, and of that node and its pods.
PODS, VM, VM_PODS = (2, 127), 200, (201, 250)
# What a node has and this machine shall not get by it.
FOREIGN = ("/var/lib/kubelet", "/var/log/containers", "/opt/runx", "/var/lib/runx/node", "/etc/containerd/conf.d/runx.toml",
           "/run/containerd/runx/k8s.io")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def is_v2():
    return pathlib.Path("/sys/fs/cgroup/cgroup.controllers").exists()


def cgroup_roots():
    base = pathlib.Path("/sys/fs/cgroup")
    if is_v2():
        return [base]
    # A controller's link leads to the hierarchy that it shares with another.
    return sorted({path.resolve() for path in base.iterdir() if (path / "cgroup.procs").exists()})


class Cluster:
    """A cluster that runs from its `start` to its `stop`."""

    def __init__(self, dist, with_vm=False):
        self.dist = pathlib.Path(dist).resolve()
        self.harness = tools.harness()
        self.kubectl_program, self.helm_program = tools.kubectl_and_helm()
        self.containerd_directory, self.containerd_version = tools.containerd()
        self.plugins = tools.cni_plugins()
        base = vm_node.base() if with_vm else None
        # Nothing of the cluster is behind a proxy; what is brought from elsewhere may be.
        self.outside = dict(os.environ)
        for name in [name for name in os.environ if name.lower() in ("http_proxy", "https_proxy", "all_proxy")]:
            del os.environ[name]
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix="runx-k8s-"))
        self.name = self.directory.name.replace("_", "-").lower()
        self.node = nodes.Node(self.directory, self.containerd_directory, self.containerd_version, self.plugins)
        self.vm = vm_node.VmNode(base, self.directory, self.containerd_directory, self.containerd_version) if with_vm else None
        self.nodes = [node for node in (self.node, self.vm) if node]
        self.children = []
        self.sysctls = {}
        self.bridge = f"rk{os.getpid():x}"
        self.second = 64 + os.getpid() % 128
        self.third = os.getpid() // 128 % 256
        self.address = f"10.{self.second}.{self.third}.1"
        # That of the service kubernetes. The API listens right there, so that pods find it without a proxy.
        self.services = f"10.{self.second}.{(self.third + 1) % 256}"
        self.api = f"{self.services}.1"
        self.ports = {name: free_port() for name in ("etcd", "peer", "kubelet")}
        self.before = None

    # --- Starting ---------------------------------------------------------------------------------------------------

    def start(self, load_images):
        """`load_images` is called when the node's containerd runs."""
        began = time.monotonic()
        for name in SYSCTLS:
            with contextlib.suppress(OSError):
                self.sysctls[name] = pathlib.Path("/proc/sys", name).read_text()
        self.before = self.traces()
        self.make_network()
        self.make_certificates()
        self.make_cgroups()
        self.node.start(self.harness)
        (self.node.root / "etc/cni/net.d/10-network.conflist").write_text(self.network)
        self.node.configure()
        self.start_containerd()
        load_images(self)
        if self.vm:
            # While nothing changes in its store, which the machine is given.
            self.node.stop_containerd()
            self.start_machine()
            self.start_containerd()
        self.start_control_plane()
        self.start_kubelet()
        self.until("the node is ready", 120, self.node_is_ready)
        if self.vm:
            self.vm.start_kubelet()
            self.until("the virtual machine is ready", 300, lambda: self.node_is_ready(self.vm.name))
        say(f"Kubernetes {tools.kubernetes_version()} with containerd {'.'.join(map(str, self.containerd_version))} "
            f"is up after {time.monotonic() - began:.0f} s")

    def start_containerd(self):
        if not self.node.start_containerd():
            raise Missing(f"containerd does not answer:\n{self.node.log()}")

    def make_network(self):
        for words in (["link", "add", self.bridge, "type", "bridge"],
                      ["address", "add", f"{self.address}/24", "dev", self.bridge],
                      ["address", "add", f"{self.api}/32", "dev", self.bridge],
                      ["link", "set", self.bridge, "up"]):
            tools.run(["ip", *words], "make the pods' network")
        addresses = {"subnet": f"10.{self.second}.{self.third}.0/24", "gateway": self.address}
        if self.vm:
            addresses["rangeStart"], addresses["rangeEnd"] = map(self.pod_address, PODS)
        network = {"cniVersion": "0.4.0", "name": self.bridge, "plugins": [{
            "type": "bridge", "bridge": self.bridge, "isGateway": True,
            "ipam": {"type": "host-local", "dataDir": str(self.directory / "ipam"),
                     "ranges": [[addresses]], "routes": [{"dst": "0.0.0.0/0"}]}}]}
        self.network = json.dumps(network)

    def pod_address(self, last):
        return f"10.{self.second}.{self.third}.{last}"

    def write(self, name, text):
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def make_certificates(self):
        certificates.make(self.directory, self.api, [self.api, self.address], [node.name for node in self.nodes])

    def make_cgroups(self):
        for root in cgroup_roots():
            directory = root / self.name
            directory.mkdir()
            # An empty set takes no process.
            for name in ("cpuset.cpus", "cpuset.mems"):
                if (directory / name).exists() and (root / name).exists():
                    (directory / name).write_text((root / name).read_text())
            if (root / "cgroup.subtree_control").exists() and len(cgroup_roots()) == 1:
                controllers = (root / "cgroup.controllers").read_text().split()
                for at in (root, directory):
                    (at / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in controllers))

    def spawn(self, name, command, inside=False, **options):
        if inside:
            command = self.node.enter(*command)
        with open(self.directory / f"{name}.log", "wb") as log:
            child = subprocess.Popen([str(word) for word in command], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                     start_new_session=True, **options)
        self.children.append((name, child))
        return child

    def start_control_plane(self):
        pki, port = self.directory / "pki", self.ports
        etcd = f"http://127.0.0.1:{port['etcd']}"
        peer = f"http://127.0.0.1:{port['peer']}"
        self.spawn("etcd", [
            self.harness, "etcd", f"--data-dir={self.directory}/etcd", f"--listen-client-urls={etcd}",
            f"--advertise-client-urls={etcd}", f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=default={peer}", "--unsafe-no-fsync", "--logger=zap"])
        self.spawn("kube-apiserver", [
            self.harness, "kube-apiserver", f"--etcd-servers={etcd}", "--secure-port=443", f"--bind-address={self.api}",
            f"--advertise-address={self.address}", "--allow-privileged=true",
            f"--service-cluster-ip-range={self.services}.0/24",
            f"--tls-cert-file={pki}/api.crt", f"--tls-private-key-file={pki}/api.key", f"--client-ca-file={pki}/ca.crt",
            f"--service-account-key-file={pki}/sa.pub", f"--service-account-signing-key-file={pki}/sa.key",
            "--service-account-issuer=https://kubernetes.default.svc", "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction", f"--kubelet-client-certificate={pki}/api.crt",
            f"--kubelet-client-key={pki}/api.key", "--kubelet-preferred-address-types=InternalIP", "--profiling=false"])
        self.until("the API server is ready", 120,
                   lambda: self.kubectl("get", "--raw", "/readyz", check=False).stdout == "ok")
        self.spawn("kube-controller-manager", [
            self.harness, "kube-controller-manager", f"--kubeconfig={self.directory}/controllers.kubeconfig",
            f"--service-account-private-key-file={pki}/sa.key", f"--root-ca-file={pki}/ca.crt", "--secure-port=0",
            "--use-service-account-credentials", "--leader-elect=false"])
        self.spawn("kube-scheduler", [
            self.harness, "kube-scheduler", f"--kubeconfig={self.directory}/scheduler.kubeconfig", "--secure-port=0",
            "--leader-elect=false"])

    def kubelet_configuration(self, authority, **own):
        return {
            "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration", "healthzPort": 0,
            "authentication": {"anonymous": {"enabled": False}, "webhook": {"enabled": True},
                               "x509": {"clientCAFile": str(authority)}},
            "authorization": {"mode": "Webhook"}, "failCgroupV1": False, "failSwapOn": False, "resolvConf": "",
            "containerRuntimeEndpoint": f"unix:///{nodes.SOCKET}", "makeIPTablesUtilChains": False, "oomScoreAdj": 0,
            "evictionHard": {"memory.available": "1Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
            "imageGCHighThresholdPercent": 100, "imageGCLowThresholdPercent": 99, "serializeImagePulls": False,
            "seccompDefault": True, "nodeStatusUpdateFrequency": "5s", "maxPods": 200, **own}

    def start_kubelet(self):
        at = self.directory
        config = self.kubelet_configuration(at / "pki/ca.crt", address=self.address, port=self.ports["kubelet"],
                                            cgroupDriver="cgroupfs", cgroupRoot=f"/{self.name}", volumePluginDir=f"{at}/plugins")
        path = self.write("kubelet.json", json.dumps(config))
        self.spawn("kubelet", [
            "/opt/harness/program", "kubelet", f"--config={path}", f"--kubeconfig={at}/kubelet.kubeconfig",
            f"--hostname-override={NODE}", f"--node-ip={self.address}", f"--cert-dir={at}/kubelet-pki"], inside=True)

    def start_machine(self):
        """The other node's: before the control plane, for both take their time."""
        address = self.pod_address(VM)
        config = self.kubelet_configuration(f"{vm_node.PLACE}/ca.crt", address=address, cgroupDriver="systemd")
        files = {"kubelet.json": json.dumps(config), "ca.crt": (self.directory / "pki/ca.crt").read_text(),
                 "kubeconfig": (self.directory / f"kubelet-{self.vm.name}.kubeconfig").read_text()}
        network = vm_node.Network(self.bridge, f"{self.bridge}v", address, self.address, *map(self.pod_address, VM_PODS))
        self.vm.start(self.harness, network, files, self.node.root / "var/lib/containerd")

    def node_is_ready(self, name=NODE):
        text = self.kubectl("get", "node", name, "-o",
                            "jsonpath={.status.conditions[?(@.type=='Ready')].status}", check=False).stdout
        # Pods need their namespace's account.
        account = self.kubectl("get", "serviceaccount", "default", check=False)
        return text == "True" and account.returncode == 0

    # --- Using ------------------------------------------------------------------------------------------------------

    def environment(self):
        homes = {f"HELM_{kind}_HOME": str(self.directory / "helm" / kind.lower()) for kind in ("CACHE", "CONFIG", "DATA")}
        return dict(os.environ, KUBECONFIG=str(self.directory / "admin.kubeconfig"), HOME=str(self.directory), **homes)

    def kubectl(self, *words, input=None, check=True, timeout=120):
        return self.client(self.kubectl_program, words, input, check, timeout)

    def helm(self, *words, check=True, timeout=240):
        return self.client(self.helm_program, words, None, check, timeout)

    def client(self, program, words, input, check, timeout):
        command = [str(program), *map(str, words)]
        feed = {"input": input} if input is not None else {"stdin": subprocess.DEVNULL}
        done = subprocess.run(command, **feed, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                              timeout=timeout, env=self.environment())
        if check and done.returncode != 0:
            raise AssertionError(f"{program.name} {' '.join(command[1:])}: exit code {done.returncode}\n"
                                 f"{done.stdout}{done.stderr}")
        return done

    def ctr(self, *words, check=True):
        done = self.node.ctr(*words)
        if check and done.returncode != 0:
            raise AssertionError(f"ctr {words}: {done.stdout}{done.stderr}")
        return done

    def until(self, what, seconds, condition):
        end = time.monotonic() + seconds
        while not condition():
            for name, child in self.children:
                if child.poll() is not None:
                    raise Missing(f"{name} ended with {child.returncode} before {what}:\n{self.last_words(name)}")
            if self.vm and self.vm.has_ended():
                raise Missing(f"the virtual machine ended before {what}:\n{self.vm.last_words()}")
            if time.monotonic() > end:
                raise AssertionError(f"{what}: not after {seconds} s")
            time.sleep(0.1)

    def last_words(self, name, lines=15):
        text = (self.directory / f"{name}.log").read_text(errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    # --- Stopping ---------------------------------------------------------------------------------------------------

    def stop(self):
        """Removes all that was made, and returns what is left that was not there before."""
        with contextlib.suppress(Exception):
            self.kubectl("delete", "daemonsets,statefulsets,deployments,jobs,pods", "--all", "--all-namespaces",
                         "--grace-period=0", "--force", "--wait=false", check=False, timeout=20)
            self.until("containers are gone", 30, lambda: not self.ctr("containers", "ls", "-q").stdout.strip())
        if self.vm:
            self.vm.stop()
        for wanted in ("kubelet", "kube-scheduler", "kube-controller-manager", "kube-apiserver", "etcd"):
            for name, child in self.children:
                if name == wanted:
                    tools.end(child, 20)
        self.node.stop_containerd()
        # Whatever still has the cluster's directory among its arguments is a shim, or a program for its pods.
        for _ in range(50):
            left = self.processes()
            if not left:
                break
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        self.node.stop()
        self.remove_cgroups()
        # Pods are gone by now, and so are their ends of it.
        left = self.traces() - self.before if self.before is not None else set()
        left = {one for one in left if one.startswith("link ") and one != f"link {self.bridge}"}
        subprocess.run(["ip", "link", "delete", self.bridge], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for name, value in self.sysctls.items():
            with contextlib.suppress(OSError):
                pathlib.Path("/proc/sys", name).write_text(value)
        shutil.rmtree(self.directory, ignore_errors=True)
        if self.before is None:
            return []
        # Others' sockets come and go.
        for _ in range(20):
            found = self.traces() - self.before
            if not found:
                break
            time.sleep(0.1)
        return sorted(found | left)

    def processes(self):
        """Those that name the cluster's directory, that run on its node (shims), or are in its cgroups; and their children."""
        found, parents = set(), {}
        mark = str(self.directory).encode()
        for entry in os.listdir("/proc"):
            if entry.isdigit() and int(entry) != os.getpid():
                with contextlib.suppress(OSError):
                    if self.node.has(entry) or mark in pathlib.Path("/proc", entry, "cmdline").read_bytes():
                        found.add(int(entry))
                    stat = pathlib.Path("/proc", entry, "stat").read_text()
                    parents[int(entry)] = int(stat.rpartition(")")[2].split()[1])
        for directory in self.cgroups():
            with contextlib.suppress(OSError):
                found.update(int(pid) for pid in (directory / "cgroup.procs").read_text().split() if pid != "0")
        # Shims have one that leaves the node's root.
        found.update(pid for pid, parent in parents.items() if parent in found)
        holder = self.node.holder
        return found - ({holder.pid} if holder and holder.poll() is None else set())

    def sandbox(self, pod):
        """The id of a pod's sandbox."""
        which = f'labels."io.kubernetes.pod.name"=={pod},labels."io.cri-containerd.kind"==sandbox'
        return self.ctr("containers", "ls", "-q", which).stdout.split()[0]

    def cgroups(self):
        found = []
        for root in cgroup_roots():
            for directory, _, _ in os.walk(root / self.name, topdown=False):
                found.append(pathlib.Path(directory))
        return found

    def remove_cgroups(self):
        for _ in range(20):
            for directory in self.cgroups():
                with contextlib.suppress(OSError):
                    directory.rmdir()
            if not self.cgroups():
                return
            time.sleep(0.1)

    def traces(self):
        """What can be left on a machine, and is not another's who works on it meanwhile."""
        found = {f"directory {path}" for path in pathlib.Path(tempfile.gettempdir()).glob(f"{self.directory.name}*")}
        for directory in ("/run/netns", "/run/containerd/runc/k8s.io", "/var/log/pods"):
            with contextlib.suppress(OSError):
                found.update(f"{directory}/{name}" for name in os.listdir(directory))
        found.update(path for path in FOREIGN if os.path.exists(path))
        # Sockets that nobody listens on.
        sockets = pathlib.Path("/proc/net/unix").read_text()
        found.update(str(path) for path in pathlib.Path("/run/containerd/s").glob("*") if str(path) not in sockets)
        found.update(f"cgroup {root / self.name}" for root in cgroup_roots() if (root / self.name).exists())
        if os.path.exists(f"/sys/class/net/{self.bridge}"):
            found.add(f"link {self.bridge}")
            found.update(f"link {link.name}" for link in pathlib.Path(f"/sys/class/net/{self.bridge}/brif").iterdir())
        mounts = (line.split()[4] for line in pathlib.Path("/proc/self/mountinfo").read_text().splitlines())
        found.update(f"mount {path}" for path in mounts if self.directory.name in path or path.startswith(FOREIGN))
        found.update(f"process {pid}" for pid in self.processes())
        for name in self.sysctls:
            found.add(f"{name}={pathlib.Path('/proc/sys', name).read_text().strip()}")
        return found
