//! The life of containers: start, stop, kill, restart, remove, and what a kill of their monitors or commands leaves.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::process::{Command, Stdio};

use runx_tests::command::{eventually, run};
use runx_tests::container::Containers;
use runx_tests::needs_root;

fn kill(pid: i64, signal: i32) {
    // SAFETY: kill takes numbers; the process is one of this test's.
    assert_eq!(unsafe { libc::kill(pid as i32, signal) }, 0);
}

fn monitor(containers: &Containers, id: &str) -> i64 {
    containers.inspect(id)["state"]["monitorPid"].as_i64().expect("it has a monitor")
}

#[test]
fn stop_asks_first_and_kills_then() {
    needs_root!();
    let containers = Containers::new();
    let polite = containers.background("a", &[], "trap 'echo bye; exit 3' TERM; echo on; while :; do sleep 0.1; done");
    let rude =
        containers.background("b", &["--stop-timeout", "1"], "trap '' TERM; echo on; while :; do sleep 0.1; done");
    let other = containers.background(
        "c",
        &["--stop-signal", "USR1"],
        "trap 'exit 4' USR1; echo on; while :; do sleep 0.1; done",
    );
    for id in [&polite, &rude, &other] {
        containers.until_logged(id, "on");
    }
    assert_eq!(containers.container(&["stop", &polite, &rude, &other]).ok().stdout.lines().count(), 3);
    let code = |id: &str| containers.inspect(id)["state"]["exitCode"].as_i64();
    assert_eq!((code(&polite), code(&rude), code(&other)), (Some(3), Some(137), Some(4)));
    assert_eq!(containers.container(&["logs", &polite]).ok().stdout, "on\nbye\n");
    // What has stopped is fine to stop.
    containers.container(&["stop", &polite]).ok();
    containers.container(&["rm", &polite, &rude, &other]).ok();
    containers.assert_nothing_left();
}

#[test]
fn what_runs_is_not_removed_without_force_and_delete_stops_it() {
    needs_root!();
    let containers = Containers::new();
    let id = containers.background("a", &[], "trap 'exit 0' TERM; echo on; while :; do sleep 0.1; done");
    containers.until_logged(&id, "on");
    containers.container(&["rm", &id]).fails(1, &["running", "runx container stop"]);
    assert_eq!(containers.status(&id), "running");
    // The command for engines sees it, and refuses as it does.
    let state = runx_tests::command::run(&mut containers.command(&["state", &id])).ok().stdout;
    assert!(state.contains("\"running\""), "{state}");
    assert_eq!(containers.container(&["delete", &id]).ok().stdout.trim(), id);
    containers.assert_nothing_left();
    containers.container(&["delete", &id]).fails(1, &["no such container", "runx container ls --all"]);
    containers.container(&["rm", "-f", &id]).ok();
    let id = containers.background("b", &[], "trap '' TERM; sleep 600");
    containers.container(&["rm", "--force", &id]).ok();
    containers.assert_nothing_left();
}

#[test]
fn ids_may_be_shortened_as_long_as_they_are_clear() {
    needs_root!();
    let containers = Containers::new();
    let (one, other) =
        (containers.background("web1", &[], "sleep 600"), containers.background("web2", &[], "sleep 600"));
    containers.container(&["inspect", &containers.id("web")]).fails(1, &["beginning of several", &one, &other]);
    let short = &one[..one.len() - 1];
    assert_eq!(short, &other[..other.len() - 1]);
    containers.container(&["rm", "-f", &other]).ok();
    assert_eq!(containers.container(&["rm", "-f", short]).ok().stdout.trim(), short);
    containers.container(&["inspect", ".."]).fails(1, &["no such container"]);
    containers.container(&["rm", "-f", "../../x"]).ok();
    containers.assert_nothing_left();
}

#[test]
fn a_policy_starts_what_failed_again_as_often_as_it_says() {
    needs_root!();
    let containers = Containers::new();
    let id = containers.background("a", &["--restart", "on-failure:2"], "echo try; exit 5");
    assert_eq!(containers.container(&["wait", &id]).ok().stdout, "5\n");
    let state = containers.inspect(&id)["state"].clone();
    assert_eq!((state["restartCount"].as_i64(), state["status"].as_str()), (Some(2), Some("exited")));
    assert_eq!(containers.container(&["logs", &id]).ok().stdout, "try\n".repeat(3));
    let fine = containers.background("b", &["--restart", "on-failure"], "exit 0");
    containers.container(&["wait", &fine]).ok();
    assert_eq!(containers.inspect(&fine)["state"]["restartCount"], 0);
    containers.container(&["rm", &id, &fine]).ok();
    containers.assert_nothing_left();
}

#[test]
fn always_is_until_it_is_stopped() {
    needs_root!();
    let containers = Containers::new();
    let id = containers.background("a", &["--restart", "always"], "echo try; sleep 0.1");
    eventually("it was started again", || containers.inspect(&id)["state"]["restartCount"].as_i64() >= Some(2));
    containers.container(&["stop", "-t", "1", &id]).ok();
    let count = containers.inspect(&id)["state"]["restartCount"].clone();
    assert_eq!(containers.status(&id), "exited");
    // It stays so until somebody starts it.
    std::thread::sleep(std::time::Duration::from_millis(1200));
    assert_eq!(containers.inspect(&id)["state"]["restartCount"], count);
    containers.container(&["start", &id]).ok();
    eventually("it was started again", || containers.inspect(&id)["state"]["restartCount"].as_i64() >= Some(3));
    // By then it waits for longer and longer, and is removed all the same.
    containers.until(&id, "restarting");
    containers.container(&["rm", "-f", &id]).ok();
    containers.assert_nothing_left();
}

#[test]
fn a_policy_may_be_changed_while_it_runs() {
    needs_root!();
    let containers = Containers::new();
    let id = containers.background("a", &["-i"], "read x; exit 1");
    containers.container(&["update", "--restart", "on-failure:1", &id]).ok();
    for _ in 0..2 {
        containers.until(&id, "running");
        let before = containers.inspect(&id)["state"]["started"].clone();
        kill(containers.inspect(&id)["state"]["pid"].as_i64().unwrap(), libc::SIGKILL);
        eventually("it has ended", || {
            let state = containers.inspect(&id)["state"].clone();
            state["started"] != before && state["status"] == "running" || state["status"] == "exited"
        });
    }
    let state = containers.inspect(&id)["state"].clone();
    assert_eq!((state["status"].as_str(), state["restartCount"].as_i64()), (Some("exited"), Some(1)));
    containers.container(&["rm", &id]).ok();
    containers.assert_nothing_left();
}

#[test]
fn restart_starts_it_anew() {
    needs_root!();
    let containers = Containers::new();
    let id = containers.background("a", &[], "trap 'exit 0' TERM; echo on; while :; do sleep 0.1; done");
    containers.until_logged(&id, "on");
    let before = containers.inspect(&id)["state"]["pid"].clone();
    containers.container(&["restart", &id]).ok();
    let state = containers.inspect(&id)["state"].clone();
    assert!(state["status"] == "running" && state["pid"] != before, "{state}");
    containers.container(&["start", &id]).fails(1, &["running already"]);
    containers.container(&["rm", "-f", &id]).ok();
    containers.assert_nothing_left();
}

#[test]
fn a_container_outlives_the_command_that_runs_it() {
    needs_root!();
    let containers = Containers::new();
    let id = containers.id("a");
    let mut command = containers.run_command(&["--name", &id, "--rm"], &["sh", "-c", "echo on; sleep 600"]);
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
    eventually("it runs", || containers.container(&["ls", "-q"]).stdout.contains(&id));
    child.kill().unwrap();
    child.wait().unwrap();
    containers.until(&id, "running");
    containers.until_logged(&id, "on");
    containers.container(&["kill", &id]).ok();
    // Nobody is there to see it, and it removes itself.
    containers.assert_nothing_left();
}

#[test]
fn a_command_that_is_killed_at_any_moment_leaves_what_can_be_removed() {
    needs_root!();
    let containers = Containers::new();
    for delay in (0..30).map(|step| step * 700) {
        let id = containers.id(&format!("k{delay}"));
        let mut command = containers.run_command(&["--name", &id], &["sleep", "600"]);
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(std::time::Duration::from_micros(delay));
        child.kill().unwrap();
        child.wait().unwrap();
        containers.container(&["rm", "-f", &id]).ok();
        containers.assert_nothing_left();
    }
}

#[test]
fn what_a_killed_command_left_without_a_record_goes_with_the_next_one() {
    needs_root!();
    let containers = Containers::new();
    containers.script(&["--rm"], "exit 0").ok();
    let root = containers.storage_root().join("containers");
    for name in ["half", ".gone-x-1"] {
        fs::create_dir_all(root.join(name).join("upper/etc")).unwrap();
    }
    // One that somebody may still be at.
    containers.script(&["--rm"], "exit 0").ok();
    assert!(root.join("half").exists() && !root.join(".gone-x-1").exists());
    let old = fs::FileTimes::new().set_modified(std::time::SystemTime::now() - std::time::Duration::from_secs(600));
    fs::File::open(root.join("half")).unwrap().set_times(old).unwrap();
    containers.script(&["--rm"], "exit 0").ok();
    containers.assert_nothing_left();
}

#[test]
fn a_container_whose_monitor_was_killed_is_told_stopped_started_and_removed() {
    needs_root!();
    let containers = Containers::new();
    let id = containers.background("a", &[], "trap 'exit 0' TERM; while :; do sleep 0.1; done");
    kill(monitor(&containers, &id), libc::SIGKILL);
    eventually("it is told", || containers.container(&["ls"]).ok().stdout.contains("running (no monitor)"));
    containers.container(&["attach", &id]).fails(1, &["no monitor any more"]);
    containers.container(&["exec", &id, "true"]).ok();
    containers.container(&["stop", "-t", "5", &id]).ok();
    let state = containers.inspect(&id)["state"].clone();
    assert!(state["status"] == "exited" && state["exitCode"].is_null(), "{state}");
    containers.container(&["wait", &id]).fails(1, &["not known", "monitor was killed"]);
    containers.container(&["start", &id]).ok();
    assert_eq!(containers.status(&id), "running");
    kill(monitor(&containers, &id), libc::SIGKILL);
    containers.container(&["rm", &id]).fails(1, &["running"]);
    containers.container(&["rm", "-f", &id]).ok();
    containers.assert_nothing_left();
}

#[test]
fn one_who_is_attached_is_told_that_the_monitor_is_gone() {
    needs_root!();
    let containers = Containers::new();
    let id = containers.id("a");
    let mut command = containers.run_command(&["--name", &id], &["sleep", "600"]);
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    eventually("it runs", || containers.container(&["ls", "-q"]).stdout.contains(&id));
    kill(monitor(&containers, &id), libc::SIGKILL);
    let done = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(done.status.code() == Some(125) && text.contains("monitor of container"), "{text}");
    containers.container(&["rm", "-f", &id]).ok();
    containers.assert_nothing_left();
}

#[test]
fn after_the_machine_was_booted_anew_everything_has_ended_and_can_be_started() {
    needs_root!();
    let containers = Containers::new();
    let id = containers.background("a", &["--restart", "always"], "echo on; sleep 600");
    containers.until_logged(&id, "on");
    let (monitor, pid) = (monitor(&containers, &id), containers.inspect(&id)["state"]["pid"].as_i64().unwrap());
    kill(monitor, libc::SIGKILL);
    kill(pid, libc::SIGKILL);
    // A tmpfs is empty then, and there are no cgroups.
    eventually("the processes have gone", || fs::metadata(format!("/proc/{pid}/ns")).is_err());
    runx_tests::command::run(&mut containers.command(&["delete", "--force", &id])).ok();
    assert!(!containers.state_root().join(&id).exists());
    assert_eq!(containers.container(&["ls", "-q"]).ok().stdout, "");
    let table = containers.container(&["ls", "-a"]).ok().stdout;
    assert!(table.contains("exited"), "{table}");
    containers.container(&["start", &id]).ok();
    containers.until_logged(&id, "on\non\n");
    containers.container(&["rm", "-f", &id]).ok();
    containers.assert_nothing_left();
}

#[test]
fn a_monitor_that_is_asked_to_end_stops_its_container_for_good() {
    needs_root!();
    let containers = Containers::new();
    let script = "trap 'exit 0' TERM; echo on; while :; do sleep 0.1; done";
    let id = containers.background("a", &["--restart", "always"], script);
    containers.until_logged(&id, "on");
    kill(monitor(&containers, &id), libc::SIGTERM);
    containers.until(&id, "exited");
    assert_eq!(containers.inspect(&id)["state"]["restartCount"], 0);
    containers.container(&["rm", &id]).ok();
    containers.assert_nothing_left();
}

#[test]
fn a_monitor_shows_neither_words_nor_environment_of_the_command_it_came_from() {
    needs_root!();
    let containers = Containers::new();
    let id = containers.id("a");
    let mut command = containers.run_command(&["-d", "--name", &id, "-e", "TOKEN=hidden"], &["sleep", "600"]);
    runx_tests::command::run(command.env("SECRET", "hidden")).ok();
    let pid = monitor(&containers, &id);
    let read = |name: &str| String::from_utf8_lossy(&fs::read(format!("/proc/{pid}/{name}")).unwrap()).into_owned();
    assert!(read("cmdline").starts_with(&format!("runx: monitor of {id}")), "{:?}", read("cmdline"));
    assert!(!read("cmdline").contains("hidden") && !read("environ").contains("hidden"));
    // Nothing of the caller's stays open in it, neither his terminal nor his pipes.
    for fd in fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten() {
        let target = fs::read_link(fd.path()).unwrap().display().to_string();
        assert!(!target.contains("/pts/") && !target.contains("/tty"), "{target}");
    }
    containers.container(&["rm", "-f", &id]).ok();
    containers.assert_nothing_left();
}

#[test]
fn lists_are_complete_filtered_and_in_three_forms() {
    needs_root!();
    let containers = Containers::new();
    let run = containers.background("run", &["--label", "tier=web", "--label", "x"], "sleep 600");
    let done = containers.background("done", &["--label", "tier=db"], "exit 3");
    containers.container(&["wait", &done]).ok();
    let created = containers.id("created");
    let rootfs = containers.rootfs();
    containers.container(&["create", "--name", &created, "--rootfs", rootfs.to_str().unwrap(), "true"]).ok();
    let ids = |flags: &[&str]| {
        let text = containers.container(&[&["ls", "-q"], flags].concat()).ok().stdout;
        let mut ids: Vec<_> = text.lines().map(str::to_owned).collect();
        ids.sort();
        ids
    };
    let all = |list: &[&String]| {
        let mut ids: Vec<_> = list.iter().map(|id| (*id).clone()).collect();
        ids.sort();
        ids
    };
    assert_eq!(ids(&[]), all(&[&run]));
    assert_eq!(ids(&["-a"]), all(&[&run, &done, &created]));
    assert_eq!(ids(&["--filter", "status=exited"]), all(&[&done]));
    assert_eq!(ids(&["--filter", "status=created", "--filter", "status=running"]), all(&[&run, &created]));
    assert_eq!(ids(&["-a", "--filter", "label=tier"]), all(&[&run, &done]));
    assert_eq!(ids(&["-a", "--filter", "label=tier=web"]), all(&[&run]));
    assert_eq!(ids(&["--filter", "exited=3"]), all(&[&done]));
    assert_eq!(ids(&["-a", "--filter", "name=done"]), all(&[&done]));
    assert_eq!(ids(&["-l"]), all(&[&created]));
    assert_eq!(ids(&["-n", "2"]), all(&[&done, &created]));
    let table = containers.container(&["ps", "-a", "--no-trunc"]).ok().stdout;
    let title = table.lines().next().unwrap();
    for column in ["CONTAINER ID", "IMAGE", "PID", "STATUS", "CREATED", "ROOTFS"] {
        assert!(title.contains(column), "{title}");
    }
    assert!(table.contains("exited (3)") && table.contains(rootfs.to_str().unwrap()), "{table}");
    let json = containers.container(&["list", "-a", "--format", "json"]).ok().stdout;
    let json: Vec<serde_json::Value> = serde_json::from_str(&json).unwrap();
    let found = json.iter().find(|one| one["id"] == run.as_str()).unwrap();
    assert!(
        found["status"] == "running" && found["pid"].as_i64() > Some(1) && found["labels"]["tier"] == "web",
        "{found}"
    );
    containers.container(&["ls", "-f", "status=running"]).fails(1, &["--filter status=running"]);
    containers.container(&["rm", "-f", &run, &done, &created]).ok();
    containers.assert_nothing_left();
}

#[test]
fn inspect_tells_all_that_is_promised() {
    needs_root!();
    let containers = Containers::new();
    let flags = ["--annotation", "a.b/c=d", "-v", "data:/data", "--stop-timeout", "7"];
    let id = containers.background("a", &flags, "sleep 600");
    let all = containers.inspect(&id);
    let pid = all["state"]["pid"].as_i64().unwrap();
    assert!(all["state"]["startTime"].as_i64() > Some(0) && all["state"]["started"].is_string(), "{all}");
    assert_eq!(all["rootfs"], containers.rootfs().to_str().unwrap());
    assert_eq!(all["bundle"], containers.directory_of(&id).to_str().unwrap());
    assert_eq!(all["namespaces"]["net"], format!("/proc/{pid}/ns/net"));
    assert_eq!((all["network"]["mode"].as_str(), all["stopTimeout"].as_i64()), (Some("none"), Some(7)));
    assert_eq!(all["annotations"]["a.b/c"], "d");
    assert_eq!(all["config"]["annotations"]["a.b/c"], "d");
    assert!(all["mounts"].as_array().unwrap().iter().any(|mount| mount["destination"] == "/data"));
    assert!(fs::metadata(all["logPath"].as_str().unwrap()).is_ok());
    containers.container(&["inspect", &id, "nope"]).fails(1, &["no such container"]);
    containers.container(&["rm", "-f", &id]).ok();
}

#[test]
fn a_container_can_be_frozen_and_thawed() {
    needs_root!();
    let containers = Containers::new();
    let id =
        containers.background("a", &[], "trap 'exit 0' TERM; i=0; while :; do i=$((i+1)); echo $i; sleep 0.02; done");
    containers.until_logged(&id, "3\n");
    containers.container(&["pause", &id]).ok();
    assert_eq!(containers.status(&id), "paused");
    // What it has printed before is written by now.
    std::thread::sleep(std::time::Duration::from_millis(100));
    let frozen = containers.container(&["logs", &id]).ok().stdout;
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert_eq!(containers.container(&["logs", &id]).ok().stdout, frozen);
    containers.container(&["pause", &id]).fails(1, &["it is paused"]);
    containers.container(&["exec", &id, "true"]).fails(1, &["runx container unpause"]);
    containers.container(&["unpause", &id]).ok();
    eventually("it goes on", || containers.container(&["logs", &id]).stdout.len() > frozen.len());
    containers.container(&["pause", &id]).ok();
    // A paused one can be stopped, too.
    containers.container(&["stop", "-t", "5", &id]).ok();
    assert_eq!(containers.inspect(&id)["state"]["exitCode"], 0);
    containers.container(&["rm", &id]).ok();
    containers.assert_nothing_left();
}

#[test]
fn statistics_and_processes_are_those_of_the_container() {
    needs_root!();
    let containers = Containers::new();
    let id = containers.background("a", &["--memory", "64m"], "while :; do :; done");
    let stats = containers.container(&["stats", "--no-stream", "--format", "json", &id]).ok().stdout;
    let stats: Vec<serde_json::Value> = serde_json::from_str(&stats).unwrap();
    let one = &stats[0];
    assert_eq!(
        (one["id"].as_str(), one["memoryLimitBytes"].as_i64(), one["pids"].as_i64()),
        (Some(&*id), Some(64 << 20), Some(1))
    );
    assert!(one["cpuPercent"].as_f64() > Some(1.0) && one["memoryBytes"].as_i64() > Some(0), "{one}");
    let table = containers.container(&["stats", "--no-stream"]).ok().stdout;
    assert!(table.contains(&id) && table.contains("/ 64.0MiB"), "{table}");
    let top = containers.container(&["top", &id, "-o", "pid,args"]).ok().stdout;
    assert!(top.contains("while :; do :; done") && top.lines().count() == 2, "{top}");
    let mut screen = runx_tests::container::Terminal::start(containers.command(&["container", "stats", &id]), 24, 120);
    screen.expect(&id);
    screen.expect("\x1b[H");
    screen.expect(&id);
    screen.write("\x03");
    assert_eq!(screen.wait().0, 130);
    containers.container(&["rm", "-f", &id]).ok();
    containers.container(&["stats", "--no-stream", &id]).fails(1, &["no such container"]);
    containers.assert_nothing_left();
}

#[test]
fn several_commands_at_once_agree() {
    needs_root!();
    let containers = Containers::new();
    let id = containers.background("a", &[], "exit 0");
    containers.container(&["wait", &id]).ok();
    for _ in 0..5 {
        containers.container(&["wait", &id]).ok();
        let all: Vec<_> = (0..4)
            .map(|_| {
                let mut command = containers.command(&["container", "start", &id]);
                command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
            })
            .collect();
        let done: Vec<_> = all.into_iter().map(|child| child.wait_with_output().unwrap()).collect();
        assert!(done.iter().any(|done| done.status.success()));
        for one in done.iter().filter(|done| !done.status.success()) {
            let text = String::from_utf8_lossy(&one.stderr);
            assert!(text.contains("already"), "{text}");
        }
    }
    let racing: Vec<_> = (0..4)
        .map(|_| containers.command(&["container", "rm", "-f", &id]).stdout(Stdio::null()).spawn().unwrap())
        .collect();
    for mut child in racing {
        assert!(child.wait().unwrap().success());
    }
    containers.assert_nothing_left();
}

#[test]
fn a_container_that_fills_the_disk_can_be_stopped_and_removed() {
    needs_root!();
    let containers = Containers::new();
    let storage = containers.storage_root();
    fs::create_dir_all(&storage).unwrap();
    run(Command::new("mount").args(["-t", "tmpfs", "-o", "size=1m", "runx-test"]).arg(&storage)).ok();
    let done = catch_unwind(AssertUnwindSafe(|| {
        let fill = "dd if=/dev/zero of=/data/f bs=4096 2>/dev/null; ";
        let sleeps = format!("{fill} while :; do dd if=/dev/zero of=/data/g bs=4096 2>/dev/null; sleep 0.1; done");
        let full = || nix::sys::statvfs::statvfs(&storage).unwrap().blocks_available() == 0;
        for end in ["stop", "kill", "rm"] {
            let id = containers.background(end, &["-v", "/data"], &sleeps);
            eventually("the disk is full", full);
            match end {
                "stop" => containers.container(&["stop", "-t", "1", &id]).ok(),
                "kill" => containers.container(&["kill", "-s", "KILL", &id]).ok(),
                _ => containers.container(&["rm", "-f", "-v", &id]).ok(),
            };
            if end != "rm" {
                eventually("it has ended", || !matches!(&*containers.status(&id), "running" | "stopping"));
                containers.container(&["rm", "-f", "-v", &id]).ok();
            }
            assert!(!full());
        }
        // One that goes by itself has its own exit code, and leaves nothing.
        let done = containers.script(&["--rm", "-v", "/data"], &format!("{fill} exit 7"));
        assert_eq!(done.code, 7, "{}", done.stderr);
        containers.assert_nothing_left();
    }));
    let _ = containers.command(&["container", "rm", "--force", "--volumes", "--all"]).output();
    run(Command::new("umount").arg("-l").arg(&storage)).ok();
    if let Err(panic) = done {
        resume_unwind(panic);
    }
}
