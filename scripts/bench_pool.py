#!/usr/bin/env python3
"""Compares executions in the pool with the machine's floor and with sandboxes that are made for one program, all in one run.

    scripts/bench_pool.py --dist DIR --programs DIR [--rounds N] [--format table|json] [--json FILE]

Each case is measured in turns with the others, so that a busy machine is busy for all; once more with 1,500 mounts on the machine, in a
mount namespace of its own that has them.
"""

import argparse
import contextlib
import json
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

MOUNTS = 1500
WARM = 500
RUNNING = 50


def timed(command, rounds):
    times = []
    for _ in range(rounds):
        begun = time.perf_counter()
        subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
        times.append((time.perf_counter() - begun) * 1e3)
    times.sort()
    return {"min": times[0], "p50": statistics.median(times), "p90": times[len(times) * 9 // 10], "p99": times[len(times) * 99 // 100]}


def peers():
    """Sandboxes for one program, with as much of their own as the pool's have."""
    found = {}
    if shutil.which("bwrap"):
        found["bwrap --unshare-all"] = ["bwrap", "--unshare-all", "--die-with-parent", "--ro-bind", "/usr", "/usr", "--symlink", "usr/bin", "/bin", "--symlink",
                                        "usr/lib", "/lib", "--symlink", "usr/lib64", "/lib64", "--proc", "/proc", "--dev", "/dev", "--tmpfs",
                                        "/tmp", "--tmpfs", "/w"]
    if shutil.which("unshare"):
        found["unshare -mpinuC -f"] = ["unshare", "-mpinuC", "-f", "--kill-child"]
    return found


def pooled(programs, program, rounds):
    """The rows that the pool's own program prints."""
    text = subprocess.run([programs / "examples" / "pool-bench", str(rounds), *program], stdin=subprocess.DEVNULL, capture_output=True,
                          text=True, check=True).stdout
    rows, floor = {}, None
    for line in text.splitlines():
        found = re.match(r"(.+?)\s{2,}([\d.]+)\s+([\d.]+)\s+([\d.]+)\s+([\d.]+)$", line)
        if found:
            name = found.group(1).strip()
            numbers = dict(zip(("min", "p50", "p90", "p99"), map(float, found.groups()[1:])))
            if name.startswith("floor"):
                # Measured anew beside each tier, in turns with it.
                floor = numbers["p50"]
                name = f"{name} ({sum(row.startswith('floor') for row in rows) + 1})"
            rows[name] = {**numbers, "floor": floor}
        elif line.startswith("throughput"):
            rows[line.split(":")[0]] = {"per_second": float(line.split(": ")[1].split(" ")[0])}
    return rows


def case(options, program):
    rows = pooled(options.programs, program, options.rounds)
    runx = options.dist / "runx"
    rows["runx pool exec (a pool of one)"] = timed([runx, "pool", "exec", "--", *program], options.rounds // 4)
    for name, command in peers().items():
        rows[name] = timed([*command, *program], options.rounds // 4)
    return rows


def with_mounts(work, options, program):
    """The same where the mount table is long: this very script, in a mount namespace that has it."""
    directory = pathlib.Path(tempfile.mkdtemp(dir=work))
    script = f'for i in $(seq {MOUNTS}); do mkdir -p "$0/$i" && mount --bind /dev "$0/$i" || exit 1; done; exec "$@"'
    command = ["unshare", "-m", "--propagation", "private", "sh", "-c", script, str(directory), sys.executable, __file__, "--dist",
               str(options.dist), "--programs", str(options.programs), "--rounds", str(options.rounds), "--case", *program]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def available():
    return int(re.search(r"^MemAvailable:\s+(\d+)", pathlib.Path("/proc/meminfo").read_text(), re.MULTILINE).group(1))


def settled():
    """Once nothing is given back any more: the kernel takes network namespaces apart in the background."""
    seen = []
    for _ in range(150):
        time.sleep(0.2)
        seen.append(available())
        if len(seen) >= 15 and max(seen[-15:]) - min(seen[-15:]) < 1000:
            break
    return statistics.median(seen[-15:])


def ask(port, path, body=None):
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", data, timeout=300) as answer:
        return answer.read().decode()


class Server:
    """`runx pool serve`, with so many sandboxes ready."""

    def __init__(self, options, size, *flags):
        self.process = subprocess.Popen([options.dist / "runx", "pool", "serve", "--address", "127.0.0.1:0", "--pool-size", str(size), *flags],
                                        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
        self.port = re.search(r":(\d+)$", self.process.stdout.readline().strip()).group(1)
        self.wait("runx_pool_ready", size)

    def wait(self, metric, wanted):
        until = time.monotonic() + 300
        while int(re.search(rf"^{metric} (\d+)", ask(self.port, "/metrics"), re.MULTILINE).group(1)) < wanted:
            if time.monotonic() > until:
                sys.exit(f"bench_pool: {metric} is not {wanted} after 300 s")
            time.sleep(0.2)

    def end(self):
        self.process.terminate()
        self.process.wait(60)


def memory(options):
    """What sandboxes take, by the kernel's count of memory that is available; shared pages count once."""
    rows = {}
    begun = settled()
    server = Server(options, WARM)
    rows[f"{WARM} warm sandboxes"] = (begun - settled()) / WARM
    server.end()
    sleep = ["sleep", "1000"]
    begun = settled()
    server = Server(options, RUNNING, "--parallelism", str(RUNNING))
    body = {"cmd": [{"args": sleep, "env": ["PATH=/usr/bin:/bin"], "clockLimit": 900_000_000_000, "cpuLimit": 900_000_000_000}]}
    threads = [threading.Thread(target=quietly, args=(server.port, body), daemon=True) for _ in range(RUNNING)]
    for thread in threads:
        thread.start()
    server.wait("runx_judge_running", RUNNING)
    rows[f"{RUNNING} that run sleep in one pool"] = (begun - settled()) / RUNNING
    server.end()
    begun = settled()
    running = [subprocess.Popen([options.dist / "runx", "pool", "exec", "--", *sleep], stdin=subprocess.DEVNULL) for _ in range(RUNNING)]
    rows[f"{RUNNING} that run sleep, each made for it"] = (begun - settled()) / RUNNING
    for one in running:
        one.terminate()
    for one in running:
        one.wait(60)
    for name, command in peers().items():
        begun = settled()
        running = [subprocess.Popen([*command, *sleep], stdin=subprocess.DEVNULL) for _ in range(RUNNING)]
        rows[f"{RUNNING} that run sleep by {name}"] = (begun - settled()) / RUNNING
        for one in running:
            one.kill()
        for one in running:
            one.wait(60)
    return rows


def quietly(port, body):
    with contextlib.suppress(OSError):
        ask(port, "/run", body)


def show(name, rows):
    print(f"\n{name}\n{'':34}{'min':>8}{'p50':>8}{'p90':>8}{'p99':>8}")
    last = None
    for row, numbers in rows.items():
        if "p50" in numbers:
            last = numbers.get("floor", last)
            ratio = f"   {numbers['p50'] / last:5.2f} x the floor before it" if last else ""
            print(f"{row:36}" + "".join(f"{numbers[key]:8.2f}" for key in ("min", "p50", "p90", "p99")) + ratio)
        else:
            print(f"{row:36}{numbers['per_second']:8.0f} executions a second")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dist", type=pathlib.Path, required=True)
    parser.add_argument("--programs", type=pathlib.Path, required=True)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--format", choices=("table", "json"), default="table")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="where to write the JSON, too")
    parser.add_argument("--case", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.dist, options.programs = options.dist.resolve(), options.programs.resolve()
    if options.case:
        print(json.dumps(case(options, options.case)))
        return
    if os.geteuid() != 0:
        sys.exit("bench_pool: the pool's own cgroups and users need root")
    with tempfile.TemporaryDirectory(prefix="runx-bench-pool-") as work:
        mounts = len(pathlib.Path("/proc/self/mountinfo").read_text().splitlines())
        results = {f"/bin/true, {mounts} mounts": case(options, ["/bin/true"])}
        static = shutil.which("busybox")
        if static:
            results[f"busybox true (static), {mounts} mounts"] = case(options, [static, "true"])
        results[f"/bin/true, {mounts + MOUNTS} mounts"] = with_mounts(work, options, ["/bin/true"])
        kib = memory(options)
    text = json.dumps({"milliseconds": results, "kib_of_memory": kib}, indent=1)
    if options.json:
        options.json.write_text(text)
    if options.format == "json":
        print(text)
        return
    for name, rows in results.items():
        show(name, rows)
    print("\nKiB of memory for each; none of them takes anything of a disk")
    for name, number in kib.items():
        print(f"{name:60}{number:10.0f}")


if __name__ == "__main__":
    main()
