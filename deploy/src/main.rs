//! `runx-node`: registers runx with containerd on a Kubernetes node, keeps it registered, and takes it away again.
//!
//! It stands alone: it shares no code with the runtime, and does not need it to run.

mod arguments;
mod change;
mod config;
mod containers;
mod cri;
mod distribution;
mod events;
mod host;
mod http;
mod install;
mod journal;
mod kube;
mod node;
mod plan;
mod pools;
mod removal;
mod root;
mod run;
mod stage;
mod starts;
mod status;
mod uninstall;
mod version;
mod wait;

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Result, bail};
use arguments::{Arguments, Asked, Command};
use install::Restart;
use journal::State;
use node::Node;

/// Lines on standard error, which is a pod's log.
struct Log;

impl log::Log for Log {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.target().starts_with("runx_node") && metadata.level() <= log::Level::Info
    }

    fn log(&self, record: &log::Record<'_>) {
        if self.enabled(record.metadata()) {
            let level = record.level().as_str().to_ascii_lowercase();
            let _ = writeln!(std::io::stderr(), "runx-node: {level}: {}", record.args());
        }
    }

    fn flush(&self) {}
}

fn main() -> ExitCode {
    let asked = Arguments::parse(std::env::args().skip(1), |name| std::env::var(name).ok());
    let arguments = match asked {
        Ok(Asked::Print(text)) => {
            return if std::io::stdout().write_all(text.as_bytes()).is_ok() {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            };
        }
        Ok(Asked::Do(arguments)) => arguments,
        Err(e) => {
            eprintln!("runx-node: {e}");
            return ExitCode::from(2);
        }
    };
    if log::set_logger(&Log).is_ok() {
        log::set_max_level(log::LevelFilter::Info);
    }
    match perform(&arguments) {
        Ok(code) => code,
        Err(e) => {
            eprintln!("runx-node: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn perform(arguments: &Arguments) -> Result<ExitCode> {
    match arguments.command {
        Command::Install => {
            let programs = stage::Programs::read(Path::new(arguments.or("programs", "/programs")))?;
            let node = Node::open(arguments)?;
            let done = install::install(&node, &programs, "install", Restart::Now, arguments.has("force"))?;
            println!(
                "runx is installed: handler {}, programs {}; containerd was {}restarted",
                node.handler,
                if done.programs { "upgraded" } else { "as they were" },
                if done.restarted { "" } else { "not " }
            );
        }
        Command::Uninstall => {
            let node = Node::open(arguments)?;
            let done = uninstall::uninstall(&node, arguments.has("force"))?;
            if !done.was_there {
                println!("runx is not installed: there was nothing to do");
            } else if done.left.is_empty() {
                println!("runx is uninstalled");
            } else {
                println!(
                    "runx is uninstalled, but for {} sets of programs that shims run from: uninstall again when they have ended",
                    done.left.len()
                );
            }
        }
        Command::Status => {
            let json = match arguments.or("format", "table") {
                "table" => false,
                "json" => true,
                other => bail!("--format {other:?} is none of table, json"),
            };
            let status = status::Status::of(&Node::open(arguments)?)?;
            if json {
                println!("{}", serde_json::to_string_pretty(&status)?);
            } else {
                print!("{}", status.table());
            }
            return Ok(match status.state {
                State::Absent => ExitCode::from(3),
                _ if status.is_well() => ExitCode::SUCCESS,
                _ => ExitCode::FAILURE,
            });
        }
        Command::Run => run::run(arguments)?,
        Command::Wait => wait::wait(arguments)?,
    }
    Ok(ExitCode::SUCCESS)
}
