//! An ordinary user of the test's own, who is in no file of the machine, and his bundle.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::bundle::fill_rootfs;
use crate::command::{Done, run, run_detached};
use crate::{dist, leftovers};

/// His user and group id.
pub const ID: u32 = 64_123;

/// The first of his further ids, and how many.
pub const FURTHER: (u32, u32) = (1_640_000_000, 65_536);

/// Why he cannot have containers here, if he cannot.
pub fn obstacle() -> Option<String> {
    if let Some(why) = crate::obstacle() {
        return Some(why);
    }
    let tried = Command::new("unshare").args(["--user", "--mount", "true"]).uid(ID).gid(ID).output();
    match tried {
        Ok(output) if output.status.success() => None,
        Ok(output) => {
            Some(format!("ordinary users may not make namespaces: {}", String::from_utf8_lossy(&output.stderr)))
        }
        Err(e) => Some(format!("it needs unshare (package util-linux): {e}")),
    }
}

/// Why he cannot have further ids here, if he cannot.
pub fn obstacle_to_further_ids() -> Option<String> {
    let found = |name: &str| ["/usr/bin", "/bin", "/usr/sbin"].iter().any(|bin| Path::new(bin).join(name).exists());
    match ["newuidmap", "newgidmap", "setpriv"].into_iter().find(|name| !found(name)) {
        Some(name) => Some(format!("it needs {name} (packages uidmap and util-linux)")),
        None => obstacle(),
    }
}

/// Returns from the test, aloud, where an ordinary user cannot have containers.
#[macro_export]
macro_rules! needs_user {
    ($obstacle:ident) => {
        if let Some(why) = $crate::user::$obstacle() {
            $crate::skip_outside_machine(&why);
            return;
        }
    };
}

/// His bundle, with the programs beside it: he may not be let in where they were built.
#[derive(Debug)]
pub struct OwnBundle {
    directory: TempDir,
    /// config.json, written at every call.
    pub config: Value,
    id: String,
}

impl OwnBundle {
    /// A bundle that runs a shell script, configured as `runx spec --rootless` does for him but without a terminal.
    ///
    /// # Panics
    /// When it cannot be made.
    pub fn script(script: &str) -> Self {
        let directory = TempDir::with_prefix("runx-test-").expect("make a directory");
        let id = directory.path().file_name().expect("it has a name").to_string_lossy().into_owned();
        let mut this = Self { directory, config: Value::Null, id };
        for name in ["bin", "bundle", "bundle/rootfs", "home", "etc"] {
            fs::create_dir(this.scratch().join(name)).expect("make a directory");
        }
        for program in fs::read_dir(dist()).expect("list the programs").flatten() {
            fs::copy(program.path(), this.scratch().join("bin").join(program.file_name())).expect("copy a program");
        }
        fill_rootfs(&this.rootfs());
        this.write_accounts();
        run(Command::new("chown").args(["-Rh", &format!("{ID}:{ID}")]).arg(this.scratch())).ok();
        this.runx(&["spec", "--rootless"]).ok();
        let text = fs::read_to_string(this.path().join("config.json")).expect("read config.json");
        this.config = serde_json::from_str(&text).expect("parse config.json");
        this.config["process"]["terminal"] = json!(false);
        this.config["process"]["args"] = json!(["sh", "-c", script]);
        this
    }

    /// What the machine says of him, in files that his commands see over its own: see [`Self::known`].
    fn write_accounts(&self) {
        let (first, count) = FURTHER;
        let name = "runx-test-user";
        let with = |file: &str, line: String| {
            let text = fs::read_to_string(Path::new("/etc").join(file)).unwrap_or_default();
            fs::write(self.scratch().join("etc").join(file), format!("{}\n{line}\n", text.trim_end())).expect("write");
        };
        with("passwd", format!("{name}:x:{ID}:{ID}::{}:/bin/sh", self.scratch().join("home").display()));
        with("group", format!("{name}:x:{ID}:"));
        with("subuid", format!("{name}:{first}:{count}"));
        with("subgid", format!("{name}:{first}:{count}"));
    }

    /// Adds his further ids to the mappings.
    pub fn map_further_ids(&mut self) {
        let (first, count) = FURTHER;
        for key in ["uidMappings", "gidMappings"] {
            self.config["linux"][key] = json!([
                {"containerID": 0, "hostID": ID, "size": 1},
                {"containerID": 1, "hostID": first, "size": count},
            ]);
        }
    }

    /// The container's id: unique on this machine.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The bundle's directory.
    pub fn path(&self) -> PathBuf {
        self.scratch().join("bundle")
    }

    /// The root filesystem.
    pub fn rootfs(&self) -> PathBuf {
        self.path().join("rootfs")
    }

    /// All that is his.
    pub fn scratch(&self) -> &Path {
        self.directory.path()
    }

    /// Where the state is.
    pub fn state_root(&self) -> PathBuf {
        self.scratch().join("state")
    }

    fn words(&self, args: &[&str]) -> Vec<String> {
        if !self.config.is_null() {
            let file = self.path().join("config.json");
            fs::write(&file, self.config.to_string()).expect("write config.json");
            chown(&file, Some(ID), Some(ID)).expect("give config.json away");
        }
        let at = |name: &str| self.scratch().join(name).to_string_lossy().into_owned();
        let mut words = vec![at("bin/runx"), "--root".to_owned(), at("state")];
        words.extend(args.iter().map(|word| (*word).to_owned()));
        words
    }

    fn settle(&self, mut command: Command) -> Command {
        command.current_dir(self.path()).env("HOME", self.scratch().join("home"));
        for variable in ["XDG_RUNTIME_DIR", "XDG_CACHE_HOME", "USER"] {
            command.env_remove(variable);
        }
        command
    }

    /// `runx` as this user, whom nobody knows.
    pub fn command(&self, args: &[&str]) -> Command {
        let words = self.words(args);
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).uid(ID).gid(ID);
        self.settle(command)
    }

    /// Any program as this user, in a mount namespace in which he has a name and further ids.
    pub fn known(&self, words: &[String]) -> Command {
        let script = "set -e; for file in passwd group subuid subgid; do
                          [ ! -e /etc/$file ] || mount --bind \"$1/$file\" /etc/$file
                      done
                      shift
                      exec setpriv --reuid \"$1\" --regid \"$1\" --clear-groups -- \"${@:2}\"";
        let mut command = Command::new("unshare");
        command.args(["--mount", "bash", "-c", script, "sh"]).arg(self.scratch().join("etc"));
        command.arg(ID.to_string()).args(words);
        self.settle(command)
    }

    /// `runx` as this user, in a mount namespace in which he has a name and further ids.
    pub fn command_when_known(&self, args: &[&str]) -> Command {
        self.known(&self.words(args))
    }

    /// Runs `runx`.
    #[track_caller]
    pub fn runx(&self, args: &[&str]) -> Done {
        run(&mut self.command(args))
    }

    /// `runx run`.
    #[track_caller]
    pub fn run(&self) -> Done {
        self.runx(&["run", &self.id])
    }

    /// `runx run`, with further ids.
    #[track_caller]
    pub fn run_when_known(&self) -> Done {
        run(&mut self.command_when_known(&["run", &self.id]))
    }

    /// `runx create` or `runx run --detach`, with the container's output in `output` of the scratch directory.
    #[track_caller]
    pub fn detached(&self, args: &[&str]) -> Done {
        run_detached(&mut self.command(args), &self.scratch().join("output"))
    }

    /// The container's state.
    ///
    /// # Panics
    /// When there is none.
    #[track_caller]
    pub fn state(&self) -> Value {
        serde_json::from_str(&self.runx(&["state", &self.id]).ok().stdout).expect("state is JSON")
    }

    /// Puts a file into the root filesystem.
    ///
    /// # Panics
    /// When it cannot be written.
    pub fn add_file(&self, name: &str, text: &str) {
        let path = self.rootfs().join(name);
        fs::write(&path, text).expect("write the file");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("make it executable");
        chown(&path, Some(ID), Some(ID)).expect("give the file away");
    }

    /// Fails the test if anything of the container is left.
    ///
    /// # Panics
    /// With what is left.
    #[track_caller]
    pub fn assert_nothing_left(&self) {
        leftovers::assert_none(&self.id, &[self.state_root()]);
    }
}

impl Drop for OwnBundle {
    fn drop(&mut self) {
        let _ = self.command(&["delete", "--force", &self.id]).output();
    }
}
