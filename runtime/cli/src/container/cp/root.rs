//! The root of a container that files are copied from or to, with the mounts that it has while it runs.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use runx_core::init::make_mount_point;
use runx_core::spec::Spec;
use runx_core::sys::{self, mount, process};

use super::lookup::Lookup;
use crate::container::options::MountKind;
use crate::container::record::{Containers, Record};
use crate::container::spec;

/// A root directory, and what is mounted below it for whoever enters it.
pub(in crate::container) struct Root {
    directory: OwnedFd,
    /// In the order in which they are made.
    mounts: Vec<Mount>,
}

/// A detached copy of what is mounted, and where.
struct Mount {
    tree: OwnedFd,
    is_dir: bool,
    target: PathBuf,
}

impl Root {
    /// A root directory as it is.
    pub(in crate::container) fn plain(directory: OwnedFd) -> Self {
        Self { directory, mounts: Vec::new() }
    }

    /// The root directory of a container that does not run, with its volumes and the paths of the host that are bound into
    /// it. What is not there any more is left out, with a word in the log.
    pub(super) fn of(containers: &Containers, record: &Record, directory: OwnedFd) -> Result<Self> {
        let mut binds =
            if record.options.given_configuration { configured(record)? } else { asked(containers, record)? };
        // What is above comes first, or it would hide what is below.
        binds.sort_by_key(|bind| bind.target.components().count());
        let mut mounts = Vec::new();
        for Bind { source, target, options } in binds {
            let has = |word: &str| options.iter().any(|option| option == word);
            let recursive = has("rbind");
            // SAFETY: AT_FDCWD names the working directory, and is no descriptor that could be closed.
            let here = unsafe { BorrowedFd::borrow_raw(libc::AT_FDCWD) };
            let what = || format!("bind {} to {}", source.display(), target.display());
            let tree = match mount::clone_tree(here, &source, recursive) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => {
                    log::warn!("{} is not there any more, and left out at {}", source.display(), target.display());
                    continue;
                }
                other => other.with_context(what)?,
            };
            let set = if has("ro") { mount::attr::RDONLY } else { 0 };
            mount::set_attributes(tree.as_fd(), set, 0, libc::MS_PRIVATE, recursive).with_context(what)?;
            let is_dir = sys::is_dir(&sys::fstat(tree.as_fd()).with_context(what)?);
            mounts.push(Mount { tree, is_dir, target });
        }
        Ok(Self { directory, mounts })
    }

    /// Makes it this process's root, and tells how paths are looked up there. The mounts are seen by this process only, and go
    /// with it: for one that was made for this.
    pub(super) fn enter(&self) -> Result<Lookup> {
        // SAFETY: the descriptor is open.
        check(unsafe { libc::fchdir(self.directory.as_raw_fd()) }).context("enter the container's root")?;
        if !self.mounts.is_empty() {
            // The working directory becomes the same one of the new namespace; the descriptor stays in the old one.
            process::unshare(libc::CLONE_NEWNS).context("make a mount namespace for the container's volumes")?;
            mount::set_propagation_of_all(libc::MS_PRIVATE).context("keep mounts from the host")?;
        }
        // SAFETY: the path is NUL-terminated.
        check(unsafe { libc::chroot(c".".as_ptr()) }).context("enter the container's root")?;
        // The descriptor that there was may be of the other namespace.
        let root = sys::open("/", libc::O_PATH | libc::O_DIRECTORY).context("open the container's root")?;
        for Mount { tree, is_dir, target } in &self.mounts {
            let what = || format!("mount what the container has at {}", target.display());
            // Made if it is not there, as by a start.
            let place = make_mount_point(root.as_fd(), target, *is_dir).with_context(what)?;
            mount::attach(tree.as_fd(), place.as_fd()).with_context(what)?;
        }
        Ok(Lookup::Inside(root))
    }
}

fn check(value: i32) -> io::Result<()> {
    if value == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// What is bound, and how.
struct Bind {
    source: PathBuf,
    target: PathBuf,
    options: Vec<String>,
}

/// What the user asked for.
fn asked(containers: &Containers, record: &Record) -> Result<Vec<Bind>> {
    let mut binds = Vec::new();
    for mount in &record.options.mounts {
        let source = match mount.kind {
            // Nothing of it is there while the container does not run.
            MountKind::Tmpfs => continue,
            MountKind::Bind if !mount.make => PathBuf::from(&mount.source),
            _ => match spec::source(containers, mount)? {
                Some(source) => source,
                None => continue,
            },
        };
        binds.push(Bind { source, target: PathBuf::from(&mount.target), options: mount.options.clone() });
    }
    Ok(binds)
}

/// What a bundle's own configuration says.
fn configured(record: &Record) -> Result<Vec<Bind>> {
    let config: Spec = runx_core::bundle::parse_file(&record.bundle.join("config.json"))?;
    let mounts = config.mounts().iter().flatten();
    let binds = mounts.filter_map(|mount| {
        let options = mount.options().clone().unwrap_or_default();
        let is_bind = options.iter().any(|option| option == "bind" || option == "rbind");
        let source = record.bundle.join(mount.source().as_ref()?);
        let target = Path::new("/").join(mount.destination());
        is_bind.then_some(Bind { source, target, options })
    });
    Ok(binds.collect())
}
