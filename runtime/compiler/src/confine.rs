//! Giving up everything but the three standard streams: a module is somebody else's program, and so might be what it
//! makes of a mistake in the compiler.

use std::os::fd::{AsFd, AsRawFd};

use anyhow::{Context, Result};
use runx_core::rootless;
use runx_core::sys::capabilities;
use runx_core::sys::mount::{self, NewFilesystem};
use runx_core::sys::process::{self, prctl};

/// What a confined compiler may use: seconds of processor time, bytes of address space and of output.
const CPU_SECONDS: u64 = 300;
const ADDRESS_SPACE: u64 = 8 << 30;
const OUTPUT: u64 = 4 << 30;

/// The user and group of a confined compiler: nobody's.
const NOBODY: u32 = 65_534;

/// Leaves nothing in reach but the three standard streams: an empty root, no network, no privileges, and
/// limits on time and memory.
pub(crate) fn confine() -> Result<()> {
    let unprivileged = rootless::is_unprivileged();
    const NAMESPACES: libc::c_int = libc::CLONE_NEWNS | libc::CLONE_NEWNET | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
    match process::unshare(NAMESPACES) {
        // An ordinary user may in a user namespace, where he then is nobody already.
        Err(e) if unprivileged && e.raw_os_error() == Some(libc::EPERM) => {
            process::unshare(NAMESPACES | libc::CLONE_NEWUSER).context("unshare namespaces")?;
        }
        other => other.context("unshare namespaces")?,
    }
    let empty = NewFilesystem::open("tmpfs")
        .and_then(|tmpfs| {
            tmpfs.string("size", "4k")?;
            tmpfs.mount(mount::attr::RDONLY | mount::attr::NOSUID | mount::attr::NODEV | mount::attr::NOEXEC)
        })
        .context("make an empty root")?;
    nix::unistd::fchdir(empty.as_fd()).context("enter the empty root")?;
    nix::unistd::chroot(".").context("chroot into the empty root")?;
    drop(empty);
    for (resource, limit) in [
        (libc::RLIMIT_CPU, CPU_SECONDS),
        (libc::RLIMIT_AS, ADDRESS_SPACE),
        (libc::RLIMIT_FSIZE, OUTPUT),
        (libc::RLIMIT_CORE, 0),
    ] {
        let limit = libc::rlimit { rlim_cur: limit, rlim_max: limit };
        // SAFETY: limit is a valid rlimit.
        if unsafe { libc::setrlimit(resource, &limit) } == -1 {
            return Err(std::io::Error::last_os_error()).context("limit resources");
        }
    }
    become_nobody(unprivileged)?;
    capabilities::set(0, 0, 0).context("give up all capabilities")?;
    process::set_undumpable().context("hide the compiler's memory")?;
    prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0).context("set no_new_privs")?;
    runx_core::sys::cloexec_from(std::io::stderr().as_raw_fd() + 1).context("close descriptors")
}

/// Gives up the user and his groups. In the user namespace of an ordinary user there may be nobody else to become.
fn become_nobody(unprivileged: bool) -> Result<()> {
    let there_is_nobody = |e: nix::errno::Errno| match e {
        nix::errno::Errno::EPERM | nix::errno::Errno::EINVAL if unprivileged => Ok(()),
        e => Err(e),
    };
    nix::unistd::setgroups(&[]).or_else(there_is_nobody).context("give up supplementary groups")?;
    let group = NOBODY.into();
    nix::unistd::setresgid(group, group, group).or_else(there_is_nobody).context("give up the group")?;
    let user = NOBODY.into();
    nix::unistd::setresuid(user, user, user).or_else(there_is_nobody).context("give up the user")
}
