//! Unpacking a layer's archive into a tree of overlay's form.
//!
//! It is one pass over a stream: the archive is decompressed, hashed and unpacked at once, and what it is turns out at its
//! end. Until then it lies in a directory that nobody uses.

mod compression;
mod limit;
pub(crate) mod tar;
#[cfg(test)]
mod tests;
mod tree;

use std::cell::Cell;
use std::io::{self, Read};
use std::path::Path;
use std::rc::Rc;

use runx_image::Digest;
use runx_image::layer::Form;
use sha2::{Digest as _, Sha256};

pub(crate) use compression::{Compression, Decoder};
pub(crate) use limit::Limit;
pub(crate) use tree::inherit;

/// Why a layer was not unpacked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// An entry that would reach out of the layer, or is otherwise not of an honest archive.
    #[error("refuse the entry {entry:?} of the layer: {reason}")]
    Hostile { entry: String, reason: &'static str },
    /// More than is allowed.
    #[error(
        "the layer is larger than {limit} bytes when it is decompressed, which is refused (--max-layer-size allows more)"
    )]
    TooLarge { limit: u64 },
    /// More than its beginning allows: the rest decides ([`Limit::Growing`]).
    #[error("the layer's first {received} bytes are more than {limit} when they are decompressed")]
    TooSoon { received: u64, limit: u64 },
    /// The archive cannot be read.
    #[error("read the layer: {0}")]
    Archive(io::Error),
    /// The kernel refused.
    #[error("{operation} {entry:?} of the layer: {source}{}", hint(source))]
    System { operation: &'static str, entry: String, source: io::Error },
}

fn hint(e: &io::Error) -> &'static str {
    match e.raw_os_error() {
        Some(libc::EINVAL) if Form::current() == Form::User => {
            " (its owner may be none of your ids: /etc/subuid and /etc/subgid say which are)"
        }
        Some(libc::ENOSPC | libc::EDQUOT) => " (\"runx storage prune\" may make room)",
        _ => "",
    }
}

/// What was unpacked.
#[derive(Debug)]
pub(crate) struct Unpacked {
    /// The digest of the archive, decompressed.
    pub(crate) diff_id: Digest,
    /// The sum of its files' lengths in bytes.
    pub(crate) size: u64,
    /// How many entries it had.
    pub(crate) entries: u64,
    /// Directories that it has files in, but does not name; relative.
    pub(crate) implied: Vec<Vec<u8>>,
}

/// Unpacks an archive, compressed or not, into an empty directory.
///
/// # Errors
/// Whatever is wrong with the archive; what of it was unpacked is then to be removed.
pub(crate) fn unpack(from: impl Read, into: &Path, limit: Limit) -> Result<Unpacked, Error> {
    let received = Rc::default();
    let decoder = Decoder::new(Counting { from, received: Rc::clone(&received) }).map_err(Error::Archive)?;
    let hashing = Hashing { from: decoder, hasher: Sha256::new(), length: 0, received, limit, exceeded: None };
    let mut archive = tar::Archive::new(hashing);
    let mut tree = tree::Tree::open(into, Form::current())?;
    let done = tree.apply_all(&mut archive);
    let mut hashing = archive.into_inner();
    // What stands behind the end belongs to the digest.
    let drained = done.and_then(|()| io::copy(&mut hashing, &mut io::sink()).map_err(Error::Archive));
    if let Some(exceeded) = hashing.exceeded {
        return Err(exceeded);
    }
    drained?;
    let (size, entries, implied) = tree.finish()?;
    Ok(Unpacked { diff_id: Digest::finish(hashing.hasher), size, entries, implied })
}

/// Counts the bytes of the archive as it comes.
struct Counting<R> {
    from: R,
    received: Rc<Cell<u64>>,
}

impl<R: Read> Read for Counting<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.from.read(buffer)?;
        self.received.set(self.received.get() + length as u64);
        Ok(length)
    }
}

/// Hashes what is read, and ends at a limit.
struct Hashing<R> {
    from: R,
    hasher: Sha256,
    /// What was read until now.
    length: u64,
    /// What of the archive it was made of, at most.
    received: Rc<Cell<u64>>,
    limit: Limit,
    exceeded: Option<Error>,
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.from.read(buffer)?;
        self.hasher.update(&buffer[..length]);
        self.length += length as u64;
        match self.limit.check(self.length, self.received.get()) {
            Ok(()) => Ok(length),
            Err(e) => {
                self.exceeded = Some(e);
                Err(io::Error::other("the archive is too large"))
            }
        }
    }
}
