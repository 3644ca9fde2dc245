//! Running an artifact in this process.

use crate::engine::{self, Kind, Layout, Settings};
use crate::error::chain;
use crate::launch::Launch;
use crate::{Error, guard, wasi};
use std::ffi::OsString;
use std::fmt::Write;
use std::fs::File;
use wasmtime::{Engine, Instance, Linker, Module, Store, StoreLimits, StoreLimitsBuilder, Trap, WasmBacktrace};
use wasmtime_wasi::I32Exit;
use wasmtime_wasi::p1::{self, WasiP1Ctx};

/// How a module ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It returned from `_start` (0) or called `proc_exit` with this code.
    Exited(i32),
    /// It trapped: a message of one or more lines, with the functions that were active.
    Trapped(String),
}

/// Exit code of a process whose module trapped: 128 + SIGABRT.
pub const EXIT_TRAPPED: i32 = 134;

/// Exit code of a process whose module could not be started: a shell's "cannot execute".
pub const EXIT_NOT_STARTED: i32 = 126;

impl Outcome {
    /// The exit code for the process: as with exit(3), of a code only the lowest eight bits count.
    pub fn exit_code(&self) -> i32 {
        match self {
            Outcome::Exited(code) => code & 0xff,
            Outcome::Trapped(_) => EXIT_TRAPPED,
        }
    }
}

/// Runs an artifact to its end, with the environment, streams and directories of this process.
///
/// `args` are the module's arguments; the first of them names it in messages. Arguments and
/// variables that are not UTF-8, which WASI requires, get replacement characters. The artifact is
/// mapped, not read, and its descriptor stays open as long as the module.
///
/// # Errors
///
/// The module was not started: [`Error::Artifact`], [`Error::Instantiate`], [`Error::NoStart`],
/// [`Error::Setup`] or [`Error::Engine`].
///
/// # Safety
///
/// The artifact is native code and nothing in it is verified: it must come from
/// [`crate::compile::compile`], and nobody may change the file while the module runs.
pub unsafe fn run(launch: Launch, args: &[OsString]) -> Result<Outcome, Error> {
    let name = args.first().map_or_else(|| "module".into(), |arg| arg.to_string_lossy().into_owned());
    // SAFETY: the caller's promise.
    let (engine, module) = unsafe { load(&name, File::from(launch.artifact), launch.fuel.is_some())? };
    let context = wasi::context(&name, args)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build().map_err(|error| {
        Error::Setup { name: name.clone(), attempt: "cannot make an event loop".into(), reason: error.to_string() }
    })?;
    let limits = match launch.memory.and_then(|memory| usize::try_from(memory).ok()) {
        Some(memory) => StoreLimitsBuilder::new().memory_size(memory).build(),
        None => StoreLimits::default(),
    };
    runtime.block_on(execute(&name, &engine, &module, Guest { wasi: context, limits }, launch.fuel))
}

/// Maps the artifact. It says nowhere in a readable way which layout it was compiled for, so the
/// likely one is tried first, and its error is the one that is reported.
///
/// # Safety
///
/// As [`run`].
unsafe fn load(name: &str, artifact: File, fuel: bool) -> Result<(Engine, Module), Error> {
    let likely = Layout::of_this_process();
    let layouts = [likely].into_iter().chain(Layout::ALL.into_iter().filter(|layout| *layout != likely));
    let mut first_error = None;
    for layout in layouts {
        let engine = engine::engine(Settings { fuel, ..Settings::new(Kind::Module, layout) })?;
        let copy = artifact.try_clone().map_err(|error| Error::Setup {
            name: name.to_owned(),
            attempt: "cannot duplicate the artifact's descriptor".into(),
            reason: error.to_string(),
        })?;
        // SAFETY: the caller's promise about the artifact.
        match unsafe { Module::deserialize_open_file(&engine, copy) } {
            Ok(module) => return Ok((engine, module)),
            Err(error) => first_error = first_error.or(Some(error)),
        }
    }
    let reason = first_error.as_ref().map(chain).unwrap_or_default();
    Err(Error::Artifact { name: name.to_owned(), reason })
}

/// What the host's functions work on.
struct Guest {
    wasi: WasiP1Ctx,
    limits: StoreLimits,
}

async fn execute(
    name: &str,
    engine: &Engine,
    module: &Module,
    guest: Guest,
    fuel: Option<u64>,
) -> Result<Outcome, Error> {
    let linker = linker(engine).map_err(|error| Error::Engine { reason: chain(&error) })?;
    let mut store = Store::new(engine, guest);
    store.limiter(|guest| &mut guest.limits);
    if let Some(fuel) = fuel {
        store.set_fuel(fuel).map_err(|error| Error::Engine { reason: chain(&error) })?;
    }
    // It bounds what one call may make the host allocate, for hosts that share a process. Here the
    // container's memory limit does, and a large write is nothing unusual.
    store.set_hostcall_fuel(usize::MAX);
    let instance = match linker.instantiate_async(&mut store, module).await {
        Ok(instance) => instance,
        // A module may have a start function of its own, which runs here.
        Err(error) if error.is::<Trap>() || error.is::<I32Exit>() => {
            return Ok(outcome(name, &error));
        }
        Err(error) => {
            return Err(Error::Instantiate { name: name.to_owned(), reason: chain(&error) });
        }
    };
    let start = start_function(name, &instance, &mut store)?;
    Ok(match start.call_async(&mut store, ()).await {
        Ok(()) => Outcome::Exited(0),
        Err(error) => outcome(name, &error),
    })
}

fn linker(engine: &Engine) -> wasmtime::Result<Linker<Guest>> {
    let mut linker = Linker::new(engine);
    add_to_linker(&mut linker, |guest: &mut Guest| &mut guest.wasi)?;
    Ok(linker)
}

/// Adds WASI preview 1, as the runner has it.
///
/// # Errors
///
/// When the linker has one of its functions.
pub fn add_to_linker<T: Send + 'static>(
    linker: &mut Linker<T>,
    context: impl Fn(&mut T) -> &mut WasiP1Ctx + Copy + Send + Sync + 'static,
) -> wasmtime::Result<()> {
    p1::add_to_linker_async(linker, context)?;
    linker.allow_shadowing(true);
    // The library's traps for codes of 126 and more; a process may exit with any.
    linker.func_wrap("wasi_snapshot_preview1", "proc_exit", |code: i32| -> wasmtime::Result<()> {
        Err(I32Exit(code).into())
    })?;
    guard::add_to_linker(linker, context)?;
    linker.allow_shadowing(false);
    Ok(())
}

/// The function that a command begins with.
///
/// # Errors
///
/// [`Error::NoStart`] if there is none.
pub fn start_function<T: 'static>(
    name: &str,
    instance: &Instance,
    store: &mut Store<T>,
) -> Result<wasmtime::TypedFunc<(), ()>, Error> {
    let no_start = |reason: &str| Error::NoStart { name: name.to_owned(), reason: reason.to_owned() };
    let Some(start) = instance.get_func(&mut *store, "_start") else {
        let reactor = instance.get_func(&mut *store, "_initialize").is_some();
        return Err(no_start(if reactor {
            "it exports _initialize and no _start: it is a library (reactor), not a program"
        } else {
            "it exports no function _start"
        }));
    };
    start.typed(&*store).map_err(|_| no_start("its _start has parameters or results"))
}

/// Tells an exit from a failure.
pub fn outcome(name: &str, error: &wasmtime::Error) -> Outcome {
    match error.downcast_ref::<I32Exit>() {
        Some(exit) => Outcome::Exited(exit.0),
        None => Outcome::Trapped(describe(name, error)),
    }
}

/// The reason on the first line, then one line for each active function of the module, the
/// innermost first: number, offset in the module, function.
fn describe(name: &str, error: &wasmtime::Error) -> String {
    let mut text = format!("{name}: {}", error.root_cause());
    let frames = error.downcast_ref::<WasmBacktrace>().map_or(&[][..], |backtrace| backtrace.frames());
    for (number, frame) in frames.iter().enumerate() {
        // Writing to a string does not fail.
        let _ = write!(text, "\n  {number:>3}: ");
        if let Some(offset) = frame.module_offset() {
            let _ = write!(text, "{offset:#8x} - ");
        }
        let _ = match frame.func_name() {
            Some(function) => write!(text, "{function}"),
            None => write!(text, "<function {}>", frame.func_index()),
        };
    }
    text
}
