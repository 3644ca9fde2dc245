//! The commands that were started, for as long as somebody may ask for them.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use nix::sys::signal::Signal;
use tokio::sync::watch;

use super::output::{Output, Piece, Pipes};
use super::reaper::{self, Ended, Exit};
use super::spawn::{self, Process, Start};
use super::store::Store;
use crate::ids;

/// How long a command that was told to end may take before it is killed.
const PATIENCE: Duration = Duration::from_secs(3);

/// How long a finished command is kept, at least, unless there are too many.
const RETENTION: Duration = Duration::from_secs(24 * 3600);

/// How much of a command's text is kept, in bytes.
const TEXT: usize = 64 << 10;

/// What is kept of commands.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    /// How much of a background command's output, in bytes.
    pub output: u64,
    /// How many finished ones.
    pub finished: usize,
}

/// How a command stands.
#[derive(Clone, Debug)]
pub enum State {
    /// It runs.
    Running,
    /// It has ended.
    Ended(Exit),
    /// It could not be started, and why.
    Failed(String, SystemTime),
}

/// A command.
#[derive(Debug)]
pub struct Command {
    /// 32 hexadecimal digits.
    pub id: String,
    /// As it was asked for.
    pub text: String,
    /// When it was started.
    pub started: SystemTime,
    /// What a background command writes.
    pub store: Option<Store>,
    process: Result<Process, (String, SystemTime)>,
    /// All that it wrote until its end is in its store.
    stored: watch::Sender<bool>,
}

impl Command {
    /// How it stands.
    pub fn state(&self) -> State {
        match &self.process {
            Err((reason, at)) => State::Failed(reason.clone(), *at),
            // Whoever hears that it has ended finds all that it wrote.
            Ok(_) if !*self.stored.borrow() => State::Running,
            Ok(process) => process.ended.borrow().map_or(State::Running, State::Ended),
        }
    }

    fn finished(&self) -> Option<SystemTime> {
        match self.state() {
            State::Running => None,
            State::Ended(exit) => Some(exit.at),
            State::Failed(_, at) => Some(at),
        }
    }

    /// Becomes `Some` at its end.
    pub fn ended(&self) -> Option<Ended> {
        self.process.as_ref().ok().map(|process| process.ended.clone())
    }

    /// Sends a signal to its process group.
    ///
    /// # Errors
    /// ESRCH when it has ended.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        match &self.process {
            Ok(process) => reaper::signal_group(process, signal),
            Err(_) => Err(io::Error::from_raw_os_error(libc::ESRCH)),
        }
    }

    /// Asks it to end, waits, and kills it if it does not. Returns when it has ended, and says so.
    ///
    /// # Errors
    /// As for [`Self::signal`].
    pub async fn interrupt(&self) -> io::Result<()> {
        if let Ok(process) = &self.process {
            reaper::doom(process);
        }
        self.signal(Signal::SIGTERM)?;
        let Some(mut ended) = self.ended() else { return Ok(()) };
        if tokio::time::timeout(PATIENCE, ended.wait_for(Option::is_some)).await.is_err() {
            let _ = self.signal(Signal::SIGKILL);
            let _ = tokio::time::timeout(PATIENCE, ended.wait_for(Option::is_some)).await;
        }
        let _ = tokio::time::timeout(PATIENCE, self.stored.subscribe().wait_for(|stored| *stored)).await;
        Ok(())
    }
}

#[derive(Debug, Default)]
struct Known {
    all: HashMap<String, Arc<Command>>,
    /// In the order in which they were started.
    order: VecDeque<String>,
}

/// All of them.
#[derive(Debug)]
pub struct Commands {
    known: Mutex<Known>,
    policy: Policy,
    started: AtomicU64,
}

/// A command that was started in the foreground.
#[derive(Debug)]
pub struct Foreground {
    /// The command.
    pub command: Arc<Command>,
    /// What it writes, or why it could not be started.
    pub output: Result<Output, String>,
}

/// A program that is to be started, without its streams.
pub type Prepared = Box<dyn FnOnce(spawn::Streams) -> Start + Send>;

impl Commands {
    /// None yet.
    pub fn new(policy: Policy) -> Self {
        Self { known: Mutex::new(Known::default()), policy, started: AtomicU64::new(0) }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The command of an id.
    pub fn get(&self, id: &str) -> Option<Arc<Command>> {
        self.known().all.get(id).cloned()
    }

    /// All that are known, in the order in which they were started.
    pub fn list(&self) -> Vec<Arc<Command>> {
        let known = self.known();
        known.order.iter().filter_map(|id| known.all.get(id).cloned()).collect()
    }

    /// How many there were, ever.
    pub fn started(&self) -> u64 {
        self.started.load(Ordering::Relaxed)
    }

    fn enter(&self, command: Command) -> Arc<Command> {
        self.started.fetch_add(1, Ordering::Relaxed);
        let command = Arc::new(command);
        let mut known = self.known();
        known.order.push_back(command.id.clone());
        known.all.insert(command.id.clone(), command.clone());
        let mut excess = known.all.len().saturating_sub(self.policy.finished);
        // The oldest go first; what runs stays, wherever it is in the line.
        let mut running = Vec::new();
        while excess > 0 {
            let Some(id) = known.order.pop_front() else { break };
            if known.all.get(&id).is_some_and(|command| command.finished().is_some()) {
                known.all.remove(&id);
                excess -= 1;
            } else {
                running.push(id);
            }
        }
        for id in running.into_iter().rev() {
            known.order.push_front(id);
        }
        command
    }

    /// Forgets what ended long ago.
    pub fn sweep(&self) {
        let mut known = self.known();
        let old =
            |command: &Command| command.finished().is_some_and(|at| at.elapsed().is_ok_and(|age| age > RETENTION));
        known.all.retain(|_, command| !old(command));
        let Known { all, order } = &mut *known;
        order.retain(|id| all.contains_key(id));
    }

    /// Starts a command whose output is read by the caller.
    ///
    /// # Errors
    /// When there are no pipes to be had.
    pub fn foreground(&self, text: &str, timeout: Option<Duration>, prepared: Prepared) -> io::Result<Foreground> {
        let (stdout, stdout_writer) = spawn::pipe()?;
        let (stderr, stderr_writer) = spawn::pipe()?;
        let pipes = Pipes::new(stdout, Some(stderr))?;
        let started = SystemTime::now();
        let streams = spawn::Streams::Output { stdout: stdout_writer, stderr: stderr_writer };
        let process = prepared(streams).start().map_err(|e| (describe(&e), SystemTime::now()));
        let output = match &process {
            Ok(process) => {
                end_after(process, timeout);
                Ok(pipes.of(process.ended.clone()))
            }
            Err((reason, _)) => Err(reason.clone()),
        };
        let command = Command {
            id: ids::hex(),
            text: shortened(text),
            started,
            store: None,
            process,
            stored: watch::Sender::new(true),
        };
        Ok(Foreground { command: self.enter(command), output })
    }

    /// Starts a command whose output is kept, standard output and error in one.
    ///
    /// # Errors
    /// When there is no pipe to be had. That it could not be started is in the command.
    pub fn background(&self, text: &str, timeout: Option<Duration>, prepared: Prepared) -> io::Result<Arc<Command>> {
        let (reader, writer) = spawn::pipe()?;
        let pipes = Pipes::new(reader, None)?;
        let started = SystemTime::now();
        let streams = spawn::Streams::Output { stdout: writer.try_clone()?, stderr: writer };
        let process = prepared(streams).start().map_err(|e| (describe(&e), SystemTime::now()));
        let output = match &process {
            Ok(process) => {
                end_after(process, timeout);
                Some(pipes.of(process.ended.clone()))
            }
            Err(_) => None,
        };
        let store = Some(Store::new(self.policy.output));
        let stored = watch::Sender::new(output.is_none());
        let command = self.enter(Command { id: ids::hex(), text: shortened(text), started, store, process, stored });
        if let Some(output) = output {
            tokio::spawn(keep(command.clone(), output));
        }
        Ok(command)
    }

    /// Sends a signal to all that run.
    pub fn signal_all(&self, signal: Signal) {
        for command in self.list() {
            let _ = command.signal(signal);
        }
    }
}

/// What of a command's text is kept.
fn shortened(text: &str) -> String {
    let end = (0..=text.len().min(TEXT)).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    text[..end].to_owned()
}

/// Puts what a background command writes into its store, also what others write that it leaves behind.
async fn keep(command: Arc<Command>, mut output: Output) {
    let Some(store) = &command.store else { return };
    let mut failed = false;
    let mut append = |bytes: &[u8]| {
        if let Err(e) = store.append(bytes)
            && !failed
        {
            failed = true;
            log::warn!("keep the output of command {}: {e}", command.id);
        }
    };
    while let Piece::Stdout(bytes) | Piece::Stderr(bytes) = output.next().await {
        append(bytes);
    }
    command.stored.send_replace(true);
    let Some(rest) = output.rest() else { return };
    let mut buffer = vec![0; 4096];
    while rest.readable().await.is_ok() {
        match rest.try_read(&mut buffer) {
            Ok(0) => return,
            Ok(length) => append(&buffer[..length]),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => return,
        }
    }
}

/// Kills a process group when its time is up.
pub fn end_after(process: &Process, timeout: Option<Duration>) {
    let Some(timeout) = timeout else { return };
    let mut ended = process.ended.clone();
    let process = process.clone();
    tokio::spawn(async move {
        if tokio::time::timeout(timeout, ended.wait_for(Option::is_some)).await.is_err() {
            reaper::doom(&process);
            let _ = reaper::signal_group(&process, Signal::SIGKILL);
        }
    });
}

/// Why a program could not be started.
pub fn describe(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::EPERM) => "fork/exec: operation not permitted".to_owned(),
        Some(libc::ENOENT) => "fork/exec: no such file or directory".to_owned(),
        Some(libc::EACCES) => "fork/exec: permission denied".to_owned(),
        _ => error.to_string(),
    }
}
