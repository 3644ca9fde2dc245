//! The pool's threads: one keeps the spawner and looks after those that are ready, some make sandboxes, one resets and
//! removes them. None of what they do is on the way of an execution.

use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, Weak, mpsc};
use std::time::{Duration, Instant};

use super::metrics::count;
use super::process::Spawner;
use super::sandbox::Sandbox;
use super::{Settings, Shared, State, lock};
use crate::error::{Error, Result};
use crate::template::Tier;

/// How long to wait after a sandbox could not be made.
const PAUSE: Duration = Duration::from_millis(200);

/// How long the janitor waits for one sandbox to end before it turns to the next, and how often it comes back to it.
const LATE: Duration = Duration::from_millis(500);

/// For the thread that resets and removes.
#[derive(Debug)]
pub(super) enum ToJanitor {
    Reset(Sandbox),
    Destroy(Sandbox),
    End,
}

/// For the thread that keeps the spawner.
#[derive(Debug)]
enum ToKeeper {
    /// Start one, unless there is another one than this by now.
    Start(Option<Arc<Spawner>>, Sender<Result<Arc<Spawner>>>),
    End,
}

/// The spawner that is there, and the way to another one.
#[derive(Debug)]
pub(super) struct Keeper {
    requests: Mutex<Sender<ToKeeper>>,
    spawners: Mutex<Spawners>,
}

#[derive(Debug, Default)]
struct Spawners {
    current: Option<Arc<Spawner>>,
    /// Those before it that may still have sandboxes.
    earlier: Vec<Weak<Spawner>>,
}

/// What the keeper's thread is given.
#[derive(Debug)]
pub(super) struct ForKeeper(Receiver<ToKeeper>);

impl Keeper {
    pub(super) fn new() -> (Self, ForKeeper) {
        let (requests, for_keeper) = mpsc::channel();
        (Self { requests: Mutex::new(requests), spawners: Mutex::default() }, ForKeeper(for_keeper))
    }

    /// The spawner; another one if it is `bad` or has no user ids left.
    pub(super) fn spawner(&self, bad: Option<&Arc<Spawner>>) -> Result<Arc<Spawner>> {
        if let Some(spawner) = &lock(&self.spawners).current
            && spawner.has_ids()
            && bad.is_none_or(|bad| !Arc::ptr_eq(bad, spawner))
        {
            return Ok(Arc::clone(spawner));
        }
        let (answer, answered) = mpsc::channel();
        lock(&self.requests).send(ToKeeper::Start(bad.cloned(), answer)).map_err(|_| Error::Closed)?;
        answered.recv().map_err(|_| Error::Closed)?
    }

    /// Ends all spawners, and with them all sandboxes, and the thread.
    pub(super) fn end(&self) {
        let _ = lock(&self.requests).send(ToKeeper::End);
        let Spawners { current, earlier } = std::mem::take(&mut *lock(&self.spawners));
        for spawner in earlier.iter().filter_map(Weak::upgrade).chain(current) {
            spawner.kill();
        }
    }
}

/// Starts spawners, which end with the thread that started them, and asks those that are ready whether they are well.
pub(super) fn keep(shared: &Shared, requests: &ForKeeper) {
    let mut next = Instant::now() + shared.settings.check_every;
    loop {
        match requests.0.recv_timeout(next.saturating_duration_since(Instant::now())) {
            Ok(ToKeeper::Start(bad, answer)) => {
                let _ = answer.send(start(shared, bad));
            }
            Ok(ToKeeper::End) | Err(RecvTimeoutError::Disconnected) => return,
            Err(RecvTimeoutError::Timeout) => {
                check(shared);
                next = Instant::now() + shared.settings.check_every;
            }
        }
    }
}

fn start(shared: &Shared, bad: Option<Arc<Spawner>>) -> Result<Arc<Spawner>> {
    let mut spawners = lock(&shared.keeper.spawners);
    if let Some(current) = &spawners.current
        && current.has_ids()
        && bad.as_ref().is_none_or(|bad| !Arc::ptr_eq(bad, current))
    {
        // Somebody else asked first.
        return Ok(Arc::clone(current));
    }
    if lock(&shared.state).closing {
        return Err(Error::Closed);
    }
    let new = Arc::new(Spawner::start(&shared.plan, &shared.group)?);
    count(&shared.counters.spawners);
    // One that ran out of ids goes with its last sandbox.
    let old = spawners.current.replace(Arc::clone(&new));
    spawners.earlier.retain(|earlier| earlier.strong_count() > 0);
    spawners.earlier.extend(old.iter().map(Arc::downgrade));
    Ok(new)
}

/// Pings those that are ready, one at a time, and replaces those that do not answer or are too old.
fn check(shared: &Shared) {
    let rounds = lock(&shared.state).ready.len();
    for _ in 0..rounds {
        let mut state = lock(&shared.state);
        let Some(mut sandbox) = state.ready.pop_front() else { return };
        // It counts all the while, so that no other one is made in its place, and whoever comes may wait for it.
        state.making += 1;
        state.asked += 1;
        drop(state);
        let well = sandbox.ping();
        let old = sandbox.age() >= shared.settings.max_age;
        let mut state = lock(&shared.state);
        state.asked -= 1;
        if state.closing || well.is_err() || old {
            state.making -= 1;
            shared.work.notify_one();
            drop(state);
            shared.throw_away(sandbox, well.is_err().then_some(&shared.counters.lost));
        } else {
            drop(state);
            shared.offer(sandbox);
        }
    }
}

/// Makes sandboxes while some are wanted.
pub(super) fn make(shared: &Arc<Shared>) {
    let mut state = lock(&shared.state);
    loop {
        if state.closing {
            return;
        }
        let pause = state.pause.map(|until| until.saturating_duration_since(Instant::now())).filter(|p| !p.is_zero());
        if let Some(pause) = pause {
            state = wait(shared, state, pause);
            continue;
        }
        if !wanted(&shared.settings, &state, shared.ending.load(Ordering::Relaxed)) {
            state = wait(shared, state, Duration::from_secs(3600));
            continue;
        }
        state.making += 1;
        drop(state);
        match make_one(shared) {
            Ok(sandbox) => {
                count(&shared.counters.made);
                shared.offer(sandbox);
                state = lock(&shared.state);
            }
            Err(e) => {
                count(&shared.counters.failed);
                state = failed(shared, &e);
            }
        }
    }
}

fn wait<'a>(
    shared: &'a Shared,
    state: std::sync::MutexGuard<'a, State>,
    time: Duration,
) -> std::sync::MutexGuard<'a, State> {
    match shared.work.wait_timeout(state, time) {
        Ok((state, _)) => state,
        Err(poisoned) => poisoned.into_inner().0,
    }
}

/// Whether another one is to be made. Those that are `ending` still have processes, descriptors and memory: while many are,
/// nobody makes more than is asked for, and at twice as many nobody does at all.
fn wanted(settings: &Settings, state: &State, ending: usize) -> bool {
    let most = settings.size + settings.burst;
    let all = state.ready.len() + state.making + state.leased;
    let missing = state.ready.len() + state.making < settings.size || state.making < state.waiters.len();
    missing && all < most && ending < if state.ready.is_empty() { 2 * most } else { most }
}

/// How often one is tried to be made, and a spawner is replaced for it.
const ATTEMPTS: u32 = 4;

fn make_one(shared: &Shared) -> Result<Sandbox> {
    let mut bad = None;
    let mut attempts = 0;
    loop {
        let spawner = shared.keeper.spawner(bad.as_ref())?;
        attempts += 1;
        match Sandbox::make(shared, &spawner) {
            // The spawner is gone, or going, or has no ids left: another one may do.
            Err(Error::Spawner(_)) if attempts < ATTEMPTS => bad = spawner.has_ids().then_some(spawner),
            Err(Error::Unclean(_)) if attempts < ATTEMPTS => {}
            Err(Error::Gone(_)) if attempts < ATTEMPTS => bad = (!spawner.is_alive()).then_some(spawner),
            Err(Error::Setup { errno: libc::EACCES | libc::EPERM, .. }) if shared.group.enter_instead() => {}
            other => return other,
        }
    }
}

/// Nothing can be made now: those who wait are told, and a while passes until the next attempt.
fn failed<'a>(shared: &'a Shared, error: &Error) -> std::sync::MutexGuard<'a, State> {
    log::warn!("{error}");
    let mut state = lock(&shared.state);
    state.making -= 1;
    state.pause = Some(Instant::now() + PAUSE);
    let errno = error.errno().unwrap_or(0);
    for waiter in state.waiters.drain(..) {
        waiter.give(Err(Error::Setup { message: error.to_string(), errno }));
    }
    state
}

/// Resets and removes.
pub(super) fn clean(shared: &Shared, requests: &Receiver<ToJanitor>) {
    // Those that did not go at once.
    let mut late = Vec::new();
    let mut tried = Instant::now();
    loop {
        if tried.elapsed() >= LATE {
            late.retain_mut(|sandbox| !destroy(shared, sandbox, Duration::ZERO));
            tried = Instant::now();
        }
        let request = if late.is_empty() {
            requests.recv().map_err(|_| RecvTimeoutError::Disconnected)
        } else {
            requests.recv_timeout(LATE)
        };
        match request {
            Ok(ToJanitor::End) | Err(RecvTimeoutError::Disconnected) => return,
            Err(RecvTimeoutError::Timeout) => {}
            Ok(ToJanitor::Destroy(mut sandbox)) => {
                if !destroy(shared, &mut sandbox, LATE) {
                    late.push(sandbox);
                }
            }
            Ok(ToJanitor::Reset(mut sandbox)) => match sandbox.reset(shared.template.tier == Tier::Wipe) {
                Ok(()) => {
                    count(&shared.counters.reset);
                    shared.offer(sandbox);
                }
                Err(e) => {
                    log::debug!("{e}");
                    let unclean = matches!(e, Error::Unclean(_));
                    lock(&shared.state).making -= 1;
                    shared.work.notify_one();
                    shared.throw_away(
                        sandbox,
                        Some(if unclean { &shared.counters.unclean } else { &shared.counters.lost }),
                    );
                }
            },
        }
    }
}

/// Removes a sandbox; returns whether it is gone.
fn destroy(shared: &Shared, sandbox: &mut Sandbox, patience: Duration) -> bool {
    if let Err(e) = sandbox.destroy(patience) {
        if !patience.is_zero() {
            log::warn!("{e}; this is tried again");
        }
        return false;
    }
    let state = lock(&shared.state);
    let before = shared.ending.fetch_sub(1, Ordering::Relaxed);
    drop(state);
    if before >= shared.settings.size + shared.settings.burst {
        // Makers may have waited for it.
        shared.work.notify_one();
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn while_many_are_ending_few_are_made() {
        let settings = Settings { size: 2, burst: 1, ..Settings::default() };
        let mut state = State::default();
        let wanted = |state: &State, ending| wanted(&settings, state, ending);
        // Nothing is ready, and may be missed.
        assert!(wanted(&state, 5));
        assert!(!wanted(&state, 6));
        state.making = 2;
        assert!(!wanted(&state, 0));
        state.waiters.extend((0..3).map(|_| std::sync::Arc::default()));
        assert!(wanted(&state, 0));
        state.leased = 1;
        assert!(!wanted(&state, 0));
    }
}
