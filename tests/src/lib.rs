//! What the tests share: bundles, commands with time limits, a private containerd, and checks that
//! nothing is left behind.
//!
//! The programs under test are those in the directory that `RUNX_DIST` names. A test that cannot run
//! here says so and why; it counts as passed for the harness, so the reason is printed in capitals. In the
//! virtual machine of `scripts/vm` it fails instead.

pub mod attack;
pub mod bench;
pub mod bundle;
pub mod cgroup;
pub mod command;
pub mod container;
pub mod containerd;
pub mod coverage;
pub mod cri;
pub mod descriptors;
pub mod image;
pub mod leftovers;
pub mod machine;
pub mod network;
pub mod podman;
pub mod random;
pub mod registry;
pub mod running;
pub mod shim;
pub mod storage;
pub mod user;
pub mod wasm;

use std::io::Write;
use std::path::{Path, PathBuf};

/// The directory of the programs under test.
///
/// # Panics
/// When `RUNX_DIST` is not set: a test run against nothing must not pass.
pub fn dist() -> PathBuf {
    std::env::var_os("RUNX_DIST").map(PathBuf::from).expect("RUNX_DIST names the directory of the built programs")
}

/// Whether this is the virtual machine that `scripts/vm` makes, which has all that a test may ask for but cgroup v1.
pub fn in_machine() -> bool {
    std::env::var_os("RUNX_TEST_VM").is_some_and(|value| value == "1")
}

/// Whether the processor is emulated: everything takes 5 to 20 times as long.
pub fn slow() -> bool {
    std::env::var_os("RUNX_TESTS_SLOW").is_some_and(|value| value == "1")
}

/// How often to do what is done `times` times to find races.
pub fn repeats(times: usize) -> usize {
    if slow() { times.div_ceil(4) } else { times }
}

/// How often to do something of which `make soak` does more: `RUNX_ROUNDS`, or a sample.
pub fn rounds(sample: usize) -> usize {
    let asked = std::env::var("RUNX_ROUNDS").ok().and_then(|rounds| rounds.parse().ok());
    asked.unwrap_or_else(|| repeats(sample))
}

/// Says that a test does not run and why. Past the harness, which hides what passed tests print.
pub fn skip(why: &str) {
    let thread = std::thread::current();
    // In one write, so that lines of tests beside it do not mix.
    let line = format!("SKIPPED {}: {why}\n", thread.name().unwrap_or("a test"));
    let _ = std::io::stderr().write_all(line.as_bytes());
}

/// As [`skip`], where a reason is acceptable: the virtual machine is there to have none.
///
/// # Panics
/// In the virtual machine.
#[track_caller]
pub fn skip_outside_machine(why: &str) {
    assert!(!in_machine(), "the virtual machine is to run every test, but {why}");
    skip(why);
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

/// Whether there is one tree of cgroups for all controllers.
pub fn has_cgroup_v2() -> bool {
    nix::sys::statfs::statfs("/sys/fs/cgroup")
        .is_ok_and(|found| found.filesystem_type() == nix::sys::statfs::CGROUP2_SUPER_MAGIC)
}

/// Whether systemd is the init, as sd_booted(3) finds out.
pub fn has_systemd() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

/// Whether the kernel enforces AppArmor profiles and there is a program to load them.
pub fn has_apparmor() -> bool {
    std::fs::read_to_string("/sys/module/apparmor/parameters/enabled").is_ok_and(|text| text.trim() == "Y")
        && ["/sbin/apparmor_parser", "/usr/sbin/apparmor_parser"].iter().any(|path| Path::new(path).exists())
}

/// Returns from the test, aloud, if there is an obstacle.
#[macro_export]
macro_rules! needs_root {
    () => {
        if let Some(why) = $crate::obstacle() {
            $crate::skip_outside_machine(&why);
            return;
        }
    };
}

/// Returns from the test, aloud, unless there are containers, and cgroup v2 for them.
#[macro_export]
macro_rules! needs_cgroup_v2 {
    () => {
        $crate::needs_root!();
        if !$crate::has_cgroup_v2() {
            $crate::skip_outside_machine("it needs cgroup v2 alone at /sys/fs/cgroup");
            return;
        }
    };
}

/// Returns from the test, aloud, unless there are containers, and cgroup v1 for them.
#[macro_export]
macro_rules! needs_cgroup_v1 {
    () => {
        $crate::needs_root!();
        if $crate::has_cgroup_v2() {
            $crate::skip("it needs cgroup v1");
            return;
        }
    };
}

/// Returns from the test, aloud, unless there are containers, cgroup v2, and systemd as the init.
#[macro_export]
macro_rules! needs_systemd {
    () => {
        $crate::needs_cgroup_v2!();
        if !$crate::has_systemd() {
            $crate::skip_outside_machine("it needs systemd as the init");
            return;
        }
    };
}

/// Returns from the test, aloud, unless there are containers, and AppArmor for them.
#[macro_export]
macro_rules! needs_apparmor {
    () => {
        $crate::needs_root!();
        if !$crate::has_apparmor() {
            $crate::skip_outside_machine("it needs AppArmor in the kernel, and apparmor_parser");
            return;
        }
    };
}
