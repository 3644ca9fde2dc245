//! `start`, `state`, `kill`, `delete`, `pause`, `resume`, `list`.

use std::io::Write;

use anyhow::{Context as _, Result, bail};
use runx_core::Error;
use runx_core::container::{Container, Status};

use crate::arguments::ListFormat;
use crate::{Context, Failure};

/// `runx start`.
pub(crate) fn start(context: &Context, id: &str) -> Result<u8, Failure> {
    context.runtime().load(id)?.start()?;
    Ok(0)
}

/// `runx pause`.
pub(crate) fn pause(context: &Context, id: &str) -> Result<u8, Failure> {
    context.runtime().load(id)?.pause()?;
    Ok(0)
}

/// `runx resume`.
pub(crate) fn resume(context: &Context, id: &str) -> Result<u8, Failure> {
    context.runtime().load(id)?.resume()?;
    Ok(0)
}

/// `runx kill`.
pub(crate) fn kill(context: &Context, id: &str, signal: &str, all: bool) -> Result<u8, Failure> {
    let signal = parse_signal(signal)?;
    match context.runtime().load(id)?.kill(signal, all) {
        // The words that engines look for.
        Err(Error::Finished) => Err(anyhow::anyhow!("container not running").into()),
        other => Ok(other.map(|()| 0)?),
    }
}

/// `runx delete`.
pub(crate) fn delete(context: &Context, id: &str, force: bool) -> Result<u8, Failure> {
    let runtime = context.runtime();
    if force {
        runtime.delete_force(id)?;
        return Ok(0);
    }
    match runtime.load(id)?.delete(false) {
        Err(Error::WrongState { id, status, .. }) => {
            Err(anyhow::anyhow!("cannot delete container {id} that is not stopped: {status}").into())
        }
        other => Ok(other.map(|()| 0)?),
    }
}

/// `runx state`.
pub(crate) fn state(context: &Context, id: &str) -> Result<u8, Failure> {
    let container = context.runtime().load(id)?;
    let text = serde_json::to_string_pretty(&describe(&container)).context("print the state")?;
    writeln!(std::io::stdout(), "{text}").context("print the state")?;
    Ok(0)
}

fn describe(container: &Container) -> serde_json::Value {
    let state = container.state();
    let status = container.status();
    let pid = if status == Status::Stopped { 0 } else { state.pid };
    let mut out = serde_json::json!({
        "ociVersion": state.oci_version,
        "id": state.id,
        "pid": pid,
        "status": status.to_string(),
        "bundle": state.bundle,
        "rootfs": state.rootfs,
        "created": state.created,
        "owner": user_name(state.owner),
    });
    if !state.annotations.is_empty() {
        out["annotations"] = serde_json::json!(state.annotations);
    }
    out
}

/// The name of a user in the host's /etc/passwd, or the number.
fn user_name(uid: u32) -> String {
    let passwd = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    let name = passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(uid)).then(|| name.to_owned())
    });
    name.unwrap_or_else(|| format!("#{uid}"))
}

/// `runx list`.
pub(crate) fn list(context: &Context, format: ListFormat, quiet: bool) -> Result<u8, Failure> {
    let containers = context.runtime().list()?;
    let mut out = std::io::stdout().lock();
    let printed = if quiet {
        containers.iter().try_for_each(|container| writeln!(out, "{}", container.state().id))
    } else {
        match format {
            ListFormat::Json => {
                let all: Vec<_> = containers.iter().map(describe).collect();
                writeln!(out, "{}", serde_json::json!(all))
            }
            ListFormat::Table => print_table(&mut out, &containers),
        }
    };
    printed.context("print the list")?;
    Ok(0)
}

fn print_table(out: &mut impl Write, containers: &[Container]) -> std::io::Result<()> {
    let rows: Vec<[String; 6]> = containers
        .iter()
        .map(|container| {
            let state = container.state();
            let status = container.status();
            let pid = if status == Status::Stopped { 0 } else { state.pid };
            [
                state.id.clone(),
                pid.to_string(),
                status.to_string(),
                state.bundle.display().to_string(),
                state.created.clone(),
                user_name(state.owner),
            ]
        })
        .collect();
    let titles = ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"].map(str::to_owned);
    let width = |column: usize| rows.iter().chain([&titles]).map(|row| row[column].len()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..5).map(width).collect();
    for row in [&titles].into_iter().chain(&rows) {
        for (cell, width) in row.iter().zip(&widths) {
            write!(out, "{cell:width$}   ")?;
        }
        writeln!(out, "{}", row[5])?;
    }
    Ok(())
}

/// A signal by number, or by name with or without `SIG`.
fn parse_signal(text: &str) -> Result<i32> {
    if let Ok(number) = text.parse::<i32>() {
        if (0..=libc::SIGRTMAX()).contains(&number) {
            return Ok(number);
        }
        bail!("unknown signal {text:?}");
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some((base, offset)) = real_time(name) {
        return Ok(base + offset);
    }
    SIGNALS
        .iter()
        .find(|(known, _)| *known == name)
        .map(|(_, number)| *number)
        .with_context(|| format!("unknown signal {text:?}"))
}

/// `RTMIN`, `RTMIN+3`, `RTMAX-1`.
fn real_time(name: &str) -> Option<(i32, i32)> {
    let (base, rest) = if let Some(rest) = name.strip_prefix("RTMIN") {
        (libc::SIGRTMIN(), rest)
    } else {
        (libc::SIGRTMAX(), name.strip_prefix("RTMAX")?)
    };
    let offset = if rest.is_empty() { 0 } else { rest.parse().ok()? };
    (libc::SIGRTMIN()..=libc::SIGRTMAX()).contains(&(base + offset)).then_some((base, offset))
}

const SIGNALS: &[(&str, i32)] = &[
    ("HUP", libc::SIGHUP),
    ("INT", libc::SIGINT),
    ("QUIT", libc::SIGQUIT),
    ("ILL", libc::SIGILL),
    ("TRAP", libc::SIGTRAP),
    ("ABRT", libc::SIGABRT),
    ("BUS", libc::SIGBUS),
    ("FPE", libc::SIGFPE),
    ("KILL", libc::SIGKILL),
    ("USR1", libc::SIGUSR1),
    ("SEGV", libc::SIGSEGV),
    ("USR2", libc::SIGUSR2),
    ("PIPE", libc::SIGPIPE),
    ("ALRM", libc::SIGALRM),
    ("TERM", libc::SIGTERM),
    ("STKFLT", libc::SIGSTKFLT),
    ("CHLD", libc::SIGCHLD),
    ("CONT", libc::SIGCONT),
    ("STOP", libc::SIGSTOP),
    ("TSTP", libc::SIGTSTP),
    ("TTIN", libc::SIGTTIN),
    ("TTOU", libc::SIGTTOU),
    ("URG", libc::SIGURG),
    ("XCPU", libc::SIGXCPU),
    ("XFSZ", libc::SIGXFSZ),
    ("VTALRM", libc::SIGVTALRM),
    ("PROF", libc::SIGPROF),
    ("WINCH", libc::SIGWINCH),
    ("IO", libc::SIGIO),
    ("PWR", libc::SIGPWR),
    ("SYS", libc::SIGSYS),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_go_by_number_and_name() {
        for (text, number) in [("9", 9), ("KILL", 9), ("sigterm", 15), ("SIGRTMIN+1", libc::SIGRTMIN() + 1)] {
            assert_eq!(parse_signal(text).unwrap(), number, "{text}");
        }
        for bad in ["", "65", "-1", "SIGNOPE", "RTMIN+99"] {
            assert!(parse_signal(bad).is_err(), "{bad}");
        }
    }
}
