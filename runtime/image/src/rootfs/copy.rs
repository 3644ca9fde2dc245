//! Copying layers over each other, as overlay would show them.
//!
//! All of it goes by descriptors of directories and single names, and follows no link: what lies in a layer is an image's,
//! and may point anywhere.

use std::collections::HashMap;
use std::ffi::{CStr, CString, OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::Path;

use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Gid, Mode, OFlags, Stat, Timespec, Timestamps, Uid, XattrFlags, chownat, fchmod,
    ioctl_ficlone, lgetxattr, linkat, llistxattr, lremovexattr, lsetxattr, mkdirat, mknodat, openat, readlinkat,
    statat, symlinkat, unlinkat, utimensat,
};
use rustix::io::Errno;

use crate::error::{Context, Result};

/// Copies a layer's tree into a directory that the layers below were copied into.
pub(super) fn apply(tree: &Path, target: &Path, opaque: &str) -> Result<()> {
    let from = open_dir(CWD, tree).on("open", tree)?;
    let to = open_dir(CWD, target).on("open", target)?;
    let mut copier = Copier { opaque, links: HashMap::new(), root: to.as_fd() };
    copier.directory(from.as_fd(), to.as_fd(), &mut Vec::new()).map_err(|(path, e)| {
        let path = String::from_utf8_lossy(&path).into_owned();
        crate::Error::system(format!("copy {} to {}", tree.join(&path).display(), target.join(&path).display()), e)
    })
}

/// Gives a directory the owner, mode, attributes and times of another one.
///
/// # Errors
/// The kernel's.
pub fn copy_attributes(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<()> {
    let stat = rustix::fs::fstat(from)?;
    Ok(dress(&this(from), &this(to), to, c".", &stat)?)
}

/// The same for directories by their paths.
pub(super) fn attributes(from: &Path, to: &Path) -> Result<()> {
    let (source, target) = (open_dir(CWD, from).on("open", from)?, open_dir(CWD, to).on("open", to)?);
    copy_attributes(source.as_fd(), target.as_fd()).on("copy attributes to", to)
}

type Failure = (Vec<u8>, io::Error);

struct Copier<'a> {
    opaque: &'a str,
    /// Where each file with several names was copied to first.
    links: HashMap<(u64, u64), Vec<u8>>,
    root: BorrowedFd<'a>,
}

impl Copier<'_> {
    /// `path` is where this is below the root, for errors and hard links.
    fn directory(&mut self, from: BorrowedFd<'_>, to: BorrowedFd<'_>, path: &mut Vec<u8>) -> Result<(), Failure> {
        let failed = |path: &[u8], e: Errno| (path.to_owned(), io::Error::from(e));
        for entry in Dir::read_from(from).map_err(|e| failed(path, e))? {
            let entry = entry.map_err(|e| failed(path, e))?;
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            let length = path.len();
            if length > 0 {
                path.push(b'/');
            }
            path.extend_from_slice(name.to_bytes());
            self.entry(from, to, name, path)?;
            path.truncate(length);
        }
        let stat = rustix::fs::fstat(from).map_err(|e| failed(path, e))?;
        dress(&this(from), &this(to), to, c".", &stat).map_err(|e| failed(path, e))
    }

    fn entry(
        &mut self,
        from: BorrowedFd<'_>,
        to: BorrowedFd<'_>,
        name: &CStr,
        path: &mut Vec<u8>,
    ) -> Result<(), Failure> {
        let here = path.clone();
        let at = |e: Errno| (here.clone(), io::Error::from(e));
        let stat = statat(from, name, AtFlags::SYMLINK_NOFOLLOW).map_err(at)?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        let there = statat(to, name, AtFlags::SYMLINK_NOFOLLOW).ok();
        let there_is_dir = there.is_some_and(|there| FileType::from_raw_mode(there.st_mode) == FileType::Directory);
        if kind == FileType::Directory {
            let source = open_dir(from, name).map_err(at)?;
            let hides = is_opaque(source.as_fd(), self.opaque);
            if there.is_some() && (!there_is_dir || hides) {
                remove(to, name).map_err(at)?;
            }
            match mkdirat(to, name, Mode::RWXU) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(e) => return Err(at(e)),
            }
            let target = open_dir(to, name).map_err(at)?;
            return self.directory(source.as_fd(), target.as_fd(), path);
        }
        if there.is_some() {
            remove(to, name).map_err(at)?;
        }
        if kind == FileType::CharacterDevice && stat.st_rdev == 0 {
            // Hides what is below, which has gone by now.
            return Ok(());
        }
        if stat.st_nlink > 1 {
            if let Some(first) = self.links.get(&(stat.st_dev, stat.st_ino)) {
                let first = CString::new(first.as_slice()).map_err(|e| (here.clone(), e.into()))?;
                return linkat(self.root, &first, to, name, AtFlags::empty()).map_err(at);
            }
            self.links.insert((stat.st_dev, stat.st_ino), path.clone());
        }
        match kind {
            FileType::RegularFile => copy_file(from, to, name, &stat).map_err(|e| (here.clone(), e))?,
            FileType::Symlink => {
                readlinkat(from, name, Vec::new()).and_then(|to_what| symlinkat(&to_what, to, name)).map_err(at)?
            }
            _ => mknodat(to, name, kind, Mode::RUSR | Mode::WUSR, stat.st_rdev).map_err(at)?,
        }
        let (source, target) = (place(from, name), place(to, name));
        dress(&source, &target, to, name, &stat).map_err(at)
    }
}

fn copy_file(from: BorrowedFd<'_>, to: BorrowedFd<'_>, name: &CStr, stat: &Stat) -> io::Result<()> {
    let flags = OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let source = openat(from, name, OFlags::RDONLY | OFlags::NONBLOCK | flags, Mode::empty())?;
    let target = openat(to, name, OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | flags, Mode::RUSR | Mode::WUSR)?;
    if stat.st_size == 0 || ioctl_ficlone(&target, &source).is_ok() {
        return Ok(());
    }
    copy_content(File::from(source), File::from(target), stat)
}

/// Holes stay holes.
fn copy_content(mut source: File, mut target: File, stat: &Stat) -> io::Result<()> {
    use std::io::{Read as _, Seek as _, SeekFrom};
    let length = u64::try_from(stat.st_size).unwrap_or_default();
    let sparse = u64::try_from(stat.st_blocks).unwrap_or_default() * 512 < length;
    if !sparse {
        return io::copy(&mut source, &mut target).map(drop);
    }
    target.set_len(length)?;
    let mut at = 0;
    while at < length {
        let data = match rustix::fs::seek(&source, rustix::fs::SeekFrom::Data(at)) {
            Ok(data) => data,
            // None after here.
            Err(Errno::NXIO) => break,
            Err(e) => return Err(e.into()),
        };
        let hole = rustix::fs::seek(&source, rustix::fs::SeekFrom::Hole(data))?;
        source.seek(SeekFrom::Start(data))?;
        target.seek(SeekFrom::Start(data))?;
        io::copy(&mut (&source).take(hole - data), &mut target)?;
        at = hole;
    }
    Ok(())
}

/// Owner, mode, extended attributes and times, in the order in which they do not undo each other.
fn dress(source: &OsStr, target: &OsStr, dir: BorrowedFd<'_>, name: &CStr, stat: &Stat) -> rustix::io::Result<()> {
    let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    chownat(dir, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
    let kind = FileType::from_raw_mode(stat.st_mode);
    if kind != FileType::Symlink {
        let mode = Mode::from_raw_mode(stat.st_mode);
        if kind == FileType::Directory {
            fchmod(
                openat(
                    dir,
                    name,
                    OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
                    Mode::empty(),
                )?,
                mode,
            )?;
        } else {
            // Just made by us in a directory that nobody else is in, and no link.
            rustix::fs::chmodat(dir, name, mode, AtFlags::empty())?;
        }
    }
    copy_xattrs(source, target)?;
    let seconds = |sec, nsec| Timespec { tv_sec: sec, tv_nsec: nsec };
    let times = Timestamps {
        last_access: seconds(stat.st_atime, stat.st_atime_nsec as _),
        last_modification: seconds(stat.st_mtime, stat.st_mtime_nsec as _),
    };
    utimensat(dir, name, &times, AtFlags::SYMLINK_NOFOLLOW)
}

fn copy_xattrs(source: &OsStr, target: &OsStr) -> rustix::io::Result<()> {
    // What a directory had from a lower layer goes with its other attributes.
    for name in xattr_names(target)? {
        if name.to_str().is_ok_and(|name| !name.starts_with("security.selinux")) {
            match lremovexattr(target, &name) {
                Ok(()) | Err(Errno::NODATA | Errno::PERM | Errno::OPNOTSUPP) => {}
                Err(e) => return Err(e),
            }
        }
    }
    for name in xattr_names(source)? {
        let text = name.to_bytes();
        // Overlay's own are about the layer, and a label is the place's.
        if [&b"trusted.overlay."[..], b"user.overlay.", b"security.selinux"].iter().any(|own| text.starts_with(own)) {
            continue;
        }
        let value = whole(|buffer| lgetxattr(source, &name, buffer))?;
        lsetxattr(target, &name, &value, XattrFlags::empty())?;
    }
    Ok(())
}

fn xattr_names(path: &OsStr) -> rustix::io::Result<Vec<CString>> {
    let list = match whole(|buffer| llistxattr(path, buffer)) {
        Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
        list => list?,
    };
    let names = list.split(|byte| *byte == 0).filter(|name| !name.is_empty());
    Ok(names.filter_map(|name| CString::new(name).ok()).collect())
}

/// What a call writes to a buffer, of which the kernel never needs more than 64 KiB.
fn whole(call: impl Fn(&mut [u8]) -> rustix::io::Result<usize>) -> rustix::io::Result<Vec<u8>> {
    let mut buffer = vec![0; 256];
    let length = match call(&mut buffer) {
        Err(Errno::RANGE) => {
            buffer.resize(1 << 16, 0);
            call(&mut buffer)?
        }
        length => length?,
    };
    buffer.truncate(length);
    Ok(buffer)
}

fn is_opaque(dir: BorrowedFd<'_>, attribute: &str) -> bool {
    rustix::fs::lgetxattr(this(dir), attribute, &mut [0_u8; 8][..]).is_ok_and(|length| length == 1)
}

/// A path for the calls that know no descriptors, to what one names.
fn this(dir: BorrowedFd<'_>) -> OsString {
    // The dot makes it the directory, where the link itself would be meant.
    format!("/proc/self/fd/{}/.", dir.as_raw_fd()).into()
}

fn place(dir: BorrowedFd<'_>, name: &CStr) -> OsString {
    let mut path = format!("/proc/self/fd/{}/", dir.as_raw_fd()).into_bytes();
    path.extend_from_slice(name.to_bytes());
    OsString::from_vec(path)
}

fn open_dir(at: BorrowedFd<'_>, name: impl rustix::path::Arg) -> rustix::io::Result<OwnedFd> {
    openat(at, name, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
}

/// Removes whatever has this name, with all below it.
fn remove(dir: BorrowedFd<'_>, name: &CStr) -> rustix::io::Result<()> {
    match unlinkat(dir, name, AtFlags::empty()) {
        Err(Errno::ISDIR | Errno::PERM) => {}
        other => return other,
    }
    let below = open_dir(dir, name)?;
    for entry in Dir::read_from(&below)? {
        let entry = entry?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            remove(below.as_fd(), entry.file_name())?;
        }
    }
    unlinkat(dir, name, AtFlags::REMOVEDIR)
}
