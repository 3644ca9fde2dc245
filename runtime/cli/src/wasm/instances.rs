//! Modules in the background: each has a directory with its state and what it prints, and a process of ours that waits for
//! its end.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::SystemTime;

use anyhow::{Context as _, Result, anyhow, bail};
use runx_core::container::validate_id;
use runx_core::spawn::refuse_threads;
use runx_core::sys::{pidfd, process};
use serde::{Deserialize, Serialize};

use super::program;
use crate::arguments::{ListFormat, Program};
use crate::{Context, Failure, message, print};

/// What is known of one.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct State {
    id: String,
    pid: i32,
    /// With the pid, the process's identity: a pid may become another's.
    start_time: u64,
    command: Vec<String>,
    created: String,
    /// Once it has ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    exit_code: Option<i32>,
}

impl State {
    fn alive(&self) -> bool {
        self.pid > 0 && process::start_time(self.pid) == Some(self.start_time)
    }

    fn status(&self) -> &'static str {
        if self.alive() { "running" } else { "stopped" }
    }

    fn read(directory: &Path, id: &str) -> Result<Self> {
        let path = directory.join("state.json");
        match fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).with_context(|| format!("read {}", path.display())),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => bail!("there is no module {id:?}"),
            Err(e) => Err(e).with_context(|| format!("read {}", path.display())),
        }
    }

    fn write(&self, directory: &Path) -> Result<()> {
        let (path, temporary) = (directory.join("state.json"), directory.join(".state.json"));
        let text = serde_json::to_vec(self).context("write the state")?;
        fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)
            .and_then(|mut file| file.write_all(&text))
            .and_then(|()| fs::rename(&temporary, &path))
            .with_context(|| format!("write {}", path.display()))
    }
}

fn root(context: &Context) -> PathBuf {
    context.global.root.join(".wasm")
}

fn directory(context: &Context, id: &str) -> Result<PathBuf> {
    validate_id(id)?;
    Ok(root(context).join(id))
}

/// Makes the directory of a new one, with the name that is asked for or a short one of ours.
fn make_directory(context: &Context, name: Option<&str>) -> Result<(String, PathBuf)> {
    let root = root(context);
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&root)
        .with_context(|| format!("create {}", root.display()))?;
    for _ in 0..16 {
        let id = match name {
            Some(name) => name.to_owned(),
            None => {
                let mut bytes = [0; 6];
                File::open("/dev/urandom")
                    .and_then(|mut file| file.read_exact(&mut bytes))
                    .context("read random bytes")?;
                bytes.iter().map(|byte| format!("{byte:02x}")).collect()
            }
        };
        let path = directory(context, &id)?;
        match fs::DirBuilder::new().mode(0o700).create(&path) {
            Ok(()) => return Ok((id, path)),
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists && name.is_none() => {}
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => bail!("there is a module {id:?} already"),
            Err(e) => return Err(e).with_context(|| format!("create {}", path.display())),
        }
    }
    Err(anyhow!("no free id was found"))
}

/// `runx wasm run --detach`: prints the id.
pub(super) fn start(context: &Context, program: &Program, verb: &str) -> Result<u8, Failure> {
    let (command, artifact) = program::command(context, program, verb)?;
    let (id, path) = make_directory(context, program.name.as_deref())?;
    let started = launch(&id, &path, program, command);
    drop(artifact);
    if let Err(e) = started {
        let _ = fs::remove_dir_all(&path);
        return Err(e.into());
    }
    print(&format!("{id}\n"))
}

/// Starts it as the child of a process of its own, which stays until its end.
fn launch(id: &str, path: &Path, program: &Program, mut command: std::process::Command) -> Result<()> {
    let log = || fs::OpenOptions::new().create(true).append(true).mode(0o600).open(path.join("log"));
    command.stdin(Stdio::null()).stdout(log().context("create the log")?).stderr(log().context("create the log")?);
    let (mut ours, mut theirs) = std::io::pipe().context("make a pipe")?;
    refuse_threads()?;
    // SAFETY: refuse_threads made sure that there is no other thread.
    match unsafe { process::clone(0, None) }.context("clone the process that waits")? {
        process::Cloned::Parent { .. } => {
            drop(theirs);
            let mut said = String::new();
            ours.read_to_string(&mut said).context("hear whether it was started")?;
            if said.is_empty() { Ok(()) } else { Err(anyhow!(said)) }
        }
        process::Cloned::Child => {
            drop(ours);
            let waited = watch(id, path, program, command, &mut theirs);
            if let Err(e) = &waited {
                // Nobody may be left to hear it.
                let _ = theirs.write_all(message(e).as_bytes());
            }
            // SAFETY: ends this process without running destructors that belong to the caller's copy.
            unsafe { libc::_exit(waited.is_err().into()) }
        }
    }
}

fn watch(
    id: &str,
    path: &Path,
    program: &Program,
    mut command: std::process::Command,
    caller: &mut std::io::PipeWriter,
) -> Result<()> {
    nix::unistd::setsid().context("leave the session")?;
    let mut child = command.spawn().context("run the program for modules")?;
    let pid = child.id() as i32;
    let words = std::iter::once(program.file.to_string_lossy().into_owned()).chain(program.args.iter().cloned());
    let mut state = State {
        id: id.to_owned(),
        pid,
        start_time: process::start_time(pid).unwrap_or(0),
        command: words.collect(),
        created: humantime::format_rfc3339_nanos(SystemTime::now()).to_string(),
        exit_code: None,
    };
    state.write(path)?;
    // The caller need not wait for more, and his terminal is not ours.
    let null = File::options().read(true).write(true).open("/dev/null").context("open /dev/null")?;
    for number in 0..3 {
        // SAFETY: what is on these numbers is used by nobody in this process any more.
        unsafe { libc::dup2(std::os::fd::AsRawFd::as_raw_fd(&null), number) };
    }
    let closed = std::mem::replace(caller, std::io::pipe().context("make a pipe")?.1);
    drop(closed);
    drop(command);
    let status = child.wait().context("wait for the module")?;
    use std::os::unix::process::ExitStatusExt;
    state.exit_code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
    // It may have been removed meanwhile.
    if path.exists() { state.write(path) } else { Ok(()) }
}

fn all(context: &Context) -> Result<Vec<State>> {
    let root = root(context);
    let entries = match fs::read_dir(&root) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.with_context(|| format!("list {}", root.display()))?,
    };
    let mut out: Vec<State> = entries
        .flatten()
        .filter_map(|entry| State::read(&entry.path(), &entry.file_name().to_string_lossy()).ok())
        .collect();
    out.sort_by(|a, b| a.created.cmp(&b.created));
    Ok(out)
}

fn describe(state: &State) -> serde_json::Value {
    serde_json::json!({
        "id": state.id,
        "pid": if state.alive() { state.pid } else { 0 },
        "status": state.status(),
        "exitCode": state.exit_code,
        "command": state.command,
        "created": state.created,
    })
}

/// `runx wasm ps`.
pub(super) fn ps(context: &Context, format: ListFormat, quiet: bool) -> Result<u8, Failure> {
    let states = all(context)?;
    let mut out = String::new();
    match format {
        _ if quiet => states.iter().for_each(|state| out.push_str(&format!("{}\n", state.id))),
        ListFormat::Json => {
            let list: Vec<_> = states.iter().map(describe).collect();
            out = serde_json::to_string(&list).context("print as JSON")? + "\n";
        }
        ListFormat::Table => {
            let width = states.iter().map(|state| state.id.len()).max().unwrap_or(0).max(12);
            out.push_str(&format!(
                "{:width$}  {:>8}  {:8}  {:4}  {:20}  COMMAND\n",
                "ID", "PID", "STATUS", "EXIT", "CREATED"
            ));
            for state in &states {
                let pid = if state.alive() { state.pid } else { 0 };
                let code = state.exit_code.map(|code| code.to_string()).unwrap_or_default();
                out.push_str(&format!(
                    "{:width$}  {pid:>8}  {:8}  {code:4}  {:20}  {}\n",
                    state.id,
                    state.status(),
                    &state.created[..state.created.len().min(19)],
                    state.command.join(" ")
                ));
            }
        }
    }
    print(&out)
}

/// `runx wasm state`.
pub(super) fn state(context: &Context, id: &str) -> Result<u8, Failure> {
    let state = State::read(&directory(context, id)?, id)?;
    print(&(serde_json::to_string_pretty(&describe(&state)).context("print as JSON")? + "\n"))
}

/// `runx wasm kill`.
pub(super) fn kill(context: &Context, id: &str, signal: &str) -> Result<u8, Failure> {
    let number = crate::oci::signal::parse(signal)?;
    let state = State::read(&directory(context, id)?, id)?;
    let process = pidfd::open(state.pid).ok().filter(|_| state.alive());
    let Some(process) = process else { return Err(anyhow!("module {id:?} is not running").into()) };
    pidfd::send_signal(process.as_fd(), number).with_context(|| format!("send {signal} to module {id:?}"))?;
    Ok(0)
}

/// `runx wasm logs`.
pub(super) fn logs(context: &Context, id: &str) -> Result<u8, Failure> {
    let directory = directory(context, id)?;
    State::read(&directory, id)?;
    let path = directory.join("log");
    let mut log = File::open(&path).with_context(|| format!("open {}", path.display()))?;
    match std::io::copy(&mut log, &mut std::io::stdout().lock()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(e).context("print the log")?,
        _ => Ok(0),
    }
}

/// `runx wasm rm`.
pub(super) fn rm(context: &Context, id: &str, force: bool) -> Result<u8, Failure> {
    let directory = directory(context, id)?;
    let state = match State::read(&directory, id) {
        // It may be half made, or half gone.
        Err(_) if force => None,
        other => Some(other?),
    };
    if let Some(state) = state.filter(State::alive) {
        if !force {
            return Err(anyhow!("module {id:?} is running: use --force, or kill it first").into());
        }
        let process = pidfd::open(state.pid).with_context(|| format!("open process {}", state.pid))?;
        if state.alive() {
            let _ = pidfd::send_signal(process.as_fd(), libc::SIGKILL);
            pidfd::wait_ended(process.as_fd(), 10_000).context("wait for the module's end")?;
        }
    }
    match fs::remove_dir_all(&directory) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound || !force => {
            Err(e).with_context(|| format!("remove {}", directory.display()))?
        }
        _ => Ok(0),
    }
}
