//! Processes by descriptor: signals that cannot hit a recycled pid, waits that cannot steal another's
//! child.

use super::{check, owned};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

/// `pidfd_open(2)`.
pub fn open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: only integers are passed.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })
}

/// The pid of the process behind `pidfd`, as this PID namespace sees it.
///
/// # Errors
/// `NotFound` if it has ended and was reaped, or is not visible from here.
pub fn pid(pidfd: BorrowedFd<'_>) -> io::Result<i32> {
    let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd()))?;
    let pid = text.lines().find_map(|line| line.strip_prefix("Pid:")?.trim().parse::<i32>().ok());
    pid.filter(|pid| *pid > 0).ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))
}

/// `pidfd_getfd(2)`: a duplicate of descriptor `number` of the process behind `pidfd`.
pub fn take_fd(pidfd: BorrowedFd<'_>, number: i32) -> io::Result<OwnedFd> {
    // SAFETY: only integers are passed.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), number, 0) })
}

/// `pidfd_send_signal(2)`; signal 0 only asks whether the process is there.
pub fn send_signal(pidfd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    // SAFETY: a NULL siginfo is what kill(2) would send.
    check(unsafe {
        libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, std::ptr::null::<libc::siginfo_t>(), 0)
    })
    .map(drop)
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// The code that a shell would show: the exit code, or 128 and the signal's number.
    pub code: i32,
    /// The signal that ended it.
    pub signal: Option<i32>,
}

impl Exit {
    fn from_siginfo(info: &libc::siginfo_t) -> Self {
        // SAFETY: waitid filled in the fields of a child's siginfo.
        let status = unsafe { info.si_status() };
        match info.si_code {
            libc::CLD_EXITED => Self { code: status, signal: None },
            _ => Self { code: 128 + status, signal: Some(status) },
        }
    }
}

fn waitid(kind: libc::idtype_t, id: libc::id_t, options: libc::c_int) -> io::Result<Option<libc::siginfo_t>> {
    loop {
        // SAFETY: siginfo_t is plain data for which all zeroes is a valid value.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        // SAFETY: info is writable; the kind and id only name whom to wait for.
        let value = unsafe { libc::waitid(kind, id, &mut info, libc::WEXITED | libc::__WALL | options) };
        match check(value.into()) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
            // SAFETY: si_pid is set by waitid, and 0 when nothing has ended yet.
            Ok(_) if unsafe { info.si_pid() } == 0 => return Ok(None),
            Ok(_) => return Ok(Some(info)),
        }
    }
}

/// Waits for our child behind `pidfd` to end, and reaps it.
pub fn wait(pidfd: BorrowedFd<'_>) -> io::Result<Exit> {
    loop {
        if let Some(info) = waitid(libc::P_PIDFD, pidfd.as_raw_fd() as libc::id_t, 0)? {
            return Ok(Exit::from_siginfo(&info));
        }
    }
}

/// Reaps our child behind `pidfd` if it has ended.
pub fn try_wait(pidfd: BorrowedFd<'_>) -> io::Result<Option<Exit>> {
    Ok(waitid(libc::P_PIDFD, pidfd.as_raw_fd() as libc::id_t, libc::WNOHANG)?.map(|info| Exit::from_siginfo(&info)))
}

/// The pid of a child of the calling thread that has ended and is not reaped yet; it stays unreaped. Orphans that come to a
/// subreaper are its first thread's.
pub fn peek_any() -> io::Result<Option<i32>> {
    match waitid(libc::P_ALL, 0, libc::WNOHANG | libc::WNOWAIT | libc::__WNOTHREAD) {
        // SAFETY: waitid filled in the fields of a child's siginfo.
        Ok(info) => Ok(info.map(|info| unsafe { info.si_pid() })),
        Err(e) if e.raw_os_error() == Some(libc::ECHILD) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Reaps our child `pid` if it has ended.
pub fn reap(pid: i32) -> io::Result<Option<Exit>> {
    Ok(waitid(libc::P_PID, pid as libc::id_t, libc::WNOHANG)?.map(|info| Exit::from_siginfo(&info)))
}

/// Waits until the process behind `pidfd`, ours or not, has ended, or `timeout_ms` milliseconds passed
/// (-1: for ever). It is not reaped. Returns whether it ended.
pub fn wait_ended(pidfd: BorrowedFd<'_>, timeout_ms: i32) -> io::Result<bool> {
    super::poll(pidfd, libc::POLLIN, timeout_ms)
}
