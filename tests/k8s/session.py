"""What checks do with a cluster, and the list of them."""

import contextlib
import json
import os
import pty
import re
import select
import ssl
import subprocess
import time
import urllib.error
import urllib.request

from images import BOX

CHECKS = []


class Skipped(Exception):
    """What a check is about cannot be had on this machine."""


def check(function):
    CHECKS.append(function)
    return function


def basis(function):
    """A check that leaves behind what others need, so that it is never left out."""
    function.is_basis = True
    return check(function)


def container(image, *command, name="main", **more):
    made = {"name": name, "image": image, "imagePullPolicy": "Never", **more}
    if command:
        made["command"] = list(command)
    return made


def pod(name, *containers, runtime="runx", annotations=None, **spec):
    made = {"apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "labels": {"app": name}, "annotations": annotations or {}},
            "spec": {"containers": list(containers), "terminationGracePeriodSeconds": 1, "restartPolicy": "Never",
                     **spec}}
    if runtime:
        made["spec"]["runtimeClassName"] = runtime
    return made


def sh(script, **more):
    return container(BOX, "sh", "-c", script, **more)


SLEEP = "trap 'exit 0' TERM; while :; do sleep 1; done"


class Session:
    """What the checks do with a cluster."""

    def __init__(self, cluster, node=None, patience=1):
        """`node` is the one that runx is installed on, the cluster's first by default. All waiting takes `patience` times as long
        at most."""
        self.cluster, self.node, self.patience = cluster, node or cluster.node, patience
        self.kubectl = cluster.kubectl

    def apply(self, *objects):
        self.kubectl("apply", "-f", "-", input=json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)}))

    def get(self, kind, name):
        return json.loads(self.kubectl("get", kind, name, "-o", "json").stdout)

    def wait(self, what, condition, timeout=60):
        timeout *= self.patience
        done = self.kubectl("wait", what, f"--for={condition}", f"--timeout={timeout}s", check=False, timeout=timeout + 20)
        if done.returncode != 0:
            raise AssertionError(f"{what} does not come to {condition}: {done.stderr}\n"
                                 + self.kubectl("describe", what, check=False).stdout)

    def ready(self, name):
        self.wait(f"pod/{name}", "condition=Ready")

    def phase(self, name, phase):
        self.wait(f"pod/{name}", f"jsonpath={{.status.phase}}={phase}")

    def logs(self, name, *more):
        return self.kubectl("logs", name, *more).stdout

    def until(self, what, condition, seconds=60):
        seconds *= self.patience
        end = time.monotonic() + seconds
        while True:
            value = condition()
            if value:
                return value
            if time.monotonic() > end:
                raise AssertionError(f"{what}: not within {seconds} s")
            time.sleep(0.2)

    @contextlib.contextmanager
    def pods(self, *objects):
        self.apply(*objects)
        try:
            yield
        finally:
            for made in reversed(objects):
                self.kubectl("delete", made["kind"].lower(), made["metadata"]["name"], "--wait=true",
                             f"--timeout={60 * self.patience}s", check=False, timeout=120 * self.patience)

    @contextlib.contextmanager
    def forwarded(self, name, *ports):
        """Local ports that `kubectl port-forward` connects to those of a pod."""
        with subprocess.Popen([str(self.cluster.kubectl_program), "port-forward", f"pod/{name}", *(f":{port}" for port in ports)],
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              env=self.cluster.environment()) as forward:
            try:
                local = {}
                while len(local) < len(ports):
                    line = forward.stdout.readline()
                    found = re.match(r"Forwarding from 127\.0\.0\.1:(\d+) -> (\d+)", line)
                    assert line, f"port-forward ends with {forward.wait()}"
                    if found:
                        local[int(found.group(2))] = int(found.group(1))
                yield [local[port] for port in ports]
            finally:
                forward.kill()

    def request(self, method, path, token, body=None):
        """A request to the API with a token: the status' code and the answer."""
        context = ssl.create_default_context(cafile=str(self.cluster.directory / "pki/ca.crt"))
        request = urllib.request.Request(f"https://{self.cluster.api}{path}", method=method,
                                         data=None if body is None else json.dumps(body).encode())
        request.add_header("Authorization", f"Bearer {token}")
        if body is not None:
            request.add_header("Content-Type", "application/json" if method == "POST" else "application/merge-patch+json")
        try:
            with urllib.request.urlopen(request, timeout=30, context=context) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as e:
            return e.code, json.load(e)

    def terminal(self, *words):
        """kubectl on a terminal."""
        master, slave = pty.openpty()
        child = subprocess.Popen([str(self.cluster.kubectl_program), *words], stdin=slave, stdout=slave, stderr=slave,
                                 env=self.cluster.environment(), start_new_session=True)
        os.close(slave)
        return Terminal(master, child)


class Terminal:
    def __init__(self, master, child):
        self.master, self.child, self.text = master, child, ""

    def type(self, text):
        os.write(self.master, text.encode())

    def expect(self, word, seconds=30):
        end = time.monotonic() + seconds
        while word not in self.text:
            if time.monotonic() > end:
                raise AssertionError(f"{word!r} does not come: {self.text!r}")
            if select.select([self.master], [], [], 0.2)[0]:
                try:
                    self.text += os.read(self.master, 4096).decode(errors="replace")
                except OSError:
                    assert word in self.text, f"it ended without {word!r}: {self.text!r}"

    def end(self, seconds=30):
        code = self.child.wait(timeout=seconds)
        os.close(self.master)
        return code

    def close(self):
        if self.child.poll() is None:
            self.child.kill()
            self.child.wait()
        with contextlib.suppress(OSError):
            os.close(self.master)
