//! `exec`.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context as _, Result, anyhow, bail};
use runx_core::Error;
use runx_core::bundle;
use runx_core::container::{Container, ExecOptions, Group, Process, Status};
use runx_core::rootless;
use runx_core::spec::{Capabilities, Capability, LinuxCapabilities, Process as ProcessSpec, Spec};

use super::console::Terminal;
use super::create::check_preserved;
use super::foreground::{self, Signals};
use super::{console, pid_file, pidfd_socket};
use crate::arguments::Exec;
use crate::{Context, Failure};

/// `runx exec`.
pub(crate) fn exec(context: &Context, exec: Exec) -> Result<u8, Failure> {
    let runtime = context.runtime();
    let container = runtime.load(&exec.id)?;
    let description = describe(&container, &exec)?;
    let terminal = description.terminal().unwrap_or(false);
    console::check(terminal, exec.console_socket.as_deref(), exec.detach)?;
    check_preserved(3, exec.preserve_fds)?;
    let sockets = Sockets {
        console: exec.console_socket.as_deref().map(console::connect).transpose()?,
        pidfd: exec.pidfd_socket.as_deref().map(pidfd_socket::connect).transpose()?,
    };
    let signals = if exec.detach { None } else { Some(Signals::hold()?) };
    let entered = enter(&container)?;
    let options = ExecOptions {
        stdio: None,
        born: None,
        preserve_fds: exec.preserve_fds,
        groups: parse_groups(&exec.cgroup)?,
        ignore_paused: exec.ignore_paused,
        entered,
        program: None,
    };
    log::debug!("executing {:?} in container {}", description.args().as_deref().unwrap_or_default(), exec.id);
    let mut process = runtime.exec(&container, &description, options).map_err(in_runcs_words)?;
    let terminal = match begin(&mut process, &exec, &sockets) {
        Ok(terminal) => terminal,
        Err(e) => {
            process.discard();
            if let Some(path) = &exec.pid_file {
                let _ = std::fs::remove_file(path);
            }
            return Err(e.into());
        }
    };
    let Some(signals) = signals else { return Ok(0) };
    Ok(foreground::wait(&process, &signals, terminal.as_ref(), None)?.code as u8)
}

/// Enters the container's user namespace, where an ordinary user has to. Tells whether he had.
pub(crate) fn enter(container: &Container) -> Result<bool> {
    let has_one = container.state().namespaces & libc::CLONE_NEWUSER != 0;
    if !has_one || !rootless::is_ordinary_user() || container.status() == Status::Stopped {
        return Ok(false);
    }
    if container.status() == Status::Created {
        // Its memory is still the runtime's, which is hidden from this user, and its namespaces with it.
        bail!("only root can exec in a container that has not been started: {:?}", container.state().id);
    }
    rootless::join(container.first_process()?.as_fd())?;
    Ok(true)
}

/// Who wants to have what the process has to give.
struct Sockets {
    console: Option<UnixStream>,
    pidfd: Option<UnixStream>,
}

/// What runc says of a container that nothing can be executed in.
pub(super) fn in_runcs_words(error: Error) -> anyhow::Error {
    match &error {
        Error::WrongState { id, status, .. } if status == "paused" => {
            anyhow!("cannot exec in a paused container (use --ignore-paused to override): {id:?}")
        }
        Error::WrongState { id, status, .. } => anyhow!("cannot exec in a {status} container: {id:?}"),
        _ => error.into(),
    }
}

/// Hands out what the process has to give, and starts it. A terminal that nobody else wants is connected to ours.
fn begin(process: &mut Process, exec: &Exec, sockets: &Sockets) -> Result<Option<Terminal>> {
    if let Some(socket) = &sockets.console {
        let master = process.take_terminal().context("the process has no terminal to hand over")?;
        console::hand_over(socket, &master)?;
    }
    if let Some(socket) = &sockets.pidfd {
        pidfd_socket::send(socket, "setns", process.pidfd())?;
    }
    if let Some(path) = &exec.pid_file {
        pid_file::write(path, process.pid())?;
    }
    let terminal = process.take_terminal().map(Terminal::connect).transpose()?;
    process.start()?;
    Ok(terminal)
}

/// The process: from a file, or the container's own with another command line; then what the flags change.
fn describe(container: &Container, exec: &Exec) -> Result<ProcessSpec> {
    let mut process = match &exec.process {
        Some(path) => read(path)?,
        None => {
            let config: Spec = bundle::parse_file(&container.state().config_path())?;
            let mut process = config.process().clone().context("the container's configuration has no process")?;
            if exec.args.is_empty() {
                bail!("exec args cannot be empty");
            }
            process.set_terminal(Some(false));
            process
        }
    };
    if !exec.args.is_empty() {
        process.set_args(Some(exec.args.clone()));
    }
    if let Some(tty) = exec.tty {
        process.set_terminal(Some(tty));
    }
    if let Some(cwd) = &exec.cwd {
        process.set_cwd(cwd.clone());
    }
    if !exec.env.is_empty() {
        let mut env = process.env().clone().unwrap_or_default();
        for variable in &exec.env {
            set_variable(&mut env, variable);
        }
        process.set_env(Some(env));
    }
    if let Some(label) = &exec.process_label {
        process.set_selinux_label(Some(label.clone()));
    }
    if let Some(profile) = &exec.apparmor {
        process.set_apparmor_profile(Some(profile.clone()));
    }
    if let Some(on) = exec.no_new_privs {
        process.set_no_new_privileges(Some(on));
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

/// A process description. One that names no user means root, as with runc.
fn read(path: &Path) -> Result<ProcessSpec> {
    let name = path.display().to_string();
    let mut description: serde_json::Value = bundle::parse_file(path)?;
    if let Some(fields) = description.as_object_mut() {
        fields.entry("user").or_insert_with(|| serde_json::json!({"uid": 0, "gid": 0}));
    }
    Ok(bundle::parse(description.to_string().as_bytes(), &name)?)
}

/// Adds a variable, or gives it another value: of two with one name, programs would see the first.
pub(crate) fn set_variable(env: &mut Vec<String>, variable: &str) {
    let name = |variable: &str| variable.split('=').next().map(str::to_owned);
    env.retain(|before| name(before) != name(variable));
    env.push(variable.to_owned());
}

/// `PATH`, or `CONTROLLER,CONTROLLER:PATH` once or several times.
fn parse_groups(arguments: &[String]) -> Result<Vec<Group>> {
    let mut groups: Vec<Group> = Vec::new();
    for argument in arguments {
        let Some((controllers, path)) = argument.split_once(':') else {
            if arguments.len() > 1 {
                bail!("invalid --cgroup argument: {argument} (missing <controller>: prefix)");
            }
            groups.push(Group { controllers: Vec::new(), path: argument.into() });
            continue;
        };
        let controllers: Vec<String> = controllers.split(',').map(str::to_owned).collect();
        if controllers.iter().any(String::is_empty) {
            bail!("invalid --cgroup argument: {argument} (empty <controller> prefix)");
        }
        let mut before = groups.iter().flat_map(|group| &group.controllers);
        if let Some(twice) = before.find(|controller| controllers.contains(controller)) {
            bail!("invalid --cgroup argument(s): controller {twice} specified multiple times");
        }
        groups.push(Group { controllers, path: path.into() });
    }
    Ok(groups)
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
    let with = |set: &Option<Capabilities>, added: &[Capability]| {
        let mut set = set.clone().unwrap_or_default();
        set.extend(added);
        Some(set)
    };
    let (bounding, effective, permitted) =
        (with(sets.bounding(), &added), with(sets.effective(), &added), with(sets.permitted(), &added));
    sets.set_bounding(bounding);
    sets.set_effective(effective);
    sets.set_permitted(permitted);
    // The kernel lets no capability be ambient that is not inheritable.
    let inheritable = sets.inheritable().clone().unwrap_or_default();
    added.retain(|capability| inheritable.contains(capability));
    if !added.is_empty() {
        let ambient = with(sets.ambient(), &added);
        sets.set_ambient(ambient);
    }
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
    fn groups_are_named_with_their_controllers_or_alone() {
        let parse = |arguments: &[&str]| {
            parse_groups(&arguments.iter().map(|argument| (*argument).to_owned()).collect::<Vec<_>>())
        };
        let group = |controllers: &[&str], path: &str| Group {
            controllers: controllers.iter().map(|name| (*name).to_owned()).collect(),
            path: path.into(),
        };
        assert_eq!(parse(&["sub"]).unwrap(), [group(&[], "sub")]);
        assert_eq!(
            parse(&["cpu,cpuacct:a", "memory:b"]).unwrap(),
            [group(&["cpu", "cpuacct"], "a"), group(&["memory"], "b")]
        );
        for bad in [&["a", "b"][..], &["cpu:a", "b"], &[":a"], &["cpu,:a"], &["cpu:a", "cpuacct,cpu:b"]] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_variable_given_again_has_its_last_value() {
        let mut env = vec!["A=1".to_owned(), "AB=2".to_owned()];
        for variable in ["A=3", "C=", "A=4=5"] {
            set_variable(&mut env, variable);
        }
        assert_eq!(env, ["AB=2", "C=", "A=4=5"]);
    }

    #[test]
    fn users_are_numbers_and_nothing_else() {
        assert_eq!(parse_user("1000").unwrap(), (1000, None));
        assert_eq!(parse_user("1000:100").unwrap(), (1000, Some(100)));
        for bad in ["", "1x", "-1", "+1", "4294967296", "4294967295", "1:", "1:2:3", ":1", "root", " 1"] {
            assert!(parse_user(bad).is_err(), "{bad:?}");
        }
    }
}
