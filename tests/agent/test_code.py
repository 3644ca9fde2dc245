"""Code, in the kernels of a real Jupyter server."""

import os
import re
import signal
import threading

import pytest
from code_interpreter.adapters.code_adapter import CodesAdapter
from code_interpreter.sync.adapters.code_adapter import CodesAdapterSync
from opensandbox.exceptions import SandboxApiException

from conftest import eventually, in_threads, run


@pytest.fixture
def codes(coder):
    services = coder.sdk()
    return CodesAdapterSync(services.endpoint, services.config)


def texts(messages):
    return "".join(message.text for message in messages)


def test_code_has_results_output_and_a_state(codes):
    done = codes.run("x = 20 + 1\nprint('out')\nimport sys; print('err', file=sys.stderr)\nx * 2", language="python")
    assert [result.text for result in done.result] == ["42"] and done.execution_count >= 1
    assert texts(done.logs.stdout).strip() == "out" and texts(done.logs.stderr).strip() == "err"
    assert done.error is None and done.complete is not None
    # The default context is one for all that name none.
    assert codes.run("x", language="python").result[0].text == "21"


def test_the_asynchronous_sdk_runs_code(coder):
    async def work():
        services = coder.asynchronous()
        codes = CodesAdapter(services.endpoint, services.config)
        context = await codes.create_context("python")
        done = await codes.run("1 + 1", context=context)
        await codes.delete_context(context.id)
        return done.result[0].text

    assert run(work()) == "2"


def test_an_error_has_its_name_and_traceback(codes):
    done = codes.run("1 / 0", language="python")
    assert (done.error.name, done.error.value) == ("ZeroDivisionError", "division by zero")
    plain = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(done.error.traceback))
    assert "1 / 0" in plain and "ZeroDivisionError" in plain
    assert codes.run("'fine'", language="python").result[0].text == "'fine'"


def test_contexts_are_apart_and_have_a_life(codes, coder, tmp_path):
    one, two = codes.create_context("python"), codes.create_context("python")
    codes.run("a = 1", context=one)
    assert codes.run("a", context=two).error.name == "NameError"
    assert codes.run("a", context=one).result[0].text == "1"
    assert {one.id, two.id} <= {context.id for context in codes.list_contexts("python")}
    assert codes.get_context(one.id).language == "python"
    codes.delete_context(one.id)
    with pytest.raises(SandboxApiException) as missing:
        codes.get_context(one.id)
    assert missing.value.status_code == 404
    assert coder.ask("POST", "/code", {"code": "1", "context": {"id": one.id, "language": "python"}}).status == 500
    codes.delete_contexts("python")
    assert codes.list_contexts("python") == []
    made = coder.ask("POST", "/code/context", {"language": "python", "cwd": str(tmp_path / "made")}).json()
    events = coder.ask("POST", "/code", {"code": "import os; os.getcwd()", "context": {"id": made["id"], "language": "python"}}).events()
    assert [e["results"]["text"] for e in events if e["type"] == "result"] == [repr(str(tmp_path / "made"))]


def test_what_is_displayed_is_told(coder):
    code = "from IPython.display import display, HTML\ndisplay(HTML('<b>bold</b>'))"
    events = coder.ask("POST", "/code", {"code": code, "context": {"language": "python"}}).events()
    results = [event["results"] for event in events if event["type"] == "result"]
    assert results and results[0]["text/html"] == "<b>bold</b>" and "text" in results[0]
    assert events[0]["type"] == "init" and events[-1]["type"] == "execution_complete"


def test_an_interrupt_reaches_the_kernel(codes, coder, tmp_path):
    context = codes.create_context("python")
    begun = tmp_path / "begun"

    def interrupt():
        eventually("it has begun", begun.exists)
        codes.interrupt(context.id)
    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    done = codes.run(f"import time\nopen({str(begun)!r}, 'w').close()\nfor _ in range(1000): time.sleep(0.1)", context=context)
    interrupter.join()
    assert done.error.name == "KeyboardInterrupt"
    assert codes.run("1", context=context).result[0].text == "1"


def test_a_context_does_one_thing_at_a_time(codes, coder, tmp_path):
    context = codes.create_context("python")
    begun, enough = tmp_path / "begun", tmp_path / "enough"
    code = f"import os, time\nopen({str(begun)!r}, 'w').close()\nwhile not os.path.exists({str(enough)!r}): time.sleep(0.05)"
    body = {"code": code, "context": {"id": context.id, "language": "python"}}
    slow = threading.Thread(target=lambda: coder.ask("POST", "/code", body))
    slow.start()
    eventually("it has begun", begun.exists)
    events = coder.ask("POST", "/code", {**body, "code": "1"}).events()
    assert [e["error"]["evalue"] for e in events if e["type"] == "error"] == ["session is busy"]
    enough.touch()
    slow.join()
    assert codes.run("1", context=context).result[0].text == "1"


def test_a_client_that_goes_away_does_not_stop_the_kernel(codes, coder):
    context = codes.create_context("python")
    body = f'{{"code": "import time; time.sleep(1); kept = 7", "context": {{"id": "{context.id}", "language": "python"}}}}'
    connection = coder.raw("POST", "/code", body.encode())
    connection.recv(100)
    connection.close()

    def value():
        done = codes.run("kept", context=context)
        return done.result and done.result[0].text

    assert eventually("it went on", value) == "7"


def test_bash_has_a_kernel(codes):
    done = codes.run("x=5; echo bash $x", language="bash")
    assert "bash 5" in texts(done.logs.stdout)


@pytest.mark.parametrize("language,code", [("javascript", "let a = 20; a + 1"),
                                           ("typescript", "let b: number = 20; b + 1")])
def test_javascript_and_typescript_have_kernels(codes, jupyter, language, code):
    if language not in jupyter.languages():
        pytest.skip(f"no kernel for {language} is installed")
    done = codes.run(code, language=language)
    # This kernel prints results.
    assert texts(done.logs.stdout) == "21\n" and done.error is None, done


def test_without_a_language_it_is_a_command(coder):
    events = coder.ask("POST", "/code", {"code": "echo $((1+1))"}).events()
    assert [event["text"] for event in events if event["type"] == "stdout"] == ["2"]
    events = coder.ask("POST", "/code", {"code": "sleep 0.1", "context": {"language": "background-command"}}).events()
    assert events[-1]["type"] == "execution_complete"


def test_what_makes_no_sense_is_refused(coder, agent):
    for body, status in (({}, 400), ({"code": ""}, 400), ({"code": "1", "context": {"language": "cobol"}}, 500),
                         ({"code": "1", "context": {"id": "none", "language": "python"}}, 500), ({"code": "1", "context": 7}, 400)):
        assert coder.ask("POST", "/code", body).status == status, body
    assert coder.ask("POST", "/code/context", {"language": "cobol"}).status == 500
    assert coder.ask("DELETE", "/code/contexts").json()["code"] == "MISSING_QUERY"
    # Without a server of kernels.
    answer = agent.ask("POST", "/code", {"code": "1", "context": {"language": "python"}})
    assert answer.status == 500 and "language runtime server not configured" in answer.json()["message"]
    assert agent.ask("GET", "/code/contexts").json() == []


def test_a_kernel_that_is_killed_is_an_error_and_no_hang(codes, coder):
    context = codes.create_context("python")
    pid = int(codes.run("import os; os.getpid()", context=context).result[0].text)
    threading.Timer(1, lambda: os.kill(pid, signal.SIGKILL)).start()
    done = codes.run("import time; print('begun', flush=True); time.sleep(1000)", context=context)
    assert "died" in done.error.value and "begun" in texts(done.logs.stdout)
    # The server starts another one.
    assert eventually("it works again", lambda: codes.run("2 + 2", context=context).result, 90)[0].text == "4"


def test_many_contexts_work_at_once(coder):
    def one(number):
        services = coder.sdk()
        codes = CodesAdapterSync(services.endpoint, services.config)
        context = codes.create_context("python")
        codes.run(f"n = {number}", context=context)
        text = codes.run("n", context=context).result[0].text
        codes.delete_context(context.id)
        return text

    assert in_threads(4, one) == ["0", "1", "2", "3"]
