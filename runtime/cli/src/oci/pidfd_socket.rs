//! Handing a process's descriptor to whoever asked for it.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result};
use runx_core::sys::socket;

/// Connects before anything is made, so that a wrong path leaves nothing.
pub(super) fn connect(path: &Path) -> Result<UnixStream> {
    UnixStream::connect(path).with_context(|| format!("connect to pidfd socket {}", path.display()))
}

/// Sends a pidfd with the word that runc sends with it: `standard` for a container's first process, `setns` for
/// others.
pub(super) fn send(socket: &UnixStream, kind: &str, pidfd: &OwnedFd) -> Result<()> {
    socket::send(socket.as_fd(), kind.as_bytes(), &[pidfd.as_fd()]).context("send a pidfd to the pidfd socket")
}
