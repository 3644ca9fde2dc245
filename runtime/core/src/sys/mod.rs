//! Thin, safe wrappers over the system calls that the standard library and `nix` lack.
//!
//! Each does one call and nothing else; errors are plain [`std::io::Error`]s, to which the caller adds
//! what was attempted.

pub mod capabilities;
pub mod mount;
pub mod netlink;
pub mod pidfd;
pub mod process;
pub mod socket;

use std::ffi::{CStr, CString, OsStr};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// Turns the -1 of a system call into the error that it stands for.
pub(crate) fn check(value: libc::c_long) -> io::Result<libc::c_long> {
    if value == -1 { Err(io::Error::last_os_error()) } else { Ok(value) }
}

/// Takes ownership of a descriptor that a system call has just returned.
pub(crate) fn owned(value: libc::c_long) -> io::Result<OwnedFd> {
    let fd = check(value)?;
    // SAFETY: every caller passes what a system call that makes a descriptor has returned just now, so nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// A path as the kernel wants it.
///
/// # Errors
/// `InvalidInput` if the path holds a NUL byte.
pub(crate) fn cstring(path: impl AsRef<OsStr>) -> io::Result<CString> {
    CString::new(path.as_ref().as_bytes())
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "path holds a NUL byte"))
}

/// Path resolution as `openat2(2)` offers it.
pub mod resolve {
    /// Treat the directory as the root: absolute paths, absolute links and `..` stay below it.
    pub const IN_ROOT: u64 = libc::RESOLVE_IN_ROOT;
    /// Refuse magic links such as `/proc/self/fd/3`.
    pub const NO_MAGICLINKS: u64 = libc::RESOLVE_NO_MAGICLINKS;
    /// Refuse every symbolic link.
    pub const NO_SYMLINKS: u64 = libc::RESOLVE_NO_SYMLINKS;
    /// Refuse to leave the directory.
    pub const BENEATH: u64 = libc::RESOLVE_BENEATH;
    /// Refuse to cross into another mount.
    pub const NO_XDEV: u64 = libc::RESOLVE_NO_XDEV;
}

/// `openat2(2)`: opens `path` below `dir` under the given resolution rules. The descriptor is
/// close-on-exec.
pub fn openat2(
    dir: BorrowedFd<'_>,
    path: impl AsRef<Path>,
    flags: libc::c_int,
    mode: u32,
    resolve: u64,
) -> io::Result<OwnedFd> {
    let path = cstring(path.as_ref())?;
    // SAFETY: open_how is plain data for which all zeroes is a valid value.
    let mut how: libc::open_how = unsafe { std::mem::zeroed() };
    how.flags = (flags | libc::O_CLOEXEC) as u64;
    how.mode = u64::from(mode);
    how.resolve = resolve;
    // The kernel answers EAGAIN when a rename or mount raced with a resolution that must not escape.
    for _ in 0..64 {
        // SAFETY: path is NUL-terminated and how has the size that is passed; both outlive the call.
        let value = unsafe {
            libc::syscall(
                libc::SYS_openat2,
                dir.as_raw_fd(),
                path.as_ptr(),
                &how as *const libc::open_how,
                size_of::<libc::open_how>(),
            )
        };
        match owned(value) {
            Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => continue,
            other => return other,
        }
    }
    Err(io::Error::from_raw_os_error(libc::EAGAIN))
}

/// Opens a path of the host, as an ordinary lookup would.
pub fn open(path: impl AsRef<Path>, flags: libc::c_int) -> io::Result<OwnedFd> {
    let path = cstring(path.as_ref())?;
    open_cstr(&path, flags)
}

fn open_cstr(path: &CStr, flags: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: path is NUL-terminated and outlives the call.
    owned(unsafe { libc::open(path.as_ptr(), flags | libc::O_CLOEXEC) }.into())
}

/// `fstat(2)`, which also works on `O_PATH` descriptors.
pub fn fstat(fd: BorrowedFd<'_>) -> io::Result<libc::stat> {
    // SAFETY: stat is plain data for which all zeroes is a valid value.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is borrowed for the call and stat is writable.
    check(unsafe { libc::fstat(fd.as_raw_fd(), &mut stat) }.into())?;
    Ok(stat)
}

/// Whether the mode bits are those of a directory.
pub fn is_dir(stat: &libc::stat) -> bool {
    stat.st_mode & libc::S_IFMT == libc::S_IFDIR
}

/// `statfs(2)`'s magic number of the filesystem that holds `path`.
pub fn filesystem_magic(path: impl AsRef<Path>) -> io::Result<i64> {
    let path = cstring(path.as_ref())?;
    // SAFETY: statfs is plain data for which all zeroes is a valid value.
    let mut out: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: path is NUL-terminated and out is writable.
    check(unsafe { libc::statfs(path.as_ptr(), &mut out) }.into())?;
    #[allow(clippy::unnecessary_cast, reason = "the type differs between architectures")]
    Ok(out.f_type as i64)
}

/// `mkdirat(2)`.
pub fn mkdirat(dir: BorrowedFd<'_>, name: impl AsRef<OsStr>, mode: u32) -> io::Result<()> {
    let name = cstring(name)?;
    // SAFETY: name is NUL-terminated and outlives the call.
    check(unsafe { libc::mkdirat(dir.as_raw_fd(), name.as_ptr(), mode) }.into()).map(drop)
}

/// `close_range(2)` with `CLOSE_RANGE_CLOEXEC`: every descriptor from `first` on is closed by exec.
pub fn cloexec_from(first: RawFd) -> io::Result<()> {
    const CLOSE_RANGE_CLOEXEC: libc::c_uint = 4;
    // SAFETY: only sets flags of descriptors; no memory is touched.
    check(unsafe {
        libc::syscall(libc::SYS_close_range, first as libc::c_uint, libc::c_uint::MAX, CLOSE_RANGE_CLOEXEC)
    })
    .map(drop)
}

/// Closes every descriptor from `first` on that is not in `keep`. For a process that was just cloned and
/// will never return to what else owned them.
///
/// # Safety
/// Whatever owned the others must not be used or dropped any more, the log's file included.
pub unsafe fn close_all_but(first: RawFd, mut keep: Vec<RawFd>) {
    keep.sort_unstable();
    let mut from = first;
    for fd in keep.into_iter().map(Some).chain([None]) {
        let last = fd.map_or(libc::c_uint::MAX, |fd| fd.saturating_sub(1) as libc::c_uint);
        if fd.is_none_or(|fd| fd > from) {
            // SAFETY: the caller vouches that nothing uses them. A kernel without the call has none of what we need.
            unsafe { libc::syscall(libc::SYS_close_range, from as libc::c_uint, last, 0) };
        }
        from = from.max(fd.map_or(from, |fd| fd.saturating_add(1)));
    }
}

/// Sets or clears close-on-exec.
pub fn set_cloexec(fd: BorrowedFd<'_>, on: bool) -> io::Result<()> {
    let flag = if on { libc::FD_CLOEXEC } else { 0 };
    // SAFETY: only changes a flag of a borrowed descriptor.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, flag) }.into()).map(drop)
}

/// Makes reads and writes fail with `WouldBlock` where they would wait.
pub fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: only reads and changes flags of a borrowed descriptor.
    let flags = check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) }.into())? as libc::c_int;
    // SAFETY: as above.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) }.into()).map(drop)
}

/// As [`memfd`], for a program that is to be executed from it, where the kernel asks for that to be said.
pub fn executable_memfd(name: &CStr) -> io::Result<std::fs::File> {
    // SAFETY: name is NUL-terminated.
    let made =
        unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING | libc::MFD_EXEC) };
    match owned(made.into()) {
        // Before Linux 6.3 all can be.
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => memfd(name),
        other => other.map(Into::into),
    }
}

/// `memfd_create(2)`: an empty file in memory, which can be sealed.
pub fn memfd(name: &CStr) -> io::Result<std::fs::File> {
    // SAFETY: name is NUL-terminated.
    let fd = owned(unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) }.into())?;
    Ok(fd.into())
}

/// Seals a file of [`memfd`] against every change.
pub fn seal(file: std::fs::File) -> io::Result<OwnedFd> {
    let seals = libc::F_SEAL_SEAL | libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_WRITE;
    // SAFETY: only adds seals to a descriptor that we own.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) }.into())?;
    Ok(file.into())
}

/// A file of [`memfd`] filled with `data` and sealed.
pub fn sealed_memfd(name: &CStr, data: &[u8]) -> io::Result<OwnedFd> {
    use std::io::Write;
    let mut file = memfd(name)?;
    file.write_all(data)?;
    seal(file)
}

/// `poll(2)` for one descriptor, for at most `timeout_ms` milliseconds (-1: for ever), through interruptions. Returns
/// whether there is something to do: an error or the end counts, and the next call reports it.
pub fn poll(fd: BorrowedFd<'_>, events: libc::c_short, timeout_ms: i32) -> io::Result<bool> {
    let deadline = u64::try_from(timeout_ms).ok().map(|limit| Instant::now() + Duration::from_millis(limit));
    let mut left = timeout_ms;
    loop {
        let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events, revents: 0 };
        // SAFETY: poll is one valid pollfd.
        match check(unsafe { libc::poll(&mut poll, 1, left) }.into()) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {
                let now = Instant::now();
                left = deadline.map_or(-1, |at| at.saturating_duration_since(now).as_millis() as i32);
            }
            ready => return ready.map(|ready| ready > 0),
        }
    }
}

/// Reads a descriptor from its beginning to its end without moving its position.
pub fn read_all(fd: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    let mut data = vec![0u8; fstat(fd)?.st_size.max(0) as usize];
    let mut at = 0;
    while at < data.len() {
        // SAFETY: the buffer is valid for the length that is passed.
        let n =
            unsafe { libc::pread(fd.as_raw_fd(), data[at..].as_mut_ptr().cast(), data.len() - at, at as libc::off_t) };
        match check(n as libc::c_long) {
            Ok(0) => break,
            Ok(n) => at += n as usize,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    data.truncate(at);
    Ok(data)
}
