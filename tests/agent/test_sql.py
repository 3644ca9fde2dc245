"""SQL, on a real server."""

import json
import shutil
import socket
import subprocess

import pytest

from conftest import Agent, eventually

SERVER = shutil.which("mariadbd") or shutil.which("mysqld") or next(
    (path for path in ("/usr/sbin/mariadbd", "/usr/sbin/mysqld") if shutil.which(path)), None)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def database(tmp_path):
    if SERVER is None or shutil.which("mariadb-install-db") is None:
        pytest.skip("mariadb-server is not installed")
    tmp_path.chmod(0o755)
    data, port = tmp_path / "data", free_port()
    subprocess.run(["mariadb-install-db", "--no-defaults", f"--datadir={data}", "--auth-root-authentication-method=normal",
                    "--user=root"], check=True, capture_output=True)
    with open(tmp_path / "server.log", "wb") as log:
        server = subprocess.Popen([SERVER, "--no-defaults", f"--datadir={data}", f"--port={port}", "--bind-address=127.0.0.1",
                                   f"--socket={tmp_path}/s.sock", "--user=root"], stdout=log, stderr=log)
    try:
        def answers():
            assert server.poll() is None, (tmp_path / "server.log").read_text()
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                return True
            except OSError:
                return False
        eventually("the server answers", answers)
        yield port
    finally:
        server.kill()
        server.wait()


def run(agent, statement):
    return agent.ask("POST", "/code", {"code": statement, "context": {"language": "sql"}}).events()


def table(events):
    assert [event["type"] for event in events if event["type"] != "ping"] == [
        "init", "execution_count", "result", "execution_complete"], events
    return json.loads(next(event for event in events if event["type"] == "result")["results"]["text"])


def test_statements_have_their_results(tmp_path, database):
    agent = Agent(tmp_path, "--sql-address", f"127.0.0.1:{database}")
    try:
        run(agent, "CREATE TABLE t (n INT, s TEXT)")
        assert table(run(agent, "INSERT INTO t VALUES (1, 'one'), (2, NULL)")) == {"columns": ["affected_rows"], "rows": [[2]]}
        assert table(run(agent, "  select n, s FROM t ORDER BY n")) == {"columns": ["n", "s"], "rows": [["1", "one"], ["2", None]]}
        big = table(run(agent, "SELECT REPEAT('ü', 500000) AS b"))
        assert len(big["rows"][0][0]) == 500_000
        for statement, name in (("SELECT * FROM none", "DBQueryError"), ("DROP nonsense", "DBExecError")):
            error = run(agent, statement)[-1]
            assert error["type"] == "error" and error["error"]["ename"] == name and error["error"]["evalue"], error
    finally:
        agent.end()


def test_without_a_server_it_is_an_error(tmp_path):
    agent = Agent(tmp_path, "--sql-address", f"127.0.0.1:{free_port()}")
    try:
        events = run(agent, "SELECT 1")
        assert events[0]["type"] == "init" and events[-1]["error"]["ename"] == "DBPingError"
    finally:
        agent.end()
