//! A containerd of the test's own.

use std::fs;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::Value;
use tempfile::TempDir;

use crate::bundle::fill_rootfs;
use crate::command::{Done, eventually, run, run_with};
use crate::{dist, image, leftovers};

/// The image with busybox.
pub const BUSYBOX: &str = "runx.test/busybox:1";

/// The runtime under test.
pub const RUNTIME: &str = "io.containerd.runx.v1";

/// Where units are until the next boot.
const UNITS: &str = "/run/systemd/system";

/// A containerd with directories, sockets and a namespace of its own. It is stopped, and what its
/// containers left is removed, when this goes.
#[derive(Debug)]
pub struct Containerd {
    directory: TempDir,
    daemon: Option<Daemon>,
    /// The unit's name, where systemd is to have it.
    unit: Option<String>,
    namespace: String,
    /// Whether other containerds may use the same namespace.
    shared: bool,
    /// Where it finds shims first.
    shims: PathBuf,
    /// The daemon's program.
    program: PathBuf,
}

#[derive(Debug)]
enum Daemon {
    Child(Child),
    Unit(String),
}

/// What `ctr events` prints, while this lives.
#[derive(Debug)]
pub struct Events {
    client: Child,
    file: PathBuf,
}

impl Events {
    /// All so far.
    pub fn read(&self) -> String {
        fs::read_to_string(&self.file).unwrap_or_default()
    }

    /// Stops listening.
    pub fn end(&mut self) {
        let _ = self.client.kill();
        let _ = self.client.wait();
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        self.end();
    }
}

/// Why tests with containerd cannot run here, if they cannot.
pub fn obstacle() -> Option<String> {
    if let Some(why) = crate::obstacle() {
        return Some(why);
    }
    match Command::new("containerd").arg("--version").output() {
        Ok(_) => None,
        Err(e) => Some(format!("it needs containerd: {e}")),
    }
}

/// Returns from the test, aloud, if there is an obstacle.
#[macro_export]
macro_rules! needs_containerd {
    () => {
        if let Some(why) = $crate::containerd::obstacle() {
            $crate::skip_outside_machine(&why);
            return;
        }
    };
}

impl Containerd {
    /// Starts it, with the busybox image.
    ///
    /// # Panics
    /// When it does not come up.
    pub fn start() -> Self {
        Self::start_with(dist(), |_| None)
    }

    /// As [`Self::start`]; it finds the shims of another directory first.
    ///
    /// # Panics
    /// When it does not come up.
    pub fn start_with_shims(shims: PathBuf) -> Self {
        Self::start_with(shims, |_| None)
    }

    /// Starts it as a service of systemd, with what packages of containerd set for theirs.
    ///
    /// # Panics
    /// When it does not come up.
    pub fn start_as_service() -> Self {
        // Not the namespace's name, by which leftovers are found.
        Self::start_with(dist(), |directory| Some(format!("{directory}.service")))
    }

    /// Starts it with a configuration that depends on its directory. Images go to `namespace`.
    ///
    /// # Panics
    /// When it does not come up.
    pub fn start_configured(namespace: &str, configure: impl FnOnce(&Path) -> String) -> Self {
        let directory = TempDir::with_prefix("runx-ctd-").expect("make a directory");
        let this = Self {
            directory,
            daemon: None,
            unit: None,
            namespace: namespace.into(),
            shared: true,
            shims: dist(),
            program: "containerd".into(),
        };
        let config = configure(this.path());
        this.begin(&config)
    }

    fn start_with(shims: PathBuf, unit: impl FnOnce(&str) -> Option<String>) -> Self {
        let directory = TempDir::with_prefix("runx-ctd-").expect("make a directory");
        let name = directory.path().file_name().expect("it has a name").to_string_lossy().into_owned();
        let namespace = name.replace(['.', '-'], "");
        let this = Self {
            directory,
            daemon: None,
            unit: unit(&name),
            namespace,
            shared: false,
            shims,
            program: "containerd".into(),
        };
        let config = format!(
            "version = 2\nroot = \"{0}/root\"\nstate = \"{0}/state\"\n\
             disabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\n  address = \"{0}/c.sock\"\n",
            this.path().display()
        );
        this.begin(&config)
    }

    fn begin(self, config: &str) -> Self {
        let mut this = self;
        fs::write(this.path().join("config.toml"), config).expect("write the configuration");
        this.launch();
        let rootfs = this.path().join("rootfs");
        fs::create_dir(&rootfs).expect("make the rootfs");
        fill_rootfs(&rootfs);
        this.import(BUSYBOX, &rootfs, &[]);
        this
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// The containerd namespace of its containers: unique, so that leftovers can be found by it.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The directory of a container's bundle.
    pub fn bundle(&self, id: &str) -> PathBuf {
        self.path().join("state/io.containerd.runtime.v2.task").join(&self.namespace).join(id)
    }

    fn launch(&mut self) {
        let path = format!("{}:{}", self.shims.display(), std::env::var("PATH").unwrap_or_default());
        let (config, log) = (self.path().join("config.toml"), self.path().join("log"));
        self.daemon = Some(if let Some(unit) = &self.unit {
            // What packages of containerd have, as far as it decides about the shims.
            let text = format!(
                "[Service]\nExecStart=containerd --config {}\nEnvironment=PATH={path}\nStandardError=append:{}\n\
                 Type=notify\nDelegate=yes\nKillMode=process\nOOMScoreAdjust=-999\nTasksMax=infinity\n",
                config.display(),
                log.display()
            );
            fs::write(Path::new(UNITS).join(unit), text).expect("write the unit");
            run(Command::new("systemctl").arg("daemon-reload")).ok();
            run(Command::new("systemctl").args(["start", unit])).ok();
            Daemon::Unit(unit.clone())
        } else {
            let log = fs::OpenOptions::new().create(true).append(true).open(log).expect("open the log");
            let child = Command::new(&self.program)
                .arg("--config")
                .arg(config)
                .env("PATH", path)
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(log)
                .process_group(0)
                .spawn()
                .expect("start containerd");
            Daemon::Child(child)
        });
        // Whoever connects is served once it is up: asking it again and again would only slow it down.
        eventually("containerd listens", || UnixStream::connect(self.path().join("c.sock")).is_ok());
        eventually("containerd answers", || self.ctr(&["version"]).code == 0);
    }

    /// Stops the daemon and nothing else.
    pub fn stop_daemon(&mut self) {
        match self.daemon.take() {
            Some(Daemon::Child(mut child)) => {
                // SAFETY: the child has not been reaped, so the pid is its own.
                unsafe { libc::kill(child.id() as i32, libc::SIGTERM) };
                let _ = child.wait();
            }
            Some(Daemon::Unit(unit)) => {
                let _ = Command::new("systemctl").args(["stop", &unit]).output();
                let _ = fs::remove_file(Path::new(UNITS).join(&unit));
                let _ = Command::new("systemctl").args(["reset-failed", &unit]).output();
                let _ = Command::new("systemctl").arg("daemon-reload").output();
            }
            None => {}
        }
    }

    /// The daemon's pid, while it is a child of this process.
    pub fn daemon_pid(&self) -> Option<i32> {
        match &self.daemon {
            Some(Daemon::Child(child)) => Some(child.id() as i32),
            _ => None,
        }
    }

    /// Kills the daemon, as a lack of memory would.
    pub fn kill_daemon(&mut self) {
        if let Some(Daemon::Child(mut child)) = self.daemon.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Lets another program be the daemon, with its own configuration, when it is started the next time.
    ///
    /// # Panics
    /// When the configuration cannot be written.
    pub fn become_program(&mut self, program: &Path, configure: impl FnOnce(&Path) -> String) {
        self.program = program.to_owned();
        fs::write(self.path().join("config.toml"), configure(self.path())).expect("write the configuration");
    }

    /// Starts the daemon again.
    pub fn start_daemon(&mut self) {
        self.launch();
    }

    /// Stops the daemon and starts it again.
    pub fn restart_daemon(&mut self) {
        self.stop_daemon();
        self.launch();
    }

    fn client(&self, args: &[&str]) -> Command {
        let mut command = Command::new("ctr");
        command.arg("-a").arg(self.path().join("c.sock")).args(["-n", &self.namespace]).args(args);
        command
    }

    /// Runs `ctr`.
    #[track_caller]
    pub fn ctr(&self, args: &[&str]) -> Done {
        run(&mut self.client(args))
    }

    /// Listens to events.
    ///
    /// # Panics
    /// When `ctr` cannot be started, or no event comes.
    pub fn events(&self) -> Events {
        let file = self.path().join("events");
        let output = fs::File::create(&file).expect("create a file");
        let client = self.client(&["events"]).stdin(Stdio::null()).stdout(output).spawn().expect("start ctr");
        let events = Events { client, file };
        // It listens once an event of ours has come through.
        eventually("events come", || {
            self.ctr(&["namespaces", "label", &self.namespace, "listening=yes"]);
            !events.read().is_empty()
        });
        events
    }

    /// Runs `ctr` with something on standard input.
    #[track_caller]
    pub fn ctr_with(&self, args: &[&str], input: &str) -> Done {
        run_with(&mut self.client(args), input)
    }

    /// Runs `ctr` on a terminal of the given size, given by script(1).
    #[track_caller]
    pub fn ctr_on_terminal(&self, args: &[&str], rows: u16, columns: u16) -> Done {
        let quoted: Vec<String> = args.iter().map(|word| format!("'{}'", word.replace('\'', "'\\''"))).collect();
        let line = format!(
            "stty rows {rows} cols {columns}; exec ctr -a '{}' -n '{}' {}",
            self.path().join("c.sock").display(),
            self.namespace,
            quoted.join(" ")
        );
        run(Command::new("script").args(["-qec", &line, "/dev/null"]))
    }

    /// `ctr run --rm` of the busybox image with flags and a command.
    #[track_caller]
    pub fn run(&self, flags: &[&str], id: &str, command: &[&str]) -> Done {
        self.ctr(&[&["run", "--rm", "--runtime", RUNTIME], flags, &[BUSYBOX, id], command].concat())
    }

    /// `ctr run -d` of the busybox image; a client that goes away leaves its FIFOs behind, so the output
    /// goes nowhere.
    #[track_caller]
    pub fn run_detached(&self, id: &str, command: &[&str]) -> Done {
        self.ctr(&[&["run", "-d", "--null-io", "--runtime", RUNTIME, BUSYBOX, id], command].concat())
    }

    /// Imports an image with the content of `rootfs`.
    #[track_caller]
    pub fn import(&self, name: &str, rootfs: &Path, entrypoint: &[&str]) {
        let archive = self.path().join("image.tar");
        image::write(&archive, name, rootfs, entrypoint);
        self.ctr(&["image", "import", &archive.to_string_lossy()]).ok();
        let _ = fs::remove_file(archive);
    }

    /// Imports an image whose only layer is `module`. `kinds` are the types of its configuration and of its layer; `flags`
    /// are of `ctr image import`.
    #[track_caller]
    pub fn import_artifact(&self, name: &str, module: &[u8], kinds: (&str, &str), flags: &[&str]) {
        let archive = self.path().join("artifact.tar");
        image::write_artifact(&archive, name, module, kinds);
        self.ctr(&[&["image", "import"], flags, &[&*archive.to_string_lossy()]].concat()).ok();
        let _ = fs::remove_file(archive);
    }

    /// Kills a running task, and deletes it and its container.
    #[track_caller]
    pub fn end(&self, id: &str) {
        self.ctr(&["task", "kill", "-s", "SIGKILL", id]).ok();
        eventually("it has stopped", || self.status(id).as_deref() == Some("STOPPED"));
        // Its exit code is not 0, which ctr passes on.
        self.ctr(&["task", "delete", id]);
        self.ctr(&["container", "rm", id]).ok();
    }

    /// The status of a task as `ctr task ls` prints it.
    #[track_caller]
    pub fn status(&self, id: &str) -> Option<String> {
        let list = self.ctr(&["task", "ls"]).ok().stdout;
        list.lines().find_map(|line| {
            let mut fields = line.split_ascii_whitespace();
            (fields.next() == Some(id)).then(|| fields.nth(1).unwrap_or_default().to_owned())
        })
    }

    /// The pid of a task.
    #[track_caller]
    pub fn pid(&self, id: &str) -> Option<i32> {
        let list = self.ctr(&["task", "ls"]).ok().stdout;
        list.lines().find_map(|line| {
            let mut fields = line.split_ascii_whitespace();
            (fields.next() == Some(id)).then(|| fields.next()?.parse().ok()).flatten()
        })
    }

    /// The pid of the shim that a task's process is a child of.
    pub fn shim(&self, id: &str) -> Option<i32> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid(id)?)).ok()?;
        status.lines().find_map(|line| line.strip_prefix("PPid:")?.trim().parse().ok())
    }

    /// Fails the test if containers have left anything.
    ///
    /// # Panics
    /// With what is left.
    #[track_caller]
    pub fn assert_nothing_left(&self) {
        let containers: Value = Value::from(self.ctr(&["container", "ls", "-q"]).ok().stdout);
        assert_eq!(containers, Value::from(""), "containers are left");
        self.remove_group();
        leftovers::assert_none(&self.namespace, &[PathBuf::from("/run/containerd/runx").join(&self.namespace)]);
        let task = self.path().join("state/io.containerd.runtime.v2.task");
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let task = task.to_string_lossy();
        assert!(!mounts.contains(&*task), "mounts are left: {mounts}");
    }

    /// The namespace's own cgroup, which is containerd's name for all its containers.
    fn remove_group(&self) {
        let root = Path::new("/sys/fs/cgroup");
        let _ = fs::remove_dir(root.join(&self.namespace));
        for entry in fs::read_dir(root).into_iter().flatten().flatten() {
            let _ = fs::remove_dir(entry.path().join(&self.namespace));
        }
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        if self.daemon.is_some() {
            let list = self.ctr(&["container", "ls", "-q"]).stdout;
            for id in list.split_ascii_whitespace() {
                let _ = self.ctr(&["task", "kill", "-s", "SIGKILL", id]);
                let _ = self.ctr(&["task", "delete", "--force", id]);
                let _ = self.ctr(&["container", "rm", id]);
            }
        }
        self.stop_daemon();
        // A client that is killed leaves the mount in which it looked a user up.
        let directory = self.path().to_string_lossy().into_owned();
        for line in fs::read_to_string("/proc/self/mountinfo").unwrap_or_default().lines() {
            if let Some(point) = line.split(' ').nth(4).filter(|_| line.contains(&directory)) {
                let _ = Command::new("umount").args(["-l", point]).output();
                let _ = fs::remove_dir(point);
            }
        }
        if !self.shared {
            self.remove_group();
            let _ = fs::remove_dir_all(PathBuf::from("/run/containerd/runx").join(&self.namespace));
        }
        if std::thread::panicking() {
            let log = fs::read_to_string(self.path().join("log")).unwrap_or_default();
            let last: Vec<&str> = log.lines().rev().take(15).collect();
            eprintln!("containerd's last words, newest first:\n{}", last.join("\n"));
        }
    }
}
