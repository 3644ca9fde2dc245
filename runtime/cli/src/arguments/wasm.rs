//! What the commands of `runx wasm` are told.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, bail};

use super::scan::Words;
use super::units::{bytes, duration};
use super::{ListFormat, list_format, text};

/// `runx wasm …`.
#[derive(Debug)]
pub(crate) enum Wasm {
    Run(Box<Program>),
    Serve(Box<Program>),
    Inspect { file: PathBuf },
    Ps { format: ListFormat, quiet: bool },
    State { id: String },
    Kill { id: String, signal: String },
    Logs { id: String },
    Rm { id: String, force: bool },
    CacheLs { format: ListFormat },
    CachePrune { limit: u64 },
    Compile(Compile),
}

/// A module or component to be run.
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
    let mut rest = rest;
    Ok(match name {
        "wasm run" => Wasm::Run(Box::new(program(first, rest, words)?)),
        "wasm serve" => Wasm::Serve(Box::new(program(first, rest, words)?)),
        "wasm inspect" => Wasm::Inspect { file: first.into() },
        "wasm ps" => Wasm::Ps { format: list_format(words)?, quiet: words.on("quiet") },
        "wasm state" => Wasm::State { id: first },
        "wasm kill" => {
            let signal = words.text("signal")?.map(str::to_owned);
            let word = rest.next().map(text).transpose()?;
            Wasm::Kill { id: first, signal: signal.or(word).unwrap_or_else(|| "SIGTERM".to_owned()) }
        }
        "wasm logs" => Wasm::Logs { id: first },
        "wasm rm" => Wasm::Rm { id: first, force: words.on("force") },
        "wasm cache" => match first.as_str() {
            "ls" => Wasm::CacheLs { format: list_format(words)? },
            "prune" => {
                let limit = words.text("max-size")?.map(bytes).transpose()?.unwrap_or(0);
                Wasm::CachePrune { limit: u64::try_from(limit).unwrap_or(u64::MAX) }
            }
            other => bail!("{other:?} is neither ls nor prune"),
        },
        _ => Wasm::Compile(Compile {
            name: words.text("name")?.unwrap_or("module").to_owned(),
            compact: words.on("compact"),
            confined: words.on("confined"),
        }),
    })
}

fn program(file: String, rest: impl Iterator<Item = OsString>, words: &mut Words) -> Result<Program> {
    let network = match words.text("network")? {
        None | Some("none") => false,
        Some("host") => true,
        Some(other) => bail!("invalid --network {other:?}: it is none or host"),
    };
    let memory = words.text("memory")?.map(bytes).transpose()?;
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
        timeout: words.text("timeout")?.map(duration).transpose()?,
        network,
        ports: words.numbers("publish")?,
        address: words.text("addr")?.map(str::to_owned),
    })
}
