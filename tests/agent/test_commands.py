"""Commands, as the SDK runs them."""

import os
import pathlib
import signal
import time
from datetime import timedelta

import pytest
from opensandbox.exceptions import SandboxApiException
from opensandbox.models.execd import ExecutionHandlers, RunCommandOpts

from conftest import Agent, eventually, in_threads, run


def texts(messages):
    return [message.text for message in messages]


def test_output_errors_and_the_exit_code_arrive(sdk):
    done = sdk.commands.run("echo out; echo err >&2; exit 7")
    assert texts(done.logs.stdout) == ["out"] and texts(done.logs.stderr) == ["err"]
    assert (done.exit_code, done.complete, done.error.value) == (7, None, "7")
    done = sdk.commands.run("true")
    assert done.exit_code == 0 and done.error is None and done.complete is not None


def test_the_asynchronous_sdk_hears_each_event_in_order(agent):
    heard = []

    def hear(kind):
        async def handler(event):
            heard.append((kind, getattr(event, "text", None)))
        return handler

    async def work():
        handlers = ExecutionHandlers(on_init=hear("init"), on_stdout=hear("out"), on_stderr=hear("err"),
                                     on_execution_complete=hear("complete"), on_error=hear("error"))
        return await agent.asynchronous().commands.run("echo 1; echo 2 >&2; sleep 0.1; echo 3", handlers=handlers)

    done = run(work())
    kinds = [kind for kind, _ in heard]
    assert kinds[0] == "init" and kinds[-1] == "complete" and "error" not in kinds
    assert [text for kind, text in heard if kind == "out"] == ["1", "3"]
    assert done.exit_code == 0


def test_a_program_runs_without_a_shell(sdk):
    done = sdk.commands.run(["printf", "%s|", "a b", "$HOME", "*"])
    assert texts(done.logs.stdout) == ["a b|$HOME|*|"]
    done = sdk.commands.run(["no-such-program"])
    assert done.exit_code is None and "not found" in done.error.value and done.complete is None


def test_directory_variables_and_user_are_the_requests(sdk, tmp_path):
    directory = tmp_path / "work"
    directory.mkdir()
    options = RunCommandOpts(working_directory=str(directory), envs={"NAME": "a $b\nc"})
    assert texts(sdk.commands.run('pwd; printf "%s" "$NAME"', opts=options).logs.stdout) == [str(directory), "a $b", "c"]
    tmp_path.chmod(0o755)
    done = sdk.commands.run("id -u; id -g; id -G", opts=RunCommandOpts(uid=12345, gid=54321, working_directory="/"))
    if os.geteuid() == 0:
        assert texts(done.logs.stdout) == ["12345", "54321", "54321"]
    else:
        assert "not permitted" in done.error.value


def test_who_one_is_already_needs_no_rights(sdk):
    done = sdk.commands.run("id -u", opts=RunCommandOpts(uid=os.geteuid(), gid=os.getegid()))
    assert texts(done.logs.stdout) == [str(os.geteuid())]


@pytest.mark.parametrize("body", [
    {}, {"command": ""}, {"command": "a", "argv": ["b"]}, {"argv": []}, {"argv": [""]}, {"argv": ["a\0"]}, {"command": 7},
    {"command": "true", "timeout": -1}, {"command": "true", "cwd": "/no/such"}, {"command": "true", "cwd": "/etc/passwd"},
    {"command": "true", "gid": 1}, {"command": "true", "uid": -1}, {"command": "true", "envs": {"A=B": "c"}},
    {"command": "true", "cwd": "$NO_SUCH/x"}, {"command": "true", "line_mode": "other"}, [], "text",
])
def test_what_makes_no_sense_is_refused_before_anything_starts(agent, body):
    answer = agent.ask("POST", "/command", body)
    assert answer.status == 400, answer.body
    assert answer.json()["code"] == "INVALID_REQUEST_BODY" and answer.json()["message"]
    assert agent.ask("POST", "/command", b"{").status == 400


def test_a_timeout_ends_the_whole_group(sdk, agent, tmp_path):
    done = sdk.commands.run(f"sleep 1000 & echo $! > {tmp_path}/pid; sleep 1000",
                            opts=RunCommandOpts(timeout=timedelta(milliseconds=300)))
    assert done.error.value == "-1" and done.error.traceback == ["signal: killed"]
    pid = int((tmp_path / "pid").read_text())
    eventually("its child is gone", lambda: not pathlib.Path(f"/proc/{pid}").exists())
    assert agent.children() == []


def test_an_interrupt_ends_a_command_that_runs(agent, sdk):
    connection = agent.raw("POST", "/command", b'{"command": "echo begun; sleep 1000"}')
    text = b""
    while b"begun" not in text:
        text += connection.recv(4096)
    identity = text.split(b'"text":"')[1].split(b'"')[0].decode()
    assert sdk.commands.get_command_status(identity).running
    sdk.commands.interrupt(identity)
    status = sdk.commands.get_command_status(identity)
    assert not status.running and status.exit_code == -1 and status.error == "signal: terminated"
    while b"\r\n0\r\n" not in text:
        text += connection.recv(4096)
    assert b'"evalue":"-1"' in text and b"execution_complete" not in text
    with pytest.raises(SandboxApiException):
        sdk.commands.interrupt(identity)
    with pytest.raises(SandboxApiException) as missing:
        sdk.commands.get_command_status("no-such")
    assert missing.value.status_code == 404


def test_who_ignores_an_interrupt_is_killed(agent, sdk):
    started = sdk.commands.run("trap '' TERM; echo deaf; while :; do sleep 1; done", opts=RunCommandOpts(background=True))
    eventually("it is deaf", lambda: sdk.commands.get_background_command_logs(started.id, 0).content)
    sdk.commands.interrupt(started.id)
    assert sdk.commands.get_command_status(started.id).error == "signal: killed"


def test_a_background_command_keeps_its_output(sdk):
    started = sdk.commands.run("for i in 1 2 3; do echo $i; echo e$i >&2; sleep 0.1; done; exit 5",
                               opts=RunCommandOpts(background=True))
    text, cursor = "", 0
    while True:
        status = sdk.commands.get_command_status(started.id)
        logs = sdk.commands.get_background_command_logs(started.id, cursor)
        text, cursor = text + logs.content, logs.cursor
        if not status.running:
            break
        time.sleep(0.02)
    assert text == "1\ne1\n2\ne2\n3\ne3\n" and cursor == len(text)
    assert status.exit_code == 5 and status.error == "exit status 5" and status.finished_at >= status.started_at
    assert sdk.commands.get_background_command_logs(started.id, 4).content == text[4:]
    assert sdk.commands.get_background_command_logs(started.id, 10_000).content == ""


def test_logs_are_those_of_background_commands(agent, sdk):
    done = sdk.commands.run("echo x")
    for path in (f"/command/{done.id}/logs", "/command/no-such/logs"):
        assert agent.ask("GET", path).status == 400, path
    started = sdk.commands.run("true", opts=RunCommandOpts(background=True))
    assert agent.ask("GET", f"/command/{started.id}/logs?cursor=-1").status == 400
    assert agent.ask("GET", f"/command/{started.id}/logs?cursor=x").status == 200


def test_a_daemon_that_is_left_behind_does_not_hold_up_its_command(sdk, agent, tmp_path):
    done = sdk.commands.run(f"echo started; (sleep 4; echo late; echo alive > {tmp_path}/alive) & exit 0")
    assert texts(done.logs.stdout) == ["started"] and not (tmp_path / "alive").exists()
    # It is not killed for writing to a pipe that nobody reads.
    eventually("it went on", lambda: (tmp_path / "alive").exists())
    eventually("it was waited for", lambda: agent.children() == [])


def test_what_a_background_command_leaves_behind_is_logged_as_well(sdk):
    started = sdk.commands.run("(sleep 0.3; echo late) & echo first", opts=RunCommandOpts(background=True))
    eventually("both are there",
               lambda: sdk.commands.get_background_command_logs(started.id, 0).content == "first\nlate\n")


def test_orphans_are_waited_for(sdk, agent):
    for _ in range(20):
        sdk.commands.run("(setsid sleep 0.05 &)")
    eventually("nobody is left", lambda: agent.children() == [])


def test_lines_are_told_in_the_mode_that_was_chosen(agent, sdk):
    done = sdk.commands.run(r"printf 'a\n\nb\n\n\nc\r\nd\re'")
    assert texts(done.logs.stdout) == ["a", "\n", "b", "\n", "\n", "c", "d", "e"]
    body = {"command": r"printf 'a\n\nb\r\nc'", "line_mode": "preserving"}
    events = agent.ask("POST", "/command", body).events()
    assert [event["text"] for event in events if event["type"] == "stdout"] == ["a\n", "\n", "b\r\n", "c"]


def test_what_clients_take_for_a_line_end_is_escaped(agent, sdk):
    done = sdk.commands.run("printf 'a\\342\\200\\250b\\302\\205c\\034d\\014e'")
    assert texts(done.logs.stdout) == ["a\u2028b\x85c\x1cd\x0ce"]


def test_the_environments_file_counts(tmp_path):
    file = tmp_path / "envs"
    agent = Agent(tmp_path, environment={"EXECD_ENVS": str(file), "BASE": "base"})
    try:
        sdk = agent.sdk()
        sdk.commands.set_env("ONE", "it's $BASE")
        sdk.commands.set_env("TWO", "plain")
        file.write_text(file.read_text() + "THREE=$BASE/x\n")
        assert texts(sdk.commands.run('echo "$ONE|$TWO|$THREE"').logs.stdout)[0].endswith("|plain|base/x")
        done = sdk.commands.run("echo $TWO", opts=RunCommandOpts(envs={"TWO": "mine"}))
        assert texts(done.logs.stdout) == ["mine"]
        # What is the daemon's alone is not told to commands.
        assert "a-token" not in sdk.commands.run("env").text
    finally:
        agent.end()


def test_many_streams_at_once_lose_nothing(agent):
    def one(number):
        events = agent.ask("POST", "/command", {"command": f"for i in 1 2 3; do echo {number}-$i; done"}).events()
        assert [e["text"] for e in events if e["type"] == "stdout"] == [f"{number}-{i}" for i in (1, 2, 3)]
        assert events[0]["type"] == "init" and events[-1]["type"] == "execution_complete"

    in_threads(100, one)


def test_a_client_that_goes_away_does_not_end_its_command(agent, tmp_path):
    connection = agent.raw("POST", "/command", f'{{"command": "sleep 0.5; echo done > {tmp_path}/done"}}'.encode())
    connection.recv(100)
    connection.close()
    assert agent.ask("GET", "/ping").status == 200
    eventually("it went on", lambda: (tmp_path / "done").exists())


def test_a_stream_says_that_it_is_alive(agent):
    events = agent.ask("POST", "/command", {"command": "sleep 3.5"}).events()
    assert [event["type"] for event in events].count("ping") == 2
    assert all(abs(event["timestamp"] / 1000 - time.time()) < 60 for event in events)


def test_an_end_of_the_daemon_lets_streams_end(tmp_path):
    agent = Agent(tmp_path)
    connection = agent.raw("POST", "/command", b'{"command": "trap \\"echo told; exit 3\\" TERM; echo x; sleep 1000 & wait"}')
    text = b""
    while b'"x"' not in text:
        text += connection.recv(4096)
    agent.process.send_signal(signal.SIGTERM)
    while True:
        more = connection.recv(4096)
        if not more:
            break
        text += more
    assert b'"told"' in text and b'"evalue":"3"' in text and text.endswith(b"0\r\n\r\n")
    assert agent.process.wait(20) == 0


def test_who_writes_for_ever_does_not_keep_its_command_from_ending(sdk, agent):
    done = sdk.commands.run("yes & exit 0")
    assert done.exit_code == 0
    started = sdk.commands.run("yes & sleep 0.2; exit 5", opts=RunCommandOpts(background=True))
    eventually("it has ended", lambda: not sdk.commands.get_command_status(started.id).running)
    assert sdk.commands.get_command_status(started.id).exit_code == 5
    for pid in agent.children():
        os.kill(pid, signal.SIGKILL)


def test_nobody_of_a_group_outlives_an_interrupt(sdk, agent, tmp_path):
    command = f"(trap '' TERM; echo deaf; while :; do sleep 1; done) & echo $! > {tmp_path}/pid; wait"
    started = sdk.commands.run(command, opts=RunCommandOpts(background=True))
    eventually("it is deaf", lambda: sdk.commands.get_background_command_logs(started.id, 0).content)
    sdk.commands.interrupt(started.id)
    pid = int((tmp_path / "pid").read_text())
    eventually("its child is gone", lambda: not pathlib.Path(f"/proc/{pid}").exists())


def test_a_variables_file_that_is_none_holds_up_nobody(tmp_path):
    os.mkfifo(tmp_path / "envs")
    agent = Agent(tmp_path, environment={"EXECD_ENVS": str(tmp_path / "envs")})
    try:
        assert in_threads(4, lambda number: agent.sdk().commands.run("echo fine").text.strip()) == ["fine"] * 4
    finally:
        agent.end()


def test_the_highest_number_is_nobody(agent):
    assert agent.ask("POST", "/command", {"command": "id", "uid": 4294967295}).status == 400
    assert agent.ask("GET", "/v1/filesystem/4294967295/4294967295/files/info?path=/").status == 400
    assert agent.ask("GET", "/v1/filesystem/%FF/0/files/info?path=/").status == 400
