//! How often the cache had what was asked for, on this node since it was made. Every shim and command adds to one small
//! file, which is what a node's metrics are read from.

use std::fmt::Write as _;
use std::io;
use std::path::Path;

use crate::counters;

/// The file's name in the cache.
const FILE: &str = "counters";

/// What is counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Artifacts that were there.
    pub hits: u64,
    /// Modules that were compiled.
    pub compiles: u64,
    /// Modules that could not be compiled.
    pub failures: u64,
    /// How long compiling took in all, in microseconds.
    pub microseconds: u64,
    /// Artifacts that were not what was compiled, and were made again.
    pub rejected: u64,
    /// Artifacts that went to make room.
    pub evicted: u64,
}

impl Counters {
    const NAMES: [&'static str; 6] = ["hits", "compiles", "failures", "microseconds", "rejected", "evicted"];

    fn numbers(&self) -> [u64; 6] {
        [self.hits, self.compiles, self.failures, self.microseconds, self.rejected, self.evicted]
    }

    /// What has been counted in the cache at `directory`.
    ///
    /// # Errors
    /// Those of reading. A cache that is not there has counted nothing.
    pub fn read(directory: &Path) -> io::Result<Self> {
        let numbers = counters::read(&directory.join(FILE), &Self::NAMES)?;
        let [hits, compiles, failures, microseconds, rejected, evicted] = numbers.try_into().unwrap_or_default();
        Ok(Self { hits, compiles, failures, microseconds, rejected, evicted })
    }

    /// Adds to what has been counted. That nobody could count it stops nothing.
    pub(super) fn add(self, directory: &Path) {
        let numbers: Vec<_> = Self::NAMES.into_iter().zip(self.numbers()).collect();
        if let Err(e) = counters::add(&directory.join(FILE), &numbers, counters::SHORT) {
            log::debug!("count in {}: {e}", directory.join(FILE).display());
        }
    }

    /// In Prometheus' text form.
    pub fn prometheus(&self) -> String {
        let mut out = String::new();
        let mut line = |name: &str, help: &str, value: &dyn std::fmt::Display| {
            // As above.
            let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} counter\n{name} {value}");
        };
        line("runx_wasm_cache_hits_total", "Compiled modules that were in the cache.", &self.hits);
        line("runx_wasm_compiles_total", "Modules that were compiled.", &self.compiles);
        line("runx_wasm_compile_failures_total", "Modules that could not be compiled.", &self.failures);
        let seconds = self.microseconds as f64 / 1e6;
        line("runx_wasm_compile_seconds_total", "Time that compiling took.", &seconds);
        line("runx_wasm_cache_rejected_total", "Compiled modules that were not what was compiled.", &self.rejected);
        line("runx_wasm_cache_evicted_total", "Compiled modules that were removed to make room.", &self.evicted);
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_counted_is_read_and_told() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(Counters::read(directory.path()).unwrap(), Counters::default());
        let all = Counters { hits: 1, compiles: 2, failures: 3, microseconds: 4, rejected: 5, evicted: 6 };
        all.add(directory.path());
        all.add(directory.path());
        let read = Counters::read(directory.path()).unwrap();
        let twice = Counters { hits: 2, compiles: 4, failures: 6, microseconds: 8, rejected: 10, evicted: 12 };
        assert_eq!(read, twice);
        assert!(read.prometheus().contains("\nrunx_wasm_cache_hits_total 2\n"), "{}", read.prometheus());
    }
}
