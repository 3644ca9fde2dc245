//! The one typed error of the library.
//!
//! The shim maps variants to ttrpc codes and the command to exit codes, so a caller can tell "there is
//! no such container" from "the kernel refused" without reading text. Every text names what was
//! attempted, on what, and why it failed.

use std::io;
use std::path::{Path, PathBuf};

/// A result of this library.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong with a container.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The container id breaks the rules of [`crate::container::validate_id`].
    #[error("invalid container id {id:?}: {reason}")]
    InvalidId {
        /// The id as given.
        id: String,
        /// Which rule it breaks.
        reason: &'static str,
    },
    /// Another container has this id.
    #[error("container with given ID already exists: {0:?}")]
    AlreadyExists(String),
    /// No container has this id under this root.
    #[error("container does not exist: {0:?}")]
    NotFound(String),
    /// The operation is not allowed in the container's present state.
    #[error("cannot {operation} container {id:?} in the {status} state")]
    WrongState {
        /// What was asked for, as a verb.
        operation: &'static str,
        /// The container.
        id: String,
        /// Its state in the words of the runtime-spec.
        status: String,
    },
    /// config.json, or a process description, breaks the runtime-spec or contradicts itself.
    #[error("invalid {document}: {reason}")]
    InvalidSpec {
        /// The file or message that holds the mistake.
        document: String,
        /// The field and what is wrong with it.
        reason: String,
    },
    /// A field is valid but has no effect here, so it is refused instead of being ignored.
    #[error("{field} is not supported: {reason}")]
    Unsupported {
        /// The field as it is called in config.json.
        field: String,
        /// Why.
        reason: String,
    },
    /// The program of the container cannot be executed.
    #[error("unable to start container process: exec: {program:?}: {reason}")]
    Program {
        /// The program as the user named it.
        program: String,
        /// Why it cannot run, in runc's words where tools match on them.
        reason: String,
        /// Whether it is missing, or there and not executable.
        missing: bool,
    },
    /// A WASM module cannot be run.
    #[error("cannot run {module:?} as WebAssembly: {reason}")]
    Wasm {
        /// The module as the user named it.
        module: String,
        /// Why.
        reason: String,
    },
    /// A step of setting up the container failed in the container's own process.
    #[error("unable to start container process: {message}")]
    Init {
        /// What was attempted, on what, and what the kernel said.
        message: String,
        /// The kernel's error number, 0 where there is none.
        errno: i32,
    },
    /// A hook failed, and with it what it was part of.
    #[error("error running {kind} hook #{number}: {}: {reason}", path.display())]
    Hook {
        /// As config.json calls it.
        kind: &'static str,
        /// Its place in the list, from 0.
        number: usize,
        /// Its program.
        path: PathBuf,
        /// How it ended and what it said.
        reason: String,
    },
    /// A hook that runs in the container's own process failed, and with it what it was part of.
    #[error("unable to start container process: {message}")]
    HookInside {
        /// As [`Self::Hook`] says it.
        message: String,
    },
    /// CRIU could not make a checkpoint of a container, or restore it from one.
    #[error("criu: {reason} (its log is {})", log.display())]
    Criu {
        /// CRIU's own reason.
        reason: String,
        /// The file with all that it says.
        log: PathBuf,
    },
    /// The container's process ended before it was set up.
    #[error("container process ended during setup: {0}")]
    Died(String),
    /// The spawner behind a connection has died; another one must be started.
    #[error("the spawner has gone")]
    SpawnerGone,
    /// The process that is to be acted on has ended.
    #[error("process already finished")]
    Finished,
    /// A call to the kernel failed.
    #[error("{operation}: {source}")]
    System {
        /// What was attempted, on what.
        operation: String,
        /// What the kernel said.
        source: io::Error,
    },
}

impl Error {
    /// A kernel error with its context.
    pub fn system(operation: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::System { operation: operation.into(), source: source.into() }
    }

    /// A mistake in config.json.
    pub fn spec(reason: impl Into<String>) -> Self {
        Self::InvalidSpec { document: "config.json".into(), reason: reason.into() }
    }

    /// A field that is refused, with the reason.
    pub fn unsupported(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Unsupported { field: field.into(), reason: reason.into() }
    }

    /// The kernel's error number, where one is behind this error.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::System { source, .. } => source.raw_os_error(),
            Self::Init { errno, .. } if *errno != 0 => Some(*errno),
            _ => None,
        }
    }
}

/// Adds to a kernel error what was attempted, and on what.
pub trait Context<T> {
    /// `operation` is a verb and its object, without a colon: `open /dev/null`.
    fn context(self, operation: impl Into<String>) -> Result<T>;
    /// The same, computed only when it is needed.
    fn with_context<S: Into<String>>(self, operation: impl FnOnce() -> S) -> Result<T>;
    /// A verb and the path it was tried on.
    fn on(self, verb: &str, path: impl AsRef<Path>) -> Result<T>
    where
        Self: Sized,
    {
        self.with_context(|| format!("{verb} {}", path.as_ref().display()))
    }
}

impl<T, E: Into<io::Error>> Context<T> for std::result::Result<T, E> {
    fn context(self, operation: impl Into<String>) -> Result<T> {
        self.map_err(|e| Error::system(operation, e))
    }
    fn with_context<S: Into<String>>(self, operation: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|e| Error::system(operation(), e))
    }
}
