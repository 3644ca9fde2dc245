//! A program's standard streams.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use runx_core::error::Context;
use runx_core::sys;

use super::sandbox::Sandbox;
use crate::command::{Input, Output};
use crate::error::{Error, Result};
use crate::wire::messages::{FromInit, OpenFile, ToInit};

/// What a pipe holds at least, so that as much can be put in before anybody reads.
const PIPE: usize = 64 * 1024;

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
        Input::Bytes(data) if data.len() <= PIPE => {
            let (reader, writer) = pipe().context("make a pipe for standard input")?;
            File::from(writer).write_all(&data).context("write a program's standard input")?;
            Ok(reader)
        }
        Input::Bytes(data) => {
            // More than fits into a pipe lies in memory, so that nobody has to stand by while it is read.
            let write = || {
                let mut file = sys::memfd(c"stdin")?;
                file.write_all(&data)?;
                file.rewind()?;
                sys::seal(file)
            };
            Ok(write().context("keep a program's standard input in memory")?)
        }
    }
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
