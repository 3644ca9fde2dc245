"""What is true of the chart before anything runs, and of a node that is configured by hand with what it has for that."""

import json
import tempfile

import tools
from session import SLEEP, Skipped, basis, check, pod, sh

CHART = tools.TOP / "charts/runx"


def lines(text):
    return [line for line in text.splitlines() if line and not line.lstrip().startswith("#")]


@basis
def the_chart_is_linted_and_refuses_what_it_does_not_know(s):
    print(s.cluster.helm("lint", "--strict", CHART).stdout.strip())
    refused = s.cluster.helm("template", "r", CHART, "--set", "node.nosuch=1", check=False)
    assert refused.returncode != 0 and "nosuch" in refused.stderr, refused


@basis
def the_manifests_without_helm_are_accepted_by_the_api(s):
    """While nothing of them is there: what helm makes has the same names. It needs the namespace, too."""
    s.kubectl("create", "namespace", "runx")
    done = s.kubectl("apply", "--dry-run=server", "-f", tools.TOP / "deploy/manifests").stdout
    for kind in ("daemonset.apps", "clusterrole", "role.rbac", "rolebinding", "serviceaccount", "validatingadmissionpolicy", "runtimeclass"):
        assert kind in done, done


@check
def a_node_that_is_configured_by_hand_with_the_charts_file_runs_pods(s):
    """Beside the installer, so under another name: the programs that it has brought are used."""
    by_hand = {"installer": {"enabled": False}, "tests": {"enabled": False},
               "node": {"configMap": True, "handler": "by-hand", "shim": "/opt/runx/current/containerd-shim-runx-v1"},
               "runtimeClass": {"name": "by-hand"}}
    if s.cluster.containerd_version < (2, 0):
        raise Skipped("before containerd 2.0 it would be appended to the file that the installer has changed")
    with tempfile.NamedTemporaryFile("w", dir=s.cluster.directory, suffix=".json") as values:
        json.dump(by_hand, values)
        values.flush()
        s.cluster.helm("install", "by-hand", CHART, "--values", values.name)
    try:
        found = json.loads(s.kubectl("get", "configmap", "by-hand-containerd", "-o", "json").stdout)["data"]
        for version in (2, 3):
            ours = (tools.TOP / f"deploy/containerd/runx-v{version}.toml").read_text()
            ours = ours.replace("/usr/local/bin/", "/opt/runx/current/").replace("runtimes.runx]", "runtimes.by-hand]")
            assert lines(found[f"runx-v{version}.toml"]) == lines(ours), found
        plain = s.kubectl("create", "-f", tools.TOP / "deploy/runtimeclass.yaml", "--dry-run=client", "-o", "json").stdout
        made = s.get("runtimeclass", "by-hand")
        assert made["overhead"] == json.loads(plain)["overhead"] and made["handler"] == "by-hand", (made, plain)
        assert "scheduling" not in made, made
        s.cluster.node.handlers_by_hand("by-hand.toml", found["runx-v3.toml"])
        with s.pods(pod("by-hand", sh(f"echo started; {SLEEP}"), runtime="by-hand")):
            s.ready("by-hand")
            assert s.logs("by-hand") == "started\n"
    finally:
        s.cluster.helm("uninstall", "by-hand", check=False)
        s.cluster.node.handlers_by_hand("by-hand.toml", None)
