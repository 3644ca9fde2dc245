"""The daemon's own API, below /runx/v1: processes, files and the system."""

import base64
import http.client
import json
import os
import pathlib
import socket

import pytest
import websocket

from conftest import TOKEN, Agent, Own, eventually, in_threads

ROOT = os.geteuid() == 0


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
