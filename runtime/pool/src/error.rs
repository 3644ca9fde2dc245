//! The one typed error of the library.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// A result of this library.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong with a pool and its sandboxes. That a program fails is no error but an
/// [`Outcome`](crate::Outcome).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A template, or the settings of a pool, contradict themselves or ask for what is not there.
    #[error("invalid {field} of the pool: {reason}")]
    Template {
        /// The field.
        field: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// A command cannot be given to a sandbox.
    #[error("invalid command: {0}")]
    Command(String),
    /// The process that makes sandboxes could not begin, or has ended.
    #[error("the pool's spawner: {0}")]
    Spawner(String),
    /// A sandbox could not be made.
    #[error("make a sandbox: {message}")]
    Setup {
        /// What was attempted, on what, and what the kernel said.
        message: String,
        /// The kernel's error number, 0 where there is none.
        errno: i32,
    },
    /// A sandbox did not prove to be as a new one is, and was thrown away.
    #[error("a sandbox is not clean: {0}")]
    Unclean(String),
    /// The sandbox has ended or has broken the protocol. It is thrown away.
    #[error("the sandbox is gone: {0}")]
    Gone(String),
    /// A file of a sandbox cannot be opened, made or removed.
    #[error("{operation} {} in the sandbox: {source}", path.display())]
    File {
        /// What was attempted.
        operation: &'static str,
        /// The path, as the sandbox's programs see it.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// As many wait already as may.
    #[error("the pool is busy: {0} requests wait for a sandbox already")]
    QueueFull(usize),
    /// No sandbox became free in time.
    #[error("no sandbox became free within {} ms", .0.as_millis())]
    Timeout(Duration),
    /// The pool is being closed.
    #[error("the pool is closing")]
    Closed,
    /// A call to the kernel failed.
    #[error(transparent)]
    System(#[from] runx_core::Error),
}

impl Error {
    /// The kernel's error number, where one is behind this error.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::System(error) => error.errno(),
            Self::File { source, .. } => source.raw_os_error(),
            Self::Setup { errno, .. } if *errno != 0 => Some(*errno),
            _ => None,
        }
    }
}
