"""Figures of the agent, all in one run, beside the floors of this machine. `make bench` calls it."""

import argparse
import json
import os
import pathlib
import shutil
import socket
import statistics
import subprocess
import tempfile
import threading
import time

import figures_e2b
from conftest import TOKEN, Agent


def median(times):
    return statistics.median(times)


def spread(times):
    times = sorted(times)
    return {"median_ms": median(times), "p99_ms": times[min(len(times) * 99 // 100, len(times) - 1)], "min_ms": times[0]}


class Connection:
    """A connection that stays open, and as little of HTTP as will do."""

    def __init__(self, agent):
        self.agent = agent
        self.socket = agent.connect()
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, method, path, body=b""):
        head = (f"{method} {path} HTTP/1.1\r\nHost: x\r\nX-EXECD-ACCESS-TOKEN: {TOKEN}\r\nContent-Length: {len(body)}\r\n\r\n")
        self.socket.sendall(head.encode() + body)

    def until(self, mark):
        text = b""
        while mark not in text:
            more = self.socket.recv(65536)
            assert more, text
            text += more
        return text


def command(agent, rounds):
    """POST /command of `true`, from the request to the end of the stream, beside a plain fork and exec of the same shell."""
    floor, ours = [], []
    connection = Connection(agent)
    body = b'{"command": "true"}'
    for _ in range(rounds):
        begun = time.perf_counter()
        subprocess.run(["bash", "-c", "true"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)
        floor.append((time.perf_counter() - begun) * 1e3)
        begun = time.perf_counter()
        connection.send("POST", "/command", body)
        connection.until(b"\r\n0\r\n\r\n")
        ours.append((time.perf_counter() - begun) * 1e3)
    return {"fork and exec of bash -c true": spread(floor), "POST /command, true": spread(ours),
            "over the floor": {"median_ms": median(ours) - median(floor)}}


def first_byte(agent, rounds):
    """How soon the first output of a command that goes on is there."""
    floor, ours = [], []
    for _ in range(rounds):
        begun = time.perf_counter()
        process = subprocess.Popen(["bash", "-c", "echo x; sleep 0.05"], stdout=subprocess.PIPE)
        process.stdout.read(1)
        floor.append((time.perf_counter() - begun) * 1e3)
        process.wait()
        connection = Connection(agent)
        begun = time.perf_counter()
        connection.send("POST", "/command", b'{"command": "echo x; sleep 0.05"}')
        connection.until(b'"stdout"')
        ours.append((time.perf_counter() - begun) * 1e3)
        connection.until(b"\r\n0\r\n\r\n")
    return {"first byte of a pipe": spread(floor), "first event": spread(ours),
            "over the floor": {"median_ms": median(ours) - median(floor)}}


def ping(agent, connections, rounds):
    """GET /ping on many connections at once: by wrk where it is there, since a client in Python is slower than the daemon."""
    if wrk := shutil.which("wrk"):
        answer = subprocess.run([wrk, "-t1", f"-c{connections}", "-d5s", "--latency", "-H", f"X-EXECD-ACCESS-TOKEN: {TOKEN}",
                                 f"http://127.0.0.1:{agent.port}/ping"], capture_output=True, text=True, check=True).stdout
        words = [line.split() for line in answer.splitlines()]
        find = lambda mark: next(line[1] for line in words if line[:1] == [mark])
        return {f"{connections} connections": {"p50": find("50%"), "p99": find("99%"), "per_second": find("Requests/sec:")}}
    times, lock = [], threading.Lock()

    def one():
        connection, own = Connection(agent), []
        for _ in range(rounds):
            begun = time.perf_counter()
            connection.send("GET", "/ping")
            connection.until(b"\r\n\r\n")
            own.append((time.perf_counter() - begun) * 1e3)
        with lock:
            times.extend(own)

    threads = [threading.Thread(target=one) for _ in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {f"{connections} connections": spread(times)}


def streams(agent, count):
    """Event streams that are all open at once, each of which has to be whole."""
    before = agent.memory()
    begun = time.perf_counter()
    open_ones = []
    for number in range(count):
        connection = Connection(agent)
        connection.send("POST", "/command", json.dumps({"command": f"echo {number}; read x < /tmp/none 2>/dev/null; sleep 20; "
                                                                    f"echo end {number}"}).encode())
        open_ones.append(connection)
    texts = [connection.until(b'"stdout"') for connection in open_ones]
    opened, memory = time.perf_counter() - begun, agent.memory()
    whole = 0
    for number, connection in enumerate(open_ones):
        connection.socket.settimeout(120)
        text = texts[number]
        while b"\r\n0\r\n\r\n" not in text:
            more = connection.socket.recv(65536)
            if not more:
                break
            text += more
        whole += f'"text":"{number}"'.encode() in text and f'"text":"end {number}"'.encode() in text and b"execution_complete" in text
    return {f"{count} streams": {"whole": whole, "all_open_s": opened, "kib_each": (memory - before) / count}}


def transfer(agent, directory, size):
    """Upload and download of one file, beside a copy of it."""
    source = directory / "source"
    with open(source, "wb") as out:
        block = os.urandom(1 << 20)
        for _ in range(size >> 20):
            out.write(block)
    out = {}
    begun = time.perf_counter()
    shutil.copyfile(source, directory / "copy")
    floor = time.perf_counter() - begun
    os.unlink(directory / "copy")
    before, peak, done = agent.memory(), [0], threading.Event()

    def watch():
        while not done.wait(0.02):
            peak[0] = max(peak[0], agent.memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    boundary = "figures"
    head = (f"--{boundary}\r\nContent-Disposition: form-data; name=\"metadata\"; filename=\"metadata\"\r\n\r\n"
            f"{json.dumps({'path': str(directory / 'uploaded')})}\r\n--{boundary}\r\n"
            f"Content-Disposition: form-data; name=\"file\"; filename=\"f\"\r\n\r\n").encode()
    tail = f"\r\n--{boundary}--\r\n".encode()
    begun = time.perf_counter()
    with open(source, "rb") as file:
        connection = agent.raw("POST", "/files/upload", head, [f"Content-Type: multipart/form-data; boundary={boundary}",
                                                               f"Content-Length: {len(head) + size + len(tail)}"])
        connection.sendfile(file)
        connection.sendall(tail)
    answer = connection.recv(4096)
    upload = time.perf_counter() - begun
    assert answer.startswith(b"HTTP/1.1 200"), answer
    assert subprocess.run(["cmp", source, directory / "uploaded"], check=False).returncode == 0
    buffer = bytearray(1 << 20)
    begun = time.perf_counter()
    connection = agent.raw("GET", f"/files/download?path={directory / 'uploaded'}", headers=["Connection: close"])
    total = 0
    while length := connection.recv_into(buffer):
        total += length
    download = time.perf_counter() - begun
    assert total > size
    done.set()
    watcher.join()
    mib = size >> 20
    out["copy of a file"] = {"mib_per_s": mib / floor}
    out["upload"] = {"mib_per_s": mib / upload, "to_copy": floor / upload}
    out["download"] = {"mib_per_s": mib / download, "to_copy": floor / download}
    out["memory while it moves"] = {"before_kib": before, "peak_kib": peak[0]}
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--format", choices=("table", "json"), default="table")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="where to write the JSON, too")
    options = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory(prefix="runx-figures-") as directory:
        directory = pathlib.Path(directory)
        agent = Agent(directory)
        try:
            time.sleep(1)
            results["idle"] = {"memory": {"kib": agent.memory()}}
            results["command"] = command(agent, options.rounds)
            results["first byte"] = first_byte(agent, options.rounds // 2)
            results["ping"] = ping(agent, 100, 50)
            results["streams"] = streams(agent, options.streams)
            results["transfer"] = transfer(agent, directory, options.mib << 20)
        finally:
            agent.end()
        results["e2b"] = figures_e2b.measure(directory, Agent, options.rounds)
    text = json.dumps(results, indent=1)
    if options.json:
        options.json.write_text(text)
    if options.format == "json":
        print(text)
        return
    for suite, rows in results.items():
        for name, numbers in rows.items():
            text = ", ".join(f"{key.replace('_', ' ')} {value:,.2f}" if isinstance(value, float) else f"{key.replace('_', ' ')} {value}"
                             for key, value in numbers.items())
            print(f"{suite:12}{name:34}{text}")


if __name__ == "__main__":
    main()
