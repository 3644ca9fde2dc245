//! cgroup version 1: a hierarchy for each controller.

use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources};

use super::devices::Rule;
use super::stats::{Blkio, BlkioEntry, CpuStats, HugetlbStats, MemoryStats, PidsStats, Stats};
use super::{Directory, read, read_number, read_pairs, refuse_occupied, write};
use crate::error::{Context, Error, Result};

/// Clock ticks of `cpuacct.stat` are hundredths of a second on every architecture.
const NANOSECONDS_PER_TICK: u64 = 10_000_000;

fn find<'a>(directories: &'a [Directory], controller: &str) -> Option<&'a Path> {
    directories.iter().find(|d| d.controllers.iter().any(|c| c == controller)).map(|d| d.path.as_path())
}

/// The directory of a controller that a limit needs.
fn need<'a>(directories: &'a [Directory], controller: &str, field: &str) -> Result<&'a Path> {
    find(directories, controller).ok_or_else(|| {
        Error::unsupported(
            format!("linux.resources.{field}"),
            format!("the cgroup controller {controller:?} is not mounted on this machine"),
        )
    })
}

pub(super) fn create(directories: &[Directory]) -> Result<()> {
    let mut made = Vec::new();
    let created = directories.iter().try_for_each(|directory| create_one(directory, &mut made));
    if created.is_err() {
        for path in made {
            let _ = fs::remove_dir(path);
        }
    }
    created
}

/// Makes one directory, and notes it if it was not there.
fn create_one<'a>(directory: &'a Directory, made: &mut Vec<&'a Path>) -> Result<()> {
    match fs::create_dir(&directory.path) {
        Ok(()) => made.push(&directory.path),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            fs::create_dir_all(&directory.path).on("create cgroup", &directory.path)?;
            made.push(&directory.path);
        }
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => refuse_occupied(&directory.path)?,
        Err(e) => return Err(e).on("create cgroup", &directory.path),
    }
    if directory.controllers.iter().any(|c| c == "cpuset") {
        inherit_cpuset(&directory.path)?;
    }
    Ok(())
}

/// A new cpuset is empty, and no process can be put into an empty one.
fn inherit_cpuset(directory: &Path) -> Result<()> {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        if read(directory, file).on("read cpuset of", directory)?.is_empty() {
            let Some(parent) = directory.parent() else { return Ok(()) };
            if read(parent, file).unwrap_or_default().is_empty() {
                inherit_cpuset(parent)?;
            }
            let value = read(parent, file).on("read cpuset of", parent)?;
            write(directory, file, value)?;
        }
    }
    Ok(())
}

pub(super) fn join(directories: &[Directory], pid: i32) -> Result<()> {
    let pid = pid.to_string();
    for directory in directories {
        write(&directory.path, "cgroup.procs", &pid)?;
    }
    Ok(())
}

/// Any hierarchy that the container is in tells its processes; prefer one that nothing else uses.
pub(super) fn membership(directories: &[Directory]) -> Option<&Path> {
    ["devices", "pids", "freezer", "memory"]
        .iter()
        .find_map(|controller| find(directories, controller))
        .or_else(|| directories.first().map(|d| d.path.as_path()))
}

pub(super) fn apply(directories: &[Directory], resources: &LinuxResources) -> Result<()> {
    if resources.unified().as_ref().is_some_and(|unified| !unified.is_empty()) {
        return Err(Error::unsupported("linux.resources.unified", "this machine has cgroup v1"));
    }
    if let Some(memory) = resources.memory() {
        apply_memory(directories, memory)?;
    }
    if let Some(cpu) = resources.cpu() {
        apply_cpu(directories, cpu)?;
    }
    if let Some(pids) = resources.pids() {
        let limit = pids.limit();
        if limit != 0 {
            let value = if limit < 0 { "max".to_owned() } else { limit.to_string() };
            write(need(directories, "pids", "pids")?, "pids.max", value)?;
        }
    }
    if let Some(block) = resources.block_io() {
        apply_block_io(directories, block)?;
    }
    for limit in resources.hugepage_limits().iter().flatten() {
        let directory = need(directories, "hugetlb", "hugepageLimits")?;
        let file = format!("hugetlb.{}.limit_in_bytes", limit.page_size());
        write(directory, &file, limit.limit().to_string())?;
    }
    if let Some(network) = resources.network() {
        if let Some(class) = network.class_id() {
            write(need(directories, "net_cls", "network.classID")?, "net_cls.classid", class.to_string())?;
        }
        for priority in network.priorities().iter().flatten() {
            let directory = need(directories, "net_prio", "network.priorities")?;
            write(directory, "net_prio.ifpriomap", format!("{} {}", priority.name(), priority.priority()))?;
        }
    }
    for (device, limits) in resources.rdma().iter().flatten() {
        let directory = need(directories, "rdma", "rdma")?;
        let number = |n: Option<u32>| n.map_or("max".to_owned(), |n| n.to_string());
        let line =
            format!("{device} hca_handle={} hca_object={}", number(limits.hca_handles()), number(limits.hca_objects()));
        write(directory, "rdma.max", line)?;
    }
    Ok(())
}

fn apply_memory(directories: &[Directory], memory: &LinuxMemory) -> Result<()> {
    let directory = match find(directories, "memory") {
        Some(directory) => directory,
        None if *memory == LinuxMemory::default() => return Ok(()),
        None => need(directories, "memory", "memory")?,
    };
    let set = |file: &str, value: Option<i64>| match value {
        // 0 is what engines write for "not set".
        None | Some(0) => Ok(()),
        Some(value) => write(directory, file, value.to_string()),
    };
    const LIMIT: &str = "memory.limit_in_bytes";
    const SWAP: &str = "memory.memsw.limit_in_bytes";
    let swap = memory.swap().filter(|swap| *swap != 0);
    if swap.is_some() && !directory.join(SWAP).exists() {
        return Err(Error::unsupported("linux.resources.memory.swap", "this kernel does not account for swap"));
    }
    super::check_before_update(directory, "memory.usage_in_bytes", memory)?;
    // The kernel holds memory+swap to be at least memory, so what grows must grow first.
    let current = read_number(directory, LIMIT).unwrap_or(u64::MAX);
    let swap_first = swap.is_some_and(|swap| swap < 0 || swap as u64 > current);
    if swap_first {
        set(SWAP, swap)?;
    }
    // No limit on memory alone means none on the sum either.
    if memory.limit() == Some(-1) && swap.is_none() && directory.join(SWAP).exists() {
        write(directory, SWAP, "-1")?;
    }
    set(LIMIT, memory.limit())?;
    if !swap_first {
        set(SWAP, swap)?;
    }
    set("memory.soft_limit_in_bytes", memory.reservation())?;
    set("memory.kmem.tcp.limit_in_bytes", memory.kernel_tcp())?;
    if let Some(swappiness) = memory.swappiness() {
        if swappiness > 100 {
            return Err(Error::spec(format!("linux.resources.memory.swappiness {swappiness} is over 100")));
        }
        write(directory, "memory.swappiness", swappiness.to_string())?;
    }
    if memory.disable_oom_killer() == Some(true) {
        write(directory, "memory.oom_control", "1")?;
    }
    Ok(())
}

fn apply_cpu(directories: &[Directory], cpu: &LinuxCpu) -> Result<()> {
    if let Some(shares) = cpu.shares().filter(|shares| *shares != 0) {
        write(need(directories, "cpu", "cpu.shares")?, "cpu.shares", shares.to_string())?;
    }
    if let Some(period) = cpu.realtime_period().filter(|period| *period != 0) {
        write(need(directories, "cpu", "cpu.realtimePeriod")?, "cpu.rt_period_us", period.to_string())?;
    }
    if let Some(runtime) = cpu.realtime_runtime().filter(|runtime| *runtime != 0) {
        write(need(directories, "cpu", "cpu.realtimeRuntime")?, "cpu.rt_runtime_us", runtime.to_string())?;
    }
    let period = cpu.period().filter(|period| *period != 0);
    let quota = cpu.quota().filter(|quota| *quota != 0);
    let burst = cpu.burst();
    if period.is_some() || quota.is_some() || burst.is_some() {
        let directory = need(directories, "cpu", "cpu.quota")?;
        // A burst above the quota is refused in between, so an old one is taken back first.
        if burst.is_some() {
            write(directory, "cpu.cfs_burst_us", "0")?;
        }
        // A smaller period may be refused under the old quota; then the quota goes first.
        let mut quota_set = false;
        if let Some(period) = period
            && let Err(e) = write(directory, "cpu.cfs_period_us", period.to_string())
        {
            let Some(quota) = quota else { return Err(e) };
            write(directory, "cpu.cfs_quota_us", quota.to_string())?;
            write(directory, "cpu.cfs_period_us", period.to_string())?;
            quota_set = true;
        }
        if let Some(quota) = quota
            && !quota_set
        {
            write(directory, "cpu.cfs_quota_us", quota.to_string())?;
        }
        if let Some(burst) = burst.filter(|burst| *burst != 0) {
            write(directory, "cpu.cfs_burst_us", burst.to_string())?;
        }
    }
    if let Some(idle) = cpu.idle() {
        write(need(directories, "cpu", "cpu.idle")?, "cpu.idle", idle.to_string())?;
    }
    for (file, value) in [("cpuset.cpus", cpu.cpus()), ("cpuset.mems", cpu.mems())] {
        if let Some(value) = value.as_deref().filter(|value| !value.is_empty()) {
            write(need(directories, "cpuset", "cpu.cpus")?, file, value)?;
        }
    }
    Ok(())
}

fn apply_block_io(directories: &[Directory], block: &LinuxBlockIo) -> Result<()> {
    if *block == LinuxBlockIo::default() {
        return Ok(());
    }
    let directory = need(directories, "blkio", "blockIO")?;
    // The proportional files carry the scheduler's name where BFQ is the only one.
    let proportional = |name: &str| {
        let bfq = format!("blkio.bfq.{name}");
        if directory.join(&bfq).exists() { bfq } else { format!("blkio.{name}") }
    };
    if let Some(weight) = block.weight().filter(|weight| *weight != 0) {
        write(directory, &proportional("weight"), weight.to_string())?;
    }
    if let Some(weight) = block.leaf_weight().filter(|weight| *weight != 0) {
        write(directory, "blkio.leaf_weight", weight.to_string())?;
    }
    for device in block.weight_device().iter().flatten() {
        let number = format!("{}:{}", device.major(), device.minor());
        if let Some(weight) = device.weight() {
            write(directory, &proportional("weight_device"), format!("{number} {weight}"))?;
        }
        if let Some(weight) = device.leaf_weight() {
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

pub(super) fn apply_devices(directories: &[Directory], rules: &[Rule]) -> Result<()> {
    let Some(directory) = find(directories, "devices") else {
        return Err(Error::unsupported(
            "a container on this machine",
            "the cgroup controller \"devices\", which keeps it from the host's devices, is not mounted",
        ));
    };
    for rule in rules {
        let file = if rule.allow { "devices.allow" } else { "devices.deny" };
        if rule.is_everything() {
            write(directory, file, "a")?;
        } else {
            write(directory, file, rule.v1_text())?;
        }
    }
    Ok(())
}

pub(super) fn set_frozen(directories: &[Directory], frozen: bool) -> Result<()> {
    let directory = need(directories, "freezer", "freezer")?;
    let wanted = if frozen { "FROZEN" } else { "THAWED" };
    // A process that forks while it is being frozen can keep the group FREEZING; thawing for a moment
    // and trying again lets the kernel catch it.
    for attempt in 0..2000 {
        if attempt % 50 == 0 {
            if attempt > 0 && frozen {
                write(directory, "freezer.state", "THAWED")?;
                std::thread::sleep(Duration::from_micros(10));
            }
            write(directory, "freezer.state", wanted)?;
        }
        if read(directory, "freezer.state").on("read freezer.state of", directory)? == wanted {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    if frozen {
        let _ = write(directory, "freezer.state", "THAWED");
    }
    Err(io::Error::from_raw_os_error(libc::ETIMEDOUT))
        .on(if frozen { "freeze cgroup" } else { "thaw cgroup" }, directory)
}

pub(super) fn is_frozen(directories: &[Directory]) -> bool {
    find(directories, "freezer")
        .and_then(|directory| read(directory, "freezer.state").ok())
        .is_some_and(|state| state == "FROZEN" || state == "FREEZING")
}

pub(super) fn stats(directories: &[Directory]) -> Result<Stats> {
    if let Some(directory) = membership(directories) {
        fs::metadata(directory).on("read statistics of cgroup", directory)?;
    }
    Ok(Stats {
        cpu: cpu_stats(directories),
        memory: find(directories, "memory").map(memory_stats),
        pids: find(directories, "pids").map(|directory| PidsStats {
            current: read_number(directory, "pids.current").unwrap_or(0),
            limit: read_number(directory, "pids.max").filter(|max| *max != u64::MAX).unwrap_or(0),
        }),
        blkio: find(directories, "blkio").map(|directory| Blkio {
            service_bytes: blkio_entries(directory, "io_service_bytes"),
            serviced: blkio_entries(directory, "io_serviced"),
        }),
        hugetlb: find(directories, "hugetlb").map(hugetlb_stats).unwrap_or_default(),
    })
}

fn cpu_stats(directories: &[Directory]) -> Option<CpuStats> {
    let accounting = find(directories, "cpuacct")?;
    let ticks = read_pairs(accounting, "cpuacct.stat");
    let row = |rows: &[(String, u64)], name: &str| rows.iter().find(|(key, _)| key == name).map_or(0, |(_, v)| *v);
    let throttling = find(directories, "cpu").map(|d| read_pairs(d, "cpu.stat")).unwrap_or_default();
    let per_cpu = read(accounting, "cpuacct.usage_percpu").unwrap_or_default();
    Some(CpuStats {
        total: read_number(accounting, "cpuacct.usage").unwrap_or(0),
        system: row(&ticks, "system") * NANOSECONDS_PER_TICK,
        user: row(&ticks, "user") * NANOSECONDS_PER_TICK,
        per_cpu: per_cpu.split_ascii_whitespace().filter_map(|n| n.parse().ok()).collect(),
        periods: row(&throttling, "nr_periods"),
        throttled_periods: row(&throttling, "nr_throttled"),
        throttled_time: row(&throttling, "throttled_time"),
    })
}

fn memory_stats(directory: &Path) -> MemoryStats {
    let number = |file: &str| read_number(directory, file).unwrap_or(0);
    let control = read_pairs(directory, "memory.oom_control");
    MemoryStats {
        usage: number("memory.usage_in_bytes"),
        max_usage: number("memory.max_usage_in_bytes"),
        limit: number("memory.limit_in_bytes"),
        failures: number("memory.failcnt"),
        swap_usage: read_number(directory, "memory.memsw.usage_in_bytes"),
        swap_limit: number("memory.memsw.limit_in_bytes"),
        swap_max_usage: number("memory.memsw.max_usage_in_bytes"),
        swap_failures: number("memory.memsw.failcnt"),
        oom_kills: control.iter().find(|(key, _)| key == "oom_kill").map_or(0, |(_, value)| *value),
        table: read_pairs(directory, "memory.stat"),
        events: Vec::new(),
    }
}

fn blkio_entries(directory: &Path, name: &str) -> Vec<BlkioEntry> {
    // Which file counts depends on the scheduler: BFQ's where there is one, else the throttling layer's.
    let text = [
        format!("blkio.bfq.{name}_recursive"),
        format!("blkio.throttle.{name}_recursive"),
        format!("blkio.throttle.{name}"),
    ]
    .iter()
    .find_map(|file| read(directory, file).ok().filter(|text| text.lines().count() > 1))
    .unwrap_or_default();
    text.lines()
        .filter_map(|line| {
            let mut fields = line.split_ascii_whitespace();
            let (major, minor) = fields.next()?.split_once(':')?;
            Some(BlkioEntry {
                major: major.parse().ok()?,
                minor: minor.parse().ok()?,
                op: fields.next()?.to_owned(),
                value: fields.next()?.parse().ok()?,
            })
        })
        .collect()
}

fn hugetlb_stats(directory: &Path) -> Vec<HugetlbStats> {
    let mut all = Vec::new();
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(page_size) = name
            .strip_prefix("hugetlb.")
            .and_then(|rest| rest.strip_suffix(".usage_in_bytes"))
            .filter(|size| !size.contains('.'))
        else {
            continue;
        };
        let number = |what: &str| read_number(directory, &format!("hugetlb.{page_size}.{what}")).unwrap_or(0);
        all.push(HugetlbStats {
            page_size: page_size.to_owned(),
            usage: number("usage_in_bytes"),
            max: number("max_usage_in_bytes"),
            failures: number("failcnt"),
        });
    }
    all
}
