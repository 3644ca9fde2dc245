"""What is true of pods: a check each, named after what it promises."""

import json
import os
import pathlib
import re
import socket
import tempfile
import urllib.request

from cluster import NODE
from images import BOX, HELLO, MISSING, TICK, TRAP
from session import SLEEP, check, container, pod, sh


@check
def a_native_pod_runs_and_is_talked_to(s):
    with s.pods(pod("native", sh(f"echo started; echo problem >&2; {SLEEP}"))):
        s.ready("native")
        s.until("both streams are in the log", lambda: sorted(s.logs("native").splitlines()) == ["problem", "started"])
        assert s.kubectl("exec", "native", "--", "echo", "answer").stdout == "answer\n"
        done = s.kubectl("exec", "native", "--", "sh", "-c", "exit 7", check=False)
        assert done.returncode == 7, done
        done = s.kubectl("exec", "-i", "native", "--", "cat", input="some\ninput\n")
        assert done.stdout == "some\ninput\n", done
        terminal = s.terminal("exec", "-it", "native", "--", "sh")
        terminal.type("tty; echo $((40 + 2)) here\n")
        terminal.expect("/dev/pts/")
        terminal.expect("42 here")
        terminal.type("exit 5\n")
        assert terminal.end() == 5
        # RuntimeDefault, which the kubelet gives to all.
        status = s.kubectl("exec", "native", "--", "cat", "/proc/self/status").stdout
        assert re.search(r"^Seccomp:\s+2$", status, re.M), status


@check
def attach_reaches_the_first_process(s):
    with s.pods(pod("attached", container(BOX, "sh", "-c", "read line; echo got $line; read line; exit 4", stdin=True,
                                          tty=True))):
        s.ready("attached")
        terminal = s.terminal("attach", "-it", "attached")
        terminal.type("word\n")
        terminal.expect("got word")
        terminal.type("\n")
        terminal.end()
        s.phase("attached", "Failed")
        state = s.get("pod", "attached")["status"]["containerStatuses"][0]["state"]["terminated"]
        assert state["exitCode"] == 4, state


@check
def files_are_copied_and_ports_are_forwarded(s):
    serve = "mkdir /www; echo served >/www/index.html; exec httpd -f -p 8080 -h /www"
    with s.pods(pod("server", sh(serve))), tempfile.TemporaryDirectory() as temporary:
        s.ready("server")
        directory = pathlib.Path(temporary)
        content = os.urandom(300_000)
        (directory / "there").write_bytes(content)
        s.kubectl("cp", directory / "there", "server:/tmp/there")
        s.kubectl("cp", "server:/tmp/there", directory / "back")
        assert (directory / "back").read_bytes() == content
        with s.forwarded("server", 8080) as (port,):
            for _ in range(3):
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=20) as answer:
                    assert answer.read() == b"served\n"
        address = s.get("pod", "server")["status"]["podIP"]
        with socket.create_connection((address, 8080), timeout=20):
            pass


@check
def a_wasm_pod_runs(s):
    with s.pods(pod("wasm", container(HELLO, args=["one", "two words"], env=[{"name": "GREETING", "value": "hello"}]))):
        s.phase("wasm", "Succeeded")
        text = s.logs("wasm")
        for words in ("Hello from a WebAssembly module.", "two words", "GREETING=hello", "a file of the image"):
            assert words in text, text


@check
def native_and_wasm_containers_share_a_pod(s):
    with s.pods(pod("both", sh(f"hostname; {SLEEP}"), container(TICK, name="module"))):
        s.ready("both")
        s.until("the module says something", lambda: "tick" in s.logs("both", "-c", "module"))
        assert s.logs("both", "-c", "main") == "both\n"
        status = s.get("pod", "both")["status"]
        assert all(state["restartCount"] == 0 for state in status["containerStatuses"]), status


@check
def a_deployment_is_probed_and_rolled_out(s):
    def deployment(version):
        serve = f"mkdir /www; echo {version} >/www/index.html; exec httpd -f -p 8080 -h /www"
        main = sh(serve, readinessProbe={"httpGet": {"path": "/", "port": 8080}, "periodSeconds": 1},
                  livenessProbe={"exec": {"command": ["cat", "/www/index.html"]}, "periodSeconds": 1},
                  startupProbe={"tcpSocket": {"port": 8080}, "periodSeconds": 1})
        template = pod("web", main, restartPolicy="Always")
        return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"},
                "spec": {"replicas": 3, "selector": {"matchLabels": {"app": "web"}},
                         "template": {"metadata": template["metadata"], "spec": template["spec"]}}}

    def served():
        found = json.loads(s.kubectl("get", "pods", "-l", "app=web", "-o", "json").stdout)["items"]
        answers = set()
        for one in found:
            if one["metadata"].get("deletionTimestamp"):
                continue
            with urllib.request.urlopen(f"http://{one['status']['podIP']}:8080/", timeout=20) as answer:
                answers.add(answer.read().decode().strip())
        return answers, [one["status"]["containerStatuses"][0]["restartCount"] for one in found]

    with s.pods(deployment("first")):
        s.kubectl("rollout", "status", "deployment/web", "--timeout=90s")
        assert served() == ({"first"}, [0, 0, 0]), served()
        s.apply(deployment("second"))
        s.kubectl("rollout", "status", "deployment/web", "--timeout=90s")
        assert served()[0] == {"second"}, served()
        # A probe that fails ends a container, and it comes again.
        found = json.loads(s.kubectl("get", "pods", "-l", "app=web", "-o", "json").stdout)["items"]
        name = next(one["metadata"]["name"] for one in found if "deletionTimestamp" not in one["metadata"])
        s.kubectl("exec", name, "--", "rm", "/www/index.html")
        s.until("it is started again", lambda: s.get("pod", name)["status"]["containerStatuses"][0]["restartCount"] >= 1)
        s.wait("deployment/web", "condition=Available")
    s.until("its pods are gone", lambda: not s.kubectl("get", "pods", "-l", "app=web", "-o", "name").stdout)


@check
def a_job_completes(s):
    template = pod("sum", sh("echo $((6 * 7)) >/dev/termination-log"))
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "sum"},
           "spec": {"completions": 3, "parallelism": 2, "template": {"spec": template["spec"]}}}
    with s.pods(job):
        s.wait("job/sum", "condition=Complete")
        text = s.kubectl("get", "pods", "-l", "job-name=sum", "-o",
                         "jsonpath={.items[*].status.containerStatuses[0].state.terminated.message}").stdout
        assert text.split() == ["42"] * 3, text


@check
def a_pod_without_memory_says_so(s):
    limits = {"limits": {"memory": "40Mi"}}
    hungry = "dd if=/dev/zero of=/dev/null bs=200M count=1"
    module = container(TICK, name="module", resources={"limits": {"memory": "2Mi"}})
    with s.pods(pod("hungry", container(BOX, *hungry.split(), resources=limits)), pod("narrow", module)):
        s.phase("hungry", "Failed")
        state = s.get("pod", "hungry")["status"]["containerStatuses"][0]["state"]["terminated"]
        assert (state["reason"], state["exitCode"]) == ("OOMKilled", 137), state
        # A module that does not fit in ends as well, or cannot begin.
        state = s.until("the module has ended", lambda: ended_or_refused(s.get("pod", "narrow")))
        assert "OOMKilled" in state or "memory" in state, state


def ended_or_refused(one):
    for status in one["status"].get("containerStatuses", []):
        for state in (status["state"], status.get("lastState", {})):
            if "terminated" in state:
                return state["terminated"]["reason"] + state["terminated"].get("message", "")
            if state.get("waiting", {}).get("reason") in ("RunContainerError", "CreateContainerError"):
                return state["waiting"]["reason"] + state["waiting"].get("message", "")
    return None


@check
def init_containers_run_in_their_order_and_volumes_are_shared(s):
    volume = {"volumeMounts": [{"name": "data", "mountPath": "/data"}, {"name": "config", "mountPath": "/config"}]}
    first = sh("cat /config/key >/data/file; echo first >>/data/file", name="first", **volume)
    second = sh("echo second >>/data/file", name="second", **volume)
    sidecar = sh(SLEEP, name="sidecar", restartPolicy="Always", **volume)
    config = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "settings"}, "data": {"key": "value\n"}}
    volumes = [{"name": "data", "emptyDir": {"medium": "Memory"}}, {"name": "config", "configMap": {"name": "settings"}}]
    with s.pods(config, pod("ordered", sh("cat /data/file", **volume), initContainers=[first, sidecar, second],
                            volumes=volumes)):
        s.phase("ordered", "Succeeded")
        assert s.logs("ordered", "-c", "main") == "value\nfirst\nsecond\n", s.logs("ordered")


@check
def an_ephemeral_container_looks_into_a_running_one(s):
    with s.pods(pod("looked-at", sh("echo secret >/tmp/file; exec sleep 1000"))):
        s.ready("looked-at")
        look = "for p in /proc/[0-9]*; do tr '\\0' ' ' <$p/cmdline; echo; done; cat /proc/1/root/tmp/file; hostname"
        s.kubectl("debug", "looked-at", f"--image={BOX}", "--image-pull-policy=Never", "--target=main",
                  "--container=debugger", "--profile=general", "--", "sh", "-c", look)

        def ended():
            states = s.get("pod", "looked-at")["status"].get("ephemeralContainerStatuses", [])
            return states and states[0]["state"].get("terminated")
        state = s.until("the debugger has ended", ended)
        text = s.logs("looked-at", "-c", "debugger")
        assert state["exitCode"] == 0 and "sleep 1000" in text, (state, text)
        assert "secret" in text and text.endswith("looked-at\n"), text


@check
def the_kubelet_counts_what_both_kinds_use(s):
    burn = "x=0; while :; do x=$((x+1)); done"
    narrow = {"limits": {"cpu": "200m", "memory": "64Mi"}}
    with s.pods(pod("counted", sh(burn, resources=narrow), container(TICK, name="module"))):
        s.ready("counted")

        def summary():
            text = s.kubectl("get", "--raw", f"/api/v1/nodes/{NODE}/proxy/stats/summary").stdout
            for one in json.loads(text)["pods"]:
                if one["podRef"]["name"] == "counted":
                    found = {each["name"]: each for each in one["containers"]}
                    numbers = [found.get(name, {}).get(kind, {}).get(field, 0) for name, kind, field in (
                        ("main", "cpu", "usageCoreNanoSeconds"), ("main", "cpu", "usageNanoCores"),
                        ("main", "memory", "workingSetBytes"), ("module", "cpu", "usageCoreNanoSeconds"),
                        ("module", "memory", "workingSetBytes"))]
                    pods = one.get("memory", {}).get("workingSetBytes", 0), one.get("network", {}).get("rxBytes", 0)
                    # The pod's number is taken at another time than its containers'.
                    if all(numbers) and all(pods) and pods[0] >= numbers[4]:
                        return numbers, one
            return None
        try:
            numbers, all_of_it = s.until("the summary has numbers", summary, 60)
        except AssertionError:
            print(s.kubectl("get", "--raw", f"/api/v1/nodes/{NODE}/proxy/stats/summary").stdout)
            raise
        total, now, memory, of_module, modules_memory = numbers
        assert total > 50_000_000 and 20_000_000 < now < 400_000_000, all_of_it
        assert 100_000 < memory < 64 << 20, all_of_it
        # It fills three megabytes of its memory.
        assert of_module > 1_000_000 and 3_000_000 < modules_memory < 64 << 20, all_of_it


@check
def a_description_says_why_a_pod_does_not_run(s):
    with s.pods(pod("missing", container(MISSING)), pod("trapping", container(TRAP))):
        def told():
            text = s.kubectl("describe", "pod", "missing").stdout
            return text if "no such file" in text else None
        text = s.until("the missing program is told of", told)
        assert '"/no/such/program"' in text and "Failed" in text, text
        s.phase("trapping", "Failed")
        text = s.kubectl("describe", "pod", "trapping").stdout
        assert re.search(r"Message:\s+.*wasm.*unreachable", text) and re.search(r"Exit Code:\s+134", text), text
        assert "unreachable" in s.logs("trapping")


@check
def a_pod_of_root_is_confined_as_it_asks(s):
    main = sh("id -u; touch /file 2>&1; cat /proc/1/status | grep NoNewPrivs", securityContext={
        "runAsUser": 1234, "readOnlyRootFilesystem": True, "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]}})
    with s.pods(pod("confined", main)):
        s.phase("confined", "Succeeded")
        text = s.logs("confined")
        assert text.startswith("1234\n") and "Read-only file system" in text and re.search(r"NoNewPrivs:\s+1", text), text


@check
def processes_are_shared_where_a_pod_asks_for_it(s):
    with s.pods(pod("shared", sh("exec sleep 1234"), sh(SLEEP, name="second"), shareProcessNamespace=True)):
        s.ready("shared")
        text = s.kubectl("exec", "shared", "-c", "second", "--", "ps").stdout
        assert "sleep 1234" in text, text
