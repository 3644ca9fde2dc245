//! What ends a program from another thread.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use crate::error::Result;
use crate::sys;
use runx_core::error::Context;

/// Whether a lease's program is to be ended. It is kept until the thread that runs programs has seen it, so that it is
/// not lost on one that is about to begin; and as only that thread acts on it, nothing happens once the lease is over.
#[derive(Debug)]
pub(super) struct Stop(OwnedFd);

impl Stop {
    pub(super) fn new() -> Result<Self> {
        Ok(Self(sys::event().context("make an event")?))
    }

    /// Whether it was asked for, after which it is not any more.
    pub(super) fn take(&self) -> bool {
        sys::take_event(self.0.as_fd())
    }
}

/// Readable when it was asked for.
impl AsFd for Stop {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Ends what runs in a sandbox, from another thread.
#[derive(Debug)]
pub struct Killer {
    pub(super) stop: Arc<Stop>,
    pub(super) init: OwnedFd,
}

impl Killer {
    /// Ends all processes of the program that is running now, or, if none is, of the next one of the lease, which then
    /// does not begin. Its outcome is that a signal ended it. When the lease is over this does nothing.
    pub fn kill(&self) {
        sys::set_event(self.stop.as_fd());
    }
}

/// The sandbox's init, as a pidfd.
impl AsFd for Killer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.init.as_fd()
    }
}
