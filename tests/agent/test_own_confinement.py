"""The daemon's own API: what a process is kept from, and how much it may have."""

import os
import pathlib
import re
import signal
import sys
import threading

import pytest

from conftest import Agent, Own, eventually

ROOT = os.geteuid() == 0


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
