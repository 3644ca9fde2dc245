//! Processes that several may watch: their output goes to everybody who listens at the time, and to nobody when nobody does.
//!
//! A process is as fast as the fastest of those who listen. Who is so far behind him that what waits for him does not fit is let
//! go; who listens alone is waited for.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::select_all;
use nix::sys::signal::Signal;
use tokio::net::unix::pipe;
use tokio::sync::mpsc;

use super::commands::end_after;
use super::input::{Input, Kind, Refused};
use super::output::{Output, Piece, Pipes};
use super::pty::{self, Master};
use super::reaper::{self, Exit};
use super::spawn::{self, Process, Start, Streams};

/// How many parts wait for one who listens.
const WAITING: usize = 256;

/// How long the end of a process is remembered.
const REMEMBERED: Duration = Duration::from_secs(30);

/// What those who listen are told.
#[derive(Clone, Debug)]
pub enum Event {
    /// From standard output.
    Stdout(Bytes),
    /// From standard error.
    Stderr(Bytes),
    /// From a terminal.
    Terminal(Bytes),
    /// There is no more.
    End(Exit),
}

/// A process that runs.
#[derive(Debug)]
pub struct Live {
    /// Its pid.
    pub pid: i32,
    /// A name that its starter gave it.
    pub tag: Option<String>,
    /// As it was asked for, for who lists it.
    pub config: serde_json::Value,
    process: Process,
    terminal: bool,
    input: Input,
    listeners: Mutex<Vec<mpsc::Sender<Event>>>,
}

#[derive(Debug, Default)]
struct Table {
    live: HashMap<i32, Arc<Live>>,
    /// By pid: the tag, how it ended, when.
    ended: HashMap<i32, (Option<String>, Exit, Instant)>,
}

/// All of them.
#[derive(Debug, Default)]
pub struct Processes(Mutex<Table>);

/// Who is meant.
#[derive(Clone, Debug)]
pub enum Selector {
    /// By its pid.
    Pid(i32),
    /// By its tag.
    Tag(String),
}

/// What there is of a process.
#[derive(Debug)]
pub enum Found {
    /// It runs.
    Live(Arc<Live>),
    /// It ended a moment ago.
    Ended(i32, Exit),
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a process's standard streams are to be.
#[derive(Clone, Copy, Debug)]
pub enum Wanted {
    /// Pipes, standard input only if it says so.
    Pipes {
        /// Whether there is a standard input.
        stdin: bool,
    },
    /// A terminal of this many columns and rows.
    Terminal(u16, u16),
}

impl Processes {
    /// Starts a process, with the first who listens to it.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(
        self: &Arc<Self>,
        wanted: Wanted,
        tag: Option<String>,
        config: serde_json::Value,
        timeout: Option<Duration>,
        start: impl FnOnce(Streams) -> Start,
    ) -> io::Result<(Arc<Live>, mpsc::Receiver<Event>)> {
        let (listener, heard) = mpsc::channel(WAITING);
        let live = |process: Process, terminal, input| {
            Arc::new(Live {
                pid: process.pid,
                tag,
                config,
                process,
                terminal,
                input: Input::new(input),
                listeners: Mutex::new(vec![listener]),
            })
        };
        let live = match wanted {
            Wanted::Terminal(columns, rows) => {
                let (master, slave) = pty::open(columns, rows)?;
                let process = start(Streams::Terminal(slave)).start()?;
                let master = Arc::new(master);
                let live = live(process, true, Kind::Terminal(master.clone()));
                tokio::spawn(read_terminal(self.clone(), live.clone(), master));
                live
            }
            Wanted::Pipes { stdin } => {
                let (stdout, stdout_writer) = spawn::pipe()?;
                let (stderr, stderr_writer) = spawn::pipe()?;
                let pipes = Pipes::new(stdout, Some(stderr))?;
                let (streams, input) = if stdin {
                    let (reader, writer) = spawn::pipe()?;
                    let streams = Streams::All { stdin: reader, stdout: stdout_writer, stderr: stderr_writer };
                    (streams, Kind::Pipe(pipe::Sender::from_owned_fd(writer)?))
                } else {
                    (Streams::Output { stdout: stdout_writer, stderr: stderr_writer }, Kind::None)
                };
                let process = start(streams).start()?;
                let output = pipes.of(process.ended.clone());
                let live = live(process, false, input);
                tokio::spawn(read_pipes(self.clone(), live.clone(), output));
                live
            }
        };
        end_after(&live.process, timeout);
        let mut table = lock(&self.0);
        table.ended.remove(&live.pid);
        if live.process.ended.borrow().is_none() || !lock(&live.listeners).is_empty() {
            table.live.insert(live.pid, live.clone());
        }
        Ok((live, heard))
    }

    /// All that run.
    pub fn list(&self) -> Vec<Arc<Live>> {
        let mut all: Vec<_> = lock(&self.0).live.values().cloned().collect();
        all.sort_by_key(|live| live.pid);
        all
    }

    /// Who is meant, if he runs or ended a moment ago.
    pub fn find(&self, selector: &Selector) -> Option<Found> {
        let mut table = lock(&self.0);
        table.ended.retain(|_, (_, _, at)| at.elapsed() < REMEMBERED);
        let live = match selector {
            Selector::Pid(pid) => table.live.get(pid),
            Selector::Tag(tag) => table.live.values().find(|live| live.tag.as_ref() == Some(tag)),
        };
        if let Some(live) = live {
            return Some(Found::Live(live.clone()));
        }
        let ended = match selector {
            Selector::Pid(pid) => table.ended.get_key_value(pid),
            Selector::Tag(tag) => table.ended.iter().find(|(_, (of, _, _))| of.as_ref() == Some(tag)),
        };
        ended.map(|(pid, (_, exit, _))| Found::Ended(*pid, *exit))
    }

    /// Kills all.
    pub fn end_all(&self) {
        for live in self.list() {
            let _ = live.signal(Signal::SIGKILL);
        }
    }

    async fn finish(&self, live: &Arc<Live>, exit: Exit) {
        {
            let mut table = lock(&self.0);
            table.live.remove(&live.pid);
            table.ended.insert(live.pid, (live.tag.clone(), exit, Instant::now()));
        }
        live.input.set(Kind::None).await;
        let listeners = std::mem::take(&mut *lock(&live.listeners));
        for listener in listeners {
            // Who is behind still hears the end, after what waits for him.
            tokio::spawn(async move { listener.send(Event::End(exit)).await });
        }
    }
}

impl Live {
    /// Listens from now on. `None` when it has just ended.
    pub fn listen(&self) -> mpsc::Receiver<Event> {
        let (listener, heard) = mpsc::channel(WAITING);
        lock(&self.listeners).push(listener);
        heard
    }

    /// Whether it is on a terminal.
    pub fn on_terminal(&self) -> bool {
        self.terminal
    }

    /// Sends it a signal: to its process group, of which it is the first.
    ///
    /// # Errors
    /// ESRCH when it has ended.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        reaper::signal_group(&self.process, signal)
    }

    /// Types something.
    ///
    /// # Errors
    /// See [`Refused`].
    pub async fn write(&self, bytes: &[u8], terminal: bool) -> Result<(), Refused> {
        if terminal != self.terminal {
            return Err(Refused::OtherKind);
        }
        self.input.write(bytes, self.process.ended.clone()).await
    }

    /// Closes its standard input. Whether that can be: a terminal has no end of its own.
    pub async fn close_input(&self) -> bool {
        self.input.close().await
    }

    /// Tells it of another size of its terminal.
    ///
    /// # Errors
    /// When it is on none.
    pub async fn resize(&self, columns: u16, rows: u16) -> io::Result<()> {
        self.input.resize(columns, rows).await
    }

    async fn tell(&self, event: Event) {
        let (mut served, mut stuck) = (0, Vec::new());
        {
            let mut listeners = lock(&self.listeners);
            listeners.retain(|listener| match listener.try_send(event.clone()) {
                Ok(()) => {
                    served += 1;
                    true
                }
                Err(mpsc::error::TrySendError::Full(_)) => {
                    stuck.push(listener.clone());
                    true
                }
                Err(mpsc::error::TrySendError::Closed(_)) => false,
            });
        }
        if stuck.is_empty() {
            return;
        }
        if served == 0 {
            // The fastest is waited for.
            let first = {
                let waits = stuck.iter().map(|listener| Box::pin(listener.reserve()));
                let (ready, first, _) = select_all(waits).await;
                if let Ok(permit) = ready {
                    permit.send(event.clone());
                }
                first
            };
            stuck.swap_remove(first);
        }
        // Others would hold him up.
        stuck.retain(|listener| listener.try_send(event.clone()).is_err());
        if !stuck.is_empty() {
            lock(&self.listeners).retain(|listener| !stuck.iter().any(|other| other.same_channel(listener)));
        }
    }
}

async fn read_pipes(table: Arc<Processes>, live: Arc<Live>, mut output: Output) {
    loop {
        let event = match output.next().await {
            Piece::Stdout(bytes) => Event::Stdout(Bytes::copy_from_slice(bytes)),
            Piece::Stderr(bytes) => Event::Stderr(Bytes::copy_from_slice(bytes)),
            Piece::Exited(exit) => return table.finish(&live, exit).await,
        };
        live.tell(event).await;
    }
}

async fn read_terminal(table: Arc<Processes>, live: Arc<Live>, master: Arc<Master>) {
    let exit = pty::read_to_end(&master, live.process.ended.clone(), |bytes| live.tell(Event::Terminal(bytes.into())));
    if let Some(exit) = exit.await {
        table.finish(&live, exit).await;
    }
}
