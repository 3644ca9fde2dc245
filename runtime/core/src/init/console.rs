//! Terminals and standard streams.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use super::{Fds, Parent, paths, place, rootfs};
use crate::error::{Context, Error, Result};
use crate::plan::{Fd, ProcessPlan};
use crate::spawn::handshake::FromChild;
use crate::sys::{self, mount, resolve};

const DEVPTS_SUPER_MAGIC: i64 = 0x1cd1;

/// Opens a terminal in the container's devpts, makes it standard input, output and error and the
/// controlling terminal, and hands its master to the parent. For a container's first process (`root`
/// given) it is mounted on /dev/console as well.
pub(super) fn open(root: Option<&OwnedFd>, process: &ProcessPlan, parent: &Parent) -> Result<()> {
    let own_root;
    let root = match root {
        Some(root) => root,
        None => {
            own_root = sys::open("/", libc::O_PATH | libc::O_DIRECTORY).context("open /")?;
            &own_root
        }
    };
    let master = open_master(root.as_fd())?;
    let slave = open_slave(master.as_fd())?;
    if let Some((rows, columns)) = process.terminal
        && (rows, columns) != (0, 0)
    {
        let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: size is a valid winsize.
        sys::check(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSWINSZ, &size) }.into())
            .context("set the size of the terminal")?;
    }
    if process.make_cwd {
        mount_console(root.as_fd(), slave.as_fd())?;
    }
    for number in 0..3 {
        place(slave.as_fd(), number).context("make the terminal standard input, output and error")?;
    }
    // SAFETY: TIOCSCTTY takes an integer.
    sys::check(unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0 as libc::c_ulong) }.into())
        .context("make the terminal the controlling one")?;
    parent.tell(&FromChild::Terminal, &[master.as_fd()])
}

fn open_master(root: BorrowedFd<'_>) -> Result<OwnedFd> {
    let path = Path::new("dev/pts/ptmx");
    let rules = resolve::IN_ROOT | resolve::NO_MAGICLINKS;
    let master = sys::openat2(root, path, libc::O_RDWR | libc::O_NOCTTY, 0, rules)
        .context("open a terminal at /dev/pts/ptmx in the container")?;
    // SAFETY: statfs is plain data for which all zeroes is a valid value.
    let mut filesystem: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is ours and the buffer writable.
    sys::check(unsafe { libc::fstatfs(master.as_raw_fd(), &mut filesystem) }.into()).context("look at /dev/pts")?;
    let stat = sys::fstat(master.as_fd()).context("look at /dev/pts/ptmx")?;
    #[allow(clippy::unnecessary_cast, reason = "the type differs between architectures")]
    let magic = filesystem.f_type as i64;
    if magic != DEVPTS_SUPER_MAGIC || stat.st_rdev != libc::makedev(5, 2) {
        return Err(Error::Init {
            message: "open a terminal: /dev/pts/ptmx in the container is not a devpts".into(),
            errno: libc::ENOTTY,
        });
    }
    let unlock: libc::c_int = 0;
    // SAFETY: TIOCSPTLCK reads one int.
    sys::check(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &unlock) }.into())
        .context("unlock the terminal")?;
    Ok(master)
}

/// By the master and not by name: a name could be swapped for something else (CVE-2025-52565).
fn open_slave(master: BorrowedFd<'_>) -> Result<OwnedFd> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: TIOCGPTPEER takes open flags and returns a descriptor.
    sys::owned(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags) }.into())
        .context("open the other side of the terminal")
}

fn mount_console(root: BorrowedFd<'_>, slave: BorrowedFd<'_>) -> Result<()> {
    let what = "mount the terminal on /dev/console";
    let dev = paths::make_directory(root, "/dev").context(what)?;
    let rules = resolve::BENEATH | resolve::NO_SYMLINKS;
    let create = libc::O_CREAT | libc::O_EXCL | libc::O_NOFOLLOW | libc::O_WRONLY;
    match sys::openat2(dev.as_fd(), "console", create, 0o600, rules) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e).context(what),
        _ => {}
    }
    let target = sys::openat2(dev.as_fd(), "console", libc::O_PATH | libc::O_NOFOLLOW, 0, rules).context(what)?;
    let tree = mount::clone_tree(slave, "", false).context(what)?;
    mount::attach(tree.as_fd(), target.as_fd()).context(what)
}

/// Makes the plan's descriptors standard input, output and error.
pub(super) fn use_stdio(fds: &Fds, stdio: [Fd; 3]) -> Result<()> {
    for (number, fd) in stdio.into_iter().enumerate() {
        place(fds.get(fd)?, number as i32).context("set standard input, output and error")?;
    }
    Ok(())
}

/// Gives the streams to the process's user, so that it can open them again by /dev/stdout. The null device belongs to
/// everybody, but let it be the container's own: a path of the host is nothing that a profile or a checkpoint knows.
pub(super) fn own_stdio(uid: u32) {
    for number in 0..3 {
        // SAFETY: it is not used any more once another takes its place. That it is open is what our caller made sure of.
        let fd = unsafe { BorrowedFd::borrow_raw(number) };
        let Ok(stat) = sys::fstat(fd) else { continue };
        if rootfs::is_null(fd).unwrap_or(false) {
            use_own_null(number);
            continue;
        }
        if stat.st_uid == uid {
            continue;
        }
        // A stream that cannot change owner (a read-only file, another's socket) still works.
        let _ = nix::unistd::fchown(fd, Some(uid.into()), None);
    }
}

/// Replaces a stream by the container's own null device, if it has one.
fn use_own_null(stream: i32) {
    let flags = libc::O_RDWR | libc::O_NOFOLLOW | libc::O_NOCTTY | libc::O_NONBLOCK;
    let Ok(own) = sys::open("/dev/null", flags) else { return };
    if !rootfs::is_null(own.as_fd()).unwrap_or(false) {
        return;
    }
    // SAFETY: F_SETFL with no flags makes the new description block, as programs expect of it.
    unsafe { libc::fcntl(own.as_raw_fd(), libc::F_SETFL, 0) };
    let _ = super::place(own.as_fd(), stream);
}
