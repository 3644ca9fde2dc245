"""The alert rules, by promtool: which of them warn, and when, of what a node tells in the course of time."""

import functools
import json
import subprocess

import pytest
import yaml
from test_chart import objects, rendered, tools

# As the PodMonitor and Prometheus label what they get of a node's installer.
ONE = {"node": "one", "pod": "runx-node-a", "namespace": "apps", "instance": "10.0.0.1:8090"}
OTHER = {"node": "other", "pod": "runx-node-b", "namespace": "apps", "instance": "10.0.0.2:8090"}
# How often Prometheus asks, in seconds.
STEP = 30


@functools.cache
def rules():
    [made] = [made for made in objects(rendered("all")) if made["kind"] == "PrometheusRule"]
    return made["spec"]


@functools.cache
def promtool():
    try:
        return tools.prometheus() / "promtool"
    except tools.Missing as e:
        pytest.skip(f"promtool cannot be had: {e}")


def series(name, values, labels=ONE, **more):
    text = ",".join(f'{key}="{value}"' for key, value in dict(labels, **more).items())
    return {"series": f"{name}{{{text}}}", "values": values}


def counted(at, minutes):
    """A counter that steps at these seconds, for so long."""
    return " ".join(str(sum(second <= now for second in at)) for now in range(0, minutes * 60 + 1, STEP))


def expected(alert, node):
    """What Prometheus makes of a rule that fires for a node."""
    [rule] = [rule for rule in rules()["groups"][0]["rules"] if rule["alert"] == alert]
    notes = {key: text.replace("{{ $labels.node }}", node["node"]) for key, text in rule["annotations"].items()}
    assert "{{" not in "".join(notes.values())
    return rule["labels"], notes


def warns(tmp_path, told, times):
    """That of the alerts only these fire, each at these minutes for that node: a list of (minutes, alert or None, labels)."""
    (tmp_path / "rules.json").write_text(json.dumps(rules()))
    names = [rule["alert"] for rule in rules()["groups"][0]["rules"]]
    wanted = []
    for minutes, fires, labels in times:
        for alert in names:
            found = []
            if alert == fires:
                severity, notes = expected(alert, labels)
                found = [{"exp_labels": dict(labels, **severity), "exp_annotations": notes}]
            wanted.append({"eval_time": f"{minutes}m", "alertname": alert, "exp_alerts": found})
    test = {"rule_files": ["rules.json"], "evaluation_interval": f"{STEP}s",
            "tests": [{"interval": f"{STEP}s", "input_series": told, "alert_rule_test": wanted}]}
    (tmp_path / "test.json").write_text(json.dumps(test))
    done = subprocess.run([promtool(), "test", "rules", tmp_path / "test.json"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout


def state(name, values, labels=ONE):
    return series("runx_install_state", values, labels, state=name)


def test_the_rules_are_well_formed(tmp_path):
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump(rules()))
    done = subprocess.run([promtool(), "check", "rules", path], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout


def test_an_installation_that_failed_is_told_after_five_minutes(tmp_path):
    told = [state("failed", "0x9 1x60"), state("installed", "1x9 0x60"), state("failed", "0x80", OTHER), state("installed", "1x80", OTHER)]
    warns(tmp_path, told, [(4, None, ONE), (9, None, ONE), (11, "RunxInstallationFailed", dict(ONE, state="failed"))])


def test_an_installer_that_does_not_answer_is_told_after_a_quarter_of_an_hour(tmp_path):
    """As Prometheus tells it of a pod that is there, and of one that is deleted."""
    [monitor] = [made["metadata"] for made in objects(rendered("all")) if made["kind"] == "PodMonitor"]
    job = f"{monitor['namespace']}/{monitor['name']}"
    told = [series("up", "1x9 0x80", job=job), series("up", "1x20 stale", OTHER, job=job), series("up", "0x80", OTHER, job="apps/other")]
    warns(tmp_path, told, [(4, None, ONE), (19, None, ONE), (21, "RunxInstallerSilent", dict(ONE, job=job))])


def test_what_is_refused_is_told_after_a_quarter_of_an_hour(tmp_path):
    told = [series("runx_node_failing", "1x80"), series("runx_node_failing", "0x80", OTHER)]
    warns(tmp_path, told, [(14, None, ONE), (16, "RunxInstallationRefused", ONE)])


def test_a_handler_that_is_gone_is_told_of_its_own_node(tmp_path):
    told = [state("installed", "1x40"), state("installed", "1x40", OTHER),
            series("runx_handler_registered", "1x40", handler="runx"),
            series("runx_handler_registered", "0x40", OTHER, handler="runx")]
    warns(tmp_path, told, [(4, None, ONE), (6, "RunxHandlerGone", dict(OTHER, state="installed"))])


def test_a_handler_that_was_never_installed_is_no_matter(tmp_path):
    told = [state("installed", "0x40"), state("absent", "1x40"), series("runx_handler_registered", "0x40", handler="runx")]
    warns(tmp_path, told, [(6, None, ONE), (20, None, ONE)])


def test_drift_that_stays_is_told_after_a_quarter_of_an_hour(tmp_path):
    warns(tmp_path, [series("runx_config_drift", "0x3 1x80")], [(14, None, ONE), (18, "RunxDrift", ONE)])


def test_containerd_that_is_repaired_as_often_as_the_installer_does_is_told(tmp_path):
    """It repairs three times within an hour and no more. The series are there from the beginning."""
    only = {"node": "one"}
    for seconds, fires in (([300, 900], None), ([300, 900, 1500], "RunxRestartsContainerd")):
        told = [series("runx_containerd_restarts_total", counted(seconds, 50), reason="drift"),
                series("runx_containerd_restarts_total", counted([], 50), reason="rollback"),
                # Long ago.
                series("runx_containerd_restarts_total", "1x100", reason="install"),
                series("runx_containerd_restarts_total", counted([600], 50), OTHER, reason="install")]
        warns(tmp_path, told, [(20, None, only), (40, fires, only)])


def test_a_container_whose_start_fails_again_and_again_is_told_and_one_that_was_deleted_is_not(tmp_path):
    """As the kubelet tries it: it waits ten seconds, twice that, and so on up to five minutes."""
    tries, pause = [60], 10
    while tries[-1] < 4 * 3600:
        tries.append(tries[-1] + pause)
        pause = min(pause * 2, 300)
    only = {"node": "one"}
    name = "runx_container_start_failures_total"
    warns(tmp_path, [series(name, counted(tries, 240))],
          [(5, None, only), *((minutes, "RunxStartsFail", only) for minutes in (30, 61, 90, 120, 181, 239))])
    deleted = [second for second in tries if second < 600]
    warns(tmp_path, [series(name, counted(deleted, 240))], [(minutes, None, only) for minutes in (5, 15, 30, 60)])


def test_starts_that_are_slow_are_told_and_few_slow_ones_among_many_are_not(tmp_path):
    only = {"node": "one"}
    name = "runx_container_start_seconds_bucket"
    for quick, fires in ((1, "RunxStartsSlow"), (20, None)):
        # So many in a step take less than a tenth of a second, and one takes two seconds.
        counts = {"0.1": quick, "1": quick, "2.5": quick + 1, "+Inf": quick + 1}
        told = [series(name, f"0+{count}x100", kind="native", le=le) for le, count in counts.items()]
        # A module's first start compiles it.
        told += [series(name, "0+5x100", kind="wasm", le=le) for le in ("2.5", "+Inf")]
        warns(tmp_path, told, [(10, None, only), (40, fires, only)])
