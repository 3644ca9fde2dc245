//! From config.json to a plan and its descriptors: all that can be decided and opened before the clone.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use oci_spec::runtime::LinuxNamespaceType;

use super::devices;
use super::mounts::Mounts;
use crate::bundle::{Bundle, empty_path};
use crate::cgroup::{Cgroup, Layout};
use crate::error::{Context, Error, Result};
use crate::hooks::{HookState, Hooks};
use crate::mount_options;
use crate::plan::{ContainerPlan, Fd, HooksPlan, NetDevice, UserNamespace};
use crate::rootless;
use crate::spawn::Spawner;
use crate::sys::mount;
use crate::sys::process::CLONE_NEWTIME;
use crate::sys::{self};

/// The descriptors that a plan will speak of.
#[derive(Debug, Default)]
pub(super) struct Table(Vec<OwnedFd>);

impl Table {
    pub(super) fn add(&mut self, fd: impl Into<OwnedFd>) -> Fd {
        self.0.push(fd.into());
        Fd(self.0.len() as u32 - 1)
    }

    pub(super) fn into_fds(self) -> Vec<OwnedFd> {
        self.0
    }
}

/// Descriptors of namespaces.
#[derive(Debug, Default)]
pub(super) struct Namespaces {
    /// To be made by the clone.
    pub(super) new: u64,
    /// To be joined by the child.
    pub(super) join: Vec<(Fd, i32)>,
    /// To be joined before the clone.
    pub(super) pid: Option<OwnedFd>,
    /// To be joined by a process of their own that then clones: with a user namespace among those to be joined,
    /// the new namespaces must belong to it; with a new one, whoever is in it may not join others any more.
    pub(super) first: Vec<(OwnedFd, i32)>,
    /// The user namespace, unless it is the caller's.
    pub(super) user: Option<UserNamespace>,
    /// Whether the user namespace is this process's.
    pub(super) entered_user: bool,
    /// A cgroup namespace is made by the child, once it is in its cgroups.
    pub(super) new_cgroup: bool,
    /// A time namespace is made by the child, which sets its clocks before it enters.
    pub(super) new_time: bool,
}

impl Namespaces {
    /// `CLONE_NEW*` flags of all namespaces that are not the host's.
    pub(super) fn all(&self) -> i32 {
        let joined = self.join.iter().map(|(_, flag)| *flag).chain(self.first.iter().map(|(_, flag)| *flag));
        let own = [
            (self.entered_user, libc::CLONE_NEWUSER),
            (self.new_cgroup, libc::CLONE_NEWCGROUP),
            (self.new_time, CLONE_NEWTIME),
        ];
        let own = own.into_iter().filter_map(|(new, flag)| new.then_some(flag));
        joined.chain(own).fold(self.new as i32, |all, flag| all | flag)
    }
}

fn clone_flag(kind: LinuxNamespaceType) -> i32 {
    match kind {
        LinuxNamespaceType::Mount => libc::CLONE_NEWNS,
        LinuxNamespaceType::Cgroup => libc::CLONE_NEWCGROUP,
        LinuxNamespaceType::Uts => libc::CLONE_NEWUTS,
        LinuxNamespaceType::Ipc => libc::CLONE_NEWIPC,
        LinuxNamespaceType::User => libc::CLONE_NEWUSER,
        LinuxNamespaceType::Pid => libc::CLONE_NEWPID,
        LinuxNamespaceType::Network => libc::CLONE_NEWNET,
        LinuxNamespaceType::Time => CLONE_NEWTIME,
    }
}

/// Opens the namespaces to be joined and adds up those to be made. The user namespace is neither where this process has
/// `entered` it.
pub(super) fn namespaces(bundle: &Bundle, entered: bool, table: &mut Table) -> Result<Namespaces> {
    let mut out = Namespaces::default();
    let mut joined = Vec::new();
    for namespace in bundle.linux()?.namespaces().iter().flatten() {
        let kind = namespace.typ();
        let flag = clone_flag(kind);
        let path = namespace.path().as_deref();
        if entered && kind == LinuxNamespaceType::User {
            out.entered_user = true;
            out.user = Some(UserNamespace::Joined);
            continue;
        }
        if empty_path(path) {
            match kind {
                LinuxNamespaceType::Cgroup => out.new_cgroup = true,
                LinuxNamespaceType::Time => out.new_time = true,
                _ => out.new |= flag as u64,
            }
            if kind == LinuxNamespaceType::User {
                out.user = Some(UserNamespace::New);
            }
            continue;
        }
        let path = path.unwrap_or(Path::new(""));
        let fd = sys::open(path, libc::O_RDONLY)
            .with_context(|| format!("open the {kind} namespace {} to join", path.display()))?;
        let is = namespace_kind(fd.as_fd());
        if is != Some(flag) {
            return Err(Error::spec(format!("linux.namespaces: {} is not a {kind} namespace", path.display())));
        }
        if kind == LinuxNamespaceType::Pid {
            out.pid = Some(fd);
        } else {
            if kind == LinuxNamespaceType::User {
                out.user = Some(UserNamespace::Joined);
            }
            joined.push((fd, flag));
        }
    }
    if out.user.is_some() && !entered {
        // The user namespace last: once in it, the host's others are out of reach.
        joined.sort_by_key(|(_, flag)| *flag == libc::CLONE_NEWUSER);
        out.first = joined;
    } else {
        out.join = joined.into_iter().map(|(fd, flag)| (table.add(fd), flag)).collect();
    }
    Ok(out)
}

/// The `CLONE_NEW*` flag of a namespace file, ioctl_ns(2).
fn namespace_kind(fd: BorrowedFd<'_>) -> Option<i32> {
    const NS_GET_NSTYPE: libc::c_ulong = 0xb703;
    // A driver might understand the number as something else.
    let is_namespace = |found: nix::sys::statfs::Statfs| found.filesystem_type() == nix::sys::statfs::NSFS_MAGIC;
    if !nix::sys::statfs::fstatfs(fd).is_ok_and(is_namespace) {
        return None;
    }
    // SAFETY: NS_GET_NSTYPE takes no argument, and the file is of a namespace.
    let kind = unsafe { libc::ioctl(std::os::fd::AsRawFd::as_raw_fd(&fd), NS_GET_NSTYPE as _, 0 as libc::c_ulong) };
    (kind > 0).then_some(kind)
}

/// What the plan of a container depends on besides its bundle.
pub(super) struct Surroundings<'a> {
    pub(super) namespaces: &'a Namespaces,
    pub(super) layout: &'a Layout,
    pub(super) cgroup: &'a Cgroup,
    pub(super) spawner: &'a Spawner,
    pub(super) hooks: &'a Hooks,
    pub(super) hook_state: HookState,
    pub(super) net_devices: Vec<NetDevice>,
    pub(super) no_pivot: bool,
}

/// The part of the plan that makes the container.
pub(super) fn container(bundle: &Bundle, around: Surroundings<'_>, table: &mut Table) -> Result<ContainerPlan> {
    let Surroundings { namespaces, layout, cgroup, spawner, hooks, hook_state, net_devices, no_pivot } = around;
    let spec = bundle.spec();
    let linux = bundle.linux()?;
    let propagation = linux.rootfs_propagation().as_deref().and_then(mount_options::propagation).unwrap_or(0);
    let entries = spec.mounts().as_deref().unwrap_or_default();
    let rootfs = bundle.rootfs()?;
    let real_rootfs = std::fs::canonicalize(&rootfs).on("find root.path", &rootfs)?;
    let named = if real_rootfs == Path::new("/") { Vec::new() } else { vec![rootfs.clone(), real_rootfs] };
    let mut mounts = Mounts {
        bundle,
        namespaces,
        layout,
        cgroup,
        spawner,
        rootfs: named,
        rootfs_propagation: propagation,
        id_maps: HashMap::new(),
    };
    // In a user namespace the kernel lets nobody make nodes.
    let bind_devices = namespaces.user.is_some() || rootless::is_unprivileged();
    let filled = |name: &Option<String>| name.clone().filter(|name| !name.is_empty());
    Ok(ContainerPlan {
        new_cgroup_namespace: namespaces.new_cgroup,
        new_time_namespace: namespaces.new_time.then(|| time_offsets(linux)),
        hooks: hooks_plan(bundle, hooks, hook_state)?,
        mounts: mounts.plan(entries, table)?,
        rootfs: table.add(rootfs_tree(&rootfs)?),
        rootfs_readonly: spec.root().as_ref().and_then(|root| root.readonly()).unwrap_or(false),
        // Being private is what the detached clone already is.
        rootfs_propagation: if propagation & libc::MS_PRIVATE != 0 { 0 } else { propagation },
        no_pivot,
        devices: devices::list(entries, linux.devices().as_deref(), bind_devices, table)?,
        null: table.add(crate::init::open_null()?),
        masked_paths: linux.masked_paths().clone().unwrap_or_default(),
        readonly_paths: linux.readonly_paths().clone().unwrap_or_default(),
        hostname: filled(spec.hostname()),
        domainname: filled(spec.domainname()),
        sysctl: linux.sysctl().iter().flatten().map(|(key, value)| (key.clone(), value.clone())).collect(),
        loopback: namespaces.new & libc::CLONE_NEWNET as u64 != 0,
        net_devices,
    })
}

fn time_offsets(linux: &oci_spec::runtime::Linux) -> Vec<(String, i64, u32)> {
    let offsets = linux.time_offsets().iter().flatten();
    offsets.map(|(clock, offset)| (clock.clone(), offset.secs().unwrap_or(0), offset.nanosecs().unwrap_or(0))).collect()
}

fn hooks_plan(bundle: &Bundle, hooks: &Hooks, state: HookState) -> Result<Option<HooksPlan>> {
    if !hooks.before_pivot() && hooks.start_container.is_empty() {
        return Ok(None);
    }
    let host_rootfs = if hooks.before_pivot() {
        let path = bundle.rootfs()?;
        let path = std::fs::canonicalize(&path).on("find root.path", &path)?;
        let text = path.into_os_string().into_string();
        Some(text.map_err(|path| Error::spec(format!("root.path {path:?} is not valid UTF-8")))?)
    } else {
        None
    };
    Ok(Some(HooksPlan {
        state,
        host_rootfs,
        create_container: hooks.create_container.clone(),
        start_container: hooks.start_container.clone(),
    }))
}

/// A private copy of the root filesystem, attached nowhere. A copy in the host's peer group would make
/// the container's mounts appear on the node.
pub(super) fn rootfs_tree(path: &Path) -> Result<OwnedFd> {
    let at = sys::open(path, libc::O_PATH | libc::O_DIRECTORY).on("open root.path", path)?;
    let tree = mount::clone_tree(at.as_fd(), "", true).on("clone the mounts of root.path", path)?;
    mount::set_attributes(tree.as_fd(), 0, 0, libc::MS_PRIVATE, true).on("make private", path)?;
    Ok(tree)
}
