//! A seccomp filter that asks a listener: how its descriptor leaves the process that loads it.
//!
//! Once the filter is loaded, any system call may have to wait for the listener, so none is made before the listener
//! has its descriptor. The parent is told the number that the descriptor will have, and takes it with
//! `pidfd_getfd(2)`.

use std::os::fd::{AsFd, AsRawFd, IntoRawFd};

use crate::error::{Context, Error, Result};
use crate::spawn::handshake::{FromChild, Handshake, ToChild};

/// Loads the filter and returns when the listener has been handed over.
pub(super) fn load_with_listener(instructions: &[u8], flags: u64, parent: &Handshake) -> Result<()> {
    // The kernel takes the lowest number that is free, as dup does, and no other thread could come between.
    // SAFETY: the descriptor is borrowed for the call.
    let free = crate::sys::owned(unsafe { libc::dup(parent.as_fd().as_raw_fd()) }.into());
    let free = free.context("find a free descriptor")?;
    let number = free.as_raw_fd();
    drop(free);
    parent.send(&FromChild::Listener { number }, &[]).context("announce the seccomp listener")?;
    match parent.receive::<ToChild>().context("hear whether the seccomp filter may be loaded")? {
        Some((ToChild::Fetch, _)) => {}
        _ => super::exit(1),
    }
    let listener = crate::seccomp::load_listening(instructions, flags)?;
    if listener.as_raw_fd() != number {
        let message = format!("the seccomp listener is descriptor {} and not {number}", listener.as_raw_fd());
        return Err(Error::Init { message, errno: 0 });
    }
    let mut word = [0u8; 64];
    // The plainest call: a filter that lets a program live allows it, or the listener, which has its descriptor by
    // then, answers for it.
    // SAFETY: the buffer is writable for its length.
    unsafe { libc::read(parent.as_fd().as_raw_fd(), word.as_mut_ptr().cast(), word.len()) };
    // Closed by the exec: closing it here would be another call for the listener.
    let _ = listener.into_raw_fd();
    Ok(())
}
