"""`runx pool serve`: the interface of go-judge."""

import json
import os
import re
import shutil
import threading
import time

import pytest
import requests
import websocket
from go_judge.client import RemoteSandbox

from conftest import Server, command, eventually

SECOND = 1_000_000_000

CPP = """#include <iostream>
#include <vector>
int main() { long a, b; std::cin >> a >> b; std::cout << a + b << std::endl; }
"""


# --- Its clients ---------------------------------------------------------------------------------------


def test_a_client_of_go_judge_runs_python(server):
    client = RemoteSandbox(server.url)
    assert client.check_health()
    results = client.run_multiple("python", "print(sum(map(int, input().split())))", [f"{n} {n}" for n in range(20)])
    assert [(one["status"], one["stdout"]) for one in results] == [("Accepted", f"{2 * n}\n") for n in range(20)]
    failed = client.run("python", "raise SystemExit(3)")
    assert (failed["status"], failed["exit_code"]) == ("Nonzero Exit Status", 3)
    assert client.run("python", "while True: pass", exec_cpu_limit_ns=SECOND // 2)["status"] == "Time Limit Exceeded"
    client.close()
    assert server.ask("GET", "/file").json() == {}


@pytest.mark.skipif(not shutil.which("g++"), reason="g++ is missing")
def test_a_client_of_go_judge_compiles_cpp(server):
    client = RemoteSandbox(server.url)
    results = client.run_multiple("cpp", CPP, ["1 2", "40 2"])
    assert [one["stdout"] for one in results] == ["3\n", "42\n"], results
    assert client.run("cpp", "int main() { return }")["status"] == "Compile Error"
    crashed = client.run("cpp", "#include <cstdlib>\nint main() { std::abort(); }")
    assert (crashed["status"], crashed["exit_code"]) == ("Signalled", 6)
    grows = "#include <cstring>\n#include <cstdlib>\nint main() { for (;;) std::memset(std::malloc(1 << 20), 1, 1 << 20); }"
    assert client.run("cpp", grows, exec_memory_limit_b=64 << 20)["status"] == "Memory Limit Exceeded"
    client.close()


@pytest.mark.skipif(not shutil.which("gcc"), reason="gcc is missing")
def test_c_is_compiled_once_and_run_with_many_tests(server):
    source = "#include <stdio.h>\nint main(void) { int n; scanf(\"%d\", &n); printf(\"%d\\n\", n * n); return n == 7; }"
    built = server.run(command("/usr/bin/gcc", "a.c", "-O2", "-o", "a", copyIn={"a.c": {"content": source}}, copyOutCached=["a"]))[0]
    assert built["status"] == "Accepted", built
    kept = built["fileIds"]["a"]
    for number in range(10):
        done = server.one("a", stdin=str(number), copyIn={"a": {"fileId": kept}})
        assert done["files"]["stdout"] == f"{number * number}\n"
        assert done["status"] == ("Nonzero Exit Status" if number == 7 else "Accepted")
    assert server.ask("DELETE", f"/file/{kept}").status_code == 200


@pytest.mark.skipif(os.geteuid() != 0, reason="the cache of compiled modules is root's")
def test_a_module_is_run_as_one(server):
    text = """(module (import "wasi_snapshot_preview1" "fd_write" (func $w (param i32 i32 i32 i32) (result i32)))
      (memory (export "memory") 1) (data (i32.const 8) "from a module\\n")
      (func (export "_start") (i32.store (i32.const 0) (i32.const 8)) (i32.store (i32.const 4) (i32.const 14))
       (drop (call $w (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 24)))))"""
    done = server.one("hello.wat", copyIn={"hello.wat": {"content": text}})
    assert (done["status"], done["files"]["stdout"]) == ("Accepted", "from a module\n"), done
    kept = server.ask("POST", "/file", files={"file": ("x", text.encode())}).json()
    assert server.one("m.wat", copyIn={"m.wat": {"fileId": kept}})["files"]["stdout"] == "from a module\n"
    server.ask("DELETE", f"/file/{kept}")
    loop = '(module (memory (export "memory") 1) (func (export "_start") (loop (br 0))))'
    assert server.one("loop.wat", copyIn={"loop.wat": {"content": loop}}, cpuLimit=SECOND // 2)["status"] == "Time Limit Exceeded"
    wrong = server.one("wrong.wasm", copyIn={"wrong.wasm": {"content": "no module"}})
    assert wrong["status"] == "File Error" and "wrong.wasm" in wrong["error"]


# --- Verdicts ----------------------------------------------------------------------------------------------


def test_each_verdict(server):
    def verdict(script, **more):
        return server.one("/bin/sh", "-c", script, **more)["status"]
    assert verdict("true") == "Accepted"
    assert verdict("exit 1") == "Nonzero Exit Status"
    assert verdict("kill -9 $$") == "Signalled"
    assert verdict("while :; do :; done", cpuLimit=SECOND // 2) == "Time Limit Exceeded"
    assert verdict("sleep 100", clockLimit=SECOND // 2, cpuLimit=SECOND // 4) == "Time Limit Exceeded"
    assert verdict("x=a; while :; do x=$x$x; done", memoryLimit=32 << 20) == "Memory Limit Exceeded"
    assert verdict("yes", files=[{"content": ""}, {"name": "stdout", "max": 1000}]) == "Output Limit Exceeded"
    assert verdict("true", copyOut=["missing"]) == "File Error"
    assert server.one("/no/such/program")["status"] == "Internal Error"


def test_times_and_memory_are_those_of_the_command(server):
    done = server.one("/bin/sh", "-c", "sleep 0.3; i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done")
    assert done["runTime"] > 300_000_000 and done["runTime"] > done["time"] > 10_000_000
    assert 100_000 < done["memory"] < 64 << 20


def test_the_data_of_each_process_is_limited_where_that_is_asked_for(server):
    def limit(**more):
        return server.one("/bin/sh", "-c", "ulimit -d", memoryLimit=64 << 20, **more)["files"]["stdout"].strip()
    assert limit(dataSegmentLimit=True) == limit(strictMemoryLimit=True) == str(64 << 10) != limit()


def test_collected_output_is_cut_and_told(server):
    files = [{"content": ""}, {"name": "stdout", "max": 10}, {"name": "stderr", "max": 100}, {"name": "extra", "max": 5}]
    done = server.run({**command("/bin/sh", "-c", "echo 123456789; echo err >&2; printf abcdefgh >&3"), "files": files})[0]
    assert done["files"] == {"stdout": "123456789\n", "stderr": "err\n", "extra": "abcde"}
    assert done["fileError"][0]["type"] == "CollectSizeExceeded" and done["fileError"][0]["name"] == "extra"
    assert done["status"] == "Output Limit Exceeded"


# --- Files ---------------------------------------------------------------------------------------------------


def test_files_go_in_and_come_out(server):
    done = server.one("/bin/sh", "-c", "cat a deep/b link; echo made > c; ls -l a",
                      copyIn={"a": {"content": "A\n"}, "deep/b": {"content": "B\n"}, "link": {"symlink": "a"}},
                      copyOut=["c", "a", "none?", "stdout"])
    assert done["status"] == "Accepted", done
    assert done["files"]["stdout"].startswith("A\nB\nA\n") and done["files"]["c"] == "made\n" and "none" not in done["files"]
    # Nothing of it is there for the next one.
    assert server.one("/bin/ls")["files"]["stdout"] == ""


def test_kept_files(server):
    kept = server.ask("POST", "/file", files={"file": ("name.txt", b"content \xff\x00 of it")}).json()
    assert server.ask("GET", "/file").json() == {kept: "name.txt"}
    answer = server.ask("GET", f"/file/{kept}")
    assert answer.content == b"content \xff\x00 of it" and "name.txt" in answer.headers["Content-Disposition"]
    done = server.one("/usr/bin/wc", "-c", copyIn={"x": {"fileId": kept}},
                      files=[{"fileId": kept}, {"name": "stdout", "max": 100}], copyOutCached=["x", "stdout"])
    ids = done["fileIds"]
    assert server.ask("GET", f"/file/{ids['x']}").content == b"content \xff\x00 of it"
    assert server.ask("GET", f"/file/{ids['stdout']}").content.strip() == b"16"
    for one in (kept, *ids.values()):
        assert server.ask("DELETE", f"/file/{one}").status_code == 200
    assert server.ask("DELETE", f"/file/{kept}").status_code == server.ask("GET", f"/file/{kept}").status_code == 404
    assert server.ask("GET", "/file/..%2f..%2fetc%2fpasswd").status_code == 404
    missing = server.one("/bin/true", copyIn={"x": {"fileId": kept}})
    assert missing["status"] == "File Error" and missing["fileError"][0]["type"] == "CopyInOpenFile"


def test_what_comes_out_has_a_limit_and_is_a_file(server):
    script = "head -c 5000 /dev/zero | tr '\\0' x > big; mkdir dir; mkfifo pipe; ln -s /etc/ld.so.cache out"
    done = server.one("/bin/sh", "-c", script, copyOut=["big", "dir", "pipe"], copyOutMax=1000)
    kinds = {error["name"]: error["type"] for error in done["fileError"]}
    assert kinds["big"] == "CopyOutSizeExceeded" and kinds["dir"] == kinds["pipe"] == "CopyOutNotRegularFile", kinds
    done = server.one("/bin/sh", "-c", script, copyOut=["big"], copyOutMax=1000, copyOutTruncate=True)
    assert done["files"]["big"] == "x" * 1000


def test_links_do_not_lead_out_of_a_sandbox(server, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("s3cret")
    done = server.one("/bin/sh", "-c", f"ln -s {secret} a; ln -s /proc/1/root{secret} b", copyOut=["a", "b"])
    assert "s3cret" not in json.dumps(done) and done["status"] == "File Error"


def test_files_of_the_server_are_closed_unless_they_are_opened(server, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/x").write_text("of the server")
    (tmp_path / "secret").write_text("s3cret")
    os.symlink(tmp_path / "secret", tmp_path / "data/link")
    refused = server.run(command("/bin/cat", files=[{"src": str(tmp_path / "data/x")}]), status=400)
    assert "--src-prefix" in refused
    assert "copyOutDir" in server.run(command("/bin/true", copyOutDir=str(tmp_path)), status=400)
    other = Server("--src-prefix", str(tmp_path / "data"))
    try:
        read = lambda name: other.run(command("/bin/cat", files=[{"src": str(tmp_path / name)}, {"name": "stdout", "max": 100}]))[0]
        assert read("data/x")["files"]["stdout"] == "of the server"
        assert "s3cret" not in json.dumps(read("data/link"))
        other.run(command("/bin/cat", files=[{"src": f"{tmp_path}/data/../secret"}]), status=400)
    finally:
        other.end()


# --- Several at once --------------------------------------------------------------------------------------------


def test_commands_talk_over_pipes(server):
    first = {**command("/bin/sh", "-c", "echo question; read x; echo got $x >&2"), "files": [None, None, {"name": "stderr", "max": 100}]}
    second = {**command("/bin/sh", "-c", "read x; echo answer to $x"), "files": [None, None, {"name": "stderr", "max": 100}]}
    pipes = [{"in": {"index": 0, "fd": 1}, "out": {"index": 1, "fd": 0}},
             {"in": {"index": 1, "fd": 1}, "out": {"index": 0, "fd": 0}, "proxy": True, "name": "said", "max": 100}]
    one, two = server.run(first, second, pipeMapping=pipes)
    assert one["files"]["stderr"] == "got answer to question\n" and two["files"]["said"] == "answer to question\n"


def test_who_writes_to_nobody_is_ended_or_not_as_is_said(server):
    def run(proxy):
        writer = {**command("/bin/sh", "-c", "for i in 1 2 3 4 5 6 7 8 9; do head -c 20000 /dev/zero || exit 9; done"), "files": [{"content": ""}, None]}
        reader = {**command("/bin/true"), "files": [None]}
        return server.run(writer, reader, pipeMapping=[{"in": {"index": 0, "fd": 1}, "out": {"index": 1, "fd": 0}, "proxy": proxy}])[0]
    assert run(True)["status"] == "Accepted"
    assert run(False)["status"] != "Accepted"


def test_many_requests_wait_in_turn(server):
    answers = []

    def one(number):
        answers.append(server.one("/bin/echo", str(number))["files"]["stdout"].strip() == str(number))
    threads = [threading.Thread(target=one, args=(number,)) for number in range(60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [True] * 60
    eventually("none runs", lambda: server.metric("runx_judge_running") == 0)


def test_who_does_not_wait_any_more_ends_his_command(server):
    with pytest.raises(requests.Timeout):
        requests.post(server.url + "/run", json={"cmd": [command("/bin/sleep", "1000", clockLimit=900 * SECOND)]}, timeout=1)
    eventually("it was given up", lambda: server.metric("runx_judge_running") == 0)
    assert server.one("/bin/true")["status"] == "Accepted"


def test_over_a_websocket(server):
    client = websocket.create_connection(server.url.replace("http", "ws") + "/ws", timeout=60)
    client.send(json.dumps({"requestId": "slow", "cmd": [command("/bin/sleep", "1000", clockLimit=900 * SECOND)]}))
    # With one processor only the slow one would run.
    if os.cpu_count() > 1:
        client.send(json.dumps({"requestId": "quick", "cmd": [command("/bin/echo", "hi")]}))
        answer = json.loads(client.recv())
        assert (answer["requestId"], answer["results"][0]["files"]["stdout"]) == ("quick", "hi\n")
    time.sleep(0.2)
    client.send(json.dumps({"cancelRequestId": "slow"}))
    answer = json.loads(client.recv())
    assert answer["requestId"] == "slow" and answer["results"][0]["status"] != "Accepted"
    client.send(json.dumps({"requestId": "wrong", "cmd": []}))
    assert "no cmd" in json.loads(client.recv())["error"]
    client.close()


# --- Who may --------------------------------------------------------------------------------------------------------


def test_it_needs_its_token_and_tells_it_to_nobody():
    server = Server(environment={"RUNX_POOL_TOKEN": "the-token"})
    try:
        for method, path in (("POST", "/run"), ("GET", "/file"), ("POST", "/file"), ("GET", "/file/x"), ("DELETE", "/file/x"), ("GET", "/metrics"), ("GET", "/ws")):
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "the-token"}):
                assert requests.request(method, server.url + path, headers=headers, timeout=30).status_code == 401, path
        assert requests.get(server.url + "/version", timeout=30).status_code == 200
        assert "the-token" not in requests.get(server.url + "/config", timeout=30).text
        server.headers = {"Authorization": "Bearer the-token"}
        done = server.one("/usr/bin/env")
        assert done["status"] == "Accepted" and "the-token" not in json.dumps(done)
    finally:
        server.end()
    assert "the-token" not in server.process.stdout.read()


@pytest.mark.parametrize("body, word", [
    (b"{", "EOF"), (b'"x"', "invalid type"), (b"{}", "no cmd"), (b'{"cmd": [{"args": []}]}', "args"),
    (b'{"cmd": [{"args": ["a"], "tty": true}]}', "tty"), (b'{"cmd": [{"args": ["a"], "cpuSetLimit": "0"}]}', "cpuSetLimit"),
    (b'{"cmd": [{"args": ["a"], "files": [null]}]}', "null"), (b'{"cmd": [{"args": ["a"], "files": [{"max": 1}]}]}', "none of"),
    (b'{"cmd": [{"args": ["a"]}], "pipeMapping": [{"in": {"index": 5, "fd": 1}, "out": {"index": 0, "fd": 0}}]}', "cmd 5"),
])
def test_what_makes_no_sense_is_refused_by_its_name(server, body, word):
    answer = server.ask("POST", "/run", data=body)
    assert answer.status_code == 400 and word in answer.text, answer.text


def test_kept_files_have_a_limit_and_a_time():
    server = Server("--file-limit", "6000", "--file-timeout", "1ms")
    try:
        assert server.ask("POST", "/file", files={"file": ("a", b"x" * 2000)}).status_code == 507
        assert [path.name for path in server.files.iterdir()] == ["lock"]
        done = server.one("/bin/sh", "-c", "head -c 2000 /dev/zero > big", copyOutCached=["big"])
        assert done["status"] == "File Error" and done["fileError"][0]["type"] == "CopyOutCreateFile"
        kept = server.ask("POST", "/file", files={"file": ("a", b"x" * 900)}).json()
        eventually("it is forgotten", lambda: server.ask("GET", "/file").json() == {})
        assert server.ask("GET", f"/file/{kept}").status_code == 404 and [path.name for path in server.files.iterdir()] == ["lock"]
    finally:
        server.end()


def test_metrics_are_in_a_file_as_long_as_the_server_is_there(tmp_path):
    path = tmp_path / "pools/judge.prom"
    server = Server("--pool-size", "3", "--metrics-file", str(path))
    try:
        assert "runx_pool_refused_total 0\n" in path.read_text()
        server.one("/bin/true")
        # It is written anew from time to time.
        eventually("it is in the file", lambda: 'runx_pool_executions_total{status="Accepted"} 1\n' in path.read_text())
        eventually("they are all ready", lambda: "runx_pool_ready 3\n" in path.read_text())
        assert [one.name for one in path.parent.iterdir()] == ["judge.prom"]
    finally:
        server.end()
    assert not list(path.parent.iterdir())
    for wrong, word in (("relative.prom", "absolute path"), ("/proc/nosuch/x.prom", "/proc/nosuch/x.prom (--metrics-file)")):
        with pytest.raises(AssertionError, match=re.escape(word)):
            Server("--metrics-file", wrong)


def test_pages_of_browsers_are_kept_out_where_there_is_no_token(server):
    body = json.dumps({"cmd": [command("/bin/true")]})
    for headers in ({"Origin": "http://elsewhere.example"}, {"Host": "elsewhere.example"}, {"Host": "10.0.0.1:5050"}):
        for method, path in (("POST", "/run"), ("GET", "/file"), ("GET", "/version"), ("GET", "/ws")):
            assert requests.request(method, server.url + path, headers=headers, data=body, timeout=30).status_code == 403
    assert requests.get(server.url + "/version", headers={"Host": "localhost:5050"}, timeout=30).status_code == 200


def test_answers_do_not_grow_without_end(server):
    # A hole takes nothing of the sandbox, and would take much of the server.
    done = server.one("/usr/bin/truncate", "-s", "200M", "hole", copyOut=["hole"])
    assert (done["status"], done["fileError"][0]["type"]) == ("File Error", "CopyOutSizeExceeded")
    many = [("./" * number) + "some" for number in range(40)]
    done = server.one("/bin/sh", "-c", "head -c 2000000 /dev/zero > some", copyOut=many)
    assert done["status"] == "File Error" and len(done["files"]) < 10
    done = server.one("/bin/sh", "-c", "head -c 3000000 /dev/zero | tr '\\0' x", memoryLimit=64 << 20,
                      files=[{"content": ""}, {"name": "stdout", "max": 9_000_000_000_000_000_000}])
    assert done["status"] == "Accepted" and len(done["files"]["stdout"]) == 3_000_000


def test_what_a_program_is_given_it_cannot_change(server, tmp_path):
    kept = server.ask("POST", "/file", files={"file": ("x", b"the data")}).json()
    for source in ({"fileId": kept}, {"content": "the data"}):
        done = server.one("/bin/sh", "-c", "(echo changed > /proc/self/fd/0) 2>/dev/null; cat",
                          files=[source, {"name": "stdout", "max": 100}])
        assert done["files"]["stdout"] == "the data", done
    assert server.ask("GET", f"/file/{kept}").content == b"the data"
    server.ask("DELETE", f"/file/{kept}")


def test_requests_of_one_id_are_all_ended_with_their_client(server):
    client = websocket.create_connection(server.url.replace("http", "ws") + "/ws", timeout=60)
    for _ in range(2):
        client.send(json.dumps({"requestId": "same", "cmd": [command("/bin/sleep", "1000", clockLimit=900 * SECOND)]}))
    eventually("one runs", lambda: server.metric("runx_judge_running") >= 1)
    client.close()
    eventually("none runs", lambda: server.metric("runx_judge_running") == 0)


def test_an_end_ends_what_runs():
    server = Server()
    answers = []

    def post():
        try:
            answers.append(server.one("/bin/sleep", "1000", clockLimit=900 * SECOND))
        except (requests.RequestException, AssertionError) as error:
            answers.append(error)
    threads = [threading.Thread(target=post, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    eventually("one runs", lambda: server.metric("runx_judge_running") >= 1)
    pids = server.processes()
    server.end()
    assert server.process.returncode == 0 and not server.files.exists()
    eventually("none is left", lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids))


def test_a_queue_that_is_full_says_so():
    server = Server("--parallelism", "1", "--queue", "1")
    try:
        assert "--parallelism" in server.run(command("/bin/true"), command("/bin/true"), status=500)
        slow = {"cmd": [command("/bin/sleep", "1000", clockLimit=900 * SECOND)]}

        def post():
            try:
                requests.post(server.url + "/run", json=slow, timeout=20)
            except requests.RequestException:
                pass
        threads = [threading.Thread(target=post, daemon=True) for _ in range(2)]
        for thread in threads:
            thread.start()
        eventually("one runs and one waits", lambda: server.metric("runx_judge_queue_free") == 0)
        answer = server.ask("POST", "/run", json=slow)
        assert answer.status_code == 500 and "queue is full" in answer.text
    finally:
        server.end()
