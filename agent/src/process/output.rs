//! What a process writes until it ends.
//!
//! It has ended when its first process has; what others that it left behind hold open is not waited for. What is in the
//! pipes by then belongs to it, and what comes later is read and thrown away, so that nobody is killed for writing.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use tokio::io::Interest;
use tokio::net::unix::pipe::Receiver;

use super::reaper::{Ended, Exit};

/// How much is read at once, in bytes: what a pipe holds.
const CHUNK: usize = 64 << 10;

/// A part of the output.
#[derive(Debug)]
pub enum Piece<'a> {
    /// From standard output, or from both where they are one.
    Stdout(&'a [u8]),
    /// From standard error.
    Stderr(&'a [u8]),
    /// There is no more.
    Exited(Exit),
}

/// The reading ends of a process's pipes, and its end.
#[derive(Debug)]
pub struct Output {
    stdout: Option<Receiver>,
    stderr: Option<Receiver>,
    ended: Ended,
    buffer: Vec<u8>,
    exit: Option<Exit>,
    /// How much of what is in the pipes was written before the end.
    left: [usize; 2],
}

enum Ready {
    Stdout,
    Stderr,
    Ended,
}

/// The reading ends, before there is a process: what can fail of them fails before anything runs.
#[derive(Debug)]
pub struct Pipes {
    stdout: Receiver,
    stderr: Option<Receiver>,
}

impl Pipes {
    /// Begins to watch them. Within a runtime.
    ///
    /// # Errors
    /// When a pipe cannot be watched.
    pub fn new(stdout: OwnedFd, stderr: Option<OwnedFd>) -> io::Result<Self> {
        let stderr = stderr.map(Receiver::from_owned_fd).transpose()?;
        Ok(Self { stdout: Receiver::from_owned_fd(stdout)?, stderr })
    }

    /// They are those of a process.
    pub fn of(self, ended: Ended) -> Output {
        Output {
            stdout: Some(self.stdout),
            stderr: self.stderr,
            ended,
            buffer: vec![0; CHUNK],
            exit: None,
            left: [0; 2],
        }
    }
}

impl Output {
    /// Standard output for what others still write after the end, for whoever wants that.
    pub fn rest(&mut self) -> Option<Receiver> {
        self.stdout.take()
    }

    /// Waits for the next part. After [`Piece::Exited`] there is none.
    pub async fn next(&mut self) -> Piece<'_> {
        loop {
            if let Some(exit) = self.exit {
                // What was in the pipes when it ended still counts; others may go on writing to them for ever.
                let [out, err] = &mut self.left;
                if let Some(length) = take(&mut self.stdout, &mut self.buffer, Some(out)) {
                    return Piece::Stdout(&self.buffer[..length]);
                }
                if let Some(length) = take(&mut self.stderr, &mut self.buffer, Some(err)) {
                    return Piece::Stderr(&self.buffer[..length]);
                }
                return Piece::Exited(exit);
            }
            let ready = tokio::select! {
                biased;
                _ = self.ended.wait_for(Option::is_some) => Ready::Ended,
                () = readable(&self.stdout), if self.stdout.is_some() => Ready::Stdout,
                () = readable(&self.stderr), if self.stderr.is_some() => Ready::Stderr,
            };
            match ready {
                Ready::Stdout => {
                    if let Some(length) = take(&mut self.stdout, &mut self.buffer, None) {
                        return Piece::Stdout(&self.buffer[..length]);
                    }
                }
                Ready::Stderr => {
                    if let Some(length) = take(&mut self.stderr, &mut self.buffer, None) {
                        return Piece::Stderr(&self.buffer[..length]);
                    }
                }
                Ready::Ended => {
                    self.exit = *self.ended.borrow();
                    self.left = [held(&self.stdout), held(&self.stderr)];
                }
            }
        }
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        discard(self.stdout.take());
        discard(self.stderr.take());
    }
}

async fn readable(pipe: &Option<Receiver>) {
    match pipe {
        Some(pipe) => {
            // An error is found by the reading.
            let _ = pipe.ready(Interest::READABLE).await;
        }
        None => std::future::pending().await,
    }
}

/// How much a pipe holds.
fn held(pipe: &Option<Receiver>) -> usize {
    let mut count: libc::c_int = 0;
    let Some(pipe) = pipe else { return 0 };
    // SAFETY: the pointer is to a local of the type that the request fills in.
    match unsafe { libc::ioctl(pipe.as_raw_fd(), libc::FIONREAD, &raw mut count) } {
        0 => usize::try_from(count).unwrap_or(0),
        _ => 0,
    }
}

/// Reads without waiting, after the end of the process as much as is `left`. A pipe that has ended is let go.
fn take(pipe: &mut Option<Receiver>, buffer: &mut [u8], left: Option<&mut usize>) -> Option<usize> {
    let receiver = pipe.as_ref()?;
    let read = match left {
        Some(0) => return None,
        // By the kernel's word: what the runtime knows of the pipe may be older than the process's end.
        Some(left) => {
            let most = buffer.len().min(*left);
            nix::unistd::read(receiver, &mut buffer[..most]).inspect(|length| *left -= length).map_err(io::Error::from)
        }
        None => receiver.try_read(buffer),
    };
    match read {
        Ok(0) => {
            *pipe = None;
            None
        }
        Ok(length) => Some(length),
        Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => None,
        Err(e) => {
            log::warn!("read a process's output: {e}");
            *pipe = None;
            None
        }
    }
}

/// Reads what others still write to a pipe, until nobody has it open.
fn discard(pipe: Option<Receiver>) {
    let Some(pipe) = pipe else { return };
    // At the end of the daemon there is no runtime any more.
    let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
    runtime.spawn(async move {
        let mut buffer = vec![0; 4096];
        while pipe.readable().await.is_ok() {
            match pipe.try_read(&mut buffer) {
                Ok(0) => break,
                Err(e) if e.kind() != io::ErrorKind::WouldBlock => break,
                _ => {}
            }
        }
    });
}
