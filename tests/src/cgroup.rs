//! The kernel's side of a container's limits.

use std::fs;
use std::path::{Path, PathBuf};

use crate::bundle::Bundle;

const MOUNT: &str = "/sys/fs/cgroup";

/// Whether all controllers are in one tree.
pub fn unified() -> bool {
    Path::new(MOUNT).join("cgroup.controllers").exists()
}

/// Whether a controller can be used here; `cpu` and the like.
pub fn has(controller: &str) -> bool {
    if unified() {
        let all = fs::read_to_string(Path::new(MOUNT).join("cgroup.controllers")).unwrap_or_default();
        all.split_ascii_whitespace().any(|name| name == controller)
    } else {
        Path::new(MOUNT).join(controller).join("cgroup.procs").exists()
    }
}

/// A container's group below `/runx-tests`, which [`Group::choose`] puts it into.
#[derive(Debug)]
pub struct Group(String);

impl Group {
    /// Lets the bundle's container have a group that can be found by its name.
    pub fn choose(bundle: &mut Bundle) -> Self {
        let path = format!("/runx-tests/{}", bundle.id());
        bundle.config["linux"]["cgroupsPath"] = path.clone().into();
        Self(path)
    }

    /// The group in the slice of a scope.
    pub fn of_scope(slice: &str, scope: &str) -> Self {
        Self(format!("/{slice}/{scope}"))
    }

    /// Its directory; `controller` counts where there are several.
    pub fn directory(&self, controller: &str) -> PathBuf {
        let root = if unified() { PathBuf::from(MOUNT) } else { Path::new(MOUNT).join(controller) };
        root.join(&self.0[1..])
    }

    /// The text of a file.
    ///
    /// # Panics
    /// When it cannot be read.
    #[track_caller]
    pub fn read(&self, controller: &str, file: &str) -> String {
        let path = self.directory(controller).join(file);
        let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("read {}: {e}", path.display()));
        text.trim_end().to_owned()
    }

    /// The text of a file that has one name in each version.
    #[track_caller]
    pub fn read_either(&self, controller: &str, version_1: &str, version_2: &str) -> String {
        self.read(controller, if unified() { version_2 } else { version_1 })
    }
}
