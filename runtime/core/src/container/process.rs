//! The process part of a plan: config.json's `process`, or an exec's description, resolved.

use std::os::fd::OwnedFd;

use oci_spec::runtime::{
    IOPriorityClass, Linux, LinuxIOPriority, LinuxMemoryPolicy, LinuxPersonality, LinuxPersonalityDomain,
    LinuxSchedulerFlag, LinuxSchedulerPolicy, LinuxSeccomp, MemoryPolicyFlagType, MemoryPolicyModeType,
    PosixRlimitType, Process, Scheduler as SchedulerSpec,
};

use serde::{Deserialize, Serialize};

use super::prepare::Table;
use crate::capability;
use crate::error::{Context, Error, Result};
use crate::lsm;
use crate::plan::{Fd, Labels, MemoryPolicy, ProcessPlan, Scheduler, Scheduling};
use crate::seccomp;
use crate::sys::{self, mount};

const RLIMITS: &[(PosixRlimitType, libc::__rlimit_resource_t, &str)] = &[
    (PosixRlimitType::RlimitCpu, libc::RLIMIT_CPU, "RLIMIT_CPU"),
    (PosixRlimitType::RlimitFsize, libc::RLIMIT_FSIZE, "RLIMIT_FSIZE"),
    (PosixRlimitType::RlimitData, libc::RLIMIT_DATA, "RLIMIT_DATA"),
    (PosixRlimitType::RlimitStack, libc::RLIMIT_STACK, "RLIMIT_STACK"),
    (PosixRlimitType::RlimitCore, libc::RLIMIT_CORE, "RLIMIT_CORE"),
    (PosixRlimitType::RlimitRss, libc::RLIMIT_RSS, "RLIMIT_RSS"),
    (PosixRlimitType::RlimitNproc, libc::RLIMIT_NPROC, "RLIMIT_NPROC"),
    (PosixRlimitType::RlimitNofile, libc::RLIMIT_NOFILE, "RLIMIT_NOFILE"),
    (PosixRlimitType::RlimitMemlock, libc::RLIMIT_MEMLOCK, "RLIMIT_MEMLOCK"),
    (PosixRlimitType::RlimitAs, libc::RLIMIT_AS, "RLIMIT_AS"),
    (PosixRlimitType::RlimitLocks, libc::RLIMIT_LOCKS, "RLIMIT_LOCKS"),
    (PosixRlimitType::RlimitSigpending, libc::RLIMIT_SIGPENDING, "RLIMIT_SIGPENDING"),
    (PosixRlimitType::RlimitMsgqueue, libc::RLIMIT_MSGQUEUE, "RLIMIT_MSGQUEUE"),
    (PosixRlimitType::RlimitNice, libc::RLIMIT_NICE, "RLIMIT_NICE"),
    (PosixRlimitType::RlimitRtprio, libc::RLIMIT_RTPRIO, "RLIMIT_RTPRIO"),
    (PosixRlimitType::RlimitRttime, libc::RLIMIT_RTTIME, "RLIMIT_RTTIME"),
];

/// The name of a resource limit, for messages.
pub(crate) fn rlimit_name(resource: u32) -> Option<&'static str> {
    RLIMITS.iter().find(|(_, number, _)| *number == resource).map(|(.., name)| *name)
}

/// What config.json says of every process of a container, an exec's too unless its own description says otherwise.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Defaults {
    /// For sched_setattr(2).
    pub scheduler: Option<Scheduler>,
    /// For ioprio_set(2).
    pub io_priority: Option<i32>,
    /// CPUs that an exec is born on.
    pub initial_cpus: Option<Vec<u64>>,
    /// CPUs that an exec runs on.
    pub final_cpus: Option<Vec<u64>>,
    /// For personality(2).
    pub personality: Option<u64>,
    /// For set_mempolicy(2).
    pub memory_policy: Option<MemoryPolicy>,
    /// The AppArmor profile.
    pub apparmor: Option<String>,
    /// The SELinux context.
    pub selinux: Option<String>,
}

impl Defaults {
    /// Those of a container.
    ///
    /// # Errors
    /// As for [`plan`].
    pub(super) fn of(process: &Process, linux: &Linux) -> Result<Self> {
        let filled = |label: &Option<String>| label.clone().filter(|label| !label.is_empty());
        let (initial_cpus, final_cpus) = affinity(process)?;
        Ok(Self {
            scheduler: process.scheduler().as_ref().map(scheduler).transpose()?,
            io_priority: process.io_priority().as_ref().map(io_priority).transpose()?,
            initial_cpus,
            final_cpus,
            personality: linux.personality().as_ref().map(personality).transpose()?,
            memory_policy: linux.memory_policy().as_ref().map(memory_policy).transpose()?,
            apparmor: lsm::apparmor(filled(process.apparmor_profile()))?,
            selinux: lsm::selinux("process.selinuxLabel", filled(process.selinux_label()))?,
        })
    }
}

/// The CPUs that an exec is born on, and those it then runs on.
pub(super) type Affinity = (Option<Vec<u64>>, Option<Vec<u64>>);

/// `process.execCPUAffinity`.
pub(super) fn affinity(process: &Process) -> Result<Affinity> {
    let Some(affinity) = process.exec_cpu_affinity() else { return Ok((None, None)) };
    let list = |field: &str, text: &Option<String>| {
        text.as_deref().filter(|text| !text.is_empty()).map(|text| number_list(field, text)).transpose()
    };
    Ok((
        list("process.execCPUAffinity.initial", affinity.initial())?,
        list("process.execCPUAffinity.final", affinity.cpu_affinity_final())?,
    ))
}

/// The process part of a plan.
///
/// # Errors
/// [`Error::InvalidSpec`] and [`Error::Unsupported`] name the field.
pub(super) fn plan(process: &Process, defaults: &Defaults, table: &mut Table) -> Result<ProcessPlan> {
    let mut rlimits = Vec::new();
    for limit in process.rlimits().iter().flatten() {
        let (_, resource, name) = RLIMITS
            .iter()
            .find(|(kind, ..)| *kind == limit.typ())
            .ok_or_else(|| Error::spec(format!("process.rlimits: {} is unknown", limit.typ())))?;
        if limit.soft() > limit.hard() {
            let (soft, hard) = (limit.soft(), limit.hard());
            return Err(Error::spec(format!("process.rlimits: {name} soft {soft} is over hard {hard}")));
        }
        rlimits.push((*resource, limit.soft(), limit.hard()));
    }
    let user = process.user();
    let cwd = process.cwd().to_str().ok_or_else(|| Error::spec("process.cwd is not valid UTF-8"))?;
    let terminal = process.terminal().unwrap_or(false).then(|| {
        let clamp = |value: u64| u16::try_from(value).unwrap_or(u16::MAX);
        process.console_size().map_or((0, 0), |size| (clamp(size.height()), clamp(size.width())))
    });
    let sets = process.capabilities().as_ref().map(capability::sets).unwrap_or_default();
    for number in (0..64).filter(|number| sets.ambient & !(sets.inheritable & sets.permitted) & (1 << number) != 0) {
        let name = capability::name(number);
        log::warn!("can't raise ambient capability {name}: it is not both permitted and inheritable");
    }
    Ok(ProcessPlan {
        args: process.args().clone().unwrap_or_default(),
        env: process.env().clone().unwrap_or_default(),
        cwd: cwd.to_owned(),
        uid: user.uid(),
        gid: user.gid(),
        groups: user.additional_gids().clone().unwrap_or_default(),
        umask: user.umask(),
        capabilities: Some(sets),
        rlimits,
        no_new_privileges: process.no_new_privileges().unwrap_or(false),
        oom_score_adj: process.oom_score_adj(),
        terminal,
        scheduling: Scheduling {
            scheduler: process.scheduler().as_ref().map(scheduler).transpose()?.or(defaults.scheduler),
            io_priority: process.io_priority().as_ref().map(io_priority).transpose()?.or(defaults.io_priority),
            cpus: None,
        },
        personality: defaults.personality,
        memory_policy: defaults.memory_policy.clone(),
        labels: labels(process, defaults, table)?,
        ..ProcessPlan::default()
    })
}

/// The seccomp program of a profile, unless there is none.
pub(super) fn filter(profile: Option<&LinuxSeccomp>, cache: &std::path::Path) -> Result<Option<seccomp::Program>> {
    profile.map(|profile| seccomp::program(profile, cache)).transpose()
}

/// Puts a filter's program into the table.
pub(super) fn add_filter(program: &[u8], flags: u64, table: &mut Table) -> Result<(Fd, u64)> {
    let file = sys::sealed_memfd(c"runx-seccomp", program).context("write the seccomp program")?;
    Ok((table.add(file), flags))
}

fn labels(process: &Process, defaults: &Defaults, table: &mut Table) -> Result<Option<Labels>> {
    let filled = |label: &Option<String>| label.clone().filter(|label| !label.is_empty());
    let apparmor = lsm::apparmor(filled(process.apparmor_profile()))?.or_else(|| defaults.apparmor.clone());
    let selinux = lsm::selinux("process.selinuxLabel", filled(process.selinux_label()))?;
    let selinux = selinux.or_else(|| defaults.selinux.clone());
    if apparmor.is_none() && selinux.is_none() {
        return Ok(None);
    }
    let proc: OwnedFd = mount::private_proc().context("mount a private procfs")?;
    Ok(Some(Labels { proc: table.add(proc), apparmor, selinux }))
}

/// Numbers of sched(7).
fn scheduler(spec: &SchedulerSpec) -> Result<Scheduler> {
    let policy = match spec.policy() {
        LinuxSchedulerPolicy::SchedOther => libc::SCHED_OTHER,
        LinuxSchedulerPolicy::SchedFifo => libc::SCHED_FIFO,
        LinuxSchedulerPolicy::SchedRr => libc::SCHED_RR,
        LinuxSchedulerPolicy::SchedBatch => libc::SCHED_BATCH,
        LinuxSchedulerPolicy::SchedIdle => libc::SCHED_IDLE,
        LinuxSchedulerPolicy::SchedDeadline => libc::SCHED_DEADLINE,
        LinuxSchedulerPolicy::SchedIso => {
            return Err(Error::unsupported("process.scheduler.policy SCHED_ISO", "no kernel implements it"));
        }
    };
    let real_time = policy == libc::SCHED_FIFO || policy == libc::SCHED_RR;
    let nice = spec.nice().unwrap_or(0);
    if !(-20..=19).contains(&nice) {
        return Err(Error::spec(format!("process.scheduler.nice {nice} is not between -20 and 19")));
    }
    let priority = spec.priority().unwrap_or(0);
    if priority != 0 && !real_time {
        return Err(Error::spec("process.scheduler.priority is for SCHED_FIFO and SCHED_RR only"));
    }
    let priority = u32::try_from(priority)
        .map_err(|_| Error::spec(format!("process.scheduler.priority {priority} is negative")))?;
    let times = [spec.runtime(), spec.deadline(), spec.period()].map(|time| time.unwrap_or(0));
    if times != [0; 3] && policy != libc::SCHED_DEADLINE {
        return Err(Error::spec("process.scheduler: runtime, deadline and period are for SCHED_DEADLINE only"));
    }
    let flags = spec.flags().iter().flatten().fold(0, |bits, flag| {
        bits | match flag {
            LinuxSchedulerFlag::SchedResetOnFork => 0x01,
            LinuxSchedulerFlag::SchedFlagReclaim => 0x02,
            LinuxSchedulerFlag::SchedFlagDLOverrun => 0x04,
            LinuxSchedulerFlag::SchedFlagKeepPolicy => 0x08,
            LinuxSchedulerFlag::SchedFlagKeepParams => 0x10,
            LinuxSchedulerFlag::SchedFlagUtilClampMin => 0x20,
            LinuxSchedulerFlag::SchedFlagUtilClampMax => 0x40,
        }
    });
    let [runtime, deadline, period] = times;
    // With these two the kernel takes what there is already.
    let keeps = flags & (0x08 | 0x10) != 0;
    let whole = if period == 0 { deadline } else { period };
    if policy == libc::SCHED_DEADLINE && !keeps && !(1024 <= runtime && runtime <= deadline && deadline <= whole) {
        return Err(Error::spec(format!(
            "process.scheduler: SCHED_DEADLINE wants 1024 <= runtime <= deadline <= period, in nanoseconds (a period of 0 is \
             the deadline), and they are {runtime}, {deadline} and {period}"
        )));
    }
    Ok(Scheduler { policy: policy as u32, flags, nice, priority, runtime, deadline, period })
}

/// `IOPRIO_PRIO_VALUE` of ioprio_set(2).
fn io_priority(spec: &LinuxIOPriority) -> Result<i32> {
    let class = match spec.class() {
        IOPriorityClass::IoprioClassRt => 1,
        IOPriorityClass::IoprioClassBe => 2,
        IOPriorityClass::IoprioClassIdle => 3,
    };
    let priority = spec.priority();
    if !(0..=7).contains(&priority) {
        return Err(Error::spec(format!("process.ioPriority.priority {priority} is not between 0 and 7")));
    }
    Ok(class << 13 | priority as i32)
}

/// The number for personality(2).
fn personality(spec: &LinuxPersonality) -> Result<u64> {
    if spec.flags().as_ref().is_some_and(|flags| !flags.is_empty()) {
        return Err(Error::unsupported("linux.personality.flags", "the runtime-spec defines none"));
    }
    Ok(match spec.domain() {
        LinuxPersonalityDomain::PerLinux => 0,
        LinuxPersonalityDomain::PerLinux32 => 8,
    })
}

/// Numbers of set_mempolicy(2).
fn memory_policy(spec: &LinuxMemoryPolicy) -> Result<MemoryPolicy> {
    let mode = match spec.mode() {
        MemoryPolicyModeType::MpolDefault => 0,
        MemoryPolicyModeType::MpolPreferred => 1,
        MemoryPolicyModeType::MpolBind => 2,
        MemoryPolicyModeType::MpolInterleave => 3,
        MemoryPolicyModeType::MpolLocal => 4,
        MemoryPolicyModeType::MpolPreferredMany => 5,
        MemoryPolicyModeType::MpolWeightedInterleave => 6,
    };
    let flags = spec.flags().iter().flatten().fold(0, |bits, flag| {
        bits | match flag {
            MemoryPolicyFlagType::MpolFNumaBalancing => 1 << 13,
            MemoryPolicyFlagType::MpolFRelativeNodes => 1 << 14,
            MemoryPolicyFlagType::MpolFStaticNodes => 1 << 15,
        }
    });
    let nodes = spec.nodes().as_deref().filter(|nodes| !nodes.is_empty());
    let nodes = nodes.map(|nodes| number_list("linux.memoryPolicy.nodes", nodes)).transpose()?.unwrap_or_default();
    Ok(MemoryPolicy { mode: mode | flags, nodes })
}

/// A list such as `0-3,7` as a bit mask.
///
/// # Errors
/// [`Error::InvalidSpec`] naming `field`.
fn number_list(field: &str, text: &str) -> Result<Vec<u64>> {
    const LIMIT: usize = 8192;
    let bad = || Error::spec(format!("{field} {text:?} is not a list of numbers and ranges such as 0-3,7"));
    let mut mask = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let number = |text: &str| text.trim().parse::<usize>().ok().filter(|n| *n < LIMIT).ok_or_else(bad);
        let (first, last) = (number(first)?, number(last)?);
        if first > last {
            return Err(bad());
        }
        for n in first..=last {
            if mask.len() <= n / 64 {
                mask.resize(n / 64 + 1, 0u64);
            }
            mask[n / 64] |= 1 << (n % 64);
        }
    }
    Ok(mask)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_numbers_become_masks() {
        assert_eq!(number_list("x", "0-2,5").unwrap(), [0b10_0111]);
        assert_eq!(number_list("x", "64").unwrap(), [0, 1]);
        for bad in ["", "a", "3-1", "1,,2", "-1", "99999"] {
            assert!(number_list("x", bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn priorities_outside_of_their_range_or_policy_are_refused() {
        let parse = |value| scheduler(&serde_json::from_value(value).unwrap());
        assert!(parse(serde_json::json!({"policy": "SCHED_OTHER", "nice": 20})).is_err());
        assert!(parse(serde_json::json!({"policy": "SCHED_OTHER", "priority": 3})).is_err());
        assert!(parse(serde_json::json!({"policy": "SCHED_FIFO", "runtime": 3})).is_err());
        let fifo = parse(serde_json::json!({"policy": "SCHED_FIFO", "priority": 3})).unwrap();
        assert_eq!((fifo.policy, fifo.priority), (1, 3));
        let bad: LinuxIOPriority =
            serde_json::from_value(serde_json::json!({"class": "IOPRIO_CLASS_BE", "priority": 8})).unwrap();
        assert!(io_priority(&bad).is_err());
    }
}
