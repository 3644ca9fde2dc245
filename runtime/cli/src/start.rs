//! The program's entry.
//!
//! Every container starts this program twice, so it begins without the standard library's runtime, which would read
//! /proc/self/maps and make a stack for signals first. What of it matters is here: the three standard streams are
//! open, and a closed pipe is an error and not a signal. Before anything else, a command that makes processes executes
//! the program again from a read-only clone.

use std::ffi::OsString;
use std::io;

use crate::reexec;

/// Commands that fork into containers.
const MAKING_PROCESSES: [&str; 3] = ["create", "run", "exec"];

/// Commands of `runx container` that do, too.
const STARTING: [&str; 2] = ["start", "restart"];

/// Runs the command and returns its exit code.
pub(crate) fn start() -> u8 {
    // A pool executes this program again.
    runx_pool::spawner_main();
    if let Err(e) = open_standard_streams() {
        eprintln!("runx: open /dev/null: {e}");
        return 1;
    }
    // SAFETY: no handler is installed.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    // Before the command line is understood, since it would be so twice: a word may only look like a command.
    let is_there = |words: &[&str]| args.iter().any(|word| words.iter().any(|command| word == command));
    let makes_processes = is_there(&MAKING_PROCESSES) || is_there(&["container"]) && is_there(&STARTING);
    let executable = if makes_processes { reexec::from_read_only_clone() } else { reexec::own_path() };
    crate::command(args.into_iter(), executable)
}

/// A closed standard stream becomes /dev/null: else the next file that is opened would take its place.
fn open_standard_streams() -> io::Result<()> {
    let mut streams = [0, 1, 2].map(|fd| libc::pollfd { fd, events: 0, revents: 0 });
    // SAFETY: streams is a valid list of three.
    if unsafe { libc::poll(streams.as_mut_ptr(), 3, 0) } == -1 {
        return Err(io::Error::last_os_error());
    }
    for stream in streams {
        if stream.revents & libc::POLLNVAL == 0 {
            continue;
        }
        // SAFETY: the path is NUL-terminated. The lowest free number is this stream's.
        if unsafe { libc::open(c"/dev/null".as_ptr(), libc::O_RDWR) } == -1 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

#[cfg(not(test))]
mod entry {
    /// What the C library calls.
    ///
    /// The name is the C library's for the program's entry, and no other symbol has it.
    #[unsafe(no_mangle)]
    extern "C" fn main(_argc: libc::c_int, _argv: *const *const libc::c_char) -> libc::c_int {
        // A panic may not leave a function that C calls; it aborts.
        super::start().into()
    }
}
