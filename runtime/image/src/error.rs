//! What can go wrong with images.

use std::io;
use std::path::{Path, PathBuf};

/// A result of this library.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong with images. Every text names what was attempted, on what, why it failed, and where somebody can
/// help it, how.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A digest that is none, or of a kind that is not supported.
    #[error("invalid digest {text:?}: {reason}")]
    InvalidDigest {
        /// As it was given.
        text: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A name that breaks the rules for image names.
    #[error("invalid image name {name:?}: {reason}")]
    InvalidName {
        /// As it was given.
        name: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// No stored image has this name, id or digest.
    #[error("no image {0:?} in the store (\"runx storage pull\" brings one, \"runx storage ls\" shows what is there)")]
    NotFound(String),
    /// More than one image is meant.
    #[error("image {name:?} is ambiguous: it may be {}", candidates.join(" or "))]
    Ambiguous {
        /// As it was given.
        name: String,
        /// What it may mean.
        candidates: Vec<String>,
    },
    /// Containers need the image.
    #[error("image {name:?} is in use by {}: remove it first, or remove the image with --force", users.join(", "))]
    InUse {
        /// The image as it was named.
        name: String,
        /// The directories of the containers.
        users: Vec<String>,
    },
    /// A document of an image cannot be understood.
    #[error("invalid {document}: {reason}")]
    Invalid {
        /// Which one.
        document: String,
        /// The mistake.
        reason: String,
    },
    /// Content is not what its digest says.
    #[error("{what} is corrupt: its digest is {found}, and {expected} was promised")]
    Corrupt {
        /// What was read, and from where.
        what: String,
        /// What was promised.
        expected: String,
        /// What it is.
        found: String,
    },
    /// A part of an image is missing or damaged in the store.
    #[error("image {image} is not complete in the store: {what}; remove it and pull it again")]
    Incomplete {
        /// The image.
        image: String,
        /// What is missing.
        what: String,
    },
    /// The image has no root filesystem.
    #[error("image {0} is a WebAssembly module without a root filesystem: \"runx wasm run\" runs it")]
    NoRootfs(String),
    /// A directory has no root filesystem made by [`crate::Store::prepare`].
    #[error("{} has no root filesystem: it was never prepared, or is removed", .0.display())]
    NotPrepared(PathBuf),
    /// Overlay was asked for and cannot be had.
    #[error("cannot use overlay below {}: {source} (a copy of the image works everywhere)", dir.display())]
    NoOverlay {
        /// Where.
        dir: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Somebody wants it no more: [`crate::Ingest::interrupt`] and [`crate::Ingest::give_up`].
    #[error("{0}: interrupted")]
    Interrupted(String),
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

    /// A document that cannot be understood.
    pub fn invalid(document: impl Into<String>, reason: impl ToString) -> Self {
        Self::Invalid { document: document.into(), reason: reason.to_string() }
    }

    /// The kind of the kernel's error, where one is behind this.
    pub fn kind(&self) -> Option<io::ErrorKind> {
        match self {
            Self::System { source, .. } | Self::NoOverlay { source, .. } => Some(source.kind()),
            _ => None,
        }
    }
}

/// Adds to a kernel error what was attempted, and on what.
pub(crate) trait Context<T> {
    /// `operation` is a verb and its object, without a colon.
    fn context(self, operation: impl FnOnce() -> String) -> Result<T>;
    /// A verb and the path it was tried on.
    fn on(self, verb: &str, path: impl AsRef<Path>) -> Result<T>
    where
        Self: Sized,
    {
        self.context(|| format!("{verb} {}", path.as_ref().display()))
    }
}

impl<T, E: Into<io::Error>> Context<T> for std::result::Result<T, E> {
    fn context(self, operation: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|e| Error::system(operation(), e))
    }
}
