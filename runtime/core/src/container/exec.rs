//! A further process in a running container.

use std::borrow::Cow;
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};

use oci_spec::runtime::{Process as ProcessSpec, Spec};

use super::create::{OomScore, raise_limits};
use super::prepare::Table;
use super::{Born, Container, Process, Runtime, Status, process};
use crate::bundle;
use crate::cgroup::Cgroup;
use crate::error::{Context, Error, Result};
use crate::plan::{Gate, Plan, UserNamespace};
use crate::rootless;
use crate::spawn::Request;
use crate::workload::{self, limits::Limits};

/// How a process is to be made, beyond its description.
#[derive(Debug, Default)]
pub struct ExecOptions {
    /// Standard input, output and error; `None` keeps the caller's. Not used with a terminal.
    pub stdio: Option<[OwnedFd; 3]>,
    /// How many descriptors after the first three it inherits.
    pub preserve_fds: u32,
    /// Groups below the container's to be in instead.
    pub groups: Vec<Group>,
    /// In a paused container, wait until it is resumed.
    pub ignore_paused: bool,
    /// Who is told of the process.
    pub born: Option<Born>,
    /// This process is in the container's user namespace already: see [`crate::rootless`].
    pub entered: bool,
    /// What is executed, whatever the arguments call it, instead of a file of the root filesystem: see
    /// [`workload::clone_program`].
    pub program: Option<OwnedFd>,
}

/// A group below the container's own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// The version 1 controllers whose group this is; none for all, or for the one tree of version 2.
    pub controllers: Vec<String>,
    /// The path below the container's group.
    pub path: PathBuf,
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
            Status::Paused if options.ignore_paused => {}
            status => return Err(container.wrong_state("exec in", status)),
        }
        let init = container.first_process()?;
        let state = &container.state;
        let cgroup = group_below(&state.cgroup, &options.groups)?;
        let mut table = Table::default();
        let spec = with_defaults(spec, &state.config_path())?;
        let mut process = process::plan(&spec, &state.defaults, &mut table)?;
        let (initial_cpus, final_cpus) = process::affinity(&spec)?;
        process.scheduling.cpus = final_cpus.or_else(|| state.defaults.final_cpus.clone());
        process.preserve_fds = options.preserve_fds;
        process.program = options.program.map(|fd| table.add(fd));
        process.keyring = state.keyring.clone();
        process.stdio = options.stdio.map(|stdio| stdio.map(|fd| table.add(fd)));
        if let Some((program, flags)) = state.seccomp(&container.directory)? {
            process.seccomp = Some(process::add_filter(&program, flags, &mut table)?);
            process.seccomp_listener = state.seccomp_listener.is_some();
        }
        let in_user_namespace = state.namespaces & libc::CLONE_NEWUSER != 0;
        process.keep_groups = rootless::keeps_groups(Some(state.pid));
        let rlimits = process.rlimits.clone();
        let score = OomScore::of(&process, options.entered)?;
        // What bounds the container's own program is not for another one.
        let limits = Limits { address_space: process.address_space(), ..Limits::default() };
        let pid_namespace = init.try_clone().context("duplicate a pidfd")?;
        let namespaces = if options.entered { state.namespaces & !libc::CLONE_NEWUSER } else { state.namespaces };
        let join = vec![(table.add(init), namespaces)];
        let user_namespace = in_user_namespace.then_some(UserNamespace::Joined);
        let plan = Plan { hold: false, join, user_namespace, container: None, process, gate: Gate::Parent };
        let request = Request {
            plan,
            fds: table.into_fds(),
            namespaces: 0,
            cgroup: if options.groups.is_empty() { cgroup.birthplace_beside(state.pid) } else { cgroup.birthplace() }?,
            pid_namespace: Some(pid_namespace),
            mount_namespace: true,
            cpus: initial_cpus.or_else(|| state.defaults.initial_cpus.clone()),
            ..Request::default()
        };
        let spawned = self.spawner.spawn(request)?;
        if let Some(Born(tell)) = options.born {
            tell(spawned.pid);
        }
        let mut process = Process::of(spawned, limits);
        process.listener = state.seccomp_listener.clone().map(|listener| (listener, state.told(Status::Running)));
        let made = cgroup
            .enter(process.pid)
            .and_then(|()| state.rdt.as_ref().map_or(Ok(()), |rdt| rdt.join(process.pid)))
            .and_then(|()| score.set(process.pid))
            .and_then(|()| if in_user_namespace { raise_limits(process.pid, &rlimits) } else { Ok(()) })
            .and_then(|()| self.converse(&mut process, &[], None));
        match made {
            Ok(()) => Ok(process),
            Err(e) => {
                process.discard();
                Err(beside_module(e, &state.config_path()))
            }
        }
    }
}

/// Says of a program that is missing in a container whose own program is a module why that is to be expected.
fn beside_module(error: Error, config: &Path) -> Error {
    let Error::Program { program, reason, missing: true } = error else { return error };
    let spec: Option<Spec> = bundle::parse_file(config).ok();
    let args = spec.as_ref().and_then(|spec| spec.process().as_ref()?.args().as_ref());
    let module = args.and_then(|args| args.first()).filter(|name| workload::has_module_name(Path::new(name)));
    let reason = match module {
        Some(module) => format!(
            "{reason}; the container runs a WASM module, {module}, and an exec is for programs that its root filesystem holds"
        ),
        None => reason,
    };
    Error::Program { program, reason, missing: true }
}

/// Capabilities and limits that a description leaves out are those of the container's first process, as runc
/// has it.
fn with_defaults<'a>(spec: &'a ProcessSpec, config: &Path) -> Result<Cow<'a, ProcessSpec>> {
    let no_limits = spec.rlimits().as_ref().is_none_or(Vec::is_empty);
    if spec.capabilities().is_some() && !no_limits {
        return Ok(Cow::Borrowed(spec));
    }
    let config: Spec = bundle::parse_file(config)?;
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

/// The container's cgroups with some replaced by groups below them.
fn group_below<'a>(cgroup: &'a Cgroup, groups: &[Group]) -> Result<Cow<'a, Cgroup>> {
    let mut cgroup = Cow::Borrowed(cgroup);
    for Group { controllers, path } in groups {
        let below = path.strip_prefix("/").unwrap_or(path);
        if below.components().any(|part| !matches!(part, Component::Normal(_) | Component::CurDir)) {
            return Err(Error::unsupported(
                format!("cgroup {path:?}"),
                "bad sub cgroup path: it leaves the container's",
            ));
        }
        let mut unknown = controllers.clone();
        match cgroup.to_mut() {
            Cgroup::V1 { directories, .. } => {
                for directory in directories {
                    let named = |controller: &String| directory.controllers.contains(controller);
                    if controllers.is_empty() || controllers.iter().any(named) {
                        unknown.retain(|controller| !named(controller));
                        directory.path.push(below);
                    }
                }
            }
            Cgroup::V2 { path, .. } => path.push(below),
            Cgroup::None => {
                return Err(Error::unsupported(format!("cgroup {path:?}"), "the container has no cgroup of its own"));
            }
        }
        if let Some(controller) = unknown.first() {
            return Err(Error::unsupported(format!("cgroup {controller}:{}", path.display()), "unknown controller"));
        }
    }
    Ok(cgroup)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cgroup::Directory;

    fn group(controllers: &[&str], path: &str) -> Group {
        Group { controllers: controllers.iter().map(|name| (*name).to_owned()).collect(), path: path.into() }
    }

    #[test]
    fn groups_are_below_the_containers_own() {
        let directory = |controllers: &[&str], path: &str| Directory {
            controllers: controllers.iter().map(|name| (*name).to_owned()).collect(),
            path: path.into(),
        };
        let own = vec![directory(&["cpu", "cpuacct"], "/c/a"), directory(&["memory"], "/m/a")];
        let own = Cgroup::V1 { directories: own, unit: None };
        let paths = |groups: &[Group]| {
            group_below(&own, groups)
                .map(|cgroup| cgroup.paths().iter().map(|p| p.display().to_string()).collect::<Vec<_>>())
        };
        assert_eq!(paths(&[]).unwrap(), ["/c/a", "/m/a"]);
        assert_eq!(paths(&[group(&["cpu", "cpuacct"], "/x/y")]).unwrap(), ["/c/a/x/y", "/m/a"]);
        assert_eq!(paths(&[group(&[], "x")]).unwrap(), ["/c/a/x", "/m/a/x"]);
        for bad in [group(&[], ".."), group(&["memory"], "x/../../y"), group(&["whaat"], "/")] {
            assert!(paths(std::slice::from_ref(&bad)).is_err(), "{bad:?}");
        }
        let own = Cgroup::V2 { path: "/c/a".into(), unit: None };
        let below = |group: Group| group_below(&own, &[group]).map(|cgroup| cgroup.paths()[0].to_owned());
        assert_eq!(below(group(&[], "x")).unwrap(), Path::new("/c/a/x"));
        assert!(below(group(&["cpu"], "x")).is_err());
    }
}
