//! Processor and memory: of the cgroup where there is a limit, and of the machine otherwise.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::Serialize;

/// Two samples nearer to each other say nothing.
const LEAST: Duration = Duration::from_millis(50);

/// What is told at once.
#[derive(Clone, Debug, Serialize)]
pub struct Snapshot {
    /// How many processors may be used.
    pub cpu_count: f64,
    /// How much of them was used since the last time, of 100.
    pub cpu_used_pct: f64,
    /// How much memory there may be, in MiB.
    pub mem_total_mib: f64,
    /// How much of it is in use, in MiB.
    pub mem_used_mib: f64,
    /// Milliseconds since 1970.
    pub timestamp: u64,
}

#[derive(Debug)]
struct Sample {
    at: Instant,
    /// Processor time used so far, in seconds.
    used: f64,
    percent: f64,
}

/// Where numbers come from, and the last ones.
#[derive(Debug)]
pub struct Metrics {
    last: Mutex<Sample>,
}

impl Metrics {
    /// Begins to count.
    pub fn new() -> Self {
        Self { last: Mutex::new(Sample { at: Instant::now(), used: cpu_used().unwrap_or(0.0), percent: 0.0 }) }
    }

    /// How it stands now. Nothing is waited for: the processors' use is that since the last time somebody asked.
    pub fn snapshot(&self) -> Snapshot {
        let count = cpu_count();
        let percent = {
            let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
            let elapsed = last.at.elapsed();
            if elapsed >= LEAST {
                let used = cpu_used().unwrap_or(last.used);
                let share = (used - last.used) / (elapsed.as_secs_f64() * count) * 100.0;
                *last = Sample { at: Instant::now(), used, percent: share.clamp(0.0, 100.0) };
            }
            last.percent
        };
        let (total, used) = memory();
        let mib = |bytes: u64| (bytes as f64 / 1_048_576.0 * 100.0).round() / 100.0;
        Snapshot {
            cpu_count: count,
            cpu_used_pct: (percent * 100.0).round() / 100.0,
            mem_total_mib: mib(total),
            mem_used_mib: mib(used.min(total)),
            timestamp: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64),
        }
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.trim().trim_end_matches(" kB").parse().ok())
}

/// The directory of this process's own group, of a controller of version 1 or of version 2's one tree. In a container it
/// is mounted as the root, or below its path on the node.
pub(crate) fn group(controller: Option<&str>) -> Option<PathBuf> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = groups.lines().find_map(|line| {
        let mut parts = line.splitn(3, ':');
        let (_, names, path) = (parts.next()?, parts.next()?, parts.next()?);
        let found = match controller {
            Some(name) => names.split(',').any(|known| known == name),
            None => names.is_empty(),
        };
        found.then(|| path.trim_start_matches('/').to_owned())
    })?;
    let top = match controller {
        Some(name) => Path::new("/sys/fs/cgroup").join(name),
        None => PathBuf::from("/sys/fs/cgroup"),
    };
    let own = top.join(path);
    Some(if own.is_dir() { own } else { top })
}

/// Processor time in seconds.
fn cpu_used() -> Option<f64> {
    if let Some(group) = group(Some("cpuacct"))
        && let Some(nanoseconds) = number(&group.join("cpuacct.usage"))
    {
        return Some(nanoseconds as f64 / 1e9);
    }
    if let Some(group) = group(None)
        && let Ok(text) = fs::read_to_string(group.join("cpu.stat"))
        && let Some(microseconds) = field(&text, "usage_usec ")
    {
        return Some(microseconds as f64 / 1e6);
    }
    let text = fs::read_to_string("/proc/stat").ok()?;
    let times: Vec<u64> =
        text.lines().next()?.split_whitespace().skip(1).filter_map(|word| word.parse().ok()).collect();
    let idle = times.get(3)? + times.get(4).unwrap_or(&0);
    Some((times.iter().take(8).sum::<u64>() - idle) as f64 / 100.0)
}

/// The processors of the quota, or those that this process may run on.
fn cpu_count() -> f64 {
    let quota = || {
        if let Some(group) = group(Some("cpu")) {
            let quota: i64 = fs::read_to_string(group.join("cpu.cfs_quota_us")).ok()?.trim().parse().ok()?;
            let period = number(&group.join("cpu.cfs_period_us"))?;
            return (quota > 0 && period > 0).then(|| quota as f64 / period as f64);
        }
        let text = fs::read_to_string(group(None)?.join("cpu.max")).ok()?;
        let (quota, period) = text.trim().split_once(' ')?;
        Some(quota.parse::<f64>().ok()? / period.parse::<f64>().ok()?)
    };
    let processors = std::thread::available_parallelism().map_or(1.0, |count| count.get() as f64);
    quota().filter(|count| *count > 0.0).map_or(processors, |count| count.min(processors))
}

/// How much memory there may be and how much is in use, in bytes. What the kernel would give up at once is not in use.
fn memory() -> (u64, u64) {
    let info = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = field(&info, "MemTotal:").unwrap_or(0) * 1024;
    let available = field(&info, "MemAvailable:").unwrap_or(0) * 1024;
    let of_group = || {
        if let Some(group) = group(Some("memory")) {
            let limit = number(&group.join("memory.limit_in_bytes"))?;
            let used = number(&group.join("memory.usage_in_bytes"))?;
            let stat = fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
            return Some((limit, used.saturating_sub(field(&stat, "total_inactive_file ").unwrap_or(0))));
        }
        let group = group(None)?;
        let limit = number(&group.join("memory.max"))?;
        let used = number(&group.join("memory.current"))?;
        let stat = fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
        Some((limit, used.saturating_sub(field(&stat, "inactive_file ").unwrap_or(0))))
    };
    match of_group() {
        Some((limit, used)) if limit < total => (limit, used),
        _ => (total, total.saturating_sub(available)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_make_sense() {
        let metrics = Metrics::new();
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_millis(80) {}
        let snapshot = metrics.snapshot();
        assert!(snapshot.cpu_count > 0.0 && snapshot.mem_total_mib > 0.0, "{snapshot:?}");
        assert!(snapshot.cpu_used_pct > 0.0 && snapshot.cpu_used_pct <= 100.0, "{snapshot:?}");
        assert!(snapshot.mem_used_mib > 0.0 && snapshot.mem_used_mib <= snapshot.mem_total_mib, "{snapshot:?}");
    }
}
