//! Checkpoints of containers by CRIU, and containers that go on from them.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use runx_tests::bundle::Bundle;
use runx_tests::command::{eventually, run, run_detached};
use runx_tests::needs_root;
use serde_json::json;

/// Why CRIU cannot work here, if it cannot: many a kernel is newer than the CRIU that is packaged.
fn obstacle() -> Option<String> {
    match Command::new("criu").arg("check").output() {
        Err(e) => Some(format!("it needs criu: {e}")),
        Ok(output) if output.status.success() => None,
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
            Some(format!("criu does not work with this kernel: {}", said.lines().next().unwrap_or_default()))
        }
    }
}

/// Returns from the test, aloud, unless CRIU works.
macro_rules! needs_criu {
    () => {
        needs_root!();
        if let Some(why) = obstacle() {
            runx_tests::skip_outside_machine(&why);
            return;
        }
    };
}

/// Counts, ten times a second, in a file that is in memory.
const COUNT: &str = "n=0; while :; do n=$((n+1)); echo $n > /dev/shm/n; sleep 0.1; done";

fn counted(bundle: &Bundle) -> u64 {
    let done = bundle.exec("cat /dev/shm/n");
    done.stdout.trim().parse().unwrap_or(0)
}

/// With streams that CRIU knows: a file of the host's would be out of its sight.
fn start_counting(bundle: &Bundle) {
    let mut command = bundle.command(&["run", "--detach", bundle.id()]);
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
    assert!(status.expect("run it").success());
}

fn images(bundle: &Bundle, name: &str) -> (PathBuf, String) {
    let path = bundle.scratch().join(name);
    let text = path.to_string_lossy().into_owned();
    (path, text)
}

#[test]
fn a_container_goes_on_where_its_checkpoint_was_made() {
    needs_criu!();
    let mut bundle = Bundle::script(COUNT);
    let host = bundle.scratch().join("host");
    fs::write(&host, "of the host").expect("write a file");
    bundle.add_mount(json!({"destination": "/etc/bound", "type": "bind", "source": host, "options": ["bind", "ro"]}));
    start_counting(&bundle);
    eventually("it counts", || counted(&bundle) > 3);
    let before = counted(&bundle);
    let (path, at) = images(&bundle, "images");
    bundle.runx(&["checkpoint", "--image-path", &at, bundle.id()]).ok();
    assert!(path.join("inventory.img").exists());
    bundle.runx(&["state", bundle.id()]).fails(1, &["does not exist"]);
    bundle.assert_nothing_left();
    let mut restore = bundle.command(&["restore", "--detach", "--image-path", &at, bundle.id()]);
    run_detached(&mut restore, &bundle.output());
    assert_eq!(bundle.state()["status"], "running", "{}", fs::read_to_string(bundle.output()).unwrap_or_default());
    assert!(counted(&bundle) >= before);
    let restored = counted(&bundle);
    eventually("it goes on", || counted(&bundle) > restored);
    assert_eq!(bundle.exec("cat /etc/bound").ok().stdout, "of the host");
    assert!(bundle.exec("cat /proc/keys").ok().stdout.is_empty(), "what was masked is seen");
    // It is in its cgroup, and so nothing of it outlives this.
    let seen = bundle.runx(&["ps", "--format", "json", bundle.id()]).ok().stdout;
    let pid = bundle.state()["pid"].as_i64();
    assert!(serde_json::from_str::<Vec<i64>>(&seen).expect("ps prints JSON").into_iter().any(|one| Some(one) == pid));
    bundle.runx(&["pause", bundle.id()]).ok();
    bundle.runx(&["resume", bundle.id()]).ok();
    bundle.runx(&["delete", "--force", bundle.id()]).ok();
    bundle.assert_nothing_left();
}

#[test]
fn a_container_in_the_foreground_writes_to_who_restored_it_and_its_exit_code_is_told() {
    needs_criu!();
    let bundle = Bundle::script("echo begun; while [ ! -e /dev/shm/end ]; do sleep 0.1; done; echo ended; exit 9");
    // With pipes, as engines have them.
    let mut first = bundle.command(&["run", "--detach", bundle.id()]);
    let (mut reader, writer) = std::io::pipe().expect("make a pipe");
    let input = std::io::pipe().expect("make a pipe");
    first.stdin(input.0).stdout(writer.try_clone().expect("duplicate it")).stderr(writer);
    assert!(first.status().expect("run it").success());
    drop(first);
    let mut line = [0; 6];
    std::io::Read::read_exact(&mut reader, &mut line).expect("read a line");
    assert_eq!(&line, b"begun\n");
    let (_, at) = images(&bundle, "images");
    bundle.runx(&["checkpoint", "--image-path", &at, "--leave-running", bundle.id()]).ok();
    assert_eq!(bundle.state()["status"], "running");
    bundle.runx(&["delete", "--force", bundle.id()]).ok();
    let restored = bundle.id().to_owned() + "-2";
    std::thread::scope(|scope| {
        let done = scope.spawn(|| bundle.runx(&["restore", "--image-path", &at, &restored]));
        eventually("it runs again", || {
            done.is_finished() || bundle.runx(&["exec", &restored, "touch", "/dev/shm/end"]).code == 0
        });
        let done = done.join().expect("no panic");
        assert_eq!((done.code, done.stdout.as_str()), (9, "ended\n"), "{}", done.stderr);
    });
    bundle.assert_nothing_left();
}

#[test]
fn a_checkpoint_adds_to_an_earlier_one() {
    needs_criu!();
    let bundle = Bundle::script(COUNT);
    start_counting(&bundle);
    eventually("it counts", || counted(&bundle) > 1);
    let (first, at_first) = images(&bundle, "first");
    let (_, at) = images(&bundle, "second");
    fs::create_dir(bundle.scratch().join("second")).expect("make a directory");
    bundle
        .runx(&["checkpoint", "--image-path", &at, "--parent-path", "../none", bundle.id()])
        .fails(1, &["--parent-path"]);
    bundle.runx(&["checkpoint", "--pre-dump", "--image-path", &at_first, bundle.id()]).ok();
    assert_eq!(bundle.state()["status"], "running");
    assert!(
        fs::read_dir(&first).expect("list it").flatten().any(|e| e.file_name().to_string_lossy().starts_with("pages-"))
    );
    bundle.runx(&["checkpoint", "--image-path", &at, "--parent-path", "../first", bundle.id()]).ok();
    assert!(bundle.scratch().join("second/parent").exists());
    bundle.assert_nothing_left();
}

#[test]
fn what_cannot_be_restored_tells_crius_reason_and_leaves_nothing() {
    needs_criu!();
    let bundle = Bundle::script("true");
    let (_, at) = images(&bundle, "images");
    fs::create_dir(bundle.scratch().join("images")).expect("make a directory");
    bundle.runx(&["restore", "--image-path", &at, bundle.id()]).fails(1, &["restore failed", "descriptors.json"]);
    fs::write(bundle.scratch().join("images/descriptors.json"), r#"["/dev/null", "/dev/null", "/dev/null"]"#)
        .expect("write");
    bundle.runx(&["restore", "--image-path", &at, bundle.id()]).fails(1, &["restore failed: criu: ", "restore.log"]);
    bundle.assert_nothing_left();
}

#[test]
fn a_container_that_cannot_be_kept_runs_on_and_the_reason_is_told() {
    needs_root!();
    let bundle = Bundle::script(COUNT);
    bundle.create().ok();
    let (_, at) = images(&bundle, "images");
    bundle.runx(&["checkpoint", "--image-path", &at, bundle.id()]).fails(1, &["cannot checkpoint", "created"]);
    bundle.runx(&["start", bundle.id()]).ok();
    let mut without = bundle.command(&["checkpoint", "--image-path", &at, bundle.id()]);
    run(without.env("PATH", "/var/empty")).fails(1, &["checkpoint failed", "criu", "is not installed"]);
    // What CRIU says where it cannot work is what is told.
    if obstacle().is_some() && Command::new("criu").arg("--version").output().is_ok() {
        bundle
            .runx(&["checkpoint", "--image-path", &at, bundle.id()])
            .fails(1, &["checkpoint failed: criu: ", "dump.log"]);
    }
    assert_eq!(bundle.state()["status"], "running");
    bundle.runx(&["delete", "--force", bundle.id()]).ok();
    bundle.assert_nothing_left();
}

#[test]
fn modes_and_namespaces_that_are_none_are_refused() {
    needs_root!();
    let bundle = Bundle::script("true");
    for (flags, words) in [
        (&["--manage-cgroups-mode", "some"], &["--manage-cgroups-mode", "soft, full, strict or ignore"]),
        (&["--empty-ns", "pid"], &["--empty-ns", "network"]),
        (&["--image-path", "/"], &["must not be /", "checkpoint"]),
    ] {
        let mut args = vec!["checkpoint"];
        args.extend(flags);
        args.push(bundle.id());
        bundle.runx(&args).fails(1, words);
    }
}
