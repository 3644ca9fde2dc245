//! `runx wasm`: the compiler is a program of its own, beside this one.

use std::os::unix::process::CommandExt;
use std::path::Path;

use anyhow::Context;
use runx_core::workload::COMPILER;

use crate::Failure;
use crate::arguments::Compile;

/// `runx wasm compile`: becomes the compiler.
pub(crate) fn compile(executable: &Path, arguments: &Compile) -> Result<u8, Failure> {
    let path = executable.with_file_name(COMPILER);
    let error = std::process::Command::new(&path)
        .args(["--name", &arguments.name])
        .args(arguments.compact.then_some("--compact"))
        .args(arguments.confined.then_some("--confined"))
        .exec();
    Err(error).with_context(|| format!("run the compiler {}", path.display())).map_err(Failure::from)
}
