//! A shim without containerd: its commands are called, its socket is spoken to and its events are received as
//! containerd does. containerd's own shim can stand in for ours, so that both can be asked the same things.

mod client;

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use containerd_shim_protos::api as pb;
use containerd_shim_protos::api::Empty;
use containerd_shim_protos::bootstrap_api::BootstrapResult;
use containerd_shim_protos::events::task::TaskOOM;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::shim_sync::{Events, create_events};
use containerd_shim_protos::ttrpc::{self, Server, TtrpcContext};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::bundle::fill_rootfs;
use crate::command::{Done, run, run_with};
use crate::{dist, leftovers};

pub use client::{Answer, Shim, refused};

/// Where shims put their sockets.
pub const SOCKETS: &str = "/run/containerd/s";

/// How long any answer may take, but for those that wait for a process.
const PATIENCE: Duration = Duration::from_secs(60);

/// Whose shim it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Make {
    /// The one under test.
    Runx,
    /// containerd's, with runc.
    Runc,
}

impl Make {
    /// Its program, if it is installed.
    pub fn program(self) -> Option<PathBuf> {
        match self {
            Self::Runx => Some(dist().join("containerd-shim-runx-v1")),
            Self::Runc => std::env::var_os("PATH").and_then(|path| {
                std::env::split_paths(&path).map(|d| d.join("containerd-shim-runc-v2")).find(|p| p.exists())
            }),
        }
    }
}

/// Returns from the test, aloud, if containerd's own shim is not there to be compared with.
#[macro_export]
macro_rules! needs_runcs_shim {
    () => {
        if $crate::shim::Make::Runc.program().is_none() {
            $crate::skip_outside_machine("it needs containerd-shim-runc-v2");
            return;
        }
    };
}

#[derive(Default)]
struct Inbox {
    events: Mutex<Vec<Envelope>>,
    arrived: Condvar,
}

impl Events for Inbox {
    fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        if let Some(envelope) = request.envelope.into_option() {
            self.events.lock().expect("no test panics here").push(envelope);
            self.arrived.notify_all();
        }
        Ok(Empty::new())
    }
}

/// The host of shims: what containerd is to them.
pub struct Host {
    directory: TempDir,
    make: Make,
    program: PathBuf,
    namespace: String,
    inbox: Arc<Inbox>,
    server: Option<Server>,
    /// The logs' FIFOs, which containerd holds open.
    logs: Mutex<HashMap<String, File>>,
    /// Options of all creates.
    pub options: Option<Any>,
}

impl std::fmt::Debug for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Host").field("make", &self.make).field("namespace", &self.namespace).finish_non_exhaustive()
    }
}

impl Host {
    /// A host without shims yet.
    ///
    /// # Panics
    /// When the shim's program is not there, or its directory cannot be made.
    pub fn new(make: Make) -> Self {
        let directory = TempDir::with_prefix("runx-shim-").expect("make a directory");
        let name = directory.path().file_name().expect("it has a name").to_string_lossy().replace(['.', '-'], "");
        let rootfs = directory.path().join("rootfs");
        fs::create_dir(&rootfs).expect("make the rootfs");
        fill_rootfs(&rootfs);
        let mut this = Self {
            directory,
            make,
            program: make.program().expect("the shim is installed"),
            namespace: name,
            inbox: Arc::default(),
            server: None,
            logs: Mutex::default(),
            options: None,
        };
        this.listen();
        this
    }

    /// Whose shims it has.
    pub fn make(&self) -> Make {
        self.make
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// The containerd namespace of its containers: unique, so that leftovers can be found by it.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    fn events_address(&self) -> PathBuf {
        self.path().join("e.ttrpc")
    }

    /// Begins to receive events.
    ///
    /// # Panics
    /// When it cannot listen.
    pub fn listen(&mut self) {
        let address = format!("unix://{}", self.events_address().display());
        let service: Arc<dyn Events + Send + Sync> = self.inbox.clone();
        let mut server =
            Server::new().bind(&address).expect("listen for events").register_service(create_events(service));
        server.start().expect("receive events");
        self.server = Some(server);
    }

    /// Stops to receive events, as while containerd restarts.
    pub fn go_deaf(&mut self) {
        if let Some(server) = self.server.take() {
            server.shutdown();
        }
        let _ = fs::remove_file(self.events_address());
    }

    /// All events of a container so far, in their order; of all containers if `id` is empty.
    pub fn events(&self, id: &str) -> Vec<Envelope> {
        let all = self.inbox.events.lock().expect("no test panics here");
        all.iter().filter(|envelope| id.is_empty() || container_of(envelope) == id).cloned().collect()
    }

    /// Waits until a container's events end with `topic`, and returns their topics.
    ///
    /// # Panics
    /// When that does not come.
    #[track_caller]
    pub fn topics_until(&self, id: &str, topic: &str) -> Vec<String> {
        let end = Instant::now() + PATIENCE;
        let mut all = self.inbox.events.lock().expect("no test panics here");
        loop {
            let topics: Vec<String> =
                all.iter().filter(|envelope| container_of(envelope) == id).map(|e| e.topic.clone()).collect();
            if topics.last().is_some_and(|last| last == topic) {
                return topics;
            }
            let left = end.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "{topic} does not come: {topics:?}");
            all = self.inbox.arrived.wait_timeout(all, left).expect("no test panics here").0;
        }
    }

    /// The directory of a bundle.
    pub fn bundle(&self, id: &str) -> PathBuf {
        self.path().join("bundles").join(id)
    }

    /// Makes a bundle that runs a command, as `edit` changes its configuration.
    ///
    /// # Panics
    /// When it cannot be written.
    pub fn make_bundle(&self, id: &str, args: &[&str], edit: impl FnOnce(&mut Value)) -> PathBuf {
        let bundle = self.bundle(id);
        fs::create_dir_all(bundle.join("rootfs")).expect("make the bundle");
        let mut config = json!({
            "ociVersion": "1.0.2",
            "process": {
                "user": {"uid": 0, "gid": 0}, "args": args, "cwd": "/", "env": ["PATH=/bin"],
                "capabilities": {"bounding": ["CAP_KILL"], "effective": ["CAP_KILL"], "permitted": ["CAP_KILL"]},
                "noNewPrivileges": true
            },
            "root": {"path": "rootfs"},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
                {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
                 "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]}
            ],
            "linux": {
                "namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"}, {"type": "network"}],
                "cgroupsPath": format!("/{}/{id}", self.namespace),
                "resources": {"devices": [{"allow": false, "access": "rwm"}]}
            }
        });
        edit(&mut config);
        fs::write(bundle.join("config.json"), config.to_string()).expect("write config.json");
        let log = bundle.join("log");
        if !log.exists() {
            nix::unistd::mkfifo(&log, nix::sys::stat::Mode::from_bits_truncate(0o600)).expect("make the log's FIFO");
        }
        let mut options = fs::OpenOptions::new();
        let log = options.read(true).write(true).custom_flags(libc::O_NONBLOCK).open(log).expect("open the log");
        self.logs.lock().expect("no test panics here").insert(id.to_owned(), log);
        bundle
    }

    /// What the shim has logged since this was asked the last time.
    ///
    /// # Panics
    /// When there is no such bundle.
    pub fn log(&self, id: &str) -> String {
        let mut text = Vec::new();
        // It ends with "would block", as there is a writer.
        let _ =
            self.logs.lock().expect("no test panics here").get_mut(id).expect("it has a log").read_to_end(&mut text);
        String::from_utf8_lossy(&text).into_owned()
    }

    /// The shim's program with containerd's arguments and environment, in a bundle.
    pub fn command(&self, id: &str, action: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command
            .args(["-namespace", &self.namespace])
            .arg("-address")
            .arg(self.path().join("c.sock"))
            .args(["-publish-binary", "/bin/false", "-id", id])
            .args(action)
            .current_dir(self.bundle(id))
            .env("TTRPC_ADDRESS", self.events_address())
            .env("GOMAXPROCS", "2");
        command
    }

    /// `start`, and what it answers.
    #[track_caller]
    pub fn start_command(&self, id: &str) -> Done {
        run(&mut self.command(id, &["start"]))
    }

    /// `start` with something on standard input.
    #[track_caller]
    pub fn start_command_with(&self, id: &str, input: &str) -> Done {
        run_with(&mut self.command(id, &["start"]), input)
    }

    /// `delete`, as containerd calls it.
    #[track_caller]
    pub fn delete_command(&self, id: &str) -> Done {
        let bundle = self.bundle(id);
        run(&mut self.command(id, &["-bundle", &bundle.to_string_lossy(), "delete"]))
    }

    /// Starts the shim of a bundle, or finds it, and connects to it.
    ///
    /// # Panics
    /// When there is none, or it does not answer.
    #[track_caller]
    pub fn shim(&self, id: &str) -> Shim {
        let reply = self.start_command(id).ok().stdout;
        let (address, version) = read_reply(&reply);
        Shim::connect(&address, version)
    }

    /// The request to create the container of a bundle, on the host's root filesystem.
    pub fn create_request(&self, id: &str) -> pb::CreateTaskRequest {
        let mount = pb::Mount {
            type_: "bind".into(),
            source: self.path().join("rootfs").to_string_lossy().into_owned(),
            options: vec!["rbind".into(), "rw".into()],
            ..pb::Mount::default()
        };
        pb::CreateTaskRequest {
            id: id.into(),
            bundle: self.bundle(id).to_string_lossy().into_owned(),
            rootfs: vec![mount],
            options: MessageField::from_option(self.options.clone()),
            ..pb::CreateTaskRequest::default()
        }
    }

    /// A FIFO in the host's directory, as containerd makes them.
    ///
    /// # Panics
    /// When it cannot be made.
    pub fn fifo(&self, name: &str) -> PathBuf {
        let path = self.path().join(name);
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::from_bits_truncate(0o700)).expect("make a FIFO");
        path
    }

    /// A plain file whose name is free.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    /// An executable script.
    ///
    /// # Panics
    /// When it cannot be written.
    pub fn script(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path().join(name);
        fs::write(&path, text).expect("write a script");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("make a script executable");
        path
    }

    /// The sockets of this host's shims, by those who listen on them: whoever has this host's address among its
    /// arguments.
    pub fn daemons(&self) -> Vec<i32> {
        let mark = self.path().to_string_lossy().into_owned();
        fs::read_dir("/proc")
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
            .filter(|pid| {
                let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                String::from_utf8_lossy(&command).contains(&mark)
            })
            .filter(|pid| *pid != std::process::id() as i32)
            .collect()
    }

    /// Fails the test if anything is left of the containers.
    ///
    /// # Panics
    /// With what is left.
    #[track_caller]
    pub fn assert_nothing_left(&self) {
        crate::command::eventually("all shims have ended", || self.daemons().is_empty());
        remove_group(&self.namespace);
        leftovers::assert_none(&self.namespace, &[PathBuf::from("/run/containerd/runx").join(&self.namespace)]);
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let ours = self.path().to_string_lossy().into_owned();
        assert!(!mounts.contains(&ours), "mounts are left: {mounts}");
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.go_deaf();
        for pid in self.daemons() {
            // SAFETY: the process has this host's own directory among its arguments.
            unsafe { libc::kill(pid, libc::SIGKILL) };
        }
        for entry in fs::read_dir(self.path().join("bundles")).into_iter().flatten().flatten() {
            let id = entry.file_name().to_string_lossy().into_owned();
            let _ = self.command(&id, &["-bundle", &entry.path().to_string_lossy(), "delete"]).output();
            let _ = Command::new("umount").arg("-l").arg(entry.path().join("rootfs")).output();
        }
        remove_group(&self.namespace);
        let _ = fs::remove_dir_all(PathBuf::from("/run/containerd/runx").join(&self.namespace));
        let _ = fs::remove_dir_all(PathBuf::from("/run/containerd/runc").join(&self.namespace));
    }
}

/// The address and the version of the Task API in an answer to `start`: a bare address, or with more than that as JSON from
/// containerd 1.7 on and as a message from 2.3 on.
///
/// # Panics
/// When it is none of these.
#[track_caller]
pub fn read_reply(reply: &str) -> (String, u32) {
    if reply.starts_with("unix://") {
        return (reply.to_owned(), 2);
    }
    if let Ok(reply) = serde_json::from_str::<Value>(reply) {
        let address = reply["address"].as_str().expect("it has an address");
        return (address.to_owned(), reply["version"].as_u64().expect("it has a version") as u32);
    }
    let result = BootstrapResult::parse_from_bytes(reply.as_bytes()).expect("it is a bootstrap message");
    assert_eq!(result.protocol, "ttrpc");
    (result.address, result.version as u32)
}

/// The namespace's own cgroup, which is containerd's name for all its containers.
pub fn remove_group(namespace: &str) {
    let root = Path::new("/sys/fs/cgroup");
    let _ = fs::remove_dir(root.join(namespace));
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        let _ = fs::remove_dir(entry.path().join(namespace));
    }
}

/// The container that an event is about: the first field of all of them.
fn container_of(envelope: &Envelope) -> String {
    let event = envelope.event.as_ref().map(|any| any.value.clone()).unwrap_or_default();
    // Every task event's first field is its container's id.
    TaskOOM::parse_from_bytes(&event).map(|event| event.container_id).unwrap_or_default()
}
