//! cgroup version 2: one tree.

mod resources;
mod stats;

use std::fs;
use std::io::{self, Read, Seek};
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, poll};

use super::files::{
    is_gone, make_directories, pair, read, read_pairs, refuse_frozen, refuse_occupied, try_write, write,
};
use crate::error::{Context, Error, Result};

pub(super) use resources::apply;
pub(super) use stats::stats;

const ROOT: &str = "/sys/fs/cgroup";

/// Makes the directory, with those above it, and gives it every controller that it can have.
pub(super) fn create(path: &Path) -> Result<()> {
    make(path)?;
    let enabled = enable(path);
    if enabled.is_err() {
        let _ = fs::remove_dir(path);
    }
    enabled
}

/// Makes the directory, with those above it.
pub(super) fn make(path: &Path) -> Result<()> {
    let fresh = match fs::create_dir(path) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
            refuse_occupied(path)?;
            false
        }
        Err(e) if is_gone(&e) => make_directories(path).on("create cgroup", path).map(|()| true)?,
        other => other.on("create cgroup", path).map(|()| true)?,
    };
    // The kernel tells of those above here, too.
    let frozen = pair(&read_pairs(path, "cgroup.events"), "frozen") == 1 || is_frozen(path);
    let usable = refuse_frozen(path, frozen);
    if usable.is_err() && fresh {
        let _ = fs::remove_dir(path);
    }
    usable
}

/// Enables every controller in all groups above.
///
/// What cannot be enabled is not an error yet: a limit that needs it fails by name when it is set.
///
/// # Errors
/// When no process can be put into the group.
pub(super) fn enable(path: &Path) -> Result<()> {
    let controllers = read(Path::new(ROOT), "cgroup.controllers").on("read the controllers of", ROOT)?;
    let all = controllers.split_ascii_whitespace().map(|c| format!("+{c}")).collect::<Vec<_>>();
    let mut above: Vec<&Path> = path.ancestors().skip(1).take_while(|ancestor| ancestor.starts_with(ROOT)).collect();
    above.reverse();
    for directory in above {
        let Err(e) = try_write(directory, "cgroup.subtree_control", &all.join(" ")) else { continue };
        // In a group with processes only controllers of threads could be enabled, and these would make the groups
        // below it useless for ours.
        if e.raw_os_error() == Some(libc::EBUSY) {
            log::debug!("cgroup {} has processes, so it passes no controllers on", directory.display());
            continue;
        }
        for controller in &all {
            if let Err(e) = try_write(directory, "cgroup.subtree_control", controller) {
                log::debug!("enable {controller} in cgroup {}: {e}", directory.display());
            }
        }
    }
    match read(path, "cgroup.type").unwrap_or_default().as_str() {
        kind @ ("domain invalid" | "threaded") => Err(Error::spec(format!(
            "linux.cgroupsPath: cgroup {} is {kind:?}, below a group of threads: no process can be put there",
            path.display()
        ))),
        _ => Ok(()),
    }
}

/// Whether the group has given its controllers away, so that no process can be in itself.
pub(super) fn is_delegated(path: &Path) -> bool {
    read(path, "cgroup.subtree_control").is_ok_and(|controllers| !controllers.is_empty())
}

/// Gives the group to a user, who may then make groups below it and move its processes among them, but not change
/// its limits: only the files that the kernel lists change hands.
pub(super) fn delegate(path: &Path, uid: u32) -> Result<()> {
    let listed = fs::read_to_string("/sys/kernel/cgroup/delegate")
        .unwrap_or_else(|_| "cgroup.procs\ncgroup.subtree_control\ncgroup.threads\n".to_owned());
    let chown = |path: &Path| std::os::unix::fs::chown(path, Some(uid), None);
    chown(path).on("change the owner of cgroup", path)?;
    for file in listed.lines().filter(|file| !file.is_empty() && !file.contains('/')) {
        match chown(&path.join(file)) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            other => other.on("change the owner of", path.join(file))?,
        }
    }
    Ok(())
}

pub(super) fn set_frozen(path: &Path, frozen: bool) -> Result<()> {
    write(path, "cgroup.freeze", if frozen { "1" } else { "0" })?;
    let mut events = fs::File::open(path.join("cgroup.events")).on("open cgroup.events of", path)?;
    let deadline = Instant::now() + Duration::from_secs(10);
    let wanted = if frozen { "frozen 1" } else { "frozen 0" };
    while Instant::now() < deadline {
        let mut text = String::new();
        events.rewind().and_then(|()| events.read_to_string(&mut text)).on("read cgroup.events of", path)?;
        if text.lines().any(|line| line == wanted) {
            return Ok(());
        }
        // The kernel wakes whoever waits with a file that he has read.
        let _ = poll(&mut [PollFd::new(events.as_fd(), PollFlags::POLLPRI)], 100u8);
    }
    if frozen {
        // Half frozen is the worst state to leave it in.
        let _ = write(path, "cgroup.freeze", "0");
    }
    Err(io::Error::from_raw_os_error(libc::ETIMEDOUT)).on(if frozen { "freeze cgroup" } else { "thaw cgroup" }, path)
}

pub(super) fn is_frozen(path: &Path) -> bool {
    read(path, "cgroup.freeze").is_ok_and(|state| state == "1")
}
