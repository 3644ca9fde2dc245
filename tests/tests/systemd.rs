//! The systemd cgroup driver with a real systemd: units, limits that outlive a reload, and nothing left behind.

use std::fs;
use std::os::unix::fs::symlink;
use std::process::{Command, Stdio};
use std::time::Duration;

use runx_tests::bundle::Bundle;
use runx_tests::cgroup::{Group, unified};
use runx_tests::command::{Done, eventually, run, run_detached, run_with};
use runx_tests::containerd::{BUSYBOX, Containerd};
use runx_tests::{dist, needs_containerd, needs_systemd, slow};
use serde_json::{Value, json};

/// A container in a scope of its own slice.
struct Scoped {
    bundle: Bundle,
    slice: String,
}

impl Scoped {
    fn new(script: &str) -> Self {
        let mut bundle = Bundle::script(script);
        // Units have no dashes but between the levels of slices.
        let slice = format!("runxtests-{}.slice", bundle.id().replace(['-', '.'], "_"));
        bundle.config["linux"]["cgroupsPath"] = json!(format!("{slice}:pre:{}", bundle.id()));
        Self { bundle, slice }
    }

    fn scope(&self) -> String {
        format!("pre-{}.scope", self.bundle.id())
    }

    fn group(&self) -> Group {
        Group::of_scope(&format!("runxtests.slice/{}", self.slice), &self.scope())
    }

    fn create(&self) -> Done {
        run_detached(&mut self.bundle.command(&["--systemd-cgroup", "create", self.bundle.id()]), &self.bundle.output())
    }

    fn started(self) -> Self {
        self.create().ok();
        self.bundle.runx(&["start", self.bundle.id()]).ok();
        self
    }

    fn end(&self) {
        self.bundle.runx(&["delete", "--force", self.bundle.id()]).ok();
        self.assert_nothing_left();
    }

    #[track_caller]
    fn assert_nothing_left(&self) {
        assert_eq!(property(&self.scope(), "LoadState"), "not-found", "{}", self.scope());
        run(Command::new("systemctl").args(["stop", &self.slice])).ok();
        self.bundle.assert_nothing_left();
    }
}

impl Drop for Scoped {
    fn drop(&mut self) {
        let _ = run(&mut self.bundle.command(&["delete", "--force", self.bundle.id()]));
        let _ = run(Command::new("systemctl").args(["stop", &self.slice]));
    }
}

fn property(unit: &str, name: &str) -> String {
    let text = run(Command::new("systemctl").args(["show", "-p", name, unit])).ok().stdout;
    text.trim().strip_prefix(&format!("{name}=")).unwrap_or_default().to_owned()
}

fn reload() {
    run(Command::new("systemctl").arg("daemon-reload")).ok();
}

// covers: linux.cgroupsPath
#[test]
fn a_container_is_a_scope_in_its_slice_and_execs_are_in_it() {
    needs_systemd!();
    let scoped = Scoped::new("sleep 1000").started();
    let scope = scoped.scope();
    assert_eq!(property(&scope, "ActiveState"), "active");
    assert_eq!(property(&scope, "Slice"), scoped.slice);
    assert_eq!(property(&scope, "Delegate"), "yes");
    assert_eq!(property(&scope, "CollectMode"), "inactive-or-failed");
    assert_eq!(property(&scope, "Description"), format!("runx container {}", scoped.bundle.id()));
    let inside = property(&scope, "ControlGroup");
    assert_eq!(inside, format!("/runxtests.slice/{}/{scope}", scoped.slice));
    let pid = scoped.bundle.state()["pid"].as_i64().unwrap();
    let groups = |pid: &str| fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    for line in groups(&pid.to_string()).lines() {
        assert!(line.ends_with(&inside), "{line}");
    }
    scoped.bundle.exec("for i in 1 2; do sleep 1000 </dev/null >/dev/null 2>&1 & done").ok();
    let procs = scoped.group().read("pids", "cgroup.procs");
    assert!(procs.lines().count() >= 3, "{procs}");
    for pid in procs.lines() {
        assert!(groups(pid).lines().all(|line| line.ends_with(&inside)), "{}", groups(pid));
    }
    scoped.bundle.runx(&["pause", scoped.bundle.id()]).ok();
    assert_eq!(scoped.bundle.state()["status"], "paused");
    scoped.bundle.runx(&["resume", scoped.bundle.id()]).ok();
    scoped.end();
}

#[test]
fn without_a_path_it_is_named_after_the_container_in_system_slice() {
    needs_systemd!();
    let bundle = Bundle::script("sleep 1000");
    let scope = format!("runx-{}.scope", bundle.id());
    run_detached(&mut bundle.command(&["--systemd-cgroup", "create", bundle.id()]), &bundle.output()).ok();
    assert_eq!(property(&scope, "Slice"), "system.slice");
    // A container that ends by itself takes its unit with it; deleting it then is fine.
    bundle.runx(&["start", bundle.id()]).ok();
    bundle.runx(&["kill", bundle.id(), "KILL"]).ok();
    eventually("the unit has gone", || property(&scope, "LoadState") == "not-found");
    bundle.runx(&["delete", bundle.id()]).ok();
    bundle.assert_nothing_left();
    let detached = &["--systemd-cgroup", "run", "--detach", bundle.id()];
    run_detached(&mut bundle.command(detached), &bundle.output()).ok();
    bundle.runx(&["delete", "--force", bundle.id()]).ok();
    bundle.assert_nothing_left();
}

/// The limits as the kernel has them.
fn limits(group: &Group) -> Vec<String> {
    let files: &[(&str, &str)] = if unified() {
        &[
            ("memory", "memory.max"),
            ("memory", "memory.low"),
            ("memory", "memory.high"),
            ("cpu", "cpu.max"),
            ("cpu", "cpu.weight"),
            ("cpu", "cpu.max.burst"),
            ("pids", "pids.max"),
            ("cpuset", "cpuset.cpus"),
            ("hugetlb", "hugetlb.2MB.max"),
        ]
    } else {
        &[
            ("memory", "memory.limit_in_bytes"),
            ("memory", "memory.soft_limit_in_bytes"),
            ("cpu", "cpu.cfs_quota_us"),
            ("cpu", "cpu.cfs_period_us"),
            ("cpu", "cpu.shares"),
            ("pids", "pids.max"),
            ("cpuset", "cpuset.cpus"),
            ("devices", "devices.list"),
        ]
    };
    files.iter().map(|(controller, file)| format!("{file}: {}", group.read(controller, file))).collect()
}

// covers: linux.resources.memory.limit linux.resources.cpu.shares linux.resources.pids.limit
#[test]
fn limits_stay_when_systemd_writes_its_own() {
    needs_systemd!();
    let mut scoped = Scoped::new("sleep 1000");
    let mut resources = json!({
        "memory": {"limit": 50_331_648, "reservation": 16_777_216},
        "cpu": {"shares": 2048, "quota": 45_500, "period": 91_000, "cpus": "0"},
        "pids": {"limit": 44},
        "devices": [{"allow": false, "access": "rwm"}, {"allow": true, "type": "c", "major": 10, "access": "rw"}]
    });
    if unified() {
        resources["unified"] = json!({"memory.high": "40000000"});
        resources["cpu"]["burst"] = json!(7_000);
        resources["hugepageLimits"] = json!([{"pageSize": "2MB", "limit": 4_194_304}]);
    }
    scoped.bundle.set("/linux", "resources", resources);
    let scoped = scoped.started();
    let group = scoped.group();
    let before = limits(&group);
    let text = before.join("\n");
    for word in ["50331648", "45500", "44"] {
        assert!(text.contains(word), "{text}");
    }
    reload();
    assert_eq!(limits(&group), before);
    let update = |limits: Value| {
        run_with(&mut scoped.bundle.command(&["update", "-r", "-", scoped.bundle.id()]), &limits.to_string()).ok()
    };
    // What systemd can keep of a quota is whole percents: it is rounded up at once, and not later.
    update(json!({"memory": {"limit": 60 << 20}, "cpu": {"quota": 20_001, "period": 100_000}, "pids": {"limit": -1}}));
    let quota = group.read_either("cpu", "cpu.cfs_quota_us", "cpu.max");
    assert!(quota.starts_with("21000"), "{quota}");
    update(json!({"cpu": {"period": 50_000}}));
    update(json!({"cpu": {"shares": 512}}));
    let before = limits(&group);
    reload();
    assert_eq!(limits(&group), before);
    assert_eq!(group.read_either("memory", "memory.limit_in_bytes", "memory.max"), (60 << 20).to_string());
    assert_eq!(group.read("pids", "pids.max"), "max");
    if unified() {
        update(json!({"cpu": {"idle": 1}}));
        reload();
        assert_eq!(group.read("cpu", "cpu.idle"), "1");
    }
    scoped.end();
}

// covers: linux.resources.devices
#[test]
fn devices_stay_closed_when_systemd_writes_its_own() {
    needs_systemd!();
    let mut scoped = Scoped::new("mknod /dev/disk b 259 0; mknod /dev/zero2 c 1 5; sleep 1000");
    for set in ["bounding", "effective", "permitted"] {
        scoped.bundle.config["process"]["capabilities"][set].as_array_mut().unwrap().push(json!("CAP_MKNOD"));
    }
    let scoped = scoped.started();
    let closed = || {
        let done = scoped.bundle.exec("head -c 1 /dev/zero2 | wc -c; head -c 1 /dev/disk");
        assert!(done.stdout.starts_with('1') && done.stderr.contains("Operation not permitted"), "{done:?}");
    };
    eventually("nodes are made", || scoped.bundle.exec("test -e /dev/zero2").code == 0);
    closed();
    reload();
    closed();
    // Limits other than devices are told to systemd now.
    scoped.bundle.runx(&["update", "--memory", "50M", scoped.bundle.id()]).ok();
    closed();
    scoped.end();
}

// covers: annotations
#[test]
fn annotations_are_properties_and_wrong_ones_are_refused() {
    needs_systemd!();
    let mut scoped = Scoped::new("sleep 1000");
    scoped.bundle.set(
        "",
        "annotations",
        json!({
            "org.systemd.property.TimeoutStopSec": "7", "org.systemd.property.CollectMode": "'inactive'",
            "org.systemd.property.After": "['basic.target']"
        }),
    );
    let scoped = scoped.started();
    assert_eq!(property(&scoped.scope(), "TimeoutStopUSec"), "7s");
    assert_eq!(property(&scoped.scope(), "CollectMode"), "inactive");
    assert!(property(&scoped.scope(), "After").contains("basic.target"));
    scoped.end();
    for (name, value, word) in [
        ("TimeoutStopSec", "'soon'", "TimeoutStopSec"),
        ("Bad-Name", "1", "Bad-Name"),
        ("Slice", "'other.slice'", "Slice"),
        ("NoSuchProperty", "1", "NoSuchProperty"),
        ("MemoryMax", "(1", "MemoryMax"),
    ] {
        let mut scoped = Scoped::new("sleep 1000");
        scoped.bundle.set("", "annotations", json!({format!("org.systemd.property.{name}"): value}));
        scoped.create().fails(1, &[word]);
        scoped.assert_nothing_left();
    }
}

#[test]
fn a_failed_unit_of_its_name_is_replaced_and_a_running_one_is_not() {
    needs_systemd!();
    let scoped = Scoped::new("sleep 1000");
    let scope = scoped.scope();
    let other = |script: &str| {
        Command::new("systemd-run")
            .args(["--scope", "-q", &format!("--unit={scope}"), &format!("--slice={}", scoped.slice)])
            .args(["-p", "TimeoutStopSec=1", "sh", "-c", script])
            .stdin(Stdio::null())
            .spawn()
            .expect("start systemd-run")
    };
    let mut running = other("trap '' TERM; while :; do sleep 0.2; done");
    eventually("the other unit runs", || property(&scope, "ActiveState") == "active");
    scoped.create().fails(1, &["linux.cgroupsPath", "not empty"]);
    assert_eq!(property(&scope, "ActiveState"), "active");
    // It does not end when it is asked to.
    run(Command::new("systemctl").args(["stop", &scope]));
    let _ = running.wait();
    eventually("it has failed", || property(&scope, "ActiveState") == "failed");
    scoped.create().ok();
    assert_eq!(property(&scope, "ActiveState"), "active");
    scoped.end();
}

#[test]
fn a_killed_create_leaves_nothing_that_delete_does_not_find() {
    needs_systemd!();
    for delay in 0..12 {
        let scoped = Scoped::new("sleep 1000");
        let mut create = scoped.bundle.command(&["--systemd-cgroup", "create", scoped.bundle.id()]);
        let mut create = create.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(delay * if slow() { 60 } else { 5 }));
        let _ = create.kill();
        let _ = create.wait();
        scoped.bundle.runx(&["delete", "--force", scoped.bundle.id()]);
        eventually("the unit has gone", || property(&scoped.scope(), "LoadState") == "not-found");
        scoped.assert_nothing_left();
    }
}

#[test]
fn the_bus_is_used_where_systemds_own_socket_is_not() {
    needs_systemd!();
    let scoped = Scoped::new("sleep 1000");
    let line = format!(
        "mount --bind /dev/null /run/systemd/private && exec '{}' --root '{}' --systemd-cgroup create {}",
        dist().join("runx").display(),
        scoped.bundle.state_root().display(),
        scoped.bundle.id()
    );
    scoped.bundle.command(&["list"]);
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-c", &line]).current_dir(scoped.bundle.path());
    run_detached(&mut command, &scoped.bundle.output()).ok();
    assert_eq!(property(&scoped.scope(), "ActiveState"), "active");
    scoped.end();
}

#[test]
fn a_container_that_ran_out_of_memory_is_removed_like_any_other() {
    needs_systemd!();
    let mut scoped = Scoped::new("dd if=/dev/zero of=/dev/null bs=200M count=1; sleep 1000");
    scoped.bundle.config["process"]["args"] = json!(["dd", "if=/dev/zero", "of=/dev/null", "bs=200M", "count=1"]);
    let limits = json!({"memory": {"limit": 16 << 20, "swap": 16 << 20}});
    scoped.bundle.set("/linux", "resources", limits);
    let scoped = scoped.started();
    eventually("it was killed", || scoped.bundle.state()["status"] == "stopped");
    scoped.bundle.runx(&["delete", scoped.bundle.id()]).ok();
    eventually("the unit has gone", || property(&scoped.scope(), "LoadState") == "not-found");
    scoped.assert_nothing_left();
}

#[test]
fn a_container_without_a_cgroup_namespace_sees_its_own_group() {
    needs_systemd!();
    let mut scoped = Scoped::new("cat /sys/fs/cgroup/cgroup.procs /sys/fs/cgroup/pids/cgroup.procs; sleep 1000");
    let namespaces = scoped.bundle.config["linux"]["namespaces"].as_array_mut().unwrap();
    namespaces.retain(|namespace| namespace["type"] != "cgroup");
    let scoped = scoped.started();
    eventually("it sees itself", || {
        fs::read_to_string(scoped.bundle.output()).unwrap_or_default().lines().any(|line| line == "1")
    });
    scoped.end();
}

#[test]
fn the_shim_leaves_cgroups_to_systemd_where_the_options_say_so() {
    needs_systemd!();
    needs_containerd!();
    // ctr passes options to the runtime that it knows by name only.
    let shims = tempfile::tempdir().unwrap();
    symlink(dist().join("containerd-shim-runx-v1"), shims.path().join("containerd-shim-runc-v2")).unwrap();
    let containerd = Containerd::start_with_shims(shims.path().to_owned());
    let name = format!("{}-c1", containerd.namespace());
    let scope = format!("runxshim-{name}.scope");
    let group = format!("system.slice:runxshim:{name}");
    let flags = ["run", "-d", "--null-io", "--runtime", "io.containerd.runc.v2", "--memory-limit", "33554432"];
    let systemd = ["--runc-systemd-cgroup", "--cgroup", &group, BUSYBOX, "c1", "sleep", "1000"];
    containerd.ctr(&[&flags[..], &systemd[..]].concat()).ok();
    assert_eq!(property(&scope, "ActiveState"), "active");
    assert_eq!(property(&scope, if unified() { "MemoryMax" } else { "MemoryLimit" }), "33554432");
    let out = containerd.ctr(&["task", "exec", "--exec-id", "e1", "c1", "cat", "/proc/self/cgroup"]).ok().stdout;
    assert!(out.lines().all(|line| line.ends_with(":/") || line.ends_with(&format!("/{scope}"))), "{out}");
    let metrics = containerd.ctr(&["task", "metrics", "--format", "json", "c1"]).ok().stdout;
    assert!(metrics.contains("33554432"), "{metrics}");
    containerd.end("c1");
    assert_eq!(property(&scope, "LoadState"), "not-found");
    containerd.assert_nothing_left();
}
