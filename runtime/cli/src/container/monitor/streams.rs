//! A container's standard streams, as its monitor holds them.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use anyhow::{Context, Result};
use runx_core::sys;

use crate::container::options::Options;

/// As much input is kept for a container that does not read.
const INPUT_LIMIT: usize = 64 * 1024;

/// The monitor's ends.
#[derive(Debug)]
pub(super) struct Streams {
    input: Option<OwnedFd>,
    pub(super) output: Option<OwnedFd>,
    pub(super) error: Option<OwnedFd>,
    terminal: bool,
    pending: VecDeque<u8>,
    /// Standard input ends once the rest is written.
    ends: bool,
}

impl Streams {
    /// Makes the streams; and what the container gets of them, unless it has a terminal.
    pub(super) fn make(options: &Options) -> Result<(Self, Option<[OwnedFd; 3]>)> {
        let empty =
            Self { input: None, output: None, error: None, terminal: false, pending: VecDeque::new(), ends: false };
        if options.tty {
            return Ok((empty, None));
        }
        let pipe = || std::io::pipe().context("make a pipe");
        let (input, theirs_input) = if options.interactive {
            let (theirs, ours) = pipe()?;
            (Some(OwnedFd::from(ours)), OwnedFd::from(theirs))
        } else {
            let null = sys::open("/dev/null", libc::O_RDONLY).context("open /dev/null")?;
            (None, null)
        };
        let ((output, theirs_output), (error, theirs_error)) = (pipe()?, pipe()?);
        let (output, error) = (OwnedFd::from(output), OwnedFd::from(error));
        for fd in input.iter().chain([&output, &error]) {
            sys::set_nonblocking(fd.as_fd()).context("set up a pipe")?;
        }
        let ours = Self { input, output: Some(output), error: Some(error), ..empty };
        Ok((ours, Some([theirs_input, theirs_output.into(), theirs_error.into()])))
    }

    /// Takes the container's terminal.
    pub(super) fn connect_terminal(&mut self, master: OwnedFd) -> Result<()> {
        sys::set_nonblocking(master.as_fd()).context("set up the terminal")?;
        self.input = Some(master.try_clone().context("set up the terminal")?);
        self.output = Some(master);
        self.terminal = true;
        Ok(())
    }

    /// Sets the size of the terminal's window.
    pub(super) fn resize(&self, rows: u16, columns: u16) {
        let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        if let Some(master) = self.output.as_ref().filter(|_| self.terminal) {
            // SAFETY: size is a valid winsize.
            unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSWINSZ, &size) };
        }
    }

    /// Takes data for standard input. Without one it goes nowhere, as with docker.
    pub(super) fn feed(&mut self, data: &[u8]) {
        if self.input.is_some() && !self.ends {
            self.pending.extend(data);
        }
        self.write_input();
    }

    /// Whether more input has to wait.
    pub(super) fn is_full(&self) -> bool {
        self.pending.len() >= INPUT_LIMIT
    }

    /// Standard input ends after what was fed. A terminal has no end.
    pub(super) fn end_input(&mut self) {
        self.ends |= !self.terminal;
        self.write_input();
    }

    /// What is to be waited for until more input can be written.
    pub(super) fn waits_for(&self) -> Option<i32> {
        self.input.as_ref().filter(|_| !self.pending.is_empty()).map(AsRawFd::as_raw_fd)
    }

    /// Writes as much input as the container takes.
    pub(super) fn write_input(&mut self) {
        while let Some(input) = &self.input {
            let (part, _) = self.pending.as_slices();
            if part.is_empty() {
                break;
            }
            // SAFETY: the part is valid for its length.
            let n = unsafe { libc::write(input.as_raw_fd(), part.as_ptr().cast(), part.len()) };
            match usize::try_from(n) {
                Ok(n) => drop(self.pending.drain(..n)),
                Err(_) => match io::Error::last_os_error().kind() {
                    io::ErrorKind::Interrupted => {}
                    io::ErrorKind::WouldBlock => return,
                    // Nobody will ever read it.
                    _ => {
                        self.pending.clear();
                        self.input = None;
                    }
                },
            }
        }
        if self.pending.is_empty() {
            self.pending.shrink_to(0);
            if self.ends {
                self.input = None;
            }
        }
    }
}

/// Reads what is there. `None` at the end.
pub(super) fn read<'a>(fd: &OwnedFd, buffer: &'a mut [u8]) -> Option<&'a [u8]> {
    loop {
        // SAFETY: the buffer is writable for its length.
        let n = unsafe { libc::read(fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) };
        match usize::try_from(n) {
            Ok(0) => return None,
            Ok(n) => return buffer.get(..n),
            Err(_) => match io::Error::last_os_error().kind() {
                io::ErrorKind::Interrupted => {}
                io::ErrorKind::WouldBlock => return Some(&[]),
                // A terminal that nobody has open any more.
                _ => return None,
            },
        }
    }
}
