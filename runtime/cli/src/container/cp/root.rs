//! The root of a container that files are copied from or to, with the mounts that it has while it runs.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use nix::unistd::{Gid, Uid, setfsgid, setfsuid};
use runx_core::init::make_mount_point;
use runx_core::spec::Spec;
use runx_core::sys::{self, mount, process};

use super::ids::{Ids, Owner};
use super::lookup::Lookup;
use crate::container::options::MountKind;
use crate::container::record::{Containers, Record};
use crate::container::{rootless, spec};

/// A root directory, and what is mounted below it for whoever enters it.
pub(in crate::container) struct Root {
    directory: OwnedFd,
    /// In the order in which they are made.
    mounts: Vec<Mount>,
    /// The ids of its users, where they are others than this machine's.
    ids: Option<Ids>,
    /// Who makes files there, if it is not the one who is here.
    creator: Option<Owner>,
}

/// A detached copy of what is mounted, and where.
struct Mount {
    tree: OwnedFd,
    is_dir: bool,
    target: PathBuf,
    /// Its place is made if it is not there.
    make: bool,
}

impl Root {
    /// A root directory as it is.
    pub(in crate::container) fn plain(directory: OwnedFd) -> Self {
        Self { directory, mounts: Vec::new(), ids: None, creator: None }
    }

    /// Tells the ids of the container's users. Where files are `written`, its root makes them.
    ///
    /// # Errors
    /// When there is no root who could.
    pub(super) fn with_users(mut self, ids: Option<Ids>, written: bool) -> Result<Self> {
        if let Some(ids) = ids.as_ref().filter(|_| written) {
            let root = ids.outside((0, 0));
            self.creator = Some(root.context("what is copied into a container is its root's, and it has none")?);
        }
        self.ids = ids;
        Ok(self)
    }

    /// The root directory of a container that does not run, with its volumes and the paths of the host that are bound into
    /// it. What is not there is left out, with a word in the log. What a start would make is made only on the way to
    /// `written`, the path to be copied to.
    pub(super) fn of(
        containers: &Containers,
        record: &Record,
        directory: OwnedFd,
        written: Option<&Path>,
    ) -> Result<Self> {
        let is_written = |target: &Path| written.is_some_and(|path| meet(path, target));
        let (mut binds, ids) = match record.options.given_configuration {
            true => configured(record)?,
            false => (asked(containers, record, is_written)?, None),
        };
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
                    log::warn!("{} is not there, and left out at {}", source.display(), target.display());
                    continue;
                }
                other => other.with_context(what)?,
            };
            let set = if has("ro") { mount::attr::RDONLY } else { 0 };
            mount::set_attributes(tree.as_fd(), set, 0, libc::MS_PRIVATE, recursive).with_context(what)?;
            let is_dir = sys::is_dir(&sys::fstat(tree.as_fd()).with_context(what)?);
            let make = is_written(&target);
            mounts.push(Mount { tree, is_dir, target, make });
        }
        Self { mounts, ..Self::plain(directory) }.with_users(ids, written.is_some())
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
        let root = Lookup::Inside { root, ids: self.ids.clone() };
        if let Some(owner) = self.creator {
            create_as(owner).context("make files as the container's root")?;
        }
        for mount in &self.mounts {
            mount
                .attach(&root)
                .with_context(|| format!("mount what the container has at {}", mount.target.display()))?;
        }
        Ok(root)
    }
}

impl Mount {
    fn attach(&self, root: &Lookup) -> io::Result<()> {
        let place = match (root.open(&self.target, libc::O_PATH), root) {
            (Err(e), Lookup::Inside { root, .. }) if e.kind() == io::ErrorKind::NotFound => {
                if !self.make {
                    // Nothing leads there.
                    log::debug!("{} is not there, and nothing is mounted on it", self.target.display());
                    return Ok(());
                }
                make_mount_point(root.as_fd(), &self.target, self.is_dir)?
            }
            (place, _) => place?,
        };
        mount::attach(self.tree.as_fd(), place.as_fd())
    }
}

/// Has files that this process makes belong to somebody else from their first moment. It keeps all that it may do.
fn create_as((uid, gid): Owner) -> io::Result<()> {
    // <linux/securebits.h>, SECBIT_NO_SETUID_FIXUP: a change of these ids takes no capabilities away.
    const NO_SETUID_FIXUP: libc::c_ulong = 1 << 2;
    process::prctl(libc::PR_SET_SECUREBITS, NO_SETUID_FIXUP, 0, 0)?;
    let (user, group) = (Uid::from_raw(uid), Gid::from_raw(gid));
    // Both return the id that there was, whether or not they change it.
    setfsgid(group);
    setfsuid(user);
    match (setfsuid(Uid::from_raw(u32::MAX)), setfsgid(Gid::from_raw(u32::MAX))) {
        set if set == (user, group) => Ok(()),
        _ => Err(io::Error::from_raw_os_error(libc::EPERM)),
    }
}

/// Whether one path is below the other one, or the same.
fn meet(one: &Path, other: &Path) -> bool {
    let plain = |path: &Path| {
        let mut plain = PathBuf::new();
        for part in path.components() {
            match part {
                Component::Normal(name) => plain.push(name),
                Component::ParentDir => drop(plain.pop()),
                _ => {}
            }
        }
        plain
    };
    let (one, other) = (plain(one), plain(other));
    one.starts_with(&other) || other.starts_with(&one)
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
fn asked(containers: &Containers, record: &Record, is_written: impl Fn(&Path) -> bool) -> Result<Vec<Bind>> {
    let mut binds = Vec::new();
    for mount in &record.options.mounts {
        let source = match mount.kind {
            // Nothing of it is there while the container does not run.
            MountKind::Tmpfs => continue,
            MountKind::Bind if !mount.make || !is_written(Path::new(&mount.target)) => PathBuf::from(&mount.source),
            _ => match spec::source(containers, mount)? {
                Some(source) => source,
                None => continue,
            },
        };
        binds.push(Bind { source, target: PathBuf::from(&mount.target), options: mount.options.clone() });
    }
    Ok(binds)
}

/// What a bundle's own configuration says: what is bound, and the ids of its users.
///
/// # Errors
/// For a bind whose ids are mapped: without that, owners would be wrong in one direction and rights in the other.
fn configured(record: &Record) -> Result<(Vec<Bind>, Option<Ids>)> {
    let config: Spec = runx_core::bundle::parse_file(&record.bundle.join("config.json"))?;
    let is_mapped = |mappings: &Option<Vec<_>>| mappings.as_ref().is_some_and(|mappings| !mappings.is_empty());
    let mut binds = Vec::new();
    for mount in config.mounts().iter().flatten() {
        let options = mount.options().clone().unwrap_or_default();
        let has = |words: [&str; 2]| options.iter().any(|option| words.contains(&option.as_str()));
        let Some(source) = mount.source().as_ref().filter(|_| has(["bind", "rbind"])) else { continue };
        let target = Path::new("/").join(mount.destination());
        if has(["idmap", "ridmap"]) || is_mapped(mount.uid_mappings()) || is_mapped(mount.gid_mappings()) {
            bail!(
                "container {:?} has an id-mapped mount at {}, which is made only where it runs: start it, and copy then",
                record.id,
                target.display()
            );
        }
        binds.push(Bind { source: record.bundle.join(source), target, options });
    }
    // The user namespace that an ordinary user's command has entered is the container's.
    let ids = if rootless::has_entered() { None } else { Ids::configured(&record.id, &config)? };
    Ok((binds, ids))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_on_the_way_to_a_path_or_below_it_meets_it() {
        let meets = |one: &str, other: &str| meet(Path::new(one), Path::new(other));
        assert!(meets("/data/file", "/data") && meets("/data/", "/data/deep/er") && meets("/", "/x"));
        assert!(meets("/tmp/../data/./file", "/data") && meets("/../data", "/data"));
        assert!(!meets("/database", "/data") && !meets("/data/../tmp", "/data"));
    }
}
