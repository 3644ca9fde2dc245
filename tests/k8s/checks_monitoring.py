"""What Prometheus and its operator make of the chart's monitors, rules and dashboard, and of a node's metrics."""

import contextlib
import json
import re
import subprocess
import urllib.error
import urllib.parse
import urllib.request

import tools
from checks_engines import defined, taken
from checks_node import NAMESPACE, RELEASE, ask_installer, helm, installer, values
from cluster import NODE, free_port
from images import MISSING
from session import Skipped, check, container, pod

OPERATOR = "github.com/prometheus-operator/prometheus-operator@v0.85.0"
SELECTOR = re.compile(r"\b(?:runx_\w+|up)(?:\{[^}]*\})?")


def expressions(rules, dashboard):
    for group in rules["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]
    panels = list(dashboard["panels"])
    for panel in panels:
        panels.extend(panel.get("panels", []))
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"]


def scraping(s, monitor):
    """What the operator makes of a monitor, for the one pod that there is."""
    spec, job = monitor["spec"], f"{monitor['metadata']['namespace']}/{monitor['metadata']['name']}"
    [endpoint] = spec["podMetricsEndpoints"]
    one = installer(s)
    labels = one["metadata"]["labels"]
    assert spec["selector"]["matchLabels"].items() <= labels.items(), (monitor, labels)
    [port] = [port["containerPort"] for port in one["spec"]["containers"][0]["ports"] if port["name"] == endpoint["port"]]
    found = {"__meta_kubernetes_pod_node_name": one["spec"]["nodeName"]}
    relabelings = [{"source_labels": rule["sourceLabels"], "target_label": rule["targetLabel"]} for rule in endpoint["relabelings"]]
    return {"job_name": job, "metrics_path": endpoint["path"], "relabel_configs": relabelings,
            "static_configs": [{"targets": [f"{one['status']['podIP']}:{port}"], "labels": found}]}


class Prometheus:
    """A server that asks the installer every second."""

    def __init__(self, s, programs, monitor, rules):
        self.at = s.cluster.directory / "prometheus"
        self.at.mkdir()
        (self.at / "rules.json").write_text(json.dumps(rules))
        config = {"global": {"scrape_interval": "1s", "evaluation_interval": "1s"}, "rule_files": [str(self.at / "rules.json")],
                  "scrape_configs": [scraping(s, monitor)]}
        (self.at / "config.json").write_text(json.dumps(config))
        print(tools.run([programs / "promtool", "check", "config", self.at / "config.json"], "check the rules").strip())
        self.address = f"127.0.0.1:{free_port()}"
        with open(self.at / "log", "wb") as log:
            self.child = subprocess.Popen(
                [programs / "prometheus", f"--config.file={self.at}/config.json", f"--storage.tsdb.path={self.at}/data",
                 f"--web.listen-address={self.address}"], stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def ask(self, path, **query):
        assert self.child.poll() is None, (self.at / "log").read_text(errors="replace")[-2000:]
        url = f"http://{self.address}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        try:
            with urllib.request.urlopen(url, timeout=20) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as e:
            # It reads its storage first.
            if e.code == 503:
                return None
            raise AssertionError(f"{query}: {e.read().decode(errors='replace')}") from e
        except urllib.error.URLError:
            return None

    def found(self, query):
        data = self.ask("query", query=query)
        return data and data["result"]

    def firing(self):
        return {one["labels"]["alertname"]: one["labels"] for one in self.ask("alerts")["alerts"] if one["state"] == "firing"}


@contextlib.contextmanager
def a_pool(s):
    """One that tells the node of itself."""
    directory = s.cluster.node.root / "var/lib/runx/pools"
    directory.mkdir(exist_ok=True)
    told = directory / "check.prom"
    command = [s.cluster.dist / "runx", "pool", "serve", "--address", "127.0.0.1:0", "--pool-size", "1", "--metrics-file", told]
    with open(s.cluster.directory / "pool.log", "wb") as log:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        s.until("the pool tells of itself", told.exists)
        yield
    finally:
        tools.end(child, 20)
        told.unlink(missing_ok=True)
        directory.rmdir()


def asked_for_is_there(s, server, rules, dashboard):
    """Every expression can be evaluated, and each of its selectors finds something."""
    for where, expression in expressions(rules, dashboard):
        assert server.found(expression) is not None, (where, expression)
        for selector in SELECTOR.findall(expression):
            # Whatever the value is that it is compared with.
            s.until(f"{where}: {selector} finds something", lambda selector=selector: server.found(selector), 20)


@check
def prometheus_takes_what_the_chart_makes_for_it_and_warns_of_starts_that_fail(s):
    with defined(s, "monitoring.coreos.com", OPERATOR, only=("_podmonitors", "_prometheusrules")):
        # helm asks the API whether it knows the kinds.
        helm(s, "upgrade", release=dict(values(), podMonitor={"enabled": True}, prometheusRule={"enabled": True}))
        try:
            manifest = s.cluster.helm("get", "manifest", RELEASE, "--namespace", NAMESPACE).stdout
            for kind in ("PodMonitor", "PrometheusRule"):
                [text] = [text for text in manifest.split("\n---\n") if f"\nkind: {kind}\n" in text]
                taken(s, kind, text)

            def made(kind, name="runx-node"):
                return json.loads(s.kubectl("-n", NAMESPACE, "get", kind, name, "-o", "json").stdout)
            rules, monitor = made("prometheusrule")["spec"], made("podmonitor")
            dashboard = json.loads(made("configmap", "runx-node-dashboard")["data"]["runx.json"])
        finally:
            helm(s, "upgrade", release=values())
    try:
        programs = tools.prometheus()
    except tools.Missing as e:
        raise Skipped(f"the operator's definitions fit, but there is no prometheus: {e}") from e
    with a_pool(s):
        s.until("the installer has seen the pool", lambda: 'runx_pool_ready{pool="check"}' in ask_installer(s, "/metrics"), 30)
        linted = subprocess.run([programs / "promtool", "check", "metrics"], input=ask_installer(s, "/metrics"), text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert (linted.returncode, linted.stdout) == (0, ""), linted
        server = Prometheus(s, programs, monitor, rules)
        try:
            s.until("the node is asked", lambda: server.found(f'runx_info{{node="{NODE}"}}'))
            asked_for_is_there(s, server, rules, dashboard)
            assert server.firing() == {}, server.firing()
            failing = [pod(f"fails-{number}", container(MISSING, "/no/such/program")) for number in range(9)]
            with s.pods(*failing):
                s.until("it warns of starts that fail", lambda: server.firing())
            assert set(server.firing()) == {"RunxStartsFail"} and server.firing()["RunxStartsFail"]["node"] == NODE, server.firing()
        finally:
            tools.end(server.child, 20)
