//! `events`: what a container uses, again and again, and when it runs out of memory.

use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
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

/// Prints until the container stops or nobody reads any more.
fn watch(container: &Container, interval: Duration) -> Result<u8, Failure> {
    let first = container.first_process()?;
    let mut next = Instant::now() + interval;
    loop {
        let left = next.saturating_duration_since(Instant::now());
        let happened = wait(&first, left)?;
        if happened.nobody_reads || happened.ended {
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
struct Happened {
    ended: bool,
    nobody_reads: bool,
}

fn wait(first: &OwnedFd, timeout: Duration) -> Result<Happened> {
    let poll = |fd: i32, events: i16| libc::pollfd { fd, events, revents: 0 };
    // Standard output says by itself when a pipe's reader has gone.
    let mut fds = [poll(first.as_raw_fd(), libc::POLLIN), poll(1, 0)];
    // Rounded up, or the last fraction of a millisecond would be waited for busily.
    let milliseconds = timeout.as_nanos().div_ceil(1_000_000).min(i32::MAX as u128) as i32;
    // SAFETY: fds is a valid list of that many.
    let ready = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, milliseconds) };
    if ready == -1 {
        let error = std::io::Error::last_os_error();
        if error.kind() != std::io::ErrorKind::Interrupted {
            return Err(error).context("wait for events of the container");
        }
        return Ok(Happened { ended: false, nobody_reads: false });
    }
    Ok(Happened { ended: fds[0].revents != 0, nobody_reads: fds[1].revents != 0 })
}
