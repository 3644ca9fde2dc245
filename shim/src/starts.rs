//! How long starts take, counted for the node's metrics: in one file for each of containerd's namespaces, beside the states of
//! its containers. `deploy/src/starts.rs` reads it.
//!
//! What is counted is what the shim takes for a container's creation and its start together, and not what containerd or the
//! kubelet does between the two. Nobody waits for the counting.

use std::path::PathBuf;
use std::time::Duration;

use runx_core::container::{Container, Process};
use runx_core::counters;

use crate::pod;

/// The file's name in the directory of states: no container's can begin so.
const FILE: &str = ".starts";

/// The upper bounds of the histogram, in microseconds; there is one more, for all that takes longer.
const BOUNDS: [u64; 12] =
    [1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000, 2_500_000, 10_000_000];

/// What was started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A pod's own container.
    Sandbox,
    /// A container with a native program.
    Native,
    /// A container with a WASM module or component.
    Wasm,
    /// The agent beside a container's program.
    Agent,
}

impl Kind {
    const ALL: [Self; 4] = [Self::Sandbox, Self::Native, Self::Wasm, Self::Agent];

    /// Of a container and its first process.
    pub(crate) fn of(container: &Container, process: &Process) -> Self {
        if pod::is_sandbox(&container.state().annotations) {
            Self::Sandbox
        } else if process.is_module() {
            Self::Wasm
        } else {
            Self::Native
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Sandbox => "sandbox",
            Self::Native => "native",
            Self::Wasm => "wasm",
            Self::Agent => "agent",
        }
    }
}

/// What has come of an attempt.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Outcome {
    /// It runs, and took this long.
    Started(Kind, Duration),
    /// It could not be made or started.
    Failed,
}

/// What one attempt adds to each line.
fn numbers(outcome: Outcome) -> Vec<(String, u64)> {
    let mut out = vec![("failed".to_owned(), u64::from(matches!(outcome, Outcome::Failed)))];
    for kind in Kind::ALL {
        let took = match outcome {
            Outcome::Started(started, took) if started == kind => Some(took.as_micros() as u64),
            _ => None,
        };
        let bucket = took.map(|took| BOUNDS.partition_point(|bound| *bound < took));
        let mut line = |what: String, number: u64| out.push((format!("{}.{what}", kind.name()), number));
        for (at, bound) in BOUNDS.iter().enumerate() {
            line(bound.to_string(), u64::from(bucket == Some(at)));
        }
        line("more".into(), u64::from(bucket == Some(BOUNDS.len())));
        line("microseconds".into(), took.unwrap_or_default());
    }
    out
}

/// Adds an attempt to the file in a directory of states. That it could not be counted stops nothing; where a state is kept
/// elsewhere there may be no directory, and nothing is counted.
pub(crate) fn count(states: PathBuf, outcome: Outcome) {
    tokio::task::spawn_blocking(move || {
        let path = states.join(FILE);
        let numbers = numbers(outcome);
        let numbers: Vec<(&str, u64)> = numbers.iter().map(|(name, number)| (name.as_str(), *number)).collect();
        if let Err(e) = counters::add(&path, &numbers, counters::LONG) {
            log::debug!("count a start in {}: {e}", path.display());
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_attempt_is_in_one_bucket_of_its_kind_and_all_fit_in_a_page() {
        for (micros, bucket) in
            [(0, "1000"), (1_000, "1000"), (1_001, "2500"), (10_000_000, "10000000"), (10_000_001, "more")]
        {
            let numbers = numbers(Outcome::Started(Kind::Wasm, Duration::from_micros(micros)));
            let set: Vec<_> = numbers.iter().filter(|(_, number)| *number != 0).cloned().collect();
            let mut expected = vec![(format!("wasm.{bucket}"), 1)];
            if micros != 0 {
                expected.push(("wasm.microseconds".into(), micros));
            }
            assert_eq!(set, expected);
            let bytes: usize = numbers.iter().map(|(name, _)| name.len() + " 18446744073709551615\n".len()).sum();
            assert!(bytes as u64 <= counters::LIMIT, "{bytes}");
        }
        let failed = numbers(Outcome::Failed);
        assert_eq!(failed.iter().filter(|(_, number)| *number != 0).collect::<Vec<_>>(), [&("failed".to_owned(), 1)]);
    }
}
