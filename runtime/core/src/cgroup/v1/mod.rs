//! cgroup version 1: a hierarchy for each controller.

mod resources;
mod stats;

use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use super::Directory;
use super::devices::Rule;
use super::files::{is_gone, make_directories, read, refuse_frozen, refuse_occupied, write};
use crate::error::{Context, Error, Result};

pub(super) use resources::apply;
pub(super) use stats::stats;

fn find<'a>(directories: &'a [Directory], controller: &str) -> Option<&'a Path> {
    directories.iter().find(|d| d.controllers.iter().any(|c| c == controller)).map(|d| d.path.as_path())
}

/// The directory of a controller that a limit needs.
fn need<'a>(directories: &'a [Directory], controller: &str, field: &str) -> Result<&'a Path> {
    find(directories, controller).ok_or_else(|| {
        Error::unsupported(
            format!("linux.resources.{field}"),
            format!("the cgroup controller {controller:?} is not mounted on this machine"),
        )
    })
}

/// Makes the directories. On failure those that were not there before are removed again.
pub(super) fn create(directories: &[Directory]) -> Result<()> {
    let mut made = Vec::new();
    let created = directories.iter().try_for_each(|directory| create_one(directory, &mut made));
    if created.is_err() {
        for path in made {
            let _ = fs::remove_dir(path);
        }
    }
    created
}

/// Makes one directory, and notes it if it was not there.
fn create_one<'a>(directory: &'a Directory, made: &mut Vec<&'a Path>) -> Result<()> {
    match fs::create_dir(&directory.path) {
        Ok(()) => made.push(&directory.path),
        Err(e) if is_gone(&e) => {
            make_directories(&directory.path).on("create cgroup", &directory.path)?;
            made.push(&directory.path);
        }
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => refuse_occupied(&directory.path)?,
        Err(e) => return Err(e).on("create cgroup", &directory.path),
    }
    if directory.controllers.iter().any(|c| c == "cpuset") {
        inherit_cpuset(&directory.path)?;
    }
    if directory.controllers.iter().any(|c| c == "freezer") {
        refuse_frozen(&directory.path, has_frozen_state(&directory.path))?;
    }
    Ok(())
}

/// A new cpuset is empty, and no process can be put into an empty one.
pub(super) fn inherit_cpuset(directory: &Path) -> Result<()> {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        if read(directory, file).on("read cpuset of", directory)?.is_empty() {
            let Some(parent) = directory.parent() else { return Ok(()) };
            if read(parent, file).unwrap_or_default().is_empty() {
                inherit_cpuset(parent)?;
            }
            let value = read(parent, file).on("read cpuset of", parent)?;
            write(directory, file, value)?;
        }
    }
    Ok(())
}

pub(super) fn join(directories: &[Directory], pid: i32) -> Result<()> {
    let pid = pid.to_string();
    for directory in directories {
        write(&directory.path, "cgroup.procs", &pid)?;
    }
    Ok(())
}

/// Any hierarchy that the container is in tells its processes; prefer one that nothing else uses.
pub(super) fn membership(directories: &[Directory]) -> Option<&Path> {
    ["devices", "pids", "freezer", "memory"]
        .iter()
        .find_map(|controller| find(directories, controller))
        .or_else(|| directories.first().map(|d| d.path.as_path()))
}

/// The directory of the controller `cpu`.
pub(super) fn processor(directories: &[Directory]) -> Option<&Path> {
    find(directories, "cpu")
}

/// The directory of the controller `memory`.
pub(super) fn memory(directories: &[Directory]) -> Option<&Path> {
    find(directories, "memory")
}

pub(super) fn apply_devices(directories: &[Directory], rules: &[Rule]) -> Result<()> {
    let Some(directory) = find(directories, "devices") else {
        return Err(Error::unsupported(
            "a container on this machine",
            "the cgroup controller \"devices\", which keeps it from the host's devices, is not mounted",
        ));
    };
    for rule in rules {
        let file = if rule.allow { "devices.allow" } else { "devices.deny" };
        if rule.is_everything() {
            write(directory, file, "a")?;
        } else {
            write(directory, file, rule.v1_text())?;
        }
    }
    Ok(())
}

pub(super) fn set_frozen(directories: &[Directory], frozen: bool) -> Result<()> {
    let directory = need(directories, "freezer", "freezer")?;
    if !frozen {
        // The kernel does not let a write return before the group has left FROZEN.
        return write(directory, "freezer.state", "THAWED");
    }
    let frozen = freeze(directory);
    if frozen.is_err() {
        // Half frozen is the worst state to leave it in.
        let _ = write(directory, "freezer.state", "THAWED");
    }
    frozen
}

/// Processes that appear while the group is being frozen can keep it FREEZING for ever. Asking again catches most
/// of them, and thawing for a moment lets the kernel catch the rest.
fn freeze(directory: &Path) -> Result<()> {
    const ATTEMPTS: u32 = 1000;
    for attempt in 1..=ATTEMPTS {
        if attempt % 50 == 0 {
            write(directory, "freezer.state", "THAWED")?;
            std::thread::sleep(Duration::from_millis(10));
        }
        write(directory, "freezer.state", "FROZEN")?;
        if attempt % 25 == 0 {
            std::thread::sleep(Duration::from_micros(10));
        }
        if read(directory, "freezer.state").on("read freezer.state of", directory)? == "FROZEN" {
            return Ok(());
        }
    }
    Err(io::Error::from_raw_os_error(libc::ETIMEDOUT)).on("freeze cgroup", directory)
}

/// Whether it was asked to freeze, by itself and not through a group above it.
pub(super) fn is_frozen(directories: &[Directory]) -> bool {
    let Some(directory) = find(directories, "freezer") else { return false };
    has_frozen_state(directory) && read(directory, "freezer.self_freezing").map_or(true, |own| own == "1")
}

/// Whether nothing runs in a group, because of itself or of one above it.
fn has_frozen_state(directory: &Path) -> bool {
    read(directory, "freezer.state").is_ok_and(|state| state == "FROZEN" || state == "FREEZING")
}
