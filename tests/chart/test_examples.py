"""The examples: that Kubernetes, agent-sandbox and OpenSandbox know every object, field and value in them."""

import pathlib
import re
import tomllib

import kubernetes_validate
import pytest
import yaml

TOP = pathlib.Path(__file__).resolve().parent.parent.parent
EXAMPLES = TOP / "examples"
KUBERNETES = "1.36"


class Pod:
    """The specification of a pod, which Kubernetes' own schema is for."""


class PodTemplate:
    """Metadata and such a specification, as a Pod has them."""


NAMED = {"name": (str,)}
POLICIES = ("Disallowed", "Allowed", "Overrides")

# What the schemas of these kinds know: fields with their types or values; a tuple of fields is what has to be there.
# Of agent-sandbox: k8s/crds/, version v1beta1.
KINDS = {
    ("extensions.agents.x-k8s.io/v1beta1", "SandboxTemplate"): ({
        "podTemplate": PodTemplate, "service": (bool,), "envVarsInjectionPolicy": POLICIES, "volumeClaimTemplatesPolicy": POLICIES,
        "networkPolicyManagement": ("Managed", "Unmanaged"),
    }, ("podTemplate",)),
    ("extensions.agents.x-k8s.io/v1beta1", "SandboxWarmPool"): ({
        "replicas": (int,), "sandboxTemplateRef": (NAMED, ("name",)),
        "updateStrategy": ({"type": ("Recreate", "OnReplenish")}, ()),
    }, ("sandboxTemplateRef",)),
    ("extensions.agents.x-k8s.io/v1beta1", "SandboxClaim"): ({
        "warmPoolRef": (NAMED, ("name",)),
        "lifecycle": ({"shutdownPolicy": ("Delete", "DeleteForeground", "Retain"), "shutdownTime": (str,),
                       "ttlSecondsAfterFinished": (int,)}, ()),
    }, ("warmPoolRef",)),
    # Of OpenSandbox: kubernetes/config/crd/bases/.
    ("sandbox.opensandbox.io/v1alpha1", "Pool"): ({
        "template": PodTemplate,
        "capacitySpec": ({name: (int,) for name in ("bufferMin", "bufferMax", "poolMin", "poolMax")},
                         ("bufferMin", "bufferMax", "poolMin", "poolMax")),
        # Not recycleStrategy: the definitions in its chart are older and refuse it.
    }, ("capacitySpec",)),
}

# What OpenSandbox's server reads (server/opensandbox_server/config.py), as far as the examples have it.
SERVER = ({
    "server": ({"host": (str,), "port": (int,), "max_sandbox_timeout_seconds": (int,)}, ()),
    "runtime": ({"type": ("docker", "kubernetes"), "execd_image": (str,)}, ("type", "execd_image")),
    "kubernetes": ({
        "namespace": (str,), "workload_provider": ("batchsandbox", "agent-sandbox"), "batchsandbox_template_file": (str,),
        "image_pull_policy": ("Always", "IfNotPresent", "Never"), "sandbox_create_timeout_seconds": (int,),
        "sandbox_create_poll_interval_seconds": (float,),
    }, ()),
    "docker": ({"network_mode": (str,), "publish_host": (str,), "no_new_privileges": (bool,), "pids_limit": (int,)}, ()),
    "secure_runtime": ({"type": ("gvisor", "kata", "firecracker"), "docker_runtime": (str,), "k8s_runtime_class": (str,)}, ("type",)),
}, ("runtime",))


def pod(metadata, spec):
    made = {"apiVersion": "v1", "kind": "Pod", "metadata": dict({"name": "example"}, **metadata), "spec": spec}
    kubernetes_validate.validate(made, KUBERNETES, strict=True)
    return made


def check(where, value, known):
    """Fails with the place of whatever is not known. Gives the pods in it."""
    if known is PodTemplate:
        assert set(value) <= {"metadata", "spec"}, where
        return [pod(value.get("metadata", {}), value["spec"])]
    if not isinstance(known[0], dict):
        assert value in known if isinstance(known[0], str) else type(value) in known, f"{where}: {value!r}"
        return []
    fields, required = known
    assert set(value) <= set(fields), f"{where}: {sorted(set(value) - set(fields))}"
    assert set(required) <= set(value), f"{where}: {sorted(set(required) - set(value))}"
    return [made for name, inner in value.items() for made in check(f"{where}.{name}", inner, fields[name])]


def documents():
    for path in sorted(EXAMPLES.glob("*/*.yaml")):
        for made in yaml.safe_load_all(path.read_text()):
            yield path, made


def objects():
    return [(path, made) for path, made in documents() if "kind" in made]


def pods():
    for path, made in objects():
        name = f"{path.relative_to(EXAMPLES)}: {made['kind']} {made['metadata']['name']}"
        if made["apiVersion"] == "v1":
            assert made["kind"] == "Pod", name
            yield name, pod(made["metadata"], made["spec"])
        else:
            assert set(made) == {"apiVersion", "kind", "metadata", "spec"}, name
            for inner in check(name, made["spec"], KINDS[made["apiVersion"], made["kind"]]):
                yield name, inner


def test_every_field_is_known_and_every_pod_is_of_the_class():
    found = list(pods())
    assert len(found) >= 6
    for name, made in found:
        assert made["spec"]["runtimeClassName"] == "runx", name
        for container in [*made["spec"].get("initContainers", ()), *made["spec"]["containers"]]:
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}, name
            assert container["resources"]["limits"]["memory"], name


@pytest.mark.parametrize("wrong", [
    ("SandboxWarmPool", {"replica": 1, "sandboxTemplateRef": {"name": "x"}}, "replica"),
    ("SandboxWarmPool", {"replicas": "1", "sandboxTemplateRef": {"name": "x"}}, "replicas"),
    ("SandboxWarmPool", {"replicas": 1}, "sandboxTemplateRef"),
    ("SandboxClaim", {"warmPoolRef": {"name": "x"}, "lifecycle": {"shutdownPolicy": "Remove"}}, "shutdownPolicy"),
])
def test_what_is_not_known_is_found(wrong):
    kind, spec, word = wrong
    known = next(known for (_, name), known in KINDS.items() if name == kind)
    with pytest.raises(AssertionError, match=word):
        check(kind, spec, known)


def test_kinds_of_pods_are_what_they_are_called():
    by_name = {made["metadata"]["name"]: made for path, made in objects() if path.parent.name == "pods"}
    assert set(by_name) == {"native", "wasm", "mixed", "agent"}
    assert [container["name"] for container in by_name["mixed"]["spec"]["containers"]] == ["native", "wasm"]
    annotations = re.compile(r"runx\.dev/[a-z.-]+")
    known = set(annotations.findall((TOP / "README.md").read_text()))
    for path, made in documents():
        assert set(annotations.findall(path.read_text())) <= known, path
    assert by_name["agent"]["metadata"]["annotations"]["runx.dev/agent"] == "true"


def test_names_of_one_example_are_those_that_others_have():
    made = {(one["kind"], one["metadata"]["name"]): one for _, one in objects()}
    assert ("SandboxTemplate", made["SandboxWarmPool", "workspace"]["spec"]["sandboxTemplateRef"]["name"]) in made
    assert ("SandboxWarmPool", made["SandboxClaim", "task-1"]["spec"]["warmPoolRef"]["name"]) in made
    for _, pod in pods():
        token = pod["metadata"].get("annotations", {}).get("runx.dev/agent.token-file")
        if token:
            [container] = pod["spec"]["containers"]
            mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
            assert str(pathlib.Path(token).parent) in mounts
            ports = {port["name"]: port["containerPort"] for port in container["ports"]}
            assert ports == {"execd": 44772, "envd": 49983}


def test_opensandboxs_server_knows_every_key_and_takes_only_the_classs_name():
    for name, key in (("server.toml", "k8s_runtime_class"), ("server-docker.toml", "docker_runtime")):
        config = tomllib.loads((EXAMPLES / "opensandbox" / name).read_text())
        assert check(name, config, SERVER) == []
        assert config["secure_runtime"] == {"type": "gvisor", key: "runx"}
        assert (config["runtime"]["type"] == "kubernetes") == ("kubernetes" in config)


def test_opensandboxs_template_is_a_part_of_a_pod():
    path = EXAMPLES / "opensandbox/batchsandbox.yaml"
    template = yaml.safe_load(path.read_text())
    assert set(template) == {"spec"} and set(template["spec"]) == {"template"}
    [container] = template["spec"]["template"]["spec"]["containers"]
    # The server makes the container, and takes of this one nothing else that is in it.
    assert set(container) == {"name", "securityContext"}
    pod({}, dict(template["spec"]["template"]["spec"], containers=[dict(container, image="workspace:1")]))


def test_opensandboxs_server_finds_its_template_and_key_where_its_chart_puts_them():
    """The chart gives it nothing else than configToml, and asks for its health at port 80. Without a key it does not start."""
    config = tomllib.loads((EXAMPLES / "opensandbox/server.toml").read_text())
    server = yaml.safe_load((EXAMPLES / "opensandbox/server-values.yaml").read_text())["server"]
    assert config["server"]["port"] == 80
    [mount] = server["volumeMounts"]
    assert mount["mountPath"] == config["kubernetes"]["batchsandbox_template_file"]
    [volume] = server["volumes"]
    [variable] = server["env"]
    secret = variable["valueFrom"]["secretKeyRef"]
    assert volume["name"] == mount["name"] and variable["name"] == "OPENSANDBOX_SERVER_API_KEY"
    readme = (EXAMPLES / "README.md").read_text()
    assert f"create configmap {volume['configMap']['name']} --from-file=$RUNX/examples/opensandbox/{mount['subPath']}" in readme
    assert f"create secret generic {secret['name']} --from-literal={secret['key']}=" in readme


def test_a_pod_of_opensandboxs_pool_runs_what_its_controller_starts_tasks_with():
    [made] = [one for _, one in objects() if one["kind"] == "Pool"]
    spec = made["spec"]["template"]["spec"]
    [main] = spec["containers"]
    assert main["command"][0] == "/opt/opensandbox/task-executor"
    [probe] = [port for port in main["ports"] if port["name"] == main["readinessProbe"]["httpGet"]["port"]]
    assert probe["containerPort"] == 5758
    put = {path for container in spec["initContainers"] for path in container["command"][1:-1]}
    assert put == {"/workspace/server", "./execd", "./bootstrap.sh"}
    for container in (main, *spec["initContainers"]):
        assert {"name": "opensandbox-bin", "mountPath": "/opt/opensandbox"} in container["volumeMounts"], container["name"]


def test_images_are_the_users_own_and_the_readme_names_each_file_and_image():
    readme = (EXAMPLES / "README.md").read_text()
    for path in EXAMPLES.glob("*/*"):
        assert str(path.relative_to(EXAMPLES)) in readme, path
    texts = [path.read_text() for path in EXAMPLES.glob("*/*")]
    images = {image for text in texts for image in re.findall(r'(?:execd_)?image(?:: | = ")([^\s"]+)', text)}
    for image in images:
        assert "/" not in image and f"`{image}`" in readme, image
