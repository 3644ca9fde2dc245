//! What the kernel counts for a container, version 1 and 2 brought together where they mean the same.

/// Statistics of a container. Times are in nanoseconds, sizes in bytes. A controller that is not there
/// is `None`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Processor time.
    pub cpu: Option<CpuStats>,
    /// Memory.
    pub memory: Option<MemoryStats>,
    /// Processes.
    pub pids: Option<PidsStats>,
    /// Block devices.
    pub blkio: Option<Blkio>,
    /// Huge pages, an entry for each size.
    pub hugetlb: Vec<HugetlbStats>,
}

/// Processor time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuStats {
    /// In total.
    pub total: u64,
    /// In the kernel.
    pub system: u64,
    /// In user space.
    pub user: u64,
    /// For each processor; version 1 only.
    pub per_cpu: Vec<u64>,
    /// Enforcement periods that passed.
    pub periods: u64,
    /// Periods in which the quota was used up.
    pub throttled_periods: u64,
    /// Time spent waiting for the next period.
    pub throttled_time: u64,
}

/// Memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MemoryStats {
    /// In use, page cache included.
    pub usage: u64,
    /// The most that was in use.
    pub max_usage: u64,
    /// The limit, `u64::MAX` for none.
    pub limit: u64,
    /// How often the limit was hit.
    pub failures: u64,
    /// Swap in use: for version 1 together with memory, for version 2 alone.
    pub swap_usage: Option<u64>,
    /// The limit of that.
    pub swap_limit: u64,
    /// The most that was in use of that.
    pub swap_max_usage: u64,
    /// How often that limit was hit.
    pub swap_failures: u64,
    /// Processes killed for lack of memory.
    pub oom_kills: u64,
    /// The kernel's own table, `memory.stat`.
    pub table: Vec<(String, u64)>,
    /// `memory.events` of version 2.
    pub events: Vec<(String, u64)>,
}

impl MemoryStats {
    /// A row of `memory.stat`, 0 if it is not there.
    pub fn row(&self, name: &str) -> u64 {
        self.table.iter().find(|(key, _)| key == name).map_or(0, |(_, value)| *value)
    }

    /// A row of `memory.events`, 0 if it is not there.
    pub fn event(&self, name: &str) -> u64 {
        self.events.iter().find(|(key, _)| key == name).map_or(0, |(_, value)| *value)
    }
}

/// Processes and threads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PidsStats {
    /// There are now.
    pub current: u64,
    /// Allowed; 0 for no limit, as containerd's metrics have it.
    pub limit: u64,
}

/// Block devices.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Blkio {
    /// Bytes.
    pub service_bytes: Vec<BlkioEntry>,
    /// Requests.
    pub serviced: Vec<BlkioEntry>,
}

/// One count for one device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlkioEntry {
    /// Major number.
    pub major: u64,
    /// Minor number.
    pub minor: u64,
    /// `Read`, `Write`, …
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
    /// How often the limit was hit.
    pub failures: u64,
}
