//! Control groups: where a container's are, its limits, its processes and statistics.
//!
//! Two layouts exist. With version 2 there is one tree and a process is born in its group
//! (`CLONE_INTO_CGROUP`). With version 1, or the hybrid of both, there is a tree for each controller and
//! a process must be moved into each; the first such move after a pause costs the kernel several
//! milliseconds, so the parent does it while the child is busy with its mounts.

mod devices;
mod layout;
mod stats;
mod v1;
mod v2;

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use oci_spec::runtime::{LinuxMemory, LinuxResources};
use serde::{Deserialize, Serialize};

use crate::error::{Context, Error, Result};
use crate::sys;

pub use layout::{Hierarchy, Layout};
pub use stats::{Blkio, BlkioEntry, CpuStats, HugetlbStats, MemoryStats, PidsStats, Stats};

/// The cgroups of one container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "version")]
pub enum Cgroup {
    /// One directory for each hierarchy of version 1.
    #[serde(rename = "1")]
    V1 {
        /// The container's directories.
        directories: Vec<Directory>,
    },
    /// One directory in the unified tree.
    #[serde(rename = "2")]
    V2 {
        /// The container's directory.
        path: PathBuf,
    },
}

/// The container's directory in one hierarchy of version 1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Directory {
    /// The controllers of the hierarchy, `name=…` for one without.
    pub controllers: Vec<String>,
    /// The directory's absolute path.
    pub path: PathBuf,
}

/// Where a container's cgroups are to be, before they are made.
///
/// # Errors
/// [`Error::InvalidSpec`] for a path that leaves the tree, [`Error::Unsupported`] for one in systemd's
/// form, and system errors where no cgroup filesystem is mounted.
pub fn place(layout: &Layout, cgroups_path: Option<&Path>, id: &str) -> Result<Cgroup> {
    if let Some(path) = cgroups_path {
        let text = path.to_string_lossy();
        if text.matches(':').count() == 2 && !text.starts_with('/') {
            return Err(Error::unsupported(
                format!("linux.cgroupsPath {text:?}"),
                "it is in systemd's form (slice:prefix:name), and the systemd cgroup driver is not implemented: \
                 let the engine use the cgroupfs driver",
            ));
        }
        if path.components().any(|part| matches!(part, std::path::Component::ParentDir)) {
            return Err(Error::spec(format!("linux.cgroupsPath {text:?} contains \"..\"")));
        }
        if path.components().all(|part| matches!(part, std::path::Component::RootDir)) {
            return Err(Error::spec(format!("linux.cgroupsPath {text:?} is the root of the hierarchy")));
        }
    }
    let relative = cgroups_path.unwrap_or(Path::new(id));
    Ok(match layout {
        Layout::V2 { root, own } => {
            // The group this process is in has processes, so no controllers can be enabled for groups
            // below it; its parent's can.
            let base = if relative.is_absolute() { Path::new("/") } else { own.parent().unwrap_or(Path::new("/")) };
            Cgroup::V2 { path: below(root, base, relative) }
        }
        Layout::V1 { hierarchies } => Cgroup::V1 {
            directories: hierarchies
                .iter()
                .map(|hierarchy| Directory {
                    controllers: hierarchy.controllers.clone(),
                    path: below(
                        &hierarchy.mount,
                        if relative.is_absolute() { Path::new("/") } else { &hierarchy.own },
                        relative,
                    ),
                })
                .collect(),
        },
    })
}

fn below(mount: &Path, base: &Path, relative: &Path) -> PathBuf {
    let strip = |path: &Path| path.strip_prefix("/").map(Path::to_path_buf).unwrap_or_else(|_| path.to_path_buf());
    mount.join(strip(base)).join(strip(relative))
}

impl Cgroup {
    /// Makes the directories. Those that exist already are an error if a process is in them, since two
    /// containers would share limits and be killed together.
    pub fn create(&self) -> Result<()> {
        match self {
            Self::V1 { directories } => v1::create(directories),
            Self::V2 { path } => v2::create(path),
        }
    }

    /// Sets the limits that `resources` names and leaves the others.
    pub fn apply(&self, resources: &LinuxResources) -> Result<()> {
        match self {
            Self::V1 { directories } => v1::apply(directories, resources),
            Self::V2 { path } => v2::apply(path, resources),
        }
    }

    /// The rules of `resources.devices` and those that every container needs.
    pub fn apply_devices(&self, resources: Option<&LinuxResources>) -> Result<()> {
        let rules = devices::rules(resources)?;
        match self {
            Self::V1 { directories } => v1::apply_devices(directories, &rules),
            Self::V2 { path } => devices::attach(path, &rules),
        }
    }

    /// The directory to clone a process into, where the kernel can.
    pub fn birthplace(&self) -> Result<Option<OwnedFd>> {
        match self {
            Self::V1 { .. } => Ok(None),
            Self::V2 { path } => sys::open(path, libc::O_PATH | libc::O_DIRECTORY).on("open cgroup", path).map(Some),
        }
    }

    /// Moves a process into every hierarchy of version 1; with version 2 it was born there.
    pub fn join(&self, pid: i32) -> Result<()> {
        match self {
            Self::V1 { directories } => v1::join(directories, pid),
            Self::V2 { .. } => Ok(()),
        }
    }

    /// The directory that tells which processes there are.
    fn membership(&self) -> Option<&Path> {
        match self {
            Self::V1 { directories } => v1::membership(directories),
            Self::V2 { path } => Some(path),
        }
    }

    /// Whether the container's directory is there.
    pub fn exists(&self) -> bool {
        self.membership().is_some_and(Path::exists)
    }

    /// The pids of all processes, in groups below the container's too, in this PID namespace.
    pub fn pids(&self) -> Result<Vec<i32>> {
        let mut pids = Vec::new();
        if let Some(directory) = self.membership() {
            collect_pids(directory, &mut pids).on("read the processes of cgroup", directory)?;
        }
        Ok(pids)
    }

    /// Sends `SIGKILL` to every process until none is left, thawing what is frozen.
    pub fn kill_all(&self) -> Result<()> {
        if let Self::V2 { path } = self
            && fs::write(path.join("cgroup.kill"), "1").is_ok()
        {
            return self.wait_empty();
        }
        // Killing and listing race with forks; a process that was born in between is seen next time.
        for _ in 0..100 {
            let pids = self.pids()?;
            if pids.is_empty() {
                return Ok(());
            }
            for pid in pids {
                // SAFETY: the pid was read from the container's own cgroup just now.
                unsafe { libc::kill(pid, libc::SIGKILL) };
            }
            let _ = self.thaw();
            std::thread::sleep(Duration::from_millis(1));
        }
        self.wait_empty()
    }

    fn wait_empty(&self) -> Result<()> {
        for _ in 0..2000 {
            if self.pids()?.is_empty() {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Err(Error::system(
            format!("wait for the processes of cgroup {:?} to end", self.membership()),
            io::Error::from_raw_os_error(libc::EBUSY),
        ))
    }

    /// Stops every process where it is, and returns once all have stopped.
    pub fn freeze(&self) -> Result<()> {
        match self {
            Self::V1 { directories } => v1::set_frozen(directories, true),
            Self::V2 { path } => v2::set_frozen(path, true),
        }
    }

    /// Lets stopped processes go on.
    pub fn thaw(&self) -> Result<()> {
        match self {
            Self::V1 { directories } => v1::set_frozen(directories, false),
            Self::V2 { path } => v2::set_frozen(path, false),
        }
    }

    /// Whether the processes are stopped by [`Self::freeze`].
    pub fn is_frozen(&self) -> bool {
        match self {
            Self::V1 { directories } => v1::is_frozen(directories),
            Self::V2 { path } => v2::is_frozen(path),
        }
    }

    /// What the kernel counts for the container.
    ///
    /// # Errors
    /// `ENOENT` when its directories are gone.
    pub fn stats(&self) -> Result<Stats> {
        match self {
            Self::V1 { directories } => v1::stats(directories),
            Self::V2 { path } => v2::stats(path),
        }
    }

    /// Removes the directories, and those that the container made below them. What is not there is fine.
    pub fn remove(&self) -> Result<()> {
        match self {
            Self::V1 { directories } => {
                for directory in directories {
                    remove_tree(&directory.path)?;
                }
                Ok(())
            }
            Self::V2 { path } => remove_tree(path),
        }
    }

    /// All directories.
    pub fn paths(&self) -> Vec<&Path> {
        match self {
            Self::V1 { directories } => directories.iter().map(|directory| directory.path.as_path()).collect(),
            Self::V2 { path } => vec![path],
        }
    }
}

fn collect_pids(directory: &Path, pids: &mut Vec<i32>) -> io::Result<()> {
    match fs::read_to_string(directory.join("cgroup.procs")) {
        // Pid 0 is a process of another PID namespace, which cannot be named from here.
        Ok(text) => pids.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()).filter(|pid| *pid != 0)),
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENODEV)) => return Ok(()),
        // A threaded group of version 2 lists its processes in its parent.
        Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
        Err(e) => return Err(e),
    }
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            collect_pids(&entry.path(), pids)?;
        }
    }
    Ok(())
}

fn remove_tree(directory: &Path) -> Result<()> {
    // The last process leaves its group a little after its parent has reaped it.
    for attempt in 0..200 {
        match fs::remove_dir(directory) {
            Ok(()) => return Ok(()),
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENODEV)) => return Ok(()),
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
                for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
                    if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                        remove_tree(&entry.path())?;
                    }
                }
                if attempt > 0 {
                    std::thread::sleep(Duration::from_millis(if attempt < 20 { 1 } else { 10 }));
                }
            }
            Err(e) => return Err(e).on("remove cgroup", directory),
        }
    }
    Err(io::Error::from_raw_os_error(libc::EBUSY)).on("remove cgroup", directory)
}

/// Writes one setting; the error names the file and the value.
fn write(directory: &Path, file: &str, value: impl AsRef<str>) -> Result<()> {
    let value = value.as_ref();
    fs::write(directory.join(file), value)
        .with_context(|| format!("write {value:?} to {}", directory.join(file).display()))
}

fn read(directory: &Path, file: &str) -> io::Result<String> {
    fs::read_to_string(directory.join(file)).map(|text| text.trim_end().to_owned())
}

fn read_number(directory: &Path, file: &str) -> Option<u64> {
    let text = read(directory, file).ok()?;
    if text == "max" { Some(u64::MAX) } else { text.parse().ok() }
}

/// The lines of a `key value` file.
fn read_pairs(directory: &Path, file: &str) -> Vec<(String, u64)> {
    let text = read(directory, file).unwrap_or_default();
    text.lines()
        .filter_map(|line| {
            let (key, value) = line.split_once(' ')?;
            Some((key.to_owned(), value.parse().ok()?))
        })
        .collect()
}

/// `memory.checkBeforeUpdate`: a limit below what is in use is refused, where it would else kill.
fn check_before_update(directory: &Path, usage: &str, memory: &LinuxMemory) -> Result<()> {
    let Some(limit) = memory.limit().and_then(|limit| u64::try_from(limit).ok()).filter(|limit| *limit != 0) else {
        return Ok(());
    };
    let used = read_number(directory, usage).unwrap_or(0);
    if memory.check_before_update() == Some(true) && used > limit {
        return Err(Error::spec(format!("linux.resources.memory.limit {limit} is less than the {used} bytes in use")));
    }
    Ok(())
}

fn refuse_occupied(directory: &Path) -> Result<()> {
    let text = read(directory, "cgroup.procs").unwrap_or_default();
    if text.lines().next().is_some() {
        return Err(Error::spec(format!(
            "linux.cgroupsPath: cgroup {} is not empty: another container or process uses it",
            directory.display()
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unified() -> Layout {
        Layout::V2 { root: "/sys/fs/cgroup".into(), own: "/user.slice/session.scope".into() }
    }

    #[test]
    fn an_absolute_path_is_taken_from_the_root_and_a_relative_one_from_beside_us() {
        let place = |path| match place(&unified(), path, "c1").unwrap() {
            Cgroup::V2 { path } => path,
            Cgroup::V1 { .. } => unreachable!("the layout is unified"),
        };
        assert_eq!(place(Some(Path::new("/default/c1"))), Path::new("/sys/fs/cgroup/default/c1"));
        assert_eq!(place(Some(Path::new("mine"))), Path::new("/sys/fs/cgroup/user.slice/mine"));
        assert_eq!(place(None), Path::new("/sys/fs/cgroup/user.slice/c1"));
    }

    #[test]
    fn paths_that_leave_the_tree_or_are_its_root_are_refused() {
        for bad in ["../x", "/a/../../b", "/", "system.slice:runx:c1"] {
            assert!(place(&unified(), Some(Path::new(bad)), "c1").is_err(), "{bad}");
        }
    }
}
