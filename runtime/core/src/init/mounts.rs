//! The mounts of config.json: made as detached trees first, then attached in order.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use super::{Fds, Parent, copy_up, paths};
use crate::error::{Context, Error, Result};
use crate::mount_options::BindAttributes;
use crate::plan::{CgroupView, ContainerPlan, MountPlan, MountSource};
use crate::sys::mount::{self, NewFilesystem, attr};
use crate::sys::{self, resolve};

/// Whether a filesystem shows the cgroups of whoever mounts it, so that it must wait for the move.
fn is_cgroup(kind: &str) -> bool {
    matches!(kind, "cgroup" | "cgroup2")
}

/// Makes the filesystems that belong to the new namespaces, detached, in the order of the plan. `None`
/// stands for what is not made here or not yet.
pub(super) fn make(plans: &[MountPlan]) -> Result<Vec<Option<OwnedFd>>> {
    plans
        .iter()
        .map(|plan| match &plan.source {
            MountSource::New { kind, attributes, data, .. } if !is_cgroup(kind) => {
                make_one(plan, kind, *attributes, data).map(Some)
            }
            _ => Ok(None),
        })
        .collect()
}

fn make_one(plan: &MountPlan, kind: &str, attributes: u64, data: &[(String, Option<String>)]) -> Result<OwnedFd> {
    // A tmpfs is made read-only when everything is there: devices, and the mount points of what is mounted below.
    let attributes = if kind == "tmpfs" { attributes & !attr::RDONLY } else { attributes };
    filesystem(kind, attributes, data).with_context(|| format!("mount {kind} for {}", plan.destination))
}

/// Makes one filesystem.
pub(crate) fn filesystem(kind: &str, attributes: u64, data: &[(String, Option<String>)]) -> io::Result<OwnedFd> {
    let filesystem = NewFilesystem::open(kind)?;
    for (key, value) in data {
        let set = match value {
            Some(value) => filesystem.string(key, value),
            None => filesystem.flag(key),
        };
        set.map_err(|e| io::Error::new(e.kind(), format!("option {key:?}: {e}")))?;
    }
    filesystem.mount(attributes)
}

/// Attaches everything below the root, in the order of the plan. Returns what is to be made read-only once nothing
/// has to be made in it any more, and where it is.
pub(super) fn attach_all(
    plan: &ContainerPlan,
    filesystems: Vec<Option<OwnedFd>>,
    fds: &Fds,
    root: &OwnedFd,
    parent: &mut Parent,
) -> Result<Vec<(OwnedFd, String)>> {
    let mut read_only = Vec::new();
    for (mount, made) in plan.mounts.iter().zip(filesystems) {
        let what = || format!("mount {}", mount.destination);
        match (&mount.source, made) {
            (MountSource::Tree { tree, directory }, _) => {
                let target = paths::make_target(root.as_fd(), Path::new(&mount.destination), *directory)
                    .with_context(|| format!("find or make the mount point {}", mount.destination))?;
                attach(fds.get(*tree)?, target.as_fd(), mount).with_context(what)?;
            }
            (MountSource::Inside { path, recursive, attributes, below, id_map }, _) => {
                let (tree, directory) =
                    clone_inside(root, path, *recursive, attributes, *below).with_context(|| {
                        format!("clone the mounts of {path}, the source of mount {}", mount.destination)
                    })?;
                if let Some((users, recursive)) = id_map {
                    mount::set_id_map(tree.as_fd(), fds.get(*users)?, *recursive)
                        .with_context(|| format!("map the ids of {path}, the source of mount {}", mount.destination))?;
                }
                let target = paths::make_target(root.as_fd(), Path::new(&mount.destination), directory)
                    .with_context(|| format!("find or make the mount point {}", mount.destination))?;
                attach(tree.as_fd(), target.as_fd(), mount).with_context(what)?;
            }
            (MountSource::New { kind, attributes, data, copy_up }, made) => {
                let made = match made {
                    Some(made) => made,
                    None => {
                        parent.enter_cgroup_namespace(plan)?;
                        make_one(mount, kind, *attributes, data)?
                    }
                };
                let target = prepare_new(mount, kind, data, *copy_up, &made, root)?;
                attach(made.as_fd(), target.as_fd(), mount)
                    .with_context(|| format!("mount {kind} on {}", mount.destination))?;
                if kind == "tmpfs" && attributes & attr::RDONLY != 0 {
                    read_only.push((made, mount.destination.clone()));
                }
            }
            (MountSource::CgroupV1 { attributes, hierarchies, links }, _) => {
                parent.enter_cgroup_namespace(plan)?;
                attach_cgroup_v1(mount, *attributes, hierarchies, links, parent, root)?;
            }
        }
    }
    Ok(read_only)
}

fn attach(tree: BorrowedFd<'_>, target: BorrowedFd<'_>, plan: &MountPlan) -> io::Result<()> {
    // Those that may be there are known by their names, which a link would get around (CVE-2019-16884).
    if !Path::new(&plan.destination).starts_with("/proc") && is_procfs(target)? {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "a link leads inside /proc"));
    }
    mount::attach(tree, target)?;
    for flags in &plan.propagation {
        mount::set_attributes(tree, 0, 0, flags & !libc::MS_REC, flags & libc::MS_REC != 0)?;
    }
    Ok(())
}

fn is_procfs(fd: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(nix::sys::statfs::fstatfs(fd)?.filesystem_type() == nix::sys::statfs::PROC_SUPER_MAGIC)
}

/// A detached tree of what is at `path` in the container by now, and whether it is a directory.
fn clone_inside(
    root: &OwnedFd,
    path: &str,
    recursive: bool,
    attributes: &BindAttributes,
    (set, clear): (u64, u64),
) -> io::Result<(OwnedFd, bool)> {
    let source = paths::find(root.as_fd(), path)?;
    let directory = sys::is_dir(&sys::fstat(source.as_fd())?);
    let tree = mount::clone_tree(source.as_fd(), "", recursive)?;
    attributes.apply(tree.as_fd(), source.as_fd(), false)?;
    if set | clear != 0 {
        mount::set_attributes(tree.as_fd(), set, clear, 0, true)?;
    }
    Ok((tree, directory))
}

/// Finds the place for a new filesystem, and finishes the filesystem after what is there.
fn prepare_new(
    plan: &MountPlan,
    kind: &str,
    data: &[(String, Option<String>)],
    copy_up: bool,
    made: &OwnedFd,
    root: &OwnedFd,
) -> Result<OwnedFd> {
    let there = kind != "tmpfs" || paths::find(root.as_fd(), &plan.destination).is_ok();
    let target = if matches!(kind, "proc" | "sysfs") {
        ordinary_directory(root.as_fd(), &plan.destination, kind)?
    } else {
        paths::make_directory(root.as_fd(), &plan.destination)
            .with_context(|| format!("find or make the mount point {}", plan.destination))?
    };
    if kind == "tmpfs" && there && !data.iter().any(|(key, _)| key == "mode") {
        // As runc does it, a tmpfs without a mode of its own has that of the directory below, and the kernel's
        // where there was none.
        let mode = sys::fstat(target.as_fd()).on("look at", &plan.destination)?.st_mode & 0o7777;
        set_mode(made.as_fd(), mode).on("set the mode of", &plan.destination)?;
    }
    if copy_up {
        copy_up::copy(target.as_fd(), made.as_fd()).on("copy to the tmpfs what is in", &plan.destination)?;
    }
    Ok(target)
}

/// `fchmod` for the root of a detached mount, whose descriptor is `O_PATH`.
fn set_mode(mount: BorrowedFd<'_>, mode: u32) -> io::Result<()> {
    let directory = sys::openat2(mount, ".", libc::O_RDONLY | libc::O_DIRECTORY, 0, resolve::BENEATH)?;
    // SAFETY: only a borrowed descriptor and a mode are passed.
    sys::check(unsafe { libc::fchmod(std::os::fd::AsRawFd::as_raw_fd(&directory), mode) }.into()).map(drop)
}

/// The place for procfs or sysfs: if an image could redirect it by a link, label and sysctl writes
/// would land elsewhere (CVE-2019-19921, CVE-2025-54867).
fn ordinary_directory(root: BorrowedFd<'_>, destination: &str, kind: &str) -> Result<OwnedFd> {
    let path = Path::new(destination);
    let relative = path.strip_prefix("/").unwrap_or(path);
    let open = || {
        let rules = resolve::BENEATH | resolve::NO_SYMLINKS;
        sys::openat2(root, relative, libc::O_PATH | libc::O_DIRECTORY, 0, rules)
    };
    match open() {
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => {
            paths::make_directory(root, path).on("make the mount point", path)?;
            open().on("find the mount point", path)
        }
        Err(e) if matches!(e.raw_os_error(), Some(libc::ELOOP | libc::ENOTDIR)) => Err(Error::Init {
            message: format!("mount {kind}: {destination} must be mounted on ordinary directory"),
            errno: libc::ENOTDIR,
        }),
        other => other.on("find the mount point", path),
    }
}

fn attach_cgroup_v1(
    plan: &MountPlan,
    attributes: u64,
    hierarchies: &[(String, CgroupView)],
    links: &[(String, String)],
    parent: &mut Parent,
    root: &OwnedFd,
) -> Result<()> {
    let destination = PathBuf::from(&plan.destination);
    let mode = [("mode".to_owned(), Some("755".to_owned()))];
    let tmpfs = make_one(plan, "tmpfs", attributes & !attr::RDONLY, &mode)?;
    let target = paths::make_directory(root.as_fd(), &destination).on("find or make the mount point", &destination)?;
    attach(tmpfs.as_fd(), target.as_fd(), plan).on("mount tmpfs on", &destination)?;
    for (name, view) in hierarchies {
        let what = || format!("mount cgroup hierarchy {name} below {}", plan.destination);
        sys::mkdirat(tmpfs.as_fd(), name, 0o755).with_context(what)?;
        let target = sys::openat2(tmpfs.as_fd(), name, libc::O_PATH | libc::O_DIRECTORY, 0, resolve::BENEATH)
            .with_context(what)?;
        match view {
            CgroupView::Mounted(data) => {
                let made = filesystem("cgroup", attributes, data).with_context(what)?;
                mount::attach(made.as_fd(), target.as_fd()).with_context(what)?;
            }
            CgroupView::Bound => {
                let tree = parent.cgroup_views.pop_front();
                let tree = tree.ok_or_else(|| Error::Died(format!("the view of cgroup {name} is missing")))?;
                mount::attach(tree.as_fd(), target.as_fd()).with_context(what)?;
            }
        }
    }
    for (name, target) in links {
        nix::unistd::symlinkat(target.as_str(), tmpfs.as_fd(), name.as_str())
            .with_context(|| format!("link {name} below {}", plan.destination))?;
    }
    if attributes & attr::RDONLY != 0 {
        mount::set_attributes(tmpfs.as_fd(), attr::RDONLY, 0, 0, false).on("make read-only", &destination)?;
    }
    Ok(())
}

/// Takes /proc, /sys and /dev away from this process and what comes of it, in a mount namespace of its own. Of what the plan
/// mounts there, directories and files of the host stay, in an empty tmpfs: /dev/termination-log, for example.
pub(super) fn detach_kernel_filesystems(plan: Option<&ContainerPlan>) -> Result<()> {
    crate::init::capabilities::raise_all();
    sys::process::unshare(libc::CLONE_NEWNS).context("unshare the mount namespace for a module")?;
    mount::set_propagation_of_all(libc::MS_SLAVE).context("keep a module's mounts apart")?;
    for path in ["/proc", "/sys", "/dev"] {
        let kept = clone_binds_below(path, plan.map_or(&[][..], |plan| &plan.mounts))?;
        let mut detached = false;
        loop {
            match mount::detach(path) {
                Ok(()) => detached = true,
                // Not a mount point, or not there at all.
                Err(e) if matches!(e.raw_os_error(), Some(libc::EINVAL | libc::ENOENT)) => break,
                Err(e) => return Err(e).on("take away from the module:", path),
            }
        }
        if detached && !kept.is_empty() {
            attach_again(path, &kept).with_context(|| format!("mount again what is below {path}"))?;
        }
    }
    Ok(())
}

/// A bind mount that outlives what it was attached to.
struct Kept<'a> {
    destination: &'a str,
    tree: OwnedFd,
    directory: bool,
}

/// What the plan binds below a directory, with all that is mounted below that in turn.
fn clone_binds_below<'a>(directory: &str, plans: &'a [MountPlan]) -> Result<Vec<Kept<'a>>> {
    let mut kept: Vec<Kept<'a>> = Vec::new();
    for plan in plans.iter().filter(|plan| matches!(plan.source, MountSource::Tree { .. } | MountSource::Inside { .. }))
    {
        let destination = Path::new(&plan.destination);
        let below = |other: &str| destination != Path::new(other) && destination.starts_with(other);
        if !below(directory) || kept.iter().any(|other| destination.starts_with(other.destination)) {
            continue;
        }
        let clone = || -> io::Result<Kept<'a>> {
            let tree = mount::clone_tree(nix::fcntl::AT_FDCWD, destination, true)?;
            let directory = sys::is_dir(&sys::fstat(tree.as_fd())?);
            Ok(Kept { destination: &plan.destination, tree, directory })
        };
        kept.push(clone().with_context(|| format!("clone mount {}", plan.destination))?);
    }
    Ok(kept)
}

fn attach_again(path: &str, kept: &[Kept<'_>]) -> io::Result<()> {
    let root = std::fs::File::open("/")?;
    let options = [("mode".to_owned(), Some("755".to_owned())), ("size".to_owned(), Some("64k".to_owned()))];
    let tmpfs = filesystem("tmpfs", attr::NOSUID | attr::NODEV | attr::NOEXEC, &options)?;
    mount::attach(tmpfs.as_fd(), paths::find(root.as_fd(), path)?.as_fd())?;
    for Kept { destination, tree, directory } in kept {
        let target = paths::make_target(root.as_fd(), Path::new(destination), *directory)?;
        mount::attach(tree.as_fd(), target.as_fd())?;
    }
    mount::set_attributes(tmpfs.as_fd(), attr::RDONLY, 0, 0, false)
}
