//! The compiler of WASM modules: from standard input to standard output, which is what `runx wasm compile` and the
//! cache of compiled modules start.
//!
//! It is a program of its own because Cranelift is large: every command and every container would pay for pages that
//! only this one touches.

mod confine;

use std::io::{Read, Write};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use runx_wasm::compile::{Form, compile};
use runx_wasm::engine::{Backend, Layout};

const USAGE: &str =
    "usage: runx-wasm-compiler [--name NAME] [--compact] [--fuel] [--pulley] [--confined] <MODULE >ARTIFACT";

/// What the command line asks for.
#[derive(Debug, PartialEq, Eq)]
struct Arguments {
    /// The module's name in messages.
    name: String,
    /// For a process with a small limit on its address space.
    compact: bool,
    /// Count what is executed.
    fuel: bool,
    /// For the interpreter.
    pulley: bool,
    /// Give up all privileges first.
    confined: bool,
}

fn arguments(words: impl Iterator<Item = String>) -> Result<Arguments> {
    let mut out =
        Arguments { name: "the module".to_owned(), compact: false, fuel: false, pulley: false, confined: false };
    let mut words = words;
    while let Some(word) = words.next() {
        match word.as_str() {
            "--compact" => out.compact = true,
            "--fuel" => out.fuel = true,
            "--pulley" => out.pulley = true,
            "--confined" => out.confined = true,
            "--name" => out.name = words.next().context("--name needs a value")?,
            _ => match word.strip_prefix("--name=") {
                Some(name) => out.name = name.to_owned(),
                None => bail!("{word:?} is unknown\n{USAGE}"),
            },
        }
    }
    Ok(out)
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            // Whoever started us puts this into a message of its own.
            eprintln!("{e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let arguments = arguments(std::env::args().skip(1))?;
    if arguments.confined {
        confine::confine().context("confine the compiler")?;
    }
    let mut bytes = Vec::new();
    std::io::stdin().read_to_end(&mut bytes).context("read the module from standard input")?;
    let layout = if arguments.compact { Layout::Compact } else { Layout::Reserved };
    let backend = if arguments.pulley { Backend::Pulley } else { Backend::Native };
    let artifact = compile(&bytes, &arguments.name, Form { layout, fuel: arguments.fuel, backend })?;
    let mut out = std::io::stdout().lock();
    out.write_all(&artifact).and_then(|()| out.flush()).context("write the artifact to standard output")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_told_from_mistakes() {
        let parse = |words: &[&str]| arguments(words.iter().map(|word| (*word).to_owned()));
        let all = parse(&["--name", "a", "--compact", "--fuel", "--pulley", "--confined"]).unwrap();
        assert_eq!(all, Arguments { name: "a".into(), compact: true, fuel: true, pulley: true, confined: true });
        assert_eq!(parse(&["--name=b"]).unwrap().name, "b");
        for bad in [&["--name"][..], &["module.wasm"], &["--fast"]] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn core_and_engine_agree_where_small_address_spaces_begin() {
        assert_eq!(runx_core::workload::RESERVED_ADDRESS_SPACE, Layout::LEAST_ADDRESS_SPACE);
    }
}
