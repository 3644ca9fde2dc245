//! Statistics as `events` prints them: runc's names and shape, on which metrics collectors rely.

use std::collections::BTreeMap;

use runx_core::cgroup;
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
    #[serde(skip_serializing_if = "Option::is_none")]
    psi: Option<Pressure>,
}

/// Pressure stall information. Lines that are all zero are left out.
#[derive(Serialize)]
struct Pressure {
    #[serde(skip_serializing_if = "Option::is_none")]
    some: Option<PressureLine>,
    #[serde(skip_serializing_if = "Option::is_none")]
    full: Option<PressureLine>,
}

#[derive(Serialize)]
struct PressureLine {
    avg10: f64,
    avg60: f64,
    avg300: f64,
    total: u64,
}

#[derive(Default, Serialize)]
struct CpuUsage {
    #[serde(skip_serializing_if = "zero")]
    total: u64,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    percpu: Vec<u64>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    percpu_kernel: Vec<u64>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    percpu_user: Vec<u64>,
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
    #[serde(skip_serializing_if = "Vec::is_empty")]
    cpus: Vec<u16>,
    cpu_exclusive: u64,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    mems: Vec<u16>,
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
    #[serde(skip_serializing_if = "Option::is_none")]
    psi: Option<Pressure>,
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
    // The name without the "d" is runc's.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    io_queue_recursive: Vec<BlockEntry>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    io_service_time_recursive: Vec<BlockEntry>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    io_wait_time_recursive: Vec<BlockEntry>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    io_merged_recursive: Vec<BlockEntry>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    io_time_recursive: Vec<BlockEntry>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    sectors_recursive: Vec<BlockEntry>,
    #[serde(skip_serializing_if = "Option::is_none")]
    psi: Option<Pressure>,
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
    pub(super) fn new(counted: cgroup::Stats) -> Self {
        let unified = counted.unified;
        let pids = |pids: cgroup::PidsStats| Pids { current: pids.current, limit: pids.limit.unwrap_or(0) };
        Self {
            cpu: counted.cpu.map(cpu).unwrap_or_default(),
            cpuset: counted.cpuset.map(cpuset).unwrap_or_default(),
            memory: counted.memory.map(|counted| memory(counted, unified)).unwrap_or_default(),
            pids: counted.pids.map(pids).unwrap_or_default(),
            blkio: counted.blkio.map(block_io).unwrap_or_default(),
            hugetlb: counted.hugetlb.into_iter().map(huge_pages).collect(),
            ..Self::default()
        }
    }
}

fn cpu(counted: cgroup::CpuStats) -> Cpu {
    Cpu {
        usage: CpuUsage {
            total: counted.total,
            percpu: counted.per_cpu,
            percpu_kernel: counted.per_cpu_system,
            percpu_user: counted.per_cpu_user,
            kernel: counted.system,
            user: counted.user,
        },
        throttling: Throttling {
            periods: counted.periods,
            throttled_periods: counted.throttled_periods,
            throttled_time: counted.throttled_time,
        },
        psi: counted.pressure.map(pressure),
    }
}

fn pressure(counted: cgroup::Pressure) -> Pressure {
    let line = |line: cgroup::PressureLine| {
        (line != cgroup::PressureLine::default()).then_some(PressureLine {
            avg10: line.avg10,
            avg60: line.avg60,
            avg300: line.avg300,
            total: line.total,
        })
    };
    Pressure { some: line(counted.some), full: line(counted.full) }
}

fn cpuset(counted: cgroup::CpusetStats) -> CpuSet {
    CpuSet {
        cpus: counted.cpus,
        cpu_exclusive: counted.cpu_exclusive,
        mems: counted.mems,
        mem_hardwall: counted.mem_hardwall,
        mem_exclusive: counted.mem_exclusive,
        memory_migrate: counted.memory_migrate,
        memory_spread_page: counted.memory_spread_page,
        memory_spread_slab: counted.memory_spread_slab,
        memory_pressure: counted.memory_pressure,
        sched_load_balance: counted.sched_load_balance,
        sched_relax_domain_level: counted.sched_relax_domain_level,
    }
}

fn memory(counted: cgroup::MemoryStats, unified: bool) -> Memory {
    let entry = |counter: cgroup::MemoryCounter| MemoryEntry {
        limit: counter.limit,
        usage: counter.usage,
        max: counter.max_usage,
        failcnt: counter.failures,
    };
    let optional = |counter: Option<cgroup::MemoryCounter>| counter.map(entry).unwrap_or_default();
    let usage = counted.usage;
    // Readers expect memory and swap together, as version 1 counts them. The most of both is not the sum.
    let swap = counted.swap.map(|swap| match unified {
        false => swap,
        true => cgroup::MemoryCounter {
            limit: swap.limit.saturating_add(usage.limit),
            usage: swap.usage.saturating_add(usage.usage),
            max_usage: 0,
            failures: swap.failures,
        },
    });
    Memory {
        cache: counted.row(if unified { "file" } else { "cache" }),
        usage: entry(usage),
        swap: optional(swap),
        kernel: optional(counted.kernel),
        kernel_tcp: optional(counted.kernel_tcp),
        psi: counted.pressure.map(pressure),
        raw: counted.table.into_iter().collect(),
    }
}

fn block_io(counted: cgroup::Blkio) -> BlockIo {
    BlockIo {
        io_service_bytes_recursive: entries(counted.service_bytes),
        io_serviced_recursive: entries(counted.serviced),
        io_queue_recursive: entries(counted.queued),
        io_service_time_recursive: entries(counted.service_time),
        io_wait_time_recursive: entries(counted.wait_time),
        io_merged_recursive: entries(counted.merged),
        io_time_recursive: entries(counted.time),
        sectors_recursive: entries(counted.sectors),
        psi: counted.pressure.map(pressure),
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

/// Reservations count where the kernel accounts for them, as with runc.
fn huge_pages(counted: cgroup::HugetlbStats) -> (String, Hugetlb) {
    let (usage, max, failcnt) = match counted.reserved {
        Some(reserved) => (reserved.usage, reserved.max_usage, reserved.failures.max(counted.failures)),
        None => (counted.usage, counted.max, counted.failures),
    };
    (counted.page_size, Hugetlb { usage, max, failcnt })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shape_is_runcs() {
        let counted = cgroup::Stats {
            cpu: Some(cgroup::CpuStats { total: 9, per_cpu: vec![4, 5], user: 6, ..Default::default() }),
            memory: Some(cgroup::MemoryStats {
                usage: cgroup::MemoryCounter { usage: 8, limit: 16, ..Default::default() },
                table: vec![("cache".into(), 3)],
                ..Default::default()
            }),
            pids: Some(cgroup::PidsStats { current: 2, limit: None }),
            blkio: Some(cgroup::Blkio {
                service_bytes: vec![cgroup::BlkioEntry { major: 8, minor: 0, op: "Read".into(), value: 4096 }],
                ..Default::default()
            }),
            hugetlb: vec![cgroup::HugetlbStats { page_size: "2MB".into(), ..Default::default() }],
            ..Default::default()
        };
        let stats = Stats::new(counted);
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
        let waited = cgroup::PressureLine { avg10: 1.5, total: 7, ..Default::default() };
        let waited = pressure(cgroup::Pressure { some: waited, ..Default::default() });
        assert_eq!(
            serde_json::to_string(&waited).unwrap(),
            r#"{"some":{"avg10":1.5,"avg60":0.0,"avg300":0.0,"total":7}}"#
        );
        let oom = serde_json::to_string(&Event { kind: "oom", id: "c", data: None }).unwrap();
        assert_eq!(oom, r#"{"type":"oom","id":"c"}"#);
    }
}
