"""Measures runx beside its peers. scripts/bench prepares what this needs, and calls it."""

import argparse
import json
import os
import pathlib
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time

from bench_wasm import Wasm

COMMANDS = ["run", "create", "start", "state", "exec", "delete"]

# Of the programs that measure by themselves.
STEPS = ["all of it", "start command", "Create", "Start", "Wait", "Delete", "until it runs", "RunPodSandbox",
         "CreateContainer", "StartContainer", "ExecSync"]

SUITES = {"command": "the command", "containerd": "containerd", "shim": "the shim by itself, over ttrpc",
          "pods": "a pod through CRI, on"}

# What a busy node has besides.
MOUNTS = 1000

# How many idle shims are looked at.
IDLE = 20


def say(text):
    print(text, file=sys.stderr, flush=True)


class Failed(Exception):
    """A program that ended with a code other than 0, and what it said."""


class Bench:
    def __init__(self, options):
        self.options = options
        self.work = pathlib.Path(options.work)
        self.devnull = os.open(os.devnull, os.O_RDWR)
        self.skipped = []
        # By (suite, bundle, operation, mode, runtime), milliseconds of each run.
        self.samples = {}
        # By (bundle, operation, runtime), KiB of the largest process.
        self.memory = {}
        # What idle shims take.
        self.idle = []
        # What is measured of WebAssembly.
        self.modules = None

    def timed(self, command):
        """Runs a program and returns the milliseconds from before its start until its end is known."""
        # A file and not a pipe: `create` leaves a process behind that keeps it open.
        said = os.open(self.work / "said", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            streams = [(os.POSIX_SPAWN_DUP2, self.devnull, 0), (os.POSIX_SPAWN_DUP2, said, 1),
                       (os.POSIX_SPAWN_DUP2, said, 2)]
            begun = time.perf_counter_ns()
            pid = os.posix_spawn(command[0], command, os.environ, file_actions=streams)
            _, status = os.waitpid(pid, 0)
            took = time.perf_counter_ns() - begun
            if status != 0:
                text = os.pread(said, 4000, 0).decode(errors="replace").strip()
                raise Failed(f"{' '.join(command)}: wait status {status}: {text or 'it said nothing'}")
            return took / 1e6
        finally:
            os.close(said)

    def measure(self, key, gap, command):
        if gap:
            time.sleep(gap)
        took = self.timed(command)
        if key is not None:
            self.samples.setdefault(key, []).append(took)

    def rounds(self, name, runtimes, work):
        """Calls work(runtime, key_of, gap) for all runtimes in turn, as often as asked, in both modes."""
        gap = self.options.gap / 1000
        usable = []
        for runtime in runtimes:
            # The first time is not measured: it fills caches, and shows who cannot do it.
            try:
                work(runtime, lambda operation: None, 0)
                usable.append(runtime)
            except (Failed, OSError) as error:
                self.skipped.append({"runtime": runtime, "suite": name[0], "bundle": name[1], "reason": str(error)})
                say(f"SKIPPED: {runtime}, {' '.join(name)}: {error}")
        for mode, pause in (("back to back", 0), ("gaps", gap)):
            say(f"measuring: {' '.join(name)}, {mode}, {self.options.runs} times {' '.join(usable)}")
            for number in range(self.options.runs):
                # In turn, so that noise hits all alike, and each is first as often as the others.
                at = number % max(len(usable), 1)
                for runtime in usable[at:] + usable[:at]:
                    work(runtime, lambda operation, r=runtime, m=mode: (*name, operation, m, r), pause)

    # --- The commands by themselves ---------------------------------------------------------------

    def commands(self):
        programs = {}
        for runtime in ("runx", "runc", "crun"):
            path = self.find(runtime)
            if path is None:
                self.skipped.append({"runtime": runtime, "suite": "command", "reason": "it is not installed"})
                say(f"SKIPPED: {runtime}: it is not installed")
            else:
                programs[runtime] = path
        for bundle in ("bare", "kubernetes"):
            run = self.bundles(bundle, "run", ["/bin/true"], programs)
            live = self.bundles(bundle, "live", ["/bin/sleep", "1000"], programs)
            self.rounds(("command", bundle), list(programs), self.one_run(programs, run))
            able = [r for r in programs if self.ran(bundle, r)]
            self.rounds(("command", bundle), able, self.one_life(programs, live))
            for runtime in able:
                self.peaks(bundle, runtime, self.base(programs, runtime), run[runtime], live[runtime])

    def peaks(self, bundle, runtime, base, run, live):
        """The largest of the processes that a command makes, its own included. The program that is run in the
        container is a part of it, and the same for all."""
        self.peak((bundle, "run", runtime), [*base, "run", "--bundle", run, "bench-run"])
        self.timed([*base, "create", "--bundle", live, "bench-live"])
        try:
            self.timed([*base, "start", "bench-live"])
            self.peak((bundle, "exec", runtime), [*base, "exec", "bench-live", "/bin/true"])
        finally:
            subprocess.run([*base, "delete", "--force", "bench-live"], capture_output=True, check=False)

    def peak(self, key, command):
        for _ in range(5):
            size = self.size(command) // self.unit()
            self.memory[key] = max(self.memory.get(key, 0), size)

    def size(self, command):
        # A small program starts it: what it is started from counts as its own.
        out = self.work / "peak"
        self.timed([shutil.which("busybox"), "time", "-f", "%M", "-o", str(out), *command])
        return int(out.read_text().split()[-1])

    def unit(self):
        """What busybox's time multiplies KiB with: it takes the kernel's number for pages."""
        busybox = shutil.which("busybox")
        answer = subprocess.run([busybox, "grep", "VmHWM", "/proc/self/status"], capture_output=True, text=True, check=True)
        return max(round(self.size([busybox, "true"]) / int(answer.stdout.split()[1])), 1)

    def ran(self, bundle, runtime):
        return ("command", bundle, "run", "back to back", runtime) in self.samples

    def find(self, runtime):
        if runtime == "runx":
            return os.path.join(self.options.dist, "runx")
        return shutil.which(runtime)

    def base(self, programs, runtime):
        return [programs[runtime], "--root", str(self.work / "states" / runtime)]

    def one_run(self, programs, bundles):
        def work(runtime, key, gap):
            base = self.base(programs, runtime)
            self.measure(key("run"), gap, [*base, "run", "--bundle", bundles[runtime], "bench-run"])
        return work

    def one_life(self, programs, bundles):
        def work(runtime, key, gap):
            base = self.base(programs, runtime)
            try:
                self.measure(key("create"), gap, [*base, "create", "--bundle", bundles[runtime], "bench-live"])
                self.measure(key("start"), gap, [*base, "start", "bench-live"])
                self.measure(key("state"), gap, [*base, "state", "bench-live"])
                self.measure(key("exec"), gap, [*base, "exec", "bench-live", "/bin/true"])
                self.timed([*base, "kill", "bench-live", "KILL"])
                self.await_stop(base)
                self.measure(key("delete"), gap, [*base, "delete", "bench-live"])
            except BaseException:
                subprocess.run([*base, "delete", "--force", "bench-live"], capture_output=True, check=False)
                raise
        return work

    def await_stop(self, base):
        for _ in range(500):
            answer = subprocess.run([*base, "state", "bench-live"], capture_output=True, check=True)
            if json.loads(answer.stdout)["status"] == "stopped":
                return
            time.sleep(0.005)
        raise Failed("the container did not stop after SIGKILL")

    def bundles(self, kind, name, args, programs):
        """A bundle for each runtime; they differ in the cgroup only."""
        made = {}
        for runtime in programs:
            path = self.work / "bundles" / kind / name / runtime
            path.mkdir(parents=True)
            spec = self.bare(path) if kind == "bare" else self.kubernetes()
            # Older releases of crun refuse everything newer.
            spec["ociVersion"] = "1.0.2"
            spec["process"]["terminal"] = False
            spec["process"]["args"] = args
            spec["root"] = {"path": str(self.work / "rootfs"), "readonly": True}
            spec["linux"]["cgroupsPath"] = f"/{self.options.namespace}/{runtime}-{name}"
            (path / "config.json").write_text(json.dumps(spec))
            made[runtime] = str(path)
        return made

    def bare(self, path):
        self.timed([self.find("runx"), "spec", "--bundle", str(path)])
        spec = json.loads((path / "config.json").read_text())
        spec.pop("hostname", None)
        return spec

    def kubernetes(self):
        """What containerd writes for a container, with the limits of a pod."""
        spec = json.loads((self.work / "profile.json").read_text())["Spec"]
        spec["process"]["oomScoreAdj"] = 1000
        spec["linux"].setdefault("resources", {}).update({
            "memory": {"limit": 128 << 20},
            "cpu": {"shares": 512, "quota": 50000, "period": 100000},
            "pids": {"limit": 100},
        })
        return spec

    # --- containerd -------------------------------------------------------------------------------

    def containerd(self):
        runtimes = self.shims()
        if len(runtimes) == 1:
            say("SKIPPED: runc and crun with containerd: containerd-shim-runc-v2 is not installed")
            self.skipped.append({"runtime": "runc, crun", "suite": "containerd",
                                 "reason": "containerd-shim-runc-v2 is not installed"})
        for bundle, flags in (("bare", []),
                              ("kubernetes", ["--seccomp", "--memory-limit", str(128 << 20), "--cpus", "0.5"])):
            self.rounds(("containerd", bundle), list(runtimes), self.one_ctr_run(runtimes, flags))
        self.add_mounts()
        self.rounds(("containerd", "mounts"), list(runtimes), self.one_ctr_run(runtimes, []))

    def add_mounts(self):
        """As on a busy node. They go with the mount namespace that all of this is in."""
        say(f"mounting {MOUNTS} filesystems")
        top = self.work / "mounts"
        top.mkdir()
        script = "".join(f"mkdir {top}/{n} && mount -t tmpfs -o size=4k none {top}/{n}\n" for n in range(MOUNTS))
        subprocess.run(["/bin/sh", "-e"], input=script, text=True, check=True)

    # --- Pods, the shim by itself, and what stays in memory -----------------------------------------

    def program(self, name, suite):
        """A program of ours that measures by itself, and prints a line for each measurement."""
        path = os.path.join(self.options.programs, name)
        say(f"measuring: {suite}, {self.options.runs} times each")
        environment = {**os.environ, "RUNX_DIST": self.options.dist}
        answer = subprocess.run([path, str(self.options.runs + 1), str(self.options.gap)], env=environment,
                                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=False)
        if answer.returncode != 0:
            self.skipped.append({"runtime": "all", "suite": suite, "reason": f"{name} ended with {answer.returncode}"})
            say(f"SKIPPED: {suite}: {name} ended with {answer.returncode}")
            return
        for line in answer.stdout.splitlines():
            row = json.loads(line)
            if row["suite"] == "memory":
                self.idle.append(row)
                continue
            key = (row["suite"], row["bundle"], row["operation"], row["mode"], row["runtime"])
            self.samples.setdefault(key, []).append(row["ms"])

    def idle_shims(self):
        """What shims take that have nothing to do, with their spawners: the part of every page that is theirs."""
        ctr = [shutil.which("ctr"), "--address", self.options.socket, "--namespace", self.options.namespace]
        for runtime, flags in self.shims().items():
            if runtime == "crun":
                continue
            say(f"measuring: memory of {IDLE} idle shims, {runtime}")
            names = [f"idle-{runtime}-{number}" for number in range(IDLE)]
            try:
                for name in names:
                    self.timed([*ctr, "run", "--detach", "--null-io", *flags, "runx.test/busybox:1", name,
                                "/bin/sleep", "100000"])
                time.sleep(2)
                sizes = [self.share(pid) for pid in self.shim_processes()]
                self.idle.append({"bundle": f"{IDLE} containers by themselves", "runtime": runtime,
                                  "shims": IDLE, "kib": sum(sizes)})
            finally:
                for name in names:
                    subprocess.run([*ctr, "tasks", "delete", "--force", name], capture_output=True, check=False)
                    subprocess.run([*ctr, "containers", "delete", name], capture_output=True, check=False)

    def shim_processes(self):
        for entry in os.listdir("/proc"):
            try:
                arguments = pathlib.Path("/proc", entry, "cmdline").read_bytes().split(b"\0") if entry.isdigit() else []
            except OSError:
                continue
            if self.options.namespace.encode() in arguments and b"containerd-shim-" in arguments[0]:
                yield entry

    def share(self, pid):
        text = pathlib.Path("/proc", pid, "smaps_rollup").read_text()
        return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))

    def wasm(self):
        self.modules = Wasm(self, say, Failed)
        self.modules.all()

    def shims(self):
        runtimes = {"runx": ["--runtime", "io.containerd.runx.v1"]}
        if shutil.which("containerd-shim-runc-v2"):
            for runtime in ("runc", "crun"):
                if path := shutil.which(runtime):
                    runtimes[runtime] = ["--runtime", "io.containerd.runc.v2", "--runc-binary", path]
        return runtimes

    def one_ctr_run(self, runtimes, flags):
        ctr = [shutil.which("ctr"), "--address", self.options.socket, "--namespace", self.options.namespace]

        def work(runtime, key, gap):
            command = [*ctr, "run", "--rm", "--fifo-dir", str(self.work / "fifo"), *runtimes[runtime], *flags,
                       "runx.test/busybox:1", f"bench-{runtime}", "/bin/true"]
            try:
                self.measure(key("ctr run --rm"), gap, command)
            except Failed:
                subprocess.run([*ctr, "tasks", "delete", "--force", f"bench-{runtime}"], capture_output=True, check=False)
                subprocess.run([*ctr, "containers", "delete", f"bench-{runtime}"], capture_output=True, check=False)
                raise
            # What the client costs whatever the runtime.
            if runtime == "runx":
                self.measure(key("ctr version"), 0, [*ctr[:3], "version"])
        return work

    # --- What it shows ----------------------------------------------------------------------------

    def facts(self):
        versions = {}
        for name, command in (("runx", [self.find("runx"), "--version"]), ("runc", ["runc", "--version"]),
                              ("crun", ["crun", "--version"]), ("containerd", ["containerd", "--version"])):
            try:
                answer = subprocess.run(command, capture_output=True, text=True, check=True)
                versions[name] = answer.stdout.splitlines()[0]
            except (OSError, subprocess.CalledProcessError, IndexError):
                versions[name] = None
        with open("/proc/self/mountinfo", encoding="utf-8") as table:
            mounts = len(table.readlines())
        v2 = os.path.exists("/sys/fs/cgroup/cgroup.controllers")
        return {
            "versions": versions,
            "kernel": platform.release(),
            "machine": platform.machine(),
            "processors": os.cpu_count(),
            "load": os.getloadavg()[0],
            "mounts": mounts,
            "cgroups": "version 2" if v2 else self.options.cgroups or "version 1",
            "snapshotter": os.environ.get("CONTAINERD_SNAPSHOTTER"),
            "runs": self.options.runs,
            "gap_ms": self.options.gap,
        }

    def results(self):
        """A row for each operation, bundle and runtime."""
        rows = []
        for (suite, bundle, operation, mode, runtime), times in self.samples.items():
            row = {"suite": suite, "bundle": bundle, "operation": operation, "mode": mode, "runtime": runtime,
                   "median_ms": statistics.median(times), "min_ms": min(times), "samples_ms": times}
            if ours := self.samples.get((suite, bundle, operation, mode, "runx")):
                row["median_to_runx"] = row["median_ms"] / statistics.median(ours)
                row["min_to_runx"] = row["min_ms"] / min(ours)
            rows.append(row)
        return rows

    def table(self, facts):
        versions = ", ".join(version or f"no {name}" for name, version in facts["versions"].items())
        print(versions)
        print(f"Linux {facts['kernel']} {facts['machine']}, {facts['processors']} processors, load {facts['load']:.2f}, "
              f"{facts['mounts']} mounts, snapshotter {facts['snapshotter']}")
        print(f"cgroups: {facts['cgroups']}")
        print(f"{facts['runs']} runs each, in turn. Milliseconds: median (minimum). "
              f"\"/ runx\": how many times as long as runx, by median and by minimum.")
        for skipped in self.skipped:
            print(f"SKIPPED: {skipped['runtime']}, {skipped['suite']}: {skipped['reason']}")
        rows = {}
        for row in self.results():
            group = rows.setdefault((row["suite"], row["bundle"], row["operation"]), {})
            group.setdefault(row["runtime"], {})[row["mode"]] = row
        order = {name: at for at, name in enumerate([*COMMANDS, "ctr run --rm", "ctr version", *STEPS])}
        section = None
        for (suite, bundle, operation), group in sorted(
                rows.items(), key=lambda item: (item[0][0], item[0][1], order[item[0][2]])):
            if (suite, bundle) != section:
                section = (suite, bundle)
                what = SUITES[suite]
                like = {"bare": "a bare bundle", "mounts": f"the same with {MOUNTS} more mounts on the host"}.get(
                    bundle, bundle if suite == "pods" else "as for a pod: seccomp, masked paths, limits")
                print(f"\n{what}{'' if suite == 'pods' else ','} {like}")
                print(f"{'':16}{'':6}{'back to back':>17}{'/ runx':>14}"
                      f"{str(facts['gap_ms']) + ' ms between':>19}{'/ runx':>14}")
            for runtime, modes in group.items():
                line = f"{operation:16}{runtime:6}"
                for mode, width in (("back to back", 17), ("gaps", 19)):
                    row = modes.get(mode)
                    if row is None:
                        line += f"{'-':>{width}}{'':14}"
                        continue
                    pair = f"{row['median_ms']:.1f} ({row['min_ms']:.1f})"
                    line += f"{pair:>{width}}"
                    ratio = ""
                    if runtime != "runx" and "median_to_runx" in row:
                        ratio = f"{row['median_to_runx']:.2f} ({row['min_to_runx']:.2f})"
                    line += f"{ratio:>14}"
                print(line.rstrip())
                operation = ""
        if self.memory:
            print("\nthe largest process of a command, KiB")
        for bundle, operation in dict.fromkeys((bundle, operation) for bundle, operation, _ in self.memory):
            sizes = (f"{runtime} {size}" for (b, o, runtime), size in self.memory.items() if (b, o) == (bundle, operation))
            print(f"{operation:14}{bundle:12}{', '.join(sizes)}")
        if self.idle:
            print("\nmemory of idle shims, spawners included: PSS in MiB, altogether and for each shim")
        for row in self.idle:
            total = row["kib"] / 1024
            print(f"{row['bundle']:32}{row['runtime']:6}{total:8.2f}{total / row['shims']:8.2f}")
        if self.modules:
            self.modules.table()


def main():
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    for name in ("work", "socket", "namespace", "cgroups"):
        parser.add_argument(f"--{name}", required=True, help=argparse.SUPPRESS)
    parser.add_argument("--dist", required=True, help="directory with the programs")
    parser.add_argument("--programs", required=True, help="directory with the programs that measure")
    parser.add_argument("--runs", type=int, default=int(os.environ.get("RUNX_BENCH_RUNS") or 20), help="how often")
    parser.add_argument("--gap", type=int, default=80, help="milliseconds between runs in the second mode")
    parser.add_argument("--format", choices=("table", "json"), default="table")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="where to write the JSON, too")
    parser.add_argument("--only", choices=("commands", "containerd", "shim", "pods", "memory", "wasm"))
    bench = Bench(parser.parse_args())
    # As an exception, so that what is under way is cleaned up.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    bench.options.dist = os.path.abspath(bench.options.dist)
    facts = bench.facts()
    for name, work in (("commands", bench.commands), ("shim", lambda: bench.program("shim-bench", "shim")),
                       ("pods", lambda: bench.program("cri-bench", "pods")), ("memory", bench.idle_shims), ("wasm", bench.wasm),
                       # At last, since it leaves a thousand mounts.
                       ("containerd", bench.containerd)):
        if bench.options.only in (None, name):
            work()
    results = json.dumps({"facts": facts, "skipped": bench.skipped, "results": bench.results(), "idle": bench.idle,
                          "wasm": bench.modules.rows if bench.modules else [],
                          "peak_kib": [{"bundle": b, "operation": o, "runtime": r, "kib": kib}
                                       for (b, o, r), kib in bench.memory.items()]}, indent=1)
    if bench.options.json:
        bench.options.json.write_text(results)
    if bench.options.format == "json":
        print(results)
    else:
        bench.table(facts)


if __name__ == "__main__":
    main()
