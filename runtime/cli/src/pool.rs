//! `runx pool`: sandboxes of `runx-pool` on a command line.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::path::Path;

use anyhow::{Context as _, anyhow};
use runx_core::workload;
use runx_pool::{Input, Limits, Outcome, Output, Pool, Settings, Status, Template};
use serde_json::json;

use crate::arguments::{ListFormat, Pool as Asked, PoolExec};
use crate::{Context, Failure, print};

/// Exit codes of what could not be started, a shell's.
const NOT_FOUND: u8 = 127;
const NOT_STARTED: u8 = 126;

/// `runx pool …`.
pub(crate) fn pool(context: &Context, asked: &Asked) -> Result<u8, Failure> {
    match asked {
        Asked::Serve { flags } => {
            let program = context.executable.with_file_name("runx-pool-server");
            let failed = std::process::Command::new(&program).args(flags).exec();
            Err(failed).with_context(|| format!("execute {}", program.display())).map_err(Failure::from)
        }
        Asked::Exec(exec) => run(context, exec),
        Asked::Stat { format } => stat(*format),
    }
}

fn run(context: &Context, exec: &PoolExec) -> Result<u8, Failure> {
    let mut template = match &exec.rootfs {
        Some(rootfs) => Template::directory(std::path::absolute(rootfs).context("--rootfs")?),
        None => Template::host(),
    };
    template.tier = exec.tier;
    template.network = exec.network;
    template.filter = exec.filter;
    template.binds.extend(exec.binds.iter().cloned());
    template.memory = exec.memory.or(template.memory);
    template.processes = exec.processes.or(template.processes);
    // One, when it is asked for.
    let settings = Settings { size: 0, burst: 1, ..Settings::default() };
    let pool = Pool::new(template, settings)?;
    let mut lease = pool.acquire()?;
    let limits = Limits { cpu: exec.cpu, wall: exec.wall, ..Limits::default() };
    let command = match module(exec)? {
        Some(file) => {
            let limits = Limits { memory: exec.memory, ..limits };
            runx_pool::Command::module(&exec.program, &file, &context.wasm(), limits)?
        }
        None => runx_pool::Command::new(&exec.program).limits(limits),
    };
    let mut command = command
        .args(&exec.args)
        .stdin(Input::Fd(duplicate(std::io::stdin())?))
        .stdout(Output::Fd(duplicate(std::io::stdout())?))
        .stderr(Output::Fd(duplicate(std::io::stderr())?));
    for variable in &exec.env {
        match (variable.split_once('='), std::env::var_os(variable)) {
            (Some((name, value)), _) => command = command.env(name, value),
            (None, Some(value)) => command = command.env(variable, value),
            (None, None) => {}
        }
    }
    if let Some(cwd) = &exec.cwd {
        command = command.directory(cwd);
    }
    let outcome = lease.run(command)?;
    drop(lease);
    drop(pool);
    if exec.json {
        eprintln!("{}", describe(&outcome));
    } else if let Some(error) = &outcome.error {
        let code = if error.contains("No such file") { NOT_FOUND } else { NOT_STARTED };
        return Err(Failure { error: anyhow!("run {}: {error}", exec.program), code });
    } else if !matches!(outcome.status, Status::Accepted | Status::NonZeroExitStatus) {
        eprintln!("runx: {}", outcome.status);
    }
    Ok(code(&outcome))
}

/// A WASM module of this machine: a program whose name is that of one.
fn module(exec: &PoolExec) -> anyhow::Result<Option<std::fs::File>> {
    if !workload::has_module_name(Path::new(&exec.program)) {
        return Ok(None);
    }
    let opened = std::fs::File::open(&exec.program);
    opened.map(Some).with_context(|| format!("open module {}", exec.program))
}

fn duplicate(stream: impl AsFd) -> anyhow::Result<OwnedFd> {
    stream.as_fd().try_clone_to_owned().context("duplicate a standard stream")
}

/// The program's own, and never 0 for one that was not accepted.
fn code(outcome: &Outcome) -> u8 {
    match (outcome.status, outcome.code()) {
        (Status::Accepted, _) => 0,
        (Status::InternalError | Status::FileError, _) => NOT_STARTED,
        (_, 0) => 1,
        (_, code) => u8::try_from(code).unwrap_or(u8::MAX),
    }
}

fn describe(outcome: &Outcome) -> serde_json::Value {
    json!({
        "status": outcome.status.name(),
        "exitCode": outcome.exit_code,
        "signal": outcome.signal,
        "cpuNanoseconds": outcome.cpu.as_nanos() as u64,
        "wallNanoseconds": outcome.wall.as_nanos() as u64,
        "memoryBytes": outcome.memory,
        "processes": outcome.processes,
        "error": outcome.error,
    })
}

fn stat(format: ListFormat) -> Result<u8, Failure> {
    let stat = runx_pool::stat();
    if format == ListFormat::Json {
        let text = json!({
            "kernel": stat.kernel,
            "root": stat.root,
            "userNamespaces": stat.user_namespaces,
            "namespaces": stat.namespaces,
            "cgroups": stat.cgroups,
            "memoryLimits": stat.memory_limits,
            "processLimits": stat.process_limits,
            "mounts": stat.mounts,
            "processors": stat.processors,
        });
        return print(&format!("{text:#}\n"));
    }
    let users = match (stat.user_namespaces, stat.root) {
        (None, _) => "none: the kernel allows no user namespaces".to_owned(),
        (Some(_), true) => "an id of its own for each sandbox, in a user namespace".to_owned(),
        (Some(_), false) => "yours for all sandboxes, in a user namespace: only root has others".to_owned(),
    };
    let limit = |group: bool, otherwise: &str| if group { "by cgroup".to_owned() } else { otherwise.to_owned() };
    let lines = [
        ("kernel", stat.kernel),
        ("processors", stat.processors.to_string()),
        ("user ids", users),
        ("namespaces", format!("{} of each kind", stat.namespaces)),
        ("cgroups", stat.cgroups),
        ("memory", limit(stat.memory_limits, "the data of each process is limited, by rlimit")),
        ("processes", limit(stat.process_limits, "those of a user id are limited, by rlimit")),
        ("mounts", format!("{} here, of which a spawner keeps none", stat.mounts)),
    ];
    print(&lines.map(|(name, value)| format!("{name:12}{value}\n")).concat())
}
