//! Requests: their commands run at once, each in a sandbox of its own, with pipes between them.

mod files;
mod pipes;

use std::collections::{BTreeMap, HashMap};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use runx_core::workload::{self, WasmConfig};
use runx_pool::{Command, Input, Killer, Lease, Limits, Output, Pool, Status};

use crate::model::{self, Cmd, File, FileError, Outcome, Request};
use crate::store::Store;
use pipes::Collected;

/// The highest descriptor that a command may be given.
const MOST_DESCRIPTORS: usize = 64;

/// The limits of the server, for what a request does not say.
#[derive(Clone, Debug)]
pub(crate) struct Bounds {
    /// Processor time.
    pub(crate) cpu: Duration,
    /// The largest file that is copied out, in bytes.
    pub(crate) copy_out: u64,
    /// The largest answer of a command, as JSON in bytes.
    pub(crate) answer: u64,
    /// The largest file that is written, in bytes.
    pub(crate) output: u64,
    /// Descriptors.
    pub(crate) open_files: u64,
    /// Directories of the server's machine whose files may be read; none unless they are named.
    pub(crate) sources: Vec<PathBuf>,
}

impl Bounds {
    /// How much of a pipe is kept for who wants so much.
    fn collected(&self, max: i64) -> u64 {
        u64::try_from(max).unwrap_or(0).min(self.copy_out)
    }
}

/// What requests are run with.
#[derive(Debug)]
pub(crate) struct Runner {
    /// The sandboxes.
    pub(crate) pool: Pool,
    /// The files that are kept.
    pub(crate) store: Store,
    /// See [`Bounds`].
    pub(crate) bounds: Bounds,
    /// Where the parts for modules are.
    pub(crate) wasm: WasmConfig,
}

/// Gives a request up, from another thread.
#[derive(Debug, Default)]
pub(crate) struct Cancel {
    cancelled: AtomicBool,
    killers: Mutex<Vec<Killer>>,
}

impl Cancel {
    /// Ends what runs of it, and lets nothing more be started.
    pub(crate) fn cancel(&self) {
        self.cancelled.store(true, Ordering::SeqCst);
        for killer in self.killers.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            killer.kill();
        }
    }

    fn add(&self, killer: Killer) {
        self.killers.lock().unwrap_or_else(PoisonError::into_inner).push(killer);
    }

    fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::SeqCst)
    }
}

/// Whether a request makes sense.
///
/// # Errors
/// What of it does not, or cannot be had.
pub(crate) fn check(request: &Request, bounds: &Bounds) -> Result<(), String> {
    if request.cmd.is_empty() {
        return Err("no cmd provided".into());
    }
    for (at, cmd) in request.cmd.iter().enumerate() {
        check_cmd(cmd, bounds).map_err(|e| format!("cmd {at}: {e}"))?;
    }
    let mut taken = HashMap::new();
    for pipe in &request.pipe_mapping {
        for end in [pipe.from, pipe.to] {
            let cmd =
                request.cmd.get(end.index).ok_or_else(|| format!("pipeMapping: there is no cmd {}", end.index))?;
            if end.fd >= MOST_DESCRIPTORS {
                return Err(format!("pipeMapping: descriptor {} is not below {MOST_DESCRIPTORS}", end.fd));
            }
            if cmd.files.get(end.fd).is_some_and(Option::is_some) || taken.insert((end.index, end.fd), ()).is_some() {
                return Err(format!(
                    "pipeMapping: descriptor {} of cmd {} is something else already",
                    end.fd, end.index
                ));
            }
        }
        if pipe.max < 0 || (pipe.proxy && pipe.max > 0 && pipe.name.is_empty()) {
            return Err("pipeMapping: max without a name, or below 0".into());
        }
    }
    for (at, cmd) in request.cmd.iter().enumerate() {
        if let Some(fd) =
            cmd.files.iter().enumerate().find(|(fd, file)| file.is_none() && !taken.contains_key(&(at, *fd)))
        {
            return Err(format!("cmd {at}: descriptor {} is null, and no pipe leads to it", fd.0));
        }
    }
    Ok(())
}

fn check_cmd(cmd: &Cmd, bounds: &Bounds) -> Result<(), String> {
    if cmd.args.first().is_none_or(String::is_empty) {
        return Err("args must not be empty".into());
    }
    if cmd.args.iter().chain(&cmd.env).any(|word| word.contains('\0')) {
        return Err("args, env: a NUL byte cannot be passed on".into());
    }
    if let Some(variable) = cmd.env.iter().find(|variable| !variable.contains('=')) {
        return Err(format!("env: {variable:?} is not NAME=VALUE"));
    }
    if cmd.tty {
        return Err("tty: terminals are not to be had here".into());
    }
    if cmd.cpu_rate_limit != 0 || !cmd.cpu_set_limit.is_empty() {
        return Err("cpuRateLimit, cpuSetLimit: a share of processors cannot be had here".into());
    }
    if !cmd.copy_out_dir.is_empty() {
        return Err("copyOutDir: nothing is written on the server's machine; use copyOut or copyOutCached".into());
    }
    if cmd.files.len() > MOST_DESCRIPTORS {
        return Err(format!("files: there may be {MOST_DESCRIPTORS}"));
    }
    for file in cmd.files.iter().flatten() {
        check_file(file, bounds).map_err(|e| format!("files: {e}"))?;
    }
    for (path, file) in &cmd.copy_in {
        if path.is_empty() || path.contains('\0') {
            return Err("copyIn: a path is empty, or holds a NUL byte".into());
        }
        if file.symlink.is_none() {
            check_file(file, bounds).map_err(|e| format!("copyIn {path:?}: {e}"))?;
            if file.max.is_some() {
                return Err(format!("copyIn {path:?}: it has no content"));
            }
        }
    }
    Ok(())
}

fn check_file(file: &File, bounds: &Bounds) -> Result<(), String> {
    if file.stream_in.is_some() || file.stream_out.is_some() {
        return Err("streamIn, streamOut: only of streams, which are not to be had here".into());
    }
    match (&file.src, &file.content, &file.file_id, &file.name, file.max) {
        (Some(src), None, None, None, None) => {
            let path = std::path::Path::new(src);
            let plain = path.components().all(|part| !matches!(part, std::path::Component::ParentDir));
            if plain && path.is_absolute() && bounds.sources.iter().any(|prefix| path.starts_with(prefix)) {
                return Ok(());
            }
            Err(format!("src {src:?} is in none of the directories of --src-prefix"))
        }
        (None, Some(_), None, None, None) | (None, None, Some(_), None, None) => Ok(()),
        (None, None, None, Some(name), Some(max)) if !name.is_empty() && max >= 0 => Ok(()),
        _ => Err("it is none of src, content, fileId, and name with max".into()),
    }
}

impl Runner {
    /// Runs a request that was checked. Blocks.
    pub(crate) fn run(&self, request: &Request, cancel: &Arc<Cancel>) -> Vec<Outcome> {
        let failed = |error: &str| -> Vec<Outcome> {
            request.cmd.iter().map(|_| Outcome::failed(Status::InternalError, error, Vec::new())).collect()
        };
        let mut leases = Vec::new();
        for _ in &request.cmd {
            match self.pool.acquire() {
                Ok(lease) => leases.push(lease),
                Err(e) => return failed(&format!("get a sandbox: {e}")),
            }
        }
        for lease in &leases {
            match lease.killer() {
                Ok(killer) => cancel.add(killer),
                Err(e) => return failed(&e.to_string()),
            }
        }
        let mut pipes = match pipes::make(request, &self.bounds) {
            Ok(pipes) => pipes,
            Err(e) => return failed(&format!("make a pipe: {e}")),
        };
        let last = request.cmd.len() - 1;
        let outcomes: Vec<Outcome> = std::thread::scope(|scope| {
            let mut others = Vec::new();
            let mut own = None;
            for (at, (cmd, lease)) in request.cmd.iter().zip(leases).enumerate() {
                let ends = pipes.ends.remove(&at).unwrap_or_default();
                let run = move || self.one(cmd, lease, ends, cancel);
                if at == last {
                    own = Some(run());
                } else {
                    others.push(scope.spawn(run));
                }
            }
            let died = || Outcome::failed(Status::InternalError, "its thread has ended", Vec::new());
            let others = others.into_iter().map(|thread| thread.join().unwrap_or_else(|_| died()));
            others.collect::<Vec<_>>().into_iter().chain(own).collect()
        });
        pipes::tell(pipes.proxies, outcomes)
    }

    /// One command: files in, run, files out.
    fn one(&self, cmd: &Cmd, mut lease: Lease, ends: BTreeMap<usize, OwnedFd>, cancel: &Cancel) -> Outcome {
        if let Err(error) = self.copy_in(cmd, &mut lease) {
            let text = error.message.clone();
            return Outcome::failed(Status::FileError, text, vec![error]);
        }
        let (command, collected) = match self.command(cmd, ends) {
            Ok(command) => command,
            Err(error) => {
                let text = error.message.clone();
                return Outcome::failed(Status::FileError, text, vec![error]);
            }
        };
        if cancel.is_cancelled() {
            return Outcome::failed(Status::InternalError, "it was given up", Vec::new());
        }
        let done = match lease.run(command) {
            Ok(done) => done,
            Err(e) => return Outcome::failed(Status::InternalError, e.to_string(), Vec::new()),
        };
        let mut outcome = Outcome {
            status: model::status(done.status),
            exit_status: done.signal.unwrap_or(done.exit_code),
            error: done.error.unwrap_or_default(),
            time: done.cpu.as_nanos() as u64,
            memory: done.memory,
            run_time: done.wall.as_nanos() as u64,
            proc_peak: done.processes,
            files: BTreeMap::new(),
            file_ids: BTreeMap::new(),
            file_error: Vec::new(),
            answered: 0,
        };
        let over = done.status == Status::OutputLimitExceeded;
        self.collect(cmd, collected, [done.stdout, done.stderr], over, &mut outcome);
        self.copy_out(cmd, &mut lease, &mut outcome);
        outcome
    }

    /// The command, and what is collected of descriptors above standard error.
    fn command(
        &self,
        cmd: &Cmd,
        mut ends: BTreeMap<usize, OwnedFd>,
    ) -> Result<(Command, Vec<(usize, Collected)>), FileError> {
        let name = &cmd.args[0];
        // go-judge executes what it is told as a path: a file that came with the command needs no ./ before it.
        let program =
            if !name.contains('/') && cmd.copy_in.contains_key(name) { format!("./{name}") } else { name.clone() };
        let came = cmd.copy_in.get(name).filter(|file| file.symlink.is_none());
        let mut command = match came.filter(|_| workload::has_module_name(Path::new(name))) {
            // What came with such a name is a module, and is run by what runs modules.
            Some(file) => {
                let file = std::fs::File::from(self.source(file)?);
                Command::module(name, &file, &self.wasm, self.limits(cmd)).map_err(|e| FileError {
                    name: name.clone(),
                    kind: "CopyInOpenFile",
                    message: e.to_string(),
                })?
            }
            None => Command::new(program).limits(self.limits(cmd)),
        };
        command = command.args(&cmd.args[1..]);
        for variable in &cmd.env {
            let (name, value) = variable.split_once('=').unwrap_or((variable, ""));
            command = command.env(name, value);
        }
        let mut collected = Vec::new();
        for fd in 0..MOST_DESCRIPTORS {
            if let Some(end) = ends.remove(&fd) {
                command = place(command, fd, end);
                continue;
            }
            let Some(Some(file)) = cmd.files.get(fd) else { continue };
            match (fd, file.max) {
                (1, Some(max)) => command = command.stdout(Output::Capture(self.bounds.collected(max))),
                (2, Some(max)) => command = command.stderr(Output::Capture(self.bounds.collected(max))),
                (fd, Some(max)) => {
                    let (writer, reader) = pipes::collect(self.bounds.collected(max)).map_err(|e| FileError {
                        name: file.name.clone().unwrap_or_default(),
                        kind: "CopyOutCreateFile",
                        message: format!("make a pipe: {e}"),
                    })?;
                    collected.push((fd, reader));
                    command = place(command, fd, writer);
                }
                (0, None) if file.content.is_some() => {
                    command = command.stdin(Input::Bytes(file.content.clone().unwrap_or_default().into_bytes()));
                }
                (fd, None) => command = place(command, fd, self.given(file)?),
            }
        }
        Ok((command, collected))
    }

    fn limits(&self, cmd: &Cmd) -> Limits {
        let or = |value: u64, usual: Duration| if value == 0 { usual } else { Duration::from_nanos(value) };
        let cpu = or(cmd.cpu_limit, self.bounds.cpu);
        let clock = if cmd.real_cpu_limit > 0 { cmd.real_cpu_limit } else { cmd.clock_limit };
        let memory = (cmd.memory_limit > 0).then_some(cmd.memory_limit);
        Limits {
            cpu: Some(cpu),
            wall: Some(or(clock, cpu.saturating_mul(2)).max(cpu)),
            memory,
            processes: (cmd.proc_limit > 0).then_some(cmd.proc_limit),
            file_size: self.bounds.output,
            open_files: self.bounds.open_files,
            stack: (cmd.stack_limit > 0).then(|| memory.map_or(cmd.stack_limit, |most| cmd.stack_limit.min(most))),
            address_space: memory.filter(|_| cmd.address_space_limit),
            data: memory.filter(|_| cmd.data_segment_limit || cmd.strict_memory_limit),
        }
    }
}

/// Gives a command a descriptor.
fn place(command: Command, number: usize, fd: OwnedFd) -> Command {
    match number {
        0 => command.stdin(Input::Fd(fd)),
        1 => command.stdout(Output::Fd(fd)),
        2 => command.stderr(Output::Fd(fd)),
        other => command.fd(other as u32, fd),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(text: &str) -> Result<(), String> {
        let bounds = Bounds {
            cpu: Duration::from_secs(1),
            copy_out: 1,
            answer: 1,
            output: 1,
            open_files: 1,
            sources: vec!["/srv/data".into()],
        };
        check(&serde_json::from_str(text).map_err(|e| e.to_string())?, &bounds)
    }

    #[test]
    fn what_makes_no_sense_is_refused_by_its_name() {
        for (text, word) in [
            (r#"{}"#, "no cmd"),
            (r#"{"cmd": [{"args": []}]}"#, "args"),
            (r#"{"cmd": [{"args": ["a"], "tty": true}]}"#, "tty"),
            (r#"{"cmd": [{"args": ["a"], "cpuRateLimit": 10}]}"#, "cpuRateLimit"),
            (r#"{"cmd": [{"args": ["a"], "copyOutDir": "/x"}]}"#, "copyOutDir"),
            (r#"{"cmd": [{"args": ["a"], "files": [{"src": "/etc/shadow"}]}]}"#, "--src-prefix"),
            (r#"{"cmd": [{"args": ["a"], "files": [{"src": "/srv/data/../../etc/shadow"}]}]}"#, "--src-prefix"),
            (r#"{"cmd": [{"args": ["a"], "files": [{}]}]}"#, "none of"),
            (r#"{"cmd": [{"args": ["a"], "files": [null]}]}"#, "null"),
            (
                r#"{"cmd": [{"args": ["a"]}], "pipeMapping": [{"in": {"index": 0, "fd": 1}, "out": {"index": 1, "fd": 0}}]}"#,
                "cmd 1",
            ),
            (
                r#"{"cmd": [{"args": ["a"], "files": [{"content": ""}]}, {"args": ["a"]}], "pipeMapping": [{"in": {"index": 1, "fd": 1}, "out": {"index": 0, "fd": 0}}]}"#,
                "something else",
            ),
        ] {
            let error = checked(text).unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
        assert_eq!(
            checked(r#"{"cmd": [{"args": ["a"], "files": [{"src": "/srv/data/x"}, {"name": "stdout", "max": 1}]}]}"#),
            Ok(())
        );
    }
}
