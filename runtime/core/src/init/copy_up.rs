//! `tmpcopyup`: a tmpfs that begins with what lies below it.

use std::ffi::{CStr, CString, OsStr};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::dir::{Dir, Type};

use crate::sys::{self, check, resolve};

const RULES: u64 = resolve::BENEATH | resolve::NO_SYMLINKS | resolve::NO_XDEV;
/// An image's directories nest; a hostile one shall not exhaust the stack.
const DEPTH_LIMIT: usize = 128;

/// Copies everything in `from` to `to`, with owners, modes, times and extended attributes. Sockets and devices are
/// left out, as are other filesystems mounted below.
pub(super) fn copy(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<()> {
    directory(from, to, 0)
}

fn directory(from: BorrowedFd<'_>, to: BorrowedFd<'_>, depth: usize) -> io::Result<()> {
    if depth > DEPTH_LIMIT {
        return Err(io::Error::other(format!("directories nest deeper than {DEPTH_LIMIT}")));
    }
    let from = sys::openat2(from, ".", libc::O_RDONLY | libc::O_DIRECTORY, 0, RULES)?;
    let to = sys::openat2(to, ".", libc::O_RDONLY | libc::O_DIRECTORY, 0, RULES)?;
    let mut listing = Dir::from_fd(from.try_clone()?)?;
    for entry in listing.iter() {
        let entry = entry?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let kind = entry.file_type();
        one(from.as_fd(), to.as_fd(), name, kind, depth)
            .map_err(|e| io::Error::new(e.kind(), format!("copy {}: {e}", name.to_string_lossy())))?;
    }
    // The tmpfs's own root has the mode that its mount options say.
    if depth == 0 { Ok(()) } else { attributes(from.as_fd(), to.as_fd()) }
}

fn one(from: BorrowedFd<'_>, to: BorrowedFd<'_>, name: &CStr, kind: Option<Type>, depth: usize) -> io::Result<()> {
    let path = Path::new(OsStr::from_bytes(name.to_bytes()));
    match kind {
        Some(Type::Directory) => {
            let source = match sys::openat2(from, path, libc::O_RDONLY | libc::O_DIRECTORY, 0, RULES) {
                // Something is mounted there: it is not the image's.
                Err(e) if e.raw_os_error() == Some(libc::EXDEV) => return Ok(()),
                other => other?,
            };
            sys::mkdirat(to, path, 0o700)?;
            let target = sys::openat2(to, path, libc::O_RDONLY | libc::O_DIRECTORY, 0, RULES)?;
            directory(source.as_fd(), target.as_fd(), depth + 1)
        }
        Some(Type::File) => {
            let source = sys::openat2(from, path, libc::O_RDONLY | libc::O_NOFOLLOW, 0, RULES)?;
            let create = libc::O_WRONLY | libc::O_CREAT | libc::O_EXCL | libc::O_NOFOLLOW;
            let target = sys::openat2(to, path, create, 0o600, RULES)?;
            let (mut reader, mut writer) = (std::fs::File::from(source), std::fs::File::from(target));
            io::copy(&mut reader, &mut writer)?;
            attributes(reader.as_fd(), writer.as_fd())
        }
        Some(Type::Symlink) => {
            let target = nix::fcntl::readlinkat(from, name)?;
            nix::unistd::symlinkat(target.as_os_str(), to, name)?;
            let link = sys::openat2(from, path, libc::O_PATH | libc::O_NOFOLLOW, 0, resolve::BENEATH)?;
            let stat = sys::fstat(link.as_fd())?;
            let flags = nix::fcntl::AtFlags::AT_SYMLINK_NOFOLLOW;
            Ok(nix::unistd::fchownat(to, name, Some(stat.st_uid.into()), Some(stat.st_gid.into()), flags)?)
        }
        _ => Ok(()),
    }
}

fn attributes(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<()> {
    let stat = sys::fstat(from)?;
    extended_attributes(from, to)?;
    nix::unistd::fchown(to, Some(stat.st_uid.into()), Some(stat.st_gid.into()))?;
    // SAFETY: only a borrowed descriptor and a mode are passed.
    check(unsafe { libc::fchmod(to.as_raw_fd(), stat.st_mode & 0o7777) }.into())?;
    let times = [
        libc::timespec { tv_sec: stat.st_atime, tv_nsec: stat.st_atime_nsec },
        libc::timespec { tv_sec: stat.st_mtime, tv_nsec: stat.st_mtime_nsec },
    ];
    // SAFETY: two times are passed, as futimens reads them.
    check(unsafe { libc::futimens(to.as_raw_fd(), times.as_ptr()) }.into()).map(drop)
}

fn extended_attributes(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<()> {
    let mut names = vec![0u8; 64 << 10];
    // SAFETY: the buffer is writable for its length.
    let length = unsafe { libc::flistxattr(from.as_raw_fd(), names.as_mut_ptr().cast(), names.len()) };
    let length = match check(length as libc::c_long) {
        Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => return Ok(()),
        other => other? as usize,
    };
    let mut value = vec![0u8; 64 << 10];
    for name in names[..length].split_inclusive(|byte| *byte == 0) {
        let Ok(name) = CString::from_vec_with_nul(name.to_vec()) else { continue };
        // SAFETY: the name is NUL-terminated and the buffer writable for its length.
        let got = unsafe { libc::fgetxattr(from.as_raw_fd(), name.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
        let got = check(got as libc::c_long)? as usize;
        // SAFETY: the name is NUL-terminated and the value valid for the length that is passed.
        let set = unsafe { libc::fsetxattr(to.as_raw_fd(), name.as_ptr(), value.as_ptr().cast(), got, 0) };
        match check(set.into()) {
            // A tmpfs need not know every attribute that an image's filesystem has.
            Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EPERM)) => {}
            other => other.map(drop)?,
        }
    }
    Ok(())
}
