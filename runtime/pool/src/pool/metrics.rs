//! Counters.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::outcome::{Outcome, Status};

/// What a pool has done since it began, and what it has now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Metrics {
    /// Sandboxes that wait for a lease.
    pub ready: u64,
    /// Sandboxes that are lent.
    pub leased: u64,
    /// Requests that wait for a sandbox.
    pub queued: u64,
    /// Sandboxes that were thrown away and are not gone yet.
    pub ending: u64,
    /// Sandboxes that were made.
    pub made: u64,
    /// Attempts to make one that failed.
    pub failed: u64,
    /// Sandboxes that were thrown away.
    pub destroyed: u64,
    /// Of these, those that were not clean after a reset, or not alike when new.
    pub unclean: u64,
    /// Of these, those that had ended or broken the protocol.
    pub lost: u64,
    /// Sandboxes that were reset.
    pub reset: u64,
    /// Spawners that were started.
    pub spawners: u64,
    /// Requests for a sandbox that were refused or not served in time.
    pub refused: u64,
    /// Requests that had to wait, and for how long together.
    pub waited: u64,
    /// The time that these waited together.
    pub waiting: Duration,
    /// Executions by verdict, in the order of [`Status::ALL`].
    pub executions: [u64; Status::ALL.len()],
    /// The processor time of all executions.
    pub cpu: Duration,
    /// The time on the clock of all executions.
    pub wall: Duration,
}

/// What adds itself up as it happens.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) made: AtomicU64,
    pub(super) failed: AtomicU64,
    pub(super) destroyed: AtomicU64,
    pub(super) unclean: AtomicU64,
    pub(super) lost: AtomicU64,
    pub(super) reset: AtomicU64,
    pub(super) spawners: AtomicU64,
    pub(super) refused: AtomicU64,
    waited: AtomicU64,
    waiting_us: AtomicU64,
    executions: [AtomicU64; Status::ALL.len()],
    cpu_us: AtomicU64,
    wall_us: AtomicU64,
}

pub(super) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

impl Counters {
    pub(super) fn waited(&self, time: Duration) {
        count(&self.waited);
        self.waiting_us.fetch_add(time.as_micros() as u64, Ordering::Relaxed);
    }

    pub(super) fn executed(&self, outcome: &Outcome) {
        if let Some(counter) = Status::ALL.iter().position(|of| *of == outcome.status).map(|at| &self.executions[at]) {
            count(counter);
        }
        self.cpu_us.fetch_add(outcome.cpu.as_micros() as u64, Ordering::Relaxed);
        self.wall_us.fetch_add(outcome.wall.as_micros() as u64, Ordering::Relaxed);
    }

    pub(super) fn read(&self) -> Metrics {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Metrics {
            ready: 0,
            leased: 0,
            queued: 0,
            ending: 0,
            made: get(&self.made),
            failed: get(&self.failed),
            destroyed: get(&self.destroyed),
            unclean: get(&self.unclean),
            lost: get(&self.lost),
            reset: get(&self.reset),
            spawners: get(&self.spawners),
            refused: get(&self.refused),
            waited: get(&self.waited),
            waiting: Duration::from_micros(get(&self.waiting_us)),
            executions: std::array::from_fn(|at| get(&self.executions[at])),
            cpu: Duration::from_micros(get(&self.cpu_us)),
            wall: Duration::from_micros(get(&self.wall_us)),
        }
    }
}

impl Metrics {
    /// In Prometheus' text format. Every name begins with `runx_pool_`.
    pub fn prometheus(&self) -> String {
        let mut out = String::new();
        let mut add = |name: &str, kind: &str, help: &str, samples: &[(String, String)]| {
            let _ = writeln!(out, "# HELP runx_pool_{name} {help}\n# TYPE runx_pool_{name} {kind}");
            for (labels, value) in samples {
                let _ = writeln!(out, "runx_pool_{name}{labels} {value}");
            }
        };
        let plain = |value: u64| vec![(String::new(), value.to_string())];
        let seconds = |time: Duration| vec![(String::new(), format!("{:.6}", time.as_secs_f64()))];
        add("ready", "gauge", "Sandboxes that wait for a lease.", &plain(self.ready));
        add("leased", "gauge", "Sandboxes that are lent.", &plain(self.leased));
        add("queued", "gauge", "Requests that wait for a sandbox.", &plain(self.queued));
        add("ending", "gauge", "Sandboxes that were thrown away and are not gone yet.", &plain(self.ending));
        add("made_total", "counter", "Sandboxes that were made.", &plain(self.made));
        add("failed_total", "counter", "Attempts to make a sandbox that failed.", &plain(self.failed));
        let reasons = [
            ("unclean", self.unclean),
            ("lost", self.lost),
            ("used", self.destroyed.saturating_sub(self.unclean + self.lost)),
        ];
        let reasons = reasons.map(|(reason, value)| (format!("{{reason=\"{reason}\"}}"), value.to_string()));
        add("destroyed_total", "counter", "Sandboxes that were thrown away.", &reasons);
        add("reset_total", "counter", "Sandboxes that were reset.", &plain(self.reset));
        add("spawners_total", "counter", "Spawners that were started.", &plain(self.spawners));
        add("refused_total", "counter", "Requests that got no sandbox.", &plain(self.refused));
        add("waited_total", "counter", "Requests that had to wait.", &plain(self.waited));
        add("waiting_seconds_total", "counter", "The time that these waited.", &seconds(self.waiting));
        let verdicts: Vec<_> = Status::ALL
            .iter()
            .zip(self.executions)
            .map(|(status, value)| (format!("{{status=\"{status}\"}}"), value.to_string()))
            .collect();
        add("executions_total", "counter", "Executions by verdict.", &verdicts);
        add("cpu_seconds_total", "counter", "Processor time of executions.", &seconds(self.cpu));
        add("wall_seconds_total", "counter", "Time on the clock of executions.", &seconds(self.wall));
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_sample_has_a_name_and_a_number() {
        let metrics = Metrics { made: 7, executions: [3; 9], cpu: Duration::from_millis(1500), ..Metrics::default() };
        let text = metrics.prometheus();
        assert!(text.contains("runx_pool_executions_total{status=\"Accepted\"} 3\n"), "{text}");
        assert!(text.contains("runx_pool_cpu_seconds_total 1.500000\n"), "{text}");
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let (name, value) = line.rsplit_once(' ').unwrap();
            assert!(name.starts_with("runx_pool_") && value.parse::<f64>().is_ok(), "{line}");
        }
    }
}
