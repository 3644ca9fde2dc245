//! Numbers of the server, beside those of its pool.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{Mutex, PoisonError};

use crate::model::Outcome;

/// What has come of commands.
#[derive(Debug, Default)]
pub(crate) struct Counters(Mutex<BTreeMap<&'static str, (u64, u64)>>);

impl Counters {
    /// Enters results.
    pub(crate) fn executed(&self, outcomes: &[Outcome]) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for outcome in outcomes {
            let (count, time) = all.entry(outcome.status).or_default();
            *count += 1;
            *time += outcome.time;
        }
    }

    /// In Prometheus' text format: of commands, of files and their bytes, of what runs, and of how many more may wait.
    pub(crate) fn prometheus(&self, (files, bytes): (usize, u64), running: usize, free: usize) -> String {
        let mut out = String::new();
        let mut head = |name: &str, kind: &str, help: &str| {
            let _ = writeln!(out, "# HELP runx_judge_{name} {help}\n# TYPE runx_judge_{name} {kind}");
            std::mem::take(&mut out)
        };
        let mut text = head("commands_total", "counter", "Commands by verdict.");
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (status, (count, _)) in all.iter() {
            let _ = writeln!(text, "runx_judge_commands_total{{status=\"{status}\"}} {count}");
        }
        text += &head("cpu_seconds_total", "counter", "Processor time of commands by verdict.");
        for (status, (_, time)) in all.iter() {
            let seconds = *time as f64 / 1e9;
            let _ = writeln!(text, "runx_judge_cpu_seconds_total{{status=\"{status}\"}} {seconds:.6}");
        }
        for (name, help, value) in [
            ("files", "Files that are kept.", files as u64),
            ("file_bytes", "Bytes of files that are kept.", bytes),
            ("running", "Commands that run.", running as u64),
            ("queue_free", "Requests that may still wait.", free as u64),
        ] {
            text += &head(name, "gauge", help);
            let _ = writeln!(text, "runx_judge_{name} {value}");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use runx_pool::Status;

    use super::*;

    #[test]
    fn every_sample_has_a_name_and_a_number() {
        let counters = Counters::default();
        counters.executed(&[Outcome::failed(Status::InternalError, "", Vec::new())]);
        let text = counters.prometheus((2, 30), 1, 9);
        assert!(text.contains("runx_judge_commands_total{status=\"Internal Error\"} 1\n"), "{text}");
        assert!(text.contains("runx_judge_file_bytes 30\n"), "{text}");
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            assert!(line.rsplit_once(' ').unwrap().1.parse::<f64>().is_ok(), "{line}");
        }
    }
}
