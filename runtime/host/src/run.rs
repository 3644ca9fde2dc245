//! Running a command, or one of its functions, to its end.

use anyhow::{Result, anyhow};
use runx_wasm::run::{self as module, Outcome};
use wasmtime::component::{Component, Instance};
use wasmtime::{Engine, Linker, Module, Store, Trap};
use wasmtime_wasi::I32Exit;

use crate::arguments::Arguments;
use crate::artifact::{Artifact, Program};
use crate::context::{self, Host};
use crate::{invoke, linker};

/// Runs it. What it prints is its own alone.
pub(crate) async fn run(arguments: &Arguments, artifact: Artifact) -> Result<Outcome> {
    let Artifact { engine, program } = artifact;
    match program {
        Program::Module(module) => run_module(arguments, &engine, &module).await,
        Program::Component(component) => run_component(arguments, &engine, &component).await,
    }
}

async fn run_module(arguments: &Arguments, engine: &Engine, module: &Module) -> Result<Outcome> {
    let name = arguments.args[0].as_str();
    let mut linker = Linker::new(engine);
    module::add_to_linker(&mut linker, |host: &mut context::ModuleHost| &mut host.wasi)
        .map_err(|e| anyhow!("define WASI: {e:#}"))?;
    let mut store = context::module_store(engine, arguments)?;
    let instance = match linker.instantiate_async(&mut store, module).await {
        Ok(instance) => instance,
        // A module may have a start function of its own, which runs here.
        Err(e) if ended(&e) => return Ok(module::outcome(name, &e)),
        Err(e) => return Err(anyhow!("{name}: cannot instantiate the module: {e:#}")),
    };
    let result = match &arguments.invoke {
        Some(call) => match invoke::initialized(&instance, &mut store, call).await? {
            Ok(printed) => {
                print(&printed);
                Ok(())
            }
            Err(e) => Err(e),
        },
        None => {
            let start = module::start_function(name, &instance, &mut store)?;
            start.call_async(&mut store, ()).await
        }
    };
    Ok(match result {
        Ok(()) => Outcome::Exited(0),
        Err(e) => module::outcome(name, &e),
    })
}

async fn run_component(arguments: &Arguments, engine: &Engine, component: &Component) -> Result<Outcome> {
    let name = arguments.args[0].as_str();
    let linker = linker::linker(engine)?;
    let mut store = context::component_store(engine, arguments)?;
    let instance = match linker.instantiate_async(&mut store, component).await {
        Ok(instance) => instance,
        Err(e) if ended(&e) => return Ok(module::outcome(name, &e)),
        Err(e) => return Err(anyhow!("{name}: cannot instantiate the component: {e:#}")),
    };
    let result = match &arguments.invoke {
        Some(call) => match invoke::component(component, &instance, &mut store, call).await? {
            Ok(printed) => {
                print(&printed);
                Ok(Ok(()))
            }
            Err(e) => Err(e),
        },
        None => call_run(name, &instance, &mut store).await?,
    };
    Ok(match result {
        Ok(Ok(())) => Outcome::Exited(0),
        Ok(Err(())) => Outcome::Exited(1),
        Err(e) => module::outcome(name, &e),
    })
}

/// Calls `wasi:cli/run`, of WASI 0.3 or of 0.2. The outer error is that it exports neither.
async fn call_run(
    name: &str,
    instance: &Instance,
    store: &mut Store<Host>,
) -> Result<wasmtime::Result<Result<(), ()>>> {
    if let Ok(command) = wasmtime_wasi::p3::bindings::Command::new(&mut *store, instance) {
        let done = store.run_concurrent(async |store| command.wasi_cli_run().call_run(store).await).await;
        return Ok(done.and_then(|result| result));
    }
    match wasmtime_wasi::p2::bindings::Command::new(&mut *store, instance) {
        Ok(command) => Ok(command.wasi_cli_run().call_run(&mut *store).await),
        Err(_) => Err(anyhow!(
            "{name}: not a command: it does not export wasi:cli/run (\"runx wasm inspect\" tells what it exports, \
             \"runx wasm serve\" answers HTTP requests)"
        )),
    }
}

fn ended(error: &wasmtime::Error) -> bool {
    error.is::<Trap>() || error.is::<I32Exit>()
}

fn print(text: &str) {
    use std::io::Write;
    // A reader that went away has read enough.
    let _ = writeln!(std::io::stdout(), "{text}");
}
