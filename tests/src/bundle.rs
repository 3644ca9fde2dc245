//! Bundles made of busybox, and the command on them.

use std::fs;
use std::os::unix::fs::{lchown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::command::{Done, run, run_with};
use crate::{dist, leftovers};

const APPLETS: &[&str] = &[
    "sh", "ls", "cat", "echo", "sleep", "ps", "mount", "id", "env", "hostname", "mkdir", "touch", "stat", "true",
    "false", "kill", "ip", "readlink", "head", "grep", "dd", "tty", "stty", "wc", "test", "mknod", "ulimit", "rm",
    "sort", "pwd", "nc", "seq", "yes", "chmod", "umask", "printf", "tr", "od",
];

/// Fills `rootfs` with busybox.
pub fn fill_rootfs(rootfs: &Path) {
    for directory in ["bin", "etc", "tmp", "proc", "sys", "dev", "root"] {
        fs::create_dir_all(rootfs.join(directory)).expect("make the rootfs");
    }
    fs::copy("/bin/busybox", rootfs.join("bin/busybox")).expect("copy busybox");
    for applet in APPLETS {
        symlink("busybox", rootfs.join("bin").join(applet)).expect("link an applet");
    }
    fs::write(rootfs.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n")
        .expect("write passwd");
    fs::write(rootfs.join("etc/group"), "root:x:0:\nuser:x:1000:\n").expect("write group");
}

/// A bundle with a state directory of its own. What it left running is removed with it.
#[derive(Debug)]
pub struct Bundle {
    directory: TempDir,
    /// config.json, written at every call.
    pub config: Value,
    id: String,
}

impl Bundle {
    /// A bundle that runs `args`, configured as `runx spec` does but without a terminal.
    ///
    /// # Panics
    /// When it cannot be made.
    pub fn new(args: &[&str]) -> Self {
        let directory = TempDir::with_prefix("runx-test-").expect("make a directory");
        let bundle = directory.path().join("bundle");
        fs::create_dir(&bundle).expect("make the bundle");
        run(Command::new(dist().join("runx")).args(["spec", "-b"]).arg(&bundle)).ok();
        let text = fs::read_to_string(bundle.join("config.json")).expect("read config.json");
        let mut config: Value = serde_json::from_str(&text).expect("parse config.json");
        config["process"]["terminal"] = json!(false);
        config["process"]["args"] = json!(args);
        fs::create_dir(bundle.join("rootfs")).expect("make the rootfs");
        fill_rootfs(&bundle.join("rootfs"));
        let unique = directory.path().file_name().expect("it has a name").to_string_lossy().into_owned();
        Self { directory, config, id: unique }
    }

    /// A bundle that runs a shell script.
    pub fn script(script: &str) -> Self {
        Self::new(&["sh", "-c", script])
    }

    /// The container's id: unique on this machine, so that leftovers can be found by it.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The bundle's directory.
    pub fn path(&self) -> PathBuf {
        self.directory.path().join("bundle")
    }

    /// The root filesystem.
    pub fn rootfs(&self) -> PathBuf {
        self.path().join("rootfs")
    }

    /// A place for other files of the test.
    pub fn scratch(&self) -> &Path {
        self.directory.path()
    }

    /// Where the state goes.
    pub fn state_root(&self) -> PathBuf {
        self.directory.path().join("state")
    }

    /// `runx` with this state directory, config.json freshly written.
    ///
    /// # Panics
    /// When config.json cannot be written.
    pub fn command(&self, args: &[&str]) -> Command {
        if !self.config.is_null() {
            fs::write(self.path().join("config.json"), self.config.to_string()).expect("write config.json");
        }
        let mut command = Command::new(dist().join("runx"));
        command.arg("--root").arg(self.state_root()).args(args).current_dir(self.path());
        command
    }

    /// Runs `runx` with these arguments.
    #[track_caller]
    pub fn runx(&self, args: &[&str]) -> Done {
        run(&mut self.command(args))
    }

    /// `runx run`.
    #[track_caller]
    pub fn run(&self) -> Done {
        self.runx(&["run", &self.id])
    }

    /// `runx run` with something on standard input.
    #[track_caller]
    pub fn run_with(&self, input: &str) -> Done {
        run_with(&mut self.command(&["run", &self.id]), input)
    }

    /// `runx create`, with the container's output in `output` of the scratch directory.
    #[track_caller]
    pub fn create(&self) -> Done {
        let mut command = self.command(&["create", &self.id]);
        crate::command::run_detached(&mut command, &self.output())
    }

    /// Where a created container's output is.
    pub fn output(&self) -> PathBuf {
        self.scratch().join("output")
    }

    /// `runx exec` of a shell script.
    #[track_caller]
    pub fn exec(&self, script: &str) -> Done {
        self.runx(&["exec", &self.id, "sh", "-c", script])
    }

    /// The container's state.
    ///
    /// # Panics
    /// When there is none.
    #[track_caller]
    pub fn state(&self) -> Value {
        serde_json::from_str(&self.runx(&["state", &self.id]).ok().stdout).expect("state is JSON")
    }

    /// Fails the test if anything of the container is left.
    ///
    /// # Panics
    /// With what is left.
    #[track_caller]
    pub fn assert_nothing_left(&self) {
        leftovers::assert_none(&self.id, &[self.state_root()]);
    }

    /// Sets the config's value at a JSON pointer's parent object.
    ///
    /// # Panics
    /// When there is no such object.
    #[track_caller]
    pub fn set(&mut self, object: &str, key: &str, value: Value) {
        let target = if object.is_empty() { Some(&mut self.config) } else { self.config.pointer_mut(object) };
        target.and_then(Value::as_object_mut).expect("the config has this object").insert(key.to_owned(), value);
    }

    /// Puts the container into a user namespace of its own, whose root is the host's user `base`, as its root filesystem is.
    ///
    /// # Panics
    /// When the root filesystem cannot be given away.
    pub fn own_users(&mut self, base: u32) {
        let maps = json!([{"containerID": 0, "hostID": base, "size": 65536}]);
        self.config["linux"]["namespaces"].as_array_mut().expect("namespaces").push(json!({"type": "user"}));
        self.set("/linux", "uidMappings", maps.clone());
        self.set("/linux", "gidMappings", maps);
        self.config["root"]["readonly"] = json!(false);
        give(&self.rootfs(), base);
    }

    /// Adds a mount.
    ///
    /// # Panics
    /// When the config has no mounts.
    pub fn add_mount(&mut self, mount: Value) {
        self.config["mounts"].as_array_mut().expect("the config has mounts").push(mount);
    }
}

/// Gives a file, or a directory with all below it, to a user and a group of this id.
///
/// # Panics
/// When it cannot be given away.
pub fn give(path: &Path, id: u32) {
    lchown(path, Some(id), Some(id)).expect("give a file away");
    if path.is_dir() && !path.is_symlink() {
        for entry in fs::read_dir(path).expect("list a directory") {
            give(&entry.expect("list a directory").path(), id);
        }
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        let _ = Command::new(dist().join("runx"))
            .arg("--root")
            .arg(self.state_root())
            .args(["delete", "--force", &self.id])
            .output();
        // The group above those of tests that name one; it goes with the last of them.
        let _ = fs::remove_dir("/sys/fs/cgroup/runx-tests");
        for hierarchy in fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
            let _ = fs::remove_dir(hierarchy.path().join("runx-tests"));
        }
    }
}
