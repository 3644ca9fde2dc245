//! Requests for sandboxes, one at a time: each is one clone.

use std::os::fd::{AsFd, OwnedFd};

use runx_core::error::Context;
use runx_core::sys::process::{self, Cloned};
use runx_core::{Error, Result};

use super::{broken, errno, hear};
use crate::init;
use crate::wire::channel::{Channel, LIMIT};
use crate::wire::setup::{FromSpawner, Setup, ToSpawner};

/// Serves until the pool's process closes the socket.
pub(super) fn serve(channel: &Channel, setup: &Setup) -> Result<()> {
    let mut buffer = vec![0; LIMIT];
    while let Some((message, fds)) = hear(channel, &mut buffer)? {
        let ToSpawner::Make { uid, cgroup, wait } = message else { return Err(broken("asked for something else")) };
        let (answer, pidfd) = match make(setup, uid, cgroup, wait, fds) {
            Ok(pidfd) => (FromSpawner::Made, Some(pidfd)),
            Err(e) => (FromSpawner::Failed { message: e.to_string(), errno: errno(&e) }, None),
        };
        let fds: Vec<_> = pidfd.iter().map(AsFd::as_fd).collect();
        channel.send(&answer.encode(), &fds).context("answer a request for a sandbox")?;
    }
    Ok(())
}

fn make(setup: &Setup, uid: u32, cgroup: bool, wait: bool, fds: Vec<OwnedFd>) -> Result<OwnedFd> {
    let mut fds = fds.into_iter();
    let socket = fds.next().ok_or_else(|| broken("sent no socket for a sandbox"))?;
    let cgroup = if cgroup { Some(fds.next().ok_or_else(|| broken("sent no cgroup for a sandbox"))?) } else { None };
    let mut namespaces = libc::CLONE_NEWPID | libc::CLONE_NEWNS | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
    if setup.own_network {
        namespaces |= libc::CLONE_NEWNET;
    }
    // SAFETY: the spawner never starts a thread.
    match unsafe { process::clone(namespaces as u64, cgroup.as_ref().map(AsFd::as_fd)) } {
        Ok(Cloned::Child) => init::run(setup, socket, uid, wait),
        Ok(Cloned::Parent { pidfd, .. }) => Ok(pidfd),
        Err(e) => Err(Error::system("clone a sandbox into its namespaces", e)),
    }
}
