//! Orphans: processes of containers that lost their parent and came to us as the nearest subreaper.
//!
//! Our own processes are waited for by their descriptors, so that no wait can take another's child.
//! What ends and is nobody's is reaped here, on the main thread, whose children orphans become. Hooks, compilers and the
//! like are children of the threads that start them, and are not seen from here.

use std::collections::HashSet;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use runx_core::container::Born;
use runx_core::sys::pidfd;
use tokio::io::Interest;
use tokio::sync::Notify;

use crate::io::watched;

/// The pids of children that somebody waits for.
#[derive(Clone, Debug, Default)]
pub(crate) struct Reaper {
    known: Arc<Mutex<Known>>,
    wanted: Arc<Notify>,
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

    /// Announces that a container's process is about to be made. Nothing is reaped until it is there, or will not be;
    /// from then on it is known, for as long as the announcement is held or after it was kept.
    pub(crate) fn announce(&self) -> (Announcement, Born) {
        let pid = Arc::new(AtomicI32::new(0));
        let announcement = Announcement { reaper: self.clone(), pid: pid.clone() };
        let expectation = self.expect();
        let born = Born(Box::new(move |born| {
            expectation.reaper.add(born);
            pid.store(born, Ordering::SeqCst);
        }));
        (announcement, born)
    }

    /// A child that somebody waits for.
    pub(crate) fn add(&self, pid: i32) {
        self.known().pids.insert(pid);
    }

    /// A child that has been waited for.
    pub(crate) fn remove(&self, pid: i32) {
        self.known().pids.remove(&pid);
        self.wanted.notify_one();
    }

    /// Waits until there may be something to reap that could not be before.
    pub(crate) async fn wanted(&self) {
        self.wanted.notified().await;
    }

    /// Reaps what has ended and is nobody's. It is called by the main thread.
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
pub(crate) async fn exit_of(pidfd: Arc<OwnedFd>) -> Option<u32> {
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
        self.reaper.wanted.notify_one();
    }
}

/// See [`Reaper::announce`].
pub(crate) struct Announcement {
    reaper: Reaper,
    pid: Arc<AtomicI32>,
}

impl Announcement {
    /// Leaves it to somebody else to say when the process has been waited for.
    pub(crate) fn keep(self) {
        self.pid.store(0, Ordering::SeqCst);
    }
}

impl Drop for Announcement {
    fn drop(&mut self) {
        match self.pid.load(Ordering::SeqCst) {
            0 => {}
            pid => self.reaper.remove(pid),
        }
    }
}
