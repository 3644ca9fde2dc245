//! The mounts that all sandboxes of a pool share: the spawner's own root directory.
//!
//! Everything in it is read-only. A clone of the spawner begins with a copy of this table, and adds what is its own.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use runx_core::error::Context;
use runx_core::sys::mount::{self, NewFilesystem, attr};
use runx_core::sys::{self, resolve};
use runx_core::{Error, Result};

use crate::sys as own;
use crate::wire::setup::{BindPlan, Setup};

/// Leaves the host's mounts for the template's. `trees` are the binds that come as detached mounts, in their order.
pub(super) fn enter(setup: &Setup, trees: Vec<OwnedFd>) -> Result<()> {
    // Before anything is detached: what is shared would be detached on the host too.
    mount::set_propagation_of_all(libc::MS_PRIVATE).context("make all mounts private")?;
    // While the host's proc is in the table: in a user namespace the kernel mounts one only for who can see one whole,
    // and this is the one that later lets each init have its own. Where programs see none it is had if it can be.
    let proc = if setup.proc { Some(new_proc()?) } else { new_proc().ok() };
    let mut trees = trees.into_iter();
    let mut binds = setup
        .binds
        .iter()
        .map(|bind| match bind.source.is_empty() {
            true => trees.next().ok_or_else(|| Error::spec("a mount of the template did not arrive")),
            false => clone_bind(bind),
        })
        .collect::<Result<Vec<_>>>()?
        .into_iter()
        .zip(&setup.binds);
    let root = match setup.rootfs {
        true => binds.next().ok_or_else(|| Error::spec("the template has no root"))?.0,
        false => small_tmpfs("the root")?,
    };
    let slash = sys::open("/", libc::O_PATH | libc::O_DIRECTORY).context("open /")?;
    mount::attach(root.as_fd(), slash.as_fd()).context("attach the template's root")?;
    let root_fd = root.as_fd();
    let mut dev = None;
    if setup.devices {
        place(setup, root_fd, Path::new("/dev"), true)?;
        let made = small_tmpfs("/dev")?;
        attach(root_fd, Path::new("/dev"), made.as_fd())?;
        for (name, target) in [
            ("fd", "/proc/self/fd"),
            ("stdin", "/proc/self/fd/0"),
            ("stdout", "/proc/self/fd/1"),
            ("stderr", "/proc/self/fd/2"),
        ] {
            own::symlink_at(target, made.as_fd(), name).with_context(|| format!("make the link /dev/{name}"))?;
        }
        dev = Some(made);
    }
    for (tree, bind) in binds {
        let target = own::path(&bind.target);
        place(setup, root_fd, target, bind.directory)?;
        attach(root_fd, target, tree.as_fd())?;
    }
    for tmpfs in &setup.tmpfs {
        place(setup, root_fd, own::path(&tmpfs.target), true)?;
    }
    for (path, target) in &setup.links {
        let (parent, name) = own::parent_of(root_fd, own::path(path), true).on("find", own::path(path))?;
        own::symlink_at(own::path(target), parent.as_fd(), name).on("make the link", own::path(path))?;
    }
    match (&proc, place(setup, root_fd, Path::new("/proc"), true)) {
        (Some(proc), Ok(())) => attach(root_fd, Path::new("/proc"), proc.as_fd())?,
        (_, Err(e)) if setup.proc => return Err(e),
        _ => {}
    }
    for path in setup.masked.iter().map(|path| own::path(path)).filter(|path| !path.starts_with("/proc")) {
        mask(root_fd, path)?;
    }
    for (fd, what) in dev.iter().map(|dev| (dev, "/dev")).chain([(&root, "the root")]) {
        let set = mount::set_attributes(fd.as_fd(), attr::RDONLY, 0, 0, false);
        set.with_context(|| format!("make {what} of the template read-only"))?;
    }
    match mount::pivot_into(&root) {
        // An initramfs cannot be pivoted away from.
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
            mount::move_into(&root, false).context("enter the template's root")
        }
        other => other.context("pivot into the template's root"),
    }
}

/// A procfs of this PID namespace, in which others' processes do not show.
pub(crate) fn new_proc() -> Result<OwnedFd> {
    let make = || {
        let proc = NewFilesystem::open("proc")?;
        proc.string("hidepid", "invisible")?;
        proc.mount(attr::NOSUID | attr::NODEV | attr::NOEXEC)
    };
    make().context("mount a procfs (in a user namespace the kernel wants one whole and visible outside)")
}

/// A mount of a host path, by its name. Only for who cannot have it cloned by the pool's process.
fn clone_bind(bind: &BindPlan) -> Result<OwnedFd> {
    let source = own::path(&bind.source);
    let at = sys::open(source, libc::O_PATH).on("open", source)?;
    let tree = mount::clone_tree(at.as_fd(), "", true).on("clone the mount of", source)?;
    restrict(tree.as_fd(), bind).on("restrict the mount of", source)?;
    Ok(tree)
}

/// What a bind is not to be used for.
pub(crate) fn restrict(tree: BorrowedFd<'_>, bind: &BindPlan) -> std::io::Result<()> {
    let mut attributes = attr::NOSUID;
    if !bind.writable {
        attributes |= attr::RDONLY;
    }
    if !bind.device {
        attributes |= attr::NODEV;
    }
    mount::set_attributes(tree, attributes, 0, libc::MS_PRIVATE, true)
}

/// A tmpfs for directories and links, which becomes read-only.
fn small_tmpfs(what: &str) -> Result<OwnedFd> {
    let make = || {
        let tmpfs = NewFilesystem::open("tmpfs")?;
        tmpfs.string("size", "256k")?;
        tmpfs.string("mode", "755")?;
        tmpfs.mount(attr::NOSUID | attr::NODEV)
    };
    make().with_context(|| format!("mount a tmpfs for {what} of the template"))
}

/// Makes the place of a mount where the root is ours. In a root of the host it has to be there.
fn place(setup: &Setup, root: BorrowedFd<'_>, path: &Path, directory: bool) -> Result<()> {
    match sys::openat2(root, path, libc::O_PATH, 0, resolve::IN_ROOT | resolve::NO_MAGICLINKS) {
        Ok(_) => return Ok(()),
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => {}
        Err(e) => return Err(e).on("look for", path),
    }
    let inside_dev = setup.devices && path.starts_with("/dev") && path != Path::new("/dev");
    if setup.rootfs && !inside_dev {
        return Err(Error::spec(format!("the template's root directory has no {}", path.display())));
    }
    let (parent, name) = own::parent_of(root, path, true).on("make the directories above", path)?;
    let made = match directory {
        true => sys::mkdirat(parent.as_fd(), name, 0o755),
        false => own::make_file(parent.as_fd(), name),
    };
    match made {
        // Inside of a tmpfs that each sandbox mounts afresh, it makes this place itself.
        Err(e) if e.raw_os_error() == Some(libc::EROFS) => {
            Err(e).with_context(|| format!("make the place of a mount, {}, inside of a bind", path.display()))
        }
        other => other.on("make", path),
    }
}

/// Attaches a mount at a path below the root.
pub(crate) fn attach(root: BorrowedFd<'_>, path: &Path, tree: BorrowedFd<'_>) -> Result<()> {
    let target = sys::openat2(root, path, libc::O_PATH, 0, resolve::IN_ROOT | resolve::NO_MAGICLINKS);
    mount::attach(tree, target.on("open", path)?.as_fd()).on("attach a mount at", path)
}

/// Makes a path look empty. One that is not there needs nothing.
pub(crate) fn mask(root: BorrowedFd<'_>, path: &Path) -> Result<()> {
    let target = match sys::openat2(root, path, libc::O_PATH, 0, resolve::IN_ROOT | resolve::NO_MAGICLINKS) {
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => return Ok(()),
        other => other.on("open", path)?,
    };
    let empty = if sys::is_dir(&sys::fstat(target.as_fd()).on("look at", path)?) {
        let tmpfs = NewFilesystem::open("tmpfs").and_then(|tmpfs| {
            tmpfs.string("size", "4k")?;
            tmpfs.string("mode", "555")?;
            tmpfs.mount(attr::RDONLY | attr::NOSUID | attr::NODEV | attr::NOEXEC)
        });
        tmpfs.context("mount an empty tmpfs")?
    } else {
        mount::clone_tree(root, "dev/null", false).context("clone the mount of /dev/null")?
    };
    mount::attach(empty.as_fd(), target.as_fd()).on("mask", path)
}
