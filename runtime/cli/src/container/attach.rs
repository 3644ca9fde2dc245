//! The user's streams, connected to those of a container through its monitor.

use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

use super::frames::{self, Kind};
use super::record::Containers;
use super::{monitor, socket, stop};
use crate::arguments::{DetachKeys, Streams};
use crate::oci::foreground::Signals;

/// How being attached ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum End {
    /// The container ended with this code.
    Exit(i32),
    /// The user left it alone.
    Detached,
    /// A signal ended the command, and not the container.
    Signal(i32),
    /// The container's monitor is gone.
    Lost,
    /// Nobody reads our output any more.
    OutputClosed,
}

/// What is connected.
pub(super) struct Attachment<'a> {
    pub(super) socket: UnixStream,
    pub(super) containers: &'a Containers,
    pub(super) id: &'a str,
    /// Where the core's state of the container is.
    pub(super) state: PathBuf,
    /// It has a terminal.
    pub(super) tty: bool,
    /// Pass standard input on.
    pub(super) input: bool,
    pub(super) streams: &'a Streams,
}

/// The user's terminal in raw mode, until this is dropped.
struct Raw {
    saved: Termios,
}

impl Raw {
    fn set() -> Option<Self> {
        // SAFETY: standard input stays open for as long as this program runs.
        let stdin = unsafe { BorrowedFd::borrow_raw(0) };
        let saved = tcgetattr(stdin).ok()?;
        let mut raw = saved.clone();
        cfmakeraw(&mut raw);
        tcsetattr(stdin, SetArg::TCSANOW, &raw).ok()?;
        Some(Self { saved })
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // SAFETY: as above.
        let stdin = unsafe { BorrowedFd::borrow_raw(0) };
        let _ = tcsetattr(stdin, SetArg::TCSADRAIN, &self.saved);
    }
}

/// Whether a stream of ours is a terminal.
pub(super) fn is_terminal(number: i32) -> bool {
    // SAFETY: isatty takes a number.
    unsafe { libc::isatty(number) == 1 }
}

/// What a client says first: that it wants the output, all of it if `lossless`, and the size of the user's window.
pub(super) fn greeting(tty: bool, lossless: bool) -> Vec<u8> {
    let mut out = Vec::new();
    frames::push(&mut out, Kind::Watch, &[lossless.into()]);
    if let Some(size) = window().filter(|_| tty) {
        frames::push(&mut out, Kind::Resize, &size);
    }
    out
}

/// The size of the user's window: rows and columns, two bytes each.
fn window() -> Option<[u8; 4]> {
    // SAFETY: winsize is plain data for which all zeroes is a valid value.
    let mut size: libc::winsize = unsafe { std::mem::zeroed() };
    let found = [1, 0, 2].iter().any(|number| {
        // SAFETY: size is writable; on what is no terminal the call fails.
        unsafe { libc::ioctl(*number, libc::TIOCGWINSZ, &mut size) == 0 && size.ws_row > 0 }
    });
    let ([a, b], [c, d]) = (size.ws_row.to_ne_bytes(), size.ws_col.to_ne_bytes());
    found.then_some([a, b, c, d])
}

/// Finds the keys that leave a container alone in what the user types.
struct Keys<'a> {
    keys: &'a [u8],
    matched: usize,
}

impl Keys<'_> {
    /// What is to be passed on of `typed`, and whether the keys were all there.
    fn filter(&mut self, typed: &[u8]) -> (Vec<u8>, bool) {
        let mut out = Vec::with_capacity(typed.len());
        for byte in typed {
            if self.keys.get(self.matched) == Some(byte) {
                self.matched += 1;
                if self.matched == self.keys.len() {
                    return (out, true);
                }
                continue;
            }
            out.extend(&self.keys[..std::mem::take(&mut self.matched)]);
            if self.keys.first() == Some(byte) {
                self.matched = 1;
            } else {
                out.push(*byte);
            }
        }
        (out, false)
    }
}

impl Attachment<'_> {
    /// Moves what goes in and out until one side ends it. `signals` are held back already.
    pub(super) fn serve(mut self, signals: &Signals) -> Result<End> {
        let raw = if self.tty && self.input { Raw::set() } else { None };
        let DetachKeys(keys) = &self.streams.detach_keys;
        let mut keys = Keys { keys: if raw.is_some() { keys } else { &[] }, matched: 0 };
        let mut input = self.input;
        let (mut incoming, mut outgoing) = (Vec::new(), Vec::new());
        self.socket.set_nonblocking(true).context("set up the connection to the monitor")?;
        loop {
            let poll = |fd: i32, events| libc::pollfd { fd, events, revents: 0 };
            let writing = !outgoing.is_empty();
            let mut fds = [
                poll(self.socket.as_raw_fd(), if writing { libc::POLLIN | libc::POLLOUT } else { libc::POLLIN }),
                poll(signals.as_fd().as_raw_fd(), libc::POLLIN),
                poll(if input && !writing { 0 } else { -1 }, libc::POLLIN),
            ];
            // SAFETY: fds is a valid list of that many.
            if unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, -1) } == -1 {
                continue;
            }
            while let Some(signal) = signals.next() {
                if let Some(end) = self.on_signal(signal) {
                    return Ok(end);
                }
            }
            if fds[2].revents != 0 {
                let mut buffer = [0u8; 16 * 1024];
                // SAFETY: the buffer is writable for its length.
                let n = unsafe { libc::read(0, buffer.as_mut_ptr().cast(), buffer.len()) };
                match usize::try_from(n) {
                    Ok(0) => {
                        input = false;
                        frames::push(&mut outgoing, Kind::InputEnd, &[]);
                    }
                    Ok(n) => {
                        let (typed, detach) = keys.filter(&buffer[..n]);
                        if !typed.is_empty() {
                            frames::push(&mut outgoing, Kind::Input, &typed);
                        }
                        if detach {
                            let _ = self.flush(&mut outgoing);
                            return Ok(End::Detached);
                        }
                    }
                    Err(_) if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
                    // A terminal that is another job's now, or was hung up.
                    Err(_) => input = false,
                }
            }
            if self.flush(&mut outgoing).is_err() {
                // What it said last may still be there to be read.
                outgoing.clear();
                input = false;
            }
            if fds[0].revents & !libc::POLLOUT != 0 {
                let open = self.read(&mut incoming);
                while let Some((kind, data)) = frames::take(&mut incoming).context("understand the monitor")? {
                    match (kind, &data[..]) {
                        (Kind::Output, _) if write_all(1, &data).is_err() => return Ok(End::OutputClosed),
                        (Kind::Error, _) => drop(write_all(2, &data)),
                        (Kind::Exit, &[a, b, c, d]) => return Ok(End::Exit(i32::from_ne_bytes([a, b, c, d]))),
                        _ => {}
                    }
                }
                if !open {
                    return Ok(End::Lost);
                }
            }
        }
    }

    /// Writes what can be written now.
    fn flush(&mut self, outgoing: &mut Vec<u8>) -> io::Result<()> {
        while !outgoing.is_empty() {
            match self.socket.write(outgoing) {
                Ok(n) => drop(outgoing.drain(..n)),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Reads what is there. Returns `false` at the end.
    fn read(&mut self, incoming: &mut Vec<u8>) -> bool {
        let mut buffer = [0u8; 32 * 1024];
        match io::Read::read(&mut self.socket, &mut buffer) {
            Ok(0) => false,
            Ok(n) => {
                incoming.extend(&buffer[..n]);
                true
            }
            Err(e) => matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock),
        }
    }

    /// What a signal to this command means.
    fn on_signal(&mut self, signal: i32) -> Option<End> {
        match signal {
            // Its connection to the monitor may be full of input, so these take one of their own.
            libc::SIGWINCH => {
                if let Some(size) = window().filter(|_| self.tty) {
                    let _ = socket::say(&self.state, Kind::Resize, &size);
                }
                None
            }
            libc::SIGCHLD | libc::SIGURG | libc::SIGPIPE | libc::SIGCONT | libc::SIGTTIN | libc::SIGTTOU => None,
            signal if self.streams.sig_proxy => {
                // Where nobody listens it has ended, or is between two starts.
                let say = || socket::say(&self.state, Kind::Signal, &[signal as u8]);
                if say().is_err() && monitor::is_ending(signal) && stop::end_pause(self.containers, self.id) {
                    let _ = say();
                }
                None
            }
            signal => Some(End::Signal(signal)),
        }
    }
}

/// Writes to a standard stream, which may be one that does not wait.
pub(super) fn write_all(number: i32, mut data: &[u8]) -> io::Result<()> {
    while !data.is_empty() {
        // SAFETY: the data is valid for its length.
        let n = unsafe { libc::write(number, data.as_ptr().cast(), data.len()) };
        match usize::try_from(n) {
            Ok(n) => data = &data[n..],
            Err(_) => {
                let error = io::Error::last_os_error();
                match error.kind() {
                    io::ErrorKind::Interrupted => {}
                    io::ErrorKind::WouldBlock => {
                        // SAFETY: the standard streams stay open for as long as this program runs.
                        let fd = unsafe { BorrowedFd::borrow_raw(number) };
                        runx_core::sys::poll(fd, libc::POLLOUT, -1)?;
                    }
                    _ => return Err(error),
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_found_across_reads_and_what_only_begins_like_them_is_passed_on() {
        let mut keys = Keys { keys: &[16, 17], matched: 0 };
        assert_eq!(keys.filter(b"a\x10"), (b"a".to_vec(), false));
        assert_eq!(keys.filter(b"b\x10\x10"), (b"\x10b\x10".to_vec(), false));
        assert_eq!(keys.filter(b"\x11c"), (Vec::new(), true));
        let mut none = Keys { keys: &[], matched: 0 };
        assert_eq!(none.filter(b"\x10\x11"), (b"\x10\x11".to_vec(), false));
    }
}
