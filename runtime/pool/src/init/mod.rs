//! The init of a sandbox: process 1 of its PID namespace.
//!
//! It sets the sandbox up ahead of time, tells that it is ready, and then does what the pool asks for over its socket. It
//! trusts nobody else: it is not dumpable, closes what it does not need, and ends at the first message that is not as it
//! should be, or not from outside of the sandbox; with it ends everything in there.

mod child;
mod execute;
mod files;
mod look;
mod mounts;
mod network;
mod privileges;

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use runx_core::error::Context;
use runx_core::sys::process;
use runx_core::sys::{self};
use runx_core::{Error, Result};

use crate::filter;
use crate::sys as own;
use crate::wire::channel::{Channel, LIMIT};
use crate::wire::messages::{FromInit, Look, ToInit};
use crate::wire::setup::Setup;

/// What the init holds.
struct Init<'a> {
    setup: &'a Setup,
    channel: Channel,
    /// The user and group that programs run as.
    uid: u32,
    /// The sandbox's root directory.
    root: OwnedFd,
    /// A procfs of its PID namespace that is nobody else's, if it can have one.
    proc: Option<OwnedFd>,
    /// The filter that each program takes upon itself; empty if the init did.
    filter: Vec<libc::sock_filter>,
    /// Where programs begin before they are executed.
    stack: execute::Stack,
}

/// Becomes the init of a sandbox, in a process that was just cloned for it.
pub(crate) fn run(setup: &Setup, socket: OwnedFd, uid: u32, wait: bool) -> ! {
    let code = match Channel::new(socket) {
        Ok(channel) => match begin(setup, channel, uid, wait) {
            Ok(mut init) => init.serve(),
            Err((channel, e)) => {
                let errno = e.errno().and_then(|errno| u32::try_from(errno).ok()).unwrap_or(0);
                let said = FromInit::Failed { message: e.to_string(), errno };
                // Nobody is left to tell if this fails.
                let _ = channel.send(&said.encode(), &[]);
                1
            }
        },
        Err(_) => 1,
    };
    own::exit(code)
}

fn begin(setup: &Setup, channel: Channel, uid: u32, wait: bool) -> std::result::Result<Init<'_>, (Channel, Error)> {
    match prepare(setup, &channel, uid, wait) {
        Ok((root, proc, filter, stack)) => {
            let init = Init { setup, channel, uid, root, proc, filter, stack };
            let ready = init.look().and_then(|look| {
                init.channel.send(&FromInit::Ready(look).encode(), &[]).context("tell that the sandbox is ready")
            });
            match ready {
                Ok(()) => Ok(init),
                Err(e) => Err((init.channel, e)),
            }
        }
        Err(e) => Err((channel, e)),
    }
}

type Prepared = (OwnedFd, Option<OwnedFd>, Vec<libc::sock_filter>, execute::Stack);

fn prepare(setup: &Setup, channel: &Channel, uid: u32, wait: bool) -> Result<Prepared> {
    // SAFETY: this process never returns to what owned the others; the spawner's socket is among them.
    unsafe { sys::close_all_but(3, vec![channel.as_fd().as_raw_fd()]) };
    process::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as _, 0, 0).context("ask to end with the spawner")?;
    execute::block_signals().context("block signals")?;
    let root = sys::open("/", libc::O_PATH | libc::O_DIRECTORY).context("open the sandbox's root")?;
    let proc = mounts::proc(setup, root.as_fd())?;
    mounts::mount_all(setup, root.as_fd(), uid)?;
    if setup.own_network {
        network::loopback_up().context("start the loopback interface")?;
    }
    new_keyring(setup, uid)?;
    if wait {
        let mut buffer = [0; 16];
        let received = channel.receive(&mut buffer).context("wait for the cgroups")?;
        let message = buffer.get(..received.length).unwrap_or_default();
        if received.pid != 0 || ToInit::decode(message) != Ok(ToInit::Entered) {
            return Err(Error::Died("the pool's process did not go on".into()));
        }
    }
    // Only now: its root is the group that the process is in.
    process::unshare(libc::CLONE_NEWCGROUP).context("make a cgroup namespace")?;
    privileges::give_up(setup.unwiped)?;
    let mut instructions = filter::instructions(&setup.filter);
    if setup.unwiped && !instructions.is_empty() {
        runx_core::seccomp::load(&setup.filter, 0)?;
        instructions = Vec::new();
    }
    Ok((root, proc, instructions, execute::Stack::new()))
}

fn new_keyring(setup: &Setup, uid: u32) -> Result<()> {
    let made = if setup.single_id { own::new_session_keyring() } else { own::new_session_keyring_for(uid) };
    match made {
        // An ordinary user has one id, and soon too many keys. Programs that are refused all calls about keys need none.
        Err(e) if setup.single_id && e.raw_os_error() == Some(libc::EDQUOT) && !setup.filter.is_empty() => Ok(()),
        other => other.context("begin a session keyring"),
    }
}

impl Init<'_> {
    /// Serves until the pool's process closes the socket, or breaks the protocol. Returns the exit code.
    fn serve(&mut self) -> i32 {
        let mut buffer = vec![0; LIMIT];
        loop {
            let Ok(received) = self.channel.receive(&mut buffer) else { return 1 };
            if received.length == 0 {
                return 0;
            }
            // Whoever is in the sandbox has a pid here; the pool's process, outside, has none.
            if received.pid != 0 {
                return 1;
            }
            let Ok(message) = ToInit::decode(buffer.get(..received.length).unwrap_or_default()) else { return 1 };
            let (answer, fds) = match message {
                ToInit::Ping => (FromInit::Pong, Vec::new()),
                ToInit::Open(files) => self.open(&files),
                ToInit::Symlink(links) => (self.symlink(&links), Vec::new()),
                ToInit::Delete(paths) => (self.delete(&paths), Vec::new()),
                ToInit::Execute(execute) => match self.execute(&execute, received.fds) {
                    Some(answer) => (answer, Vec::new()),
                    None => return 1,
                },
                ToInit::Reset { wipe } => match self.reset(wipe) {
                    Ok(look) => (FromInit::Ready(look), Vec::new()),
                    // It is not what it was.
                    Err(_) => return 1,
                },
                // It was said before.
                ToInit::Entered => return 1,
            };
            let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
            if self.channel.send(&answer.encode(), &fds).is_err() {
                return 1;
            }
        }
    }

    fn reset(&self, wipe: bool) -> Result<Look> {
        execute::kill_all();
        if wipe {
            mounts::unmount_all(self.setup)?;
            mounts::mount_all(self.setup, self.root.as_fd(), self.uid)?;
            new_keyring(self.setup, self.uid)?;
        }
        self.look()
    }
}
