//! A pseudoterminal.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::pty::{Winsize, posix_openpt};
use tokio::io::unix::AsyncFd;

use super::reaper::{Ended, Exit};

/// Its size before anybody says one, columns and rows.
pub const SIZE: (u16, u16) = (80, 24);

/// How much is read at once, in bytes.
const CHUNK: usize = 16 << 10;

/// How much is told after the end of a process, in bytes.
const LAST: usize = 1 << 20;

/// The side of a terminal that a program does not see.
#[derive(Debug)]
pub struct Master(AsyncFd<OwnedFd>);

fn winsize(columns: u16, rows: u16) -> Winsize {
    Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }
}

fn check(code: libc::c_int) -> io::Result<libc::c_int> {
    if code < 0 { Err(io::Error::last_os_error()) } else { Ok(code) }
}

/// Makes one. Returns both sides; the second is for the program. Within a runtime.
///
/// # Errors
/// When there are no more to be had.
pub fn open(columns: u16, rows: u16) -> io::Result<(Master, OwnedFd)> {
    // Closed at exec from the beginning: another thread may start something at any moment.
    let master = OwnedFd::from(posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC)?);
    let unlock: libc::c_int = 0;
    // SAFETY: the first takes a pointer to a local, the second flags; its descriptor is new and nobody else's.
    let slave = unsafe {
        check(libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw const unlock))?;
        let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
        OwnedFd::from_raw_fd(check(libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags))?)
    };
    let size = winsize(columns, rows);
    // SAFETY: the pointer is to a local of the type that the request takes.
    check(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) })?;
    let flags = OFlag::from_bits_retain(fcntl(&master, FcntlArg::F_GETFL)?);
    fcntl(&master, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    // SAFETY: it owns an open descriptor, which nobody else closes or replaces.
    Ok((Master(unsafe { AsyncFd::register(master) }?), slave))
}

impl Master {
    /// Waits until there is something to read.
    ///
    /// # Errors
    /// At the end of the runtime.
    pub async fn readable(&self) -> io::Result<()> {
        self.0.readable().await.map(|mut guard| guard.retain_ready())
    }

    /// Reads what is there.
    ///
    /// # Errors
    /// `WouldBlock` when there is nothing; EIO when nobody has the other side open.
    pub fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.0.try_io(tokio::io::Interest::READABLE, |fd| Ok(nix::unistd::read(fd, &mut *buffer)?)) {
            // By the kernel's word: what the runtime knows of it may be older.
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(nix::unistd::read(&self.0, buffer)?),
            other => other,
        }
    }

    /// Writes all of it, as what somebody types.
    ///
    /// # Errors
    /// EIO when nobody has the other side open.
    pub async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let mut guard = self.0.writable().await?;
            match guard.try_io(|fd| Ok(nix::unistd::write(fd.as_fd(), bytes)?)) {
                Ok(written) => bytes = &bytes[written?..],
                Err(_would_block) => {}
            }
        }
        Ok(())
    }

    /// Tells the program of another size.
    ///
    /// # Errors
    /// The kernel's.
    pub fn resize(&self, columns: u16, rows: u16) -> io::Result<()> {
        let size = winsize(columns, rows);
        // SAFETY: the pointer is to a local of the type that the request takes.
        match unsafe { libc::ioctl(self.0.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// Reads a terminal until its process has ended and nothing is left, and tells what it says. Returns how the process ended.
///
/// Others may have it open after that, and write for ever: of what comes then, no more is told than may have been written
/// before.
pub async fn read_to_end<F: Future<Output = ()>>(
    master: &Master,
    mut ended: Ended,
    mut tell: impl FnMut(Vec<u8>) -> F,
) -> Option<Exit> {
    let mut buffer = vec![0; CHUNK];
    let mut exit = None;
    let mut left = LAST;
    loop {
        match master.try_read(&mut buffer) {
            Ok(length) if length > 0 => {
                tell(buffer[..length].to_vec()).await;
                if exit.is_none() {
                    exit = *ended.borrow();
                } else {
                    left = left.saturating_sub(length);
                    if left == 0 {
                        break;
                    }
                }
                // It may have something to say all the time.
                tokio::task::yield_now().await;
                continue;
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            // Nobody has the other side open: all that is missing is its exit.
            _ => break,
        }
        if exit.is_some() {
            break;
        }
        tokio::select! {
            ready = master.readable() => if ready.is_err() { break },
            seen = ended.wait_for(Option::is_some) => exit = seen.ok().and_then(|seen| *seen),
        }
    }
    ended.wait_for(Option::is_some).await.ok().and_then(|seen| *seen)
}
