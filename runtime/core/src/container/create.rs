//! Making a container, up to the point where its program could start.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use oci_spec::runtime::{Linux, LinuxIdMapping};

use super::listener::Listener;
use super::mounts;
use super::net_devices;
use super::prepare::{self, Namespaces, Surroundings, Table};
use super::process::{self, Defaults};
use super::state::{self, State, Status};
use super::users;
use super::{Born, Container, Process, Runtime, remove_directory};
use crate::bundle::Bundle;
use crate::cgroup::{self, Cgroup, Layout};
use crate::error::{Context, Error, Result};
use crate::hooks::{self, HookState, Hooks};
use crate::plan::{Gate, Plan, ProcessPlan, UserNamespace};
use crate::rdt::Rdt;
use crate::rootless;
use crate::seccomp::Program;
use crate::spawn::handshake::{FromChild, ToChild};
use crate::spawn::{Request, Spawned};
use crate::workload::limits::Limits;
use crate::workload::provided::ModuleSource;
use crate::workload::{self, WasmConfig};

/// How a container is to be made, beyond its config.json.
#[derive(Debug, Default)]
pub struct CreateOptions {
    /// Standard input, output and error; `None` keeps the caller's. Not used with a terminal.
    pub stdio: Option<[OwnedFd; 3]>,
    /// Anybody with access to the state may start it, after this process is gone. Otherwise it is
    /// started by [`Process::start`], and ends with this process.
    pub detached_start: bool,
    /// How many descriptors after the first three it inherits.
    pub preserve_fds: u32,
    /// Enter the root without pivot_root.
    pub no_pivot: bool,
    /// Keep the caller's session keyring.
    pub no_new_keyring: bool,
    /// Let systemd make the cgroup.
    pub systemd_cgroup: bool,
    /// Make the directory of [`Runtime::notify_directory`], which the configuration mounts.
    pub notify: bool,
    /// The absolute path of the configuration, if it is not config.json in the bundle. Execs read it again.
    pub config: Option<PathBuf>,
    /// Who is told of its process.
    pub born: Option<Born>,
    /// This process is in the container's user namespace already: see [`crate::rootless`].
    pub entered: bool,
    /// Whether it goes without a cgroup where none may be made and nothing needs one; `None` leaves that to who this
    /// process is.
    pub lenient: Option<bool>,
    /// Where its program may be when the root filesystem does not hold it.
    pub modules: Option<Box<dyn ModuleSource>>,
}

impl Runtime {
    /// Makes the container `id` from `bundle`. Its program has not started when this returns.
    ///
    /// # Errors
    /// Everything that can be wrong with a bundle, and the kernel's refusals; nothing is left behind.
    pub fn create(&self, id: &str, bundle: &Bundle, options: CreateOptions) -> Result<(Container, Process)> {
        let systemd = options.systemd_cgroup;
        self.in_new_directory(id, bundle, systemd, |layout, cgroup, directory| {
            self.create_locked(id, bundle, options, layout, cgroup, directory)
        })
    }

    /// Lets `make` make the container `id` in a directory of its own, which it holds the lock of, and removes that if it
    /// fails. It is told where the cgroups are to be.
    pub(super) fn in_new_directory<T>(
        &self,
        id: &str,
        bundle: &Bundle,
        systemd_cgroup: bool,
        make: impl FnOnce(&'static Layout, Cgroup, &Path) -> Result<T>,
    ) -> Result<T> {
        let directory = self.directory(id)?;
        let layout = Layout::of_this_machine()?;
        let path = bundle.linux()?.cgroups_path().as_deref().filter(|path| !path.as_os_str().is_empty());
        let cgroup = cgroup::place(layout, path, id, systemd_cgroup)?;
        state::make_directory(&self.root, &directory, id)?;
        // A `delete --force` may come in between, and even another create after it: then this directory is
        // the other one's.
        let _lock = state::lock(&directory, id).inspect_err(|_| drop(fs::remove_dir(&directory)))?;
        if directory.join(state::STATE_FILE).exists() {
            return Err(Error::AlreadyExists(id.to_owned()));
        }
        let made = make(layout, cgroup, &directory);
        if made.is_err()
            && let Err(left) = remove_directory(&directory)
        {
            log::warn!("after a container {id} that could not be made: {left}");
        }
        made
    }

    fn create_locked(
        &self,
        id: &str,
        bundle: &Bundle,
        options: CreateOptions,
        layout: &Layout,
        cgroup: Cgroup,
        directory: &Path,
    ) -> Result<(Container, Process)> {
        let linux = bundle.linux()?;
        let mut table = Table::default();
        let namespaces = prepare::namespaces(bundle, options.entered, &mut table)?;
        let hooks = Hooks::of(bundle.spec())?;
        let filter = process::filter(linux.seccomp().as_ref(), &self.root.join(".seccomp"))?;
        let keyring = (!options.no_new_keyring).then(|| format!("_ses.{id}"));
        let mut state = State::new(id, bundle, options.config, cgroup, filter.as_ref(), &hooks, &namespaces, keyring)?;
        if options.notify {
            let notify = directory.join(state::NOTIFY);
            fs::DirBuilder::new().mode(0o755).create(&notify).on("create", notify)?;
        }
        let lenient = options.lenient.unwrap_or_else(rootless::is_unprivileged);
        let settings = cgroup::Settings::of(id, bundle.spec(), lenient).kept_by_caller(options.entered);
        // With version 2 a process is born in its cgroup; with version 1 the cgroups are made and joined while it
        // already works. The state is on disk before the first of them: from there on, `delete` finds what a killed
        // create leaves.
        let early = lenient || matches!(layout, Layout::V2 { .. });
        if early {
            state.write(directory)?;
            if let Some(instead) = state.cgroup.make(&settings)? {
                state.cgroup = instead;
            }
        }
        let mut cleanup = Cleanup::of(&state.cgroup, state.rdt.as_ref(), settings, early);
        if early {
            state.cgroup.configure(&settings)?;
        }
        let (moved, net_devices): (Vec<_>, Vec<_>) = net_devices::find(linux)?.into_iter().unzip();
        let around = Surroundings {
            net_devices,
            namespaces: &namespaces,
            layout,
            cgroup: &state.cgroup,
            spawner: &self.spawner,
            hooks: &hooks,
            hook_state: state.told(Status::Creating),
            no_pivot: options.no_pivot,
        };
        let container = prepare::container(bundle, around, &mut table)?;
        let views = mounts::bound_views(&container.mounts);
        let mut process = process::plan(bundle.process()?, &state.defaults, &mut table)?;
        process.preserve_fds = options.preserve_fds;
        process.make_cwd = true;
        process.ask_for_module = options.modules.is_some();
        process.keyring = state.keyring.clone();
        process.stdio = options.stdio.map(|stdio| stdio.map(|fd| table.add(fd)));
        if let Some(filter) = &filter {
            process.seccomp = Some(process::add_filter(&filter.instructions, filter.flags, &mut table)?);
            process.seccomp_listener = filter.asks_listener;
            state::write_seccomp(directory, &filter.instructions)?;
        }
        process.keep_groups = rootless::keeps_groups(None);
        let rlimits = process.rlimits.clone();
        let score = OomScore::of(&process, options.entered)?;
        let limits = Limits::of(bundle.spec(), process.address_space())?;
        let gate = if options.detached_start {
            Gate::Listener(table.add(state::listen_gate(directory)?))
        } else {
            state::close_gate(directory)?;
            Gate::Parent
        };
        let user_namespace = namespaces.user;
        let plan =
            Plan { hold: false, join: namespaces.join, user_namespace, container: Some(container), process, gate };
        let request = Request {
            plan,
            fds: table.into_fds(),
            namespaces: namespaces.new,
            cgroup: state.cgroup.birthplace()?,
            pid_namespace: namespaces.pid,
            first: namespaces.first,
            host_mounts: hooks.before_pivot(),
            ..Request::default()
        };
        let spawned = self.spawner.spawn(request)?;
        if let Some(Born(tell)) = options.born {
            tell(spawned.pid);
        }
        let mut process = Process::of(spawned, limits);
        process.modules = options.modules;
        process.listener = state
            .seccomp_listener
            .clone()
            .map(|listener| (listener, HookState { pid: process.pid, ..state.told(Status::Creating) }));
        let mut set_up = || -> Result<Vec<OwnedFd>> {
            if user_namespace == Some(UserNamespace::New) {
                let mappings = |list: &Option<Vec<LinuxIdMapping>>| list.clone().unwrap_or_default();
                users::write_maps(process.pid, &mappings(linux.uid_mappings()), &mappings(linux.gid_mappings()))?;
                process.tell(&ToChild::Mapped)?;
            }
            if user_namespace.is_some() {
                raise_limits(process.pid, &rlimits)?;
            }
            if !early {
                state.write(directory)?;
                cleanup.make()?;
            }
            state.cgroup.join(process.pid, &settings)?;
            if let (Some(rdt), Some(spec)) = (&state.rdt, linux.intel_rdt()) {
                rdt.set_up(spec)?;
                rdt.join(process.pid)?;
            }
            net_devices::move_all(&moved, process.pid)?;
            score.set(process.pid)?;
            mounts::open_views(&views, &state.cgroup, layout)
        };
        let pid = process.pid;
        let run_hooks = || -> Result<()> {
            let told = HookState { pid, ..state.told(Status::Creating) };
            hooks::run_all("prestart", &hooks.prestart, &told, &state.bundle)?;
            hooks::run_all("createRuntime", &hooks.create_runtime, &told, &state.bundle)
        };
        let set_up = set_up().and_then(|views| self.converse(&mut process, &views, Some(&run_hooks)));
        process.modules = None;
        let made = set_up.and_then(|()| {
            let start_time = crate::sys::process::start_time(process.pid)
                .ok_or_else(|| Error::Died("it ended while it was being set up".into()))?;
            let state = State { pid: process.pid, start_time, ..state.clone() };
            state.write(directory)?;
            if options.detached_start {
                process.release()?;
            }
            Ok(state)
        });
        match made {
            Ok(state) => {
                cleanup.disarm();
                Ok((Container { directory: directory.to_owned(), state }, process))
            }
            Err(e) => {
                process.discard();
                hooks::run_each("poststop", &hooks.poststop, &state.told(Status::Stopped), &state.bundle);
                Err(e)
            }
        }
    }

    /// Accompanies a process through its setup until it is ready. `views` show its cgroups; `hooks` is what it waits
    /// for before pivot_root.
    pub(super) fn converse(
        &self,
        process: &mut Process,
        views: &[OwnedFd],
        hooks: Option<&dyn Fn() -> Result<()>>,
    ) -> Result<()> {
        let Some(handshake) = &process.handshake else {
            return Err(Error::Died("there is no handshake".into()));
        };
        let views: Vec<_> = views.iter().map(AsFd::as_fd).collect();
        tell(handshake, &ToChild::InCgroup, &views)?;
        loop {
            let heard = handshake.receive::<FromChild>().context("hear from the container's process")?;
            let Some((message, fds)) = heard else {
                let end = process.wait().map(|exit| format!("exit code {}", exit.code));
                return Err(Error::Died(end.unwrap_or_else(|e| e.to_string())));
            };
            match message {
                FromChild::Ready => return Ok(()),
                FromChild::Failed(failure) => return Err(failure.into()),
                FromChild::BeforePivot => {
                    if let Some(hooks) = hooks {
                        hooks()?;
                    }
                    tell(handshake, &ToChild::HooksRun, &[])?;
                }
                FromChild::Listener { number } => match &process.listener {
                    Some((listener, state)) => listener.serve(handshake, process.pidfd.as_fd(), number, state)?,
                    None => return Err(Error::Died("it asked for a seccomp listener that it has not".into())),
                },
                FromChild::Terminal => process.terminal = fds.into_iter().next(),
                FromChild::Module { name } => {
                    let module = fds.into_iter().next().map(fs::File::from);
                    let module = module.ok_or_else(|| Error::Died("the module's descriptor is missing".into()))?;
                    run_module(&self.wasm, &name, workload::Module::File(&module), &process.limits, handshake)?;
                    process.is_module = true;
                }
                FromChild::Missing { name } => {
                    let found = process.modules.as_ref().map_or(Ok(None), |modules| modules.find());
                    match found {
                        Ok(None) => tell(handshake, &ToChild::NoModule { why: None }, &[])?,
                        Ok(Some(module)) => {
                            let module = workload::Module::Provided(&*module);
                            run_module(&self.wasm, &name, module, &process.limits, handshake)?;
                            process.is_module = true;
                        }
                        Err(e) => {
                            let why = format!("whether the image is a WASM artifact is not known: {e}");
                            tell(handshake, &ToChild::NoModule { why: Some(why) }, &[])?;
                        }
                    }
                }
            }
        }
    }
}

/// Answers with what runs a module.
fn run_module(
    wasm: &WasmConfig,
    name: &str,
    module: workload::Module<'_>,
    limits: &Limits,
    handshake: &crate::spawn::handshake::Handshake,
) -> Result<()> {
    match wasm.prepare(name, module, limits) {
        Ok((runner, artifact, words)) => {
            tell(handshake, &ToChild::Runner { words }, &[runner.as_fd(), artifact.as_fd()])
        }
        Err(e) => {
            let _ = handshake.send(&ToChild::NoRunner, &[]);
            Err(e)
        }
    }
}

fn tell(
    handshake: &crate::spawn::handshake::Handshake,
    message: &ToChild,
    fds: &[std::os::fd::BorrowedFd<'_>],
) -> Result<()> {
    match handshake.send(message, fds) {
        // Why it went away is in what it said before.
        Err(e) if e.raw_os_error() == Some(libc::EPIPE) => Ok(()),
        other => other.context("tell the container's process"),
    }
}

/// `process.oomScoreAdj`.
pub(super) enum OomScore {
    /// There is none, or the process will inherit it.
    Settled {
        /// Until it has.
        _lent: Option<rootless::Lent>,
    },
    /// To be set once there is the process.
    Pending(i32),
}

impl OomScore {
    /// What is to be done, before there is the process. One whose creator has `entered` its user namespace is out of
    /// his reach in /proc.
    pub(super) fn of(process: &ProcessPlan, entered: bool) -> Result<Self> {
        Ok(match process.oom_score_adj {
            Some(adjustment) if !entered => Self::Pending(adjustment),
            lent => Self::Settled { _lent: lent.map(rootless::Lent::lend).transpose()? },
        })
    }

    /// Adjusts a process that is still in our hands, from outside: what /proc shows inside is not trusted.
    pub(super) fn set(&self, pid: i32) -> Result<()> {
        let Self::Pending(adjustment) = self else { return Ok(()) };
        fs::write(format!("/proc/{pid}/oom_score_adj"), adjustment.to_string())
            .with_context(|| format!("set process.oomScoreAdj to {adjustment}"))
    }
}

/// Raises the hard limits of a process in a user namespace, which may not do that by itself. The rest it does, when
/// it needs no more than they allow.
pub(super) fn raise_limits(pid: i32, limits: &[(u32, u64, u64)]) -> Result<()> {
    for (resource, soft, hard) in limits {
        let what = || {
            let name = process::rlimit_name(*resource).unwrap_or("rlimit");
            format!("set {name} to {soft}:{hard}")
        };
        let mut present = libc::rlimit64 { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: present is writable, and no new limit is given.
        crate::sys::check(unsafe { libc::prlimit64(pid, *resource as _, std::ptr::null(), &mut present) }.into())
            .with_context(what)?;
        if *hard > present.rlim_max {
            let limit = libc::rlimit64 { rlim_cur: present.rlim_cur, rlim_max: *hard };
            // SAFETY: limit is a valid rlimit64, and the old one is not asked for.
            crate::sys::check(unsafe { libc::prlimit64(pid, *resource as _, &limit, std::ptr::null_mut()) }.into())
                .with_context(what)?;
        }
    }
    Ok(())
}

impl State {
    /// The state of a container that has no process yet.
    #[allow(clippy::too_many_arguments, reason = "all that a container is made of")]
    pub(super) fn new(
        id: &str,
        bundle: &Bundle,
        config: Option<PathBuf>,
        cgroup: Cgroup,
        filter: Option<&Program>,
        hooks: &Hooks,
        namespaces: &Namespaces,
        keyring: Option<String>,
    ) -> Result<Self> {
        let spec = bundle.spec();
        let linux = bundle.linux()?;
        Ok(Self {
            oci_version: spec.version().clone(),
            id: id.to_owned(),
            pid: 0,
            start_time: 0,
            bundle: bundle.path().to_owned(),
            config,
            rootfs: bundle.rootfs()?,
            created: humantime::format_rfc3339_nanos(SystemTime::now()).to_string(),
            owner: rootless::caller(),
            cgroup,
            seccomp_listener: filter.filter(|filter| filter.asks_listener).and_then(|_| listener(linux)),
            defaults: Defaults::of(bundle.process()?, linux)?,
            rdt: linux.intel_rdt().as_ref().map(|spec| Rdt::place(spec, id)).transpose()?,
            hooks: Hooks { poststart: hooks.poststart.clone(), poststop: hooks.poststop.clone(), ..Hooks::default() },
            own_pid_namespace: namespaces.new & libc::CLONE_NEWPID as u64 != 0,
            // Joined or made, an exec enters them all.
            namespaces: namespaces.all() & !libc::CLONE_NEWPID,
            seccomp_flags: filter.map(|filter| filter.flags),
            keyring,
            annotations: spec.annotations().clone().unwrap_or_default(),
        })
    }
}

fn listener(linux: &Linux) -> Option<Listener> {
    let profile = linux.seccomp().as_ref()?;
    let path = profile.listener_path().clone()?;
    Some(Listener { path, metadata: profile.listener_metadata().clone().unwrap_or_default() })
}

impl Process {
    pub(super) fn of(spawned: Spawned, limits: Limits) -> Self {
        Self {
            pid: spawned.pid,
            pidfd: spawned.pidfd,
            handshake: Some(spawned.handshake),
            terminal: None,
            limits,
            modules: None,
            is_module: false,
            listener: None,
        }
    }

    fn tell(&self, message: &ToChild) -> Result<()> {
        self.handshake.as_ref().map_or(Ok(()), |handshake| tell(handshake, message, &[]))
    }

    /// Lets the process wait for its start without us.
    fn release(&mut self) -> Result<()> {
        match self.handshake.take() {
            Some(handshake) => tell(&handshake, &ToChild::Start, &[]),
            None => Ok(()),
        }
    }
}

/// Makes a container's cgroups, and removes them if the container could not be made.
pub(super) struct Cleanup<'a> {
    cgroup: &'a Cgroup,
    rdt: Option<&'a Rdt>,
    settings: cgroup::Settings<'a>,
    /// Whether they are this container's: a directory that another one uses was refused and stays.
    made: bool,
}

impl<'a> Cleanup<'a> {
    /// Removes groups that have been `made` already, or will be.
    pub(super) fn of(cgroup: &'a Cgroup, rdt: Option<&'a Rdt>, settings: cgroup::Settings<'a>, made: bool) -> Self {
        Self { cgroup, rdt, settings, made }
    }

    fn make(&mut self) -> Result<()> {
        self.cgroup.create()?;
        self.made = true;
        self.cgroup.configure(&self.settings)
    }

    pub(super) fn disarm(mut self) {
        self.made = false;
    }
}

impl Drop for Cleanup<'_> {
    fn drop(&mut self) {
        if !self.made {
            return;
        }
        for removed in [self.cgroup.remove(), self.rdt.map_or(Ok(()), Rdt::remove)] {
            if let Err(e) = removed {
                log::warn!("after a failed create: {e}");
            }
        }
    }
}
