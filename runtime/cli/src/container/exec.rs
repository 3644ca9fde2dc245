//! `exec`: another program in a container that runs.

use std::os::fd::{AsFd, OwnedFd};

use anyhow::{Context as _, Result, anyhow};
use runx_core::container::{Container, ExecOptions};
use runx_core::spec::{Process as ProcessSpec, Spec};
use runx_core::{bundle, sys};

use super::pipes::Pipes;
use super::record::Containers;
use super::spec::all_capabilities;
use super::status::{Seen, Status};
use super::{attach, monitor, users};
use crate::arguments::ContainerExec;
use crate::oci::console::Terminal;
use crate::oci::exec::{enter, set_variable};
use crate::oci::foreground::{self, Signals};
use crate::{Context, Failure};

/// `runx container exec`.
pub(super) fn exec(context: &Context, exec: ContainerExec) -> Result<u8, Failure> {
    let seen = Seen::look(context, Containers::of(context).find(&exec.id)?)?;
    let id = &seen.record.id;
    let core = match (seen.status, &seen.core) {
        (Status::Running, Some(core)) => core,
        (Status::Paused, _) => {
            return Err(anyhow!("container {id:?} is paused: let it go on with \"runx container unpause {id}\"").into());
        }
        (status, _) => {
            return Err(
                anyhow!("container {id:?} is not running, it is {status}: \"runx container start {id}\"").into()
            );
        }
    };
    if exec.tty && exec.interactive && !exec.detach && !attach::is_terminal(0) {
        return Err(anyhow!(
            "-t with -i connects your terminal to the program's, but standard input is none: leave -t out"
        )
        .into());
    }
    let description = describe(core, &exec)?;
    let signals = if exec.detach { None } else { Some(Signals::hold()?) };
    let (pipes, stdio) = match (exec.detach, exec.tty) {
        (true, _) => (None, Some(nothing()?)),
        (false, true) => (None, None),
        (false, false) => {
            let (ours, theirs) = Pipes::make(exec.interactive)?;
            (Some(ours), Some(theirs))
        }
    };
    let entered = enter(core)?;
    let options = ExecOptions { stdio, entered, ..ExecOptions::default() };
    let failed = |error: runx_core::Error| {
        let error = anyhow::Error::from(error);
        let code = match monitor::exit_code(&error) {
            125 => 1,
            code => code,
        };
        Failure { error, code }
    };
    let mut process = context.runtime().exec(core, &description, options).map_err(failed)?;
    let terminal = match process.take_terminal() {
        Some(master) if exec.interactive => Some(Terminal::connect_raw(master)),
        Some(master) => Some(Terminal::watch(master)?),
        None => None,
    };
    if let Err(e) = process.start() {
        process.discard();
        drop(terminal);
        return Err(failed(e));
    }
    let Some(signals) = signals else { return Ok(0) };
    let exit = match pipes {
        Some(pipes) => pipes.wait(&process, &signals)?,
        None => foreground::wait(&process, &signals, terminal.as_ref(), None)?,
    };
    Ok(exit.code as u8)
}

/// The streams of one that nobody looks at.
fn nothing() -> Result<[OwnedFd; 3]> {
    let null = || sys::open("/dev/null", libc::O_RDWR).context("open /dev/null");
    Ok([null()?, null()?, null()?])
}

/// The container's own process with another command line, and what the flags change.
fn describe(core: &Container, exec: &ContainerExec) -> Result<ProcessSpec> {
    let config: Spec = bundle::parse_file(&core.state().config_path())?;
    let mut process = config.process().clone().context("the container's configuration has no process")?;
    process.set_args(Some(exec.args.clone()));
    process.set_terminal(Some(exec.tty && !exec.detach));
    process.set_console_size(None);
    let mut env = process.env().clone().unwrap_or_default();
    if exec.tty && !env.iter().any(|variable| variable.starts_with("TERM=")) {
        env.push("TERM=xterm".to_owned());
    }
    for variable in &exec.env {
        set_variable(&mut env, variable);
    }
    if let Some(cwd) = &exec.cwd {
        process.set_cwd(cwd.into());
    }
    if let Some(text) = &exec.user {
        let pid = core.pid().context("the container has ended in this moment")?;
        let root = sys::open(format!("/proc/{pid}/root"), libc::O_PATH | libc::O_DIRECTORY)
            .context("open the container's root")?;
        let user = users::resolve(root.as_fd(), text, &[])?;
        process.user_mut().set_uid(user.uid);
        process.user_mut().set_gid(user.gid);
        process.user_mut().set_additional_gids(Some(user.groups));
        if !exec.env.iter().any(|variable| variable.starts_with("HOME=")) {
            set_variable(&mut env, &format!("HOME={}", user.home));
        }
    }
    process.set_env(Some(env));
    set_capabilities(&mut process, exec.privileged)?;
    Ok(process)
}

/// Root gets what the container may have, others nothing at first; with `privileged`, all there is.
fn set_capabilities(process: &mut ProcessSpec, privileged: bool) -> Result<()> {
    let Some(mut sets) = process.capabilities().clone() else { return Ok(()) };
    if privileged {
        let all = serde_json::from_value(all_capabilities()?.into()).context("name the capabilities")?;
        sets.set_bounding(Some(all));
    }
    let at_first = if process.user().uid() == 0 { sets.bounding().clone() } else { None };
    let at_first = Some(at_first.unwrap_or_default());
    sets.set_effective(at_first.clone());
    sets.set_permitted(at_first);
    process.set_capabilities(Some(sets));
    Ok(())
}
