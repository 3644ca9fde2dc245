//! What a machine offers to a pool.

use std::fs;

use crate::group::PoolGroup;

/// What sandboxes can be made of here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stat {
    /// The kernel's release.
    pub kernel: String,
    /// Whether the caller is root: who is not has one user id for all sandboxes, and no more limits than each process's.
    pub root: bool,
    /// How many user namespaces the kernel allows; `None` if it has none.
    pub user_namespaces: Option<u64>,
    /// How many namespaces of the other kinds it allows, the smallest number of these.
    pub namespaces: u64,
    /// Which cgroups limit and measure sandboxes, or why none do.
    pub cgroups: String,
    /// Whether memory is limited, and how much was used is known.
    pub memory_limits: bool,
    /// Whether processes are limited by number, and counted.
    pub process_limits: bool,
    /// The mounts in the caller's namespace: what each sandbox would cost more without a spawner.
    pub mounts: usize,
    /// The processors.
    pub processors: usize,
}

/// Looks at this machine. The groups that it makes to find out are removed again.
pub fn stat() -> Stat {
    let number = |name: &str| fs::read_to_string(format!("/proc/sys/user/{name}")).ok()?.trim().parse::<u64>().ok();
    let kinds =
        ["max_pid_namespaces", "max_mnt_namespaces", "max_ipc_namespaces", "max_uts_namespaces", "max_net_namespaces"];
    let group = PoolGroup::create(None);
    let stat = Stat {
        kernel: fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned(),
        // SAFETY: it takes nothing and cannot fail.
        root: unsafe { libc::geteuid() } == 0,
        user_namespaces: number("max_user_namespaces").filter(|most| *most > 0),
        namespaces: kinds.iter().map(|name| number(name).unwrap_or(0)).min().unwrap_or(0),
        cgroups: group.describe(),
        memory_limits: group.has_memory(),
        process_limits: group.has_processes(),
        mounts: fs::read_to_string("/proc/self/mountinfo").map_or(0, |table| table.lines().count()),
        processors: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
    };
    group.clear();
    stat
}
