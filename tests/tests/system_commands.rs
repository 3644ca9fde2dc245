//! What people ask about a machine and about runx: `check`, `info`, `version`.

use std::fs;
use std::process::Command;

use runx_tests::bundle::Bundle;
use runx_tests::command::{Done, run};
use runx_tests::{dist, needs_root, needs_user, user};
use serde_json::{Value, json};
use tempfile::TempDir;

fn runx(args: &[&str]) -> Done {
    run(Command::new(dist().join("runx")).args(args))
}

fn json(done: Done) -> Value {
    serde_json::from_str(&done.stdout).unwrap_or_else(|e| panic!("{e}: {}{}", done.stdout, done.stderr))
}

/// What was found out about something.
fn finding<'a>(report: &'a Value, name: &str) -> &'a Value {
    let all = report["findings"].as_array().unwrap();
    all.iter().find(|finding| finding["name"] == name).unwrap_or_else(|| panic!("{name} is not in {report:#}"))
}

#[test]
fn check_tells_what_there_is_and_how_to_get_the_rest() {
    needs_root!();
    let directory = TempDir::with_prefix("runx-test-").unwrap();
    let file = directory.path().join("config.toml");
    fs::write(&file, "[network]\nplugins = [\"/no/such\"]\n").unwrap();
    let with = |args: &[&str]| runx(&[&["--config-file", file.to_str().unwrap()], args].concat());
    let report = json(with(&["check", "--format", "json"]).ok());
    assert_eq!(report["usable"], true);
    for name in ["clone3", "openat2", "mount", "pid", "seccomp"] {
        assert_eq!(finding(&report, name)["state"], "ok", "{name}");
        assert_eq!(finding(&report, name)["advice"], Value::Null);
    }
    let version = if runx_tests::has_cgroup_v2() { "2" } else { "1" };
    assert_eq!(finding(&report, "version")["found"], version);
    let plugins = finding(&report, "CNI plugins");
    assert_eq!(plugins["state"], "limited");
    assert!(plugins["advice"].as_str().unwrap().contains("containernetworking-plugins"));
    assert!(plugins["found"].as_str().unwrap().contains("portmap"));
    let table = with(&["check"]).ok().stdout;
    assert!(table.contains("openat2") && table.ends_with("Containers can run here.\n"), "{table}");
    assert!(table.contains("network, CNI plugins: apt install"), "{table}");
    // A place that cannot be written is missing, and nothing is made there by the question.
    let root = directory.path().join("made/later");
    let report = json(with(&["--root", root.to_str().unwrap(), "check", "--format", "json"]).ok());
    assert_ne!(finding(&report, "state")["state"], "missing");
    assert!(!root.parent().unwrap().exists());
    let report = json(with(&["--storage-root", "/etc/passwd/x", "check", "--format", "json"]).fails(1, &[]));
    assert_eq!((&report["usable"], &finding(&report, "images")["state"]), (&json!(false), &json!("missing")));
}

#[test]
fn check_fails_where_containers_cannot_run() {
    needs_root!();
    let mut bundle = Bundle::new(&["/bin/runx", "check", "--format", "json"]);
    fs::copy(dist().join("runx"), bundle.rootfs().join("bin/runx")).unwrap();
    bundle.set(
        "/linux",
        "seccomp",
        json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["openat2", "clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}]
        }),
    );
    let report = json(bundle.run().fails(1, &[]));
    assert_eq!(report["usable"], false);
    for name in ["openat2", "clone3"] {
        let found = finding(&report, name);
        assert_eq!((&found["state"], &found["essential"]), (&json!("missing"), &json!(true)), "{name}");
        assert!(found["advice"].as_str().unwrap().contains("seccomp"), "{found}");
    }
    assert_eq!(finding(&report, "pidfd_open")["state"], "ok");
    // Root without the capabilities that make containers.
    assert_eq!(finding(&report, "capabilities")["state"], "missing");
    bundle.config["process"]["args"] = json!(["/bin/runx", "check"]);
    let out = bundle.run().fails(1, &[]).stdout;
    assert!(out.contains("Containers cannot run here"), "{out}");
}

#[test]
fn check_tells_an_ordinary_user_what_he_needs() {
    needs_user!(obstacle);
    use std::os::unix::process::CommandExt;
    let directory = TempDir::with_prefix("runx-test-").unwrap();
    std::os::unix::fs::chown(directory.path(), Some(user::ID), Some(user::ID)).unwrap();
    let program = directory.path().join("runx");
    fs::copy(dist().join("runx"), &program).unwrap();
    let mut command = Command::new(&program);
    let at = |name: &str| directory.path().join(name);
    command.args(["check", "--format", "json"]).uid(user::ID).gid(user::ID);
    command.env_clear().env("XDG_RUNTIME_DIR", at("run")).env("XDG_DATA_HOME", at("data"));
    let report = json(run(&mut command).ok());
    assert_eq!(finding(&report, "user")["state"], "ok");
    assert_eq!(finding(&report, "user")["essential"], true);
    // He is in no file of the machine.
    assert_eq!(finding(&report, "/etc/subuid")["state"], "limited");
    assert!(finding(&report, "/etc/subuid")["advice"].as_str().unwrap().contains("--add-subuids"));
    assert_eq!(finding(&report, "runx-agent")["state"], "limited");
}

#[test]
fn info_counts_what_there_is_and_makes_nothing() {
    needs_root!();
    let bundle = Bundle::new(&["sleep", "100"]);
    let storage = bundle.scratch().join("storage");
    let info = || json(bundle.runx(&["--storage-root", storage.to_str().unwrap(), "info", "--format", "json"]).ok());
    let none = info();
    assert_eq!(none["containers"], json!({"running": 0, "all": 0}));
    assert!(!storage.exists());
    bundle.create().ok();
    bundle.runx(&["process", "run", "-d", "--name", "p", "true"]).ok();
    let some = info();
    assert_eq!((&some["containers"]["all"], &some["processes"]), (&json!(1), &json!(1)));
    assert_eq!(some["root"], json!(bundle.state_root()));
    assert_eq!(some["programs"]["runx-agent"], json!(dist().join("runx-agent")));
    assert_eq!(some["version"], json(runx(&["version", "--format", "json"]).ok()));
    let text = bundle.runx(&["info"]).ok().stdout;
    assert!(text.lines().any(|line| line.starts_with("containers") && line.ends_with("1, of which 1 run")), "{text}");
    bundle.runx(&["delete", "-f", bundle.id()]).ok();
    bundle.assert_nothing_left();
}

#[test]
fn the_version_is_one() {
    let text = runx(&["version"]).ok().stdout;
    assert_eq!(runx(&["--version"]).ok().stdout, text);
    let version = json(runx(&["version", "--format", "json"]).ok());
    assert!(text.starts_with(&format!("runx version {}\n", version["version"].as_str().unwrap())), "{text}");
    assert!(text.contains(&format!("spec: {}\n", version["spec"].as_str().unwrap())), "{text}");
}
