//! `create` and `run`.

use anyhow::{Context as _, Result, bail};
use runx_core::Error;
use runx_core::bundle::{self, Bundle};
use runx_core::container::{Container, CreateOptions, Process};
use runx_core::rootless;
use runx_core::spec::Spec;

use super::console::Terminal;
use super::foreground::{self, Signals};
use super::notify::Proxy;
use super::{console, notify, pid_file, pidfd_socket};
use crate::arguments::{Create, Run};
use crate::{Context, Failure, message};

/// How many descriptors systemd's socket activation passes to this process, sd_listen_fds(3).
fn listening() -> u32 {
    let variable = |name| std::env::var(name).ok().and_then(|value| value.parse::<u32>().ok());
    // They may be meant for a parent of ours that did not take the variables away.
    if variable("LISTEN_PID") != Some(std::process::id()) {
        return 0;
    }
    // More than a process can have are a mistake, which check_preserved tells.
    variable("LISTEN_FDS").unwrap_or(0).min(1 << 20)
}

/// Makes sure that descriptors which are to be inherited are there, and nothing of ours that took their place.
pub(super) fn check_preserved(first: u32, count: u32) -> Result<()> {
    for number in first..first.saturating_add(count) {
        // SAFETY: F_GETFD takes no argument; on a number that is no descriptor it fails.
        let flags = unsafe { libc::fcntl(number as i32, libc::F_GETFD) };
        if flags == -1 || flags & libc::FD_CLOEXEC != 0 {
            bail!("unable to stat preserved-fd {} (of {count}): descriptor {number} is not open", number - first);
        }
    }
    Ok(())
}

fn make(context: &Context, create: &Create, detached_start: bool, detach: bool) -> Result<(Container, Process)> {
    let path =
        std::fs::canonicalize(&create.bundle).with_context(|| format!("find bundle {}", create.bundle.display()))?;
    let config = create.config.as_deref().map(std::path::absolute).transpose().context("find the configuration")?;
    let mut spec: Spec = bundle::parse_file(config.as_deref().unwrap_or(&path.join("config.json")))?;
    let listening = listening();
    if listening > 0
        && let Some(process) = spec.process_mut()
    {
        let mut env = process.env().clone().unwrap_or_default();
        // It will be the first process of its PID namespace.
        env.extend([format!("LISTEN_FDS={listening}"), "LISTEN_PID=1".to_owned()]);
        process.set_env(Some(env));
    }
    let runtime = context.runtime();
    let notify = notify::managers_socket().is_some();
    if notify {
        notify::add_to(&mut spec, &runtime.notify_directory(&create.id)?);
    }
    let bundle = Bundle::new(path, spec)?;
    let terminal = bundle.process()?.terminal().unwrap_or(false);
    console::check(terminal, create.console_socket.as_deref(), detach)?;
    check_preserved(3, listening)?;
    check_preserved(3 + listening, create.preserve_fds)?;
    let entered = rootless::is_ordinary_user();
    let socket = create.console_socket.as_deref().map(console::connect).transpose()?;
    let pidfd_socket = create.pidfd_socket.as_deref().map(pidfd_socket::connect).transpose()?;
    let options = CreateOptions {
        stdio: None,
        born: None,
        detached_start,
        preserve_fds: listening.saturating_add(create.preserve_fds),
        no_pivot: create.no_pivot,
        no_new_keyring: create.no_new_keyring,
        systemd_cgroup: context.global.systemd_cgroup,
        notify,
        config,
        entered,
        lenient: context.global.rootless,
        modules: None,
    };
    log::debug!("creating container {} from {}", create.id, bundle.path().display());
    if entered {
        rootless::enter(&bundle)?;
    }
    let (container, mut process) = runtime.create(&create.id, &bundle, options)?;
    let finish = |process: &mut Process| -> Result<()> {
        if let Some(socket) = &socket {
            let master = process.take_terminal().context("the container has no terminal to hand over")?;
            console::hand_over(socket, &master)?;
        }
        if let Some(socket) = &pidfd_socket {
            pidfd_socket::send(socket, "standard", process.pidfd())?;
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

/// The way from a container that is about to start to the service manager, if both are there.
pub(super) fn proxy(context: &Context, id: &str) -> Result<Option<Proxy>> {
    let directory = context.runtime().notify_directory(id)?;
    match notify::managers_socket() {
        // A container that was created without a manager has no place for the socket.
        Some(manager) if directory.exists() => Proxy::open(&directory, &manager).map(Some),
        _ => Ok(None),
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
    let begin = |process: &mut Process| -> Result<(Option<Terminal>, Option<Proxy>)> {
        let proxy = proxy(context, &run.create.id)?;
        let terminal = process.take_terminal().map(Terminal::connect).transpose()?;
        process.start()?;
        container.set_started()?;
        Ok((terminal, proxy))
    };
    let (terminal, proxy) = match begin(&mut process) {
        Ok(begun) => begun,
        Err(e) => {
            process.discard();
            undo(&container);
            if let Some(path) = &run.create.pid_file {
                let _ = std::fs::remove_file(path);
            }
            return Err(e.into());
        }
    };
    let Some(signals) = signals else {
        if let Some(proxy) = proxy
            && let Err(e) = proxy.wait(process.pid(), process.pidfd())
        {
            // The container runs; the manager will find out by itself that it was told nothing.
            log::warn!("{}", message(&e));
        }
        return Ok(0);
    };
    let exit = foreground::wait(&process, &signals, terminal.as_ref(), proxy.as_ref())?;
    if !run.keep {
        match container.delete(true) {
            // Somebody else was faster.
            Err(Error::NotFound(_)) => {}
            other => other?,
        }
    }
    Ok(exit.code as u8)
}
