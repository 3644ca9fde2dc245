"""Interactive shells, over WebSockets."""

import json
import struct
import time

import pytest
import websocket

from conftest import TOKEN, eventually


class Shell:
    def __init__(self, agent, identity, query=""):
        self.socket = websocket.create_connection(f"ws://127.0.0.1:{agent.port}/pty/{identity}/ws{query}",
                                                  header=[f"X-EXECD-ACCESS-TOKEN: {TOKEN}"], timeout=30)
        self.out, self.err, self.replayed, self.offset, self.told, self.last = b"", b"", b"", None, [], b""

    def step(self):
        """Takes one message. None when the connection was closed, else whether it was text."""
        kind, data = self.socket.recv_data()
        if kind == websocket.ABNF.OPCODE_CLOSE:
            self.told.append({"type": "close", "code": struct.unpack(">H", data[:2])[0]})
            return None
        if kind == websocket.ABNF.OPCODE_TEXT:
            self.told.append(json.loads(data))
            return True
        if data[0] == 1:
            self.out += data[1:]
            self.last = self.last[-100:] + data[1:]
        elif data[0] == 2:
            self.err += data[1:]
        elif data[0] == 3:
            self.offset, self.replayed = struct.unpack(">q", data[1:9])[0], self.replayed + data[9:]
            self.last = data[9:]
        return False

    def until(self, check):
        deadline = time.monotonic() + 60
        while not check(self):
            went_on = time.monotonic() < deadline and self.step() is not None
            assert went_on or check(self), (self.out, self.told)
        return self

    def hears(self, kind):
        return self.until(lambda s: any(told["type"] == kind for told in s.told)).find(kind)

    def find(self, kind):
        return [told for told in self.told if told["type"] == kind][-1]

    def type(self, text):
        self.socket.send_binary(b"\0" + text.encode())

    def say(self, **message):
        self.socket.send(json.dumps(message))


@pytest.fixture
def make(agent):
    def make(**body):
        answer = agent.ask("POST", "/pty", body)
        assert answer.status == 201
        return answer.json()["session_id"]
    return make


def test_a_terminal_is_one(agent, make, tmp_path):
    identity = make(cwd=str(tmp_path / "made"))
    assert agent.ask("GET", f"/pty/{identity}").json()["running"] is False
    shell = Shell(agent, identity)
    assert shell.hears("connected")["mode"] == "pty"
    shell.type("tty; stty size; pwd\n")
    shell.until(lambda s: b"24 80" in s.out and str(tmp_path / "made").encode() in s.out and b"/dev/pts/" in s.out)
    shell.say(type="resize", cols=132, rows=50)
    shell.type("stty size\n")
    shell.until(lambda s: b"50 132" in s.out)
    shell.type("sleep 1000\n")
    time.sleep(0.3)
    shell.type("\x03")
    shell.say(type="stdin", data="echo after $((1+1))\n")
    shell.until(lambda s: b"after 2" in s.out)
    shell.say(type="ping")
    shell.hears("pong")
    shell.type("exit 7\n")
    assert shell.hears("exit")["exit_code"] == 7
    assert shell.hears("close")["code"] == 1000
    assert agent.ask("GET", f"/pty/{identity}").json()["running"] is False


def test_pipes_keep_the_streams_apart(agent, make):
    shell = Shell(agent, make(), "?pty=0")
    assert shell.hears("connected")["mode"] == "pipe"
    shell.type("echo out; echo err >&2; tty\n")
    shell.until(lambda s: s.out == b"out\nnot a tty\n" and s.err == b"err\n")


def test_a_command_runs_instead_of_a_shell(agent, make):
    shell = Shell(agent, make(command="echo from a command; exit 3"))
    assert shell.hears("exit")["exit_code"] == 3
    assert b"from a command" in shell.replayed + shell.out


def test_who_comes_back_misses_nothing(agent, make):
    identity = make()
    shell = Shell(agent, identity)
    shell.hears("connected")
    shell.type("echo first; sleep 0.5; echo second\n")
    shell.until(lambda s: s.out.count(b"first") >= 2)
    seen = len(shell.out)
    shell.socket.close()
    eventually("it went on", lambda: agent.ask("GET", f"/pty/{identity}").json()["output_offset"] > seen + 6)
    again = Shell(agent, identity, f"?since={seen}")
    again.hears("connected")
    again.until(lambda s: b"second" in s.replayed + s.out)
    assert again.offset == seen
    # From the beginning it is the same, in one piece.
    again.socket.close()
    whole = eventually("the place is free", lambda: try_connect(agent, identity))
    whole.hears("connected")
    assert whole.offset == 0 and whole.replayed.startswith(shell.out)


def try_connect(agent, identity):
    try:
        return Shell(agent, identity)
    except websocket.WebSocketBadStatusException:
        return None


def test_one_types_until_another_takes_over(agent, make):
    identity = make()
    first = Shell(agent, identity)
    first.hears("connected")
    with pytest.raises(websocket.WebSocketBadStatusException) as refused:
        Shell(agent, identity)
    assert refused.value.status_code == 409 and b"ALREADY_CONNECTED" in refused.value.resp_body
    second = Shell(agent, identity, "?takeover=1")
    assert first.hears("close")["code"] == 4001
    second.hears("connected")
    second.type("echo mine\n")
    second.until(lambda s: b"mine" in s.out)


def test_viewers_see_and_do_nothing(agent, make):
    identity = make()
    shell = Shell(agent, identity)
    shell.hears("connected")
    viewers = [Shell(agent, identity, "?mode=viewer") for _ in range(3)]
    for viewer in viewers:
        viewer.hears("connected")
        viewer.type("echo no\n")
        assert viewer.hears("error")["code"] == "READ_ONLY"
        viewer.say(type="ping")
        viewer.hears("pong")
    shell.type("echo seen\n")
    for viewer in viewers:
        viewer.until(lambda s: b"seen" in s.out)
        assert b"echo no" not in viewer.out


def test_signals_reach_the_group_and_nonsense_is_said(agent, make):
    shell = Shell(agent, make(command="sleep 1000"))
    shell.hears("connected")
    shell.say(type="dance")
    assert shell.hears("error")["code"] == "INVALID_FRAME"
    shell.socket.send("no json")
    shell.say(type="signal", signal="SIGKILL")
    assert shell.hears("exit")["exit_code"] == -1


def test_a_new_shell_follows_one_that_has_ended(agent, make):
    identity = make()
    shell = Shell(agent, identity)
    shell.hears("connected")
    shell.type("exit\n")
    shell.hears("close")
    again = eventually("the place is free", lambda: try_connect(agent, identity))
    again.hears("connected")
    again.type("echo again\n")
    again.until(lambda s: b"again" in s.out)


def test_a_shell_that_is_deleted_is_gone(agent, make):
    identity = make()
    shell = Shell(agent, identity)
    shell.hears("connected")
    assert agent.ask("DELETE", f"/pty/{identity}").status == 200
    assert shell.hears("exit")["exit_code"] == -1
    for method in ("GET", "DELETE"):
        answer = agent.ask(method, f"/pty/{identity}")
        assert (answer.status, answer.json()["code"]) == (404, "CONTEXT_NOT_FOUND")
    eventually("nobody is left", lambda: agent.children() == [])


def test_more_than_is_kept_is_told_with_its_offset(agent, make):
    identity = make(command="head -c 3000000 /dev/zero | tr '\\0' x; sleep 1000")
    first = Shell(agent, identity)
    first.hears("connected")
    first.socket.close()
    eventually("all of it is out", lambda: agent.ask("GET", f"/pty/{identity}").json()["output_offset"] == 3_000_000)
    again = eventually("the place is free", lambda: try_connect(agent, identity))
    again.hears("connected")
    assert again.offset == 3_000_000 - (1 << 20) and len(again.replayed) == 1 << 20


def test_a_viewer_that_does_not_read_holds_up_nobody(agent, make):
    identity = make()
    shell = Shell(agent, identity)
    shell.hears("connected")
    stuck = Shell(agent, identity, "?mode=viewer")
    stuck.hears("connected")
    shell.type("head -c 20000000 /dev/zero | tr '\\0' y; echo; echo d''one\n")
    shell.until(lambda s: b"done" in s.last)
    assert agent.memory() < 100_000


def test_a_program_that_writes_without_end_can_be_stopped(agent, make):
    shell = Shell(agent, make())
    shell.hears("connected")
    shell.type("yes\n")
    shell.until(lambda s: len(s.out) > 1_000_000)
    shell.type("\x03")
    shell.type("echo stop''ped\n")
    shell.until(lambda s: b"stopped" in s.last or b"stopped" in s.out[-200:])
