//! A container of this shim, and the blocking half of its operations.

use std::cell::Cell;
use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use containerd_shim_protos::api::CreateTaskRequest;
use containerd_shim_protos::events::task::TaskOOM;
use containerd_shim_protos::ttrpc::{self, Code};
use runx_core::Error;
use runx_core::agent::Wish;
use runx_core::bundle::Bundle;
use runx_core::cgroup::{OomEvents, OomWatch};
use runx_core::container::{Born, Container as Core, CreateOptions, ExecOptions, Process as Handle, Runtime, Status};
use runx_core::spec::Process as ProcessSpec;
use runx_core::workload;
use tokio::sync::RwLock;

use crate::artifact::Artifacts;
use crate::error::{runtime_failure, status, unknown};
use crate::events::Publisher;
use crate::io::{Ends, Owner, Streams};
use crate::options::Options;
use crate::process::{Phase, Process};
use crate::{rootfs, starts};

/// Holds the pid of the first process, for `delete`.
pub(crate) const PID_FILE: &str = "init.pid";

/// containerd's, in a bundle: the path of the shim's program if the handler names it.
const PROGRAM_FILE: &str = "shim-binary-path";

/// Holds the directory of the state where that is not the usual one, for `delete`.
const ROOT_FILE: &str = "runx-root";

/// What can be done with a container depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    Created,
    Running,
    Pausing,
    Paused,
    Stopped,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Container {
    pub(crate) id: String,
    pub(crate) bundle: PathBuf,
    pub(crate) core: Core,
    /// The agent that its annotations ask for.
    pub(crate) agent: Option<Wish>,
    pub(crate) init: Arc<Process>,
    /// What it is, and how long its creation took.
    pub(crate) made: (starts::Kind, Duration),
    /// The user and group that own the pipes of its processes.
    pub(crate) io_owner: (u32, u32),
    execs: Mutex<HashMap<String, Arc<Process>>>,
    /// Its processes are being frozen.
    pub(crate) pausing: AtomicBool,
    /// Set when the first process has ended: nothing new is started.
    pub(crate) closing: AtomicBool,
    /// Held for reading by kills until they are answered. A delete's answer comes after theirs: containerd closes its
    /// connection then, and who has sent the signal would be told of that.
    pub(crate) kills: RwLock<()>,
    /// Where the kernel tells of processes killed for lack of memory.
    oom: Mutex<Option<OomWatch>>,
}

/// The descriptors that become a process's standard streams, kept for a second try: to close a FIFO in
/// between would end its client's copy.
pub(crate) type Stdio = Option<[OwnedFd; 3]>;

/// Opens the streams of a process. It may wait for a logger.
pub(crate) fn open_streams(streams: &Streams, owner: Owner<'_>) -> ttrpc::Result<(Stdio, Ends)> {
    streams.open(owner).map_err(|error| {
        let code = if error.kind() == io::ErrorKind::InvalidInput { Code::INVALID_ARGUMENT } else { Code::UNKNOWN };
        status(code, format!("open standard streams: {error}"))
    })
}

fn duplicate(stdio: &Stdio) -> ttrpc::Result<Stdio> {
    let Some([stdin, stdout, stderr]) = stdio else { return Ok(None) };
    let copy = |fd: &OwnedFd| fd.try_clone().map_err(|e| unknown(format!("duplicate standard streams: {e}")));
    Ok(Some([copy(stdin)?, copy(stdout)?, copy(stderr)?]))
}

/// Notes for containerd where this program is, as it has noted it for the pod `pod`.
///
/// It does so where it has a program started. A shim of version 3 is not for the containers of a pod that runs, and when containerd
/// is started again, it looks for their shim in `PATH` alone: without the note it forgets them if the handler's program is
/// elsewhere (`loadShim` of containerd 2.0 to 2.4).
pub(crate) fn note_program(request: &CreateTaskRequest, pod: &str) {
    let bundle = Path::new(&request.bundle);
    // A link is there as a whole or not at all.
    match fs::hard_link(bundle.with_file_name(pod).join(PROGRAM_FILE), bundle.join(PROGRAM_FILE)) {
        Err(e) if !matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::AlreadyExists) => {
            log::warn!("container {}: note in its bundle where the shim's program is: {e}", request.id);
        }
        _ => {}
    }
}

/// The state directory that a create used, if it was not the usual one.
pub(crate) fn recorded_root(bundle: &Path) -> Option<PathBuf> {
    fs::read_to_string(bundle.join(ROOT_FILE)).ok().map(|text| PathBuf::from(text.trim_end()))
}

fn streams(terminal: bool, stdin: &str, stdout: &str, stderr: &str) -> Streams {
    Streams { terminal, stdin: stdin.into(), stdout: stdout.into(), stderr: stderr.into() }
}

/// The streams that a create request names.
pub(crate) fn create_streams(request: &CreateTaskRequest) -> Streams {
    streams(request.terminal, &request.stdin, &request.stdout, &request.stderr)
}

/// A container, the agent that it wants, and its first process.
pub(crate) type Created = (Core, Option<Wish>, Handle);

/// Mounts the root filesystem and makes the container. Everything is taken back on failure.
pub(crate) fn create(
    runtime: &Runtime,
    request: &CreateTaskRequest,
    options: &Options,
    stdio: &Stdio,
    born: Born,
    modules: Artifacts,
) -> ttrpc::Result<Created> {
    let bundle = PathBuf::from(&request.bundle);
    let root = bundle.join("rootfs");
    if !request.rootfs.is_empty() {
        match fs::DirBuilder::new().mode(0o711).create(&root) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
                return Err(unknown(format!("create {}: {e}", root.display())));
            }
            _ => {}
        }
        let gone = Cell::new(false);
        let namespaces = |users: &[_], groups: &[_]| {
            let made = runtime.user_namespace(users, groups);
            gone.set(matches!(made, Err(Error::SpawnerGone)));
            made
        };
        rootfs::mount_all(&request.rootfs, &root, &namespaces)
            .map_err(|e| if gone.get() { spawner_gone() } else { unknown(e) })?;
    }
    let created = create_mounted(runtime, request, options, stdio, born, modules);
    if created.is_err()
        && !request.rootfs.is_empty()
        && let Err(e) = rootfs::unmount(&root)
    {
        log::warn!("unmount {} after a failed create: {e}", root.display());
    }
    created
}

fn create_mounted(
    runtime: &Runtime,
    request: &CreateTaskRequest,
    options: &Options,
    stdio: &Stdio,
    born: Born,
    modules: Artifacts,
) -> ttrpc::Result<Created> {
    let path = Path::new(&request.bundle);
    let what = "OCI runtime create failed";
    if options.root.is_some() {
        fs::write(path.join(ROOT_FILE), runtime.root().as_os_str().as_encoded_bytes())
            .map_err(|e| unknown(format!("write {ROOT_FILE}: {e}")))?;
    }
    let bundle = Bundle::load(path).map_err(|e| runtime_failure(what, e))?;
    let terminal = bundle.process().map_err(|e| runtime_failure(what, e))?.terminal().unwrap_or(false);
    if terminal != request.terminal {
        return Err(status(
            Code::INVALID_ARGUMENT,
            format!("{what}: process.terminal is {terminal} in config.json and {} in the request", request.terminal),
        ));
    }
    let agent = Wish::of(bundle.spec()).map_err(|e| status(Code::INVALID_ARGUMENT, format!("{what}: {e}")))?;
    let create = CreateOptions {
        stdio: duplicate(stdio)?,
        no_pivot: options.no_pivot,
        no_new_keyring: options.no_new_keyring,
        systemd_cgroup: options.systemd_cgroup,
        born: Some(born),
        modules: Some(Box::new(modules)),
        ..CreateOptions::default()
    };
    let (core, handle) = runtime.create(&request.id, &bundle, create).map_err(|e| match e {
        Error::SpawnerGone => spawner_gone(),
        other => runtime_failure(what, other),
    })?;
    if let Err(e) = fs::write(path.join(PID_FILE), handle.pid().to_string()) {
        handle.discard();
        let _ = core.delete(true);
        return Err(unknown(format!("write {PID_FILE}: {e}")));
    }
    Ok((core, agent, handle))
}

/// The error after which another spawner is started and the call tried again.
pub(crate) fn spawner_gone() -> ttrpc::Error {
    status(Code::UNAVAILABLE, Error::SpawnerGone.to_string())
}

/// Whether an error is [`spawner_gone`]'s.
pub(crate) fn is_spawner_gone(error: &ttrpc::Error) -> bool {
    matches!(error, ttrpc::Error::RpcStatus(status) if status.code() == Code::UNAVAILABLE)
}

/// Makes a process in a container, ready to start.
pub(crate) fn exec(
    runtime: &Runtime,
    container: &Container,
    spec: &ProcessSpec,
    stdio: &Stdio,
    born: Born,
) -> ttrpc::Result<Handle> {
    let what = "OCI runtime exec failed";
    let options = ExecOptions { stdio: duplicate(stdio)?, born: Some(born), ..ExecOptions::default() };
    runtime.exec(&container.core, spec, options).map_err(|e| match e {
        Error::SpawnerGone => spawner_gone(),
        Error::WrongState { status, .. } => unknown(format!("cannot exec in a {status} state")),
        other => runtime_failure(what, other),
    })
}

/// Makes a process with a program of ours in a container, and starts it. It has no streams.
pub(crate) fn exec_apart(
    runtime: &Runtime,
    container: &Container,
    spec: &ProcessSpec,
    program: &Path,
    born: Born,
) -> ttrpc::Result<(i32, Arc<OwnedFd>)> {
    let failed = |e: Error| match e {
        Error::SpawnerGone => spawner_gone(),
        other => runtime_failure("start the agent", other),
    };
    let null = || {
        let opened = fs::OpenOptions::new().read(true).write(true).open("/dev/null");
        opened.map(OwnedFd::from).map_err(|e| unknown(format!("open /dev/null: {e}")))
    };
    let options = ExecOptions {
        stdio: Some([null()?, null()?, null()?]),
        program: Some(workload::clone_program(program).map_err(failed)?),
        born: Some(born),
        ..ExecOptions::default()
    };
    let mut handle = runtime.exec(&container.core, spec, options).map_err(failed)?;
    match handle.start() {
        Ok(()) => Ok((handle.pid(), Arc::new(handle.into_pidfd()))),
        Err(e) => {
            handle.discard();
            Err(failed(e))
        }
    }
}

impl Container {
    /// A container with its first process.
    pub(crate) fn new(
        id: String,
        bundle: PathBuf,
        (core, agent): (Core, Option<Wish>),
        init: Arc<Process>,
        made: (starts::Kind, Duration),
        io_owner: (u32, u32),
    ) -> Self {
        let oom = core.state().cgroup.watch_oom().unwrap_or_else(|e| {
            log::warn!("container {id}: out-of-memory kills will not be told of: {e}");
            None
        });
        Self {
            id,
            bundle,
            core,
            agent,
            init,
            made,
            io_owner,
            execs: Mutex::new(HashMap::new()),
            pausing: AtomicBool::new(false),
            closing: AtomicBool::new(false),
            kills: RwLock::default(),
            oom: Mutex::new(oom),
        }
    }

    pub(crate) fn execs(&self) -> MutexGuard<'_, HashMap<String, Arc<Process>>> {
        self.execs.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// The first process, or one that was exec'd.
    pub(crate) fn process(&self, exec_id: &str) -> Option<Arc<Process>> {
        if exec_id.is_empty() { Some(self.init.clone()) } else { self.execs().get(exec_id).cloned() }
    }

    /// The status of the container, in the words that containerd's shim has for it.
    pub(crate) fn standing(&self) -> Standing {
        match self.init.phase() {
            Phase::Added | Phase::Created => Standing::Created,
            Phase::Stopped => Standing::Stopped,
            Phase::Running if self.pausing.load(Ordering::Relaxed) => Standing::Pausing,
            Phase::Running if self.core.status() == Status::Paused => Standing::Paused,
            Phase::Running => Standing::Running,
        }
    }

    /// A descriptor that becomes readable when [`Self::tell_oom`] may have something to tell.
    pub(crate) fn oom_descriptor(&self) -> Option<OwnedFd> {
        let copy = OwnedFd::try_from(self.oom().as_ref()?);
        copy.inspect_err(|e| log::warn!("container {}: watch for out-of-memory kills: {e}", self.id)).ok()
    }

    fn oom(&self) -> MutexGuard<'_, Option<OomWatch>> {
        self.oom.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Publishes that processes were killed for lack of memory, if that is news. Whoever finds it first tells it
    /// before another can go on, so it is told once, and before the exit of who was killed.
    pub(crate) fn tell_oom(&self, events: &Publisher) -> OomEvents {
        let mut oom = self.oom();
        let Some(watch) = oom.as_mut() else { return OomEvents::default() };
        let found = watch.drain().unwrap_or_else(|e| {
            log::warn!("container {}: read out-of-memory kills: {e}", self.id);
            OomEvents { gone: true, ..OomEvents::default() }
        });
        if found.kills > 0 || found.stalled {
            events.publish("/tasks/oom", &TaskOOM { container_id: self.id.clone(), ..TaskOOM::default() });
        }
        found
    }
}
