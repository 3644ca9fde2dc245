//! What version 1 counts.

use std::fs;
use std::path::Path;

use super::{find, membership};
use crate::cgroup::Directory;
use crate::cgroup::files::{exists, names_between, pair, read, read_number, read_pairs};
use crate::cgroup::stats::{
    Blkio, BlkioEntry, CpuStats, CpusetStats, HugetlbStats, MemoryCounter, MemoryStats, NumaRow, PidsStats, RdmaEntry,
    RdmaStats, Stats,
};
use crate::error::{Context, Result};

/// Clock ticks of `cpuacct.stat` are hundredths of a second on every architecture.
const NANOSECONDS_PER_TICK: u64 = 10_000_000;

pub(in crate::cgroup) fn stats(directories: &[Directory]) -> Result<Stats> {
    if let Some(directory) = membership(directories) {
        fs::metadata(directory).on("read statistics of cgroup", directory)?;
    }
    Ok(Stats {
        unified: false,
        cpu: cpu(directories),
        cpuset: find(directories, "cpuset").map(cpuset),
        memory: find(directories, "memory").map(memory),
        pids: find(directories, "pids").map(|directory| PidsStats {
            current: read_number(directory, "pids.current").unwrap_or(0),
            limit: read_number(directory, "pids.max").filter(|max| *max != u64::MAX),
        }),
        blkio: find(directories, "blkio").map(blkio),
        hugetlb: find(directories, "hugetlb").map(hugetlb).unwrap_or_default(),
        rdma: find(directories, "rdma").map(|directory| RdmaStats {
            current: RdmaEntry::parse_all(&read(directory, "rdma.current").unwrap_or_default()),
            limit: RdmaEntry::parse_all(&read(directory, "rdma.max").unwrap_or_default()),
        }),
        misc: Vec::new(),
    })
}

fn cpu(directories: &[Directory]) -> Option<CpuStats> {
    let accounting = find(directories, "cpuacct")?;
    let ticks = read_pairs(accounting, "cpuacct.stat");
    let throttling = find(directories, "cpu").map(|d| read_pairs(d, "cpu.stat")).unwrap_or_default();
    let per_cpu = read(accounting, "cpuacct.usage_percpu").unwrap_or_default();
    let (per_cpu_user, per_cpu_system) = cpu_modes(&read(accounting, "cpuacct.usage_all").unwrap_or_default());
    Some(CpuStats {
        total: read_number(accounting, "cpuacct.usage").unwrap_or(0),
        system: pair(&ticks, "system") * NANOSECONDS_PER_TICK,
        user: pair(&ticks, "user") * NANOSECONDS_PER_TICK,
        per_cpu: per_cpu.split_ascii_whitespace().filter_map(|n| n.parse().ok()).collect(),
        per_cpu_system,
        per_cpu_user,
        periods: pair(&throttling, "nr_periods"),
        throttled_periods: pair(&throttling, "nr_throttled"),
        throttled_time: pair(&throttling, "throttled_time"),
        bursts: pair(&throttling, "nr_bursts"),
        burst_time: pair(&throttling, "burst_time"),
        pressure: None,
    })
}

/// The table of `cpuacct.usage_all` as its columns user and system.
fn cpu_modes(text: &str) -> (Vec<u64>, Vec<u64>) {
    text.lines()
        .skip(1)
        .filter_map(|line| {
            let mut fields = line.split_ascii_whitespace().skip(1).map(|field| field.parse::<u64>().ok());
            Some((fields.next()??, fields.next()??))
        })
        .unzip()
}

fn cpuset(directory: &Path) -> CpusetStats {
    let number = |file: &str| read_number(directory, &format!("cpuset.{file}")).unwrap_or(0);
    let list = |file: &str| numbers(&read(directory, file).unwrap_or_default());
    CpusetStats {
        cpus: list("cpuset.cpus"),
        mems: list("cpuset.mems"),
        cpu_exclusive: number("cpu_exclusive"),
        mem_exclusive: number("mem_exclusive"),
        mem_hardwall: number("mem_hardwall"),
        memory_migrate: number("memory_migrate"),
        memory_spread_page: number("memory_spread_page"),
        memory_spread_slab: number("memory_spread_slab"),
        memory_pressure: number("memory_pressure"),
        sched_load_balance: number("sched_load_balance"),
        sched_relax_domain_level: read(directory, "cpuset.sched_relax_domain_level")
            .ok()
            .and_then(|text| text.parse().ok())
            .unwrap_or(0),
    }
}

/// `0-2,5` as its numbers.
fn numbers(text: &str) -> Vec<u16> {
    text.split(',')
        .filter_map(|part| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            Some(first.trim().parse::<u16>().ok()?..=last.trim().parse::<u16>().ok()?)
        })
        .flatten()
        .collect()
}

fn memory(directory: &Path) -> MemoryStats {
    let counter = |prefix: &str| {
        let number = |what: &str| read_number(directory, &format!("{prefix}.{what}")).unwrap_or(0);
        MemoryCounter {
            usage: number("usage_in_bytes"),
            max_usage: number("max_usage_in_bytes"),
            limit: number("limit_in_bytes"),
            failures: number("failcnt"),
        }
    };
    let optional = |prefix: &str| exists(directory, &format!("{prefix}.usage_in_bytes")).then(|| counter(prefix));
    let control = read_pairs(directory, "memory.oom_control");
    MemoryStats {
        usage: counter("memory"),
        swap: optional("memory.memsw"),
        kernel: optional("memory.kmem"),
        kernel_tcp: optional("memory.kmem.tcp"),
        oom_kills: pair(&control, "oom_kill"),
        under_oom: pair(&control, "under_oom") != 0,
        oom_kill_disabled: pair(&control, "oom_kill_disable") != 0,
        hierarchical: read_number(directory, "memory.use_hierarchy") == Some(1),
        table: read_pairs(directory, "memory.stat"),
        events: Vec::new(),
        numa: numa(&read(directory, "memory.numa_stat").unwrap_or_default()),
        pressure: None,
    }
}

/// `total=5 N0=3 N1=2`, a line for each kind of page.
fn numa(text: &str) -> Vec<NumaRow> {
    text.lines()
        .filter_map(|line| {
            let mut fields = line.split_ascii_whitespace();
            let (name, total) = fields.next()?.split_once('=')?;
            let nodes = fields
                .filter_map(|field| {
                    let (node, pages) = field.strip_prefix('N')?.split_once('=')?;
                    Some((node.parse().ok()?, pages.parse().ok()?))
                })
                .collect();
            Some(NumaRow { name: name.to_owned(), total: total.parse().ok()?, nodes })
        })
        .collect()
}

fn blkio(directory: &Path) -> Blkio {
    let list = |file: &str| blkio_entries(&read(directory, &format!("blkio.{file}")).unwrap_or_default());
    // Which files count depends on the devices' schedulers: BFQ's, on old kernels CFQ's, or else only those of
    // the throttling layer.
    for scheduler in ["bfq.", ""] {
        let of = |name: &str| list(&format!("{scheduler}{name}_recursive"));
        let serviced = of("io_serviced");
        if !serviced.is_empty() {
            return Blkio {
                service_bytes: of("io_service_bytes"),
                serviced,
                queued: of("io_queued"),
                service_time: of("io_service_time"),
                wait_time: of("io_wait_time"),
                merged: of("io_merged"),
                time: of("time"),
                sectors: of("sectors"),
                ..Blkio::default()
            };
        }
    }
    let throttle = |name: &str| {
        let recursive = list(&format!("throttle.{name}_recursive"));
        if recursive.is_empty() { list(&format!("throttle.{name}")) } else { recursive }
    };
    Blkio { service_bytes: throttle("io_service_bytes"), serviced: throttle("io_serviced"), ..Blkio::default() }
}

/// `8:0 Read 4096`, or `8:0 4096` for what is not divided; the sum over all devices is left out.
fn blkio_entries(text: &str) -> Vec<BlkioEntry> {
    text.lines()
        .filter_map(|line| {
            let mut fields = line.split_ascii_whitespace();
            let (major, minor) = fields.next()?.split_once(':')?;
            let (first, second) = (fields.next()?, fields.next());
            let (op, value) = second.map_or(("", first), |value| (first, value));
            Some(BlkioEntry {
                major: major.parse().ok()?,
                minor: minor.parse().ok()?,
                op: op.to_owned(),
                value: value.parse().ok()?,
            })
        })
        .collect()
}

fn hugetlb(directory: &Path) -> Vec<HugetlbStats> {
    names_between(directory, "hugetlb.", ".usage_in_bytes")
        .into_iter()
        .map(|page_size| {
            let number = |what: &str| read_number(directory, &format!("hugetlb.{page_size}.{what}"));
            HugetlbStats {
                usage: number("usage_in_bytes").unwrap_or(0),
                max: number("max_usage_in_bytes").unwrap_or(0),
                limit: number("limit_in_bytes").unwrap_or(0),
                failures: number("failcnt").unwrap_or(0),
                reserved: number("rsvd.usage_in_bytes").map(|usage| MemoryCounter {
                    usage,
                    max_usage: number("rsvd.max_usage_in_bytes").unwrap_or(0),
                    limit: number("rsvd.limit_in_bytes").unwrap_or(0),
                    failures: number("rsvd.failcnt").unwrap_or(0),
                }),
                page_size,
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_processors_are_spelled_out() {
        assert_eq!(numbers("0-2,5"), [0, 1, 2, 5]);
        assert!(numbers("").is_empty());
        assert_eq!(numbers("7"), [7]);
    }

    #[test]
    fn counts_of_devices_are_read_with_and_without_an_operation() {
        let entries = blkio_entries("8:0 Read 4096\n8:0 Total 4096\n8:16 17\nTotal 4113\n");
        assert_eq!(entries[0], BlkioEntry { major: 8, minor: 0, op: "Read".into(), value: 4096 });
        assert_eq!(entries[2], BlkioEntry { major: 8, minor: 16, op: String::new(), value: 17 });
        assert_eq!(entries.len(), 3);
    }

    #[test]
    fn pages_are_counted_by_node() {
        let rows = numa("total=5 N0=3 N1=2\nhierarchical_total=6 N0=6 N1=0\nnumbers without a name\n");
        assert_eq!(rows[0], NumaRow { name: "total".into(), total: 5, nodes: vec![(0, 3), (1, 2)] });
        assert_eq!((rows[1].name.as_str(), rows.len()), ("hierarchical_total", 2));
    }

    #[test]
    fn processor_time_is_divided_by_mode() {
        assert_eq!(cpu_modes("cpu user system\n0 10 20\n1 30 40\n"), (vec![10, 30], vec![20, 40]));
    }
}
