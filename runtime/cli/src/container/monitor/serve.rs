//! What a monitor does while its container runs.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::Result;
use runx_core::sys::pidfd::{self, Exit};

use super::agent::Agent;
use super::clients::Wish;
use super::streams::{self, Streams};
use super::{Monitor, Running, is_ending};
use crate::container::frames::Kind;
use crate::container::log::{Stream, Writer};

/// How long output is waited for after the end. All processes of a PID namespace go with its first one, so that is only
/// for streams that were passed to somebody outside.
const DRAIN: Duration = Duration::from_millis(500);
/// How long at most, if somebody outside goes on writing to them.
const PATIENCE: Duration = Duration::from_secs(5);

/// Moves what goes in and out, until the container's end.
pub(super) fn serve(monitor: &mut Monitor, running: &mut Running, log: &mut Option<Writer>) -> Result<Exit> {
    let mut buffer = vec![0u8; 16 * 1024];
    let mut end: Option<(Exit, Instant)> = None;
    loop {
        let streams = &running.streams;
        // Nobody who does not read keeps a container from its end: what its pipes still hold is kept for him.
        let hold = if end.is_none() { monitor.clients.hold() } else { monitor.clients.hold_at_end() };
        let raw = |fd: &Option<OwnedFd>| fd.as_ref().filter(|_| !hold).map_or(-1, |fd| fd.as_raw_fd());
        let poll = |fd: i32, events| libc::pollfd { fd, events, revents: 0 };
        let mut fds = vec![
            poll(monitor.signals.as_fd().as_raw_fd(), libc::POLLIN),
            poll(if end.is_none() { running.process.pidfd().as_raw_fd() } else { -1 }, libc::POLLIN),
            poll(raw(&streams.output), libc::POLLIN),
            poll(raw(&streams.error), libc::POLLIN),
            poll(streams.waits_for().unwrap_or(-1), libc::POLLOUT),
            poll(running.listener.as_raw_fd(), libc::POLLIN),
            poll(monitor.agent.as_ref().filter(|_| end.is_none()).and_then(Agent::watched).unwrap_or(-1), libc::POLLIN),
        ];
        let own = fds.len();
        fds.extend(monitor.clients.poll(streams.is_full()));
        let timeout = match end {
            None => monitor.agent.as_ref().and_then(Agent::wait).map_or(-1, |wait| wait.as_millis() as i32 + 1),
            Some((_, at)) => {
                let limit = if hold { PATIENCE } else { DRAIN };
                (at + limit).saturating_duration_since(Instant::now()).as_millis() as i32
            }
        };
        // SAFETY: fds is a valid list of that many.
        let ready = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, timeout) };
        if ready == -1 {
            continue;
        }
        while let Some(signal) = monitor.signals.next() {
            if is_ending(signal) {
                stop(monitor, running);
            }
        }
        if fds[1].revents != 0 {
            end = Some((running.process.wait()?, Instant::now()));
        }
        for wish in monitor.clients.handle(&fds[own..]) {
            if let Wish::Signal(number) = wish
                && (end.is_some() || pidfd::wait_ended(running.process.pidfd().as_fd(), 0).unwrap_or(false))
            {
                // It is too late for the program, and not for what its restart policy makes of the end.
                monitor.stopping |= is_ending(number);
                continue;
            }
            fulfil(wish, running, monitor.options.stdin_once);
        }
        if fds[4].revents != 0 {
            running.streams.write_input();
        }
        let readable = |at: usize| fds[at].revents != 0;
        if readable(2) {
            pass(monitor, &mut running.streams, Stream::Output, log, &mut buffer);
        }
        if readable(3) {
            pass(monitor, &mut running.streams, Stream::Error, log, &mut buffer);
        }
        if fds[5].revents != 0
            && let Ok((socket, _)) = running.listener.accept()
        {
            monitor.clients.add(socket);
        }
        if end.is_none()
            && let Some(agent) = &mut monitor.agent
        {
            agent.tend(&monitor.runtime, &running.container);
        }
        if let Some((exit, at)) = end {
            let open = running.streams.output.is_some() || running.streams.error.is_some();
            if !open || ready == 0 && at.elapsed() >= DRAIN || at.elapsed() >= PATIENCE {
                return Ok(exit);
            }
        }
    }
}

fn pass(monitor: &mut Monitor, streams: &mut Streams, stream: Stream, log: &mut Option<Writer>, buffer: &mut [u8]) {
    let (fd, kind) = match stream {
        Stream::Output => (&mut streams.output, Kind::Output),
        Stream::Error => (&mut streams.error, Kind::Error),
    };
    let Some(from) = fd else { return };
    match streams::read(from, buffer) {
        None => *fd = None,
        Some([]) => {}
        Some(data) => {
            // A full disk shall not hold up the container.
            let _ = log.as_mut().map(|log| log.write(stream, data));
            monitor.clients.tell(kind, data);
        }
    }
}

fn fulfil(wish: Wish, running: &mut Running, input_once: bool) {
    match wish {
        Wish::Input(data) => running.streams.feed(&data),
        // Who comes later may have more to say.
        Wish::InputEnd if !input_once => {}
        Wish::InputEnd => running.streams.end_input(),
        Wish::Resize(rows, columns) => running.streams.resize(rows, columns),
        // It may have ended in this moment.
        Wish::Signal(number) => drop(pidfd::send_signal(running.process.pidfd().as_fd(), number)),
    }
}

/// Somebody wants the monitor to end, such as a machine that goes down: the container is asked to stop.
fn stop(monitor: &mut Monitor, running: &Running) {
    if std::mem::replace(&mut monitor.stopping, true) {
        return;
    }
    let _ = running.container.kill(monitor.stop_signal, false);
}
