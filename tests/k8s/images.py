"""The images of the tests, made of a static busybox and of WebAssembly in text form; and that of the node's installer, as
deploy/Dockerfile says it."""

import hashlib
import json
import pathlib
import shutil
import subprocess
import tempfile

import tools

INSTALLER = "runx.test/runx-node"
BOX, PAUSE, HELLO, TICK, TRAP, MISSING = (
    f"runx.test/{name}:1" for name in ("box", "pause", "hello", "tick", "trap", "missing"))

# Says a line a second, for ever.
TICK_MODULE = """(module
  (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "poll_oneoff" (func $poll (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 64)
  (data (i32.const 64) "tick\\n")
  (func (export "_start")
    (i32.store (i32.const 0) (i32.const 64))
    (i32.store (i32.const 4) (i32.const 5))
    ;; A subscription: a monotonic clock, a second from now.
    (i32.store (i32.const 144) (i32.const 1))
    (i64.store (i32.const 152) (i64.const 1000000000))
    ;; Memory that is used counts.
    (memory.fill (i32.const 65536) (i32.const 7) (i32.const 3000000))
    (loop $again
      (drop (call $fd_write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 32)))
      (drop (call $poll (i32.const 128) (i32.const 256) (i32.const 1) (i32.const 40)))
      (br $again))))
"""
TRAP_MODULE = """(module
  (func $deep unreachable)
  (func (export "_start") (call $deep)))
"""


def box(directory):
    for name in ("bin", "tmp", "etc", "root"):
        (directory / name).mkdir()
    busybox = directory / "bin/busybox"
    shutil.copy(shutil.which("busybox"), busybox)
    for name in subprocess.run([busybox, "--list"], stdout=subprocess.PIPE, text=True).stdout.split():
        if name != "busybox":
            (directory / "bin" / name).symlink_to("busybox")


def module(name, text):
    def fill(directory):
        (directory / name).write_text(text)
    return fill


def hello(directory):
    shutil.copy(tools.TOP / "scripts/hello.wat", directory / "hello.wat")
    (directory / "message.txt").write_text("a file of the image\n")


IMAGES = {
    BOX: (box, ["/bin/sh"]),
    PAUSE: (box, ["/bin/sleep", "2147483647"]),
    HELLO: (hello, ["/hello.wat"]),
    TICK: (module("tick.wat", TICK_MODULE), ["/tick.wat"]),
    TRAP: (module("trap.wat", TRAP_MODULE), ["/trap.wat"]),
    MISSING: (box, ["/no/such/program"]),
}

def make(cluster, name, fill, entrypoint):
    with tempfile.TemporaryDirectory(dir=cluster.directory) as temporary:
        work = pathlib.Path(temporary)
        (work / "rootfs").mkdir()
        (work / "rootfs").chmod(0o755)
        fill(work / "rootfs")
        tools.run([tools.TOP / "scripts/image", work / "image.tar", name, work / "rootfs", json.dumps(entrypoint)],
                  "make an image")
        cluster.ctr("image", "import", work / "image.tar")


def load(cluster):
    for name, (fill, entrypoint) in IMAGES.items():
        make(cluster, name, fill, entrypoint)


def write_sums(directory):
    """The digests of programs that were changed, as `make build` would have written them."""
    path = directory / "SHA256SUMS"
    lines = []
    for digest, name in (line.split("  ") for line in path.read_text().splitlines()):
        if (directory / name).exists():
            digest = hashlib.sha256((directory / name).read_bytes()).hexdigest()
        lines.append(f"{digest}  {name}\n")
    path.write_text("".join(lines))


def load_installer(cluster, tag, change=None, damaged=False):
    """The image of deploy/Dockerfile. `change` is given the directory of its programs first; with `damaged` the digests in it stay."""
    lines = [line.split() for line in (tools.TOP / "deploy/Dockerfile").read_text().splitlines()]
    copies = [line[1:] for line in lines if line[:1] == ["COPY"]]
    entrypoint = next(" ".join(line[1:]) for line in lines if line[:1] == ["ENTRYPOINT"])
    assert copies and ["FROM", "scratch"] in lines, "deploy/Dockerfile is not what it was"

    def fill(directory):
        for *sources, target in copies:
            place = directory / target.strip("/")
            place.mkdir(exist_ok=True)
            for source in sources:
                shutil.copy(cluster.dist / source, place / source)
        if change:
            change(directory / "programs")
            if not damaged:
                write_sums(directory / "programs")
    make(cluster, f"{INSTALLER}:{tag}", fill, json.loads(entrypoint))
