//! What the tests share: bundles, commands with time limits, a private containerd, and checks that
//! nothing is left behind.
//!
//! The programs under test are those in the directory that `RUNX_DIST` names. A test that cannot run
//! here says so and why; it counts as passed for the harness, so the reason is printed in capitals.

pub mod bundle;
pub mod command;
pub mod containerd;
pub mod descriptors;
pub mod image;
pub mod leftovers;
pub mod wasm;

use std::path::PathBuf;

/// The directory of the programs under test.
///
/// # Panics
/// When `RUNX_DIST` is not set: a test run against nothing must not pass.
pub fn dist() -> PathBuf {
    std::env::var_os("RUNX_DIST").map(PathBuf::from).expect("RUNX_DIST names the directory of the built programs")
}

/// Why tests with containers cannot run here, if they cannot.
pub fn obstacle() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("it needs root".into());
    }
    if !PathBuf::from("/bin/busybox").exists() {
        return Some("it needs /bin/busybox (package busybox-static)".into());
    }
    None
}

/// Returns from the test, aloud, if there is an obstacle.
#[macro_export]
macro_rules! needs_root {
    () => {
        if let Some(why) = $crate::obstacle() {
            eprintln!("SKIPPED {}: {why}", module_path!());
            return;
        }
    };
}
