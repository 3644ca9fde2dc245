//! One sandbox, from outside.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use runx_core::sys::{self, pidfd};

use super::process::Spawner;
use super::{Shared, lock};
use crate::error::{Error, Result};
use crate::group::LeaseGroup;
use crate::template::Template;
use crate::wire::channel::{Channel, LIMIT};
use crate::wire::messages::{FromInit, Look, ToInit};

/// How long an init may take for what takes it microseconds, on a machine that is busy with other things.
const PATIENCE: Duration = Duration::from_secs(10);

/// A sandbox and what is known of it.
pub(super) struct Sandbox {
    pub(super) channel: Channel,
    pub(super) buffer: Vec<u8>,
    pub(super) pidfd: OwnedFd,
    pub(super) group: Option<LeaseGroup>,
    pub(super) counts: Counts,
    /// The init's pid, to know its messages by; none of one that has ended before it could be asked for.
    pid: Option<i32>,
    /// It lives no longer than the spawner.
    spawner: Arc<Spawner>,
    born: Instant,
    uses: u32,
    look: Look,
    /// What limits its memory and processes now.
    pub(super) limits: (Option<u64>, Option<u64>),
}

/// What a group had counted when the last execution ended.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts {
    pub(super) cpu_ns: u64,
    pub(super) memory_peak: u64,
    pub(super) processes_peak: u64,
    pub(super) oom_kills: u64,
    /// Executions since it was made.
    pub(super) executions: u64,
}

impl Sandbox {
    /// Makes one, and waits until it is ready.
    pub(super) fn make(shared: &Shared, spawner: &Arc<Spawner>) -> Result<Self> {
        let wait = shared.group.is_entered();
        let mut group = shared.group.lease()?;
        let (channel, pidfd) = match spawner.make(&group, wait) {
            Ok(made) => made,
            Err(e) => {
                log_failure(group.remove(PATIENCE));
                return Err(e);
            }
        };
        let mut sandbox = Self {
            channel,
            buffer: vec![0; LIMIT],
            pidfd,
            group: Some(group),
            counts: Counts::default(),
            pid: None,
            spawner: Arc::clone(spawner),
            born: Instant::now(),
            uses: 0,
            look: Look::default(),
            limits: (None, None),
        };
        match sandbox.begin(&shared.template, wait).and_then(|()| sandbox.agree(shared)) {
            Ok(()) => Ok(sandbox),
            Err(e) => {
                log_failure(sandbox.destroy(PATIENCE));
                Err(e)
            }
        }
    }

    /// Puts it into its cgroups, while it mounts, and waits until it is ready.
    fn begin(&mut self, template: &Template, wait: bool) -> Result<()> {
        self.pid = pidfd::pid(self.pidfd.as_fd()).ok();
        let mut entered = true;
        if let (Some(group), Some(pid)) = (&self.group, self.pid) {
            if let Some(memory) = template.memory {
                group.limit_memory(memory)?;
            }
            if let Some(processes) = template.processes {
                group.limit_processes(processes)?;
            }
            if wait {
                match group.enter(pid) {
                    // It has failed and ended, and what it said about that is there.
                    Err(e) if e.errno() == Some(libc::ESRCH) => entered = false,
                    done => done?,
                }
            }
        }
        self.limits = (template.memory, template.processes);
        if wait && entered {
            // One that has failed does not hear it, and what it said is there.
            let _ = self.say(&ToInit::Entered);
        }
        match self.hear()?.0 {
            FromInit::Ready(look) if self.pid.is_some() => self.look = look,
            FromInit::Failed { message, errno } => return Err(Error::Setup { message, errno: errno as i32 }),
            _ => return Err(Error::Gone("it said something else than that it is ready".into())),
        }
        if self.look.processes {
            return Err(Error::Unclean("it is new, and a process is in it".into()));
        }
        // Its first answer is slower than others, so it is not the one that somebody waits for.
        self.ping()?;
        self.note();
        Ok(())
    }

    /// Remembers what has been counted until now.
    pub(super) fn note(&mut self) {
        let Some(group) = &self.group else { return };
        self.counts.cpu_ns = group.cpu_ns().unwrap_or(0);
        if self.counts.executions == 0 {
            return;
        }
        self.counts.memory_peak = group.memory_peak().unwrap_or(0);
        self.counts.processes_peak = group.processes_peak().unwrap_or(0);
        self.counts.oom_kills = group.oom_kills();
    }

    /// Whether it, being new, is like the others of its spawner. Another spawner has the host's mounts as they are by then,
    /// so that what was changed there does not spoil the pool for ever.
    fn agree(&self, shared: &Shared) -> Result<()> {
        let agreed = lock(&self.spawner.looks).agree(self.look);
        if agreed.is_err() {
            super::count(&shared.counters.unclean);
        }
        agreed
    }

    /// How many leases it had and was reset after.
    pub(super) fn uses(&self) -> u32 {
        self.uses
    }

    pub(super) fn age(&self) -> Duration {
        self.born.elapsed()
    }

    /// Whether its init is there.
    pub(super) fn is_alive(&self) -> bool {
        pidfd::wait_ended(self.pidfd.as_fd(), 0).is_ok_and(|ended| !ended)
    }

    pub(super) fn say(&self, message: &ToInit) -> Result<()> {
        self.channel.send(&message.encode(), &[]).map_err(gone)
    }

    /// Waits for an answer. Anything that is none is the end of the sandbox.
    pub(super) fn hear(&mut self) -> Result<(FromInit, Vec<OwnedFd>)> {
        let there = sys::poll(self.channel.as_fd(), libc::POLLIN, PATIENCE.as_millis() as i32).map_err(gone)?;
        if !there {
            self.kill();
            return Err(Error::Gone("its init does not answer".into()));
        }
        self.read()
    }

    /// Reads what is there.
    pub(super) fn read(&mut self) -> Result<(FromInit, Vec<OwnedFd>)> {
        let received = self.channel.receive(&mut self.buffer).map_err(gone)?;
        if received.length == 0 {
            return Err(Error::Gone("its init has ended".into()));
        }
        if self.pid.is_some_and(|pid| pid != received.pid) {
            self.kill();
            return Err(Error::Gone("somebody else spoke for its init".into()));
        }
        match FromInit::decode(self.buffer.get(..received.length).unwrap_or_default()) {
            Ok(message) => Ok((message, received.fds)),
            Err(e) => {
                self.kill();
                Err(Error::Gone(format!("its init sent a {e}")))
            }
        }
    }

    /// Asks something that has one answer.
    pub(super) fn ask(&mut self, message: &ToInit) -> Result<(FromInit, Vec<OwnedFd>)> {
        self.say(message)?;
        self.hear()
    }

    pub(super) fn ping(&mut self) -> Result<()> {
        match self.ask(&ToInit::Ping)?.0 {
            FromInit::Pong => Ok(()),
            _ => Err(Error::Gone("it answered something else to a ping".into())),
        }
    }

    /// Makes it as new, as far as its namespaces allow, and proves it.
    pub(super) fn reset(&mut self, wipe: bool) -> Result<()> {
        let look = match self.ask(&ToInit::Reset { wipe })?.0 {
            FromInit::Ready(look) => look,
            _ => return Err(Error::Gone("it answered something else to a reset".into())),
        };
        let unclean = |what: String| Err(Error::Unclean(what));
        let processes = self.group.as_ref().map_or(Ok(None), LeaseGroup::processes)?;
        if look.processes || processes.is_some_and(|count| count != 1) {
            return unclean("a process is left".into());
        }
        if look.mounts != self.look.mounts || look.descriptors != self.look.descriptors {
            return unclean("its mounts or its init's descriptors are not what they were".into());
        }
        if wipe && look.ipc > 0 {
            return unclean(format!("{} objects of its IPC namespace are left", look.ipc));
        }
        self.uses += 1;
        Ok(())
    }

    /// Ends it, at once.
    pub(super) fn kill(&self) {
        // It may have ended.
        let _ = pidfd::send_signal(self.pidfd.as_fd(), libc::SIGKILL);
    }

    /// Ends it and removes its group. What fails can be tried again later.
    pub(super) fn destroy(&mut self, patience: Duration) -> Result<()> {
        self.kill();
        let waited = pidfd::wait_ended(self.pidfd.as_fd(), patience.as_millis() as i32);
        let ended = waited.map_err(|e| runx_core::Error::system("wait for a sandbox to end", e))?;
        if !ended {
            return Err(Error::Unclean("its processes do not end".into()));
        }
        self.group.as_mut().map_or(Ok(()), |group| group.remove(patience))?;
        self.group = None;
        Ok(())
    }
}

impl std::fmt::Debug for Sandbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sandbox").field("pid", &self.pid).field("uses", &self.uses).finish_non_exhaustive()
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        self.kill();
    }
}

/// What a spawner's new sandboxes looked like.
#[derive(Debug, Default)]
pub(super) struct Looks {
    first: Option<Look>,
    /// Another look, and how many had it in a row.
    other: Option<(Look, u32)>,
}

/// How many that are alike, and not like the first, show that this is no accident.
const MANY: u32 = 3;

impl Looks {
    /// Whether a new sandbox is like the others.
    fn agree(&mut self, look: Look) -> Result<()> {
        let first = *self.first.get_or_insert(look);
        if look == first {
            self.other = None;
            return Ok(());
        }
        let times = self.other.filter(|(other, _)| *other == look).map_or(1, |(_, times)| times + 1);
        self.other = Some((look, times));
        let what = format!("{look:?} instead of {first:?}");
        if times < MANY {
            return Err(Error::Unclean(format!("it is new and not like the others: {what}")));
        }
        log::warn!("all new sandboxes of a pool are not like those before: {what}; another spawner begins");
        Err(Error::Spawner(format!("its new sandboxes are not like those before: {what}")))
    }
}

/// What fails while something else is put right.
fn log_failure(result: Result<()>) {
    if let Err(e) = result {
        log::warn!("{e}");
    }
}

fn gone(error: std::io::Error) -> Error {
    Error::Gone(format!("its init cannot be reached: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_that_is_different_is_unclean_and_many_are_the_spawners_fault() {
        let look = |mounts| Look { mounts, ..Look::default() };
        let mut looks = Looks::default();
        assert!(looks.agree(look(1)).is_ok() && looks.agree(look(1)).is_ok());
        for other in [2, 2, 3, 3] {
            assert!(matches!(looks.agree(look(other)), Err(Error::Unclean(_))), "{other}");
        }
        assert!(looks.agree(look(1)).is_ok());
        assert!(matches!(looks.agree(look(3)), Err(Error::Unclean(_))));
        assert!(matches!(looks.agree(look(3)), Err(Error::Unclean(_))));
        assert!(matches!(looks.agree(look(3)), Err(Error::Spawner(_))));
    }
}
