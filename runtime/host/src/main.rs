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
    match perform(&arguments) {
        Ok(outcome) => {
            if let Outcome::Trapped(message) = &outcome {
                say(message);
            }
            exit(outcome.exit_code())
        }
        Err(e) => refuse(&format!("{e:#}")),
    }
}

fn perform(arguments: &Arguments) -> anyhow::Result<Outcome> {
    if arguments.verb == Verb::Inspect {
        return inspect::print(arguments);
    }
    let artifact = artifact::load(arguments)?;
    let http = arguments.verb == Verb::Serve || arguments.in_container && artifact.is_http();
    if !http {
        signals::install()?;
        deadline::set(arguments)?;
    }
    // One module is one thread's work; a server's requests are not.
    let mut runtime = match http {
        true => tokio::runtime::Builder::new_multi_thread(),
        false => tokio::runtime::Builder::new_current_thread(),
    };
    let runtime = runtime.enable_all().build()?;
    if http {
        runtime.block_on(serve::serve(arguments, artifact))
    } else {
        runtime.block_on(run::run(arguments, artifact))
    }
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
