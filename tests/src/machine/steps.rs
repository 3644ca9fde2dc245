//! Kills a program between two of its steps: at the entry of its n-th system call that changes something. Nothing in the
//! program knows of it.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

/// What became of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Killed {
    /// It was killed before its n-th step.
    At(&'static str),
    /// It had no n-th step, and ended with this code.
    Ended(i32),
}

/// System calls that are steps: they change files, start something or speak to somebody.
const STEPS: [(i64, &str); 16] = [
    (libc::SYS_openat, "openat to write"),
    (libc::SYS_write, "write"),
    (libc::SYS_fsync, "fsync"),
    (libc::SYS_rename, "rename"),
    (libc::SYS_renameat, "renameat"),
    (libc::SYS_renameat2, "renameat2"),
    (libc::SYS_unlink, "unlink"),
    (libc::SYS_unlinkat, "unlinkat"),
    (libc::SYS_rmdir, "rmdir"),
    (libc::SYS_mkdir, "mkdir"),
    (libc::SYS_mkdirat, "mkdirat"),
    (libc::SYS_symlink, "symlink"),
    (libc::SYS_symlinkat, "symlinkat"),
    (libc::SYS_fchmod, "fchmod"),
    (libc::SYS_chmod, "chmod"),
    (libc::SYS_connect, "connect"),
];

fn ptrace(request: libc::c_uint, pid: i32, data: usize) -> io::Result<()> {
    // SAFETY: none of the requests used here writes to memory of this process.
    match unsafe { libc::ptrace(request, pid, std::ptr::null_mut::<libc::c_void>(), data) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// The system call that a stopped process enters, and its third argument.
fn entered(pid: i32) -> io::Result<(i64, u64)> {
    // SAFETY: all bytes of zero are registers.
    let mut registers: libc::user_regs_struct = unsafe { std::mem::zeroed() };
    let mut vector = libc::iovec { iov_base: (&raw mut registers).cast(), iov_len: std::mem::size_of_val(&registers) };
    // SAFETY: the vector is as large as it says, and outlives the call.
    let done = unsafe { libc::ptrace(libc::PTRACE_GETREGSET, pid, 1, &raw mut vector) };
    if done == -1 {
        return Err(io::Error::last_os_error());
    }
    #[cfg(target_arch = "x86_64")]
    let found = (registers.orig_rax as i64, registers.rdx);
    #[cfg(target_arch = "aarch64")]
    let found = (registers.regs[8] as i64, registers.regs[2]);
    Ok(found)
}

fn wait(pid: i32) -> i32 {
    let mut status = 0;
    // SAFETY: the status is ours.
    while unsafe { libc::waitpid(pid, &raw mut status, 0) } == -1 {}
    status
}

/// The step that a process is about to do, if it is one.
fn step(pid: i32) -> io::Result<Option<&'static str>> {
    let (number, flags) = entered(pid)?;
    let found = STEPS.iter().find(|(step, _)| *step == number).map(|(_, name)| *name);
    let writes = flags & (libc::O_WRONLY | libc::O_RDWR | libc::O_CREAT) as u64 != 0;
    Ok(found.filter(|_| number != libc::SYS_openat || writes))
}

/// Runs a program and kills it (SIGKILL) before its n-th step, counted from 0. What it has started lives on.
///
/// # Errors
/// When it cannot be started or followed.
pub fn run_until(command: &mut Command, nth: usize) -> io::Result<Killed> {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    // SAFETY: between fork and exec it makes one system call.
    unsafe {
        command.pre_exec(|| ptrace(libc::PTRACE_TRACEME, 0, 0));
    }
    // Whoever starts a traced process is who follows it: this thread.
    let pid = command.spawn()?.id() as i32;
    wait(pid);
    ptrace(libc::PTRACE_SETOPTIONS, pid, (libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_EXITKILL) as usize)?;
    let (mut count, mut entering, mut signal) = (0, true, 0);
    loop {
        ptrace(libc::PTRACE_SYSCALL, pid, signal)?;
        signal = 0;
        let status = wait(pid);
        if libc::WIFEXITED(status) {
            return Ok(Killed::Ended(libc::WEXITSTATUS(status)));
        }
        if libc::WIFSIGNALED(status) {
            return Ok(Killed::Ended(128 + libc::WTERMSIG(status)));
        }
        if libc::WSTOPSIG(status) != libc::SIGTRAP | 0x80 {
            signal = libc::WSTOPSIG(status) as usize;
            continue;
        }
        if entering && let Some(name) = step(pid)? {
            if count == nth {
                // SAFETY: only a signal, to a child that is not reaped.
                unsafe { libc::kill(pid, libc::SIGKILL) };
                wait(pid);
                return Ok(Killed::At(name));
            }
            count += 1;
        }
        entering = !entering;
    }
}
