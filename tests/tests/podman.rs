//! `runx` as podman's runtime: podman and conmon are as the distribution has them.

use std::fs;

use runx_tests::command::eventually;
use runx_tests::podman::{self, IMAGE, Podman};

/// Starts podman, or says why not.
fn start() -> Option<Podman> {
    match podman::obstacle() {
        None => Some(Podman::start()),
        Some(why) => {
            eprintln!("SKIPPED {}: {why}", module_path!());
            None
        }
    }
}

#[test]
fn containers_run_and_their_exit_codes_come_back() {
    let Some(it) = start() else { return };
    let run = |flags: &[&str], command: &[&str]| it.podman(&[&["run", "--rm"], flags, &[IMAGE], command].concat());
    let done = run(&["--env", "A=b"], &["sh", "-c", "echo out $A; echo err >&2; exit 7"]);
    assert_eq!((done.code, done.stdout.as_str(), done.stderr.as_str()), (7, "out b\n", "err\n"));
    let done = it.podman_with(&["run", "--rm", "-i", IMAGE, "cat"], "piped\n").ok();
    assert_eq!(done.stdout, "piped\n");
    // podman tells these apart by the runtime's words.
    run(&[], &["nosuch"]).fails(127, &["executable file not found in $PATH"]);
    run(&[], &["/etc/passwd"]).fails(126, &["permission denied"]);
    let data = it.path().join("data");
    fs::create_dir(&data).unwrap();
    let volume = format!("{}:/data", data.display());
    let script = "id -u; hostname; grep NoNewPrivs /proc/self/status; echo written > /data/file";
    let flags = ["--user", "0:5", "--hostname", "its-name", "--security-opt", "no-new-privileges", "-v", &volume];
    let out = run(&flags, &["sh", "-c", script]).ok().stdout;
    assert_eq!(out, "0\nits-name\nNoNewPrivs:\t1\n");
    assert_eq!(fs::read_to_string(data.join("file")).unwrap(), "written\n");
    let out = it.podman_on_terminal(&["run", "--rm", "-t", IMAGE, "sh", "-c", "sleep 0.3; tty; stty size"], 29, 81);
    assert!(out.stdout.contains("/dev/pts/0") && out.stdout.contains("29 81"), "{out:?}");
    it.assert_nothing_left();
}

#[test]
fn a_container_goes_through_its_life() {
    let Some(it) = start() else { return };
    let script = "trap 'exit 5' TERM; echo up; while :; do sleep 0.05; done";
    let limits = ["--memory", "64m", "--cpus", "0.5", "--pids-limit", "30"];
    it.podman(&[&["run", "-d", "--name", "c1"], &limits[..], &[IMAGE, "sh", "-c", script]].concat()).ok();
    eventually("it is up", || it.podman(&["logs", "c1"]).ok().stdout == "up\n");
    let read = |controller: &str, v1: &str, v2: &str| {
        let group = it.group("c1", controller);
        fs::read_to_string(group.join(v1)).or_else(|_| fs::read_to_string(group.join(v2))).unwrap().trim().to_owned()
    };
    assert_eq!(read("memory", "memory.limit_in_bytes", "memory.max"), (64 << 20).to_string());
    assert_eq!(read("pids", "pids.max", "pids.max"), "30");
    assert!(read("cpu", "cpu.cfs_quota_us", "cpu.max").starts_with("50000"));
    let exec = |flags: &[&str], command: &[&str]| it.podman(&[&["exec"], flags, &["c1"], command].concat());
    assert_eq!(exec(&[], &["sh", "-c", "exit 6"]).code, 6);
    assert_eq!(it.podman_with(&["exec", "-i", "c1", "cat"], "piped\n").ok().stdout, "piped\n");
    let done = exec(&["-u", "1000:1000", "-w", "/tmp", "-e", "A=b"], &["sh", "-c", "id -u; pwd; echo $A"]);
    assert_eq!(done.ok().stdout, "1000\n/tmp\nb\n");
    exec(&["-d"], &["sleep", "100"]).ok();
    exec(&[], &["nosuch"]).fails(127, &["executable file not found in $PATH"]);
    let out = it.podman_on_terminal(&["exec", "-t", "c1", "sh", "-c", "sleep 0.3; tty; stty size"], 31, 91).ok().stdout;
    assert!(out.contains("/dev/pts/") && out.contains("31 91"), "{out}");
    let top = it.podman(&["top", "c1", "args"]).ok().stdout;
    assert!(top.contains("sleep 100"), "{top}");
    let stats = it.podman(&["stats", "--no-stream", "--format", "{{.Name}} {{.MemLimit}} {{.PIDS}}", "c1"]).ok().stdout;
    assert!(stats.starts_with("c1 67108864 ") || stats.starts_with("c1 67.11MB "), "{stats}");
    let status = || it.podman(&["inspect", "--format", "{{.State.Status}} {{.State.ExitCode}}", "c1"]).ok().stdout;
    it.podman(&["pause", "c1"]).ok();
    assert_eq!(status(), "paused 0\n");
    it.podman(&["unpause", "c1"]).ok();
    assert_eq!(status(), "running 0\n");
    it.podman(&["stop", "--time", "20", "c1"]).ok();
    assert_eq!(status(), "exited 5\n");
    it.podman(&["start", "c1"]).ok();
    assert_eq!(status(), "running 0\n");
    it.podman(&["kill", "c1"]).ok();
    eventually("it has stopped", || status() == "exited 137\n");
    it.podman(&["rm", "c1"]).ok();
    it.assert_nothing_left();
}

#[test]
fn containers_are_removed_by_force_and_without_having_run() {
    let Some(it) = start() else { return };
    it.podman(&["run", "-d", "--name", "c1", IMAGE, "sleep", "100"]).ok();
    it.podman(&["rm", "--force", "--time", "0", "c1"]).ok();
    it.podman(&["create", "--name", "c2", IMAGE, "echo", "later"]).ok();
    assert_eq!(it.podman(&["start", "--attach", "c2"]).ok().stdout, "later\n");
    it.podman(&["rm", "c2"]).ok();
    it.podman(&["create", "--name", "c3", IMAGE, "true"]).ok();
    it.podman(&["init", "c3"]).ok();
    it.podman(&["rm", "--force", "c3"]).ok();
    let out = it.podman(&["info", "--format", "{{.Host.OCIRuntime.Version}}"]).ok().stdout;
    assert!(out.starts_with("runx version "), "{out}");
    it.assert_nothing_left();
}
