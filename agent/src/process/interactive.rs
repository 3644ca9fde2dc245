//! Interactive shells that outlive those who look at them: on a terminal, or with pipes.

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::sys::signal::Signal;
use tokio::io::AsyncWriteExt;
use tokio::net::unix::pipe;
use tokio::sync::{Notify, watch};

use super::environment;
use super::output::{Output, Piece, Pipes};
use super::pty::{self, Master};
use super::reaper::{self, Exit};
use super::ring::{Ring, Source};
use super::spawn::{self, Process, Program, Start, Streams};
use crate::ids;

/// How long somebody waits for the one that he takes a shell over from.
const HANDOVER: Duration = Duration::from_secs(5);

/// Where what is typed goes.
#[derive(Debug)]
enum Input {
    Terminal(Arc<Master>),
    Pipe(tokio::sync::Mutex<pipe::Sender>),
}

/// A shell that was started.
#[derive(Debug)]
pub struct Live {
    process: Process,
    input: Input,
    /// Becomes `Some` when it has ended and all of its output is in the ring.
    pub done: watch::Receiver<Option<Exit>>,
}

#[derive(Debug, Default)]
struct State {
    ring: Ring,
    live: Option<Arc<Live>>,
    attempted: bool,
    failed: bool,
    /// It was deleted: nobody could end a shell that it got now.
    closed: bool,
    /// Whoever types, and is told when he is not to any more.
    holder: Option<Arc<Notify>>,
}

/// An interactive shell.
#[derive(Debug)]
pub struct Interactive {
    /// A UUID.
    pub id: String,
    cwd: PathBuf,
    command: Option<String>,
    state: Mutex<State>,
    /// The ring's end, for those who follow it.
    grown: watch::Sender<u64>,
    /// Somebody stopped typing.
    freed: Notify,
}

/// What is to be known of one.
#[derive(Clone, Copy, Debug)]
pub struct Status {
    /// Its shell runs.
    pub running: bool,
    /// How much it has written, ever.
    pub output: u64,
    /// Somebody asked for a shell.
    pub attempted: bool,
    /// The last one could not be started.
    pub failed: bool,
}

/// The right to type, given back when it is dropped.
#[derive(Debug)]
pub struct Hold {
    session: Arc<Interactive>,
    /// Told when somebody else takes over.
    pub evicted: Arc<Notify>,
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut state = self.session.state();
        if state.holder.as_ref().is_some_and(|holder| Arc::ptr_eq(holder, &self.evicted)) {
            state.holder = None;
        }
        drop(state);
        self.session.freed.notify_waiters();
    }
}

impl Interactive {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How it stands.
    pub fn status(&self) -> Status {
        let state = self.state();
        Status {
            running: state.live.as_ref().is_some_and(|live| live.done.borrow().is_none()),
            output: state.ring.end(),
            attempted: state.attempted,
            failed: state.failed,
        }
    }

    /// Follows how much it has written.
    pub fn follow(&self) -> watch::Receiver<u64> {
        self.grown.subscribe()
    }

    /// Does something with what it has written.
    pub fn with_ring<T>(&self, work: impl FnOnce(&Ring) -> T) -> T {
        work(&self.state().ring)
    }

    /// Whether somebody types.
    pub fn is_held(&self) -> bool {
        self.state().holder.is_some()
    }

    /// Takes the right to type, from somebody else if `takeover` says so. `None` when he keeps it.
    pub async fn hold(self: &Arc<Self>, takeover: bool) -> Option<Hold> {
        let until = tokio::time::Instant::now() + HANDOVER;
        loop {
            let freed = self.freed.notified();
            tokio::pin!(freed);
            // Before looking, so that nothing is missed between.
            freed.as_mut().enable();
            {
                let mut state = self.state();
                match &state.holder {
                    None => {
                        let evicted = Arc::new(Notify::new());
                        state.holder = Some(evicted.clone());
                        return Some(Hold { session: self.clone(), evicted });
                    }
                    Some(holder) if takeover => holder.notify_one(),
                    Some(_) => return None,
                }
            }
            if tokio::time::timeout_at(until, freed).await.is_err() {
                return None;
            }
        }
    }

    /// The shell that runs, or a new one on a terminal or with pipes.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn launch(self: &Arc<Self>, on_terminal: bool) -> io::Result<Arc<Live>> {
        let mut state = self.state();
        if let Some(live) = &state.live
            && live.done.borrow().is_none()
        {
            return Ok(live.clone());
        }
        if state.closed {
            return Err(io::Error::other("the session was deleted"));
        }
        state.attempted = true;
        state.failed = true;
        let live = Arc::new(self.start(on_terminal)?);
        state.failed = false;
        state.live = Some(live.clone());
        Ok(live)
    }

    fn start(self: &Arc<Self>, on_terminal: bool) -> io::Result<Live> {
        let environment = environment::current();
        let shell = spawn::shell(&environment);
        let mut argv = vec![shell.to_string_lossy().into_owned()];
        if spawn::is_bash(&shell) {
            argv.extend(["--norc".to_owned(), "--noprofile".to_owned()]);
        }
        if let Some(command) = &self.command {
            argv.extend(["-c".to_owned(), command.clone()]);
        }
        let start = |streams| Start {
            program: Program::Argv(argv),
            cwd: self.cwd.clone(),
            environment,
            identity: None,
            streams,
            passed: Vec::new(),
            confinement: None,
        };
        let (sender, done) = watch::channel(None);
        if on_terminal {
            let (master, slave) = pty::open(pty::SIZE.0, pty::SIZE.1)?;
            let process = start(Streams::Terminal(slave)).start()?;
            let master = Arc::new(master);
            tokio::spawn(read_terminal(self.clone(), master.clone(), process.clone(), sender));
            Ok(Live { process, input: Input::Terminal(master), done })
        } else {
            let (stdin, typed) = spawn::pipe()?;
            let (stdout, stdout_writer) = spawn::pipe()?;
            let (stderr, stderr_writer) = spawn::pipe()?;
            let pipes = Pipes::new(stdout, Some(stderr))?;
            let typed = pipe::Sender::from_owned_fd(typed)?;
            let streams = Streams::All { stdin, stdout: stdout_writer, stderr: stderr_writer };
            let process = start(streams).start()?;
            let output = pipes.of(process.ended.clone());
            tokio::spawn(read_pipes(self.clone(), output, sender));
            Ok(Live { process, input: Input::Pipe(tokio::sync::Mutex::new(typed)), done })
        }
    }

    fn push(&self, source: Source, bytes: &[u8]) {
        let mut state = self.state();
        state.ring.push(source, bytes);
        self.grown.send_replace(state.ring.end());
    }

    fn close(&self) {
        let mut state = self.state();
        state.closed = true;
        if let Some(live) = &state.live {
            let _ = live.signal(Signal::SIGKILL);
        }
    }
}

async fn read_terminal(
    session: Arc<Interactive>,
    master: Arc<Master>,
    process: Process,
    done: watch::Sender<Option<Exit>>,
) {
    let exit = pty::read_to_end(&master, process.ended, |bytes| {
        session.push(Source::Stdout, &bytes);
        std::future::ready(())
    });
    done.send_replace(exit.await);
    session.grown.send_modify(|_| {});
}

async fn read_pipes(session: Arc<Interactive>, mut output: Output, done: watch::Sender<Option<Exit>>) {
    loop {
        match output.next().await {
            Piece::Stdout(bytes) => session.push(Source::Stdout, bytes),
            Piece::Stderr(bytes) => session.push(Source::Stderr, bytes),
            Piece::Exited(exit) => {
                done.send_replace(Some(exit));
                session.grown.send_modify(|_| {});
                return;
            }
        }
    }
}

impl Live {
    /// Types something.
    ///
    /// # Errors
    /// When nobody reads it any more.
    pub async fn write(&self, bytes: &[u8]) -> io::Result<()> {
        match &self.input {
            Input::Terminal(master) => master.write_all(bytes).await,
            Input::Pipe(pipe) => pipe.lock().await.write_all(bytes).await,
        }
    }

    /// Tells it of another size. With pipes there is none.
    ///
    /// # Errors
    /// The kernel's.
    pub fn resize(&self, columns: u16, rows: u16) -> io::Result<()> {
        match &self.input {
            Input::Terminal(master) => master.resize(columns, rows),
            Input::Pipe(_) => Ok(()),
        }
    }

    /// Whether it is on a terminal.
    pub fn on_terminal(&self) -> bool {
        matches!(self.input, Input::Terminal(_))
    }

    /// Sends a signal to its process group.
    ///
    /// # Errors
    /// ESRCH when it has ended.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        reaper::signal_group(&self.process, signal)
    }
}

/// All interactive shells.
#[derive(Debug, Default)]
pub struct Shells(Mutex<HashMap<String, Arc<Interactive>>>);

impl Shells {
    fn all(&self) -> MutexGuard<'_, HashMap<String, Arc<Interactive>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new one, without a shell yet.
    pub fn create(&self, cwd: PathBuf, command: Option<String>) -> Arc<Interactive> {
        let session = Arc::new(Interactive {
            id: ids::uuid(),
            cwd,
            command,
            state: Mutex::default(),
            grown: watch::channel(0).0,
            freed: Notify::new(),
        });
        self.all().insert(session.id.clone(), session.clone());
        session
    }

    /// The one of an id.
    pub fn get(&self, id: &str) -> Option<Arc<Interactive>> {
        self.all().get(id).cloned()
    }

    /// Forgets it and kills its shell. Whether there was one.
    pub fn close(&self, id: &str) -> bool {
        let session = self.all().remove(id);
        if let Some(session) = &session {
            session.close();
        }
        session.is_some()
    }

    /// Kills everything.
    pub fn close_all(&self) {
        for (_, session) in self.all().drain() {
            session.close();
        }
    }
}
