//! `runx wasm`: modules and components without a container.
//!
//! The engine and the compiler are programs of their own, beside this one.

mod cache;
mod program;

use std::os::unix::process::CommandExt;

use anyhow::Context as _;
use runx_core::workload::COMPILER;

use crate::arguments::Wasm;
use crate::instances::{self, Group};
use crate::{Context, Failure};

/// `runx wasm …`.
pub(crate) fn wasm(context: &Context, command: &Wasm) -> Result<u8, Failure> {
    match command {
        Wasm::Run(program) => program::execute(context, program, "run"),
        Wasm::Serve(program) => program::execute(context, program, "serve"),
        Wasm::Inspect { file } => program::inspect(context, file),
        Wasm::Instances(command) => instances::instances(context, Group::Modules, command),
        Wasm::CacheLs { format } => cache::ls(context, *format),
        Wasm::CacheStats { format } => cache::stats(context, *format),
        Wasm::CachePrune { limit } => cache::prune(context, *limit),
        Wasm::Compile(arguments) => {
            let path = context.executable.with_file_name(COMPILER);
            let error = std::process::Command::new(&path)
                .args(["--name", &arguments.name])
                .args(arguments.compact.then_some("--compact"))
                .args(arguments.confined.then_some("--confined"))
                .exec();
            Err(error).with_context(|| format!("run the compiler {}", path.display())).map_err(Failure::from)
        }
    }
}
