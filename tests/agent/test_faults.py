"""What goes wrong, and must not take anything else with it."""

import json
import os
import pathlib
import re
import socket
import subprocess
import time

import pytest
from opensandbox.models.execd import RunCommandOpts

from conftest import Agent, eventually, in_threads

ROOT = os.geteuid() == 0

# The full counts are those of `make soak`.
COMMANDS = int(os.environ.get("RUNX_ROUNDS") or 400)


def test_a_million_lines_arrive(agent):
    begun = agent.memory()
    answer = agent.ask("POST", "/command", {"command": "seq 1000000; echo end >&2"}, timeout=240)
    numbers = re.findall(rb'"type":"stdout","text":"(\d+)"', answer.body)
    assert len(numbers) == 1_000_000 and numbers[0] == b"1" and numbers[-1] == b"1000000"
    assert [int(number) for number in numbers[::10007]] == list(range(1, 1_000_001, 10007))
    assert answer.events()[-1]["type"] == "execution_complete"
    assert agent.memory() < begun + 30_000


def test_binary_output_is_told_as_well_as_text_can(agent):
    answer = agent.ask("POST", "/command", {"command": "head -c 3000000 /dev/urandom; printf '\\377\\376\\0x'"})
    events = answer.events()
    assert events[-1]["type"] == "execution_complete"
    assert "".join(e["text"] for e in events if e["type"] == "stdout").endswith("\ufffd\ufffd\0x")


def test_a_line_of_many_mebibytes_is_one_event(agent):
    events = agent.ask("POST", "/command", {"command": "head -c 8000000 /dev/zero | tr '\\0' x"}).events()
    assert [len(e["text"]) for e in events if e["type"] == "stdout"] == [8_000_000]


def test_a_client_that_does_not_read_stops_its_own_stream_only(agent, sdk):
    stuck = [agent.raw("POST", "/command", b'{"command": "cat /dev/zero | tr \'\\\\0\' z | fold -w 100"}') for _ in range(5)]
    eventually("they are full", lambda: blocked(agent), 90)
    before = agent.memory()
    for _ in range(20):
        assert sdk.commands.run("echo fine").text.strip() == "fine"
    time.sleep(0.5)
    assert agent.memory() < before + 5_000 and agent.memory() < 100_000
    for connection in stuck:
        connection.close()
    for identity in re.findall(r'"id":"([0-9a-f]{32})"[^}]*"running":true', agent.ask("GET", "/command").body.decode()):
        agent.ask("DELETE", f"/command?id={identity}")
    eventually("nobody is left", lambda: agent.children() == [])


def blocked(agent):
    """Whether what it reads does not grow any more."""
    path = pathlib.Path("/proc", str(agent.process.pid), "io")
    first = path.read_text()
    time.sleep(0.3)
    return first.splitlines()[0] == path.read_text().splitlines()[0]


def test_many_commands_leave_nothing(agent, tmp_path):
    def some(count):
        def one(number):
            sdk = agent.sdk()
            for at in range(count // 4):
                background = at % 10 == 0
                done = sdk.commands.run("head -c 30000 /dev/zero", opts=RunCommandOpts(background=background))
                assert done.error is None
        in_threads(4, one)

    some(COMMANDS // 4)
    eventually("nobody is left", lambda: agent.children() == [])
    descriptors, memory, files = agent.descriptors(), agent.memory(), set(os.listdir(tmp_path))
    some(COMMANDS)
    eventually("nobody is left", lambda: agent.children() == [])
    # Connections of the SDK's pools, and the logs of background commands.
    eventually("descriptors are closed", lambda: agent.descriptors() <= descriptors + 30 + COMMANDS // 10)
    assert agent.memory() < memory + 6_000 + COMMANDS * 3
    assert set(os.listdir(tmp_path)) == files


def test_what_is_kept_of_commands_is_bounded(tmp_path):
    agent = Agent(tmp_path, "--operation-capacity", "10", "--max-log-size", "2097152")
    try:
        sdk = agent.sdk()
        first = sdk.commands.run("true")
        running = sdk.commands.run("sleep 1000", opts=RunCommandOpts(background=True))
        for _ in range(15):
            sdk.commands.run("true")
        assert agent.ask("GET", f"/command/status/{first.id}").status == 404
        assert sdk.commands.get_command_status(running.id).running
        assert len(agent.ask("GET", "/command").json()["commands"]) <= 11
        big = sdk.commands.run("head -c 20000000 /dev/zero | tr '\\0' a; echo -n END", opts=RunCommandOpts(background=True))
        eventually("it has ended", lambda: not sdk.commands.get_command_status(big.id).running)
        answer = agent.ask("GET", f"/command/{big.id}/logs?cursor=0")
        assert answer.headers["EXECD-COMMANDS-TAIL-CURSOR"] == "20000003" and answer.body.endswith(b"aEND")
        assert 2_000_000 <= len(answer.body) <= 4_300_000
    finally:
        agent.end()


@pytest.mark.skipif(not ROOT, reason="mounts need root")
def test_a_full_disk_loses_logs_and_nothing_else(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", small], check=True)
    agent = Agent(tmp_path, environment={"TMPDIR": str(small)})
    try:
        sdk = agent.sdk()
        big = sdk.commands.run("head -c 3000000 /dev/zero; exit 4", opts=RunCommandOpts(background=True))
        eventually("it has ended", lambda: not sdk.commands.get_command_status(big.id).running)
        assert sdk.commands.get_command_status(big.id).exit_code == 4
        assert sdk.commands.run("echo fine").text.strip() == "fine"
        assert "No space left" in agent.log.read_text()
    finally:
        agent.end()
        subprocess.run(["umount", small], check=True)


def test_hundreds_of_streams_are_open_at_once(agent):
    connections = [agent.raw("POST", "/command", json.dumps({"command": f"echo {n}; sleep 2; echo end {n}"}).encode())
                   for n in range(200)]
    for number, connection in enumerate(connections):
        connection.settimeout(60)
        text = b""
        while not text.endswith(b"0\r\n\r\n"):
            more = connection.recv(65536)
            assert more, text
            text += more
        assert f'"text":"end {number}"'.encode() in text and b"execution_complete" in text
        connection.close()


@pytest.mark.parametrize("request_bytes", [
    b"GET /ping HTTP/1.1\r\n", b"rubbish\r\n\r\n", b"GET /ping HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03",
    b"POST /command HTTP/1.1\r\nHost: x\r\nContent-Length: 99999\r\n\r\n{", b"POST /command HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n\r\n", b"GET /ping HTTP/1.1\r\n" + b"X: y\r\n" * 10_000,
], ids=["half", "words", "version", "tls", "short", "chunks", "path", "headers"])
def test_rubbish_ends_its_own_connection_only(agent, request_bytes):
    connection = agent.connect()
    connection.settimeout(5)
    try:
        connection.sendall(request_bytes)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(4096):
            pass
    except OSError:
        pass
    connection.close()
    assert agent.ask("GET", "/ping").status == 200


def test_a_daemon_that_is_killed_takes_no_file_with_it(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "f").write_text("old")
    agent = Agent(tmp_path)
    from test_files import begin_upload
    connection = begin_upload(agent, f'{{"path": "{tmp_path}/d/f"}}', b"x" * 3_000_000, 1000)
    agent.ask("POST", "/command", {"command": "head -c 100000 /dev/zero", "background": True})
    time.sleep(0.3)
    agent.process.kill()
    agent.process.wait()
    connection.close()
    assert os.listdir(tmp_path / "d") == ["f"] and (tmp_path / "d" / "f").read_text() == "old"
    assert [name for name in os.listdir(tmp_path) if not name.endswith(".log")] == ["d"]


def test_the_daemon_may_be_the_first_process_of_its_namespace(tmp_path):
    if not ROOT:
        pytest.skip("namespaces need root")
    from conftest import AGENT
    agent = Agent(tmp_path, command=["unshare", "--pid", "--fork", "--kill-child=TERM", "--mount-proc", AGENT])
    try:
        sdk = agent.sdk()
        assert sdk.commands.run("echo $PPID").text.strip() == "1"
        for _ in range(20):
            sdk.commands.run("(setsid sh -c 'sleep 0.05; exit 3' &)")
        count = lambda: int(sdk.commands.run("ls -d /proc/[0-9]* | wc -l").text)
        eventually("its orphans were waited for", lambda: count() <= 5)
    finally:
        agent.end()
