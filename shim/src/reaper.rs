//! Orphans: processes of containers that lost their parent and came to us as the nearest subreaper.
//!
//! Our own processes are waited for by their descriptors, so that no wait can take another's child.
//! What ends and is nobody's is reaped here.

use std::collections::HashSet;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard};

use runx_core::sys::pidfd;
use tokio::io::Interest;

use crate::io::watched;

/// The pids of children that somebody waits for.
#[derive(Clone, Debug, Default)]
pub(crate) struct Reaper {
    known: Arc<Mutex<Known>>,
}

#[derive(Debug, Default)]
struct Known {
    pids: HashSet<i32>,
    /// Clones under way, whose pids are not known yet.
    pending: usize,
}

impl Reaper {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Announces that a child is about to be made. Until the returned guard goes, nothing is reaped.
    pub(crate) fn expect(&self) -> Expectation {
        self.known().pending += 1;
        Expectation { reaper: self.clone() }
    }

    /// A child that somebody waits for.
    pub(crate) fn add(&self, pid: i32) {
        self.known().pids.insert(pid);
    }

    /// A child that has been waited for.
    pub(crate) fn remove(&self, pid: i32) {
        self.known().pids.remove(&pid);
        self.reap();
    }

    /// Reaps what has ended and is nobody's.
    pub(crate) fn reap(&self) {
        let known = self.known();
        if known.pending > 0 {
            return;
        }
        while let Ok(Some(pid)) = pidfd::peek_any() {
            // One that is known stands before others in the kernel's list until its waiter takes it,
            // and then `remove` comes back here.
            if known.pids.contains(&pid) || pidfd::reap(pid).is_err() {
                break;
            }
        }
    }
}

/// Waits until a child ends, reaps it, and returns its exit code as a shell would show it; `None` if it cannot be waited
/// for.
pub(crate) async fn exit_of(pidfd: OwnedFd) -> Option<u32> {
    let waited = async {
        let waiter = watched(pidfd, Interest::READABLE)?;
        loop {
            if let Some(exit) = pidfd::try_wait(waiter.get_ref().as_fd())? {
                return Ok::<_, io::Error>(exit.code as u32);
            }
            waiter.readable().await?.clear_ready();
        }
    };
    waited.await.inspect_err(|e| log::error!("wait for a process: {e}")).ok()
}

/// See [`Reaper::expect`].
pub(crate) struct Expectation {
    reaper: Reaper,
}

impl Drop for Expectation {
    fn drop(&mut self) {
        self.reaper.known().pending -= 1;
        self.reaper.reap();
    }
}
