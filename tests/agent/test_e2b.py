"""The envd protocol, as E2B's SDK speaks it."""

import asyncio
import base64
import hashlib
import json
import os
import pathlib
import threading
import time
import urllib.error
import urllib.request

import pytest
from e2b import AsyncSandbox, CommandExitException, FileType, FilesystemEventType, PtySize, Sandbox
from e2b.connection_config import ConnectionConfig
from e2b.exceptions import AuthenticationException, FileNotFoundException, InvalidArgumentException, NotFoundException
from packaging.version import Version

from conftest import TOKEN, Agent, eventually, in_threads, run

ROOT = os.geteuid() == 0


def sandbox(agent, kind=Sandbox, token=TOKEN):
    url = f"http://127.0.0.1:{agent.envd_port()}"
    headers = {"X-Access-Token": token} if token else {}
    return kind(sandbox_id="local", sandbox_domain=None, envd_version=Version("0.6.13"), envd_access_token=token,
                traffic_access_token=None, connection_config=ConnectionConfig(sandbox_url=url, extra_sandbox_headers=headers))


@pytest.fixture
def agent(tmp_path):
    agent = Agent(tmp_path, "--envd-port", "0")
    yield agent
    agent.end()
    assert TOKEN not in agent.log.read_text()
    assert agent.process.returncode == 0


@pytest.fixture
def box(agent):
    return sandbox(agent)


def ask(agent, method, path, body=None, headers=None):
    request = urllib.request.Request(f"http://127.0.0.1:{agent.envd_port()}{path}", data=body, method=method,
                                     headers=headers or {})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


# --- Commands -----------------------------------------------------------------------------------------


def test_a_command_has_its_output_and_exit_code(box):
    done = box.commands.run("echo out; echo err >&2")
    assert (done.stdout, done.stderr, done.exit_code) == ("out\n", "err\n", 0)
    with pytest.raises(CommandExitException) as failed:
        box.commands.run("echo x; exit 7")
    assert (failed.value.exit_code, failed.value.stdout, failed.value.error) == (7, "x\n", "exit status 7")
    with pytest.raises(CommandExitException) as failed:
        box.commands.run("no-such-command")
    assert failed.value.exit_code == 127 and "not found" in failed.value.stderr
    with pytest.raises(CommandExitException) as failed:
        box.commands.run("kill -9 $$")
    assert failed.value.exit_code == -1 and failed.value.error == "signal: killed"


def test_directory_and_variables_are_the_requests(box, tmp_path):
    done = box.commands.run('pwd; echo "$NAME|$HOME|$USER"', cwd=str(tmp_path), envs={"NAME": "a b"})
    lines = done.stdout.splitlines()
    assert lines[0] == str(tmp_path) and lines[1].startswith("a b|/")
    with pytest.raises(InvalidArgumentException):
        box.commands.run("true", cwd="/no/such")


def test_a_background_command_is_listed_typed_to_and_ended(box):
    command = box.commands.run("cat", background=True, stdin=True, timeout=0)
    assert any(process.pid == command.pid and process.args[-1] == "cat" for process in box.commands.list())
    box.commands.send_stdin(command.pid, "hello\n")
    box.commands.close_stdin(command.pid)
    assert command.wait().stdout == "hello\n"
    assert all(process.pid != command.pid for process in box.commands.list())
    command = box.commands.run("sleep 1000", background=True, timeout=0)
    assert box.commands.kill(command.pid) is True
    with pytest.raises(CommandExitException):
        command.wait()
    assert box.commands.kill(command.pid) is False


def test_another_client_may_listen(box):
    command = box.commands.run("for i in 1 2 3 4 5; do echo $i; sleep 0.2; done", background=True, timeout=0)
    time.sleep(0.3)
    heard = box.commands.connect(command.pid).wait().stdout
    assert "5\n" in heard and heard in command.wait().stdout
    # It ended a moment ago.
    assert box.commands.connect(command.pid).wait().exit_code == 0
    with pytest.raises(NotFoundException):
        box.commands.connect(4_000_000)


def test_a_time_limit_ends_the_process(box, agent):
    with pytest.raises(Exception):
        box.commands.run("sleep 1000", timeout=1)
    eventually("it is gone", lambda: not any("sleep" in " ".join(p.args) for p in box.commands.list()))


def test_a_client_that_goes_away_ends_nothing(agent, box, tmp_path):
    command = box.commands.run(f"sleep 0.5; echo done > {tmp_path}/done", background=True, timeout=0)
    command.disconnect()
    eventually("it went on", lambda: (tmp_path / "done").exists())


def frames(*messages):
    return b"".join(b"\0" + len(text).to_bytes(4, "big") + text for text in (json.dumps(m).encode() for m in messages))


def test_a_listener_that_does_not_read_delays_nobody(agent, box):
    command = box.commands.run("read x; for i in $(seq 3000); do head -c 10000 /dev/zero | tr '\\0' z; echo; done; echo end",
                               background=True, stdin=True, timeout=0)
    stuck = []
    for _ in range(3):
        connection = socket_to(agent)
        body = frames({"process": {"pid": command.pid}})
        connection.sendall((f"POST /process.Process/Connect HTTP/1.1\r\nHost: x\r\nX-Access-Token: {TOKEN}\r\n"
                            f"Content-Type: application/connect+json\r\nContent-Length: {len(body)}\r\n\r\n").encode() + body)
        connection.recv(200)
        stuck.append(connection)
    box.commands.send_stdin(command.pid, "go\n")
    done = command.wait()
    assert done.stdout.endswith("end\n") and len(done.stdout) > 30_000_000
    assert agent.memory() < 150_000


def socket_to(agent):
    import socket
    return socket.create_connection(("127.0.0.1", agent.envd_port()))


def test_a_request_whose_end_comes_late_leaves_its_connection_open(agent):
    body = frames({"process": {"cmd": "true"}, "stdin": False})
    head = (f"POST /process.Process/Start HTTP/1.1\r\nHost: x\r\nX-Access-Token: {TOKEN}\r\n"
            "Content-Type: application/connect+json\r\nTransfer-Encoding: chunked\r\n\r\n").encode()
    connection = socket_to(agent)
    for _ in range(3):
        connection.sendall(head + b"%x\r\n" % len(body) + body + b"\r\n")
        answer = b""
        while not answer.endswith(b"0\r\n\r\n"):
            more = connection.recv(65536)
            assert more, "the connection was closed"
            answer += more
        assert b'"exited":true' in answer
        # Only now does the request end, and another one may follow it.
        connection.sendall(b"0\r\n\r\n")
    connection.close()


def test_the_asynchronous_sdk_does_the_same(agent, tmp_path):
    async def work():
        box = sandbox(agent, AsyncSandbox)
        heard = []
        done = await box.commands.run("echo async; echo e >&2", on_stdout=heard.append)
        await box.files.write(str(tmp_path / "f"), "content")
        names = [entry.name for entry in await box.files.list(str(tmp_path))]
        command = await box.commands.run("cat", background=True, stdin=True, timeout=0)
        await box.commands.send_stdin(command.pid, "x")
        await box.commands.close_stdin(command.pid)
        last = await command.wait()
        return done.stdout, "".join(heard), names, last.stdout

    out, heard, names, last = run(work())
    assert (out, heard, last) == ("async\n", "async\n", "x") and "f" in names


@pytest.mark.skipif(not ROOT, reason="to become somebody else needs root")
def test_users_are_who_they_are(agent, box, tmp_path):
    assert box.commands.run("id -un; echo $HOME", user="daemon").stdout.splitlines()[0] == "daemon"
    with pytest.raises(AuthenticationException):
        box.commands.run("true", user="nobody-has-this-name")
    secret = tmp_path / "secret"
    secret.write_text("root's")
    secret.chmod(0o600)
    with pytest.raises(Exception) as refused:
        box.files.read(str(secret), user="daemon")
    assert "root's" not in str(refused.value)
    assert box.files.read(str(secret)) == "root's"


# --- Terminals ----------------------------------------------------------------------------------------


def test_a_terminal_is_one(box):
    out = []
    terminal = box.pty.create(PtySize(rows=24, cols=80), timeout=0)
    reader = threading.Thread(target=lambda: [out.append(data) for data in iterate(terminal)])
    reader.start()
    box.pty.send_stdin(terminal.pid, b"tty; stty size; echo $TERM\n")
    seen = lambda text: text in b"".join(out)
    eventually("it answers", lambda: seen(b"24 80") and seen(b"xterm-256color") and seen(b"/dev/pts/"))
    box.pty.resize(terminal.pid, PtySize(rows=50, cols=132))
    box.pty.send_stdin(terminal.pid, b"stty size\n")
    eventually("it was told", lambda: seen(b"50 132"))
    box.pty.send_stdin(terminal.pid, b"exit\n")
    reader.join(30)
    assert not reader.is_alive()


def iterate(terminal):
    for _, _, data in terminal:
        if data:
            yield data


# --- Files --------------------------------------------------------------------------------------------


def test_what_is_written_is_read(box, tmp_path):
    path = str(tmp_path / "new" / "dätei")
    info = box.files.write(path, "héllo")
    assert info.path == path and box.files.read(path) == "héllo"
    data = bytes(range(256)) * 10_000
    box.files.write(path, data)
    assert bytes(box.files.read(path, format="bytes")) == data
    assert b"".join(box.files.read(path, format="stream")) == data
    written = box.files.write_files([{"path": str(tmp_path / "a"), "data": "1"}, {"path": str(tmp_path / "b"), "data": b"2"}])
    assert [entry.name for entry in written] == ["a", "b"]
    with pytest.raises(FileNotFoundException):
        box.files.read(str(tmp_path / "missing"))
    with pytest.raises(InvalidArgumentException):
        box.files.read(str(tmp_path))


def test_files_are_listed_made_moved_and_removed(box, tmp_path):
    top = tmp_path / "top"
    assert box.files.make_dir(str(top / "d" / "e")) is True
    assert box.files.make_dir(str(top / "d")) is False
    box.files.write(str(top / "f"), "x")
    os.symlink("f", top / "link")
    entries = {entry.name: entry for entry in box.files.list(str(top))}
    assert entries["d"].type == FileType.DIR and entries["f"].type == FileType.FILE and entries["f"].size == 1
    assert entries["link"].symlink_target == str(top / "f") and entries["f"].permissions == "-rw-r--r--"
    assert [os.path.relpath(entry.path, top) for entry in box.files.list(str(top), depth=2)] == ["d", "d/e", "f", "link"]
    assert box.files.rename(str(top / "f"), str(top / "deep" / "g")).path == str(top / "deep" / "g")
    assert box.files.exists(str(top / "deep" / "g")) and not box.files.exists(str(top / "f"))
    info = box.files.get_info(str(top / "deep" / "g"))
    assert abs(info.modified_time.timestamp() - time.time()) < 60 and info.owner
    box.files.remove(str(top / "deep"))
    assert not (top / "deep").exists()
    with pytest.raises(FileNotFoundException):
        box.files.list(str(tmp_path / "none"))


def test_a_small_upload_is_three_events(box, tmp_path):
    watched = tmp_path / "watched"
    watched.mkdir()
    handle = box.files.watch_dir(str(watched))
    box.files.write(str(watched / "f"), "content")
    events = [(event.name, event.type) for event in handle.get_new_events()]
    assert events == [("f", FilesystemEventType.CREATE), ("f", FilesystemEventType.CHMOD), ("f", FilesystemEventType.WRITE)]
    box.files.rename(str(watched / "f"), str(watched / "g"))
    box.files.remove(str(watched / "g"))
    events = [(event.name, event.type) for event in handle.get_new_events()]
    assert events == [("f", FilesystemEventType.RENAME), ("g", FilesystemEventType.CREATE), ("g", FilesystemEventType.REMOVE)]
    handle.stop()
    with pytest.raises(Exception):
        handle.get_new_events()


def test_new_directories_are_watched_at_once(box, tmp_path):
    watched = tmp_path / "watched"
    watched.mkdir()
    handle = box.files.watch_dir(str(watched), recursive=True)
    box.files.make_dir(str(watched / "nested"))
    box.files.write(str(watched / "nested" / "f"), "content")
    events = {(event.name, event.type) for event in handle.get_new_events()}
    assert ("nested", FilesystemEventType.CREATE) in events and ("nested/f", FilesystemEventType.WRITE) in events


def test_a_large_tree_is_watched_and_nothing_is_lost(box, tmp_path):
    watched = tmp_path / "watched"
    outer = int(os.environ.get("RUNX_DIRECTORIES") or 10_000) // 20
    for number in range(outer):
        for inner in range(20):
            (watched / str(number) / str(inner)).mkdir(parents=True)
    handle = box.files.watch_dir(str(watched), recursive=True)
    for number in range(outer):
        (watched / str(number) / "7" / "f").write_text("x")
    names = {event.name for event in handle.get_new_events()}
    assert {f"{number}/7/f" for number in range(outer)} <= names


def test_the_asynchronous_sdk_is_told_of_changes(agent, tmp_path):
    watched = tmp_path / "watched"
    watched.mkdir()

    async def work():
        box, heard = sandbox(agent, AsyncSandbox), []
        handle = await box.files.watch_dir(str(watched), on_event=heard.append)
        await box.files.write(str(watched / "f"), "x")
        for _ in range(200):
            if len(heard) >= 3:
                break
            await asyncio.sleep(0.02)
        await handle.stop()
        return [event.type for event in heard]

    assert run(work()) == [FilesystemEventType.CREATE, FilesystemEventType.CHMOD, FilesystemEventType.WRITE]


# --- Addresses that are signed, and tokens ---------------------------------------------------------------


def test_signed_addresses_work_and_others_do_not(agent, box, tmp_path):
    path = str(tmp_path / "f")
    box.files.write(path, "signed")
    fetch = lambda url, data=None, headers=None: ask(agent, "POST" if data else "GET", url.split(str(agent.envd_port()), 1)[1],
                                                     data, headers)
    good = box.download_url(path)
    assert fetch(good)[2] == b"signed"
    later = box.download_url(path, use_signature_expiration=100)
    assert fetch(later)[0] == 200
    for bad in (good.replace("f", "g", 1), good.split("&signature")[0], good.replace("v1_", "v1_x"),
                later.replace("signature_expiration=", "signature_expiration=1")):
        assert fetch(bad)[0] == 401, bad
    # For another path, for writing, and after its time.
    assert fetch(good.replace(path.replace("/", "%2F"), "%2Fetc%2Fpasswd"))[0] == 401
    past = int(time.time()) - 10
    digest = hashlib.sha256(f"{path}:read::{TOKEN}:{past}".encode()).digest()
    signature = "v1_" + base64.b64encode(digest).decode().rstrip("=")
    status, _, text = ask(agent, "GET", f"/files?path={path}&signature={signature.replace('+', '%2B')}&signature_expiration={past}")
    assert status == 401 and b"expired" in text
    body = b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\nnew\r\n--b--\r\n'
    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    assert fetch(good, body, kind)[0] == 401
    assert fetch(box.upload_url(path), body, kind)[0] == 200 and pathlib.Path(path).read_text() == "new"


def test_without_the_token_nothing_is_done(agent):
    for token in ("", "wrong"):
        other = sandbox(agent, token=token)
        with pytest.raises(Exception):
            other.commands.run("true")
        with pytest.raises(Exception):
            other.files.read("/etc/hostname")
        with pytest.raises(Exception):
            other.files.list("/")
    assert ask(agent, "GET", "/health")[0] == 204
    for method, path in (("GET", "/metrics"), ("GET", "/envs"), ("POST", "/files/compose"), ("POST", "/execute")):
        assert ask(agent, method, path, b"{}" if method == "POST" else None)[0] == 401, path
    status, _, text = ask(agent, "POST", "/init", json.dumps({"accessToken": "mine"}).encode())
    assert status == 401 and ask(agent, "POST", "/init", b"{}")[0] == 401
    assert TOKEN.encode() not in text


def test_init_sets_what_all_processes_have(agent, box, tmp_path):
    token = {"X-Access-Token": TOKEN}
    body = {"envVars": {"ALL": "have"}, "accessToken": TOKEN, "defaultWorkdir": str(tmp_path)}
    status, headers, _ = ask(agent, "POST", "/init", json.dumps(body).encode(), token)
    assert status == 204 and headers["X-Envd-Version"] == "0.6.13"
    assert box.commands.run("echo $ALL $E2B_SANDBOX; pwd").stdout == f"have false\n{tmp_path}\n"
    assert json.loads(ask(agent, "GET", "/envs", headers=token)[2]) == {"ALL": "have", "E2B_SANDBOX": "false"}
    numbers = json.loads(ask(agent, "GET", "/metrics", headers=token)[2])
    assert numbers["cpu_count"] >= 1 and 0 < numbers["disk_used"] <= numbers["disk_total"]


def test_files_are_composed(agent, box, tmp_path):
    for name in ("1", "2"):
        (tmp_path / name).write_text(name * 3)
    body = {"source_paths": [str(tmp_path / "1"), str(tmp_path / "2")], "destination": str(tmp_path / "all")}
    status, _, text = ask(agent, "POST", "/files/compose", json.dumps(body).encode(), {"X-Access-Token": TOKEN})
    assert status == 200 and json.loads(text)["name"] == "all"
    assert (tmp_path / "all").read_text() == "111222" and not (tmp_path / "1").exists()


# --- The protocol by itself -----------------------------------------------------------------------------


def test_what_is_no_call_is_refused(agent):
    token = {"X-Access-Token": TOKEN}
    call = lambda path, body, kind, **more: ask(agent, "POST", path, body, {**token, "Content-Type": kind, **more})
    assert call("/process.Process/List", b"{}", "text/plain")[0] == 415
    assert call("/process.Process/Start", b"{}", "application/json")[0] == 415
    assert call("/process.Process/None", b"{}", "application/json")[0] == 404
    assert ask(agent, "GET", "/process.Process/List", headers=token)[0] == 405
    status, _, text = call("/process.Process/List", b"{", "application/json")
    assert status == 400 and json.loads(text)["code"] == "invalid_argument"
    status, _, text = call("/process.Process/SendSignal", b'{"process": {"pid": 4000000}, "signal": 9}', "application/json")
    assert status == 404 and json.loads(text)["code"] == "not_found"
    status, _, text = call("/process.Process/Connect", frames({"process": {}}), "application/connect+json")
    assert status == 200 and text[0] == 2 and b"unimplemented" in text
    status, _, text = call("/process.Process/StreamInput", frames({"data": {"input": {"stdin": ""}}}), "application/connect+json")
    assert status == 200 and b"invalid_argument" in text
    for body in (b"\0\0\0\0\x05{", b"\1\0\0\0\2{}", b""):
        status, _, text = call("/process.Process/Start", body, "application/connect+json")
        assert status == 200 and b'"error"' in text, body


def test_protobufs_own_encoding_is_spoken(agent):
    headers = {"X-Access-Token": TOKEN, "Content-Type": "application/proto"}
    # StatRequest{path: "/"}, and EntryInfo's name and type in the answer.
    status, answered, text = ask(agent, "POST", "/filesystem.Filesystem/Stat", b"\x0a\x01/", headers)
    assert status == 200 and answered["Content-Type"] == "application/proto"
    assert text[:1] == b"\x0a" and b"\x0a\x01/" in text and b"\x10\x02" in text


def test_two_hundred_terminals_at_once(agent, box):
    pids = []

    def one(number):
        own = sandbox(agent)
        terminal = own.pty.create(PtySize(rows=24, cols=80), timeout=0)
        pids.append(terminal.pid)
        own.pty.send_stdin(terminal.pid, f"echo $((1000 + {number}))\n".encode())
        text = b""
        for data in iterate(terminal):
            text += data
            if str(1000 + number).encode() in text:
                break
        own.pty.kill(terminal.pid)
        return str(1000 + number).encode() in text

    count = int(os.environ.get("RUNX_TERMINALS") or 50)
    assert all(in_threads(count, one))
    eventually("they are gone", lambda: box.commands.list() == [])


def test_all_is_frozen_and_goes_on(agent, box, tmp_path):
    # A child that has left its parent's session is meant as well.
    (tmp_path / "run").touch()
    script = "setsid sh -c 'while test -e run; do date +%s%N > child; sleep 0.01; done' & while :; do date +%s%N > own; sleep 0.01; done"
    command = box.commands.run(script, background=True, cwd=str(tmp_path))
    eventually("both run", lambda: (tmp_path / "own").exists() and (tmp_path / "child").exists())
    token = {"X-Access-Token": TOKEN}

    def contents():
        return (tmp_path / "own").read_text(), (tmp_path / "child").read_text()
    status, _, text = ask(agent, "POST", "/freeze?maxWaitMs=20000", b"", token)
    report = json.loads(text)
    assert status == 200 and report["notFrozen"] == report["failed"] == 0 and report["frozen"] >= 2, report
    before = contents()
    time.sleep(0.3)
    assert contents() == before
    assert ask(agent, "POST", "/unfreeze", b"", token)[0] == 204
    eventually("both go on", lambda: all(now != then for now, then in zip(contents(), before)))
    assert ask(agent, "POST", "/freeze", b"", token)[0] == 204
    eventually("both are stopped", lambda: (was := contents()) and not time.sleep(0.1) and contents() == was)
    # Setting it up lets it go on.
    before = contents()
    assert ask(agent, "POST", "/init", b"", token)[0] == 204
    eventually("both go on", lambda: all(now != then for now, then in zip(contents(), before)))
    assert ask(agent, "POST", "/freeze?maxWaitMs=x", b"", token)[0] == 400
    command.kill()
    (tmp_path / "run").unlink()


def test_freezing_while_others_are_started_holds_nobody_up(agent, box):
    token, over = {"X-Access-Token": TOKEN}, threading.Event()

    def start(_):
        own = sandbox(agent)
        while not over.is_set():
            own.commands.run("true", timeout=60)
    starters = [threading.Thread(target=start, args=(number,)) for number in range(3)]
    for starter in starters:
        starter.start()
    for _ in range(15):
        assert ask(agent, "POST", "/freeze", b"", token)[0] == 204
        assert ask(agent, "POST", "/unfreeze", b"", token)[0] == 204
    over.set()
    for starter in starters:
        starter.join(60)
        assert not starter.is_alive()


@pytest.mark.skipif(not ROOT, reason="needs the right to become somebody else")
def test_a_user_without_a_home_begins_at_the_root(box):
    nobody = next(line.split(":") for line in pathlib.Path("/etc/passwd").read_text().splitlines() if line.startswith("nobody:"))
    if os.path.isdir(nobody[5]):
        pytest.skip("nobody has a home here")
    assert box.commands.run("pwd", user="nobody").stdout == "/\n"
    # Who asks for a directory that is not there is told so.
    with pytest.raises(InvalidArgumentException):
        box.commands.run("pwd", user="nobody", cwd="/no/such")
