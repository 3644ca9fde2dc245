//! A time namespace: clocks are set before anybody is in it.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use crate::error::{Context, Result};
use crate::sys::process::{self, CLONE_NEWTIME};
use crate::sys::{self, resolve};

/// Makes a time namespace with these offsets and enters it. `proc` is a procfs of this process's PID namespace.
pub(super) fn enter(proc: &OwnedFd, offsets: &[(String, i64, u32)]) -> Result<()> {
    process::unshare(CLONE_NEWTIME).context("unshare the time namespace")?;
    // SAFETY: getpid cannot fail and touches no memory.
    let own = unsafe { libc::getpid() };
    let text: String = offsets.iter().map(|(clock, secs, nanosecs)| format!("{clock} {secs} {nanosecs}\n")).collect();
    if !text.is_empty() {
        let rules = resolve::BENEATH | resolve::NO_SYMLINKS | resolve::NO_XDEV;
        sys::openat2(proc.as_fd(), format!("{own}/timens_offsets"), libc::O_WRONLY, 0, rules)
            .and_then(|fd| File::from(fd).write_all(text.as_bytes()))
            .with_context(|| format!("set linux.timeOffsets {:?}", text.trim_end()))?;
    }
    // A namespace that was unshared is only for children; to be in it, it has to be joined. The file is a magic
    // link, which is safe to follow on a procfs over which nothing can be mounted.
    let path = sys::cstring(format!("{own}/ns/time_for_children")).context("name the time namespace")?;
    // SAFETY: the path is NUL-terminated.
    let namespace = unsafe { libc::openat(proc.as_raw_fd(), path.as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC) };
    let namespace = sys::owned(namespace.into()).context("open the new time namespace")?;
    process::setns(namespace.as_fd(), CLONE_NEWTIME).context("enter the new time namespace")
}
