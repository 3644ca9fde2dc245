//! `runx` in runc's place: containerd's own shim for runc runs it, and reads its words, pid files and logs.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use runx_tests::command::{Done, eventually};
use runx_tests::containerd::{BUSYBOX, Containerd};
use runx_tests::{dist, leftovers, needs_containerd};
use serde_json::Value;

/// A containerd whose containers are runc's but for the program.
struct InRuncsPlace {
    containerd: Containerd,
    program: String,
    root: String,
}

impl InRuncsPlace {
    fn start() -> Option<Self> {
        if Command::new("containerd-shim-runc-v2").arg("-v").output().is_err() {
            eprintln!("SKIPPED {}: it needs containerd-shim-runc-v2", module_path!());
            return None;
        }
        let containerd = Containerd::start();
        let root = containerd.path().join("runc").to_string_lossy().into_owned();
        Some(Self { containerd, program: dist().join("runx").to_string_lossy().into_owned(), root })
    }

    /// `ctr run` with these flags, and an id and a command.
    #[track_caller]
    fn run(&self, flags: &[&str], id: &str, command: &[&str]) -> Done {
        self.containerd.ctr(&self.line(flags, id, command))
    }

    fn line<'a>(&'a self, flags: &[&'a str], id: &'a str, command: &[&'a str]) -> Vec<&'a str> {
        let runtime = ["--runtime", "io.containerd.runc.v2", "--runc-binary", &self.program, "--runc-root", &self.root];
        [&["run"], &runtime[..], flags, &[BUSYBOX, id], command].concat()
    }

    #[track_caller]
    fn assert_nothing_left(&self) {
        self.containerd.assert_nothing_left();
        leftovers::assert_none(
            self.containerd.namespace(),
            &[PathBuf::from(&self.root).join(self.containerd.namespace())],
        );
    }
}

#[test]
fn containers_run_and_their_exit_codes_come_back() {
    needs_containerd!();
    let Some(it) = InRuncsPlace::start() else { return };
    let done = it.run(&["--rm", "--env", "A=b"], "c1", &["sh", "-c", "echo out $A; echo err >&2; exit 7"]);
    assert_eq!((done.code, done.stdout.as_str(), done.stderr.as_str()), (7, "out b\n", "err\n"));
    it.run(&["--rm"], "c3", &["/no/such"]).fails(1, &["/no/such", "no such file or directory"]);
    it.run(&["--rm"], "c4", &["nosuch"]).fails(1, &["exec: \"nosuch\": executable file not found in $PATH"]);
    for id in ["c3", "c4"] {
        it.containerd.ctr(&["container", "rm", id]);
    }
    it.assert_nothing_left();
}

#[test]
fn a_task_goes_through_its_life() {
    needs_containerd!();
    let Some(it) = InRuncsPlace::start() else { return };
    let ctd = &it.containerd;
    it.run(&["-d", "--null-io"], "c1", &["sh", "-c", "trap 'exit 3' TERM; while :; do sleep 0.05; done"]).ok();
    let exec = |flags: &[&str], id: &str, command: &[&str]| {
        ctd.ctr(&[&["task", "exec"], flags, &["--exec-id", id, "c1"], command].concat())
    };
    assert_eq!(exec(&[], "e1", &["sh", "-c", "echo here; exit 4"]).code, 4);
    assert_eq!(ctd.ctr_with(&["task", "exec", "--exec-id", "e2", "c1", "cat"], "piped\n").ok().stdout, "piped\n");
    assert!(exec(&["--user", "1000:100"], "e3", &["id"]).ok().stdout.contains("uid=1000(user) gid=100"));
    exec(&[], "e4", &["nosuch"]).fails(1, &["exec: \"nosuch\": executable file not found in $PATH"]);
    let terminal = ["task", "exec", "-t", "--exec-id", "e5", "c1", "sh", "-c", "sleep 0.3; tty; stty size"];
    let out = ctd.ctr_on_terminal(&terminal, 31, 91).ok().stdout;
    assert!(out.contains("/dev/pts/") && out.contains("31 91"), "{out}");
    let pid = ctd.pid("c1").unwrap();
    let ps = ctd.ctr(&["task", "ps", "c1"]).ok().stdout;
    assert!(ps.contains(&pid.to_string()), "{ps}");
    ctd.ctr(&["task", "pause", "c1"]).ok();
    assert_eq!(ctd.status("c1").as_deref(), Some("PAUSED"));
    ctd.ctr(&["task", "resume", "c1"]).ok();
    assert_eq!(ctd.status("c1").as_deref(), Some("RUNNING"));
    ctd.ctr(&["task", "kill", "-s", "SIGTERM", "c1"]).ok();
    eventually("it has stopped", || ctd.status("c1").as_deref() == Some("STOPPED"));
    ctd.ctr(&["task", "kill", "c1"]).fails(1, &["process already finished"]);
    let deleted = ctd.ctr(&["task", "delete", "c1"]);
    assert!(deleted.stderr.contains("exit code 3"), "{}", deleted.stderr);
    ctd.ctr(&["container", "rm", "c1"]).ok();
    it.assert_nothing_left();
}

#[test]
fn limits_metrics_and_terminals_are_there() {
    needs_containerd!();
    let Some(it) = InRuncsPlace::start() else { return };
    let ctd = &it.containerd;
    it.run(&["-d", "--null-io", "--memory-limit", "33554432", "--cpus", "0.5"], "c1", &["sleep", "100"]).ok();
    let group = format!("{}/c1", ctd.namespace());
    let read = |v1: &str, v2: &str| {
        let v2 = format!("/sys/fs/cgroup/{group}/{v2}");
        let (controller, file) = v1.split_once('/').unwrap();
        let v1 = format!("/sys/fs/cgroup/{controller}/{group}/{file}");
        fs::read_to_string(v1).or_else(|_| fs::read_to_string(v2)).unwrap().trim().to_owned()
    };
    assert_eq!(read("memory/memory.limit_in_bytes", "memory.max"), "33554432");
    assert!(read("cpu/cpu.cfs_quota_us", "cpu.max").starts_with("50000"));
    let metrics = ctd.ctr(&["task", "metrics", "--format", "json", "c1"]).ok().stdout;
    let metrics: Value = serde_json::from_str(&metrics).unwrap();
    let usage = metrics.pointer("/memory/usage/usage").or_else(|| metrics.pointer("/memory/usage")).unwrap();
    assert!(usage.as_u64().unwrap() > 0, "{metrics}");
    ctd.end("c1");
    let command = ["sh", "-c", "sleep 0.3; tty; stty size; test -c /dev/console && echo console"];
    let out = ctd.ctr_on_terminal(&it.line(&["--rm", "-t"], "c2", &command), 29, 81).ok().stdout;
    assert!(out.contains("/dev/pts/0") && out.contains("29 81") && out.contains("console"), "{out}");
    it.assert_nothing_left();
}

#[test]
fn a_shim_that_is_killed_leaves_nothing() {
    needs_containerd!();
    let Some(it) = InRuncsPlace::start() else { return };
    let ctd = &it.containerd;
    it.run(&["-d", "--null-io"], "c1", &["sleep", "100"]).ok();
    let shim = ctd.shim("c1").expect("the shim's pid");
    // SAFETY: the pid is that of the parent of the test's own container.
    unsafe { libc::kill(shim, libc::SIGKILL) };
    // containerd has the shim's program delete the container, which runs runx with delete --force.
    eventually("the task is gone", || ctd.status("c1").is_none_or(|status| status != "RUNNING"));
    ctd.ctr(&["task", "delete", "--force", "c1"]);
    ctd.ctr(&["container", "rm", "c1"]).ok();
    it.assert_nothing_left();
}
