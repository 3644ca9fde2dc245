//! A process that is watched: hooks before and after its start and its end, signals passed on, and an end by time.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use runx_core::spawn::refuse_threads;
use runx_core::sys::{pidfd, process};
use serde::{Deserialize, Serialize};

use crate::oci::foreground::Signals;

/// The exit code of what was ended by its deadline, as timeout(1) has it.
const TIMED_OUT: i32 = 124;

/// Commands of the user's, for `sh -c`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Hooks {
    /// Before it is started; a failure keeps it from that.
    pub(crate) before_start: Vec<String>,
    /// Once it has started.
    pub(crate) after_start: Vec<String>,
    /// Before a signal that ends it is passed on.
    pub(crate) before_stop: Vec<String>,
    /// Once it has ended.
    pub(crate) after_stop: Vec<String>,
}

impl Hooks {
    /// Adds `WHEN=COMMAND`.
    ///
    /// # Errors
    /// For another time than the four.
    pub(crate) fn add(&mut self, text: &str) -> Result<()> {
        let (when, command) = text.split_once('=').with_context(|| format!("--hook {text:?} is not WHEN=COMMAND"))?;
        let list = match when {
            "before-start" => &mut self.before_start,
            "after-start" => &mut self.after_start,
            "before-stop" => &mut self.before_stop,
            "after-stop" => &mut self.after_stop,
            _ => bail!("--hook {when:?} is none of before-start, after-start, before-stop and after-stop"),
        };
        list.push(command.to_owned());
        Ok(())
    }

    pub(crate) fn is_empty(&self) -> bool {
        [&self.before_start, &self.after_start, &self.before_stop, &self.after_stop].iter().all(|list| list.is_empty())
    }
}

/// Runs hooks one after the other. They are told the id and the pid in variables.
///
/// # Errors
/// The first failure.
pub(crate) fn run_hooks(when: &str, list: &[String], id: &str, pid: i32) -> Result<()> {
    for text in list {
        let mut command = Command::new("sh");
        command.args(["-c", text]).env("RUNX_ID", id).env("RUNX_PID", pid.to_string());
        command.stdin(Stdio::null()).stdout(Stdio::from(io::stderr().as_fd().try_clone_to_owned()?));
        refuse_threads()?;
        // SAFETY: there is no other thread, whose locks the new process could wait for.
        unsafe { command.pre_exec(process::reset_signals) };
        let status = command.status().with_context(|| format!("run the hook {when}={text:?}"))?;
        if !status.success() {
            bail!("the hook {when}={text:?} ended with {status}");
        }
    }
    Ok(())
}

/// As [`run_hooks`], where a failure is only told.
fn run_each(when: &str, list: &[String], id: &str, pid: i32) {
    if let Err(e) = run_hooks(when, list, id, pid) {
        log::warn!("{}", crate::message(&e));
    }
}

/// Whether a signal asks for the end.
pub(crate) fn is_ending(signal: i32) -> bool {
    matches!(signal, libc::SIGTERM | libc::SIGINT | libc::SIGQUIT | libc::SIGHUP | libc::SIGKILL)
}

/// Starts a command and stays with it until its end. `started` is told its pid once it runs. Returns its exit code.
///
/// # Errors
/// A failed hook before the start, and the kernel's.
pub(crate) fn supervise(
    id: &str,
    mut command: Command,
    hooks: &Hooks,
    timeout: Option<Duration>,
    started: impl FnOnce(i32) -> Result<()>,
) -> Result<i32> {
    let signals = Signals::hold()?;
    run_hooks("before-start", &hooks.before_start, id, 0)?;
    refuse_threads()?;
    // SAFETY: there is no other thread, whose locks the new process could wait for.
    unsafe { command.pre_exec(process::reset_signals) };
    let child = command.spawn().with_context(|| format!("run {}", command.get_program().to_string_lossy()))?;
    let pid = child.id() as i32;
    let process = pidfd::open(pid).with_context(|| format!("open process {pid}"))?;
    let end = |error: anyhow::Error| {
        let _ = pidfd::send_signal(process.as_fd(), libc::SIGKILL);
        let _ = pidfd::wait(process.as_fd());
        error
    };
    started(pid).map_err(end)?;
    if let Err(e) = run_hooks("after-start", &hooks.after_start, id, pid) {
        let e = end(e);
        run_each("after-stop", &hooks.after_stop, id, pid);
        return Err(e);
    }
    let deadline = timeout.map(|timeout| Instant::now() + timeout);
    let (mut stopping, mut timed_out) = (false, false);
    let exit = loop {
        if let Some(exit) = pidfd::try_wait(process.as_fd()).context("wait for the process")? {
            break exit;
        }
        while let Some(signal) = signals.next() {
            if matches!(signal, libc::SIGCHLD | libc::SIGURG) {
                continue;
            }
            if is_ending(signal) && !stopping {
                stopping = true;
                run_each("before-stop", &hooks.before_stop, id, pid);
            }
            // It may have ended in this moment.
            let _ = pidfd::send_signal(process.as_fd(), signal);
        }
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) && !timed_out {
            timed_out = true;
            eprintln!("runx: {id}: its time of {} ms is over", timeout.unwrap_or_default().as_millis());
            if !std::mem::replace(&mut stopping, true) {
                run_each("before-stop", &hooks.before_stop, id, pid);
            }
            let _ = pidfd::send_signal(process.as_fd(), libc::SIGKILL);
        }
        let limit = left.filter(|_| !timed_out).map_or(-1, |left| left.as_millis().clamp(1, i32::MAX as u128) as i32);
        // SIGCHLD comes over the same descriptor.
        runx_core::sys::poll(signals.as_fd(), libc::POLLIN, limit).context("wait for the process")?;
    };
    run_each("after-stop", &hooks.after_stop, id, pid);
    Ok(if timed_out { TIMED_OUT } else { exit.code })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hooks_name_when_they_run() {
        let mut hooks = Hooks::default();
        assert!(hooks.is_empty());
        hooks.add("before-start=a=b").unwrap();
        hooks.add("after-stop=c").unwrap();
        assert_eq!((hooks.before_start, hooks.after_stop), (vec!["a=b".to_owned()], vec!["c".to_owned()]));
        assert!(Hooks::default().add("later=x").is_err());
        assert!(Hooks::default().add("before-start").is_err());
    }
}
