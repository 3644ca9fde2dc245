//! cgroup version 2: one tree.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources};

use super::stats::{Blkio, BlkioEntry, CpuStats, HugetlbStats, MemoryStats, PidsStats, Stats};
use super::{read, read_number, read_pairs, refuse_occupied, write};
use crate::error::{Context, Error, Result};

const ROOT: &str = "/sys/fs/cgroup";

pub(super) fn create(path: &Path) -> Result<()> {
    let mut missing: Vec<PathBuf> = Vec::new();
    for ancestor in path.ancestors().take_while(|ancestor| ancestor.starts_with(ROOT)) {
        missing.push(ancestor.to_path_buf());
    }
    let controllers = read(Path::new(ROOT), "cgroup.controllers").on("read the controllers of", ROOT)?;
    let enable: String = controllers.split_ascii_whitespace().map(|c| format!("+{c}")).collect::<Vec<_>>().join(" ");
    for directory in missing.iter().rev() {
        match fs::create_dir(directory) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                if directory == path {
                    refuse_occupied(directory)?;
                }
            }
            Err(e) => return Err(e).on("create cgroup", directory),
        }
        if directory != path && fs::write(directory.join("cgroup.subtree_control"), &enable).is_err() {
            // All at once fails if one cannot be had; what can is enabled, and a limit whose controller
            // is missing fails by name when it is set.
            for controller in enable.split_ascii_whitespace() {
                let _ = fs::write(directory.join("cgroup.subtree_control"), controller);
            }
        }
    }
    Ok(())
}

pub(super) fn apply(path: &Path, resources: &LinuxResources) -> Result<()> {
    if let Some(memory) = resources.memory() {
        apply_memory(path, memory)?;
    }
    if let Some(cpu) = resources.cpu() {
        apply_cpu(path, cpu)?;
    }
    if let Some(pids) = resources.pids()
        && pids.limit() != 0
    {
        let value = if pids.limit() < 0 { "max".to_owned() } else { pids.limit().to_string() };
        write(path, "pids.max", value)?;
    }
    if let Some(block) = resources.block_io() {
        apply_block_io(path, block)?;
    }
    for limit in resources.hugepage_limits().iter().flatten() {
        write(path, &format!("hugetlb.{}.max", limit.page_size()), limit.limit().to_string())?;
    }
    if let Some(network) = resources.network()
        && (network.class_id().is_some_and(|id| id != 0)
            || network.priorities().as_ref().is_some_and(|p| !p.is_empty()))
    {
        return Err(Error::unsupported("linux.resources.network", "net_cls and net_prio exist in cgroup v1 only"));
    }
    for (device, limits) in resources.rdma().iter().flatten() {
        let number = |n: Option<u32>| n.map_or("max".to_owned(), |n| n.to_string());
        let line =
            format!("{device} hca_handle={} hca_object={}", number(limits.hca_handles()), number(limits.hca_objects()));
        write(path, "rdma.max", line)?;
    }
    for (file, value) in resources.unified().iter().flatten() {
        if file.contains('/') || file.starts_with("cgroup.") {
            return Err(Error::spec(format!("linux.resources.unified: {file:?} is not the name of a resource file")));
        }
        write(path, file, value)?;
    }
    Ok(())
}

fn limit_text(value: i64) -> String {
    if value < 0 { "max".to_owned() } else { value.to_string() }
}

fn apply_memory(path: &Path, memory: &LinuxMemory) -> Result<()> {
    let limit = memory.limit().filter(|limit| *limit != 0);
    super::check_before_update(path, "memory.current", memory)?;
    if limit == Some(-1) && memory.swap().is_none() && path.join("memory.swap.max").exists() {
        write(path, "memory.swap.max", "max")?;
    }
    if let Some(swap) = memory.swap().filter(|swap| *swap != 0) {
        // The spec counts memory and swap together, version 2 swap alone.
        let alone = match limit {
            _ if swap < 0 => -1,
            Some(limit) if limit > 0 && swap >= limit => swap - limit,
            Some(limit) if limit > 0 => {
                return Err(Error::spec(format!("linux.resources.memory.swap {swap} is less than limit {limit}")));
            }
            _ => return Err(Error::spec("linux.resources.memory.swap needs a memory limit".to_owned())),
        };
        let file = "memory.swap.max";
        // Without swap in the kernel there is none to limit.
        if path.join(file).exists() || alone > 0 {
            write(path, file, limit_text(alone))?;
        }
    }
    if let Some(limit) = limit {
        write(path, "memory.max", limit_text(limit))?;
    }
    if let Some(reservation) = memory.reservation().filter(|reservation| *reservation != 0) {
        write(path, "memory.low", limit_text(reservation))?;
    }
    if memory.disable_oom_killer() == Some(true) {
        return Err(Error::unsupported("linux.resources.memory.disableOOMKiller", "cgroup v2 has no such switch"));
    }
    if memory.swappiness().is_some() {
        return Err(Error::unsupported("linux.resources.memory.swappiness", "cgroup v2 has no such setting"));
    }
    Ok(())
}

/// `cpu.shares` (2 to 262144, 1024 by default) as `cpu.weight` (1 to 10000, 100 by default), by the
/// curve that maps both ends and the default onto each other, as runc and crun do.
fn weight_from_shares(shares: u64) -> u64 {
    if shares <= 2 {
        return 1;
    }
    if shares >= 262_144 {
        return 10_000;
    }
    let log = (shares as f64).log2();
    let exponent = (log * log + 125.0 * log) / 612.0 - 7.0 / 34.0;
    10f64.powf(exponent).ceil() as u64
}

fn apply_cpu(path: &Path, cpu: &LinuxCpu) -> Result<()> {
    if let Some(idle) = cpu.idle() {
        write(path, "cpu.idle", idle.to_string())?;
    }
    if cpu.idle() != Some(1)
        && let Some(shares) = cpu.shares().filter(|shares| *shares != 0)
    {
        write(path, "cpu.weight", weight_from_shares(shares).to_string())?;
    }
    let burst = cpu.burst();
    if burst.is_some() {
        write(path, "cpu.max.burst", "0")?;
    }
    let quota = cpu.quota().filter(|quota| *quota != 0);
    let period = cpu.period().filter(|period| *period != 0);
    if quota.is_some() || period.is_some() {
        let quota = match quota {
            Some(quota) if quota > 0 => quota.to_string(),
            Some(_) => "max".to_owned(),
            // The period alone keeps the quota in force.
            None => read(path, "cpu.max")
                .ok()
                .and_then(|text| text.split_ascii_whitespace().next().map(str::to_owned))
                .unwrap_or_else(|| "max".to_owned()),
        };
        let value = match period {
            Some(period) => format!("{quota} {period}"),
            None => quota,
        };
        write(path, "cpu.max", value)?;
    }
    if let Some(burst) = burst.filter(|burst| *burst != 0) {
        write(path, "cpu.max.burst", burst.to_string())?;
    }
    if cpu.realtime_period().is_some_and(|v| v != 0) || cpu.realtime_runtime().is_some_and(|v| v != 0) {
        return Err(Error::unsupported("linux.resources.cpu.realtimeRuntime", "cgroup v2 has no real-time limits"));
    }
    for (file, value) in [("cpuset.cpus", cpu.cpus()), ("cpuset.mems", cpu.mems())] {
        if let Some(value) = value.as_deref().filter(|value| !value.is_empty()) {
            write(path, file, value)?;
        }
    }
    Ok(())
}

fn apply_block_io(path: &Path, block: &LinuxBlockIo) -> Result<()> {
    if let Some(weight) = block.weight().filter(|weight| *weight != 0) {
        if path.join("io.bfq.weight").exists() {
            write(path, "io.bfq.weight", weight.to_string())?;
        } else {
            // 10 to 1000 onto 1 to 10000.
            let weight = 1 + (u64::from(weight).saturating_sub(10)) * 9999 / 990;
            write(path, "io.weight", weight.to_string())?;
        }
    }
    for device in block.weight_device().iter().flatten() {
        if let Some(weight) = device.weight() {
            let line = format!("{}:{} {weight}", device.major(), device.minor());
            write(path, if path.join("io.bfq.weight").exists() { "io.bfq.weight" } else { "io.weight" }, line)?;
        }
    }
    if block.leaf_weight().is_some_and(|weight| weight != 0) {
        return Err(Error::unsupported("linux.resources.blockIO.leafWeight", "cgroup v2 has no leaf weights"));
    }
    let throttles = [
        ("rbps", block.throttle_read_bps_device()),
        ("wbps", block.throttle_write_bps_device()),
        ("riops", block.throttle_read_iops_device()),
        ("wiops", block.throttle_write_iops_device()),
    ];
    for (name, devices) in throttles {
        for device in devices.iter().flatten() {
            write(path, "io.max", format!("{}:{} {name}={}", device.major(), device.minor(), device.rate()))?;
        }
    }
    Ok(())
}

pub(super) fn set_frozen(path: &Path, frozen: bool) -> Result<()> {
    write(path, "cgroup.freeze", if frozen { "1" } else { "0" })?;
    let wanted = u64::from(frozen);
    for _ in 0..2000 {
        let events = read_pairs(path, "cgroup.events");
        if events.iter().any(|(key, value)| key == "frozen" && *value == wanted) {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    if frozen {
        let _ = write(path, "cgroup.freeze", "0");
    }
    Err(io::Error::from_raw_os_error(libc::ETIMEDOUT)).on(if frozen { "freeze cgroup" } else { "thaw cgroup" }, path)
}

pub(super) fn is_frozen(path: &Path) -> bool {
    read(path, "cgroup.freeze").is_ok_and(|state| state == "1")
}

pub(super) fn stats(path: &Path) -> Result<Stats> {
    fs::metadata(path).on("read statistics of cgroup", path)?;
    let cpu = read_pairs(path, "cpu.stat");
    let row = |name: &str| cpu.iter().find(|(key, _)| key == name).map_or(0, |(_, value)| *value) * 1000;
    let count = |name: &str| cpu.iter().find(|(key, _)| key == name).map_or(0, |(_, value)| *value);
    Ok(Stats {
        cpu: Some(CpuStats {
            total: row("usage_usec"),
            system: row("system_usec"),
            user: row("user_usec"),
            per_cpu: Vec::new(),
            periods: count("nr_periods"),
            throttled_periods: count("nr_throttled"),
            throttled_time: row("throttled_usec"),
        }),
        memory: read_number(path, "memory.current").map(|usage| memory_stats(path, usage)),
        pids: read_number(path, "pids.current").map(|current| PidsStats {
            current,
            limit: read_number(path, "pids.max").filter(|max| *max != u64::MAX).unwrap_or(0),
        }),
        blkio: Some(io_stats(path)),
        hugetlb: hugetlb_stats(path),
    })
}

fn memory_stats(path: &Path, usage: u64) -> MemoryStats {
    let events = read_pairs(path, "memory.events");
    MemoryStats {
        usage,
        max_usage: read_number(path, "memory.peak").unwrap_or(0),
        limit: read_number(path, "memory.max").unwrap_or(u64::MAX),
        failures: events.iter().find(|(key, _)| key == "max").map_or(0, |(_, value)| *value),
        swap_usage: read_number(path, "memory.swap.current"),
        swap_limit: read_number(path, "memory.swap.max").unwrap_or(u64::MAX),
        swap_max_usage: read_number(path, "memory.swap.peak").unwrap_or(0),
        swap_failures: 0,
        oom_kills: events.iter().find(|(key, _)| key == "oom_kill").map_or(0, |(_, value)| *value),
        table: read_pairs(path, "memory.stat"),
        events,
    }
}

fn io_stats(path: &Path) -> Blkio {
    let mut out = Blkio::default();
    for line in read(path, "io.stat").unwrap_or_default().lines() {
        let mut fields = line.split_ascii_whitespace();
        let Some((major, minor)) = fields.next().and_then(|number| number.split_once(':')) else { continue };
        let (Ok(major), Ok(minor)) = (major.parse(), minor.parse()) else { continue };
        for (key, value) in fields.filter_map(|field| field.split_once('=')) {
            let (list, op) = match key {
                "rbytes" => (&mut out.service_bytes, "Read"),
                "wbytes" => (&mut out.service_bytes, "Write"),
                "rios" => (&mut out.serviced, "Read"),
                "wios" => (&mut out.serviced, "Write"),
                _ => continue,
            };
            if let Ok(value) = value.parse() {
                list.push(BlkioEntry { major, minor, op: op.to_owned(), value });
            }
        }
    }
    out
}

fn hugetlb_stats(path: &Path) -> Vec<HugetlbStats> {
    let mut all = Vec::new();
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(page_size) = name
            .strip_prefix("hugetlb.")
            .and_then(|rest| rest.strip_suffix(".current"))
            .filter(|size| !size.contains('.'))
        else {
            continue;
        };
        let events = read_pairs(path, &format!("hugetlb.{page_size}.events"));
        all.push(HugetlbStats {
            page_size: page_size.to_owned(),
            usage: read_number(path, &name).unwrap_or(0),
            max: 0,
            failures: events.iter().find(|(key, _)| key == "max").map_or(0, |(_, value)| *value),
        });
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_map_onto_weights_at_both_ends_and_the_default() {
        assert_eq!(weight_from_shares(2), 1);
        assert_eq!(weight_from_shares(1024), 100);
        assert_eq!(weight_from_shares(262_144), 10_000);
    }
}
