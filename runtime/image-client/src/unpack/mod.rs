//! Unpacking a layer's archive into a tree of overlay's form.
//!
//! It is one pass over a stream: the archive is decompressed, hashed and unpacked at once, and what it is turns out at its
//! end. Until then it lies in a directory that nobody uses.

mod compression;
pub(crate) mod tar;
#[cfg(test)]
mod tests;
mod tree;

use std::io::{self, Read};
use std::path::Path;

use runx_image::Digest;
use runx_image::layer::Form;
use sha2::{Digest as _, Sha256};

pub(crate) use compression::{Compression, Decoder};
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

/// What a compressed archive may become: a gigabyte in any case, and beyond that 200 times its own length. What is
/// compressed better was made to fill disks.
pub(crate) fn limit(compressed: u64) -> u64 {
    compressed.saturating_mul(200).max(1 << 30)
}

/// Unpacks an archive, compressed or not, into an empty directory.
///
/// # Errors
/// Whatever is wrong with the archive; what of it was unpacked is then to be removed.
pub(crate) fn unpack(from: impl Read, into: &Path, limit: u64) -> Result<Unpacked, Error> {
    let decoder = Decoder::new(from).map_err(Error::Archive)?;
    let hashing = Hashing { from: decoder, hasher: Sha256::new(), left: limit, exceeded: false };
    let mut archive = tar::Archive::new(hashing);
    let mut tree = tree::Tree::open(into, Form::current())?;
    let done = tree.apply_all(&mut archive);
    let mut hashing = archive.into_inner();
    // What stands behind the end belongs to the digest.
    let drained = done.and_then(|()| io::copy(&mut hashing, &mut io::sink()).map_err(Error::Archive));
    if hashing.exceeded {
        return Err(Error::TooLarge { limit });
    }
    drained?;
    let (size, entries, implied) = tree.finish()?;
    Ok(Unpacked { diff_id: Digest::finish(hashing.hasher), size, entries, implied })
}

/// Hashes what is read, and ends at a limit.
struct Hashing<R> {
    from: R,
    hasher: Sha256,
    left: u64,
    exceeded: bool,
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.from.read(buffer)?;
        self.hasher.update(&buffer[..length]);
        match self.left.checked_sub(length as u64) {
            Some(left) => self.left = left,
            None => {
                self.exceeded = true;
                return Err(io::Error::other("the archive is too large"));
            }
        }
        Ok(length)
    }
}
