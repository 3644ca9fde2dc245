//! The command on the real kernel: what config.json asks for takes effect, and nothing is left behind.

use std::fs;
use std::io::Read;
use std::os::unix::net::UnixListener;
use std::process::Command;

use runx_tests::bundle::Bundle;
use runx_tests::command::{eventually, run};
use runx_tests::{descriptors, needs_root, repeats, slow};
use serde_json::json;

// covers: process.args process.cwd ociVersion
#[test]
fn the_exit_code_is_the_programs() {
    needs_root!();
    let bundle = Bundle::script("exit 7");
    assert_eq!(bundle.run().code, 7);
    bundle.assert_nothing_left();
    let bundle = Bundle::script("kill -9 $$");
    assert_eq!(bundle.run().code, 0, "a container's init does not see its own SIGKILL");
    bundle.assert_nothing_left();
}

#[test]
fn standard_streams_are_the_callers() {
    needs_root!();
    let bundle = Bundle::script("cat; echo err >&2");
    let done = bundle.run_with("in and out").ok();
    assert_eq!((done.stdout.as_str(), done.stderr.as_str()), ("in and out", "err\n"));
    bundle.assert_nothing_left();
}

// covers: linux.namespaces.pid linux.namespaces.network linux.namespaces.mount linux.namespaces.ipc linux.namespaces.uts linux.namespaces.cgroup hostname
#[test]
fn a_container_has_namespaces_of_its_own() {
    needs_root!();
    let bundle = Bundle::script(
        "echo $$; hostname; ls /proc | grep -c '^[0-9]'; ip link | grep -c ': ';\
         for n in pid net ipc uts mnt cgroup; do readlink /proc/self/ns/$n; done; cat /proc/self/cgroup",
    );
    let out = bundle.run().ok().stdout;
    let mut lines = out.lines();
    assert_eq!(lines.next(), Some("1"));
    assert_eq!(lines.next(), Some("runx"));
    assert!(lines.next().unwrap().parse::<u32>().unwrap() <= 4, "{out}");
    assert_eq!(lines.next(), Some("1"), "only lo: {out}");
    for name in ["pid", "net", "ipc", "uts", "mnt", "cgroup"] {
        let inside = lines.next().unwrap();
        let host = fs::read_link(format!("/proc/self/ns/{name}")).unwrap();
        assert_ne!(inside, host.to_string_lossy(), "{name}");
    }
    // In a cgroup namespace of its own every path is the root.
    assert!(lines.all(|line| line.ends_with(":/")), "{out}");
    bundle.assert_nothing_left();
}

#[test]
fn loopback_is_up() {
    needs_root!();
    let bundle = Bundle::script("ip addr show lo");
    let out = bundle.run().ok().stdout;
    assert!(out.contains("127.0.0.1/8") && out.contains("UP"), "{out}");
}

// covers: linux.namespaces.path
#[test]
fn a_namespace_is_joined_by_its_path() {
    needs_root!();
    let mut first = Bundle::script("sleep 100");
    first.set("", "hostname", json!("shared"));
    first.create().ok();
    first.runx(&["start", first.id()]).ok();
    let pid = first.state()["pid"].as_i64().unwrap();
    let mut second = Bundle::script("hostname; readlink /proc/self/ns/uts; readlink /proc/self/ns/pid; echo $$");
    second.set("", "hostname", json!(""));
    second.config["linux"]["namespaces"] = json!([
        {"type": "mount"}, {"type": "uts", "path": format!("/proc/{pid}/ns/uts")},
        {"type": "pid", "path": format!("/proc/{pid}/ns/pid")}, {"type": "ipc"}, {"type": "network"}
    ]);
    let out = second.run().ok().stdout;
    let link = |name: &str| fs::read_link(format!("/proc/{pid}/ns/{name}")).unwrap().to_string_lossy().into_owned();
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(lines[..3], ["shared", &link("uts"), &link("pid")]);
    assert_ne!(lines[3], "1");
    first.runx(&["delete", "--force", first.id()]).ok();
    first.assert_nothing_left();
    second.assert_nothing_left();
}

#[test]
fn a_path_that_is_another_kind_of_namespace_is_refused() {
    needs_root!();
    let mut bundle = Bundle::script("true");
    bundle.config["linux"]["namespaces"] = json!([{"type": "mount"}, {"type": "ipc", "path": "/proc/self/ns/uts"}]);
    bundle.set("", "hostname", json!(""));
    bundle.run().fails(1, &["/proc/self/ns/uts", "ipc"]);
    bundle.assert_nothing_left();
}

// covers: root.path root.readonly linux.maskedPaths linux.readonlyPaths
#[test]
fn the_root_is_read_only_and_paths_are_hidden() {
    needs_root!();
    let bundle = Bundle::script(
        "touch /x 2>/dev/null && echo writable; echo 1 > /proc/sys/kernel/printk 2>/dev/null && echo sys;\
         cat /proc/timer_list | wc -c; ls /sys/firmware | wc -l; echo done",
    );
    assert_eq!(bundle.run().ok().stdout, "0\n0\ndone\n");
}

// covers: mounts.options.attributes mounts.options.bind mounts.options.filesystem
#[test]
fn mounts_have_their_options() {
    needs_root!();
    let mut bundle =
        Bundle::script("mount; cat /data/file; touch /data/new 2>/dev/null && echo writable; ls -ld /scratch");
    let data = bundle.scratch().join("data");
    fs::create_dir(&data).unwrap();
    fs::write(data.join("file"), "from the host\n").unwrap();
    bundle.add_mount(
        json!({"destination": "/data", "type": "bind", "source": data, "options": ["rbind", "ro", "nosuid", "nodev"]}),
    );
    bundle.add_mount(json!({"destination": "/scratch", "type": "tmpfs", "source": "mine", "options": ["noexec", "size=1m", "mode=1777"]}));
    bundle.config["root"]["readonly"] = json!(false);
    let out = bundle.run().ok().stdout;
    let line = |at: &str| out.lines().find(|line| line.contains(&format!(" on {at} "))).unwrap_or_default().to_owned();
    for word in ["ro", "nosuid", "nodev"] {
        assert!(line("/data").contains(word), "{out}");
    }
    assert!(line("/scratch").starts_with("mine on") && line("/scratch").contains("noexec"), "{out}");
    assert!(out.contains("from the host") && !out.contains("writable") && out.contains("drwxrwxrwt"), "{out}");
    // What the container mounted is not on the host.
    bundle.assert_nothing_left();
}

// covers: mounts.options.bind
#[test]
fn a_file_is_bound_on_a_file_that_is_made() {
    needs_root!();
    let mut bundle = Bundle::script("cat /etc/a/b/resolv.conf");
    let file = bundle.scratch().join("resolv.conf");
    fs::write(&file, "nameserver 127.0.0.1\n").unwrap();
    bundle.config["root"]["readonly"] = json!(false);
    bundle
        .add_mount(json!({"destination": "/etc/a/b/resolv.conf", "type": "bind", "source": file, "options": ["bind"]}));
    assert_eq!(bundle.run().ok().stdout, "nameserver 127.0.0.1\n");
}

// covers: mounts.options.propagation
#[test]
fn what_the_host_mounts_later_arrives_only_where_it_may() {
    needs_root!();
    for (option, arrives) in [("rslave", "yes"), ("rprivate", "no")] {
        let mut bundle = Bundle::script(
            "until test -e /shared/go; do sleep 0.02; done; test -e /shared/sub/file && echo yes || echo no",
        );
        let shared = bundle.scratch().join("shared");
        fs::create_dir_all(shared.join("sub")).unwrap();
        let mount = |args: &[&str]| run(Command::new("mount").args(args)).ok();
        let path = shared.to_string_lossy().into_owned();
        mount(&["--bind", &path, &path]);
        mount(&["--make-shared", &path]);
        bundle.add_mount(
            json!({"destination": "/shared", "type": "bind", "source": shared, "options": ["rbind", option]}),
        );
        bundle.config["root"]["readonly"] = json!(false);
        bundle.create().ok();
        bundle.runx(&["start", bundle.id()]).ok();
        let sub = shared.join("sub").to_string_lossy().into_owned();
        mount(&["-t", "tmpfs", "late", &sub]);
        fs::write(shared.join("sub/file"), "").unwrap();
        fs::write(shared.join("go"), "").unwrap();
        eventually("the container ends", || bundle.state()["status"] == "stopped");
        let out = fs::read_to_string(bundle.output()).unwrap();
        bundle.runx(&["delete", bundle.id()]).ok();
        for path in [&sub, &path] {
            run(Command::new("umount").arg(path)).ok();
        }
        assert_eq!(out.trim(), arrives, "{option}");
    }
}

// covers: linux.devices linux.resources.devices
#[test]
fn devices_are_the_default_ones_and_those_asked_for() {
    needs_root!();
    let mut bundle = Bundle::script(
        "echo x > /dev/null; head -c 4 /dev/zero | od -An -tx1; head -c1 /dev/urandom | wc -c;\
         stat -c '%t:%T %a %u:%g' /dev/full /dev/mine; readlink /dev/fd; readlink /dev/ptmx;\
         mknod /dev/disk b 8 0 && cat /dev/disk 2>&1",
    );
    bundle.config["linux"]["devices"] =
        json!([{"path": "/dev/mine", "type": "c", "major": 1, "minor": 3, "fileMode": 0o640, "uid": 5, "gid": 6}]);
    for set in ["bounding", "effective", "permitted"] {
        bundle.config["process"]["capabilities"][set].as_array_mut().unwrap().push(json!("CAP_MKNOD"));
    }
    let out = bundle.run().stdout;
    let lines: Vec<&str> = out.lines().map(str::trim).collect();
    assert_eq!(lines[..6], ["00 00 00 00", "1", "1:7 666 0:0", "1:3 640 5:6", "/proc/self/fd", "pts/ptmx"]);
    // A node can be made, but the cgroup does not let it be used.
    assert!(lines[6].contains("Operation not permitted"), "{out}");
}

// covers: process.user.uid process.user.gid process.user.umask process.user.additionalGids process.rlimits process.capabilities.bounding process.capabilities.effective process.capabilities.permitted process.noNewPrivileges process.oomScoreAdj process.cwd process.env
#[test]
fn the_process_has_the_identity_and_limits_of_its_description() {
    needs_root!();
    let mut bundle =
        Bundle::script("id; pwd; echo $MARK $HOME; umask; ulimit -n; grep -E 'NoNewPrivs|^Cap' /proc/self/status");
    bundle.config["process"]["user"] = json!({"uid": 1000, "gid": 100, "additionalGids": [7, 8], "umask": 0o27});
    bundle.config["process"]["cwd"] = json!("/tmp");
    bundle.config["process"]["env"] = json!(["PATH=/bin", "MARK=here"]);
    bundle.config["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 50, "hard": 60}]);
    let caps = json!(["CAP_KILL", "CAP_CHOWN"]);
    bundle.config["process"]["capabilities"] = json!({"bounding": caps, "permitted": caps, "effective": ["CAP_KILL"], "inheritable": ["CAP_KILL"], "ambient": ["CAP_KILL"]});
    let out = bundle.run().ok().stdout;
    assert!(out.contains("uid=1000(user) gid=100 groups=7,8") || out.contains("uid=1000 gid=100 groups=7,8"), "{out}");
    assert!(out.contains("/tmp\nhere /home/user\n0027\n50\n"), "{out}");
    let value = |name: &str| {
        let line = out.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_ascii_whitespace().nth(1).unwrap().to_owned()
    };
    assert_eq!(value("NoNewPrivs"), "1");
    // An ordinary user keeps over the exec what is ambient.
    for (name, mask) in [("CapBnd", 0x21), ("CapAmb", 0x20), ("CapPrm", 0x20), ("CapEff", 0x20), ("CapInh", 0x20)] {
        assert_eq!(u64::from_str_radix(&value(name), 16).unwrap(), mask, "{name}: {out}");
    }
}

// covers: linux.seccomp.syscalls.errnoRet
#[test]
fn seccomp_rules_take_effect_with_their_own_errno_and_without_no_new_privileges() {
    needs_root!();
    let mut bundle = Bundle::script("mkdir /tmp/x; grep Seccomp: /proc/self/status");
    bundle.config["root"]["readonly"] = json!(false);
    let profile = |errno: i32| {
        json!({"defaultAction": "SCMP_ACT_ALLOW",
               "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": errno}]})
    };
    for (errno, text) in [(libc::EPERM, "not permitted"), (libc::EADDRNOTAVAIL, "assign requested address")] {
        for no_new_privileges in [true, false] {
            bundle.config["process"]["noNewPrivileges"] = json!(no_new_privileges);
            bundle.config["linux"]["seccomp"] = profile(errno);
            let done = bundle.run();
            assert!(done.stderr.contains(text), "{}", done.stderr);
            assert!(done.stdout.contains("Seccomp:\t2"), "{}", done.stdout);
        }
    }
    bundle.assert_nothing_left();
}

// covers: linux.sysctl
#[test]
fn sysctls_are_set_in_the_containers_namespaces_only() {
    needs_root!();
    let host = fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start").unwrap();
    let mut bundle = Bundle::script("cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/kernel/msgmax");
    bundle.config["linux"]["sysctl"] = json!({"net.ipv4.ip_unprivileged_port_start": "77", "kernel.msgmax": "5555"});
    assert_eq!(bundle.run().ok().stdout, "77\n5555\n");
    assert_eq!(fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start").unwrap(), host);
    bundle.config["linux"]["sysctl"] = json!({"kernel.printk": "1"});
    bundle.run().fails(1, &["kernel.printk", "not in a separate kernel namespace"]);
    bundle.config["linux"]["sysctl"] = json!({"net/../kernel/printk": "1"});
    bundle.run().fails(1, &["net/../kernel/printk", "not the name of a kernel parameter"]);
    bundle.assert_nothing_left();
}

// covers: linux.cgroupsPath linux.resources.memory.limit linux.resources.cpu.shares linux.resources.cpu.quota linux.resources.cpu.period linux.resources.pids.limit
#[test]
fn limits_are_in_the_cgroup() {
    needs_root!();
    let mut bundle = Bundle::script("sleep 100");
    bundle.set("/linux", "cgroupsPath", json!(format!("/runx-tests/{}", bundle.id())));
    bundle.config["linux"]["resources"] = json!({
        "memory": {"limit": 64 << 20}, "cpu": {"quota": 50000, "period": 100000, "shares": 512}, "pids": {"limit": 20},
        "devices": [{"allow": false, "access": "rwm"}]
    });
    bundle.create().ok();
    let read = |controller: &str, v1: &str, v2: &str| {
        let group = format!("runx-tests/{}", bundle.id());
        let v1 = format!("/sys/fs/cgroup/{controller}/{group}/{v1}");
        let v2 = format!("/sys/fs/cgroup/{group}/{v2}");
        fs::read_to_string(&v1).or_else(|_| fs::read_to_string(&v2)).unwrap().trim().to_owned()
    };
    assert_eq!(read("memory", "memory.limit_in_bytes", "memory.max"), (64 << 20).to_string());
    assert_eq!(read("pids", "pids.max", "pids.max"), "20");
    let quota = read("cpu", "cpu.cfs_quota_us", "cpu.max");
    assert_eq!(quota.split(' ').next(), Some("50000"));
    bundle.runx(&["delete", bundle.id()]).ok();
    bundle.assert_nothing_left();
}

// covers: linux.resources.memory.limit
#[test]
fn memory_beyond_the_limit_kills() {
    needs_root!();
    let mut bundle = Bundle::script("dd if=/dev/zero of=/dev/null bs=200M count=1");
    bundle.config["linux"]["resources"]["memory"] = json!({"limit": 32 << 20});
    assert_eq!(bundle.run().code, 137);
    bundle.assert_nothing_left();
}

#[test]
fn the_lifecycle_goes_through_its_states() {
    needs_root!();
    let bundle = Bundle::script("trap 'echo bye; exit 3' TERM; echo up; while :; do sleep 0.05; done");
    bundle.create().ok();
    assert_eq!(bundle.state()["status"], "created");
    assert_eq!(fs::read_to_string(bundle.output()).unwrap(), "", "the program has not started");
    bundle.runx(&["start", bundle.id()]).ok();
    assert_eq!(bundle.state()["status"], "running");
    bundle.runx(&["start", bundle.id()]).fails(1, &["start", "running"]);
    bundle.runx(&["delete", bundle.id()]).fails(1, &["not stopped"]);
    eventually("it is up", || fs::read_to_string(bundle.output()).unwrap().contains("up"));
    bundle.runx(&["pause", bundle.id()]).ok();
    assert_eq!(bundle.state()["status"], "paused");
    bundle.runx(&["exec", bundle.id(), "true"]).fails(255, &["paused"]);
    bundle.runx(&["resume", bundle.id()]).ok();
    let list = bundle.runx(&["list"]).ok().stdout;
    assert!(list.contains(bundle.id()) && list.contains("running"), "{list}");
    bundle.runx(&["kill", bundle.id(), "TERM"]).ok();
    eventually("it has stopped", || bundle.state()["status"] == "stopped");
    bundle.runx(&["kill", bundle.id(), "TERM"]).fails(1, &["container not running"]);
    bundle.runx(&["exec", bundle.id(), "true"]).fails(255, &["stopped"]);
    assert!(fs::read_to_string(bundle.output()).unwrap().contains("bye"));
    bundle.runx(&["delete", bundle.id()]).ok();
    bundle.runx(&["state", bundle.id()]).fails(1, &["does not exist"]);
    bundle.runx(&["delete", "--force", bundle.id()]).ok();
    bundle.assert_nothing_left();
}

#[test]
fn a_created_container_can_be_killed_and_deleted() {
    needs_root!();
    let bundle = Bundle::script("true");
    bundle.create().ok();
    bundle.runx(&["kill", bundle.id(), "KILL"]).ok();
    eventually("it has stopped", || bundle.state()["status"] == "stopped");
    bundle.runx(&["delete", bundle.id()]).ok();
    bundle.assert_nothing_left();
    let bundle = Bundle::script("true");
    bundle.create().ok();
    bundle.runx(&["delete", bundle.id()]).ok();
    bundle.assert_nothing_left();
}

#[test]
fn exec_runs_in_the_container() {
    needs_root!();
    let bundle = Bundle::script("sleep 100");
    bundle.create().ok();
    bundle.runx(&["start", bundle.id()]).ok();
    let init = bundle.state()["pid"].as_i64().unwrap();
    let out = bundle
        .exec("readlink /proc/1/ns/pid; readlink /proc/self/ns/mnt; hostname; pwd; ls -l /proc/self/fd | wc -l")
        .ok()
        .stdout;
    let link = |name: &str| fs::read_link(format!("/proc/{init}/ns/{name}")).unwrap().to_string_lossy().into_owned();
    assert!(out.starts_with(&format!("{}\n{}\nrunx\n/\n", link("pid"), link("mnt"))), "{out}");
    assert_eq!(bundle.exec("exit 5").code, 5);
    let run = |flags: &[&str], command: &[&str]| bundle.runx(&[&["exec"], flags, &[bundle.id()], command].concat());
    assert_eq!(run(&["--user", "1000:100"], &["id", "-u"]).ok().stdout, "1000\n");
    assert_eq!(run(&["--cwd", "/tmp", "-e", "A=b"], &["sh", "-c", "pwd; echo $A"]).ok().stdout, "/tmp\nb\n");
    let caps = run(&["--cap", "CAP_SYS_ADMIN"], &["grep", "Cap", "/proc/self/status"]).ok().stdout;
    assert!(caps.contains("CapInh:\t0000000000000000") && caps.contains("CapEff:\t0000000020200420"), "{caps}");
    for user in ["", "1x", "-1", "4294967296", "1:", "root"] {
        run(&[&format!("--user={user}")], &["id"]).fails(255, &["--user"]);
    }
    bundle.runx(&["delete", "--force", bundle.id()]).ok();
    bundle.assert_nothing_left();
}

#[test]
fn a_process_description_is_read_from_a_file() {
    needs_root!();
    let bundle = Bundle::script("sleep 100");
    bundle.create().ok();
    bundle.runx(&["start", bundle.id()]).ok();
    let file = bundle.scratch().join("process.json");
    let process = json!({"user": {"uid": 1000, "gid": 5}, "args": ["id"], "cwd": "/", "env": ["PATH=/bin"]});
    fs::write(&file, process.to_string()).unwrap();
    let out = bundle.runx(&["exec", "--process", &file.to_string_lossy(), bundle.id()]).ok().stdout;
    assert!(out.contains("uid=1000") && out.contains("gid=5"), "{out}");
    // What it leaves out is as for the container's first process.
    let process = json!({"user": {"uid": 0, "gid": 0}, "args": ["sh", "-c", "grep CapEff /proc/self/status; ulimit -n"],
                         "cwd": "/", "env": ["PATH=/bin"]});
    fs::write(&file, process.to_string()).unwrap();
    let out = bundle.runx(&["exec", "--process", &file.to_string_lossy(), bundle.id()]).ok().stdout;
    assert_eq!(out, "CapEff:\t0000000020000420\n1024\n");
    bundle.runx(&["delete", "--force", bundle.id()]).ok();
}

#[test]
fn detached_processes_have_pid_files() {
    needs_root!();
    let bundle = Bundle::script("sleep 100");
    let file = bundle.scratch().join("pid");
    let args = ["run", "-d", "--pid-file", &file.to_string_lossy(), bundle.id()];
    runx_tests::command::run_detached(&mut bundle.command(&args), &bundle.output()).ok();
    let pid: i64 = fs::read_to_string(&file).unwrap().parse().unwrap();
    assert_eq!(bundle.state()["pid"], pid);
    let args = ["exec", "-d", "--pid-file", &file.to_string_lossy(), bundle.id(), "sleep", "100"];
    runx_tests::command::run_detached(&mut bundle.command(&args), &bundle.output()).ok();
    let pid: i32 = fs::read_to_string(&file).unwrap().parse().unwrap();
    let command = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap();
    assert!(command.starts_with("sleep"), "{command:?}");
    bundle.runx(&["delete", "--force", bundle.id()]).ok();
    bundle.assert_nothing_left();
}

// covers: process.terminal process.consoleSize
#[test]
fn a_terminal_goes_to_the_console_socket_with_the_size_asked_for() {
    needs_root!();
    let mut bundle = Bundle::script("tty; stty size; test -c /dev/console && echo console; test -t 0 && echo terminal");
    bundle.config["process"]["terminal"] = json!(true);
    bundle.config["process"]["consoleSize"] = json!({"height": 33, "width": 77});
    let socket = bundle.scratch().join("console.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    bundle.runx(&["create", bundle.id()]).fails(1, &["console socket"]);
    bundle.runx(&["create", "--console-socket", &socket.to_string_lossy(), bundle.id()]).ok();
    let (_, master) = descriptors::receive(&descriptors::accept(&listener));
    bundle.runx(&["start", bundle.id()]).ok();
    let mut out = String::new();
    let mut file = fs::File::from(master);
    let mut buffer = [0u8; 256];
    // The last read of a terminal that is gone is an error.
    while let Ok(n) = file.read(&mut buffer) {
        out.push_str(&String::from_utf8_lossy(&buffer[..n]));
    }
    assert_eq!(out.replace('\r', ""), "/dev/pts/0\n33 77\nconsole\nterminal\n");
    eventually("it has stopped", || bundle.state()["status"] == "stopped");
    bundle.runx(&["delete", bundle.id()]).ok();
    bundle.assert_nothing_left();
}

#[test]
fn the_log_is_in_the_format_asked_for() {
    needs_root!();
    let bundle = Bundle::script("true");
    let log = bundle.scratch().join("log.json");
    let flags = ["--log", &log.to_string_lossy(), "--log-format", "json", "state", "nobody"];
    bundle.runx(&flags).fails(1, &["does not exist"]);
    let line: serde_json::Value = serde_json::from_str(fs::read_to_string(&log).unwrap().trim()).unwrap();
    assert_eq!(line["level"], "error");
    assert!(line["msg"].as_str().unwrap().contains("nobody") && line["time"].is_string(), "{line}");
}

#[test]
fn short_lived_containers_never_hang() {
    needs_root!();
    let bundle = Bundle::new(&["true"]);
    for _ in 0..repeats(60) {
        bundle.run().ok();
    }
    bundle.assert_nothing_left();
}

#[test]
fn a_create_killed_at_any_moment_leaves_nothing_after_delete_force() {
    needs_root!();
    let bundle = Bundle::script("true");
    let (steps, apart) = if slow() { (12, 20_000) } else { (40, 400) };
    for step in 0..steps {
        let mut child = bundle
            .command(&["create", bundle.id()])
            .stdin(std::process::Stdio::null())
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(std::time::Duration::from_micros(step * apart));
        let _ = child.kill();
        let _ = child.wait();
        bundle.runx(&["delete", "--force", bundle.id()]).ok();
        bundle.assert_nothing_left();
    }
}
