//! Running a program to its end.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Instant;

use super::Init;
use super::child::{self, Child, Step};
use crate::wire::messages::{Ended, Execute, FromInit};

/// What a process runs on between its clone and its program.
pub(super) struct Stack(Vec<u64>);

impl Stack {
    pub(super) fn new() -> Self {
        // Written to, so that its pages are there when somebody waits.
        Self(std::hint::black_box(vec![1; 8 * 1024]))
    }

    /// Its upper end, on which the processor's rules about alignment hold.
    fn top(&mut self) -> *mut libc::c_void {
        let end = self.0.as_mut_ptr_range().end;
        (end as usize & !15) as *mut libc::c_void
    }
}

fn signals(list: &[libc::c_int]) -> libc::sigset_t {
    // SAFETY: an empty set is made in place, and valid signals are added.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        for signal in list {
            libc::sigaddset(&mut set, *signal);
        }
        set
    }
}

/// Blocks the signals that are waited for: a child's end, and the pool's word that a program is to be ended. As process 1
/// it gets others from nobody in the sandbox.
pub(super) fn block_signals() -> io::Result<()> {
    let set = signals(&[libc::SIGCHLD, libc::SIGTERM]);
    // SAFETY: SIG_DFL installs no handler; the spawner ignores this signal, with which children could not be waited for.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
    // A blocked signal with the default action never gets to process 1 from its own namespace, and is not kept for it from
    // outside either. With a handler it is.
    // SAFETY: the handler does nothing and is never run, since the signal stays blocked.
    unsafe { libc::signal(libc::SIGTERM, nothing as *const () as libc::sighandler_t) };
    // SAFETY: the set is valid, and the old one is not asked for.
    if unsafe { libc::sigprocmask(libc::SIG_SETMASK, &set, std::ptr::null_mut()) } == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

extern "C" fn nothing(_signal: libc::c_int) {}

/// Whether there is another process in the sandbox.
pub(super) fn others() -> bool {
    // SAFETY: signal 0 only asks. It is sent to all but the caller.
    unsafe { libc::kill(-1, 0) == 0 }
}

/// Ends every other process, and reaps them. Their processor time and largest resident set are added up.
pub(super) fn kill_all() -> Usage {
    let mut usage = Usage::default();
    // Everybody in the namespace comes from a child of this process, or has become one when his parent ended. To be told
    // that there is none is cheaper than a signal, for which the kernel goes through all processes of the machine.
    if !has_children() {
        return usage;
    }
    // The kernel holds the list of processes meanwhile: one that forks gets the signal too, or does not fork.
    // SAFETY: everybody in the namespace is meant, and nobody else can be.
    while unsafe { libc::kill(-1, libc::SIGKILL) } == 0 {
        while let Some(ended) = wait(0) {
            usage.add(&ended);
        }
    }
    while let Some(ended) = wait(libc::WNOHANG) {
        usage.add(&ended);
    }
    usage
}

fn has_children() -> bool {
    let options = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT | libc::__WALL;
    // SAFETY: siginfo_t is plain data for which all zeroes is a valid value.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // SAFETY: info is writable.
    unsafe { libc::waitid(libc::P_ALL, 0, &mut info, options) == 0 }
}

/// A process that has been reaped.
struct Reaped {
    pid: i32,
    status: libc::c_int,
    usage: libc::rusage,
}

/// Reaps a process; `None` if there is none, or with WNOHANG none that has ended.
fn wait(options: libc::c_int) -> Option<Reaped> {
    // SAFETY: rusage is plain data for which all zeroes is a valid value.
    let mut ended = Reaped { pid: 0, status: 0, usage: unsafe { std::mem::zeroed() } };
    loop {
        // SAFETY: both results are writable.
        ended.pid = unsafe { libc::wait4(-1, &mut ended.status, options | libc::__WALL, &mut ended.usage) };
        if ended.pid == -1 && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted {
            continue;
        }
        return (ended.pid > 0).then_some(ended);
    }
}

/// Sums over processes.
#[derive(Default)]
pub(super) struct Usage {
    user_us: u64,
    system_us: u64,
    resident: u64,
}

impl Usage {
    fn add(&mut self, ended: &Reaped) {
        let microseconds = |time: libc::timeval| time.tv_sec as u64 * 1_000_000 + time.tv_usec as u64;
        self.user_us += microseconds(ended.usage.ru_utime);
        self.system_us += microseconds(ended.usage.ru_stime);
        self.resident = self.resident.max(ended.usage.ru_maxrss as u64 * 1024);
    }
}

impl Init<'_> {
    /// Runs a program. `None` for a request that breaks the protocol.
    pub(super) fn execute(&mut self, request: &Execute, fds: Vec<OwnedFd>) -> Option<FromInit> {
        let with_program = request.programs.is_empty();
        if fds.len() != request.targets.len() + usize::from(with_program) || request.args.is_empty() {
            return None;
        }
        let strings =
            |list: &[Vec<u8>]| list.iter().map(|text| CString::new(text.as_slice())).collect::<Result<Vec<_>, _>>();
        let (programs, args, env) = (strings(&request.programs), strings(&request.args), strings(&request.env));
        let (Ok(programs), Ok(args), Ok(env)) = (programs, args, env) else { return None };
        let directory = CString::new(request.directory.as_slice()).ok()?;
        let pointers = |list: &[CString]| list.iter().map(|text| text.as_ptr()).collect::<Vec<_>>();
        let ended_by_null = |list: &[CString]| [pointers(list), vec![std::ptr::null()]].concat();
        let (programs, args, env) = (pointers(&programs), ended_by_null(&args), ended_by_null(&env));
        let mut sources: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let mut child = Child {
            programs: &programs,
            args: args.as_ptr(),
            env: env.as_ptr(),
            directory: directory.as_ptr(),
            limits: &request.limits,
            sources: &mut sources,
            targets: &request.targets,
            id: self.uid,
            filter: &self.filter,
            failed: None,
        };
        // A word that was meant for the last program.
        discard_signal(libc::SIGTERM);
        let start = Instant::now();
        let pid = child::clone(&mut child, self.stack.top());
        let failed = child.failed.or(pid.is_err().then(|| (Step::Clone, pid.as_ref().err().map_or(0, errno))));
        // The program has its own; output ends when the last copy is closed.
        drop(fds);
        let mut ended = Ended::default();
        let mut usage = Usage::default();
        if let Ok(pid) = pid {
            let status = wait_for(pid, &mut usage);
            ended.wall_ns = start.elapsed().as_nanos() as u64;
            if libc::WIFSIGNALED(status) {
                ended.signal = libc::WTERMSIG(status) as u32;
            } else {
                ended.code = libc::WEXITSTATUS(status) as u32;
            }
        }
        let rest = kill_all();
        if let Some((step, errno)) = failed {
            return Some(FromInit::NotStarted { step: step.name().into(), errno: errno as u32 });
        }
        ended.user_us = usage.user_us + rest.user_us;
        ended.system_us = usage.system_us + rest.system_us;
        ended.resident = usage.resident.max(rest.resident);
        Some(FromInit::Ended(ended))
    }
}

fn errno(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(0)
}

/// Waits for a child to end, reaps whoever else does meanwhile, and ends all at the pool's word. Returns its status.
fn wait_for(pid: i32, usage: &mut Usage) -> libc::c_int {
    let set = signals(&[libc::SIGCHLD, libc::SIGTERM]);
    loop {
        // The signal of a child that has ended by now is kept.
        // SAFETY: the set is valid, and what comes with the signal is not asked for.
        if unsafe { libc::sigwaitinfo(&set, std::ptr::null_mut()) } == libc::SIGTERM {
            // SAFETY: everybody in the namespace is meant, and nobody else can be.
            unsafe { libc::kill(-1, libc::SIGKILL) };
        }
        while let Some(ended) = wait(libc::WNOHANG) {
            usage.add(&ended);
            if ended.pid == pid {
                return ended.status;
            }
        }
    }
}

/// Takes a blocked signal that has come, if it has.
fn discard_signal(signal: libc::c_int) {
    let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the set and the time are valid, and what comes with the signal is not asked for.
    unsafe { libc::sigtimedwait(&signals(&[signal]), std::ptr::null_mut(), &now) };
}
