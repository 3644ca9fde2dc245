//! Files into a tar stream.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use tar::{Builder, EntryType, Header};

use super::Source;

/// Sends a file, or a directory with all in it. Sockets, FIFOs and devices are left out.
pub(super) fn send(source: &Source, to: impl Write) -> Result<()> {
    let path = &source.path;
    let ends_with_slash = path.as_os_str().as_encoded_bytes().ends_with(b"/");
    let found = if ends_with_slash || source.contents { fs::metadata(path) } else { fs::symlink_metadata(path) };
    let found = found.with_context(|| format!("look at {}", path.display()))?;
    if !found.is_dir() && (ends_with_slash || source.contents) {
        bail!("{} is no directory", path.display());
    }
    let mut stream = Builder::new(to);
    let name = path.file_name().map_or_else(|| PathBuf::from("root"), PathBuf::from);
    // Directories that are still to be looked into.
    let mut rest = vec![(path.clone(), name, found)];
    let mut is_first = true;
    while let Some((path, name, found)) = rest.pop() {
        let sent = append(&mut stream, &path, &name, &found)?;
        if std::mem::take(&mut is_first) && !sent {
            bail!("{} is a socket, FIFO or device: it has no content to copy", path.display());
        }
        if found.is_dir() {
            let entries = fs::read_dir(&path).with_context(|| format!("list {}", path.display()))?;
            for entry in entries {
                let entry = entry.with_context(|| format!("list {}", path.display()))?;
                match fs::symlink_metadata(entry.path()) {
                    // It was removed in this moment.
                    Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                    Err(e) => return Err(e).with_context(|| format!("look at {}", entry.path().display())),
                    Ok(found) => rest.push((entry.path(), name.join(entry.file_name()), found)),
                }
            }
        }
    }
    stream.into_inner().and_then(|mut to| to.flush()).context("write the tar stream")
}

/// Appends one. Returns whether it is of a kind that can be sent.
fn append(stream: &mut Builder<impl Write>, path: &Path, name: &Path, found: &Metadata) -> Result<bool> {
    let kind = found.file_type();
    let mut header = Header::new_gnu();
    header.set_mode(found.mode() & 0o7777);
    header.set_uid(found.uid().into());
    header.set_gid(found.gid().into());
    header.set_mtime(u64::try_from(found.mtime()).unwrap_or(0));
    header.set_size(0);
    let what = || format!("send {}", path.display());
    if kind.is_dir() {
        header.set_entry_type(EntryType::Directory);
        stream.append_data(&mut header, name, io::empty()).with_context(what)?;
    } else if kind.is_symlink() {
        let target = fs::read_link(path).with_context(what)?;
        header.set_entry_type(EntryType::Symlink);
        stream.append_link(&mut header, name, target).with_context(what)?;
    } else if kind.is_file() {
        // Another file may have taken its place since it was looked at: a FIFO must not be waited for.
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY;
        let file = OpenOptions::new().read(true).custom_flags(flags).open(path).with_context(what)?;
        let now = file.metadata().with_context(what)?;
        if !now.is_file() {
            bail!("{} changed while it was copied", path.display());
        }
        header.set_entry_type(EntryType::Regular);
        header.set_size(now.len());
        stream.append_data(&mut header, name, exactly(file, now.len())).with_context(what)?;
    } else {
        debug_assert!(kind.is_socket() || kind.is_fifo() || kind.is_char_device() || kind.is_block_device());
        return Ok(false);
    }
    Ok(true)
}

/// As many bytes of a file as its header says, whatever becomes of it meanwhile.
fn exactly(file: File, length: u64) -> impl Read {
    file.take(length).chain(io::repeat(0)).take(length)
}
