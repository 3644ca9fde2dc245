//! The processes of a group and those below it: who they are, ending them, and removing the emptied groups.

use std::fs;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use super::files;
use crate::error::{Context, Result};

/// How long the kernel may take to end what was killed, and to let go of an emptied group.
const PATIENCE: Duration = Duration::from_secs(10);

/// Whether an error says that the group is not there, or no more.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV))
}

/// The pids of all processes in this PID namespace. A group that is not there has none.
pub(super) fn list(directory: &Path) -> Result<Vec<i32>> {
    let mut pids = Vec::new();
    collect(directory, &mut pids).on("read the processes of cgroup", directory)?;
    Ok(pids)
}

fn collect(directory: &Path, pids: &mut Vec<i32>) -> io::Result<()> {
    match fs::read_to_string(directory.join("cgroup.procs")) {
        // Pid 0 is a process of another PID namespace, which cannot be named from here.
        Ok(text) => pids.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()).filter(|pid| *pid > 0)),
        Err(e) if is_gone(&e) => return Ok(()),
        // A threaded group of version 2 lists its processes in the domain above it.
        Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
        Err(e) => return Err(e),
    }
    for child in children(directory) {
        collect(&child, pids)?;
    }
    Ok(())
}

fn children(directory: &Path) -> impl Iterator<Item = std::path::PathBuf> {
    fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
}

/// Sends `SIGKILL` to every process until none is left.
///
/// `freeze` stops them all, so that what forks faster than it is killed is caught, and `thaw` lets them die.
pub(super) fn kill(directory: &Path, freeze: impl Fn(), thaw: impl Fn()) -> Result<()> {
    // The kernel's own way, of version 2 since 5.14: nothing escapes it, and the frozen die, too.
    if files::try_write(directory, "cgroup.kill", "1").is_ok() {
        return wait_empty(directory);
    }
    let deadline = Instant::now() + PATIENCE;
    for attempt in 0u32.. {
        let stop = attempt > 4;
        if stop {
            freeze();
        }
        let pids = list(directory)?;
        for pid in &pids {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(*pid), nix::sys::signal::Signal::SIGKILL);
        }
        if stop || !pids.is_empty() {
            thaw();
        }
        if pids.is_empty() {
            return Ok(());
        }
        if Instant::now() > deadline {
            break;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Err(io::Error::from_raw_os_error(libc::EBUSY)).on("end the processes of cgroup", directory)
}

fn wait_empty(directory: &Path) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !list(directory)?.is_empty() {
        if Instant::now() > deadline {
            return Err(io::Error::from_raw_os_error(libc::EBUSY)).on("end the processes of cgroup", directory);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Removes a group and those that were made below it. What is not there is fine.
pub(super) fn remove_tree(directory: &Path) -> Result<()> {
    // The last process leaves its group a little after its parent has reaped it.
    let deadline = Instant::now() + PATIENCE;
    let mut pause = Duration::from_micros(100);
    loop {
        match fs::remove_dir(directory) {
            Ok(()) => return Ok(()),
            Err(e) if is_gone(&e) => return Ok(()),
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) && Instant::now() < deadline => {}
            // A hierarchy that is read-only here says so even of what does not exist.
            Err(_) if !directory.exists() => return Ok(()),
            Err(e) => return Err(e).on("remove cgroup", directory),
        }
        let mut nested = false;
        for child in children(directory) {
            nested = true;
            remove_tree(&child)?;
        }
        if !nested {
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(20));
        }
    }
}
