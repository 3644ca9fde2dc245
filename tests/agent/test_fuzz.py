"""Requests of any form, made from the OpenAPI document: each is answered, none takes the daemon down.

They run real commands and remove real files, so the daemon is nobody's, in a root and in namespaces of its own.
"""

import os
import pathlib
import shutil
import signal

import pytest
import schemathesis
from hypothesis import HealthCheck, settings

from conftest import AGENT, TOKEN, Agent

DOCUMENT = pathlib.Path(__file__).parents[2] / "agent" / "openapi.yaml"

# The full counts are those of `make soak`.
EXAMPLES = int(os.environ.get("RUNX_EXAMPLES") or 12)

schema = schemathesis.openapi.from_path(DOCUMENT)

CONFINED = """set -e
mount -t tmpfs -o size=64m none "$1"
mkdir -p "$1/bin" "$1/proc" "$1/tmp" "$1/dev"
cp "$2" "$1/runx-agent"
cp "$3" "$1/bin/busybox"
for name in sh cat ls echo true sleep; do ln -s busybox "$1/bin/$name"; done
chmod 1777 "$1" "$1/tmp"
mknod -m 666 "$1/dev/null" c 1 3
mount -t proc none "$1/proc"
root=$1
shift 3
exec chroot --userspec=65534:65534 "$root" /runx-agent "$@"
"""


@pytest.fixture(scope="module")
def confined(tmp_path_factory):
    busybox = shutil.which("busybox")
    if os.geteuid() != 0 or busybox is None:
        pytest.skip("to confine the daemon needs root and busybox")
    directory = tmp_path_factory.mktemp("fuzz")
    root = directory / "root"
    root.mkdir()
    agent = Agent(directory, "--max-executions", "64", "--drain-timeout", "1s",
                  environment={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "TMPDIR": "/tmp", "HOME": "/tmp"},
                  command=["unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation", "private",
                           "sh", "-c", CONFINED, "sh", str(root), AGENT, busybox])
    yield agent
    assert agent.ask("GET", "/ping").status == 200
    # The first process of the namespace; all others in it go with it.
    for pid in agent.children():
        os.kill(pid, signal.SIGKILL)
    agent.process.wait()


@schema.parametrize()
@settings(max_examples=EXAMPLES, deadline=None, derandomize=False,
          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much])
def test_any_request_is_answered(case, confined):
    case.headers = {**(case.headers or {}), "X-EXECD-ACCESS-TOKEN": TOKEN}
    answer = case.call(base_url=f"http://127.0.0.1:{confined.port}", timeout=60)
    assert answer.status_code in (200, 201, 206, 301, 307, 400, 401, 404, 409, 413, 416, 429, 500, 501, 503), answer.status_code
    if answer.status_code >= 500:
        told = answer.json()
        assert told["code"] and told["message"], told
    assert confined.ask("GET", "/ping").status == 200


own = schemathesis.openapi.from_path(DOCUMENT.with_name("openapi-own.yaml"))


@own.parametrize()
@settings(max_examples=EXAMPLES, deadline=None, derandomize=False,
          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much])
def test_any_request_to_its_own_api_is_answered_as_documented(case, confined):
    case.headers = {**(case.headers or {}), "Authorization": f"Bearer {TOKEN}"}
    answer = case.call(base_url=f"http://127.0.0.1:{confined.port}", timeout=60)
    # Of what the document does not know, it is only said that it is not there, or makes no sense.
    documented = {int(status) for status in case.operation.definition.raw["responses"]} | {400, 404}
    assert answer.status_code in documented, (answer.status_code, answer.text)
    if answer.status_code < 500 and answer.status_code != 503:
        case.validate_response(answer, checks=[schemathesis.checks.response_schema_conformance])
    assert confined.ask("GET", "/ping").status == 200
