//! The node's files, below the directory that stands for its `/`. A path here is always the node's own, such as
//! `/etc/containerd/config.toml`; links in it lead nowhere else (openat2(2), RESOLVE_IN_ROOT).

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Metadata};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::Mode;

/// What the name of a file that is being written ends with. No pattern of configuration files matches it.
const NEW: &str = ".runx-new";

/// The node's root directory.
#[derive(Debug)]
pub(crate) struct Root {
    directory: OwnedFd,
    path: PathBuf,
}

/// Which directory a file is in, and its name there.
struct Place {
    directory: OwnedFd,
    name: OsString,
}

impl Place {
    /// A path to it that goes by the descriptor.
    fn path(&self) -> PathBuf {
        self.at(&self.name)
    }

    fn at(&self, name: &OsStr) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.directory.as_raw_fd())).join(name)
    }

    fn new_name(&self) -> OsString {
        let mut name = OsString::from(".");
        name.push(&self.name);
        name.push(NEW);
        name
    }

    /// Makes sure that what was done in the directory outlives a loss of power.
    fn sync(&self) -> io::Result<()> {
        File::open(self.at(OsStr::new(".")))?.sync_all()
    }
}

/// `None` for what is not there.
fn optional<T>(done: io::Result<T>) -> io::Result<Option<T>> {
    match done {
        Ok(value) => Ok(Some(value)),
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => Ok(None),
        Err(e) => Err(e),
    }
}

impl Root {
    /// Opens the directory at `path`.
    ///
    /// # Errors
    /// When it is not a directory that can be opened.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let path = fs::canonicalize(path)?;
        let directory = nix::fcntl::open(&path, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
        Ok(Self { directory, path })
    }

    fn open_path(&self, path: &Path, flags: OFlag) -> io::Result<OwnedFd> {
        let how = OpenHow::new()
            .flags(flags | OFlag::O_PATH | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        Ok(openat2(&self.directory, path, how)?)
    }

    fn place(&self, path: &Path) -> io::Result<Place> {
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{} names no file", path.display())));
        };
        Ok(Place { directory: self.open_path(parent, OFlag::O_DIRECTORY)?, name: name.to_owned() })
    }

    /// Where a path leads, as this process sees it: for programs that are started here, and for sockets.
    ///
    /// # Errors
    /// When there is nothing.
    pub(crate) fn outside(&self, path: &Path) -> io::Result<PathBuf> {
        let file = self.open_path(path, OFlag::empty())?;
        fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))
    }

    /// The path without links in it.
    ///
    /// # Errors
    /// When there is nothing.
    pub(crate) fn real(&self, path: &Path) -> io::Result<PathBuf> {
        let outside = self.outside(path)?;
        match outside.strip_prefix(&self.path) {
            Ok(below) => Ok(Path::new("/").join(below)),
            Err(_) => Err(io::Error::other(format!("{} is not below {}", outside.display(), self.path.display()))),
        }
    }

    /// What a path leads to, if there is anything.
    ///
    /// # Errors
    /// When that cannot be found out.
    pub(crate) fn metadata(&self, path: &Path) -> io::Result<Option<Metadata>> {
        let Some(file) = optional(self.open_path(path, OFlag::empty()))? else { return Ok(None) };
        fs::metadata(format!("/proc/self/fd/{}", file.as_raw_fd())).map(Some)
    }

    /// Whether there is anything. What cannot be looked at counts as missing.
    pub(crate) fn exists(&self, path: &Path) -> bool {
        self.metadata(path).is_ok_and(|found| found.is_some())
    }

    /// Whether there is a directory.
    pub(crate) fn is_directory(&self, path: &Path) -> bool {
        self.metadata(path).is_ok_and(|found| found.is_some_and(|found| found.is_dir()))
    }

    /// A file's content, if there is one.
    ///
    /// # Errors
    /// When there is one that cannot be read.
    pub(crate) fn read(&self, path: &Path) -> io::Result<Option<Vec<u8>>> {
        let Some(file) = optional(self.open_path(path, OFlag::empty()))? else { return Ok(None) };
        fs::read(format!("/proc/self/fd/{}", file.as_raw_fd())).map(Some)
    }

    /// Opens a file for reading, if there is one.
    ///
    /// # Errors
    /// When there is one that cannot be opened.
    pub(crate) fn open_file(&self, path: &Path) -> io::Result<Option<File>> {
        let Some(file) = optional(self.open_path(path, OFlag::empty()))? else { return Ok(None) };
        // What is a FIFO by now keeps nobody waiting for who writes into it.
        let mut options = fs::OpenOptions::new();
        options.read(true).custom_flags(libc::O_NONBLOCK);
        options.open(format!("/proc/self/fd/{}", file.as_raw_fd())).map(Some)
    }

    /// Opens an empty file, which is made if it is not there.
    ///
    /// # Errors
    /// When it cannot be opened, or made.
    pub(crate) fn open_or_make(&self, path: &Path) -> io::Result<File> {
        let place = self.place(path)?;
        let flags = libc::O_NOFOLLOW;
        fs::OpenOptions::new().read(true).append(true).create(true).mode(0o600).custom_flags(flags).open(place.path())
    }

    /// The names in a directory, sorted; none if there is no directory.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(crate) fn names(&self, path: &Path) -> io::Result<Vec<OsString>> {
        let Some(directory) = optional(self.open_path(path, OFlag::O_DIRECTORY))? else { return Ok(Vec::new()) };
        let entries = fs::read_dir(format!("/proc/self/fd/{}", directory.as_raw_fd()))?;
        let mut names = entries.map(|entry| entry.map(|entry| entry.file_name())).collect::<io::Result<Vec<_>>>()?;
        names.sort();
        Ok(names)
    }

    /// Makes a directory and those above it. Tells which of them were not there, from the top.
    ///
    /// # Errors
    /// When one cannot be made.
    pub(crate) fn make_directories(&self, path: &Path) -> io::Result<Vec<PathBuf>> {
        let mut made = Vec::new();
        let mut at = PathBuf::from("/");
        for part in path.components() {
            match part {
                Component::RootDir => {}
                Component::Normal(name) => at.push(name),
                _ => {
                    return Err(io::Error::new(
                        io::ErrorKind::InvalidInput,
                        format!("{}: not absolute", path.display()),
                    ));
                }
            }
            if part == Component::RootDir || self.is_directory(&at) {
                continue;
            }
            let place = self.place(&at)?;
            match fs::create_dir(place.path()) {
                // By somebody else, just now.
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists && self.is_directory(&at) => continue,
                done => done?,
            }
            fs::set_permissions(place.path(), fs::Permissions::from_mode(0o755))?;
            place.sync()?;
            made.push(at.clone());
        }
        Ok(made)
    }

    /// Puts a file into its place at once and for good: whoever looks finds the old content or the new one, also after a
    /// loss of power. Owner and mode are those of `like`, if there is such a file, else root's and `mode`.
    ///
    /// # Errors
    /// When that is not possible; the old file is as it was then.
    pub(crate) fn write(&self, path: &Path, bytes: &[u8], mode: u32, like: Option<&Metadata>) -> io::Result<()> {
        self.write_if(path, bytes, mode, like, || Ok(true)).map(drop)
    }

    /// The same, unless `wanted` says otherwise at the last moment. Tells whether it was written.
    ///
    /// # Errors
    /// As [`Root::write`], and with those of `wanted`.
    pub(crate) fn write_if(
        &self,
        path: &Path,
        bytes: &[u8],
        mode: u32,
        like: Option<&Metadata>,
        wanted: impl Fn() -> io::Result<bool>,
    ) -> io::Result<bool> {
        let place = self.place(path)?;
        let new = place.at(&place.new_name());
        optional(fs::remove_file(&new))?;
        let write = || {
            let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
            file.write_all(bytes)?;
            let made = file.metadata()?;
            // Root's own file to root needs no right to, and a pod has none.
            if let Some(like) = like.filter(|like| (like.uid(), like.gid()) != (made.uid(), made.gid())) {
                std::os::unix::fs::fchown(&file, Some(like.uid()), Some(like.gid()))?;
            }
            let mode = like.map_or(mode, |like| like.mode() & 0o7777);
            file.set_permissions(fs::Permissions::from_mode(mode))?;
            file.sync_all()?;
            let wanted = wanted()?;
            if wanted {
                fs::rename(&new, place.path())?;
            }
            io::Result::Ok(wanted)
        };
        let done = write();
        if !matches!(done, Ok(true)) {
            let _ = fs::remove_file(&new);
            return done;
        }
        place.sync().map(|()| true)
    }

    /// Whether files can be made in a directory, or in what is there of those above it.
    ///
    /// # Errors
    /// When they cannot: the file system is read-only, or the right is missing.
    pub(crate) fn writable(&self, directory: &Path) -> io::Result<()> {
        for at in directory.ancestors() {
            let Some(found) = optional(self.open_path(at, OFlag::O_DIRECTORY))? else { continue };
            let path = format!("/proc/self/fd/{}", found.as_raw_fd());
            return Ok(nix::unistd::access(path.as_str(), nix::unistd::AccessFlags::W_OK)?);
        }
        Ok(())
    }

    /// Lets a link lead elsewhere, at once.
    ///
    /// # Errors
    /// When that is not possible; the old link is as it was then.
    pub(crate) fn link(&self, path: &Path, target: &Path) -> io::Result<()> {
        let place = self.place(path)?;
        let new = place.at(&place.new_name());
        optional(fs::remove_file(&new))?;
        std::os::unix::fs::symlink(target, &new)?;
        fs::rename(&new, place.path())?;
        place.sync()
    }

    /// Where a link says that it leads.
    ///
    /// # Errors
    /// When there is something that is no link.
    pub(crate) fn link_target(&self, path: &Path) -> io::Result<Option<PathBuf>> {
        let Some(place) = optional(self.place(path))? else { return Ok(None) };
        optional(fs::read_link(place.path()))
    }

    /// When a link was made.
    ///
    /// # Errors
    /// When that cannot be found out.
    pub(crate) fn link_time(&self, path: &Path) -> io::Result<Option<std::time::SystemTime>> {
        let Some(place) = optional(self.place(path))? else { return Ok(None) };
        optional(fs::symlink_metadata(place.path()).and_then(|found| found.modified()))
    }

    /// Renames within the node.
    ///
    /// # Errors
    /// When that is not possible.
    pub(crate) fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let (from, to) = (self.place(from)?, self.place(to)?);
        fs::rename(from.path(), to.path())?;
        to.sync()
    }

    /// Removes a file or a link, and what a kill left of writing it; it is fine if there is none.
    ///
    /// # Errors
    /// When there is one that cannot be removed.
    pub(crate) fn remove(&self, path: &Path) -> io::Result<()> {
        let Some(place) = optional(self.place(path))? else { return Ok(()) };
        optional(fs::remove_file(place.at(&place.new_name())))?;
        if optional(fs::remove_file(place.path()))?.is_some() {
            place.sync()?;
        }
        Ok(())
    }

    /// Removes a directory and all below it; it is fine if there is none.
    ///
    /// # Errors
    /// When there is one that cannot be removed.
    pub(crate) fn remove_tree(&self, path: &Path) -> io::Result<()> {
        let Some(place) = optional(self.place(path))? else { return Ok(()) };
        if optional(fs::remove_dir_all(place.path()))?.is_some() {
            place.sync()?;
        }
        Ok(())
    }

    /// Removes a directory if it is there and empty. Tells whether it is gone.
    ///
    /// # Errors
    /// When it cannot be removed for another reason than what is in it.
    pub(crate) fn remove_empty(&self, path: &Path) -> io::Result<bool> {
        let Some(place) = optional(self.place(path))? else { return Ok(true) };
        match fs::remove_dir(place.path()) {
            Ok(()) => place.sync().map(|()| true),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(true),
            // One that something is mounted on is a container's volume, and what it is in cannot be written to.
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOTEMPTY | libc::EEXIST | libc::EBUSY | libc::EROFS)) => {
                Ok(false)
            }
            Err(e) => Err(e),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root() -> (tempfile::TempDir, Root) {
        let directory = tempfile::tempdir().unwrap();
        let root = Root::open(directory.path()).unwrap();
        (directory, root)
    }

    #[test]
    fn links_lead_nowhere_outside() {
        let (directory, root) = root();
        let outside = tempfile::NamedTempFile::new().unwrap();
        std::os::unix::fs::symlink(outside.path(), directory.path().join("out")).unwrap();
        std::os::unix::fs::symlink("/", directory.path().join("up")).unwrap();
        fs::write(directory.path().join("file"), "x").unwrap();
        assert_eq!(root.read(Path::new("/out")).unwrap(), None);
        assert_eq!(root.read(Path::new("/up/up/../../file")).unwrap().as_deref(), Some(&b"x"[..]));
        assert_eq!(root.real(Path::new("/up/file")).unwrap(), Path::new("/file"));
    }

    #[test]
    fn what_is_written_replaces_with_owner_and_mode_and_leaves_nothing_beside() {
        let (directory, root) = root();
        assert_eq!(root.make_directories(Path::new("/a/b")).unwrap(), [Path::new("/a"), Path::new("/a/b")]);
        assert!(root.make_directories(Path::new("/a/b")).unwrap().is_empty());
        let path = Path::new("/a/b/c");
        // As a kill leaves it.
        fs::write(directory.path().join("a/b/.c.runx-new"), "half").unwrap();
        root.write(path, b"one", 0o640, None).unwrap();
        let like = root.metadata(path).unwrap();
        assert_eq!(like.as_ref().unwrap().mode() & 0o777, 0o640);
        root.write(path, b"two", 0o600, like.as_ref()).unwrap();
        assert_eq!(root.metadata(path).unwrap().unwrap().mode() & 0o777, 0o640);
        assert_eq!(root.read(path).unwrap().unwrap(), b"two");
        assert_eq!(root.names(Path::new("/a/b")).unwrap(), ["c"]);
        assert!(!root.remove_empty(Path::new("/a/b")).unwrap());
        root.remove(path).unwrap();
        root.remove(path).unwrap();
        assert!(root.remove_empty(Path::new("/a/b")).unwrap());
    }
}
