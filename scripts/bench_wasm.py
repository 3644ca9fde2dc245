"""What `make bench` measures of WebAssembly: starts, instances, requests and memory. bench.py calls it."""

import json
import os
import pathlib
import shutil
import signal
import statistics
import subprocess
import time

IMAGE = "runx.test/wasm:1"

# How many instances of one module are looked at together.
CROWDS = (1, 20, 100)

# How long and with how many connections servers are asked, in seconds.
SECONDS, CONNECTIONS = 5, 32


class Wasm:
    """The measurements, in turn. `bench` has the options, the times and the programs that all share."""

    def __init__(self, bench, say, failed):
        self.bench, self.say, self.failed = bench, say, failed
        self.guests = bench.work / "guests"
        self.ctr = [shutil.which("ctr"), "--address", bench.options.socket, "--namespace", bench.options.namespace]
        self.runtime = ["--runtime", "io.containerd.runx.v1"]
        # Rows of what it shows: what, of what, and the numbers by their names.
        self.rows = []

    def all(self):
        self.guests.mkdir()
        firsts = max(self.bench.options.runs // 4, 3)
        subprocess.run([os.path.join(self.bench.options.programs, "wasm-guests"), str(self.guests), str(firsts)], check=True)
        archive = self.bench.work / "wasm.tar"
        image = pathlib.Path(__file__).with_name("image")
        subprocess.run([image, archive, IMAGE, self.guests, '["/hello.wasm"]'], check=True)
        subprocess.run([*self.ctr, "images", "import", archive], check=True, stdout=subprocess.DEVNULL)
        self.starts(firsts)
        self.instances()
        self.requests()
        for count in CROWDS:
            self.crowd(count)

    def add(self, what, case, **numbers):
        self.rows.append({"what": what, "case": case, **numbers})

    # --- Starts -----------------------------------------------------------------------------------

    def starts(self, firsts):
        cases = {"native true": ("runx.test/busybox:1", "/bin/true"), "module, cached": (IMAGE, "/hello.wasm"),
                 "component, cached": (IMAGE, "/component.wasm")}
        self.say(f"measuring: wasm, ctr run, {self.bench.options.runs} times {', '.join(cases)}")
        times = {case: [] for case in cases}
        for case, program in cases.items():
            self.run(*program)
        names = list(cases)
        for number in range(self.bench.options.runs):
            at = number % len(names)
            for case in names[at:] + names[:at]:
                times[case].append(self.run(*cases[case]))
        self.say(f"measuring: wasm, ctr run of what was never compiled, {firsts} times")
        for kind, name in (("module", "first"), ("component", "first-component")):
            times[f"{kind}, first start"] = [self.run(IMAGE, f"/{name}-{number}.wasm") for number in range(firsts)]
        native = times["native true"]
        for case, taken in times.items():
            self.add("ctr run --rm", case, median_ms=statistics.median(taken), min_ms=min(taken),
                     over_native_ms=statistics.median(taken) - statistics.median(native))

    def run(self, image, program):
        try:
            return self.bench.timed([*self.ctr, "run", "--rm", "--fifo-dir", str(self.bench.work / "fifo"), *self.runtime,
                                     image, "bench-wasm", program])
        except self.failed:
            self.remove("bench-wasm")
            raise

    def remove(self, name):
        subprocess.run([*self.ctr, "tasks", "delete", "--force", name], capture_output=True, check=False)
        subprocess.run([*self.ctr, "containers", "delete", name], capture_output=True, check=False)

    # --- Instances --------------------------------------------------------------------------------

    def instances(self):
        self.say("measuring: wasm, instances by themselves")
        runx = self.bench.find("runx")
        artifact = self.bench.work / "hello.cwasm"
        with open(self.guests / "hello.wasm", "rb") as module, open(artifact, "wb") as out:
            subprocess.run([runx, "wasm", "compile"], stdin=module, stdout=out, check=True)
        program = os.path.join(self.bench.options.programs, "examples", "instantiate")
        answer = subprocess.run([program, str(artifact), "10000"], capture_output=True, text=True, check=True)
        self.add("an instance, nothing run", "module", **json.loads(answer.stdout))
        cases = {"static native true": [shutil.which("busybox"), "true"],
                 "module": [self.runner_with(artifact)], "runx wasm run, module": [runx, "wasm", "run", str(self.guests / "hello.wasm")],
                 "runx wasm run, component": [runx, "wasm", "run", str(self.guests / "component.wasm")]}
        times = {case: [] for case in cases}
        for number in range(self.bench.options.runs + 1):
            for case, command in cases.items():
                taken = self.bench.timed(command)
                if number:
                    times[case].append(taken)
        for case, taken in times.items():
            self.add("a whole process", case, median_ms=statistics.median(taken), min_ms=min(taken))

    def runner_with(self, artifact):
        """A program that becomes the runner of an artifact: a shell, whose own start counts as the runner's."""
        path = self.bench.work / "runner"
        runner = os.path.join(self.bench.options.dist, "runx-wasm-runner")
        path.write_text(f"#!/bin/sh\nexec {runner} 3 hello 3<{artifact}\n")
        path.chmod(0o755)
        return str(path)

    # --- Requests ---------------------------------------------------------------------------------

    def requests(self):
        if shutil.which("wrk") is None:
            self.skip("wasm serve", "wrk is not installed")
            return
        guest = str(self.guests / "teapot.wat")
        servers = {"runx": [self.bench.find("runx"), "wasm", "serve", "--addr", "127.0.0.1:0", guest]}
        if wasmtime := shutil.which("wasmtime"):
            servers["wasmtime"] = [wasmtime, "serve", "--addr", "127.0.0.1:0", guest]
        else:
            self.skip("wasm serve, wasmtime", "it is not installed")
        rounds = {name: [] for name in servers}
        for _ in range(3):
            for name, command in servers.items():
                self.say(f"measuring: wasm, requests to {name}, {SECONDS} s")
                rounds[name].append(self.ask(command))
        for name, answers in rounds.items():
            middle = sorted(answers)[len(answers) // 2]
            self.add("HTTP requests", name, per_second=middle[0], p99_ms=statistics.median(a[1] for a in answers),
                     peak_mib=max(a[2] for a in answers) / 1024)

    def ask(self, command):
        log = self.bench.work / "serve"
        with open(log, "wb") as out:
            server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=out)
        try:
            url = self.await_url(server, log)
            subprocess.run(["wrk", "-t1", "-c4", "-d1s", url], capture_output=True, check=True)
            answer = subprocess.run(["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{SECONDS}s", "--latency", url],
                                    capture_output=True, text=True, check=True).stdout
            status = pathlib.Path("/proc", str(server.pid), "status").read_text()
            peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
        finally:
            server.send_signal(signal.SIGINT)
            server.wait()
        words = [line.split() for line in answer.splitlines()]
        rate = next(float(line[1]) for line in words if line[:1] == ["Requests/sec:"])
        last = next(line[1] for line in words if line[:1] == ["99%"])
        factor = {"us": 1e-3, "ms": 1, "s": 1e3}
        unit = "us" if last.endswith("us") else "ms" if last.endswith("ms") else "s"
        return rate, float(last.removesuffix(unit)) * factor[unit], peak

    def await_url(self, server, log):
        for _ in range(500):
            for word in log.read_text().split():
                if word.startswith("http://"):
                    return word
            if server.poll() is not None:
                break
            time.sleep(0.02)
        raise self.failed(f"the server did not begin: {log.read_text()}")

    def skip(self, suite, reason):
        self.bench.skipped.append({"runtime": "all", "suite": suite, "reason": reason})
        self.say(f"SKIPPED: {suite}: {reason}")

    # --- Memory -----------------------------------------------------------------------------------

    def crowd(self, count):
        """What containers of one module take, each with a shim of its own, and what of it they share."""
        self.say(f"measuring: wasm, memory of {count} instances of one module")
        names = [f"crowd-{number}" for number in range(count)]
        try:
            for name in names:
                self.bench.timed([*self.ctr, "run", "--detach", "--null-io", *self.runtime, IMAGE, name, "/waits.wasm"])
            time.sleep(2)
            listed = subprocess.run([*self.ctr, "tasks", "list"], capture_output=True, text=True, check=True).stdout
            pids = [line.split()[1] for line in listed.splitlines()[1:] if line.split()[0] in names]
            modules = [self.bench.share(pid) for pid in pids]
            shims = [self.bench.share(pid) for pid in self.bench.shim_processes()]
            code = [self.code(pid) for pid in pids]
            self.add("memory of containers", f"{count} of one module", containers=len(pids),
                     instance_kib=sum(modules) / count, shim_kib=sum(shims) / count,
                     all_kib=(sum(modules) + sum(shims)) / count,
                     code_resident_kib=statistics.mean(c[0] for c in code),
                     code_pss_kib=statistics.mean(c[1] for c in code), code_private_kib=sum(c[2] for c in code))
        finally:
            for name in names:
                self.remove(name)

    def code(self, pid):
        """Of the mappings that are executed, module and runner: what is resident, its share, and what is nobody else's."""
        resident = share = private = 0
        executed = False
        for line in pathlib.Path("/proc", pid, "smaps").read_text().splitlines():
            words = line.split()
            if "-" in words[0] and not words[0].endswith(":"):
                executed = "x" in words[1] and len(words) > 5 and words[5].startswith("/")
            elif executed:
                size = int(words[1]) if len(words) > 1 and words[1].isdigit() else 0
                resident += size if words[0] == "Rss:" else 0
                share += size if words[0] == "Pss:" else 0
                private += size if words[0] in ("Private_Dirty:",) else 0
        return resident, share, private

    # --- What it shows ----------------------------------------------------------------------------

    def table(self):
        print("\nWebAssembly")
        for row in self.rows:
            numbers = ", ".join(f"{name.rsplit('_', 1)[0].replace('_', ' ')} {value:,.2f} {name.rsplit('_', 1)[1]}"
                                if name.endswith(("_ms", "_us", "_kib", "_mib")) else f"{name.replace('_', ' ')} {value:,.0f}"
                                for name, value in row.items() if name not in ("what", "case"))
            print(f"{row['what']:26}{row['case']:26}{numbers}")
