//! `start`, `kill`, `delete`, `pause`, `resume`: commands that change a container and print nothing.

use anyhow::{Result, anyhow};
use runx_core::Error;
use runx_core::container::Status;

use super::{create, signal};
use crate::{Context, Failure};

/// What runc says of an operation in the wrong state. Engines look for these words.
fn in_runcs_words(error: Error) -> anyhow::Error {
    let Error::WrongState { operation, id, status } = &error else { return error.into() };
    match (*operation, status.as_str()) {
        ("start", "stopped") => anyhow!("cannot start a container that has stopped: {id:?}"),
        ("start", "running") => anyhow!("cannot start an already running container: {id:?}"),
        ("start", _) => anyhow!("cannot start a container in the {status} state: {id:?}"),
        ("delete", _) => anyhow!("cannot delete container {id} that is not stopped: {status}"),
        ("resume", _) => anyhow!("container not paused: {id:?} is {status}"),
        ("pause" | "update", _) => anyhow!("container not running: cannot {operation} {id:?}, it is {status}"),
        _ => error.into(),
    }
}

/// The exit code of an operation, or its failure in runc's words.
pub(super) fn outcome(result: runx_core::Result<()>) -> Result<u8, Failure> {
    Ok(result.map(|()| 0).map_err(in_runcs_words)?)
}

/// `runx start`.
pub(crate) fn start(context: &Context, id: &str) -> Result<u8, Failure> {
    let container = context.runtime().load(id)?;
    let proxy = if container.status() == Status::Created { create::proxy(context, id)? } else { None };
    let code = outcome(container.start())?;
    // If it has ended already, nobody will ever be ready.
    if let (Some(proxy), Ok(process)) = (proxy, container.first_process()) {
        proxy.wait(container.state().pid, &process)?;
    }
    Ok(code)
}

/// `runx pause`.
pub(crate) fn pause(context: &Context, id: &str) -> Result<u8, Failure> {
    outcome(context.runtime().load(id)?.pause())
}

/// `runx resume`.
pub(crate) fn resume(context: &Context, id: &str) -> Result<u8, Failure> {
    outcome(context.runtime().load(id)?.resume())
}

/// `runx kill`.
pub(crate) fn kill(context: &Context, id: &str, signal: &str, all: bool) -> Result<u8, Failure> {
    let signal = signal::parse(signal)?;
    match context.runtime().load(id)?.kill(signal, all) {
        // Engines look for these words, too.
        Err(Error::Finished) => Err(anyhow!("container not running").into()),
        other => outcome(other),
    }
}

/// `runx delete`.
pub(crate) fn delete(context: &Context, id: &str, force: bool) -> Result<u8, Failure> {
    let runtime = context.runtime();
    if force {
        return outcome(runtime.delete_force(id));
    }
    let deleted = runtime.load(id).and_then(|container| container.delete(false));
    if let Err(Error::NotFound(_)) = &deleted
        && runtime.root().join(id).exists()
    {
        return Err(anyhow!(
            "container does not exist: {id:?}; what a create that was killed left of it is removed by delete --force"
        )
        .into());
    }
    outcome(deleted)
}
