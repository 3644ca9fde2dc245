//! Where images are imported from: directories and archives of other programs.

mod archive;
mod directory;
mod module;
mod rootfs;

use std::io::Read;

use anyhow::{Context as _, Result, ensure};
use runx_image::manifest::DOCUMENT_LIMIT;

pub(crate) use archive::{Archive, open};
pub(crate) use directory::Directory;
pub(crate) use module::{MAGIC, import_module};
pub(crate) use rootfs::{Change, import_directory, import_tarball};

/// Files by their paths, of a directory or an archive. Nothing outside of it can be named.
pub(crate) trait Source: Sync {
    /// Opens a file; nothing if there is none.
    fn open(&self, path: &str) -> Result<Option<Box<dyn Read + Send + '_>>>;
    /// What errors call it.
    fn name(&self) -> String;
}

/// A small document; nothing if there is none.
pub(crate) fn document(source: &dyn Source, path: &str) -> Result<Option<Vec<u8>>> {
    let Some(file) = source.open(path)? else { return Ok(None) };
    let mut content = Vec::new();
    let read = file.take(DOCUMENT_LIMIT + 1).read_to_end(&mut content);
    read.with_context(|| format!("read {path} of {}", source.name()))?;
    ensure!(
        content.len() as u64 <= DOCUMENT_LIMIT,
        "{path} of {} is longer than {DOCUMENT_LIMIT} bytes",
        source.name()
    );
    Ok(Some(content))
}
