//! The life of one process: started, read, watched, and started again.

use std::fs;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use nix::sys::signal::Signal;
use tokio::net::unix::pipe;

use super::{Ended, Kind, Managed, Standing, When, lock};
use crate::process::confine::cgroup;
use crate::process::output::{Piece, Pipes};
use crate::process::pty;
use crate::process::reaper::{self, Exit};
use crate::process::ring::Source;
use crate::process::spawn::{self, Process, Start, Streams};

/// The longest time between two starts.
const LONGEST: Duration = Duration::from_secs(30);

/// One that ran this long has not failed at its start.
const SETTLED: Duration = Duration::from_secs(10);

/// How often processor time is looked at.
const LOOK: Duration = Duration::from_millis(50);

/// What reads the output of a run.
enum Reading {
    Pipes(Box<Pipes>),
    Terminal(Arc<pty::Master>),
}

/// What a process uses now, from proc.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Usage {
    pub(super) cpu: Duration,
    pub(super) memory: u64,
    pub(super) peak_memory: u64,
    pub(super) halted: bool,
}

/// What a process and the children that it has waited for use.
pub(super) fn usage_of(pid: i32) -> Usage {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name may hold anything; its closing bracket is the last one.
    let fields: Vec<&str> = text.rsplit(") ").next().unwrap_or_default().split(' ').collect();
    let field = |at: usize| fields.get(at).and_then(|field| field.parse::<u64>().ok()).unwrap_or(0);
    let ticks: u64 = (11..=14).map(field).sum();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let kib = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok()).unwrap_or(0) * 1024
    };
    Usage {
        cpu: Duration::from_millis(ticks * 10),
        memory: kib("VmRSS:"),
        peak_memory: kib("VmHWM:"),
        halted: matches!(fields.first(), Some(&"T" | &"t")),
    }
}

/// Starts it for the first time, and keeps it from then on.
pub(super) async fn begin(managed: &Arc<Managed>) -> io::Result<()> {
    match start(managed).await {
        Ok((process, reading)) => {
            tokio::spawn(keep(managed.clone(), process, reading));
            // Somebody may have stopped it while it was being started.
            if lock(&managed.state).stopped {
                let _ = managed.signal(libc::SIGKILL, true);
            }
            Ok(())
        }
        Err(e) => {
            fail(managed, &e);
            Err(e)
        }
    }
}

fn fail(managed: &Managed, error: &io::Error) {
    {
        let mut state = lock(&managed.state);
        state.standing = Standing::Failed;
        state.process = None;
        state.group = None;
        state.why = Some(crate::process::commands::describe(error));
    }
    managed.grown.send_modify(|(_, over)| *over = true);
}

/// One start.
async fn start(managed: &Arc<Managed>) -> io::Result<(Process, Reading)> {
    let order = &managed.order;
    let limits = &order.confinement.limits;
    let wants_group = limits.memory_bytes.is_some() || limits.processes.is_some() || limits.cpu_time_ms.is_some();
    let group = match (wants_group, cgroup::place()) {
        (true, Ok(place)) => Some(Arc::new(place.make(limits)?)),
        _ => None,
    };
    let confinement = if order.confinement.is_none() {
        None
    } else {
        Some(order.confinement.ready(order.identity.as_ref(), group.as_deref(), &order.cwd)?)
    };
    let (streams, reading, input) = streams(managed)?;
    let start = Start {
        program: order.program.clone(),
        cwd: order.cwd.clone(),
        environment: order.environment.clone(),
        identity: order.identity.clone(),
        streams,
        passed: Vec::new(),
        confinement,
    };
    // Before it: a short one has ended by the time that this one goes on.
    let started = SystemTime::now();
    let process = start.start()?;
    managed.input.set(input).await;
    let mut state = lock(&managed.state);
    state.standing = Standing::Running;
    state.ended = None;
    state.process = Some(process.clone());
    state.group = group;
    state.started = Some(started);
    Ok((process, reading))
}

fn streams(managed: &Managed) -> io::Result<(Streams, Reading, Kind)> {
    let order = &managed.order;
    if let Some((columns, rows)) = order.terminal {
        let (master, slave) = pty::open(columns, rows)?;
        let master = Arc::new(master);
        return Ok((Streams::Terminal(slave), Reading::Terminal(master.clone()), Kind::Terminal(master)));
    }
    let (stdout, stdout_writer) = spawn::pipe()?;
    let (stderr, stderr_writer) = spawn::pipe()?;
    let pipes = Reading::Pipes(Box::new(Pipes::new(stdout, Some(stderr))?));
    if !order.stdin {
        let streams = Streams::Output { stdout: stdout_writer, stderr: stderr_writer };
        return Ok((streams, pipes, Kind::None));
    }
    let (reader, writer) = spawn::pipe()?;
    let streams = Streams::All { stdin: reader, stdout: stdout_writer, stderr: stderr_writer };
    Ok((streams, pipes, Kind::Pipe(pipe::Sender::from_owned_fd(writer)?)))
}

/// Runs it, again and again if that is wanted, until it has ended for good.
async fn keep(managed: Arc<Managed>, mut process: Process, mut reading: Reading) {
    let first = Duration::from_millis(managed.order.restart.delay_ms);
    let mut pause = first;
    loop {
        let begun = Instant::now();
        let watching = tokio::spawn(watch_over(managed.clone(), process.clone()));
        let exit = read(&managed, &process, reading).await;
        watching.abort();
        managed.input.set(Kind::None).await;
        let again = finish(&managed, exit);
        if !again {
            managed.grown.send_modify(|(_, over)| *over = true);
            return;
        }
        if begun.elapsed() > SETTLED {
            pause = first;
        }
        // Who does not want it any more need not wait.
        let woken = tokio::time::timeout(pause, managed.woken.notified()).await.is_ok();
        if woken || lock(&managed.state).stopped {
            lock(&managed.state).standing = Standing::Exited;
            managed.grown.send_modify(|(_, over)| *over = true);
            return;
        }
        pause = (pause * 2).min(LONGEST);
        lock(&managed.state).restarts += 1;
        match start(&managed).await {
            Ok(started) => (process, reading) = started,
            Err(e) => return fail(&managed, &e),
        }
        // Somebody may have stopped it while it was being started.
        if lock(&managed.state).stopped {
            let _ = managed.signal(libc::SIGKILL, true);
        }
    }
}

/// Enters the end of a run. Whether another one follows.
fn finish(managed: &Managed, exit: Option<Exit>) -> bool {
    let group = lock(&managed.state).group.take();
    if let Some(group) = &group {
        // Nobody of it outlives it: what has left its process group neither.
        group.kill();
    }
    let mut state = lock(&managed.state);
    if let Some(group) = group.filter(|group| group.has("memory") && group.has("cpuacct")) {
        let used = group.used();
        if used.killed_for_memory > 0 {
            state.ended = Some(Ended::Memory);
        }
        state.cpu_before += used.cpu;
        state.peak_before = state.peak_before.max(used.peak_memory.unwrap_or(0));
    } else if let Some(exit) = &exit {
        state.cpu_before += exit.cpu;
        state.peak_before = state.peak_before.max(exit.peak_memory);
    }
    if exit.is_some_and(|exit| exit.signal == Some(libc::SIGXCPU)) {
        state.ended = Some(Ended::CpuTime);
    }
    state.exit = exit;
    state.process = None;
    let restart = managed.order.restart;
    let failed = exit.is_none_or(|exit| exit.code != Some(0));
    let wanted = match restart.when {
        When::Never => false,
        When::OnFailure => failed,
        When::Always => true,
    };
    let again = wanted
        && !state.stopped
        && state.ended != Some(Ended::Timeout)
        && restart.most.is_none_or(|most| state.restarts < most);
    state.standing = if again { Standing::Waiting } else { Standing::Exited };
    again
}

async fn read(managed: &Managed, process: &Process, reading: Reading) -> Option<Exit> {
    let add = |source, bytes: &[u8]| {
        let end = {
            let mut ring = lock(&managed.output);
            ring.push(source, bytes);
            ring.end()
        };
        managed.grown.send_modify(|(known, _)| *known = end);
    };
    match reading {
        Reading::Terminal(master) => {
            pty::read_to_end(&master, process.ended.clone(), |bytes| {
                add(Source::Stdout, &bytes);
                std::future::ready(())
            })
            .await
        }
        Reading::Pipes(pipes) => {
            let mut output = pipes.of(process.ended.clone());
            loop {
                match output.next().await {
                    Piece::Stdout(bytes) if managed.order.stdout => add(Source::Stdout, bytes),
                    Piece::Stderr(bytes) if managed.order.stderr => add(Source::Stderr, bytes),
                    Piece::Exited(exit) => return Some(exit),
                    _ => {}
                }
                // It may have something to say all the time.
                tokio::task::yield_now().await;
            }
        }
    }
}

/// Ends a run whose time is up: of the clock, or on the processor.
async fn watch_over(managed: Arc<Managed>, process: Process) {
    let order = &managed.order;
    let clock = async {
        match order.timeout {
            Some(timeout) => tokio::time::sleep(timeout).await,
            None => std::future::pending().await,
        }
    };
    let processor = async {
        let Some(limit) = order.confinement.limits.cpu_time_ms.map(Duration::from_millis) else {
            return std::future::pending().await;
        };
        loop {
            tokio::time::sleep(LOOK).await;
            let group = lock(&managed.state).group.clone();
            let counts = group.filter(|group| group.has("cpuacct"));
            let used = counts.map_or_else(|| usage_of(process.pid).cpu, |group| group.used().cpu);
            if used >= limit {
                return;
            }
        }
    };
    let why = tokio::select! {
        () = clock => Ended::Timeout,
        () = processor => Ended::CpuTime,
    };
    lock(&managed.state).ended = Some(why);
    reaper::doom(&process);
    if why == Ended::Timeout && !order.grace.is_zero() {
        let _ = reaper::signal_group(&process, Signal::SIGTERM);
        let _ = managed.signal(libc::SIGCONT, true);
        tokio::time::sleep(order.grace).await;
    }
    let _ = reaper::signal_group(&process, Signal::SIGKILL);
}
