"""Boots the machine with a disk of a run's own, passes on what it says, and returns its verdict."""

import json
import os
import pathlib
import re
import secrets
import select
import shlex
import shutil
import subprocess
import sys
import time

from vm_base import run, say, work_directory

# A boot takes 10 s if it is emulated, on a machine that has nothing else to do, and less if it is not.
BOOT_LIMIT = {"tcg": 300, "kvm": 40}
ENVIRONMENT = "export PATH=/opt/runx/bin:$PATH RUNX_DIST=/opt/runx/bin RUNX_TEST_VM=1"

# Through a pipe: what is run shall not see a terminal where it has none elsewhere.
PIPE = """#!/bin/sh
{environment}
stty -F /dev/ttyS1 raw -echo
cd /opt/runx/files
code=0
{{
echo '{marker} begin'
{lines}
printf '\\n%s\\n' "{marker} end $code"
}} </dev/null 2>&1 | cat >/dev/ttyS1
"""
TERMINAL = """#!/bin/sh
{environment}
stty -F /dev/ttyS1 sane -ixon
cd /opt/runx/files
{{
{lines}
}} </dev/ttyS1 >/dev/ttyS1 2>&1
"""


class Failed(Exception):
    """The machine did not do what it was asked for."""

    # Of its console, and of qemu.
    last_words = ()


class NotUp(Failed):
    """It did not even get to what it was asked for."""


class Kvm:
    """Whether machines can be run with the processor's help. /dev/kvm promises more than some hosts keep."""

    def __init__(self, cache):
        # What was found out lasts until the next boot of this machine.
        self.note = cache / "no-kvm"
        self.boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text()

    def promising(self):
        if self.note.exists() and self.note.read_text() == self.boot:
            return False
        try:
            os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
        except OSError:
            return False
        return True

    def disappointed(self):
        self.note.write_text(self.boot)


class Payload:
    """What a run brings with it: programs, files, and a script that ends with the verdict."""

    def __init__(self, directory):
        self.directory = pathlib.Path(directory)
        # What tells the end cannot be written by anybody who does not know it.
        self.nonce = secrets.token_hex(8)
        self.lines = []
        for name in ("bin", "tests", "files"):
            (self.directory / name).mkdir(parents=True)

    def add_programs(self, dist):
        for program in pathlib.Path(dist).iterdir():
            if program.is_file():
                shutil.copy2(program, self.directory / "bin")

    def add_file(self, path):
        path = pathlib.Path(path)
        target = self.directory / "files" / path.name
        if path.is_dir():
            shutil.copytree(path, target, symlinks=True)
        else:
            shutil.copy2(path, target)

    def add_test(self, name, path, arguments):
        shutil.copy2(path, self.directory / "tests" / name)
        command = shlex.join([f"/opt/runx/tests/{name}", "--color", "never", *arguments])
        self.lines += [f"echo '== {name}, in the machine'", f"{command} || {{ code=1; echo '== {name} failed'; }}"]

    def add_command(self, command):
        self.lines += [f"{shlex.join(command)} || code=$?"]

    def image(self, path, emulated, terminal=False):
        """Writes the disk."""
        script = self.directory / "run"
        script.write_text((TERMINAL if terminal else PIPE).format(
            environment=ENVIRONMENT + (" RUNX_TESTS_SLOW=1" if emulated else ""),
            marker=f"RUNX-VM {self.nonce}",
            lines="\n".join(self.lines)))
        script.chmod(0o755)
        used = sum(file.stat().st_size for file in self.directory.rglob("*") if file.is_file())
        size = used * 5 // 4 // 2**20 + 16
        run(["mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal", "-L", "runx-payload", "-d", self.directory, path,
             f"{size}M"], 120)


def qemu(base, payload, console, accelerator, network):
    """The command line. Its standard streams are the machine's second serial line. `network` is what qemu calls a nic."""
    about = json.loads((base / "base.json").read_text())
    drives, devices, disk = {
        # One controller with two namespaces: controllers are numbered in whatever order they answer.
        "nvme": (("system", "payload"), ["nvme,id=c,serial=runx", "nvme-ns,drive=system,bus=c,nsid=1",
                                         "nvme-ns,drive=payload,bus=c,nsid=2"], "nvme0n1"),
        "virtio": (("system", "payload"), ["virtio-blk-pci,drive=system", "virtio-blk-pci,drive=payload"], "vda"),
    }[about["disk"]]
    images = {"system": base / "base.img", "payload": payload}
    command = ["qemu-system-x86_64"]
    # The emulation of cmpxchg16b in qemu 7.2 breaks the kernel.
    command += {"kvm": ["-accel", "kvm", "-cpu", "host"],
                "tcg": ["-accel", "tcg,thread=multi", "-cpu", "max,-cx16"]}[accelerator]
    command += ["-smp", str(min(4, len(os.sched_getaffinity(0)))), "-m", "2048", "-display", "none", "-vga", "none",
                "-monitor", "none", "-nic", network, "-no-reboot", "-serial", f"file:{console}", "-serial", "stdio",
                "-kernel", str(base / "vmlinuz"),
                "-append", f"root=/dev/{disk} rw console=ttyS0 panic=-1 oops=panic quiet systemd.show_status=0"]
    for name in drives:
        command += ["-drive", f"file={images[name]},if=none,id={name},format=raw,snapshot=on,cache=unsafe"]
    for device in devices:
        command += ["-device", device]
    return command


def stop(child):
    """Ends the machine, which has nothing that is worth keeping."""
    if child.poll() is None:
        child.kill()
    child.wait()


def follow(child, nonce, limit, boot_limit):
    """Passes on the machine's output, and returns the verdict."""
    pattern = re.compile(rb"^RUNX-VM " + nonce.encode() + rb" (begin|end (\d+))$")
    started = time.monotonic()
    begun = False
    rest = b""
    while True:
        kind, allowed = (Failed, limit) if begun else (NotUp, min(limit, boot_limit))
        left = started + allowed - time.monotonic()
        if left <= 0:
            raise kind(f"the machine did not {'end' if begun else 'reach its tests'} within {allowed} s")
        if not select.select([child.stdout], [], [], left)[0]:
            continue
        data = os.read(child.stdout.fileno(), 65536)
        if not data:
            raise kind("the machine ended without a verdict" if begun else "the machine ended before its tests")
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            verdict = pattern.match(line)
            if not verdict:
                sys.stdout.buffer.write(line + b"\n")
            elif verdict[2] is None:
                begun = True
                say(f"up after {time.monotonic() - started:.1f} s")
            else:
                sys.stdout.flush()
                say(f"done after {time.monotonic() - started:.1f} s")
                return int(verdict[2])
        sys.stdout.flush()


def command_line(accelerator, base, work, payload, terminal=False, network="none"):
    """Writes the payload's disk, and gives the command that boots it."""
    image = work / "payload.img"
    payload.image(image, emulated=accelerator == "tcg", terminal=terminal)
    say(f"booting ({'with KVM' if accelerator == 'kvm' else 'emulated'})")
    # It ends with us, however we end.
    return ["setpriv", "--pdeathsig", "KILL", "--", *qemu(base, image, work / "console", accelerator, network)]


def boot_terminal(accelerator, base, work, payload):
    """Runs a payload that talks to whoever sits here."""
    child = subprocess.Popen(command_line(accelerator, base, work, payload, terminal=True))
    try:
        return child.wait()
    finally:
        stop(child)


def boot_with(accelerator, base, work, payload, limit, network="none"):
    """Runs a payload to its end: its verdict, and the machine's process, which goes on."""
    console, said = work / "console", work / "qemu"
    command = command_line(accelerator, base, work, payload, network=network)
    with open(said, "wb") as errors:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors,
                                 start_new_session=True)
    try:
        return follow(child, payload.nonce, limit, BOOT_LIMIT[accelerator]), child
    except BaseException as e:
        stop(child)
        if isinstance(e, Failed):
            e.last_words = [line for path in (console, said) if path.exists()
                            for line in path.read_text(errors="replace").splitlines()[-40:]]
        raise


def with_what_works(kvm, accelerator, boot_it):
    """Calls `boot_it` with the accelerator that was asked for, or with the best that gets a machine up."""
    if accelerator is None and kvm.promising():
        try:
            return boot_it("kvm")
        except NotUp as e:
            kvm.disappointed()
            say(f"{e}; without KVM from now on")
    return boot_it(accelerator or "tcg")


def start(base, work, payload, limit, network):
    """Boots a machine that goes on after its payload has ended, which has to end well; to be ended with `stop`."""
    verdict, child = with_what_works(Kvm(base.parent), None, lambda accelerator: boot_with(
        accelerator, base, work, payload, limit, network))
    if verdict != 0:
        stop(child)
        raise Failed(f"what the machine begins with ended with {verdict}")
    return child


def boot(base, prepare_payload, limit, accelerator=None, terminal=False):
    """Runs a payload, which `prepare_payload` fills, to its end."""
    with work_directory(base.parent) as work:
        payload = Payload(work / "payload")
        prepare_payload(payload)

        def boot_it(accelerator):
            if terminal:
                return boot_terminal(accelerator, base, work, payload)
            verdict, child = boot_with(accelerator, base, work, payload, limit)
            stop(child)
            return verdict
        return with_what_works(Kvm(base.parent), accelerator, boot_it)
