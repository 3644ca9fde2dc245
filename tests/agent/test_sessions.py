"""Shell sessions."""

import pathlib
from datetime import timedelta

import pytest
from opensandbox.exceptions import SandboxApiException

from conftest import eventually, in_threads, run


def texts(done):
    return [message.text for message in done.logs.stdout]


def test_directory_and_exported_variables_stay(sdk, tmp_path):
    session = sdk.commands.create_session(working_directory=str(tmp_path / "made"))
    say = lambda command, **options: sdk.commands.run_in_session(session, command, **options)
    assert texts(say("pwd")) == [str(tmp_path / "made")]
    say("export A='it'\"'\"'s \"x\"'; export B='two\nlines'; C=not; cd /usr")
    assert texts(say('printf "%s|%s|%s|%s" "$A" "$B" "$C" "$PWD"')) == ["it's \"x\"|two", "lines||/usr"]
    assert texts(say("pwd", working_directory="/etc")) == ["/etc"]
    # The directory of one command is that of the next.
    assert texts(say("pwd")) == ["/etc"]
    say("unset A")
    assert texts(say('echo "${A-gone}"')) == ["gone"]


def test_it_stays_also_when_a_command_exits_early(sdk):
    session = sdk.commands.create_session()
    done = sdk.commands.run_in_session(session, "export X=kept; cd /usr; exit 7; echo never")
    assert (done.exit_code, done.error.value, done.complete) == (7, "7", None)
    assert texts(sdk.commands.run_in_session(session, "echo $X $PWD")) == ["kept /usr"]
    done = sdk.commands.run_in_session(session, "sh -c 'echo sub; exit 7'")
    assert done.exit_code == 7 and texts(done) == ["sub"]
    done = sdk.commands.run_in_session(session, "if then fi")
    assert done.exit_code == 2
    assert texts(sdk.commands.run_in_session(session, "echo $X")) == ["kept"]


def test_both_streams_are_one_and_complete(sdk):
    session = sdk.commands.create_session()
    done = sdk.commands.run_in_session(session, "echo 1; echo 2 >&2; echo; echo 3; printf 4")
    assert texts(done) == ["1", "2", "\n", "3", "4"] and not done.logs.stderr


def test_nothing_that_is_printed_is_taken_for_the_state(sdk):
    session = sdk.commands.create_session()
    sdk.commands.run_in_session(session, "export -p; printf '/tmp\\0declare -x EVIL=1'; env -0; export REAL=1")
    assert texts(sdk.commands.run_in_session(session, 'echo "${EVIL-none} $REAL"')) == ["none 1"]


def test_a_timeout_kills_and_the_session_lives(sdk, agent):
    session = sdk.commands.create_session()
    sdk.commands.run_in_session(session, "export Y=1")
    done = sdk.commands.run_in_session(session, "sleep 1000 | cat; echo never", timeout=timedelta(milliseconds=300))
    assert done.error.value == "-1"
    assert texts(sdk.commands.run_in_session(session, "echo $Y")) == ["1"]
    eventually("nobody is left", lambda: agent.children() == [])


def test_without_its_client_a_command_of_a_session_ends(agent, sdk, tmp_path):
    session = sdk.commands.create_session()
    body = f'{{"command": "echo $$ > {tmp_path}/pid; echo x; sleep 1000"}}'.encode()
    connection = agent.raw("POST", f"/session/{session}/run", body)
    text = b""
    while b'"x"' not in text:
        text += connection.recv(4096)
    connection.close()
    pid = int((tmp_path / "pid").read_text())
    eventually("it was killed", lambda: not pathlib.Path(f"/proc/{pid}").exists())


def test_a_deleted_session_is_gone_with_what_runs_in_it(agent, sdk):
    session = sdk.commands.create_session()
    connection = agent.raw("POST", f"/session/{session}/run", b'{"command": "echo x; sleep 1000"}')
    text = b""
    while b'"x"' not in text:
        text += connection.recv(4096)
    sdk.commands.delete_session(session)
    while b"0\r\n\r\n" not in text:
        text += connection.recv(4096)
    assert b'"evalue":"-1"' in text
    with pytest.raises(SandboxApiException) as missing:
        sdk.commands.delete_session(session)
    assert missing.value.status_code == 404
    assert agent.ask("POST", f"/session/{session}/run", {"command": "true"}).status == 500


def test_what_makes_no_sense_is_refused(agent, sdk):
    session = sdk.commands.create_session()
    for body in ({}, {"command": ""}, {"command": "true", "cwd": "/no/such"}, {"command": "true", "timeout": -1}):
        assert agent.ask("POST", f"/session/{session}/run", body).status == 400, body
    assert agent.ask("POST", "/session", b"[1]").status == 400
    assert agent.ask("POST", "/session", b"").status == 200


def test_sessions_are_apart(agent):
    sdk = agent.sdk()
    sessions = [sdk.commands.create_session() for _ in range(20)]

    def one(number):
        own = agent.sdk()
        own.commands.run_in_session(sessions[number], f"export N={number}")
        return texts(own.commands.run_in_session(sessions[number], "echo $N"))

    assert in_threads(20, one) == [[str(number)] for number in range(20)]


def test_the_asynchronous_sdk_has_sessions_too(agent):
    async def work():
        commands = agent.asynchronous().commands
        session = await commands.create_session()
        await commands.run_in_session(session, "export Z=async")
        done = await commands.run_in_session(session, "echo $Z")
        await commands.delete_session(session)
        return texts(done)

    assert run(work()) == ["async"]


def test_a_command_may_have_a_trap_of_its_own(sdk):
    session = sdk.commands.create_session()
    done = sdk.commands.run_in_session(session, "trap 'echo bye' EXIT; export T=1; cd /usr; echo first")
    assert texts(done) == ["first", "bye"]
    assert texts(sdk.commands.run_in_session(session, "echo $T $PWD")) == ["1 /usr"]
    assert texts(sdk.commands.run_in_session(session, "echo a \\")) == ["a"]


def test_a_directory_that_is_gone_is_said(sdk, tmp_path):
    session = sdk.commands.create_session(working_directory=str(tmp_path / "gone"))
    sdk.commands.run_in_session(session, f"rmdir {tmp_path}/gone")
    done = sdk.commands.run_in_session(session, "echo still here")
    assert texts(done)[-1] == "still here" and "gone" in texts(done)[0]
