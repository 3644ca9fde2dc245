"""What is true of a node that the chart's DaemonSet installs runx on."""

import json
import pathlib
import re
import tempfile
import urllib.error
import urllib.request

from checks_chart import CHART
from cluster import NODE
from images import BOX, HELLO, INSTALLER, TICK
from session import SLEEP, basis, check, container, pod, sh

RELEASE = NAMESPACE = "runx"
DAEMONSET = "daemonset/runx-node"
SELECTOR = "app.kubernetes.io/instance=runx,app.kubernetes.io/component=installer"
WANTED = "runx.test/wanted"
DROP_IN = "conf.d/runx.toml"
OURS = re.compile(r"runx\.dev/")


def values(**installer):
    return {"installer": {"image": {"repository": INSTALLER, "tag": "1", "pullPolicy": "Never"}, "intervalSeconds": 1,
                          # It is the only node, and is counted what it does in one go.
                          "jitterSeconds": 0, "nodeSelector": {WANTED: "yes"}, **installer},
            "tests": {"image": BOX, "wasmImage": HELLO, "pullPolicy": "Never"},
            # What needs no definitions that this cluster does not have.
            "networkPolicy": {"enabled": True}, "dashboard": {"enabled": True}}


def helm(s, verb, *words, release=None, check=True):
    """helm for our release; with `release`, by these values."""
    how = {"check": check, "timeout": 240 * s.patience}
    if release is None:
        return s.cluster.helm(verb, RELEASE, *words, "--namespace", NAMESPACE, **how)
    with tempfile.NamedTemporaryFile("w", dir=s.cluster.directory, suffix=".json") as file:
        json.dump(release, file)
        file.flush()
        return s.cluster.helm(verb, RELEASE, CHART, "--namespace", NAMESPACE, "--create-namespace", "--values", file.name, *words,
                              **how)


def installer(s):
    """The pod of the DaemonSet that is to stay; `None` while there is none."""
    found = json.loads(s.kubectl("-n", NAMESPACE, "get", "pods", "-l", SELECTOR, "-o", "json").stdout)["items"]
    staying = [one for one in found if "deletionTimestamp" not in one["metadata"]]
    return staying[0] if staying else None


def is_ready(one):
    return any(each["type"] == "Ready" and each["status"] == "True" for each in one["status"].get("conditions", []))


def says_ready(s):
    """By itself, which the kubelet hears of only later."""
    try:
        return ask_installer(s, "/readyz") == "ok\n"
    except urllib.error.HTTPError as e:
        assert e.code == 503, e
        return False


def ask_installer(s, path):
    with urllib.request.urlopen(f"http://{installer(s)['status']['podIP']}:8090{path}", timeout=20) as answer:
        return answer.read().decode()


def installers_log(s):
    """What the pod that is to stay has written; nothing if it has not begun."""
    one = installer(s)
    return s.kubectl("-n", NAMESPACE, "logs", one["metadata"]["name"], check=False).stdout if one else ""


def labels(s):
    return {key: value for key, value in s.get("node", s.node.name)["metadata"]["labels"].items() if OURS.match(key)}


def handlers(s):
    """What the node says of its containerd; before 2.0 it says nothing."""
    return [one.get("name") for one in s.get("node", s.node.name)["status"].get("runtimeHandlers") or []]


def programs(s):
    """The sets of programs on the node, and the one that new pods get."""
    top = s.cluster.node.root / "opt/runx"
    return {path.name for path in (top / "versions").iterdir()}, (top / "current").readlink().name


@basis
def where_runx_is_not_a_pod_stays_pending_with_a_reason_and_runs_once_it_is(s):
    node = s.cluster.node
    s.files_before = node.files()
    print(helm(s, "install", release=values()).stdout)
    with s.pods(pod("early", sh(f"echo started; {SLEEP}"))):
        def reason():
            events = json.loads(s.kubectl("get", "events", "--field-selector", "involvedObject.name=early", "-o", "json").stdout)
            return next((each["message"] for each in events["items"] if each["reason"] == "FailedScheduling"), None)
        message = s.until("the scheduler says why", reason)
        assert "didn't match Pod's node affinity/selector" in message, message
        early = s.get("pod", "early")
        assert early["spec"]["nodeSelector"] == {"runx.dev/ready": "true"}, early["spec"]
        assert early["status"]["phase"] == "Pending" and labels(s) == {} and node.files() == s.files_before
        # From here on the DaemonSet has a node.
        restarts = node.starts
        s.kubectl("label", "node", NODE, f"{WANTED}=yes")
        s.until("its pod is there", lambda: installer(s))
        s.kubectl("-n", NAMESPACE, "rollout", "status", DAEMONSET, "--timeout=120s")
        s.ready("early")
        assert s.logs("early") == "started\n"
    assert labels(s)["runx.dev/ready"] == "true" and re.match(r"\d+\.\d+", labels(s)["runx.dev/version"]), labels(s)
    assert node.starts == restarts + 1, installers_log(s)
    # The node's own containerd has read the configuration before it was there, and once more with the handler.
    asked = [member for member, _ in node.manager.asked]
    checks = [called for member, called in node.manager.asked if member == "StartTransientUnit"]
    assert asked.index("RestartUnit") > asked.index("StartTransientUnit") and asked.count("RestartUnit") == 1, asked
    commands = [dict(called[2])["ExecStart"][0][1] for called in checks]
    assert [command[-2:] for command in commands].count(["config", "dump"]) == 2, commands
    after = node.files()
    if s.cluster.containerd_version >= (2, 0):
        assert set(after) - set(s.files_before) == {DROP_IN} and b"runtimes.runx]" in after[DROP_IN], after
        assert {name: after[name] for name in s.files_before} == s.files_before
        s.until("the node names the handler", lambda: "runx" in handlers(s) and "runc" in handlers(s))
    assert s.get("runtimeclass", "runx")["overhead"]["podFixed"] == {"cpu": "10m", "memory": "8Mi"}


@check
def the_installers_pod_has_no_right_that_it_does_not_need(s):
    one = installer(s)
    spec = one["spec"]
    assert not any(spec.get(name) for name in ("hostPID", "hostIPC", "hostNetwork")), spec
    status = s.kubectl("-n", NAMESPACE, "exec", one["metadata"]["name"], "--", "/runx-node", "status").stdout
    assert re.search(r"^STATE\s+installed$", status, re.M) and re.search(r"^DRIFT\s+none$", status, re.M), status
    # As the kernel has it. The container's processes are found by its cgroup.
    container = one["status"]["containerStatuses"][0]["containerID"].rpartition("/")[2]
    cgroup = next(path for path in s.cluster.cgroups() if path.name == container)
    text = pathlib.Path("/proc", (cgroup / "cgroup.procs").read_text().split()[0], "status").read_text()
    for line in (r"CapEff:\s+0+$", r"CapBnd:\s+0+$", r"NoNewPrivs:\s+1$", r"Seccomp:\s+2$"):
        assert re.search("^" + line, text, re.M), text


@check
def helm_test_passes_for_all_three_kinds(s):
    print(helm(s, "test").stdout)
    # Those that have passed are removed.
    left = s.kubectl("-n", NAMESPACE, "get", "pods", "-l", "app.kubernetes.io/component=test", "-o", "name").stdout
    assert left == "", left


@check
def a_new_pod_of_the_installer_changes_nothing_and_restarts_nothing(s):
    node = s.cluster.node
    before, restarts, first = node.files(), node.starts, installer(s)["metadata"]["name"]
    s.kubectl("-n", NAMESPACE, "delete", "pod", first, "--wait=true", "--timeout=60s")
    s.until("there is another", lambda: (installer(s) or {"metadata": {"name": first}})["metadata"]["name"] != first)
    s.kubectl("-n", NAMESPACE, "rollout", "status", DAEMONSET, "--timeout=60s")
    assert "installed already" in installers_log(s), installers_log(s)
    assert (node.files(), node.starts) == (before, restarts)


@check
def what_somebody_takes_away_is_put_back(s):
    """A drop-in that is removed, with a restart so that containerd forgets it."""
    node = s.cluster.node
    before = node.files()
    name = DROP_IN if DROP_IN in before else "config.toml"
    (node.root / "etc/containerd" / name).unlink()
    if name != DROP_IN:
        (node.root / "etc/containerd" / name).write_bytes(s.files_before[name])
    assert node.restart_containerd()
    s.until("it is there again", lambda: node.files() == before)
    s.until("the installer is ready", lambda: says_ready(s))
    assert re.search(r'^runx_containerd_restarts_total\{reason="drift"\} 1$', ask_installer(s, "/metrics"), re.M)
    with s.pods(pod("after-drift", sh(SLEEP))):
        s.ready("after-drift")


@check
def the_installer_tells_prometheus_what_runs(s):
    def starts(kind):
        return int(re.search(rf'^runx_container_start_seconds_count\{{kind="{kind}"\}} (\d+)$', ask_installer(s, "/metrics"), re.M)[1])

    before = {kind: starts(kind) for kind in ("sandbox", "native", "wasm", "agent")}
    with s.pods(pod("counted", sh(SLEEP), annotations={"runx.dev/agent": "true"}), pod("counted-module", container(TICK))):
        for name in ("counted", "counted-module"):
            s.ready(name)
        expected = {"sandbox": 2, "native": 1, "wasm": 1, "agent": 1}
        s.until("starts are counted by kind",
                lambda: all(starts(kind) == before[kind] + more for kind, more in expected.items()), 30)
    with s.pods(pod("counted-one", sh(SLEEP))):
        s.ready("counted-one")

        wanted = {'runx_install_state{state="installed"}': "1", 'runx_handler_registered{handler="runx"}': "1", "runx_config_drift": "0",
                  'runx_containers{kind="native",state="started"}': "1", 'runx_containers{kind="sandbox",state="started"}': "1"}

        def numbers():
            found = dict(re.findall(r"^(runx_\S+) ([0-9.]+)$", ask_installer(s, "/metrics"), re.M))
            return all(found.get(name) == value for name, value in wanted.items())
        try:
            s.until("the numbers are right", numbers, 30)
        except AssertionError:
            print(ask_installer(s, "/metrics"))
            raise


@check
def the_installers_account_changes_its_own_nodes_labels_alone(s):
    other = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "other", "labels": {"kubernetes.io/os": "linux"}}}
    name = installer(s)["metadata"]["name"]
    token = s.kubectl("-n", NAMESPACE, "create", "token", "runx-node", "--bound-object-kind=Pod", f"--bound-object-name={name}"
                      ).stdout.strip()
    of_nowhere = s.kubectl("-n", NAMESPACE, "create", "token", "runx-node").stdout.strip()

    def patch(body, node=NODE, token=token):
        return s.request("PATCH", f"/api/v1/nodes/{node}", token, body)

    def label(key, value, **more):
        return patch({"metadata": {"labels": {key: value}}}, **more)
    try:
        s.apply(other)
        code, answer = label("runx.dev/checked", "yes")
        assert code == 200 and answer["metadata"]["labels"]["runx.dev/checked"] == "yes", answer
        code, answer = label("runx.dev/checked", None)
        assert code == 200 and "runx.dev/checked" not in answer["metadata"]["labels"], answer
        # Policies come into effect a moment after they were made, which is long ago.
        refused = {
            "the node that it runs on, and no other": [
                label("runx.dev/checked", "yes", node="other"), label("runx.dev/checked", "yes", token=of_nowhere)],
            "labels that begin with runx.dev/, and no others": [
                label("other.dev/x", "y"), label("kubernetes.io/os", "none"), label(WANTED, None), label("runx.devious/x", "y")],
            "labels, and nothing else": [
                patch({"spec": {"unschedulable": True}}), patch({"metadata": {"annotations": {"runx.dev/x": "y"}}}),
                patch({"spec": {"taints": [{"key": "runx.dev/x", "effect": "NoExecute"}]}})]}
        for message, answers in refused.items():
            for code, answer in answers:
                assert code == 422 and message in answer["message"], (message, code, answer)
        for method, path in (("GET", f"/api/v1/nodes/{NODE}"), ("DELETE", "/api/v1/nodes/other"), ("GET", "/api/v1/pods"),
                             ("GET", f"/api/v1/namespaces/{NAMESPACE}/secrets"),
                             ("PATCH", f"/api/v1/nodes/{NODE}/status")):
            code, answer = s.request(method, path, token, {} if method == "PATCH" else None)
            assert code == 403, (method, path, code, answer)
    finally:
        s.kubectl("delete", "node", "other", check=False)


@check
def an_installation_is_an_event_of_its_node_and_the_account_tells_no_others(s):
    s.until("it is told", lambda: "RunxInstalled" in s.kubectl("describe", "node", NODE).stdout, 30)
    name = installer(s)["metadata"]["name"]
    token = s.kubectl("-n", NAMESPACE, "create", "token", "runx-node", "--bound-object-kind=Pod", f"--bound-object-name={name}"
                      ).stdout.strip()
    path = "/api/v1/namespaces/default/events"

    def event(event_name, **more):
        return {"apiVersion": "v1", "kind": "Event", "metadata": {"name": event_name, "namespace": "default"}, "type": "Normal",
                "involvedObject": {"kind": "Node", "name": NODE}, "reason": "RunxChecked", "source": {"component": "runx-node"}, **more}

    def tell(event_name, **more):
        return s.request("POST", path, token, event(event_name, **more))
    try:
        code, answer = tell("checked")
        assert code == 201, answer
        code, answer = s.request("PATCH", f"{path}/checked", token, {"count": 2})
        assert code == 200 and answer["count"] == 2, answer
        kubelets = event("kubelets", reason="Rebooted", source={"component": "kubelet"})
        s.apply(kubelets)
        refused = {
            "the node that it runs on, and about nothing else": [
                tell("other", involvedObject={"kind": "Node", "name": "other"}),
                tell("pod", involvedObject={"kind": "Pod", "namespace": "default", "name": NODE}),
                s.request("PATCH", f"{path}/checked", token, {"involvedObject": {"name": "other"}})],
            "events of its own, and changes no others": [
                tell("reason", reason="Rebooted"), tell("component", source={"component": "kubelet"}),
                s.request("PATCH", f"{path}/kubelets", token, {"count": 2}),
                s.request("PATCH", f"{path}/kubelets", token, {"reason": "RunxChecked", "source": {"component": "runx-node"}})]}
        for message, answers in refused.items():
            for code, answer in answers:
                assert code == 422 and message in answer["message"], (message, code, answer)
        for method, where in (("GET", f"{path}/kubelets"), ("DELETE", f"{path}/kubelets"), ("POST", f"/api/v1/namespaces/{NAMESPACE}/events")):
            code, answer = s.request(method, where, token, event("elsewhere") if method == "POST" else None)
            assert code == 403, (method, where, code, answer)
    finally:
        s.kubectl("-n", "default", "delete", "event", "checked", "kubelets", check=False)
