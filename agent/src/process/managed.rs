//! Processes of the daemon's own protocol: confined, started again when they are to be, known after their end, with their
//! newest output kept under its offsets.
//!
//! Whoever reads output holds an offset of his own: nobody waits for anybody, and who comes too late is told how much he
//! missed.

mod supervise;

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use nix::sys::signal::Signal;
use serde::Deserialize;
use tokio::sync::{Notify, watch};

use super::confine::{Confinement, cgroup};
use super::environment::Variables;
use super::input::{Input, Kind, Refused};
use super::reaper::{self, Exit};
use super::ring::{Ring, Source};
use super::spawn::{Process, Program};
use super::users::Identity;
use crate::ids;

/// How many that have ended are remembered.
const REMEMBERED: usize = 1024;

/// When a process is started again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum When {
    /// Never.
    #[default]
    Never,
    /// When it ended with a signal or an exit code that is not 0.
    OnFailure,
    /// Whenever it ended and was not asked to.
    Always,
}

/// Whether and how a process is started again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Restart {
    /// When.
    pub when: When,
    /// How often at most; `None` for as often as needed.
    pub most: Option<u32>,
    /// What is waited before the first time, in milliseconds; it doubles with each that follows soon, up to 30 s.
    pub delay_ms: u64,
}

impl Default for Restart {
    fn default() -> Self {
        Self { when: When::Never, most: None, delay_ms: 500 }
    }
}

/// All that is wanted of a process.
#[derive(Clone, Debug)]
pub struct Order {
    /// What is executed.
    pub program: Program,
    /// Its working directory.
    pub cwd: PathBuf,
    /// Its environment, all of it.
    pub environment: Variables,
    /// Who it is to be; `None` for who the daemon is.
    pub identity: Option<Identity>,
    /// A name that its starter gave it.
    pub tag: Option<String>,
    /// A terminal of so many columns and rows.
    pub terminal: Option<(u16, u16)>,
    /// Whether its standard input is open.
    pub stdin: bool,
    /// Whether its standard output is kept.
    pub stdout: bool,
    /// Whether its standard error is kept.
    pub stderr: bool,
    /// How much of its output is kept, in bytes.
    pub keep: usize,
    /// When it is asked to end, by SIGTERM.
    pub timeout: Option<Duration>,
    /// How long after being asked it is killed.
    pub grace: Duration,
    /// What it may do less than the daemon.
    pub confinement: Confinement,
    /// Whether it is started again.
    pub restart: Restart,
}

/// How it is with a process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Standing {
    /// It is about to be.
    #[default]
    Starting,
    /// It runs.
    Running,
    /// It has ended and will be started again.
    Waiting,
    /// It has ended for good.
    Exited,
    /// It could not be started.
    Failed,
}

/// Why it was ended, if the daemon ended it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Its time was up.
    Timeout,
    /// It has used up its processor time.
    CpuTime,
    /// Its memory ran out.
    Memory,
}

#[derive(Debug, Default)]
struct State {
    standing: Standing,
    process: Option<Process>,
    group: Option<Arc<cgroup::Group>>,
    started: Option<SystemTime>,
    exit: Option<Exit>,
    ended: Option<Ended>,
    why: Option<String>,
    restarts: u32,
    /// Of earlier runs.
    cpu_before: Duration,
    peak_before: u64,
    /// It is not started again, whatever its policy.
    stopped: bool,
}

/// A process, from its order to long after its end.
#[derive(Debug)]
pub struct Managed {
    /// A UUID.
    pub id: String,
    /// What was wanted.
    pub order: Order,
    /// When.
    pub created: SystemTime,
    state: Mutex<State>,
    input: Input,
    output: Mutex<Ring>,
    /// The ring's end, and whether there will be no more.
    grown: watch::Sender<(u64, bool)>,
    woken: Notify,
}

/// What is known of a process at one moment.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// How it is with it.
    pub standing: Standing,
    /// Its pid, while it runs.
    pub pid: Option<i32>,
    /// When it was started the last time.
    pub started: Option<SystemTime>,
    /// How it ended the last time.
    pub exit: Option<Exit>,
    /// Why the daemon ended it.
    pub ended: Option<Ended>,
    /// Why it could not be started.
    pub why: Option<String>,
    /// How often it was started again.
    pub restarts: u32,
    /// Time on a processor, of all its runs.
    pub cpu: Duration,
    /// Memory now, in bytes, while it runs.
    pub memory: Option<u64>,
    /// The most memory of any run, in bytes.
    pub peak_memory: u64,
    /// How many processes there are in its group, where there is one.
    pub processes: Option<u64>,
    /// It is stopped by a signal.
    pub halted: bool,
    /// What is kept of its output: the first and the last offset.
    pub output: (u64, u64),
}

/// A part of the output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// Bytes of a source, and the offset after them.
    Bytes(Source, Vec<u8>, u64),
    /// What was before this offset is not kept any more.
    Lost(u64),
    /// There is nothing new, and there will be.
    Wait,
    /// There is no more.
    End,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// All of them, by their ids.
#[derive(Debug, Default)]
pub struct Table(Mutex<HashMap<String, Arc<Managed>>>);

impl Table {
    /// Starts a process. Also one that cannot be started is known afterwards, with the reason.
    ///
    /// # Errors
    /// Why it cannot be started the first time.
    pub async fn start(&self, order: Order) -> Result<Arc<Managed>, (Arc<Managed>, io::Error)> {
        let managed = Arc::new(Managed {
            id: ids::uuid(),
            created: SystemTime::now(),
            state: Mutex::default(),
            input: Input::new(Kind::None),
            output: Mutex::new(Ring::new(order.keep)),
            grown: watch::Sender::new((0, false)),
            woken: Notify::new(),
            order,
        });
        self.add(managed.clone());
        match supervise::begin(&managed).await {
            Ok(()) => Ok(managed),
            Err(e) => Err((managed, e)),
        }
    }

    fn add(&self, managed: Arc<Managed>) {
        let mut table = lock(&self.0);
        table.insert(managed.id.clone(), managed);
        if table.len() > REMEMBERED {
            let over = |one: &Arc<Managed>| matches!(lock(&one.state).standing, Standing::Exited | Standing::Failed);
            let mut ended: Vec<_> =
                table.values().filter(|one| over(one)).map(|one| (one.created, one.id.clone())).collect();
            ended.sort();
            let most = table.len() - REMEMBERED;
            for (_, id) in ended.into_iter().take(most) {
                table.remove(&id);
            }
        }
    }

    /// All, the oldest first.
    pub fn list(&self) -> Vec<Arc<Managed>> {
        let mut all: Vec<_> = lock(&self.0).values().cloned().collect();
        all.sort_by(|a, b| (a.created, &a.id).cmp(&(b.created, &b.id)));
        all
    }

    /// By its id, or by the tag of the newest that has it.
    pub fn find(&self, name: &str) -> Option<Arc<Managed>> {
        if let Some(found) = lock(&self.0).get(name) {
            return Some(found.clone());
        }
        self.list().into_iter().rev().find(|one| one.order.tag.as_deref() == Some(name))
    }

    /// Ends a process if it runs, and forgets it.
    pub fn remove(&self, managed: &Managed) {
        managed.stop(Signal::SIGKILL);
        lock(&self.0).remove(&managed.id);
    }

    /// Kills all.
    pub fn end_all(&self) {
        for managed in self.list() {
            managed.stop(Signal::SIGKILL);
        }
    }
}

impl Managed {
    /// How it is.
    pub fn snapshot(&self) -> Snapshot {
        let (start, end) = {
            let ring = lock(&self.output);
            (ring.start(), ring.end())
        };
        let state = lock(&self.state);
        let running = state.standing == Standing::Running;
        let pid = state.process.as_ref().filter(|_| running).map(|process| process.pid);
        let group = state.group.as_ref().filter(|_| running).map(|group| group.used());
        let own = pid.map(supervise::usage_of).unwrap_or_default();
        let now = match &group {
            Some(used) => (used.cpu, Some(used.memory), used.peak_memory.unwrap_or(used.memory)),
            None if running => (own.cpu, Some(own.memory), own.peak_memory),
            None => (Duration::ZERO, None, 0),
        };
        Snapshot {
            standing: state.standing,
            pid,
            started: state.started,
            exit: state.exit,
            ended: state.ended,
            why: state.why.clone(),
            restarts: state.restarts,
            cpu: state.cpu_before + now.0,
            memory: now.1,
            peak_memory: state.peak_before.max(now.2),
            processes: group.map(|used| used.processes),
            halted: own.halted,
            output: (start, end),
        }
    }

    /// Sends a signal: to all of its process group, or to itself alone.
    ///
    /// # Errors
    /// ESRCH when it does not run.
    pub fn signal(&self, signal: i32, group: bool) -> io::Result<()> {
        let process = lock(&self.state).process.clone().ok_or_else(|| io::Error::from_raw_os_error(libc::ESRCH))?;
        reaper::send(&process, signal, group)
    }

    /// Ends it, and does not start it again.
    pub fn stop(&self, signal: Signal) {
        let group = {
            let mut state = lock(&self.state);
            state.stopped = true;
            state.group.clone()
        };
        self.woken.notify_one();
        let _ = self.signal(signal as i32, true);
        if let (Signal::SIGKILL, Some(group)) = (signal, group) {
            group.kill();
        }
    }

    /// Types something.
    ///
    /// # Errors
    /// See [`Refused`].
    pub async fn write(&self, bytes: &[u8]) -> Result<(), Refused> {
        let process = lock(&self.state).process.clone().ok_or(Refused::Closed)?;
        self.input.write(bytes, process.ended).await
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

    /// The next part of its output from an offset on, of at most so many bytes.
    pub fn output(&self, offset: u64, most: usize) -> Part {
        let (_, over) = *self.grown.borrow();
        match lock(&self.output).next(offset, most) {
            Ok(Some((source, bytes))) => {
                let end = offset + bytes.len() as u64;
                Part::Bytes(source, bytes, end)
            }
            Err(start) => Part::Lost(start),
            Ok(None) if over => Part::End,
            Ok(None) => Part::Wait,
        }
    }

    /// Changes when there is more output, or no more.
    pub fn watch(&self) -> watch::Receiver<(u64, bool)> {
        self.grown.subscribe()
    }

    /// Waits until it has ended for good.
    pub async fn over(&self) {
        let _ = self.watch().wait_for(|(_, over)| *over).await;
    }
}
