//! Moving bytes between descriptors, as they come.
//!
//! They move by `splice(2)` where both ends are pipes, so an idle container costs no buffer.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::oneshot;

use super::{Sink, watched};

/// Bytes moved at a time.
const CHUNK: usize = 64 << 10;

/// Copies output until its end, which `copied` is told of. Then it stays until a FIFO has been read, or it is aborted.
///
/// # Errors
/// When a descriptor cannot be watched.
pub(super) fn output(
    from: AsyncFd<OwnedFd>,
    sink: Sink,
    copied: oneshot::Sender<()>,
) -> io::Result<impl Future<Output = ()>> {
    enum To {
        Pipe(AsyncFd<File>),
        File(File),
    }
    let to = match sink {
        Sink::Pipe(file) => To::Pipe(watched(file, Interest::WRITABLE)?),
        Sink::File(file) => To::File(file),
    };
    Ok(async move {
        let done = match &to {
            To::Pipe(to) => move_bytes(&from, to).await,
            To::File(to) => to_file(&from, to).await,
        };
        if let Err(e) = done {
            log::warn!("copy output: {e}: the rest of it is lost");
            // Nobody shall wait for us, or die, since his output has nowhere to go.
            let _ = discard(&from).await;
        }
        drop(from);
        let _ = copied.send(());
        if let To::Pipe(to) = &to {
            until_read(to.get_ref()).await;
        }
    })
}

/// Waits until there is nothing in a pipe that nobody has read. While containerd restarts ours are the only ends of a FIFO,
/// and what is in it would go with them.
async fn until_read(pipe: &File) {
    let mut pause = Duration::from_millis(1);
    while unread(pipe).is_ok_and(|bytes| bytes > 0) {
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(100));
    }
}

fn unread(pipe: &File) -> io::Result<i32> {
    let mut bytes = 0;
    // SAFETY: FIONREAD writes an int, and the descriptor is open.
    match unsafe { libc::ioctl(pipe.as_raw_fd(), libc::FIONREAD, &mut bytes) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(bytes),
    }
}

/// Copies a client's input until its end.
pub(super) async fn input(reader: File, to: OwnedFd) {
    let copied = async {
        let to = watched(to, Interest::WRITABLE)?;
        let from = watched(reader, Interest::READABLE)?;
        move_bytes(&from, &to).await
    };
    if let Err(e) = copied.await {
        log::debug!("copy input: {e}");
    }
}

/// As long as a file cannot be written, the disk being full for example, what is read is lost.
async fn to_file(from: &AsyncFd<OwnedFd>, mut to: &File) -> io::Result<()> {
    let mut complained = false;
    loop {
        let mut guard = from.readable().await?;
        let mut buffer = vec![0u8; CHUNK];
        match read(from.get_ref().as_fd(), &mut buffer) {
            Ok(0) => return Ok(()),
            Ok(n) => match to.write_all(&buffer[..n]) {
                Ok(()) => complained = false,
                Err(e) => {
                    if !complained {
                        log::warn!("write output to its file: {e}: output is lost until that works again");
                    }
                    complained = true;
                }
            },
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => guard.clear_ready(),
            Err(e) => return end_of_terminal(e),
        }
    }
}

async fn discard(from: &AsyncFd<OwnedFd>) -> io::Result<()> {
    loop {
        let mut guard = from.readable().await?;
        let mut buffer = vec![0u8; CHUNK];
        match read(from.get_ref().as_fd(), &mut buffer) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => guard.clear_ready(),
            Err(e) => return end_of_terminal(e),
        }
    }
}

/// A terminal whose other side has been closed reads as an error.
fn end_of_terminal(error: io::Error) -> io::Result<()> {
    if error.raw_os_error() == Some(libc::EIO) { Ok(()) } else { Err(error) }
}

fn read(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<usize> {
    Ok(nix::unistd::read(fd, buffer)?)
}

/// Moves bytes until the end of `from`. Both are non-blocking; at least one is a pipe if `splice` is to
/// work, and where it does not a buffer takes its place.
async fn move_bytes<F: AsRawFd + AsFd, T: AsRawFd + AsFd>(from: &AsyncFd<F>, to: &AsyncFd<T>) -> io::Result<()> {
    loop {
        let mut readable = from.readable().await?;
        match splice(from.get_ref().as_fd(), to.get_ref().as_fd()) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                // Which end was not ready is asked of the source: were it the target that a reader has just
                // emptied, bytes would wait for an edge that never comes.
                if is_ready(from.get_ref().as_fd(), libc::POLLIN)? {
                    wait_writable(to).await?;
                } else {
                    readable.clear_ready();
                }
            }
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => return copy_bytes(from, to).await,
            Err(e) => return end_of_terminal(e),
        }
    }
}

async fn copy_bytes<F: AsRawFd + AsFd, T: AsRawFd + AsFd>(from: &AsyncFd<F>, to: &AsyncFd<T>) -> io::Result<()> {
    loop {
        let mut readable = from.readable().await?;
        let mut buffer = vec![0u8; 4096];
        let n = match read(from.get_ref().as_fd(), &mut buffer) {
            Ok(0) => return Ok(()),
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                readable.clear_ready();
                continue;
            }
            Err(e) => return end_of_terminal(e),
        };
        let mut rest = &buffer[..n];
        while !rest.is_empty() {
            match nix::unistd::write(to.get_ref().as_fd(), rest) {
                Ok(n) => rest = &rest[n..],
                Err(nix::errno::Errno::EAGAIN) => wait_writable(to).await?,
                Err(nix::errno::Errno::EINTR) => {}
                Err(e) => return end_of_terminal(e.into()),
            }
        }
    }
}

async fn wait_writable<T: AsRawFd + AsFd>(to: &AsyncFd<T>) -> io::Result<()> {
    loop {
        let mut guard = to.writable().await?;
        if is_ready(to.get_ref().as_fd(), libc::POLLOUT)? {
            return Ok(());
        }
        guard.clear_ready();
    }
}

fn is_ready(fd: BorrowedFd<'_>, events: libc::c_short) -> io::Result<bool> {
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events, revents: 0 };
    // SAFETY: poll is one valid pollfd.
    match unsafe { libc::poll(&mut poll, 1, 0) } {
        -1 => Err(io::Error::last_os_error()),
        // An error or the end counts: the next call reports it.
        ready => Ok(ready > 0),
    }
}

fn splice(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<usize> {
    let flags = libc::SPLICE_F_MOVE | libc::SPLICE_F_NONBLOCK;
    // SAFETY: no offsets are passed; both descriptors are borrowed for the call.
    let n = unsafe {
        libc::splice(from.as_raw_fd(), std::ptr::null_mut(), to.as_raw_fd(), std::ptr::null_mut(), CHUNK, flags)
    };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}
