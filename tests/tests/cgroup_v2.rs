//! Version 2 of cgroups, and systemd, whose tree it is.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use runx_tests::bundle::Bundle;
use runx_tests::command::{eventually, run};
use runx_tests::containerd::Containerd;
use runx_tests::{leftovers, needs_cgroup_v2, needs_containerd, needs_systemd};
use serde_json::{Value, json};

/// The unified tree.
const ROOT: &str = "/sys/fs/cgroup";

/// What a file of a group below the root says, `None` where there is no such file.
fn read(group: &str, file: &str) -> Option<String> {
    let path = Path::new(ROOT).join(group.trim_start_matches('/')).join(file);
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

/// The group of a process, from the root.
fn group_of(pid: i64) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    text.trim().strip_prefix("0::").unwrap().to_owned()
}

/// A bundle of `sleep` in a group of this name below that of the tests.
fn sleeper() -> (Bundle, String) {
    let mut bundle = Bundle::script("sleep 1000");
    let group = format!("/runx-tests/{}", bundle.id());
    bundle.set("/linux", "cgroupsPath", json!(group));
    (bundle, group)
}

/// Creates and starts it.
#[track_caller]
fn up(bundle: &Bundle) -> i64 {
    bundle.create().ok();
    bundle.runx(&["start", bundle.id()]).ok();
    bundle.state()["pid"].as_i64().unwrap()
}

#[track_caller]
fn down(bundle: &Bundle) {
    bundle.runx(&["delete", "--force", bundle.id()]).ok();
    bundle.assert_nothing_left();
}

// covers: linux.resources.memory.limit linux.resources.memory.reservation linux.resources.memory.swap linux.resources.cpu.shares linux.resources.cpu.quota linux.resources.cpu.period linux.resources.cpu.cpus linux.resources.cpu.mems linux.resources.pids.limit linux.resources.blockIO.weight linux.resources.hugepageLimits linux.resources.unified
#[test]
fn every_limit_is_read_back() {
    needs_cgroup_v2!();
    let (mut bundle, group) = sleeper();
    bundle.config["linux"]["resources"] = json!({
        "memory": {"limit": 64 << 20, "reservation": 32 << 20, "swap": 96 << 20},
        "cpu": {"shares": 512, "quota": 50000, "period": 200_000, "cpus": "0", "mems": "0"},
        "pids": {"limit": 20},
        "blockIO": {"weight": 500},
        "hugepageLimits": [{"pageSize": "2MB", "limit": 4 << 20}],
        "unified": {"memory.high": "60M", "cgroup_is_no_resource.max": "1"}
    });
    // What is not there is named, and nothing is left of the rest.
    bundle.run().fails(1, &["cgroup_is_no_resource.max"]);
    bundle.assert_nothing_left();
    bundle.config["linux"]["resources"]["unified"] = json!({"memory.high": (60 << 20).to_string()});
    let pid = up(&bundle);
    assert_eq!(group_of(pid), group);
    for (file, value) in [
        ("memory.max", (64 << 20).to_string().as_str()),
        ("memory.low", (32 << 20).to_string().as_str()),
        ("memory.high", (60 << 20).to_string().as_str()),
        ("cpu.max", "50000 200000"),
        ("cpuset.cpus", "0"),
        ("cpuset.mems", "0"),
        ("pids.max", "20"),
        ("hugetlb.2MB.max", (4 << 20).to_string().as_str()),
    ] {
        assert_eq!(read(&group, file).as_deref(), Some(value), "{file}");
    }
    // Memory and swap together is what the specification counts. A kernel may do without either of these.
    if let Some(swap) = read(&group, "memory.swap.max") {
        assert_eq!(swap, (32 << 20).to_string());
    }
    if let Some(weight) = read(&group, "io.weight") {
        assert_eq!(weight, "default 4950");
    }
    let weight: u32 = read(&group, "cpu.weight").unwrap().parse().unwrap();
    assert!((1..100).contains(&weight), "half of the default shares became the weight {weight}");
    down(&bundle);
}

#[test]
fn what_version_2_has_not_is_refused_by_name() {
    needs_cgroup_v2!();
    for (resources, word) in [
        (json!({"memory": {"limit": 64 << 20, "swappiness": 10}}), "swappiness"),
        (json!({"memory": {"limit": 64 << 20, "disableOOMKiller": true}}), "disableOOMKiller"),
        (json!({"cpu": {"realtimeRuntime": 1000, "realtimePeriod": 10000}}), "realtimeRuntime"),
        (json!({"network": {"classID": 1}}), "network"),
        (json!({"blockIO": {"leafWeight": 10}}), "leafWeight"),
        (json!({"unified": {"../memory.max": "1"}}), "unified"),
        (json!({"unified": {"cgroup.freeze": "1"}}), "unified"),
    ] {
        let (mut bundle, _) = sleeper();
        bundle.config["linux"]["resources"] = resources;
        bundle.run().fails(1, &[word]);
        bundle.assert_nothing_left();
    }
}

// covers: linux.namespaces.cgroup
#[test]
fn a_container_sees_its_own_group_as_the_root() {
    needs_cgroup_v2!();
    let mut bundle = Bundle::script(
        "cat /proc/self/cgroup /sys/fs/cgroup/pids.max; mkdir /sys/fs/cgroup/x 2>/dev/null && echo writable",
    );
    bundle.config["linux"]["resources"]["pids"] = json!({"limit": 33});
    let done = bundle.run();
    assert_eq!((done.code, done.stdout.as_str()), (1, "0::/\n33\n"), "{}", done.stderr);
    bundle.assert_nothing_left();
}

#[test]
fn a_container_that_gives_its_controllers_away_is_execd_into_and_removed() {
    needs_cgroup_v2!();
    let mut bundle = Bundle::script(
        "cd /sys/fs/cgroup; mkdir -p leaf/deep; echo 1 > leaf/cgroup.procs; echo +pids > cgroup.subtree_control;\
         echo 30 > leaf/pids.max; sleep 1000",
    );
    let group = format!("/runx-tests/{}", bundle.id());
    bundle.set("/linux", "cgroupsPath", json!(group));
    for mount in bundle.config["mounts"].as_array_mut().unwrap() {
        if mount["destination"] == "/sys/fs/cgroup" {
            *mount = json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["rw"]});
        }
    }
    let pid = up(&bundle);
    let leaf = format!("{group}/leaf");
    eventually("it has given them away", || read(&leaf, "pids.max").as_deref() == Some("30"));
    assert_eq!(group_of(pid), leaf);
    assert_eq!(bundle.exec("cat /proc/self/cgroup").ok().stdout, "0::/leaf\n");
    bundle.runx(&["pause", bundle.id()]).ok();
    assert_eq!(read(&leaf, "cgroup.events").unwrap().lines().last(), Some("frozen 1"));
    down(&bundle);
}

/// `systemd-run` of a shell script, with `runx run` and these flags as its arguments. The script is in a file, since
/// systemd replaces what begins with a dollar.
fn service(bundle: &Bundle, unit: &str, script: &str, flags: &[&str], run_flags: &[&str]) -> Command {
    let file = bundle.scratch().join("script");
    fs::write(&file, script).unwrap();
    let runx = bundle.command(&[&["run"], run_flags, &[bundle.id()]].concat());
    let mut command = Command::new("systemd-run");
    command.args(["--quiet", "--collect", "-p", "Delegate=yes", "--unit", unit]).args(flags);
    command.arg("--working-directory").arg(bundle.path()).arg("sh").arg(file);
    command.arg(runx.get_program()).args(runx.get_args());
    command
}

#[test]
fn a_service_has_containers_in_the_group_that_it_was_delegated() {
    needs_systemd!();
    let mut bundle = Bundle::script("cat /proc/self/cgroup /sys/fs/cgroup/memory.max");
    let unit = format!("{}.service", bundle.id());
    let group = format!("/system.slice/{unit}/payload");
    bundle.set("/linux", "cgroupsPath", json!(group));
    bundle.config["linux"]["resources"]["memory"] = json!({"limit": 64 << 20});
    // As a service does that keeps the rules: its own processes leave the group whose controllers are wanted below.
    let supervisor = format!("{ROOT}/system.slice/{unit}/supervisor");
    let leave = format!("mkdir {supervisor} && echo $$ >{supervisor}/cgroup.procs && \"$@\"");
    let wait = ["--pipe", "--wait"];
    assert_eq!(run(&mut service(&bundle, &unit, &leave, &wait, &[])).ok().stdout, format!("0::/\n{}\n", 64 << 20));
    bundle.assert_nothing_left();
    // A service that stays where it is cannot have limits below it; that is said with the file's name.
    run(&mut service(&bundle, &unit, "\"$@\"", &wait, &[])).fails(1, &["memory.max", &unit]);
    bundle.assert_nothing_left();
}

#[test]
fn a_service_has_containers_beside_it() {
    needs_systemd!();
    let mut bundle = Bundle::script("cat /sys/fs/cgroup/memory.max; echo up; sleep 1000");
    bundle.config["linux"]["resources"]["memory"] = json!({"limit": 64 << 20});
    let unit = format!("{}.service", bundle.id());
    let group = format!("/system.slice/beside-{}", bundle.id());
    for path in [json!(group), json!(group.trim_start_matches("/system.slice/"))] {
        bundle.set("/linux", "cgroupsPath", path);
        let pid_file = bundle.scratch().join("pid");
        let script = format!("\"$@\" & until test -s {}; do sleep 0.1; done; wait", pid_file.display());
        run(&mut service(&bundle, &unit, &script, &[], &["--pid-file", &pid_file.to_string_lossy()])).ok();
        eventually("it is up", || fs::read_to_string(&pid_file).is_ok_and(|pid| !pid.is_empty()));
        let pid: i64 = fs::read_to_string(&pid_file).unwrap().parse().unwrap();
        assert_eq!(group_of(pid), group);
        assert_eq!(read(&group, "memory.max"), Some((64 << 20).to_string()));
        // The service ends: its container is not its own to kill, as with runc.
        run(Command::new("systemctl").args(["kill", "--signal=KILL", &unit])).ok();
        eventually("the service is gone", || {
            run(Command::new("systemctl").args(["is-active", &unit])).stdout.trim() != "active"
        });
        bundle.runx(&["delete", "--force", bundle.id()]).ok();
        fs::remove_file(&pid_file).unwrap();
        bundle.assert_nothing_left();
    }
}

#[test]
fn limits_outlast_what_systemd_does_with_its_tree() {
    needs_systemd!();
    let mut all = Vec::new();
    for parent in ["/runx-tests", "/system.slice"] {
        let mut bundle = Bundle::script("sleep 1000");
        let group = format!("{parent}/{}", bundle.id());
        bundle.set("/linux", "cgroupsPath", json!(group));
        bundle.config["linux"]["resources"] = json!({
            "memory": {"limit": 64 << 20}, "cpu": {"quota": 50000, "period": 100_000, "cpus": "0"}, "pids": {"limit": 20}
        });
        up(&bundle);
        all.push((bundle, group));
    }
    let unit = format!("other-{}", all[0].0.id());
    let properties = ["-p", "MemoryMax=100M", "-p", "CPUQuota=50%", "-p", "AllowedCPUs=0"];
    let command = ["--quiet", "--wait", "--collect", "--unit", &unit];
    run(Command::new("systemd-run").args(command).args(properties).arg("true")).ok();
    run(Command::new("systemctl").arg("daemon-reload")).ok();
    for (bundle, group) in &all {
        for (file, value) in
            [("memory.max", "67108864"), ("cpu.max", "50000 100000"), ("cpuset.cpus", "0"), ("pids.max", "20")]
        {
            assert_eq!(read(group, file).as_deref(), Some(value), "{group}: {file}");
        }
        assert_eq!(bundle.exec("echo alive").ok().stdout, "alive\n");
    }
    for (bundle, _) in all {
        down(&bundle);
    }
}

#[test]
fn containerd_as_a_service_is_restarted_and_its_containers_run_on() {
    needs_containerd!();
    needs_systemd!();
    let mut containerd = Containerd::start_as_service();
    containerd.run_detached("c1", &["sleep", "1000"]).ok();
    let (pid, shim) = (containerd.pid("c1").unwrap(), containerd.shim("c1").unwrap());
    assert_eq!(group_of(pid.into()), format!("/{}/c1", containerd.namespace()));
    assert!(group_of(shim.into()).starts_with("/system.slice/"), "{}", group_of(shim.into()));
    let metrics = containerd.ctr(&["task", "metrics", "--format", "json", "c1"]).ok().stdout;
    let metrics: Value = serde_json::from_str(&metrics).unwrap();
    assert!(metrics["pids"]["current"].as_u64().unwrap() >= 1, "{metrics}");
    assert!(metrics["memory"]["usage"].as_u64().unwrap() > 0, "{metrics}");
    containerd.restart_daemon();
    assert_eq!(containerd.pid("c1"), Some(pid));
    assert_eq!(containerd.ctr(&["task", "exec", "--exec-id", "e", "c1", "echo", "alive"]).ok().stdout, "alive\n");
    containerd.end("c1");
    containerd.assert_nothing_left();
}

#[test]
fn a_group_that_is_left_is_found() {
    needs_cgroup_v2!();
    let bundle = Bundle::script("true");
    let top = PathBuf::from(ROOT).join("runx-tests");
    let group = top.join("a/b").join(bundle.id());
    fs::create_dir_all(&group).unwrap();
    let left = leftovers::find(bundle.id(), &[]);
    for directory in [&group, &top.join("a/b"), &top.join("a")] {
        fs::remove_dir(directory).unwrap();
    }
    assert_eq!(left, [format!("cgroup {}", group.display())]);
    bundle.assert_nothing_left();
}
