//! `runx process`, and the hooks that it and `runx wasm` have.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use runx_tests::command::{Done, eventually, run};
use runx_tests::dist;
use serde_json::{Value, json};
use tempfile::TempDir;

struct Place(TempDir);

impl Place {
    fn new() -> Self {
        Self(TempDir::with_prefix("runx-process-test-").expect("make a directory"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    #[track_caller]
    fn runx(&self, args: &[&str]) -> Done {
        let mut command = Command::new(dist().join("runx"));
        run(command.arg("--root").arg(self.path("root")).args(args).env("OTHER", "of the caller"))
    }

    #[track_caller]
    fn process(&self, args: &[&str]) -> Done {
        self.runx(&[&["process"], args].concat())
    }

    fn state(&self, id: &str) -> Value {
        serde_json::from_str(&self.process(&["state", id]).ok().stdout).expect("state is JSON")
    }

    /// A hook that adds a word to a file, and the file's words.
    fn hook(&self, when: &str) -> String {
        format!("{when}=echo {when} $RUNX_PID >> {}", self.path("hooks").display())
    }

    fn hooked(&self) -> Vec<String> {
        let text = fs::read_to_string(self.path("hooks")).unwrap_or_default();
        text.lines().map(|line| line.split(' ').next().unwrap_or_default().to_owned()).collect()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        for id in self.process(&["ps", "--quiet"]).stdout.lines() {
            self.process(&["rm", "--force", id]);
        }
    }
}

const ALL: [&str; 4] = ["before-start", "after-start", "before-stop", "after-stop"];

#[test]
fn a_process_has_the_environment_that_it_is_given_and_its_exit_code_is_told() {
    let place = Place::new();
    let directory = place.0.path().to_string_lossy().into_owned();
    let script = "env | grep -v -E '^(_|PWD|SHLVL|PATH)='; pwd; exit 5";
    let done = place.process(&["run", "--env", "A=b", "--env", "OTHER", "--cwd", &directory, "sh", "-c", script]);
    let mut lines: Vec<_> = done.stdout.lines().collect();
    lines.sort_unstable();
    assert_eq!(lines, [&directory, "A=b", "OTHER=of the caller"]);
    assert_eq!(done.code, 5);
    assert!(!place.process(&["run", "env"]).ok().stdout.contains("of the caller"));
    place.process(&["run", "no-such-program"]).fails(127, &["run no-such-program"]);
    place.process(&["run", "/etc/passwd"]).fails(126, &["/etc/passwd"]);
    place.process(&["run", "--timeout", "200ms", "sleep", "1000"]).fails(124, &["its time of 200 ms is over"]);
    assert_eq!(place.process(&["run", "--timeout", "60s", "sh", "-c", "kill -9 $$"]).code, 128 + 9);
}

#[test]
fn hooks_run_before_and_after_the_start_and_the_end() {
    let place = Place::new();
    let hooks: Vec<String> = ALL.iter().map(|when| place.hook(when)).collect();
    let mut args = vec!["process", "run"];
    for hook in &hooks {
        args.extend(["--hook", hook]);
    }
    let script = format!("echo program >> {}", place.path("hooks").display());
    let with = |args: &[&str], more: &[&str]| place.runx(&[args, more].concat());
    with(&args, &["sh", "-c", &format!("sleep 0.3; {script}")]).ok();
    // Nobody stopped it.
    assert_eq!(place.hooked(), ["before-start", "after-start", "program", "after-stop"]);
    fs::remove_file(place.path("hooks")).expect("remove the file");
    let module = place.path("m.wat");
    fs::write(&module, "(module (func (export \"_start\")))").expect("write a module");
    args[0] = "wasm";
    with(&args, &[&module.to_string_lossy()]).ok();
    assert_eq!(place.hooked(), ["before-start", "after-start", "after-stop"]);
    let failing = ["run", "--hook", "before-start=echo why >&2; exit 3", "sh", "-c", &script];
    place.process(&failing).fails(1, &["why", "the hook before-start", "exit status: 3"]);
    assert_eq!(place.hooked().last().map(String::as_str), Some("after-stop"), "it was started");
    place.process(&["run", "--hook", "sometime=x", "true"]).fails(1, &["none of before-start"]);
}

#[test]
fn a_detached_process_is_watched_until_its_end() {
    let place = Place::new();
    let (before, after) = (place.hook("before-stop"), place.hook("after-stop"));
    let script = "echo begun; trap 'echo told; exit 6' TERM; while :; do sleep 0.05; done";
    let args = ["run", "-d", "--name", "p", "--hook", &before, "--hook", &after, "sh", "-c", script];
    assert_eq!(place.process(&args).ok().stdout, "p\n");
    eventually("it begins", || place.process(&["logs", "p"]).stdout == "begun\n");
    assert_eq!(place.state("p")["status"], "running");
    assert!(place.process(&["ps"]).ok().stdout.lines().nth(1).is_some_and(|line| line.contains("running")));
    // They are no containers, and no modules.
    assert_eq!(place.runx(&["list", "--quiet"]).ok().stdout, "");
    assert_eq!(place.runx(&["wasm", "ps", "--quiet"]).ok().stdout, "");
    place.process(&["kill", "p", "TERM"]).ok();
    eventually("it ends", || place.state("p")["exitCode"] == 6);
    assert_eq!(place.process(&["logs", "p"]).ok().stdout, "begun\ntold\n");
    assert_eq!(place.hooked(), ["before-stop", "after-stop"]);
    assert_eq!(place.state("p")["pid"], json!(0));
    place.process(&["rm", "p"]).ok();
    place.process(&["run", "-d", "no-such-program"]).fails(1, &["run no-such-program"]);
    assert_eq!(place.process(&["ps", "--quiet"]).ok().stdout, "");
}
