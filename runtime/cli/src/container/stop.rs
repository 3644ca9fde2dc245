//! `stop`, `kill`, `restart`, `rm` and `delete`.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use runx_core::Error;
use runx_core::sys::pidfd;

use super::frames::{self, Kind};
use super::record::{Containers, NoContainer, Record};
use super::status::{Seen, Status};
use super::{each, remove, rootless, socket, start};
use crate::oci::signal;
use crate::{Context, Failure};

/// A monitor is done with clearing up by then.
const CLEARING: Duration = Duration::from_secs(20);

/// `runx container stop`.
pub(super) fn stop(
    context: &Context,
    ids: &[String],
    all: bool,
    timeout: Option<Duration>,
    name: Option<&str>,
) -> Result<u8, Failure> {
    let containers = Containers::of(context);
    if let Some(name) = name {
        signal::parse(name)?;
    }
    let ids = if all { those(context, &containers, |status| !status.is_down())? } else { ids.to_vec() };
    each(&ids, |word| {
        let id = containers.resolve(word)?;
        end(context, &containers, &id, timeout, name)?;
        Ok(word.to_owned())
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
    each(ids, |word| {
        let id = containers.resolve(word)?;
        let record = containers.find(&id)?;
        if record.options.auto_remove && !Seen::look(context, record)?.status.is_down() {
            bail!("container {id:?} was made with --rm: once stopped it is gone, and cannot be started again");
        }
        end(context, &containers, &id, timeout, None)?;
        start::start_again(context, &containers, &id, &[]).map_err(|failure| failure.error)?;
        Ok(word.to_owned())
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

/// Stops a container, whatever it is doing, and waits until all is cleared up.
pub(super) fn end(
    context: &Context,
    containers: &Containers,
    id: &str,
    timeout: Option<Duration>,
    name: Option<&str>,
) -> Result<()> {
    let begun = Instant::now();
    let (mut looked, mut asked, mut marked) = (false, false, false);
    loop {
        let seen = match containers.find(id) {
            // It was made with --rm, or somebody else was faster.
            Err(e) if e.is::<NoContainer>() && looked => return Ok(()),
            other => Seen::look(context, other?)?,
        };
        looked = true;
        let record = &seen.record;
        if seen.status.is_down() {
            return clear(context, containers, &seen);
        }
        if !record.stopped && !marked {
            if mark(containers, id).is_err() {
                // It has gone meanwhile.
                continue;
            }
            marked = true;
        }
        match (seen.status, &seen.core) {
            (Status::Running | Status::Paused, Some(core)) if !asked => {
                asked = true;
                let number = name.map_or_else(|| stop_signal(record), signal::parse)?;
                let limit = timeout.unwrap_or_else(|| record.options.stop_timeout());
                end_process(core, number, limit, seen.status == Status::Paused)?;
            }
            (Status::Restarting, _) => {
                // It waits for its next start: its monitor shall look again.
                if let Some(monitor) = record.monitor.filter(|monitor| monitor.alive())
                    && let Ok(process) = pidfd::open(monitor.pid)
                {
                    let _ = pidfd::send_signal(process.as_fd(), libc::SIGTERM);
                }
            }
            _ => {}
        }
        if begun.elapsed() > timeout.unwrap_or_else(|| record.options.stop_timeout()) + CLEARING {
            bail!(
                "container {id:?} is still {}: its monitor, process {}, does not clear up",
                seen.status,
                record.monitor.map_or(0, |monitor| monitor.pid)
            );
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// What a monitor that was killed did not clear up.
fn clear(context: &Context, containers: &Containers, seen: &Seen) -> Result<()> {
    let id = &seen.record.id;
    if seen.core.is_none() && seen.record.phase != super::record::Phase::Running {
        // A monitor writes the end down before it takes the network away, and holds the lock until that is done: who stops a
        // container may want its ports.
        return match containers.lock(id) {
            Ok(lock) => {
                lock.release();
                Ok(())
            }
            Err(e) if e.is::<NoContainer>() => Ok(()),
            Err(e) => Err(e),
        };
    }
    let lock = match containers.lock(id) {
        // Its monitor was at it, and has removed it.
        Err(e) if e.is::<NoContainer>() => return Ok(()),
        other => other?,
    };
    let directory = containers.directory(id);
    let mut record = Record::read(&directory)?;
    if record.is_monitored() {
        return Ok(());
    }
    if let Ok(core) = context.runtime().load(id)
        && core.state().bundle == record.bundle
    {
        context.runtime().delete_force(id)?;
    }
    if record.phase != super::record::Phase::Created {
        record.phase = super::record::Phase::Exited;
        record.finished.get_or_insert_with(super::record::now);
    }
    if let Err(e) = record.write(&directory) {
        // A full disk must not keep anybody from making room.
        log::warn!("{}", crate::message(&e));
    }
    remove::after_end(&context.global.root, containers, &directory, &record);
    lock.release();
    Ok(())
}

/// Writes down that somebody stopped a container, so that its policy does not start it again. Where that cannot be written, on
/// a full disk say, the container can be stopped nevertheless.
///
/// # Errors
/// [`NoContainer`].
fn mark(containers: &Containers, id: &str) -> Result<()> {
    match containers.change(id, |record| record.stopped = true) {
        Err(e) if e.is::<NoContainer>() => Err(e),
        Err(e) => {
            log::warn!("{}", crate::message(&e));
            Ok(())
        }
        Ok(_) => Ok(()),
    }
}

/// Ends a container's first process: by a signal, and after a time by force.
fn end_process(core: &runx_core::container::Container, number: i32, limit: Duration, paused: bool) -> Result<()> {
    let process = match core.first_process() {
        Err(Error::Finished) => return Ok(()),
        other => other?,
    };
    let gone = |result: runx_core::Result<()>| match result {
        Err(Error::Finished | Error::NotFound(_)) => Ok(()),
        other => other,
    };
    gone(core.kill(number, false))?;
    if paused && number != libc::SIGKILL {
        // It could not hear otherwise.
        let _ = core.resume();
    }
    let limit = limit.as_millis().min(i32::MAX as u128) as i32;
    if !pidfd::wait_ended(process.as_fd(), limit).context("wait for the container's end")? {
        gone(core.kill(libc::SIGKILL, false))?;
        if !pidfd::wait_ended(process.as_fd(), 10_000).context("wait for the container's end")? {
            bail!("process {} of container {:?} does not die", core.state().pid, core.state().id);
        }
    }
    Ok(())
}

/// `runx container rm`.
pub(super) fn rm(context: &Context, ids: &[String], force: bool, volumes: bool, all: bool) -> Result<u8, Failure> {
    let containers = Containers::of(context);
    let ids = if all { those(context, &containers, |status| force || status.is_down())? } else { ids.to_vec() };
    each(&ids, |word| {
        let id = match containers.resolve(word) {
            Err(e) if force && e.is::<NoContainer>() => return Ok(word.to_owned()),
            other => other?,
        };
        if force {
            end_and_wipe(context, &containers, &id, None, Some("SIGKILL"), volumes)?;
        } else {
            wipe(context, &containers, &id, volumes, false)?;
        }
        Ok(word.to_owned())
    })
}

/// `runx container delete`.
pub(super) fn delete(context: &Context, ids: &[String], timeout: Option<Duration>) -> Result<u8, Failure> {
    let containers = Containers::of(context);
    each(ids, |word| {
        let id = containers.resolve(word)?;
        end_and_wipe(context, &containers, &id, timeout, None, true)?;
        Ok(word.to_owned())
    })
}

/// Ends a container and removes it, again if somebody starts it in between.
fn end_and_wipe(
    context: &Context,
    containers: &Containers,
    id: &str,
    timeout: Option<Duration>,
    name: Option<&str>,
    volumes: bool,
) -> Result<()> {
    loop {
        if Record::read(&containers.directory(id)).is_ok() {
            end(context, containers, id, timeout, name)?;
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
