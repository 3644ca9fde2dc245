//! Where paths lead: everywhere that the daemon may go, or inside of one directory.
//!
//! With a jail, every path is resolved by the kernel with `RESOLVE_IN_ROOT` (openat2), where `..` and symbolic links end at
//! the jail's root. What is opened is then used by its descriptor; a link that is put in its place meanwhile changes
//! nothing.

use std::ffi::{CString, OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

/// A directory that all paths are in.
#[derive(Debug)]
pub struct Root {
    /// The root of the jail, if there is one.
    jail: Option<OwnedFd>,
}

/// A name in a directory that is open.
#[derive(Debug)]
pub struct Place {
    directory: OwnedFd,
    name: OsString,
}

/// What is known of a file.
pub type Stat = libc::stat;

fn c(path: &OsStr) -> io::Result<CString> {
    CString::new(path.as_bytes()).map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "the path holds a NUL byte"))
}

fn check(code: libc::c_int) -> io::Result<libc::c_int> {
    if code < 0 { Err(io::Error::last_os_error()) } else { Ok(code) }
}

/// openat2(2)'s arguments.
#[repr(C)]
struct How {
    flags: u64,
    mode: u64,
    resolve: u64,
}

const RESOLVE_NO_MAGICLINKS: u64 = 0x02;
const RESOLVE_IN_ROOT: u64 = 0x10;

impl Root {
    /// Everywhere, or inside of `jail`.
    ///
    /// # Errors
    /// When the jail is no directory, or the kernel knows no openat2.
    pub fn new(jail: Option<&Path>) -> io::Result<Self> {
        let root = Self {
            jail: jail.map(|path| open_at(libc::AT_FDCWD, path, libc::O_PATH | libc::O_DIRECTORY, 0)).transpose()?,
        };
        root.open(Path::new("/"), libc::O_PATH | libc::O_DIRECTORY, 0)?;
        Ok(root)
    }

    /// Whether paths are kept inside of a directory.
    pub fn is_jail(&self) -> bool {
        self.jail.is_some()
    }

    /// Opens an absolute path; `O_CLOEXEC` is added.
    ///
    /// # Errors
    /// The kernel's.
    pub fn open(&self, path: &Path, flags: libc::c_int, mode: u32) -> io::Result<OwnedFd> {
        let Some(jail) = &self.jail else { return open_at(libc::AT_FDCWD, path, flags, mode) };
        let path = c(path.as_os_str())?;
        let how = How {
            flags: (flags | libc::O_CLOEXEC) as u64,
            mode: if flags & (libc::O_CREAT | libc::O_TMPFILE) != 0 { mode.into() } else { 0 },
            resolve: RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS,
        };
        loop {
            // SAFETY: the path ends with its NUL, and `how` has the size that is given.
            let fd = unsafe {
                libc::syscall(libc::SYS_openat2, jail.as_raw_fd(), path.as_ptr(), &raw const how, size_of::<How>())
            };
            if fd >= 0 {
                // SAFETY: it is new, and nobody else's.
                return Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) });
            }
            let error = io::Error::last_os_error();
            // Somebody renamed something while `..` was resolved.
            if error.raw_os_error() != Some(libc::EAGAIN) {
                return Err(error);
            }
        }
    }

    /// As [`Self::open`], for reading and writing as a file.
    ///
    /// # Errors
    /// The kernel's.
    pub fn open_file(&self, path: &Path, flags: libc::c_int, mode: u32) -> io::Result<File> {
        self.open(path, flags, mode).map(File::from)
    }

    /// The directory of a path, opened, and its last name.
    ///
    /// # Errors
    /// When the directory cannot be opened, or the path has no last name.
    pub fn place(&self, path: &Path) -> io::Result<Place> {
        match path.components().next_back() {
            Some(Component::Normal(name)) => {
                let parent = path.parent().unwrap_or(Path::new("/"));
                let directory = self.open(parent, libc::O_PATH | libc::O_DIRECTORY, 0)?;
                Ok(Place { directory, name: name.to_owned() })
            }
            Some(Component::RootDir) => {
                let directory = self.open(Path::new("/"), libc::O_PATH | libc::O_DIRECTORY, 0)?;
                Ok(Place { directory, name: ".".into() })
            }
            _ => {
                // The directory that it leads to, seen from itself.
                let directory = self.open(path, libc::O_PATH | libc::O_DIRECTORY, 0)?;
                Ok(Place { directory, name: ".".into() })
            }
        }
    }

    /// Makes a directory and those above it that are missing, with this mode less the umask.
    ///
    /// # Errors
    /// The kernel's, and ENOTDIR where something else is in the way.
    pub fn make_directories(&self, path: &Path, mode: u32) -> io::Result<()> {
        let is_there = |path: &Path| match self.open(path, libc::O_PATH | libc::O_DIRECTORY, 0) {
            Ok(_) => Ok(true),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(e),
        };
        let mut missing = Vec::new();
        let mut above = Some(path);
        while let Some(path) = above {
            if is_there(path)? {
                break;
            }
            missing.push(path);
            above = path.parent();
        }
        for path in missing.into_iter().rev() {
            let place = self.place(path)?;
            if place.name == "." {
                continue;
            }
            match place.make_directory(mode) {
                // Somebody else made it meanwhile; or it is a link that leads nowhere.
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                    self.open(path, libc::O_PATH | libc::O_DIRECTORY, 0)?;
                }
                other => other?,
            }
        }
        Ok(())
    }

    /// The path of a request: without `.` and empty names, made absolute. Names of other directories stay: only the kernel
    /// knows where they lead.
    pub fn absolute(&self, path: &str) -> PathBuf {
        let base =
            if self.is_jail() { PathBuf::from("/") } else { std::env::current_dir().unwrap_or_else(|_| "/".into()) };
        base.join(path).components().collect()
    }
}

fn open_at(directory: libc::c_int, path: &Path, flags: libc::c_int, mode: u32) -> io::Result<OwnedFd> {
    let path = c(path.as_os_str())?;
    // SAFETY: the path ends with its NUL; the descriptor is new and nobody else's.
    unsafe {
        let fd = check(libc::openat(directory, path.as_ptr(), flags | libc::O_CLOEXEC, mode as libc::c_uint))?;
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

impl Place {
    fn parts(&self) -> io::Result<(libc::c_int, CString)> {
        Ok((self.directory.as_raw_fd(), c(&self.name)?))
    }

    /// A name in a directory.
    pub fn new(directory: OwnedFd, name: impl Into<OsString>) -> Self {
        Self { directory, name: name.into() }
    }

    /// What is there, a symbolic link itself included.
    ///
    /// # Errors
    /// The kernel's.
    pub fn stat(&self) -> io::Result<Stat> {
        let (directory, name) = self.parts()?;
        stat_at(directory, &name)
    }

    /// Opens it without following a symbolic link.
    ///
    /// # Errors
    /// The kernel's; ELOOP for a link.
    pub fn open(&self, flags: libc::c_int, mode: u32) -> io::Result<OwnedFd> {
        open_at(self.directory.as_raw_fd(), Path::new(&self.name), flags | libc::O_NOFOLLOW, mode)
    }

    /// Removes it, a directory only if `directory` says so.
    ///
    /// # Errors
    /// The kernel's.
    pub fn unlink(&self, directory: bool) -> io::Result<()> {
        let (at, name) = self.parts()?;
        // SAFETY: the name ends with its NUL.
        check(unsafe { libc::unlinkat(at, name.as_ptr(), if directory { libc::AT_REMOVEDIR } else { 0 }) }).map(drop)
    }

    /// Makes a directory.
    ///
    /// # Errors
    /// The kernel's.
    pub fn make_directory(&self, mode: u32) -> io::Result<()> {
        let (at, name) = self.parts()?;
        // SAFETY: the name ends with its NUL.
        check(unsafe { libc::mkdirat(at, name.as_ptr(), mode) }).map(drop)
    }

    /// Gives it another name, which replaces nothing unless `replace` says so.
    ///
    /// # Errors
    /// The kernel's: EEXIST when there is something of the other name.
    pub fn rename(&self, to: &Self, replace: bool) -> io::Result<()> {
        let ((from, name), (to, new)) = (self.parts()?, to.parts()?);
        let flags = if replace { 0 } else { libc::RENAME_NOREPLACE };
        // SAFETY: both names end with their NULs.
        let renamed = check(unsafe { libc::renameat2(from, name.as_ptr(), to, new.as_ptr(), flags) }).map(drop);
        match renamed {
            // Not every filesystem can look and rename in one.
            Err(e) if !replace && e.raw_os_error() == Some(libc::EINVAL) => {
                if stat_at(to, &new).is_ok() {
                    return Err(io::Error::from_raw_os_error(libc::EEXIST));
                }
                // SAFETY: as above.
                check(unsafe { libc::renameat(from, name.as_ptr(), to, new.as_ptr()) }).map(drop)
            }
            other => other,
        }
    }

    /// Gives an open file this name.
    ///
    /// # Errors
    /// The kernel's: EEXIST when there is something of it.
    pub fn link(&self, file: &File) -> io::Result<()> {
        let (at, name) = self.parts()?;
        let from = c(OsStr::new(&format!("/proc/self/fd/{}", file.as_raw_fd())))?;
        // SAFETY: both names end with their NULs.
        check(unsafe { libc::linkat(libc::AT_FDCWD, from.as_ptr(), at, name.as_ptr(), libc::AT_SYMLINK_FOLLOW) })
            .map(drop)
    }

    /// Where a symbolic link leads.
    ///
    /// # Errors
    /// The kernel's.
    pub fn read_link(&self) -> io::Result<PathBuf> {
        Ok(nix::fcntl::readlinkat(&self.directory, Path::new(&self.name))?.into())
    }

    /// Another name in the same directory.
    ///
    /// # Errors
    /// When there are no more descriptors.
    pub fn beside(&self, name: impl Into<OsString>) -> io::Result<Self> {
        Ok(Self { directory: self.directory.try_clone()?, name: name.into() })
    }

    /// Its name.
    pub fn name(&self) -> &OsStr {
        &self.name
    }

    /// The directory that it is in.
    pub fn directory(&self) -> &OwnedFd {
        &self.directory
    }
}

fn stat_at(directory: libc::c_int, name: &CString) -> io::Result<Stat> {
    let mut stat = std::mem::MaybeUninit::<Stat>::zeroed();
    // SAFETY: the name ends with its NUL, and the pointer is to a local of the right type.
    unsafe {
        check(libc::fstatat(directory, name.as_ptr(), stat.as_mut_ptr(), libc::AT_SYMLINK_NOFOLLOW))?;
        Ok(stat.assume_init())
    }
}

/// The names in an open directory, sorted, without `.` and `..`.
///
/// # Errors
/// The kernel's.
pub fn names(directory: OwnedFd) -> io::Result<Vec<OsString>> {
    let mut directory = nix::dir::Dir::from_fd(directory)?;
    let mut names = Vec::new();
    for entry in directory.iter() {
        let entry = entry?;
        let name = OsStr::from_bytes(entry.file_name().to_bytes());
        if name != "." && name != ".." {
            names.push(name.to_owned());
        }
    }
    names.sort();
    Ok(names)
}

/// Changes the mode of an open file; one that was opened with `O_PATH` will do.
///
/// # Errors
/// The kernel's.
pub fn change_mode(file: &OwnedFd, mode: u32) -> io::Result<()> {
    // SAFETY: takes numbers.
    match check(unsafe { libc::fchmod(file.as_raw_fd(), mode) }) {
        Err(e) if e.raw_os_error() == Some(libc::EBADF) => {
            let path = c(OsStr::new(&format!("/proc/self/fd/{}", file.as_raw_fd())))?;
            // SAFETY: the path ends with its NUL. It leads to what is open, whatever has its name by now.
            check(unsafe { libc::chmod(path.as_ptr(), mode) }).map(drop)
        }
        other => other.map(drop),
    }
}

/// Changes owner and group of an open file; one that was opened with `O_PATH` will do.
///
/// # Errors
/// The kernel's.
pub fn change_owner(file: &OwnedFd, uid: Option<u32>, gid: Option<u32>) -> io::Result<()> {
    // SAFETY: the name is a string with its NUL, and empty: what is open is meant.
    check(unsafe {
        libc::fchownat(
            file.as_raw_fd(),
            c"".as_ptr(),
            uid.unwrap_or(u32::MAX),
            gid.unwrap_or(u32::MAX),
            libc::AT_EMPTY_PATH,
        )
    })
    .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn nothing_leads_out_of_a_jail() {
        let top = tempfile::tempdir().unwrap();
        let jail = top.path().join("jail");
        std::fs::create_dir(&jail).unwrap();
        std::fs::write(top.path().join("secret"), "x").unwrap();
        symlink("../secret", jail.join("up")).unwrap();
        symlink(top.path().join("secret"), jail.join("absolute")).unwrap();
        symlink("..", jail.join("dir")).unwrap();
        let root = Root::new(Some(&jail)).unwrap();
        for path in ["/up", "/absolute", "/dir/secret", "/../secret", "/dir/../../secret", "/proc/self/root/etc/passwd"]
        {
            let opened = root.open(&root.absolute(path), libc::O_RDONLY, 0);
            assert_eq!(opened.unwrap_err().kind(), io::ErrorKind::NotFound, "{path}");
        }
        // They lead to the jail's own root instead.
        root.open(Path::new("/up"), libc::O_WRONLY | libc::O_CREAT, 0o600).unwrap();
        assert!(jail.join("secret").exists());
        root.make_directories(Path::new("/dir/made/deep"), 0o755).unwrap();
        assert!(jail.join("made/deep").is_dir() && !top.path().join("made").exists());
    }

    #[test]
    fn the_place_of_a_link_is_the_link() {
        let top = tempfile::tempdir().unwrap();
        symlink("nowhere", top.path().join("link")).unwrap();
        let root = Root::new(None).unwrap();
        let place = root.place(&top.path().join("link")).unwrap();
        assert_eq!(place.stat().unwrap().st_mode & libc::S_IFMT, libc::S_IFLNK);
        assert_eq!(place.read_link().unwrap(), Path::new("nowhere"));
        place.unlink(false).unwrap();
        assert_eq!(place.stat().unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
