//! From a file to the program that runs it.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use runx_core::sys;
use runx_core::workload::Kind;
use runx_core::workload::cache::Form;
use runx_image::Store;

use crate::arguments::Program;
use crate::instances::{self, Group};
use crate::{Context, Failure};

/// Exit code of what could not be started, a shell's.
const NOT_STARTED: u8 = 126;

/// The command that runs a module or component, which is compiled if that has not been done yet, with the artifact that
/// it inherits.
fn command(context: &Context, program: &Program, verb: &str) -> Result<(Command, [OwnedFd; 2])> {
    let (mut command, artifact) = prepare(
        context,
        &program.file,
        verb,
        Form { fuel: program.fuel.is_some(), pulley: program.pulley, ..Form::default() },
    )?;
    command.env_clear();
    let mut flag = |name: &str, value: Option<String>| {
        if let Some(value) = value {
            command.args([name, &value]);
        }
    };
    flag("--fuel", program.fuel.map(|fuel| fuel.to_string()));
    flag("--memory", program.memory.map(|memory| memory.to_string()));
    flag("--timeout", program.timeout.map(|timeout| timeout.as_millis().to_string()));
    flag("--network", program.network.then(|| "host".to_owned()));
    flag("--invoke", program.invoke.clone());
    flag("--addr", program.address.clone());
    flag("--metrics", program.metrics.clone());
    flag("--engine", program.pulley.then(|| "pulley".to_owned()));
    for port in &program.ports {
        flag("--port", Some(port.to_string()));
    }
    for directory in &program.directories {
        flag("--dir", Some(directory.clone()));
    }
    // They may be secrets, and everybody can read arguments.
    let variables: String = program.variables().map(|(name, value)| format!("{name}={value}\0")).collect();
    let environment = sys::sealed_memfd(c"runx-environment", variables.as_bytes()).context("hand variables over")?;
    sys::set_cloexec(environment.as_fd(), false).context("hand variables over")?;
    flag("--env-fd", Some(environment.as_raw_fd().to_string()));
    // Its own name is that of the file, as with wasmtime: where that lies is the host's business.
    command.arg("--").arg(program.file.file_name().unwrap_or(program.file.as_os_str())).args(&program.args);
    Ok((command, [artifact.into(), environment]))
}

fn prepare(context: &Context, file: &Path, verb: &str, form: Form) -> Result<(Command, File)> {
    let name = file.to_string_lossy();
    let module = open(context, file)?;
    let kind = Kind::of(&module).with_context(|| format!("read {name}"))?;
    let (host, artifact) = context.wasm().prepare_for_host(&name, &module, form)?;
    sys::set_cloexec(artifact.as_fd(), false).context("hand the artifact over")?;
    let mut command = Command::new(host);
    command.args([verb, "--artifact", &artifact.as_raw_fd().to_string()]);
    command.args(["--kind", if kind == Kind::Component { "component" } else { "module" }]);
    Ok((command, artifact))
}

/// Opens a module: a file, or else what an image of this name in the store holds.
fn open(context: &Context, file: &Path) -> Result<File> {
    let name = file.to_string_lossy();
    let missing = match File::open(file) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => e,
        other => return other.with_context(|| format!("open {name}")),
    };
    let root = context.global.storage_root();
    // Nothing is made only because somebody mistyped a file's name.
    let image = if root.join("storage").is_dir() { Store::open(&root)?.find(&name).ok().flatten() } else { None };
    let Some(image) = image else {
        return Err(missing).with_context(|| format!("open {name}, a file or an image of \"runx storage ls\""));
    };
    let Some(path) = Store::open(&root)?.module(&image)? else {
        bail!("the image {name} is not a WASM module: \"runx container run {name}\" runs it");
    };
    File::open(&path).with_context(|| format!("open the module of image {name}"))
}

/// Becomes the program that runs it, or watches it where that is asked for.
pub(super) fn execute(context: &Context, program: &Program, verb: &str) -> Result<u8, Failure> {
    let not_started = |error: anyhow::Error| Failure { error, code: NOT_STARTED };
    let (mut command, _inherited) = command(context, program, verb).map_err(not_started)?;
    // The deadline is the program's own: it ends by itself.
    if program.detach {
        return instances::background(context, Group::Modules, program, command, None);
    }
    if !program.hooks.is_empty() {
        return instances::foreground(program, command, None);
    }
    Err(not_started(anyhow::Error::from(command.exec()).context("run the program for modules")))
}

/// `runx wasm inspect`.
pub(super) fn inspect(context: &Context, file: &Path) -> Result<u8, Failure> {
    let (mut command, _artifact) = prepare(context, file, "inspect", Form::default())?;
    command.arg("--").arg(file);
    Err(command.exec()).context("run the program for modules").map_err(Failure::from)
}
