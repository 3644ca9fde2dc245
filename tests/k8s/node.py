"""The node of the cluster: a root directory of its own in a mount namespace of its own.

containerd and the kubelet run in it as on an ordinary node: with their usual directories, a configuration in
/etc/containerd, and something that restarts services at /run/systemd/private. So what is installed on it is installed as
everywhere, and nothing of the machine is touched. The machine's /usr is there and can only be read, with another containerd
in it where the cluster has another one.
"""

import os
import shlex
import shutil
import signal
import subprocess
import threading
import time

import systemd
import tools
from tools import Missing

CONTAINERD_PROGRAMS = ("containerd", "ctr", "containerd-shim-runc-v2")
CONFIG = "etc/containerd/config.toml"
SOCKET = "run/containerd/containerd.sock"
PAUSE = "runx.test/pause:1"


def copy_if_there(source, target):
    if os.path.exists(source):
        shutil.copyfile(source, target)
    else:
        target.write_text("")


def configuration(version, common, systemd=False):
    """containerd's, as kubeadm's documentation has it. runx is not in it. `common` is for CRI's plugin; with `systemd` that
    makes the cgroups."""
    if version < (2, 0):
        cri = "io.containerd.grpc.v1.cri"
        text = (f'version = 2\n[plugins."{cri}"]\nsandbox_image = "{PAUSE}"\n{common}'
                f'[plugins."{cri}".cni]\n  bin_dir = "/opt/cni/bin"\n  conf_dir = "/etc/cni/net.d"\n')
    else:
        cri = "io.containerd.cri.v1.runtime"
        binaries = 'bin_dir = "{}"' if version < (2, 1) else 'bin_dirs = ["{}"]'
        text = (f'version = 3\nimports = ["/etc/containerd/conf.d/*.toml"]\n'
                f'[plugins."io.containerd.cri.v1.images".pinned_images]\n  sandbox = "{PAUSE}"\n'
                f'[plugins."{cri}"]\n{common}[plugins."{cri}".cni]\n  {binaries.format("/opt/cni/bin")}\n'
                '  conf_dir = "/etc/cni/net.d"\n')
    runc = f'plugins."{cri}".containerd.runtimes.runc'
    text += f'[{runc}]\n  runtime_type = "io.containerd.runc.v2"\n'
    return text + (f"[{runc}.options]\n  SystemdCgroup = true\n" if systemd else "")


class Node:
    """From `start` to `stop`. `directory` is seen under its own name in the node, too."""

    name = "node"

    def __init__(self, directory, programs, version, plugins):
        self.directory, self.programs, self.version, self.plugins = directory, programs, version, plugins
        self.root = directory / "root"
        self.identity = None
        self.holder = None
        self.manager = None
        self.containerd = None
        # How often it was started.
        self.starts = 0
        self.lock = threading.Lock()

    # --- The root ---------------------------------------------------------------------------------------------------

    def start(self, harness):
        self.fill()
        self.identity = os.stat(self.root)
        self.hold(harness)
        self.manager = systemd.Manager(self.root / "run/systemd/private", self)
        self.manager.start()

    def fill(self):
        for name in ("usr", "proc", "sys", "dev", "tmp", ".old", "root", "opt/cni/bin", "opt/harness", "srv", "etc/cni/net.d",
                     "etc/containerd/conf.d", "run/systemd", "var/lib", "var/log", str(self.directory).lstrip("/")):
            (self.root / name).mkdir(parents=True)
        (self.root / "tmp").chmod(0o1777)
        (self.root / "var/run").symlink_to("/run")
        for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
            if os.path.islink(f"/{name}"):
                (self.root / name).symlink_to(os.readlink(f"/{name}"))
            elif os.path.isdir(f"/{name}"):
                (self.root / name).mkdir()
        for name in ("os-release", "passwd", "group", "nsswitch.conf", "ld.so.cache"):
            copy_if_there(f"/etc/{name}", self.root / "etc" / name)
        (self.root / "etc/hosts").write_text("127.0.0.1 localhost\n::1 localhost\n")
        # Pods get a copy.
        (self.root / "etc/resolv.conf").write_text("")

    def hold(self, harness):
        """Starts the process that keeps the namespace."""
        root = shlex.quote(str(self.root))
        lines = ["set -e", "PATH=$PATH:/usr/sbin:/sbin", f"mount --bind {root} {root}", f"cd {root}", "mount --rbind /usr usr"]
        if str(self.programs) != "/usr/bin":
            # What a node has in /usr/bin is found there first.
            lines.append(f"mount -t overlay -o ro,lowerdir={self.programs}:/usr/bin overlay usr/bin")
        lines += [f"[ -L {name} ] || [ ! -d {name} ] || mount --rbind /{name} {name}" for name in ("bin", "sbin", "lib", "lib64")]
        lines += [f"mount --rbind /{name} {name}" for name in ("proc", "sys", "dev")]
        lines += [f"mount --bind {shlex.quote(str(self.plugins))} opt/cni/bin", "touch opt/harness/program",
                  f"mount --bind {shlex.quote(str(harness))} opt/harness/program",
                  f"mount --bind {shlex.quote(str(self.directory))} ./{shlex.quote(str(self.directory))}",
                  "mount -o remount,bind,ro usr", "pivot_root . .old", "umount -l /.old", "cd /",
                  "mount --make-rshared /", "echo ready", "exec sleep infinity"]
        self.holder = subprocess.Popen(["unshare", "--mount", "--propagation", "private", "sh", "-c", "\n".join(lines)],
                                       stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                       start_new_session=True)
        if self.holder.stdout.readline() != "ready\n":
            raise Missing(f"the node's root cannot be made: {self.holder.stderr.read()}")

    def enter(self, *command):
        """A command, as it is run in the node from outside."""
        return ["nsenter", f"--target={self.holder.pid}", "--mount", "--root", "--wd", "--", *map(str, command)]

    def has(self, pid):
        """Whether a process runs on the node, and in no container."""
        try:
            return self.identity is not None and os.path.samestat(os.stat(f"/proc/{pid}/root/"), self.identity)
        except OSError:
            return False

    def run(self, *command):
        """Runs a command in the node, and gives what it printed."""
        done = subprocess.run(self.enter(*command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True, timeout=60)
        if done.returncode != 0:
            raise AssertionError(f"{' '.join(map(str, command))} on the node: exit code {done.returncode}\n{done.stdout}")
        return done.stdout

    def files(self, name="etc/containerd"):
        """All files below a directory of the node and what is in them; directories are there with `None`."""
        top = self.root / name
        return {str(path.relative_to(top)): None if path.is_dir() else path.read_bytes() for path in sorted(top.rglob("*"))}

    def handlers_by_hand(self, name, text):
        """Puts a drop-in beside the installer's, or takes it away, and restarts containerd."""
        path = self.root / "etc/containerd/conf.d" / name
        if text is None:
            path.unlink(missing_ok=True)
        else:
            path.write_text(text)
        if not self.restart_containerd():
            raise AssertionError(f"containerd does not start with {name}:\n{self.log()}")

    # --- containerd -------------------------------------------------------------------------------------------------

    def configure(self):
        """With what this machine asks for."""
        common = "restrict_oom_score_adj = true\nenable_unprivileged_ports = true\nenable_unprivileged_icmp = true\n"
        (self.root / CONFIG).write_text(configuration(self.version, common))

    def start_containerd(self):
        """Tells whether it answers."""
        with self.lock:
            return self.start_locked()

    def start_locked(self):
        # Sockets stay where a process has been killed.
        for name in (SOCKET, f"{SOCKET}.ttrpc"):
            (self.root / name).unlink(missing_ok=True)
        environment = {**os.environ, "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        with open(self.directory / "containerd.log", "ab") as log:
            child = subprocess.Popen(self.enter("/usr/bin/containerd"), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                     start_new_session=True, env=environment)
        self.containerd = child
        self.starts += 1
        end = time.monotonic() + 60
        while child.poll() is None and time.monotonic() < end:
            if self.ctr("version").returncode == 0:
                return True
            time.sleep(0.1)
        return False

    def stop_containerd(self):
        with self.lock:
            self.stop_locked()

    def stop_locked(self):
        """It alone, as a service whose KillMode is process: its shims stay."""
        child = self.containerd
        self.containerd = None
        if child:
            tools.end(child, 30)

    def restart_containerd(self):
        with self.lock:
            self.stop_locked()
            return self.start_locked()

    def ctr(self, *words):
        command = [self.programs / "ctr", "--address", self.root / SOCKET, "--namespace", "k8s.io", *words]
        # Newer ones warn on standard error.
        return subprocess.run([str(word) for word in command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True)

    def log(self, lines=15):
        path = self.directory / "containerd.log"
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else ""

    # --- Ending -----------------------------------------------------------------------------------------------------

    def stop(self):
        if self.manager:
            self.manager.stop()
        if self.holder:
            if self.holder.poll() is None:
                os.kill(self.holder.pid, signal.SIGKILL)
            self.holder.wait()
            self.holder.stdout.close()
            self.holder.stderr.close()
