//! The six hooks: their order, what they are told, what their failure does.

use std::fs;
use std::path::Path;

use runx_tests::bundle::Bundle;
use runx_tests::command::eventually;
use runx_tests::needs_root;
use serde_json::{Value, json};

const KINDS: [&str; 6] = ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"];

/// A hook that writes its name, its namespaces' view and its state to a file of the host or the container.
fn hook(kind: &str, log: &Path, more: &str) -> Value {
    let script = format!("cat > {0}.{kind}; echo {kind} >> {0}; {more}", log.display());
    json!({"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/bin:/bin"]})
}

/// All six hooks write to the same file: it is bound into the container at the same path.
fn with_hooks(script: &str) -> (Bundle, std::path::PathBuf) {
    let mut bundle = Bundle::script(script);
    let directory = bundle.scratch().join("hooks");
    fs::create_dir(&directory).unwrap();
    let log = directory.join("log");
    bundle.config["root"]["readonly"] = json!(false);
    bundle.add_mount(
        json!({"destination": directory, "type": "bind", "source": directory, "options": ["bind", "rprivate"]}),
    );
    let hooks: serde_json::Map<String, Value> =
        KINDS.iter().map(|kind| ((*kind).to_owned(), json!([hook(kind, &log, "")]))).collect();
    bundle.set("", "hooks", Value::Object(hooks));
    bundle.set("", "annotations", json!({"key": "value"}));
    (bundle, log)
}

fn told(log: &Path, kind: &str) -> Value {
    let text = fs::read_to_string(format!("{}.{kind}", log.display())).unwrap();
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{kind}: {e}: {text}"))
}

fn lines(log: &Path) -> Vec<String> {
    fs::read_to_string(log).unwrap_or_default().lines().map(str::to_owned).collect()
}

// covers: hooks.prestart hooks.createRuntime hooks.createContainer hooks.startContainer hooks.poststart hooks.poststop
// covers: annotations
#[test]
fn hooks_run_in_order_and_read_the_state() {
    needs_root!();
    let (bundle, log) = with_hooks("sleep 100");
    bundle.create().ok();
    assert_eq!(lines(&log), KINDS[..3], "before the start");
    let pid = bundle.state()["pid"].clone();
    bundle.runx(&["start", bundle.id()]).ok();
    eventually("poststart has run", || lines(&log).len() >= 5);
    assert_eq!(lines(&log), KINDS[..5]);
    bundle.runx(&["delete", "--force", bundle.id()]).ok();
    assert_eq!(lines(&log), KINDS);
    let statuses = ["creating", "creating", "creating", "created", "running", "stopped"];
    for (kind, status) in KINDS.iter().zip(statuses) {
        let state = told(&log, kind);
        assert_eq!(state["status"], status, "{kind}");
        assert_eq!(state["id"], bundle.id(), "{kind}");
        assert_eq!(state["bundle"], json!(bundle.path()), "{kind}");
        assert_eq!(state["annotations"]["key"], "value", "{kind}");
        assert!(state["ociVersion"].as_str().unwrap().starts_with("1."), "{kind}");
        match *kind {
            "prestart" | "createRuntime" | "poststart" => assert_eq!(state["pid"], pid, "{kind}"),
            "createContainer" | "startContainer" => assert_eq!(state["pid"], 1, "{kind}"),
            _ => assert!(state.get("pid").is_none_or(|pid| *pid == 0), "{kind}"),
        }
    }
    bundle.assert_nothing_left();
}

// covers: hooks.createRuntime hooks.createContainer hooks.startContainer
#[test]
fn hooks_run_in_the_namespaces_that_the_specification_says() {
    needs_root!();
    let (mut bundle, log) = with_hooks("true");
    for kind in KINDS {
        let script = format!(
            "readlink /proc/self/ns/net >> {0}.{kind}.view; test -e {1}/state.marker && echo host >> {0}.{kind}.view; true",
            log.display(),
            bundle.scratch().display()
        );
        bundle.config["hooks"][kind] = json!([{"path": "/bin/sh", "args": ["sh", "-c", script]}]);
    }
    fs::write(bundle.scratch().join("state.marker"), "").unwrap();
    bundle.run().ok();
    let own = fs::read_link("/proc/self/ns/net").unwrap().to_string_lossy().into_owned();
    for kind in KINDS {
        let text = fs::read_to_string(format!("{}.{kind}.view", log.display())).unwrap();
        let (network, paths) = (text.lines().next().unwrap() == own, text.contains("host"));
        match kind {
            "createContainer" => assert_eq!((network, paths), (false, true), "{kind}: {text}"),
            "startContainer" => assert_eq!((network, paths), (false, false), "{kind}: {text}"),
            _ => assert_eq!((network, paths), (true, true), "{kind}: {text}"),
        }
    }
    bundle.assert_nothing_left();
}

/// What GPU toolkits do: enter the container's mount namespace and mount below its root filesystem.
// covers: hooks.createRuntime hooks.createContainer
#[test]
fn hooks_before_pivot_find_the_root_filesystem_with_its_mounts_at_the_hosts_path() {
    needs_root!();
    let (mut bundle, log) = with_hooks("cat /injected /tmp/inner; mount | grep -c injected");
    let rootfs = bundle.rootfs();
    fs::write(rootfs.join("injected"), "").unwrap();
    let source = bundle.scratch().join("device");
    fs::write(&source, "from a hook\n").unwrap();
    let script = format!(
        "pid=$(sed 's/.*\"pid\":\\([0-9]*\\).*/\\1/'); nsenter -m -t $pid mount --bind {} {}/injected",
        source.display(),
        rootfs.display()
    );
    bundle.config["hooks"] = json!({
        "createRuntime": [{"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/sbin:/usr/bin:/bin"]}],
        "createContainer": [hook("createContainer", &log,
            &format!("test -e {0}/proc/self/stat && echo inner > {0}/tmp/inner", rootfs.display()))],
    });
    assert_eq!(bundle.run().ok().stdout, "from a hook\ninner\n1\n");
    assert_eq!(fs::read_to_string(rootfs.join("injected")).unwrap(), "", "nothing is mounted on the host");
    bundle.assert_nothing_left();
}

// covers: hooks.prestart hooks.createRuntime hooks.createContainer hooks.poststop
#[test]
fn a_failing_hook_before_the_start_undoes_the_container_and_runs_poststop() {
    needs_root!();
    for kind in &KINDS[..3] {
        let (mut bundle, log) = with_hooks("echo it ran");
        bundle.config["hooks"][*kind] = json!([hook(kind, &log, "echo why >&2; exit 9"), hook("second", &log, "")]);
        let done = bundle.run().fails(1, &[kind, "#0", "exit status 9", "why"]);
        assert_eq!(done.stdout, "");
        assert_eq!(lines(&log).last().map(String::as_str), Some("poststop"), "{kind}");
        assert!(!lines(&log).contains(&"second".to_owned()), "{kind}");
        bundle.assert_nothing_left();
    }
}

// covers: hooks.startContainer hooks.poststart
#[test]
fn a_failing_hook_at_the_start_fails_the_start_and_undoes_the_container() {
    needs_root!();
    for kind in ["startContainer", "poststart"] {
        let (mut bundle, log) = with_hooks("sleep 100");
        bundle.config["hooks"][kind] = json!([hook(kind, &log, "exit 9")]);
        bundle.create().ok();
        bundle.runx(&["start", bundle.id()]).fails(1, &[kind, "exit status 9"]);
        bundle.runx(&["state", bundle.id()]).fails(1, &["does not exist"]);
        assert_eq!(lines(&log).last().map(String::as_str), Some("poststop"), "{kind}");
        bundle.assert_nothing_left();
        // `run` undoes all of it.
        let (mut bundle, log) = with_hooks("sleep 100");
        bundle.config["hooks"][kind] = json!([hook(kind, &log, "exit 9")]);
        bundle.run().fails(1, &[kind, "exit status 9"]);
        assert_eq!(lines(&log).last().map(String::as_str), Some("poststop"), "{kind}");
        bundle.assert_nothing_left();
    }
}

// covers: hooks.poststop
#[test]
fn a_failing_poststop_hook_is_a_warning_and_the_others_run() {
    needs_root!();
    let (mut bundle, log) = with_hooks("true");
    bundle.config["hooks"] = json!({"poststop": [hook("first", &log, "exit 9"), hook("second", &log, "")]});
    let done = bundle.run().ok();
    assert!(done.stderr.contains("poststop") && done.stderr.contains("exit status 9"), "{}", done.stderr);
    assert_eq!(lines(&log), ["first", "second"]);
    bundle.assert_nothing_left();
}

// covers: hooks.timeout
#[test]
fn a_hook_that_hangs_or_is_missing_fails_the_container() {
    needs_root!();
    let (mut bundle, _) = with_hooks("echo it ran");
    bundle.config["hooks"] =
        json!({"createRuntime": [{"path": "/bin/sleep", "args": ["sleep", "1000"], "timeout": 1}]});
    bundle.run().fails(1, &["createRuntime", "1 s", "killed"]);
    bundle.config["hooks"] = json!({"createContainer": [{"path": "/no/such/hook"}]});
    bundle.run().fails(1, &["createContainer", "/no/such/hook", "No such file"]);
    bundle.assert_nothing_left();
}

// covers: hooks.startContainer
#[test]
fn a_start_container_hook_without_an_environment_has_the_programs() {
    needs_root!();
    let mut bundle = Bundle::script("cat /told");
    bundle.config["root"]["readonly"] = json!(false);
    bundle.set("/process", "env", json!(["PATH=/bin", "WORD=here"]));
    bundle.set(
        "",
        "hooks",
        json!({"startContainer": [{"path": "/bin/sh", "args": ["sh", "-c", "env | sort > /told"]}]}),
    );
    let out = bundle.run().ok().stdout;
    for line in ["WORD=here", "PATH=/bin", "HOME=/root"] {
        assert!(out.lines().any(|l| l == line), "{out}");
    }
    bundle.assert_nothing_left();
}

// covers: hooks.startContainer linux.seccomp.syscalls
#[test]
fn a_start_container_hook_is_confined_as_the_program_is() {
    needs_root!();
    let mut bundle = Bundle::script("cat /told");
    bundle.config["root"]["readonly"] = json!(false);
    let hook = |script: &str| json!({"startContainer": [{"path": "/bin/sh", "args": ["sh", "-c", script]}]});
    bundle.set(
        "/linux",
        "seccomp",
        json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 98}],
        }),
    );
    bundle.set("", "hooks", hook("(mkdir /made; grep -E 'Cap(Prm|Eff)|Seccomp:' /proc/self/status) > /told 2>&1"));
    let hooks = bundle.run().ok().stdout;
    bundle.set("", "hooks", json!({}));
    bundle.config["process"]["args"] =
        json!(["sh", "-c", "mkdir /made 2>&1; grep -E 'Cap(Prm|Eff)|Seccomp:' /proc/self/status"]);
    let programs = bundle.run().stdout;
    assert_eq!(hooks, programs);
    assert!(hooks.contains("Seccomp:\t2") && hooks.contains("in use"), "{hooks}");
    // A profile that knows nothing of newer calls must not keep a hook from running.
    let old = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["pidfd_open", "close_range"], "action": "SCMP_ACT_ERRNO"}],
    });
    bundle.set("/linux", "seccomp", old);
    bundle.set("", "hooks", hook("sleep 0.1; echo ran > /told"));
    bundle.config["process"]["args"] = json!(["cat", "/told"]);
    assert_eq!(bundle.run().ok().stdout, "ran\n");
    bundle.assert_nothing_left();
}
