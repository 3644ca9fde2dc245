#!/usr/bin/env python3
"""Compares runx with podman: the pull of an image from a registry on this machine, and `run --rm` of `true` from it.

    scripts/bench_images.py --dist DIR [--size MB] [--rounds N] [--json FILE]

It makes the image, starts a registry (docker-registry), and gives both a storage of their own in a temporary directory, which is
removed in the end. Root is needed. The two take turns, and each pull begins without the image.
"""

import argparse
import io
import json
import os
import platform
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

LAYERS = 4
NEEDED = ["docker-registry", "skopeo", "umoci", "podman", "busybox"]


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--dist", required=True, type=Path, help="directory of runx's programs")
    options.add_argument("--size", type=int, default=200, help="the image's size in MB as it is downloaded (default 200)")
    options.add_argument("--rounds", type=int, default=5, help="pulls of each (default 5)")
    options.add_argument("--runs", type=int, default=20, help="runs of each (default 20)")
    options.add_argument("--json", type=Path, help="write the figures to this file, too")
    options = options.parse_args()
    missing = [program for program in NEEDED if not shutil.which(program)]
    if missing or os.geteuid() != 0:
        sys.exit(f"bench_images: SKIPPED: {'it needs ' + ', '.join(missing) if missing else 'it needs root'}")
    # Not in /tmp, which may be a filesystem in memory that overlay cannot write to.
    work = Path(tempfile.mkdtemp(prefix="runx-bench-", dir="/var/tmp"))
    registry = None
    try:
        image = make_image(work, options.size)
        registry, address = start_registry(work)
        name = f"{address}/bench:v1"
        call(["skopeo", "copy", "-q", "--dest-tls-verify=false", image, f"docker://{name}"])
        figures = measure(work, options, name)
    finally:
        if registry:
            registry.send_signal(signal.SIGTERM)
            registry.wait()
        # What containers' storages have mounted.
        for _ in range(100):
            places = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
            places = [place for place in places if place.startswith(f"{work}/")]
            if not places:
                break
            subprocess.run(["umount", "-l", places[-1]], check=False)
        shutil.rmtree(work, ignore_errors=True)
    print(table(figures))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def call(command, **more):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, **more)
    if done.returncode:
        sys.exit(f"bench_images: {' '.join(map(str, command))} failed:\n{done.stderr}")
    return done.stdout


def make_image(work, megabytes):
    """An OCI layout with layers of many small and some large files, half of which can be compressed."""
    layout = work / "layout"
    call(["umoci", "init", "--layout", layout])
    call(["umoci", "new", "--image", f"{layout}:v1"])
    source = random.Random(1)
    for number in range(LAYERS):
        archive = work / "layer.tar"
        with tarfile.open(archive, "w") as tar:
            if number == 0:
                add_file(tar, "bin/busybox", Path(shutil.which("busybox")).read_bytes(), 0o755)
                for link in ["sh", "true"]:
                    entry = tarfile.TarInfo(f"bin/{link}")
                    entry.type, entry.linkname = tarfile.SYMTYPE, "busybox"
                    tar.addfile(entry)
            left = megabytes * 1_000_000 // LAYERS
            count = 0
            while left > 0:
                # Mostly small, as in distributions.
                length = min(left, source.choice([2_000, 8_000, 8_000, 30_000, 30_000, 120_000, 2_000_000]))
                content = source.randbytes(length) + b"text that comes again and again\n" * (length // 32)
                add_file(tar, f"usr/layer{number}/dir{count // 200}/file{count}", content, 0o644)
                left -= length
                count += 1
        call(["umoci", "raw", "add-layer", "--image", f"{layout}:v1", archive])
        archive.unlink()
    call(["umoci", "config", "--image", f"{layout}:v1", "--config.cmd", "sh", "--config.env", "PATH=/bin"])
    return f"oci:{layout}:v1"


def add_file(tar, name, content, mode):
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(content), mode
    tar.addfile(entry, io.BytesIO(content))


def start_registry(work):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    config = work / "registry.yml"
    config.write_text(
        f"version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {work}/registry}}}}\n"
        f"http: {{addr: '{address}'}}\n"
    )
    log = open(work / "registry.log", "w")
    process = subprocess.Popen(["docker-registry", "serve", str(config)], stdout=log, stderr=log)
    host, port = address.split(":")
    for _ in range(100):
        try:
            socket.create_connection((host, int(port))).close()
            return process, address
        except OSError:
            time.sleep(0.1)
    process.kill()
    sys.exit("bench_images: the registry does not start")


def measure(work, options, name):
    # As much as everybody may have, on machines where root may not raise limits.
    config = work / "containers.conf"
    limits = 'default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]'
    config.write_text(f'[containers]\n{limits}\n[engine]\nlock_type = "file"\n')
    os.environ["CONTAINERS_CONF"] = str(config)
    runx = [options.dist / "runx", "--root", work / "runx-state", "--storage-root", work / "runx"]
    podman = ["podman", "--root", work / "podman", "--runroot", work / "podman-run", "--cgroup-manager", "cgroupfs"]
    podman += ["--log-level", "error", "--tmpdir", work / "podman-tmp"]
    # crun refuses machines with both versions of cgroups, and podman asks for it first.
    if shutil.which("runc") and not Path("/sys/fs/cgroup/cgroup.controllers").exists():
        podman += ["--runtime", "runc"]
    pulls = {
        "runx": ([*runx, "storage", "pull", "-q", name], [*runx, "storage", "rm", "--force", name]),
        "podman": ([*podman, "pull", "-q", "--tls-verify=false", name], [*podman, "rmi", "--force", name]),
    }
    pull = {program: [] for program in pulls}
    for round_ in range(options.rounds + 1):
        for program, (fetch, forget) in pulls.items():
            # What others wrote is not this one's to wait for.
            os.sync()
            took = timed(fetch)
            # The first round fills caches.
            if round_:
                pull[program].append(took)
            if round_ < options.rounds:
                call(forget)
    runs = {
        "runx": [*runx, "container", "run", "--rm", "--network", "none", name, "true"],
        "podman": [*podman, "run", "--rm", "--network", "none", name, "true"],
    }
    run = {program: [] for program in runs}
    for round_ in range(options.runs + 1):
        for program, command in runs.items():
            took = timed(command)
            if round_:
                run[program].append(took)
    versions = {
        "runx": call([options.dist / "runx", "--version"]).splitlines()[0],
        "podman": call(["podman", "--version"]).strip(),
    }
    mounts = len(Path("/proc/self/mounts").read_text().splitlines())
    about = (
        f"An image of {options.size} MB in {LAYERS} layers, from a registry on this machine without TLS; each pull begins without it. "
        f"{versions['runx']}, {versions['podman']}, kernel {platform.release().split('-')[0]}, {os.cpu_count()} processors, {mounts} mounts. "
        "What runx has pulled is on the disk when it ends; podman leaves that to the kernel."
    )
    return {
        "about": about,
        "milliseconds": {
            f"pull of {options.size} MB": {program: summary(times) for program, times in pull.items()},
            "run --rm true": {program: summary(times) for program, times in run.items()},
        },
    }


def timed(command):
    begun = time.monotonic()
    call(command)
    return time.monotonic() - begun


def summary(times):
    times = [seconds * 1e3 for seconds in times]
    return {"min": min(times), "median": statistics.median(times), "max": max(times), "rounds": len(times)}


def table(figures):
    lines = [figures["about"], "", f"{'median':24}{'runx':>12}{'podman':>12}{'ratio':>8}"]
    for case, rows in figures["milliseconds"].items():
        ours, theirs = (rows[program]["median"] for program in ("runx", "podman"))
        lines.append(f"{case:24}{ours:9.1f} ms{theirs:9.1f} ms{ours / theirs:8.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
