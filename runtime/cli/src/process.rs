//! `runx process`: a native program without an image, watched as modules are.

use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::Context as _;

use crate::arguments::{Process, Program};
use crate::instances::{self, Group};
use crate::{Context, Failure};

/// Exit codes of what could not be started, a shell's.
const NOT_FOUND: u8 = 127;
const NOT_STARTED: u8 = 126;

/// `runx process …`.
pub(crate) fn process(context: &Context, command: &Process) -> Result<u8, Failure> {
    match command {
        Process::Run(program) => run(context, program),
        Process::Instances(command) => instances::instances(context, Group::Processes, command),
    }
}

fn run(context: &Context, program: &Program) -> Result<u8, Failure> {
    let mut command = Command::new(&program.file);
    command.args(&program.args).env_clear().envs(program.variables());
    // To find programs by their names takes a PATH, here and in there.
    if !program.variables().any(|(name, _)| name == "PATH")
        && let Some(path) = std::env::var_os("PATH")
    {
        command.env("PATH", path);
    }
    if let Some(cwd) = &program.cwd {
        command.current_dir(cwd);
    }
    if program.detach {
        return instances::background(context, Group::Processes, program, command, program.timeout);
    }
    let code = |error: &std::io::Error| {
        if error.kind() == std::io::ErrorKind::NotFound { NOT_FOUND } else { NOT_STARTED }
    };
    if !program.hooks.is_empty() || program.timeout.is_some() {
        return instances::foreground(program, command, program.timeout).map_err(|failure| {
            let of_start = failure.error.downcast_ref::<std::io::Error>().map(code);
            Failure { code: of_start.unwrap_or(failure.code), ..failure }
        });
    }
    let error = command.exec();
    let code = code(&error);
    let error = Err::<(), _>(error).with_context(|| format!("run {}", program.file.display()));
    Err(Failure { error: error.err().unwrap_or_else(|| anyhow::anyhow!("exec returned")), code })
}
