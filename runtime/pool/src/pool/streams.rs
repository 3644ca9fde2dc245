//! A program's standard streams.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use runx_core::error::Context;
use runx_core::sys;

use super::sandbox::Sandbox;
use crate::command::{Input, Output};
use crate::error::{Error, Result};
use crate::wire::messages::{FromInit, OpenFile, ToInit};

/// What goes into a pipe before anybody reads. Most hold 64 KiB, but those of a user who has many hold a page or two.
const PIPE: usize = 4096;

/// A pipe that is read into memory.
#[derive(Debug)]
pub(super) struct Capture {
    pipe: Option<File>,
    limit: u64,
    data: Vec<u8>,
}

/// How a capture stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flow {
    /// More may come.
    Open,
    /// It came to its end.
    Ended,
    /// There was more than may be.
    Over,
}

impl Capture {
    /// Nothing.
    fn none() -> Self {
        Self { pipe: None, limit: 0, data: Vec::new() }
    }

    /// The descriptor to wait for, while more may come.
    pub(super) fn waiting(&self) -> Option<BorrowedFd<'_>> {
        self.pipe.as_ref().map(AsFd::as_fd)
    }

    /// Reads what is there.
    pub(super) fn read(&mut self, chunk: &mut [u8]) -> Flow {
        let Some(pipe) = &mut self.pipe else { return Flow::Ended };
        loop {
            match pipe.read(chunk) {
                Ok(0) => break,
                Ok(length) => {
                    let room = self.limit.saturating_sub(self.data.len() as u64).min(length as u64) as usize;
                    self.data.extend_from_slice(chunk.get(..room).unwrap_or_default());
                    if room < length {
                        // Whoever writes on gets SIGPIPE.
                        self.pipe = None;
                        return Flow::Over;
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Flow::Open,
                Err(_) => break,
            }
        }
        self.pipe = None;
        Flow::Ended
    }

    pub(super) fn into_data(self) -> Vec<u8> {
        self.data
    }
}

fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let (reader, writer) = io::pipe()?;
    Ok((reader.into(), writer.into()))
}

/// Opens what a program reads from.
pub(super) fn input(input: Input, sandbox: &mut Sandbox, null: &mut Null) -> Result<OwnedFd> {
    match input {
        Input::Null => null.get(),
        Input::Fd(fd) => Ok(fd),
        Input::Path(path) => open(sandbox, &path, false),
        Input::Bytes(data) => bytes(&data).context("give a program its standard input").map_err(Error::from),
    }
}

/// A descriptor to read these bytes from, and then the end.
fn bytes(data: &[u8]) -> io::Result<OwnedFd> {
    if data.len() <= PIPE {
        let (reader, writer) = pipe()?;
        sys::set_nonblocking(writer.as_fd())?;
        // One that takes less is left as it is.
        if File::from(writer).write(data).is_ok_and(|written| written == data.len()) {
            return Ok(reader);
        }
    }
    // More lies in memory, so that nobody has to stand by while it is read.
    let file = sys::sealed_memfd(c"stdin", data)?;
    // Opened anew it is at its beginning, and for reading only.
    sys::open(format!("/proc/self/fd/{}", file.as_raw_fd()), libc::O_RDONLY)
}

/// Opens what a program writes to.
pub(super) fn output(output: Output, sandbox: &mut Sandbox, null: &mut Null) -> Result<(OwnedFd, Capture)> {
    match output {
        Output::Null => Ok((null.get()?, Capture::none())),
        Output::Fd(fd) => Ok((fd, Capture::none())),
        Output::Path(path) => Ok((open(sandbox, &path, true)?, Capture::none())),
        Output::Capture(limit) => {
            let (reader, writer) = pipe().context("make a pipe for a program's output")?;
            sys::set_nonblocking(reader.as_fd()).context("set up a pipe for a program's output")?;
            Ok((writer, Capture { pipe: Some(reader.into()), limit, data: Vec::new() }))
        }
    }
}

/// /dev/null, opened for one program only: flags and locks of an open file are seen by all who share it.
#[derive(Debug, Default)]
pub(super) struct Null(Option<OwnedFd>);

impl Null {
    fn get(&mut self) -> Result<OwnedFd> {
        let fd = match &self.0 {
            Some(fd) => fd,
            None => self.0.insert(sys::open("/dev/null", libc::O_RDWR).context("open /dev/null")?),
        };
        Ok(fd.try_clone().context("duplicate a descriptor")?)
    }
}

/// Opens a file of the sandbox.
fn open(sandbox: &mut Sandbox, path: &std::path::Path, write: bool) -> Result<OwnedFd> {
    let bytes = std::os::unix::ffi::OsStrExt::as_bytes(path.as_os_str()).to_vec();
    let file = OpenFile { path: bytes, write, create: write, mode: 0o644 };
    let failed = |source| Error::File { operation: "open", path: path.to_owned(), source };
    match sandbox.ask(&ToInit::Open(vec![file]))? {
        (FromInit::Opened(errors), fds) => match (errors.first(), fds.into_iter().next()) {
            (Some(0), Some(fd)) => Ok(fd),
            (errno, _) => Err(failed(io::Error::from_raw_os_error(errno.copied().unwrap_or(0) as i32))),
        },
        _ => Err(Error::Gone("it answered something else than files".into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn input_of_any_size_is_read_to_its_end_and_cannot_be_written() {
        for size in [0, 1, PIPE, PIPE + 1, 64 * 1024, 300_000] {
            let data: Vec<u8> = (0..size).map(|at| at as u8).collect();
            let mut file = File::from(bytes(&data).unwrap());
            assert!(file.write(b"x").is_err(), "{size}");
            let mut read = Vec::new();
            file.read_to_end(&mut read).unwrap();
            assert!(read == data, "{size}");
        }
    }
}
