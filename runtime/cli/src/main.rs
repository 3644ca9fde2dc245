//! The `runx` command: an OCI runtime that takes the place of runc, and what else people need of runx
//! on one machine.

mod arguments;
mod logging;
mod oci;
mod reexec;
mod wasm;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use runx_core::container::Runtime;
use runx_core::spawn::Spawner;
use runx_core::workload::WasmConfig;

use arguments::{Arguments, Command, WasmCommand};

/// What every command needs.
pub(crate) struct Context {
    /// Where the state of containers is.
    root: PathBuf,
    /// This program's own path.
    executable: PathBuf,
}

impl Context {
    /// The containers below the root.
    fn runtime(&self) -> Runtime {
        Runtime::new(&self.root, Spawner::Direct, WasmConfig::beside(&self.executable))
    }
}

/// How a command that failed ends, runc's codes.
pub(crate) struct Failure {
    error: anyhow::Error,
    code: u8,
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self { error: error.into(), code: 1 }
    }
}

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(e) => {
            // Help and version are no failures.
            let code = if e.use_stderr() { 1 } else { 0 };
            let _ = e.print();
            return ExitCode::from(code);
        }
    };
    let to_file = match logging::begin(&arguments.global) {
        Ok(to_file) => to_file,
        Err(e) => {
            eprintln!("runx: {e:#}");
            return ExitCode::FAILURE;
        }
    };
    match run(arguments) {
        Ok(code) => ExitCode::from(code),
        Err(failure) => {
            log::error!("{:#}", failure.error);
            if to_file {
                eprintln!("{:#}", failure.error);
            }
            ExitCode::from(failure.code)
        }
    }
}

fn run(arguments: Arguments) -> Result<u8, Failure> {
    let Arguments { global, command } = arguments;
    if global.systemd_cgroup {
        return Err(anyhow::anyhow!("--systemd-cgroup: the systemd cgroup driver is not implemented yet").into());
    }
    let executable = if command.makes_processes() { reexec::from_read_only_clone()? } else { reexec::own_path()? };
    let context = Context { root: global.root, executable };
    match command {
        Command::Create(create) => oci::create::create(&context, create),
        Command::Run(run) => oci::create::run(&context, run),
        Command::Start { id } => oci::manage::start(&context, &id),
        Command::Exec(exec) => oci::exec::exec(&context, exec).map_err(|mut failure| {
            failure.code = 255;
            failure
        }),
        Command::State { id } => oci::manage::state(&context, &id),
        Command::Kill { all, id, signal } => oci::manage::kill(&context, &id, &signal, all),
        Command::Delete { force, id } => oci::manage::delete(&context, &id, force),
        Command::Pause { id } => oci::manage::pause(&context, &id),
        Command::Resume { id } => oci::manage::resume(&context, &id),
        Command::List { format, quiet } => oci::manage::list(&context, format, quiet),
        Command::Spec { bundle } => oci::spec::spec(bundle),
        Command::Wasm(WasmCommand::Compile(compile)) => wasm::compile(compile),
    }
}
