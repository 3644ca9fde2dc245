//! Files of a sandbox, by the paths that its programs know.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use runx_core::sys::{self, resolve};

use super::Init;
use crate::sys as own;
use crate::wire::messages::{FromInit, OpenFile};

/// How deep a tree may be that is removed. Each level is an open descriptor.
const DEEPEST: usize = 200;

fn number(result: io::Result<()>) -> u32 {
    match result {
        Ok(()) => 0,
        Err(e) => e.raw_os_error().and_then(|errno| u32::try_from(errno).ok()).unwrap_or(libc::EINVAL as u32),
    }
}

impl Init<'_> {
    /// Opens files. All that could be opened go with the answer, in order.
    pub(super) fn open(&self, files: &[OpenFile]) -> (FromInit, Vec<OwnedFd>) {
        let mut opened = Vec::new();
        let errors = files.iter().map(|file| {
            number(self.open_one(file).and_then(|fd| {
                // More do not fit into a message.
                if opened.len() == sys::socket::MAX_FDS {
                    return Err(io::Error::from_raw_os_error(libc::EMFILE));
                }
                opened.push(fd);
                Ok(())
            }))
        });
        (FromInit::Opened(errors.collect()), opened)
    }

    fn open_one(&self, file: &OpenFile) -> io::Result<OwnedFd> {
        let path = own::path(&file.path);
        // O_NONBLOCK: a program may have left a FIFO there, and opening that would wait.
        let flags = libc::O_NONBLOCK | libc::O_NOCTTY | if file.write { libc::O_RDWR } else { libc::O_RDONLY };
        let look_up = || sys::openat2(self.root.as_fd(), path, flags, 0, own::LOOKUP);
        let fd = match look_up() {
            Err(e) if file.create && e.raw_os_error() == Some(libc::ENOENT) => {
                let above = path.parent().unwrap_or(Path::new("/"));
                own::make_directories(self.root.as_fd(), above, Some(self.uid))?;
                let new = flags | libc::O_CREAT | libc::O_EXCL;
                let fd = sys::openat2(self.root.as_fd(), path, new, file.mode, own::LOOKUP)?;
                own::give(fd.as_fd(), self.uid)?;
                fd
            }
            other => other?,
        };
        // The descriptor is looked at and not the path: what that names may change meanwhile.
        if sys::fstat(fd.as_fd())?.st_mode & libc::S_IFMT != libc::S_IFREG {
            return Err(io::Error::from_raw_os_error(libc::EISDIR));
        }
        if own::is_proc(fd.as_fd())? {
            return Err(io::Error::from_raw_os_error(libc::EACCES));
        }
        if file.create {
            own::truncate(fd.as_fd())?;
        }
        own::set_blocking(fd.as_fd())?;
        Ok(fd)
    }

    /// Makes symbolic links.
    pub(super) fn symlink(&self, links: &[(Vec<u8>, Vec<u8>)]) -> FromInit {
        let one = |(target, path): &(Vec<u8>, Vec<u8>)| {
            let path = own::path(path);
            let above = path.parent().unwrap_or(Path::new("/"));
            own::make_directories(self.root.as_fd(), above, Some(self.uid))?;
            let (parent, name) = own::parent_of(self.root.as_fd(), path, false)?;
            own::symlink_at(own::path(target), parent.as_fd(), name)?;
            own::give_link(parent.as_fd(), name, self.uid)
        };
        FromInit::Done(links.iter().map(|link| number(one(link))).collect())
    }

    /// Removes files, and directories with all that is in them.
    pub(super) fn delete(&self, paths: &[Vec<u8>]) -> FromInit {
        let one = |path: &Vec<u8>| {
            let (parent, name) = own::parent_of(self.root.as_fd(), own::path(path), false)?;
            remove(parent.as_fd(), name, 0)
        };
        FromInit::Done(paths.iter().map(|path| number(one(path))).collect())
    }
}

/// Removes a name from a directory. Symbolic links are removed and not followed, and mounts not entered.
fn remove(parent: BorrowedFd<'_>, name: &std::ffi::OsStr, depth: usize) -> io::Result<()> {
    match own::unlink_at(parent, name, false) {
        Err(e) if matches!(e.raw_os_error(), Some(libc::EISDIR | libc::EPERM)) => {}
        other => return other,
    }
    if depth >= DEEPEST {
        return Err(io::Error::from_raw_os_error(libc::ELOOP));
    }
    let flags = libc::O_RDONLY | libc::O_DIRECTORY | libc::O_NOFOLLOW;
    let directory = sys::openat2(parent, Path::new(name), flags, 0, resolve::BENEATH | resolve::NO_XDEV)?;
    for inside in own::names(directory.try_clone()?)? {
        remove(directory.as_fd(), &inside, depth + 1)?;
    }
    own::unlink_at(parent, name, true)
}
