//! The limits of version 2, converted from those of the runtime-spec where it speaks of version 1.

use std::path::Path;

use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources};

use crate::cgroup::convert::{
    check_before_update, io_weight, limit_text, pids_max, rdma_line, swap_alone, swappiness, warn_kernel_memory,
    weight_from_shares,
};
use crate::cgroup::files::{exists, read, try_write};
use crate::error::{Error, Result};

/// Files of the group that are no limits. Writing to some of them would move, stop or end processes.
const NO_RESOURCES: &[&str] =
    &["cgroup.procs", "cgroup.threads", "cgroup.kill", "cgroup.freeze", "cgroup.type", "cgroup.subtree_control"];

/// Writes one setting. If there is no such file, the error tells whether its controller is missing.
fn write(path: &Path, file: &str, value: impl AsRef<str>) -> Result<()> {
    let value = value.as_ref();
    try_write(path, file, value).map_err(|e| {
        let mut what = format!("write {value:?} to {}", path.join(file).display());
        if e.kind() == std::io::ErrorKind::NotFound
            && let Some((controller, _)) = file.split_once('.')
            && controller != "cgroup"
            && let Ok(has) = read(path, "cgroup.controllers")
            && !has.split_ascii_whitespace().any(|has| has == controller)
        {
            what.push_str(&format!(" (the group has not got the controller {controller:?}, only {has:?})"));
        }
        Error::system(what, e)
    })
}

pub(in crate::cgroup) fn apply(path: &Path, resources: &LinuxResources) -> Result<()> {
    if let Some(memory) = resources.memory() {
        apply_memory(path, memory)?;
    }
    if let Some(cpu) = resources.cpu() {
        apply_cpu(path, cpu)?;
    }
    if let Some(pids) = resources.pids() {
        write(path, "pids.max", pids_max(pids).map_or("max".to_owned(), |max| max.to_string()))?;
    }
    if let Some(block) = resources.block_io() {
        apply_block_io(path, block)?;
    }
    for limit in resources.hugepage_limits().iter().flatten() {
        let file = |kind: &str| format!("hugetlb.{}{kind}.max", limit.page_size());
        write(path, &file(""), limit.limit().to_string())?;
        // Reservations are accounted for since Linux 5.7.
        if exists(path, &file(".rsvd")) {
            write(path, &file(".rsvd"), limit.limit().to_string())?;
        }
    }
    if let Some(network) = resources.network()
        && (network.class_id().is_some_and(|id| id != 0)
            || network.priorities().as_ref().is_some_and(|p| !p.is_empty()))
    {
        return Err(Error::unsupported("linux.resources.network", "net_cls and net_prio exist in cgroup v1 only"));
    }
    for (device, limits) in resources.rdma().iter().flatten() {
        write(path, "rdma.max", rdma_line(device, limits)?)?;
    }
    for (file, value) in resources.unified().iter().flatten() {
        apply_unified(path, file, value)?;
    }
    Ok(())
}

/// Refuses what is not the name of a limit's file.
pub(in crate::cgroup) fn check_unified(file: &str) -> Result<()> {
    let bad = |why: &str| Err(Error::spec(format!("linux.resources.unified: {file:?} {why}")));
    match file.split_once('.') {
        _ if file.contains('/') => bad("must be a file name (no slashes)"),
        None | Some(("", _) | (_, "")) => bad("must be in the form CONTROLLER.PARAMETER"),
        _ if NO_RESOURCES.contains(&file) => bad("is not a limit"),
        _ => Ok(()),
    }
}

/// The kernel takes one line at a time.
fn apply_unified(path: &Path, file: &str, value: &str) -> Result<()> {
    check_unified(file)?;
    if value.trim().is_empty() {
        return write(path, file, value);
    }
    value.lines().filter(|line| !line.trim().is_empty()).try_for_each(|line| write(path, file, line))
}

fn apply_memory(path: &Path, memory: &LinuxMemory) -> Result<()> {
    const SWAP: &str = "memory.swap.max";
    check_before_update(path, "memory.current", memory)?;
    if let Some(swap) = swap_alone(memory)?
        // Where the kernel has no swap there is none to limit.
        && (swap > 0 || exists(path, SWAP))
    {
        write(path, SWAP, limit_text(swap))?;
    }
    if let Some(limit) = memory.limit().filter(|limit| *limit != 0) {
        write(path, "memory.max", limit_text(limit))?;
    }
    if let Some(reservation) = memory.reservation().filter(|reservation| *reservation != 0) {
        write(path, "memory.low", limit_text(reservation))?;
    }
    // The accessor is marked as deprecated because the limit is.
    #[allow(deprecated)]
    let kernel = memory.kernel();
    for (field, value) in [("kernel", kernel), ("kernelTCP", memory.kernel_tcp())] {
        if let Some(value) = value.filter(|value| *value > 0) {
            warn_kernel_memory(field, value);
        }
    }
    let none = |field: &str| {
        Err(Error::unsupported(format!("linux.resources.memory.{field}"), "cgroup v2 has no such setting"))
    };
    if memory.disable_oom_killer() == Some(true) {
        return none("disableOOMKiller");
    }
    if memory.use_hierarchy() == Some(false) {
        return none("useHierarchy");
    }
    if swappiness(memory)?.is_some() {
        return none("swappiness");
    }
    Ok(())
}

fn apply_cpu(path: &Path, cpu: &LinuxCpu) -> Result<()> {
    if let Some(idle) = cpu.idle() {
        write(path, "cpu.idle", idle.to_string())?;
    }
    // An idle group has no weight of its own.
    if let Some(shares) = cpu.shares().filter(|shares| *shares != 0 && cpu.idle() != Some(1)) {
        write(path, "cpu.weight", weight_from_shares(shares).to_string())?;
    }
    let burst = cpu.burst();
    // A quota below the old burst is refused, so that is taken back first.
    if burst.is_some() {
        write(path, "cpu.max.burst", "0")?;
    }
    let quota = cpu.quota().filter(|quota| *quota != 0);
    let period = cpu.period().filter(|period| *period != 0);
    if quota.is_some() || period.is_some() {
        let quota = match quota {
            Some(quota) => limit_text(quota),
            // The period alone keeps the quota in force.
            None => read(path, "cpu.max")
                .ok()
                .and_then(|text| text.split_ascii_whitespace().next().map(str::to_owned))
                .unwrap_or_else(|| "max".to_owned()),
        };
        write(path, "cpu.max", period.map_or(quota.clone(), |period| format!("{quota} {period}")))?;
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
    if block.leaf_weight().is_some_and(|weight| weight != 0)
        || block.weight_device().iter().flatten().any(|device| device.leaf_weight().is_some_and(|weight| weight != 0))
    {
        return Err(Error::unsupported("linux.resources.blockIO.leafWeight", "cgroup v2 has no leaf weights"));
    }
    // BFQ's weights are version 1's; the cost model's have another range.
    let set_weight = |device: &str, weight: u16| {
        if exists(path, "io.bfq.weight") {
            write(path, "io.bfq.weight", format!("{device}{weight}"))
        } else {
            write(path, "io.weight", format!("{device}{}", io_weight(weight)))
        }
    };
    if let Some(weight) = block.weight().filter(|weight| *weight != 0) {
        set_weight("", weight)?;
    }
    for device in block.weight_device().iter().flatten() {
        if let Some(weight) = device.weight().filter(|weight| *weight != 0) {
            set_weight(&format!("{}:{} ", device.major(), device.minor()), weight)?;
        }
    }
    let throttles = [
        ("rbps", block.throttle_read_bps_device()),
        ("wbps", block.throttle_write_bps_device()),
        ("riops", block.throttle_read_iops_device()),
        ("wiops", block.throttle_write_iops_device()),
    ];
    for (name, devices) in throttles {
        for device in devices.iter().flatten() {
            // In version 1 no rate is no limit.
            let rate = if device.rate() == 0 { "max".to_owned() } else { device.rate().to_string() };
            write(path, "io.max", format!("{}:{} {name}={rate}", device.major(), device.minor()))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_limits_are_written_to() {
        for good in ["memory.high", "io.max", "hugetlb.2MB.max", "cgroup.max.depth"] {
            assert!(check_unified(good).is_ok(), "{good}");
        }
        for bad in ["memory/high", "../memory.high", "memory", ".max", "memory.", "cgroup.procs", "cgroup.kill"] {
            assert!(check_unified(bad).is_err(), "{bad}");
        }
    }
}
