//! `containerd-shim-runx-v1`: what containerd talks to for containers of the runtime
//! `io.containerd.runx.v1`.
//!
//! One program in four roles: `start` and `delete` are short calls by containerd, the daemon serves the
//! Task API for the containers of one pod, and its spawner, which has one thread, clones processes into
//! them.

mod agent;
mod artifact;
mod container;
mod daemon;
mod delete;
mod error;
mod events;
mod flags;
mod info;
mod io;
mod logging;
mod metrics;
mod options;
mod pod;
mod process;
mod reaper;
mod rootfs;
mod sandbox;
mod service;
mod sockets;
mod spawner;
mod start;
mod starts;

use std::process::ExitCode;

use flags::{Action, Flags};

fn main() -> ExitCode {
    if std::env::args_os().nth(1).is_some_and(|argument| argument == spawner::ARGUMENT) {
        return spawner::main();
    }
    let outcome = Flags::parse(std::env::args().skip(1)).and_then(|flags| match flags.action {
        Action::Version => info::print_version(),
        Action::Info => info::print(),
        Action::Start => start::run(&flags),
        Action::Delete => delete::run(&flags),
        Action::Serve => daemon::run(flags),
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("containerd-shim-runx-v1: {e:#}");
            ExitCode::FAILURE
        }
    }
}
