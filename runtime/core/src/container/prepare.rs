//! From config.json to a plan and its descriptors: all that can be decided and opened before the clone.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use oci_spec::runtime::{
    LinuxDevice, LinuxDeviceType, LinuxNamespaceType, LinuxSeccomp, Mount, PosixRlimitType, Process,
};

use crate::bundle::{Bundle, empty_path};
use crate::capability;
use crate::cgroup::{Cgroup, Layout};
use crate::error::{Context, Error, Result};
use crate::mount_options::{self, MountOptions};
use crate::plan::{CgroupView, ContainerPlan, Device, Fd, MountPlan, MountSource, ProcessPlan};
use crate::seccomp;
use crate::sys::mount::{self, attr};
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
    /// A cgroup namespace is made by the child, once it is in its cgroups.
    pub(super) new_cgroup: bool,
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
        LinuxNamespaceType::Time => 0x80,
    }
}

/// Opens the namespaces to be joined and adds up those to be made.
pub(super) fn namespaces(bundle: &Bundle, table: &mut Table) -> Result<Namespaces> {
    let mut out = Namespaces::default();
    for namespace in bundle.linux()?.namespaces().iter().flatten() {
        let kind = namespace.typ();
        let flag = clone_flag(kind);
        let path = namespace.path().as_deref();
        if empty_path(path) {
            if kind == LinuxNamespaceType::Cgroup {
                out.new_cgroup = true;
            } else {
                out.new |= flag as u64;
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
            out.join.push((table.add(fd), flag));
        }
    }
    Ok(out)
}

/// The `CLONE_NEW*` flag of a namespace file, ioctl_ns(2).
fn namespace_kind(fd: BorrowedFd<'_>) -> Option<i32> {
    const NS_GET_NSTYPE: libc::c_ulong = 0xb703;
    // SAFETY: NS_GET_NSTYPE takes no argument; on another kind of file it fails.
    let kind = unsafe { libc::ioctl(std::os::fd::AsRawFd::as_raw_fd(&fd), NS_GET_NSTYPE as _) };
    (kind > 0).then_some(kind)
}

/// What is asked of the container beyond its config.json.
pub(super) struct Wishes {
    pub(super) no_pivot: bool,
}

/// The part of the plan that makes the container.
pub(super) fn container(
    bundle: &Bundle,
    wishes: &Wishes,
    namespaces: &Namespaces,
    layout: &Layout,
    cgroup: &Cgroup,
    table: &mut Table,
) -> Result<ContainerPlan> {
    let spec = bundle.spec();
    let linux = bundle.linux()?;
    let propagation = linux.rootfs_propagation().as_deref().and_then(mount_options::propagation).unwrap_or(0);
    let mut mounts = Vec::new();
    for entry in spec.mounts().iter().flatten() {
        mounts.push(mount_plan(bundle, entry, namespaces, layout, cgroup, propagation, table)?);
    }
    let filled = |name: &Option<String>| name.clone().filter(|name| !name.is_empty());
    Ok(ContainerPlan {
        new_cgroup_namespace: namespaces.new_cgroup,
        rootfs: table.add(rootfs_tree(&bundle.rootfs()?)?),
        rootfs_readonly: spec.root().as_ref().and_then(|root| root.readonly()).unwrap_or(false),
        // Being private is what the detached clone already is.
        rootfs_propagation: if propagation & libc::MS_PRIVATE != 0 { 0 } else { propagation },
        no_pivot: wishes.no_pivot,
        devices: device_list(spec.mounts().as_deref().unwrap_or_default(), linux.devices().as_deref())?,
        mounts,
        null: table.add(crate::init::open_null()?),
        masked_paths: linux.masked_paths().clone().unwrap_or_default(),
        readonly_paths: linux.readonly_paths().clone().unwrap_or_default(),
        hostname: filled(spec.hostname()),
        domainname: filled(spec.domainname()),
        sysctl: linux.sysctl().iter().flatten().map(|(key, value)| (key.clone(), value.clone())).collect(),
        loopback: namespaces.new & libc::CLONE_NEWNET as u64 != 0,
    })
}

/// A private copy of the root filesystem, attached nowhere. A copy in the host's peer group would make
/// the container's mounts appear on the node.
fn rootfs_tree(path: &Path) -> Result<OwnedFd> {
    let at = sys::open(path, libc::O_PATH | libc::O_DIRECTORY).on("open root.path", path)?;
    let tree = mount::clone_tree(at.as_fd(), "", true).on("clone the mounts of root.path", path)?;
    mount::set_attributes(tree.as_fd(), 0, 0, libc::MS_PRIVATE, true).on("make private", path)?;
    Ok(tree)
}

#[allow(clippy::too_many_arguments, reason = "each is a different part of one decision")]
fn mount_plan(
    bundle: &Bundle,
    entry: &Mount,
    namespaces: &Namespaces,
    layout: &Layout,
    cgroup: &Cgroup,
    rootfs_propagation: u64,
    table: &mut Table,
) -> Result<MountPlan> {
    let destination = Path::new("/").join(entry.destination());
    let destination = destination
        .to_str()
        .ok_or_else(|| Error::spec(format!("mount destination {destination:?} is not valid UTF-8")))?
        .to_owned();
    let options = MountOptions::parse(entry.options().as_deref().unwrap_or_default(), &destination)?;
    let kind = entry.typ().as_deref().unwrap_or_default();
    let mut propagation = options.propagation.clone();
    let source = if options.bind.is_some() || kind == "bind" {
        if propagation.is_empty() && rootfs_propagation & libc::MS_SHARED == 0 {
            // A clone stays a peer of the host's mount; as runc does it, what the host mounts below
            // later arrives, and what the container mounts does not leave.
            propagation.push(libc::MS_SLAVE | libc::MS_REC);
        }
        bind(bundle, entry, &destination, &options, table)?
    } else if kind.is_empty() {
        return Err(Error::spec(format!("mount {destination} has neither a type nor a bind option")));
    } else {
        if options.recursive_set | options.recursive_clear != 0 {
            return Err(Error::unsupported(
                format!("recursive options of mount {destination}"),
                "a new filesystem has nothing mounted below it",
            ));
        }
        let attributes = options.set & !options.clear | options.set & attr::ATIME_MASK;
        match (kind, layout) {
            ("cgroup", Layout::V1 { .. }) => cgroup_v1(attributes, namespaces, layout, cgroup, table)?,
            ("cgroup" | "cgroup2", Layout::V2 { .. }) => cgroup_v2(attributes, namespaces, cgroup, table)?,
            _ => new_filesystem(entry, kind, &destination, attributes, options.data, table)?,
        }
    };
    Ok(MountPlan { destination, source, propagation })
}

fn bind(
    bundle: &Bundle,
    entry: &Mount,
    destination: &str,
    options: &MountOptions,
    table: &mut Table,
) -> Result<MountSource> {
    if let Some((key, _)) = options.data.first() {
        return Err(Error::spec(format!("mount option {key:?} of the bind mount {destination} is unknown")));
    }
    let source = entry.source().as_deref().unwrap_or(Path::new(""));
    if source.as_os_str().is_empty() {
        return Err(Error::spec(format!("bind mount {destination} has no source")));
    }
    // A relative source is below the bundle (config.md, "Mounts").
    let source: PathBuf = bundle.path().join(source);
    let what = |verb: &str| format!("{verb} {}, the source of mount {destination}", source.display());
    let at = sys::open(&source, libc::O_PATH).with_context(|| what("open"))?;
    let directory = sys::is_dir(&sys::fstat(at.as_fd()).with_context(|| what("look at"))?);
    let tree =
        mount::clone_tree(at.as_fd(), "", options.bind != Some(false)).with_context(|| what("clone the mounts of"))?;
    for (set, clear, recursive) in
        [(options.set, options.clear, false), (options.recursive_set, options.recursive_clear, true)]
    {
        if set | clear != 0 {
            mount::set_attributes(tree.as_fd(), set, clear, 0, recursive).with_context(|| what("set options on"))?;
        }
    }
    Ok(MountSource::Tree { tree: table.add(tree), directory })
}

/// Filesystems that show what namespace they were mounted in are made by the child; others here, where
/// the host's devices and paths are.
fn new_filesystem(
    entry: &Mount,
    kind: &str,
    destination: &str,
    attributes: u64,
    data: Vec<(String, Option<String>)>,
    table: &mut Table,
) -> Result<MountSource> {
    let mut data = data;
    if let Some(source) = entry.source().as_deref().filter(|source| !source.as_os_str().is_empty()) {
        data.push(("source".to_owned(), Some(source.to_string_lossy().into_owned())));
    }
    if matches!(kind, "proc" | "sysfs" | "mqueue" | "tmpfs" | "devpts") {
        return Ok(MountSource::New { kind: kind.to_owned(), attributes, data });
    }
    let made = crate::init::make_filesystem(kind, attributes, &data)
        .with_context(|| format!("mount {kind} for {destination}"))?;
    Ok(MountSource::Tree { tree: table.add(made), directory: true })
}

fn cgroup_v1(
    attributes: u64,
    namespaces: &Namespaces,
    layout: &Layout,
    cgroup: &Cgroup,
    table: &mut Table,
) -> Result<MountSource> {
    let Layout::V1 { hierarchies } = layout else {
        return Err(Error::unsupported("a mount of type cgroup", "this machine has cgroup v2"));
    };
    let mut views = Vec::new();
    let mut links = Vec::new();
    for (hierarchy, path) in hierarchies.iter().zip(cgroup.paths()) {
        let name = hierarchy.name();
        let view = if namespaces.new_cgroup {
            let mut data = vec![("source".to_owned(), Some("cgroup".to_owned()))];
            for controller in &hierarchy.controllers {
                match controller.strip_prefix("name=") {
                    Some(name) => {
                        data.push(("none".to_owned(), None));
                        data.push(("name".to_owned(), Some(name.to_owned())));
                    }
                    None => data.push((controller.clone(), None)),
                }
            }
            CgroupView::Mounted(data)
        } else {
            let at = sys::open(path, libc::O_PATH | libc::O_DIRECTORY).on("open cgroup", path)?;
            let tree = mount::clone_tree(at.as_fd(), "", false).on("clone the mount of cgroup", path)?;
            mount::set_attributes(tree.as_fd(), attributes, 0, libc::MS_PRIVATE, false).on("set options on", path)?;
            CgroupView::Bound(table.add(tree))
        };
        for controller in hierarchy.controllers.iter().filter(|controller| **controller != name) {
            if !controller.starts_with("name=") {
                links.push((controller.clone(), name.clone()));
            }
        }
        views.push((name, view));
    }
    Ok(MountSource::CgroupV1 { attributes, hierarchies: views, links })
}

fn cgroup_v2(attributes: u64, namespaces: &Namespaces, cgroup: &Cgroup, table: &mut Table) -> Result<MountSource> {
    if namespaces.new_cgroup {
        return Ok(MountSource::New {
            kind: "cgroup2".to_owned(),
            attributes,
            data: vec![("source".to_owned(), Some("cgroup".to_owned()))],
        });
    }
    let Cgroup::V2 { path } = cgroup else {
        return Err(Error::unsupported("a mount of type cgroup2", "this machine has cgroup v1"));
    };
    let at = sys::open(path, libc::O_PATH | libc::O_DIRECTORY).on("open cgroup", path)?;
    let tree = mount::clone_tree(at.as_fd(), "", false).on("clone the mount of cgroup", path)?;
    mount::set_attributes(tree.as_fd(), attributes, 0, libc::MS_PRIVATE, false).on("set options on", path)?;
    Ok(MountSource::Tree { tree: table.add(tree), directory: true })
}

/// Devices that every container has, config-linux.md, "Default Devices".
const DEFAULT_DEVICES: &[(&str, u32, u32)] = &[
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];

/// The nodes to make; none where the host's /dev is bound.
fn device_list(mounts: &[Mount], listed: Option<&[LinuxDevice]>) -> Result<Option<Vec<Device>>> {
    let bound = mounts.iter().any(|mount| {
        let options = mount.options().as_deref().unwrap_or_default();
        Path::new("/").join(mount.destination()) == Path::new("/dev")
            && (mount.typ().as_deref() == Some("bind") || options.iter().any(|o| o == "bind" || o == "rbind"))
    });
    if bound {
        return Ok(None);
    }
    let mut devices: Vec<Device> = DEFAULT_DEVICES
        .iter()
        .map(|(path, major, minor)| Device {
            path: (*path).to_owned(),
            mode: libc::S_IFCHR | 0o666,
            major: *major,
            minor: *minor,
            uid: 0,
            gid: 0,
        })
        .collect();
    for device in listed.unwrap_or_default() {
        let device = device_node(device)?;
        match devices.iter_mut().find(|known| known.path == device.path) {
            Some(known) => *known = device,
            None => devices.push(device),
        }
    }
    Ok(Some(devices))
}

fn device_node(device: &LinuxDevice) -> Result<Device> {
    let path = device.path();
    let kind = match device.typ() {
        LinuxDeviceType::C | LinuxDeviceType::U => libc::S_IFCHR,
        LinuxDeviceType::B => libc::S_IFBLK,
        LinuxDeviceType::P => libc::S_IFIFO,
        LinuxDeviceType::A => {
            return Err(Error::spec(format!("linux.devices: {} has no type of c, b, u or p", path.display())));
        }
    };
    let number = |n: i64| {
        u32::try_from(n).map_err(|_| Error::spec(format!("linux.devices: {}: {n} is no device number", path.display())))
    };
    let text = path
        .to_str()
        .filter(|text| text.starts_with('/'))
        .ok_or_else(|| Error::spec(format!("linux.devices: {} is not an absolute path", path.display())))?;
    Ok(Device {
        path: text.to_owned(),
        mode: kind | device.file_mode().unwrap_or(0o666) & 0o7777,
        major: number(device.major())?,
        minor: number(device.minor())?,
        uid: device.uid().unwrap_or(0),
        gid: device.gid().unwrap_or(0),
    })
}

const RLIMITS: &[(PosixRlimitType, libc::__rlimit_resource_t, &str)] = &[
    (PosixRlimitType::RlimitCpu, libc::RLIMIT_CPU, "RLIMIT_CPU"),
    (PosixRlimitType::RlimitFsize, libc::RLIMIT_FSIZE, "RLIMIT_FSIZE"),
    (PosixRlimitType::RlimitData, libc::RLIMIT_DATA, "RLIMIT_DATA"),
    (PosixRlimitType::RlimitStack, libc::RLIMIT_STACK, "RLIMIT_STACK"),
    (PosixRlimitType::RlimitCore, libc::RLIMIT_CORE, "RLIMIT_CORE"),
    (PosixRlimitType::RlimitRss, libc::RLIMIT_RSS, "RLIMIT_RSS"),
    (PosixRlimitType::RlimitNproc, libc::RLIMIT_NPROC, "RLIMIT_NPROC"),
    (PosixRlimitType::RlimitNofile, libc::RLIMIT_NOFILE, "RLIMIT_NOFILE"),
    (PosixRlimitType::RlimitMemlock, libc::RLIMIT_MEMLOCK, "RLIMIT_MEMLOCK"),
    (PosixRlimitType::RlimitAs, libc::RLIMIT_AS, "RLIMIT_AS"),
    (PosixRlimitType::RlimitLocks, libc::RLIMIT_LOCKS, "RLIMIT_LOCKS"),
    (PosixRlimitType::RlimitSigpending, libc::RLIMIT_SIGPENDING, "RLIMIT_SIGPENDING"),
    (PosixRlimitType::RlimitMsgqueue, libc::RLIMIT_MSGQUEUE, "RLIMIT_MSGQUEUE"),
    (PosixRlimitType::RlimitNice, libc::RLIMIT_NICE, "RLIMIT_NICE"),
    (PosixRlimitType::RlimitRtprio, libc::RLIMIT_RTPRIO, "RLIMIT_RTPRIO"),
    (PosixRlimitType::RlimitRttime, libc::RLIMIT_RTTIME, "RLIMIT_RTTIME"),
];

/// The name of a resource limit, for messages.
pub(crate) fn rlimit_name(resource: u32) -> Option<&'static str> {
    RLIMITS.iter().find(|(_, number, _)| *number == resource).map(|(.., name)| *name)
}

/// The process part of a plan.
pub(super) fn process(process: &Process) -> Result<ProcessPlan> {
    let mut rlimits = Vec::new();
    for limit in process.rlimits().iter().flatten() {
        let (_, resource, name) = RLIMITS
            .iter()
            .find(|(kind, ..)| *kind == limit.typ())
            .ok_or_else(|| Error::spec(format!("process.rlimits: {} is unknown", limit.typ())))?;
        if limit.soft() > limit.hard() {
            let (soft, hard) = (limit.soft(), limit.hard());
            return Err(Error::spec(format!("process.rlimits: {name} soft {soft} is over hard {hard}")));
        }
        rlimits.push((*resource, limit.soft(), limit.hard()));
    }
    let user = process.user();
    let cwd = process.cwd().to_str().ok_or_else(|| Error::spec("process.cwd is not valid UTF-8"))?;
    let terminal = process.terminal().unwrap_or(false).then(|| {
        let clamp = |value: u64| u16::try_from(value).unwrap_or(u16::MAX);
        process.console_size().map_or((0, 0), |size| (clamp(size.height()), clamp(size.width())))
    });
    Ok(ProcessPlan {
        args: process.args().clone().unwrap_or_default(),
        env: process.env().clone().unwrap_or_default(),
        cwd: cwd.to_owned(),
        uid: user.uid(),
        gid: user.gid(),
        groups: user.additional_gids().clone().unwrap_or_default(),
        umask: user.umask(),
        capabilities: Some(process.capabilities().as_ref().map(capability::sets).unwrap_or_default()),
        rlimits,
        no_new_privileges: process.no_new_privileges().unwrap_or(false),
        oom_score_adj: process.oom_score_adj(),
        terminal,
        ..ProcessPlan::default()
    })
}

/// The seccomp program of a profile, unless it allows everything by having none.
pub(super) fn filter(profile: Option<&LinuxSeccomp>, cache: &Path) -> Result<Option<seccomp::Program>> {
    profile.map(|profile| seccomp::program(profile, cache)).transpose()
}

/// Puts a filter's program into the table.
pub(super) fn add_filter(program: &[u8], flags: u64, table: &mut Table) -> Result<(Fd, u64)> {
    let file = sys::sealed_memfd(c"runx-seccomp", program).context("write the seccomp program")?;
    Ok((table.add(file), flags))
}
