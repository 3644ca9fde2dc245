//! The spawner process, which clones containers: a fork of the daemon from before there were threads.
//!
//! The daemon was executed from a read-only clone of its own file, and so its fork is: a process that was cloned into
//! a container shows that as /proc/PID/exe until its last step. A fork shares its memory with the daemon, where a
//! program of its own would need it again. Only when a spawner has died the next one is executed, since by then there are
//! threads.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;

use anyhow::{Context, Result};
use runx_core::spawn::{Spawner, refuse_threads, server};
use runx_core::sys::process::{self, Cloned, restore_open_files};
use runx_core::sys::{self, socket};

/// The first argument that makes this program a spawner.
pub(crate) const ARGUMENT: &str = "spawner";

/// The descriptor that it finds its connection on.
const CONTROL: i32 = 3;

/// Forks a spawner and connects to it. It ends with the connection, and is reaped like any orphan.
///
/// The calling thread must be the only one, and live as long as the spawner's children shall have this process as
/// parent: it is called from the main thread.
///
/// # Errors
/// The kernel's refusals.
pub(crate) fn fork() -> Result<Spawner> {
    refuse_threads()?;
    let (ours, theirs) = socket::pair().context("create the spawner's sockets")?;
    // SAFETY: refuse_threads made sure that there is no other thread.
    match unsafe { process::clone(0, None) }.context("fork the spawner")? {
        Cloned::Child => {
            // The daemon's end goes too, or the spawner would not notice when that is closed.
            // The log's descriptor is closed with it, and its number will be another's.
            log::set_max_level(log::LevelFilter::Off);
            // SAFETY: this process never returns to what owned the others.
            unsafe { sys::close_all_but(3, vec![theirs.as_raw_fd()]) };
            std::mem::forget(ours);
            // SAFETY: a process that was just cloned has one thread.
            unsafe { forget_environment() };
            let code = i32::from(server::serve(theirs).is_err());
            // SAFETY: ends this process without running destructors that belong to the daemon's copy.
            unsafe { libc::_exit(code) }
        }
        Cloned::Parent { .. } => Ok(connected_to(ours)),
    }
}

/// Executes a spawner and connects to it, as [`fork`] does for a process with threads.
///
/// # Errors
/// The kernel's refusals.
pub(crate) fn execute() -> Result<Spawner> {
    let (ours, theirs) = socket::pair().context("create the spawner's sockets")?;
    let number = theirs.as_raw_fd();
    // The daemon's own file, which is on a read-only mount.
    let mut command = Command::new("/proc/self/exe");
    command.arg0("runx-spawner");
    command.arg(ARGUMENT).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).current_dir("/").env_clear();
    // SAFETY: between fork and exec only system calls are made.
    unsafe { command.pre_exec(move || restore_open_files().and_then(|()| place(number, CONTROL))) };
    command.spawn().context("start the spawner")?;
    Ok(connected_to(ours))
}

fn connected_to(socket: OwnedFd) -> Spawner {
    Spawner::Server(Arc::new(server::Client::new(socket)))
}

/// Moves a descriptor to a number that the next program expects it on. Only makes system calls.
pub(crate) fn place(from: i32, to: i32) -> io::Result<()> {
    if from == to {
        // SAFETY: the caller owns the descriptor, and it is not used beyond the call.
        return sys::set_cloexec(unsafe { std::os::fd::BorrowedFd::borrow_raw(to) }, false);
    }
    // SAFETY: both are plain descriptor numbers.
    if unsafe { libc::dup2(from, to) } == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Overwrites the environment: a container's process is a copy of this one until its last step, and whatever
/// containerd was started with is none of its business.
///
/// # Safety
/// There must be one thread only.
unsafe fn forget_environment() {
    unsafe extern "C" {
        static environ: *const *mut libc::c_char;
    }
    // SAFETY: environ ends with a null pointer, its entries are NUL-terminated strings that may be written to, and
    // there is no other thread that could read them.
    unsafe {
        let mut entry = environ;
        while !entry.is_null() && !(*entry).is_null() {
            let length = CStr::from_ptr(*entry).count_bytes();
            std::ptr::write_bytes(*entry, 0, length);
            entry = entry.add(1);
        }
        libc::clearenv();
    }
}

/// The main of a spawner that was executed.
pub(crate) fn main() -> ExitCode {
    // SAFETY: F_SETFD takes an integer; on a number that is no descriptor it fails.
    if unsafe { libc::fcntl(CONTROL, libc::F_SETFD, libc::FD_CLOEXEC) } == -1 {
        eprintln!("containerd-shim-runx-v1: the spawner is started by the shim only");
        return ExitCode::FAILURE;
    }
    // SAFETY: it is open. execute put the connection there, and nothing has been opened yet that could own it.
    let control = unsafe { OwnedFd::from_raw_fd(CONTROL) };
    match server::serve(control) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}
