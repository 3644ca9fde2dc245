//! Which containers share a daemon.

use std::collections::HashMap;
use std::path::Path;

use anyhow::Result;
use runx_core::container::{Container, Runtime};

/// The annotations that group containers into one daemon, the same as runc's shim has.
const GROUPS: [&str; 2] = ["io.containerd.runc.v2.group", "io.kubernetes.cri.sandbox-id"];

fn group(annotations: &HashMap<String, String>) -> Option<&String> {
    GROUPS.iter().find_map(|key| annotations.get(*key)).filter(|group| !group.is_empty())
}

/// The group of a bundle's container, if it is in one.
///
/// # Errors
/// When config.json cannot be read.
pub(crate) fn group_of(bundle: &Path) -> Result<Option<String>> {
    #[derive(serde::Deserialize)]
    struct Annotated {
        #[serde(default)]
        annotations: Option<HashMap<String, String>>,
    }
    let spec: Annotated = runx_core::bundle::parse_file(&bundle.join("config.json"))?;
    Ok(group(&spec.annotations.unwrap_or_default()).cloned())
}

/// Whether CRI says of a container that it is its pod's own.
pub(crate) fn is_sandbox(annotations: &HashMap<String, String>) -> bool {
    annotations.get("io.kubernetes.cri.container-type").is_some_and(|kind| kind == "sandbox")
}

/// All containers of a group that there are.
///
/// # Errors
/// When the directory of states cannot be read.
pub(crate) fn members(runtime: &Runtime, name: &str) -> Result<Vec<Container>> {
    let mut containers = runtime.list()?;
    containers.retain(|container| group(&container.state().annotations).is_some_and(|group| group == name));
    Ok(containers)
}
