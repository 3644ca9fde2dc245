//! What is done to whole trees: copies, modes, owners. And pages of a directory, and rights.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use super::ops::{copy, remove};
use super::root::{self, Place, names};
use super::{Error, FileInfo, Files, Result};
use crate::ids;
use crate::process::users::Accounts;

/// How deep a tree may be: each directory is open meanwhile.
const DEPTH: usize = 256;

/// What may be done with a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rights {
    /// Read, or listed.
    pub read: bool,
    /// Written.
    pub write: bool,
    /// Executed, or entered.
    pub execute: bool,
}

impl Files {
    /// What is in a directory, in the order of names: `limit` entries from `offset` on, and how many there are.
    ///
    /// # Errors
    /// That it is missing or no directory, and the kernel's.
    pub fn page(
        &self,
        path: &Path,
        offset: usize,
        limit: usize,
        accounts: &Accounts,
    ) -> Result<(Vec<FileInfo>, usize)> {
        let directory = self.open_directory(path)?;
        let copy = directory.try_clone().map_err(|e| Error::of("open", path, &e))?;
        let all = names(directory).map_err(|e| Error::of("read", path, &e))?;
        let total = all.len();
        let mut entries = Vec::new();
        for name in all.into_iter().skip(offset).take(limit) {
            let below = path.join(&name);
            let place = copy.try_clone().map(|directory| Place::new(directory, name));
            // It may be gone by now.
            if let Ok(stat) = place.and_then(|place| place.stat()) {
                entries.push(FileInfo::new(&below, &stat, accounts));
            }
        }
        Ok((entries, total))
    }

    /// Copies a file or link, or with `recursive` a directory. It appears at once and whole, or not at all.
    ///
    /// # Errors
    /// [`Error::Conflict`] when there is something and `overwrite` is not said, or when it is a directory; and the kernel's.
    pub fn copy(&self, from: &Path, to: &Path, recursive: bool, overwrite: bool) -> Result<()> {
        if to.starts_with(from) {
            return Err(Error::Invalid(format!("{} cannot be copied into itself", from.display())));
        }
        let place = |path: &Path| self.root.place(path).map_err(|e| Error::of("open the directory of", path, &e));
        let source = place(from)?;
        let stat = source.stat().map_err(|e| Error::of("stat", from, &e))?;
        let directory = stat.st_mode & libc::S_IFMT == libc::S_IFDIR;
        if directory && !recursive {
            return Err(Error::Invalid(format!("{} is a directory, and recursive is not said", from.display())));
        }
        if !directory && stat.st_size as u64 > self.limit {
            let text = format!("{} has {} bytes, more than {}", from.display(), stat.st_size, self.limit);
            return Err(Error::TooLarge(text));
        }
        let target = place(to)?;
        if let Ok(there) = target.stat() {
            let is_directory = there.st_mode & libc::S_IFMT == libc::S_IFDIR;
            if !overwrite || directory || is_directory {
                return Err(Error::Conflict(format!("destination path already exists: {}", to.display())));
            }
        }
        let failed = |e: io::Error| Error::System(format!("copy {} to {}: {e}", from.display(), to.display()));
        let part = target.beside(format!(".runx-copy-{}", ids::hex())).map_err(failed)?;
        let done = copy(&source, &part, DEPTH, false).and_then(|()| part.rename(&target, overwrite && !directory));
        done.map_err(|e| {
            let _ = remove(&part);
            match e.kind() {
                io::ErrorKind::AlreadyExists => {
                    Error::Conflict(format!("destination path already exists: {}", to.display()))
                }
                _ => failed(e),
            }
        })
    }

    /// Changes the mode, of all below as well if `recursive` says so. Symbolic links below have none.
    ///
    /// # Errors
    /// The kernel's.
    pub fn change_mode(&self, path: &Path, mode: u32, recursive: bool) -> Result<()> {
        self.each(path, recursive, "change the mode of", &|file, link| {
            if link {
                return Ok(());
            }
            root::change_mode(file, mode)
        })
    }

    /// Changes owner and group, of all below as well if `recursive` says so; of symbolic links below themselves.
    ///
    /// # Errors
    /// The kernel's.
    pub fn change_owner(&self, path: &Path, (uid, gid): (Option<u32>, Option<u32>), recursive: bool) -> Result<()> {
        self.each(path, recursive, "change the owner of", &|file, _| root::change_owner(file, uid, gid))
    }

    /// Does something to a path, and to all below it if `recursive` says so; below first, since it may take rights away.
    fn each(&self, path: &Path, recursive: bool, attempt: &str, work: Work<'_>) -> Result<()> {
        // A link at the path itself is followed, inside of the root.
        let file = self.root.open(path, libc::O_PATH, 0).map_err(|e| Error::of("open", path, &e))?;
        if recursive && let Ok(directory) = self.root.open(path, libc::O_RDONLY | libc::O_DIRECTORY, 0) {
            below(directory, DEPTH, work).map_err(|e| Error::of(attempt, path, &e))?;
        }
        work(&file, false).map_err(|e| Error::of(attempt, path, &e))
    }

    /// What the one as whom this thread acts may do with a file.
    ///
    /// # Errors
    /// [`Error::NotFound`]; also when he cannot reach it, the kernel's.
    pub fn access(&self, path: &Path) -> Result<Rights> {
        let file = self.root.open(path, libc::O_PATH, 0).map_err(|e| Error::of("open", path, &e))?;
        let may = |mode: libc::c_int| {
            // SAFETY: the path is empty and ends with NUL; what is asked about is the open file.
            let code = unsafe {
                libc::syscall(
                    libc::SYS_faccessat2,
                    file.as_raw_fd(),
                    c"".as_ptr(),
                    mode,
                    libc::AT_EMPTY_PATH | libc::AT_EACCESS,
                )
            };
            code == 0
        };
        Ok(Rights { read: may(libc::R_OK), write: may(libc::W_OK), execute: may(libc::X_OK) })
    }
}

/// Something that is done to an open file, of which it is said whether it is a symbolic link.
type Work<'a> = &'a dyn Fn(&OwnedFd, bool) -> io::Result<()>;

fn below(directory: OwnedFd, depth: usize, work: Work<'_>) -> io::Result<()> {
    if depth == 0 {
        return Err(io::Error::other(format!("it is deeper than {DEPTH} directories")));
    }
    let copy = directory.try_clone()?;
    for name in names(directory)? {
        let place = Place::new(copy.try_clone()?, name);
        let stat = match place.stat() {
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            other => other?,
        };
        let kind = stat.st_mode & libc::S_IFMT;
        if kind == libc::S_IFDIR {
            below(place.open(libc::O_RDONLY | libc::O_DIRECTORY, 0)?, depth - 1, work)?;
        }
        work(&place.open(libc::O_PATH, 0)?, kind == libc::S_IFLNK)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, symlink};

    use super::*;
    use crate::fs::root::Root;

    fn files() -> (tempfile::TempDir, Files) {
        let top = tempfile::tempdir().unwrap();
        fs::create_dir_all(top.path().join("a/b")).unwrap();
        fs::write(top.path().join("a/b/file"), "x").unwrap();
        symlink("/etc/passwd", top.path().join("a/link")).unwrap();
        let root = Root::new(Some(top.path())).unwrap();
        (top, Files { root, limit: 1 << 20 })
    }

    #[test]
    fn a_copy_is_whole_or_not_there() {
        let (top, files) = files();
        let copy = |from: &str, to: &str, recursive, overwrite| {
            files.copy(Path::new(from), Path::new(to), recursive, overwrite)
        };
        copy("/a", "/c", true, false).unwrap();
        assert_eq!(fs::read(top.path().join("c/b/file")).unwrap(), b"x");
        assert_eq!(fs::read_link(top.path().join("c/link")).unwrap(), Path::new("/etc/passwd"));
        assert!(matches!(copy("/a", "/d", false, false), Err(Error::Invalid(_))));
        assert!(matches!(copy("/a", "/c", true, true), Err(Error::Conflict(_))));
        assert!(matches!(copy("/a", "/a/b/c", true, false), Err(Error::Invalid(_))));
        assert!(matches!(copy("/none", "/d", true, false), Err(Error::NotFound(_))));
        copy("/a/b/file", "/e", false, false).unwrap();
        assert!(matches!(copy("/a/b/file", "/e", false, false), Err(Error::Conflict(_))));
        copy("/a/b/file", "/e", false, true).unwrap();
        // What cannot be copied leaves nothing behind.
        nix::unistd::mkfifo(&top.path().join("a/fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(matches!(copy("/a", "/f", true, false), Err(Error::System(_))));
        let mut left: Vec<_> = fs::read_dir(top.path()).unwrap().map(|one| one.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["a", "c", "e"]);
    }

    #[test]
    fn modes_of_a_tree_do_not_follow_its_links() {
        let (top, files) = files();
        let before = fs::metadata("/etc/passwd").unwrap().mode();
        files.change_mode(Path::new("/a"), 0o710, true).unwrap();
        assert_eq!(fs::metadata(top.path().join("a/b/file")).unwrap().mode() & 0o777, 0o710);
        assert_eq!(fs::metadata(top.path().join("a")).unwrap().mode() & 0o777, 0o710);
        assert_eq!(fs::metadata("/etc/passwd").unwrap().mode(), before);
        let accounts = Accounts::default();
        let (entries, total) = files.page(Path::new("/a"), 1, 1, &accounts).unwrap();
        assert_eq!((entries.len(), total, entries[0].path.as_str()), (1, 2, "/a/link"));
        let rights = files.access(Path::new("/a/b/file")).unwrap();
        assert!(rights.read && rights.execute);
    }
}
