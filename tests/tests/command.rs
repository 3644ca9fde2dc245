//! The command line on the real kernel: runc's flags in every place and form, its words, exit codes and logs.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use runx_tests::bundle::Bundle;
use runx_tests::command::{eventually, run, run_with};
use runx_tests::running::receive_descriptor;
use runx_tests::{dist, needs_root};
use serde_json::{Value, json};

fn runx(args: &[&str]) -> runx_tests::command::Done {
    run(Command::new(dist().join("runx")).args(args))
}

#[test]
fn flags_have_every_form_and_place() {
    needs_root!();
    let bundle = Bundle::script("echo ran");
    let path = bundle.path();
    let path = path.to_string_lossy();
    for line in [
        &["run", "--bundle", &path, bundle.id()][..],
        &["run", bundle.id(), "--bundle", &path],
        &["run", &format!("--bundle={path}"), "--no-pivot=false", bundle.id()],
        &["run", "-bundle", &path, bundle.id()],
        &["run", "-b", &path, "-no-new-keyring", "--", bundle.id()],
    ] {
        assert_eq!(run(bundle.command(line).current_dir("/")).ok().stdout, "ran\n", "{line:?}");
    }
    let pid_file = bundle.scratch().join("pid");
    bundle.runx_detached(&["run", bundle.id(), "-d", "--pid-file", &pid_file.to_string_lossy()]).ok();
    assert!(pid_file.exists());
    // A global flag may come after the command, too.
    let root = bundle.state_root();
    assert!(runx(&["state", bundle.id(), "--root", &root.to_string_lossy()]).ok().stdout.contains(bundle.id()));
    bundle.runx(&["delete", bundle.id(), "-f"]).ok();
    bundle.assert_nothing_left();
}

#[test]
fn mistakes_in_the_command_line_are_named() {
    for (line, words) in [
        (&["create", "--nope", "c"][..], "--nope"),
        (&["state"], "requires exactly 1"),
        (&["state", "a", "b"], "requires exactly 1"),
        (&["frobnicate"], "frobnicate"),
        (&["--root", "/", "list"], "--root"),
        (&["--log-format", "xml", "list"], "xml"),
        (&["--rootless", "maybe", "list"], "maybe"),
        (&["run", "--preserve-fds", "x", "c"], "--preserve-fds"),
        (&["run", "--pid-file"], "--pid-file"),
        (&["list", "-f", "yaml"], "invalid format option"),
        (&["events", "--interval", "0s", "c"], "greater than 0"),
        (&["update", "--memory", "1q", "c"], "--memory"),
        (&["checkpoint", "--image-path", "/", "c"], "must not be /"),
        (&["restore", "--empty-ns", "pid", "c"], "--empty-ns"),
    ] {
        runx(line).fails(1, &[words]);
    }
    // Even these go to the log that was asked for.
    let log = runx(&["--log-format", "json", "state"]).fails(1, &[]).stderr;
    let line: Value = serde_json::from_str(log.trim()).unwrap();
    assert_eq!((&line["level"], line["msg"].is_string()), (&json!("error"), true), "{log}");
}

#[test]
fn the_version_and_the_help_are_printed() {
    for line in [&["--version"][..], &["-v"], &["-V", "state"]] {
        let out = runx(line).ok().stdout;
        let lines: Vec<&str> = out.lines().collect();
        assert!(lines[0].starts_with("runx version ") && lines.contains(&"spec: 1.3.0"), "{out}");
        assert!(lines.last().unwrap().starts_with("libseccomp: 2."), "{out}");
    }
    for line in [&[][..], &["-h"], &["--help"], &["help"]] {
        assert!(runx(line).ok().stdout.contains("update"));
    }
    for line in [&["exec", "--help"][..], &["help", "exec"], &["exec", "c", "-h"]] {
        assert!(runx(line).ok().stdout.contains("--ignore-paused"), "{line:?}");
    }
    let features: Value = serde_json::from_str(&runx(&["features"]).ok().stdout).unwrap();
    assert_eq!(features["ociVersionMax"], "1.3.0");
    assert_eq!(features["linux"]["cgroup"]["v1"], true);
}

#[test]
fn the_log_has_both_formats_and_goes_to_a_file_and_standard_error() {
    needs_root!();
    let bundle = Bundle::script("true");
    let log = bundle.scratch().join("log");
    let flags = |format| ["--log", log.to_str().unwrap(), "--log-format", format, "--debug", "run", bundle.id()];
    bundle.runx(&flags("text")).ok();
    let text = fs::read_to_string(&log).unwrap();
    assert!(text.lines().all(|line| line.starts_with("time=\"") && line.contains(" level=debug msg=")), "{text}");
    assert!(text.contains(bundle.id()) && text.contains("exit code 0"), "{text}");
    fs::remove_file(&log).unwrap();
    let mut broken = Bundle::script("true");
    broken.config["process"]["args"] = json!(["/no/such"]);
    let log = broken.scratch().join("log");
    let flags = ["--log", log.to_str().unwrap(), "--log-format", "json", "run", broken.id()];
    broken.runx(&flags).fails(1, &["runx run failed", "/no/such", "no such file or directory"]);
    let text = fs::read_to_string(&log).unwrap();
    let line: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    assert!(line["msg"].as_str().unwrap().starts_with("runx run failed: unable to start container process"), "{text}");
    // Seconds, as runc writes them.
    assert_eq!(line["time"].as_str().unwrap().len(), "2026-01-01T00:00:00Z".len(), "{text}");
    // One line alone, and no debugging where it was not asked for.
    assert_eq!(text.lines().count(), 1, "{text}");
    // A warning is none of the command's failures.
    runx(&["--criu", "/x", "--root", broken.state_root().to_str().unwrap(), "delete", "-f", "nobody"])
        .ok()
        .stderr
        .contains("level=warning")
        .then_some(())
        .expect("a warning about --criu");
}

#[test]
fn failures_have_runcs_words_and_codes() {
    needs_root!();
    let bundle = Bundle::script("sleep 100");
    for command in ["state", "start", "pause", "resume", "kill", "delete", "update", "events", "ps"] {
        bundle.runx(&[command, "nobody"]).fails(1, &["container does not exist"]);
    }
    bundle.runx(&["exec", "nobody", "true"]).fails(255, &["exec failed", "container does not exist"]);
    bundle.runx(&["delete", "--force", "nobody"]).ok();
    bundle.create().ok();
    bundle.runx(&["create", bundle.id()]).fails(1, &["container with given ID already exists"]);
    bundle.runx(&["resume", bundle.id()]).fails(1, &["container not paused"]);
    bundle.runx(&["start", bundle.id()]).ok();
    bundle.runx(&["start", bundle.id()]).fails(1, &["cannot start an already running container"]);
    bundle.runx(&["delete", bundle.id()]).fails(1, &["cannot delete container", "that is not stopped: running"]);
    bundle.runx(&["exec", bundle.id()]).fails(255, &["exec args cannot be empty"]);
    bundle.runx(&["exec", bundle.id(), "nope"]).fails(255, &["executable file not found in $PATH"]);
    bundle.runx(&["exec", bundle.id(), "/nope"]).fails(255, &["no such file or directory"]);
    bundle.runx(&["exec", "--pid-file", "/no/such/dir/pid", bundle.id(), "true"]).fails(255, &["pid file"]);
    bundle.runx(&["exec", bundle.id(), "sh", "-c", "exit 42"]).fails(42, &[]);
    bundle.runx(&["kill", bundle.id(), "NOPE"]).fails(1, &["unknown signal \"NOPE\""]);
    bundle.runx(&["kill", bundle.id(), "KILL"]).ok();
    eventually("it has stopped", || bundle.state()["status"] == "stopped");
    bundle.runx(&["kill", bundle.id(), "0"]).fails(1, &["container not running"]);
    bundle.runx(&["kill", "-a", bundle.id(), "0"]).ok();
    bundle.runx(&["start", bundle.id()]).fails(1, &["cannot start a container that has stopped"]);
    bundle.runx(&["pause", bundle.id()]).fails(1, &["container not running"]);
    bundle.runx(&["update", "--pids-limit", "5", bundle.id()]).fails(1, &["container not running"]);
    bundle.runx(&["events", bundle.id()]).fails(1, &["is not running"]);
    bundle.runx(&["exec", bundle.id(), "true"]).fails(255, &["cannot exec in a stopped container"]);
    bundle.runx(&["delete", bundle.id()]).ok();
    bundle.assert_nothing_left();
}

#[test]
fn a_configuration_can_have_another_name() {
    needs_root!();
    let mut bundle = Bundle::script("sleep 100");
    bundle.set("/process", "env", json!(["PATH=/bin", "WHICH=first"]));
    let other = bundle.scratch().join("other.json");
    fs::write(&other, bundle.config.to_string()).unwrap();
    bundle.set("/process", "args", json!(["false"]));
    bundle.set("/process", "env", json!(["PATH=/nowhere"]));
    bundle.runx_detached(&["run", "-d", "-f", other.to_str().unwrap(), bundle.id()]).ok();
    // An exec finds the same one, and not config.json.
    assert_eq!(bundle.exec("echo $WHICH").ok().stdout, "first\n");
    bundle.runx(&["delete", "-f", bundle.id()]).ok();
    bundle.runx(&["run", "--config", "/no/such.json", bundle.id()]).fails(1, &["/no/such.json"]);
    bundle.assert_nothing_left();
}

/// Runs a command line in a shell of the host that opened a file of each name as descriptor 3 and so on.
fn with_files(bundle: &Bundle, names: &[&str], prefix: &str, args: &[&str]) -> runx_tests::command::Done {
    let mut script = String::new();
    for (i, name) in names.iter().enumerate() {
        let path = bundle.scratch().join(name);
        fs::write(&path, format!("{name}\n")).unwrap();
        script += &format!("exec {}<'{}'; ", i + 3, path.display());
    }
    // Written by the call.
    let command = bundle.command(&[]);
    let words = std::iter::once(command.get_program()).chain(command.get_args()).map(|word| word.to_string_lossy());
    let words: Vec<String> =
        words.chain(args.iter().map(|word| (*word).into())).map(|word| format!("'{word}'")).collect();
    script += &format!("{prefix} exec {}", words.join(" "));
    run(Command::new("sh").args(["-c", &script]).current_dir(bundle.path()))
}

#[test]
fn descriptors_are_handed_on_and_no_others() {
    needs_root!();
    let bundle = Bundle::script("cat <&4; ls /proc/self/fd; echo $LISTEN_FDS $LISTEN_PID");
    let done = with_files(&bundle, &["a", "b", "c"], "", &["run", "--preserve-fds", "2", bundle.id()]).ok();
    // 5 is the descriptor with which ls reads the directory.
    assert_eq!(done.stdout, "b\n0\n1\n2\n3\n4\n5\n\n");
    with_files(&bundle, &["a"], "", &["run", "--preserve-fds", "2", bundle.id()]).fails(1, &["preserved-fd 1"]);
    // The log's own descriptor is none of those.
    let log = bundle.scratch().join("log");
    let flags = ["--log", log.to_str().unwrap(), "run", "--preserve-fds", "1", bundle.id()];
    with_files(&bundle, &[], "", &flags).fails(1, &["preserved-fd 0"]);
    let listening = "LISTEN_PID=$$ LISTEN_FDS=1";
    let bundle = Bundle::script("cat <&3; cat <&4; echo $LISTEN_FDS $LISTEN_PID");
    let flags = ["run", "--preserve-fds", "1", bundle.id()];
    assert_eq!(with_files(&bundle, &["a", "b"], listening, &flags).ok().stdout, "a\nb\n1 1\n");
    // Meant for another process, they are not handed on.
    let bundle = Bundle::script("ls /proc/self/fd; echo $LISTEN_FDS $LISTEN_PID");
    let done = with_files(&bundle, &["a"], "LISTEN_PID=1 LISTEN_FDS=1", &["run", bundle.id()]).ok();
    assert_eq!(done.stdout, "0\n1\n2\n3\n\n");
    let bundle = Bundle::running("sleep 100");
    let flags = ["exec", "--preserve-fds=2", bundle.id(), "cat", "/proc/self/fd/4"];
    assert_eq!(with_files(&bundle, &["a", "b"], "", &flags).ok().stdout, "b\n");
    with_files(&bundle, &["a"], "", &flags).fails(255, &["preserved-fd 1"]);
}

#[test]
fn a_pidfd_goes_to_the_socket() {
    needs_root!();
    let bundle = Bundle::script("sleep 100");
    let path = bundle.scratch().join("pidfd.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let socket = path.to_str().unwrap();
    let pid_of = |fd: &std::os::fd::OwnedFd| {
        let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", std::os::fd::AsRawFd::as_raw_fd(fd))).unwrap();
        info.lines().find_map(|line| line.strip_prefix("Pid:")).unwrap().trim().parse::<i64>().unwrap()
    };
    bundle.runx_detached(&["run", "-d", "--pidfd-socket", socket, bundle.id()]).ok();
    let (word, first) = receive_descriptor(&listener);
    assert_eq!((word.as_str(), pid_of(&first)), ("standard", bundle.state()["pid"].as_i64().unwrap()));
    let pid_file = bundle.scratch().join("pid");
    let flags =
        ["exec", "-d", "--pid-file", pid_file.to_str().unwrap(), "--pidfd-socket", socket, bundle.id(), "sleep", "9"];
    bundle.runx_detached(&flags).ok();
    let (word, other) = receive_descriptor(&listener);
    assert_eq!((word.as_str(), pid_of(&other).to_string()), ("setns", fs::read_to_string(pid_file).unwrap()));
    bundle.runx(&["delete", "-f", bundle.id()]).ok();
    // A socket that is not there leaves nothing.
    bundle.runx(&["create", "--pidfd-socket", "/no/such.sock", bundle.id()]).fails(1, &["/no/such.sock"]);
    bundle.assert_nothing_left();
}

#[test]
fn a_container_can_be_kept_when_it_ends() {
    needs_root!();
    let bundle = Bundle::script("exit 3");
    assert_eq!(bundle.runx(&["run", "--keep", bundle.id()]).code, 3);
    assert_eq!(bundle.state()["status"], "stopped");
    bundle.runx(&["delete", bundle.id()]).ok();
    bundle.assert_nothing_left();
}

#[test]
fn an_exec_is_what_its_flags_say() {
    needs_root!();
    let bundle = Bundle::running("sleep 100");
    let id = bundle.id();
    let exec = |flags: &[&str], script: &str| {
        let done = bundle.runx(&[&["exec"], flags, &[id, "sh", "-c", script]].concat());
        done.ok().stdout
    };
    assert_eq!(exec(&["--cwd", "/bin"], "pwd"), "/bin\n");
    assert_eq!(
        exec(&["-e", "A=1", "--env", "B=2", "-e", "A=3", "-e", "TERM=vt100"], "echo $A $B $TERM"),
        "3 2 vt100\n"
    );
    assert_eq!(exec(&["-u", "1000:5", "-g", "7", "--additional-gids", "8"], "id -u; id -G"), "1000\n5 7 8\n");
    assert_eq!(exec(&["--no-new-privs=false"], "grep NoNewPrivs /proc/self/status"), "NoNewPrivs:\t0\n");
    assert_eq!(exec(&["--tty=false"], "test -t 0 || echo none"), "none\n");
    // A terminal's lines end as the program ends them.
    assert_eq!(exec(&["-t"], "tty; echo x"), "/dev/pts/0\nx\n");
    // Flags after the container's id, too, up to the command.
    assert_eq!(bundle.runx(&["exec", id, "--cwd", "/tmp", "pwd"]).ok().stdout, "/tmp\n");
    assert_eq!(bundle.runx(&["exec", id, "echo", "--cwd", "-t"]).ok().stdout, "--cwd -t\n");
    let sets = exec(&["-c", "CAP_SYS_TIME", "--cap", "cap_chown"], "grep Cap /proc/self/status");
    let set = |name: &str| {
        let line = sets.lines().find(|line| line.starts_with(name)).unwrap();
        u64::from_str_radix(line.split_whitespace().last().unwrap(), 16).unwrap()
    };
    let added = 1 << 25 | 1;
    for name in ["CapBnd", "CapEff", "CapPrm"] {
        assert_eq!(set(name) & added, added, "{sets}");
    }
    // CVE-2022-29162.
    assert_eq!((set("CapInh"), set("CapAmb")), (0, 0), "{sets}");
    bundle.runx(&["exec", "--cap", "CAP_NOPE", id, "true"]).fails(255, &["CAP_NOPE"]);
    // CVE-2026-30892: what is no number never becomes root.
    for user in ["", "1x", "-1", "+1", "4294967296", "4294967295", "1:", ":1", "1:2:3", "root", " 1", "0x1"] {
        let done = bundle.runx(&["exec", "--user", user, id, "id"]).fails(255, &["--user"]);
        assert_eq!(done.stdout, "", "{user:?}");
    }
    bundle.runx(&["exec", "-g", "-5", id, "id"]).fails(1, &["--additional-gids"]);
    // Without an AppArmor or SELinux these are refused, not ignored.
    bundle.runx(&["exec", "--apparmor", "no-such-profile", id, "true"]).fails(255, &["no-such-profile"]);
    bundle.runx(&["exec", "--process-label", "no:such:label", id, "true"]).fails(255, &["elinux"]);
    // Flags change what a file says.
    let file = bundle.scratch().join("process.json");
    let process = json!({"user": {"uid": 5, "gid": 6}, "args": ["id"], "cwd": "/", "env": ["PATH=/bin"]});
    fs::write(&file, process.to_string()).unwrap();
    let flags = ["exec", "-p", file.to_str().unwrap(), "-u", "7", id];
    let out = bundle.runx(&flags).ok().stdout;
    assert!(out.starts_with("uid=7 gid=6"), "{out}");
    // Without a user it is root, and what is wrong with it is named.
    fs::write(&file, json!({"args": ["id"], "cwd": "/", "env": ["PATH=/bin"]}).to_string()).unwrap();
    let out = bundle.runx(&["exec", "-p", file.to_str().unwrap(), id]).ok().stdout;
    assert!(out.starts_with("uid=0"), "{out}");
    fs::write(&file, json!({"user": {"uid": "many"}, "args": ["id"], "cwd": "/"}).to_string()).unwrap();
    bundle.runx(&["exec", "-p", file.to_str().unwrap(), id]).fails(255, &["process.json", "many"]);
}

#[test]
fn an_exec_goes_into_a_group_below_the_containers() {
    needs_root!();
    let bundle = Bundle::running("sleep 100");
    let v1 = std::path::Path::new("/sys/fs/cgroup/memory").exists();
    let below = bundle.group_file("memory", "", "").join("below");
    fs::create_dir(&below).unwrap();
    let group = if v1 { "memory:below" } else { "below" };
    let own = |flags: &[&str]| {
        let pid_file = bundle.scratch().join("pid");
        let always = ["exec", "-d", "--pid-file", pid_file.to_str().unwrap()];
        bundle.runx_detached(&[&always, flags, &[bundle.id(), "sleep", "100"]].concat()).ok();
        let pid = fs::read_to_string(pid_file).unwrap();
        fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap()
    };
    let groups = own(&["--cgroup", group]);
    let inside = groups.lines().filter(|line| line.ends_with(&format!("{}/below", bundle.id()))).count();
    assert_eq!(inside, 1, "{groups}");
    assert!(!own(&["--cgroup", "/"]).contains("below"));
    for (bad, words) in [
        ("..", "bad sub cgroup path"),
        ("nope", "o such file or directory"),
        ("whaat:/", "unknown controller"),
        (":x", "empty"),
    ] {
        bundle.runx(&["exec", "--cgroup", bad, bundle.id(), "true"]).fails(255, &[words]);
    }
    bundle.runx(&["exec", "--cgroup", "a", "--cgroup", "b", bundle.id(), "true"]).fails(255, &["missing <controller>"]);
    bundle.runx(&["delete", "-f", bundle.id()]).ok();
    bundle.assert_nothing_left();
}

#[test]
fn an_exec_in_a_paused_container_waits_if_it_is_told_to() {
    needs_root!();
    let bundle = Bundle::running("sleep 100");
    bundle.runx(&["pause", bundle.id()]).ok();
    bundle.runx(&["exec", bundle.id(), "true"]).fails(255, &["cannot exec in a paused container", "--ignore-paused"]);
    let mut command = bundle.command(&["exec", "--ignore-paused", bundle.id(), "echo", "done"]);
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(200));
    let early = child.try_wait().unwrap();
    bundle.runx(&["resume", bundle.id()]).ok();
    let output = child.wait_with_output().unwrap();
    assert!(early.is_none(), "it ran in a paused container");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "done\n");
}

#[test]
fn processes_and_containers_are_listed() {
    needs_root!();
    let bundle = Bundle::running("sleep 100 & sleep 101; true");
    let pids = || -> Vec<i64> {
        serde_json::from_str(&bundle.runx(&["ps", "--format", "json", bundle.id()]).ok().stdout).unwrap()
    };
    eventually("both are there", || pids().len() == 3);
    assert!(pids().contains(&bundle.state()["pid"].as_i64().unwrap()));
    if Command::new("ps").output().is_ok() {
        let table = bundle.runx(&["ps", bundle.id()]).ok().stdout;
        assert!(table.lines().next().unwrap().contains("CMD") && table.lines().count() == 4, "{table}");
        let table = bundle.runx(&["ps", bundle.id(), "-o", "pid,args", "-e"]).ok().stdout;
        assert!(table.contains("sleep 101") && table.lines().count() == 4, "{table}");
        bundle.runx(&["ps", bundle.id(), "-o", "args", "-e"]).fails(1, &["no PID column"]);
        bundle.runx(&["ps", bundle.id(), "--nope"]).fails(1, &["ps"]);
    } else {
        eprintln!("SKIPPED a part: there is no ps here");
    }
    let table = bundle.runx(&["list"]).ok().stdout;
    let lines: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines[0], ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"]);
    assert_eq!((lines[1][0], lines[1][2], lines[1][5], lines.len()), (bundle.id(), "running", "root", 2));
    assert_eq!(bundle.runx(&["list", "-q"]).ok().stdout, format!("{}\n", bundle.id()));
    let json: Value = serde_json::from_str(&bundle.runx(&["list", "--format=json"]).ok().stdout).unwrap();
    assert_eq!((&json[0]["id"], &json[0]["status"]), (&json!(bundle.id()), &json!("running")));
    assert_eq!(json[0]["bundle"], json!(bundle.path()));
    bundle.runx(&["kill", bundle.id(), "9"]).ok();
    eventually("it has stopped", || bundle.state()["status"] == "stopped");
    // runc's readers expect a list, and 0 for the pid.
    assert_eq!(bundle.runx(&["ps", "-f", "json", bundle.id()]).ok().stdout, "[]\n");
    assert_eq!(bundle.state()["pid"], 0);
    bundle.runx(&["delete", bundle.id()]).ok();
    runx(&["--root", "/no/such/root", "list"]).fails(1, &["/no/such/root", "o such file"]);
}

#[test]
fn signals_go_by_number_and_name() {
    needs_root!();
    let script = "for s in USR1 USR2 HUP; do trap \"echo $s\" $s; done; trap 'exit 0' TERM; echo up; \
                  while :; do sleep 0.02; done";
    let bundle = Bundle::running(script);
    let said = || fs::read_to_string(bundle.output()).unwrap();
    eventually("it is up", || said().contains("up"));
    for (signal, word) in [("USR1", "USR1"), ("sigusr2", "USR2"), ("1", "HUP")] {
        bundle.runx(&["kill", bundle.id(), signal]).ok();
        eventually(word, || said().contains(word));
    }
    // The one that is sent if none is named; to all processes, the sleeping ones too.
    bundle.runx(&["kill", "--all", bundle.id()]).ok();
    eventually("it has stopped", || bundle.state()["status"] == "stopped");
    bundle.runx(&["delete", bundle.id()]).ok();
    bundle.assert_nothing_left();
}

#[test]
fn limits_are_changed_by_flags_and_files() {
    needs_root!();
    let bundle = Bundle::running("sleep 100");
    let id = bundle.id();
    let update = |flags: &[&str]| bundle.runx(&[&["update"], flags, &[id]].concat());
    let memory = || bundle.limit("memory", "memory.limit_in_bytes", "memory.max");
    let pids = || bundle.limit("pids", "pids.max", "pids.max");
    let quota = || bundle.limit("cpu", "cpu.cfs_quota_us", "cpu.max");
    update(&["--memory", "64M", "--pids-limit=33", "--cpu-quota", "40000", "--cpu-period", "200000"]).ok();
    assert_eq!((memory(), pids()), ((64 << 20).to_string(), "33".to_owned()));
    assert!(quota().starts_with("40000"), "{}", quota());
    update(&["--memory-reservation", "16777216", "--cpu-quota", "-1", "--memory", "96m", "--pids-limit", "-1"]).ok();
    assert_eq!((memory(), pids()), ((96 << 20).to_string(), "max".to_owned()));
    assert!(quota().starts_with("-1") || quota().starts_with("max"), "{}", quota());
    assert_eq!(bundle.limit("memory", "memory.soft_limit_in_bytes", "memory.low"), "16777216");
    update(&["--cpuset-cpus", "0", "--cpuset-mems", "0"]).ok();
    assert_eq!(bundle.limit("cpuset", "cpuset.cpus", "cpuset.cpus"), "0");
    let file = bundle.scratch().join("limits.json");
    fs::write(&file, json!({"memory": {"limit": 48 << 20}, "pids": {"limit": 7}}).to_string()).unwrap();
    update(&["-r", file.to_str().unwrap(), "--pids-limit", "8"]).ok();
    assert_eq!((memory(), pids()), ((48 << 20).to_string(), "8".to_owned()), "flags change what the file says");
    let text = json!({"pids": {"limit": 9}, "cpu": {"shares": 100}}).to_string();
    run_with(&mut bundle.command(&["update", "--resources=-", id]), &text).ok();
    assert_eq!((memory(), pids()), ((48 << 20).to_string(), "9".to_owned()));
    let warned = update(&["--kernel-memory", "1m", "--pids-limit", "10"]).ok().stderr;
    assert!(warned.contains("level=warning") && warned.contains("kernel memory"), "{warned}");
    update(&["--l3-cache-schema", "L3:0=f"]).fails(1, &["--l3-cache-schema"]);
    run_with(&mut bundle.command(&["update", "-r", "-", id]), "{\"pids\": ").fails(1, &["standard input"]);
    update(&["-r", "/no/such.json"]).fails(1, &["/no/such.json"]);
    update(&["--cpuset-cpus", "9999"]).fails(1, &["cpuset.cpus"]);
    assert_eq!(pids(), "10");
    bundle.runx(&["delete", "-f", id]).ok();
    bundle.assert_nothing_left();
}

#[test]
fn statistics_are_printed_once_and_until_the_end() {
    needs_root!();
    let mut bundle = Bundle::script("dd if=/dev/zero of=/dev/null bs=1M count=500; sleep 100");
    bundle.config["linux"]["resources"]["memory"] = json!({"limit": 64 << 20});
    bundle.config["linux"]["resources"]["pids"] = json!({"limit": 25});
    bundle.begin();
    let once: Value = serde_json::from_str(&bundle.runx(&["events", "--stats", bundle.id()]).ok().stdout).unwrap();
    assert_eq!((&once["type"], &once["id"]), (&json!("stats"), &json!(bundle.id())));
    let data = &once["data"];
    assert_eq!(data["memory"]["usage"]["limit"], 64 << 20, "{once}");
    assert!(data["memory"]["usage"]["usage"].as_u64().unwrap() > 0, "{once}");
    assert!(data["cpu"]["usage"]["total"].as_u64().unwrap() > 0, "{once}");
    assert_eq!(data["pids"]["limit"], 25, "{once}");
    // What Go leaves out when it is zero is left out here, and nothing else.
    for key in ["cpu", "cpuset", "memory", "pids", "blkio", "hugetlb", "intel_rdt", "network_interfaces"] {
        assert!(data.get(key).is_some(), "{key}: {once}");
    }
    let mut child =
        bundle.command(&["events", "--interval", "50ms", bundle.id()]).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    for _ in 0..3 {
        let line = lines.next().unwrap().unwrap();
        assert!(line.starts_with(&format!("{{\"type\":\"stats\",\"id\":{:?},\"data\":{{", bundle.id())), "{line}");
    }
    bundle.runx(&["delete", "-f", bundle.id()]).ok();
    // It ends with the container.
    for line in lines {
        serde_json::from_str::<Value>(&line.unwrap()).unwrap();
    }
    assert!(child.wait().unwrap().success());
    bundle.assert_nothing_left();
}

#[test]
fn events_end_when_nobody_reads_them() {
    needs_root!();
    let bundle = Bundle::running("sleep 100");
    let mut child =
        bundle.command(&["events", "--interval", "1h", bundle.id()]).stdout(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    eventually("it has ended", || child.try_wait().unwrap().is_some());
}

/// `events` without statistics, once it watches, and the lines that it prints.
fn events(bundle: &Bundle) -> (Child, impl Iterator<Item = String>) {
    let mut child =
        bundle.command(&["events", "--interval", "1h", bundle.id()]).stdout(Stdio::piped()).spawn().unwrap();
    let waits = || fs::read_to_string(format!("/proc/{}/syscall", child.id())).unwrap_or_default();
    eventually("it watches", || waits().split(' ').next() == Some(&libc::SYS_poll.to_string()));
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    (child, lines.map(|line| line.unwrap()))
}

#[test]
fn a_lack_of_memory_is_told_of() {
    needs_root!();
    let oom = |bundle: &Bundle| Some(format!("{{\"type\":\"oom\",\"id\":\"{}\"}}", bundle.id()));
    let hog = ["dd", "if=/dev/zero", "of=/dev/null", "bs=200M", "count=1"];
    let mut bundle = Bundle::script("sleep 100");
    bundle.config["linux"]["resources"]["memory"] = json!({"limit": 32 << 20});
    bundle.begin();
    let (mut child, mut lines) = events(&bundle);
    for _ in 0..2 {
        assert_eq!(bundle.runx(&[&["exec", bundle.id()], &hog[..]].concat()).code, 137);
        assert_eq!(lines.next(), oom(&bundle));
    }
    bundle.runx(&["delete", "-f", bundle.id()]).ok();
    assert!(lines.next().is_none() && child.wait().unwrap().success());
    // The last word of a container that ended of it.
    let mut bundle = Bundle::script(&format!("until test -e /tmp/go; do sleep 0.02; done; exec {}", hog.join(" ")));
    bundle.config["root"]["readonly"] = json!(false);
    bundle.config["linux"]["resources"]["memory"] = json!({"limit": 32 << 20});
    bundle.begin();
    let (mut child, mut lines) = events(&bundle);
    fs::write(bundle.rootfs().join("tmp/go"), "").unwrap();
    assert_eq!(lines.next(), oom(&bundle));
    assert!(lines.next().is_none() && child.wait().unwrap().success());
    bundle.runx(&["delete", bundle.id()]).ok();
    bundle.assert_nothing_left();
}

#[test]
fn a_configuration_to_begin_with_is_written() {
    let directory = tempfile::TempDir::with_prefix("runx-test-").unwrap();
    let path = directory.path().to_str().unwrap();
    let config = || -> Value {
        serde_json::from_str(&fs::read_to_string(directory.path().join("config.json")).unwrap()).unwrap()
    };
    runx(&["spec", "--bundle", path]).ok();
    assert_eq!(config()["process"]["args"], json!(["sh"]));
    runx(&["spec", "-b", path]).fails(1, &["exists. Remove it first"]);
    fs::remove_file(directory.path().join("config.json")).unwrap();
    runx(&["spec", "--rootless", "--bundle", path]).ok();
    let namespaces: Vec<Value> = config()["linux"]["namespaces"].as_array().unwrap().clone();
    assert!(namespaces.contains(&json!({"type": "user"})) && !namespaces.contains(&json!({"type": "network"})));
    assert_eq!(config()["linux"]["uidMappings"][0]["size"], 1);
    assert!(config()["linux"].get("resources").is_none());
    runx(&["spec", "-b", "/no/such"]).fails(1, &["/no/such"]);
}

/// Not a test but the service in the next one, when this very program runs inside the container.
#[test]
fn says_that_it_is_ready() {
    if let Ok(address) = std::env::var("NOTIFY_SOCKET")
        && address.starts_with("/run/notify/")
    {
        let socket = UnixDatagram::unbound().unwrap();
        socket.send_to(b"STATUS=starting", &address).unwrap();
        socket.send_to(b"READY=1\nSTATUS=up", &address).unwrap();
        std::thread::sleep(Duration::from_secs(100));
    }
}

#[test]
fn a_service_tells_the_manager_that_it_is_ready() {
    needs_root!();
    let mut bundle = Bundle::new(&["/service", "--exact", "says_that_it_is_ready"]);
    fs::copy(std::env::current_exe().unwrap(), bundle.rootfs().join("service")).unwrap();
    bundle.config["root"]["readonly"] = json!(false);
    let address = bundle.scratch().join("manager");
    let manager = UnixDatagram::bind(&address).unwrap();
    manager.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let receive = || {
        let mut buffer = [0; 256];
        // The descriptor that comes with the barrier is closed at once, since nobody takes it.
        let length = manager.recv(&mut buffer).unwrap();
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    };
    bundle.command(&[]);
    let with_manager = |args: &[&str]| {
        let mut command = bundle.command(args);
        command.env("NOTIFY_SOCKET", &address);
        runx_tests::command::run_detached(&mut command, &bundle.output())
    };
    let in_two_steps: [&[&str]; 2] = [&["create", bundle.id()], &["start", bundle.id()]];
    for steps in [&in_two_steps[..], &[&["run", "-d", bundle.id()]]] {
        let told = std::thread::scope(|scope| {
            let told = scope.spawn(|| [receive(), receive()]);
            for step in steps {
                with_manager(step).ok();
            }
            told.join().unwrap()
        });
        let pid = bundle.state()["pid"].as_i64().unwrap();
        assert_eq!(told, [format!("READY=1\nMAINPID={pid}\n"), "BARRIER=1".to_owned()]);
        bundle.runx(&["delete", "-f", bundle.id()]).ok();
    }
    // In the foreground the command itself is what the manager watches.
    let mut child = bundle.command(&["run", bundle.id()]).env("NOTIFY_SOCKET", &address).spawn().unwrap();
    assert_eq!(receive(), format!("READY=1\nMAINPID={}\n", child.id()));
    bundle.runx(&["kill", bundle.id(), "KILL"]).ok();
    child.wait().unwrap();
    bundle.assert_nothing_left();
}

#[test]
fn a_systemd_cgroup_is_refused_where_there_is_no_systemd() {
    needs_root!();
    let bundle = Bundle::script("true");
    if !runx_tests::has_systemd() {
        bundle.runx(&["--systemd-cgroup", "run", bundle.id()]).fails(1, &["systemd cgroup driver", "not booted"]);
    }
    // It is of no concern to commands that make no cgroup.
    bundle.runx(&["--systemd-cgroup", "delete", "-f", bundle.id()]).ok();
    bundle.runx(&["--rootless=true", "run", bundle.id()]).ok();
    bundle.runx(&["--rootless", "auto", "run", bundle.id()]).ok();
    bundle.assert_nothing_left();
}
