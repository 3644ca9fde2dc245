//! What the daemon knows of its containers, and what it does with them. [`task`] is the Task API on top of it,
//! [`exec`] what is done with processes beside the first, [`exits`] what happens when one ends.

mod exec;
mod exits;
mod task;

use std::collections::{HashMap, HashSet};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use containerd_shim_protos::api as pb;
use containerd_shim_protos::events::task as topics;
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::ttrpc::{self, Code, Result};
use runx_core::Error;
use runx_core::container::Runtime;
use runx_core::spawn::Spawner;
use runx_core::spec::Process as ProcessSpec;
use runx_core::workload::WasmConfig;
use tokio::sync::{Notify, mpsc, oneshot};

use crate::agent;
use crate::artifact::Artifacts;
use crate::container::{self, Container, Standing, Stdio};
use crate::error::{from_runtime, not_found, runtime_failure, status, unknown};
use crate::events::Publisher;
use crate::flags::Flags;
use crate::io::{Ends, Owner, Streams};
use crate::process::{Ended, Phase, Process, end_time};
use crate::reaper::Reaper;
use crate::starts::{self, Outcome};
use crate::{options, rootfs, spawner};

type SpawnerRequest = oneshot::Sender<anyhow::Result<Spawner>>;

/// The service behind the socket.
#[derive(Clone)]
pub(crate) struct Service(Arc<Shared>);

struct Shared {
    namespace: String,
    /// The pod's, or the only container's.
    id: String,
    /// Its address.
    containerd: String,
    root: PathBuf,
    wasm: WasmConfig,
    spawner: Mutex<Spawner>,
    spawner_requests:
        (mpsc::UnboundedSender<SpawnerRequest>, tokio::sync::Mutex<mpsc::UnboundedReceiver<SpawnerRequest>>),
    containers: Mutex<HashMap<String, Arc<Container>>>,
    /// Ids whose creation is under way.
    creating: Mutex<HashSet<String>>,
    /// One of them is done.
    created: Notify,
    /// A shutdown was asked for while a creation was under way.
    shutdown_wanted: AtomicBool,
    shutdown: Notify,
    events: Publisher,
    reaper: Reaper,
    agents: agent::Ports,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Runs blocking work on a thread of its own.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(e) => Err(unknown(format!("the shim's own work failed: {e}"))),
    }
}

impl Service {
    pub(crate) fn new(flags: &Flags, spawner: Spawner, events: Publisher, reaper: Reaper) -> Self {
        let (sender, receiver) = mpsc::unbounded_channel();
        Self(Arc::new(Shared {
            namespace: flags.namespace.clone(),
            id: flags.id.clone(),
            containerd: flags.address.clone(),
            root: flags.state_root(),
            wasm: WasmConfig::beside(&flags.program),
            spawner: Mutex::new(spawner),
            spawner_requests: (sender, tokio::sync::Mutex::new(receiver)),
            containers: Mutex::new(HashMap::new()),
            creating: Mutex::new(HashSet::new()),
            created: Notify::new(),
            shutdown_wanted: AtomicBool::new(false),
            shutdown: Notify::new(),
            events,
            reaper,
            agents: agent::Ports::default(),
        }))
    }

    /// Waits until the last container is gone and containerd has said so.
    pub(crate) async fn shut_down(&self) {
        self.0.shutdown.notified().await;
    }

    /// Writes into the log what there is.
    pub(crate) fn describe(&self) {
        let containers: Vec<_> = lock(&self.0.containers).values().cloned().collect();
        log::info!(
            "this is version {} with {} containers, and {} being made",
            env!("CARGO_PKG_VERSION"),
            containers.len(),
            lock(&self.0.creating).len()
        );
        for container in containers {
            log::info!("container {}, pid {}: {:?}", container.id, container.init.pid(), container.standing());
            for exec in container.execs().values() {
                log::info!("container {}, exec {}, pid {}: {:?}", container.id, exec.exec_id, exec.pid(), exec.phase());
            }
        }
    }

    fn is_idle(&self) -> bool {
        lock(&self.0.containers).is_empty() && lock(&self.0.creating).is_empty()
    }

    /// Removes containers that containerd has forgotten, whose bundle is gone, and tells whether none is
    /// left. A client that dies in the middle of a create makes such.
    pub(crate) async fn sweep(&self) -> bool {
        let forgotten: Vec<_> =
            lock(&self.0.containers).values().filter(|container| !container.bundle.exists()).cloned().collect();
        for container in forgotten {
            log::warn!("container {}: its bundle is gone, so it is deleted", container.id);
            let _ = container.init.signal(libc::SIGKILL);
            let id = container.id.clone();
            let deleted = blocking(move || container.core.delete(true).map_err(from_runtime)).await;
            if let Err(e) = deleted
                && !matches!(&e, ttrpc::Error::RpcStatus(status) if status.code() == Code::NOT_FOUND)
            {
                log::warn!("delete a forgotten container: {e}");
            }
            lock(&self.0.containers).remove(&id);
            self.0.agents.release(&id);
        }
        self.is_idle()
    }

    /// Waits until the creation of `id`, if one is under way, has come to an end.
    async fn wait_created(&self, id: &str) {
        loop {
            let created = self.0.created.notified();
            tokio::pin!(created);
            // Registered before the look, so that an end in between is not missed.
            created.as_mut().enable();
            if !lock(&self.0.creating).contains(id) {
                return;
            }
            created.await;
        }
    }

    /// Somebody found the spawner dead. The main thread answers, as it must be the parent of the next.
    pub(crate) async fn next_spawner_request(&self) -> Option<SpawnerRequest> {
        self.0.spawner_requests.1.lock().await.recv().await
    }

    pub(crate) fn answer_spawner_request(&self, request: Option<SpawnerRequest>) {
        if let Some(request) = request {
            log::warn!("the spawner has gone: another one is started");
            let _ = request.send(spawner::execute());
        }
    }

    async fn replace_spawner(&self) -> Result<()> {
        let (sender, receiver) = oneshot::channel();
        let _ = self.0.spawner_requests.0.send(sender);
        match receiver.await {
            Ok(Ok(spawner)) => {
                *lock(&self.0.spawner) = spawner;
                Ok(())
            }
            Ok(Err(e)) => Err(unknown(format!("start another spawner: {e:#}"))),
            Err(_) => Err(unknown("start another spawner: the shim is shutting down")),
        }
    }

    fn runtime(&self, root: Option<&PathBuf>) -> Runtime {
        let root = root.map_or_else(|| self.0.root.clone(), |root| root.join(&self.0.namespace));
        Runtime::new(root, lock(&self.0.spawner).clone(), self.0.wasm.clone())
    }

    fn container(&self, id: &str) -> Result<Arc<Container>> {
        lock(&self.0.containers).get(id).cloned().ok_or_else(|| not_found("container not created"))
    }

    fn process(&self, id: &str, exec_id: &str) -> Result<(Arc<Container>, Arc<Process>)> {
        let container = self.container(id)?;
        let process =
            container.process(exec_id).ok_or_else(|| not_found(format!("process does not exist {exec_id}")))?;
        Ok((container, process))
    }

    async fn open_streams(&self, streams: &Streams, id: &str, ids: (u32, u32)) -> Result<(Stdio, Ends)> {
        let (shared, copy, id) = (self.0.clone(), streams.clone(), id.to_owned());
        let open = move || {
            let owner = Owner { namespace: &shared.namespace, id: &id, ids, reaper: &shared.reaper };
            container::open_streams(&copy, owner)
        };
        let readers = streams.readers().await;
        let opened = if streams.may_wait() { blocking(open).await } else { open() };
        drop(readers);
        opened
    }

    async fn create_container(&self, request: pb::CreateTaskRequest) -> Result<pb::CreateTaskResponse> {
        if !request.checkpoint.is_empty() {
            return Err(status(Code::UNIMPLEMENTED, "restore from a checkpoint is not supported"));
        }
        let begun = Instant::now();
        let options = Arc::new(options::parse(request.options.as_ref())?);
        container::note_program(&request, &self.0.id);
        let streams = container::create_streams(&request);
        let io_owner = (options.io_uid, options.io_gid);
        let (stdio, ends) = self.open_streams(&streams, &request.id, io_owner).await?;
        let (request, stdio) = (Arc::new(request), Arc::new(stdio));
        let mut tried = false;
        let created = loop {
            let runtime = self.runtime(options.root.as_ref());
            let (request, options, stdio) = (request.clone(), options.clone(), stdio.clone());
            let (announcement, born) = self.0.reaper.announce();
            let modules = Artifacts::new(&self.0.containerd, &self.0.namespace, &request.id);
            let create = move || container::create(&runtime, &request, &options, &stdio, born, modules);
            let created = blocking(create).await;
            match created {
                Err(e) if container::is_spawner_gone(&e) && !tried => {
                    tried = true;
                    self.replace_spawner().await?;
                }
                other => break other.map(|created| (created, announcement)),
            }
        };
        // Held by the process alone from here on, so that its end closes them.
        drop(stdio);
        let ((core, agent, mut handle), announcement) = created?;
        // Both would want the same port: the second one is refused before it runs.
        let taken = agent.as_ref().and_then(|agent| self.0.agents.reserve(agent, &request.id).err());
        let pid = handle.pid() as u32;
        let kind = starts::Kind::of(&core, &handle);
        let process = Arc::new(Process::new(String::new(), streams, None));
        let connected = match &taken {
            Some(text) => Err(std::io::Error::other(text.clone())),
            None => ends.connect(handle.take_terminal()),
        };
        let connected = connected.and_then(|connections| process.born(handle, connections));
        if let Err(e) = connected {
            let root = PathBuf::from(&request.bundle).join("rootfs");
            let undone = blocking(move || {
                let _ = core.delete(true);
                rootfs::unmount(&root).map_err(|e| unknown(format!("unmount {}: {e}", root.display())))
            });
            if let Err(e) = undone.await {
                log::warn!("after a failed create of {}: {e}", request.id);
            }
            self.0.agents.release(&request.id);
            return Err(match taken {
                Some(text) => status(Code::INVALID_ARGUMENT, text),
                None => unknown(format!("connect the streams of the container: {e}")),
            });
        }
        let bundle = PathBuf::from(&request.bundle);
        let agent = agent.filter(|_| self.0.agents.has(&request.id));
        let made = (kind, begun.elapsed());
        let container = Container::new(request.id.clone(), bundle, (core, agent), process.clone(), made, io_owner);
        let container = Arc::new(container);
        lock(&self.0.containers).insert(request.id.clone(), container.clone());
        let event = topics::TaskCreate {
            container_id: request.id.clone(),
            bundle: request.bundle.clone(),
            rootfs: request.rootfs.clone(),
            io: MessageField::some(topics::TaskIO {
                stdin: request.stdin.clone(),
                stdout: request.stdout.clone(),
                stderr: request.stderr.clone(),
                terminal: request.terminal,
                ..topics::TaskIO::default()
            }),
            pid,
            ..topics::TaskCreate::default()
        };
        self.0.events.publish("/tasks/create", &event);
        self.watch_oom(container.clone());
        announcement.keep();
        self.watch(container, process);
        Ok(pb::CreateTaskResponse { pid, ..pb::CreateTaskResponse::default() })
    }

    async fn start_init(&self, container: Arc<Container>) -> Result<u32> {
        let process = container.init.clone();
        let _turn = process.turn.lock().await;
        let handle = match container.standing() {
            Standing::Created => process.take_handle(),
            Standing::Running | Standing::Pausing => return Err(unknown("cannot start a running process")),
            Standing::Paused => return Err(unknown("cannot start a paused process")),
            Standing::Stopped => return Err(unknown("cannot start a stopped process")),
        };
        let Some(mut handle) = handle else { return Err(unknown("cannot start a running process")) };
        let begun = Instant::now();
        let started = {
            let container = container.clone();
            blocking(move || {
                handle.start().map_err(|e| runtime_failure("OCI runtime start failed", e))?;
                container.core.set_started().map_err(from_runtime)
            })
        };
        started.await.inspect_err(|_| self.count(Outcome::Failed))?;
        let (kind, creation) = container.made;
        self.count(Outcome::Started(kind, creation + begun.elapsed()));
        if let Err(e) = process.open_stdin() {
            log::warn!("standard input of {}: {e}", container.id);
        }
        process.set_phase(Phase::Running);
        let pid = process.pid();
        let event = topics::TaskStart { container_id: container.id.clone(), pid, ..topics::TaskStart::default() };
        self.0.events.publish("/tasks/start", &event);
        if let Some(agent) = &container.agent {
            tokio::spawn(agent::keep(self.clone(), container.clone(), agent.clone()));
        }
        Ok(pid)
    }

    fn count(&self, outcome: Outcome) {
        starts::count(self.0.root.clone(), outcome);
    }

    /// Makes a process that containerd does not know of, and starts it. Returns its pid and what its end is waited for by.
    pub(crate) async fn run_apart(
        &self,
        container: &Arc<Container>,
        spec: ProcessSpec,
        program: PathBuf,
    ) -> Result<(i32, Arc<OwnedFd>)> {
        let runtime = self.runtime(None);
        let (announcement, born) = self.0.reaper.announce();
        let container = container.clone();
        let begun = Instant::now();
        let started = blocking(move || container::exec_apart(&runtime, &container, &spec, &program, born));
        match started.await {
            Ok(started) => {
                announcement.keep();
                self.count(Outcome::Started(starts::Kind::Agent, begun.elapsed()));
                Ok(started)
            }
            Err(e) => {
                // The next try, which comes soon, has another one.
                if container::is_spawner_gone(&e) {
                    self.replace_spawner().await?;
                }
                Err(e)
            }
        }
    }

    /// Such a process has been waited for.
    pub(crate) fn forget_apart(&self, pid: i32) {
        self.0.reaper.remove(pid);
    }

    /// The programs that lie beside this one.
    pub(crate) fn beside(&self, name: &str) -> PathBuf {
        self.0.wasm.runner.with_file_name(name)
    }

    async fn delete_init(&self, container: Arc<Container>) -> Result<pb::DeleteResponse> {
        let process = container.init.clone();
        match container.standing() {
            Standing::Running | Standing::Pausing => return Err(unknown("cannot delete a running process")),
            Standing::Paused => return Err(unknown("cannot delete a paused process")),
            Standing::Created | Standing::Stopped => {}
        }
        // Never started: it is ended, and its end told, before it goes.
        if process.phase() == Phase::Created {
            let doomed = container.clone();
            // Thaws what is frozen, too.
            let killed = blocking(move || doomed.core.kill(libc::SIGKILL, false).map_err(from_runtime)).await;
            if let Err(e) = killed {
                log::debug!("end container {} before its start: {e}", container.id);
            }
            process.wait().await;
        }
        let _turn = process.turn.lock().await;
        // Another delete may have been faster, and another container may have the id by now.
        if !self.container(&container.id).is_ok_and(|known| Arc::ptr_eq(&known, &container)) {
            return Err(not_found("container not created"));
        }
        if let Some(connections) = process.connections() {
            connections.drain().await;
        }
        {
            let container = container.clone();
            blocking(move || {
                match container.core.delete(true) {
                    Ok(()) | Err(Error::NotFound(_)) => {}
                    Err(e) => return Err(runtime_failure("OCI runtime delete failed", e)),
                }
                let root = container.bundle.join("rootfs");
                rootfs::unmount(&root).map_err(|e| unknown(format!("unmount {}: {e}", root.display())))
            })
            .await?;
        }
        lock(&self.0.containers).remove(&container.id);
        self.0.agents.release(&container.id);
        let ended = process.ended();
        let response = delete_response(&process, ended);
        let event = topics::TaskDelete {
            container_id: container.id.clone(),
            pid: response.pid,
            exit_status: response.exit_status,
            exited_at: response.exited_at.clone(),
            ..topics::TaskDelete::default()
        };
        self.0.events.publish("/tasks/delete", &event);
        Ok(response)
    }
}

fn delete_response(process: &Process, ended: Option<Ended>) -> pb::DeleteResponse {
    pb::DeleteResponse {
        pid: process.pid(),
        exit_status: ended.map_or(0, |ended| ended.status),
        exited_at: MessageField::some(end_time(ended)),
        ..pb::DeleteResponse::default()
    }
}
