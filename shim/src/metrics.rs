//! Statistics as containerd's metrics messages.

use containerd_shim_protos::cgroups::metrics as v1;
use containerd_shim_protos::cgroups_v2::metrics as v2;
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use runx_core::cgroup::{Blkio, BlkioEntry, MemoryCounter, MemoryStats, Pressure, PressureLine, RdmaEntry, Stats};

use crate::events::any;

/// The message that fits the cgroup version.
pub(crate) fn message(stats: &Stats) -> Any {
    if stats.unified { any(&version_2(stats)) } else { any(&version_1(stats)) }
}

fn version_1(stats: &Stats) -> v1::Metrics {
    let mut out = v1::Metrics::new();
    if let Some(pids) = stats.pids {
        // No limit is 0 here, and the largest number in version 2's message.
        let limit = pids.limit.unwrap_or(0);
        out.pids = MessageField::some(v1::PidsStat { current: pids.current, limit, ..Default::default() });
    }
    if let Some(cpu) = &stats.cpu {
        out.cpu = MessageField::some(v1::CPUStat {
            usage: MessageField::some(v1::CPUUsage {
                total: cpu.total,
                kernel: cpu.system,
                user: cpu.user,
                per_cpu: cpu.per_cpu.clone(),
                ..Default::default()
            }),
            throttling: MessageField::some(v1::Throttle {
                periods: cpu.periods,
                throttled_periods: cpu.throttled_periods,
                throttled_time: cpu.throttled_time,
                ..Default::default()
            }),
            ..Default::default()
        });
    }
    if let Some(memory) = &stats.memory {
        out.memory = MessageField::some(memory_1(memory));
        out.memory_oom_control = MessageField::some(v1::MemoryOomControl {
            oom_kill_disable: memory.oom_kill_disabled.into(),
            under_oom: memory.under_oom.into(),
            oom_kill: memory.oom_kills,
            ..Default::default()
        });
    }
    if let Some(blkio) = &stats.blkio {
        let entries = |list: &[BlkioEntry]| {
            list.iter()
                .map(|entry| v1::BlkIOEntry {
                    op: entry.op.clone(),
                    device: device_name(entry.major, entry.minor),
                    major: entry.major,
                    minor: entry.minor,
                    value: entry.value,
                    ..Default::default()
                })
                .collect()
        };
        out.blkio = MessageField::some(v1::BlkIOStat {
            io_service_bytes_recursive: entries(&blkio.service_bytes),
            io_serviced_recursive: entries(&blkio.serviced),
            io_queued_recursive: entries(&blkio.queued),
            io_service_time_recursive: entries(&blkio.service_time),
            io_wait_time_recursive: entries(&blkio.wait_time),
            io_merged_recursive: entries(&blkio.merged),
            io_time_recursive: entries(&blkio.time),
            sectors_recursive: entries(&blkio.sectors),
            ..Default::default()
        });
    }
    if let Some(rdma) = &stats.rdma {
        let entries = |list: &[RdmaEntry]| {
            list.iter()
                .map(|entry| v1::RdmaEntry {
                    device: entry.device.clone(),
                    hca_handles: entry.handles,
                    hca_objects: entry.objects,
                    ..Default::default()
                })
                .collect()
        };
        out.rdma = MessageField::some(v1::RdmaStat {
            current: entries(&rdma.current),
            limit: entries(&rdma.limit),
            ..Default::default()
        });
    }
    out.hugetlb = stats
        .hugetlb
        .iter()
        .map(|huge| v1::HugetlbStat {
            usage: huge.usage,
            max: huge.max,
            failcnt: huge.failures,
            pagesize: huge.page_size.clone(),
            ..Default::default()
        })
        .collect();
    out
}

fn memory_1(memory: &MemoryStats) -> v1::MemoryStat {
    let row = |name| memory.row(name);
    let entry = |counter: MemoryCounter| v1::MemoryEntry {
        usage: counter.usage,
        limit: counter.limit,
        max: counter.max_usage,
        failcnt: counter.failures,
        ..Default::default()
    };
    v1::MemoryStat {
        cache: row("cache"),
        rss: row("rss"),
        rss_huge: row("rss_huge"),
        mapped_file: row("mapped_file"),
        dirty: row("dirty"),
        writeback: row("writeback"),
        pg_pg_in: row("pgpgin"),
        pg_pg_out: row("pgpgout"),
        pg_fault: row("pgfault"),
        pg_maj_fault: row("pgmajfault"),
        inactive_anon: row("inactive_anon"),
        active_anon: row("active_anon"),
        inactive_file: row("inactive_file"),
        active_file: row("active_file"),
        unevictable: row("unevictable"),
        hierarchical_memory_limit: row("hierarchical_memory_limit"),
        hierarchical_swap_limit: row("hierarchical_memsw_limit"),
        total_cache: row("total_cache"),
        total_rss: row("total_rss"),
        total_rss_huge: row("total_rss_huge"),
        total_mapped_file: row("total_mapped_file"),
        total_dirty: row("total_dirty"),
        total_writeback: row("total_writeback"),
        total_pg_pg_in: row("total_pgpgin"),
        total_pg_pg_out: row("total_pgpgout"),
        total_pg_fault: row("total_pgfault"),
        total_pg_maj_fault: row("total_pgmajfault"),
        total_inactive_anon: row("total_inactive_anon"),
        total_active_anon: row("total_active_anon"),
        total_inactive_file: row("total_inactive_file"),
        total_active_file: row("total_active_file"),
        total_unevictable: row("total_unevictable"),
        usage: MessageField::some(entry(memory.usage)),
        swap: memory.swap.map(entry).into(),
        kernel: memory.kernel.map(entry).into(),
        kernel_tcp: memory.kernel_tcp.map(entry).into(),
        ..Default::default()
    }
}

/// The path of a block device, as containerd looks it up in /proc/partitions; empty if it is not there.
fn device_name(major: u64, minor: u64) -> String {
    std::fs::read_link(format!("/sys/dev/block/{major}:{minor}"))
        .ok()
        .and_then(|link| Some(format!("/dev/{}", link.file_name()?.to_str()?.replace('!', "/"))))
        .unwrap_or_default()
}

fn version_2(stats: &Stats) -> v2::Metrics {
    let mut out = v2::Metrics::new();
    if let Some(pids) = stats.pids {
        let limit = pids.limit.unwrap_or(u64::MAX);
        out.pids = MessageField::some(v2::PidsStat { current: pids.current, limit, ..Default::default() });
    }
    if let Some(cpu) = &stats.cpu {
        out.cpu = MessageField::some(v2::CPUStat {
            usage_usec: cpu.total / 1000,
            user_usec: cpu.user / 1000,
            system_usec: cpu.system / 1000,
            nr_periods: cpu.periods,
            nr_throttled: cpu.throttled_periods,
            throttled_usec: cpu.throttled_time / 1000,
            nr_bursts: cpu.bursts,
            burst_usec: cpu.burst_time / 1000,
            psi: cpu.pressure.map(pressure).into(),
            ..Default::default()
        });
    }
    if let Some(memory) = &stats.memory {
        out.memory = MessageField::some(memory_2(memory));
        out.memory_events = MessageField::some(v2::MemoryEvents {
            low: memory.event("low"),
            high: memory.event("high"),
            max: memory.event("max"),
            oom: memory.event("oom"),
            oom_kill: memory.event("oom_kill"),
            oom_group_kill: memory.event("oom_group_kill"),
            ..Default::default()
        });
    }
    if let Some(blkio) = &stats.blkio {
        out.io = MessageField::some(v2::IOStat {
            usage: io_2(blkio),
            psi: blkio.pressure.map(pressure).into(),
            ..Default::default()
        });
    }
    if let Some(rdma) = &stats.rdma {
        let entries = |list: &[RdmaEntry]| {
            list.iter()
                .map(|entry| v2::RdmaEntry {
                    device: entry.device.clone(),
                    hca_handles: entry.handles,
                    hca_objects: entry.objects,
                    ..Default::default()
                })
                .collect()
        };
        out.rdma = MessageField::some(v2::RdmaStat {
            current: entries(&rdma.current),
            limit: entries(&rdma.limit),
            ..Default::default()
        });
    }
    out.hugetlb = stats
        .hugetlb
        .iter()
        .map(|huge| v2::HugeTlbStat {
            current: huge.usage,
            max: huge.limit,
            failcnt: huge.failures,
            pagesize: huge.page_size.clone(),
            ..Default::default()
        })
        .collect();
    out
}

fn memory_2(memory: &MemoryStats) -> v2::MemoryStat {
    let row = |name| memory.row(name);
    let swap = memory.swap.unwrap_or_default();
    v2::MemoryStat {
        anon: row("anon"),
        file: row("file"),
        kernel_stack: row("kernel_stack"),
        slab: row("slab"),
        sock: row("sock"),
        shmem: row("shmem"),
        file_mapped: row("file_mapped"),
        file_dirty: row("file_dirty"),
        file_writeback: row("file_writeback"),
        anon_thp: row("anon_thp"),
        inactive_anon: row("inactive_anon"),
        active_anon: row("active_anon"),
        inactive_file: row("inactive_file"),
        active_file: row("active_file"),
        unevictable: row("unevictable"),
        slab_reclaimable: row("slab_reclaimable"),
        slab_unreclaimable: row("slab_unreclaimable"),
        pgfault: row("pgfault"),
        pgmajfault: row("pgmajfault"),
        workingset_refault: row("workingset_refault_anon") + row("workingset_refault_file"),
        workingset_activate: row("workingset_activate_anon") + row("workingset_activate_file"),
        workingset_nodereclaim: row("workingset_nodereclaim"),
        pgrefill: row("pgrefill"),
        pgscan: row("pgscan"),
        pgsteal: row("pgsteal"),
        pgactivate: row("pgactivate"),
        pgdeactivate: row("pgdeactivate"),
        pglazyfree: row("pglazyfree"),
        pglazyfreed: row("pglazyfreed"),
        thp_fault_alloc: row("thp_fault_alloc"),
        thp_collapse_alloc: row("thp_collapse_alloc"),
        usage: memory.usage.usage,
        usage_limit: memory.usage.limit,
        max_usage: memory.usage.max_usage,
        swap_usage: swap.usage,
        swap_limit: swap.limit,
        swap_max_usage: swap.max_usage,
        psi: memory.pressure.map(pressure).into(),
        ..Default::default()
    }
}

fn pressure(pressure: Pressure) -> v2::PSIStats {
    let line = |line: PressureLine| {
        MessageField::some(v2::PSIData {
            avg10: line.avg10,
            avg60: line.avg60,
            avg300: line.avg300,
            total: line.total,
            ..Default::default()
        })
    };
    v2::PSIStats { some: line(pressure.some), full: line(pressure.full), ..Default::default() }
}

fn io_2(blkio: &Blkio) -> Vec<v2::IOEntry> {
    let mut out: Vec<v2::IOEntry> = Vec::new();
    let lists = [(&blkio.service_bytes, true), (&blkio.serviced, false)];
    for (entry, bytes) in lists.into_iter().flat_map(|(list, bytes)| list.iter().map(move |entry| (entry, bytes))) {
        let position = out.iter().position(|known| known.major == entry.major && known.minor == entry.minor);
        let position = position.unwrap_or_else(|| {
            out.push(v2::IOEntry { major: entry.major, minor: entry.minor, ..Default::default() });
            out.len() - 1
        });
        let target = &mut out[position];
        match (entry.op.as_str(), bytes) {
            ("Read", true) => target.rbytes = entry.value,
            ("Write", true) => target.wbytes = entry.value,
            ("Read", false) => target.rios = entry.value,
            ("Write", false) => target.wios = entry.value,
            _ => {}
        }
    }
    out
}
