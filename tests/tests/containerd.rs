//! containerd drives the shim through `ctr`, and nothing is left behind.

use std::fs;
use std::path::Path;

use runx_tests::command::eventually;
use runx_tests::containerd::{BUSYBOX, Containerd, RUNTIME};
use runx_tests::{needs_containerd, repeats, slow};
use serde_json::{Value, json};

#[test]
fn a_container_runs_and_its_exit_code_comes_back() {
    needs_containerd!();
    let containerd = Containerd::start();
    let done = containerd.run(&[], "c1", &["sh", "-c", "echo out; echo err >&2; exit 7"]);
    assert_eq!((done.code, done.stdout.as_str(), done.stderr.as_str()), (7, "out\n", "err\n"));
    let flags = [RUNTIME, BUSYBOX, "c2"];
    let done = containerd.ctr_with(&["run", "--rm", "--runtime", flags[0], flags[1], flags[2], "cat"], "through stdin");
    assert_eq!(done.ok().stdout, "through stdin");
    // More than all buffers on the way hold, to a reader that is sometimes faster and sometimes slower.
    let numbers: String = (1..=200_000).map(|n| format!("{n}\n")).collect();
    assert!(containerd.run(&[], "c4", &["seq", "1", "200000"]).ok().stdout == numbers, "output is lost or changed");
    // Programs that end before anybody looks are not lost.
    for _ in 0..repeats(10) {
        containerd.run(&[], "c3", &["true"]).ok();
    }
    containerd.assert_nothing_left();
}

#[test]
fn flags_of_ctr_take_effect() {
    needs_containerd!();
    let containerd = Containerd::start();
    let script = |flags: &[&str], script: &str| containerd.run(flags, "c1", &["sh", "-c", script]);
    assert_eq!(script(&["--cwd", "/tmp", "--env", "A=b"], "pwd; echo $A").ok().stdout, "/tmp\nb\n");
    assert_eq!(script(&["--read-only"], "touch /x").code, 1);
    let volume = containerd.path().join("volume");
    fs::create_dir(&volume).unwrap();
    fs::write(volume.join("file"), "volume\n").unwrap();
    let mount = format!("type=bind,src={},dst=/mnt/v,options=rbind:ro", volume.display());
    let done = script(&["--mount", &mount], "cat /mnt/v/file; touch /mnt/v/new");
    assert_eq!((done.code, done.stdout.as_str()), (1, "volume\n"));
    let net = script(&["--net-host"], "readlink /proc/self/ns/net").ok().stdout;
    assert_eq!(net.trim(), fs::read_link("/proc/self/ns/net").unwrap().to_string_lossy());
    let eff = |flags: &[&str]| {
        let out = script(flags, "grep CapEff /proc/self/status").ok().stdout;
        u64::from_str_radix(out.split_ascii_whitespace().nth(1).unwrap(), 16).unwrap()
    };
    let default = eff(&[]);
    let (sys_admin, chown) = (1 << 21, 1);
    assert_eq!(default & (sys_admin | chown), chown);
    assert_eq!(eff(&["--cap-add", "CAP_SYS_ADMIN", "--cap-drop", "CAP_CHOWN"]), default & !chown | sys_admin);
    assert_eq!(eff(&["--privileged"]) & sys_admin, sys_admin);
    assert!(script(&["--privileged"], "ls /dev").ok().stdout.contains("kmsg"));
    assert!(script(&["--seccomp"], "grep Seccomp: /proc/self/status").ok().stdout.contains('2'));
    let pid_file = containerd.path().join("pid");
    script(&["--pid-file", &pid_file.to_string_lossy()], "true").ok();
    assert!(fs::read_to_string(&pid_file).unwrap().trim().parse::<u32>().is_ok());
    let log = containerd.path().join("logs/deep/log");
    script(&["--log-uri", &format!("file://{}", log.display())], "echo one; echo two >&2").ok();
    let mut lines: Vec<String> = fs::read_to_string(&log).unwrap().lines().map(str::to_owned).collect();
    lines.sort();
    assert_eq!(lines, ["one", "two"]);
    containerd.assert_nothing_left();
}

#[test]
fn limits_are_in_the_cgroup_while_it_runs() {
    needs_containerd!();
    let containerd = Containerd::start();
    let flags = ["run", "-d", "--null-io", "--runtime", RUNTIME, "--memory-limit", "33554432", "--cpus", "0.5"];
    containerd.ctr(&[&flags[..], &[BUSYBOX, "c1", "sleep", "100"]].concat()).ok();
    let group = format!("{}/c1", containerd.namespace());
    let read = |v1: &str, v2: &str| {
        let v2 = format!("/sys/fs/cgroup/{group}/{v2}");
        let (controller, file) = v1.split_once('/').unwrap();
        let v1 = format!("/sys/fs/cgroup/{controller}/{group}/{file}");
        fs::read_to_string(v1).or_else(|_| fs::read_to_string(v2)).unwrap().trim().to_owned()
    };
    assert_eq!(read("memory/memory.limit_in_bytes", "memory.max"), "33554432");
    assert!(read("cpu/cpu.cfs_quota_us", "cpu.max").starts_with("50000"));
    let metrics = containerd.ctr(&["task", "metrics", "--format", "json", "c1"]).ok().stdout;
    let metrics: Value = serde_json::from_str(&metrics).unwrap();
    let usage = metrics.pointer("/memory/usage/usage").or_else(|| metrics.pointer("/memory/usage")).unwrap();
    assert!(usage.as_u64().unwrap() > 0, "{metrics}");
    let cpu = metrics.pointer("/cpu/usage/total").or_else(|| metrics.pointer("/cpu/usage_usec")).unwrap();
    assert!(cpu.as_u64().unwrap() > 0, "{metrics}");
    containerd.end("c1");
    containerd.assert_nothing_left();
}

#[test]
fn a_running_task_is_execd_into_paused_listed_and_killed() {
    needs_containerd!();
    let containerd = Containerd::start();
    containerd.run_detached("c1", &["sh", "-c", "trap 'exit 3' TERM; while :; do sleep 0.05; done"]).ok();
    let exec = |flags: &[&str], id: &str, command: &[&str]| {
        containerd.ctr(&[&["task", "exec"], flags, &["--exec-id", id, "c1"], command].concat())
    };
    assert_eq!(exec(&[], "e1", &["sh", "-c", "echo here; exit 4"]).code, 4);
    let done = containerd.ctr_with(&["task", "exec", "--exec-id", "e2", "c1", "cat"], "piped\n");
    assert_eq!(done.ok().stdout, "piped\n");
    assert!(exec(&["--user", "1000:100"], "e3", &["id"]).ok().stdout.contains("uid=1000(user) gid=100"));
    assert_eq!(exec(&["--cwd", "/tmp"], "e4", &["pwd"]).ok().stdout, "/tmp\n");
    exec(&[], "e5", &["nosuch"]).fails(1, &["exec: \"nosuch\": executable file not found in $PATH"]);
    let terminal = ["task", "exec", "-t", "--exec-id", "e6", "c1", "sh", "-c", "sleep 0.3; tty; stty size"];
    let out = containerd.ctr_on_terminal(&terminal, 31, 91).ok().stdout;
    assert!(out.contains("/dev/pts/") && out.contains("31 91"), "{out}");
    let pid = containerd.pid("c1").unwrap();
    let ps = containerd.ctr(&["task", "ps", "c1"]).ok().stdout;
    assert!(ps.contains(&pid.to_string()), "{ps}");
    containerd.ctr(&["task", "pause", "c1"]).ok();
    assert_eq!(containerd.status("c1").as_deref(), Some("PAUSED"));
    exec(&[], "e7", &["true"]).fails(1, &["paused"]);
    containerd.ctr(&["task", "resume", "c1"]).ok();
    assert_eq!(containerd.status("c1").as_deref(), Some("RUNNING"));
    containerd.ctr(&["task", "delete", "c1"]).fails(1, &["c1"]);
    containerd.ctr(&["task", "kill", "-s", "SIGTERM", "c1"]).ok();
    eventually("it has stopped", || containerd.status("c1").as_deref() == Some("STOPPED"));
    containerd.ctr(&["task", "kill", "c1"]).fails(1, &["process already finished"]);
    let deleted = containerd.ctr(&["task", "delete", "c1"]);
    assert!(deleted.stderr.contains("exit code 3"), "{}", deleted.stderr);
    containerd.ctr(&["container", "rm", "c1"]).ok();
    containerd.assert_nothing_left();
}

#[test]
fn a_terminal_resizes() {
    needs_containerd!();
    let containerd = Containerd::start();
    let command = "sleep 0.3; tty; stty size; test -c /dev/console && echo console";
    let run = ["run", "--rm", "-t", "--runtime", RUNTIME, BUSYBOX, "c1", "sh", "-c", command];
    let out = containerd.ctr_on_terminal(&run, 29, 81).ok().stdout;
    assert!(out.contains("/dev/pts/0") && out.contains("29 81") && out.contains("console"), "{out}");
    containerd.assert_nothing_left();
}

#[test]
fn a_spec_of_the_users_own_is_followed() {
    needs_containerd!();
    let containerd = Containerd::start();
    let rootfs = containerd.path().join("rootfs");
    let config = containerd.path().join("spec.json");
    let spec = json!({
        "ociVersion": "1.0.2",
        "process": {"user": {"uid": 1000, "gid": 100}, "args": ["id"], "cwd": "/", "env": ["PATH=/bin"]},
        "root": {"path": rootfs},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
        "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "ipc"}],
                  "cgroupsPath": format!("/{}/own", containerd.namespace())}
    });
    fs::write(&config, spec.to_string()).unwrap();
    let done = containerd.ctr(&["run", "--rm", "--runtime", RUNTIME, "--config", &config.to_string_lossy(), "c1"]);
    assert!(done.ok().stdout.contains("uid=1000(user) gid=100"));
    containerd.assert_nothing_left();
}

#[test]
fn no_runtime_program_is_started_for_a_container() {
    needs_containerd!();
    let containerd = Containerd::start();
    containerd.run_detached("c1", &["sleep", "100"]).ok();
    let shim = containerd.shim("c1").expect("the container's parent is its shim");
    let name = |pid: i32| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim().to_owned();
    assert_eq!(name(shim), "containerd-shim");
    let children = fs::read_to_string(format!("/proc/{shim}/task/{shim}/children")).unwrap();
    let mut names: Vec<String> = children.split_ascii_whitespace().map(|pid| name(pid.parse().unwrap())).collect();
    names.sort();
    assert_eq!(names, ["runx-spawner", "sleep"]);
    containerd.ctr(&["task", "rm", "-f", "c1"]).ok();
    containerd.ctr(&["container", "rm", "c1"]).ok();
    containerd.assert_nothing_left();
}

#[test]
fn a_container_outlives_a_restart_of_containerd() {
    needs_containerd!();
    let mut containerd = Containerd::start();
    containerd.run_detached("c1", &["sleep", "1000"]).ok();
    let pid = containerd.pid("c1").unwrap();
    containerd.restart_daemon();
    assert_eq!(containerd.pid("c1"), Some(pid));
    assert_eq!(containerd.status("c1").as_deref(), Some("RUNNING"));
    assert_eq!(containerd.ctr(&["task", "exec", "--exec-id", "e", "c1", "echo", "alive"]).ok().stdout, "alive\n");
    containerd.end("c1");
    containerd.assert_nothing_left();
}

#[test]
fn an_exit_while_containerd_is_away_is_known_afterwards() {
    needs_containerd!();
    let mut containerd = Containerd::start();
    containerd.run_detached("c1", &["sh", "-c", "until test -e /go; do sleep 0.05; done; exit 9"]).ok();
    let root = format!("/proc/{}/root/go", containerd.pid("c1").unwrap());
    let pid = containerd.pid("c1").unwrap();
    containerd.stop_daemon();
    fs::write(root, "").unwrap();
    eventually("it has ended", || !Path::new(&format!("/proc/{pid}")).exists());
    containerd.restart_daemon();
    match containerd.status("c1").as_deref() {
        Some("STOPPED") => {
            let deleted = containerd.ctr(&["task", "delete", "c1"]);
            assert!(deleted.stderr.contains("exit code 9"), "{}", deleted.stderr);
        }
        // From 1.7 on containerd itself deletes, as it starts, a task that has no process any more.
        None => {}
        other => panic!("the task is {other:?}"),
    }
    containerd.ctr(&["container", "rm", "c1"]).ok();
    containerd.assert_nothing_left();
}

fn kill(pid: i32) {
    // SAFETY: the pid is that of a process of this test's own containerd.
    unsafe { libc::kill(pid, libc::SIGKILL) };
}

#[test]
fn a_killed_shim_leaves_nothing() {
    needs_containerd!();
    let containerd = Containerd::start();
    containerd.run_detached("c1", &["sleep", "1000"]).ok();
    let pid = containerd.pid("c1").unwrap();
    let address = fs::read_to_string(containerd.bundle("c1").join("address")).unwrap();
    let socket = address.strip_prefix("unix://").unwrap();
    assert!(Path::new(socket).exists());
    kill(containerd.shim("c1").unwrap());
    eventually("the socket is gone", || !Path::new(socket).exists());
    eventually("containerd knows", || containerd.status("c1").is_none_or(|status| status == "STOPPED"));
    eventually("the container is gone", || !Path::new(&format!("/proc/{pid}")).exists());
    containerd.ctr(&["task", "delete", "c1"]);
    containerd.ctr(&["container", "rm", "c1"]).ok();
    containerd.assert_nothing_left();
}

#[test]
fn a_killed_spawner_is_replaced() {
    needs_containerd!();
    let containerd = Containerd::start();
    containerd.run_detached("c1", &["sleep", "1000"]).ok();
    let shim = containerd.shim("c1").unwrap();
    let children = fs::read_to_string(format!("/proc/{shim}/task/{shim}/children")).unwrap();
    let spawner = children
        .split_ascii_whitespace()
        .map(|pid| pid.parse::<i32>().unwrap())
        .find(|pid| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "runx-spawner"))
        .expect("the shim has a spawner");
    kill(spawner);
    eventually("it is reaped", || !Path::new(&format!("/proc/{spawner}")).exists());
    assert_eq!(containerd.ctr(&["task", "exec", "--exec-id", "e", "c1", "echo", "alive"]).ok().stdout, "alive\n");
    assert_eq!(containerd.status("c1").as_deref(), Some("RUNNING"));
    containerd.ctr(&["task", "rm", "-f", "c1"]).ok();
    containerd.ctr(&["container", "rm", "c1"]).ok();
    containerd.assert_nothing_left();
}

#[test]
fn bad_input_is_named_and_leaves_nothing() {
    needs_containerd!();
    let containerd = Containerd::start();
    let refused = |flags: &[&str], command: &[&str], words: &[&str]| {
        containerd.run(flags, "c1", command).fails(1, words);
        containerd.ctr(&["container", "rm", "c1"]);
        containerd.assert_nothing_left();
    };
    refused(&[], &["nosuch"], &["exec: \"nosuch\": executable file not found in $PATH"]);
    refused(&[], &["/etc/passwd"], &["exec: \"/etc/passwd\": permission denied"]);
    refused(&["--mount", "type=bind,src=/no/source,dst=/d,options=rbind:ro"], &["true"], &["/no/source", "/d"]);
    refused(&["--log-uri", "binary:///no/logger"], &["true"], &["start logger /no/logger"]);
    refused(&["--log-uri", "binary-v2:///bin/true"], &["true"], &["logger /bin/true", "before it was ready"]);
    refused(&["--apparmor-profile", "x"], &["true"], &["AppArmor"]);
}

#[test]
fn a_client_that_dies_in_the_middle_of_a_create_leaves_no_shim() {
    needs_containerd!();
    let containerd = Containerd::start();
    let (steps, apart) = if slow() { (6, 160) } else { (12, 8) };
    for step in 0..steps {
        let id = format!("k{step}");
        let mut client = std::process::Command::new("ctr")
            .arg("-a")
            .arg(containerd.path().join("c.sock"))
            .args(["-n", containerd.namespace(), "run", "--rm", "--null-io", "--runtime", RUNTIME, BUSYBOX, &id])
            .args(["sleep", "1000"])
            .stdin(std::process::Stdio::null())
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(std::time::Duration::from_millis(10 + step * apart));
        let _ = client.kill();
        let _ = client.wait();
    }
    // What had started by then runs on, as it should; the rest is gone or can be removed.
    eventually("all is gone", || {
        for line in containerd.ctr(&["container", "ls", "-q"]).stdout.lines() {
            containerd.ctr(&["task", "rm", "-f", line]);
            containerd.ctr(&["container", "rm", line]);
        }
        let name = containerd.namespace();
        runx_tests::leftovers::find(name, &[]).iter().all(|left| !left.starts_with("process"))
    });
    containerd.assert_nothing_left();
}

#[test]
fn a_kill_for_lack_of_memory_is_an_event_as_it_happens_and_before_the_exit() {
    needs_containerd!();
    let containerd = Containerd::start();
    let mut events = containerd.events();
    let exhaust =
        "dd if=/dev/zero of=/dev/null bs=200M count=1; sleep 0.5; dd if=/dev/zero of=/dev/null bs=200M count=1";
    let limit = ["--memory-limit", "33554432"];
    // The shell lives on after the first, and ends right after the second.
    containerd.run(&limit, "c1", &["sh", "-c", exhaust]);
    let all = ["dd", "if=/dev/zero", "of=/dev/null", "bs=200M", "count=1"];
    assert_eq!(containerd.run(&limit, "c2", &all).code, 137);
    let order = |id: &str, events: &str| -> Vec<String> {
        let of = |line: &&str| line.contains(&format!("\"container_id\":\"{id}\""));
        let topic =
            |line: &str| line.split_ascii_whitespace().find(|word| word.starts_with("/tasks/")).map(str::to_owned);
        events.lines().filter(of).filter_map(topic).collect()
    };
    eventually("the last event is there", || order("c2", &events.read()).contains(&"/tasks/delete".to_owned()));
    let text = events.read();
    assert_eq!(
        order("c1", &text),
        ["/tasks/create", "/tasks/start", "/tasks/oom", "/tasks/oom", "/tasks/exit", "/tasks/delete"],
        "{text}"
    );
    assert_eq!(order("c2", &text), ["/tasks/create", "/tasks/start", "/tasks/oom", "/tasks/exit", "/tasks/delete"]);
    events.end();
    containerd.assert_nothing_left();
}

#[test]
fn options_come_as_a_table_too_and_take_effect_or_are_refused() {
    needs_containerd!();
    let containerd = Containerd::start();
    let root = containerd.path().join("own-root");
    let file = containerd.path().join("options.toml");
    let config = ["--runtime-config-path", &file.to_string_lossy()];
    fs::write(&file, format!("# runc's names\nBinaryName = \"\"\nRoot = \"{}\"\n", root.display())).unwrap();
    let flags = [&["run", "-d", "--null-io", "--runtime", RUNTIME], &config[..], &[BUSYBOX, "c1", "sleep", "100"]];
    containerd.ctr(&flags.concat()).ok();
    // As runc's shim has it, each namespace has its own below.
    let state = root.join(containerd.namespace()).join("c1");
    assert!(state.join("state.json").exists());
    containerd.end("c1");
    assert!(!state.exists());
    for (text, words) in [
        ("NoSuchOption = true", &["NoSuchOption", "unknown"][..]),
        ("ShimCgroup = '/no-such'", &["shim_cgroup", "there is no cgroup /no-such"]),
        ("TaskAPIVersion = 9", &["task_api_version 9"]),
        ("CriuWorkPath = '/x'", &["criu_work_path", "not supported"]),
        ("[nested]", &["[nested]"]),
    ] {
        fs::write(&file, text).unwrap();
        containerd.run(&config, "c2", &["true"]).fails(1, words);
    }
    containerd.assert_nothing_left();
}
