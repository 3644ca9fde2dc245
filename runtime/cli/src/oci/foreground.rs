//! Waiting for a process in the foreground: its signals, its terminal, its exit code.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result};
use runx_core::container::Process;
use runx_core::sys::pidfd::{self, Exit};

use super::console::{self, Terminal};
use super::notify::Proxy;
use crate::message;

/// Signals that are held back from this process, to be read from a descriptor.
pub(crate) struct Signals(OwnedFd);

impl Signals {
    /// Holds back all signals. Before the clone, so that none is lost; the container's process gets a
    /// clean slate.
    pub(crate) fn hold() -> Result<Self> {
        // SAFETY: sigset_t is plain data that sigfillset makes valid, and the descriptor that signalfd
        // returns is nobody else's.
        unsafe {
            let mut all: libc::sigset_t = std::mem::zeroed();
            libc::sigfillset(&mut all);
            libc::sigprocmask(libc::SIG_SETMASK, &all, std::ptr::null_mut());
            match libc::signalfd(-1, &all, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) {
                -1 => Err(io::Error::last_os_error()).context("open a descriptor for signals"),
                fd => Ok(Self(OwnedFd::from_raw_fd(fd))),
            }
        }
    }

    /// The next one that came, if any.
    pub(crate) fn next(&self) -> Option<i32> {
        // SAFETY: signalfd_siginfo is plain data for which all zeroes is a valid value.
        let mut info: libc::signalfd_siginfo = unsafe { std::mem::zeroed() };
        // SAFETY: info is writable for its size.
        let n = unsafe { libc::read(self.0.as_raw_fd(), (&raw mut info).cast(), size_of_val(&info)) };
        (n as usize == size_of_val(&info)).then_some(info.ssi_signo as i32)
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Adopts processes that lose their parent, so that they are reaped.
pub(super) fn become_subreaper() -> Result<()> {
    runx_core::sys::process::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0).context("become a subreaper").map(drop)
}

/// Waits for the process's end, passing signals on to it and connecting its terminal to ours, and its word that
/// it is ready to the service manager.
pub(crate) fn wait(
    process: &Process,
    signals: &Signals,
    terminal: Option<&Terminal>,
    proxy: Option<&Proxy>,
) -> Result<Exit> {
    let master = terminal.map(Terminal::master);
    // SAFETY: the standard streams stay open for as long as this program runs.
    let (stdin, stdout) = unsafe { (BorrowedFd::borrow_raw(0), BorrowedFd::borrow_raw(1)) };
    let mut from_user = master.is_some();
    let mut from_container = master.is_some();
    let mut exit = None;
    loop {
        let poll = |fd: i32, on: bool| libc::pollfd { fd: if on { fd } else { -1 }, events: libc::POLLIN, revents: 0 };
        let mut fds = [
            poll(process.pidfd().as_raw_fd(), exit.is_none()),
            poll(signals.0.as_raw_fd(), true),
            poll(0, from_user && exit.is_none()),
            poll(master.map_or(-1, |master| master.as_raw_fd()), from_container),
            poll(proxy.map_or(-1, |proxy| proxy.fd().as_raw_fd()), true),
        ];
        // After the end, only what the terminal still holds is fetched.
        let timeout = if exit.is_some() { 0 } else { -1 };
        // SAFETY: fds is a valid list of that many.
        let ready = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, timeout) };
        if ready == -1 {
            let error = io::Error::last_os_error();
            if error.kind() == io::ErrorKind::Interrupted {
                continue;
            }
            return Err(error).context("wait for the container");
        }
        if let Some(master) = master {
            if fds[2].revents != 0 {
                from_user = console::copy(stdin, master);
            }
            if fds[3].revents != 0 {
                from_container = console::copy(master, stdout);
            }
        }
        if let Some(proxy) = proxy.filter(|_| fds[4].revents != 0)
            && let Err(e) = proxy.forward(std::process::id() as i32)
        {
            log::warn!("{}", message(&e));
        }
        while let Some(signal) = signals.next() {
            forward(process, signal, terminal);
        }
        if fds[0].revents != 0 {
            let end = process.wait()?;
            log::debug!("process {} ended with exit code {}", process.pid(), end.code);
            exit = Some(end);
        }
        if let Some(exit) = exit
            && (!from_container || ready == 0)
        {
            return Ok(exit);
        }
    }
}

/// Passes a signal on to the process, and reaps orphans.
pub(crate) fn forward(process: &Process, signal: i32, terminal: Option<&Terminal>) {
    match signal {
        libc::SIGCHLD => {
            // Orphans that were handed to us; the process itself is waited for by its descriptor.
            while let Ok(Some(pid)) = pidfd::peek_any() {
                if pid == process.pid() || pidfd::reap(pid).is_err() {
                    break;
                }
            }
        }
        libc::SIGURG => {}
        libc::SIGWINCH if terminal.is_some() => {
            if let Some(terminal) = terminal {
                terminal.resize();
            }
        }
        _ => {
            log::debug!("forwarding signal {signal} to process {}", process.pid());
            // It may have ended in this moment.
            let _ = pidfd::send_signal(process.pidfd().as_fd(), signal);
        }
    }
}
