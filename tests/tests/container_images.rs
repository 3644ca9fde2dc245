//! Containers of images: what an image says, its root filesystem, and that it stays as it is.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use runx_tests::command::{Done, eventually, run};
use runx_tests::container::Containers;
use runx_tests::{dist, needs_root, skip_outside_machine};

/// Imports the root filesystem as an image, with instructions of a Dockerfile.
#[track_caller]
fn import(containers: &Containers, rootfs: &Path, name: &str, changes: &[&str]) {
    let mut command = Command::new(dist().join("runx-image-client"));
    command
        .arg("--storage-root")
        .arg(containers.storage_root())
        .args(["import", "--quiet", "--name", name])
        .arg(rootfs);
    for change in changes {
        command.args(["--change", change]);
    }
    run(&mut command).ok();
}

/// Whether there is a program to import with.
fn has_client() -> bool {
    let there = dist().join("runx-image-client").exists();
    if !there {
        skip_outside_machine("it needs runx-image-client in RUNX_DIST");
    }
    there
}

#[track_caller]
fn image(containers: &Containers, flags: &[&str], args: &[&str]) -> Done {
    containers.container(&[&["run", "--network", "none"], flags, args].concat())
}

#[test]
fn an_image_says_what_runs_and_how_and_flags_say_otherwise() {
    needs_root!();
    if !has_client() {
        return;
    }
    let containers = Containers::new();
    let changes = [
        "ENTRYPOINT [\"/bin/echo\", \"entry\"]",
        "CMD [\"usual\", \"words\"]",
        "ENV FROM_IMAGE=yes",
        "ENV PATH=/bin",
        "USER user",
        "WORKDIR /tmp",
        "LABEL tier=image",
        "STOPSIGNAL SIGUSR1",
    ];
    import(&containers, &containers.rootfs(), "app:1", &changes);
    assert_eq!(image(&containers, &["--rm"], &["app:1"]).ok().stdout, "entry usual words\n");
    assert_eq!(image(&containers, &["--rm"], &["app:1", "other"]).ok().stdout, "entry other\n");
    assert_eq!(image(&containers, &["--rm", "--image", "app:1"], &["--", "x", "-y"]).ok().stdout, "entry x -y\n");
    let script = "id -u; pwd; echo $FROM_IMAGE $PATH $HOME";
    let out = image(&containers, &["--rm", "--entrypoint", "sh"], &["app:1", "-c", script]).ok().stdout;
    assert_eq!(out, "1000\n/tmp\nyes /bin /home/user\n");
    let flags = ["--rm", "--entrypoint", "sh", "-u", "0", "-w", "/", "-e", "FROM_IMAGE=no"];
    let out = image(&containers, &flags, &["app:1", "-c", script]).ok().stdout;
    assert_eq!(out, "0\n/\nno /bin /root\n");
    // Another entrypoint takes the image's arguments away.
    assert_eq!(image(&containers, &["--rm", "--entrypoint", "echo"], &["app:1"]).ok().stdout, "\n");
    let id = containers.id("a");
    let trap = "trap 'exit 4' USR1; echo on; while :; do sleep 0.1; done";
    image(&containers, &["-d", "--name", &id, "--entrypoint", "sh"], &["app:1", "-c", trap]).ok();
    containers.until_logged(&id, "on");
    let all = containers.inspect(&id);
    assert_eq!((all["labels"]["tier"].as_str(), all["stopSignal"].as_str()), (Some("image"), Some("SIGUSR1")));
    assert_eq!(containers.container(&["ls", "-q", "--filter", "ancestor=app:1"]).ok().stdout.trim(), id);
    containers.container(&["stop", &id]).ok();
    assert_eq!(containers.inspect(&id)["state"]["exitCode"], 4);
    containers.container(&["rm", &id]).ok();
    containers.assert_nothing_left();
}

#[test]
fn what_a_container_writes_is_its_own_and_stays_until_it_is_removed() {
    needs_root!();
    if !has_client() {
        return;
    }
    let containers = Containers::new();
    import(&containers, &containers.rootfs(), "app:1", &[]);
    let id = containers.id("a");
    let script = "cat /root/mine 2>/dev/null; echo written >> /root/mine; rm -f /etc/group";
    assert_eq!(image(&containers, &["--name", &id], &["app:1", "sh", "-c", script]).ok().stdout, "");
    // Nothing is mounted for what does not run.
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(&id), "{mounts}");
    assert_eq!(containers.container(&["start", "-a", &id]).ok().stdout, "written\n");
    let other = image(&containers, &["--rm"], &["app:1", "ls", "/root", "/etc/group"]).ok().stdout;
    assert!(!other.contains("mine") && other.contains("/etc/group"), "{other}");
    // It is there to be copied, too, while nothing runs.
    let out = containers.scratch().join("out");
    containers.container(&["cp", &format!("{id}:/root/mine"), out.to_str().unwrap()]).ok();
    assert_eq!(fs::read_to_string(out).unwrap(), "written\nwritten\n");
    containers.container(&["rm", &id]).ok();
    containers.assert_nothing_left();
}

#[test]
fn volumes_of_an_image_are_made_and_filled_and_go_with_rm() {
    needs_root!();
    if !has_client() {
        return;
    }
    let containers = Containers::new();
    fs::create_dir(containers.rootfs().join("data")).unwrap();
    fs::write(containers.rootfs().join("data/seed"), "seed").unwrap();
    import(&containers, &containers.rootfs(), "app:1", &["VOLUME /data"]);
    let out =
        image(&containers, &["--rm"], &["app:1", "sh", "-c", "cat /data/seed; grep -c ' /data ' /proc/self/mountinfo"]);
    assert_eq!(out.ok().stdout, "seed1\n");
    assert_eq!(fs::read_dir(containers.storage_root().join("volumes")).unwrap().count(), 0);
    containers.assert_nothing_left();
}

#[test]
fn a_monitor_that_was_killed_leaves_a_mount_that_the_next_command_takes_away() {
    needs_root!();
    if !has_client() {
        return;
    }
    let containers = Containers::new();
    import(&containers, &containers.rootfs(), "app:1", &[]);
    let id = containers.id("a");
    let mounted = || fs::read_to_string("/proc/self/mountinfo").unwrap().contains(&id);
    image(&containers, &["-d", "--name", &id], &["app:1", "sleep", "600"]).ok();
    assert!(mounted());
    let state = containers.inspect(&id)["state"].clone();
    for pid in [&state["monitorPid"], &state["pid"]] {
        // SAFETY: kill takes numbers; the process is one of this test's.
        assert_eq!(unsafe { libc::kill(pid.as_i64().unwrap() as i32, libc::SIGKILL) }, 0);
    }
    containers.until(&id, "exited");
    containers.container(&["start", &id]).ok();
    assert_eq!(containers.container(&["exec", &id, "echo", "fine"]).ok().stdout, "fine\n");
    containers.container(&["rm", "-f", &id]).ok();
    assert!(!mounted());
    containers.assert_nothing_left();
}

#[test]
fn a_command_that_is_killed_at_any_moment_leaves_no_mount_that_rm_does_not_take_away() {
    needs_root!();
    if !has_client() {
        return;
    }
    let containers = Containers::new();
    import(&containers, &containers.rootfs(), "app:1", &[]);
    for delay in (0..20).map(|step| step * 1500) {
        let id = containers.id(&format!("k{delay}"));
        let words = ["container", "run", "--network", "none", "--name", &id, "app:1", "sleep", "600"];
        let mut child = containers.command(&words).stdin(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(std::time::Duration::from_micros(delay));
        child.kill().unwrap();
        child.wait().unwrap();
        containers.container(&["rm", "-f", &id]).ok();
        containers.assert_nothing_left();
    }
}

#[test]
fn an_image_that_is_not_there_is_told_with_what_to_do() {
    needs_root!();
    if !has_client() {
        return;
    }
    let containers = Containers::new();
    image(&containers, &["--pull", "never"], &["nope:1"]).fails(125, &["nope:1", "runx storage pull nope:1"]);
    // Nobody answers on this port.
    image(&containers, &[], &["localhost:1/nope:1"]).fails(125, &["localhost:1/nope:1", "could not be fetched"]);
    import(&containers, &containers.rootfs(), "empty:1", &[]);
    image(&containers, &[], &["empty:1"]).fails(125, &["no command", "empty:1"]);
    containers.assert_nothing_left();
}

#[test]
fn a_module_in_an_image_runs_as_a_program() {
    needs_root!();
    if !has_client() {
        return;
    }
    let containers = Containers::new();
    let module = wat::parse_str(
        r#"(module (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
             (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
             (memory (export "memory") 1) (data (i32.const 8) "from wasm\n")
             (func (export "_start")
               (i32.store (i32.const 0) (i32.const 8)) (i32.store (i32.const 4) (i32.const 10))
               (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 20)))
               (call $exit (i32.const 6))))"#,
    )
    .unwrap();
    fs::write(containers.rootfs().join("app.wasm"), module).unwrap();
    let done = containers.run(&["--rm"], &["/app.wasm"]);
    assert_eq!((done.code, done.stdout.as_str()), (6, "from wasm\n"), "{}", done.stderr);
    import(&containers, &containers.rootfs(), "module:1", &["ENTRYPOINT [\"/app.wasm\"]"]);
    let done = image(&containers, &["--rm"], &["module:1"]);
    assert_eq!((done.code, done.stdout.as_str()), (6, "from wasm\n"), "{}", done.stderr);
    containers.assert_nothing_left();
}

#[test]
fn an_annotation_puts_the_agent_beside_the_program_and_keeps_it_there() {
    needs_root!();
    let containers = Containers::new();
    let flags = ["--annotation", "runx.dev/agent=true", "--annotation", "runx.dev/agent.envd-port=0"];
    let id = containers.background("a", &flags, "sleep 600");
    let agent = || {
        let top = containers.container(&["top", &id, "-eo", "pid,args"]).stdout;
        top.lines()
            .find(|line| line.contains("runx-agent"))
            .and_then(|line| line.split_whitespace().next()?.parse::<i32>().ok())
    };
    eventually("the agent runs", || agent().is_some());
    eventually("it made a token", || containers.container(&["exec", &id, "cat", "/dev/.runx-agent/token"]).code == 0);
    let first = agent().unwrap();
    // SAFETY: kill takes numbers; the process is one of this test's.
    unsafe { libc::kill(first, libc::SIGKILL) };
    eventually("it was started again", || agent().is_some_and(|pid| pid != first));
    assert_eq!(containers.status(&id), "running");
    containers.container(&["rm", "-f", &id]).ok();
    containers.assert_nothing_left();
    let flags = ["--annotation", "runx.dev/agent=perhaps"];
    containers.run(&flags, &["true"]).fails(125, &["runx.dev/agent", "perhaps"]);
    containers.assert_nothing_left();
}
