//! What is done to files and directories as a whole.

use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;

use super::root::{Place, names};
use super::{Error, FileInfo, Files, Permission, Result};
use crate::process::users::Accounts;

/// How deep a tree may be that is moved to another filesystem: each directory is open meanwhile.
const DEPTH: usize = 256;

/// The largest file in which text is replaced, in bytes: it is held in memory.
const REPLACE_LIMIT: u64 = 256 << 20;

impl Files {
    fn place(&self, path: &Path) -> Result<Place> {
        self.root.place(path).map_err(|e| Error::of("open the directory of", path, &e))
    }

    /// What is at a path; a symbolic link is told of itself.
    ///
    /// # Errors
    /// [`Error::NotFound`], and the kernel's.
    pub fn info(&self, path: &Path, accounts: &Accounts) -> Result<FileInfo> {
        let stat = self.place(path)?.stat().map_err(|e| Error::of("stat", path, &e))?;
        Ok(FileInfo::new(path, &stat, accounts))
    }

    /// Removes a file or symbolic link; one that is missing is gone already.
    ///
    /// # Errors
    /// When it is a directory, and the kernel's.
    pub fn remove_file(&self, path: &Path) -> Result<()> {
        let place = match self.root.place(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other.map_err(|e| Error::of("open the directory of", path, &e))?,
        };
        match place.stat() {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(Error::of("stat", path, &e)),
            Ok(stat) if stat.st_mode & libc::S_IFMT == libc::S_IFDIR => {
                return Err(Error::System(format!("path is a directory: {}", path.display())));
            }
            Ok(_) => {}
        }
        match place.unlink(false) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::of("remove", path, &e)),
            _ => Ok(()),
        }
    }

    /// Removes a directory with all that is in it, or a file; what is missing is gone already.
    ///
    /// # Errors
    /// The kernel's.
    pub fn remove_tree(&self, path: &Path) -> Result<()> {
        if path.file_name().is_none() {
            return Err(Error::Invalid(format!("{} cannot be removed", path.display())));
        }
        let place = match self.root.place(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other.map_err(|e| Error::of("open the directory of", path, &e))?,
        };
        remove(&place).map_err(|e| Error::of("remove", path, &e))
    }

    /// Gives something another path, and makes the directories that leads through.
    ///
    /// # Errors
    /// When there is something already.
    pub fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        let source = self.place(from)?;
        source.stat().map_err(|e| Error::of("stat", from, &e))?;
        if let Some(parent) = to.parent() {
            self.root
                .make_directories(parent, 0o755)
                .map_err(|e| Error::System(format!("create {}: {e}", parent.display())))?;
        }
        let target = self.place(to)?;
        match source.rename(&target, false) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                Err(Error::System(format!("destination path already exists: {}", to.display())))
            }
            Err(e) if e.raw_os_error() == Some(libc::EXDEV) => copy(&source, &target, DEPTH, true)
                .and_then(|()| remove(&source))
                .map_err(|e| Error::System(format!("move {} to {}: {e}", from.display(), to.display()))),
            other => other.map_err(|e| Error::System(format!("rename {} to {}: {e}", from.display(), to.display()))),
        }
    }

    /// Changes owner and mode of what a path leads to.
    ///
    /// # Errors
    /// The kernel's, and names that nobody has.
    pub fn change(&self, path: &Path, permission: &Permission, accounts: &Accounts) -> Result<()> {
        let file = self
            .root
            .open(path, libc::O_PATH, 0)
            .map_err(|e| Error::System(format!("open {}: {e}", path.display())))?;
        permission.apply(&file, path, accounts)
    }

    /// Makes a directory, those above it, and changes its owner and mode.
    ///
    /// # Errors
    /// The kernel's, and names that nobody has.
    pub fn make_directory(&self, path: &Path, permission: &Permission, accounts: &Accounts) -> Result<()> {
        self.root
            .make_directories(path, 0o777)
            .map_err(|e| Error::System(format!("create directory {}: {e}", path.display())))?;
        self.change(path, permission, accounts)
    }

    /// Replaces a text wherever it is in a file. Returns how often.
    ///
    /// # Errors
    /// When the text to look for is empty, the file missing or too large.
    pub fn replace(&self, path: &Path, old: &str, new: &str) -> Result<usize> {
        let flags = libc::O_RDONLY | libc::O_NONBLOCK;
        let mut file = self.root.open_file(path, flags, 0).map_err(|e| Error::of("open", path, &e))?;
        if old.is_empty() {
            return Err(Error::Invalid(format!("old text must not be empty: {}", path.display())));
        }
        let meta = file.metadata().map_err(|e| Error::of("stat", path, &e))?;
        if !meta.is_file() {
            return Err(Error::System(format!("not a file: {}", path.display())));
        }
        let most = REPLACE_LIMIT.min(self.limit);
        if meta.len() > most {
            return Err(Error::TooLarge(format!("{} has {} bytes, more than {most}", path.display(), meta.len())));
        }
        let mut content = Vec::with_capacity(meta.len() as usize);
        Read::by_ref(&mut file).take(most).read_to_end(&mut content).map_err(|e| Error::of("read", path, &e))?;
        let mut out = Vec::with_capacity(content.len());
        let (mut rest, mut count) = (content.as_slice(), 0);
        let finder = |text: &[u8]| text.windows(old.len()).position(|window| window == old.as_bytes());
        while let Some(at) = finder(rest) {
            out.extend_from_slice(&rest[..at]);
            out.extend_from_slice(new.as_bytes());
            rest = &rest[at + old.len()..];
            count += 1;
        }
        out.extend_from_slice(rest);
        if count > 0 {
            if out.len() as u64 > self.limit {
                return Err(Error::TooLarge(format!(
                    "{} would have {} bytes, more than {}",
                    path.display(),
                    out.len(),
                    self.limit
                )));
            }
            let mut writer = self.writer(path, &Permission::default(), None)?;
            writer.write(&out)?;
            writer.finish(self)?;
        }
        Ok(count)
    }
}

/// Removes whatever is at a place. Links are removed, not followed.
pub(super) fn remove(place: &Place) -> io::Result<()> {
    match place.stat() {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e),
        Ok(stat) if stat.st_mode & libc::S_IFMT != libc::S_IFDIR => return absent(place.unlink(false)),
        Ok(_) => {}
    }
    // Depth first, without recursion: a tree may be deeper than a stack.
    let mut open: Vec<(OwnedFd, Vec<std::ffi::OsString>, Place)> = Vec::new();
    let enter = |place: Place| -> io::Result<(OwnedFd, Vec<std::ffi::OsString>, Place)> {
        let directory = place.open(libc::O_RDONLY | libc::O_DIRECTORY, 0)?;
        let inside = names(directory.try_clone()?)?;
        Ok((directory, inside, place))
    };
    open.push(enter(place.beside(place.name())?)?);
    while let Some((directory, inside, _)) = open.last_mut() {
        match inside.pop() {
            Some(name) => {
                let below = Place::new(directory.try_clone()?, name);
                match below.unlink(false) {
                    Err(e) if matches!(e.raw_os_error(), Some(libc::EISDIR | libc::EPERM)) => {
                        let next = enter(below)?;
                        open.push(next);
                    }
                    other => absent(other)?,
                }
            }
            None => {
                let Some((_, _, place)) = open.pop() else { break };
                absent(place.unlink(true))?;
            }
        }
    }
    Ok(())
}

fn absent(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Copies a file, a symbolic link or a directory with the modes, and the owners if `owners` says so.
pub(super) fn copy(from: &Place, to: &Place, depth: usize, owners: bool) -> io::Result<()> {
    if depth == 0 {
        return Err(io::Error::other(format!("it is deeper than {DEPTH} directories")));
    }
    let stat = from.stat()?;
    match stat.st_mode & libc::S_IFMT {
        libc::S_IFDIR => {
            to.make_directory(0o700)?;
            let source = from.open(libc::O_RDONLY | libc::O_DIRECTORY, 0)?;
            let target = to.open(libc::O_RDONLY | libc::O_DIRECTORY, 0)?;
            for name in names(source.try_clone()?)? {
                copy(
                    &Place::new(source.try_clone()?, &name),
                    &Place::new(target.try_clone()?, &name),
                    depth - 1,
                    owners,
                )?;
            }
            keep(&target, &stat, owners)
        }
        libc::S_IFREG => {
            let mut source = std::fs::File::from(from.open(libc::O_RDONLY | libc::O_NONBLOCK, 0)?);
            let mut target = std::fs::File::from(to.open(libc::O_WRONLY | libc::O_CREAT | libc::O_EXCL, 0o600)?);
            io::copy(&mut source, &mut target)?;
            target.flush()?;
            keep(&target.into(), &stat, owners)
        }
        libc::S_IFLNK => Ok(nix::unistd::symlinkat(&from.read_link()?, to.directory(), Path::new(to.name()))?),
        _ => Err(io::Error::new(io::ErrorKind::Unsupported, "it is neither file, directory nor link")),
    }
}

fn keep(file: &OwnedFd, stat: &super::root::Stat, owners: bool) -> io::Result<()> {
    if owners {
        // Whoever may not give files away keeps them.
        let _ = super::root::change_owner(file, Some(stat.st_uid), Some(stat.st_gid));
    }
    // Rights that come with the owner do not come with a copy that somebody else has.
    super::root::change_mode(file, stat.st_mode & if owners { 0o7777 } else { 0o1777 })
}
