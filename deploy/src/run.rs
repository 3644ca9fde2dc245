//! The process of a DaemonSet: installs, looks whether it stays so, and tells others.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::net::TcpListener;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use nix::sys::signal::{SigSet, Signal};

use crate::arguments::Arguments;
use crate::distribution::Refusal;
use crate::events::{self, Events, Reason};
use crate::http::{self, Answer};
use crate::install::{Done, Restart, collect, install};
use crate::journal::State;
use crate::kube::{READY, VERSION, label_value};
use crate::node::{self, Node};
use crate::stage::Programs;
use crate::status::{Metrics, Status};
use crate::uninstall::uninstall;

/// How often drift is repaired in a time before it is only told: somebody else wants it otherwise.
const REPAIRS: usize = 3;

/// That time.
const REPAIRS_IN: Duration = Duration::from_secs(3600);

/// How long it takes between two tries of what failed, at first; it doubles.
const RETRY: Duration = Duration::from_secs(15);

/// After so many looks the node's label is set again, since others can take it away.
const LOOKS: u32 = 10;

/// The longest of these times.
const LONGEST_RETRY: Duration = Duration::from_secs(600);

/// What the requests are answered from.
#[derive(Default)]
struct Shared {
    ready: AtomicBool,
    text: Mutex<Texts>,
}

#[derive(Default)]
struct Texts {
    /// Why it is not ready.
    reason: String,
    /// Why the last installation failed, if it did, or what it waits for.
    failure: Option<String>,
    metrics: String,
    repairs: u64,
}

impl Shared {
    fn texts(&self) -> std::sync::MutexGuard<'_, Texts> {
        self.text.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn answer(&self, path: &str) -> Answer {
        match path {
            "/healthz" => Answer::plain(200, "ok\n"),
            "/readyz" if self.ready.load(Ordering::Relaxed) => Answer::plain(200, "ok\n"),
            "/readyz" => Answer::plain(503, format!("{}\n", self.texts().reason)),
            "/metrics" => Answer {
                code: 200,
                kind: "text/plain; version=0.0.4; charset=utf-8",
                text: self.texts().metrics.clone(),
            },
            _ => Answer::plain(404, "there are /healthz, /readyz and /metrics\n"),
        }
    }
}

/// Waits for a signal to end, for so long. Tells whether there was one.
fn told_to_end(signals: &SigSet, patience: Duration) -> Result<bool> {
    let end = Instant::now() + patience;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let time = libc::timespec { tv_sec: left.as_secs() as libc::time_t, tv_nsec: left.subsec_nanos().into() };
        // SAFETY: the set and the time are valid for the call, and no information is asked for.
        match unsafe { libc::sigtimedwait(signals.as_ref(), std::ptr::null_mut(), &time) } {
            -1 => match nix::errno::Errno::last() {
                nix::errno::Errno::EAGAIN => return Ok(false),
                nix::errno::Errno::EINTR => {}
                e => return Err(e).context("wait for signals"),
            },
            _ => return Ok(true),
        }
    }
}

/// Runs until it is told to end.
///
/// # Errors
/// When it cannot even begin: a flag is wrong, or the node is none that can be installed on.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let interval = arguments.seconds("interval", 30).map_err(|e| anyhow!(e))?;
    let jitter = arguments.seconds("jitter", 0).map_err(|e| anyhow!(e))?;
    let signals = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]);
    // Before there are threads, so that all of them leave the signals to this one.
    signals.thread_block().context("block signals")?;
    let node = Node::open(arguments).inspect_err(|e| tell_refusal(arguments, e))?;
    let address = arguments.or("listen", "0.0.0.0:8090");
    let listener = TcpListener::bind(address).with_context(|| format!("listen on {address} (--listen)"))?;
    let shared = Arc::<Shared>::default();
    shared.texts().reason = "it has just begun".into();
    let served = shared.clone();
    std::thread::Builder::new()
        .name("http".into())
        .spawn(move || http::serve(&listener, move |path| served.answer(path)))
        .context("start a thread")?;
    if arguments.has("uninstall") {
        return take_away(&node, interval, &signals, &shared);
    }
    let programs = Path::new(arguments.or("programs", "/programs"));
    let events = Events::begin(node.cluster.clone())?;
    watch(&node, programs, (interval, jitter), &signals, (&shared, &events))
}

/// Tells why this process does not even begin, which is not what it was to do: others wait for that.
fn tell_refusal(arguments: &Arguments, why: &anyhow::Error) {
    let cluster = node::cluster(arguments).ok().flatten().filter(|_| arguments.installs());
    let told = cluster.map_or(Ok(()), |cluster| events::tell(&cluster, Reason::InstallFailed, &why.to_string()));
    told.unwrap_or_else(|e| log::warn!("{e:#}"));
}

/// A time by chance, up to the longest one.
fn by_chance(longest: Duration) -> Duration {
    // Its keys are random.
    let random = RandomState::new().build_hasher().finish();
    longest.mul_f64(random as f64 / u64::MAX as f64)
}

/// Installs. Before a restart of containerd it waits, without keeping other installers out. `None` if it is told to end then.
fn install_in_turn(
    node: &Node,
    programs: &Path,
    why: &str,
    jitter: Duration,
    signals: &SigSet,
    shared: &Shared,
) -> Result<Option<Done>> {
    let restart = if jitter.is_zero() { Restart::Now } else { Restart::Later };
    let done = install(node, &Programs::read(programs)?, why, restart, false)?;
    if !done.postponed {
        return Ok(Some(done));
    }
    let pause = by_chance(jitter);
    let text = format!("containerd is restarted in {:.1} s: not on all nodes at once (--jitter)", pause.as_secs_f64());
    log::info!("{text}");
    shared.texts().failure = Some(text);
    look(node, shared);
    if told_to_end(signals, pause)? {
        return Ok(None);
    }
    let last = install(node, &Programs::read(programs)?, why, Restart::Now, false)?;
    Ok(Some(Done { programs: done.programs || last.programs, ..last }))
}

/// The node's labels, as they were set last: RuntimeClasses send pods where they say that containerd serves the handler.
#[derive(Default)]
struct Labels {
    told: Option<&'static str>,
    looks: u32,
    silent: bool,
    /// The node is none that runx is installed on, though a containerd may serve it there.
    refused: bool,
}

impl Labels {
    /// Sets them if they are not as the node is, or were not set for long.
    fn set(&mut self, node: &Node, status: &Status) {
        let wanted = match status.registered {
            // A handler of that name that is not in our files is somebody else's.
            Some(true) if status.is_ours() && !self.refused => "true",
            Some(_) => "failed",
            // It may be restarting for somebody else; at the second look it is not.
            None if self.silent => "failed",
            None => {
                self.silent = true;
                return;
            }
        };
        self.silent = status.registered.is_none();
        self.looks += 1;
        if self.told == Some(wanted) && self.looks < LOOKS {
            return;
        }
        let version = label_value(env!("CARGO_PKG_VERSION"));
        let labels = [(READY, Some(wanted)), (VERSION, Some(version.as_str()))];
        match node.label(if wanted == "true" { &labels } else { &labels[..1] }) {
            Ok(()) => (self.told, self.looks) = (Some(wanted), 0),
            Err(e) => log::warn!("{e:#}"),
        }
    }
}

fn watch(
    node: &Node,
    programs: &Path,
    (interval, jitter): (Duration, Duration),
    signals: &SigSet,
    (shared, events): (&Shared, &Events),
) -> Result<()> {
    let mut repairs: Vec<Instant> = Vec::new();
    let mut labels = Labels::default();
    let mut retry = RETRY;
    let mut why = "install";
    loop {
        let rollbacks = rollbacks(node);
        let done = install_in_turn(node, programs, why, jitter, signals, shared);
        // When it is tried again, if it failed.
        let again = match done {
            Ok(None) => {
                log::info!("told to end before containerd was restarted");
                return Ok(());
            }
            Ok(Some(done)) => {
                tell(done, events);
                retry = RETRY;
                labels = Labels { told: Some("true"), ..Labels::default() };
                shared.texts().failure = None;
                None
            }
            Err(e) => {
                log::error!("{e:#}");
                let again = Instant::now() + retry;
                retry = (retry * 2).min(LONGEST_RETRY);
                labels.told = None;
                labels.refused = e.is::<Refusal>();
                // Others may read it: what containerd says of its files is for the log.
                let text = e.to_string();
                let is_taken_back = self::rollbacks(node) > rollbacks;
                events.tell(if is_taken_back { Reason::RolledBack } else { Reason::InstallFailed }, &text);
                shared.texts().failure = Some(text);
                Some(again)
            }
        };
        why = loop {
            if let Some(status) = look(node, shared) {
                labels.set(node, &status);
            }
            let left = again.map(|again| again.saturating_duration_since(Instant::now()));
            if told_to_end(signals, left.map_or(interval, |left| left.min(interval)))? {
                log::info!("told to end: runx stays installed");
                return Ok(());
            }
            match again {
                Some(again) if Instant::now() >= again => break why,
                Some(_) => continue,
                None => {}
            }
            let Some(status) = look(node, shared) else { continue };
            if status.state != State::Installed {
                break "install";
            }
            let Some(drift) = status.drift else {
                // An upgrade leaves the programs that shims ran from; the last of these may have ended since.
                if status.has_old_programs() {
                    collect(node).unwrap_or_else(|e| log::warn!("{e:#}"));
                }
                continue;
            };
            repairs.retain(|at| at.elapsed() < REPAIRS_IN);
            if repairs.len() >= REPAIRS {
                log::error!("{drift}; it was repaired {REPAIRS} times within an hour, and is left alone now");
                continue;
            }
            log::warn!("{drift}: installing again");
            repairs.push(Instant::now());
            shared.texts().repairs += 1;
            break "drift";
        };
    }
}

/// Takes runx away, and tries until nothing is left.
fn take_away(node: &Node, interval: Duration, signals: &SigSet, shared: &Shared) -> Result<()> {
    let mut gone = false;
    loop {
        if !gone {
            let failure = match uninstall(node, false) {
                Ok(done) if done.left.is_empty() => None,
                Ok(_) => {
                    let failure = "shims of pods still run: their programs stay until they have ended";
                    log::warn!("{failure}");
                    Some(failure.to_owned())
                }
                Err(e) => {
                    log::warn!("{e:#}");
                    Some(e.to_string())
                }
            };
            gone = failure.is_none();
            if gone {
                log::info!("uninstalled");
            }
            shared.texts().failure = failure;
        }
        look(node, shared);
        shared.ready.store(gone, Ordering::Relaxed);
        if told_to_end(signals, interval)? {
            return Ok(());
        }
    }
}

/// How often an installation was taken back.
fn rollbacks(node: &Node) -> u64 {
    node.store().load().map_or(0, |journal| journal.rollbacks)
}

fn tell(done: Done, events: &Events) {
    let text = match (done.restarted, done.programs) {
        (true, _) => "installed; containerd was restarted",
        (false, true) => "upgraded; containerd was not restarted",
        (false, false) => "installed already",
    };
    log::info!("{text}");
    if done.restarted || done.programs {
        events.tell(Reason::Installed, &format!("runx {} is {text}", env!("CARGO_PKG_VERSION")));
    }
}

/// Looks at the node, and lets others know.
fn look(node: &Node, shared: &Shared) -> Option<Status> {
    let status = match Status::of(node) {
        Ok(status) => status,
        Err(e) => {
            log::error!("{e:#}");
            shared.texts().reason = e.to_string();
            shared.ready.store(false, Ordering::Relaxed);
            return None;
        }
    };
    let mut metrics = Metrics(status.metrics(node));
    let mut texts = shared.texts();
    let reason = texts.failure.clone().or_else(|| status.drift.clone());
    shared.ready.store(reason.is_none() && status.is_well(), Ordering::Relaxed);
    texts.reason = reason.unwrap_or_else(|| format!("it is {}", status.state.name()));
    metrics.family("runx_node_repairs_total", "counter", "How often drift was repaired since this process began.");
    metrics.sample("runx_node_repairs_total", &[], texts.repairs);
    metrics.family(
        "runx_node_failing",
        "gauge",
        "Whether the last installation, or its removal, failed or was refused.",
    );
    metrics.sample("runx_node_failing", &[], u8::from(texts.failure.is_some()));
    texts.metrics = metrics.0;
    Some(status)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_are_within_their_bound_and_differ() {
        let longest = Duration::from_secs(10);
        let pauses: Vec<Duration> = (0..50).map(|_| by_chance(longest)).collect();
        assert!(pauses.iter().all(|pause| *pause <= longest), "{pauses:?}");
        let early = pauses.iter().filter(|pause| **pause < longest / 2).count();
        assert!((5..45).contains(&early), "{pauses:?}");
        assert_eq!(by_chance(Duration::ZERO), Duration::ZERO);
    }
}
