"""The daemon's own API: ports of the sandbox that are had from outside."""

import http.client
import http.server
import json
import os
import socket
import socketserver
import ssl
import subprocess
import threading
import time

import pytest
import websocket

from conftest import TOKEN, eventually, in_threads


class Site(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        body = json.dumps({"path": self.path, "headers": dict(self.headers)}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def site():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()


def get(port, path, headers=None, context=None, host="127.0.0.1"):
    kind = http.client.HTTPSConnection if context else http.client.HTTPConnection
    connection = kind(host, port, timeout=30, **({"context": context} if context else {}))
    connection.request("GET", path, headers=headers or {})
    answer = connection.getresponse()
    return answer.status, answer.read()


def port_of(forward):
    return int(forward["listen"].rsplit(":", 1)[1])


def test_http_is_forwarded_to_who_has_the_token(own, site):
    forward = own.ask("POST", "/forwards", {"protocol": "http", "listen": "127.0.0.1:0", "target": f"http://127.0.0.1:{site}/base/",
                                            "token": "forward-token"}, 201)
    assert "forward-token" not in json.dumps(forward) and forward["authenticated"]
    port = port_of(forward)
    assert get(port, "/x")[0] == 401 and get(port, "/x", {"Authorization": "Bearer wrong"})[0] == 401
    status, body = get(port, "/x?y=1", {"Authorization": "Bearer forward-token", "X-Own": "1"})
    seen = json.loads(body)
    assert status == 200 and seen["path"] == "/base/x?y=1" and seen["headers"]["x-own"] == "1"
    assert "forward-token" not in body.decode() and seen["headers"]["x-forwarded-for"] == "127.0.0.1"
    # The application's own authorization goes through.
    _, body = get(port, "/x", {"X-Runx-Forward-Token": "forward-token", "Authorization": "Bearer app"})
    assert json.loads(body)["headers"]["authorization"] == "Bearer app" and "forward-token" not in body.decode()
    now = own.ask("GET", f"/forwards/{forward['id']}")
    assert (now["accepted"], now["refused"], now["failed"]) == (2, 2, 0)
    assert [one["id"] for one in own.ask("GET", "/forwards")["forwards"]] == [forward["id"]]
    own.ask("DELETE", f"/forwards/{forward['id']}", status=204)
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=5)
    own.ask("DELETE", f"/forwards/{forward['id']}", status=404)


@pytest.fixture
def certificate(tmp_path):
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
                    "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-addext", "basicConstraints=critical,CA:FALSE", "-keyout", "key.pem", "-out", "cert.pem"],
                   cwd=tmp_path, check=True, capture_output=True)
    return (tmp_path / "cert.pem").read_text(), (tmp_path / "key.pem").read_text(), tmp_path


def test_https_at_either_end(own, site, certificate):
    cert, key, directory = certificate
    outer = own.ask("POST", "/forwards", {"protocol": "https", "listen": "127.0.0.1:0", "target": f"http://127.0.0.1:{site}",
                                          "tls": {"certificate": cert, "key": key}}, 201)
    trusting = ssl.create_default_context(cafile=str(directory / "cert.pem"))
    status, body = get(port_of(outer), "/secure", context=trusting, host="localhost")
    assert status == 200 and json.loads(body)["headers"]["x-forwarded-proto"] == "https"
    # And a target that is itself behind TLS.
    def inner(**more):
        return own.ask("POST", "/forwards", {"protocol": "http", "listen": "127.0.0.1:0",
                                             "target": f"https://localhost:{port_of(outer)}", **more}, 201)
    assert get(port_of(inner(target_ca=cert)), "/a")[0] == 200
    assert get(port_of(inner(target_insecure=True)), "/a")[0] == 200
    if os.path.exists("/etc/ssl/certs/ca-certificates.crt"):
        assert get(port_of(inner()), "/a")[0] == 502
    assert key.strip() not in own.agent.log.read_text()
    refused = own.ask("POST", "/forwards", {"protocol": "https", "listen": "127.0.0.1:0", "target": "http://127.0.0.1:1",
                                            "tls": {"certificate": cert, "key": "nonsense"}}, 400)
    assert "tls.key" in refused["message"]


def test_tcp_goes_both_ways_and_by_address(own):
    class Echo(socketserver.BaseRequestHandler):
        def handle(self):
            while data := self.request.recv(65536):
                self.request.sendall(data.upper())

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads, request_queue_size = True, 128
    server = Server(("127.0.0.1", 0), Echo)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    target = f"127.0.0.1:{server.server_address[1]}"

    def make(**more):
        return own.ask("POST", "/forwards", {"protocol": "tcp", "listen": "127.0.0.1:0", "target": target, **more}, 201)
    forward = make(allow=["127.0.0.0/8"])

    def one(_):
        with socket.create_connection(("127.0.0.1", port_of(forward)), timeout=30) as client:
            client.sendall(b"abc" * 50_000)
            client.shutdown(socket.SHUT_WR)
            got = b""
            while data := client.recv(65536):
                got += data
            assert got == b"ABC" * 50_000
    in_threads(20, one)
    eventually("none is open", lambda: own.ask("GET", f"/forwards/{forward['id']}")["open"] == 0)
    now = own.ask("GET", f"/forwards/{forward['id']}")
    assert now["accepted"] == 20 and now["bytes_sent"] == now["bytes_received"] == 20 * 150_000
    # Somebody of elsewhere is turned away, and who says nothing is let go.
    elsewhere = make(allow=["10.0.0.0/8"])
    with socket.create_connection(("127.0.0.1", port_of(elsewhere)), timeout=30) as client:
        assert client.recv(1) == b""
    silent = make(idle_timeout_ms=200)
    with socket.create_connection(("127.0.0.1", port_of(silent)), timeout=30) as client:
        assert client.recv(1) == b""
    # What is open ends with its forward.
    with socket.create_connection(("127.0.0.1", port_of(forward)), timeout=30) as client:
        client.sendall(b"x")
        assert client.recv(1) == b"X"
        own.ask("DELETE", f"/forwards/{forward['id']}", status=204)
        assert client.recv(1) == b""
    server.shutdown()
    server.server_close()
    # The target is gone: it is tried again, and then the client is let go.
    with socket.create_connection(("127.0.0.1", port_of(make(retries=2, retry_delay_ms=10))), timeout=30) as client:
        assert client.recv(1) == b""


def test_a_target_that_comes_late_is_waited_for(own):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    forward = own.ask("POST", "/forwards", {"protocol": "http", "listen": "127.0.0.1:0", "target": f"http://127.0.0.1:{port}",
                                            "retries": 100, "retry_delay_ms": 50}, 201)
    found = []
    client = threading.Thread(target=lambda: found.append(get(port_of(forward), "/late")))
    client.start()
    time.sleep(0.3)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    client.join(30)
    server.shutdown()
    assert found and found[0][0] == 200
    gone = own.ask("POST", "/forwards", {"protocol": "http", "listen": "127.0.0.1:0", "target": "http://127.0.0.1:1"}, 201)
    assert get(port_of(gone), "/")[0] == 502


def test_udp(own):
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind(("127.0.0.1", 0))
    server.settimeout(30)

    def echo():
        try:
            while True:
                data, peer = server.recvfrom(65536)
                server.sendto(data[::-1], peer)
        except OSError:
            pass
    threading.Thread(target=echo, daemon=True).start()
    forward = own.ask("POST", "/forwards", {"protocol": "udp", "listen": "127.0.0.1:0", "idle_timeout_ms": 300,
                                            "target": f"127.0.0.1:{server.getsockname()[1]}"}, 201)
    clients = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(5)]
    for number, client in enumerate(clients):
        client.settimeout(30)
        client.sendto(f"ab{number}".encode(), ("127.0.0.1", port_of(forward)))
    assert [client.recv(100) for client in clients] == [f"{number}ba".encode() for number in range(5)]
    assert own.ask("GET", f"/forwards/{forward['id']}")["accepted"] == 5
    eventually("who is silent is forgotten", lambda: own.ask("GET", f"/forwards/{forward['id']}")["open"] == 0)
    server.close()


def test_websockets_and_nothing_else(own):
    process = own.start(["cat"], terminal={"columns": 80, "rows": 24})
    forward = own.ask("POST", "/forwards", {"protocol": "websocket", "listen": "127.0.0.1:0",
                                            "target": f"ws://127.0.0.1:{own.agent.port}"}, 201)
    path = f"/runx/v1/processes/{process['id']}/attach"
    assert get(port_of(forward), path)[0] == 426
    client = websocket.create_connection(f"ws://127.0.0.1:{port_of(forward)}{path}",
                                         header=[f"Authorization: Bearer {TOKEN}"], timeout=30)
    client.send_binary(b"hello\n")
    assert "hello" in json.loads(client.recv())["text"]
    own.ask("DELETE", f"/forwards/{forward['id']}", status=204)
    with pytest.raises((websocket.WebSocketException, OSError)):
        for _ in range(100):
            client.recv()


def test_a_forward_that_would_let_anybody_in_is_refused(own):
    answer = own.ask("POST", "/forwards", {"protocol": "tcp", "listen": "0.0.0.0:0", "target": "127.0.0.1:1"}, 400)
    assert "insecure" in answer["message"]
    own.ask("POST", "/forwards", {"protocol": "tcp", "listen": f"127.0.0.1:{own.agent.port}", "target": "127.0.0.1:1"}, 409)
    assert own.ask("GET", "/forwards")["forwards"] == []
