//! Looking up and making paths below the container's root, so that no link in an image leads out of it.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path};

use crate::sys::{self, openat2, resolve};

const IN_ROOT: u64 = resolve::IN_ROOT | resolve::NO_MAGICLINKS;

/// As many links as the kernel follows in one lookup.
const LINKS: usize = 40;

/// Finds `path` below `root`, following links inside it. The descriptor is `O_PATH`.
pub(super) fn find(root: BorrowedFd<'_>, path: impl AsRef<Path>) -> io::Result<OwnedFd> {
    openat2(root, path, libc::O_PATH, 0, IN_ROOT)
}

/// Finds the directory `path` below `root`, or makes it and what is missing above it (mode 755).
pub(super) fn make_directory(root: BorrowedFd<'_>, path: impl AsRef<Path>) -> io::Result<OwnedFd> {
    let path = path.as_ref();
    match openat2(root, path, libc::O_PATH | libc::O_DIRECTORY, 0, IN_ROOT) {
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => make_missing(root, path, true),
        other => other,
    }
}

/// Finds `path` below `root` as the place for a mount: a directory or a file, made if it is missing. No link leads out of
/// `root`, and those of a procfs are not followed. The descriptor is `O_PATH`.
///
/// # Errors
/// The kernel's: `ELOOP` for a link that is not followed, and `ENOTDIR` where what is there is no directory.
pub fn make_target(root: BorrowedFd<'_>, path: &Path, directory: bool) -> io::Result<OwnedFd> {
    if directory {
        return make_directory(root, path);
    }
    match find(root, path) {
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => make_missing(root, path, false),
        other => other,
    }
}

/// Walks `path` name by name and makes what is missing. A link that leads nowhere is followed too, below `root`:
/// images have, say, an /etc/resolv.conf that points into a /run which is empty until it is mounted.
fn make_missing(root: BorrowedFd<'_>, path: &Path, directory: bool) -> io::Result<OwnedFd> {
    let one_name = resolve::BENEATH | resolve::NO_MAGICLINKS;
    let mut way = vec![root.try_clone_to_owned()?];
    let mut rest = names(path)?;
    let mut links = 0;
    while let Some(name) = rest.pop_front() {
        if name == ".." {
            // As the kernel has it, the root is its own parent.
            if way.len() > 1 {
                way.pop();
            }
            continue;
        }
        let at = way.last().map_or(root, AsFd::as_fd);
        let found = match openat2(at, &name, libc::O_PATH | libc::O_NOFOLLOW, 0, one_name) {
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => make_one(at, &name, directory || !rest.is_empty())?,
            other => other?,
        };
        match sys::fstat(found.as_fd())?.st_mode & libc::S_IFMT {
            libc::S_IFLNK => {
                links += 1;
                if links > LINKS {
                    return Err(io::Error::from_raw_os_error(libc::ELOOP));
                }
                let target = nix::fcntl::readlinkat(found.as_fd(), "")?;
                if target.as_bytes().starts_with(b"/") {
                    way.truncate(1);
                }
                let mut target = names(Path::new(&target))?;
                target.append(&mut rest);
                rest = target;
            }
            libc::S_IFDIR => way.push(found),
            _ if rest.is_empty() && !directory => return Ok(found),
            _ => return Err(io::Error::from_raw_os_error(libc::ENOTDIR)),
        }
    }
    // A place for a file that turns out to be a directory is for the mount to refuse.
    way.pop().ok_or_else(|| io::Error::from_raw_os_error(libc::ENOENT))
}

fn make_one(at: BorrowedFd<'_>, name: &OsStr, directory: bool) -> io::Result<OwnedFd> {
    let rules = resolve::BENEATH | resolve::NO_SYMLINKS;
    let made = if directory {
        sys::mkdirat(at, name, 0o755)
    } else {
        let flags = libc::O_CREAT | libc::O_EXCL | libc::O_NOFOLLOW | libc::O_WRONLY;
        openat2(at, Path::new(name), flags, 0o644, rules).map(drop)
    };
    match made {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
        _ => {}
    }
    // Made by us, or by another in this moment; a link here would be somebody's trap.
    let kind = if directory { libc::O_DIRECTORY } else { 0 };
    openat2(at, Path::new(name), libc::O_PATH | libc::O_NOFOLLOW | kind, 0, rules)
}

fn names(path: &Path) -> io::Result<VecDeque<OsString>> {
    path.components()
        .filter_map(|part| match part {
            Component::Normal(name) => Some(Ok(name.to_owned())),
            Component::ParentDir => Some(Ok(OsString::from(".."))),
            Component::RootDir | Component::CurDir => None,
            Component::Prefix(_) => Some(Err(io::Error::from(io::ErrorKind::InvalidInput))),
        })
        .collect()
}

/// The directory and the last name of a path.
pub(super) fn split(path: &Path) -> io::Result<(&Path, &OsStr)> {
    match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) => Ok((parent, name)),
        _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "path has no name")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    struct Scratch(std::path::PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("runx-paths-{name}-{}", std::process::id()));
            fs::create_dir_all(path.join("root")).unwrap();
            Self(path)
        }
        fn root(&self) -> OwnedFd {
            sys::open(self.0.join("root"), libc::O_PATH | libc::O_DIRECTORY).unwrap()
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn a_link_out_of_the_root_is_followed_inside_it() {
        let scratch = Scratch::new("out");
        fs::create_dir(scratch.0.join("canary")).unwrap();
        symlink(scratch.0.join("canary"), scratch.0.join("root/etc")).unwrap();
        make_target(scratch.root().as_fd(), Path::new("/etc/x"), false).unwrap();
        assert!(scratch.0.join("root").join(scratch.0.strip_prefix("/").unwrap()).join("canary/x").is_file());
        assert_eq!(fs::read_dir(scratch.0.join("canary")).unwrap().count(), 0);
    }

    #[test]
    fn links_that_lead_nowhere_are_followed_to_what_is_then_made() {
        let scratch = Scratch::new("dangling");
        fs::create_dir(scratch.0.join("root/etc")).unwrap();
        symlink("../run/resolve/stub", scratch.0.join("root/etc/resolv.conf")).unwrap();
        symlink("/../../jump/to", scratch.0.join("root/far")).unwrap();
        symlink("loop", scratch.0.join("root/loop")).unwrap();
        let root = scratch.root();
        make_target(root.as_fd(), Path::new("/etc/resolv.conf"), false).unwrap();
        assert!(scratch.0.join("root/run/resolve/stub").is_file());
        make_target(root.as_fd(), Path::new("far/away"), true).unwrap();
        assert!(scratch.0.join("root/jump/to/away").is_dir());
        let error = make_target(root.as_fd(), Path::new("/loop/x"), true).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ELOOP));
    }

    #[test]
    fn missing_directories_are_made_and_found_again() {
        let scratch = Scratch::new("make");
        make_directory(scratch.root().as_fd(), "/a/b/c").unwrap();
        make_target(scratch.root().as_fd(), Path::new("/a/b/file"), false).unwrap();
        assert!(scratch.0.join("root/a/b/c").is_dir());
        assert!(scratch.0.join("root/a/b/file").is_file());
        find(scratch.root().as_fd(), "a/b/c").unwrap();
    }

    #[test]
    fn dots_that_would_leave_the_root_stay_in_it() {
        let scratch = Scratch::new("dots");
        fs::create_dir(scratch.0.join("root/in")).unwrap();
        find(scratch.root().as_fd(), "../../../in").unwrap();
    }
}
