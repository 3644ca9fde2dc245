//! The default seccomp profile: what is allowed, by name, and nothing else.
//!
//! It allows and refuses what docker's does, so that images that run there run here: EPERM for a call that is not in the
//! list, ENOSYS for clone3, whose flags no filter can see, and for calls that are newer than the list (which
//! [`runx_core::seccomp`] adds). Some capabilities bring calls with them that are of no use, or too much, without.
//!
//! A profile depends on which of these capabilities there are and on nothing else, neither on their order nor on other
//! capabilities: the compiled program is found in the cache of the state root from the second container on.

use runx_core::spec::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArgBuilder, LinuxSeccompOperator, LinuxSyscall,
};

/// Calls that are allowed whatever their arguments are, with names of all architectures: those that this one lacks are
/// passed over.
const ALLOWED: &[&str] = &[
    // Memory.
    "brk madvise map_shadow_stack membarrier memfd_create memfd_secret mincore mlock mlock2 mlockall mmap mmap2 mprotect \
     mremap mseal msync munlock munlockall munmap pkey_alloc pkey_free pkey_mprotect remap_file_pages",
    // Reading and writing.
    "_llseek close close_range copy_file_range dup dup2 dup3 fcntl fcntl64 fdatasync flock fsync ioctl lseek pipe pipe2 \
     pread64 preadv preadv2 pwrite64 pwritev pwritev2 read readahead readv sendfile sendfile64 splice sync \
     sync_file_range syncfs tee vmsplice write writev fadvise64 fadvise64_64 fallocate ftruncate ftruncate64 cachestat",
    // Files and directories by name.
    "access chdir chmod chown chown32 creat faccessat faccessat2 fchdir fchmod fchmodat fchmodat2 fchown fchown32 \
     fchownat futimesat getcwd getdents getdents64 lchown lchown32 link linkat mkdir mkdirat mknod mknodat \
     name_to_handle_at open openat openat2 readlink readlinkat rename renameat renameat2 rmdir symlink symlinkat \
     truncate truncate64 umask unlink unlinkat utime utimensat utimensat_time64 utimes",
    // What is known of them.
    "fstat fstat64 fstatat64 fstatfs fstatfs64 listmount lstat lstat64 newfstatat stat stat64 statfs statfs64 statmount \
     statx fgetxattr flistxattr fremovexattr fsetxattr getxattr getxattrat lgetxattr listxattr listxattrat llistxattr \
     lremovexattr lsetxattr removexattr removexattrat setxattr setxattrat",
    // Waiting for something to happen.
    "_newselect epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old \
     eventfd eventfd2 fanotify_mark inotify_add_watch inotify_init inotify_init1 inotify_rm_watch poll ppoll \
     ppoll_time64 pselect6 pselect6_time64 select signalfd signalfd4",
    // Linux's older asynchronous I/O. io_uring, whose calls no filter sees, is not here.
    "io_cancel io_destroy io_getevents io_pgetevents io_pgetevents_time64 io_setup io_submit",
    // Sockets, once they are made.
    "accept accept4 bind connect getpeername getsockname getsockopt listen recv recvfrom recvmmsg recvmmsg_time64 \
     recvmsg send sendmmsg sendmsg sendto setsockopt shutdown socketcall socketpair",
    // Processes and threads. ptrace and its kin look at the user's own processes; until Linux 4.8 they were a way around
    // the filter, and containers here need a newer one anyway.
    "execve execveat exit exit_group fork futex futex_requeue futex_time64 futex_wait futex_waitv futex_wake \
     get_robust_list get_thread_area getcpu kill pidfd_open pidfd_send_signal prctl process_mrelease process_vm_readv \
     process_vm_writev ptrace restart_syscall rseq set_robust_list set_thread_area set_tid_address tgkill tkill \
     uretprobe vfork wait4 waitid waitpid",
    // Signals.
    "pause rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait \
     rt_sigtimedwait_time64 rt_tgsigqueueinfo sigaltstack sigprocmask sigreturn",
    // Who somebody is, and may become by his capabilities.
    "capget capset getegid getegid32 geteuid geteuid32 getgid getgid32 getgroups getgroups32 getpgid getpgrp getpid \
     getppid getresgid getresgid32 getresuid getresuid32 getsid gettid getuid getuid32 setfsgid setfsgid32 setfsuid \
     setfsuid32 setgid setgid32 setgroups setgroups32 setpgid setregid setregid32 setresgid setresgid32 setresuid \
     setresuid32 setreuid setreuid32 setsid setuid setuid32",
    // Limits and scheduling.
    "getpriority getrlimit getrusage ioprio_get ioprio_set prlimit64 sched_get_priority_max sched_get_priority_min \
     sched_getaffinity sched_getattr sched_getparam sched_getscheduler sched_rr_get_interval \
     sched_rr_get_interval_time64 sched_setaffinity sched_setattr sched_setparam sched_setscheduler sched_yield \
     setpriority setrlimit sysinfo times ugetrlimit uname",
    // Time; setting the clock needs a capability, which the kernel asks for.
    "adjtimex alarm clock_adjtime clock_adjtime64 clock_getres clock_getres_time64 clock_gettime clock_gettime64 \
     clock_nanosleep clock_nanosleep_time64 getitimer gettimeofday nanosleep setitimer time timer_create timer_delete \
     timer_getoverrun timer_gettime timer_gettime64 timer_settime timer_settime64 timerfd_create timerfd_gettime \
     timerfd_gettime64 timerfd_settime timerfd_settime64",
    // System V's and POSIX's messages, semaphores and shared memory.
    "ipc mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedreceive_time64 mq_timedsend mq_timedsend_time64 \
     mq_unlink msgctl msgget msgrcv msgsnd semctl semget semop semtimedop semtimedop_time64 shmat shmctl shmdt shmget",
    // Random numbers, and sandboxes inside the container.
    "getrandom landlock_add_rule landlock_create_ruleset landlock_restrict_self seccomp",
];

/// Calls that only some processors have.
#[cfg(target_arch = "x86_64")]
const OF_ARCHITECTURE: &[&str] = &["arch_prctl modify_ldt"];
/// Calls that only some processors have.
#[cfg(target_arch = "aarch64")]
const OF_ARCHITECTURE: &[&str] =
    &["arm_fadvise64_64 arm_sync_file_range breakpoint cacheflush set_tls sync_file_range2"];
/// Calls that only some processors have.
#[cfg(target_arch = "riscv64")]
const OF_ARCHITECTURE: &[&str] = &["riscv_flush_icache riscv_hwprobe"];
/// Calls that only some processors have.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64", target_arch = "riscv64")))]
const OF_ARCHITECTURE: &[&str] = &[];

/// The architectures whose programs run here: each has numbers of its own, and a filter that did not know them would kill
/// such programs.
#[cfg(target_arch = "x86_64")]
const ARCHITECTURES: &[Arch] = &[Arch::ScmpArchX86_64, Arch::ScmpArchX86, Arch::ScmpArchX32];
/// The architectures whose programs run here.
#[cfg(target_arch = "aarch64")]
const ARCHITECTURES: &[Arch] = &[Arch::ScmpArchAarch64, Arch::ScmpArchArm];
/// The architectures whose programs run here.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
const ARCHITECTURES: &[Arch] = &[Arch::ScmpArchNative];

/// What somebody needs namespaces, mounts or the whole machine for.
const SYS_ADMIN: &str = "CAP_SYS_ADMIN";

/// Calls that come with a capability.
const BY_CAPABILITY: &[(&str, &str)] = &[
    ("CAP_BPF", "bpf"),
    ("CAP_DAC_READ_SEARCH", "open_by_handle_at"),
    ("CAP_PERFMON", "perf_event_open"),
    (
        SYS_ADMIN,
        "bpf clone clone3 fanotify_init fsconfig fsmount fsopen fspick lookup_dcookie lsm_get_self_attr lsm_list_modules \
         lsm_set_self_attr mount mount_setattr move_mount open_tree perf_event_open pivot_root quotactl quotactl_fd \
         setdomainname sethostname setns syslog umount umount2 unshare",
    ),
    ("CAP_SYS_BOOT", "reboot"),
    ("CAP_SYS_CHROOT", "chroot"),
    ("CAP_SYS_MODULE", "delete_module finit_module init_module"),
    ("CAP_SYS_NICE", "get_mempolicy mbind set_mempolicy set_mempolicy_home_node"),
    ("CAP_SYS_PACCT", "acct"),
    ("CAP_SYS_PTRACE", "kcmp pidfd_getfd process_madvise"),
    ("CAP_SYS_RAWIO", "ioperm iopl"),
    ("CAP_SYS_TIME", "clock_settime clock_settime64 settimeofday stime"),
    ("CAP_SYS_TTY_CONFIG", "vhangup"),
    ("CAP_SYSLOG", "syslog"),
];

/// Execution domains of personality(2): the usual one with or without 32-bit uname (UNAME26 and PER_LINUX32 in any mix),
/// and the question which one it is. Others turn off address randomisation and more.
const PERSONALITIES: [u64; 5] = [0x0, 0x8, 0x2_0000, 0x2_0008, 0xffff_ffff];

/// Flags of clone(2) that make a namespace.
const NAMESPACE_FLAGS: u64 = (libc::CLONE_NEWNS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET) as u64;

/// On s390 the flags of clone(2) are its second argument.
const CLONE_FLAGS_ARGUMENT: usize = if cfg!(target_arch = "s390x") { 1 } else { 0 };

/// The profile of a container whose bounding set is `capabilities`, named with or without `CAP_`.
pub(crate) fn default_profile(capabilities: &[&str]) -> LinuxSeccomp {
    let has = |wanted: &str| {
        let short = |name: &str| name.to_ascii_uppercase().trim_start_matches("CAP_").to_owned();
        capabilities.iter().any(|name| short(name) == short(wanted))
    };
    let names = |texts: &[&str]| texts.iter().flat_map(|text| text.split_whitespace()).map(str::to_owned).collect();
    let mut rules = vec![allow(names(ALLOWED)), allow(names(OF_ARCHITECTURE))];
    // Virtual machines' sockets reach the host around every network namespace, and the kernel's cryptography has been a
    // way into it; what is below, between and above these two families is allowed.
    let family = |op, value: libc::c_int| allow_if("socket", 0, op, value.unsigned_abs().into(), None);
    rules.push(family(LinuxSeccompOperator::ScmpCmpLt, libc::AF_ALG));
    rules.extend((libc::AF_ALG + 1..libc::AF_VSOCK).map(|between| family(LinuxSeccompOperator::ScmpCmpEq, between)));
    rules.push(family(LinuxSeccompOperator::ScmpCmpGt, libc::AF_VSOCK));
    for domain in PERSONALITIES {
        rules.push(allow_if("personality", 0, LinuxSeccompOperator::ScmpCmpEq, domain, None));
    }
    for (capability, calls) in BY_CAPABILITY {
        if has(capability) {
            rules.push(allow(names(&[calls])));
        }
    }
    if !has(SYS_ADMIN) {
        let masked = LinuxSeccompOperator::ScmpCmpMaskedEq;
        rules.push(allow_if("clone", CLONE_FLAGS_ARGUMENT, masked, NAMESPACE_FLAGS, Some(0)));
        // Its flags are in memory. C libraries fall back to clone.
        let mut refused = rule(vec!["clone3".to_owned()], LinuxSeccompAction::ScmpActErrno);
        refused.set_errno_ret(Some(libc::ENOSYS.unsigned_abs()));
        rules.push(refused);
    }
    let mut profile = LinuxSeccomp::default();
    profile
        .set_default_action(LinuxSeccompAction::ScmpActErrno)
        .set_default_errno_ret(Some(libc::EPERM.unsigned_abs()))
        .set_architectures(Some(ARCHITECTURES.to_vec()))
        .set_syscalls(Some(rules.into_iter().filter(|rule| !rule.names().is_empty()).collect()));
    profile
}

fn rule(names: Vec<String>, action: LinuxSeccompAction) -> LinuxSyscall {
    let mut rule = LinuxSyscall::default();
    rule.set_names(names).set_action(action);
    rule
}

fn allow(names: Vec<String>) -> LinuxSyscall {
    rule(names, LinuxSeccompAction::ScmpActAllow)
}

fn allow_if(name: &str, index: usize, op: LinuxSeccompOperator, value: u64, two: Option<u64>) -> LinuxSyscall {
    let arg = LinuxSeccompArgBuilder::default().index(index).op(op).value(value);
    let arg = two.into_iter().fold(arg, LinuxSeccompArgBuilder::value_two).build();
    let mut rule = allow(vec![name.to_owned()]);
    rule.set_args(Some(vec![arg.expect("every field of an argument has a default")]));
    rule
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::super::CAPABILITIES;
    use super::*;

    fn text(capabilities: &[&str]) -> String {
        serde_json::to_string(&default_profile(capabilities)).unwrap()
    }

    /// Names that are allowed whatever their arguments are.
    fn allowed(capabilities: &[&str]) -> BTreeSet<String> {
        let profile = default_profile(capabilities);
        let rules = profile.syscalls().iter().flatten();
        let plain = rules.filter(|rule| rule.args().is_none() && rule.action() == LinuxSeccompAction::ScmpActAllow);
        plain.flat_map(|rule| rule.names().clone()).collect()
    }

    #[test]
    fn the_form_depends_on_what_there_is_and_not_on_how_it_is_said() {
        let reversed: Vec<_> = CAPABILITIES.iter().rev().copied().collect();
        assert_eq!(text(CAPABILITIES), text(&reversed));
        assert_eq!(text(&["CAP_SYS_CHROOT"]), text(&["sys_chroot", "CAP_KILL", "CAP_SYS_CHROOT"]));
        assert_ne!(text(CAPABILITIES), text(&[]));
    }

    #[test]
    fn no_call_is_named_twice_in_the_list_of_all() {
        let names = || ALLOWED.iter().chain(OF_ARCHITECTURE).flat_map(|line| line.split_whitespace());
        assert_eq!(names().collect::<BTreeSet<_>>().len(), names().count());
    }

    #[test]
    fn what_reaches_out_of_a_container_is_not_in_the_default() {
        let allowed = allowed(CAPABILITIES);
        for call in [
            "add_key",
            "bpf",
            "clone",
            "clone3",
            "delete_module",
            "finit_module",
            "fsopen",
            "init_module",
            "io_uring_setup",
            "kcmp",
            "kexec_load",
            "keyctl",
            "mount",
            "move_mount",
            "open_by_handle_at",
            "open_tree",
            "perf_event_open",
            "personality",
            "pidfd_getfd",
            "pivot_root",
            "reboot",
            "request_key",
            "setns",
            "socket",
            "swapon",
            "syslog",
            "umount2",
            "unshare",
            "userfaultfd",
        ] {
            assert!(!allowed.contains(call), "{call}");
        }
        for call in ["execve", "openat2", "statx", "ptrace", "chroot", "rseq", "futex_waitv"] {
            assert!(allowed.contains(call), "{call}");
        }
    }

    #[test]
    fn a_capability_brings_its_calls_and_no_others() {
        let bare = allowed(&[]);
        for (capability, calls) in BY_CAPABILITY {
            let more: BTreeSet<_> = allowed(&[capability]).difference(&bare).cloned().collect();
            let wanted: BTreeSet<_> = calls.split_whitespace().map(str::to_owned).collect();
            assert_eq!(more, wanted, "{capability}");
        }
        // With it, clone is not asked for its flags and clone3 is allowed.
        assert!(!text(&[SYS_ADMIN]).contains("SCMP_CMP_MASKED_EQ") && text(&[]).contains("SCMP_CMP_MASKED_EQ"));
    }

    #[test]
    fn it_compiles() {
        for capabilities in [&[][..], CAPABILITIES, &[SYS_ADMIN]] {
            assert!(!runx_core::seccomp::compile(&default_profile(capabilities)).unwrap().is_empty());
        }
    }
}
