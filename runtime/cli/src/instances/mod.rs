//! Modules, and native programs, that are watched, in the background or not: in the background each has a directory with its
//! state and what it prints, and a process of ours that waits for its end.

pub(crate) mod supervise;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, anyhow, bail};
use runx_core::cgroup::Refuge;
use runx_core::container::validate_id;
use runx_core::spawn::refuse_threads;
use runx_core::sys::{pidfd, process};
use serde::{Deserialize, Serialize};

use crate::arguments::{Instances, ListFormat, Program};
use crate::{Context, Failure, message, print};
use supervise::{Hooks, supervise};

/// What is watched, each kind by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Group {
    /// WASM modules and components.
    Modules,
    /// Native programs.
    Processes,
}

impl Group {
    fn directory(self) -> &'static str {
        match self {
            Self::Modules => ".wasm",
            Self::Processes => ".process",
        }
    }

    fn noun(self) -> &'static str {
        match self {
            Self::Modules => "module",
            Self::Processes => "process",
        }
    }
}

/// `ps`, `state`, `kill`, `logs` and `rm` of a group.
pub(crate) fn instances(context: &Context, group: Group, command: &Instances) -> Result<u8, Failure> {
    let place = Place { root: context.global.root.join(group.directory()), group };
    match command {
        Instances::Ps { format, quiet } => place.ps(*format, *quiet),
        Instances::State { id } => place.state(id),
        Instances::Kill { id, signal } => place.kill(id, signal),
        Instances::Logs { id } => place.logs(id),
        Instances::Rm { id, force } => place.rm(id, *force),
    }
}

/// Where a group's are.
struct Place {
    root: PathBuf,
    group: Group,
}

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
    #[serde(default, skip_serializing_if = "Hooks::is_empty")]
    hooks: Hooks,
    /// Once it has ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    exit_code: Option<i32>,
}

impl State {
    fn alive(&self) -> bool {
        self.pid > 0 && process::is_alive(self.pid, self.start_time)
    }

    fn status(&self) -> &'static str {
        if self.alive() { "running" } else { "stopped" }
    }

    fn read(directory: &Path, noun: &str, id: &str) -> Result<Self> {
        let path = directory.join("state.json");
        match fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).with_context(|| format!("read {}", path.display())),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => bail!("there is no {noun} {id:?}"),
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

impl Place {
    fn directory(&self, id: &str) -> Result<PathBuf> {
        validate_id(id)?;
        Ok(self.root.join(id))
    }

    fn read(&self, id: &str) -> Result<(PathBuf, State)> {
        let directory = self.directory(id)?;
        let state = State::read(&directory, self.group.noun(), id)?;
        Ok((directory, state))
    }

    /// Makes the directory of a new one, with the name that is asked for or a short one of ours.
    fn make_directory(&self, name: Option<&str>) -> Result<(String, PathBuf)> {
        let root = &self.root;
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(root)
            .with_context(|| format!("create {}", root.display()))?;
        for _ in 0..16 {
            let id = match name {
                Some(name) => name.to_owned(),
                None => random_id()?,
            };
            let path = self.directory(&id)?;
            match fs::DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => return Ok((id, path)),
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists && name.is_none() => {}
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {
                    bail!("there is a {} {id:?} already", self.group.noun())
                }
                Err(e) => return Err(e).with_context(|| format!("create {}", path.display())),
            }
        }
        Err(anyhow!("no free id was found"))
    }
}

fn random_id() -> Result<String> {
    let mut bytes = [0; 6];
    File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes)).context("read random bytes")?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Runs a command that [`Program`] describes in the foreground, watched.
pub(crate) fn foreground(program: &Program, command: Command, timeout: Option<Duration>) -> Result<u8, Failure> {
    let name = program.file.file_name().unwrap_or_default().to_string_lossy();
    Ok(supervise(&name, command, &program.hooks, timeout, |_| Ok(()))? as u8)
}

/// Runs it in the background, and prints its id.
pub(crate) fn background(
    context: &Context,
    group: Group,
    program: &Program,
    command: Command,
    timeout: Option<Duration>,
) -> Result<u8, Failure> {
    let place = Place { root: context.global.root.join(group.directory()), group };
    let (id, path) = place.make_directory(program.name.as_deref())?;
    if let Err(e) = launch(&id, &path, program, command, timeout) {
        let _ = fs::remove_dir_all(&path);
        return Err(e.into());
    }
    print(&format!("{id}\n"))
}

/// Starts it as the child of a process of its own, which stays until its end.
fn launch(id: &str, path: &Path, program: &Program, command: Command, timeout: Option<Duration>) -> Result<()> {
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
            let mut refuge = Refuge::default();
            let waited = watch(id, path, program, command, timeout, (&mut theirs, &mut refuge));
            refuge.leave();
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
    mut command: Command,
    timeout: Option<Duration>,
    (caller, refuge): (&mut std::io::PipeWriter, &mut Refuge),
) -> Result<()> {
    nix::unistd::setsid().context("leave the session")?;
    let log = || {
        let file = fs::OpenOptions::new().create(true).append(true).mode(0o600).open(path.join("log"));
        file.context("create the log")
    };
    command.stdin(Stdio::null()).stdout(log()?).stderr(log()?);
    let words = std::iter::once(program.file.to_string_lossy().into_owned()).chain(program.args.iter().cloned());
    let mut state = State {
        id: id.to_owned(),
        pid: 0,
        start_time: 0,
        command: words.collect(),
        created: humantime::format_rfc3339_nanos(SystemTime::now()).to_string(),
        hooks: program.hooks.clone(),
        exit_code: None,
    };
    let started = |pid: i32| {
        state.pid = pid;
        state.start_time = process::start_time(pid).unwrap_or(0);
        state.write(path)?;
        // Before anybody knows, as a container's monitor. The program stays with who started it.
        refuge.enter();
        // The caller need not wait for more, and his terminal is not ours: what hooks say belongs to the log.
        let null = File::options().read(true).open("/dev/null").context("open /dev/null")?;
        let log = log()?;
        for (number, file) in [(0, &null), (1, &log), (2, &log)] {
            // SAFETY: what is on these numbers is used by nobody in this process any more.
            unsafe { libc::dup2(file.as_raw_fd(), number) };
        }
        let closed = std::mem::replace(caller, std::io::pipe().context("make a pipe")?.1);
        drop(closed);
        Ok(())
    };
    let code = supervise(id, command, &program.hooks, timeout, started)?;
    state.exit_code = Some(code);
    // It may have been removed meanwhile.
    if path.exists() { state.write(path) } else { Ok(()) }
}

/// What listings of all kinds tell of one.
pub(crate) struct Listed {
    pub(crate) id: String,
    /// 0 once it has ended.
    pub(crate) pid: i32,
    pub(crate) status: &'static str,
    pub(crate) created: String,
    pub(crate) command: Vec<String>,
}

/// All of a group, the oldest first.
pub(crate) fn all(context: &Context, group: Group) -> Result<Vec<Listed>> {
    let place = Place { root: context.global.root.join(group.directory()), group };
    let listed = |state: State| Listed {
        pid: if state.alive() { state.pid } else { 0 },
        status: state.status(),
        id: state.id,
        created: state.created,
        command: state.command,
    };
    Ok(place.all()?.into_iter().map(listed).collect())
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

impl Place {
    fn all(&self) -> Result<Vec<State>> {
        let entries = match fs::read_dir(&self.root) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.with_context(|| format!("list {}", self.root.display()))?,
        };
        let read = |name: &str| State::read(&self.root.join(name), self.group.noun(), name).ok();
        let names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
        let mut out: Vec<State> =
            names.filter(|name| !name.starts_with(".gone-")).filter_map(|name| read(&name)).collect();
        out.sort_by(|a, b| a.created.cmp(&b.created));
        Ok(out)
    }

    fn ps(&self, format: ListFormat, quiet: bool) -> Result<u8, Failure> {
        let states = self.all()?;
        let mut out = String::new();
        match format {
            _ if quiet => states.iter().for_each(|state| out.push_str(&format!("{}\n", state.id))),
            ListFormat::Json => {
                let list: Vec<_> = states.iter().map(describe).collect();
                out = serde_json::to_string(&list).context("print as JSON")? + "\n";
            }
            ListFormat::Table => {
                let width = states.iter().map(|state| state.id.len()).max().unwrap_or(0).max(12);
                let header = ["PID", "STATUS", "EXIT", "CREATED", "COMMAND"];
                let [pid, status, exit, created, command] = header;
                out.push_str(&format!("{:width$}  {pid:>8}  {status:8}  {exit:4}  {created:19}  {command}\n", "ID"));
                for state in &states {
                    let pid = if state.alive() { state.pid } else { 0 };
                    let code = state.exit_code.map(|code| code.to_string()).unwrap_or_default();
                    let created = state.created.get(..19).unwrap_or(&state.created);
                    let command = state.command.join(" ");
                    let status = state.status();
                    out.push_str(&format!(
                        "{:width$}  {pid:>8}  {status:8}  {code:4}  {created:19}  {command}\n",
                        state.id
                    ));
                }
            }
        }
        print(&out)
    }

    fn state(&self, id: &str) -> Result<u8, Failure> {
        let (_, state) = self.read(id)?;
        print(&(serde_json::to_string_pretty(&describe(&state)).context("print as JSON")? + "\n"))
    }

    fn kill(&self, id: &str, signal: &str) -> Result<u8, Failure> {
        let number = crate::oci::signal::parse(signal)?;
        let (_, state) = self.read(id)?;
        let noun = self.group.noun();
        let process = pidfd::open(state.pid).ok().filter(|_| state.alive());
        let Some(process) = process else { return Err(anyhow!("{noun} {id:?} is not running").into()) };
        if supervise::is_ending(number)
            && let Err(e) = supervise::run_hooks("before-stop", &state.hooks.before_stop, id, state.pid)
        {
            log::warn!("{}", message(&e));
        }
        pidfd::send_signal(process.as_fd(), number).with_context(|| format!("send {signal} to {noun} {id:?}"))?;
        Ok(0)
    }

    fn logs(&self, id: &str) -> Result<u8, Failure> {
        let (directory, _) = self.read(id)?;
        let path = directory.join("log");
        let mut log = File::open(&path).with_context(|| format!("open {}", path.display()))?;
        match std::io::copy(&mut log, &mut std::io::stdout().lock()) {
            Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(e).context("print the log")?,
            _ => Ok(0),
        }
    }

    fn rm(&self, id: &str, force: bool) -> Result<u8, Failure> {
        let directory = self.directory(id)?;
        let state = match State::read(&directory, self.group.noun(), id) {
            // It may be half made, or half gone.
            Err(_) if force => None,
            other => Some(other?),
        };
        if let Some(state) = state.filter(State::alive) {
            if !force {
                let noun = self.group.noun();
                return Err(anyhow!("{noun} {id:?} is running: use --force, or kill it first").into());
            }
            let process = pidfd::open(state.pid).with_context(|| format!("open process {}", state.pid))?;
            if state.alive() {
                let _ = pidfd::send_signal(process.as_fd(), libc::SIGKILL);
                if !pidfd::wait_ended(process.as_fd(), 10_000).context("wait for its end")? {
                    return Err(anyhow!("process {} of {} {id:?} does not die", state.pid, self.group.noun()).into());
                }
            }
        }
        // Out of the way first: the one who watches it writes down its end in this moment.
        let gone = self.root.join(format!(".gone-{id}-{}", std::process::id()));
        let directory = if fs::rename(&directory, &gone).is_ok() { gone } else { directory };
        if let Err(e) = fs::remove_dir_all(&directory)
            && (e.kind() != std::io::ErrorKind::NotFound || !force)
        {
            return Err(e).with_context(|| format!("remove {}", directory.display()))?;
        }
        // What the ones who watched others and were killed may have left.
        Refuge::sweep();
        Ok(0)
    }
}
