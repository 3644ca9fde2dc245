//! Looking up and making paths below the container's root, so that no link in an image leads out of it.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path};

use crate::sys::{self, openat2, resolve};

const IN_ROOT: u64 = resolve::IN_ROOT | resolve::NO_MAGICLINKS;

/// Finds `path` below `root`, following links inside it. The descriptor is `O_PATH`.
pub(super) fn find(root: BorrowedFd<'_>, path: impl AsRef<Path>) -> io::Result<OwnedFd> {
    openat2(root, path, libc::O_PATH, 0, IN_ROOT)
}

/// Finds the directory `path` below `root`, or makes it and what is missing above it (mode 755).
pub(super) fn make_directory(root: BorrowedFd<'_>, path: impl AsRef<Path>) -> io::Result<OwnedFd> {
    let path = path.as_ref();
    let directory = libc::O_PATH | libc::O_DIRECTORY;
    match openat2(root, path, directory, 0, IN_ROOT) {
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => {}
        other => return other,
    }
    let mut at = root.try_clone_to_owned()?;
    let mut walked = std::path::PathBuf::from("/");
    for part in path.components() {
        let Component::Normal(name) = part else {
            if part == Component::ParentDir {
                return Err(io::Error::new(io::ErrorKind::InvalidInput, "path contains \"..\""));
            }
            continue;
        };
        walked.push(name);
        // Always from the root: a link in the middle is resolved there as the container would.
        at = match openat2(root, &walked, directory, 0, IN_ROOT) {
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => {
                match sys::mkdirat(at.as_fd(), name, 0o755) {
                    Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
                    _ => {}
                }
                // Made by us, or by another in this moment; a link here would be somebody's trap.
                openat2(at.as_fd(), name, directory | libc::O_NOFOLLOW, 0, resolve::BENEATH | resolve::NO_SYMLINKS)?
            }
            other => other?,
        };
    }
    Ok(at)
}

/// Finds `path` below `root` as the place for a mount: a directory or a file, made if it is missing.
pub(super) fn make_target(root: BorrowedFd<'_>, path: &Path, directory: bool) -> io::Result<OwnedFd> {
    if directory {
        return make_directory(root, path);
    }
    match find(root, path) {
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => {}
        other => return other,
    }
    let (parent, name) = split(path)?;
    let parent = make_directory(root, parent)?;
    let flags = libc::O_CREAT | libc::O_EXCL | libc::O_NOFOLLOW | libc::O_WRONLY;
    match openat2(parent.as_fd(), Path::new(name), flags, 0o644, resolve::BENEATH | resolve::NO_SYMLINKS) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
        _ => {}
    }
    openat2(
        parent.as_fd(),
        Path::new(name),
        libc::O_PATH | libc::O_NOFOLLOW,
        0,
        resolve::BENEATH | resolve::NO_SYMLINKS,
    )
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
        let made = make_target(scratch.root().as_fd(), Path::new("/etc/x"), false);
        // The link dangles inside the root, which is an error, and the canary stays empty.
        assert!(made.is_err());
        assert_eq!(fs::read_dir(scratch.0.join("canary")).unwrap().count(), 0);
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
