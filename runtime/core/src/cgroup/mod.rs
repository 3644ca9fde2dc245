//! Control groups: where a container's are, its limits, its processes and statistics.
//!
//! Two layouts exist. With version 2 there is one tree and a process is born in its group
//! (`CLONE_INTO_CGROUP`). With version 1, or the hybrid of both, there is a tree for each controller and
//! a process must be moved into each; the first such move after a pause costs the kernel several
//! milliseconds, so the parent does it while the child is busy with its mounts.
//!
//! Who makes the groups is a choice besides: we do, or [`systemd`] does for us.

mod convert;
mod delegation;
mod devices;
mod files;
mod layout;
mod oom;
mod permission;
mod processes;
mod refuge;
mod stats;
mod systemd;
mod v1;
mod v2;

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};

use oci_spec::runtime::{LinuxResources, Spec};
use serde::{Deserialize, Serialize};

use crate::error::{Context, Error, Result};
use crate::sys;

pub use layout::{Hierarchy, Layout};
pub use oom::{OomEvents, OomWatch};
pub use refuge::Refuge;
pub use stats::{
    Blkio, BlkioEntry, CpuStats, CpusetStats, HugetlbStats, MemoryCounter, MemoryStats, MiscStats, NumaRow, PidsStats,
    Pressure, PressureLine, RdmaEntry, RdmaStats, Stats,
};
pub use systemd::Unit;

/// The cgroups of one container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "version")]
pub enum Cgroup {
    /// One directory for each hierarchy of version 1.
    #[serde(rename = "1")]
    V1 {
        /// The container's directories.
        directories: Vec<Directory>,
        /// The unit of systemd that they belong to, if it makes them.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        unit: Option<Unit>,
    },
    /// One directory in the unified tree.
    #[serde(rename = "2")]
    V2 {
        /// The container's directory.
        path: PathBuf,
        /// The unit of systemd that it belongs to, if it makes it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        unit: Option<Unit>,
    },
    /// None of its own: it is in those of whoever made it, who may not make any.
    #[serde(rename = "none")]
    None,
}

/// The container's directory in one hierarchy of version 1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Directory {
    /// The controllers of the hierarchy, `name=…` for one without; empty for version 2's tree beside them.
    pub controllers: Vec<String>,
    /// The directory's absolute path.
    pub path: PathBuf,
}

/// What a container's cgroups are to be like.
#[derive(Clone, Copy, Debug)]
pub struct Settings<'a> {
    id: &'a str,
    resources: Option<&'a LinuxResources>,
    annotations: Option<&'a HashMap<String, String>>,
    owner: Option<u32>,
    /// Whether the configuration says where the groups are to be.
    named: bool,
    lenient: bool,
}

impl<'a> Settings<'a> {
    /// The settings of a container's configuration. `lenient` makes do without groups that may not be made, as far as
    /// nothing in the configuration needs them.
    pub fn of(id: &'a str, spec: &'a Spec, lenient: bool) -> Self {
        let path = spec.linux().as_ref().and_then(|linux| linux.cgroups_path().as_deref());
        Self {
            id,
            named: path.is_some_and(|path| !path.as_os_str().is_empty()),
            lenient,
            resources: spec.linux().as_ref().and_then(|linux| linux.resources().as_ref()),
            annotations: spec.annotations().as_ref(),
            owner: delegation::owner(spec),
        }
    }

    /// The groups stay their maker's, who is the container's root already.
    pub fn kept_by_caller(self, kept: bool) -> Self {
        if kept { Self { owner: None, ..self } } else { self }
    }
}

/// Where a container's cgroups are to be, before they are made. `systemd` leaves their making to it; cgroupsPath then
/// has the form `slice:prefix:name`, and is `system.slice:runx:ID` by default.
///
/// # Errors
/// [`Error::InvalidSpec`] for a path that leaves the tree or has the wrong form, [`Error::Unsupported`] where systemd
/// is asked for and not there, and system errors where no cgroup filesystem is mounted.
pub fn place(layout: &Layout, cgroups_path: Option<&Path>, id: &str, systemd: bool) -> Result<Cgroup> {
    let unit = if systemd { Some(unit(cgroups_path, id)?) } else { None };
    let relative = match &unit {
        Some(unit) => Path::new("/").join(unit.path()?),
        None => check_path(cgroups_path.unwrap_or(Path::new(id)))?.to_owned(),
    };
    Ok(match layout {
        Layout::V2 { root, own } => {
            // The group this process is in has processes, so no controllers can be enabled for groups
            // below it; its parent's can.
            let base = if relative.is_absolute() { Path::new("/") } else { own.parent().unwrap_or(Path::new("/")) };
            Cgroup::V2 { path: below(root, base, &relative), unit }
        }
        Layout::V1 { hierarchies } => {
            let mut directories: Vec<Directory> = hierarchies
                .iter()
                .map(|hierarchy| {
                    let base = if relative.is_absolute() { Path::new("/") } else { &hierarchy.own };
                    let path = below(&hierarchy.mount, base, &relative);
                    Directory { controllers: hierarchy.controllers.clone(), path }
                })
                .collect();
            // systemd keeps an account of processes in version 2's tree, if that is there, too.
            if unit.is_some()
                && let Some(root) = layout::unified_beside()
            {
                directories.push(Directory { controllers: Vec::new(), path: below(root, Path::new("/"), &relative) });
            }
            Cgroup::V1 { directories, unit }
        }
    })
}

fn unit(cgroups_path: Option<&Path>, id: &str) -> Result<Unit> {
    let unit = Unit::named(cgroups_path, id)?;
    if !systemd::is_running() {
        return Err(Error::unsupported("the systemd cgroup driver", "this machine was not booted with systemd"));
    }
    Ok(unit)
}

fn check_path(path: &Path) -> Result<&Path> {
    let bad = |why: &str| Err(Error::spec(format!("linux.cgroupsPath {:?} {why}", path.to_string_lossy())));
    if !path.is_absolute() && path.to_string_lossy().matches(':').count() == 2 {
        return bad("is in systemd's form (slice:prefix:name), but the systemd cgroup driver is not asked for: use \
             --systemd-cgroup, or SystemdCgroup = true in containerd's options of the runtime");
    }
    if path.components().any(|part| matches!(part, Component::ParentDir)) {
        return bad("contains \"..\"");
    }
    if path.components().all(|part| matches!(part, Component::RootDir | Component::CurDir)) {
        return bad("is the root of the hierarchy");
    }
    Ok(path)
}

fn below(mount: &Path, base: &Path, relative: &Path) -> PathBuf {
    let strip = |path: &Path| path.strip_prefix("/").map(Path::to_path_buf).unwrap_or_else(|_| path.to_path_buf());
    mount.join(strip(base)).join(strip(relative))
}

impl Cgroup {
    /// The unit of systemd that the groups belong to, if any.
    pub fn unit(&self) -> Option<&Unit> {
        match self {
            Self::V1 { unit, .. } | Self::V2 { unit, .. } => unit.as_ref(),
            Self::None => None,
        }
    }

    /// Makes the directories of a new container: see [`Self::create`]. Returns what there is instead where the
    /// settings allow less.
    pub fn make(&self, settings: &Settings<'_>) -> Result<Option<Self>> {
        if settings.lenient {
            return permission::create(self, settings, settings.named).map(Some);
        }
        self.create().map(|()| None)
    }

    /// Makes the directories. Those that exist already are an error if a process is in them, since two
    /// containers would share limits and be killed together.
    ///
    /// For a unit of systemd they are made, too, so that a process can be born there and mounts can show them;
    /// systemd takes over what it finds.
    pub fn create(&self) -> Result<()> {
        match self {
            Self::V1 { directories, .. } => v1::create(directories),
            Self::V2 { path, unit: None } => v2::create(path),
            Self::V2 { path, unit: Some(_) } => v2::make(path),
            Self::None => Ok(()),
        }
    }

    /// Sets all limits, before there is a process. With systemd this has to wait for one: see [`Self::join`].
    pub fn configure(&self, settings: &Settings<'_>) -> Result<()> {
        if self.unit().is_some() { Ok(()) } else { self.configure_now(settings, settings.resources) }
    }

    fn configure_now(&self, settings: &Settings<'_>, resources: Option<&LinuxResources>) -> Result<()> {
        let rules = devices::rules(settings.resources)?;
        let attached = match self {
            Self::V1 { directories, .. } => v1::apply_devices(directories, &rules),
            Self::V2 { path, .. } => devices::attach(path, &rules),
            Self::None => return Ok(()),
        };
        match attached {
            // Whoever may not do this may not make devices either, and has no more of them than before.
            Err(e) if settings.lenient && (permission::is_refusal(&e) || matches!(e, Error::Unsupported { .. })) => {
                log::debug!("the container is not kept from devices that its user may use: {e}");
            }
            other => other?,
        }
        if let Some(resources) = resources {
            self.apply(resources)?;
        }
        match (self, settings.owner) {
            (Self::V2 { path, .. }, Some(uid)) if uid != 0 => v2::delegate(path, uid),
            // Not safe with version 1, where limits belong to whoever owns the directory.
            _ => Ok(()),
        }
    }

    /// Puts the container's first process into its groups. With version 2 it was born there. With systemd this is
    /// the moment when the unit is made and the limits are set.
    pub fn join(&self, pid: i32, settings: &Settings<'_>) -> Result<()> {
        let Some(unit) = self.unit() else { return self.enter(pid) };
        let devices = match self {
            Self::V1 { .. } => Some(devices::allowed(&devices::rules(settings.resources)?)),
            Self::V2 { .. } | Self::None => None,
        };
        let adjusted = unit.start(&systemd::Start {
            id: settings.id,
            pid,
            group: self.group(),
            devices,
            resources: settings.resources,
            annotations: settings.annotations,
        })?;
        // systemd knows some controllers only.
        match self {
            Self::V1 { .. } => self.enter(pid)?,
            Self::V2 { path, .. } => v2::enable(path)?,
            Self::None => {}
        }
        self.configure_now(settings, adjusted.as_ref())
    }

    /// Puts a further process into the groups, where it was not born there.
    pub fn enter(&self, pid: i32) -> Result<()> {
        match self {
            Self::V1 { directories, .. } => v1::join(directories, pid),
            Self::V2 { .. } | Self::None => Ok(()),
        }
    }

    /// Puts a process that is there already into new groups, to become the container's first or to fork that.
    pub fn adopt(&self, pid: i32, settings: &Settings<'_>) -> Result<()> {
        match self {
            Self::V2 { path, unit: None } => files::write(path, "cgroup.procs", pid.to_string()),
            _ => self.join(pid, settings),
        }
    }

    fn group(&self) -> systemd::Group<'_> {
        match self {
            Self::V1 { directories, .. } => systemd::Group::V1(v1::processor(directories)),
            Self::V2 { path, .. } => systemd::Group::V2(path),
            // It has no unit either.
            Self::None => systemd::Group::V1(None),
        }
    }

    /// Changes the limits that `resources` names and leaves the others.
    ///
    /// Device rules are not changed, as with runc: engines send all that they know of a container with every
    /// update, and others may have allowed a device to it since.
    pub fn update(&self, resources: &LinuxResources) -> Result<()> {
        match self.unit() {
            Some(unit) => {
                // systemd would kill before we could refuse.
                self.check_update(resources)?;
                self.apply(&unit.update(self.group(), resources)?)
            }
            None => self.apply(resources),
        }
    }

    fn check_update(&self, resources: &LinuxResources) -> Result<()> {
        let Some(memory) = resources.memory() else { return Ok(()) };
        match self {
            Self::V2 { path, .. } => convert::check_before_update(path, "memory.current", memory),
            Self::V1 { directories, .. } => match v1::memory(directories) {
                Some(directory) => convert::check_before_update(directory, "memory.usage_in_bytes", memory),
                None => Ok(()),
            },
            Self::None => Ok(()),
        }
    }

    fn apply(&self, resources: &LinuxResources) -> Result<()> {
        match self {
            Self::V1 { directories, .. } => v1::apply(directories, resources),
            Self::V2 { path, .. } => v2::apply(path, resources),
            Self::None => Err(missing("a limit")),
        }
    }

    /// The directory to clone the first process into, where the kernel can.
    pub fn birthplace(&self) -> Result<Option<OwnedFd>> {
        match self {
            Self::V1 { .. } | Self::None => Ok(None),
            Self::V2 { path, .. } => open_directory(path).map(Some),
        }
    }

    /// As [`Self::birthplace`], for a further process beside the first one, `pid`.
    ///
    /// No process can be in a group that has given its controllers to groups below it, as a container does that
    /// runs systemd for example. There it is born where the first process is now.
    pub fn birthplace_beside(&self, pid: i32) -> Result<Option<OwnedFd>> {
        let Self::V2 { path, .. } = self else { return Ok(None) };
        if !v2::is_delegated(path) {
            return self.birthplace();
        }
        let file = format!("/proc/{pid}/cgroup");
        let text = std::fs::read_to_string(&file).on("read", &file)?;
        let own = text.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
        let own = Path::new("/sys/fs/cgroup").join(own);
        if !own.starts_with(path) || own.components().any(|part| part == Component::ParentDir) {
            return Err(Error::Init {
                message: format!(
                    "join cgroup {}: it has given its controllers to groups below it, and the container's first \
                     process is in {}",
                    path.display(),
                    own.display()
                ),
                errno: libc::EBUSY,
            });
        }
        open_directory(&own).map(Some)
    }

    /// The directory that tells which processes there are.
    fn membership(&self) -> Option<&Path> {
        match self {
            Self::V1 { directories, .. } => v1::membership(directories),
            Self::V2 { path, .. } => Some(path),
            Self::None => None,
        }
    }

    /// Whether the container's directory is there.
    pub fn exists(&self) -> bool {
        self.membership().is_some_and(Path::exists)
    }

    /// The pids of all processes, in groups below the container's too, in this PID namespace.
    pub fn pids(&self) -> Result<Vec<i32>> {
        self.membership().map_or(Ok(Vec::new()), processes::list)
    }

    /// Sends `SIGKILL` to every process until none is left, thawing what is frozen.
    pub fn kill_all(&self) -> Result<()> {
        let Some(directory) = self.membership() else { return Ok(()) };
        let try_to = |what: Result<()>| what.unwrap_or_else(|e| log::debug!("while ending processes: {e}"));
        processes::kill(directory, || try_to(self.freeze()), || try_to(self.thaw()))
    }

    /// Stops every process where it is, and returns once all have stopped.
    pub fn freeze(&self) -> Result<()> {
        self.set_frozen(true)
    }

    /// Lets stopped processes go on.
    pub fn thaw(&self) -> Result<()> {
        self.set_frozen(false)
    }

    fn set_frozen(&self, frozen: bool) -> Result<()> {
        match self {
            Self::V1 { directories, .. } => v1::set_frozen(directories, frozen),
            Self::V2 { path, .. } => v2::set_frozen(path, frozen),
            Self::None => Err(missing(if frozen { "pausing" } else { "resuming" })),
        }
    }

    /// Whether the processes are stopped by [`Self::freeze`].
    pub fn is_frozen(&self) -> bool {
        match self {
            Self::V1 { directories, .. } => v1::is_frozen(directories),
            Self::V2 { path, .. } => v2::is_frozen(path),
            Self::None => false,
        }
    }

    /// What the kernel counts for the container.
    ///
    /// # Errors
    /// `ENOENT` when its directories are gone.
    pub fn stats(&self) -> Result<Stats> {
        match self {
            Self::V1 { directories, .. } => v1::stats(directories),
            Self::V2 { path, .. } => v2::stats(path),
            Self::None => Err(missing("reading statistics")),
        }
    }

    /// Begins to watch for processes killed for lack of memory; `None` where the kernel does not say.
    pub fn watch_oom(&self) -> Result<Option<OomWatch>> {
        match self {
            Self::V1 { directories, .. } => v1::memory(directories).map(OomWatch::v1).transpose(),
            Self::V2 { path, .. } => OomWatch::v2(path),
            Self::None => Ok(None),
        }
    }

    /// Gives the group to a user, who may then divide it but not change its limits. Nothing happens with version 1,
    /// where that would not be safe.
    pub fn delegate(&self, uid: u32) -> Result<()> {
        match self {
            Self::V1 { .. } | Self::None => Ok(()),
            Self::V2 { path, .. } => v2::delegate(path, uid),
        }
    }

    /// Removes the directories, and those that the container made below them, and the unit. What is not there is
    /// fine.
    pub fn remove(&self) -> Result<()> {
        let stopped = self.unit().map_or(Ok(()), Unit::stop);
        // One that cannot be removed keeps none of the others.
        self.paths().into_iter().map(processes::remove_tree).fold(stopped, Result::and)
    }

    /// All directories, in the order of the layout's hierarchies.
    pub fn paths(&self) -> Vec<&Path> {
        match self {
            Self::V1 { directories, .. } => directories.iter().map(|directory| directory.path.as_path()).collect(),
            Self::V2 { path, .. } => vec![path],
            Self::None => Vec::new(),
        }
    }
}

/// Why something that needs a cgroup cannot be had.
fn missing(what: &str) -> Error {
    Error::unsupported(what, "the container has no cgroup of its own, since its creator may not make one")
}

fn open_directory(path: &Path) -> Result<OwnedFd> {
    sys::open(path, libc::O_PATH | libc::O_DIRECTORY).on("open cgroup", path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unified() -> Layout {
        Layout::V2 { root: "/sys/fs/cgroup".into(), own: "/user.slice/session.scope".into() }
    }

    #[test]
    fn an_absolute_path_is_taken_from_the_root_and_a_relative_one_from_beside_us() {
        let place = |path| match place(&unified(), path, "c1", false).unwrap() {
            Cgroup::V2 { path, .. } => path,
            Cgroup::V1 { .. } | Cgroup::None => unreachable!("the layout is unified"),
        };
        assert_eq!(place(Some(Path::new("/default/c1"))), Path::new("/sys/fs/cgroup/default/c1"));
        assert_eq!(place(Some(Path::new("mine"))), Path::new("/sys/fs/cgroup/user.slice/mine"));
        assert_eq!(place(None), Path::new("/sys/fs/cgroup/user.slice/c1"));
    }

    #[test]
    fn paths_that_leave_the_tree_or_are_its_root_are_refused() {
        for bad in ["../x", "/a/../../b", "/", "system.slice:runx:c1"] {
            assert!(place(&unified(), Some(Path::new(bad)), "c1", false).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_state_of_before_there_were_units_is_read() {
        let old: Cgroup = serde_json::from_str(r#"{"version": "2", "path": "/sys/fs/cgroup/c1"}"#).unwrap();
        assert_eq!(old.unit(), None);
        let unit = Unit { name: "a.scope".into(), slice: "b.slice".into() };
        let new = Cgroup::V1 { directories: Vec::new(), unit: Some(unit) };
        assert_eq!(serde_json::from_str::<Cgroup>(&serde_json::to_string(&new).unwrap()).unwrap(), new);
    }
}
