//! Statistics as `events` prints them: runc's names and shape, on which metrics collectors rely.

use std::collections::BTreeMap;

use runx_core::cgroup::{self, Cgroup};
use serde::Serialize;

fn zero(n: &u64) -> bool {
    *n == 0
}

/// One line of `events`.
#[derive(Serialize)]
pub(super) struct Event<'a> {
    #[serde(rename = "type")]
    pub(super) kind: &'static str,
    pub(super) id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) data: Option<Stats>,
}

/// All statistics.
#[derive(Default, Serialize)]
pub(super) struct Stats {
    cpu: Cpu,
    cpuset: CpuSet,
    memory: Memory,
    pids: Pids,
    blkio: BlockIo,
    hugetlb: BTreeMap<String, Hugetlb>,
    intel_rdt: IntelRdt,
    /// runc fills it for interfaces that it made itself, which it has not done for years.
    network_interfaces: Option<()>,
}

#[derive(Default, Serialize)]
struct Cpu {
    usage: CpuUsage,
    throttling: Throttling,
}

#[derive(Default, Serialize)]
struct CpuUsage {
    #[serde(skip_serializing_if = "zero")]
    total: u64,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    percpu: Vec<u64>,
    kernel: u64,
    user: u64,
}

#[derive(Default, Serialize)]
#[serde(rename_all = "camelCase")]
struct Throttling {
    #[serde(skip_serializing_if = "zero")]
    periods: u64,
    #[serde(skip_serializing_if = "zero")]
    throttled_periods: u64,
    #[serde(skip_serializing_if = "zero")]
    throttled_time: u64,
}

#[derive(Default, Serialize)]
struct CpuSet {
    cpu_exclusive: u64,
    mem_hardwall: u64,
    mem_exclusive: u64,
    memory_migrate: u64,
    memory_spread_page: u64,
    memory_spread_slab: u64,
    memory_pressure: u64,
    sched_load_balance: u64,
    sched_relax_domain_level: i64,
}

#[derive(Default, Serialize)]
struct Memory {
    #[serde(skip_serializing_if = "zero")]
    cache: u64,
    usage: MemoryEntry,
    swap: MemoryEntry,
    kernel: MemoryEntry,
    #[serde(rename = "kernelTCP")]
    kernel_tcp: MemoryEntry,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    raw: BTreeMap<String, u64>,
}

#[derive(Default, Serialize)]
struct MemoryEntry {
    limit: u64,
    #[serde(skip_serializing_if = "zero")]
    usage: u64,
    #[serde(skip_serializing_if = "zero")]
    max: u64,
    failcnt: u64,
}

#[derive(Default, Serialize)]
struct Pids {
    #[serde(skip_serializing_if = "zero")]
    current: u64,
    #[serde(skip_serializing_if = "zero")]
    limit: u64,
}

#[derive(Default, Serialize)]
#[serde(rename_all = "camelCase")]
struct BlockIo {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    io_service_bytes_recursive: Vec<BlockEntry>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    io_serviced_recursive: Vec<BlockEntry>,
}

#[derive(Serialize)]
struct BlockEntry {
    #[serde(skip_serializing_if = "zero")]
    major: u64,
    #[serde(skip_serializing_if = "zero")]
    minor: u64,
    #[serde(skip_serializing_if = "String::is_empty")]
    op: String,
    #[serde(skip_serializing_if = "zero")]
    value: u64,
}

#[derive(Serialize)]
struct Hugetlb {
    #[serde(skip_serializing_if = "zero")]
    usage: u64,
    #[serde(skip_serializing_if = "zero")]
    max: u64,
    failcnt: u64,
}

#[derive(Default, Serialize)]
struct IntelRdt {}

impl Stats {
    /// Puts what the kernel counted into runc's shape.
    pub(super) fn new(cgroup: &Cgroup, counted: cgroup::Stats) -> Self {
        let unified = matches!(cgroup, Cgroup::V2 { .. });
        Self {
            cpu: counted.cpu.map(cpu).unwrap_or_default(),
            memory: counted.memory.map(|counted| memory(counted, unified)).unwrap_or_default(),
            pids: counted.pids.map(|pids| Pids { current: pids.current, limit: pids.limit }).unwrap_or_default(),
            blkio: counted.blkio.map(block_io).unwrap_or_default(),
            hugetlb: counted.hugetlb.into_iter().map(huge_pages).collect(),
            ..Self::default()
        }
    }
}

fn cpu(counted: cgroup::CpuStats) -> Cpu {
    Cpu {
        usage: CpuUsage { total: counted.total, percpu: counted.per_cpu, kernel: counted.system, user: counted.user },
        throttling: Throttling {
            periods: counted.periods,
            throttled_periods: counted.throttled_periods,
            throttled_time: counted.throttled_time,
        },
    }
}

fn memory(counted: cgroup::MemoryStats, unified: bool) -> Memory {
    let cache = counted.row(if unified { "file" } else { "cache" });
    // Readers expect memory and swap together, as version 1 counts them.
    let with_memory = |swap: u64, memory: u64| if unified { swap.saturating_add(memory) } else { swap };
    let swap = counted.swap_usage.map(|swap| MemoryEntry {
        limit: with_memory(counted.swap_limit, counted.limit),
        usage: with_memory(swap, counted.usage),
        max: counted.swap_max_usage,
        failcnt: counted.swap_failures,
    });
    Memory {
        cache,
        usage: MemoryEntry {
            limit: counted.limit,
            usage: counted.usage,
            max: counted.max_usage,
            failcnt: counted.failures,
        },
        swap: swap.unwrap_or_default(),
        raw: counted.table.into_iter().collect(),
        ..Memory::default()
    }
}

fn block_io(counted: cgroup::Blkio) -> BlockIo {
    BlockIo {
        io_service_bytes_recursive: entries(counted.service_bytes),
        io_serviced_recursive: entries(counted.serviced),
    }
}

fn entries(counted: Vec<cgroup::BlkioEntry>) -> Vec<BlockEntry> {
    let entry = |entry: cgroup::BlkioEntry| BlockEntry {
        major: entry.major,
        minor: entry.minor,
        op: entry.op,
        value: entry.value,
    };
    counted.into_iter().map(entry).collect()
}

fn huge_pages(counted: cgroup::HugetlbStats) -> (String, Hugetlb) {
    let entry = Hugetlb { usage: counted.usage, max: counted.max, failcnt: counted.failures };
    (counted.page_size, entry)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shape_is_runcs() {
        let counted = cgroup::Stats {
            cpu: Some(cgroup::CpuStats { total: 9, per_cpu: vec![4, 5], user: 6, ..Default::default() }),
            memory: Some(cgroup::MemoryStats {
                usage: 8,
                limit: 16,
                table: vec![("cache".into(), 3)],
                ..Default::default()
            }),
            pids: Some(cgroup::PidsStats { current: 2, limit: 0 }),
            blkio: Some(cgroup::Blkio {
                service_bytes: vec![cgroup::BlkioEntry { major: 8, minor: 0, op: "Read".into(), value: 4096 }],
                serviced: Vec::new(),
            }),
            hugetlb: vec![cgroup::HugetlbStats { page_size: "2MB".into(), ..Default::default() }],
        };
        let stats = Stats::new(&Cgroup::V1 { directories: Vec::new() }, counted);
        let line = serde_json::to_string(&Event { kind: "stats", id: "c", data: Some(stats) }).unwrap();
        assert_eq!(
            line,
            r#"{"type":"stats","id":"c","data":{"cpu":{"usage":{"total":9,"percpu":[4,5],"kernel":0,"user":6},"#
                .to_owned()
                + r#""throttling":{}},"cpuset":{"cpu_exclusive":0,"mem_hardwall":0,"mem_exclusive":0,"#
                + r#""memory_migrate":0,"memory_spread_page":0,"memory_spread_slab":0,"memory_pressure":0,"#
                + r#""sched_load_balance":0,"sched_relax_domain_level":0},"memory":{"cache":3,"#
                + r#""usage":{"limit":16,"usage":8,"failcnt":0},"swap":{"limit":0,"failcnt":0},"#
                + r#""kernel":{"limit":0,"failcnt":0},"kernelTCP":{"limit":0,"failcnt":0},"raw":{"cache":3}},"#
                + r#""pids":{"current":2},"blkio":{"ioServiceBytesRecursive":[{"major":8,"op":"Read","value":4096}]},"#
                + r#""hugetlb":{"2MB":{"failcnt":0}},"intel_rdt":{},"network_interfaces":null}}"#
        );
        let oom = serde_json::to_string(&Event { kind: "oom", id: "c", data: None }).unwrap();
        assert_eq!(oom, r#"{"type":"oom","id":"c"}"#);
    }
}
