//! Taking away what was made for a container.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use runx_core::cgroup::Refuge;
use runx_core::container::Runtime;
use runx_core::sys;

use super::record::{Containers, Lock, Phase, Record, is_there};
use super::{rootfs, volumes};
use crate::network;

/// Takes away what was made for a start: the network, and the mount of its root filesystem. Fine to repeat.
pub(super) fn take_down(root: &Path, directory: &Path, record: &Record) -> Result<()> {
    let detached = network::detach(root, &record.id);
    rootfs::unmount(directory, record)?;
    detached
}

/// What is done at the end of a container that is not started again.
pub(super) fn after_end(root: &Path, containers: &Containers, directory: &Path, record: &Record) {
    // What cannot be taken away now is tried again by the next start, or by rm: for that, what is known of it has to stay.
    if take_down(root, directory, record).is_ok() && record.options.auto_remove {
        let _ = discard(containers, directory, record, true);
    }
}

/// Removes what a container keeps. For the holder of the lock; there are no processes and no state of the core any more.
pub(super) fn discard(containers: &Containers, directory: &Path, record: &Record, with_volumes: bool) -> Result<()> {
    rootfs::remove(directory, record)?;
    if with_volumes {
        volumes::remove(containers, &record.volumes)?;
    }
    remove_directory(directory)
}

/// Removes a container's directory; the record goes first, with which it is one.
pub(super) fn remove_directory(directory: &Path) -> Result<()> {
    // Out of the way first: another container may have this id from now on.
    let name = directory.file_name().unwrap_or_default().to_string_lossy();
    let gone = directory.with_file_name(format!(".gone-{name}-{}", std::process::id()));
    let directory = if fs::rename(directory, &gone).is_ok() { gone.as_path() } else { directory };
    match fs::remove_dir_all(directory) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("remove {}", directory.display()))
        }
        _ => Ok(()),
    }
}

/// A directory that has no record for so long is nobody's any more.
const ABANDONED: Duration = Duration::from_secs(60);

/// Removes what commands left that were killed while they made or removed a container: nobody knows its name.
pub(super) fn sweep(containers: &Containers) {
    for entry in fs::read_dir(containers.root()).into_iter().flatten().flatten() {
        let (path, name) = (entry.path(), entry.file_name());
        if name.to_string_lossy().starts_with(".gone-") {
            // Who is removing it does not mind.
            let _ = fs::remove_dir_all(&path);
            continue;
        }
        let age = entry.metadata().and_then(|found| found.modified()).ok().and_then(|time| time.elapsed().ok());
        if is_there(&path) || age.is_none_or(|age| age < ABANDONED) {
            continue;
        }
        // Somebody may be filling it with a large copy.
        let Ok(Some(_lock)) = try_lock(&path) else { continue };
        if !is_there(&path) {
            let half = Record { id: name.to_string_lossy().into_owned(), ..Record::default() };
            if let Err(e) = discard(containers, &path, &half, false) {
                log::debug!("remove the rest of container {}: {}", half.id, crate::message(&e));
            }
        }
    }
}

/// The lock of a directory, unless somebody has it.
fn try_lock(directory: &Path) -> io::Result<Option<OwnedFd>> {
    let fd = sys::open(directory, libc::O_RDONLY | libc::O_DIRECTORY)?;
    // SAFETY: flock takes a descriptor and flags.
    let locked = unsafe { libc::flock(fd.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } == 0;
    Ok(locked.then_some(fd))
}

/// Removes everything of a container that has no processes, even what a killed command or monitor left.
pub(super) fn wipe(runtime: &Runtime, containers: &Containers, id: &str, lock: Lock, with_volumes: bool) -> Result<()> {
    let directory = containers.directory(id);
    let record = Record::read(&directory).ok();
    let own = |record: &Record| runtime.load(id).map_or_else(|_| true, |core| core.state().bundle == record.bundle);
    if record.as_ref().is_none_or(own) {
        runtime.delete_force(id)?;
    }
    let record = record.unwrap_or_else(|| Record { id: id.to_owned(), ..Record::default() });
    take_down(runtime.root(), &directory, &record)?;
    discard(containers, &directory, &record, with_volumes)?;
    if matches!(record.phase, Phase::Running | Phase::Restarting) {
        // Its monitor was killed.
        Refuge::sweep();
    }
    drop(lock);
    Ok(())
}
