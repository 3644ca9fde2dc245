"""The machine that tests are run in: a root filesystem of the distribution that runs here, and its kernel.

It is built once and kept in a cache directory, as `base-KEY`: base.img, vmlinuz and base.json. The key is a hash
of what it is made from, this file included.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

PACKAGES = ["systemd-sysv", "dbus", "containerd", "runc", "busybox-static", "uidmap", "iproute2", "kmod", "util-linux",
            "apparmor", "containernetworking-plugins"]
# Not in every distribution; tests say that they are skipped without.
OPTIONAL = ["criu", "iptables"]
# By the distribution's id: the packages whose dependencies are the kernel, the smallest first.
KERNELS = {"debian": ["linux-image-cloud-amd64", "linux-image-amd64"],
           "ubuntu": ["linux-image-virtual", "linux-image-generic"]}
# What a disk can be connected with, and the options of the kernel for it.
DISKS = {"nvme": ["BLK_DEV_NVME"], "virtio": ["VIRTIO_BLK", "VIRTIO_PCI"]}
TOOLS = {"qemu-system-x86_64": "qemu-system-x86", "debootstrap": "debootstrap", "mke2fs": "e2fsprogs",
         "unshare": "util-linux", "setpriv": "util-linux", "dpkg-deb": "dpkg", "apt-get": "apt"}
# Sparse: this is what the tests can fill.
IMAGE_SIZE = "3G"

# The second disk is a run's own: our programs, and what is to be done with them.
START = """#!/bin/sh
# Started by systemd in the virtual machine that runx's tests run in.
mkdir -p /opt/runx
mount -o ro LABEL=runx-payload /opt/runx || exit
exec /opt/runx/run
"""
SERVICE = """[Unit]
Description=What runx's tests do in this machine
After=dbus.service local-fs.target systemd-tmpfiles-setup.service

[Service]
ExecStart=/usr/local/sbin/runx-vm
Environment=HOME=/root LC_ALL=C
Delegate=yes
TasksMax=infinity
TimeoutStartSec=infinity

[Install]
WantedBy=multi-user.target
"""


class Unavailable(Exception):
    """Why there cannot be such a machine here."""


def say(text):
    print(f"vm: {text}", file=sys.stderr, flush=True)


def cache_directory():
    """Where the base is kept."""
    shared = os.environ.get("RUNX_CI_CACHE")
    top = pathlib.Path(__file__).resolve().parent.parent
    target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR") or top / "target")
    return pathlib.Path(shared) / "vm" if shared else target / "vm"


def distribution():
    """The distribution's id and codename."""
    fields = {}
    for line in pathlib.Path("/etc/os-release").read_text().splitlines():
        name, _, value = line.partition("=")
        fields[name] = value.strip('"')
    return fields.get("ID", ""), fields.get("VERSION_CODENAME", "")


def check():
    """Raises Unavailable where no machine can be had."""
    if platform.machine() != "x86_64":
        raise Unavailable(f"the machine is made for amd64, and this is {platform.machine()}")
    if os.geteuid() != 0:
        raise Unavailable("it needs root")
    missing = sorted({package for tool, package in TOOLS.items() if not shutil.which(tool)})
    if missing:
        raise Unavailable(f"missing: {' '.join(missing)}; run scripts/setup test")
    name, codename = distribution()
    if name not in KERNELS or not codename:
        raise Unavailable(f"it is made of Debian or Ubuntu, and this is {name or 'neither'} {codename}".strip())


def run(command, limit, **more):
    """Runs a program to its end, which is Unavailable's reason if it is not a good one."""
    # A group of its own, so that its children end with it.
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                             text=True, errors="replace", start_new_session=True, **more)
    try:
        said, _ = child.communicate(timeout=limit)
    except BaseException as e:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        if isinstance(e, subprocess.TimeoutExpired):
            raise Unavailable(f"{command[0]} did not end within {limit} s") from None
        raise
    if child.returncode != 0:
        last = "\n".join(said.splitlines()[-15:])
        raise Unavailable(f"{' '.join(map(str, command))} failed with {child.returncode}:\n{last}")
    return said


def packages():
    """PACKAGES, and those of OPTIONAL that there are."""
    found = run(["apt-cache", "pkgnames"], 60).split()
    return PACKAGES + [name for name in OPTIONAL if name in found]


def mirror(codename):
    """The address that the machine's own apt has the distribution from, and the components that it uses."""
    form = "$(RELEASE) $(COMPONENT) $(REPO_URI)"
    listed = run(["apt-get", "indextargets", "--no-release-info", "--format", form, "Created-By: Packages"], 60)
    found = [line.split() for line in listed.splitlines()]
    found = [line for line in found if len(line) == 3 and line[0] == codename]
    if not found:
        raise Unavailable(f"apt has no source for {codename}")
    address = found[0][2]
    if address.startswith("mirror+file:"):
        address = pathlib.Path(address.removeprefix("mirror+file:").rstrip("/")).read_text().split()[0]
    components = sorted({line[1] for line in found} & {"main", "universe"})
    return address, components


def proxy():
    """The environment with apt's proxies, which debootstrap's downloads do not ask apt for."""
    environment = dict(os.environ)
    for scheme in ("http", "https"):
        said = run(["apt-config", "dump", "--format", "%v%n", f"Acquire::{scheme}::Proxy"], 60).strip()
        if said and said != "DIRECT":
            environment.setdefault(f"{scheme}_proxy", said)
    return environment


def kernel_packages(name):
    """The packages that hold the kernel and its modules."""
    for meta in KERNELS[name]:
        with contextlib.suppress(Unavailable):
            said = run(["apt-cache", "depends", "--recurse", "--important", meta], 60)
            found = sorted(set(re.findall(r"^(linux-(?:image|modules)-[0-9]\S+)", said, re.M)))
            if found:
                return found
    raise Unavailable(f"apt has none of {' '.join(KERNELS[name])}")


def download_kernel(name, work):
    """Leaves the packages in a directory."""
    for attempt in ("with the lists that are there", "updated"):
        try:
            packages = kernel_packages(name)
            say(f"kernel: {' '.join(packages)}")
            # Not as user _apt, who may not write here.
            run(["apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", *packages], 600, cwd=work)
            return
        except Unavailable:
            if attempt == "updated":
                raise
            say("updating the package lists")
            run(["apt-get", "update", "-qq"], 600)


def install_kernel(name, work, rootfs):
    """Unpacks kernel and modules; returns what the disks have to be connected with."""
    download_kernel(name, work)
    unpacked = work / "kernel"
    unpacked.mkdir()
    for package in work.glob("*.deb"):
        run(["dpkg-deb", "-x", package, unpacked], 300)
    image = next(unpacked.glob("boot/vmlinuz-*"))
    version = image.name.removeprefix("vmlinuz-")
    config = (unpacked / f"boot/config-{version}").read_text()
    # Without an initramfs, what the root filesystem is on has to be built in.
    def built_in(*options):
        return all(f"CONFIG_{option}=y" in config for option in options)

    disks = [kind for kind, options in DISKS.items() if built_in(*options)]
    if not disks or not built_in("EXT4_FS", "DEVTMPFS", "SERIAL_8250_CONSOLE"):
        raise Unavailable(f"the kernel {version} has as modules what it boots from here: ext4, NVMe or virtio-blk")
    shutil.copyfile(image, work / "vmlinuz")
    modules = next(path for path in (unpacked / "lib/modules", unpacked / "usr/lib/modules") if path.is_dir())
    target = rootfs / "usr/lib/modules"
    target.mkdir(parents=True, exist_ok=True)
    run(["cp", "-a", modules / version, target], 300)
    run(["chroot", rootfs, "depmod", version], 300)
    return {"kernel": version, "disk": disks[0]}


def configure(rootfs):
    """Makes it boot into our service, and into little else."""
    units = rootfs / "etc/systemd/system"
    (units / "runx-vm.service").write_text(SERVICE)
    wants = units / "multi-user.target.wants"
    wants.mkdir(exist_ok=True)
    (wants / "runx-vm.service").symlink_to("../runx-vm.service")
    (units / "default.target").symlink_to("/lib/systemd/system/multi-user.target")
    start = rootfs / "usr/local/sbin/runx-vm"
    start.write_text(START)
    start.chmod(0o755)
    # Tests start containerd themselves. The others only make the start slower.
    (wants / "containerd.service").unlink(missing_ok=True)
    for unit in ("getty.target", "serial-getty@ttyS0.service", "timers.target", "systemd-logind.service",
                 "systemd-update-utmp.service", "systemd-update-utmp-runlevel.service", "e2scrub_reap.service"):
        (units / unit).unlink(missing_ok=True)
        (units / unit).symlink_to("/dev/null")
    # With an id it is not a first boot.
    (rootfs / "etc/machine-id").write_text("72756e7800000000000000000000766d\n")
    (rootfs / "etc/hostname").write_text("runx-vm\n")
    # Mounted into containers by those who give them the host's network.
    (rootfs / "etc/hosts").write_text("127.0.0.1 localhost runx-vm\n")
    (rootfs / "etc/resolv.conf").write_text("")
    (rootfs / "etc/fstab").write_text("")
    shutil.rmtree(rootfs / "var/cache/apt", ignore_errors=True)
    shutil.rmtree(rootfs / "var/lib/apt/lists", ignore_errors=True)


def build(work, name, codename):
    """Makes base.img, vmlinuz and base.json in a directory."""
    rootfs = work / "rootfs"
    address, components = mirror(codename)
    say(f"making a root filesystem of {codename} (once)")
    # In namespaces of its own, so that no mount and no process is left, whenever this ends.
    run(["setpriv", "--pdeathsig", "KILL", "--", "unshare", "--mount", "--propagation", "private", "--pid", "--fork",
         "--kill-child", "debootstrap", "--variant=minbase", f"--components={','.join(components)}",
         f"--include={','.join(packages())}", codename, rootfs, address], 1200, env=proxy())
    about = install_kernel(name, work, rootfs)
    configure(rootfs)
    # No journal: every run starts from this image as it is, and no run is taken up again.
    run(["mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal", "-L", "runx-root", "-d", rootfs, work / "base.img",
         IMAGE_SIZE], 300)
    (work / "base.json").write_text(json.dumps(about))
    for path in work.iterdir():
        if path.name == "rootfs" or path.name == "kernel":
            shutil.rmtree(path)
        elif path.name not in ("base.img", "vmlinuz", "base.json"):
            path.unlink()


@contextlib.contextmanager
def work_directory(cache):
    """A directory for a run, removed after it. Those of runs that were killed go first."""
    with open(cache / "runs", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for old in cache.glob("run-*"):
            with contextlib.suppress(BlockingIOError):
                held = hold(old, fcntl.LOCK_NB)
                shutil.rmtree(old, ignore_errors=True)
                os.close(held)
        work = pathlib.Path(tempfile.mkdtemp(prefix="run-", dir=cache))
        held = hold(work, 0)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        os.close(held)


def hold(directory, flags):
    """Locks a directory for as long as the descriptor is open."""
    held = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | flags)
    except OSError:
        os.close(held)
        raise
    return held


def drop_unused(cache):
    """Removes bases that nobody has used for days. Other checkouts may share the cache."""
    for old in cache.glob("base-*"):
        if old.stat().st_mtime < time.time() - 5 * 86400:
            shutil.rmtree(old, ignore_errors=True)


def prepare(cache):
    """The directory of the base, which is built if it is not there."""
    check()
    name, codename = distribution()
    source = pathlib.Path(__file__).read_bytes()
    key = hashlib.sha256(source + f"{name} {codename}".encode()).hexdigest()[:16]
    base = cache / f"base-{key}"
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if base.is_dir():
            os.utime(base)
            return base
        work = cache / f"base-{key}.partial"
        # Of builds that were killed.
        for old in cache.glob("base-*.partial"):
            shutil.rmtree(old, ignore_errors=True)
        work.mkdir()
        try:
            build(work, name, codename)
            work.rename(base)
            drop_unused(cache)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return base
