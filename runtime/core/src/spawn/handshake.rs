//! The messages between a process that is being set up and the one that asked for it.
//!
//! They travel over a SEQPACKET pair made for this one process. When the asking side goes away the
//! other reads the end of the stream and exits: a process that nobody knows of does not stay.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::error::{Context, Error, Result};
use crate::sys::socket;

/// Longest message; a failure's text is cut well below it.
const LIMIT: usize = 16 * 1024;

/// Longest text of a failure, in bytes.
const TEXT_LIMIT: usize = 4 * 1024;

/// What the new process says.
#[derive(Debug, Serialize, Deserialize)]
pub enum FromChild {
    /// The master side of its terminal goes with this message.
    Terminal,
    /// Its program is a WASM module, which goes with this message.
    Module {
        /// As the user named it.
        name: String,
    },
    /// The root filesystem holds no program of the name; it may be a module from elsewhere.
    Missing {
        /// As the user named it.
        name: String,
    },
    /// Its mounts are there, and it waits before pivot_root for the hooks of the runtime.
    BeforePivot,
    /// It is about to load a seccomp filter whose listener will be this descriptor of it, and waits.
    Listener {
        /// The descriptor's number.
        number: i32,
    },
    /// All is set up but for the last step.
    Ready,
    /// It has failed, and exits.
    Failed(Failure),
}

/// What the new process is told.
#[derive(Debug, Serialize, Deserialize)]
pub enum ToChild {
    /// The ids of its new user namespace are mapped.
    Mapped,
    /// It is in its cgroups.
    InCgroup,
    /// The hooks of the runtime have run.
    HooksRun,
    /// The filter may be loaded; its listener will be fetched.
    Fetch,
    /// The runner's and the compiled artifact's descriptors go with this message.
    Runner {
        /// What the runner is told after the artifact's number.
        words: String,
    },
    /// Its module cannot be run; exit.
    NoRunner,
    /// There is no such module either.
    NoModule {
        /// Why that could not be found out, if it could not.
        why: Option<String>,
    },
    /// Take the last step.
    Start,
}

/// Why a process could not be set up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What kind of failure it is.
    pub kind: FailureKind,
    /// What was attempted, on what, and why it failed.
    pub message: String,
    /// The kernel's error number, or 0.
    pub errno: i32,
}

/// Failures that callers tell apart.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FailureKind {
    /// Any step.
    Step,
    /// A hook.
    Hook,
    /// The program is not there.
    ProgramMissing(String),
    /// The program is there and cannot be executed.
    ProgramUnusable(String),
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        match failure.kind {
            FailureKind::Step => Error::Init { message: failure.message, errno: failure.errno },
            FailureKind::Hook => Error::HookInside { message: failure.message },
            FailureKind::ProgramMissing(program) => Error::Program { program, reason: failure.message, missing: true },
            FailureKind::ProgramUnusable(program) => {
                Error::Program { program, reason: failure.message, missing: false }
            }
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let errno = error.errno().unwrap_or(0);
        let (kind, mut message) = match error {
            Error::Program { program, reason, missing: true } => (FailureKind::ProgramMissing(program), reason),
            Error::Program { program, reason, missing: false } => (FailureKind::ProgramUnusable(program), reason),
            Error::Init { message, .. } => (FailureKind::Step, message),
            hook @ Error::Hook { .. } => (FailureKind::Hook, hook.to_string()),
            other => (FailureKind::Step, other.to_string()),
        };
        if message.len() > TEXT_LIMIT {
            let end = (0..=TEXT_LIMIT).rev().find(|end| message.is_char_boundary(*end)).unwrap_or(0);
            message.truncate(end);
        }
        Self { kind, message, errno }
    }
}

/// One end of a handshake.
#[derive(Debug)]
pub struct Handshake(OwnedFd);

impl Handshake {
    /// Both ends.
    pub fn pair() -> Result<(Self, Self)> {
        let (a, b) = socket::pair().context("create the handshake's sockets")?;
        Ok((Self(a), Self(b)))
    }

    /// An end that was received or accepted.
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// The socket.
    pub fn into_fd(self) -> OwnedFd {
        self.0
    }

    /// Sends a message with descriptors.
    pub fn send<M: Serialize>(&self, message: &M, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let data = postcard::to_stdvec(message).map_err(io::Error::other)?;
        socket::send(self.0.as_fd(), &data, fds)
    }

    /// Whether there is something to receive, or becomes so within `timeout`.
    pub fn readable(&self, timeout: std::time::Duration) -> io::Result<bool> {
        let mut poll = libc::pollfd { fd: std::os::fd::AsRawFd::as_raw_fd(&self.0), events: libc::POLLIN, revents: 0 };
        // SAFETY: poll is one valid pollfd.
        let ready = unsafe { libc::poll(&mut poll, 1, timeout.as_millis().min(i32::MAX as u128) as i32) };
        match crate::sys::check(ready.into()) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(false),
            other => other.map(|n| n > 0),
        }
    }

    /// Receives a message; `None` at the end of the stream.
    pub fn receive<M: DeserializeOwned>(&self) -> io::Result<Option<(M, Vec<OwnedFd>)>> {
        let Some((data, fds)) = socket::receive(self.0.as_fd(), LIMIT)? else { return Ok(None) };
        let message = postcard::from_bytes(&data).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
        Ok(Some((message, fds)))
    }
}

impl AsFd for Handshake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_keeps_its_kind_and_a_long_text_is_cut() {
        let error = Error::Program { program: "x".into(), reason: "ü".repeat(TEXT_LIMIT), missing: true };
        let failure = Failure::from(error);
        assert!(failure.message.len() <= TEXT_LIMIT);
        let (a, b) = Handshake::pair().unwrap();
        a.send(&FromChild::Failed(failure.clone()), &[]).unwrap();
        let Some((FromChild::Failed(got), _)) = b.receive().unwrap() else { panic!("another message") };
        assert_eq!(got, failure);
        assert!(matches!(Error::from(got), Error::Program { missing: true, .. }));
    }

    #[test]
    fn the_end_of_the_stream_is_told_from_a_message() {
        let (a, b) = Handshake::pair().unwrap();
        drop(a);
        assert!(b.receive::<FromChild>().unwrap().is_none());
    }
}
