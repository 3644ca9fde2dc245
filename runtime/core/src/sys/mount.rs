//! The descriptor-based mount calls: `open_tree`, `fsopen`, `fsconfig`, `fsmount`, `mount_setattr`,
//! `move_mount`, `pivot_root`.

use super::{check, cstring, owned};
use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// Attributes of a mount, `MOUNT_ATTR_*`.
pub mod attr {
    /// Read-only.
    pub const RDONLY: u64 = libc::MOUNT_ATTR_RDONLY;
    /// Ignore set-user-id bits.
    pub const NOSUID: u64 = libc::MOUNT_ATTR_NOSUID;
    /// No access to devices.
    pub const NODEV: u64 = libc::MOUNT_ATTR_NODEV;
    /// No execution.
    pub const NOEXEC: u64 = libc::MOUNT_ATTR_NOEXEC;
    /// The field that holds how access times are kept; cleared before one of them is set.
    pub const ATIME_MASK: u64 = libc::MOUNT_ATTR__ATIME;
    /// Never update access times.
    pub const NOATIME: u64 = libc::MOUNT_ATTR_NOATIME;
    /// Always update access times.
    pub const STRICTATIME: u64 = libc::MOUNT_ATTR_STRICTATIME;
    /// Never update access times of directories.
    pub const NODIRATIME: u64 = libc::MOUNT_ATTR_NODIRATIME;
    /// Do not follow symbolic links.
    pub const NOSYMFOLLOW: u64 = 0x0020_0000;
}

/// `open_tree(2)` with `OPEN_TREE_CLONE`: a detached copy of the mount at `path`, with everything
/// mounted below it if `recursive`.
pub fn clone_tree(dir: BorrowedFd<'_>, path: impl AsRef<Path>, recursive: bool) -> io::Result<OwnedFd> {
    let path = cstring(path.as_ref())?;
    let mut flags = libc::OPEN_TREE_CLONE as i64 | libc::OPEN_TREE_CLOEXEC as i64;
    if recursive {
        flags |= i64::from(libc::AT_RECURSIVE);
    }
    if path.is_empty() {
        flags |= i64::from(libc::AT_EMPTY_PATH);
    }
    // SAFETY: path is NUL-terminated and outlives the call.
    owned(unsafe { libc::syscall(libc::SYS_open_tree, dir.as_raw_fd(), path.as_ptr(), flags) })
}

/// Sets and clears attributes of the mount behind `fd`, and of all below it if `recursive`.
/// `propagation` is one of `MS_PRIVATE`, `MS_SLAVE`, `MS_SHARED`, `MS_UNBINDABLE`, or 0 to leave it.
pub fn set_attributes(fd: BorrowedFd<'_>, set: u64, clear: u64, propagation: u64, recursive: bool) -> io::Result<()> {
    mount_setattr(fd, libc::mount_attr { attr_set: set, attr_clr: clear, propagation, userns_fd: 0 }, recursive)
}

/// Shows a detached mount, and all below it if `recursive`, with ids as the user namespace `users` maps them:
/// `MOUNT_ATTR_IDMAP`.
pub fn set_id_map(fd: BorrowedFd<'_>, users: BorrowedFd<'_>, recursive: bool) -> io::Result<()> {
    let userns_fd = users.as_raw_fd() as u64;
    let attributes = libc::mount_attr { attr_set: libc::MOUNT_ATTR_IDMAP, attr_clr: 0, propagation: 0, userns_fd };
    mount_setattr(fd, attributes, recursive)
}

fn mount_setattr(fd: BorrowedFd<'_>, attributes: libc::mount_attr, recursive: bool) -> io::Result<()> {
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is an empty NUL-terminated string and attributes has the size that is passed.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            fd.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &attributes as *const libc::mount_attr,
            size_of::<libc::mount_attr>(),
        )
    })
    .map(drop)
}

/// `move_mount(2)`: attaches the mount behind `mount` on the place behind `target`.
pub fn attach(mount: BorrowedFd<'_>, target: BorrowedFd<'_>) -> io::Result<()> {
    let flags = libc::MOVE_MOUNT_F_EMPTY_PATH | libc::MOVE_MOUNT_T_EMPTY_PATH;
    // SAFETY: both paths are empty NUL-terminated strings; the descriptors are borrowed.
    check(unsafe {
        libc::syscall(libc::SYS_move_mount, mount.as_raw_fd(), c"".as_ptr(), target.as_raw_fd(), c"".as_ptr(), flags)
    })
    .map(drop)
}

/// A filesystem that is being configured, `fsopen(2)`.
#[derive(Debug)]
pub struct NewFilesystem(OwnedFd);

impl NewFilesystem {
    /// Begins a filesystem of the given type.
    pub fn open(kind: &str) -> io::Result<Self> {
        let kind = cstring(kind)?;
        // SAFETY: kind is NUL-terminated.
        owned(unsafe { libc::syscall(libc::SYS_fsopen, kind.as_ptr(), libc::FSOPEN_CLOEXEC) }).map(Self)
    }

    fn config(&self, command: libc::c_uint, key: Option<&CStr>, value: Option<&CStr>) -> io::Result<()> {
        let pointer = |text: Option<&CStr>| text.map_or(std::ptr::null(), CStr::as_ptr);
        // SAFETY: key and value are NULL or NUL-terminated, as each command asks.
        check(unsafe {
            libc::syscall(libc::SYS_fsconfig, self.0.as_raw_fd(), command, pointer(key), pointer(value), 0)
        })
        .map(drop)
        .map_err(|e| self.explain(e))
    }

    /// The kernel's own words about a failure, which it leaves to be read from the descriptor.
    fn explain(&self, error: io::Error) -> io::Error {
        let mut text = [0u8; 256];
        // SAFETY: the buffer is valid for its length.
        let n = unsafe { libc::read(self.0.as_raw_fd(), text.as_mut_ptr().cast(), text.len()) };
        match usize::try_from(n) {
            Ok(n) if n > 2 => {
                let said = String::from_utf8_lossy(&text[2..n]);
                io::Error::new(error.kind(), format!("{error}: {}", said.trim()))
            }
            _ => error,
        }
    }

    /// Sets an option without a value.
    pub fn flag(&self, key: &str) -> io::Result<()> {
        self.config(libc::FSCONFIG_SET_FLAG, Some(&cstring(key)?), None)
    }

    /// Sets an option with a value.
    pub fn string(&self, key: &str, value: &str) -> io::Result<()> {
        self.config(libc::FSCONFIG_SET_STRING, Some(&cstring(key)?), Some(&cstring(value)?))
    }

    /// Creates the filesystem and a detached mount of it with the given attributes.
    pub fn mount(self, attributes: u64) -> io::Result<OwnedFd> {
        self.config(libc::FSCONFIG_CMD_CREATE, None, None)?;
        // SAFETY: only integers are passed.
        owned(unsafe { libc::syscall(libc::SYS_fsmount, self.0.as_raw_fd(), libc::FSMOUNT_CLOEXEC, attributes) })
            .map_err(|e| self.explain(e))
    }
}

/// A procfs of the caller's PID namespace that is attached nowhere, so that nothing can be mounted
/// over it: the only way runx reads or writes files of /proc.
pub fn private_proc() -> io::Result<OwnedFd> {
    NewFilesystem::open("proc")?.mount(attr::NOSUID | attr::NODEV | attr::NOEXEC)
}

/// Changes the propagation of everything mounted in this namespace.
pub fn set_propagation_of_all(propagation: libc::c_ulong) -> io::Result<()> {
    set_propagation(c"/", propagation | libc::MS_REC)
}

/// Changes the propagation of the mount at `path`.
pub fn set_propagation(path: &CStr, flags: libc::c_ulong) -> io::Result<()> {
    // SAFETY: all strings are NUL-terminated or NULL where mount(2) ignores them.
    check(unsafe { libc::mount(std::ptr::null(), path.as_ptr(), std::ptr::null(), flags, std::ptr::null()) }.into())
        .map(drop)
}

/// Makes `root`, a mount that is attached in this namespace, the root directory, and detaches what was
/// the root before.
///
/// The caller must have made everything private first, else the node's own mounts are detached too.
pub fn pivot_into(root: &impl AsFd) -> io::Result<()> {
    let root = root.as_fd();
    // SAFETY: the descriptor is borrowed for the call.
    check(unsafe { libc::fchdir(root.as_raw_fd()) }.into())?;
    // pivot_root(".", ".") stacks the old root on the new one, where "." then reaches it.
    // SAFETY: both paths are NUL-terminated.
    check(unsafe { libc::syscall(libc::SYS_pivot_root, c".".as_ptr(), c".".as_ptr()) })?;
    // SAFETY: the path is NUL-terminated.
    check(unsafe { libc::umount2(c".".as_ptr(), libc::MNT_DETACH) }.into())?;
    chdir_root()
}

/// The way into a root for kernels that run on an initramfs, where pivot_root is refused: the mount is
/// moved over `/`, unless it is there already, and entered by chroot.
pub fn move_into(root: &impl AsFd, elsewhere: bool) -> io::Result<()> {
    // SAFETY: the descriptor is borrowed for the call.
    check(unsafe { libc::fchdir(root.as_fd().as_raw_fd()) }.into())?;
    if elsewhere {
        let (from, to) = (c".".as_ptr(), c"/".as_ptr());
        // SAFETY: the paths are NUL-terminated; type and data are ignored for MS_MOVE.
        check(unsafe { libc::mount(from, to, std::ptr::null(), libc::MS_MOVE, std::ptr::null()) }.into())?;
    }
    // SAFETY: the path is NUL-terminated.
    check(unsafe { libc::chroot(c".".as_ptr()) }.into())?;
    chdir_root()
}

fn chdir_root() -> io::Result<()> {
    // SAFETY: the path is NUL-terminated.
    check(unsafe { libc::chdir(c"/".as_ptr()) }.into()).map(drop)
}

/// A file alone on a read-only mount that is nowhere attached: whoever executes it from there, or maps it, cannot be used
/// to write to it through /proc/PID/exe or /proc/PID/fd (CVE-2019-5736).
pub fn read_only_clone(file: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let tree = clone_tree(file, "", false)?;
    set_attributes(tree.as_fd(), attr::RDONLY, 0, libc::MS_PRIVATE, false)?;
    Ok(tree)
}

/// `umount2(2)` with `MNT_DETACH`.
pub fn detach(path: impl AsRef<Path>) -> io::Result<()> {
    let path = cstring(path.as_ref())?;
    // SAFETY: path is NUL-terminated.
    check(unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH | libc::UMOUNT_NOFOLLOW) }.into()).map(drop)
}
