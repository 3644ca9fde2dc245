//! Files into a tar stream.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use nix::dir::Dir;
use nix::fcntl::readlinkat;
use runx_core::sys;
use tar::{Builder, EntryType, Header};

use super::Source;
use super::lookup::{BELOW, Lookup};

/// Sends a file, or a directory with all in it. Sockets, FIFOs and devices are left out.
pub(super) fn send(lookup: &Lookup, source: &Source, to: impl Write) -> Result<()> {
    let path = &source.path;
    let what = || format!("look at {}", path.display());
    let is_directory = source.contents || path.as_os_str().as_encoded_bytes().ends_with(b"/");
    let mut stream = Builder::new(to);
    let name = path.file_name().map_or_else(|| PathBuf::from("root"), PathBuf::from);
    let base = match path.file_name().filter(|_| !is_directory) {
        Some(last) => {
            let parent = lookup.open_parent(path, libc::O_PATH).with_context(what)?;
            match append(lookup, &mut stream, parent.as_fd(), last, &name)
                .with_context(|| format!("send {}", path.display()))?
            {
                Sent::Nothing => bail!("{} is a socket, FIFO or device: it has no content to copy", path.display()),
                Sent::Directory(directory) => Some(directory),
                Sent::Other => None,
            }
        }
        // A link there is followed, too.
        None => {
            let directory = lookup.open(path, libc::O_PATH).with_context(what)?;
            let found = sys::fstat(directory.as_fd()).with_context(what)?;
            if !sys::is_dir(&found) {
                bail!("{} is no directory", path.display());
            }
            let mut header = header(lookup, &found, EntryType::Directory);
            stream.append_data(&mut header, &name, io::empty()).with_context(what)?;
            Some(directory)
        }
    };
    if let Some(base) = base {
        send_below(lookup, &mut stream, base.as_fd(), path, &name)?;
    }
    stream.into_inner().and_then(|mut to| to.flush()).context("write the tar stream")
}

/// Sends what is in a directory, which is `path` for people and `name` in the stream.
fn send_below(
    lookup: &Lookup,
    stream: &mut Builder<impl Write>,
    base: BorrowedFd<'_>,
    path: &Path,
    name: &Path,
) -> Result<()> {
    // Directories that are still to be looked into, below the first one.
    let mut rest = vec![PathBuf::new()];
    while let Some(below) = rest.pop() {
        let what = || format!("list {}", path.join(&below).display());
        let here = if below.as_os_str().is_empty() { Path::new(".") } else { &below };
        let directory = match sys::openat2(base, here, libc::O_RDONLY | libc::O_DIRECTORY, 0, BELOW) {
            // It was removed in this moment.
            Err(e) if is_missing(&e) && !below.as_os_str().is_empty() => continue,
            other => other.with_context(what)?,
        };
        for entry in names(&directory).with_context(what)? {
            let below = below.join(&entry);
            match append(lookup, stream, directory.as_fd(), &entry, &name.join(&below)) {
                Err(e) if e.downcast_ref().is_some_and(is_missing) => {}
                Err(e) => return Err(e).with_context(|| format!("send {}", path.join(&below).display())),
                Ok(Sent::Directory(_)) => rest.push(below),
                Ok(Sent::Nothing | Sent::Other) => {}
            }
        }
    }
    Ok(())
}

fn is_missing(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
}

fn names(directory: &OwnedFd) -> io::Result<Vec<OsString>> {
    let mut names = Vec::new();
    for entry in Dir::from_fd(directory.try_clone()?)?.iter() {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push(OsStr::from_bytes(name).to_owned());
        }
    }
    Ok(names)
}

/// What was sent.
enum Sent {
    /// It is of a kind that cannot be.
    Nothing,
    /// This directory, without what is in it. The descriptor is `O_PATH`.
    Directory(OwnedFd),
    Other,
}

/// Appends one, which has the name `last` in the directory `at`, and no link is followed. An error of the kind `NotFound` is
/// not wrapped.
fn append(
    lookup: &Lookup,
    stream: &mut Builder<impl Write>,
    at: BorrowedFd<'_>,
    last: &OsStr,
    name: &Path,
) -> Result<Sent> {
    let there = sys::openat2(at, last, libc::O_PATH | libc::O_NOFOLLOW, 0, BELOW)?;
    let found = sys::fstat(there.as_fd())?;
    match found.st_mode & libc::S_IFMT {
        libc::S_IFDIR => {
            stream.append_data(&mut header(lookup, &found, EntryType::Directory), name, io::empty())?;
            Ok(Sent::Directory(there))
        }
        libc::S_IFLNK => {
            let target = readlinkat(there.as_fd(), "").map_err(io::Error::from)?;
            stream.append_link(&mut header(lookup, &found, EntryType::Symlink), name, target)?;
            Ok(Sent::Other)
        }
        libc::S_IFREG => {
            // Another file may have taken its place since it was looked at: a FIFO must not be waited for.
            let flags = libc::O_RDONLY | libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY;
            let file = sys::openat2(at, last, flags, 0, BELOW)?;
            let now = sys::fstat(file.as_fd())?;
            if now.st_mode & libc::S_IFMT != libc::S_IFREG {
                bail!("it changed while it was copied");
            }
            let length = u64::try_from(now.st_size).unwrap_or(0);
            let mut header = header(lookup, &now, EntryType::Regular);
            header.set_size(length);
            stream.append_data(&mut header, name, exactly(file.into(), length))?;
            Ok(Sent::Other)
        }
        _ => Ok(Sent::Nothing),
    }
}

fn header(lookup: &Lookup, found: &libc::stat, kind: EntryType) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(found.st_mode & 0o7777);
    let (uid, gid) = lookup.owner(found);
    header.set_uid(uid.into());
    header.set_gid(gid.into());
    header.set_mtime(u64::try_from(found.st_mtime).unwrap_or(0));
    header.set_size(0);
    header
}

/// As many bytes of a file as its header says, whatever becomes of it meanwhile.
fn exactly(file: File, length: u64) -> impl Read {
    file.take(length).chain(io::repeat(0)).take(length)
}
