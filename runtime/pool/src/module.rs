//! WASM modules and components: compiled ahead of time, once a node, and run in sandboxes by the same programs as in containers.

use std::fs::File;

use runx_core::workload::{self, Module, WasmConfig, limits};

use crate::command::{Command, Limits};
use crate::error::Result;

/// The number of the artifact's descriptor in the program that runs it.
const ARTIFACT: u32 = 63;

impl Command {
    /// A module or component out of a file of the host, with the name that it is told, and these limits; its memory fails in
    /// its own words before a group's limit is reached. Arguments, environment and streams are those of any command. Only root
    /// has the cache of compiled modules.
    ///
    /// # Errors
    /// What is wrong with the module, by the compiler's word; and system errors.
    pub fn module(name: &str, file: &File, wasm: &WasmConfig, of_process: Limits) -> Result<Self> {
        let memory =
            of_process.memory.and_then(|memory| memory.checked_sub(limits::MARGIN)).filter(|memory| *memory > 0);
        let of_module = limits::Limits { memory, address_space: of_process.address_space, ..limits::Limits::default() };
        let (program, artifact, words) = wasm.prepare(name, Module::File(file), &of_module)?;
        Ok(Self::new(workload::RUNNER)
            .arg(format!("{ARTIFACT}{words}"))
            .arg(name)
            .program(program)
            .fd(ARTIFACT, artifact)
            .limits(of_process))
    }
}
