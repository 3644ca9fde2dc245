//! A podman of the test's own, with `runx` as its runtime.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use tempfile::TempDir;

use crate::bundle::fill_rootfs;
use crate::command::{Done, run, run_with};
use crate::{dist, leftovers};

/// The image with busybox.
pub const IMAGE: &str = "localhost/runx-test:1";

/// Why tests with podman cannot run here, if they cannot.
pub fn obstacle() -> Option<String> {
    if let Some(why) = crate::obstacle() {
        return Some(why);
    }
    ["podman", "conmon"].into_iter().find_map(|program| {
        Command::new(program).arg("--version").output().err().map(|e| format!("it needs {program}: {e}"))
    })
}

/// Directories, locks and cgroups of its own, and nothing of the machine's configuration.
#[derive(Debug)]
pub struct Podman {
    directory: TempDir,
}

impl Podman {
    /// Makes them, and the image.
    ///
    /// # Panics
    /// When podman does not import it.
    pub fn start() -> Self {
        let this = Self { directory: TempDir::with_prefix("runx-podman-").expect("make a directory") };
        // Locks in shared memory would be those of every podman here. The limits are those that a container can
        // have where its engine has no CAP_SYS_RESOURCE.
        let config = "[containers]\ndefault_ulimits = [\"nofile=1024:1024\", \"nproc=1024:1024\"]\n\
                      [engine]\nlock_type = \"file\"\nruntime_supports_json = [\"runx\"]\n";
        fs::write(this.path().join("containers.conf"), config).expect("write the configuration");
        for name in ["tmp", "bin"] {
            fs::create_dir(this.path().join(name)).expect("make a directory");
        }
        // podman forgets its --runtime-flag when it cleans up.
        let program = dist().join("runx");
        let script = format!("#!/bin/sh\nexec {} --root={} \"$@\"\n", program.display(), this.state_root().display());
        let wrapper = this.path().join("bin/runx");
        fs::write(&wrapper, script).expect("write the wrapper");
        fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755)).expect("make it executable");
        let rootfs = this.path().join("rootfs");
        fs::create_dir(&rootfs).expect("make the rootfs");
        fill_rootfs(&rootfs);
        let archive = this.path().join("rootfs.tar");
        let mut tar = tar::Builder::new(fs::File::create(&archive).expect("create the archive"));
        tar.follow_symlinks(false);
        tar.append_dir_all(".", &rootfs).and_then(|()| tar.finish()).expect("pack the rootfs");
        this.podman(&["import", &archive.to_string_lossy(), IMAGE]).ok();
        this
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Where `runx` keeps its state.
    pub fn state_root(&self) -> PathBuf {
        self.path().join("runx")
    }

    fn parent(&self) -> String {
        let name = self.path().file_name().expect("it has a name").to_string_lossy();
        format!("/{name}")
    }

    fn words(&self, args: &[&str]) -> Vec<String> {
        let at = |name: &str| self.path().join(name).to_string_lossy().into_owned();
        let mut words: Vec<String> =
            ["--cgroup-manager", "cgroupfs", "--events-backend", "file", "--storage-driver", "vfs"]
                .map(str::to_owned)
                .into();
        for (flag, value) in [
            ("--runtime", at("bin/runx")),
            ("--root", at("root")),
            ("--runroot", at("run")),
            ("--tmpdir", at("libpod")),
        ] {
            words.extend([flag.to_owned(), value]);
        }
        let (command, rest) = args.split_first().expect("a command");
        words.push((*command).to_owned());
        if matches!(*command, "run" | "create") {
            let parent = self.parent();
            words.extend(["--network", "none", "--cgroup-parent", &parent].map(str::to_owned));
        }
        words.extend(rest.iter().map(|word| (*word).to_owned()));
        words
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("CONTAINERS_CONF", self.path().join("containers.conf")).env("TMPDIR", self.path().join("tmp"));
        command
    }

    /// Runs podman.
    #[track_caller]
    pub fn podman(&self, args: &[&str]) -> Done {
        run(self.command("podman").args(self.words(args)))
    }

    /// Runs podman with something on standard input.
    #[track_caller]
    pub fn podman_with(&self, args: &[&str], input: &str) -> Done {
        run_with(self.command("podman").args(self.words(args)), input)
    }

    /// Runs podman on a terminal of the given size, given by script(1).
    #[track_caller]
    pub fn podman_on_terminal(&self, args: &[&str], rows: u16, columns: u16) -> Done {
        let words = self.words(args);
        let quoted: Vec<String> = words.iter().map(|word| format!("'{}'", word.replace('\'', "'\\''"))).collect();
        let line = format!("stty rows {rows} cols {columns}; exec podman {}", quoted.join(" "));
        run(self.command("script").args(["-qec", &line, "/dev/null"]))
    }

    /// The cgroup directory of a container for a version 1 controller, or for version 2.
    ///
    /// # Panics
    /// When podman does not know the container.
    #[track_caller]
    pub fn group(&self, name: &str, controller: &str) -> PathBuf {
        let id = self.podman(&["inspect", "--format", "{{.Id}}", name]).ok().stdout;
        let below = format!("{}/libpod-{}", self.parent().trim_start_matches('/'), id.trim());
        let old = Path::new("/sys/fs/cgroup").join(controller).join(&below);
        if old.exists() { old } else { Path::new("/sys/fs/cgroup").join(below) }
    }

    /// Fails the test if containers have left anything.
    ///
    /// # Panics
    /// With what is left.
    #[track_caller]
    pub fn assert_nothing_left(&self) {
        assert_eq!(self.podman(&["ps", "-a", "-q"]).ok().stdout, "", "containers are left");
        // conmon ends a little after its container.
        for _ in 0..100 {
            self.remove_groups();
            if !self.group_is_there() {
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let name = self.path().file_name().expect("it has a name").to_string_lossy().into_owned();
        leftovers::assert_none(&name, &[self.state_root()]);
    }

    fn group_is_there(&self) -> bool {
        let name = self.parent().trim_start_matches('/').to_owned();
        hierarchies().any(|hierarchy| hierarchy.join(&name).exists())
    }

    /// The group above the containers', which podman leaves; and conmon's.
    fn remove_groups(&self) {
        let name = self.parent().trim_start_matches('/').to_owned();
        for hierarchy in hierarchies() {
            let own = hierarchy.join(&name);
            // Where a hierarchy is not mounted, podman makes ordinary directories and files of the same names.
            for file in ["tasks", "cgroup.procs"] {
                let _ = fs::remove_file(own.join("conmon").join(file));
            }
            let _ = fs::remove_dir(own.join("conmon"));
            let _ = fs::remove_dir(own);
        }
    }
}

/// The mounts of version 1's controllers, and that of version 2.
fn hierarchies() -> impl Iterator<Item = PathBuf> {
    let root = PathBuf::from("/sys/fs/cgroup");
    fs::read_dir(&root).into_iter().flatten().flatten().map(|entry| entry.path()).chain([root])
}

impl Drop for Podman {
    fn drop(&mut self) {
        let _ = run(self.command("podman").args(self.words(&["rm", "--force", "--all", "--time", "0"])));
        self.remove_groups();
        let directory = self.path().to_string_lossy().into_owned();
        for line in fs::read_to_string("/proc/self/mountinfo").unwrap_or_default().lines() {
            if let Some(point) = line.split(' ').nth(4).filter(|point| point.starts_with(&directory)) {
                let _ = Command::new("umount").args(["-l", point]).output();
            }
        }
    }
}
