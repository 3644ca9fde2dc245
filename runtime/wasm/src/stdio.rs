//! The standard streams of the module: the process's own, unbuffered.
//!
//! The library's streams read stdin in a thread and buffer stdout by lines. A thread costs memory
//! and a place under the container's pids limit, and a broken pipe would reach the module as EIO.
//! These block in the calling thread, which is the module's and the only one.

use async_trait::async_trait;
use bytes::Bytes;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::OnceLock;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest};
use wasmtime_wasi::cli::{IsTerminal, StdinStream, StdoutStream};
use wasmtime_wasi::p2::{InputStream, OutputStream, Pollable, StreamError, StreamResult};

/// The largest single read: what a pipe holds.
const READ_SIZE: usize = 64 << 10;

/// What a stream says it takes at once; it always takes everything.
const WRITE_SIZE: usize = 1 << 20;

/// Descriptor 0.
#[derive(Debug)]
pub struct Stdin;

/// Descriptor 1.
#[derive(Debug)]
pub struct Stdout;

/// Descriptor 2.
#[derive(Debug)]
pub struct Stderr;

fn stdin() -> BorrowedFd<'static> {
    static STDIN: OnceLock<io::Stdin> = OnceLock::new();
    STDIN.get_or_init(io::stdin).as_fd()
}

fn stdout() -> BorrowedFd<'static> {
    static STDOUT: OnceLock<io::Stdout> = OnceLock::new();
    STDOUT.get_or_init(io::stdout).as_fd()
}

fn stderr() -> BorrowedFd<'static> {
    static STDERR: OnceLock<io::Stderr> = OnceLock::new();
    STDERR.get_or_init(io::stderr).as_fd()
}

impl IsTerminal for Stdin {
    fn is_terminal(&self) -> bool {
        io::IsTerminal::is_terminal(&stdin())
    }
}

impl StdinStream for Stdin {
    fn async_stream(&self) -> Box<dyn AsyncRead + Send + Sync> {
        // Preview 1 does not come here.
        StdinStream::async_stream(&wasmtime_wasi::cli::stdin())
    }
    fn p2_stream(&self) -> Box<dyn InputStream> {
        Box::new(Input(stdin()))
    }
}

impl IsTerminal for Stdout {
    fn is_terminal(&self) -> bool {
        io::IsTerminal::is_terminal(&stdout())
    }
}

impl StdoutStream for Stdout {
    fn async_stream(&self) -> Box<dyn AsyncWrite + Send + Sync> {
        StdoutStream::async_stream(&wasmtime_wasi::cli::stdout())
    }
    fn p2_stream(&self) -> Box<dyn OutputStream> {
        Box::new(Output(stdout()))
    }
}

impl IsTerminal for Stderr {
    fn is_terminal(&self) -> bool {
        io::IsTerminal::is_terminal(&stderr())
    }
}

impl StdoutStream for Stderr {
    fn async_stream(&self) -> Box<dyn AsyncWrite + Send + Sync> {
        StdoutStream::async_stream(&wasmtime_wasi::cli::stderr())
    }
    fn p2_stream(&self) -> Box<dyn OutputStream> {
        Box::new(Output(stderr()))
    }
}

struct Input(BorrowedFd<'static>);

struct Output(BorrowedFd<'static>);

fn failed(error: io::Error) -> StreamError {
    StreamError::LastOperationFailed(error.into())
}

/// Whether `fd` has one of `events` (or an error or a hang-up) within `timeout` milliseconds; a
/// negative timeout waits for ever.
fn poll(fd: BorrowedFd<'_>, events: libc::c_short, timeout: libc::c_int) -> bool {
    let mut entry = libc::pollfd { fd: fd.as_raw_fd(), events, revents: 0 };
    // SAFETY: one valid entry. On failure the caller's read or write finds out.
    unsafe { libc::poll(&mut entry, 1, timeout) != 0 }
}

/// Waits without blocking the event loop, so that a timeout of the same poll can end it.
async fn ready(fd: BorrowedFd<'static>, interest: Interest) {
    // A copy, since one descriptor cannot be registered twice and the module may ask twice.
    let Ok(copy) = fd.try_clone_to_owned() else {
        return;
    };
    // Regular files cannot be registered: they are always ready.
    // SAFETY: the copy is open, and the registration owns it until it is dropped below.
    let registered = unsafe { AsyncFd::register_with_interest(copy, interest) };
    let Ok(registered) = registered else {
        return;
    };
    let _ = registered.ready(interest).await;
}

/// Reads at most `size` bytes; nothing means the end.
fn read(fd: BorrowedFd<'_>, size: usize) -> io::Result<Bytes> {
    let mut buffer = vec![0; size.min(READ_SIZE)];
    loop {
        // SAFETY: the buffer is valid for its length.
        let n = unsafe { libc::read(fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) };
        if let Ok(n) = usize::try_from(n) {
            buffer.truncate(n);
            return Ok(buffer.into());
        }
        retry(fd, libc::POLLIN)?;
    }
}

fn write_all(fd: BorrowedFd<'_>, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        // SAFETY: the slice is valid for its length.
        let n = unsafe { libc::write(fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len()) };
        match usize::try_from(n) {
            Ok(n) => bytes = &bytes[n..],
            Err(_) => retry(fd, libc::POLLOUT)?,
        }
    }
    Ok(())
}

/// After a failed system call: returns when it is worth another try, or the error. The streams may
/// be shared with processes that made them non-blocking.
fn retry(fd: BorrowedFd<'_>, events: libc::c_short) -> io::Result<()> {
    let error = io::Error::last_os_error();
    match error.kind() {
        io::ErrorKind::Interrupted => Ok(()),
        io::ErrorKind::WouldBlock => {
            poll(fd, events, -1);
            Ok(())
        }
        _ => Err(error),
    }
}

#[async_trait]
impl Pollable for Input {
    async fn ready(&mut self) {
        ready(self.0, Interest::READABLE).await;
    }
}

#[async_trait]
impl InputStream for Input {
    fn read(&mut self, size: usize) -> StreamResult<Bytes> {
        if size == 0 || !poll(self.0, libc::POLLIN, 0) {
            return Ok(Bytes::new());
        }
        let bytes = read(self.0, size).map_err(failed)?;
        if bytes.is_empty() { Err(StreamError::Closed) } else { Ok(bytes) }
    }

    async fn blocking_read(&mut self, size: usize) -> StreamResult<Bytes> {
        // For a size of 0 too: the caller would take no bytes for an interrupted call, and
        // "closed" for the 0 bytes that were asked for.
        let bytes = read(self.0, size).map_err(failed)?;
        if bytes.is_empty() { Err(StreamError::Closed) } else { Ok(bytes) }
    }
}

#[async_trait]
impl Pollable for Output {
    async fn ready(&mut self) {
        ready(self.0, Interest::WRITABLE).await;
    }
}

#[async_trait]
impl OutputStream for Output {
    fn write(&mut self, bytes: Bytes) -> StreamResult<()> {
        write_all(self.0, &bytes).map_err(failed)
    }

    fn flush(&mut self) -> StreamResult<()> {
        Ok(())
    }

    fn check_write(&mut self) -> StreamResult<usize> {
        Ok(WRITE_SIZE)
    }

    async fn blocking_write_and_flush(&mut self, bytes: Bytes) -> StreamResult<()> {
        self.write(bytes)
    }
}
