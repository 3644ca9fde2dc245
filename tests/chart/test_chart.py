"""The chart and the plain manifests: what helm makes of them, without a cluster."""

import functools
import json
import os
import pathlib
import re
import subprocess
import sys

import kubernetes_validate
import pytest
import yaml

TOP = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(TOP / "tests/k8s"))
import tools  # noqa: E402

CHART = TOP / "charts/runx"
MANIFESTS = TOP / "deploy/manifests"
GOLDEN = pathlib.Path(__file__).resolve().parent / "golden"
KUBERNETES = "1.36"

# Sets of values, each of which has a file in golden/.
SETS = {
    "default": {},
    "by-hand": {"installer.enabled": "false", "node.configMap": "true", "tests.enabled": "false"},
    "k3s": {"installer.distribution": "k3s", "tests.enabled": "false"},
    "rke2": {"installer.distribution": "rke2", "tests.enabled": "false"},
    "k0s": {"installer.distribution": "k0s", "tests.enabled": "false"},
    "kind": {"installer.distribution": "kind", "tests.enabled": "false"},
    "uninstall": {"installer.mode": "uninstall", "tests.enabled": "false", "runtimeClass.create": "false"},
    "all": {
        "installer.image.repository": "mirror.example/runx/node", "installer.image.digest": "sha256:" + "a" * 64,
        "installer.imagePullSecrets[0].name": "pull", "installer.seLinuxOptions.type": "spc_t", "installer.installDir": "/home/runx",
        "installer.maxUnavailable": "10%", "installer.podLabels.team": "node", "podMonitor.enabled": "true",
        "prometheusRule.enabled": "true", "dashboard.enabled": "true", "networkPolicy.enabled": "true",
        "tests.wasmImage": "hello-wasm:1", "runtimeClass.nodeSelector.pool": "sandboxes", "node.handler": "runx-next",
    },
}


@functools.cache
def helm_program():
    return tools.kubectl_and_helm()[1]


def helm(*words, check=True):
    home = tools.cache() / "helm-home"
    homes = {f"HELM_{kind}_HOME": str(home / kind.lower()) for kind in ("CACHE", "CONFIG", "DATA")}
    done = subprocess.run([str(helm_program()), *map(str, words)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True, env=dict(os.environ, **homes))
    if check:
        assert done.returncode == 0, done.stderr
    return done


@functools.cache
def rendered(name):
    flags = [word for key, value in SETS[name].items() for word in ("--set", f"{key}={value}")]
    return helm("template", "demo", CHART, "--namespace", "apps", "--kube-version", KUBERNETES, "--api-versions",
                "monitoring.coreos.com/v1", *flags).stdout


def objects(text):
    return [made for made in yaml.safe_load_all(text) if made]


def every_object():
    for name in SETS:
        for made in objects(rendered(name)):
            yield f"{name}: {made['kind']} {made['metadata']['name']}", made
    for path in sorted(MANIFESTS.glob("*.yaml")):
        for made in objects(path.read_text()):
            yield f"{path.name}: {made['kind']} {made['metadata']['name']}", made


def is_hook(made):
    return "helm.sh/hook" in made["metadata"].get("annotations", {})


def test_helm_has_nothing_against_the_chart():
    helm("lint", "--strict", CHART)


@pytest.mark.parametrize("name", SETS)
def test_what_is_rendered_is_what_was_looked_at(name):
    path = GOLDEN / f"{name}.yaml"
    if os.environ.get("RUNX_GOLDEN") == "write":
        path.write_text(rendered(name))
    assert rendered(name) == path.read_text(), f"if it is meant: RUNX_GOLDEN=write tests/chart/run, and look at {path}"


def test_kubernetes_knows_every_object_and_every_field():
    for name, made in every_object():
        if made["apiVersion"].startswith("monitoring.coreos.com/"):
            continue
        kubernetes_validate.validate(made, KUBERNETES, strict=True)


@pytest.mark.parametrize("value", [
    "installer.nosuch=1", "nosuch=1", "installer.image.nosuch=x", "node.nosuch=1", "tests.nosuch=1",
    "installer.distribution=talos", "installer.mode=remove", "installer.installDir=opt", "installer.installDir=/opt/../etc",
    "installer.image.digest=sha256:12", "installer.timeoutSeconds=0", "installer.maxUnavailable=0", "installer.jitterSeconds=-1", "hooks.nosuch=1", "networkPolicy.from[0].podSelektor=x", "hooks.timeoutSeconds=0", "node.handler=runc",
    "node.handler=Runx", "runtimeClass.name=A", "podMonitor.interval=soon", "tests.pullPolicy=Sometimes",
    "installer.tolerations[0].efect=NoSchedule", "runtimeClass.create=perhaps",
])
def test_a_value_that_is_wrong_is_refused_by_its_name(value):
    done = helm("template", "demo", CHART, "--set", value, check=False)
    assert done.returncode != 0
    path = re.sub(r"\[\d+\]", "", value.split("=")[0]).split(".")
    assert path[-1] in done.stderr, done.stderr


def test_monitors_need_what_they_are_made_for():
    for name in ("podMonitor", "prometheusRule"):
        done = helm("template", "demo", CHART, "--set", f"{name}.enabled=true", check=False)
        assert done.returncode != 0 and f"{name}.enabled" in done.stderr, done.stderr


def test_the_installer_has_no_right_that_it_does_not_need():
    found = 0
    for name, made in every_object():
        if made["kind"] == "DaemonSet":
            found += 1
            spec = made["spec"]["template"]["spec"]
            for field in ("hostPID", "hostNetwork", "hostIPC"):
                assert not spec.get(field), name
            [container] = spec["containers"]
            security = container["securityContext"]
            assert security["privileged"] is False and security["allowPrivilegeEscalation"] is False, name
            assert security["readOnlyRootFilesystem"] is True and security["capabilities"] == {"drop": ["ALL"]}, name
            assert security["seccompProfile"] == {"type": "RuntimeDefault"}, name
            paths = {}
            for volume in spec["volumes"]:
                assert set(volume["hostPath"]) == {"path", "type"} and volume["hostPath"]["type"], name
                assert volume["hostPath"]["path"] not in ("/", "/etc", "/run", "/usr", "/var", "/var/lib"), name
                paths[volume["name"]] = volume["hostPath"]["path"]
            mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
            assert set(mounts) == set(paths), name
            for mount in mounts.values():
                assert mount["mountPath"] == "/host" + paths[mount["name"]], name
            # What is mounted below it on the node comes, and goes when its container has ended.
            held = {mount["name"] for mount in mounts.values() if mount["mountPath"].startswith("/host/run/")} - {"systemd"}
            assert held and all(mounts[mount].get("mountPropagation") == "HostToContainer" for mount in held), name
            # As long as a restart of containerd takes, and another one to take it back.
            timeout = [int(variable["value"]) for variable in container["env"] if variable["name"] == "RUNX_TIMEOUT"] or [60]
            assert spec["terminationGracePeriodSeconds"] >= 2 * (180 + timeout[0]), name
            writable = {mount["name"] for mount in mounts.values() if not mount.get("readOnly")}
            assert writable == {"containerd-config", "programs", "state"}, name
        if made["kind"] == "ClusterRole":
            assert made["rules"] == [{"apiGroups": [""], "resources": ["nodes"], "verbs": ["patch"]}], name
        if made["kind"] == "Role" and not is_hook(made):
            assert made["metadata"]["namespace"] == "default", name
            assert made["rules"] == [{"apiGroups": [""], "resources": ["events"], "verbs": ["create", "patch"]}], name
        if made["kind"] == "ServiceAccount":
            assert made["automountServiceAccountToken"] is False, name
    assert found > len(SETS) / 2


def test_the_policies_and_rights_are_for_the_account_that_the_daemonset_has():
    for text in (rendered("default"), "\n---\n".join(path.read_text() for path in sorted(MANIFESTS.glob("*.yaml")))):
        def of(kind):
            return [made for made in objects(text) if made["kind"] == kind and not is_hook(made)]
        [daemonset] = of("DaemonSet")
        namespace, name = daemonset["metadata"]["namespace"], daemonset["spec"]["template"]["spec"]["serviceAccountName"]
        policies = of("ValidatingAdmissionPolicy")
        for policy in policies:
            [condition] = policy["spec"]["matchConditions"]
            assert json.dumps(f"system:serviceaccount:{namespace}:{name}") in condition["expression"]
        bound = {binding["spec"]["policyName"] for binding in of("ValidatingAdmissionPolicyBinding")}
        assert bound == {policy["metadata"]["name"] for policy in policies} and len(policies) == 2
        for kind in ("Role", "ClusterRole"):
            [binding], [role] = of(f"{kind}Binding"), of(kind)
            assert binding["subjects"] == [{"kind": "ServiceAccount", "name": name, "namespace": namespace}]
            assert (binding["roleRef"]["kind"], binding["roleRef"]["name"]) == (kind, role["metadata"]["name"])
            assert binding["metadata"].get("namespace") == role["metadata"].get("namespace")


def test_the_policy_compares_all_of_a_nodes_metadata_that_can_be_patched():
    for text in (rendered("default"), (MANIFESTS / "admission.yaml").read_text()):
        [policy] = [made for made in objects(text) if made["kind"] == "ValidatingAdmissionPolicy"
                    and made["spec"]["matchConstraints"]["resourceRules"][0]["resources"] == ["nodes"]]
        rules = " ".join(rule["expression"] for rule in policy["spec"]["validations"])
        for field in ("annotations", "finalizers", "ownerReferences"):
            assert f"object.metadata.{field} == oldObject.metadata.{field})" in rules, field


def test_the_program_of_rke2_is_where_its_own_link_leads():
    [daemonset] = [made for made in objects(rendered("rke2")) if made["kind"] == "DaemonSet"]
    paths = {volume["hostPath"]["path"] for volume in daemonset["spec"]["template"]["spec"]["volumes"]}
    # There is no data/current as k3s has it.
    assert "/var/lib/rancher/rke2/bin" in paths and "/var/lib/rancher/rke2/data" not in paths


def test_older_clusters_get_no_policy_that_would_refuse_everything():
    text = helm("template", "demo", CHART, "--kube-version", "1.31").stdout
    assert not [made for made in objects(text) if made["kind"].startswith("ValidatingAdmission")]


def test_pods_of_the_class_go_where_the_installer_is_done():
    for name, made in every_object():
        if made["kind"] == "RuntimeClass" and not name.startswith("by-hand"):
            assert made["scheduling"]["nodeSelector"]["runx.dev/ready"] == "true", name


def test_the_hooks_job_looks_at_the_daemonset_with_no_more_rights_than_that():
    made = [one for one in objects(rendered("all")) if is_hook(one) and one["kind"] != "Pod"]
    by_kind = {one["kind"]: one for one in made}
    assert set(by_kind) == {"ServiceAccount", "Role", "RoleBinding", "Job"} and len(made) == 4
    for one in made:
        assert one["metadata"]["annotations"]["helm.sh/hook"] == "post-upgrade,post-rollback"
    [daemonset] = [one for one in objects(rendered("all")) if one["kind"] == "DaemonSet"]
    name = daemonset["metadata"]["name"]
    assert by_kind["Role"]["rules"] == [
        {"apiGroups": ["apps"], "resources": ["daemonsets"], "resourceNames": [name], "verbs": ["get"]},
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]}]
    job = by_kind["Job"]["spec"]["template"]["spec"]
    assert job["serviceAccountName"] == by_kind["ServiceAccount"]["metadata"]["name"]
    assert by_kind["RoleBinding"]["subjects"][0]["name"] == job["serviceAccountName"]
    [container] = job["containers"]
    [installer] = daemonset["spec"]["template"]["spec"]["containers"]
    assert container["image"] == installer["image"] and container["args"] == ["wait"]
    environment = {variable["name"]: variable["value"] for variable in container["env"]}
    assert environment == {"RUNX_DAEMONSET": f"apps/{name}", "RUNX_TIMEOUT": "240"}
    security = container["securityContext"]
    assert security["runAsNonRoot"] is True and security["readOnlyRootFilesystem"] is True
    assert security["capabilities"] == {"drop": ["ALL"]} and "volumes" not in job
    # Where runx is taken away, that may wait for pods for as long as they like.
    for name in ("uninstall", "by-hand"):
        assert not [one for one in objects(rendered(name)) if one["kind"] == "Job"]


def test_the_network_policy_is_for_all_that_asks_the_api_and_for_nothing_else():
    made = objects(rendered("all"))
    [policy] = [one for one in made if one["kind"] == "NetworkPolicy"]
    selector = policy["spec"]["podSelector"]
    [expression] = selector["matchExpressions"]
    for one in made:
        pod = one if one["kind"] == "Pod" else one.get("spec", {}).get("template") if one["kind"] in ("DaemonSet", "Job") else None
        if pod:
            labels = pod["metadata"]["labels"]
            chosen = selector["matchLabels"].items() <= labels.items() and labels[expression["key"]] in expression["values"]
            assert chosen == (one["kind"] != "Pod"), one["metadata"]["name"]


def test_there_is_a_pod_for_each_kind_of_container():
    pods = {made["metadata"]["name"]: made for made in objects(rendered("all")) if made["kind"] == "Pod"}
    assert sorted(pods) == ["demo-test-agent", "demo-test-native", "demo-test-wasm"]
    for pod in pods.values():
        assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
        assert pod["spec"]["runtimeClassName"] == "runx"
    assert pods["demo-test-agent"]["metadata"]["annotations"]["runx.dev/agent"] == "true"


def test_dashboard_and_alerts_ask_for_metrics_that_there_are():
    served = set(re.findall(r'"(runx_[a-z_]+)"', (TOP / "deploy/src/status.rs").read_text()))
    served |= set(re.findall(r'"(runx_[a-z_]+)"', (TOP / "deploy/src/run.rs").read_text()))
    for name in ("starts", "pools"):
        served |= set(re.findall(r'"(runx_[a-z_]+)"', (TOP / f"deploy/src/{name}.rs").read_text()))
    served |= {f"runx_wasm_cache_{name}_total" for name in ("hits", "compiles", "failures", "rejected", "evicted")}
    texts = [(CHART / "dashboard.json").read_text(), (CHART / "templates/monitoring/prometheusrule.yaml").read_text()]
    asked = {name for text in texts for name in re.findall(r"\brunx_[a-z_]+", text)}
    assert asked and asked <= served, asked - served


def test_the_image_holds_all_that_its_sums_name():
    makefile = (TOP / "Makefile").read_text()
    named = {name for which in ("PROGRAMS", "INSTALLER") for name in re.search(rf"^{which} := (.*)$", makefile, re.M)[1].split()}
    copies = re.findall(r"^COPY (.*) (/\S*)$", (TOP / "deploy/Dockerfile").read_text(), re.M)
    places = {name: place for names, place in copies for name in names.split()}
    assert set(places) == named | {"SHA256SUMS"}
    assert {name for name, place in places.items() if place != "/programs/"} == {"runx-node"}


def test_flags_of_the_daemonset_are_flags_of_the_program():
    flags = re.findall(r'^    \("([a-z-]+)",', (TOP / "deploy/src/arguments.rs").read_text(), re.M)
    known = {"RUNX_" + flag.upper().replace("-", "_") for flag in flags}
    for name, made in every_object():
        if made["kind"] == "DaemonSet":
            [container] = made["spec"]["template"]["spec"]["containers"]
            assert {variable["name"] for variable in container["env"]} <= known, name
            assert container["args"] in (["run"], ["run", "--uninstall"]), name
