//! Terminals: handing one to whoever asked for it, or connecting it to the user's own.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result, bail};
use runx_core::sys::socket;

/// Checks the combinations of terminal, console socket and detaching, in runc's words.
pub(super) fn check(terminal: bool, socket: Option<&Path>, detach: bool) -> Result<()> {
    match (terminal, socket, detach) {
        (true, None, true) => bail!("cannot allocate tty if runx will detach without setting console socket"),
        (false, Some(_), _) | (_, Some(_), false) => {
            bail!("cannot use console socket if runx will not detach or allocate tty")
        }
        _ => Ok(()),
    }
}

/// Connects to a console socket before anything is made, so that a wrong path leaves nothing.
pub(super) fn connect(path: &Path) -> Result<UnixStream> {
    UnixStream::connect(path).with_context(|| format!("connect to console socket {}", path.display()))
}

/// Hands a terminal's master over.
pub(super) fn hand_over(socket: &UnixStream, master: &OwnedFd) -> Result<()> {
    socket::send(socket.as_fd(), b"/dev/ptmx", &[master.as_fd()]).context("send the terminal to the console socket")
}

/// The user's terminal in raw mode, until this is dropped.
pub(super) struct RawMode {
    saved: libc::termios,
}

impl RawMode {
    /// Puts standard input into raw mode, if it is a terminal.
    pub(super) fn begin() -> Option<Self> {
        // SAFETY: termios is plain data for which all zeroes is a valid value.
        let mut saved: libc::termios = unsafe { std::mem::zeroed() };
        // SAFETY: saved is writable; on anything but a terminal the call fails.
        if unsafe { libc::tcgetattr(0, &mut saved) } == -1 {
            return None;
        }
        let mut raw = saved;
        // SAFETY: raw is a valid termios.
        unsafe {
            libc::cfmakeraw(&mut raw);
            libc::tcsetattr(0, libc::TCSANOW, &raw);
        }
        Some(Self { saved })
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // SAFETY: saved was filled by tcgetattr.
        unsafe { libc::tcsetattr(0, libc::TCSANOW, &self.saved) };
    }
}

/// Gives the container's terminal the size of the user's.
pub(super) fn copy_size(master: BorrowedFd<'_>) {
    // SAFETY: winsize is plain data for which all zeroes is a valid value.
    let mut size: libc::winsize = unsafe { std::mem::zeroed() };
    // SAFETY: size is writable; on anything but a terminal the call fails and nothing is copied.
    if unsafe { libc::ioctl(0, libc::TIOCGWINSZ, &mut size) } == 0 {
        // SAFETY: size is a valid winsize.
        unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSWINSZ, &size) };
    }
}

/// Copies what is there to be read. Returns `false` at the end.
pub(super) fn copy(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> bool {
    let mut buffer = [0u8; 16 * 1024];
    let n = loop {
        // SAFETY: the buffer is valid for its length.
        let n = unsafe { libc::read(from.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) };
        if n >= 0 || io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
            break n;
        }
    };
    let Ok(n) = usize::try_from(n) else { return false };
    let mut rest = &buffer[..n];
    while !rest.is_empty() {
        // SAFETY: rest is valid for its length.
        let n = unsafe { libc::write(to.as_raw_fd(), rest.as_ptr().cast(), rest.len()) };
        match usize::try_from(n) {
            Ok(n) => rest = &rest[n..],
            Err(_) if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return false,
        }
    }
    n > 0
}
