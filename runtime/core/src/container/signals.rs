//! A container's processes: who they are, and signals to them.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use super::Container;
use crate::cgroup::Cgroup;
use crate::error::{Context, Error, Result};
use crate::sys::pidfd;

impl Container {
    /// All its processes.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for one without a cgroup in a PID namespace that it shares with others.
    pub fn pids(&self) -> Result<Vec<i32>> {
        match &self.state.cgroup {
            Cgroup::None if self.state.own_pid_namespace => self.pids_in_namespace(),
            Cgroup::None => Err(Error::unsupported(
                "a list of processes",
                "the container has neither a cgroup nor a PID namespace of its own",
            )),
            cgroup => cgroup.pids(),
        }
    }

    /// The processes in the first one's PID namespace, and of those below it none that this user may not look at.
    fn pids_in_namespace(&self) -> Result<Vec<i32>> {
        let namespace = |pid: i32| fs::metadata(format!("/proc/{pid}/ns/pid")).map(|file| (file.dev(), file.ino()));
        let Some(init) = self.pid() else { return Ok(Vec::new()) };
        let own = namespace(init).with_context(|| format!("look at the PID namespace of process {init}"))?;
        let all = fs::read_dir("/proc").on("list", "/proc")?.flatten();
        let mut pids: Vec<i32> = all
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .filter(|pid| namespace(*pid).is_ok_and(|of| of == own))
            .collect();
        pids.sort_unstable();
        Ok(pids)
    }

    /// Sends a signal to the first process, or to all of the container.
    ///
    /// # Errors
    /// [`Error::Finished`] if the first process has ended (and `all` is not asked for).
    pub fn kill(&self, signal: i32, all: bool) -> Result<()> {
        if all {
            return self.kill_all(signal);
        }
        let last_resort = signal == libc::SIGKILL && !self.state.own_pid_namespace;
        match self.first_process().and_then(|init| self.signal_first(&init, signal)) {
            // In a PID namespace shared with others its children outlive it.
            Err(Error::Finished) if last_resort && !self.pids()?.is_empty() => {}
            other => other?,
        }
        if signal != libc::SIGKILL {
            return Ok(());
        }
        // Who is freezing the container now is waited for, since frozen processes die only when they are thawed.
        match self.lock() {
            Ok((_lock, current, _)) if last_resort => current.state.cgroup.kill_all(),
            Ok((_lock, current, _)) if current.state.cgroup.is_frozen() => current.state.cgroup.thaw(),
            Ok(_) | Err(Error::NotFound(_)) => Ok(()),
            Err(e) => Err(e),
        }
    }

    fn signal_first(&self, init: &OwnedFd, signal: i32) -> Result<()> {
        match pidfd::send_signal(init.as_fd(), signal) {
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => Err(Error::Finished),
            other => other.with_context(|| format!("send signal {signal} to container {:?}", self.state.id)),
        }
    }

    fn kill_all(&self, signal: i32) -> Result<()> {
        // Cgroups go by name: they shall not be those of another container that got this one's id since.
        let _lock = self.lock()?;
        if signal == libc::SIGKILL && self.state.cgroup != Cgroup::None {
            return self.state.cgroup.kill_all();
        }
        let processes: Vec<_> =
            self.pids()?.into_iter().filter_map(|pid| Some((pid, pidfd::open(pid).ok()?))).collect();
        // A pid may have become another process's before it was opened. Those that are listed still, and are
        // held now, are the container's.
        let still = self.pids()?;
        for (_, process) in processes.iter().filter(|(pid, _)| still.contains(pid)) {
            // It may have ended in this moment.
            let _ = pidfd::send_signal(process.as_fd(), signal);
        }
        Ok(())
    }
}
