//! What the commands of `runx wasm` are told.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, bail};

use super::scan::Words;
use super::units::{bytes, duration};
use super::{ListFormat, list_format, text};
use crate::instances::supervise::Hooks;

/// How `runx wasm cache stats` prints.
#[derive(Clone, Copy, Debug)]
pub(crate) enum StatsFormat {
    List(ListFormat),
    Prometheus,
}

/// `runx wasm …`.
#[derive(Debug)]
pub(crate) enum Wasm {
    Run(Box<Program>),
    Serve(Box<Program>),
    Inspect { file: PathBuf },
    Instances(Instances),
    CacheLs { format: ListFormat },
    CachePrune { limit: u64 },
    CacheStats { format: StatsFormat },
    Compile(Compile),
}

/// `runx process …`.
#[derive(Debug)]
pub(crate) enum Process {
    Run(Box<Program>),
    Instances(Instances),
}

/// What is done with those in the background.
#[derive(Debug)]
pub(crate) enum Instances {
    Ps { format: ListFormat, quiet: bool },
    State { id: String },
    Kill { id: String, signal: String },
    Logs { id: String },
    Rm { id: String, force: bool },
}

/// A module or component, or a native program, to be run.
#[derive(Debug, Default)]
pub(crate) struct Program {
    pub(crate) file: PathBuf,
    pub(crate) args: Vec<String>,
    pub(crate) detach: bool,
    pub(crate) name: Option<String>,
    pub(crate) directories: Vec<String>,
    pub(crate) env: Vec<String>,
    pub(crate) invoke: Option<String>,
    pub(crate) fuel: Option<u64>,
    pub(crate) memory: Option<u64>,
    pub(crate) timeout: Option<Duration>,
    pub(crate) network: bool,
    pub(crate) ports: Vec<u16>,
    pub(crate) address: Option<String>,
    pub(crate) metrics: Option<String>,
    pub(crate) pulley: bool,
    pub(crate) cwd: Option<PathBuf>,
    pub(crate) hooks: Hooks,
}

impl Program {
    /// The variables that are given, and those of the caller that are named without a value, as docker has it.
    pub(crate) fn variables(&self) -> impl Iterator<Item = (String, String)> {
        self.env.iter().filter_map(|variable| match variable.split_once('=') {
            Some((name, value)) => Some((name.to_owned(), value.to_owned())),
            None => std::env::var(variable).ok().map(|value| (variable.clone(), value)),
        })
    }
}

/// `runx wasm compile`.
#[derive(Debug)]
pub(crate) struct Compile {
    pub(crate) name: String,
    pub(crate) compact: bool,
    pub(crate) confined: bool,
}

/// The command `name`, of which `first` is the first word and `rest` what follows.
pub(super) fn build(
    name: &str,
    first: String,
    rest: impl Iterator<Item = OsString>,
    words: &mut Words,
) -> Result<Wasm> {
    Ok(match name {
        "wasm run" => Wasm::Run(Box::new(program(first, rest, words)?)),
        "wasm serve" => Wasm::Serve(Box::new(program(first, rest, words)?)),
        "wasm inspect" => Wasm::Inspect { file: first.into() },
        "wasm ps" | "wasm state" | "wasm kill" | "wasm logs" | "wasm rm" => {
            Wasm::Instances(instances(name, first, rest, words)?)
        }
        "wasm cache" => match first.as_str() {
            "ls" => Wasm::CacheLs { format: list_format(words)? },
            "prune" => {
                let limit = words.text("max-size")?.map(bytes).transpose()?.unwrap_or(0);
                Wasm::CachePrune { limit: u64::try_from(limit).unwrap_or(u64::MAX) }
            }
            "stats" => Wasm::CacheStats {
                format: match words.text("format")? {
                    Some("prometheus") => StatsFormat::Prometheus,
                    _ => StatsFormat::List(list_format(words)?),
                },
            },
            other => bail!("{other:?} is none of ls, prune and stats"),
        },
        _ => Wasm::Compile(Compile {
            name: words.text("name")?.unwrap_or("module").to_owned(),
            compact: words.on("compact"),
            confined: words.on("confined"),
        }),
    })
}

/// As [`build`], for `runx process`.
pub(super) fn build_process(
    name: &str,
    first: String,
    rest: impl Iterator<Item = OsString>,
    words: &mut Words,
) -> Result<Process> {
    Ok(match name {
        "process run" => Process::Run(Box::new(program(first, rest, words)?)),
        _ => Process::Instances(instances(name, first, rest, words)?),
    })
}

fn instances(name: &str, id: String, mut rest: impl Iterator<Item = OsString>, words: &mut Words) -> Result<Instances> {
    Ok(match name.split_once(' ').map_or(name, |(_, verb)| verb) {
        "ps" => Instances::Ps { format: list_format(words)?, quiet: words.on("quiet") },
        "state" => Instances::State { id },
        "kill" => {
            let signal = words.text("signal")?.map(str::to_owned);
            let word = rest.next().map(text).transpose()?;
            Instances::Kill { id, signal: signal.or(word).unwrap_or_else(|| "SIGTERM".to_owned()) }
        }
        "logs" => Instances::Logs { id },
        _ => Instances::Rm { id, force: words.on("force") },
    })
}

fn program(file: String, rest: impl Iterator<Item = OsString>, words: &mut Words) -> Result<Program> {
    let network = match words.text("network")? {
        None | Some("none") => false,
        Some("host") => true,
        Some(other) => bail!("invalid --network {other:?}: it is none or host"),
    };
    let pulley = match words.text("engine")? {
        None | Some("cranelift") => false,
        Some("pulley") => true,
        Some(other) => bail!("invalid --engine {other:?}: it is cranelift or pulley"),
    };
    let memory = words.text("memory")?.map(bytes).transpose()?;
    let mut hooks = Hooks::default();
    words.texts("hook")?.iter().try_for_each(|text| hooks.add(text))?;
    Ok(Program {
        file: file.into(),
        args: rest.map(text).collect::<Result<_>>()?,
        detach: words.on("detach"),
        name: words.text("name")?.map(str::to_owned),
        directories: words.texts("dir")?,
        env: words.texts("env")?,
        invoke: words.text("invoke")?.map(str::to_owned),
        fuel: words.number("fuel")?,
        memory: memory.and_then(|memory| u64::try_from(memory).ok()),
        timeout: words.text("timeout")?.map(|text| duration("timeout", text)).transpose()?,
        network,
        ports: words.numbers("publish")?,
        address: words.text("addr")?.map(str::to_owned),
        metrics: words.text("metrics")?.map(str::to_owned),
        pulley,
        cwd: words.path("cwd"),
        hooks,
    })
}
