//! The streams of a program without a terminal: pipes, whose other ends are copied from and to ours.
//!
//! Our own streams never get into a container. They may be a terminal or a file, which then would be its user's, to read what
//! is typed or was written there before, for as long as a process in there keeps them.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use anyhow::{Context as _, Result};
use runx_core::container::Process;
use runx_core::sys::{self, pidfd::Exit};

use crate::oci::foreground::{Signals, forward};

/// Where the program's outputs go.
const OURS: [i32; 2] = [1, 2];

/// Our ends.
pub(super) struct Pipes {
    /// Where its input is written to, and what has been read for it.
    input: Option<(OwnedFd, Vec<u8>)>,
    /// What it prints, to our standard output and error.
    outputs: [Option<Output>; 2],
}

/// One of its outputs.
struct Output {
    from: OwnedFd,
    /// Ours does not take anything now, and is waited for.
    full: bool,
}

/// As much can be written to a pipe that is ready without waiting: PIPE_BUF.
const ATOMIC: usize = 4096;

impl Pipes {
    /// Makes them. Returns our ends and the program's; without `interactive` its input is empty.
    pub(super) fn make(interactive: bool) -> Result<(Self, [OwnedFd; 3])> {
        let pipe = || std::io::pipe().context("make a pipe");
        let (input, stdin) = if interactive {
            let (reader, writer) = pipe()?;
            let writer = OwnedFd::from(writer);
            sys::set_nonblocking(writer.as_fd()).context("make a pipe")?;
            (Some((writer, Vec::new())), reader.into())
        } else {
            (None, sys::open("/dev/null", libc::O_RDONLY).context("open /dev/null")?)
        };
        let ((out, stdout), (err, stderr)) = (pipe()?, pipe()?);
        let outputs = [out.into(), err.into()].map(|from| Some(Output { from, full: false }));
        Ok((Self { input, outputs }, [stdin, stdout.into(), stderr.into()]))
    }

    /// Copies until the program has ended and what it printed is out. A process that it leaves behind is not waited for.
    pub(super) fn wait(mut self, process: &Process, signals: &Signals) -> Result<Exit> {
        let mut exit = None;
        loop {
            let poll = |fd: i32, events: i16| libc::pollfd { fd, events, revents: 0 };
            // Our input is only read once the program has taken what there is.
            let (reads, writes) = match &self.input {
                Some((_, data)) if data.is_empty() => (0, -1),
                Some((fd, _)) => (-1, fd.as_raw_fd()),
                None => (-1, -1),
            };
            let output = |index: usize| match &self.outputs[index] {
                // Who does not read keeps us from writing, but not from hearing signals.
                Some(Output { full: true, .. }) => poll(OURS[index], libc::POLLOUT),
                Some(output) => poll(output.from.as_raw_fd(), libc::POLLIN),
                None => poll(-1, 0),
            };
            let mut fds = [
                poll(if exit.is_none() { process.pidfd().as_raw_fd() } else { -1 }, libc::POLLIN),
                poll(signals.as_fd().as_raw_fd(), libc::POLLIN),
                poll(if exit.is_none() { reads } else { -1 }, libc::POLLIN),
                poll(if exit.is_none() { writes } else { -1 }, libc::POLLOUT),
                output(0),
                output(1),
            ];
            let full = self.outputs.iter().flatten().any(|output| output.full);
            let timeout = if exit.is_some() && !full { 0 } else { -1 };
            // SAFETY: fds is a valid list of that many.
            let ready = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, timeout) };
            if ready == -1 {
                let error = io::Error::last_os_error();
                if error.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                return Err(error).context("wait for the program");
            }
            while let Some(signal) = signals.next() {
                match exit {
                    // There is only somebody to be waited for who does not read.
                    Some(exit) if matches!(signal, libc::SIGINT | libc::SIGTERM | libc::SIGHUP | libc::SIGQUIT) => {
                        return Ok(exit);
                    }
                    _ => forward(process, signal, None),
                }
            }
            if fds[2].revents != 0 {
                self.read();
            }
            if fds[3].revents != 0 {
                self.write();
            }
            for (index, _) in fds[4..].iter().enumerate().filter(|(_, fd)| fd.revents != 0) {
                // Once ours takes nothing any more, the program shall know.
                if !self.outputs[index].as_mut().is_some_and(|output| output.pass_on(OURS[index])) {
                    self.outputs[index] = None;
                }
            }
            if let Some(exit) = exit
                && fds[4..].iter().all(|fd| fd.revents == 0)
            {
                return Ok(exit);
            }
            if fds[0].revents != 0 {
                exit = Some(process.wait()?);
            }
        }
    }

    /// Reads our input. At its end the program's ends as well.
    fn read(&mut self) {
        let Some((_, data)) = &mut self.input else { return };
        data.resize(16 * 1024, 0);
        // SAFETY: the buffer is valid for its length.
        let n = unsafe { libc::read(0, data.as_mut_ptr().cast(), data.len()) };
        match usize::try_from(n) {
            Ok(n) if n > 0 => data.truncate(n),
            Err(_) if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => data.clear(),
            _ => self.input = None,
        }
    }

    /// Passes on what the program takes.
    fn write(&mut self) {
        let Some((fd, data)) = &mut self.input else { return };
        // SAFETY: data is valid for its length.
        let n = unsafe { libc::write(fd.as_raw_fd(), data.as_ptr().cast(), data.len()) };
        match usize::try_from(n) {
            Ok(n) => drop(data.drain(..n)),
            Err(_) if matches!(io::Error::last_os_error().raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) => {}
            Err(_) => self.input = None,
        }
    }
}

impl Output {
    /// Copies what ours takes without waiting. Returns `false` at the end of either.
    fn pass_on(&mut self, number: i32) -> bool {
        let mut ours = libc::pollfd { fd: number, events: libc::POLLOUT, revents: 0 };
        // SAFETY: ours is a valid list of one.
        self.full = unsafe { libc::poll(&raw mut ours, 1, 0) } == 0;
        if self.full {
            return true;
        }
        let mut buffer = [0_u8; ATOMIC];
        // SAFETY: the buffer is valid for its length.
        let n = unsafe { libc::read(self.from.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) };
        let Ok(n) = usize::try_from(n) else {
            return io::Error::last_os_error().kind() == io::ErrorKind::Interrupted;
        };
        let mut rest = &buffer[..n];
        while !rest.is_empty() {
            // SAFETY: rest is valid for its length.
            let n = unsafe { libc::write(number, rest.as_ptr().cast(), rest.len()) };
            match usize::try_from(n) {
                Ok(n) => rest = &rest[n..],
                Err(_) if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
        }
        n > 0
    }
}
