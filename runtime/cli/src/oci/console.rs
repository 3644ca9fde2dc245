//! Terminals: handing one to whoever asked for it, or connecting it to the user's own.

use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result, bail};
use nix::sys::termios::{OutputFlags, SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
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

/// The user's terminal: that of the standard streams that is one, or the controlling one.
struct UsersTerminal {
    terminal: ManuallyDrop<File>,
    saved: Termios,
}

impl UsersTerminal {
    /// Puts it into raw mode until this is dropped, if there is one. Line ends are made for a screen here if
    /// `line_ends`, as the container's terminal leaves them alone then.
    fn raw(line_ends: bool) -> Option<Self> {
        // SAFETY: the standard streams stay open for as long as this program runs; they are not closed here.
        let standard = [2, 1, 0].map(|number| ManuallyDrop::new(unsafe { File::from_raw_fd(number) }));
        let controlling = File::open("/dev/tty").ok().map(ManuallyDrop::new);
        let mut all = standard.into_iter().chain(controlling);
        let (terminal, saved) = all.find_map(|file| tcgetattr(&*file).ok().map(|saved| (file, saved)))?;
        let mut raw = saved.clone();
        cfmakeraw(&mut raw);
        if line_ends {
            raw.output_flags |= OutputFlags::OPOST;
        }
        tcsetattr(&*terminal, SetArg::TCSANOW, &raw).ok()?;
        Some(Self { terminal, saved })
    }

    /// Gives the container's terminal the size of this one.
    fn copy_size(&self, master: BorrowedFd<'_>) {
        // SAFETY: winsize is plain data for which all zeroes is a valid value.
        let mut size: libc::winsize = unsafe { std::mem::zeroed() };
        // SAFETY: size is writable; if the terminal has hung up the call fails and nothing is copied.
        if unsafe { libc::ioctl(self.terminal.as_raw_fd(), libc::TIOCGWINSZ, &mut size) } == 0 {
            // SAFETY: size is a valid winsize.
            unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSWINSZ, &size) };
        }
    }
}

impl Drop for UsersTerminal {
    fn drop(&mut self) {
        let _ = tcsetattr(&*self.terminal, SetArg::TCSANOW, &self.saved);
    }
}

/// A container's terminal, connected to the user's.
pub(crate) struct Terminal {
    master: OwnedFd,
    users: Option<UsersTerminal>,
}

impl Terminal {
    /// Connects it, before the program could look at its size or write to it.
    pub(super) fn connect(master: OwnedFd) -> Result<Self> {
        // Lines end as the program has it: the user's terminal does the rest, and a file shall hold no more.
        tcgetattr(&master)
            .and_then(|mut attributes| {
                attributes.output_flags &= !OutputFlags::ONLCR;
                tcsetattr(&master, SetArg::TCSANOW, &attributes)
            })
            .context("set up the container's terminal")?;
        let this = Self { master, users: UsersTerminal::raw(true) };
        this.resize();
        Ok(this)
    }

    /// As [`Self::connect`], with a terminal in the container that makes line ends itself.
    pub(crate) fn connect_raw(master: OwnedFd) -> Self {
        let this = Self { master, users: UsersTerminal::raw(false) };
        this.resize();
        this
    }

    /// Connects its output only. Standard input becomes empty.
    pub(crate) fn watch(master: OwnedFd) -> Result<Self> {
        let null = File::open("/dev/null").context("open /dev/null")?;
        // SAFETY: winsize is plain data for which all zeroes is a valid value.
        let mut size: libc::winsize = unsafe { std::mem::zeroed() };
        // SAFETY: size is writable; on what is no terminal the first call fails, and the second is not made.
        unsafe {
            if libc::ioctl(1, libc::TIOCGWINSZ, &mut size) == 0 {
                libc::ioctl(master.as_raw_fd(), libc::TIOCSWINSZ, &size);
            }
            libc::dup2(null.as_raw_fd(), 0);
        }
        Ok(Self { master, users: None })
    }

    /// Follows the size of the user's terminal.
    pub(super) fn resize(&self) {
        if let Some(users) = &self.users {
            users.copy_size(self.master.as_fd());
        }
    }

    /// What the container writes, and where it reads from.
    pub(super) fn master(&self) -> BorrowedFd<'_> {
        self.master.as_fd()
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
