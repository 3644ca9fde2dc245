//! `create` and `run`.

use anyhow::{Context as _, Result};
use runx_core::bundle::Bundle;
use runx_core::container::{Container, CreateOptions, Process};
use runx_core::spec::Process as ProcessSpec;

use super::foreground::{self, Signals};
use super::{console, pid_file};
use crate::arguments::{Create, Run};
use crate::{Context, Failure};

fn has_terminal(process: &ProcessSpec) -> bool {
    process.terminal().unwrap_or(false)
}

/// Descriptors that systemd's socket activation passes are handed on, as runc does it.
pub(super) fn preserved(asked: u32) -> u32 {
    let listening = std::env::var("LISTEN_FDS").ok().and_then(|count| count.parse().ok()).unwrap_or(0);
    asked.saturating_add(listening)
}

fn make(context: &Context, create: &Create, detached_start: bool, detach: bool) -> Result<(Container, Process)> {
    let bundle = Bundle::load(&create.bundle)?;
    console::check(has_terminal(bundle.process()?), create.console_socket.as_deref(), detach)?;
    let socket = create.console_socket.as_deref().map(console::connect).transpose()?;
    let options = CreateOptions {
        stdio: None,
        detached_start,
        preserve_fds: preserved(create.preserve_fds),
        no_pivot: create.no_pivot,
        no_new_keyring: create.no_new_keyring,
    };
    let (container, mut process) = context.runtime().create(&create.id, &bundle, options)?;
    let finish = |process: &mut Process| -> Result<()> {
        if let Some(socket) = &socket {
            let master = process.take_terminal().context("the container has no terminal to hand over")?;
            console::hand_over(socket, &master)?;
        }
        if let Some(path) = &create.pid_file {
            pid_file::write(path, process.pid())?;
        }
        Ok(())
    };
    match finish(&mut process) {
        Ok(()) => Ok((container, process)),
        Err(e) => {
            process.discard();
            undo(&container);
            Err(e)
        }
    }
}

/// Takes back a container whose creation could not be completed.
fn undo(container: &Container) {
    if let Err(e) = container.delete(true) {
        log::warn!("delete after a failure: {e}");
    }
}

/// `runx create`.
pub(crate) fn create(context: &Context, create: Create) -> Result<u8, Failure> {
    make(context, &create, true, true)?;
    Ok(0)
}

/// `runx run`.
pub(crate) fn run(context: &Context, run: Run) -> Result<u8, Failure> {
    if !run.no_subreaper && !run.detach {
        foreground::become_subreaper()?;
    }
    let signals = if run.detach { None } else { Some(Signals::hold()?) };
    let (container, mut process) = make(context, &run.create, false, run.detach)?;
    let started = process.start().and_then(|()| container.set_started());
    if let Err(e) = started {
        process.discard();
        undo(&container);
        if let Some(path) = &run.create.pid_file {
            let _ = std::fs::remove_file(path);
        }
        return Err(e.into());
    }
    let Some(signals) = signals else { return Ok(0) };
    let master = process.take_terminal();
    let exit = foreground::wait(&process, &signals, master)?;
    if !run.keep {
        container.delete(true)?;
    }
    Ok(exit.code as u8)
}
