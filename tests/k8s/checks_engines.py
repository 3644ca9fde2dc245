"""The examples for engines that are plugged on top: that the API takes them with the engines' own definitions, without the engines.
Where nothing brings these, RUNX_K8S_CRDS names a directory that has them."""

import contextlib
import json

import tools
from session import Skipped, check


def served(s, words):
    """`kubectl wait` fails where there are no conditions yet."""
    found = json.loads(s.kubectl("get", *words, "-o", "json").stdout)
    conditions = [one.get("status", {}).get("conditions") or [] for one in found.get("items", [found])]
    return all(any(each["type"] == "Established" and each["status"] == "True" for each in one) for one in conditions)


@contextlib.contextmanager
def defined(s, group, module=None, only=("",)):
    """A group of kinds, while it is needed. `only` are words of the files' names that are taken."""
    try:
        files = [file for file in tools.definitions(group, module) if any(word in file.name for word in only)]
    except tools.Missing as e:
        raise Skipped(e) from e
    words = [word for file in files for word in ("-f", file)]
    # They are too large for what apply notes otherwise.
    s.kubectl("apply", "--server-side", *words)
    try:
        s.until(f"the kinds of {group} are served", lambda: served(s, words))
        yield
    finally:
        s.kubectl("delete", "--wait=true", "--timeout=60s", *words, check=False)


def taken(s, what, text):
    """That the API knows every field of an object, and not one more."""
    def apply(one):
        return s.kubectl("apply", "--dry-run=server", "--validate=strict", "-f", "-", input=one, check=False)
    done = apply(text)
    assert done.returncode == 0, f"{what}: {done.stderr}"
    refused = apply(text.replace("\nspec:\n", "\nspec:\n  nosuch: 1\n", 1))
    assert refused.returncode != 0 and 'unknown field "spec.nosuch"' in refused.stderr, (what, refused)


def newest(s, group, kind):
    """The version of a kind that is stored, which is the one to write."""
    found = json.loads(s.kubectl("get", "customresourcedefinitions", "-o", "json").stdout)["items"]
    [one] = [one for one in found if (one["spec"]["group"], one["spec"]["names"]["kind"]) == (group, kind)]
    return next(version["name"] for version in one["spec"]["versions"] if version["storage"])


@check
def agent_sandbox_knows_every_field_of_its_examples(s):
    group = "extensions.agents.x-k8s.io"
    with defined(s, group, "sigs.k8s.io/agent-sandbox@v0.5.6"):
        for name, kind in (("template", "SandboxTemplate"), ("warm-pool", "SandboxWarmPool"), ("claim", "SandboxClaim")):
            text = (tools.TOP / f"examples/agent-sandbox/{name}.yaml").read_text()
            assert f"apiVersion: {group}/{newest(s, group, kind)}\nkind: {kind}\n" in text, name
            taken(s, name, text)


@check
def opensandbox_knows_every_field_of_its_examples(s):
    group = "sandbox.opensandbox.io"
    with defined(s, group):
        s.kubectl("create", "namespace", "opensandbox")
        try:
            text = (tools.TOP / "examples/opensandbox/pool.yaml").read_text()
            assert f"apiVersion: {group}/{newest(s, group, 'Pool')}\nkind: Pool\n" in text
            taken(s, "pool", text)
            # The server adds what is no template.
            head = f"apiVersion: {group}/{newest(s, group, 'BatchSandbox')}\nkind: BatchSandbox\nmetadata: {{name: one}}\n"
            taken(s, "batchsandbox", head + (tools.TOP / "examples/opensandbox/batchsandbox.yaml").read_text())
        finally:
            s.kubectl("delete", "namespace", "opensandbox", "--timeout=60s", check=False)
