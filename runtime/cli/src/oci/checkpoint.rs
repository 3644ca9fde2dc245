//! `checkpoint` and `restore`.

use anyhow::{Context as _, Result};
use runx_core::Error;
use runx_core::bundle::Bundle;
use runx_core::container::{Container, Process, RestoreOptions, Status};

use super::console::Terminal;
use super::foreground::{self, Signals};
use super::{console, pid_file};
use crate::arguments::{Checkpoint, Restore};
use crate::{Context, Failure};

/// `runx checkpoint`. As with runc, the container is deleted unless it goes on.
pub(crate) fn checkpoint(context: &Context, checkpoint: &Checkpoint) -> Result<u8, Failure> {
    let container = context.runtime().load(&checkpoint.id)?;
    container.checkpoint(&checkpoint.options)?;
    if !checkpoint.options.leave_running && !checkpoint.options.pre_dump {
        match container.delete(true) {
            // The one who waits for its end was faster.
            Err(Error::NotFound(_)) => {}
            other => other?,
        }
    }
    Ok(0)
}

/// `runx restore`.
pub(crate) fn restore(context: &Context, restore: Restore) -> Result<u8, Failure> {
    if !restore.no_subreaper && !restore.detach {
        foreground::become_subreaper()?;
    }
    let signals = if restore.detach { None } else { Some(Signals::hold()?) };
    let (container, mut process) = make(context, &restore)?;
    let terminal = match hand_out(&restore, &mut process) {
        Ok(terminal) => terminal,
        Err(e) => {
            process.discard();
            if let Err(left) = container.delete(true) {
                log::warn!("delete after a failure: {left}");
            }
            return Err(e.into());
        }
    };
    let Some(signals) = signals else { return Ok(0) };
    let exit = foreground::wait(&process, &signals, terminal.as_ref(), None)?;
    if container.status() == Status::Stopped {
        match container.delete(true) {
            Err(Error::NotFound(_)) => {}
            other => other?,
        }
    }
    Ok(exit.code as u8)
}

fn make(context: &Context, restore: &Restore) -> Result<(Container, Process)> {
    let bundle = Bundle::load(&restore.bundle)?;
    let terminal = bundle.process()?.terminal().unwrap_or(false);
    console::check(terminal, restore.console_socket.as_deref(), restore.detach)?;
    let options = RestoreOptions {
        images: restore.images.clone(),
        systemd_cgroup: context.global.systemd_cgroup,
        config: None,
        lsm_profile: restore.lsm_profile.clone(),
        lsm_mount_context: restore.lsm_mount_context.clone(),
    };
    log::debug!("restoring container {} from {}", restore.id, options.images.images.display());
    Ok(context.runtime().restore(&restore.id, &bundle, &options)?)
}

/// Hands out what the process has to give. A terminal that nobody else wants is connected to ours.
fn hand_out(restore: &Restore, process: &mut Process) -> Result<Option<Terminal>> {
    if let Some(path) = &restore.console_socket {
        let socket = console::connect(path)?;
        let master = process.take_terminal().context("the container has no terminal to hand over")?;
        console::hand_over(&socket, &master)?;
    }
    if let Some(path) = &restore.pid_file {
        pid_file::write(path, process.pid())?;
    }
    process.take_terminal().map(Terminal::connect).transpose()
}
