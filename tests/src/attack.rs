//! Containers of hostile configurations and images, made by the command and through the shim: what holds an attack off has to
//! hold it off on both ways.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::bundle::Bundle;
use crate::command::{Done, run};
use crate::dist;
use crate::shim::{Host, Make, Shim};

/// Who makes the container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Door {
    /// `runx`.
    Command,
    /// `containerd-shim-runx-v1`, asked as containerd does.
    Shim,
}

/// Both.
pub const DOORS: [Door; 2] = [Door::Command, Door::Shim];

/// How a process ended, or why it did not begin.
#[derive(Debug)]
pub struct Outcome {
    /// Its exit code; 1 where it did not begin.
    pub code: i32,
    /// Both of its streams.
    pub output: String,
    /// Why it did not begin.
    pub error: String,
}

impl Outcome {
    /// Fails the test unless it ended with success.
    ///
    /// # Panics
    /// With all that is known.
    #[track_caller]
    pub fn ok(self) -> Self {
        assert_eq!((self.code, self.error.as_str()), (0, ""), "{}", self.output);
        self
    }

    /// Fails the test unless the process did not begin, for a reason with these words.
    ///
    /// # Panics
    /// With all that is known.
    #[track_caller]
    pub fn refused(self, words: &[&str]) -> Self {
        assert!(!self.error.is_empty(), "it was not refused: code {}, {}", self.code, self.output);
        for word in words {
            assert!(self.error.contains(word), "{word:?} is not in {:?}", self.error);
        }
        self
    }
}

/// A container that is attacked, or attacks. What it left is removed with it.
#[derive(Debug)]
pub struct Target {
    door: Door,
    /// Its configuration and root filesystem.
    pub bundle: Bundle,
    host: Option<Host>,
    shim: Option<Shim>,
    execs: usize,
}

const ID: &str = "a";

/// What the command says of a failure of its own; everything else is of the container's program.
fn own_error(done: &Done) -> String {
    let own = |line: &&str| line.starts_with("time=") && line.contains("level=error");
    if done.code == 0 { String::new() } else { done.stderr.lines().filter(own).collect() }
}

impl Target {
    /// A container that runs a shell script.
    ///
    /// # Panics
    /// When its bundle cannot be made.
    pub fn script(door: Door, script: &str) -> Self {
        let mut bundle = Bundle::script(script);
        bundle.config["root"]["readonly"] = json!(false);
        let host = (door == Door::Shim).then(|| Host::new(Make::Runx));
        Self { door, bundle, host, shim: None, execs: 0 }
    }

    /// An empty directory of the host, which nothing may come into.
    ///
    /// # Panics
    /// When it cannot be made.
    pub fn canary(&self) -> PathBuf {
        let path = self.bundle.scratch().join("canary");
        fs::create_dir_all(&path).expect("make a directory");
        path
    }

    fn log(&self) -> PathBuf {
        self.bundle.scratch().join("log")
    }

    /// Where the container's output is, of one that runs on.
    ///
    /// # Panics
    /// When there is none.
    pub fn output(&self) -> String {
        let path = if self.door == Door::Shim { self.log() } else { self.bundle.output() };
        String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
    }

    fn request(&self, host: &Host) -> containerd_shim_protos::api::CreateTaskRequest {
        let _ = fs::remove_dir_all(host.bundle(ID));
        host.make_bundle(ID, &["x"], |config| {
            *config = self.bundle.config.clone();
            config["root"]["path"] = json!(self.bundle.rootfs());
            if config["linux"].is_object() {
                config["linux"]["cgroupsPath"] = json!(format!("/{}/{ID}", host.namespace()));
            }
        });
        let log = format!("file://{}", self.log().display());
        let terminal = self.bundle.config["process"]["terminal"] == true;
        let mut request = host.create_request(ID);
        (request.stdout, request.stderr, request.terminal) = (log.clone(), log, terminal);
        request.rootfs.clear();
        request
    }

    /// Runs it to its end, and removes it.
    #[track_caller]
    pub fn run(&mut self) -> Outcome {
        let Some(host) = &self.host else {
            let done = self.bundle.run();
            let error = own_error(&done);
            return Outcome { code: done.code, output: done.stdout + &done.stderr, error };
        };
        let _ = fs::remove_file(self.log());
        let request = self.request(host);
        let begun = host.start_command(ID);
        if begun.code != 0 {
            return Outcome { code: begun.code, output: String::new(), error: begun.stderr };
        }
        let shim = host.shim(ID);
        let made = shim.create(&request).and_then(|_| shim.start(ID, ""));
        let outcome = match made {
            Ok(_) => {
                let code = shim.wait(ID, "").expect("wait").exit_status as i32;
                let _ = shim.delete(ID, "");
                Outcome { code, output: self.output(), error: String::new() }
            }
            Err(e) => {
                let _ = shim.delete(ID, "");
                Outcome { code: 1, output: self.output(), error: e.to_string() }
            }
        };
        let _ = shim.shutdown(ID);
        host.delete_command(ID);
        outcome
    }

    /// Starts it, to run on; returns the pid of its first process.
    ///
    /// # Panics
    /// When it does not start.
    #[track_caller]
    pub fn start(&mut self) -> i32 {
        let Some(host) = &self.host else {
            self.bundle.create().ok();
            self.bundle.runx(&["start", self.bundle.id()]).ok();
            return self.bundle.state()["pid"].as_i64().expect("it has a pid") as i32;
        };
        let request = self.request(host);
        let shim = host.shim(ID);
        let pid = shim.create(&request).expect("create").pid;
        shim.start(ID, "").expect("start");
        self.shim = Some(shim);
        pid as i32
    }

    /// Executes a script in it; `edit` changes the description of the process.
    ///
    /// # Panics
    /// When the test cannot ask for it.
    #[track_caller]
    pub fn exec(&mut self, script: &str, edit: impl FnOnce(&mut Value)) -> Outcome {
        let mut process = self.bundle.config["process"].clone();
        process["args"] = json!(["sh", "-c", script]);
        process["terminal"] = json!(false);
        edit(&mut process);
        self.execs += 1;
        let Some(shim) = &self.shim else {
            let file = self.bundle.scratch().join("process.json");
            fs::write(&file, process.to_string()).expect("write a process");
            let done = self.bundle.runx(&["exec", "--process", &file.to_string_lossy(), self.bundle.id()]);
            let error = own_error(&done);
            return Outcome { code: done.code, output: done.stdout + &done.stderr, error };
        };
        let id = format!("e{}", self.execs);
        let log = self.bundle.scratch().join(&id);
        let made = shim
            .exec(ID, &id, &process, |request| {
                request.stdout = format!("file://{}", log.display());
                request.stderr.clone_from(&request.stdout);
            })
            .and_then(|_| shim.start(ID, &id));
        let text = || String::from_utf8_lossy(&fs::read(&log).unwrap_or_default()).into_owned();
        match made {
            Ok(_) => {
                let code = shim.wait(ID, &id).expect("wait").exit_status as i32;
                let _ = shim.delete(ID, &id);
                Outcome { code, output: text(), error: String::new() }
            }
            Err(e) => {
                let _ = shim.delete(ID, &id);
                Outcome { code: 1, output: text(), error: e.to_string() }
            }
        }
    }

    /// Ends it, and fails the test if anything is left of it.
    ///
    /// # Panics
    /// With what is left.
    #[track_caller]
    pub fn end(&mut self) {
        match (&self.host, self.shim.take()) {
            (Some(host), shim) => {
                if let Some(shim) = shim {
                    let _ = shim.kill(ID, "", libc::SIGKILL, true);
                    let _ = shim.wait(ID, "");
                    let _ = shim.delete(ID, "");
                    let _ = shim.shutdown(ID);
                }
                host.assert_nothing_left();
            }
            (None, _) => {
                self.bundle.runx(&["delete", "--force", self.bundle.id()]);
                self.bundle.assert_nothing_left();
            }
        }
    }
}

/// What a directory of the host holds, and which mounts are in it.
///
/// # Panics
/// When it is not there any more.
pub fn content(directory: &Path) -> Vec<String> {
    let mut found: Vec<String> = fs::read_dir(directory)
        .expect("it is there")
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    let mounts = fs::read_to_string("/proc/self/mountinfo").expect("there are mounts");
    let name = directory.to_string_lossy().into_owned();
    found.extend(mounts.lines().filter(|line| line.contains(&name)).map(str::to_owned));
    found
}

/// The digests of all programs of ours.
///
/// # Panics
/// When they cannot be read.
pub fn programs() -> Vec<(PathBuf, String)> {
    let mut found: Vec<_> = fs::read_dir(dist())
        .expect("there are programs")
        .flatten()
        .map(|entry| {
            let bytes = fs::read(entry.path()).expect("read a program");
            (entry.path(), format!("{:x}", Sha256::digest(bytes)))
        })
        .collect();
    found.sort();
    found
}

/// Whether a program is installed.
pub fn installed(program: &str) -> bool {
    run(std::process::Command::new("sh").args(["-c", &format!("command -v {program}")])).code == 0
}
