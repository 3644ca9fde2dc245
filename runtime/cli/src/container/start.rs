//! `start`, and what `run` and `restart` share with it.

use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};
use runx_core::Error;
use runx_core::bundle::Bundle;

use super::attach::{self, Attachment, End};
use super::frames::{self, Kind};
use super::options::Network;
use super::record::{Containers, Lock, Record};
use super::status::{Seen, Status};
use super::{files, monitor, remove, rootfs, rootless, spec, volumes};
use crate::arguments::Streams;
use crate::network::{self, Attached, NetworkOptions};
use crate::oci::foreground::Signals;
use crate::{Context, Failure};

/// Exit code when the container could not be started, or its monitor is gone.
const NOT_RUN: u8 = 125;
/// A monitor that clears up is done by then.
const CLEARING: Duration = Duration::from_secs(15);

/// `runx container start`.
pub(super) fn command(
    context: &Context,
    ids: &[String],
    attached: bool,
    interactive: bool,
    streams: &Streams,
) -> Result<u8, Failure> {
    let containers = Containers::of(context);
    if !(attached || interactive) {
        return super::each(ids, |word| {
            let id = containers.resolve(word)?;
            start_again(context, &containers, &id, &[]).map_err(|failure| failure.error)?;
            Ok(word.to_owned())
        });
    }
    let record = containers.find(ids.first().map_or("", String::as_str))?;
    let signals = Signals::hold()?;
    let greeting = attach::greeting(record.options.tty, !attach::is_terminal(1));
    let socket = start_again(context, &containers, &record.id, &greeting)?;
    let attachment = Attachment {
        socket,
        containers: &containers,
        id: &record.id,
        state: context.global.root.join(&record.id),
        tty: record.options.tty,
        input: interactive && record.options.interactive,
        streams,
    };
    Ok(conclude(&record.id, attachment.serve(&signals)?))
}

/// Starts a container that is there and does not run.
pub(super) fn start_again(
    context: &Context,
    containers: &Containers,
    id: &str,
    greeting: &[u8],
) -> Result<UnixStream, Failure> {
    rootless::enter()?;
    let begun = Instant::now();
    loop {
        let lock = containers.lock(id)?;
        let seen = Seen::look(context, Record::read(&containers.directory(id))?)?;
        match seen.status {
            Status::Created | Status::Exited => {
                let mut record = seen.record;
                record.stopped = false;
                record.restarts = 0;
                return start(context, containers, record, lock, greeting);
            }
            Status::Stopping | Status::Starting if begun.elapsed() < CLEARING => {
                lock.release();
                std::thread::sleep(Duration::from_millis(5));
            }
            Status::Restarting => {
                return Err(anyhow!("container {id:?} is about to start again by itself: stop it first").into());
            }
            status => return Err(anyhow!("container {id:?} is {status} already").into()),
        }
    }
}

/// Starts a container. The lock is held by whoever calls, and by the monitor until the container runs. Returns the
/// connection to the monitor.
pub(super) fn start(
    context: &Context,
    containers: &Containers,
    record: Record,
    lock: Lock,
    greeting: &[u8],
) -> Result<UnixStream, Failure> {
    let failed = |error: anyhow::Error| Failure { error, code: NOT_RUN };
    let directory = containers.directory(&record.id);
    let prepared = prepare(context, containers, &record).and_then(|bundle| {
        let unmount = record.clone();
        monitor::launch(context, containers, record, lock, bundle, greeting)
            .inspect_err(|_| drop(remove::take_down(&context.global.root, &directory, &unmount)))
    });
    let mut socket = prepared.map_err(failed)?;
    match frames::receive(&mut socket).context("hear from the container's monitor").map_err(failed)? {
        Some((Kind::Started, _)) => Ok(socket),
        Some((Kind::Failed, data)) => {
            let (code, text) = data.split_first().unwrap_or((&NOT_RUN, &[]));
            Err(Failure { error: anyhow!("{}", String::from_utf8_lossy(text)), code: *code })
        }
        _ => Err(failed(anyhow!("the container's monitor ended before the container was started"))),
    }
}

/// Clears up after an earlier start, mounts the root filesystem, and writes what the container reads.
fn prepare(context: &Context, containers: &Containers, record: &Record) -> Result<Bundle> {
    let runtime = context.runtime();
    let directory = containers.directory(&record.id);
    match runtime.load(&record.id) {
        // Of a monitor that was killed.
        Ok(core) if core.state().bundle == record.bundle => runtime.delete_force(&record.id)?,
        Ok(core) => bail!(
            "there is another container {:?} below {}, made from {}: delete it, or use another --root",
            record.id,
            runtime.root().display(),
            core.state().bundle.display()
        ),
        // What a killed command may have left without a state.
        Err(Error::NotFound(_)) if runtime.root().join(&record.id).exists() => runtime.delete_force(&record.id)?,
        Err(Error::NotFound(_)) => {}
        Err(e) => return Err(e.into()),
    }
    if record.options.given_configuration {
        return Ok(Bundle::load(&record.bundle)?);
    }
    let rootfs = rootfs::mount(&directory, record)?;
    let made = || -> Result<Bundle> {
        let attached = attach_network(context, containers, record)?;
        volumes::fill(containers, record, &rootfs)?;
        files::write(&directory, record, &attached)?;
        let spec = spec::make(containers, record, &rootfs, &attached.namespace)?;
        spec::write(&spec, &record.bundle)?;
        Ok(Bundle::new(record.bundle.clone(), spec)?)
    };
    made().inspect_err(|_| drop(remove::take_down(runtime.root(), &directory, record)))
}

/// Gives it its network.
fn attach_network(context: &Context, containers: &Containers, record: &Record) -> Result<Attached> {
    let runtime = context.runtime();
    // Of an earlier start, whose monitor was killed.
    network::detach(runtime.root(), &record.id)?;
    if let Network::Container(other) = &record.options.network {
        let seen = Seen::look(context, containers.find(other).context("--network")?)?;
        if !seen.status.is_up() {
            bail!("--network container:{other}: it is {}; start it first: runx container start {other}", seen.status);
        }
    }
    let options = NetworkOptions {
        kind: (&record.options.network).into(),
        ports: record.options.publish.clone(),
        settings: &context.config.network,
    };
    network::attach(&runtime, &record.id, &options)
}

/// The exit code of a command that was attached, and what there is to say.
pub(super) fn conclude(id: &str, end: End) -> u8 {
    match end {
        End::Exit(code) => code as u8,
        End::Detached => {
            eprintln!("\ndetached from {id}; to come back: runx container attach {id}");
            0
        }
        End::Signal(signal) => 128u8.saturating_add(signal as u8),
        End::OutputClosed => 128 + libc::SIGPIPE as u8,
        End::Lost => {
            eprintln!(
                "runx: the monitor of container {id} is gone; whether the container runs is told by: runx container ls --all"
            );
            NOT_RUN
        }
    }
}
