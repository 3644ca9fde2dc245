//! The limits of version 1, in an order that the kernel accepts.

use std::path::Path;

use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources};

use super::{find, need};
use crate::cgroup::Directory;
use crate::cgroup::convert::{check_before_update, pids_max, rdma_line, swappiness, warn_kernel_memory};
use crate::cgroup::files::{exists, pair, read_number, read_pairs, try_write, write};
use crate::error::{Error, Result};

pub(in crate::cgroup) fn apply(directories: &[Directory], resources: &LinuxResources) -> Result<()> {
    if resources.unified().as_ref().is_some_and(|unified| !unified.is_empty()) {
        return Err(Error::unsupported("linux.resources.unified", "this machine has cgroup v1"));
    }
    if let Some(memory) = resources.memory().as_ref().filter(|memory| **memory != LinuxMemory::default()) {
        apply_memory(need(directories, "memory", "memory")?, memory)?;
    }
    if let Some(cpu) = resources.cpu() {
        apply_cpu(directories, cpu)?;
        apply_cpuset(directories, cpu)?;
    }
    if let Some(pids) = resources.pids() {
        let max = pids_max(pids).map_or("max".to_owned(), |max| max.to_string());
        write(need(directories, "pids", "pids")?, "pids.max", max)?;
    }
    if let Some(block) = resources.block_io().as_ref().filter(|block| **block != LinuxBlockIo::default()) {
        apply_block_io(need(directories, "blkio", "blockIO")?, block)?;
    }
    for limit in resources.hugepage_limits().iter().flatten() {
        let directory = need(directories, "hugetlb", "hugepageLimits")?;
        let file = |kind: &str| format!("hugetlb.{}{kind}.limit_in_bytes", limit.page_size());
        write(directory, &file(""), limit.limit().to_string())?;
        // Reservations are accounted for since Linux 5.7.
        if exists(directory, &file(".rsvd")) {
            write(directory, &file(".rsvd"), limit.limit().to_string())?;
        }
    }
    if let Some(network) = resources.network() {
        if let Some(class) = network.class_id()
            && (class != 0 || find(directories, "net_cls").is_some())
        {
            write(need(directories, "net_cls", "network.classID")?, "net_cls.classid", class.to_string())?;
        }
        for priority in network.priorities().iter().flatten() {
            let directory = need(directories, "net_prio", "network.priorities")?;
            write(directory, "net_prio.ifpriomap", format!("{} {}", priority.name(), priority.priority()))?;
        }
    }
    for (device, limits) in resources.rdma().iter().flatten() {
        write(need(directories, "rdma", "rdma")?, "rdma.max", rdma_line(device, limits)?)?;
    }
    Ok(())
}

fn apply_memory(directory: &Path, memory: &LinuxMemory) -> Result<()> {
    const RESERVATION: &str = "memory.soft_limit_in_bytes";
    check_before_update(directory, "memory.usage_in_bytes", memory)?;
    // Only an empty group can change this, and what comes later is accounted for under it.
    if let Some(hierarchical) = memory.use_hierarchy() {
        let wanted = u64::from(hierarchical);
        if read_number(directory, "memory.use_hierarchy") != Some(wanted) {
            write(directory, "memory.use_hierarchy", wanted.to_string())?;
        }
    }
    apply_memory_and_swap(directory, memory)?;
    // 0 is what engines write for "not set".
    if let Some(reservation) = memory.reservation().filter(|value| *value != 0) {
        write(directory, RESERVATION, reservation.to_string())?;
    }
    // The accessor is marked as deprecated because the limit is.
    #[allow(deprecated)]
    let kernel = memory.kernel();
    for (field, file, value) in [
        ("kernel", "memory.kmem.limit_in_bytes", kernel),
        ("kernelTCP", "memory.kmem.tcp.limit_in_bytes", memory.kernel_tcp()),
    ] {
        if let Some(value) = value.filter(|value| *value != 0) {
            apply_kernel_memory(directory, field, file, value)?;
        }
    }
    if let Some(swappiness) = swappiness(memory)? {
        write(directory, "memory.swappiness", swappiness.to_string())?;
    }
    if let Some(disable) = memory.disable_oom_killer()
        && (disable || pair(&read_pairs(directory, "memory.oom_control"), "oom_kill_disable") != 0)
    {
        write(directory, "memory.oom_control", if disable { "1" } else { "0" })?;
    }
    Ok(())
}

fn apply_memory_and_swap(directory: &Path, memory: &LinuxMemory) -> Result<()> {
    const LIMIT: &str = "memory.limit_in_bytes";
    const SWAP: &str = "memory.memsw.limit_in_bytes";
    let accounted = exists(directory, SWAP);
    let limit = memory.limit().filter(|limit| *limit != 0);
    let swap = match memory.swap().filter(|swap| *swap != 0) {
        // No limit on memory alone means none on the sum either.
        None if limit.is_some_and(|limit| limit < 0) && accounted => Some(-1),
        // Where nothing is counted there is no limit.
        Some(swap) if swap < 0 && !accounted => None,
        Some(swap) if !accounted => {
            return Err(Error::unsupported(
                format!("linux.resources.memory.swap {swap}"),
                format!("this kernel does not account for swap: {} is not there", directory.join(SWAP).display()),
            ));
        }
        swap => swap,
    };
    let set_limit = || limit.map_or(Ok(()), |limit| write_limit(directory, LIMIT, limit));
    let set_swap = || swap.map_or(Ok(()), |swap| write_limit(directory, SWAP, swap));
    // The kernel holds memory and swap together to be at least memory, so what grows must grow first.
    let current = read_number(directory, LIMIT).unwrap_or(u64::MAX);
    if swap.is_some_and(|swap| swap < 0 || swap as u64 > current) {
        set_swap()?;
        set_limit()
    } else {
        set_limit()?;
        set_swap()
    }
}

/// A limit below what is in use is refused with EBUSY, once the kernel has tried to make room.
fn write_limit(directory: &Path, file: &str, value: i64) -> Result<()> {
    try_write(directory, file, &value.to_string()).map_err(|e| {
        let path = directory.join(file);
        let mut what = format!("write {value} to {}", path.display());
        if e.raw_os_error() == Some(libc::EBUSY) {
            let number = |name: &str| read_number(directory, name).unwrap_or(0);
            let (usage, peak) = (number("memory.usage_in_bytes"), number("memory.max_usage_in_bytes"));
            what.push_str(&format!(" (in use: {usage} bytes, at most so far: {peak})"));
        }
        Error::system(what, e)
    })
}

/// Newer kernels have the file and ignore what is written to it, so the value is read back.
fn apply_kernel_memory(directory: &Path, field: &str, file: &str, value: i64) -> Result<()> {
    const LARGEST_PAGE: u64 = 65_536;
    let gone = match try_write(directory, file, &value.to_string()) {
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::EOPNOTSUPP)) => true,
        Err(e) => return Err(Error::system(format!("write {value} to {}", directory.join(file).display()), e)),
        Ok(()) => read_number(directory, file).is_none_or(|now| now.abs_diff(value as u64) >= LARGEST_PAGE),
    };
    if gone && value > 0 {
        warn_kernel_memory(field, value);
    }
    Ok(())
}

fn apply_cpu(directories: &[Directory], cpu: &LinuxCpu) -> Result<()> {
    let directory = |field: &str| need(directories, "cpu", field);
    apply_realtime(&directory, cpu)?;
    // An idle group has no shares of its own.
    if cpu.idle() == Some(0) {
        write(directory("cpu.idle")?, "cpu.idle", "0")?;
    }
    if let Some(shares) = cpu.shares().filter(|shares| *shares != 0 && cpu.idle() != Some(1)) {
        let directory = directory("cpu.shares")?;
        write(directory, "cpu.shares", shares.to_string())?;
        // The kernel takes the nearest value that it allows, without a word.
        if let Some(now) = read_number(directory, "cpu.shares").filter(|now| *now != shares) {
            let what = if now < shares { "maximum" } else { "minimum" };
            return Err(Error::spec(format!("linux.resources.cpu.shares {shares}: the {what} is {now}")));
        }
    }
    let number = |value: Option<u64>| value.filter(|value| *value != 0);
    let (period, quota, burst) = (number(cpu.period()), cpu.quota().filter(|quota| *quota != 0), cpu.burst());
    if period.is_some() || quota.is_some() || burst.is_some() {
        let directory = directory("cpu.quota")?;
        // A quota below the old burst is refused, so that is taken back first.
        if burst.is_some() {
            write(directory, "cpu.cfs_burst_us", "0")?;
        }
        let set_period = || period.map_or(Ok(()), |value| write(directory, "cpu.cfs_period_us", value.to_string()));
        let set_quota = || quota.map_or(Ok(()), |value| write(directory, "cpu.cfs_quota_us", value.to_string()));
        // A shorter period may be refused under the old quota, and a new quota under the old period.
        if set_period().is_err() {
            set_quota()?;
            set_period()?;
        } else {
            set_quota()?;
        }
        if let Some(burst) = number(burst) {
            write(directory, "cpu.cfs_burst_us", burst.to_string())?;
        }
    }
    if let Some(idle) = cpu.idle().filter(|idle| *idle != 0) {
        write(directory("cpu.idle")?, "cpu.idle", idle.to_string())?;
    }
    Ok(())
}

/// Before a process joins: one that is scheduled in real time is let in only where there is time for it.
fn apply_realtime<'a>(directory: &impl Fn(&str) -> Result<&'a Path>, cpu: &LinuxCpu) -> Result<()> {
    let period = cpu.realtime_period().filter(|period| *period != 0);
    let runtime = cpu.realtime_runtime().filter(|runtime| *runtime != 0);
    let set_period = || match period {
        Some(period) => write(directory("cpu.realtimePeriod")?, "cpu.rt_period_us", period.to_string()),
        None => Ok(()),
    };
    let set_runtime = || match runtime {
        Some(runtime) => write(directory("cpu.realtimeRuntime")?, "cpu.rt_runtime_us", runtime.to_string()),
        None => Ok(()),
    };
    // A period below the old runtime is refused.
    match set_period() {
        Err(e) if e.errno() == Some(libc::EINVAL) && runtime.is_some() => {
            set_runtime()?;
            set_period()
        }
        Err(e) => Err(e),
        Ok(()) => set_runtime(),
    }
}

fn apply_cpuset(directories: &[Directory], cpu: &LinuxCpu) -> Result<()> {
    for (file, value) in [("cpuset.cpus", cpu.cpus()), ("cpuset.mems", cpu.mems())] {
        if let Some(value) = value.as_deref().filter(|value| !value.is_empty()) {
            write(need(directories, "cpuset", "cpu.cpus")?, file, value)?;
        }
    }
    Ok(())
}

fn apply_block_io(directory: &Path, block: &LinuxBlockIo) -> Result<()> {
    // The proportional files carry the scheduler's name where BFQ is the only one.
    let proportional = |name: &str| {
        let bfq = format!("blkio.bfq.{name}");
        if exists(directory, &bfq) { bfq } else { format!("blkio.{name}") }
    };
    if let Some(weight) = block.weight().filter(|weight| *weight != 0) {
        write(directory, &proportional("weight"), weight.to_string())?;
    }
    if let Some(weight) = block.leaf_weight().filter(|weight| *weight != 0) {
        write(directory, "blkio.leaf_weight", weight.to_string())?;
    }
    for device in block.weight_device().iter().flatten() {
        let number = format!("{}:{}", device.major(), device.minor());
        if let Some(weight) = device.weight().filter(|weight| *weight != 0) {
            write(directory, &proportional("weight_device"), format!("{number} {weight}"))?;
        }
        if let Some(weight) = device.leaf_weight().filter(|weight| *weight != 0) {
            write(directory, "blkio.leaf_weight_device", format!("{number} {weight}"))?;
        }
    }
    let throttles = [
        ("read_bps", block.throttle_read_bps_device()),
        ("write_bps", block.throttle_write_bps_device()),
        ("read_iops", block.throttle_read_iops_device()),
        ("write_iops", block.throttle_write_iops_device()),
    ];
    for (name, devices) in throttles {
        for device in devices.iter().flatten() {
            let line = format!("{}:{} {}", device.major(), device.minor(), device.rate());
            write(directory, &format!("blkio.throttle.{name}_device"), line)?;
        }
    }
    Ok(())
}
