"""Health, numbers, forwarding, tokens and limits."""

import http.server
import os
import re
import subprocess
import threading
import time

import pytest
import websocket

from conftest import AGENT, TOKEN, Agent, eventually


def test_it_answers_and_tells_its_numbers(agent, sdk):
    assert sdk.health.ping("any")
    numbers = sdk.metrics.get_metrics("any")
    assert numbers.cpu_count > 0 and 0 <= numbers.cpu_used_percentage <= 100
    assert 0 < numbers.memory_used_in_mib <= numbers.memory_total_in_mib
    assert abs(numbers.timestamp / 1000 - time.time()) < 60
    connection = agent.raw("GET", "/metrics/watch")
    text = b""
    while text.count(b'"cpu_count"') < 2:
        text += connection.recv(4096)
    connection.close()
    assert agent.ask("GET", "/v1/isolated/capabilities").json()["available"] is False
    assert agent.ask("POST", "/v1/isolated/session", {}).status == 503


def test_each_request_needs_the_token(agent):
    for path in ("/ping", "/metrics", "/no/such", "/proxy/1/", "/pty/x/ws", "/files/info?path=/etc/passwd"):
        for token in ("", "wrong", TOKEN[:-1], TOKEN + "x"):
            answer = agent.ask("GET", path, headers={"X-EXECD-ACCESS-TOKEN": token} if token else {}, token="")
            assert answer.status == 401 and "X-EXECD-ACCESS-TOKEN" in answer.json()["error"], (path, token)
    assert agent.ask("POST", "/command", {"command": "true"}, token="wrong").status == 401


def test_without_a_token_only_this_machine_is_served(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "EXECD_ACCESS_TOKEN"}
    refused = subprocess.run([AGENT, "--port", "0", "--address", "0.0.0.0"], env=environment, capture_output=True, text=True)
    assert refused.returncode == 1 and "--insecure" in refused.stderr
    agent = Agent(tmp_path, token="")
    try:
        assert agent.ask("GET", "/ping").status == 200
    finally:
        agent.end()
    for wrong in (["--port", "x"], ["--root", "/no/such"], ["--jupyter-host", "x"], ["word"], ["--access-token-file", "/dev/null"]):
        done = subprocess.run([AGENT, *wrong], env=environment, capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.startswith("runx-agent: "), wrong


def test_what_there_is_not_is_not_found(agent):
    for method, path in (("GET", "/no/such"), ("PUT", "/ping"), ("POST", "/metrics"), ("GET", "/command/x")):
        answer = agent.ask(method, path)
        assert (answer.status, answer.body) == (404, b"404 page not found"), path
    assert agent.ask("GET", "/ping/").status == 200


class Echo(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        answer = f"{self.command} {self.path} {body.decode()}\n{self.headers}".encode()
        self.send_response(418)
        self.send_header("Content-Length", str(len(answer)))
        self.send_header("X-Own", "1")
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_DELETE = do_POST

    def log_message(self, *_):
        pass


@pytest.fixture
def echo():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()


def test_ports_are_forwarded(agent, echo):
    answer = agent.ask("POST", f"/proxy/{echo}/a/b%20c?d=e&f", b"body", headers={"X-Mine": "1", "X-Forwarded-Host": "evil"})
    text = answer.body.decode()
    assert answer.status == 418 and answer.headers["X-Own"] == "1"
    assert text.startswith("POST /a/b%20c?d=e&f body\n") and "X-Mine: 1" in text.title()
    assert "x-forwarded-for: 127.0.0.1" in text.lower() and "x-forwarded-proto: http" in text.lower()
    # The application does not learn the daemon's token.
    assert TOKEN not in text and "evil" not in text
    assert agent.ask("GET", f"/proxy/{echo}").body.decode().startswith("GET / ")
    assert agent.ask("GET", "/proxy/1/x").status == 502
    for path in ("/proxy/", "/proxy/x/", "/proxy/0/", "/proxy/99999/"):
        assert agent.ask("GET", path).status == 400, path


WEBSOCKET = """
import base64, hashlib, socket
server = socket.create_server(("127.0.0.1", 0)); print(server.getsockname()[1], flush=True)
connection, _ = server.accept(); head = b""
while b"\\r\\n\\r\\n" not in head: head += connection.recv(4096)
key = [line.split(b": ")[1] for line in head.split(b"\\r\\n") if line.lower().startswith(b"sec-websocket-key")][0]
accept = base64.b64encode(hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
connection.sendall(b"HTTP/1.1 101 Switching Protocols\\r\\nUpgrade: websocket\\r\\nConnection: Upgrade\\r\\nSec-WebSocket-Accept: "
                   + accept + b"\\r\\n\\r\\n")
frame = connection.recv(4096); mask = frame[2:6]
text = bytes(byte ^ mask[at % 4] for at, byte in enumerate(frame[6:6 + (frame[1] & 127)]))
connection.sendall(bytes([0x81, len(text) + 3]) + b"re:" + text); connection.recv(10)
"""


def test_websockets_are_forwarded(agent, tmp_path):
    import sys
    server = subprocess.Popen([sys.executable, "-c", WEBSOCKET], stdout=subprocess.PIPE, text=True)
    try:
        port = server.stdout.readline().strip()
        client = websocket.create_connection(f"ws://127.0.0.1:{agent.port}/proxy/{port}/x", timeout=30,
                                             header=[f"X-EXECD-ACCESS-TOKEN: {TOKEN}"])
        client.send("hello")
        assert client.recv() == "re:hello"
        client.close()
    finally:
        server.kill()
        server.wait()


def test_too_much_at_once_is_refused_and_nothing_else_suffers(tmp_path):
    agent = Agent(tmp_path, "--max-executions", "2", "--max-body-size", "1000")
    try:
        held = [agent.raw("POST", "/command", b'{"command": "sleep 1000"}') for _ in range(2)]
        for connection in held:
            connection.recv(100)
        answer = agent.ask("POST", "/command", {"command": "true"})
        assert answer.status == 429 and "2 executions" in answer.json()["message"]
        assert agent.ask("GET", "/ping").status == 200
        assert agent.ask("POST", "/command", {"command": "true " + "x" * 2000}).status == 413
        for identity in re.findall(r'"id":"([0-9a-f]{32})"', agent.ask("GET", "/command").body.decode()):
            agent.ask("DELETE", f"/command?id={identity}")
        eventually("there is room again", lambda: agent.ask("POST", "/command", {"command": "true"}).status == 200)
    finally:
        agent.end()


def test_a_token_in_a_file_and_a_log_in_a_file(tmp_path):
    (tmp_path / "token").write_text("from-a-file\n")
    log = tmp_path / "own.log"
    agent = Agent(tmp_path, "--access-token-file", str(tmp_path / "token"), token="")
    try:
        assert agent.ask("GET", "/ping").status == 401
        assert agent.ask("GET", "/ping", token="from-a-file").status == 200
    finally:
        agent.end()
    assert "from-a-file" not in agent.log.read_text()
    process = subprocess.Popen([AGENT, "--port", "0", "--log-file", str(log)])
    try:
        eventually("it logs there", lambda: log.exists() and "listens on" in log.read_text())
    finally:
        process.terminate()
        assert process.wait(20) == 0
