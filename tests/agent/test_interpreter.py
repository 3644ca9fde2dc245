"""The code interpreter's API, as E2B's SDK speaks it."""

import http.client
import json
import re

import pytest
from e2b.connection_config import ConnectionConfig
from e2b_code_interpreter import AsyncSandbox, Sandbox
from packaging.version import Version

from conftest import TOKEN, Agent, run


def sandbox(agent, kind=Sandbox):
    url = f"http://127.0.0.1:{agent.envd_port()}"
    return kind(sandbox_id="local", sandbox_domain=None, envd_version=Version("0.6.13"), envd_access_token=TOKEN,
                traffic_access_token=TOKEN,
                connection_config=ConnectionConfig(sandbox_url=url, extra_sandbox_headers={"X-Access-Token": TOKEN}))


@pytest.fixture
def agent(tmp_path, jupyter):
    agent = Agent(tmp_path, "--envd-port", "0", *jupyter.flags())
    yield agent
    agent.end()


@pytest.fixture
def box(agent):
    return sandbox(agent)


def test_code_has_results_and_output(box):
    done = box.run_code("x = 20\nprint('out')\nimport sys; print('err', file=sys.stderr)\nx + 1")
    assert done.text == "21" and "".join(done.logs.stdout) == "out\n" and "".join(done.logs.stderr) == "err\n"
    assert done.error is None and done.execution_count >= 1
    assert box.run_code("x").text == "20"
    assert box.run_code("'quoted'").text == "quoted"


def test_an_error_is_one(box):
    done = box.run_code("1 / 0")
    assert (done.error.name, done.error.value) == ("ZeroDivisionError", "division by zero")
    assert "1 / 0" in re.sub(r"\x1b\[[0-9;]*m", "", done.error.traceback)


def test_displays_and_formats_are_told(box):
    done = box.run_code("from IPython.display import display, HTML\ndisplay(HTML('<b>x</b>'))\n7")
    assert [result.html for result in done.results if result.html] == ["<b>x</b>"]
    assert [result.text for result in done.results if result.is_main_result] == ["7"]


def test_contexts_are_apart(box):
    one, two = box.create_code_context(), box.create_code_context()
    box.run_code("a = 1", context=one)
    assert box.run_code("a", context=two).error.name == "NameError"
    assert box.run_code("a", context=one).text == "1"
    assert {one.id, two.id} <= {context.id for context in box.list_code_contexts()}
    box.restart_code_context(one)
    assert box.run_code("a", context=one).error.name == "NameError"
    box.remove_code_context(two)
    with pytest.raises(Exception):
        box.run_code("1", context=two)


def test_executions_in_a_context_come_in_the_order_in_which_they_were_asked_for(agent, box):
    context = box.create_code_context()
    box.run_code("order = []", context=context)
    answers = []
    for number in range(6):
        connection = http.client.HTTPConnection("127.0.0.1", agent.envd_port(), timeout=60)
        code = f"import time; time.sleep({0.5 if number == 0 else 0}); order.append({number})"
        connection.request("POST", "/execute", json.dumps({"code": code, "context_id": context.id}), {"X-Access-Token": TOKEN,
                           "Content-Type": "application/json"})
        answers.append((connection, connection.getresponse()))
    for connection, answer in answers:
        assert answer.status == 200 and b"error" not in answer.read()
        connection.close()
    assert box.run_code("order", context=context).text == "[0, 1, 2, 3, 4, 5]"


def test_variables_are_there_for_one_execution(box):
    code = "import os; os.environ.get('ONLY')"
    assert box.run_code(code, envs={"ONLY": "now \"x\""}).text == 'now "x"'
    assert box.run_code(code).text is None or box.run_code(code).text == ""


def test_bash_runs_too(box):
    assert "".join(box.run_code("echo $((20 + 1))", language="bash").logs.stdout).strip() == "21"


def test_the_asynchronous_sdk_runs_code(agent):
    async def work():
        box = sandbox(agent, AsyncSandbox)
        heard = []
        done = await box.run_code("print('a'); 1 + 1", on_stdout=lambda line: heard.append(line.line))
        return done.text, "".join(heard)

    assert run(work()) == ("2", "a\n")
