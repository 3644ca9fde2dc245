//! How the kernel schedules the process, where its memory comes from, and which system it shows.

use crate::error::{Context, Result};
use crate::plan::{MemoryPolicy, ProcessPlan, Scheduler};
use crate::sys::{self, process};

/// `struct sched_attr`, version 1.
#[repr(C)]
#[derive(Default)]
struct Attributes {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
    util_min: u32,
    util_max: u32,
}

/// Scheduler, disk priority, memory policy and personality. Some need capabilities that the program may not have,
/// so this comes before the change of user.
pub(super) fn set(plan: &ProcessPlan) -> Result<()> {
    if let Some(scheduler) = &plan.scheduling.scheduler {
        set_scheduler(scheduler).context("set process.scheduler")?;
    }
    if let Some(priority) = plan.scheduling.io_priority {
        const IOPRIO_WHO_PROCESS: libc::c_int = 1;
        // SAFETY: only integers are passed.
        sys::check(unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, priority) })
            .context("set process.ioPriority")?;
    }
    if let Some(policy) = &plan.memory_policy {
        set_memory_policy(policy).context("set linux.memoryPolicy")?;
    }
    if let Some(domain) = plan.personality {
        // SAFETY: only an integer is passed.
        sys::check(unsafe { libc::personality(domain as libc::c_ulong) }.into()).context("set linux.personality")?;
    }
    Ok(())
}

/// Once the process is in its cgroup: the CPUs asked for, or all that the cgroup has. Whoever started us may have
/// been bound to a few, and that is not the container's business.
pub(super) fn set_cpus(plan: &ProcessPlan) -> Result<()> {
    match &plan.scheduling.cpus {
        Some(cpus) => process::set_affinity(cpus).context("set process.execCPUAffinity.final"),
        None => {
            // Where the kernel refuses, the process stays where its cgroup has put it.
            let _ = process::set_affinity(&[u64::MAX; 16]);
            Ok(())
        }
    }
}

fn set_scheduler(plan: &Scheduler) -> std::io::Result<()> {
    let attributes = Attributes {
        size: size_of::<Attributes>() as u32,
        policy: plan.policy,
        flags: plan.flags,
        nice: plan.nice,
        priority: plan.priority,
        runtime: plan.runtime,
        deadline: plan.deadline,
        period: plan.period,
        ..Attributes::default()
    };
    // SAFETY: attributes carries its own size and lives over the call.
    sys::check(unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &attributes as *const Attributes, 0) }).map(drop)
}

fn set_memory_policy(policy: &MemoryPolicy) -> std::io::Result<()> {
    let nodes = if policy.nodes.is_empty() { std::ptr::null() } else { policy.nodes.as_ptr() };
    // The kernel takes one bit less than it is told.
    let bits = if policy.nodes.is_empty() { 0 } else { policy.nodes.len() * 64 + 1 };
    // SAFETY: the mask is valid for the bits that are passed.
    sys::check(unsafe { libc::syscall(libc::SYS_set_mempolicy, policy.mode, nodes, bits) }).map(drop)
}
