//! Moving bytes between descriptors, as they come.
//!
//! They move by `splice(2)` where both ends are pipes, so an idle container costs no buffer.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use runx_core::sys;
use tokio::io::Interest;
use tokio::io::unix::{AsyncFd, AsyncFdReadyGuard};
use tokio::sync::{oneshot, watch};
use tokio::time::Instant;

use super::{Sink, watched};

/// Bytes moved at a time.
const CHUNK: usize = 64 << 10;

/// How long the last output of a terminal may take from the process's end on.
const LAST_WORDS: Duration = Duration::from_millis(50);

/// More bytes than a terminal holds of its process's last output, however slowly they are read.
const LAST_BYTES: usize = 256 << 10;

/// The end of a terminal's process, after which others may hold the terminal open, and write to it, for ever.
#[derive(Clone, Debug)]
pub(super) struct Ended {
    at: watch::Receiver<Option<Instant>>,
    /// Bytes that may still come from then on.
    left: usize,
}

impl Ended {
    pub(super) fn new(at: watch::Receiver<Option<Instant>>) -> Self {
        Self { at, left: LAST_BYTES }
    }

    /// Counts what was read; false once what comes cannot be the process's any more.
    fn count(&mut self, bytes: usize) -> bool {
        if self.at.borrow().is_some() {
            self.left = self.left.saturating_sub(bytes);
        }
        self.left > 0
    }
}

fn goes_on(ended: &mut Option<Ended>, bytes: usize) -> bool {
    ended.as_mut().is_none_or(|ended| ended.count(bytes))
}

/// Copies output until its end, which `copied` is told of. Then it stays until a FIFO has been read, or it is aborted.
///
/// # Errors
/// When a descriptor cannot be watched.
pub(super) fn output(
    from: AsyncFd<OwnedFd>,
    sink: Sink,
    copied: oneshot::Sender<()>,
    ended: Option<Ended>,
) -> io::Result<impl Future<Output = ()>> {
    enum To {
        Pipe(AsyncFd<File>),
        File(Arc<File>),
    }
    let to = match sink {
        Sink::Pipe(file) => To::Pipe(watched(file, Interest::WRITABLE)?),
        Sink::File(file) => To::File(Arc::new(file)),
    };
    Ok(async move {
        let done = match &to {
            To::Pipe(to) => move_bytes(&from, to, ended.clone()).await,
            To::File(to) => to_file(&from, to, ended.clone()).await,
        };
        if let Err(e) = done {
            log::warn!("copy output: {e}: the rest of it is lost");
            // Nobody shall wait for us, or die, since his output has nowhere to go.
            let _ = each_piece(&from, ended, |_| std::future::ready(())).await;
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
        move_bytes(&from, &to, None).await
    };
    if let Err(e) = copied.await {
        log::debug!("copy input: {e}");
    }
}

/// As long as a file cannot be written, the disk being full for example, what is read is lost. Writing may take a while,
/// and is done in another thread.
async fn to_file(from: &AsyncFd<OwnedFd>, to: &Arc<File>, ended: Option<Ended>) -> io::Result<()> {
    let complained = Arc::new(AtomicBool::new(false));
    each_piece(from, ended, |piece| {
        let (to, complained) = (to.clone(), complained.clone());
        let written = tokio::task::spawn_blocking(move || {
            let written = (&*to).write_all(&piece);
            if let Err(e) = &written
                && !complained.load(Ordering::Relaxed)
            {
                log::warn!("write output to its file: {e}: output is lost until that works again");
            }
            complained.store(written.is_err(), Ordering::Relaxed);
        });
        async move { drop(written.await) }
    })
    .await
}

/// Reads to the end, and does something with each piece.
async fn each_piece<Done: Future<Output = ()>>(
    from: &AsyncFd<OwnedFd>,
    mut ended: Option<Ended>,
    mut work: impl FnMut(Vec<u8>) -> Done,
) -> io::Result<()> {
    while let Some(mut guard) = readable(from, &mut ended).await? {
        let mut buffer = vec![0u8; CHUNK];
        match read(from.get_ref().as_fd(), &mut buffer) {
            Ok(0) => return Ok(()),
            Ok(n) => {
                buffer.truncate(n);
                work(buffer).await;
                if !goes_on(&mut ended, n) {
                    return Ok(());
                }
                // Others have their turn, however much there is.
                tokio::task::yield_now().await;
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => guard.clear_ready(),
            Err(e) => return end_of_terminal(e),
        }
    }
    Ok(())
}

/// Waits until there is something to read; `None` if a terminal's process has ended and nothing more comes.
async fn readable<'a, F: AsRawFd>(
    from: &'a AsyncFd<F>,
    ended: &mut Option<Ended>,
) -> io::Result<Option<AsyncFdReadyGuard<'a, F>>> {
    let Some(ended) = ended else { return from.readable().await.map(Some) };
    let silence = async {
        // Its sender lives as long as the streams do.
        if let Ok(at) = ended.at.wait_for(Option::is_some).await.map(|at| *at) {
            tokio::time::sleep_until(at.unwrap_or_else(Instant::now) + LAST_WORDS).await;
        }
    };
    tokio::select! {
        biased;
        ready = from.readable() => ready.map(Some),
        () = silence => Ok(None),
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
async fn move_bytes<F: AsRawFd + AsFd, T: AsRawFd + AsFd>(
    from: &AsyncFd<F>,
    to: &AsyncFd<T>,
    mut ended: Option<Ended>,
) -> io::Result<()> {
    while let Some(mut guard) = readable(from, &mut ended).await? {
        match splice(from.get_ref().as_fd(), to.get_ref().as_fd()) {
            Ok(0) => return Ok(()),
            Ok(n) if !goes_on(&mut ended, n) => return Ok(()),
            // Others have their turn, however much there is.
            Ok(_) => tokio::task::yield_now().await,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                // Which end was not ready is asked of the source: were it the target that a reader has just
                // emptied, bytes would wait for an edge that never comes.
                if is_ready(from.get_ref().as_fd(), libc::POLLIN)? {
                    wait_writable(to).await?;
                } else {
                    guard.clear_ready();
                }
            }
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => return copy_bytes(from, to, ended).await,
            Err(e) => return end_of_terminal(e),
        }
    }
    Ok(())
}

async fn copy_bytes<F: AsRawFd + AsFd, T: AsRawFd + AsFd>(
    from: &AsyncFd<F>,
    to: &AsyncFd<T>,
    mut ended: Option<Ended>,
) -> io::Result<()> {
    while let Some(mut guard) = readable(from, &mut ended).await? {
        let mut buffer = vec![0u8; 4096];
        let n = match read(from.get_ref().as_fd(), &mut buffer) {
            Ok(0) => return Ok(()),
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                guard.clear_ready();
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
        if !goes_on(&mut ended, n) {
            return Ok(());
        }
        tokio::task::yield_now().await;
    }
    Ok(())
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
    sys::poll(fd, events, 0)
}

fn splice(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<usize> {
    let flags = libc::SPLICE_F_MOVE | libc::SPLICE_F_NONBLOCK;
    // SAFETY: no offsets are passed; both descriptors are borrowed for the call.
    let n = unsafe {
        libc::splice(from.as_raw_fd(), std::ptr::null_mut(), to.as_raw_fd(), std::ptr::null_mut(), CHUNK, flags)
    };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}
