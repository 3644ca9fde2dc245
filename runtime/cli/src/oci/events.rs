//! `events`: what a container uses, again and again, and when it runs out of memory.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use runx_core::cgroup::OomWatch;
use runx_core::container::{Container, Status};

use super::stats::{Event, Stats};
use crate::{Context, Failure, message, print};

/// `runx events`.
pub(crate) fn events(context: &Context, id: &str, interval: Duration, once: bool) -> Result<u8, Failure> {
    let container = context.runtime().load(id)?;
    if container.status() == Status::Stopped {
        return Err(anyhow::anyhow!("container with id {id} is not running").into());
    }
    if once {
        return print_stats(&container);
    }
    watch(&container, interval)
}

fn print_stats(container: &Container) -> Result<u8, Failure> {
    let state = container.state();
    let stats = Stats::new(container.stats()?);
    print_event(&Event { kind: "stats", id: &state.id, data: Some(stats) })
}

fn print_event(event: &Event<'_>) -> Result<u8, Failure> {
    print(&format!("{}\n", serde_json::to_string(event).context("print an event")?))
}

/// How long to wait until a kill that the kernel announced is counted, and how often.
const RECHECK: Duration = Duration::from_millis(5);
const RECHECKS: u32 = 40;

/// Tells when a container runs out of memory.
struct Memory<'a> {
    id: &'a str,
    watch: Option<OomWatch>,
    /// How often a kill that was announced is still looked for.
    rechecks: u32,
}

impl Memory<'_> {
    /// Prints what is new.
    fn tell(&mut self) -> Result<(), Failure> {
        let Some(watch) = &mut self.watch else {
            self.rechecks = 0;
            return Ok(());
        };
        let found = watch.drain()?;
        if found.kills > 0 || found.stalled {
            print_event(&Event { kind: "oom", id: self.id, data: None })?;
        }
        if found.gone {
            self.watch = None;
        }
        self.rechecks = match (found.announced, self.rechecks) {
            (false, _) => 0,
            (true, 0) => RECHECKS,
            (true, left) => left - 1,
        };
        Ok(())
    }
}

/// Prints until the container stops or nobody reads any more.
fn watch(container: &Container, interval: Duration) -> Result<u8, Failure> {
    let state = container.state();
    let mut memory = Memory { id: &state.id, watch: state.cgroup.watch_oom()?, rechecks: 0 };
    let first = container.first_process()?;
    let mut next = Instant::now() + interval;
    loop {
        let mut left = next.saturating_duration_since(Instant::now());
        if memory.rechecks > 0 {
            left = left.min(RECHECK);
        }
        let happened = wait(&first, memory.watch.as_ref(), left)?;
        if happened.nobody_reads {
            return Ok(0);
        }
        if happened.memory || happened.ended || memory.rechecks > 0 {
            memory.tell()?;
        }
        if happened.ended {
            // Its end may be what the lack of memory led to.
            while memory.rechecks > 0 {
                std::thread::sleep(RECHECK);
                memory.tell()?;
            }
            return Ok(0);
        }
        if Instant::now() >= next {
            if let Err(failure) = print_stats(container) {
                // The next time may go better; if the container has gone, that is seen first.
                log::error!("{}", message(&failure.error));
            }
            // What was missed while this process was stopped is not made up for.
            next = (next + interval).max(Instant::now());
        }
    }
}

/// What can happen before it is time for statistics again.
#[derive(Default)]
struct Happened {
    ended: bool,
    nobody_reads: bool,
    memory: bool,
}

fn wait(first: &OwnedFd, memory: Option<&OomWatch>, timeout: Duration) -> Result<Happened> {
    let poll = |fd: i32, events: i16| libc::pollfd { fd, events, revents: 0 };
    // Standard output says by itself when a pipe's reader has gone.
    let mut fds = [
        poll(first.as_raw_fd(), libc::POLLIN),
        poll(1, 0),
        poll(memory.map_or(-1, |watch| watch.as_fd().as_raw_fd()), libc::POLLIN),
    ];
    // Rounded up, or the last fraction of a millisecond would be waited for busily.
    let milliseconds = timeout.as_nanos().div_ceil(1_000_000).min(i32::MAX as u128) as i32;
    // SAFETY: fds is a valid list of that many.
    let ready = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, milliseconds) };
    if ready == -1 {
        let error = std::io::Error::last_os_error();
        if error.kind() != std::io::ErrorKind::Interrupted {
            return Err(error).context("wait for events of the container");
        }
        return Ok(Happened::default());
    }
    let [ended, nobody_reads, memory] = fds.map(|fd| fd.revents != 0);
    Ok(Happened { ended, nobody_reads, memory })
}
