//! The spawner: a process of its own that clones sandboxes ahead of time.
//!
//! The pool's process may be large, have many threads and many mounts; cloning from it would cost time and copy its
//! memory to where hostile programs run. So it executes its program again, in a mode in which that becomes the spawner:
//! first in a new user namespace whose ids the pool maps, then, by one clone, in new PID and mount namespaces. There it is
//! process 1, so that when it dies, the kernel ends every sandbox with it; and its mount table holds nothing but what
//! sandboxes see, since a clone copies it: a node's thousand mounts cost over a millisecond each time.

mod serve;
mod tree;

pub(crate) use tree::{attach, mask, new_proc, restrict};

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use runx_core::error::Context;
use runx_core::sys::process::{self, Cloned};
use runx_core::sys::{self};
use runx_core::{Error, Result};

use crate::sys as own;
use crate::wire::channel::{Channel, LIMIT};
use crate::wire::setup::{FromSpawner, Setup, ToSpawner};

/// The name that a program is executed by to become a spawner, and what it is told then.
pub(crate) const NAME: &str = "runx-pool-spawner";
pub(crate) const WORD: &str = "serve";

/// Becomes the spawner if the program was started to be one, and then never returns. Every program that makes a
/// [`Pool`](crate::Pool) without naming another one in [`Settings::spawner`](crate::Settings::spawner) calls this first in
/// its `main`, before there are threads.
pub fn spawner_main() {
    if !is_meant() {
        return;
    }
    let code = match own::take_standard_input().and_then(Channel::new) {
        Ok(channel) => match run(&channel) {
            Ok(()) => 0,
            Err(e) => {
                let said = FromSpawner::Failed { message: e.to_string(), errno: errno(&e) };
                // Nobody is left to tell if this fails.
                let _ = channel.send(&said.encode(), &[]);
                1
            }
        },
        // Somebody executed us by hand.
        Err(_) => 2,
    };
    own::exit(code)
}

/// Whether this program was executed to become a spawner.
pub(crate) fn is_meant() -> bool {
    let mut args = std::env::args_os();
    args.next().is_some_and(|name| name == NAME) && args.next().is_some_and(|word| word == WORD)
}

fn errno(error: &Error) -> u32 {
    error.errno().and_then(|errno| u32::try_from(errno).ok()).unwrap_or(0)
}

fn broken(what: &str) -> Error {
    Error::Died(format!("the pool's process {what}"))
}

/// Waits for a message, and refuses one of anybody but the pool's process.
fn hear(channel: &Channel, buffer: &mut [u8]) -> Result<Option<(ToSpawner, Vec<OwnedFd>)>> {
    let received = channel.receive(buffer).context("hear the pool's process")?;
    if received.length == 0 {
        return Ok(None);
    }
    let message = buffer.get(..received.length).unwrap_or_default();
    let message = ToSpawner::decode(message).map_err(|e| broken(&format!("sent a {e}")))?;
    Ok(Some((message, received.fds)))
}

fn run(channel: &Channel) -> Result<()> {
    process::set_name(c"runx-pool");
    process::reset_signals().context("reset signals")?;
    own::reset_reserved_signals();
    own::umask(0o022);
    // Here, where root may also raise it.
    own::limit_core_files().context("limit core files")?;
    // SAFETY: this is the beginning of the program, and nothing owns a descriptor but the socket's and the streams'.
    unsafe { sys::close_all_but(3, vec![channel.as_fd().as_raw_fd()]) };
    let mut buffer = vec![0; LIMIT];
    let (setup, trees) = match hear(channel, &mut buffer)? {
        Some((ToSpawner::Setup(setup), trees)) => (setup, trees),
        _ => return Err(broken("did not begin with a setup")),
    };
    if setup.user_namespace {
        process::unshare(libc::CLONE_NEWUSER).context("make a user namespace")?;
        channel.send(&FromSpawner::Map.encode(), &[]).context("ask for the user namespace's ids")?;
        match hear(channel, &mut buffer)? {
            Some((ToSpawner::Mapped, _)) => {}
            _ => return Err(broken("did not map the user namespace's ids")),
        }
        if !setup.single_id {
            own::become_root().context("become the user namespace's root")?;
        }
    }
    if !setup.single_id {
        own::drop_groups().context("leave the supplementary groups")?;
    }
    process::set_undumpable().context("hide the spawner's memory")?;
    let namespaces = libc::CLONE_NEWPID | libc::CLONE_NEWNS | libc::CLONE_NEWUTS | libc::CLONE_PARENT;
    // SAFETY: the program has just begun and never started a thread.
    match unsafe { process::clone(namespaces as u64, None) }.context("clone the spawner into its namespaces")? {
        Cloned::Parent { pidfd, .. } => {
            channel.send(&FromSpawner::Born.encode(), &[pidfd.as_fd()]).context("hand over the spawner")
        }
        Cloned::Child => {
            drop(buffer);
            begin(channel, &setup, trees)?;
            serve::serve(channel, &setup)
        }
    }
}

/// A pool's process that the kernel spares when memory is short does not want that for what its sandboxes run.
fn give_up_protection() -> std::io::Result<()> {
    const FILE: &str = "/proc/self/oom_score_adj";
    let protected = std::fs::read_to_string(FILE)?.starts_with('-');
    if protected { std::fs::write(FILE, "0") } else { Ok(()) }
}

/// The spawner proper, before its first request.
fn begin(channel: &Channel, setup: &Setup, trees: Vec<OwnedFd>) -> Result<()> {
    process::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as _, 0, 0).context("ask to end with the pool's process")?;
    own::new_session_keyring().context("begin a session keyring")?;
    give_up_protection().context("let programs be ended when the machine has no memory")?;
    own::set_hostname(&setup.hostname).context("set the host name")?;
    tree::enter(setup, trees)?;
    // Sandboxes are waited for by their pidfds, in another process: here the kernel reaps them.
    own::ignore_children();
    channel.send(&FromSpawner::Ready.encode(), &[]).context("tell that the spawner is ready")
}
