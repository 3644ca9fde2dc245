//! The group of one sandbox.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::files::{ControlFile, Setting, remove, write};
use super::system;
use crate::error::{Error, Result};

/// The highest number that a limit of processes takes: the kernel has no more.
const MOST_PROCESSES: u64 = 4 << 20;

/// The group of one sandbox. Without cgroups it is in none, and everything that is read is unknown.
#[derive(Debug, Default)]
pub(crate) struct LeaseGroup {
    pub(super) directories: Vec<PathBuf>,
    pub(super) birthplace: Option<OwnedFd>,
    pub(super) memory_peak: Option<ControlFile>,
    pub(super) memory_limit: Option<Setting>,
    /// With version 2.
    pub(super) memory_current: Option<Setting>,
    pub(super) swap_limit: Option<Setting>,
    pub(super) oom: Option<ControlFile>,
    pub(super) pids_peak: Option<ControlFile>,
    pub(super) pids_limit: Option<Setting>,
    pub(super) pids_current: Option<Setting>,
    pub(super) cpu: Option<ControlFile>,
}

impl LeaseGroup {
    pub(super) fn make(&mut self, path: PathBuf) -> Result<()> {
        if self.directories.contains(&path) {
            return Ok(());
        }
        fs::create_dir(&path).map_err(|e| system("make", &path, e))?;
        self.directories.push(path);
        Ok(())
    }

    pub(super) fn pids(&mut self, path: &Path) -> Result<()> {
        self.pids_peak = ControlFile::open(path, "pids.peak", false)?;
        self.pids_limit = Setting::find(path, "pids.max")?;
        self.pids_current = Setting::find(path, "pids.current")?;
        Ok(())
    }

    /// The directory to be born in, with version 2.
    pub(crate) fn birthplace(&self) -> Option<BorrowedFd<'_>> {
        self.birthplace.as_ref().map(AsFd::as_fd)
    }

    /// Puts the first process in, with version 1.
    pub(crate) fn enter(&self, pid: i32) -> Result<()> {
        for path in &self.directories {
            write(path, "cgroup.procs", &pid.to_string()).map_err(|e| system("enter", path, e))?;
        }
        Ok(())
    }

    /// Limits memory, and with it swap, to `bytes`.
    ///
    /// # Errors
    /// EBUSY if more is in use, and cannot be freed.
    pub(crate) fn limit_memory(&self, bytes: u64) -> Result<()> {
        let Some(memory) = &self.memory_limit else { return Ok(()) };
        self.reclaim(memory, bytes)?;
        let first = memory.write(bytes);
        if let Some(swap) = &self.swap_limit {
            // Neither may pass the other, so whichever way it goes one of the two writes comes first.
            let second = swap.write(bytes);
            if first.is_err() {
                memory.write(bytes).map_err(|e| memory.error("limit memory by", e))?;
            }
            return second.map_err(|e| swap.error("limit memory and swap by", e));
        }
        first.map_err(|e| memory.error("limit memory by", e))
    }

    /// With version 2 the kernel takes any limit, and ends processes, the init among them, until it holds. So what is in use is
    /// looked at before.
    fn reclaim(&self, memory: &Setting, bytes: u64) -> Result<()> {
        let (Some(current), Some(path)) = (&self.memory_current, self.directories.first()) else { return Ok(()) };
        let over = || Ok::<_, Error>(current.number()?.unwrap_or(0).saturating_sub(bytes));
        match over()? {
            0 => return Ok(()),
            // It fails where not all of it can be freed, and where the kernel does not know it.
            much => _ = write(path, "memory.reclaim", &much.to_string()),
        }
        match over()? {
            0 => Ok(()),
            _ => Err(memory.error("limit memory by", io::Error::from_raw_os_error(libc::EBUSY))),
        }
    }

    /// Limits processes and threads beside the init.
    pub(crate) fn limit_processes(&self, count: u64) -> Result<()> {
        let Some(file) = &self.pids_limit else { return Ok(()) };
        file.write(count.saturating_add(1).min(MOST_PROCESSES)).map_err(|e| file.error("limit processes by", e))
    }

    /// Whether it limits memory.
    pub(crate) fn limits_memory(&self) -> bool {
        self.memory_limit.is_some()
    }

    /// Whether it limits processes.
    pub(crate) fn limits_processes(&self) -> bool {
        self.pids_limit.is_some()
    }

    /// The processor time of all its processes until now, in nanoseconds.
    pub(crate) fn cpu_ns(&self) -> Option<u64> {
        let file = self.cpu.as_ref()?;
        if self.birthplace.is_some() {
            file.pair("usage_usec").map(|us| us.saturating_mul(1000))
        } else {
            file.number()
        }
    }

    /// The most memory it had, in bytes.
    pub(crate) fn memory_peak(&self) -> Option<u64> {
        self.memory_peak.as_ref()?.number()
    }

    /// Begins the peak anew, where the kernel can. Returns whether it did.
    pub(crate) fn reset_memory_peak(&self) -> bool {
        self.memory_peak.as_ref().is_some_and(|file| file.write(0).is_ok())
    }

    /// How many of its processes were ended for want of memory.
    pub(crate) fn oom_kills(&self) -> u64 {
        self.oom.as_ref().and_then(|file| file.pair("oom_kill")).unwrap_or(0)
    }

    /// The most processes at once, beside the init.
    pub(crate) fn processes_peak(&self) -> Option<u64> {
        self.pids_peak.as_ref()?.number().map(|count| count.saturating_sub(1))
    }

    /// Processes now, with the init.
    pub(crate) fn processes(&self) -> Result<Option<u64>> {
        self.pids_current.as_ref().map_or(Ok(None), Setting::number)
    }

    /// Removes it. All processes have to be gone or going. What fails can be tried again later.
    pub(crate) fn remove(&mut self, patience: Duration) -> Result<()> {
        // Its files are closed first; nobody asks a group that goes.
        let mut closed = Self::default();
        std::mem::swap(&mut closed.directories, &mut self.directories);
        *self = closed;
        while let Some(path) = self.directories.last() {
            remove(path, patience)?;
            self.directories.pop();
        }
        Ok(())
    }
}

/// One that was not removed, since making it failed half way or the pool goes, is tried once: the pool's own group takes the
/// rest with it.
impl Drop for LeaseGroup {
    fn drop(&mut self) {
        for path in &self.directories {
            let _ = fs::remove_dir(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_removed_can_be_removed_later() {
        let place = tempfile::TempDir::with_prefix("runx-pool-test-").unwrap();
        let mut group = LeaseGroup::default();
        for name in ["first", "second"] {
            group.make(place.path().join(name)).unwrap();
        }
        let file = place.path().join("first/file");
        fs::write(&file, "").unwrap();
        assert!(group.remove(Duration::ZERO).is_err());
        fs::remove_file(&file).unwrap();
        group.remove(Duration::ZERO).unwrap();
        assert_eq!(fs::read_dir(place.path()).unwrap().count(), 0);
    }

    #[test]
    fn one_that_is_given_up_half_way_leaves_nothing() {
        let place = tempfile::TempDir::with_prefix("runx-pool-test-").unwrap();
        let mut group = LeaseGroup::default();
        group.make(place.path().join("first")).unwrap();
        assert!(group.make(place.path().join("none/second")).is_err());
        drop(group);
        assert_eq!(fs::read_dir(place.path()).unwrap().count(), 0);
    }
}
