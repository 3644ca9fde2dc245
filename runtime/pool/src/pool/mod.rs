//! The pool: sandboxes that are ready, who waits for one, and who makes them.

pub(crate) mod lease;
pub(crate) mod metrics;
mod process;
mod run;
mod sandbox;
pub(crate) mod stop;
mod streams;
mod watch;
mod workers;

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use runx_core::error::Context;

use crate::error::{Error, Result};
use crate::group::PoolGroup;
use crate::template::{Template, Tier};
use lease::Lease;
use metrics::{Counters, Metrics, count};
use process::Plan;
use sandbox::Sandbox;
use workers::{Keeper, ToJanitor};

/// How a pool is run.
#[derive(Clone, Debug)]
pub struct Settings {
    /// How many sandboxes are kept ready. 0 makes one when it is asked for.
    pub size: usize,
    /// How many more there may be while some are lent.
    pub burst: usize,
    /// How many requests may wait; one more is refused.
    pub queue: usize,
    /// How long a request waits.
    pub timeout: Duration,
    /// How old a sandbox gets that nobody uses, and one that is used again and again.
    pub max_age: Duration,
    /// How many leases a sandbox has. In the complete tier that is one.
    pub max_uses: u32,
    /// How often those that are ready are asked whether they are well.
    pub check_every: Duration,
    /// The program that becomes the spawner, by calling [`spawner_main`](crate::spawner_main). The caller's own by default.
    pub spawner: Option<PathBuf>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            size: 4,
            burst: 4,
            queue: 256,
            timeout: Duration::from_secs(30),
            max_age: Duration::from_secs(600),
            max_uses: 1000,
            check_every: Duration::from_secs(10),
            spawner: None,
        }
    }
}

/// A pool of warm sandboxes. Dropping it ends everything in it, lent or not, and leaves nothing: no process, no mount, no
/// cgroup, no file.
#[derive(Debug)]
pub struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

/// What the pool, its threads and its leases share.
pub(crate) struct Shared {
    template: Template,
    settings: Settings,
    group: PoolGroup,
    plan: Plan,
    keeper: Keeper,
    counters: Counters,
    state: Mutex<State>,
    /// Sandboxes that were thrown away and are not gone yet. It shrinks under the lock of the state, so that who waits for
    /// that misses nothing.
    ending: AtomicUsize,
    /// For who makes sandboxes: there may be something to do.
    work: Condvar,
    /// For who waits until no sandbox is lent.
    returned: Condvar,
    janitor: Mutex<Sender<ToJanitor>>,
}

#[derive(Debug, Default)]
struct State {
    ready: VecDeque<Sandbox>,
    waiters: VecDeque<Arc<Waiter>>,
    /// Sandboxes that are being made or reset.
    making: usize,
    /// Those of them that are ready, and only asked whether they are well.
    asked: usize,
    leased: usize,
    closing: bool,
    /// How long to wait before the next attempt, after one that failed.
    pause: Option<Instant>,
}

/// A request that waits.
#[derive(Debug, Default)]
struct Waiter {
    given: Mutex<Option<Result<Sandbox>>>,
    there: Condvar,
}

/// A lock whose holder panicked is taken all the same: what it guards is changed in single steps.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl Pool {
    /// Starts a pool. Its first sandboxes are made in the background.
    ///
    /// A sandbox takes some eight descriptors, so the soft limit on open files of the caller is raised to the hard one.
    ///
    /// # Errors
    /// [`Error::Template`] for what makes no sense, [`Error::Spawner`] where the spawner cannot set itself up, and
    /// system errors.
    pub fn new(template: Template, settings: Settings) -> Result<Self> {
        if crate::spawner::is_meant() {
            // It would execute itself again, and so on.
            return Err(Error::Spawner("this program was executed to be one, and does not call spawner_main".into()));
        }
        if settings.size + settings.burst == 0 || settings.max_uses == 0 {
            return Err(Error::Template { field: "size", reason: "there would be no sandbox at all".into() });
        }
        let plan = Plan::new(&template, settings.spawner.clone())?;
        runx_core::sys::process::raise_open_files().context("raise the limit on open files")?;
        let (janitor, for_janitor) = mpsc::channel();
        let (keeper, for_keeper) = Keeper::new();
        let shared = Arc::new(Shared {
            template,
            settings,
            group: PoolGroup::create(plan.user()),
            plan,
            keeper,
            counters: Counters::default(),
            state: Mutex::default(),
            ending: AtomicUsize::new(0),
            work: Condvar::new(),
            returned: Condvar::new(),
            janitor: Mutex::new(janitor),
        });
        let mut pool = Self { shared, threads: Vec::new() };
        let shared = Arc::clone(&pool.shared);
        pool.thread("pool-keeper", move || workers::keep(&shared, &for_keeper))?;
        pool.shared.keeper.spawner(None)?;
        let shared = Arc::clone(&pool.shared);
        pool.thread("pool-janitor", move || workers::clean(&shared, &for_janitor))?;
        let makers = std::thread::available_parallelism().map_or(1, |cores| cores.get().clamp(1, 4));
        for _ in 0..makers {
            let shared = Arc::clone(&pool.shared);
            pool.thread("pool-maker", move || workers::make(&shared))?;
        }
        Ok(pool)
    }

    fn thread(&mut self, name: &str, body: impl FnOnce() + Send + 'static) -> Result<()> {
        let started = std::thread::Builder::new().name(name.into()).spawn(body);
        let started = started.map_err(|e| runx_core::Error::system(format!("start the thread {name}"), e))?;
        self.threads.push(started);
        Ok(())
    }

    /// Lends a sandbox, or waits for one in turn, for at most [`Settings::timeout`].
    ///
    /// # Errors
    /// [`Error::QueueFull`], [`Error::Timeout`] and [`Error::Closed`]; the reason why none can be made, for those who wait
    /// when that shows.
    pub fn acquire(&self) -> Result<Lease> {
        self.acquire_within(self.shared.settings.timeout)
    }

    /// As [`Self::acquire`], for at most `timeout`.
    ///
    /// # Errors
    /// As [`Self::acquire`].
    pub fn acquire_within(&self, timeout: Duration) -> Result<Lease> {
        let taken = self.shared.take(timeout);
        if taken.is_err() {
            count(&self.shared.counters.refused);
        }
        Ok(Lease::new(Arc::clone(&self.shared), taken?))
    }

    /// The template.
    pub fn template(&self) -> &Template {
        &self.shared.template
    }

    /// What limits and measures sandboxes here, in words.
    pub fn cgroups(&self) -> String {
        self.shared.group.describe()
    }

    /// The counters.
    pub fn metrics(&self) -> Metrics {
        let state = lock(&self.shared.state);
        Metrics {
            ready: state.ready.len() as u64,
            leased: state.leased as u64,
            queued: state.waiters.len() as u64,
            ending: self.shared.ending.load(Ordering::Relaxed) as u64,
            ..self.shared.counters.read()
        }
    }

    /// Lends nothing more, waits until all that is lent came back, but for at most `timeout`, and closes the pool.
    /// Returns whether all came back.
    pub fn drain(self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let mut state = self.shared.close(lock(&self.shared.state));
        while state.leased > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = match self.shared.returned.wait_timeout(state, left) {
                Ok((state, _)) => state,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
        true
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        drop(self.shared.close(lock(&self.shared.state)));
        let ready = std::mem::take(&mut lock(&self.shared.state).ready);
        drop(ready);
        self.shared.keeper.end();
        // Fails if the thread is gone, which is what it is to do.
        let _ = lock(&self.shared.janitor).send(ToJanitor::End);
        for thread in self.threads.drain(..) {
            // A thread that panicked has said so.
            let _ = thread.join();
        }
        self.shared.group.clear();
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("tier", &self.template.tier).field("groups", &self.group).finish_non_exhaustive()
    }
}

impl Shared {
    /// Nobody gets a sandbox any more.
    fn close<'a>(&'a self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        state.closing = true;
        for waiter in state.waiters.drain(..) {
            waiter.give(Err(Error::Closed));
        }
        self.work.notify_all();
        state
    }

    fn take(&self, timeout: Duration) -> Result<Sandbox> {
        let mut state = lock(&self.state);
        if state.closing {
            return Err(Error::Closed);
        }
        if state.waiters.is_empty() {
            while let Some(sandbox) = state.ready.pop_front() {
                // Not in the way of the execution that is about to begin, unless few are left.
                if state.ready.len() * 2 < self.settings.size {
                    self.work.notify_one();
                }
                if sandbox.is_alive() {
                    state.leased += 1;
                    return Ok(sandbox);
                }
                self.throw_away(sandbox, Some(&self.counters.lost));
            }
        }
        if state.waiters.len() >= self.settings.queue + state.asked {
            return Err(Error::QueueFull(state.waiters.len()));
        }
        let waiter = Arc::new(Waiter::default());
        state.waiters.push_back(Arc::clone(&waiter));
        self.work.notify_one();
        drop(state);
        let begin = Instant::now();
        let given = waiter.wait(timeout);
        self.counters.waited(begin.elapsed());
        if let Some(given) = given {
            return given;
        }
        let mut state = lock(&self.state);
        state.waiters.retain(|other| !Arc::ptr_eq(other, &waiter));
        drop(state);
        // It may have come in between.
        let given = lock(&waiter.given).take();
        given.unwrap_or(Err(Error::Timeout(timeout)))
    }

    /// Takes a sandbox that is ready, new or reset.
    fn offer(&self, sandbox: Sandbox) {
        let mut state = lock(&self.state);
        state.making -= 1;
        state.pause = None;
        if state.closing {
            drop(state);
            self.throw_away(sandbox, None);
        } else if let Some(waiter) = state.waiters.pop_front() {
            state.leased += 1;
            waiter.give(Ok(sandbox));
        } else {
            state.ready.push_back(sandbox);
        }
    }

    /// Takes a sandbox back from a lease.
    fn give_back(&self, sandbox: Sandbox, broken: bool) {
        let mut state = lock(&self.state);
        state.leased -= 1;
        if state.leased == 0 {
            self.returned.notify_all();
        }
        let used_up = self.template.tier == Tier::Complete
            || sandbox.uses() + 1 >= self.settings.max_uses
            || sandbox.age() >= self.settings.max_age;
        if broken || used_up || state.closing {
            self.work.notify_one();
            drop(state);
            self.throw_away(sandbox, broken.then_some(&self.counters.lost));
        } else {
            state.making += 1;
            self.work.notify_one();
            drop(state);
            self.janitor(ToJanitor::Reset(sandbox));
        }
    }

    /// Ends a sandbox. That it is gone is waited for in the background, but all that are on the way end at once.
    fn throw_away(&self, sandbox: Sandbox, why: Option<&AtomicU64>) {
        count(&self.counters.destroyed);
        if let Some(why) = why {
            count(why);
        }
        sandbox.kill();
        self.ending.fetch_add(1, Ordering::Relaxed);
        self.janitor(ToJanitor::Destroy(sandbox));
    }

    fn janitor(&self, what: ToJanitor) {
        // When the thread is gone the pool is, and what is dropped here with it.
        let _ = lock(&self.janitor).send(what);
    }
}

impl Waiter {
    fn give(&self, sandbox: Result<Sandbox>) {
        *lock(&self.given) = Some(sandbox);
        self.there.notify_one();
    }

    fn wait(&self, timeout: Duration) -> Option<Result<Sandbox>> {
        let waited = self.there.wait_timeout_while(lock(&self.given), timeout, |given| given.is_none());
        let (mut given, _) = waited.unwrap_or_else(|poisoned| poisoned.into_inner());
        given.take()
    }
}
