"""An agent in a pod, driven from outside the cluster."""

import base64
import os
import pathlib
import subprocess

import tools
from session import SLEEP, Skipped, check, pod, sh

TOKEN = "a-token-of-a-secret"
BOTH = tools.TOP / "tests/agent/both.py"


def python(s):
    """That of the environment that has the SDKs."""
    found = pathlib.Path(os.environ.get("RUNX_AGENT_ENV", tools.TOP / "target/agent-env"))
    done = subprocess.run([tools.TOP / "tests/agent/environment", found], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, env=s.cluster.outside)
    if done.returncode == 3:
        raise Skipped(done.stdout.strip())
    assert done.returncode == 0, done.stdout
    return found / "bin/python"


@check
def both_sdks_drive_an_agent_pod_through_port_forward(s):
    program = python(s)
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "agent"},
              "data": {"token": base64.b64encode(TOKEN.encode()).decode()}}
    volumes = [{"name": "token", "secret": {"secretName": "agent"}}]
    main = sh(SLEEP, volumeMounts=[{"name": "token", "mountPath": "/run/secrets/agent", "readOnly": True}],
              readinessProbe={"tcpSocket": {"port": 44772}, "periodSeconds": 1})
    annotations = {"runx.dev/agent": "true", "runx.dev/agent.token-file": "/run/secrets/agent/token"}
    with s.pods(secret, pod("agent", main, annotations=annotations, volumes=volumes)):
        s.ready("agent")
        with s.forwarded("agent", 44772, 49983) as (execd, envd):
            command = [program, BOTH, "127.0.0.1", str(execd), str(envd), "/tmp"]
            done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                  timeout=120, env={**os.environ, "AGENT_TOKEN": TOKEN, "PYTHONDONTWRITEBYTECODE": "1"})
            assert (done.returncode, done.stdout) == (0, "both\n"), (done.returncode, done.stdout)
            refused = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                     timeout=120, env={**os.environ, "AGENT_TOKEN": "wrong", "PYTHONDONTWRITEBYTECODE": "1"})
            assert refused.returncode != 0 and TOKEN not in refused.stdout, refused.stdout
        # What the SDKs wrote is the container's.
        assert s.kubectl("exec", "agent", "--", "cat", "/tmp/execd-9", "/tmp/envd-9").stdout == "99"
        processes = s.kubectl("exec", "agent", "--", "ps").stdout
        assert "runx-agent" in processes and TOKEN not in processes, processes
