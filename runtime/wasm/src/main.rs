//! The last step of a WASM container. The contract is in the library's documentation.

use runx_wasm::{launch, run, signals, termination};
use std::ffi::OsString;
use std::fmt::Display;
use std::io::Write;
use std::process::exit;

fn main() {
    let mut args = std::env::args_os().skip(1);
    let (fd, args) = (args.next(), args.collect::<Vec<OsString>>());
    let Some(launch) = fd.as_deref().and_then(launch::parse) else {
        refuse("usage: runx-wasm-runner ARTIFACT_FD[,KEY=VALUE]... ARG0 [ARG]..., with an open descriptor from 3 up");
    };
    if let Err(error) = signals::install().and_then(|()| signals::end_after(launch.timeout)) {
        refuse(format_args!("cannot install signal handlers: {error}"));
    }
    // SAFETY: the artifact is the runtime's, which compiled it and keeps others from writing it;
    // that is the contract of this program.
    match unsafe { run::run(launch, &args) } {
        Ok(outcome) => {
            if let run::Outcome::Trapped(message) = &outcome {
                say(message);
            }
            exit(outcome.exit_code())
        }
        Err(error) => refuse(error),
    }
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
