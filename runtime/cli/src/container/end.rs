//! Ending containers, several at once: each is asked, and killed when its time is over.

use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use runx_core::Error;
use runx_core::cgroup::Refuge;
use runx_core::container::Container;
use runx_core::sys::pidfd;

use super::record::{Containers, Identity, NoContainer, Phase, Record, now};
use super::status::{Seen, Status};
use super::turn::{Changes, Locker};
use super::{each, remove, stop};
use crate::{Context, Failure};

/// A monitor is done with clearing up by then.
const CLEARING: Duration = Duration::from_secs(20);
/// What was killed has died by then.
const DYING: Duration = Duration::from_secs(10);
/// A monitor is at it for a moment as a rule: so often it is only looked again, which costs less than to wait.
const LOOKS: u32 = 15;
/// The pause between these.
const MOMENT: Duration = Duration::from_millis(2);
/// The pause before the next look where the kernel has nothing to wait with: a user may watch and clone only so much.
const PAUSE: Duration = Duration::from_millis(50);
/// Longer than that nobody waits.
const LONGEST: Duration = Duration::from_secs(i32::MAX as u64 / 1000);

/// How containers are to be ended, where that is not as they say themselves.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct How {
    /// How long they have after they were asked.
    pub(super) timeout: Option<Duration>,
    /// What asks them.
    pub(super) signal: Option<i32>,
}

/// Ends the containers that `find` finds by words, all at once, and then does something for each in the order of the words.
/// `then` is told whether the container was ended: not if it has no record, or was named twice.
pub(super) fn each_ended(
    context: &Context,
    containers: &Containers,
    words: &[String],
    how: How,
    find: impl FnMut(&String) -> Result<Option<String>>,
    mut then: impl FnMut(&str, bool) -> Result<()>,
) -> Result<u8, Failure> {
    let found: Vec<_> = words.iter().map(find).collect();
    let mut ids: Vec<&str> = Vec::new();
    for id in found.iter().flatten().flatten() {
        if !ids.contains(&id.as_str()) && Record::read(&containers.directory(id)).is_ok() {
            ids.push(id);
        }
    }
    let ended = all(context, containers, &ids, how);
    let mut ended: HashMap<String, Result<()>> = ids.into_iter().map(str::to_owned).zip(ended).collect();
    let mut found = found.into_iter();
    each(words, |word| {
        if let Some(id) = found.next().transpose()?.flatten() {
            let result = ended.remove(&id);
            let was_ended = result.is_some();
            result.transpose()?;
            then(&id, was_ended)?;
        }
        Ok(word.to_owned())
    })
}

/// Ends a container, whatever it is doing, and waits until all is cleared up.
pub(super) fn one(context: &Context, containers: &Containers, id: &str, how: How) -> Result<()> {
    all(context, containers, &[id], how).into_iter().collect()
}

/// Ends several containers at once, each as [`one`].
fn all(context: &Context, containers: &Containers, ids: &[&str], how: How) -> Vec<Result<()>> {
    let mut endings: Vec<_> = ids.iter().map(|id| Ending::new(context, containers, id, how)).collect();
    let mut results: Vec<Option<Result<()>>> = ids.iter().map(|_| None).collect();
    let mut changes = None;
    loop {
        // Before anything is looked at: what comes later ends the wait.
        changes.iter().for_each(Changes::forget);
        let (mut fds, mut until) = (Vec::new(), Instant::now() + LONGEST);
        let mut wait = |fd: i32| fds.push(libc::pollfd { fd, events: libc::POLLIN, revents: 0 });
        for (ending, result) in endings.iter_mut().zip(&mut results).filter(|(_, result)| result.is_none()) {
            match ending.step() {
                Ok(Next::Done) => *result = Some(Ok(())),
                Ok(Next::Look) => {
                    let (fd, limit) = ending.turn(&mut changes);
                    until = until.min(limit);
                    fd.into_iter().for_each(&mut wait);
                }
                Ok(Next::Wait(fd, limit)) => {
                    until = until.min(limit);
                    wait(fd);
                }
                Err(e) => *result = Some(Err(e)),
            }
            if result.is_some() {
                ending.locker = None;
            }
        }
        if results.iter().all(Option::is_some) {
            return results.into_iter().flatten().collect();
        }
        changes.iter().map(Changes::fd).for_each(&mut wait);
        let left = until.saturating_duration_since(Instant::now()) + Duration::from_micros(999);
        let left = left.as_millis().min(i32::MAX as u128) as i32;
        // SAFETY: fds is a valid list of that many.
        unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, left) };
    }
}

/// What is to be done next for a container that is being ended.
enum Next {
    /// Nothing: it has ended, and all is cleared up.
    Done,
    /// Look again when somebody else has done something with it.
    Look,
    /// Look again when the process has ended, or at that time.
    Wait(i32, Instant),
}

/// A container that is being ended.
struct Ending<'a> {
    context: &'a Context,
    containers: &'a Containers,
    id: &'a str,
    how: How,
    begun: Instant,
    /// It was there.
    looked: bool,
    /// It was noted that it is not to start again.
    marked: bool,
    asked: bool,
    dying: Option<Dying>,
    /// How often it was looked again.
    looks: u32,
    /// Its directory is watched.
    watched: bool,
    /// Waits for its lock, which somebody has.
    locker: Option<Locker>,
    /// The monitor that was there when it was looked at last.
    monitor: Option<(Identity, OwnedFd)>,
    /// When it is not waited for any longer.
    late: Option<Instant>,
}

/// A first process that was asked to end.
struct Dying {
    core: Container,
    process: OwnedFd,
    until: Instant,
    killed: bool,
}

impl<'a> Ending<'a> {
    fn new(context: &'a Context, containers: &'a Containers, id: &'a str, how: How) -> Self {
        Self {
            context,
            containers,
            id,
            how,
            begun: Instant::now(),
            looked: false,
            marked: false,
            asked: false,
            dying: None,
            looks: 0,
            watched: false,
            locker: None,
            monitor: None,
            late: None,
        }
    }

    /// What to wait for until somebody else has done something with the container, and until when.
    fn turn(&mut self, changes: &mut Option<Changes>) -> (Option<i32>, Instant) {
        self.wait_turn(changes).unwrap_or_else(|e| {
            log::debug!("container {}: {}", self.id, crate::message(&e));
            // Of one that was removed there is nothing to wait for.
            let is_there = self.containers.directory(self.id).exists();
            (None, Instant::now() + if is_there { PAUSE } else { Duration::ZERO })
        })
    }

    fn wait_turn(&mut self, changes: &mut Option<Changes>) -> Result<(Option<i32>, Instant)> {
        let now = Instant::now();
        if self.looks < LOOKS {
            self.looks += 1;
            return Ok((None, now + MOMENT));
        }
        let directory = self.containers.directory(self.id);
        if !self.watched {
            if changes.is_none() {
                *changes = Some(Changes::new().context("watch directories")?);
            }
            let watched = changes.as_ref().map_or(Ok(()), |changes| changes.watch(&directory));
            watched.with_context(|| format!("watch {}", directory.display()))?;
            self.watched = true;
            return Ok((None, now));
        }
        let until = self.late.filter(|late| *late > now).unwrap_or(now + LONGEST);
        if let Some(locker) = &self.locker {
            if !locker.is_done() {
                return Ok((Some(locker.fd()), until));
            }
            self.locker = None;
            return Ok((None, now));
        }
        match self.containers.try_lock(self.id)? {
            Some(lock) => lock.release(),
            None => {
                let locker = self.locker.insert(Locker::start(&directory)?);
                return Ok((Some(locker.fd()), until));
            }
        }
        // Nobody is at it. Its monitor will be, or it ends.
        match &self.monitor {
            Some((identity, process)) if identity.alive() && !pidfd::wait_ended(process.as_fd(), 0)? => {
                Ok((Some(process.as_raw_fd()), until))
            }
            _ => bail!("its monitor, if it has one, ends in this moment"),
        }
    }

    /// Remembers whom to wait for.
    fn remember(&mut self, monitor: Option<Identity>) {
        let known = self.monitor.as_ref().map(|(identity, _)| *identity);
        if known != monitor {
            let open = |identity: Identity| pidfd::open(identity.pid).ok().map(|process| (identity, process));
            self.monitor = monitor.and_then(open);
        }
    }

    /// Does what can be done now.
    fn step(&mut self) -> Result<Next> {
        if let Some(dying) = &mut self.dying {
            if let Some(next) = dying.step()? {
                return Ok(next);
            }
            self.dying = None;
        }
        let (containers, id) = (self.containers, self.id);
        let mut seen = match containers.find(id) {
            // It was made with --rm, or somebody else was faster.
            Err(e) if e.is::<NoContainer>() && self.looked => return Ok(Next::Done),
            other => Seen::look(self.context, other?)?,
        };
        self.looked = true;
        self.remember(seen.record.monitor);
        let record = &seen.record;
        if seen.status.is_down() {
            return clear(self.context, containers, &seen);
        }
        let limit = self.how.timeout.unwrap_or_else(|| record.options.stop_timeout()).min(LONGEST);
        let end = self.begun + limit + CLEARING;
        self.late = Some(end);
        let late = Instant::now() > end;
        if !record.stopped && !self.marked {
            if !stop::try_mark(containers, id).unwrap_or(false) {
                // It has gone meanwhile, or somebody is at it: the others need not wait for that.
                if late {
                    bail!("container {id:?} is still {}: another command is at it", seen.status);
                }
                return Ok(Next::Look);
            }
            self.marked = true;
        }
        let core = seen.core.take_if(|_| seen.status.is_up() && !self.asked);
        match (seen.status, core) {
            (_, Some(core)) => {
                self.asked = true;
                let number = self.how.signal.map_or_else(|| stop::stop_signal(record), Ok)?;
                self.dying = ask(core, number, limit, seen.status == Status::Paused)?;
                return self.dying.as_mut().map_or(Ok(None), Dying::step).map(|next| next.unwrap_or(Next::Look));
            }
            // It waits for its next start: its monitor shall look again.
            (Status::Restarting, _) => stop::wake(record),
            _ => {}
        }
        if late {
            bail!(
                "container {id:?} is still {}: its monitor, process {}, does not clear up",
                seen.status,
                record.monitor.map_or(0, |monitor| monitor.pid)
            );
        }
        Ok(Next::Look)
    }
}

/// That a process is gone already is fine.
fn unless_gone(result: runx_core::Result<()>) -> runx_core::Result<()> {
    match result {
        Err(Error::Finished | Error::NotFound(_)) => Ok(()),
        other => other,
    }
}

/// Asks a container's first process to end. `None` if it has.
fn ask(core: Container, number: i32, limit: Duration, paused: bool) -> Result<Option<Dying>> {
    let process = match core.first_process() {
        Err(Error::Finished) => return Ok(None),
        other => other?,
    };
    unless_gone(core.kill(number, false))?;
    if paused && number != libc::SIGKILL {
        // It could not hear otherwise.
        let _ = core.resume();
    }
    Ok(Some(Dying { core, process, until: Instant::now() + limit, killed: false }))
}

impl Dying {
    /// Kills it when its time is over. `None` once it has ended.
    fn step(&mut self) -> Result<Option<Next>> {
        if pidfd::wait_ended(self.process.as_fd(), 0).context("look whether the container has ended")? {
            return Ok(None);
        }
        if Instant::now() >= self.until {
            if self.killed {
                let state = self.core.state();
                bail!("process {} of container {:?} does not die", state.pid, state.id);
            }
            unless_gone(self.core.kill(libc::SIGKILL, false))?;
            self.killed = true;
            self.until = Instant::now() + DYING;
        }
        Ok(Some(Next::Wait(self.process.as_raw_fd(), self.until)))
    }
}

/// What a monitor that was killed did not clear up.
fn clear(context: &Context, containers: &Containers, seen: &Seen) -> Result<Next> {
    let id = &seen.record.id;
    if seen.core.is_none() && seen.record.phase != Phase::Running {
        if !seen.record.is_monitored() {
            return Ok(Next::Done);
        }
        // A monitor writes the end down before it takes the network away, and holds the lock until that is done: who stops a
        // container may want its ports.
        return match containers.try_lock(id) {
            Ok(None) => Ok(Next::Look),
            Ok(Some(lock)) => {
                lock.release();
                Ok(Next::Done)
            }
            Err(e) if e.is::<NoContainer>() => Ok(Next::Done),
            Err(e) => Err(e),
        };
    }
    let lock = match containers.try_lock(id) {
        Ok(Some(lock)) => lock,
        Ok(None) => return Ok(Next::Look),
        // Its monitor was at it, and has removed it.
        Err(e) if e.is::<NoContainer>() => return Ok(Next::Done),
        Err(e) => return Err(e),
    };
    let directory = containers.directory(id);
    let mut record = Record::read(&directory)?;
    if record.is_monitored() {
        return Ok(Next::Done);
    }
    if let Ok(core) = context.runtime().load(id)
        && core.state().bundle == record.bundle
    {
        context.runtime().delete_force(id)?;
    }
    if record.phase != Phase::Created {
        record.phase = Phase::Exited;
        record.finished.get_or_insert_with(now);
    }
    if let Err(e) = record.write(&directory) {
        // A full disk must not keep anybody from making room.
        log::warn!("{}", crate::message(&e));
    }
    remove::after_end(&context.global.root, containers, &directory, &record);
    Refuge::sweep();
    lock.release();
    Ok(Next::Done)
}
