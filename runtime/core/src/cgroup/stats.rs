//! What the kernel counts for a container, version 1 and 2 brought together where they mean the same.

/// Statistics of a container. Times are in nanoseconds and sizes in bytes, unless said otherwise. A controller
/// that is not there is `None`, or an empty list.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stats {
    /// Whether these are version 2's counts. A few fields mean another thing there, which their comments say.
    pub unified: bool,
    /// Processor time.
    pub cpu: Option<CpuStats>,
    /// Processors and memory nodes; version 1 only.
    pub cpuset: Option<CpusetStats>,
    /// Memory.
    pub memory: Option<MemoryStats>,
    /// Processes.
    pub pids: Option<PidsStats>,
    /// Block devices.
    pub blkio: Option<Blkio>,
    /// Huge pages, an entry for each size.
    pub hugetlb: Vec<HugetlbStats>,
    /// RDMA devices.
    pub rdma: Option<RdmaStats>,
    /// Scalar resources of the misc controller; version 2 only.
    pub misc: Vec<MiscStats>,
}

/// Processor time.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CpuStats {
    /// In total.
    pub total: u64,
    /// In the kernel.
    pub system: u64,
    /// In user space.
    pub user: u64,
    /// For each processor; version 1 only.
    pub per_cpu: Vec<u64>,
    /// For each processor, in the kernel; version 1 only.
    pub per_cpu_system: Vec<u64>,
    /// For each processor, in user space; version 1 only.
    pub per_cpu_user: Vec<u64>,
    /// Enforcement periods that passed.
    pub periods: u64,
    /// Periods in which the quota was used up.
    pub throttled_periods: u64,
    /// Time spent waiting for the next period.
    pub throttled_time: u64,
    /// Periods in which more than the quota was used.
    pub bursts: u64,
    /// Time used above the quota in those.
    pub burst_time: u64,
    /// Time lost waiting for a processor; version 2 only.
    pub pressure: Option<Pressure>,
}

/// Where the container may run, as cpuset of version 1 has it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpusetStats {
    /// Processors.
    pub cpus: Vec<u16>,
    /// Memory nodes.
    pub mems: Vec<u16>,
    /// `cpuset.cpu_exclusive`.
    pub cpu_exclusive: u64,
    /// `cpuset.mem_exclusive`.
    pub mem_exclusive: u64,
    /// `cpuset.mem_hardwall`.
    pub mem_hardwall: u64,
    /// `cpuset.memory_migrate`.
    pub memory_migrate: u64,
    /// `cpuset.memory_spread_page`.
    pub memory_spread_page: u64,
    /// `cpuset.memory_spread_slab`.
    pub memory_spread_slab: u64,
    /// `cpuset.memory_pressure`.
    pub memory_pressure: u64,
    /// `cpuset.sched_load_balance`.
    pub sched_load_balance: u64,
    /// `cpuset.sched_relax_domain_level`.
    pub sched_relax_domain_level: i64,
}

/// One of the memory controller's counters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryCounter {
    /// In use.
    pub usage: u64,
    /// The most that was in use; 0 if the kernel does not say.
    pub max_usage: u64,
    /// The limit. None is `u64::MAX` in version 2, and the kernel's own large number in version 1.
    pub limit: u64,
    /// How often the limit was hit.
    pub failures: u64,
}

/// Memory.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MemoryStats {
    /// Memory, page cache included.
    pub usage: MemoryCounter,
    /// Version 1: memory and swap together. Version 2: swap alone. `None` if swap is not accounted for.
    pub swap: Option<MemoryCounter>,
    /// The kernel's memory; version 1 only.
    pub kernel: Option<MemoryCounter>,
    /// Buffers of TCP; version 1 only.
    pub kernel_tcp: Option<MemoryCounter>,
    /// Processes killed for lack of memory.
    pub oom_kills: u64,
    /// Whether processes wait for memory because nothing is killed; version 1 only.
    pub under_oom: bool,
    /// Whether nothing is killed for lack of memory; version 1 only.
    pub oom_kill_disabled: bool,
    /// Whether groups below count, too. Version 2 is always so.
    pub hierarchical: bool,
    /// The kernel's own table, `memory.stat`.
    pub table: Vec<(String, u64)>,
    /// `memory.events` of version 2.
    pub events: Vec<(String, u64)>,
    /// Pages by NUMA node, `memory.numa_stat`; version 1 only.
    pub numa: Vec<NumaRow>,
    /// Time lost waiting for memory; version 2 only.
    pub pressure: Option<Pressure>,
}

/// One row of `memory.numa_stat`, in pages.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NumaRow {
    /// `total`, `file`, `anon`, `unevictable`, or the same after `hierarchical_`.
    pub name: String,
    /// On all nodes.
    pub total: u64,
    /// On each node: its number and the pages.
    pub nodes: Vec<(u8, u64)>,
}

impl MemoryStats {
    /// A row of `memory.stat`, 0 if it is not there.
    pub fn row(&self, name: &str) -> u64 {
        super::files::pair(&self.table, name)
    }

    /// A row of `memory.events`, 0 if it is not there.
    pub fn event(&self, name: &str) -> u64 {
        super::files::pair(&self.events, name)
    }
}

/// Processes and threads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PidsStats {
    /// There are now.
    pub current: u64,
    /// Allowed; `None` for no limit.
    pub limit: Option<u64>,
}

/// Block devices. A list that the kernel or the scheduler of the device does not keep is empty.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Blkio {
    /// Bytes.
    pub service_bytes: Vec<BlkioEntry>,
    /// Requests.
    pub serviced: Vec<BlkioEntry>,
    /// Requests in line; version 1 only, as all up to [`Self::sectors`].
    pub queued: Vec<BlkioEntry>,
    /// Time from dispatch to completion.
    pub service_time: Vec<BlkioEntry>,
    /// Time in line.
    pub wait_time: Vec<BlkioEntry>,
    /// Requests merged into others.
    pub merged: Vec<BlkioEntry>,
    /// Time of the device, in milliseconds.
    pub time: Vec<BlkioEntry>,
    /// Sectors.
    pub sectors: Vec<BlkioEntry>,
    /// The cost model's counts: time used; version 2 only, in microseconds as the next three.
    pub cost_usage: Vec<BlkioEntry>,
    /// Time waited.
    pub cost_wait: Vec<BlkioEntry>,
    /// Time in debt.
    pub cost_indebt: Vec<BlkioEntry>,
    /// Time delayed because of debt.
    pub cost_indelay: Vec<BlkioEntry>,
    /// Time lost waiting for devices; version 2 only.
    pub pressure: Option<Pressure>,
}

/// One count for one device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlkioEntry {
    /// Major number.
    pub major: u64,
    /// Minor number.
    pub minor: u64,
    /// `Read`, `Write`, …; empty where the count is not divided.
    pub op: String,
    /// The count.
    pub value: u64,
}

/// Huge pages of one size.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HugetlbStats {
    /// As in the names of the kernel's files: `2MB`.
    pub page_size: String,
    /// Bytes in use.
    pub usage: u64,
    /// The most that was in use; version 1 only.
    pub max: u64,
    /// The limit, `u64::MAX` for none.
    pub limit: u64,
    /// How often the limit was hit.
    pub failures: u64,
    /// The same for reservations, where the kernel accounts for those.
    pub reserved: Option<MemoryCounter>,
}

/// RDMA devices.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RdmaStats {
    /// In use.
    pub current: Vec<RdmaEntry>,
    /// Allowed.
    pub limit: Vec<RdmaEntry>,
}

/// One RDMA device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RdmaEntry {
    /// Its name.
    pub device: String,
    /// HCA handles; `u32::MAX` for no limit.
    pub handles: u32,
    /// HCA objects; `u32::MAX` for no limit.
    pub objects: u32,
}

/// One resource of the misc controller.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MiscStats {
    /// Its name.
    pub name: String,
    /// In use.
    pub usage: u64,
    /// How often its limit was hit.
    pub events: u64,
}

/// Pressure stall information.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Pressure {
    /// At least one process waited.
    pub some: PressureLine,
    /// All of them waited.
    pub full: PressureLine,
}

/// One line of it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PressureLine {
    /// Percent of the last ten seconds.
    pub avg10: f64,
    /// Percent of the last minute.
    pub avg60: f64,
    /// Percent of the last five minutes.
    pub avg300: f64,
    /// In total, in microseconds.
    pub total: u64,
}

impl Pressure {
    /// Reads the kernel's text.
    pub(super) fn parse(text: &str) -> Self {
        let mut out = Self::default();
        for line in text.lines() {
            let mut fields = line.split_ascii_whitespace();
            let target = match fields.next() {
                Some("some") => &mut out.some,
                Some("full") => &mut out.full,
                _ => continue,
            };
            for (key, value) in fields.filter_map(|field| field.split_once('=')) {
                match key {
                    "avg10" => target.avg10 = value.parse().unwrap_or(0.0),
                    "avg60" => target.avg60 = value.parse().unwrap_or(0.0),
                    "avg300" => target.avg300 = value.parse().unwrap_or(0.0),
                    "total" => target.total = value.parse().unwrap_or(0),
                    _ => {}
                }
            }
        }
        out
    }
}

impl RdmaEntry {
    /// Reads `rdma.current` or `rdma.max`: `mlx4_0 hca_handle=2 hca_object=2000`.
    pub(super) fn parse_all(text: &str) -> Vec<Self> {
        let number = |text: &str| if text == "max" { Some(u32::MAX) } else { text.parse().ok() };
        text.lines()
            .filter_map(|line| {
                let mut fields = line.split_ascii_whitespace();
                let mut entry = Self { device: fields.next()?.to_owned(), ..Self::default() };
                for (key, value) in fields.filter_map(|field| field.split_once('=')) {
                    match key {
                        "hca_handle" => entry.handles = number(value)?,
                        "hca_object" => entry.objects = number(value)?,
                        _ => {}
                    }
                }
                Some(entry)
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pressure_is_read_line_by_line() {
        let text =
            "some avg10=1.50 avg60=0.25 avg300=0.00 total=1234\nfull avg10=0.00 avg60=0.00 avg300=0.10 total=5\n";
        let pressure = Pressure::parse(text);
        assert_eq!((pressure.some.avg10, pressure.some.avg60, pressure.some.total), (1.5, 0.25, 1234));
        assert_eq!((pressure.full.avg300, pressure.full.total), (0.1, 5));
    }

    #[test]
    fn rdma_devices_are_read_with_and_without_limits() {
        let entries = RdmaEntry::parse_all("mlx4_0 hca_handle=2 hca_object=max\nocrdma1 hca_handle=max hca_object=7\n");
        assert_eq!(entries[0], RdmaEntry { device: "mlx4_0".into(), handles: 2, objects: u32::MAX });
        assert_eq!((entries[1].handles, entries[1].objects), (u32::MAX, 7));
    }
}
