//! `exec`.

use std::os::unix::net::UnixStream;

use anyhow::{Context as _, Result, bail};
use runx_core::bundle::{self, Bundle};
use runx_core::container::{Container, ExecOptions, Process};
use runx_core::spec::{Capability, LinuxCapabilities, Process as ProcessSpec};

use super::create::preserved;
use super::foreground::{self, Signals};
use super::{console, pid_file};
use crate::arguments::Exec;
use crate::{Context, Failure};

/// `runx exec`.
pub(crate) fn exec(context: &Context, exec: Exec) -> Result<u8, Failure> {
    let runtime = context.runtime();
    let container = runtime.load(&exec.id)?;
    let description = describe(&container, &exec)?;
    let terminal = description.terminal().unwrap_or(false);
    console::check(terminal, exec.console_socket.as_deref(), exec.detach)?;
    let socket = exec.console_socket.as_deref().map(console::connect).transpose()?;
    let signals = if exec.detach { None } else { Some(Signals::hold()?) };
    let options = ExecOptions { stdio: None, preserve_fds: preserved(exec.preserve_fds) };
    let mut process = runtime.exec(&container, &description, options)?;
    let started = begin(&mut process, &exec, socket.as_ref());
    if let Err(e) = started {
        process.discard();
        if let Some(path) = &exec.pid_file {
            let _ = std::fs::remove_file(path);
        }
        return Err(e.into());
    }
    let Some(signals) = signals else { return Ok(0) };
    let master = process.take_terminal();
    Ok(foreground::wait(&process, &signals, master)?.code as u8)
}

/// Hands out what the process has to give, and starts it.
fn begin(process: &mut Process, exec: &Exec, socket: Option<&UnixStream>) -> Result<()> {
    if let Some(socket) = socket {
        let master = process.take_terminal().context("the process has no terminal to hand over")?;
        console::hand_over(socket, &master)?;
    }
    if let Some(path) = &exec.pid_file {
        pid_file::write(path, process.pid())?;
    }
    Ok(process.start()?)
}

/// The process: from a file, or the container's own with another command line and changes.
fn describe(container: &Container, exec: &Exec) -> Result<ProcessSpec> {
    if let Some(path) = &exec.process {
        return Ok(bundle::parse_file(path)?);
    }
    let bundle = Bundle::load(&container.state().bundle)?;
    let mut process = bundle.process()?.clone();
    if exec.args.is_empty() {
        bail!("process args cannot be empty");
    }
    process.set_args(Some(exec.args.clone()));
    process.set_terminal(Some(exec.tty));
    if let Some(cwd) = &exec.cwd {
        process.set_cwd(cwd.clone());
    }
    if !exec.env.is_empty() {
        let mut env = process.env().clone().unwrap_or_default();
        env.extend(exec.env.iter().cloned());
        process.set_env(Some(env));
    }
    if exec.no_new_privs {
        process.set_no_new_privileges(Some(true));
    }
    if let Some(text) = &exec.user {
        let (uid, gid) = parse_user(text)?;
        process.user_mut().set_uid(uid);
        if let Some(gid) = gid {
            process.user_mut().set_gid(gid);
        }
    }
    if !exec.additional_gids.is_empty() {
        let mut groups = process.user().additional_gids().clone().unwrap_or_default();
        groups.extend(&exec.additional_gids);
        process.user_mut().set_additional_gids(Some(groups));
    }
    add_capabilities(&mut process, &exec.cap)?;
    Ok(process)
}

/// Adds capabilities; never to the inheritable set (CVE-2022-29162).
fn add_capabilities(process: &mut ProcessSpec, names: &[String]) -> Result<()> {
    if names.is_empty() {
        return Ok(());
    }
    let mut added = Vec::new();
    for name in names {
        let capability: Capability = serde_json::from_value(name.to_ascii_uppercase().into())
            .with_context(|| format!("--cap {name:?} is not a capability"))?;
        added.push(capability);
    }
    let mut sets = match process.capabilities() {
        Some(sets) => sets.clone(),
        // The type's own default is not empty.
        None => serde_json::from_value::<LinuxCapabilities>(serde_json::json!({}))?,
    };
    let with = |set: &Option<runx_core::spec::Capabilities>| {
        let mut set = set.clone().unwrap_or_default();
        set.extend(&added);
        Some(set)
    };
    let (bounding, effective, permitted) = (with(sets.bounding()), with(sets.effective()), with(sets.permitted()));
    sets.set_bounding(bounding);
    sets.set_effective(effective);
    sets.set_permitted(permitted);
    process.set_capabilities(Some(sets));
    Ok(())
}

/// `UID[:GID]`, in digits and nothing else: a name or a number that does not fit must never become root
/// (CVE-2026-30892).
fn parse_user(text: &str) -> Result<(u32, Option<u32>)> {
    let number = |part: &str| -> Result<u32> {
        if part.is_empty() || !part.bytes().all(|byte| byte.is_ascii_digit()) {
            bail!("--user {text:?} is not UID or UID:GID in digits");
        }
        let id: u32 = part.parse().with_context(|| format!("--user {text:?}"))?;
        if id == u32::MAX {
            bail!("--user {text:?}: {id} is no user or group");
        }
        Ok(id)
    };
    match text.split_once(':') {
        Some((uid, gid)) => Ok((number(uid)?, Some(number(gid)?))),
        None => Ok((number(text)?, None)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_numbers_and_nothing_else() {
        assert_eq!(parse_user("1000").unwrap(), (1000, None));
        assert_eq!(parse_user("1000:100").unwrap(), (1000, Some(100)));
        for bad in ["", "1x", "-1", "+1", "4294967296", "4294967295", "1:", "1:2:3", ":1", "root", " 1"] {
            assert!(parse_user(bad).is_err(), "{bad:?}");
        }
    }
}
