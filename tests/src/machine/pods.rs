//! Pods on a machine, as the kubelet asks for them.

use std::fs;
use std::process::Command;

use k8s_cri::v1 as api;

use super::{Machine, PAUSE};
use crate::bundle::fill_rootfs;
use crate::command::run;
use crate::image;

impl Machine {
    /// Imports the image of pods.
    ///
    /// # Panics
    /// When containerd does not take it.
    pub fn import_image(&self) {
        let rootfs = self.path().join("rootfs");
        fs::create_dir_all(&rootfs).expect("make a directory");
        fill_rootfs(&rootfs);
        let archive = self.root().join("tmp/image.tar");
        image::write(&archive, PAUSE, &rootfs, &["/bin/sleep", "2147483647"]);
        let mut command = Command::new("nsenter");
        command.args(&self.enter()[1..]).args(["ctr", "-n", "k8s.io", "images", "import", "/tmp/image.tar"]);
        run(&mut command).ok();
    }

    /// Runs a pod in the host's network by a handler.
    ///
    /// # Panics
    /// When containerd refuses.
    #[track_caller]
    pub fn run_pod(&self, name: &str, handler: &str) -> String {
        let request =
            api::RunPodSandboxRequest { config: Some(self.pod_config(name)), runtime_handler: handler.into() };
        self.client().run_pod_sandbox(request).expect("run a pod").pod_sandbox_id
    }

    fn pod_config(&self, name: &str) -> api::PodSandboxConfig {
        let namespaces = api::NamespaceOption { network: api::NamespaceMode::Node as i32, ..Default::default() };
        api::PodSandboxConfig {
            metadata: Some(api::PodSandboxMetadata {
                name: name.into(),
                uid: name.into(),
                namespace: "test".into(),
                attempt: 0,
            }),
            log_directory: "/tmp".into(),
            linux: Some(api::LinuxPodSandboxConfig {
                cgroup_parent: format!("/{}", self.name()),
                security_context: Some(api::LinuxSandboxSecurityContext {
                    namespace_options: Some(namespaces),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    /// Runs a container in a pod.
    ///
    /// # Panics
    /// When containerd refuses.
    #[track_caller]
    pub fn run_in_pod(&self, pod: &str, pod_name: &str, name: &str) -> String {
        let config = api::ContainerConfig {
            metadata: Some(api::ContainerMetadata { name: name.into(), attempt: 0 }),
            image: Some(api::ImageSpec { image: PAUSE.into(), ..Default::default() }),
            log_path: format!("{name}.log"),
            ..Default::default()
        };
        let request = api::CreateContainerRequest {
            pod_sandbox_id: pod.into(),
            config: Some(config),
            sandbox_config: Some(self.pod_config(pod_name)),
        };
        let client = self.client();
        let id = client.create_container(request).expect("create a container").container_id;
        client.start_container(api::StartContainerRequest { container_id: id.clone() }).expect("start a container");
        id
    }

    /// What containerd says that a container does.
    ///
    /// # Panics
    /// When it does not know it.
    #[track_caller]
    pub fn container_state(&self, id: &str) -> api::ContainerState {
        let request = api::ContainerStatusRequest { container_id: id.into(), verbose: false };
        self.client().container_status(request).expect("look at a container").status.expect("it has one").state()
    }

    /// Whether a pod runs.
    pub fn pod_is_ready(&self, id: &str) -> bool {
        let request = api::PodSandboxStatusRequest { pod_sandbox_id: id.into(), verbose: false };
        let status = self.client().pod_sandbox_status(request).expect("look at a pod");
        status.status.expect("it has one").state == api::PodSandboxState::SandboxReady as i32
    }

    /// Removes a pod.
    ///
    /// # Panics
    /// When containerd refuses.
    #[track_caller]
    pub fn remove_pod(&self, id: &str) {
        let client = self.client();
        client.stop_pod_sandbox(api::StopPodSandboxRequest { pod_sandbox_id: id.into() }).expect("stop a pod");
        client.remove_pod_sandbox(api::RemovePodSandboxRequest { pod_sandbox_id: id.into() }).expect("remove a pod");
    }
}
