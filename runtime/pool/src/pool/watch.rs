//! Waiting with deadlines.

use std::time::{Duration, Instant};

use crate::command::Limits;
use crate::outcome::Status;

/// The least time between two looks at the processor time that was used.
const LEAST: Duration = Duration::from_millis(1);

/// The deadlines of an execution.
#[derive(Debug)]
pub(super) struct Watch {
    wall: Option<Instant>,
    cpu: Option<Duration>,
    /// How many processors can be used at once.
    parallel: u32,
    pub(super) reason: Option<Status>,
    pub(super) kill_at: Option<Instant>,
    /// Until then, when its init is told again.
    pub(super) again: Instant,
}

impl Watch {
    pub(super) fn new(limits: &Limits, start: Instant, processes: Option<u64>) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get() as u32);
        let parallel = processes.map_or(cores, |count| cores.min(count.clamp(1, 1024) as u32));
        let wall = limits.wall.and_then(|wall| start.checked_add(wall));
        Self { wall, cpu: limits.cpu, parallel, reason: None, kill_at: None, again: start }
    }

    /// When to look again. Processor time cannot pass faster than on all processors at once, so until then there is
    /// nothing to see.
    pub(super) fn next(&self, used: impl FnOnce() -> Option<Duration>) -> Option<Instant> {
        if self.reason.is_some() {
            return self.kill_at.map(|at| at.min(self.again));
        }
        let cpu = self.cpu.and_then(|limit| Some((limit, used()?))).and_then(|(limit, used)| {
            let left = limit.saturating_sub(used) / self.parallel;
            // What is over is over at once: a program that writes without a pause puts off whatever is later than now.
            Instant::now().checked_add(if used > limit { Duration::ZERO } else { left.max(LEAST) })
        });
        self.wall.into_iter().chain(cpu).min()
    }

    pub(super) fn is_over(&self, used: Option<Duration>) -> bool {
        let cpu = self.cpu.zip(used).is_some_and(|(limit, used)| used > limit);
        cpu || self.wall.is_some_and(|at| Instant::now() >= at)
    }
}

/// `ppoll(2)` until an instant, or for ever.
pub(super) fn poll(fds: &mut [libc::pollfd], until: Option<Instant>) -> std::io::Result<usize> {
    let time = until.map(|until| {
        let left = until.saturating_duration_since(Instant::now());
        libc::timespec { tv_sec: left.as_secs() as libc::time_t, tv_nsec: left.subsec_nanos().into() }
    });
    let time = time.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: the list is valid for its length, and the time is NULL or lives over the call.
    let ready = unsafe { libc::ppoll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, time, std::ptr::null()) };
    usize::try_from(ready).map_err(|_| std::io::Error::last_os_error())
}
