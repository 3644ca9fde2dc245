//! What runs on the node, as far as its disk tells: the state that shims and the command keep for each container.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::root::Root;
use crate::starts::{Numbers, numbers};

/// Below it shims have a directory for each of containerd's namespaces.
pub(crate) const SHIMS: &str = "/run/containerd/runx";

/// The state of containers that the command made.
const COMMAND: &str = "/run/runx";

/// The cache of compiled modules.
const CACHE: &str = "/var/lib/runx/wasm";

/// Kind and state of containers, and how many there are.
pub(crate) type Counts = BTreeMap<(&'static str, &'static str), u64>;

/// The kinds of containers.
pub(crate) const KINDS: [&str; 3] = ["sandbox", "native", "wasm"];

/// The states that are on the disk. Whether a process still runs is not.
pub(crate) const STATES: [&str; 2] = ["created", "started"];

/// What was counted.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Containers {
    /// All containers.
    pub(crate) counts: Counts,
    /// How many of them have an agent.
    pub(crate) agents: u64,
}

/// A container's kind by its configuration: a program in a module is recognized by its name here, since its content is in
/// a root filesystem that is not to be seen from here.
fn kind(annotations: Option<&Value>, config: &Value) -> &'static str {
    let annotation = |key: &str| annotations.and_then(|it| it.get(key)).and_then(Value::as_str);
    if annotation("io.kubernetes.cri.container-type") == Some("sandbox") {
        return "sandbox";
    }
    let program = config.pointer("/process/args/0").and_then(Value::as_str).unwrap_or_default();
    let module = [".wasm", ".wat", ".cwasm"].iter().any(|end| program.ends_with(end));
    if module || annotation("run.oci.handler") == Some("wasm") { "wasm" } else { "native" }
}

/// Whose agent a container has: its own, by its directory, or that of its pod, which the pod's first container gets.
fn agent(annotations: Option<&Value>, directory: &Path) -> Option<String> {
    let get = |key: &str| annotations.and_then(|it| it.get(key)).and_then(Value::as_str);
    if get("runx.dev/agent") != Some("true") || get("io.kubernetes.cri.container-type") == Some("sandbox") {
        return None;
    }
    let own = directory.to_string_lossy().into_owned();
    match (get("runx.dev/agent.containers"), get("io.kubernetes.cri.container-name")) {
        (Some(list), Some(name)) => list.split(',').any(|entry| entry.trim() == name).then_some(own),
        _ => Some(get("io.kubernetes.cri.sandbox-id").map_or(own, str::to_owned)),
    }
}

fn json(root: &Root, path: &Path) -> Option<Value> {
    serde_json::from_slice(&root.read(path).ok()??).ok()
}

/// The directories in one, but for those whose names begin with a dot.
pub(crate) fn directories(root: &Root, path: &Path) -> Vec<PathBuf> {
    let names = root.names(path).unwrap_or_default();
    let visible = names.into_iter().filter(|name| !name.to_string_lossy().starts_with('.'));
    visible.map(|name| path.join(name)).filter(|path| root.is_directory(path)).collect()
}

/// Counts the containers of a node. Those that go meanwhile are not counted.
pub(crate) fn count(root: &Root) -> Containers {
    let mut out = Containers::default();
    let mut agents = BTreeSet::new();
    let mut all = directories(root, Path::new(COMMAND));
    for namespace in directories(root, Path::new(SHIMS)) {
        all.extend(directories(root, &namespace));
    }
    for directory in all {
        let Some(state) = json(root, &directory.join("state.json")) else { continue };
        let annotations = state.get("annotations");
        let path = |key: &str| state.get(key).and_then(Value::as_str).map(PathBuf::from);
        let config = path("config").or_else(|| path("bundle").map(|bundle| bundle.join("config.json")));
        let config = config.and_then(|path| json(root, &path)).unwrap_or_default();
        let of = if root.exists(&directory.join("start")) { "created" } else { "started" };
        *out.counts.entry((kind(annotations, &config), of)).or_default() += 1;
        agents.extend(agent(annotations, &directory));
    }
    out.agents = agents.len() as u64;
    out
}

/// The cache of modules: what its counters count, and what is in it.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Cache {
    /// Names and numbers, as the shims and the command write them.
    pub(crate) counters: Numbers,
    /// How many artifacts there are.
    pub(crate) artifacts: u64,
    /// How large they are, in bytes.
    pub(crate) bytes: u64,
}

/// Looks at the cache.
pub(crate) fn cache(root: &Root) -> Cache {
    let cache = Path::new(CACHE);
    let mut out = Cache { counters: numbers(root, &cache.join("counters")), ..Cache::default() };
    for directory in directories(root, cache) {
        for name in root.names(&directory).unwrap_or_default() {
            if name.to_string_lossy().ends_with(".cwasm") {
                out.artifacts += 1;
                out.bytes += root.metadata(&directory.join(name)).ok().flatten().map_or(0, |found| found.len());
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containers_are_counted_by_kind_and_state() {
        let node = tempfile::tempdir().unwrap();
        let put = |path: &str, text: &str| {
            let path = node.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        let cri = r#""io.kubernetes.cri.container-type""#;
        put(
            "run/containerd/runx/k8s.io/pod/state.json",
            &format!(r#"{{"annotations": {{{cri}: "sandbox"}}, "bundle": "/b/pod"}}"#),
        );
        let agent =
            r#""runx.dev/agent": "true", "runx.dev/agent.containers": "a, b", "io.kubernetes.cri.container-name": "b""#;
        put(
            "run/containerd/runx/k8s.io/one/state.json",
            &format!(r#"{{"annotations": {{{agent}}}, "bundle": "/b/one"}}"#),
        );
        put("run/containerd/runx/k8s.io/one/start", "");
        let first = r#""runx.dev/agent": "true", "io.kubernetes.cri.sandbox-id": "p""#;
        for name in ["three", "four"] {
            put(
                &format!("run/containerd/runx/k8s.io/{name}/state.json"),
                &format!(r#"{{"annotations": {{{first}}}}}"#),
            );
        }
        put("b/one/config.json", r#"{"process": {"args": ["/bin/sh"]}}"#);
        put("run/runx/two/state.json", r#"{"bundle": "/b/two", "annotations": {}}"#);
        put("b/two/config.json", r#"{"process": {"args": ["/app.wasm", "x"]}}"#);
        put("run/runx/.cache/state.json", "{}");
        put("run/runx/half/other", "");
        let root = Root::open(node.path()).unwrap();
        let found = count(&root);
        let expected = [
            (("sandbox", "started"), 1),
            (("native", "created"), 1),
            (("native", "started"), 2),
            (("wasm", "started"), 1),
        ];
        assert_eq!(found, Containers { counts: expected.into(), agents: 2 });
        put("var/lib/runx/wasm/counters", "hits 3\ncompiles 2\nwrong\n");
        put("var/lib/runx/wasm/abc/x.cwasm", "1234");
        put("var/lib/runx/wasm/abc/x.lock", "");
        let found = cache(&root);
        assert_eq!((found.counters["hits"], found.counters.len(), found.artifacts, found.bytes), (3, 2, 1, 4));
    }
}
