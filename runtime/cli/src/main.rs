//! The `runx` command: an OCI runtime that takes the place of runc, and what else people need of runx
//! on one machine.

#![cfg_attr(not(test), no_main)]
#![cfg_attr(test, allow(dead_code, reason = "the program's entry is not in its tests"))]

mod arguments;
mod completion;
mod config;
mod container;
mod container_defaults;
mod instances;
mod logging;
mod network;
mod oci;
mod pool;
mod process;
mod reexec;
mod start;
mod storage;
mod system;
mod table;
mod version;
mod wasm;

use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use runx_core::container::Runtime;
use runx_core::rootless;
use runx_core::spawn::Spawner;
use runx_core::workload::WasmConfig;

use arguments::{Command, Global};
use config::Config;

/// What every command needs.
pub(crate) struct Context {
    global: Global,
    config: Config,
    /// This program's own path.
    executable: PathBuf,
}

impl Context {
    /// Where the parts for modules are.
    fn wasm(&self) -> WasmConfig {
        let mut wasm = WasmConfig::beside(&self.executable);
        if rootless::is_unprivileged()
            && let Some(cache) = own_cache()
        {
            wasm.cache = cache;
        }
        wasm
    }

    /// The containers below the root.
    fn runtime(&self) -> Runtime {
        Runtime::new(&self.global.root, Spawner::Direct, self.wasm())
    }
}

/// Where an ordinary user keeps what is compiled once, by the XDG Base Directory Specification.
fn own_cache() -> Option<PathBuf> {
    let directory = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let cache = directory("XDG_CACHE_HOME").or_else(|| directory("HOME").map(|home| home.join(".cache")))?;
    Some(cache.join("runx/wasm"))
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

impl Failure {
    /// What failed as a whole, in runc's words.
    fn of(self, what: &'static str) -> Self {
        Self { error: self.error.context(what), ..self }
    }
}

/// The whole of the command, on a command line without the program's name.
fn command(args: impl Iterator<Item = OsString>, executable: Result<PathBuf>) -> u8 {
    let (global, command) = arguments::parse(args);
    let begun = global.and_then(|mut global| {
        // What is wrong with the config file is told where the flags say.
        let config = Config::load(global.config_file.as_deref());
        if let Ok(config) = &config {
            global.complete(config);
        }
        logging::begin(&global).map(|to_file| (global, config, to_file))
    });
    let (global, config, to_file) = match begun {
        Ok(begun) => begun,
        Err(e) => {
            eprintln!("runx: {}", message(&e));
            return 1;
        }
    };
    let done = match (command, config) {
        // Help and the version are told in any case.
        (
            Ok(
                command @ (Command::Help(_)
                | Command::Version { .. }
                | Command::Completion { .. }
                | Command::Man { .. }),
            ),
            config,
        ) => run(global, config.unwrap_or_default(), command, executable),
        (Ok(command), Ok(config)) => run(global, config, command, executable),
        (Err(e), _) | (_, Err(e)) => Err(e.into()),
    };
    match done {
        Ok(code) => code,
        Err(failure) => {
            let message = message(&failure.error);
            log::error!("{message}");
            if to_file {
                eprintln!("{message}");
            }
            failure.code
        }
    }
}

/// An error and what is behind it. The library's errors tell their cause themselves.
pub(crate) fn message(error: &anyhow::Error) -> String {
    let mut out = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if !out.ends_with(&cause) {
            out.push_str(if out.is_empty() { "" } else { ": " });
            out.push_str(&cause);
        }
    }
    out
}

fn run(global: Global, config: Config, command: Command, executable: Result<PathBuf>) -> Result<u8, Failure> {
    if global.criu {
        log::warn!("--criu is ignored: it has no effect any more");
    }
    let context = Context { global, config, executable: executable? };
    log::debug!("runx {} with state below {}", env!("CARGO_PKG_VERSION"), context.global.root.display());
    match command {
        Command::Create(create) => oci::create::create(&context, create).map_err(|e| e.of("runx create failed")),
        Command::Run(run) => oci::create::run(&context, run).map_err(|e| e.of("runx run failed")),
        Command::Start { id } => oci::manage::start(&context, &id),
        Command::Exec(exec) => {
            oci::exec::exec(&context, *exec).map_err(|e| Failure { code: 255, ..e.of("exec failed") })
        }
        Command::State { id } => oci::list::state(&context, &id),
        Command::Kill { id, signal, all } => oci::manage::kill(&context, &id, &signal, all),
        Command::Delete { id, force } => oci::manage::delete(&context, &id, force),
        Command::List { format, quiet } => oci::list::list(&context, format, quiet),
        Command::PsAll { format, all, quiet } => system::ps::ps(&context, format, all, quiet),
        Command::Ps { id, format, options } => oci::ps::ps(&context, &id, format, &options),
        Command::Pause { id } => oci::manage::pause(&context, &id),
        Command::Resume { id } => oci::manage::resume(&context, &id),
        Command::Update(update) => oci::update::update(&context, *update),
        Command::Checkpoint(checkpoint) => {
            oci::checkpoint::checkpoint(&context, &checkpoint).map_err(|e| e.of("checkpoint failed"))
        }
        Command::Restore(restore) => oci::checkpoint::restore(&context, *restore).map_err(|e| e.of("restore failed")),
        Command::Events { id, interval, once } => oci::events::events(&context, &id, interval, once),
        Command::Spec { bundle, rootless, defaults } => oci::spec::spec(bundle, rootless, defaults),
        Command::Features => {
            let text = serde_json::to_string_pretty(&runx_core::features::features());
            print(&format!("{}\n", text.context("print the features")?))
        }
        Command::Agent(agent) => oci::agent::agent(&context, &agent).map_err(|e| e.of("agent")),
        Command::Process(command) => process::process(&context, &command).map_err(|e| e.of("process")),
        Command::Network(command) => network::command::network(&context, &command).map_err(|e| e.of("network")),
        Command::Storage(command) => storage::storage(&context, *command).map_err(|e| e.of("storage")),
        Command::Pool(command) => pool::pool(&context, &command).map_err(|e| e.of("pool")),
        Command::Wasm(command) => wasm::wasm(&context, &command).map_err(|e| e.of("wasm")),
        Command::Container(command) => container::container(&context, *command),
        Command::Check { format } => system::check::check(&context, format),
        Command::Info { format } => system::info::info(&context, format),
        Command::Version { format } => system::info::version(format),
        Command::Completion { shell } => completion::script(&shell),
        Command::Complete { words } => completion::complete(&context, &words),
        Command::Man { of, output } => system::man::man(of, output.as_deref()),
        Command::Help(of) => print(&arguments::help::help(of)),
    }
}

/// Prints a text to standard output. A reader that went away has read enough.
pub(crate) fn print(text: &str) -> Result<u8, Failure> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(e).context("print to standard output")?,
        _ => Ok(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_is_told_once() {
        let kernel = std::io::Error::from_raw_os_error(libc::ENOENT);
        let error = anyhow::Error::from(runx_core::Error::system("open /x", kernel)).context("exec failed");
        assert_eq!(message(&error), "exec failed: open /x: No such file or directory (os error 2)");
    }
}
