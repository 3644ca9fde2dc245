//! `runx container`: containers for people, on the same core as the commands for engines.
//!
//! A container has a record on disk ([`record`]), and while it runs a small process that looks after it ([`monitor`]).

mod attach;
mod cp;
mod end;
mod exec;
mod files;
mod frames;
mod inspect;
mod log;
mod logs;
mod ls;
mod make;
mod monitor;
pub(crate) mod options;
mod pause;
mod pipes;
pub(crate) mod record;
mod remove;
mod rootfs;
mod rootless;
mod socket;
mod spec;
mod start;
mod stats;
pub(crate) mod status;
mod stop;
mod top;
mod turn;
mod update;
mod users;
mod volumes;

pub(crate) use ls::ago;

use anyhow::Result;

use crate::arguments::{Container, Streams};
use crate::oci::foreground::Signals;
use crate::{Context, Failure, message};
use record::Containers;
use status::Seen;

/// `runx container …`.
pub(crate) fn container(context: &Context, command: Container) -> Result<u8, Failure> {
    match command {
        Container::Run(make) => make::run(context, *make),
        Container::Create(make) => make::create(context, *make),
        Container::Start { ids, attach, interactive, streams } => {
            start::command(context, &ids, attach, interactive, &streams)
        }
        Container::Stop { ids, all, timeout, signal } => stop::stop(context, &ids, all, timeout, signal.as_deref()),
        Container::Restart { ids, timeout } => stop::restart(context, &ids, timeout),
        Container::Kill { ids, signal } => stop::kill(context, &ids, &signal),
        Container::Rm { ids, force, volumes, all } => stop::rm(context, &ids, force, volumes, all),
        Container::Delete { ids, timeout } => stop::delete(context, &ids, timeout),
        Container::Ls(ls) => ls::ls(context, &ls),
        Container::Exec(exec) => exec::exec(context, *exec),
        Container::Logs(logs) => logs::logs(context, &logs),
        Container::Attach { id, no_stdin, streams } => attach_to(context, &id, no_stdin, &streams),
        Container::Inspect { ids } => inspect::inspect(context, &ids),
        Container::Stats { ids, no_stream, format } => stats::stats(context, &ids, no_stream, format),
        Container::Top { id, options } => top::top(context, &id, &options),
        Container::Pause { ids } => pause::pause(context, &ids),
        Container::Unpause { ids } => pause::unpause(context, &ids),
        Container::Wait { ids } => stop::wait(context, &ids),
        Container::Cp { from, to, archive } => cp::cp(context, &from, &to, archive),
        Container::Update { ids, limits, restart } => update::update(context, &ids, &limits, restart),
    }
}

/// Does something for each of several containers and prints what comes of it. One that fails does not keep it from the
/// others.
fn each(ids: &[String], mut act: impl FnMut(&str) -> Result<String>) -> Result<u8, Failure> {
    let mut failed = None;
    for id in ids {
        match act(id) {
            Ok(line) => drop(crate::print(&format!("{line}\n"))?),
            Err(e) => {
                if let Some(before) = failed.replace(e) {
                    ::log::error!("{}", message(&before));
                }
            }
        }
    }
    failed.map_or(Ok(0), |error| Err(error.into()))
}

/// `runx container attach`.
fn attach_to(context: &Context, word: &str, no_stdin: bool, streams: &Streams) -> Result<u8, Failure> {
    let containers = Containers::of(context);
    let seen = Seen::look(context, containers.find(word)?)?;
    let (record, state) = (&seen.record, context.global.root.join(&seen.record.id));
    if !seen.status.is_up() {
        return Err(anyhow::anyhow!(
            "container {:?} is {}: only to one that runs can be attached",
            record.id,
            seen.status
        )
        .into());
    }
    let signals = Signals::hold()?;
    let mut socket = socket::connect(&state).map_err(|e| {
        anyhow::anyhow!("container {:?} has no monitor any more, so that its streams are lost: {e}", record.id)
    })?;
    let tty = record.options.tty;
    std::io::Write::write_all(&mut socket, &attach::greeting(tty, false))?;
    let input = record.options.interactive && !no_stdin;
    let (containers, id) = (&containers, record.id.as_str());
    let attachment = attach::Attachment { socket, containers, id, state, tty, input, streams };
    Ok(start::conclude(&record.id, attachment.serve(&signals)?))
}
