//! Making processes: `clone3(2)`, `setns(2)`, and the attributes a process passes on.

use super::{check, owned};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

/// What `clone3` returned.
#[derive(Debug)]
pub enum Cloned {
    /// In the new process.
    Child,
    /// In the caller.
    Parent {
        /// The new process, as the caller's PID namespace sees it.
        pid: i32,
        /// A descriptor of it.
        pidfd: OwnedFd,
    },
}

/// Flags of new namespaces, the only ones with which a child is a copy and nothing else.
const NAMESPACES: u64 = (libc::CLONE_NEWNS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET
    | CLONE_NEWTIME) as u64;

#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// `clone3(2)` without shared memory: like fork, with new namespaces by `flags`, a pidfd, and the child
/// born in the cgroup v2 directory `cgroup` if one is given.
///
/// The C library's fork handlers do not run, and what it remembers of thread ids is the parent's.
///
/// # Errors
/// The kernel's, and `InvalidInput` for flags that share something with the child.
///
/// # Safety
/// The calling process must have one thread only: another thread's locks, held at this moment, would
/// stay locked for ever in the child.
pub unsafe fn clone(flags: u64, cgroup: Option<BorrowedFd<'_>>) -> io::Result<Cloned> {
    if flags & !NAMESPACES & !(libc::CLONE_PARENT as u64) != 0 {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    let mut pidfd: RawFd = -1;
    let mut arguments = CloneArgs {
        flags: flags | libc::CLONE_PIDFD as u64,
        pidfd: &mut pidfd as *mut RawFd as u64,
        // With CLONE_PARENT the kernel wants 0 and takes over the caller's own signal.
        exit_signal: if flags & libc::CLONE_PARENT as u64 != 0 { 0 } else { libc::SIGCHLD as u64 },
        ..CloneArgs::default()
    };
    if let Some(cgroup) = cgroup {
        const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
        arguments.flags |= CLONE_INTO_CGROUP;
        arguments.cgroup = cgroup.as_raw_fd() as u64;
    }
    // SAFETY: the arguments live over the call; memory is not shared, so the child runs on a copy of this stack, and the
    // caller vouches for there being one thread.
    let pid =
        check(unsafe { libc::syscall(libc::SYS_clone3, &arguments as *const CloneArgs, size_of::<CloneArgs>()) })?;
    if pid == 0 {
        return Ok(Cloned::Child);
    }
    Ok(Cloned::Parent { pid: pid as i32, pidfd: owned(pidfd.into())? })
}

/// `CLONE_NEWTIME`, which the C library's bindings lack.
pub const CLONE_NEWTIME: libc::c_int = 0x80;

/// `setns(2)`; `fd` is a namespace file, or a pidfd with one or more `CLONE_NEW*` flags.
pub fn setns(fd: BorrowedFd<'_>, kinds: libc::c_int) -> io::Result<()> {
    // SAFETY: only a borrowed descriptor and flags are passed.
    check(unsafe { libc::setns(fd.as_raw_fd(), kinds) }.into()).map(drop)
}

/// `unshare(2)`.
pub fn unshare(kinds: libc::c_int) -> io::Result<()> {
    // SAFETY: only flags are passed.
    check(unsafe { libc::unshare(kinds) }.into()).map(drop)
}

/// `sched_setaffinity(2)` of the calling thread; a bit for each CPU.
pub fn set_affinity(cpus: &[u64]) -> io::Result<()> {
    // SAFETY: the mask is valid for its size in bytes.
    check(unsafe { libc::syscall(libc::SYS_sched_setaffinity, 0, size_of_val(cpus), cpus.as_ptr()) }).map(drop)
}

/// `sched_getaffinity(2)` of the calling thread.
pub fn affinity() -> io::Result<Vec<u64>> {
    let mut cpus = vec![0u64; 128];
    // SAFETY: the mask is writable for the size that is passed.
    let bytes = check(unsafe {
        libc::syscall(libc::SYS_sched_getaffinity, 0, size_of_val(cpus.as_slice()), cpus.as_mut_ptr())
    })?;
    cpus.truncate((bytes as usize).div_ceil(8));
    Ok(cpus)
}

/// `prctl(2)` with up to three integers.
pub fn prctl(option: libc::c_int, a: libc::c_ulong, b: libc::c_ulong, c: libc::c_ulong) -> io::Result<i32> {
    // SAFETY: used only with options whose arguments are integers.
    check(unsafe { libc::prctl(option, a, b, c, 0 as libc::c_ulong) }.into()).map(|value| value as i32)
}

/// Has this process end with `parent`, which made it. A change of its ids makes the kernel forget that. Returns whether that
/// one is still there.
pub fn end_with(parent: u32) -> bool {
    let set = prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as libc::c_ulong, 0, 0);
    set.is_ok() && std::os::unix::process::parent_id() == parent
}

/// The soft and hard limit on open files that this process began with, once it has raised its own.
static OPEN_FILES: std::sync::OnceLock<(u64, u64)> = std::sync::OnceLock::new();

/// Raises the soft limit on open files to the hard one, for a process that holds descriptors for many others.
pub fn raise_open_files() -> io::Result<()> {
    let mut limit = libc::rlimit64 { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: limit is writable.
    check(unsafe { libc::getrlimit64(libc::RLIMIT_NOFILE, &mut limit) }.into())?;
    let (soft, hard) = *OPEN_FILES.get_or_init(|| (limit.rlim_cur, limit.rlim_max));
    if soft < hard { set_open_files(hard, hard) } else { Ok(()) }
}

/// Gives a process that is about to execute another program the limit on open files that this one began with. Only makes
/// system calls.
pub fn restore_open_files() -> io::Result<()> {
    OPEN_FILES.get().map_or(Ok(()), |(soft, hard)| set_open_files(*soft, *hard))
}

fn set_open_files(soft: u64, hard: u64) -> io::Result<()> {
    let limit = libc::rlimit64 { rlim_cur: soft, rlim_max: hard };
    // SAFETY: limit is a valid rlimit64.
    check(unsafe { libc::setrlimit64(libc::RLIMIT_NOFILE, &limit) }.into()).map(drop)
}

/// Names the calling thread, and the process if it is its first one; the kernel keeps 15 bytes.
pub fn set_name(name: &std::ffi::CStr) {
    // SAFETY: the name is NUL-terminated. Nothing of this can fail.
    unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) };
}

/// Makes this process, and what it forks until an exec, unreadable for processes without
/// `CAP_SYS_PTRACE` over it (CVE-2016-9962).
pub fn set_undumpable() -> io::Result<()> {
    prctl(libc::PR_SET_DUMPABLE, 0, 0, 0).map(drop)
}

/// Gives every signal its default action and unblocks all: what a program may expect at its start.
pub fn reset_signals() -> io::Result<()> {
    for signal in 1..=libc::SIGRTMAX() {
        if signal == libc::SIGKILL || signal == libc::SIGSTOP {
            continue;
        }
        // SAFETY: SIG_DFL installs no handler. The C library refuses the two signals it keeps for
        // itself, which it has not touched either.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    // SAFETY: an empty set is made and installed; the old one is not asked for.
    unsafe {
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut none);
        check(libc::sigprocmask(libc::SIG_SETMASK, &none, std::ptr::null_mut()).into()).map(drop)
    }
}

/// Lets the signals that end other processes end this one, until [`reset_signals`]: the kernel ignores them where their
/// default action would do so for the first process of a PID namespace (pid_namespaces(7)). Its exit code is a shell's.
pub fn end_on_signals() -> io::Result<()> {
    extern "C" fn end(signal: libc::c_int) {
        // SAFETY: _exit(2) may be called from a handler, and does not return.
        unsafe { libc::_exit(128 + signal) }
    }
    const ENDING: [libc::c_int; 7] =
        [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGUSR1, libc::SIGUSR2, libc::SIGALRM, libc::SIGTERM];
    // SAFETY: the set is initialised before it is used, and the handler makes one system call.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        for signal in ENDING {
            libc::signal(signal, end as *const () as libc::sighandler_t);
            libc::sigaddset(&mut set, signal);
        }
        check(libc::sigprocmask(libc::SIG_UNBLOCK, &set, std::ptr::null_mut()).into()).map(drop)
    }
}

/// The time a process started, in clock ticks since boot: with its pid, its identity
/// (proc_pid_stat(5), field 22). `None` when there is no such process, or only its zombie.
pub fn start_time(pid: i32) -> Option<u64> {
    read_start_time(pid).ok()?
}

/// Whether the process that started at this time is alive. Where the kernel does not say when it started, for want of a
/// descriptor or of memory, one with this pid counts: nobody's is to be taken for ended because this one has run out.
pub fn is_alive(pid: i32, start_time: u64) -> bool {
    match read_start_time(pid) {
        Ok(found) => found == Some(start_time),
        Err(e) if e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(libc::ESRCH) => false,
        Err(_) => {
            // SAFETY: signal 0 only asks whether the process is there.
            let asked = check(unsafe { libc::kill(pid, 0) }.into());
            asked.map_or_else(|e| e.raw_os_error() == Some(libc::EPERM), |_| true)
        }
    }
}

fn read_start_time(pid: i32) -> io::Result<Option<u64>> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let field = || {
        // The command's name may hold spaces and parentheses; what follows the last one is regular.
        let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
        let state = fields.next()?;
        if matches!(state, "Z" | "X") {
            return None;
        }
        fields.nth(18)?.parse().ok()
    };
    Ok(field())
}

/// Whether a process has got a `SIGKILL` that it has not died of yet (proc_pid_status(5)).
pub fn is_being_killed(pid: i32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    status
        .lines()
        .filter_map(|line| line.strip_prefix("ShdPnd:").or_else(|| line.strip_prefix("SigPnd:")))
        .filter_map(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .any(|mask| mask & 1 << (libc::SIGKILL - 1) != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a process without any descriptor to spare says.
    fn without_descriptors(ask: impl FnOnce() -> bool) -> bool {
        // SAFETY: the child calls only what allocates, opens and exits, all of which may follow a fork.
        unsafe {
            let child = libc::fork();
            assert!(child >= 0, "{}", io::Error::last_os_error());
            if child == 0 {
                let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
                let limited = libc::setrlimit(libc::RLIMIT_NOFILE, &none) == 0;
                libc::_exit(if limited && std::fs::File::open("/").is_err() { ask().into() } else { 2 });
            }
            let mut status = 0;
            assert_eq!(libc::waitpid(child, &mut status, 0), child);
            assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) < 2, "{status:#x}");
            libc::WEXITSTATUS(status) == 1
        }
    }

    #[test]
    fn a_process_is_alive_as_long_as_it_is_also_for_who_has_no_descriptor_left() {
        let mut child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        let pid = child.id() as i32;
        let start = start_time(pid).unwrap();
        assert!(is_alive(pid, start) && !is_alive(pid, start + 1));
        assert!(without_descriptors(|| is_alive(pid, start)));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!is_alive(pid, start) && !without_descriptors(|| is_alive(pid, start)));
    }
}
