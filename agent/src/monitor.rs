//! Resources over time: samples at an interval, the last ones kept, and limits that somebody may set.

use std::collections::VecDeque;
use std::fs;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::metrics::Metrics;

/// How many samples are kept: an hour of them at the usual interval.
const KEPT: usize = 720;

/// How it stood at one moment.
#[derive(Clone, Debug, Serialize)]
pub struct Sample {
    /// Milliseconds since 1970.
    pub timestamp_ms: u64,
    /// How many processors may be used.
    pub cpu_count: f64,
    /// How much of them was used since the sample before, of 100.
    pub cpu_percent: f64,
    /// In bytes.
    pub memory_total: u64,
    /// In bytes. What the kernel would give up at once is not in it.
    pub memory_used: u64,
    /// Of the filesystem of the root, in bytes.
    pub disk_total: u64,
    /// In bytes.
    pub disk_used: u64,
    /// Of all interfaces but the loopback, in bytes, since they are there.
    pub network_received: u64,
    /// As above.
    pub network_sent: u64,
    /// How many processes there are.
    pub processes: u64,
}

/// From which share on a resource counts as short, of 100. `None` for never.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Of the processors.
    pub cpu_percent: Option<f64>,
    /// Of the memory.
    pub memory_percent: Option<f64>,
    /// Of the disk.
    pub disk_percent: Option<f64>,
    /// How many processes.
    pub processes: Option<u64>,
}

/// See the module.
#[derive(Debug)]
pub struct Monitor {
    metrics: Arc<Metrics>,
    samples: Arc<Mutex<VecDeque<Sample>>>,
    newest: watch::Sender<Option<Sample>>,
    limits: Mutex<Limits>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Monitor {
    /// Begins to take samples, never with an interval of zero. Within a runtime.
    pub fn begin(interval: Duration) -> Self {
        let monitor = Self {
            metrics: Arc::new(Metrics::new()),
            samples: Arc::default(),
            newest: watch::Sender::new(None),
            limits: Mutex::default(),
        };
        if !interval.is_zero() {
            let (metrics, samples, newest) = (monitor.metrics.clone(), monitor.samples.clone(), monitor.newest.clone());
            tokio::spawn(async move {
                let mut tick = tokio::time::interval(interval);
                tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
                loop {
                    tick.tick().await;
                    let sample = take(&metrics);
                    let mut samples = lock(&samples);
                    samples.truncate(KEPT - 1);
                    samples.push_front(sample.clone());
                    newest.send_replace(Some(sample));
                }
            });
        }
        monitor
    }

    /// How it stands now.
    pub fn now(&self) -> Sample {
        take(&self.metrics)
    }

    /// The samples since a time in milliseconds since 1970, the oldest first.
    pub fn since(&self, timestamp: u64) -> Vec<Sample> {
        let samples = lock(&self.samples);
        let mut out: Vec<_> = samples.iter().take_while(|sample| sample.timestamp_ms >= timestamp).cloned().collect();
        out.reverse();
        out
    }

    /// Each new sample.
    pub fn watch(&self) -> watch::Receiver<Option<Sample>> {
        self.newest.subscribe()
    }

    /// The limits.
    pub fn limits(&self) -> Limits {
        lock(&self.limits).clone()
    }

    /// Sets the limits.
    pub fn set_limits(&self, limits: Limits) {
        *lock(&self.limits) = limits;
    }
}

impl Limits {
    /// The resources that are short, by their names.
    pub fn exceeded(&self, sample: &Sample) -> Vec<&'static str> {
        let share = |used: u64, total: u64| if total == 0 { 0.0 } else { used as f64 / total as f64 * 100.0 };
        let all = [
            ("cpu", self.cpu_percent, sample.cpu_percent),
            ("memory", self.memory_percent, share(sample.memory_used, sample.memory_total)),
            ("disk", self.disk_percent, share(sample.disk_used, sample.disk_total)),
            ("processes", self.processes.map(|most| most as f64), sample.processes as f64),
        ];
        all.iter()
            .filter(|(_, limit, value)| limit.is_some_and(|limit| *value >= limit))
            .map(|(name, _, _)| *name)
            .collect()
    }
}

fn take(metrics: &Metrics) -> Sample {
    let snapshot = metrics.snapshot();
    let bytes = |mib: f64| (mib * 1_048_576.0) as u64;
    let (total, free, block) = nix::sys::statvfs::statvfs("/")
        .map_or((0, 0, 0), |disk| (disk.blocks(), disk.blocks_available(), disk.fragment_size()));
    let (received, sent) = network(&fs::read_to_string("/proc/net/dev").unwrap_or_default());
    let is_process = |name: std::ffi::OsString| name.to_str().is_some_and(|name| name.parse::<u32>().is_ok());
    let processes =
        fs::read_dir("/proc").map_or(0, |all| all.flatten().filter(|one| is_process(one.file_name())).count());
    Sample {
        timestamp_ms: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64),
        cpu_count: snapshot.cpu_count,
        cpu_percent: snapshot.cpu_used_pct,
        memory_total: bytes(snapshot.mem_total_mib),
        memory_used: bytes(snapshot.mem_used_mib),
        disk_total: total * block,
        disk_used: total.saturating_sub(free) * block,
        network_received: received,
        network_sent: sent,
        processes: processes as u64,
    }
}

/// Bytes received and sent.
fn network(text: &str) -> (u64, u64) {
    let lines = text.lines().filter_map(|line| line.split_once(':')).filter(|(name, _)| name.trim() != "lo");
    lines.fold((0, 0), |(received, sent), (_, numbers)| {
        let numbers: Vec<u64> = numbers.split_whitespace().filter_map(|number| number.parse().ok()).collect();
        (received + numbers.first().unwrap_or(&0), sent + numbers.get(8).unwrap_or(&0))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_network_is_counted_without_the_loopback() {
        let text = "Inter-|   Receive |  Transmit\n face |bytes packets\n    lo: 5 1 0 0 0 0 0 0 5 1 0 0 0 0 0 0\n  \
                    eth0: 100 2 0 0 0 0 0 0 70 1 0 0 0 0 0 0\n eth1:1 0 0 0 0 0 0 0 2 0 0 0 0 0 0 0\n";
        assert_eq!(network(text), (101, 72));
    }

    #[test]
    fn what_is_short_is_named() {
        let mut sample = take(&Metrics::new());
        (sample.memory_used, sample.memory_total, sample.cpu_percent) = (90, 100, 10.0);
        let limits = Limits { memory_percent: Some(90.0), cpu_percent: Some(50.0), ..Limits::default() };
        assert_eq!(limits.exceeded(&sample), ["memory"]);
        assert!(Limits::default().exceeded(&sample).is_empty());
    }
}
