//! Seccomp listeners: fetching a filter's descriptor from the process that loads it, and handing it over.
//!
//! config-linux.md, "Seccomp" and "The Container Process State".

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::error::{Context, Error, Result};
use crate::hooks::HookState;
use crate::spawn::handshake::{FromChild, Handshake, ToChild};
use crate::sys::{pidfd, socket};

/// Who answers the calls that a filter asks about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listener {
    /// Its socket.
    pub path: PathBuf,
    /// Handed on to it as it is.
    pub metadata: String,
}

/// What it is told, with the descriptor.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ContainerProcessState<'a> {
    oci_version: &'a str,
    fds: [&'static str; 1],
    pid: i32,
    metadata: &'a str,
    state: &'a HookState,
}

impl Listener {
    /// The process behind `handshake` is about to load its filter, whose descriptor will have this number: takes it
    /// and hands it over, then lets the process go on.
    pub(super) fn serve(
        &self,
        handshake: &Handshake,
        process: BorrowedFd<'_>,
        number: i32,
        state: &HookState,
    ) -> Result<()> {
        let socket = UnixStream::connect(&self.path)
            .on("failed to connect with seccomp agent: connect to linux.seccomp.listenerPath", &self.path)?;
        handshake.send(&ToChild::Fetch, &[]).context("tell the process to load its filter")?;
        let descriptor = fetch(handshake, process, number)?;
        let message = ContainerProcessState {
            oci_version: &state.oci_version,
            fds: ["seccompFd"],
            pid: pidfd::pid(process).context("find the process's pid")?,
            metadata: &self.metadata,
            state,
        };
        let text = serde_json::to_vec(&message)
            .map_err(|e| Error::system("write the container process state", io::Error::other(e)))?;
        socket::send(socket.as_fd(), &text, &[descriptor.as_fd()]).on("send the seccomp descriptor to", &self.path)?;
        // It reads anything as "go on".
        handshake.send(&ToChild::Start, &[]).context("tell the process to go on")
    }
}

/// Takes the descriptor as soon as it is there. Nothing tells when: the process may not make a call after it.
fn fetch(handshake: &Handshake, process: BorrowedFd<'_>, number: i32) -> Result<OwnedFd> {
    loop {
        match pidfd::take_fd(process, number) {
            Ok(fd) => {
                let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
                if link.as_ref().is_ok_and(|link| link.to_string_lossy().contains("seccomp notify")) {
                    return Ok(fd);
                }
                let what = format!("descriptor {number} of the process is {link:?} and no seccomp listener");
                return Err(Error::Init { message: what, errno: libc::EBADF });
            }
            Err(e) if e.raw_os_error() == Some(libc::EBADF) => {}
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => return Err(Error::Finished),
            Err(e) => return Err(e).context("take the seccomp descriptor out of the process"),
        }
        if handshake.readable(Duration::from_millis(1)).context("hear from the process")? {
            return match handshake.receive().context("hear from the process")? {
                Some((FromChild::Failed(failure), _)) => Err(failure.into()),
                _ => Err(Error::Died("it ended before its seccomp filter was loaded".into())),
            };
        }
    }
}
