"""The daemon's own API, below /runx/v1."""

import base64
import http.client
import http.server
import json
import os
import pathlib
import re
import signal
import socket
import socketserver
import ssl
import subprocess
import sys
import threading
import time

import pytest
import websocket

from conftest import TOKEN, Agent, eventually, in_threads

ROOT = os.geteuid() == 0


class Own:
    """Requests to it."""

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


# --- Who may -----------------------------------------------------------------------------------------


def test_it_needs_the_token_in_one_of_three_headers(agent):
    def status(headers):
        return agent.ask("GET", "/runx/v1/system", headers=headers, token="").status
    assert status({}) == 401 and status({"Authorization": "Bearer wrong"}) == 401
    assert status({"X-Access-Token": TOKEN + "x"}) == 401
    assert agent.ask("GET", "/runx/v1/nothing", token="").status == 401
    for headers in ({"Authorization": f"Bearer {TOKEN}"}, {"X-Access-Token": TOKEN}, {"X-EXECD-ACCESS-TOKEN": TOKEN}):
        assert status(headers) == 200
    answer = agent.ask("GET", "/runx/v1/nothing")
    assert answer.status == 404 and answer.json()["code"] == "not_found"


def test_it_is_on_the_other_port_as_well_and_goes_by_its_token(tmp_path):
    agent = Agent(tmp_path, "--envd-port", "0")
    try:
        port = eventually("envd", agent.envd_port)

        def status(token):
            connection = http.client.HTTPConnection("127.0.0.1", port)
            connection.request("GET", "/runx/v1/health", headers={"Authorization": f"Bearer {token}"})
            return connection.getresponse().status
        assert (status(TOKEN), status("other")) == (200, 401)
    finally:
        agent.end()


# --- Processes -----------------------------------------------------------------------------------------


def test_a_process_is_known_from_its_start_to_after_its_end(own):
    process = own.start("echo out; echo err >&2; exit 3", tag="first", cwd="/")
    ended = own.wait(process)
    assert (ended["state"], ended["exit_code"], ended["signal"], ended["tag"]) == ("exited", 3, None, "first")
    assert ended["created_at"] <= ended["started_at"] <= ended["finished_at"]
    assert ended["usage"]["peak_memory_bytes"] > 0 and ended["output"]["end_offset"] == 8
    events = own.output(ended)
    assert {(event["type"], event.get("text")) for event in events[:-1]} == {("stdout", "out\n"), ("stderr", "err\n")}
    assert events[-1]["type"] == "end" and events[-1]["process"]["exit_code"] == 3
    # By its tag, too, and again from any offset.
    assert own.ask("GET", "/processes/first")["id"] == process["id"]
    assert own.output(process, offset=8)[0]["type"] == "end"
    own.ask("DELETE", f"/processes/{process['id']}", status=204)
    own.ask("GET", f"/processes/{process['id']}", status=404)


def test_pages_of_processes(own):
    for number in range(5):
        own.wait(own.start(["true"], tag=f"n{number}"))
    running = own.start("sleep 100")
    page = own.ask("GET", "/processes?offset=2&limit=2")
    assert page["total"] == 6 and [one["tag"] for one in page["processes"]] == ["n2", "n3"]
    assert own.ask("GET", "/processes?state=running")["processes"][0]["id"] == running["id"]
    assert "limit" in own.ask("GET", "/processes?limit=0", status=400)["message"]


@pytest.mark.parametrize("body, word", [
    ({}, "argv"), ({"argv": []}, "argv"), ({"argv": ["a"], "command": "b"}, "argv"), ({"argv": ["a\0"]}, "NUL"),
    ({"command": "x", "cwd": "relative"}, "cwd"), ({"command": "x", "cwd": "/nowhere"}, "cwd"),
    ({"command": "x", "env": {"A=B": "c"}}, "A=B"), ({"command": "x", "user": "nobody-of-that-name"}, "user"),
    ({"command": "x", "unknown": 1}, "unknown"), ({"command": "x", "confinement": {"limits": {"cpu": 1}}}, "cpu"),
    ({"command": "x", "confinement": {"capabilities": ["CAP_NONSENSE"]}}, "NONSENSE"),
    ({"command": "x", "confinement": {"seccomp": "strict"}}, "strict"),
    ({"command": "x", "confinement": {"readonly_paths": ["/no/such"]}}, "/no/such"),
    ({"command": "x", "keep_output_bytes": 1 << 40}, "keep_output_bytes"),
    ({"command": "x", "restart": {"when": "sometimes"}}, "sometimes"),
    ({"command": "x", "terminal": {"columns": 80, "rows": 24}, "stdout": False}, "stdout"),
])
def test_what_makes_no_sense_is_refused_by_its_name(own, body, word):
    assert word in own.ask("POST", "/processes", body, 400)["message"]
    assert own.ask("GET", "/processes")["total"] == 0


def test_what_cannot_be_started_is_said_and_not_kept(own):
    assert "executable file not found" in own.refused(["no-such-program"], status=404)
    assert own.ask("GET", "/processes")["total"] == 0


def test_signals_of_all_kinds(own):
    script = "trap 'echo usr1' USR1; trap 'echo rt' RTMIN+2; echo ready; while :; do sleep 0.05; done"
    process = own.start(["bash", "-c", script])
    path = f"/processes/{process['id']}"
    eventually("it is ready", lambda: own.ask("GET", path)["output"]["end_offset"])
    own.ask("POST", f"{path}/signal", {"signal": "SIGUSR1", "group": False}, 204)
    own.ask("POST", f"{path}/signal", {"signal": "RTMIN+2", "group": False}, 204)
    eventually("both came", lambda: {"usr1", "rt"} <= set("".join(
        event.get("text", "") for event in own.output(process, follow=False)).split()))
    own.ask("POST", f"{path}/signal", {"signal": "STOP"}, 204)
    eventually("it is stopped", lambda: own.ask("GET", path)["state"] == "stopped")
    own.ask("POST", f"{path}/signal", {"signal": "CONT"}, 204)
    eventually("it goes on", lambda: own.ask("GET", path)["state"] == "running")
    own.ask("POST", f"{path}/signal", {"signal": 9}, 204)
    ended = own.wait(process)
    assert (ended["signal"], ended["signal_name"], ended["exit_code"]) == (9, "SIGKILL", None)
    assert "does not run" in own.ask("POST", f"{path}/signal", {"signal": 9}, 409)["message"]
    for wrong in ("NONSENSE", 0, 65):
        own.ask("POST", f"{path}/signal", {"signal": wrong}, 400)


def test_time_that_is_up_is_asked_first_and_then_taken(own):
    asked = own.start(["bash", "-c", "trap 'echo bye; exit 9' TERM; echo; while :; do sleep 0.05; done"],
                      timeout_ms=300, grace_ms=20_000)
    stubborn = own.start(["bash", "-c", "trap '' TERM; while :; do sleep 0.05; done"], timeout_ms=300, grace_ms=200)
    ended = own.wait(asked)
    assert (ended["exit_code"], ended["ended_by"]) == (9, "timeout") and "bye" in own.text(asked)
    ended = own.wait(stubborn)
    assert (ended["signal"], ended["ended_by"]) == (9, "timeout")


def test_standard_input(own):
    process = own.start("cat", stdin=True)
    path = f"/runx/v1/processes/{process['id']}/stdin"
    assert own.agent.ask("POST", path, b"typed\n").status == 204
    assert own.agent.ask("DELETE", path).status == 204
    assert own.wait(process)["exit_code"] == 0 and own.text(process) == "typed\n"
    closed = own.start("sleep 100")
    assert own.agent.ask("POST", f"/runx/v1/processes/{closed['id']}/stdin", b"x").status == 409


def test_output_that_is_not_wanted_is_not_kept(own):
    process = own.start("echo out; echo err >&2", stdout=False)
    own.wait(process)
    assert [event["type"] for event in own.output(process)] == ["stderr", "end"]


def test_output_that_is_no_text_comes_in_base64(own):
    process = own.start(["printf", "\\377\\000\\376"])
    own.wait(process)
    assert base64.b64decode(own.output(process)[0]["base64"]) == b"\xff\x00\xfe"


def test_who_comes_too_late_is_told_how_much_he_missed(own):
    process = own.start("seq 100000", keep_output_bytes=10_000)
    own.wait(process)
    events = own.output(process)
    lost, rest = events[0], "".join(event["text"] for event in events[1:-1])
    assert lost["type"] == "lost" and lost["bytes"] == lost["end_offset"] and len(rest) == 10_000
    assert rest.endswith("99999\n100000\n") and lost["bytes"] + len(rest) == len("".join(f"{n}\n" for n in range(1, 100_001)))


def test_a_reader_that_stops_delays_nobody(own):
    process = own.start("for i in $(seq 300); do head -c 20000 /dev/zero | tr '\\0' x; done; echo; echo done",
                        keep_output_bytes=8 << 20)
    path = f"/runx/v1/processes/{process['id']}/output?follow=true"
    stuck = [own.agent.raw("GET", path) for _ in range(5)]
    assert own.wait(process)["exit_code"] == 0
    assert own.text(process).endswith("done\n")
    for connection in stuck:
        connection.close()


def test_a_process_is_started_again_as_its_policy_says(own, tmp_path):
    never = own.start("exit 1")
    process = own.start(f"echo run; test -e {tmp_path}/good", restart={"when": "on-failure", "delay_ms": 10})
    path = f"/processes/{process['id']}"
    eventually("it was started again", lambda: own.ask("GET", path)["restarts"] >= 2)
    (tmp_path / "good").touch()
    ended = own.wait(process)
    assert (ended["state"], ended["exit_code"]) == ("exited", 0)
    assert own.text(process).count("run") == ended["restarts"] + 1
    limited = own.wait(own.start("exit 1", restart={"when": "always", "most": 3, "delay_ms": 1}))
    assert (limited["restarts"], limited["exit_code"]) == (3, 1)
    assert own.wait(never)["restarts"] == 0
    # One that shall always run ends when it is told to.
    always = own.start("sleep 1000", restart={"when": "always", "delay_ms": 1})
    first = always["pid"]
    own.ask("POST", f"/processes/{always['id']}/signal", {"signal": "KILL"}, 204)
    eventually("another one", lambda: own.ask("GET", f"/processes/{always['id']}")["pid"] not in (None, first))
    stopped = own.ask("POST", f"/processes/{always['id']}/stop", {})
    assert stopped["state"] == "exited" and stopped["signal"] == 15


def test_attached_over_a_websocket(own):
    process = own.start(["bash", "--norc", "--noprofile"], terminal={"columns": 90, "rows": 20}, env={"PS1": "$ "})
    url = f"ws://127.0.0.1:{own.agent.port}/runx/v1/processes/{process['id']}/attach"
    client = websocket.create_connection(url, header=[f"Authorization: Bearer {TOKEN}"], timeout=60)
    seen = []

    def until(text):
        while text not in "".join(seen):
            event = json.loads(client.recv())
            assert event["type"] == "terminal", event
            seen.append(event["text"])
    client.send(json.dumps({"type": "resize", "columns": 101, "rows": 33}))
    client.send_binary(b"stty size; echo $((40+2))\n")
    until("33 101")
    until("42\r\n")
    client.send(json.dumps({"type": "nonsense"}))
    client.send_binary(b"exit 5\n")
    while True:
        event = json.loads(client.recv())
        if event["type"] == "end":
            break
        assert event["type"] in ("terminal", "error"), event
    assert event["process"]["exit_code"] == 5
    client.close()
    # Everything again, from the beginning.
    client = websocket.create_connection(url + "?offset=0", header=[f"Authorization: Bearer {TOKEN}"], timeout=60)
    again = ""
    while (event := json.loads(client.recv()))["type"] != "end":
        again += event["text"]
    assert "42\r\n" in again
    with pytest.raises(websocket.WebSocketBadStatusException):
        websocket.create_connection(url, timeout=60)


def test_the_environment_is_told_to_nobody(own):
    process = own.start("sleep 100", env={"SECRET": "s3cr3t-value"})
    assert "s3cr3t-value" not in json.dumps(own.ask("GET", f"/processes/{process['id']}"))
    assert "s3cr3t-value" not in own.agent.log.read_text()


def test_many_at_once(own):
    def one(number):
        text, ended = own.done(f"echo {number}; exit {number % 7}")
        assert (text, ended["exit_code"]) == (str(number), number % 7)
    in_threads(40, one)
    eventually("none is left", lambda: own.agent.children() == [])


# --- Confinement ---------------------------------------------------------------------------------------


def confined(**more):
    return {"confinement": more}


def limited(**more):
    return {"confinement": {"limits": more}}


def test_limits_of_each_process(own):
    text, _ = own.done("ulimit -n; ulimit -c; ulimit -s", **limited(open_files=37, core_bytes=0, stack_bytes=1 << 20))
    assert text.split() == ["37", "0", "1024"]
    _, ended = own.done("head -c 100000 /dev/zero > big; echo $?", cwd=str(own.agent.directory), **limited(file_size_bytes=4096))
    assert (own.agent.directory / "big").stat().st_size == 4096


def test_processor_time_runs_out_also_for_its_children(own):
    _, ended = own.done("while :; do :; done", **limited(cpu_time_ms=300))
    assert ended["ended_by"] == "cpu_time" and ended["signal"] in (signal.SIGKILL, signal.SIGXCPU)
    assert ended["usage"]["cpu_time_ms"] >= 200
    if own.ask("GET", "/capabilities")["cgroup"]["available"]:
        _, ended = own.done("(while :; do :; done) & wait", **limited(cpu_time_ms=300))
        assert ended["ended_by"] == "cpu_time"
    # Sleeping costs nothing.
    assert own.done("sleep 0.5", **limited(cpu_time_ms=300))[1]["exit_code"] == 0


def test_memory_runs_out_for_it_and_for_nobody_else(own):
    script = "import sys\nx = []\nfor i in range(400): x.append(bytearray(1 << 20))\nprint('all')"
    text, ended = own.done([sys.executable, "-c", script], **limited(memory_bytes=64 << 20))
    assert text == "" and ended["exit_code"] != 0, ended
    if own.ask("GET", "/capabilities")["cgroup"]["available"]:
        assert (ended["ended_by"], ended["signal"]) == ("memory", 9)
    assert own.done([sys.executable, "-c", "print('fine')"], **limited(memory_bytes=256 << 20))[0] == "fine"


def test_the_number_of_processes(own):
    if not own.ask("GET", "/capabilities")["cgroup"]["available"]:
        pytest.skip("no cgroup can be made here")
    script = ("import os, time\nn = 0\ntry:\n    while os.fork():\n        n += 1\n    time.sleep(1000)\n"
              "except OSError as e:\n    print(n, e.errno)")
    text, ended = own.done([sys.executable, "-c", script], **limited(processes=4))
    assert text == "3 11" and ended["exit_code"] == 0, (text, ended)


def test_nothing_outlives_a_group(own):
    if not own.ask("GET", "/capabilities")["cgroup"]["available"]:
        pytest.skip("no cgroup can be made here")
    text, _ = own.done("setsid sleep 1000 > /dev/null 2>&1 & echo $!", **limited(processes=100))
    eventually("it is gone", lambda: not pathlib.Path("/proc", text).exists())

    def empty(path):
        try:
            return not pathlib.Path(path, "cgroup.procs").read_text()
        except FileNotFoundError:
            return False

    def groups():
        # Others make and remove groups meanwhile, which os.walk takes as it comes.
        return [path for path, _, _ in os.walk("/sys/fs/cgroup") if re.fullmatch("runx-[0-9a-f]{32}", os.path.basename(path))]
    own.ask("GET", "/health")
    eventually("its groups are gone", lambda: not any(empty(one) for one in groups()))


def test_no_new_privileges(own):
    assert own.done("grep NoNewPrivs /proc/self/status")[0].split() == ["NoNewPrivs:", "0"]
    assert own.done("grep NoNewPrivs /proc/self/status", **confined(no_new_privileges=True))[0].split()[1] == "1"


def test_a_seccomp_filter(own):
    def run(profile, command):
        return own.done(command, cwd=str(own.agent.directory), **confined(seccomp=profile))
    deny = {"defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28}]}
    text, ended = run(deny, "mkdir here 2>&1")
    assert "No space left" in text and ended["exit_code"] == 1
    kill = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_KILL_PROCESS"}]}
    assert run(kill, "exec mkdir here")[1]["signal"] == signal.SIGSYS
    argument = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
        {"names": ["socket"], "action": "SCMP_ACT_ERRNO", "args": [{"index": 0, "value": 2, "op": "SCMP_CMP_EQ"}]}]}
    script = "import socket\nsocket.socket(socket.AF_UNIX)\nsocket.socket(socket.AF_INET)"
    text, ended = own.done([sys.executable, "-c", script], **confined(seccomp=argument))
    assert ended["exit_code"] == 1 and "line 3, in <module>" in "".join(
        event.get("text", "") for event in own.output(ended) if event["type"] == "stderr")
    text, _ = run("default", "unshare -U true 2>&1; grep -E 'Seccomp:|NoNewPrivs' /proc/self/status")
    assert "Operation not permitted" in text and "Seccomp:\t2" in text and "NoNewPrivs:\t1" in text


def test_the_default_filter_cannot_be_gone_round(own):
    script = """
import ctypes, os, threading
libc = ctypes.CDLL(None, use_errno=True)
def call(*args):
    return libc.syscall(*args), ctypes.get_errno()
if os.uname().machine == "x86_64":
    print(call(0x40000000 | 39), call(56, 0x10000000 | 17, 0, 0, 0, 0), call(435, 0, 0))
done = []
thread = threading.Thread(target=lambda: done.append(1))
thread.start(); thread.join()
print(len(done), os.spawnlp(os.P_WAIT, "true", "true"))
"""
    text, ended = own.done([sys.executable, "-c", script], **confined(seccomp="default"))
    lines = text.splitlines()
    assert lines[-1] == "1 0", (text, ended)
    if os.uname().machine == "x86_64":
        assert lines[0] == "(-1, 1) (-1, 1) (-1, 38)", text


def test_a_confined_program_that_is_not_there_holds_nobody_up(own):
    for _ in range(4):
        refused = own.refused(["/no/such/program"], status=404, **confined(no_new_privileges=True))
        assert "no such file" in refused.lower(), refused
    assert own.ask("GET", "/health")["status"] == "ok"


def test_who_types_to_nobody_does_not_keep_an_end_from_being_seen(own):
    process = own.start("sleep 30 <&0 & echo $!; exit 3", stdin=True)
    path = f"/runx/v1/processes/{process['id']}/stdin"
    typed = threading.Thread(target=lambda: own.agent.ask("POST", path, b"x" * (1 << 20)))
    typed.start()
    ended = own.wait(process)
    assert (ended["state"], ended["exit_code"]) == ("exited", 3)
    typed.join(30)
    assert not typed.is_alive()
    os.kill(int(own.text(process).split()[0]), signal.SIGKILL)


@pytest.mark.skipif(not ROOT, reason="needs capabilities to give up")
def test_capabilities(own):
    def sets(text):
        return {line.split()[0]: int(line.split()[1], 16) for line in text.splitlines()}
    show = "grep ^Cap /proc/self/status"
    text, _ = own.done(show, **confined(capabilities=["CAP_CHOWN", "kill"]))
    assert all(value == (1 | 1 << 5) for value in sets(text).values()), text
    text, _ = own.done(show, user=65534, **confined(capabilities=["CAP_NET_BIND_SERVICE"]))
    assert sets(text)["CapEff:"] == 1 << 10 and sets(text)["CapBnd:"] == 1 << 10
    assert all(value == 0 for value in sets(own.done(show, **confined(capabilities=[]))[0]).values())


@pytest.mark.skipif(not ROOT, reason="needs the right to mount")
def test_paths_that_are_read_only_or_masked(own, tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "secret").write_text("s3cret")
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets/one").write_text("s3cret")
    script = f"cat {tmp_path}/secret; ls {tmp_path}/secrets; touch {tmp_path}/kept/x 2>&1"
    text, ended = own.done(script, **confined(readonly_paths=[str(tmp_path / "kept")],
                                              masked_paths=[str(tmp_path / "secret"), str(tmp_path / "secrets"), "/no/such"]))
    assert "Read-only file system" in text and "s3cret" not in text and "one" not in text
    # Not by its working directory either.
    text, _ = own.done("ls; cat one 2>&1; touch y 2>&1", cwd=str(tmp_path / "secrets"), **confined(masked_paths=[str(tmp_path / "secrets")]))
    assert "s3cret" not in text and "No such file" in text and "Read-only" in text, text
    # Nor can it take away what hides it, in a user namespace of its own either.
    for more in ({}, {"user_namespace": True}):
        script = f"umount {tmp_path}/secret; grep CapEff /proc/self/status; cat {tmp_path}/secret"
        text, _ = own.done(script, **confined(masked_paths=[str(tmp_path / "secret")], **more))
        assert "s3cret" not in text and not int(text.split()[1], 16) & 1 << 21, text
    # For nobody else.
    assert own.done(f"cat {tmp_path}/secret")[0] == "s3cret"
    assert str(tmp_path) not in pathlib.Path("/proc/self/mountinfo").read_text()


def test_a_user_namespace(own, tmp_path):
    if not own.ask("GET", "/capabilities")["user_namespace"]:
        pytest.skip("there are no user namespaces here")
    (tmp_path / "kept").mkdir()
    more = confined(user_namespace=True, readonly_paths=[str(tmp_path / "kept")])
    text, ended = own.done(f"id -u; cat /proc/self/uid_map; touch {tmp_path}/kept/x 2>&1; readlink /proc/self/ns/user", **more)
    lines = text.splitlines()
    assert lines[0] == "0" and lines[1].split() == ["0", str(os.geteuid()), "1"] and "Read-only" in lines[2], lines
    assert lines[3] != os.readlink("/proc/self/ns/user")
    text, _ = own.done("grep ^Cap /proc/self/status", **confined(user_namespace=True, capabilities=["CAP_CHOWN"] if ROOT else []))
    sets = {line.split()[0]: int(line.split()[1], 16) for line in text.splitlines()}
    assert sets["CapEff:"] == sets["CapBnd:"] == (1 if ROOT else 0), text


@pytest.mark.skipif(not ROOT, reason="needs the right to become somebody else")
def test_somebody_else(own, tmp_path):
    text, _ = own.done("id -u; id -g", user="nobody", cwd="/")
    assert text.split()[0] == "65534"
    assert own.done("id -u; id -g", user=1234, group=77, cwd="/")[0].split() == ["1234", "77"]


def test_what_the_daemon_may_not_it_says(tmp_path):
    if not ROOT:
        pytest.skip("needs to become an ordinary user first")
    os.chmod(tmp_path, 0o777)
    agent = Agent(tmp_path, command=["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups",
                                     "--bounding-set=-all", "--", os.environ["RUNX_AGENT"]])
    try:
        own = Own(agent)
        answer = own.ask("GET", "/capabilities")
        assert answer["capabilities"] == [] and not answer["other_users"] and not answer["cgroup"]["available"]
        assert answer["cgroup"]["why_not"]
        assert "the daemon itself has no CAP_CHOWN" in own.refused(
            "true", status=403, cwd="/", **confined(capabilities=["CAP_CHOWN"]))
        assert "become its user" in own.refused("true", status=403, user=0, cwd="/", **confined(no_new_privileges=True))
        # Limits hold all the same, and so do a filter and a namespace of users.
        text, _ = own.done("ulimit -n; ulimit -d", cwd="/", **limited(open_files=20, memory_bytes=64 << 20))
        assert text.split() == ["20", str(64 << 10)]
        assert own.done("mkdir x 2>&1", cwd="/", **confined(seccomp="default"))[1]["exit_code"] == 1
        refused = own.refused("true", status=403, cwd="/", **confined(masked_paths=["/etc/passwd"]))
        assert "read-only or masked" in refused
        if answer["user_namespace"]:
            text, _ = own.done("wc -c < /etc/passwd", cwd="/", **confined(masked_paths=["/etc/passwd"], user_namespace=True))
            assert text == "0"
    finally:
        agent.end()


# --- Files -----------------------------------------------------------------------------------------------


def test_pages_of_a_directory(own, tmp_path):
    for number in range(250):
        (tmp_path / f"{number:03}").touch()
    names = []
    while True:
        page = own.ask("GET", f"/files?path={tmp_path}&offset={len(names)}&limit=100")
        names += [pathlib.Path(entry["path"]).name for entry in page["entries"]]
        if not page["entries"]:
            break
    names = [name for name in names if name.isdigit()]
    assert names == [f"{number:03}" for number in range(250)]
    own.ask("GET", "/files?path=/no/such", status=404)
    own.ask("GET", "/files", status=400)


def test_copies(own, tmp_path):
    (tmp_path / "tree/deep").mkdir(parents=True)
    (tmp_path / "tree/deep/file").write_text("content")
    (tmp_path / "tree/deep/file").chmod(0o750)
    copy = {"source": str(tmp_path / "tree"), "destination": str(tmp_path / "copy")}
    own.ask("POST", "/files/copy", copy, 400)
    assert own.ask("POST", "/files/copy", {**copy, "recursive": True}, 201)["type"] == "directory"
    assert (tmp_path / "copy/deep/file").read_text() == "content"
    assert (tmp_path / "copy/deep/file").stat().st_mode & 0o777 == 0o750
    own.ask("POST", "/files/copy", {**copy, "recursive": True}, 409)
    own.ask("POST", "/files/copy", {"source": str(tmp_path / "none"), "destination": "/x"}, 404)


@pytest.mark.skipif(not ROOT, reason="needs the right to change owners")
def test_modes_owners_and_rights_as_somebody(own, tmp_path):
    os.chmod(tmp_path, 0o755)
    for parent in tmp_path.parents:
        if parent.stat().st_uid == os.geteuid() and parent != pathlib.Path("/"):
            os.chmod(parent, parent.stat().st_mode | 0o011)
    file = tmp_path / "file"
    file.write_text("x")
    own.ask("POST", "/files/mode", {"path": str(file), "mode": "0640"})
    assert file.stat().st_mode & 0o777 == 0o640
    assert own.ask("GET", f"/files/access?path={file}&user=65534") == {"read": False, "write": False, "execute": False}
    own.ask("POST", "/files/owner", {"path": str(file), "owner": "65534", "owner_group": "77"})
    assert (file.stat().st_uid, file.stat().st_gid) == (65534, 77)
    assert own.ask("GET", f"/files/access?path={file}&user=65534") == {"read": True, "write": True, "execute": False}
    # Who may not, may not through the daemon either.
    own.ask("POST", "/files/mode", {"path": str(file), "mode": "777", "user": 1234}, 403)
    own.ask("POST", "/files/owner", {"path": str(file), "owner": "1234", "user": 1234}, 403)
    (tmp_path / "root-only").write_text("s3cret")
    (tmp_path / "root-only").chmod(0o600)
    os.chmod(tmp_path, 0o777)
    refused = own.ask("POST", "/files/copy", {"source": str(tmp_path / "root-only"), "destination": str(tmp_path / "c"), "user": 1234}, 403)
    assert "s3cret" not in json.dumps(refused) and not (tmp_path / "c").exists()
    own.ask("POST", "/files/mode", {"path": str(file), "mode": "9"}, 400)


# --- Forwards ----------------------------------------------------------------------------------------------


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


# --- The system ----------------------------------------------------------------------------------------------


def test_what_the_system_is(own):
    system = own.ask("GET", "/system")
    assert system["hostname"] == socket.gethostname() and system["kernel"] == os.uname().release
    assert system["agent_pid"] == own.agent.process.pid and system["memory_total"] > 0


def test_health_names_what_is_wrong(own):
    assert own.ask("GET", "/health")["status"] == "ok"
    own.ask("PUT", "/resources/limits", {"memory_percent": 0.0})
    health = own.ask("GET", "/health")
    assert health["status"] == "degraded" and health["components"]["resources"]["above_limit"] == ["memory"]
    own.ask("PUT", "/resources/limits", {})
    own.start("exit 1", tag="key", restart={"when": "always", "delay_ms": 30_000})
    eventually("it waits", lambda: own.ask("GET", "/health")["components"]["processes"]["not_running"])
    assert own.ask("GET", "/health")["status"] == "degraded"
    own.ask("PUT", "/resources/limits", {"cpu_percent": 200}, 400)


def test_resources_have_a_history(tmp_path):
    agent = Agent(tmp_path, "--monitor-interval", "100ms")
    try:
        own = Own(agent)
        history = eventually("there are samples", lambda: (
            found := own.ask("GET", "/resources/history?seconds=60"))["samples"][3:] and found)
        times = [sample["timestamp_ms"] for sample in history["samples"]]
        assert times == sorted(times) and history["interval_ms"] == 100
        now = own.ask("GET", "/resources")
        assert now["memory_total"] >= now["memory_used"] > 0 and now["processes"] > 1
        own.ask("PUT", "/resources/limits", {"processes": 1})
        connection = agent.raw("GET", "/runx/v1/resources/watch")
        text = b""
        while text.count(b"above_limit") < 2:
            text += connection.recv(65536)
        assert b'"above_limit":["processes"]' in text
        connection.close()
    finally:
        agent.end()
