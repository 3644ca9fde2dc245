//! Calls to the kernel that only the pool makes.

use std::ffi::{CString, OsStr};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path};

use runx_core::sys::{self, resolve};

fn check(value: libc::c_long) -> io::Result<libc::c_long> {
    if value == -1 { Err(io::Error::last_os_error()) } else { Ok(value) }
}

fn cstring(text: impl AsRef<OsStr>) -> io::Result<CString> {
    CString::new(text.as_ref().as_bytes())
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "a string holds a NUL byte"))
}

/// Bytes as a path.
pub(crate) fn path(bytes: &[u8]) -> &Path {
    Path::new(OsStr::from_bytes(bytes))
}

/// Ends this process at once: nothing of the memory that it shares with, or has copied from, another one is cleaned up.
pub(crate) fn exit(code: i32) -> ! {
    // SAFETY: ends the process.
    unsafe { libc::_exit(code) }
}

/// `umask(2)`.
pub(crate) fn umask(mode: libc::mode_t) {
    // SAFETY: only an integer is passed, and it cannot fail.
    unsafe { libc::umask(mode) };
}

/// Gives the two signals their default action that the C library keeps for itself, and so would not touch. Whoever started
/// the pool's process may have ignored them, and programs would inherit that.
pub(crate) fn reset_reserved_signals() {
    // struct sigaction as the kernel has it: the default action, no flags, an empty mask.
    let default = [0u64; 4];
    for signal in [32, 33] {
        // SAFETY: the action is valid, the old one is not asked for, and the mask has 8 bytes.
        unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, default.as_ptr(), std::ptr::null::<u8>(), 8usize) };
    }
}

/// Becomes user and group 0 of the user namespace.
pub(crate) fn become_root() -> io::Result<()> {
    // SAFETY: only integers are passed. The process has one thread, so the bare calls do all that is to be done.
    check(unsafe { libc::syscall(libc::SYS_setresgid, 0, 0, 0) })?;
    // SAFETY: as above.
    check(unsafe { libc::syscall(libc::SYS_setresuid, 0, 0, 0) }).map(drop)
}

/// Has the kernel write no core file of this process and of all that come from it, and run no handler of crashes, which
/// `core_pattern` may name and which would run on the host: for a handler 1 means none, and 0 does not. The filter refuses
/// another limit; without the filter a program can set 0.
pub(crate) fn limit_core_files() -> io::Result<()> {
    let limit = libc::rlimit64 { rlim_cur: 1, rlim_max: 1 };
    // SAFETY: the limit is valid, and the old one is not asked for.
    check(unsafe { libc::prlimit64(0, libc::RLIMIT_CORE, &limit, std::ptr::null_mut()) }.into()).map(drop)
}

/// The hard limit of this process for what `kind`, an `RLIMIT_*`, names.
pub(crate) fn most(kind: u32) -> u64 {
    let mut limit = libc::rlimit64 { rlim_cur: 0, rlim_max: u64::MAX };
    // SAFETY: the limit is writable. Of a kind that the kernel does not know it stays as it is.
    unsafe { libc::syscall(libc::SYS_prlimit64, 0, kind, std::ptr::null::<u8>(), &raw mut limit) };
    limit.rlim_max
}

/// An `eventfd(2)` that nobody waits for in a read.
pub(crate) fn event() -> io::Result<OwnedFd> {
    // SAFETY: only integers are passed.
    let fd = check(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) }.into())?;
    // SAFETY: the descriptor is new and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Sets an event. It fails only where it is set as often as can be counted.
pub(crate) fn set_event(event: BorrowedFd<'_>) {
    let one = 1u64;
    // SAFETY: eight bytes are read from a number that lives over the call.
    unsafe { libc::write(event.as_raw_fd(), (&raw const one).cast(), size_of::<u64>()) };
}

/// Takes an event back; returns whether it was set.
pub(crate) fn take_event(event: BorrowedFd<'_>) -> bool {
    let mut count = 0u64;
    // SAFETY: eight bytes are written to a number that lives over the call.
    unsafe { libc::read(event.as_raw_fd(), (&raw mut count).cast(), size_of::<u64>()) == size_of::<u64>() as isize }
}

/// Leaves all supplementary groups.
pub(crate) fn drop_groups() -> io::Result<()> {
    // SAFETY: an empty list is passed.
    check(unsafe { libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<libc::gid_t>()) }).map(drop)
}

/// As [`new_session_keyring`], as the property of another user. The kernel allows each user 200 keys, and a sandbox's own
/// has none yet.
pub(crate) fn new_session_keyring_for(id: u32) -> io::Result<()> {
    set_real_user(id)?;
    let made = new_session_keyring();
    set_real_user(0).and(made)
}

/// Changes the real user id alone, by which the kernel counts what belongs to whom.
fn set_real_user(id: u32) -> io::Result<()> {
    // SAFETY: only integers are passed; -1 leaves the other two.
    check(unsafe { libc::syscall(libc::SYS_setresuid, id, -1, -1) }).map(drop)
}

/// Begins an empty session keyring without a name. A kernel without keys has none to share.
pub(crate) fn new_session_keyring() -> io::Result<()> {
    const KEYCTL_JOIN_SESSION_KEYRING: libc::c_ulong = 1;
    // SAFETY: without a name a new keyring is made.
    let joined = check(unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, std::ptr::null::<u8>()) });
    match joined {
        Err(e) if e.raw_os_error() == Some(libc::ENOSYS) => Ok(()),
        other => other.map(drop),
    }
}

/// `sethostname(2)`.
pub(crate) fn set_hostname(name: &[u8]) -> io::Result<()> {
    // SAFETY: the name is valid for its length.
    check(unsafe { libc::sethostname(name.as_ptr().cast(), name.len()) }.into()).map(drop)
}

/// Has the kernel reap children.
pub(crate) fn ignore_children() {
    // SAFETY: no handler is installed.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
}

/// `symlinkat(2)`.
pub(crate) fn symlink_at(target: impl AsRef<Path>, dir: BorrowedFd<'_>, name: impl AsRef<OsStr>) -> io::Result<()> {
    let (target, name) = (cstring(target.as_ref())?, cstring(name)?);
    // SAFETY: both strings are NUL-terminated and outlive the call.
    check(unsafe { libc::symlinkat(target.as_ptr(), dir.as_raw_fd(), name.as_ptr()) }.into()).map(drop)
}

/// Makes an empty file.
pub(crate) fn make_file(dir: BorrowedFd<'_>, name: impl AsRef<OsStr>) -> io::Result<()> {
    let name = cstring(name)?;
    // SAFETY: the name is NUL-terminated and outlives the call.
    check(unsafe { libc::mknodat(dir.as_raw_fd(), name.as_ptr(), libc::S_IFREG | 0o644, 0) }.into()).map(drop)
}

/// `unlinkat(2)` of a file, or of an empty directory.
pub(crate) fn unlink_at(dir: BorrowedFd<'_>, name: impl AsRef<OsStr>, directory: bool) -> io::Result<()> {
    let name = cstring(name)?;
    let flags = if directory { libc::AT_REMOVEDIR } else { 0 };
    // SAFETY: the name is NUL-terminated and outlives the call.
    check(unsafe { libc::unlinkat(dir.as_raw_fd(), name.as_ptr(), flags) }.into()).map(drop)
}

/// Gives a file to a user and the group of the same number.
pub(crate) fn give(fd: BorrowedFd<'_>, id: u32) -> io::Result<()> {
    // SAFETY: only a borrowed descriptor and integers are passed.
    check(unsafe { libc::fchown(fd.as_raw_fd(), id, id) }.into()).map(drop)
}

/// The directory that holds `path`, below `root`, and the last part of the path. Symbolic links lead no further than
/// `root`. With `make`, directories that are missing are made.
///
/// # Errors
/// `InvalidInput` for the root itself and for a path that ends in `..`; otherwise the kernel's.
pub(crate) fn parent_of<'a>(root: BorrowedFd<'_>, path: &'a Path, make: bool) -> io::Result<(OwnedFd, &'a OsStr)> {
    let name = path.file_name().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    let above = path.parent().filter(|above| !above.as_os_str().is_empty()).unwrap_or(Path::new("/"));
    let open = || sys::openat2(root, above, libc::O_RDONLY | libc::O_DIRECTORY, 0, LOOKUP);
    match open() {
        Err(e) if make && e.raw_os_error() == Some(libc::ENOENT) => make_directories(root, above, None)?,
        other => return other.map(|parent| (parent, name)),
    }
    open().map(|parent| (parent, name))
}

/// How paths of a sandbox are looked up.
pub(crate) const LOOKUP: u64 = resolve::IN_ROOT | resolve::NO_MAGICLINKS;

/// Makes a directory and those above it, for `owner` if there is one.
pub(crate) fn make_directories(root: BorrowedFd<'_>, path: &Path, owner: Option<u32>) -> io::Result<()> {
    // Before anything is made.
    if path.components().any(|part| !matches!(part, Component::RootDir | Component::CurDir | Component::Normal(_))) {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    let mut at = sys::openat2(root, "/", libc::O_RDONLY | libc::O_DIRECTORY, 0, LOOKUP)?;
    let mut walked = std::path::PathBuf::from("/");
    for part in path.components() {
        let Component::Normal(name) = part else { continue };
        let made = match sys::mkdirat(at.as_fd(), name, 0o755) {
            Err(e) if e.raw_os_error() == Some(libc::EEXIST) => false,
            Err(e) => return Err(e),
            Ok(()) => true,
        };
        walked.push(name);
        at = sys::openat2(root, &walked, libc::O_RDONLY | libc::O_DIRECTORY, 0, LOOKUP)?;
        if let (true, Some(owner)) = (made, owner) {
            give(at.as_fd(), owner)?;
        }
    }
    Ok(())
}

/// As [`give`], for a symbolic link.
pub(crate) fn give_link(dir: BorrowedFd<'_>, name: impl AsRef<OsStr>, id: u32) -> io::Result<()> {
    let name = cstring(name)?;
    // SAFETY: the name is NUL-terminated and outlives the call.
    check(unsafe { libc::fchownat(dir.as_raw_fd(), name.as_ptr(), id, id, libc::AT_SYMLINK_NOFOLLOW) }.into()).map(drop)
}

/// Whether a descriptor is of a procfs.
pub(crate) fn is_proc(fd: BorrowedFd<'_>) -> io::Result<bool> {
    // SAFETY: statfs is plain data for which all zeroes is a valid value.
    let mut out: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is borrowed and out is writable.
    check(unsafe { libc::fstatfs(fd.as_raw_fd(), &mut out) }.into())?;
    Ok(out.f_type == libc::PROC_SUPER_MAGIC)
}

/// Empties a file.
pub(crate) fn truncate(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: only a borrowed descriptor and an integer are passed.
    check(unsafe { libc::ftruncate(fd.as_raw_fd(), 0) }.into()).map(drop)
}

/// Makes reads and writes wait where they have to.
pub(crate) fn set_blocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: only reads and changes flags of a borrowed descriptor.
    let flags = check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) }.into())? as libc::c_int;
    // SAFETY: as above.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags & !libc::O_NONBLOCK) }.into()).map(drop)
}

/// What is in a directory, without `.` and `..`.
pub(crate) fn names(directory: OwnedFd) -> io::Result<Vec<std::ffi::OsString>> {
    let mut names = Vec::new();
    let mut buffer = vec![0u64; 4096];
    loop {
        // SAFETY: the buffer is writable for the size that is passed.
        let length = check(unsafe {
            libc::syscall(
                libc::SYS_getdents64,
                directory.as_raw_fd(),
                buffer.as_mut_ptr(),
                size_of_val(buffer.as_slice()),
            )
        })? as usize;
        if length == 0 {
            return Ok(names);
        }
        // SAFETY: the kernel has filled this much of the buffer, and bytes have no alignment.
        let mut entries = unsafe { std::slice::from_raw_parts(buffer.as_ptr().cast::<u8>(), length) };
        // linux_dirent64: two numbers of 8 bytes, the length of the entry, its type, its name.
        while let Some(size) = entries.get(16..18) {
            let size = usize::from(u16::from_ne_bytes([size[0], size[1]]));
            let Some((entry, rest)) = entries.split_at_checked(size).filter(|(entry, _)| entry.len() > 19) else {
                break;
            };
            let name = entry[19..].split(|byte| *byte == 0).next().unwrap_or_default();
            if name != b"." && name != b".." {
                names.push(OsStr::from_bytes(name).to_owned());
            }
            entries = rest;
        }
    }
}

/// Takes what is standard input for another use, and leaves the standard output, which is /dev/null, in its place.
pub(crate) fn take_standard_input() -> io::Result<OwnedFd> {
    // SAFETY: only integers are passed.
    let moved = check(unsafe { libc::fcntl(0, libc::F_DUPFD_CLOEXEC, 3) }.into())?;
    // SAFETY: only integers are passed; both numbers are standard streams, which nobody owns.
    check(unsafe { libc::dup2(1, 0) }.into())?;
    // SAFETY: the descriptor is new and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(moved as RawFd) })
}
