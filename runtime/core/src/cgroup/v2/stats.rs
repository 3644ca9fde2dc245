//! What version 2 counts.

use std::fs;
use std::path::Path;

use crate::cgroup::files::{names_between, pair, read, read_number, read_pairs};
use crate::cgroup::processes;
use crate::cgroup::stats::{
    Blkio, BlkioEntry, CpuStats, HugetlbStats, MemoryCounter, MemoryStats, MiscStats, PidsStats, Pressure, RdmaEntry,
    RdmaStats, Stats,
};
use crate::error::{Context, Result};

pub(in crate::cgroup) fn stats(path: &Path) -> Result<Stats> {
    fs::metadata(path).on("read statistics of cgroup", path)?;
    Ok(Stats {
        unified: true,
        cpu: Some(cpu(path)),
        cpuset: None,
        memory: memory(path),
        pids: Some(pids(path)?),
        blkio: io(path),
        hugetlb: hugetlb(path),
        rdma: read(path, "rdma.current").ok().map(|current| RdmaStats {
            current: RdmaEntry::parse_all(&current),
            limit: RdmaEntry::parse_all(&read(path, "rdma.max").unwrap_or_default()),
        }),
        misc: misc(&read_pairs(path, "misc.current"), &read_pairs(path, "misc.events")),
    })
}

/// Not there without `CONFIG_PSI`; there and unreadable where it is switched off.
fn pressure(path: &Path, file: &str) -> Option<Pressure> {
    read(path, file).ok().map(|text| Pressure::parse(&text))
}

fn cpu(path: &Path) -> CpuStats {
    let rows = read_pairs(path, "cpu.stat");
    let nanoseconds = |name: &str| pair(&rows, name) * 1000;
    CpuStats {
        total: nanoseconds("usage_usec"),
        system: nanoseconds("system_usec"),
        user: nanoseconds("user_usec"),
        periods: pair(&rows, "nr_periods"),
        throttled_periods: pair(&rows, "nr_throttled"),
        throttled_time: nanoseconds("throttled_usec"),
        bursts: pair(&rows, "nr_bursts"),
        burst_time: nanoseconds("burst_usec"),
        pressure: pressure(path, "cpu.pressure"),
        ..CpuStats::default()
    }
}

fn memory(path: &Path) -> Option<MemoryStats> {
    let events = read_pairs(path, "memory.events");
    let swap_events = read_pairs(path, "memory.swap.events");
    Some(MemoryStats {
        usage: MemoryCounter {
            usage: read_number(path, "memory.current")?,
            max_usage: read_number(path, "memory.peak").unwrap_or(0),
            limit: read_number(path, "memory.max").unwrap_or(u64::MAX),
            failures: pair(&events, "max"),
        },
        swap: read_number(path, "memory.swap.current").map(|usage| MemoryCounter {
            usage,
            max_usage: read_number(path, "memory.swap.peak").unwrap_or(0),
            limit: read_number(path, "memory.swap.max").unwrap_or(u64::MAX),
            failures: pair(&swap_events, "max"),
        }),
        oom_kills: pair(&events, "oom_kill"),
        hierarchical: true,
        table: read_pairs(path, "memory.stat"),
        events,
        pressure: pressure(path, "memory.pressure"),
        ..MemoryStats::default()
    })
}

/// Without the controller the processes are counted one by one.
fn pids(path: &Path) -> Result<PidsStats> {
    match read_number(path, "pids.current") {
        Some(current) => Ok(PidsStats { current, limit: read_number(path, "pids.max").filter(|max| *max != u64::MAX) }),
        None => Ok(PidsStats { current: processes::list(path)?.len() as u64, limit: None }),
    }
}

fn io(path: &Path) -> Option<Blkio> {
    let mut out = Blkio { pressure: pressure(path, "io.pressure"), ..Blkio::default() };
    for line in read(path, "io.stat").ok()?.lines() {
        let mut fields = line.split_ascii_whitespace();
        let Some((major, minor)) = fields.next().and_then(|number| number.split_once(':')) else { continue };
        let (Ok(major), Ok(minor)) = (major.parse(), minor.parse()) else { continue };
        for (key, value) in fields.filter_map(|field| field.split_once('=')) {
            let (list, op) = match key {
                "rbytes" => (&mut out.service_bytes, "Read"),
                "wbytes" => (&mut out.service_bytes, "Write"),
                "rios" => (&mut out.serviced, "Read"),
                "wios" => (&mut out.serviced, "Write"),
                "cost.usage" => (&mut out.cost_usage, "Count"),
                "cost.wait" => (&mut out.cost_wait, "Count"),
                "cost.indebt" => (&mut out.cost_indebt, "Count"),
                "cost.indelay" => (&mut out.cost_indelay, "Count"),
                _ => continue,
            };
            if let Ok(value) = value.parse() {
                list.push(BlkioEntry { major, minor, op: op.to_owned(), value });
            }
        }
    }
    Some(out)
}

fn hugetlb(path: &Path) -> Vec<HugetlbStats> {
    names_between(path, "hugetlb.", ".current")
        .into_iter()
        .map(|page_size| {
            let number = |what: &str| read_number(path, &format!("hugetlb.{page_size}.{what}"));
            let events = read_pairs(path, &format!("hugetlb.{page_size}.events"));
            HugetlbStats {
                usage: number("current").unwrap_or(0),
                max: 0,
                limit: number("max").unwrap_or(u64::MAX),
                failures: pair(&events, "max"),
                reserved: number("rsvd.current").map(|usage| MemoryCounter {
                    usage,
                    limit: number("rsvd.max").unwrap_or(u64::MAX),
                    ..MemoryCounter::default()
                }),
                page_size,
            }
        })
        .collect()
}

/// Events are counted as `res.max`, beside `res` in use.
fn misc(current: &[(String, u64)], events: &[(String, u64)]) -> Vec<MiscStats> {
    current
        .iter()
        .map(|(name, usage)| MiscStats {
            name: name.clone(),
            usage: *usage,
            events: pair(events, &format!("{name}.max")),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_of_scalar_resources_are_told_beside_their_use() {
        let pairs = |list: &[(&str, u64)]| list.iter().map(|(k, v)| ((*k).to_owned(), *v)).collect::<Vec<_>>();
        let out = misc(&pairs(&[("sev", 3), ("tdx", 0)]), &pairs(&[("sev.max", 9)]));
        assert_eq!(out[0], MiscStats { name: "sev".into(), usage: 3, events: 9 });
        assert_eq!(out[1], MiscStats { name: "tdx".into(), usage: 0, events: 0 });
    }
}
