"""Another node of the cluster: the virtual machine of scripts/vm, with cgroup version 2, systemd as its init, containerd as
systemd's service, and a kubelet whose cgroups are systemd's slices.

Its network is a part of the cluster's: a tap device on the bridge here is the card of the machine, which is on a bridge there,
and so its pods are reached from here as those of this machine.
"""

import base64
import contextlib
import dataclasses
import io
import ipaddress
import json
import os
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import tarfile

import node as nodes
import tools
from tools import Missing

sys.path.insert(0, str(tools.TOP / "scripts"))
import vm_base  # noqa: E402
import vm_boot  # noqa: E402

Unavailable = vm_base.Unavailable
# The machine is new each time, and nobody else is in it.
PORT = 7000
PLACE = "/srv/node"

# Commands come over the network: the secret and a script in base64; back goes what it says, and a line with its exit code.
CONTROL = """#!/bin/sh
read -r secret
[ "$secret" = "{secret}" ] || exit 1
read -r script
sh -c "$(printf %s "$script" | base64 -d)" 2>&1
printf '\\n%d' $?
"""
UNITS = {
    "control.socket": """[Socket]
ListenStream={port}
Accept=yes
""",
    "control@.service": """[Service]
ExecStart=/bin/sh {place}/control
StandardInput=socket
StandardOutput=socket
Environment=HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
""",
    "kubelet.service": """[Unit]
After=containerd.service

[Service]
ExecStart={place}/harness kubelet --config={place}/kubelet.json --kubeconfig={place}/kubeconfig \
    --hostname-override={name} --node-ip={address}
Restart=on-failure
RestartSec=2
"""}
# What is brought is moved away from where runx is going to be installed.
BEGIN = """set -e
mkdir {place} /opt/cni
mount --bind /opt/runx/files {place}
umount --lazy /opt/runx
rmdir /opt/runx
ln -s /usr/lib/cni /opt/cni/bin
cp {place}/programs/* /usr/bin
rm -rf /var/lib/containerd
cp -a {place}/store /var/lib/containerd
mkdir -p /etc/containerd/conf.d /etc/cni/net.d
cp {place}/config.toml /etc/containerd
cp {place}/network.conflist /etc/cni/net.d/10-network.conflist
modprobe -a virtio_net bridge veth overlay
card=
for path in /sys/class/net/*; do [ ! -e $path/device ] || card=${{path##*/}}; done
[ -n "$card" ]
ip link add pods type bridge
ip address add {address}/24 dev pods
ip link set "$card" master pods up
ip link set pods up
ip route add default via {gateway}
cp {place}/units/* /run/systemd/system
systemctl daemon-reload
systemctl start control.socket containerd.service
"""


@dataclasses.dataclass
class Network:
    """Where its card is connected to, under which name; its address, that of the way out, and the addresses of its pods."""

    bridge: str
    tap: str
    address: str
    gateway: str
    first: str
    last: str

    def plugins(self):
        """For CNI."""
        addresses = {"subnet": str(ipaddress.ip_network(f"{self.gateway}/24", strict=False)), "gateway": self.gateway,
                     "rangeStart": self.first, "rangeEnd": self.last}
        return {"cniVersion": "0.4.0", "name": "pods", "plugins": [{
            "type": "bridge", "bridge": "pods",
            "ipam": {"type": "host-local", "ranges": [[addresses]], "routes": [{"dst": "0.0.0.0/0"}]}}]}


def base():
    """The machine's disk and kernel; raises `Unavailable` where there can be none."""
    if not os.path.exists("/dev/net/tun"):
        raise Unavailable("the kernel has no tap devices, which are its network: there is no /dev/net/tun")
    return vm_base.prepare(vm_base.cache_directory())


class VmNode:
    """From `start` to `stop`."""

    name = "vm"

    def __init__(self, base, directory, programs, version):
        self.base, self.directory, self.programs, self.version = base, directory / "vm", programs, version
        self.secret = secrets.token_hex(16)
        self.address = None
        self.tap = None
        self.machine = None

    def start(self, harness, network, kubelet, store):
        """Boots it. `kubelet` is what is in the kubelet's files, `store` that of a containerd that has the images: to import
        them would take the machine minutes."""
        self.address = network.address
        for words in (["tuntap", "add", network.tap, "mode", "tap"], ["link", "set", network.tap, "master", network.bridge, "up"]):
            tools.run(["ip", *words], "make a network card for the virtual machine")
            self.tap = network.tap
        payload = vm_boot.Payload(self.directory / "payload")
        files = payload.directory / "files"
        place = {"place": PLACE, "port": PORT, "name": self.name, "address": network.address, "gateway": network.gateway}
        for name, text in {
                "begin": BEGIN.format(**place), "control": CONTROL.format(secret=self.secret),
                "network.conflist": json.dumps(network.plugins()), **kubelet,
                "config.toml": nodes.configuration(self.version, "", systemd=True),
                **{f"units/{name}": text.format(**place) for name, text in UNITS.items()}}.items():
            path = files / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        shutil.copy2(harness, files / "harness")
        (files / "programs").mkdir()
        for name in nodes.CONTAINERD_PROGRAMS:
            shutil.copy2(self.programs / name, files / "programs")
        tools.run(["cp", "-a", store, files / "store"], "copy the images")
        payload.add_command(["sh", "begin"])
        card = f"tap,ifname={network.tap},script=no,downscript=no,model=virtio-net-pci"
        try:
            self.machine = vm_boot.start(self.base, self.directory, payload, 300, card)
        except vm_boot.Failed as e:
            raise Missing("\n".join([str(e), *e.last_words])) from None
        shutil.rmtree(payload.directory)

    def start_kubelet(self):
        self.run("systemctl", "start", "kubelet.service")

    def has_ended(self):
        return self.machine is not None and self.machine.poll() is not None

    # --- Using ------------------------------------------------------------------------------------------------------

    def shell(self, script, timeout=120):
        """Runs a script in the machine, as root and outside of any container: its exit code and what it said, in bytes."""
        with socket.create_connection((self.address, PORT), timeout=timeout) as connection:
            connection.sendall(f"{self.secret}\n{base64.b64encode(script.encode()).decode()}\n".encode())
            connection.shutdown(socket.SHUT_WR)
            said = b"".join(iter(lambda: connection.recv(1 << 16), b""))
        text, _, code = said.rpartition(b"\n")
        if not code.isdigit():
            raise AssertionError(f"{script}: the virtual machine did not end it:\n{said.decode(errors='replace')}")
        return int(code), text

    def run(self, *command, timeout=120):
        """Runs a command in the machine, and gives what it printed."""
        code, said = self.shell(shlex.join(map(str, command)), timeout)
        if code != 0:
            raise AssertionError(f"{' '.join(map(str, command))} in the virtual machine: exit code {code}\n"
                                 f"{said.decode(errors='replace')}")
        return said.decode(errors="replace")

    def files(self, name="etc/containerd"):
        """All files below a directory of the machine and what is in them; directories are there with `None`."""
        code, said = self.shell(f"tar -C /{name} -c . 2>/dev/null")
        assert code == 0, f"/{name} is not read: {said!r}"
        with tarfile.open(fileobj=io.BytesIO(said)) as archive:
            return {one.name.removeprefix("./"): None if one.isdir() else archive.extractfile(one).read() if one.isfile()
                    else one.linkname for one in archive if one.name != "."}

    def last_words(self, lines=30):
        """What its services have said last."""
        try:
            return self.run("journalctl", "--no-pager", "--lines", lines, "--output", "cat", "--unit", "kubelet",
                            "--unit", "containerd")
        except (AssertionError, OSError) as e:
            console = self.directory / "console"
            last = console.read_text(errors="replace").splitlines()[-lines:] if console.exists() else []
            return "\n".join([f"{e}; its console:", *last])

    # --- Ending -----------------------------------------------------------------------------------------------------

    def stop(self):
        if self.machine:
            vm_boot.stop(self.machine)
            self.machine.stdout.close()
        if self.tap:
            with contextlib.suppress(OSError):
                subprocess.run(["ip", "link", "delete", self.tap], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
