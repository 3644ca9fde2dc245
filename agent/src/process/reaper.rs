//! Waits for every process that is a child of this one: those it started, and orphans that it has inherited as PID 1 or as
//! a subreaper.
//!
//! One place waits, so that nobody's exit is taken by somebody else, and a pid is signalled only while it has not been
//! waited for: it cannot have become another process.

use std::collections::{HashMap, HashSet};
use std::io;
use std::mem::MaybeUninit;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use nix::sys::signal::Signal;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use super::spawn::Process;

/// How a process ended, and what it used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// Its exit code, unless a signal ended it.
    pub code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// Time on a processor, its children's that it waited for included.
    pub cpu: Duration,
    /// The largest its memory was, in bytes.
    pub peak_memory: u64,
    /// When its end was seen.
    pub at: SystemTime,
}

/// Becomes `Some` when the process has ended.
pub type Ended = watch::Receiver<Option<Exit>>;

#[derive(Debug, Default)]
struct Children {
    /// Held for reading while a process is started and entered; nobody is waited for meanwhile.
    starting: RwLock<()>,
    known: Mutex<HashMap<i32, watch::Sender<Option<Exit>>>>,
    /// Those whose groups end with them. Locked after `known`.
    doomed: Mutex<HashSet<i32>>,
}

fn children() -> &'static Children {
    static CHILDREN: OnceLock<Children> = OnceLock::new();
    CHILDREN.get_or_init(Children::default)
}

impl Children {
    fn known(&self) -> MutexGuard<'_, HashMap<i32, watch::Sender<Option<Exit>>>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn doomed(&self) -> MutexGuard<'_, HashSet<i32>> {
        self.doomed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Begins to wait for children, orphans among them. Within a runtime, once, before anything is started.
///
/// # Errors
/// When SIGCHLD cannot be watched.
pub fn begin() -> io::Result<()> {
    // SAFETY: sets an attribute of this process and takes no pointers.
    if unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) } != 0 {
        // As PID 1 it gets them anyhow, and otherwise whoever is.
        log::warn!("orphans will not be waited for: {}", io::Error::last_os_error());
    }
    let mut child_ended = signal(SignalKind::child())?;
    tokio::spawn(async move {
        loop {
            reap();
            child_ended.recv().await;
        }
    });
    Ok(())
}

/// Starts a process and enters it in one step.
///
/// # Errors
/// Those of `start`.
pub fn start(start: impl FnOnce() -> io::Result<i32>) -> io::Result<(i32, Ended)> {
    let children = children();
    let _starting = children.starting.read().unwrap_or_else(PoisonError::into_inner);
    let pid = start()?;
    let (sender, receiver) = watch::channel(None);
    children.known().insert(pid, sender);
    Ok((pid, receiver))
}

/// Sends a signal to the process group of a child, as long as that child has not been waited for.
///
/// # Errors
/// ESRCH when it has ended; EPERM when it changed its user.
pub fn signal_group(process: &Process, signal: Signal) -> io::Result<()> {
    let known = children().known();
    let pid = process.pid;
    // Its end is made known under this lock, before its pid can be another process's.
    if process.ended.borrow().is_some() || !known.contains_key(&pid) {
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    }
    match nix::sys::signal::killpg(nix::unistd::Pid::from_raw(pid), signal) {
        // It has not become a leader yet, or its group consists of others.
        Err(nix::Error::ESRCH) => Ok(nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal)?),
        other => Ok(other?),
    }
}

/// Runs something while no process is being started or waited for: nobody is between fork and exec meanwhile.
pub fn exclusively<T>(work: impl FnOnce() -> T) -> T {
    let _nobody_starts = children().starting.write().unwrap_or_else(PoisonError::into_inner);
    work()
}

/// Sends any signal, by its number, to the process group of a child or to it alone, as long as it has not been waited for.
///
/// # Errors
/// As [`signal_group`], and EINVAL for a number that is none.
pub fn send(process: &Process, signal: i32, group: bool) -> io::Result<()> {
    let known = children().known();
    if process.ended.borrow().is_some() || !known.contains_key(&process.pid) {
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    }
    let target = if group { -process.pid } else { process.pid };
    // SAFETY: takes numbers; nobody else has the pid while the lock is held.
    match unsafe { libc::kill(target, signal) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Lets nobody of its process group outlive a child: when that ends, what is left of its group is killed.
pub fn doom(process: &Process) {
    let children = children();
    let known = children.known();
    if process.ended.borrow().is_none() && known.contains_key(&process.pid) {
        children.doomed().insert(process.pid);
    }
}

/// Waits for all that has ended.
fn reap() {
    let children = children();
    let _nobody_starts = children.starting.write().unwrap_or_else(PoisonError::into_inner);
    loop {
        // Looked at first and taken under the lock: whoever signals holds it, too.
        let mut known = children.known();
        let mut status = 0;
        let mut usage = MaybeUninit::<libc::rusage>::zeroed();
        let Some(pid) = ended() else { return };
        // As long as it has not been waited for, its number is its group's.
        if children.doomed().remove(&pid) {
            let _ = nix::sys::signal::killpg(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL);
        }
        // SAFETY: both pointers are to locals that outlive the call.
        let pid = unsafe { libc::wait4(pid, &raw mut status, libc::WNOHANG, usage.as_mut_ptr()) };
        if pid <= 0 {
            return;
        }
        // SAFETY: the kernel filled it in, and all zeros would be a value of it as well.
        let usage = unsafe { usage.assume_init() };
        if let Some(sender) = known.remove(&pid) {
            let time = |time: libc::timeval| {
                Duration::from_secs(time.tv_sec.max(0) as u64) + Duration::from_micros(time.tv_usec.max(0) as u64)
            };
            let exited = libc::WIFEXITED(status);
            sender.send_replace(Some(Exit {
                code: exited.then(|| libc::WEXITSTATUS(status)),
                signal: (!exited).then(|| libc::WTERMSIG(status)),
                cpu: time(usage.ru_utime) + time(usage.ru_stime),
                peak_memory: usage.ru_maxrss.max(0) as u64 * 1024,
                at: SystemTime::now(),
            }));
        }
    }
}

/// A child that has ended and has not been waited for.
fn ended() -> Option<i32> {
    let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
    let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
    // SAFETY: the pointer is to a local, which is all zeros where the kernel leaves it alone; the pid is then 0.
    let pid = unsafe {
        if libc::waitid(libc::P_ALL, 0, info.as_mut_ptr(), flags) != 0 {
            return None;
        }
        info.assume_init().si_pid()
    };
    (pid > 0).then_some(pid)
}

/// What a signal is called where it ended a process.
pub fn signal_name(signal: i32) -> String {
    match signal {
        libc::SIGKILL => "killed".into(),
        libc::SIGTERM => "terminated".into(),
        libc::SIGINT => "interrupt".into(),
        libc::SIGHUP => "hangup".into(),
        libc::SIGQUIT => "quit".into(),
        libc::SIGABRT => "aborted".into(),
        libc::SIGSEGV => "segmentation fault".into(),
        libc::SIGPIPE => "broken pipe".into(),
        libc::SIGBUS => "bus error".into(),
        libc::SIGFPE => "floating point exception".into(),
        libc::SIGILL => "illegal instruction".into(),
        other => format!("signal {other}"),
    }
}
