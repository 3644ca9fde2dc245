"""A Kubernetes cluster of one node on this machine, with directories, ports, addresses and cgroups of its own.

containerd and the kubelet run in a mount namespace of their own, where the directories that the kubelet has fixed names
for lie in the cluster's: what they mount goes with them. Everything else that is made is removed by `Cluster.stop`.
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

import tools
from tools import Missing, say

NODE = "node"
# The kubelet sets these, and wants no other values; a bridge makes the machine a router.
SYSCTLS = ("vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops", "kernel/keys/root_maxkeys",
           "kernel/keys/root_maxbytes", "net/ipv4/ip_forward")
# Names that are compiled into the kubelet, and where their content is put.
FIXED = {"/var/lib/kubelet": "var-lib-kubelet", "/var/log/containers": "var-log-containers"}
PAUSE = "runx.test/pause:1"


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def cgroup_roots():
    base = pathlib.Path("/sys/fs/cgroup")
    if (base / "cgroup.controllers").exists():
        return [base]
    # A controller's link leads to the hierarchy that it shares with another.
    return sorted({path.resolve() for path in base.iterdir() if (path / "cgroup.procs").exists()})


class Cluster:
    """A cluster that runs from its `start` to its `stop`."""

    def __init__(self, dist):
        self.dist = pathlib.Path(dist).resolve()
        self.harness = tools.harness()
        self.kubectl_program, self.helm_program = tools.kubectl_and_helm()
        self.containerd_directory, self.containerd_version = tools.containerd()
        self.plugins = tools.cni_plugins()
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix="runx-k8s-"))
        self.name = self.directory.name.replace("_", "-").lower()
        self.children = []
        self.holder = None
        self.sysctls = {}
        self.made = []
        self.bridge = f"rk{os.getpid():x}"
        self.second = 64 + os.getpid() % 128
        self.third = os.getpid() // 128 % 256
        self.address = f"10.{self.second}.{self.third}.1"
        self.ports = {name: free_port() for name in ("etcd", "peer", "api", "kubelet")}
        self.before = None

    # --- Starting ---------------------------------------------------------------------------------------------------

    def start(self):
        began = time.monotonic()
        for name in SYSCTLS:
            with contextlib.suppress(OSError):
                self.sysctls[name] = pathlib.Path("/proc/sys", name).read_text()
        self.before = self.traces()
        self.make_network()
        self.make_certificates()
        self.make_cgroups()
        self.hold_namespace()
        self.start_containerd()
        self.start_control_plane()
        self.start_kubelet()
        self.until("the node is ready", 120, self.node_is_ready)
        say(f"Kubernetes {tools.kubernetes_version()} with containerd {'.'.join(map(str, self.containerd_version))} "
            f"is up after {time.monotonic() - began:.0f} s")

    def make_network(self):
        for words in (["link", "add", self.bridge, "type", "bridge"],
                      ["address", "add", f"{self.address}/24", "dev", self.bridge],
                      ["link", "set", self.bridge, "up"]):
            tools.run(["ip", *words], "make the pods' network")
        network = {"cniVersion": "0.4.0", "name": self.bridge, "plugins": [{
            "type": "bridge", "bridge": self.bridge, "isGateway": True,
            "ipam": {"type": "host-local", "dataDir": str(self.directory / "ipam"),
                     "ranges": [[{"subnet": f"10.{self.second}.{self.third}.0/24", "gateway": self.address}]],
                     "routes": [{"dst": "0.0.0.0/0"}]}}]}
        self.write("cni/10-network.conflist", json.dumps(network))

    def write(self, name, text):
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def make_certificates(self):
        pki = self.directory / "pki"
        pki.mkdir(mode=0o700)
        def openssl(*words):
            tools.run(["openssl", *words], "make certificates", cwd=pki)
        openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "ca.key", "-out", "ca.crt", "-days", "2",
                "-subj", "/CN=runx-k8s")
        openssl("genrsa", "-out", "sa.key", "2048")
        openssl("rsa", "-in", "sa.key", "-pubout", "-out", "sa.pub")
        names = {"admin": "/O=system:masters/CN=admin", "kubelet": f"/O=system:nodes/CN=system:node:{NODE}",
                 "controllers": "/CN=system:kube-controller-manager", "scheduler": "/CN=system:kube-scheduler",
                 "api": "/O=system:masters/CN=kube-apiserver"}
        for name, subject in names.items():
            extensions = "extendedKeyUsage=clientAuth,serverAuth\n"
            if name == "api":
                extensions += f"subjectAltName=IP:127.0.0.1,IP:{self.address}\n"
            (pki / f"{name}.ext").write_text(extensions)
            openssl("req", "-newkey", "rsa:2048", "-nodes", "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj",
                    subject)
            openssl("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial",
                    "-days", "2", "-extfile", f"{name}.ext", "-out", f"{name}.crt")
            if name != "api":
                self.write(f"{name}.kubeconfig", json.dumps({
                    "apiVersion": "v1", "kind": "Config", "current-context": "c",
                    "clusters": [{"name": "c", "cluster": {
                        "server": f"https://127.0.0.1:{self.ports['api']}", "certificate-authority": f"{pki}/ca.crt"}}],
                    "users": [{"name": "u", "user": {
                        "client-certificate": f"{pki}/{name}.crt", "client-key": f"{pki}/{name}.key"}}],
                    "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}]}))

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

    def hold_namespace(self):
        binds = []
        for target, name in FIXED.items():
            (self.directory / name).mkdir()
            if not os.path.isdir(target):
                os.mkdir(target)
                self.made.append(target)
            binds.append(f"mount --bind {self.directory / name} {target}")
        script = " && ".join(["mount --make-rshared /", *binds, "echo ready", "exec sleep infinity"])
        self.holder = subprocess.Popen(["unshare", "--mount", "--propagation", "slave", "sh", "-c", script],
                                       stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
        if self.holder.stdout.readline() != "ready\n":
            raise Missing("the mount namespace cannot be made")

    def spawn(self, name, command, inside=False, **options):
        if inside:
            command = ["nsenter", "--mount", f"--target={self.holder.pid}", *command]
        log = open(self.directory / f"{name}.log", "wb")
        child = subprocess.Popen([str(word) for word in command], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                 start_new_session=True, **options)
        self.children.append((name, child))
        return child

    def drop_in(self):
        """What deploy/ gives for this containerd, with the shim that was just built."""
        version = 2 if self.containerd_version < (2, 0) else 3
        text = (tools.TOP / f"deploy/containerd/runx-v{version}.toml").read_text()
        return text.replace("/usr/local/bin/containerd-shim-runx-v1", str(self.dist / "containerd-shim-runx-v1"))

    def start_containerd(self):
        at = self.directory
        runc = '[plugins."{}".containerd.runtimes.runc]\n  runtime_type = "io.containerd.runc.v2"\n'
        common = "restrict_oom_score_adj = true\nenable_unprivileged_ports = true\nenable_unprivileged_icmp = true\n"
        head = (f'root = "{at}/root"\nstate = "{at}/state"\n[grpc]\n  address = "{at}/c.sock"\n[ttrpc]\n'
                f'  address = "{at}/c.sock.ttrpc"\n[debug]\n  address = "{at}/debug.sock"\n'
                '[plugins."io.containerd.nri.v1.nri"]\n  disable = true\n')
        if self.containerd_version < (2, 0):
            cri = "io.containerd.grpc.v1.cri"
            text = (f'version = 2\n{head}[plugins."{cri}"]\nsandbox_image = "{PAUSE}"\n{common}'
                    f'netns_mounts_under_state_dir = true\n[plugins."{cri}".cni]\n  bin_dir = "{self.plugins}"\n'
                    f'  conf_dir = "{at}/cni"\n' + runc.format(cri) + self.drop_in().replace("version = 2\n", ""))
        else:
            cri = "io.containerd.cri.v1.runtime"
            binaries = "bin_dir = \"%s\"" if self.containerd_version < (2, 1) else "bin_dirs = [\"%s\"]"
            text = (f'version = 3\nimports = ["{at}/conf.d/*.toml"]\n{head}'
                    f'[plugins."io.containerd.cri.v1.images".pinned_images]\n  sandbox = "{PAUSE}"\n'
                    f'[plugins."{cri}"]\n{common}netns_mounts_under_state_dir = true\n[plugins."{cri}".cni]\n'
                    f'  {binaries % self.plugins}\n  conf_dir = "{at}/cni"\n' + runc.format(cri))
            self.write("conf.d/runx.toml", self.drop_in())
        config = self.write("containerd.toml", text)
        path = os.pathsep.join([str(self.containerd_directory), os.environ["PATH"], "/usr/sbin", "/sbin"])
        self.spawn("containerd", [self.containerd_directory / "containerd", "-c", config], inside=True,
                   env=dict(os.environ, PATH=path))
        self.until("containerd answers", 30, lambda: self.ctr("version", check=False).returncode == 0)

    def start_control_plane(self):
        pki, port = self.directory / "pki", self.ports
        etcd = f"http://127.0.0.1:{port['etcd']}"
        peer = f"http://127.0.0.1:{port['peer']}"
        self.spawn("etcd", [
            self.harness, "etcd", f"--data-dir={self.directory}/etcd", f"--listen-client-urls={etcd}",
            f"--advertise-client-urls={etcd}", f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=default={peer}", "--unsafe-no-fsync", "--logger=zap"])
        self.spawn("kube-apiserver", [
            self.harness, "kube-apiserver", f"--etcd-servers={etcd}", f"--secure-port={port['api']}",
            "--bind-address=127.0.0.1", f"--advertise-address={self.address}", "--allow-privileged=true",
            f"--service-cluster-ip-range=10.{self.second}.{(self.third + 1) % 256}.0/24",
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

    def start_kubelet(self):
        at = self.directory
        config = {
            "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
            "address": self.address, "port": self.ports["kubelet"], "healthzPort": 0,
            "authentication": {"anonymous": {"enabled": False}, "webhook": {"enabled": True},
                               "x509": {"clientCAFile": f"{at}/pki/ca.crt"}},
            "authorization": {"mode": "Webhook"},
            "cgroupDriver": "cgroupfs", "cgroupRoot": f"/{self.name}", "failCgroupV1": False, "failSwapOn": False,
            "containerRuntimeEndpoint": f"unix://{at}/c.sock", "resolvConf": "", "podLogsDir": f"{at}/pods",
            "volumePluginDir": f"{at}/plugins", "makeIPTablesUtilChains": False, "oomScoreAdj": 0,
            "evictionHard": {"memory.available": "1Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
            "imageGCHighThresholdPercent": 100, "imageGCLowThresholdPercent": 99, "serializeImagePulls": False,
            "seccompDefault": True, "nodeStatusUpdateFrequency": "5s", "maxPods": 200,
        }
        path = self.write("kubelet.json", json.dumps(config))
        self.spawn("kubelet", [
            self.harness, "kubelet", f"--config={path}", f"--kubeconfig={at}/kubelet.kubeconfig",
            f"--hostname-override={NODE}", f"--node-ip={self.address}", f"--root-dir=/var/lib/kubelet",
            f"--cert-dir={at}/kubelet-pki",
            # For the network's numbers, which CRI's do not have.
            f"--containerd={at}/c.sock"], inside=True)

    def node_is_ready(self):
        text = self.kubectl("get", "node", NODE, "-o",
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

    def helm(self, *words, check=True):
        return self.client(self.helm_program, words, None, check, 120)

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
        command = [self.containerd_directory / "ctr", "--address", self.directory / "c.sock", "--namespace", "k8s.io"]
        done = subprocess.run([str(word) for word in [*command, *words]], stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if check and done.returncode != 0:
            raise AssertionError(f"ctr {words}: {done.stdout}")
        return done

    def until(self, what, seconds, condition):
        end = time.monotonic() + seconds
        while not condition():
            for name, child in self.children:
                if child.poll() is not None:
                    raise Missing(f"{name} ended with {child.returncode} before {what}:\n{self.last_words(name)}")
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
            self.kubectl("delete", "pods,deployments,jobs", "--all", "--all-namespaces", "--grace-period=0", "--force",
                         "--wait=false", check=False, timeout=20)
            self.until("containers are gone", 30, lambda: not self.ctr("containers", "ls", "-q").stdout.strip())
        names = ["kubelet", "kube-scheduler", "kube-controller-manager", "kube-apiserver", "etcd", "containerd"]
        for wanted in names:
            for name, child in self.children:
                if name == wanted:
                    self.end(child)
        # Whatever still has the cluster's directory among its arguments is a shim, or a program for its pods.
        for _ in range(50):
            left = self.processes()
            if not left:
                break
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        if self.holder:
            self.end(self.holder)
        self.remove_cgroups()
        # Pods are gone by now, and so are their ends of it.
        left = self.traces() - self.before if self.before is not None else set()
        left = {one for one in left if one.startswith("link ") and one != f"link {self.bridge}"}
        subprocess.run(["ip", "link", "delete", self.bridge], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for name, value in self.sysctls.items():
            with contextlib.suppress(OSError):
                pathlib.Path("/proc/sys", name).write_text(value)
        for directory in self.made:
            with contextlib.suppress(OSError):
                os.rmdir(directory)
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

    def end(self, child):
        if child.poll() is None:
            child.terminate()
            try:
                child.wait(timeout=20)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()

    def processes(self):
        """Those that name the cluster's directory, or are in its cgroups."""
        found = set()
        mark = str(self.directory).encode()
        for entry in os.listdir("/proc"):
            if entry.isdigit() and int(entry) != os.getpid():
                with contextlib.suppress(OSError):
                    if mark in pathlib.Path("/proc", entry, "cmdline").read_bytes():
                        found.add(int(entry))
        for directory in self.cgroups():
            with contextlib.suppress(OSError):
                found.update(int(pid) for pid in (directory / "cgroup.procs").read_text().split() if pid != "0")
        holder = {self.holder.pid} if self.holder and self.holder.poll() is None else set()
        return found - holder

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
        for directory in ("/run/netns", "/run/containerd/runx/k8s.io", "/run/containerd/runc/k8s.io", "/var/log/pods"):
            with contextlib.suppress(OSError):
                found.update(f"{directory}/{name}" for name in os.listdir(directory))
        found.update(path for path in FIXED if os.path.exists(path))
        # Sockets that nobody listens on.
        sockets = pathlib.Path("/proc/net/unix").read_text()
        found.update(str(path) for path in pathlib.Path("/run/containerd/s").glob("*") if str(path) not in sockets)
        found.update(f"cgroup {root / self.name}" for root in cgroup_roots() if (root / self.name).exists())
        if os.path.exists(f"/sys/class/net/{self.bridge}"):
            found.add(f"link {self.bridge}")
            found.update(f"link {link.name}" for link in pathlib.Path(f"/sys/class/net/{self.bridge}/brif").iterdir())
        mounts = (line.split()[4] for line in pathlib.Path("/proc/self/mountinfo").read_text().splitlines())
        found.update(f"mount {path}" for path in mounts if self.directory.name in path or path.startswith(tuple(FIXED)))
        found.update(f"process {pid}" for pid in self.processes())
        for name in self.sysctls:
            found.add(f"{name}={pathlib.Path('/proc/sys', name).read_text().strip()}")
        return found
