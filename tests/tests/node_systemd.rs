//! `runx-node` on a machine with a real systemd: by its private socket, without any privilege.

use std::fs;
use std::path::Path;
use std::process::Command;

use k8s_cri::v1 as api;
use runx_tests::bundle::fill_rootfs;
use runx_tests::command::{Done, eventually, run};
use runx_tests::cri::Client;
use runx_tests::{dist, image, machine};

macro_rules! needs_installer {
    () => {
        runx_tests::needs_systemd!();
        runx_tests::needs_machine!();
    };
}

/// A containerd that systemd runs, and that does not start with a file named `sabotage` beside it and runx in its files.
struct Service {
    directory: tempfile::TempDir,
    unit: String,
}

impl Service {
    fn start() -> Self {
        let directory = tempfile::TempDir::with_prefix("runx-service-").expect("make a directory");
        let at = directory.path().display().to_string();
        let unit = format!(
            "{}.service",
            directory.path().file_name().expect("it has a name").to_string_lossy().to_lowercase()
        );
        let pause = machine::PAUSE;
        let config = format!(
            "version = 2\nroot = \"{at}/root\"\nstate = \"{at}/state\"\n[grpc]\n  address = \"{at}/c.sock\"\n\
             [plugins.\"io.containerd.grpc.v1.cri\"]\n  sandbox_image = \"{pause}\"\n  restrict_oom_score_adj = true\n\
             [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc]\n  runtime_type = \"io.containerd.runc.v2\"\n  \
             [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc.options]\n    SystemdCgroup = true\n"
        );
        fs::write(directory.path().join("config.toml"), config).expect("write the configuration");
        let text = format!(
            "[Service]\nType=notify\nDelegate=yes\nKillMode=process\nStartLimitIntervalSec=0\n\
             ExecStartPre=/bin/sh -c '! [ -e {at}/sabotage ] || ! grep -q runtimes.runx {at}/config.toml'\n\
             ExecStart=/usr/bin/containerd --config {at}/config.toml\n"
        );
        fs::write(Path::new("/run/systemd/system").join(&unit), text).expect("write the unit");
        let this = Self { directory, unit };
        this.systemctl(&["daemon-reload"]);
        this.systemctl(&["start", &this.unit]);
        this
    }

    fn systemctl(&self, words: &[&str]) -> String {
        run(Command::new("systemctl").args(words)).ok().stdout
    }

    /// When it was started, by systemd's word.
    fn since(&self) -> String {
        self.systemctl(&["show", "--property", "ActiveEnterTimestampMonotonic", &self.unit])
    }

    /// The installer as a pod has it: root, but without any capability and without new ones.
    fn node(&self, words: &[&str]) -> Done {
        let at = |name: &str| self.directory.path().join(name).to_string_lossy().into_owned();
        let mut command = Command::new("setpriv");
        command.args(["--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]);
        command.arg(dist().join("runx-node")).arg(words[0]);
        let paths =
            [("containerd-config", "config.toml"), ("socket", "c.sock"), ("state-dir", "node"), ("install-dir", "opt")];
        for (flag, name) in paths {
            command.arg(format!("--{flag}")).arg(at(name));
        }
        command.args(["--containerd", "/usr/bin/containerd"]);
        if words[0] != "status" {
            command.args(["--unit", &self.unit]);
        }
        if words[0] == "install" {
            command.arg("--programs").arg(at("programs"));
        }
        run(command.args(&words[1..]))
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = Command::new("systemctl").args(["stop", &self.unit]).output();
        let _ = fs::remove_file(Path::new("/run/systemd/system").join(&self.unit));
        let _ = Command::new("systemctl").args(["reset-failed", &self.unit]).output();
        let _ = Command::new("systemctl").arg("daemon-reload").output();
    }
}

#[test]
fn by_systemd_it_is_installed_rolled_back_and_taken_away_without_any_capability() {
    needs_installer!();
    let mut service = Service::start();
    machine::write_programs(&service.directory.path().join("programs"), "one");
    let config = service.directory.path().join("config.toml");
    let before = fs::read(&config).expect("read the configuration");
    fs::write(service.directory.path().join("sabotage"), "").expect("write a file");
    service.node(&["install"]).fails(1, &["its configuration was restored", "\"failed\""]);
    assert_eq!(fs::read(&config).expect("read the configuration"), before);
    fs::remove_file(service.directory.path().join("sabotage")).expect("remove a file");

    let since = service.since();
    // The unit is looked for before a file is touched.
    let named = std::mem::replace(&mut service.unit, "runx-nosuch.service".into());
    service.node(&["install"]).fails(1, &["nothing was changed", "runx-nosuch.service", "--unit"]);
    service.unit = named;
    assert_eq!(fs::read(&config).expect("read the configuration"), before);
    assert_eq!(service.since(), since);
    service.node(&["install"]).ok();
    let installed = service.since();
    assert_ne!(installed, since);
    assert_eq!(service.node(&["status"]).ok().code, 0);
    service.node(&["install"]).ok();
    assert_eq!(service.since(), installed);
    service.node(&["uninstall"]).ok();
    assert_ne!(service.since(), installed);
    assert_eq!(fs::read(&config).expect("read the configuration"), before);
    assert!(!service.directory.path().join("opt").exists() && !service.directory.path().join("node").exists());
    // A test beside this one has some for moments.
    eventually("no unit is left", || {
        service.systemctl(&["list-units", "--all", "--plain", "--no-legend", "runx-node-*"]).is_empty()
    });
}

#[test]
fn pods_of_the_installed_handler_are_in_scopes_of_systemd_as_the_kubelet_wants_them() {
    needs_installer!();
    let service = Service::start();
    let at = service.directory.path();
    let programs = at.join("programs");
    fs::create_dir(&programs).expect("make a directory");
    fs::copy(dist().join("containerd-shim-runx-v1"), programs.join("containerd-shim-runx-v1")).expect("copy the shim");
    service.node(&["install"]).ok();
    let rootfs = at.join("rootfs");
    fs::create_dir(&rootfs).expect("make a directory");
    fill_rootfs(&rootfs);
    let archive = at.join("image.tar");
    image::write(&archive, machine::PAUSE, &rootfs, &["/bin/sleep", "2147483647"]);
    let socket = at.join("c.sock");
    run(Command::new("ctr").arg("-a").arg(&socket).args(["-n", "k8s.io", "images", "import"]).arg(&archive)).ok();
    let client = Client::connect(&socket);
    let name = at.file_name().expect("it has a name").to_string_lossy().to_lowercase().replace('-', "");
    let slice = format!("{name}.slice");
    let config = api::PodSandboxConfig {
        metadata: Some(api::PodSandboxMetadata {
            name: name.clone(),
            uid: name.clone(),
            namespace: "test".into(),
            attempt: 0,
        }),
        log_directory: "/tmp".into(),
        linux: Some(api::LinuxPodSandboxConfig {
            cgroup_parent: format!("/{slice}"),
            security_context: Some(api::LinuxSandboxSecurityContext {
                namespace_options: Some(api::NamespaceOption {
                    network: api::NamespaceMode::Node as i32,
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    };
    let request = api::RunPodSandboxRequest { config: Some(config), runtime_handler: "runx".into() };
    let id = client.run_pod_sandbox(request).expect("run a pod").pod_sandbox_id;
    let group = Path::new("/sys/fs/cgroup").join(&slice).join(format!("cri-containerd-{id}.scope"));
    assert!(group.join("cgroup.procs").exists(), "{} is not there", group.display());
    service.node(&["uninstall"]).fails(1, &["1 running pods", &format!("test/{name}")]);
    client.stop_pod_sandbox(api::StopPodSandboxRequest { pod_sandbox_id: id.clone() }).expect("stop it");
    client.remove_pod_sandbox(api::RemovePodSandboxRequest { pod_sandbox_id: id }).expect("remove it");
    eventually("its group is gone", || !group.exists());
    service.systemctl(&["stop", &slice]);
    eventually("its shim has ended", || {
        service.node(&["uninstall"]).ok();
        !at.join("opt").exists()
    });
}
