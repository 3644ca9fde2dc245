//! What the tests share: pools whose spawner is the probe, and the probe in a sandbox.

#![allow(dead_code, reason = "each suite uses a part")]

use std::fs::File;
use std::os::fd::OwnedFd;
use std::time::Duration;

use runx_pool::{Command, Lease, Limits, Outcome, Output, Pool, Settings, Template};

/// The program of `probe/`.
pub(crate) const PROBE: &str = env!("CARGO_BIN_EXE_pool-probe");

/// Returns from the test, aloud, if it cannot run here.
#[macro_export]
macro_rules! needs_root {
    () => {
        if !common::is_root() {
            eprintln!("SKIPPED {}: it needs root", module_path!());
            return;
        }
    };
}

pub(crate) fn is_root() -> bool {
    // SAFETY: it takes nothing and cannot fail.
    unsafe { libc::geteuid() == 0 }
}

pub(crate) fn settings(size: usize, burst: usize) -> Settings {
    Settings { size, burst, spawner: Some(PROBE.into()), timeout: Duration::from_secs(60), ..Settings::default() }
}

pub(crate) fn pool(template: Template, size: usize) -> Pool {
    Pool::new(template, settings(size, 0)).expect("start a pool")
}

pub(crate) fn program() -> OwnedFd {
    File::open(PROBE).expect("open the probe").into()
}

/// The probe with some words; what it prints is captured.
pub(crate) fn probe(words: &[&str]) -> Command {
    let command = Command::new("probe").program(program()).args(words.iter().copied());
    command.stdout(Output::Capture(1 << 20)).stderr(Output::Capture(1 << 20))
}

/// Limits that end whatever hangs.
pub(crate) fn patient() -> Limits {
    Limits { wall: Some(Duration::from_secs(60)), ..Limits::default() }
}

pub(crate) fn run(lease: &mut Lease, words: &[&str]) -> Outcome {
    lease.run(probe(words).limits(patient())).expect("run the probe")
}

pub(crate) fn text(outcome: &Outcome) -> String {
    String::from_utf8_lossy(&outcome.stdout).into_owned()
}

/// That a pool still does what it is for.
#[track_caller]
pub(crate) fn assert_healthy(pool: &Pool) {
    let mut lease = pool.acquire().expect("lend another sandbox");
    let outcome = lease.run(Command::new("/bin/echo").arg("well").stdout(Output::Capture(100))).expect("run a program");
    assert_eq!((outcome.code(), text(&outcome).as_str()), (0, "well\n"), "{outcome:?}");
}
