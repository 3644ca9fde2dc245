//! What the programs for `make bench` share: rows of measurements that scripts/bench.py reads.

use std::time::{Duration, Instant};

use serde_json::json;

/// Parts of something that is timed, one after the other.
#[derive(Debug)]
pub struct Stopwatch {
    begun: Instant,
    parts: Vec<(&'static str, Duration)>,
}

impl Stopwatch {
    /// Begins.
    pub fn start() -> Self {
        Self { begun: Instant::now(), parts: Vec::new() }
    }

    /// A part has come to its end.
    pub fn lap(&mut self, name: &'static str) {
        let before: Duration = self.parts.iter().map(|(_, part)| *part).sum();
        self.parts.push((name, self.begun.elapsed() - before));
    }

    /// Prints a row for each part, and one for all of them together.
    pub fn report(&self, row: &Row<'_>, whole: &str) {
        for (name, part) in &self.parts {
            row.print(name, *part);
        }
        row.print(whole, self.parts.iter().map(|(_, part)| *part).sum());
    }
}

/// Where a measurement belongs.
#[derive(Clone, Copy, Debug)]
pub struct Row<'a> {
    /// A group of measurements.
    pub suite: &'a str,
    /// What they are made on.
    pub bundle: &'a str,
    /// `back to back` or `gaps`.
    pub mode: &'a str,
    /// Whose.
    pub runtime: &'a str,
}

impl Row<'_> {
    /// Prints a measurement.
    pub fn print(&self, operation: &str, time: Duration) {
        println!(
            "{}",
            json!({
                "suite": self.suite, "bundle": self.bundle, "mode": self.mode, "runtime": self.runtime,
                "operation": operation, "ms": time.as_secs_f64() * 1000.0
            })
        );
    }
}

/// The two numbers that a program for measurements is called with: how often, and the pause in the second mode.
///
/// # Panics
/// When they are missing.
pub fn arguments() -> (usize, Duration) {
    let mut numbers = std::env::args().skip(1).map(|text| text.parse::<u64>().expect("usage: PROGRAM ROUNDS GAP_MS"));
    let mut next = || numbers.next().expect("usage: PROGRAM ROUNDS GAP_MS");
    (next() as usize, Duration::from_millis(next()))
}

/// Both modes with their pauses.
pub fn modes(gap: Duration) -> [(&'static str, Duration); 2] {
    [("back to back", Duration::ZERO), ("gaps", gap)]
}

/// The memory of processes, shared pages in parts, in KiB.
pub fn pss(pids: &[i32]) -> u64 {
    let of = |pid: &i32| -> Option<u64> {
        let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
        text.lines().find_map(|line| line.strip_prefix("Pss:")?.split_ascii_whitespace().next()?.parse().ok())
    };
    pids.iter().filter_map(of).sum()
}
