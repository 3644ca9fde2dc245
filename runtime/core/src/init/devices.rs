//! Device nodes and the links that programs expect in /dev.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use super::{Fds, paths};
use crate::error::{Context, Result};
use crate::plan::Device;
use crate::sys::{self, cstring, mount, resolve};

/// Links of config-linux.md, "Dev symbolic links".
const LINKS: &[(&str, &str)] = &[
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
];

/// Makes nodes and links.
pub(super) fn make(root: &OwnedFd, devices: &[Device], fds: &Fds) -> Result<()> {
    for device in devices {
        match device.bound {
            Some(tree) => {
                let target = paths::make_target(root.as_fd(), Path::new(&device.path), false)
                    .on("find or make the mount point", &device.path)?;
                mount::attach(fds.get(tree)?, target.as_fd()).on("bind device", &device.path)?;
            }
            None => make_node(root.as_fd(), device).on("make device", &device.path)?,
        }
    }
    let dev = paths::make_directory(root.as_fd(), "/dev").context("find or make /dev")?;
    for (name, target) in LINKS {
        link(dev.as_fd(), name, target).with_context(|| format!("link /dev/{name} to {target}"))?;
    }
    // /dev/core shows the kernel's memory; runc links it where the target is there.
    link_if_target(root.as_fd(), dev.as_fd(), "core", "/proc/kcore").context("link /dev/core to /proc/kcore")
}

fn link(dev: BorrowedFd<'_>, name: &str, target: &str) -> io::Result<()> {
    match nix::unistd::symlinkat(target, dev, name) {
        Err(nix::errno::Errno::EEXIST) if name == "ptmx" => {
            // An image's own ptmx would open the host's terminals.
            nix::unistd::unlinkat(dev, name, nix::unistd::UnlinkatFlags::NoRemoveDir)?;
            nix::unistd::symlinkat(target, dev, name)?;
            Ok(())
        }
        Err(nix::errno::Errno::EEXIST) => Ok(()),
        other => Ok(other?),
    }
}

fn link_if_target(root: BorrowedFd<'_>, dev: BorrowedFd<'_>, name: &str, target: &str) -> io::Result<()> {
    match paths::find(root, target) {
        Ok(_) => link(dev, name, target),
        Err(_) => Ok(()),
    }
}

fn make_node(root: BorrowedFd<'_>, device: &Device) -> io::Result<()> {
    let (parent, name) = paths::split(Path::new(&device.path))?;
    let parent = paths::make_directory(root, parent)?;
    let number = libc::makedev(device.major, device.minor);
    let c_name = cstring(name)?;
    // SAFETY: the name is NUL-terminated; the directory is borrowed for the call.
    let made = unsafe { libc::mknodat(parent.as_raw_fd(), c_name.as_ptr(), device.mode, number) };
    match sys::check(made.into()) {
        Ok(_) => {}
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
            let there = open_node(parent.as_fd(), name)?;
            let stat = sys::fstat(there.as_fd())?;
            let kind = stat.st_mode & libc::S_IFMT;
            if kind != device.mode & libc::S_IFMT || (kind != libc::S_IFIFO && stat.st_rdev != number) {
                return Err(io::Error::new(e.kind(), "something else is there"));
            }
        }
        Err(e) => return Err(e),
    }
    // mknod(2) is subject to the umask, which may be anything.
    let node = open_node(parent.as_fd(), name)?;
    change_mode(node.as_fd(), device.mode & 0o7777)?;
    nix::unistd::fchownat(
        node.as_fd(),
        "",
        Some(device.uid.into()),
        Some(device.gid.into()),
        nix::fcntl::AtFlags::AT_EMPTY_PATH,
    )?;
    Ok(())
}

fn open_node(parent: BorrowedFd<'_>, name: &std::ffi::OsStr) -> io::Result<OwnedFd> {
    let rules = resolve::BENEATH | resolve::NO_SYMLINKS;
    sys::openat2(parent, Path::new(name), libc::O_PATH | libc::O_NOFOLLOW, 0, rules)
}

/// `fchmodat2(2)` on an `O_PATH` descriptor, or its old stand-in through /proc, which is ours here: the
/// container has no process yet that could have laid something over it.
fn change_mode(node: BorrowedFd<'_>, mode: u32) -> io::Result<()> {
    const SYS_FCHMODAT2: libc::c_long = 452;
    // SAFETY: the path is an empty NUL-terminated string.
    let changed = unsafe { libc::syscall(SYS_FCHMODAT2, node.as_raw_fd(), c"".as_ptr(), mode, libc::AT_EMPTY_PATH) };
    match sys::check(changed) {
        Err(e) if e.raw_os_error() == Some(libc::ENOSYS) => {
            let proc = mount::private_proc()?;
            let path = cstring(format!("self/fd/{}", node.as_raw_fd()))?;
            // SAFETY: the path is NUL-terminated.
            sys::check(unsafe { libc::fchmodat(proc.as_raw_fd(), path.as_ptr(), mode, 0) }.into()).map(drop)
        }
        other => other.map(drop),
    }
}
