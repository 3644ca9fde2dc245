//! Mapping an artifact.

use std::fs::File;

use anyhow::{Result, anyhow};
use runx_wasm::engine::{self, Kind, Layout, Settings};
use wasmtime::component::Component;
use wasmtime::{Engine, Module};

use crate::arguments::{Arguments, Verb};
use crate::mapping;

/// What is to be run, and the engine that it was compiled for.
pub(crate) struct Artifact {
    pub(crate) engine: Engine,
    pub(crate) program: Program,
}

/// Either kind.
pub(crate) enum Program {
    Module(Module),
    Component(Component),
}

/// Maps the artifact. It says nowhere in a readable way which layout it was compiled for, so the likely one is tried
/// first, and its error is the one that is reported.
pub(crate) fn load(arguments: &Arguments) -> Result<Artifact> {
    let likely = Layout::of_this_process();
    let layouts = [likely].into_iter().chain(Layout::ALL.into_iter().filter(|layout| *layout != likely));
    let mut first_error = None;
    for layout in layouts {
        let (kind, backend) = (arguments.kind, arguments.backend);
        let settings = Settings { kind, layout, fuel: arguments.fuel.is_some(), backend };
        let mut config = engine::config(settings);
        if arguments.verb == Verb::Serve && layout == Layout::Reserved {
            config.allocation_strategy(pool());
        }
        if arguments.kind == Kind::Component {
            mapping::allow(&mut config);
        }
        let engine = Engine::new(&config).map_err(|e| anyhow!("make an engine: {e:#}"))?;
        let copy = File::from(arguments.artifact.try_clone()?);
        let loaded = match arguments.kind {
            // SAFETY: the artifact is the runtime's, which compiled it and keeps others from writing it; that is the
            // contract of this program.
            Kind::Module => unsafe { Module::deserialize_open_file(&engine, copy) }.map(Program::Module),
            Kind::Component => {
                let mapped = mapping::map(&copy)?;
                // SAFETY: as above, and it stays mapped.
                unsafe { Component::deserialize_raw(&engine, mapped) }.map(Program::Component)
            }
        };
        match loaded {
            Ok(program) => return Ok(Artifact { engine, program }),
            Err(e) => first_error = first_error.or(Some(e)),
        }
    }
    let reason = first_error.map(|e| format!("{e:#}")).unwrap_or_default();
    Err(anyhow!("{}: cannot load the compiled artifact: {reason}", arguments.args[0]))
}

/// Instances for a server, made ahead and used again: an instance for every request costs no mapping of memory.
fn pool() -> wasmtime::InstanceAllocationStrategy {
    let mut pool = wasmtime::PoolingAllocationConfig::default();
    // As many as there are requests at once, see serve.rs.
    pool.total_component_instances(1000).total_core_instances(4000).total_memories(2000).total_tables(4000);
    pool.total_stacks(1000);
    // A slot keeps what it had so that it is not faulted in again, up to this many bytes.
    pool.linear_memory_keep_resident(256 << 10).table_keep_resident(16 << 10);
    wasmtime::InstanceAllocationStrategy::Pooling(pool)
}

impl Artifact {
    /// Whether it answers HTTP requests, and is no command.
    pub(crate) fn is_http(&self) -> bool {
        let Program::Component(component) = &self.program else { return false };
        let exports: Vec<String> =
            component.component_type().exports(&self.engine).map(|(name, _)| name.to_owned()).collect();
        let has = |prefix: &str| exports.iter().any(|name| name.starts_with(prefix));
        has("wasi:http/") && !has("wasi:cli/run")
    }
}
