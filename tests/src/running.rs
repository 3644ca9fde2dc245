//! Containers that run while a test looks at them.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use serde_json::json;

use crate::bundle::Bundle;
use crate::command::{Done, run_detached};
use crate::descriptors;

impl Bundle {
    /// A container that runs a shell script, in a cgroup of a known path.
    ///
    /// # Panics
    /// When it does not start.
    #[track_caller]
    pub fn running(script: &str) -> Self {
        let mut bundle = Self::script(script);
        bundle.set("/linux", "cgroupsPath", json!(format!("/runx-tests/{}", bundle.id())));
        bundle.begin();
        bundle
    }

    /// Creates and starts it.
    #[track_caller]
    pub fn begin(&self) {
        self.create().ok();
        self.runx(&["start", self.id()]).ok();
    }

    /// `runx` with arguments whose processes outlive it; their output goes where a created container's does.
    #[track_caller]
    pub fn runx_detached(&self, args: &[&str]) -> Done {
        run_detached(&mut self.command(args), &self.output())
    }

    /// The first of a container's control files that is there: of a version 1 controller, or of version 2.
    pub fn group_file(&self, controller: &str, v1: &str, v2: &str) -> PathBuf {
        let group = format!("runx-tests/{}", self.id());
        let root = PathBuf::from("/sys/fs/cgroup");
        let old = root.join(controller).join(&group).join(v1);
        if old.exists() { old } else { root.join(group).join(v2) }
    }

    /// What a control file says.
    ///
    /// # Panics
    /// When there is none.
    #[track_caller]
    pub fn limit(&self, controller: &str, v1: &str, v2: &str) -> String {
        let path = self.group_file(controller, v1, v2);
        fs::read_to_string(&path).unwrap_or_else(|e| panic!("read {}: {e}", path.display())).trim().to_owned()
    }
}

/// Receives a message and the descriptor that comes with it on a new connection.
///
/// # Panics
/// When none comes.
#[track_caller]
pub fn receive_descriptor(listener: &UnixListener) -> (String, OwnedFd) {
    let (text, fd) = descriptors::receive(&descriptors::accept(listener));
    (String::from_utf8_lossy(&text).into_owned(), fd)
}
