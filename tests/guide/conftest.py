"""runx on the path, and an image to begin with."""

import os
import pathlib
import shutil
import subprocess

import pytest

os.environ["PATH"] = f"{os.environ['RUNX_DIST']}:{os.environ['PATH']}"


@pytest.fixture
def image(tmp_path):
    """busybox as an image, by the name `busybox`."""
    rootfs = tmp_path / "rootfs"
    for name in ("bin", "etc", "tmp", "proc", "sys", "dev"):
        (rootfs / name).mkdir(parents=True)
    shutil.copy(shutil.which("busybox"), rootfs / "bin/busybox")
    subprocess.run(["chroot", rootfs, "/bin/busybox", "--install", "-s", "/bin"], check=True)
    pathlib.Path(rootfs, "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n")
    pathlib.Path(rootfs, "etc/group").write_text("root:x:0:\nnobody:x:65534:\n")
    subprocess.run(["runx", "storage", "import", rootfs, "busybox"], check=True, capture_output=True)
    yield "busybox"
    subprocess.run(["runx", "storage", "rm", "--force", "busybox"], capture_output=True, check=False)
