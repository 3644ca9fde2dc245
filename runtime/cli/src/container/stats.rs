//! `stats`: what containers use.

use std::collections::HashMap;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use runx_core::cgroup::Stats;
use serde_json::{Value, json};

use super::attach::is_terminal;
use super::ls::format_table;
use super::record::Containers;
use super::status::Seen;
use crate::arguments::ListFormat;
use crate::{Context, Failure, print};

/// The time between two looks.
const INTERVAL: Duration = Duration::from_secs(1);
/// The first share of a processor is measured over this time.
const FIRST: Duration = Duration::from_millis(250);

/// One look at a container.
struct Look {
    id: String,
    at: Instant,
    stats: Stats,
    received: u64,
    sent: u64,
}

impl Look {
    fn take(seen: &Seen) -> Result<Option<Self>> {
        let Some(core) = seen.core.as_ref().filter(|_| seen.status.is_up()) else { return Ok(None) };
        let stats = match core.stats() {
            Ok(stats) => stats,
            // It has ended in this moment.
            Err(_) if core.pid().is_none() => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        let (received, sent) = seen.pid().map_or((0, 0), network);
        Ok(Some(Self { id: seen.record.id.clone(), at: Instant::now(), stats, received, sent }))
    }

    fn processor_time(&self) -> u64 {
        self.stats.cpu.as_ref().map_or(0, |cpu| cpu.total)
    }

    /// Hundredths of a processor since an earlier look.
    fn share(&self, before: &Self) -> f64 {
        let time = self.at.duration_since(before.at).as_nanos().max(1) as f64;
        self.processor_time().saturating_sub(before.processor_time()) as f64 * 100.0 / time
    }

    /// What it uses, without the part of the page cache that could be dropped at once, as docker has it.
    fn memory(&self) -> u64 {
        self.stats.memory.as_ref().map_or(0, |memory| {
            let inactive = if self.stats.unified { "inactive_file" } else { "total_inactive_file" };
            memory.usage.usage.saturating_sub(memory.row(inactive))
        })
    }

    fn memory_limit(&self) -> u64 {
        let limit = self.stats.memory.as_ref().map_or(u64::MAX, |memory| memory.usage.limit);
        limit.min(machine_memory())
    }

    fn blocks(&self, operation: &str) -> u64 {
        let entries = self.stats.blkio.iter().flat_map(|blkio| &blkio.service_bytes);
        entries.filter(|entry| entry.op.eq_ignore_ascii_case(operation)).map(|entry| entry.value).sum()
    }

    fn pids(&self) -> u64 {
        self.stats.pids.map_or(0, |pids| pids.current)
    }
}

fn machine_memory() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = text.lines().find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB")?.parse().ok());
    total.map_or(u64::MAX, |kilobytes: u64| kilobytes * 1024)
}

/// Bytes received and sent by the interfaces of a process's network namespace, but for the loopback one.
fn network(pid: i32) -> (u64, u64) {
    let text = fs::read_to_string(format!("/proc/{pid}/net/dev")).unwrap_or_default();
    let line = |line: &str| {
        let (name, counts) = line.split_once(':')?;
        let counts: Vec<u64> = counts.split_ascii_whitespace().filter_map(|count| count.parse().ok()).collect();
        (name.trim() != "lo").then(|| Some((*counts.first()?, *counts.get(8)?)))?
    };
    text.lines().filter_map(line).fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1))
}

/// `runx container stats`.
pub(super) fn stats(context: &Context, ids: &[String], once: bool, format: ListFormat) -> Result<u8, Failure> {
    let containers = Containers::of(context);
    // What is named has to be there.
    let named: Vec<String> = ids.iter().map(|word| containers.resolve(word)).collect::<Result<_>>()?;
    let look = || -> Result<Vec<Look>> {
        let records = match named.is_empty() {
            true => containers.all()?,
            false => named.iter().filter_map(|id| containers.find(id).ok()).collect(),
        };
        let mut looks = Vec::new();
        for record in records {
            looks.extend(Look::take(&Seen::look(context, record)?)?);
        }
        Ok(looks)
    };
    // Where there is a screen, it is drawn anew each time.
    let redraw = !once && format == ListFormat::Table && is_terminal(1);
    let mut before: HashMap<String, Look> = look()?.into_iter().map(|look| (look.id.clone(), look)).collect();
    let mut wait = FIRST;
    loop {
        // A signal ends or stops it as any program: there is nothing to put in order, and the shell says so.
        std::thread::sleep(wait);
        wait = INTERVAL;
        let now = look()?;
        let mut text = String::new();
        if redraw {
            // To the corner; each line's rest is deleted, and what is below.
            text.push_str("\x1b[H");
        }
        match format {
            ListFormat::Json => {
                let list: Vec<Value> = now.iter().map(|look| describe(look, before.get(&look.id))).collect();
                text.push_str(&(serde_json::to_string(&list).context("print as JSON")? + "\n"));
            }
            ListFormat::Table => {
                let table = table(&now, &before);
                text.push_str(&if redraw { table.replace('\n', "\x1b[K\n") + "\x1b[J" } else { table });
            }
        }
        print(&text)?;
        if once {
            return Ok(0);
        }
        before = now.into_iter().map(|look| (look.id.clone(), look)).collect();
    }
}

fn describe(look: &Look, before: Option<&Look>) -> Value {
    json!({
        "id": look.id,
        "cpuPercent": before.map(|before| look.share(before)),
        "cpuNanoseconds": look.processor_time(),
        "memoryBytes": look.memory(),
        "memoryLimitBytes": look.memory_limit(),
        "networkReceivedBytes": look.received,
        "networkSentBytes": look.sent,
        "blockReadBytes": look.blocks("read"),
        "blockWrittenBytes": look.blocks("write"),
        "pids": look.pids(),
    })
}

/// A size with a unit.
fn size(bytes: u64) -> String {
    let mut value = bytes as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if value < 1024.0 {
            return if unit == "B" { format!("{bytes}B") } else { format!("{value:.1}{unit}") };
        }
        value /= 1024.0;
    }
    format!("{value:.1}TiB")
}

fn table(now: &[Look], before: &HashMap<String, Look>) -> String {
    let titles = ["CONTAINER ID", "CPU %", "MEM USAGE / LIMIT", "MEM %", "NET I/O", "BLOCK I/O", "PIDS"];
    let mut rows = vec![titles.map(str::to_owned)];
    rows.extend(now.iter().map(|look| {
        let share =
            before.get(&look.id).map_or_else(|| "--".to_owned(), |before| format!("{:.2}%", look.share(before)));
        let (memory, limit) = (look.memory(), look.memory_limit());
        [
            look.id.clone(),
            share,
            format!("{} / {}", size(memory), size(limit)),
            format!("{:.2}%", memory as f64 * 100.0 / limit.max(1) as f64),
            format!("{} / {}", size(look.received), size(look.sent)),
            format!("{} / {}", size(look.blocks("read")), size(look.blocks("write"))),
            look.pids().to_string(),
        ]
    }));
    format_table(&rows)
}
