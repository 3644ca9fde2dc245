//! The last step of a WASM container. The contract is in the library's documentation.

use runx_wasm::{run, signals, termination};
use std::ffi::{OsStr, OsString};
use std::fmt::Display;
use std::io::Write;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::process::exit;

fn main() {
    let mut args = std::env::args_os().skip(1);
    let (fd, args) = (args.next(), args.collect::<Vec<OsString>>());
    let Some(artifact) = fd.as_deref().and_then(descriptor) else {
        refuse("usage: runx-wasm-runner ARTIFACT_FD ARG0 [ARG]..., with an open descriptor from 3 up");
    };
    if let Err(error) = signals::install() {
        refuse(format_args!("cannot install signal handlers: {error}"));
    }
    // SAFETY: the artifact is the runtime's, which compiled it and keeps others from writing it;
    // that is the contract of this program.
    match unsafe { run::run(artifact, &args) } {
        Ok(outcome) => {
            if let run::Outcome::Trapped(message) = &outcome {
                say(message);
            }
            exit(outcome.exit_code())
        }
        Err(error) => refuse(error),
    }
}

/// Takes ownership of the descriptor that the argument names, and closes it on exec.
fn descriptor(arg: &OsStr) -> Option<OwnedFd> {
    let fd: RawFd = arg.to_str()?.parse().ok()?;
    if fd < 3 {
        return None;
    }
    // SAFETY: any number may be asked about; one that is not open fails.
    if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } != 0 {
        return None;
    }
    // SAFETY: it is open, not a standard stream, and passed to this process to own.
    Some(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// One message on stderr, and to the kubelet; nobody hears of a stderr that is gone.
fn say(message: impl Display) {
    let message = message.to_string();
    let _ = writeln!(std::io::stderr(), "runx: {message}");
    termination::tell(&message);
}

fn refuse(message: impl Display) -> ! {
    say(message);
    exit(run::EXIT_NOT_STARTED)
}
