//! The mounts that a sandbox has for itself.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use runx_core::Result;
use runx_core::error::Context;
use runx_core::sys::mount::{self, NewFilesystem, attr};

use crate::spawner::{attach, mask, new_proc};
use crate::sys as own;
use crate::wire::setup::{Setup, TmpfsPlan};

/// Mounts a procfs over the one that came with the clone, which the kernel wants to see before it gives another one.
/// Returns it: paths to it can be covered, the descriptor cannot. Where programs are to see none, /proc is empty, and the
/// init has one only if it can.
pub(super) fn proc(setup: &Setup, root: BorrowedFd<'_>) -> Result<Option<OwnedFd>> {
    if !setup.proc {
        let proc = new_proc().ok();
        mask(root, Path::new("/proc"))?;
        return Ok(proc);
    }
    let proc = new_proc()?;
    attach(root, Path::new("/proc"), proc.as_fd())?;
    for path in setup.masked.iter().map(|path| own::path(path)).filter(|path| path.starts_with("/proc")) {
        mask(root, path)?;
    }
    // Nothing in there is a program's to change.
    mount::set_attributes(proc.as_fd(), attr::RDONLY, 0, 0, false).context("make /proc read-only")?;
    Ok(Some(proc))
}

/// Mounts every tmpfs, empty.
pub(super) fn mount_all(setup: &Setup, root: BorrowedFd<'_>, uid: u32) -> Result<()> {
    for tmpfs in &setup.tmpfs {
        let target = own::path(&tmpfs.target);
        // One may be inside of another.
        own::make_directories(root, target, None).on("make", target)?;
        attach(root, target, new_tmpfs(tmpfs, uid).on("mount a tmpfs for", target)?.as_fd())?;
    }
    Ok(())
}

fn new_tmpfs(plan: &TmpfsPlan, uid: u32) -> std::io::Result<OwnedFd> {
    let tmpfs = NewFilesystem::open("tmpfs")?;
    tmpfs.string("size", &plan.size.to_string())?;
    tmpfs.string("nr_inodes", &plan.inodes.to_string())?;
    tmpfs.string("mode", &format!("{:o}", plan.mode))?;
    tmpfs.string("uid", &uid.to_string())?;
    tmpfs.string("gid", &uid.to_string())?;
    tmpfs.mount(attr::NOSUID | attr::NODEV)
}

/// Takes every tmpfs away with all that is in it.
pub(super) fn unmount_all(setup: &Setup) -> Result<()> {
    for tmpfs in setup.tmpfs.iter().rev() {
        let target = own::path(&tmpfs.target);
        mount::detach(target).on("detach the tmpfs at", target)?;
    }
    Ok(())
}
