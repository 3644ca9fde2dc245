"""The pods of examples/, with images of the tests in place of those that they name."""

import base64
import json

import tools
from images import BOX, HELLO
from session import check

IMAGES = {"hello:1": BOX, "workspace:1": BOX, "hello-wasm:1": HELLO}


def example(s, name):
    path = tools.TOP / f"examples/pods/{name}.yaml"
    one = json.loads(s.kubectl("create", "-f", path, "--dry-run=client", "-o", "json").stdout)
    for container in one["spec"]["containers"]:
        container.update(image=IMAGES[container["image"]], imagePullPolicy="Never")
    one["spec"]["terminationGracePeriodSeconds"] = 1
    return one


@check
def the_examples_of_pods_run(s):
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "agent"},
              "data": {"token": base64.b64encode(b"of-the-example").decode()}}
    with s.pods(secret, *(example(s, name) for name in ("native", "wasm", "mixed", "agent"))):
        s.phase("native", "Succeeded")
        assert s.logs("native") == "hello from native\n"
        s.phase("wasm", "Succeeded")
        assert "Hello from a WebAssembly module." in s.logs("wasm") and "two" in s.logs("wasm"), s.logs("wasm")
        s.until("the module of both has ended", lambda: "terminated" in next(
            status["state"] for status in s.get("pod", "mixed")["status"]["containerStatuses"] if status["name"] == "wasm"))
        assert "Hello from a WebAssembly module." in s.logs("mixed", "-c", "wasm")
        assert s.kubectl("exec", "mixed", "-c", "native", "--", "cat", "/shared/started").stdout
        # Ready by the agent's own health.
        s.ready("agent")
        ask = 'wget -q -O - --header "X-EXECD-ACCESS-TOKEN: $(cat /run/secrets/agent/token)" http://127.0.0.1:44772/metrics'
        assert "cpu" in s.kubectl("exec", "agent", "--", "sh", "-c", ask).stdout
        refused = s.kubectl("exec", "agent", "--", "wget", "-q", "-O", "-", "http://127.0.0.1:44772/metrics", check=False)
        assert refused.returncode != 0 and "401" in refused.stderr, refused
