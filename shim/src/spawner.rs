//! The spawner process: this program again, executed from a read-only clone of itself.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;

use anyhow::{Context, Result};
use runx_core::spawn::{Spawner, server};
use runx_core::sys::{self, mount, socket};

/// The first argument that makes this program a spawner.
pub(crate) const ARGUMENT: &str = "spawner";

/// The descriptor that it finds its connection on.
const CONTROL: i32 = 3;

/// Starts a spawner and connects to it. It ends with the connection, and is reaped like any orphan.
///
/// The calling thread must live as long as the spawner's children shall have this process as parent:
/// it is called from the main thread.
pub(crate) fn launch() -> Result<Spawner> {
    let (ours, theirs) = socket::pair().context("create the spawner's sockets")?;
    let program = read_only_self()?;
    let path = format!("/proc/self/fd/{}", program.as_raw_fd());
    let number = theirs.as_raw_fd();
    let mut command = Command::new(Path::new(&path));
    command.arg0("runx-spawner");
    command.arg(ARGUMENT).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).current_dir("/").env_clear();
    // SAFETY: between fork and exec only system calls are made.
    unsafe {
        command.pre_exec(move || {
            if number == CONTROL {
                let fd = std::os::fd::BorrowedFd::borrow_raw(CONTROL);
                return sys::set_cloexec(fd, false);
            }
            if libc::dup2(number, CONTROL) == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
        });
    }
    command.spawn().context("start the spawner")?;
    Ok(Spawner::Server(Arc::new(server::Client::new(ours))))
}

/// This program's file on a read-only mount that is nowhere attached: a process cloned into a container
/// shows it as /proc/PID/exe until its last step.
fn read_only_self() -> Result<OwnedFd> {
    let own = sys::open("/proc/self/exe", libc::O_PATH).context("open /proc/self/exe")?;
    let clone = mount::clone_tree(own.as_fd(), "", false).context("clone the mount of the shim's program")?;
    mount::set_attributes(clone.as_fd(), mount::attr::RDONLY, 0, 0, false).context("make the clone read-only")?;
    Ok(clone)
}

/// The spawner's own main.
pub(crate) fn main() -> ExitCode {
    // SAFETY: launch put the connection there, and nobody else owns it.
    let control = unsafe { OwnedFd::from_raw_fd(CONTROL) };
    if sys::fstat(control.as_fd()).is_err() || sys::set_cloexec(control.as_fd(), true).is_err() {
        std::mem::forget(control);
        eprintln!("containerd-shim-runx-v1: the spawner is started by the shim only");
        return ExitCode::FAILURE;
    }
    match server::serve(control) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}
