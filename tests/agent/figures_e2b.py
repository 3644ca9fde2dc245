"""Figures of the envd protocol through E2B's SDK, beside the SDK's own floor: a stub that answers at once."""

import json
import multiprocessing
import os
import socket
import statistics
import struct
import subprocess
import threading
import time

from conftest import eventually
from test_e2b import sandbox


def frame(flags, value):
    payload = json.dumps(value).encode()
    return struct.pack(">BI", flags, len(payload)) + payload


def serve(listener):
    """Answers each Start as a command that has ended, and each file with one byte."""
    started = frame(0, {"event": {"start": {"pid": 1}}}) + frame(0, {"event": {"end": {"exited": True, "status": "exit status 0"}}})
    body = started + frame(2, {})
    stream = (b"HTTP/1.1 200 OK\r\ncontent-type: application/connect+json\r\ncontent-length: %d\r\n\r\n" % len(body)) + body
    written = b'[{"path":"/x","name":"x","type":"file"}]'

    def one(client):
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        buffer = b""
        while True:
            while b"\r\n\r\n" not in buffer:
                more = client.recv(1 << 20)
                if not more:
                    return
                buffer += more
            head, _, buffer = buffer.partition(b"\r\n\r\n")
            lower = head.lower()
            if b"transfer-encoding: chunked" in lower:
                while not buffer.endswith(b"0\r\n\r\n"):
                    buffer += client.recv(1 << 20)
                buffer = b""
            elif b"content-length: " in lower:
                length = int(lower.split(b"content-length: ")[1].split(b"\r\n")[0])
                got = len(buffer)
                while got < length:
                    got += len(client.recv(1 << 20))
                buffer = b""
            if head.startswith(b"POST /process"):
                client.sendall(stream)
            elif head.startswith(b"POST"):
                client.sendall(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(written) + written)
            else:
                size = int(head.split(b"size-")[1].split(b"&")[0].split(b" ")[0]) if b"size-" in head else 1
                client.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size + b"x" * size)
    while True:
        client, _ = listener.accept()
        threading.Thread(target=one, args=(client,), daemon=True).start()


class Stub:
    def __init__(self):
        listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = listener.getsockname()[1]
        self.process = multiprocessing.Process(target=serve, args=(listener,), daemon=True)
        self.process.start()

    def envd_port(self):
        return self.port


def compared(work, ours, floor, rounds):
    """In turns, so that both see the same machine."""
    times = {id(ours): [], id(floor): []}
    for _ in range(rounds):
        for box in (ours, floor):
            begun = time.perf_counter()
            work(box)
            times[id(box)].append((time.perf_counter() - begun) * 1e3)
    own, stub = statistics.median(times[id(ours)]), statistics.median(times[id(floor)])
    return {"median_ms": own, "stub_ms": stub, "ratio": own / stub}


def measure(directory, agent_class, rounds=100):
    stub = Stub()
    agent = agent_class(directory, "--envd-port", "0")
    try:
        eventually("envd", agent.envd_port)
        ours, floor = sandbox(agent), sandbox(stub)
        out = {}
        # What a login shell reads at its start is its user's: nobody's has nothing to read.
        user = {"user": "nobody", "cwd": "/"} if os.geteuid() == 0 else {}
        for name, work, count in [
            ("commands.run(true)", lambda box: box.commands.run("true", **user), rounds),
            ("files.write, 1 byte", lambda box: box.files.write(f"{directory}/small", b"x"), rounds),
            ("files.read, 1 byte", lambda box: box.files.read(f"{directory}/small", format="bytes"), rounds),
        ]:
            work(ours), work(floor)
            out[name] = compared(work, ours, floor, count)
        times = []
        for _ in range(rounds):
            begun = time.perf_counter()
            subprocess.run(["bash", "-l", "-c", "true"], cwd="/", env={"PATH": os.environ["PATH"], "HOME": "/nonexistent"},
                           stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)
            times.append((time.perf_counter() - begun) * 1e3)
        out["commands.run(true)"]["shell_ms"] = statistics.median(times)
        size = 100 << 20
        block = os.urandom(1 << 20) * 100
        for name, work in [
            ("files.write, 100 MiB", lambda box: box.files.write(f"{directory}/size-{size}", block)),
            ("files.read, 100 MiB", lambda box: box.files.read(f"{directory}/size-{size}", format="bytes")),
        ]:
            work(ours), work(floor)
            out[name] = compared(work, ours, floor, 5)
        idle = agent.memory()
        handles = [ours.commands.run("sleep 1000", background=True, timeout=0) for _ in range(100)]
        eventually("they run", lambda: len(agent.children()) >= 100)
        out["memory"] = {"idle_kib": idle, "with_100_processes_kib": agent.memory()}
        for handle in handles:
            handle.kill()
        return out
    finally:
        agent.end()
        stub.process.terminate()
