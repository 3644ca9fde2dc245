//! A tar stream into files. Below the destination no link is followed, and nothing leads out of it.

use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use nix::fcntl::readlinkat;
use runx_core::sys;
use tar::{Archive, Entry, EntryType};

use super::Destination;
use super::ids::Owner;
use super::lookup::{BELOW, Lookup};

/// Bits that lend rights of the owner or group.
const LENDING: u32 = 0o6000;

/// Receives a stream of [`super::send`], or of somebody else.
pub(super) fn receive(lookup: &Lookup, stream: impl Read, destination: &Destination) -> Result<()> {
    let mut archive = Archive::new(stream);
    let mut place: Option<(OwnedFd, PathBuf)> = None;
    // Directories get their times and modes when nothing more is written into them.
    let mut directories = Vec::new();
    for entry in archive.entries().context("read the tar stream")? {
        let mut entry = entry.context("read the tar stream")?;
        let name = entry.path().context("read a name of the tar stream")?.into_owned();
        let parts = plain(&name)?;
        let (root, below) = match &place {
            Some((root, base)) => (root, base.join(rest(&parts, destination))),
            None => {
                let is_dir = entry.header().entry_type() == EntryType::Directory;
                let (root, base) = decide(lookup, destination, &parts, is_dir)?;
                let below = base.join(rest(&parts, destination));
                let (root, _) = place.insert((root, base));
                (&*root, below)
            }
        };
        if below.as_os_str().is_empty() {
            // The destination itself, which was there before.
            continue;
        }
        unpack(lookup, root.as_fd(), &below, &mut entry, destination, &mut directories)
            .with_context(|| format!("copy to {}", destination.path.join(&below).display()))?;
    }
    let Some((root, _)) = &place else {
        if destination.foreign {
            return Ok(());
        }
        bail!("the tar stream is empty");
    };
    for (path, mode, owner, time) in directories.into_iter().rev() {
        let fd = sys::openat2(root.as_fd(), &path, libc::O_RDONLY | libc::O_DIRECTORY, 0, BELOW)
            .with_context(|| format!("open {}", path.display()))?;
        finish(fd.as_fd(), mode, owner, time).with_context(|| format!("set the mode of {}", path.display()))?;
    }
    Ok(())
}

/// The parts of a name, which does not lead upwards.
fn plain(name: &Path) -> Result<Vec<&OsStr>> {
    let mut parts = Vec::new();
    for part in name.components() {
        match part {
            Component::Normal(part) => parts.push(part),
            Component::CurDir | Component::RootDir => {}
            _ => bail!("the tar stream holds the name {}, which leads upwards: refused", name.display()),
        }
    }
    Ok(parts)
}

/// What is left of a name below the place that was decided on.
fn rest(parts: &[&OsStr], destination: &Destination) -> PathBuf {
    parts.iter().skip(usize::from(!destination.foreign)).collect()
}

/// As many links as the kernel follows in one lookup.
const LINKS: usize = 40;

/// Where the first entry goes: an open directory, and a name below it.
fn decide(lookup: &Lookup, destination: &Destination, parts: &[&OsStr], is_dir: bool) -> Result<(OwnedFd, PathBuf)> {
    let path = &destination.path;
    let shown = path.display();
    let base = parts.first().map(PathBuf::from).unwrap_or_default();
    let is = |found: &OwnedFd| sys::fstat(found.as_fd()).map(|stat| sys::is_dir(&stat));
    let found = lookup.open(path, libc::O_PATH).and_then(|found| Ok((is(&found)?, found)));
    match found {
        Ok((true, found)) => {
            let contents = destination.foreign || is_dir && destination.contents;
            let directory = sys::openat2(found.as_fd(), ".", libc::O_RDONLY | libc::O_DIRECTORY, 0, BELOW)
                .with_context(|| format!("open the directory {shown}"))?;
            Ok((directory, if contents { PathBuf::new() } else { base }))
        }
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e).with_context(|| format!("look at {shown}")),
        _ if destination.foreign => bail!("{shown} is no directory: a tar stream is unpacked into one"),
        Ok(_) if is_dir => bail!("{shown} is a file: a directory cannot take its place"),
        Err(_) if !is_dir && path.as_os_str().as_bytes().ends_with(b"/") => {
            bail!("{shown} is not there: create the directory first, or leave out the slash at the end")
        }
        Ok(_) => replaced(lookup, path).with_context(|| format!("find {shown}")),
        Err(_) => in_parent(lookup, path),
    }
}

/// A file is replaced where links lead to, as when it is written to.
fn replaced(lookup: &Lookup, path: &Path) -> Result<(OwnedFd, PathBuf)> {
    let mut path = path.to_owned();
    for _ in 0..LINKS {
        let (parent, name) = in_parent(lookup, &path)?;
        let found = sys::openat2(parent.as_fd(), &name, libc::O_PATH | libc::O_NOFOLLOW, 0, BELOW)?;
        if sys::fstat(found.as_fd())?.st_mode & libc::S_IFMT != libc::S_IFLNK {
            return Ok((parent, name));
        }
        // What a link says is for the next lookup, under the same rules.
        path.pop();
        path.push(readlinkat(found.as_fd(), "").context("read a link")?);
    }
    Err(io::Error::from_raw_os_error(libc::ELOOP).into())
}

fn in_parent(lookup: &Lookup, path: &Path) -> Result<(OwnedFd, PathBuf)> {
    let name = path.file_name().with_context(|| format!("{} names no file", path.display()))?;
    let parent = lookup.open_parent(path, libc::O_RDONLY);
    let shown = path.parent().unwrap_or(Path::new("/")).display();
    Ok((parent.with_context(|| format!("open the directory {shown}"))?, PathBuf::from(name)))
}

type Directories = Vec<(PathBuf, u32, Option<Owner>, u64)>;

fn unpack(
    lookup: &Lookup,
    root: BorrowedFd<'_>,
    path: &Path,
    entry: &mut Entry<'_, impl Read>,
    destination: &Destination,
    directories: &mut Directories,
) -> Result<()> {
    let header = entry.header();
    let (kind, time) = (header.entry_type(), header.mtime().unwrap_or(0));
    let mode = header.mode().context("read a mode of the tar stream")? & 0o7777;
    let mode = if destination.archive { mode } else { mode & !LENDING };
    let id = |id: io::Result<u64>| -> Result<u32> { Ok(u32::try_from(id?)?) };
    let owner = match destination.archive {
        true => Some(lookup.to_own((id(header.uid())?, id(header.gid())?))?),
        false => None,
    };
    let parent = parent(root, path)?;
    let name = path.file_name().context("a name of the tar stream is empty")?;
    let name = CString::new(name.as_bytes()).context("a name of the tar stream holds a NUL byte")?;
    match kind {
        EntryType::Directory => {
            make_directory(parent.as_fd(), &name)?;
            directories.push((path.to_owned(), mode, owner, time));
        }
        EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
            let mut file = create(parent.as_fd(), &name)?;
            io::copy(entry, &mut file)?;
            finish(file.as_fd(), mode, owner, time)?;
        }
        EntryType::Symlink => {
            let target = entry.link_name()?.context("a link of the tar stream leads nowhere")?;
            let target = CString::new(target.as_os_str().as_bytes()).context("a link holds a NUL byte")?;
            unlink(parent.as_fd(), &name)?;
            // SAFETY: both strings are NUL-terminated and the descriptor is open.
            check(unsafe { libc::symlinkat(target.as_ptr(), parent.as_raw_fd(), name.as_ptr()) })?;
            if let Some((uid, gid)) = owner {
                let flags = libc::AT_SYMLINK_NOFOLLOW;
                // SAFETY: as above.
                check(unsafe { libc::fchownat(parent.as_raw_fd(), name.as_ptr(), uid, gid, flags) })?;
            }
        }
        EntryType::Link => {
            let target = entry.link_name()?.context("a link of the tar stream leads nowhere")?.into_owned();
            let parts = plain(&target)?;
            let from = sys::openat2(root, parts.iter().collect::<PathBuf>(), libc::O_PATH, 0, BELOW)?;
            unlink(parent.as_fd(), &name)?;
            let (empty, flags) = (c"".as_ptr(), libc::AT_EMPTY_PATH);
            // SAFETY: both strings are NUL-terminated and the descriptors are open.
            check(unsafe { libc::linkat(from.as_raw_fd(), empty, parent.as_raw_fd(), name.as_ptr(), flags) })?;
        }
        EntryType::XGlobalHeader => {}
        other => bail!("the tar stream holds a {other:?}: only files, directories and links are copied"),
    }
    Ok(())
}

fn check(value: i32) -> io::Result<()> {
    if value == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Opens the directory that a path is in, and makes what is missing of it.
fn parent(root: BorrowedFd<'_>, path: &Path) -> Result<OwnedFd> {
    let flags = libc::O_RDONLY | libc::O_DIRECTORY;
    let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) else {
        return root.try_clone_to_owned().context("open the destination");
    };
    match sys::openat2(root, parent, flags, 0, BELOW) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        other => return other.context("open the directory that it is in"),
    }
    let mut at = root.try_clone_to_owned().context("open the destination")?;
    for part in parent.components() {
        let name = CString::new(part.as_os_str().as_bytes()).context("a name holds a NUL byte")?;
        make_directory(at.as_fd(), &name)?;
        at = sys::openat2(at.as_fd(), part.as_os_str(), flags, 0, BELOW).context("open a directory")?;
    }
    Ok(at)
}

/// Makes a directory, unless it is there.
fn make_directory(parent: BorrowedFd<'_>, name: &CString) -> Result<()> {
    // SAFETY: the name is NUL-terminated and the descriptor is open.
    match check(unsafe { libc::mkdirat(parent.as_raw_fd(), name.as_ptr(), 0o755) }) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
            let name = Path::new(OsStr::from_bytes(name.as_bytes()));
            sys::openat2(parent, name, libc::O_PATH | libc::O_DIRECTORY, 0, BELOW)
                .context("what is there is no directory")
                .map(drop)
        }
        other => Ok(other?),
    }
}

fn unlink(parent: BorrowedFd<'_>, name: &CString) -> io::Result<()> {
    // SAFETY: the name is NUL-terminated and the descriptor is open.
    match check(unsafe { libc::unlinkat(parent.as_raw_fd(), name.as_ptr(), 0) }) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// Makes a file in the place of whatever was there; what is mounted there is written to.
fn create(parent: BorrowedFd<'_>, name: &CString) -> Result<File> {
    let open = |flags: i32| -> io::Result<File> {
        let flags = libc::O_WRONLY | libc::O_NOFOLLOW | libc::O_CLOEXEC | libc::O_NONBLOCK | libc::O_NOCTTY | flags;
        // SAFETY: the name is NUL-terminated and the descriptor is open.
        let fd = unsafe { libc::openat(parent.as_raw_fd(), name.as_ptr(), flags, 0o600) };
        check(fd)?;
        // SAFETY: the descriptor was opened just now and is nobody else's.
        Ok(unsafe { File::from_raw_fd(fd) })
    };
    match unlink(parent, name) {
        Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
            let file = open(libc::O_TRUNC)?;
            if !file.metadata()?.is_file() {
                bail!("what is mounted there is no regular file");
            }
            Ok(file)
        }
        Err(e) if e.raw_os_error() == Some(libc::EISDIR) => bail!("a directory is there: a file cannot take its place"),
        Err(e) => Err(e.into()),
        Ok(()) => Ok(open(libc::O_CREAT | libc::O_EXCL)?),
    }
}

/// Sets what a file has beside its content. The owner first: a change of it takes bits of the mode away.
fn finish(file: BorrowedFd<'_>, mode: u32, owner: Option<Owner>, time: u64) -> io::Result<()> {
    if let Some((uid, gid)) = owner {
        // SAFETY: fchown takes a descriptor and numbers.
        check(unsafe { libc::fchown(file.as_raw_fd(), uid, gid) })?;
    }
    // SAFETY: fchmod takes a descriptor and a number.
    check(unsafe { libc::fchmod(file.as_raw_fd(), mode) })?;
    let time = libc::timespec { tv_sec: i64::try_from(time).unwrap_or(0), tv_nsec: 0 };
    // SAFETY: the two times are valid.
    check(unsafe { libc::futimens(file.as_raw_fd(), [time, time].as_ptr()) })
}
