//! `stop`, `kill`, `restart`, `rm` and `delete`.

use std::os::fd::AsFd;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use runx_core::Error;
use runx_core::sys::pidfd;

use super::end::{self, How};
use super::frames::{self, Kind};
use super::record::{Containers, NoContainer, Phase, Record};
use super::status::{Seen, Status};
use super::{each, remove, rootless, socket, start};
use crate::oci::signal;
use crate::{Context, Failure};

/// `runx container stop`.
pub(super) fn stop(
    context: &Context,
    ids: &[String],
    all: bool,
    timeout: Option<Duration>,
    name: Option<&str>,
) -> Result<u8, Failure> {
    let containers = Containers::of(context);
    let how = How { timeout, signal: name.map(signal::parse).transpose()? };
    let ids = if all { those(context, &containers, |status| !status.is_down())? } else { ids.to_vec() };
    let find = |word: &String| containers.resolve(word).map(Some);
    end::each_ended(context, &containers, &ids, how, find, |id, ended| {
        if ended { Ok(()) } else { end::one(context, &containers, id, how) }
    })
}

/// The ids of all containers with a status.
fn those(context: &Context, containers: &Containers, wanted: impl Fn(Status) -> bool) -> Result<Vec<String>> {
    let mut ids = Vec::new();
    for record in containers.all()? {
        let seen = Seen::look(context, record)?;
        if wanted(seen.status) {
            ids.push(seen.record.id);
        }
    }
    Ok(ids)
}

/// `runx container restart`.
pub(super) fn restart(context: &Context, ids: &[String], timeout: Option<Duration>) -> Result<u8, Failure> {
    let containers = Containers::of(context);
    let how = How { timeout, signal: None };
    let find = |word: &String| {
        let id = containers.resolve(word)?;
        let record = containers.find(&id)?;
        if record.options.auto_remove && !Seen::look(context, record)?.status.is_down() {
            bail!("container {id:?} was made with --rm: once stopped it is gone, and cannot be started again");
        }
        Ok(Some(id))
    };
    end::each_ended(context, &containers, ids, how, find, |id, ended| {
        if !ended {
            end::one(context, &containers, id, how)?;
        }
        start::start_again(context, &containers, id, &[]).map(drop).map_err(|failure| failure.error)
    })
}

/// `runx container kill`.
pub(super) fn kill(context: &Context, ids: &[String], name: &str) -> Result<u8, Failure> {
    let number = signal::parse(name)?;
    let containers = Containers::of(context);
    each(ids, |word| {
        let id = containers.resolve(word)?;
        let seen = Seen::look(context, containers.find(&id)?)?;
        let Some(core) = seen.core.as_ref().filter(|_| seen.status.is_up()) else {
            bail!("container {id:?} is not running: it is {}", seen.status);
        };
        if number == libc::SIGKILL || number == stop_signal(&seen.record)? {
            // Who kills it does not want it back.
            mark(&containers, &id)?;
        }
        match core.kill(number, false) {
            Err(Error::Finished) => bail!("container {id:?} has ended in this moment"),
            other => other?,
        }
        Ok(word.to_owned())
    })
}

/// What asks a container to stop.
pub(super) fn stop_signal(record: &Record) -> Result<i32> {
    let name = record.options.stop_signal.as_deref().or(record.defaults.stop_signal.as_deref());
    name.map_or(Ok(libc::SIGTERM), signal::parse)
}

/// Lets the monitor of a container that waits for its next start look again.
pub(super) fn wake(record: &Record) {
    if let Some(monitor) = record.monitor.filter(|monitor| monitor.alive())
        && let Ok(process) = pidfd::open(monitor.pid)
    {
        let _ = pidfd::send_signal(process.as_fd(), libc::SIGTERM);
    }
}

/// Ends a container that is between two starts: it is not started again. Returns whether that came too late to keep it from
/// the next start, which is its last one then, and can be told.
pub(super) fn end_pause(containers: &Containers, id: &str) -> bool {
    // Who starts it has the lock until it runs.
    let changed = containers.change(id, |record| {
        let runs = record.phase == Phase::Running && record.is_monitored();
        record.stopped |= runs || record.phase == Phase::Restarting;
        (record.phase, runs, record.clone())
    });
    match changed {
        Ok((Phase::Restarting, _, record)) => wake(&record),
        Ok((_, runs, _)) => return runs,
        Err(e) => log::debug!("container {id}: {}", crate::message(&e)),
    }
    false
}

/// Writes down that somebody stopped a container, so that its policy does not start it again. Where that cannot be written, on
/// a full disk say, the container can be stopped nevertheless.
///
/// # Errors
/// [`NoContainer`].
pub(super) fn mark(containers: &Containers, id: &str) -> Result<()> {
    unless_unwritable(containers.change(id, |record| record.stopped = true)).map(drop)
}

/// The same where nobody has the container's lock. Returns whether it is done.
///
/// # Errors
/// [`NoContainer`].
pub(super) fn try_mark(containers: &Containers, id: &str) -> Result<bool> {
    let marked = unless_unwritable(containers.try_change(id, |record| record.stopped = true))?;
    Ok(marked.is_none_or(|marked| marked.is_some()))
}

fn unless_unwritable<T>(changed: Result<T>) -> Result<Option<T>> {
    match changed {
        Err(e) if e.is::<NoContainer>() => Err(e),
        Err(e) => {
            log::warn!("{}", crate::message(&e));
            Ok(None)
        }
        Ok(done) => Ok(Some(done)),
    }
}

/// `runx container rm`.
pub(super) fn rm(context: &Context, ids: &[String], force: bool, volumes: bool, all: bool) -> Result<u8, Failure> {
    let containers = Containers::of(context);
    let ids = if all { those(context, &containers, |status| force || status.is_down())? } else { ids.to_vec() };
    if !force {
        return each(&ids, |word| {
            wipe(context, &containers, &containers.resolve(word)?, volumes, false)?;
            Ok(word.to_owned())
        });
    }
    let how = How { timeout: None, signal: Some(libc::SIGKILL) };
    let find = |word: &String| match containers.resolve(word) {
        Err(e) if e.is::<NoContainer>() => Ok(None),
        other => other.map(Some),
    };
    end::each_ended(context, &containers, &ids, how, find, |id, _| end_and_wipe(context, &containers, id, how, volumes))
}

/// `runx container delete`.
pub(super) fn delete(context: &Context, ids: &[String], timeout: Option<Duration>) -> Result<u8, Failure> {
    let containers = Containers::of(context);
    let how = How { timeout, signal: None };
    let find = |word: &String| containers.resolve(word).map(Some);
    end::each_ended(context, &containers, ids, how, find, |id, _| end_and_wipe(context, &containers, id, how, true))
}

/// Ends a container and removes it, again if somebody starts it in between.
fn end_and_wipe(context: &Context, containers: &Containers, id: &str, how: How, volumes: bool) -> Result<()> {
    loop {
        if Record::read(&containers.directory(id)).is_ok() {
            end::one(context, containers, id, how)?;
        }
        match wipe(context, containers, id, volumes, true) {
            Err(e) if e.is::<Up>() => {}
            other => return other,
        }
    }
}

/// The error that a container is not to be removed while it is up.
#[derive(Debug)]
struct Up(String, Status);

impl std::fmt::Display for Up {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self(id, status) = self;
        write!(f, "container {id:?} is {status}: stop it first with \"runx container stop {id}\", or say rm --force")
    }
}

impl std::error::Error for Up {}

/// Removes a container that has no processes. Gone already is fine: it may have been made with --rm.
fn wipe(context: &Context, containers: &Containers, id: &str, volumes: bool, force: bool) -> Result<()> {
    // Files of an ordinary user's container may have other owners, too.
    rootless::enter()?;
    let lock = match containers.lock(id) {
        Err(e) if e.is::<NoContainer>() => return Ok(()),
        other => other?,
    };
    if let Ok(record) = Record::read(&containers.directory(id)) {
        let seen = Seen::look(context, record)?;
        if !seen.status.is_down() {
            return Err(Up(id.to_owned(), seen.status).into());
        }
    } else if !force {
        bail!(
            "container {id:?} is only half made or half removed: \"runx container rm --force {id}\" removes the rest"
        );
    }
    remove::wipe(&context.runtime(), containers, id, lock, volumes)
}

/// `runx container wait`.
pub(super) fn wait(context: &Context, ids: &[String]) -> Result<u8, Failure> {
    let containers = Containers::of(context);
    each(ids, |word| {
        let id = containers.resolve(word)?;
        let code = wait_for(context, &containers, &id)?;
        code.map(|code| code.to_string()).with_context(|| {
            format!("container {id:?} has ended, but with which exit code is not known: its monitor was killed")
        })
    })
}

/// The exit code of a container, once it has ended and is not started again. `None` if nobody knows it.
fn wait_for(context: &Context, containers: &Containers, id: &str) -> Result<Option<i32>> {
    loop {
        let seen = match containers.find(id) {
            Ok(record) => Seen::look(context, record)?,
            // It was removed, by itself or by somebody, while we looked.
            Err(e) if e.is::<NoContainer>() => return Ok(None),
            Err(e) => return Err(e),
        };
        match seen.status {
            Status::Exited => return Ok(seen.record.exit_code),
            Status::Created => return Ok(Some(seen.record.exit_code.unwrap_or(0))),
            _ => {}
        }
        if let Ok(mut socket) = socket::connect(&context.global.root.join(id)) {
            while let Some((kind, data)) = frames::receive(&mut socket).context("hear from the monitor")? {
                if let (Kind::Exit, Ok(code)) = (kind, <[u8; 4]>::try_from(data)) {
                    return Ok(Some(i32::from_ne_bytes(code)));
                }
            }
        } else if let Some(process) = seen.core.as_ref().and_then(|core| core.first_process().ok())
            && !seen.record.is_monitored()
        {
            pidfd::wait_ended(process.as_fd(), -1).context("wait for the container's end")?;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
