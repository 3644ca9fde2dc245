//! Executing ourselves from a read-only clone.
//!
//! A process that we clone into a container is, until its last step, this program, and a container can
//! get at its file through /proc/PID/exe. On a read-only mount that is nowhere attached it cannot be
//! written (CVE-2019-5736).

use std::ffi::{CString, OsString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use anyhow::{Context, Result};
use runx_core::sys::{self, mount};

/// Carries our path over the exec, since /proc/self/exe then names the clone.
const PATH_VARIABLE: &str = "_RUNX_EXECUTABLE";

/// The path that this program was started from.
pub(crate) fn own_path() -> Result<PathBuf> {
    std::env::current_exe().context("find this program's own path")
}

/// Returns this program's path once it runs from a read-only mount; until then it executes itself from
/// one.
pub(crate) fn from_read_only_clone() -> Result<PathBuf> {
    let executable = sys::open("/proc/self/exe", libc::O_PATH).context("open /proc/self/exe")?;
    if on_read_only_mount(executable.as_fd())? || is_sealed() {
        return match std::env::var_os(PATH_VARIABLE) {
            Some(path) => {
                // SAFETY: this program has one thread.
                unsafe { std::env::remove_var(PATH_VARIABLE) };
                Ok(path.into())
            }
            None => own_path(),
        };
    }
    let clone = match mount::read_only_clone(executable.as_fd()) {
        // Not for an ordinary user, whose copy is in memory, sealed.
        Err(e) if e.raw_os_error() == Some(libc::EPERM) => sealed_copy()?,
        other => other.context("clone the mount of this program")?,
    };
    let path = own_path()?;
    let args = c_strings(std::env::args_os())?;
    let mut variable = OsString::from(format!("{PATH_VARIABLE}="));
    variable.push(&path);
    let inherited = std::env::vars_os().map(|(mut name, value)| {
        name.push("=");
        name.push(value);
        name
    });
    let env = c_strings(inherited.chain([variable]))?;
    let pointers = |list: &[CString]| -> Vec<*const libc::c_char> {
        list.iter().map(|word| word.as_ptr()).chain([std::ptr::null()]).collect()
    };
    let (args_list, env_list) = (pointers(&args), pointers(&env));
    // SAFETY: the strings are NUL-terminated, the lists end with NULL, and all outlive the call.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            clone.as_raw_fd(),
            c"".as_ptr(),
            args_list.as_ptr(),
            env_list.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
    Err(io::Error::last_os_error()).context("execute this program from a read-only clone")
}

fn sealed_copy() -> Result<OwnedFd> {
    let mut program = std::fs::File::open("/proc/self/exe").context("open this program")?;
    let mut copy = sys::executable_memfd(c"runx")?;
    io::copy(&mut program, &mut copy).and_then(|_| sys::seal(copy)).context("copy this program into memory")
}

/// Whether this program runs from [`sealed_copy`].
fn is_sealed() -> bool {
    if std::env::var_os(PATH_VARIABLE).is_none() {
        return false;
    }
    let Ok(program) = sys::open("/proc/self/exe", libc::O_RDONLY) else { return false };
    // SAFETY: F_GET_SEALS takes no argument; on a file that cannot be sealed it fails.
    let seals = unsafe { libc::fcntl(program.as_raw_fd(), libc::F_GET_SEALS) };
    seals != -1 && seals & libc::F_SEAL_WRITE != 0
}

fn c_strings(words: impl Iterator<Item = OsString>) -> Result<Vec<CString>> {
    words.map(|word| CString::new(word.into_vec()).context("an argument or variable holds a NUL byte")).collect()
}

fn on_read_only_mount(fd: std::os::fd::BorrowedFd<'_>) -> Result<bool> {
    // SAFETY: statvfs is plain data for which all zeroes is a valid value.
    let mut out: libc::statvfs = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is borrowed and out is writable.
    if unsafe { libc::fstatvfs(fd.as_raw_fd(), &mut out) } == -1 {
        return Err(io::Error::last_os_error()).context("look at the mount of this program");
    }
    Ok(out.f_flag & libc::ST_RDONLY != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_path_is_absolute() {
        assert!(own_path().unwrap().is_absolute());
    }
}
