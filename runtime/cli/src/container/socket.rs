//! The socket on which a container's monitor is reached, in the directory of the core's state.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use anyhow::{Context, Result};
use runx_core::sys;

use super::frames::{self, Kind};

const NAME: &str = "attach";

/// Listens in the state directory of a container.
pub(super) fn listen(state: &Path) -> Result<UnixListener> {
    let listener = short(state, |path| UnixListener::bind(path))
        .and_then(|listener| listener.set_nonblocking(true).map(|()| listener));
    listener.with_context(|| format!("listen on {}", state.join(NAME).display()))
}

/// Connects to the monitor of a container.
pub(super) fn connect(state: &Path) -> io::Result<UnixStream> {
    short(state, |path| UnixStream::connect(path))
}

/// Says one thing to the monitor of a container.
pub(super) fn say(state: &Path, kind: Kind, data: &[u8]) -> io::Result<()> {
    frames::send(&mut connect(state)?, kind, data)
}

/// A unix address has no room for a long path: the directory is named by its descriptor.
fn short<T>(state: &Path, on: impl FnOnce(&Path) -> io::Result<T>) -> io::Result<T> {
    let directory = sys::open(state, libc::O_PATH | libc::O_DIRECTORY)?;
    on(Path::new(&format!("/proc/self/fd/{}/{NAME}", directory.as_raw_fd())))
}
