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
    for name in ["clone3", "openat2", "mount", "pid", "seccomp", "id-mapped mounts"] {
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

#[test]
fn ps_shows_what_runs_of_every_kind() {
    needs_root!();
    let bundle = Bundle::new(&["sleep", "100"]);
    bundle.create().ok();
    let storage = bundle.scratch().join("storage");
    let with = |args: &[&str]| bundle.runx(&[&["--storage-root", storage.to_str().unwrap()], args].concat());
    with(&["process", "run", "-d", "--name", "native", "sleep", "100"]).ok();
    with(&["process", "run", "-d", "--name", "over", "true"]).ok();
    runx_tests::command::eventually("it has ended", || with(&["process", "ps"]).ok().stdout.contains("stopped"));
    let rows = |args: &[&str]| -> Vec<(String, String, String)> {
        let list: Value = json(with(&[&["ps", "--format", "json"], args].concat()).ok());
        let text = |row: &Value, key: &str| row[key].as_str().unwrap().to_owned();
        let ours = list.as_array().unwrap().iter().filter(|row| row["kind"] != "pool");
        ours.map(|row| (text(row, "kind"), text(row, "id"), text(row, "status"))).collect()
    };
    let row = |kind: &str, id: &str, status: &str| (kind.to_owned(), id.to_owned(), status.to_owned());
    let running = [row("bundle", bundle.id(), "created"), row("process", "native", "running")];
    assert_eq!(rows(&[]), running);
    let all = rows(&["--all"]);
    assert_eq!(all.len(), 3);
    assert!(all.contains(&row("process", "over", "stopped")));
    let table = with(&["ps"]).ok().stdout;
    assert!(table.starts_with("ID ") && table.contains("sleep 100") && !table.contains("over"), "{table}");
    let ids = with(&["ps", "-q"]).ok().stdout;
    assert!(ids.lines().any(|id| id == "native"), "{ids}");
    // With a container it is runc's, and "list" is so always.
    assert!(with(&["ps", bundle.id()]).ok().stdout.contains("PID"));
    with(&["ps", "--all", bundle.id()]).fails(1, &["--all", "without a container"]);
    assert_eq!(with(&["list", "-q"]).ok().stdout, format!("{}\n", bundle.id()));
    with(&["process", "rm", "--force", "native"]).ok();
    with(&["process", "rm", "over"]).ok();
    // A container of the command for people is one, and no bundle beside.
    bundle.runx(&["delete", "-f", bundle.id()]).ok();
    let rootfs = bundle.rootfs();
    let made = with(&[
        "container",
        "run",
        "-d",
        "--name",
        "mine",
        "--network",
        "none",
        "--rootfs",
        rootfs.to_str().unwrap(),
        "sleep",
        "100",
    ]);
    made.ok();
    assert_eq!(rows(&[]), [row("container", "mine", "running")]);
    with(&["container", "rm", "--force", "mine"]).ok();
    assert!(rows(&["-a"]).is_empty());
    bundle.assert_nothing_left();
}

#[test]
fn ps_shows_servers_of_pools_while_they_run() {
    needs_root!();
    let directory = TempDir::with_prefix("runx-test-").unwrap();
    let root = directory.path().to_str().unwrap().to_owned();
    let mut server = Command::new(dist().join("runx"));
    server.args([
        "--root",
        &root,
        "pool",
        "serve",
        "--address",
        "127.0.0.1:0",
        "--auth-token",
        "geheim",
        "--auth-token=geheim",
    ]);
    let mut child = server.stderr(std::process::Stdio::null()).stdout(std::process::Stdio::null()).spawn().unwrap();
    let id = format!("pool-{}", child.id());
    let listed = || json(runx(&["--root", &root, "--storage-root", &root, "ps", "--format", "json"]).ok());
    let seen = || listed().as_array().unwrap().iter().filter(|row| row["id"] == id.as_str()).count();
    runx_tests::command::eventually("the server is listed", || seen() == 1);
    let row = listed().as_array().unwrap().iter().find(|row| row["id"] == id.as_str()).unwrap().clone();
    assert_eq!((&row["kind"], &row["pid"]), (&json!("pool"), &json!(child.id())));
    assert!(row["what"].as_str().unwrap().contains("127.0.0.1:0"), "{row}");
    assert!(!row.to_string().contains("geheim"), "{row}");
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(seen(), 0);
}
