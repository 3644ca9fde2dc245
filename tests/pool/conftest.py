"""A server of its own for a test."""

import os
import pathlib
import re
import signal
import subprocess
import time

import pytest
import requests

RUNX = os.environ.get("RUNX", "runx")


def eventually(what, check, seconds=60):
    until = time.monotonic() + seconds
    while True:
        found = check()
        if found:
            return found
        assert time.monotonic() < until, f"{what} did not come to be"
        time.sleep(0.02)


class Server:
    def __init__(self, *flags, environment=None):
        self.process = subprocess.Popen([RUNX, "pool", "serve", "--address", "127.0.0.1:0", *flags], stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT, text=True, env={**os.environ, **(environment or {})})
        line = self.process.stdout.readline()
        found = re.search(r"listens on 127\.0\.0\.1:(\d+)", line)
        if not found:
            self.process.kill()
            raise AssertionError(line + self.process.stdout.read())
        self.url = f"http://127.0.0.1:{found.group(1)}"
        self.headers = {}
        self.files = pathlib.Path(self.ask("GET", "/config").json()["fileStorePath"])

    def ask(self, method, path, **more):
        return requests.request(method, self.url + path, headers=self.headers, timeout=120, **more)

    def run(self, *commands, status=200, **more):
        answer = self.ask("POST", "/run", json={"cmd": list(commands), **more})
        assert answer.status_code == status, (answer.status_code, answer.text)
        return answer.json()

    def one(self, *args, **more):
        return self.run(command(*args, **more))[0]

    def metric(self, name):
        text = self.ask("GET", "/metrics").text
        return float(re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE).group(1))

    def processes(self):
        """Its descendants."""
        parents = {}
        for entry in pathlib.Path("/proc").iterdir():
            try:
                stat = (entry / "stat").read_text() if entry.name.isdigit() else ""
            except OSError:
                continue
            if stat:
                parents[int(entry.name)] = int(stat.rsplit(")", 1)[1].split()[1])
        found, more = set(), {self.process.pid}
        while more:
            more = {pid for pid, parent in parents.items() if parent in more}
            found |= more
        return found

    def end(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def command(*args, stdin="", **more):
    return {"args": list(args), "env": ["PATH=/usr/bin:/bin"], "cpuLimit": 5_000_000_000, "memoryLimit": 256 << 20, "procLimit": 50,
            "files": [{"content": stdin}, {"name": "stdout", "max": 10240}, {"name": "stderr", "max": 10240}], **more}


def groups():
    """Cgroups of pools, with their processes."""
    # Others make and remove groups meanwhile, which os.walk takes as it comes.
    return {path for path, _, _ in os.walk("/sys/fs/cgroup") if os.path.basename(path).startswith("runx-pool-")}


@pytest.fixture(scope="module")
def server():
    server = Server()
    left = server.processes()
    yield server
    pids = server.processes() | left
    server.end()
    assert server.process.returncode == 0, server.process.stdout.read()
    assert not server.files.exists()
    eventually("none of its processes is left", lambda: not any(pathlib.Path("/proc", str(pid)).exists() for pid in pids))
    own = f"runx-pool-{server.process.pid}-"
    eventually("none of its cgroups is left", lambda: not any(own in path for path in groups()))
