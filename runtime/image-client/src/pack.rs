//! A directory as an archive, for images that are made of one.

use std::collections::HashMap;
use std::ffi::{CStr, CString, OsString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Mode, OFlags, Stat, fstat, lgetxattr, llistxattr, major, minor, openat, readlinkat,
    statat,
};
use rustix::io::Errno;
use tar::{Builder, EntryType, Header};

/// Writes all below a directory, in the order of names, so that the same directory is the same archive.
pub(crate) fn directory(dir: &Path, to: impl Write) -> io::Result<()> {
    let root = open_dir(CWD, dir)?;
    let mut packer = Packer { to: Builder::new(to), links: HashMap::new() };
    packer.attributes(root.as_fd(), c".", b"./", &fstat(&root)?)?;
    packer.below(root.as_fd(), &mut Vec::new())?;
    packer.to.finish()
}

struct Packer<W: Write> {
    to: Builder<W>,
    /// The first name of each file that has several.
    links: HashMap<(u64, u64), Vec<u8>>,
}

impl<W: Write> Packer<W> {
    fn below(&mut self, dir: BorrowedFd<'_>, path: &mut Vec<u8>) -> io::Result<()> {
        let mut names: Vec<CString> = Vec::new();
        for entry in Dir::read_from(dir)? {
            let name = entry?.file_name().to_owned();
            if !matches!(name.to_bytes(), b"." | b"..") {
                names.push(name);
            }
        }
        names.sort();
        for name in names {
            let length = path.len();
            path.extend_from_slice(name.to_bytes());
            self.entry(dir, &name, path)
                .map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", String::from_utf8_lossy(path))))?;
            path.truncate(length);
        }
        Ok(())
    }

    fn entry(&mut self, dir: BorrowedFd<'_>, name: &CStr, path: &mut Vec<u8>) -> io::Result<()> {
        let stat = match statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
            // Removed meanwhile.
            Err(Errno::NOENT) => return Ok(()),
            stat => stat?,
        };
        if name.to_bytes().starts_with(b".wh.") {
            return Err(io::Error::other(
                "names that begin with .wh. mean removed files in images, and cannot be in one",
            ));
        }
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                path.push(b'/');
                self.attributes(dir, name, path, &stat)?;
                let below = open_dir(dir, name)?;
                self.below(below.as_fd(), path)
            }
            // Of processes, and nothing without them.
            FileType::Socket => Ok(()),
            _ => self.attributes(dir, name, path, &stat),
        }
    }

    /// Writes one entry.
    fn attributes(&mut self, dir: BorrowedFd<'_>, name: &CStr, path: &[u8], stat: &Stat) -> io::Result<()> {
        let mut header = Header::new_gnu();
        header.set_mode(stat.st_mode & 0o7777);
        header.set_uid(stat.st_uid.into());
        header.set_gid(stat.st_gid.into());
        header.set_mtime(u64::try_from(stat.st_mtime).unwrap_or_default());
        header.set_size(0);
        let kind = FileType::from_raw_mode(stat.st_mode);
        let place = Path::new(std::ffi::OsStr::from_bytes(path));
        let several = stat.st_nlink > 1 && kind != FileType::Directory;
        if several {
            if let Some(first) = self.links.get(&(stat.st_dev, stat.st_ino)).cloned() {
                header.set_entry_type(EntryType::Link);
                return self.to.append_link(&mut header, place, Path::new(std::ffi::OsStr::from_bytes(&first)));
            }
            self.links.insert((stat.st_dev, stat.st_ino), path.to_vec());
        }
        self.extended(dir, name, stat)?;
        match kind {
            FileType::RegularFile => {
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
                let file = File::from(openat(dir, name, flags, Mode::empty())?);
                let size = u64::try_from(stat.st_size).unwrap_or_default();
                header.set_entry_type(EntryType::Regular);
                header.set_size(size);
                // As long as the header says, whatever happens to the file meanwhile.
                self.to.append_data(&mut header, place, file.chain(io::repeat(0)).take(size))
            }
            FileType::Symlink => {
                let link = readlinkat(dir, name, Vec::new())?;
                header.set_entry_type(EntryType::Symlink);
                self.to.append_link(&mut header, place, Path::new(std::ffi::OsStr::from_bytes(link.to_bytes())))
            }
            other => {
                header.set_entry_type(match other {
                    FileType::Directory => EntryType::Directory,
                    FileType::Fifo => EntryType::Fifo,
                    FileType::BlockDevice => EntryType::Block,
                    _ => EntryType::Char,
                });
                if matches!(other, FileType::BlockDevice | FileType::CharacterDevice) {
                    header.set_device_major(major(stat.st_rdev))?;
                    header.set_device_minor(minor(stat.st_rdev))?;
                }
                self.to.append_data(&mut header, place, io::empty())
            }
        }
    }

    /// What the header has no room for.
    fn extended(&mut self, dir: BorrowedFd<'_>, name: &CStr, stat: &Stat) -> io::Result<()> {
        let mut path = format!("/proc/self/fd/{}/", dir.as_raw_fd()).into_bytes();
        path.extend_from_slice(name.to_bytes());
        let path = OsString::from_vec(path);
        let mut records: Vec<(String, Vec<u8>)> = Vec::new();
        if stat.st_mtime_nsec != 0 && stat.st_mtime >= 0 {
            records.push(("mtime".into(), format!("{}.{:09}", stat.st_mtime, stat.st_mtime_nsec).into_bytes()));
        }
        for attribute in attributes(&path)? {
            let Ok(text) = attribute.to_str() else { continue };
            if ["trusted.overlay.", "user.overlay.", "security.selinux"].iter().any(|own| text.starts_with(own)) {
                continue;
            }
            let value = whole(|buffer| lgetxattr(&path, &attribute, buffer))?;
            records.push((format!("SCHILY.xattr.{text}"), value));
        }
        records.sort();
        self.to.append_pax_extensions(records.iter().map(|(key, value)| (key.as_str(), value.as_slice())))
    }
}

fn attributes(path: &OsString) -> io::Result<Vec<CString>> {
    let list = match whole(|buffer| llistxattr(path, buffer)) {
        Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
        list => list?,
    };
    Ok(list
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
        .filter_map(|name| CString::new(name).ok())
        .collect())
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

fn open_dir(at: BorrowedFd<'_>, name: impl rustix::path::Arg) -> rustix::io::Result<OwnedFd> {
    openat(at, name, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
}
