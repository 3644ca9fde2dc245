//! Runs modules and components: as the last step of a container whose program is a component, and for `runx wasm`.
//!
//! A container's program that is a core module has a smaller runner of its own, `runx-wasm-runner`. What this program can
//! do besides costs pages that only components need: the component model, HTTP, the network, threads.
//!
//! Like that runner it holds no compiler: what it runs is an artifact, on a descriptor that it inherits, made by
//! `runx-wasm-compiler` of the same build.

mod arguments;
mod artifact;
mod context;
mod deadline;
mod inspect;
mod invoke;
mod linker;
mod mapping;
mod metrics;
mod run;
mod serve;

use std::process::exit;

use arguments::{Arguments, Verb};
use runx_wasm::run::{EXIT_NOT_STARTED, Outcome};
use runx_wasm::{signals, termination};

fn main() {
    let arguments = match arguments::parse(std::env::args_os().skip(1)) {
        Ok(arguments) => arguments,
        Err(e) => refuse(&format!("{e:#}")),
    };
    match perform(arguments) {
        Ok(outcome) => {
            if let Outcome::Trapped(message) = &outcome {
                say(message);
            }
            exit(outcome.exit_code())
        }
        Err(e) => refuse(&format!("{e:#}")),
    }
}

fn perform(mut arguments: Arguments) -> anyhow::Result<Outcome> {
    if arguments.verb == Verb::Inspect {
        return inspect::print(&arguments);
    }
    // As PID 1 it would be deaf otherwise. A server takes those over that ask for its end.
    signals::install()?;
    let artifact = artifact::load(&arguments)?;
    if arguments.in_container && arguments.invoke.is_none() && artifact.is_http() {
        arguments.verb = Verb::Serve;
    }
    // One module is one thread's work; a server's requests are not.
    if arguments.verb == Verb::Serve {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        return runtime.block_on(serve::serve(&arguments, artifact));
    }
    deadline::set(&arguments)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(run::run(&arguments, artifact))
}

/// One message on stderr, and to the kubelet; nobody hears of a stderr that is gone.
fn say(message: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "runx: {message}");
    termination::tell(message);
}

fn refuse(message: &str) -> ! {
    say(message);
    exit(EXIT_NOT_STARTED)
}
