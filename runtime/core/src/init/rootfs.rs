//! Entering the root filesystem, hiding parts of it, and its final state.

use std::collections::HashSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use super::{Fds, paths};
use crate::error::{Context, Error, Result};
use crate::plan::ContainerPlan;
use crate::sys::mount::{self, NewFilesystem, attr};
use crate::sys::{self};

/// Attaches the root filesystem: over `/`, or in a copy of the host's mounts at its own path, where the hooks that
/// run before pivot_root look for it.
pub(super) fn attach(plan: &ContainerPlan, fds: &Fds) -> Result<()> {
    // Before anything is detached: what is shared would be detached on the node too.
    mount::set_propagation_of_all(libc::MS_PRIVATE).context("make all mounts private")?;
    let rootfs = fds.get(plan.rootfs)?;
    let path = plan.hooks.as_ref().and_then(|hooks| hooks.host_rootfs.as_deref()).unwrap_or("/");
    let at = sys::open(path, libc::O_PATH | libc::O_DIRECTORY).on("open", path)?;
    mount::attach(rootfs, at.as_fd()).context("attach the root filesystem")
}

/// Makes the root filesystem this process's root, and the host's mounts disappear.
pub(super) fn enter(plan: &ContainerPlan, fds: &Fds) -> Result<()> {
    let rootfs = fds.get(plan.rootfs)?;
    if plan.no_pivot {
        let elsewhere = plan.hooks.as_ref().and_then(|hooks| hooks.host_rootfs.as_deref());
        uncover_nothing(elsewhere)?;
        mount::move_into(&rootfs, elsewhere.is_some()).context("move the root filesystem over /")
    } else {
        mount::pivot_into(&rootfs).context("pivot into the root filesystem")
    }
}

/// Without pivot_root the host's mounts stay below the container's root. Nobody reaches them, but the kernel lets a
/// user namespace mount a new procfs or sysfs only where it sees one without masks, and would see the host's.
fn uncover_nothing(rootfs: Option<&str>) -> Result<()> {
    let path = "/proc/self/mountinfo";
    let text = std::fs::read_to_string(path).on("read", path)?;
    let mut kernels: Vec<PathBuf> = text.lines().filter_map(kernel_filesystem).collect();
    // What was mounted last is on top.
    kernels.reverse();
    for path in kernels {
        if rootfs.is_some_and(|rootfs| path.starts_with(rootfs)) {
            continue;
        }
        if mount::detach(&path).is_err() {
            // In a user namespace the host's mounts cannot be detached one by one.
            let at = sys::open(&path, libc::O_PATH | libc::O_DIRECTORY).on("open", &path)?;
            let cover = empty_directory().on("make a cover for", &path)?;
            mount::attach(cover.as_fd(), at.as_fd()).on("cover", &path)?;
        }
    }
    Ok(())
}

/// The mount point of a whole procfs or sysfs, from a line of /proc/PID/mountinfo.
fn kernel_filesystem(line: &str) -> Option<PathBuf> {
    let (own, filesystem) = line.split_once(" - ")?;
    let mut fields = own.split(' ').skip(3);
    let (root, path) = (fields.next()?, fields.next()?);
    let whole = root == "/" && matches!(filesystem.split(' ').next()?, "proc" | "sysfs");
    // The four characters that the kernel writes as octal numbers.
    let plain = [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")];
    whole.then(|| plain.iter().fold(path.to_owned(), |path, (code, plain)| path.replace(code, plain)).into())
}

/// Masks paths and makes paths read-only.
pub(super) fn hide(plan: &ContainerPlan, fds: &Fds, root: &OwnedFd) -> Result<()> {
    for path in &plan.readonly_paths {
        let Some(target) = find_if_there(root, path).on("look up read-only path", path)? else { continue };
        let tree = mount::clone_tree(target.as_fd(), "", true).on("clone read-only path", path)?;
        mount::set_attributes(tree.as_fd(), attr::RDONLY, 0, 0, true).on("make read-only", path)?;
        mount::attach(tree.as_fd(), target.as_fd()).on("attach read-only path", path)?;
    }
    // A detached tree of another mount namespace can be attached here and not cloned. So the first mask
    // of each kind is the tree itself, and the others are clones of the then attached one.
    let null = fds.get(plan.null)?;
    let mut null_used = false;
    let mut empty: Option<OwnedFd> = None;
    let mut seen = HashSet::new();
    for path in &plan.masked_paths {
        if !seen.insert(Path::new(path).components().collect::<Vec<_>>()) {
            continue;
        }
        let Some(target) = find_if_there(root, path).on("look up masked path", path)? else { continue };
        let stat = sys::fstat(target.as_fd()).on("look at masked path", path)?;
        if !sys::is_dir(&stat) {
            // The host's own /dev/null, whatever the image or a volume shows under that name
            // (CVE-2025-31133).
            if null_used {
                let mask = mount::clone_tree(null, "", false).on("make a mask for", path)?;
                mount::attach(mask.as_fd(), target.as_fd()).on("mask", path)?;
            } else {
                mount::attach(null, target.as_fd()).on("mask", path)?;
                null_used = true;
            }
            continue;
        }
        let mask = match &empty {
            Some(empty) => mount::clone_tree(empty.as_fd(), "", false),
            None => empty_directory(),
        }
        .on("make a mask for", path)?;
        mount::attach(mask.as_fd(), target.as_fd()).on("mask", path)?;
        empty.get_or_insert(mask);
    }
    Ok(())
}

fn find_if_there(root: &OwnedFd, path: &str) -> io::Result<Option<OwnedFd>> {
    match paths::find(root.as_fd(), path) {
        Ok(fd) => Ok(Some(fd)),
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => Ok(None),
        Err(e) => Err(e),
    }
}

fn empty_directory() -> io::Result<OwnedFd> {
    let tmpfs = NewFilesystem::open("tmpfs")?;
    tmpfs.string("size", "0")?;
    tmpfs.string("nr_inodes", "1")?;
    tmpfs.string("mode", "755")?;
    tmpfs.mount(attr::RDONLY | attr::NOSUID | attr::NODEV | attr::NOEXEC)
}

/// The last attributes of the root and of what is mounted in it, when nothing has to be made there any more.
pub(super) fn finish(plan: &ContainerPlan, root: &OwnedFd, read_only: &[(OwnedFd, String)]) -> Result<()> {
    for (mount, destination) in read_only {
        mount::set_attributes(mount.as_fd(), attr::RDONLY, 0, 0, false).on("make read-only", destination)?;
    }
    if plan.rootfs_readonly {
        mount::set_attributes(root.as_fd(), attr::RDONLY, 0, 0, false).context("make / read-only")?;
    }
    if plan.rootfs_propagation != 0 {
        mount::set_propagation(c"/", plan.rootfs_propagation as libc::c_ulong).context("set the propagation of /")?;
    }
    Ok(())
}

/// Whether a descriptor is the null device, by type and number.
pub(crate) fn is_null(fd: BorrowedFd<'_>) -> io::Result<bool> {
    let stat = sys::fstat(fd)?;
    Ok(stat.st_mode & libc::S_IFMT == libc::S_IFCHR && stat.st_rdev == libc::makedev(1, 3))
}

/// A detached mount of the host's /dev/null alone, for masking.
///
/// # Errors
/// When it is something else.
pub(crate) fn open_null() -> Result<OwnedFd> {
    let path = Path::new("/dev/null");
    let null = sys::open(path, libc::O_PATH | libc::O_NOFOLLOW).on("open", path)?;
    if !is_null(null.as_fd()).on("look at", path)? {
        return Err(Error::unsupported("this machine's /dev/null", "it is not the null device"));
    }
    let tree = mount::clone_tree(null.as_fd(), "", false).on("clone the mount of", path)?;
    // The node's /dev may be shared with all the world; a mask is nobody's peer.
    mount::set_attributes(tree.as_fd(), 0, 0, libc::MS_PRIVATE, false).on("make private", path)?;
    Ok(tree)
}
