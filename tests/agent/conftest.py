"""A daemon, and a Jupyter server for those who need one."""

import asyncio
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest

from opensandbox.adapters.factory import AdapterFactory
from opensandbox.config import ConnectionConfig
from opensandbox.config.connection_sync import ConnectionConfigSync
from opensandbox.models.sandboxes import SandboxEndpoint
from opensandbox.sync.adapters.factory import AdapterFactorySync

TOKEN = "a-token-that-must-not-be-logged"
AGENT = os.environ.get("RUNX_AGENT", "runx-agent")


def eventually(what, check, seconds=60):
    until = time.monotonic() + seconds
    while True:
        found = check()
        if found:
            return found
        assert time.monotonic() < until, f"{what} did not come to be"
        time.sleep(0.02)


class Answer:
    """What came back of a request."""

    def __init__(self, status, headers, body):
        self.status, self.headers, self.body = status, headers, body

    def json(self):
        return json.loads(self.body)

    def events(self):
        return [json.loads(event) for event in self.body.decode().split("\n\n") if event]


class Agent:
    """A daemon of its own for a test, in a directory of its own, ended with it."""

    def __init__(self, directory, *flags, environment=None, token=TOKEN, address=None, command=None):
        self.directory = pathlib.Path(directory)
        self.log = self.directory / f"agent-{time.monotonic_ns()}.log"
        self.token = token
        variables = {**os.environ, "HOME": str(self.directory), "TMPDIR": str(self.directory), **(environment or {})}
        variables.pop("JUPYTER_HOST", None)
        if token:
            variables["EXECD_ACCESS_TOKEN"] = token
        variables.update(environment or {})
        arguments = [*(command or [AGENT]), "--port", "0", "--address", address or "127.0.0.1", "--log-level", "7", *flags]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(arguments, cwd=self.directory, env=variables, stdin=subprocess.DEVNULL,
                                            stdout=log, stderr=log)
        try:
            self.port = eventually("the daemon listens", self.listening)
        except BaseException:
            self.end()
            raise

    def listening(self):
        assert self.process.poll() is None, self.log.read_text()
        found = re.search(r"listens on [0-9.]+:(\d+)", self.log.read_text())
        return int(found.group(1)) if found else None

    def envd_port(self):
        # It says so a moment after it has said where it listens.
        found = eventually("it speaks envd's protocol",
                           lambda: re.search(r"envd protocol is spoken on [0-9.]+:(\d+)", self.log.read_text()))
        return int(found.group(1))

    def end(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def ask(self, method, path, body=None, headers=None, token=None, timeout=60):
        """A request by itself, as no SDK would make it."""
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data=body, method=method)
        token = self.token if token is None else token
        if token:
            request.add_header("X-EXECD-ACCESS-TOKEN", token)
        for name, value in (headers or {}).items():
            request.add_header(name, value)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return Answer(answer.status, answer.headers, answer.read())
        except urllib.error.HTTPError as error:
            return Answer(error.code, error.headers, error.read())

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.port))

    def raw(self, method, path, body=b"", headers=()):
        """A connection on which a request was sent and nothing was read."""
        connection = self.connect()
        lines = [f"{method} {path} HTTP/1.1", "Host: x", f"X-EXECD-ACCESS-TOKEN: {self.token}", *headers]
        if not any(line.lower().startswith(("content-length", "transfer-encoding")) for line in lines):
            lines.append(f"Content-Length: {len(body)}")
        connection.sendall(("\r\n".join(lines) + "\r\n\r\n").encode() + body)
        return connection

    # --- What it takes ----------------------------------------------------------------------------

    def status(self, name):
        text = pathlib.Path("/proc", str(self.process.pid), "status").read_text()
        return int(re.search(rf"^{name}:\s+(\d+)", text, re.MULTILINE).group(1))

    def memory(self):
        """Resident, in KiB."""
        return self.status("VmRSS")

    def descriptors(self):
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def children(self):
        """The pids of what it has started and not waited for."""
        found = []
        for entry in os.listdir("/proc"):
            try:
                stat = pathlib.Path("/proc", entry, "stat").read_text() if entry.isdigit() else ""
            except OSError:
                continue
            if stat and int(stat.rsplit(")", 1)[1].split()[1]) == self.process.pid:
                found.append(int(entry))
        return found

    # --- The SDK ----------------------------------------------------------------------------------

    def endpoint(self):
        return SandboxEndpoint(endpoint=f"127.0.0.1:{self.port}", headers={"X-EXECD-ACCESS-TOKEN": self.token})

    def sdk(self):
        """The synchronous one's services."""
        config = ConnectionConfigSync(protocol="http", disable_metrics=True).with_transport_if_missing()
        return Services(AdapterFactorySync(config), self.endpoint(), config)

    def asynchronous(self):
        """The asynchronous one's services, within its event loop."""
        config = ConnectionConfig(protocol="http", disable_metrics=True).with_transport_if_missing()
        return Services(AdapterFactory(config), self.endpoint(), config)


class Services:
    def __init__(self, factory, endpoint, config):
        self.commands = factory.create_command_service(endpoint)
        self.files = factory.create_filesystem_service(endpoint)
        self.health = factory.create_health_service(endpoint)
        self.metrics = factory.create_metrics_service(endpoint)
        self.isolated = factory.create_isolated_session_service(endpoint)
        self.endpoint, self.config = endpoint, config


@pytest.fixture
def agent(tmp_path):
    agent = Agent(tmp_path)
    yield agent
    agent.end()
    assert TOKEN not in agent.log.read_text()
    assert agent.process.returncode == 0, agent.log.read_text()


@pytest.fixture
def sdk(agent):
    return agent.sdk()


class Own:
    """Requests to the daemon's own API."""

    def __init__(self, agent):
        self.agent = agent

    def ask(self, method, path, body=None, status=200, timeout=60):
        answer = self.agent.ask(method, "/runx/v1" + path, body, {"Content-Type": "application/json"}, timeout=timeout)
        assert answer.status == status, (answer.status, answer.body)
        return answer.json() if answer.body else None

    def start(self, command=None, **more):
        body = {"argv": command} if isinstance(command, list) else {"command": command}
        return self.ask("POST", "/processes", {**body, **more}, 201)

    def refused(self, command=None, status=400, **more):
        body = {"argv": command} if isinstance(command, list) else {"command": command}
        return self.ask("POST", "/processes", {**body, **more}, status)["message"]

    def wait(self, process, timeout_ms=60_000):
        return self.ask("GET", f"/processes/{process['id']}/wait?timeout_ms={timeout_ms}")

    def output(self, process, offset=0, follow=True, stream="stdout"):
        path = f"/runx/v1/processes/{process['id']}/output?offset={offset}&follow={str(follow).lower()}"
        events = [json.loads(line) for line in self.agent.ask("GET", path).body.splitlines()]
        return events

    def text(self, process, stream="stdout"):
        return "".join(event["text"] for event in self.output(process) if event["type"] == stream)

    def done(self, command, **more):
        """What it printed and how it ended."""
        process = self.start(command, **more)
        ended = self.wait(process)
        return self.text(process).strip(), ended


@pytest.fixture
def own(agent):
    return Own(agent)


def run(coroutine):
    return asyncio.run(coroutine)


class Jupyter:
    """A real one, with the kernels that are installed."""

    def __init__(self, directory):
        self.directory = directory
        self.token = "jupyter-token"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        prefix = pathlib.Path(sys.prefix)
        environment = {**os.environ, "HOME": str(directory), "JUPYTER_PATH": str(prefix / "share/jupyter"),
                       "JUPYTER_RUNTIME_DIR": str(directory / "runtime"), "PATH": f"{prefix / 'bin'}:{prefix / 'node/node_modules/.bin'}:{os.environ['PATH']}"}
        self.log = directory / "jupyter.log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jupyter_server", "--ip=127.0.0.1", f"--port={self.port}", "--allow-root",
                 f"--IdentityProvider.token={self.token}", f"--ServerApp.root_dir={directory}", "--no-browser"],
                cwd=directory, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        try:
            eventually("Jupyter answers", self.answers, 120)
        except BaseException:
            self.end()
            raise

    def ask(self, path):
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}",
                                         headers={"Authorization": f"Token {self.token}"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.loads(answer.read())

    def answers(self):
        assert self.process.poll() is None, self.log.read_text()
        try:
            return self.ask("/api/status")
        except OSError:
            return None

    def languages(self):
        specs = self.ask("/api/kernelspecs")["kernelspecs"].values()
        return {spec["spec"]["language"] for spec in specs}

    def end(self):
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def flags(self):
        return ["--jupyter-host", f"http://127.0.0.1:{self.port}", "--jupyter-token", self.token]


@pytest.fixture(scope="session")
def jupyter(tmp_path_factory):
    jupyter = Jupyter(tmp_path_factory.mktemp("jupyter"))
    yield jupyter
    jupyter.end()


@pytest.fixture
def coder(tmp_path, jupyter):
    agent = Agent(tmp_path, *jupyter.flags())
    yield agent
    agent.end()
    assert TOKEN not in agent.log.read_text() and jupyter.token not in agent.log.read_text()


def in_threads(count, work):
    """Runs work(number) in as many threads and returns what each has returned."""
    results = [None] * count

    def one(number):
        try:
            results[number] = work(number)
        except BaseException as error:  # noqa: BLE001: it is raised where it is seen
            results[number] = error

    threads = [threading.Thread(target=one, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results
