//! `agent`: the daemon for agents, on this machine or in a container that runs.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use runx_core::agent::{PROGRAM, TOKENS};
use runx_core::bundle;
use runx_core::container::{Container, ExecOptions};
use runx_core::spec::{Process as ProcessSpec, Spec};
use runx_core::workload;

use super::exec::{enter, in_runcs_words};
use super::foreground::{self, Signals};
use crate::arguments::Agent;
use crate::{Context, Failure};

/// What decides who may ask it.
const OF_TOKENS: [&str; 4] = ["--access-token", "--access-token-file", "--generate-token", "--insecure"];

/// `runx agent`.
pub(crate) fn agent(context: &Context, agent: &Agent) -> Result<u8, Failure> {
    let program = beside(&context.executable)?;
    let Some(id) = &agent.container else {
        let failed = std::process::Command::new(&program).arg0(PROGRAM).args(&agent.flags).exec();
        return Err(failed).with_context(|| format!("execute {}", program.display())).map_err(Failure::from);
    };
    let runtime = context.runtime();
    let container = runtime.load(id)?;
    let description = describe(&container, agent)?;
    let signals = Signals::hold()?;
    let entered = enter(&container)?;
    let options = ExecOptions { entered, program: Some(workload::clone_program(&program)?), ..ExecOptions::default() };
    let mut process = runtime.exec(&container, &description, options).map_err(in_runcs_words)?;
    if let Err(e) = process.start() {
        process.discard();
        return Err(e.into());
    }
    Ok(foreground::wait(&process, &signals, None, None)?.code as u8)
}

fn beside(executable: &Path) -> Result<PathBuf> {
    let program = executable.with_file_name(PROGRAM);
    program.metadata().with_context(|| format!("{}: the agent lies beside runx", program.display()))?;
    Ok(program)
}

/// The container's own process with another command line.
fn describe(container: &Container, agent: &Agent) -> Result<ProcessSpec> {
    let config: Spec = bundle::parse_file(&container.state().config_path())?;
    let mut flags = Vec::new();
    let decides = |flag: &String| OF_TOKENS.contains(&flag.split('=').next().unwrap_or_default());
    if !agent.flags.iter().any(decides) {
        flags.extend(["--generate-token".to_owned(), TOKENS.to_owned()]);
    }
    flags.extend(agent.flags.iter().cloned());
    Ok(runx_core::agent::process(&config, flags)?)
}
