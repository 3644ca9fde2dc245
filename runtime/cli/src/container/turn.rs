//! Waiting for what others do with containers, of several at once: for their locks, and for changes of their records.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use anyhow::{Context as _, Result};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use runx_core::spawn::refuse_threads;
use runx_core::sys::{self, pidfd, process};

/// Tells when something in the directories of containers was made, renamed or removed: a record is renamed to its place, and
/// a container that is removed is renamed first.
pub(super) struct Changes(Inotify);

impl Changes {
    /// # Errors
    /// When the user has as many of these as he may.
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self(Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?))
    }

    /// Tells of this directory, too. What has happened before is to be looked at after this.
    ///
    /// # Errors
    /// When it is not there, or the user may watch no more.
    pub(super) fn watch(&self, directory: &Path) -> io::Result<()> {
        let flags = AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVE | AddWatchFlags::IN_DELETE;
        let own = AddWatchFlags::IN_MOVE_SELF | AddWatchFlags::IN_DELETE_SELF | AddWatchFlags::IN_ONLYDIR;
        self.0.add_watch(directory, flags | own)?;
        Ok(())
    }

    /// Forgets what was told. What comes after this makes [`Self::fd`] readable.
    pub(super) fn forget(&self) {
        while self.0.read_events().is_ok_and(|events| !events.is_empty()) {}
    }

    /// What to poll.
    pub(super) fn fd(&self) -> i32 {
        self.0.as_fd().as_raw_fd()
    }
}

/// A process that waits for the lock of a container and ends once it has had it: the kernel has no other way to wait for a lock
/// and for something else. It ends with this one.
pub(super) struct Locker(OwnedFd);

impl Locker {
    /// Begins to wait for the lock of the container in this directory.
    ///
    /// # Errors
    /// When the directory is not there, and the kernel's.
    pub(super) fn start(directory: &Path) -> Result<Self> {
        let what = || format!("open {}", directory.display());
        let lock = sys::open(directory, libc::O_RDONLY | libc::O_DIRECTORY).with_context(what)?;
        refuse_threads()?;
        let parent = std::process::id();
        // SAFETY: refuse_threads made sure that there is no other thread.
        match unsafe { process::clone(0, None) }.context("clone a process to wait for a lock")? {
            process::Cloned::Parent { pidfd, .. } => Ok(Self(pidfd)),
            process::Cloned::Child => {
                if process::end_with(parent) {
                    // SAFETY: flock takes a descriptor and flags.
                    while unsafe { libc::flock(lock.as_raw_fd(), libc::LOCK_EX) } == -1
                        && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted
                    {}
                }
                // SAFETY: ends this process without running destructors that belong to the caller's copy.
                unsafe { libc::_exit(0) }
            }
        }
    }

    /// Whether it has had the lock.
    pub(super) fn is_done(&self) -> bool {
        pidfd::wait_ended(self.0.as_fd(), 0).unwrap_or(true)
    }

    /// What to poll.
    pub(super) fn fd(&self) -> i32 {
        self.0.as_raw_fd()
    }
}

impl Drop for Locker {
    fn drop(&mut self) {
        let _ = pidfd::send_signal(self.0.as_fd(), libc::SIGKILL);
        let _ = pidfd::wait(self.0.as_fd());
    }
}
