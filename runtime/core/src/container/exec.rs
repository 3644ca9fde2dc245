//! A further process in a running container.

use std::borrow::Cow;
use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;

use oci_spec::runtime::{Process as ProcessSpec, Spec};

use super::create::{set_limits, set_oom_score};
use super::prepare::Table;
use super::{Container, Process, Runtime, Status, process};
use crate::bundle;
use crate::cgroup::Cgroup;
use crate::error::{Context, Result};
use crate::plan::{Gate, Plan, UserNamespace};
use crate::spawn::Request;
use crate::sys;

/// How a process is to be made, beyond its description.
#[derive(Debug, Default)]
pub struct ExecOptions {
    /// Standard input, output and error; `None` keeps the caller's. Not used with a terminal.
    pub stdio: Option<[OwnedFd; 3]>,
    /// How many descriptors after the first three it inherits.
    pub preserve_fds: u32,
}

impl Runtime {
    /// Makes a process in the container's namespaces and cgroups. Its program has not started when this
    /// returns; [`Process::start`] does that.
    ///
    /// # Errors
    /// [`crate::Error::WrongState`] unless the container is created or running.
    pub fn exec(&self, container: &Container, spec: &ProcessSpec, options: ExecOptions) -> Result<Process> {
        bundle::check_process(spec)?;
        match container.status() {
            Status::Running | Status::Created => {}
            status => return Err(container.wrong_state("exec in", status)),
        }
        let init = container.init()?;
        let state = &container.state;
        let mut table = Table::default();
        let spec = with_defaults(spec, &state.bundle)?;
        let mut process = process::plan(&spec, &state.defaults, &mut table)?;
        let (initial_cpus, final_cpus) = process::affinity(&spec)?;
        process.scheduling.cpus = final_cpus.or_else(|| state.defaults.final_cpus.clone());
        process.preserve_fds = options.preserve_fds;
        process.keyring = state.keyring.clone();
        process.stdio = options.stdio.map(|stdio| stdio.map(|fd| table.add(fd)));
        if let Some((program, flags)) = state.seccomp(&container.directory)? {
            process.seccomp = Some(process::add_filter(&program, flags, &mut table)?);
            process.seccomp_listener = state.seccomp_listener.is_some();
        }
        let in_user_namespace = state.namespaces & libc::CLONE_NEWUSER != 0;
        let rlimits = process.rlimits.clone();
        let oom_score_adj = process.oom_score_adj;
        let address_space = process.address_space();
        let pid_namespace = init.try_clone().context("duplicate a pidfd")?;
        let join = vec![(table.add(init), state.namespaces)];
        let user_namespace = in_user_namespace.then_some(UserNamespace::Joined);
        let plan = Plan { hold: false, join, user_namespace, container: None, process, gate: Gate::Parent };
        let mut request = Request {
            plan,
            fds: table.into_fds(),
            namespaces: 0,
            cgroup: state.cgroup.birthplace()?,
            pid_namespace: Some(pid_namespace),
            mount_namespace: true,
            cpus: initial_cpus.or_else(|| state.defaults.initial_cpus.clone()),
            ..Request::default()
        };
        if let Cgroup::V2 { path } = &state.cgroup
            && delegated(path)
        {
            // Processes cannot be born in a group that has given its controllers away.
            request.cgroup = own_group_of(state.pid)?;
        }
        let mut process = Process::of(self.spawner.spawn(request)?, address_space);
        process.listener = state.seccomp_listener.clone().map(|listener| (listener, state.told(Status::Running)));
        let made = state
            .cgroup
            .join(process.pid)
            .and_then(|()| state.rdt.as_ref().map_or(Ok(()), |rdt| rdt.join(process.pid)))
            .and_then(|()| set_oom_score(process.pid, oom_score_adj))
            .and_then(|()| if in_user_namespace { set_limits(process.pid, &rlimits) } else { Ok(()) })
            .and_then(|()| self.converse(&mut process, None));
        match made {
            Ok(()) => Ok(process),
            Err(e) => {
                process.discard();
                Err(e)
            }
        }
    }
}

/// Capabilities and limits that a description leaves out are those of the container's first process, as runc
/// has it.
fn with_defaults<'a>(spec: &'a ProcessSpec, bundle: &Path) -> Result<Cow<'a, ProcessSpec>> {
    let no_limits = spec.rlimits().as_ref().is_none_or(Vec::is_empty);
    if spec.capabilities().is_some() && !no_limits {
        return Ok(Cow::Borrowed(spec));
    }
    let config: Spec = bundle::parse_file(&bundle.join("config.json"))?;
    let Some(first) = config.process() else { return Ok(Cow::Borrowed(spec)) };
    let mut spec = spec.clone();
    if spec.capabilities().is_none() {
        spec.set_capabilities(first.capabilities().clone());
    }
    if no_limits {
        spec.set_rlimits(first.rlimits().clone());
    }
    Ok(Cow::Owned(spec))
}

fn delegated(path: &Path) -> bool {
    fs::read_to_string(path.join("cgroup.subtree_control")).is_ok_and(|controllers| !controllers.trim().is_empty())
}

/// The version 2 cgroup that a process is in.
fn own_group_of(pid: i32) -> Result<Option<OwnedFd>> {
    let path = format!("/proc/{pid}/cgroup");
    let text = fs::read_to_string(&path).on("read", &path)?;
    let Some(own) = text.lines().find_map(|line| line.strip_prefix("0::/")) else { return Ok(None) };
    let directory = Path::new("/sys/fs/cgroup").join(own);
    sys::open(&directory, libc::O_PATH | libc::O_DIRECTORY).on("open cgroup", &directory).map(Some)
}
