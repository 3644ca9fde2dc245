//! Signals that end the module.
//!
//! The runner is usually PID 1 of its PID namespace, and the kernel does not deliver a signal to
//! such a process unless it has a handler: without one, TERM would be lost and every stop would
//! take until KILL. A module cannot handle signals, so each signal whose default action is to end
//! a process ends the runner at once with the exit code 128 + n that a shell or containerd would
//! report for a death by that signal.

use std::io;

/// Signals that end a process by default and that somebody sends. Not among them: KILL and STOP,
/// which cannot be handled; SEGV, BUS, ILL, FPE and TRAP, which are the engine's or a crash; and
/// PIPE, which is ignored, so that a write to a closed pipe gives the module an error.
const ENDING: [libc::c_int; 14] = [
    libc::SIGHUP,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGABRT,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGALRM,
    libc::SIGTERM,
    libc::SIGSTKFLT,
    libc::SIGVTALRM,
    libc::SIGPROF,
    libc::SIGPWR,
    libc::SIGXCPU,
    libc::SIGXFSZ,
];

extern "C" fn end(signal: libc::c_int) {
    // SAFETY: _exit is async-signal-safe, and nothing runs after it.
    unsafe { libc::_exit(128 + signal) }
}

/// Installs the handlers. A signal that the caller had ignored when it executed us stays ignored,
/// as it would for any program.
///
/// # Errors
///
/// The kernel's, which for valid signal numbers does not happen.
pub fn install() -> io::Result<()> {
    for signal in ENDING.into_iter().chain(libc::SIGRTMIN()..=libc::SIGRTMAX()) {
        install_one(signal)?;
    }
    // The Rust runtime does this before main; here it does not hang on that.
    // SAFETY: SIG_IGN is a valid disposition for SIGPIPE.
    if unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) } == libc::SIG_ERR {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Exit code of a process whose time is over, as timeout(1) has it.
pub const EXIT_TIMED_OUT: i32 = 124;

extern "C" fn time_is_over(_: libc::c_int) {
    const WORDS: &[u8] = b"runx: the module's time is over\n";
    // SAFETY: write and _exit are async-signal-safe, and nothing runs after them.
    unsafe {
        libc::write(2, WORDS.as_ptr().cast(), WORDS.len());
        libc::_exit(EXIT_TIMED_OUT)
    }
}

/// Ends the process after this time, whatever it does then. A timer of the kernel's does it, since a thread would count
/// under the container's limit on them. After [`install`].
///
/// # Errors
///
/// The kernel's, for a time that is none.
pub fn end_after(limit: Option<std::time::Duration>) -> io::Result<()> {
    let Some(limit) = limit else { return Ok(()) };
    set_handler(libc::SIGALRM, time_is_over)?;
    let value = libc::timeval {
        tv_sec: libc::time_t::try_from(limit.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_usec: limit.subsec_micros().into(),
    };
    let timer = libc::itimerval { it_interval: libc::timeval { tv_sec: 0, tv_usec: 0 }, it_value: value };
    // SAFETY: timer is valid, and the one before is not asked for.
    match unsafe { libc::setitimer(libc::ITIMER_REAL, &timer, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Takes the handler of a signal away, for a program that has one of its own for it.
///
/// # Errors
///
/// The kernel's, which for valid signal numbers does not happen.
pub fn release(signal: libc::c_int) -> io::Result<()> {
    // SAFETY: SIG_DFL is a valid disposition.
    if unsafe { libc::signal(signal, libc::SIG_DFL) } == libc::SIG_ERR {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn install_one(signal: libc::c_int) -> io::Result<()> {
    // SAFETY: all zeroes is a valid sigaction: SIG_DFL, no flags, an empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: reads the disposition into a valid struct.
    if unsafe { libc::sigaction(signal, std::ptr::null(), &mut action) } != 0 {
        return Err(io::Error::last_os_error());
    }
    if action.sa_sigaction == libc::SIG_IGN { Ok(()) } else { set_handler(signal, end) }
}

fn set_handler(signal: libc::c_int, handler: extern "C" fn(libc::c_int)) -> io::Result<()> {
    // SAFETY: all zeroes is a valid sigaction: SIG_DFL, no flags, an empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as libc::sighandler_t;
    // On the alternate stack where there is one: the module may have used up its own.
    action.sa_flags = libc::SA_ONSTACK | libc::SA_RESTART;
    // SAFETY: the handlers only make calls that are async-signal-safe; `action` is fully initialised above.
    match unsafe { libc::sigaction(signal, &action, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
