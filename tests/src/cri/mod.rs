//! A containerd whose CRI is spoken to as the kubelet does, with a network of its own.

mod client;
mod configuration;
mod streams;

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use k8s_cri::v1 as api;
use serde_json::Value;

use crate::command::{Done, eventually};
use crate::containerd::{self, Containerd};
use crate::leftovers;
use crate::shim::remove_group;

pub use client::{Client, Refused};
pub use configuration::{crun, handlers, newer, version};
pub use streams::Stream;

/// The handler of the runtime under test.
pub const HANDLER: &str = "runx";

/// Another handler of the same shim, which containerd takes for runc's: only such ones have their features asked for in
/// 2.0 and 2.1.
pub const BY_PATH: &str = "runx-by-path";

/// containerd's own runtime.
pub const RUNC: &str = "runc";

/// containerd's own runtime with crun, where that is installed.
pub const CRUN: &str = "crun";

/// The image of sandboxes.
const PAUSE: &str = "runx.test/pause:1";

/// The image with busybox.
pub const BUSYBOX: &str = "runx.test/busybox:1";

/// A node, as far as the kubelet sees one.
#[derive(Debug)]
pub struct Node {
    containerd: Containerd,
    client: Client,
    bridge: String,
    /// Ids of pods and containers that were made.
    made: Mutex<HashSet<String>>,
    /// Network namespaces of pods.
    networks: Mutex<HashSet<PathBuf>>,
}

/// Why a node cannot be had here, if it cannot.
pub fn obstacle() -> Option<String> {
    if let Some(why) = containerd::obstacle() {
        return Some(why);
    }
    if configuration::plugins().is_none() {
        return Some("it needs the CNI plugins bridge, host-local and loopback (containernetworking-plugins)".into());
    }
    // The kernel may lack the module.
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let probe = format!("rxp{}x{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    let made = Command::new("ip").args(["link", "add", &probe, "type", "bridge"]).output();
    let _ = Command::new("ip").args(["link", "del", &probe]).output();
    match made {
        Ok(output) if output.status.success() => None,
        Ok(output) => Some(format!("it needs bridges: {}", String::from_utf8_lossy(&output.stderr).trim())),
        Err(e) => Some(format!("it needs ip: {e}")),
    }
}

/// Returns from the test, aloud, if there is an obstacle.
#[macro_export]
macro_rules! needs_cri {
    () => {
        if let Some(why) = $crate::cri::obstacle() {
            $crate::skip_outside_machine(&why);
            return;
        }
    };
}

impl Node {
    /// Starts a node.
    ///
    /// # Panics
    /// When it does not come up.
    pub fn start() -> Self {
        let mut bridge = String::new();
        let containerd = Containerd::start_configured("k8s.io", |directory| {
            let name = directory.file_name().expect("it has a name").to_string_lossy().into_owned();
            // Names of devices are short.
            bridge = format!("rx{}", name.rsplit('-').next().expect("it has parts"));
            configuration::write_network(directory, &bridge);
            configuration::containerds(directory, version())
        });
        let client = Client::connect(&containerd.path().join("c.sock"));
        let this = Self { containerd, client, bridge, made: Mutex::default(), networks: Mutex::default() };
        this.containerd.import(PAUSE, &this.containerd.path().join("rootfs"), &["/bin/sleep", "2147483647"]);
        this.wait_ready();
        this
    }

    fn wait_ready(&self) {
        eventually("CRI and the network are ready", || {
            let status = self.client.status(api::StatusRequest::default());
            let conditions = status.ok().and_then(|status| status.status).map(|status| status.conditions);
            // Others are opinions, of deprecated features for example.
            let ready = |name: &str, list: &[api::RuntimeCondition]| {
                list.iter().any(|condition| condition.r#type == name && condition.status)
            };
            conditions.is_some_and(|list| ready("RuntimeReady", &list) && ready("NetworkReady", &list))
        });
        self.wait_for_image(PAUSE);
        self.wait_for_image(BUSYBOX);
    }

    /// Waits until CRI has heard of an image that was imported.
    pub fn wait_for_image(&self, name: &str) {
        eventually(&format!("CRI knows {name}"), || self.client.knows_image(name));
    }

    /// Its containerd.
    pub fn containerd(&self) -> &Containerd {
        &self.containerd
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        self.containerd.path()
    }

    /// The device that its pods are connected to.
    pub fn bridge(&self) -> &str {
        &self.bridge
    }

    /// The kubelet's connection.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// A name that nothing else has, for cgroups.
    pub fn name(&self) -> String {
        self.path().file_name().expect("it has a name").to_string_lossy().into_owned()
    }

    /// Stops containerd, lets something happen, and starts it again.
    pub fn restart_around(&mut self, meanwhile: impl FnOnce()) {
        self.containerd.stop_daemon();
        meanwhile();
        self.containerd.restart_daemon();
        self.client = Client::connect(&self.path().join("c.sock"));
        self.wait_ready();
    }

    /// Stops containerd and starts another one in its place.
    ///
    /// # Panics
    /// When it does not come up.
    pub fn upgrade_to(&mut self, program: &Path) {
        self.containerd.stop_daemon();
        self.containerd.become_program(program, |directory| {
            configuration::containerds(directory, configuration::version_of(program))
        });
        self.containerd.start_daemon();
        self.client = Client::connect(&self.path().join("c.sock"));
        self.wait_ready();
    }

    /// Kills containerd, and starts it again.
    pub fn crash(&mut self) {
        self.containerd.kill_daemon();
        self.containerd.start_daemon();
        self.client = Client::connect(&self.path().join("c.sock"));
        self.wait_ready();
    }

    /// Where a pod's logs are.
    pub fn logs(&self, pod: &str) -> PathBuf {
        self.path().join("logs").join(pod)
    }

    /// The configuration of a pod.
    pub fn pod_config(&self, name: &str) -> api::PodSandboxConfig {
        api::PodSandboxConfig {
            metadata: Some(api::PodSandboxMetadata {
                name: name.into(),
                uid: format!("{name}-{}", self.name()),
                namespace: "tests".into(),
                attempt: 0,
            }),
            hostname: name.into(),
            log_directory: self.logs(name).to_string_lossy().into_owned(),
            linux: Some(api::LinuxPodSandboxConfig {
                cgroup_parent: format!("/{}", self.name()),
                security_context: Some(api::LinuxSandboxSecurityContext {
                    namespace_options: Some(own_namespaces()),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    /// Runs a pod's sandbox by a handler.
    ///
    /// # Errors
    /// What CRI says.
    pub fn try_run_pod(&self, config: &api::PodSandboxConfig, handler: &str) -> Result<String, Refused> {
        let request = api::RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: handler.into() };
        let id = self.client.run_pod_sandbox(request)?.pod_sandbox_id;
        self.made.lock().expect("no test panics here").insert(id.clone());
        if let Some(network) = self.network(&id) {
            self.networks.lock().expect("no test panics here").insert(network);
        }
        Ok(id)
    }

    /// Runs a pod's sandbox.
    ///
    /// # Panics
    /// When it cannot be run.
    #[track_caller]
    pub fn run_pod(&self, config: &api::PodSandboxConfig) -> String {
        self.try_run_pod(config, HANDLER).unwrap_or_else(|e| panic!("run pod: {e:?}"))
    }

    /// What containerd tells of a pod beyond its status.
    ///
    /// # Panics
    /// When there is no such pod.
    #[track_caller]
    pub fn pod_info(&self, id: &str) -> Value {
        let request = api::PodSandboxStatusRequest { pod_sandbox_id: id.into(), verbose: true };
        let info = self.client.pod_sandbox_status(request).expect("status of the pod").info;
        serde_json::from_str(&info["info"]).expect("the pod's info is JSON")
    }

    /// The path of a pod's network namespace.
    pub fn network(&self, id: &str) -> Option<PathBuf> {
        let info = self.pod_info(id);
        let namespaces = info.pointer("/runtimeSpec/linux/namespaces")?.as_array()?;
        let network = namespaces.iter().find(|namespace| namespace["type"] == "network")?;
        network["path"].as_str().map(PathBuf::from)
    }

    /// The status of a pod.
    ///
    /// # Panics
    /// When there is none.
    #[track_caller]
    pub fn pod_status(&self, id: &str) -> api::PodSandboxStatus {
        let request = api::PodSandboxStatusRequest { pod_sandbox_id: id.into(), verbose: false };
        self.client.pod_sandbox_status(request).expect("status of the pod").status.expect("a status")
    }

    /// Stops and removes a pod with all that is in it.
    ///
    /// # Panics
    /// When it cannot be removed.
    #[track_caller]
    pub fn remove_pod(&self, id: &str) {
        self.client
            .stop_pod_sandbox(api::StopPodSandboxRequest { pod_sandbox_id: id.into() })
            .unwrap_or_else(|e| panic!("stop pod: {e:?}"));
        self.client
            .remove_pod_sandbox(api::RemovePodSandboxRequest { pod_sandbox_id: id.into() })
            .unwrap_or_else(|e| panic!("remove pod: {e:?}"));
    }

    /// The configuration of a container that runs a shell script.
    pub fn container_config(&self, name: &str, script: &str) -> api::ContainerConfig {
        api::ContainerConfig {
            metadata: Some(api::ContainerMetadata { name: name.into(), attempt: 0 }),
            image: Some(api::ImageSpec { image: BUSYBOX.into(), ..Default::default() }),
            command: ["/bin/sh", "-c", script].map(str::to_owned).to_vec(),
            log_path: format!("{name}.log"),
            linux: Some(api::LinuxContainerConfig {
                security_context: Some(api::LinuxContainerSecurityContext {
                    namespace_options: Some(own_namespaces()),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    /// Creates a container in a pod.
    ///
    /// # Errors
    /// What CRI says.
    pub fn try_create(
        &self,
        pod: &str,
        config: &api::ContainerConfig,
        pod_config: &api::PodSandboxConfig,
    ) -> Result<String, Refused> {
        let request = api::CreateContainerRequest {
            pod_sandbox_id: pod.into(),
            config: Some(config.clone()),
            sandbox_config: Some(pod_config.clone()),
        };
        let id = self.client.create_container(request)?.container_id;
        self.made.lock().expect("no test panics here").insert(id.clone());
        Ok(id)
    }

    /// Creates and starts a container in a pod.
    ///
    /// # Panics
    /// When that fails.
    #[track_caller]
    pub fn run_container(
        &self,
        pod: &str,
        config: &api::ContainerConfig,
        pod_config: &api::PodSandboxConfig,
    ) -> String {
        let id = self.try_create(pod, config, pod_config).unwrap_or_else(|e| panic!("create container: {e:?}"));
        self.start_container(&id).unwrap_or_else(|e| panic!("start container: {e:?}"));
        id
    }

    /// Starts a container.
    ///
    /// # Errors
    /// What CRI says.
    pub fn start_container(&self, id: &str) -> Result<(), Refused> {
        self.client.start_container(api::StartContainerRequest { container_id: id.into() }).map(drop)
    }

    /// Stops a container, with a time to end by itself.
    ///
    /// # Panics
    /// When that fails.
    #[track_caller]
    pub fn stop_container(&self, id: &str, seconds: i64) {
        let request = api::StopContainerRequest { container_id: id.into(), timeout: seconds };
        self.client.stop_container(request).unwrap_or_else(|e| panic!("stop container: {e:?}"));
    }

    /// Removes a container.
    ///
    /// # Panics
    /// When that fails.
    #[track_caller]
    pub fn remove_container(&self, id: &str) {
        self.client
            .remove_container(api::RemoveContainerRequest { container_id: id.into() })
            .unwrap_or_else(|e| panic!("remove container: {e:?}"));
    }

    /// The status of a container.
    ///
    /// # Panics
    /// When there is none.
    #[track_caller]
    pub fn container_status(&self, id: &str) -> api::ContainerStatus {
        let request = api::ContainerStatusRequest { container_id: id.into(), verbose: false };
        self.client.container_status(request).expect("status of the container").status.expect("a status")
    }

    /// The pid of a container's first process.
    ///
    /// # Panics
    /// When it has none.
    #[track_caller]
    pub fn pid(&self, id: &str) -> i32 {
        let request = api::ContainerStatusRequest { container_id: id.into(), verbose: true };
        let info = self.client.container_status(request).expect("status of the container").info;
        let info: Value = serde_json::from_str(&info["info"]).expect("the container's info is JSON");
        info["pid"].as_i64().expect("it has a pid") as i32
    }

    /// Waits until a container has exited.
    ///
    /// # Panics
    /// When it does not.
    #[track_caller]
    pub fn wait(&self, id: &str) -> api::ContainerStatus {
        let mut status = self.container_status(id);
        eventually("it has exited", || {
            status = self.container_status(id);
            status.state() == api::ContainerState::ContainerExited
        });
        status
    }

    /// Executes a command, with a time limit in seconds (0: none).
    ///
    /// # Errors
    /// What CRI says.
    pub fn exec(&self, id: &str, command: &[&str], seconds: i64) -> Result<Done, Refused> {
        let request = api::ExecSyncRequest {
            container_id: id.into(),
            cmd: command.iter().map(|word| (*word).to_owned()).collect(),
            timeout: seconds,
        };
        let answer = self.client.exec_sync(request)?;
        Ok(Done {
            code: answer.exit_code,
            stdout: String::from_utf8_lossy(&answer.stdout).into_owned(),
            bytes: answer.stdout,
            stderr: String::from_utf8_lossy(&answer.stderr).into_owned(),
        })
    }

    /// Executes a shell script.
    ///
    /// # Panics
    /// When it cannot be executed.
    #[track_caller]
    pub fn sh(&self, id: &str, script: &str) -> Done {
        self.exec(id, &["/bin/sh", "-c", script], 0).unwrap_or_else(|e| panic!("exec: {e:?}"))
    }

    /// The lines of a container's log, without what CRI puts before them.
    pub fn log(&self, pod: &str, container: &str) -> String {
        let text = fs::read_to_string(self.logs(pod).join(format!("{container}.log"))).unwrap_or_default();
        text.lines().filter_map(|line| line.splitn(4, ' ').nth(3)).map(|line| format!("{line}\n")).collect()
    }

    /// The shims that run, without their spawners.
    pub fn shims(&self) -> Vec<i32> {
        self.processes("containerd-shim")
    }

    /// The spawners of the shims.
    pub fn spawners(&self) -> Vec<i32> {
        self.processes("runx-spawner")
    }

    fn processes(&self, name: &str) -> Vec<i32> {
        let mark = self.path().to_string_lossy().into_owned();
        let is_one = |pid: &i32| {
            let read = |what: &str| fs::read_to_string(format!("/proc/{pid}/{what}")).unwrap_or_default();
            read("cmdline").contains(&mark) && read("comm").trim() == name
        };
        let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(is_one).collect()
    }

    /// Fails the test if anything is left of the pods and containers.
    ///
    /// # Panics
    /// With what is left.
    #[track_caller]
    pub fn assert_nothing_left(&self) {
        eventually("all shims have ended", || self.shims().is_empty());
        remove_group(&self.name());
        let made = self.made.lock().expect("no test panics here");
        let states = |name: &String| Path::new("/run/containerd/runx/k8s.io").join(name);
        let left: Vec<_> = made.iter().map(states).filter(|path| path.exists()).collect();
        assert!(left.is_empty(), "states are left: {left:?}");
        let networks = self.networks.lock().expect("no test panics here");
        let left: Vec<_> = networks.iter().filter(|path| path.exists()).collect();
        assert!(left.is_empty(), "network namespaces are left: {left:?}");
        let task = self.path().join("state/io.containerd.runtime.v2.task").to_string_lossy().into_owned();
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        assert!(!mounts.contains(&task), "mounts are left: {mounts}");
        let bundles = || fs::read_dir(PathBuf::from(&task).join("k8s.io")).into_iter().flatten().flatten();
        let describe = |entry: fs::DirEntry| {
            let files = fs::read_dir(entry.path()).into_iter().flatten().flatten().map(|file| file.file_name());
            format!("{}: {:?}", entry.path().display(), files.collect::<Vec<_>>())
        };
        let mut left = Vec::new();
        for _ in 0..100 {
            left = bundles().map(describe).collect();
            if left.is_empty() {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        assert!(left.is_empty(), "bundles are left: {left:?}");
        for id in made.iter() {
            leftovers::assert_none(id, &[]);
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let list = self.client.list_pod_sandbox(api::ListPodSandboxRequest::default());
        for pod in list.map(|list| list.items).unwrap_or_default() {
            let _ = self.client.stop_pod_sandbox(api::StopPodSandboxRequest { pod_sandbox_id: pod.id.clone() });
            let _ = self.client.remove_pod_sandbox(api::RemovePodSandboxRequest { pod_sandbox_id: pod.id });
        }
        self.containerd.stop_daemon();
        let _ = Command::new("ip").args(["link", "del", &self.bridge]).output();
        remove_group(&self.name());
    }
}

/// A pod has its own network and IPC, and each container its own processes.
pub fn own_namespaces() -> api::NamespaceOption {
    api::NamespaceOption {
        network: api::NamespaceMode::Pod.into(),
        pid: api::NamespaceMode::Container.into(),
        ipc: api::NamespaceMode::Pod.into(),
        ..Default::default()
    }
}
