//! What a process does between its clone and its program.
//!
//! It shares the init's memory, which waits meanwhile, so nothing is copied: no page table, no allocation. It makes plain
//! system calls on a stack of its own, and writes nothing but how far it came.

use std::io;
use std::os::fd::RawFd;

/// What it did when it failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Clone,
    Descriptors,
    Limits,
    User,
    Directory,
    Filter,
    Execute,
}

impl Step {
    /// In words.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Clone => "clone a process",
            Self::Descriptors => "set its descriptors",
            Self::Limits => "set its limits",
            Self::User => "become its user",
            Self::Directory => "enter its working directory",
            Self::Filter => "load its seccomp filter",
            Self::Execute => "execute the program",
        }
    }
}

/// What it is given.
pub(super) struct Child<'a> {
    /// Paths to try; none if the last of `sources` is the program.
    pub(super) programs: &'a [*const libc::c_char],
    pub(super) args: *const *const libc::c_char,
    pub(super) env: *const *const libc::c_char,
    pub(super) directory: *const libc::c_char,
    pub(super) limits: &'a [(u32, u64, u64)],
    pub(super) sources: &'a mut [RawFd],
    pub(super) targets: &'a [u32],
    pub(super) id: u32,
    pub(super) filter: &'a [libc::sock_filter],
    /// Where it failed, and the error number.
    pub(super) failed: Option<(Step, i32)>,
}

/// Clones a process, which has executed its program, or failed and ended, when this returns.
pub(super) fn clone(child: &mut Child<'_>, stack: *mut libc::c_void) -> io::Result<i32> {
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
    // SAFETY: the caller waits until the child has left this memory, so `child` and the stack, whose upper end is passed,
    // are the child's alone until then. The child never returns from its function.
    let pid = unsafe { libc::clone(begin, stack, flags, (child as *mut Child<'_>).cast()) };
    if pid == -1 { Err(io::Error::last_os_error()) } else { Ok(pid) }
}

extern "C" fn begin(child: *mut libc::c_void) -> libc::c_int {
    // SAFETY: `clone` passes a `Child` that nobody else uses meanwhile.
    let child = unsafe { &mut *child.cast::<Child<'_>>() };
    let Err(failed) = go(child);
    child.failed = Some(failed);
    // SAFETY: ends this process without running what belongs to the init.
    unsafe { libc::_exit(127) }
}

fn check(step: Step, value: libc::c_long) -> Result<libc::c_long, (Step, i32)> {
    if value == -1 {
        // SAFETY: reads this thread's error number, which the init shares and does not use meanwhile.
        return Err((step, unsafe { *libc::__errno_location() }));
    }
    Ok(value)
}

fn go(child: &mut Child<'_>) -> Result<std::convert::Infallible, (Step, i32)> {
    // SAFETY: no argument. It fails for a leader of a group only, which a new process is not.
    unsafe { libc::setsid() };
    descriptors(child)?;
    for (kind, soft, hard) in child.limits {
        let limit = libc::rlimit64 { rlim_cur: *soft, rlim_max: *hard };
        // SAFETY: the limit is valid and the old one is not asked for.
        let set = unsafe { libc::syscall(libc::SYS_prlimit64, 0, *kind, &raw const limit, std::ptr::null::<u8>()) };
        check(Step::Limits, set)?;
    }
    user(child.id)?;
    // SAFETY: the path is NUL-terminated.
    check(Step::Directory, unsafe { libc::chdir(child.directory) }.into())?;
    if !child.filter.is_empty() {
        const SECCOMP_SET_MODE_FILTER: libc::c_ulong = 1;
        let program = libc::sock_fprog { len: child.filter.len() as u16, filter: child.filter.as_ptr().cast_mut() };
        // SAFETY: the program points to as many instructions as it says.
        let loaded = unsafe { libc::syscall(libc::SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &raw const program) };
        check(Step::Filter, loaded)?;
    }
    // The init blocks signals that a program expects to get. Its handler goes with the exec.
    // SAFETY: an empty set is made and installed.
    unsafe {
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &none, std::ptr::null_mut());
    }
    execute(child)
}

/// Puts descriptors to their numbers. Everything else is closed by the exec.
fn descriptors(child: &mut Child<'_>) -> Result<(), (Step, i32)> {
    let first_free = child.targets.iter().max().map_or(3, |number| *number as RawFd + 1).max(3);
    for source in child.sources.iter_mut() {
        // One that lies where another is going to be has to move first.
        if *source < first_free {
            // SAFETY: only integers are passed.
            let moved = unsafe { libc::fcntl(*source, libc::F_DUPFD_CLOEXEC, first_free) };
            *source = check(Step::Descriptors, moved.into())? as RawFd;
        }
    }
    for (source, target) in child.sources.iter().zip(child.targets) {
        // SAFETY: only integers are passed; what was open at the target is this process's own copy.
        check(Step::Descriptors, unsafe { libc::dup3(*source, *target as RawFd, 0) }.into())?;
    }
    const CLOSE_RANGE_CLOEXEC: libc::c_uint = 4;
    // SAFETY: only sets flags of descriptors.
    let closed = unsafe {
        libc::syscall(libc::SYS_close_range, first_free as libc::c_uint, libc::c_uint::MAX, CLOSE_RANGE_CLOEXEC)
    };
    check(Step::Descriptors, closed).map(drop)
}

/// Becomes the user without a way back. The bare calls change this process only.
fn user(id: u32) -> Result<(), (Step, i32)> {
    // SAFETY: only integers are passed.
    check(Step::User, unsafe { libc::syscall(libc::SYS_setresgid, id, id, id) })?;
    // SAFETY: only integers are passed.
    check(Step::User, unsafe { libc::syscall(libc::SYS_setresuid, id, id, id) })?;
    // A change of user from 0 has dropped all; where there is one user only, it is not.
    const VERSION_3: u32 = 0x2008_0522;
    let header = [VERSION_3, 0];
    let none = [0u32; 6];
    // SAFETY: version 3 reads two sets of three words.
    check(Step::User, unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), none.as_ptr()) }).map(drop)
}

fn execute(child: &Child<'_>) -> Result<std::convert::Infallible, (Step, i32)> {
    let mut error = libc::ENOENT;
    if let (true, Some(program)) = (child.programs.is_empty(), child.sources.last()) {
        // SAFETY: the path is empty and the lists end with NULL.
        unsafe {
            libc::syscall(libc::SYS_execveat, *program, c"".as_ptr(), child.args, child.env, libc::AT_EMPTY_PATH)
        };
        // SAFETY: reads this thread's error number.
        error = unsafe { *libc::__errno_location() };
    }
    for program in child.programs {
        // SAFETY: the path is NUL-terminated and the lists end with NULL.
        unsafe { libc::execve(*program, child.args, child.env) };
        // SAFETY: reads this thread's error number.
        let errno = unsafe { *libc::__errno_location() };
        match errno {
            // As a shell does it: look on, and remember one that may not be executed.
            libc::ENOENT | libc::ENOTDIR => {}
            libc::EACCES => error = errno,
            _ => return Err((Step::Execute, errno)),
        }
    }
    Err((Step::Execute, error))
}
