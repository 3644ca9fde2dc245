//! Limits, as the kernel has them after the command has set them, and the rest of a container's cgroup.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use runx_tests::bundle::Bundle;
use runx_tests::cgroup::{Group, has, unified};
use runx_tests::command::{Done, eventually, run_with};
use runx_tests::needs_root;
use serde_json::{Value, json};

/// A created container with these limits, and its group.
fn created(resources: Value) -> (Bundle, Group) {
    let mut bundle = Bundle::script("sleep 1000");
    let group = Group::choose(&mut bundle);
    bundle.set("/linux", "resources", resources);
    bundle.create().ok();
    (bundle, group)
}

/// As [`created`], or what the runtime says of it.
fn created_or(resources: Value) -> Result<(Bundle, Group), String> {
    let mut bundle = Bundle::script("sleep 1000");
    let group = Group::choose(&mut bundle);
    bundle.config["linux"]["resources"] = resources;
    let done = bundle.create();
    if done.code == 0 { Ok((bundle, group)) } else { Err(done.stderr) }
}

fn end(bundle: &Bundle) {
    bundle.runx(&["delete", "--force", bundle.id()]).ok();
    bundle.assert_nothing_left();
}

/// A container that is refused for its limits, and leaves nothing.
fn refused(resources: Value, words: &[&str]) {
    let mut bundle = Bundle::script("true");
    Group::choose(&mut bundle);
    bundle.set("/linux", "resources", resources);
    bundle.run().fails(1, words);
    bundle.assert_nothing_left();
}

fn update(bundle: &Bundle, resources: Value) -> Done {
    run_with(&mut bundle.command(&["update", "-r", "-", bundle.id()]), &resources.to_string())
}

/// The device of the root filesystem or of any disk, for limits that want one.
fn disk() -> Option<String> {
    let mut names: Vec<_> = fs::read_dir("/sys/block").ok()?.flatten().map(|entry| entry.path()).collect();
    names.sort();
    let is_disk = |path: &Path| !path.to_string_lossy().contains("loop") && path.join("dev").exists();
    let disk = names.into_iter().find(|path| is_disk(path))?;
    Some(fs::read_to_string(disk.join("dev")).ok()?.trim().to_owned())
}

/// What is asked for, in which controller and file it is to be found with version 1, and with version 2.
type Case = (Value, &'static str, &'static str, &'static str, &'static str);

// covers: linux.resources.memory.limit linux.resources.memory.reservation linux.resources.memory.swap linux.resources.pids.limit linux.resources.cpu.shares linux.resources.cpu.quota linux.resources.cpu.period linux.resources.cpu.burst linux.resources.cpu.cpus linux.resources.cpu.mems linux.resources.cpu.idle
#[test]
fn every_limit_is_read_back() {
    needs_root!();
    let cases: &[Case] = &[
        (json!({"memory": {"limit": 33_554_432}}), "memory", "memory.limit_in_bytes", "memory.max", "33554432"),
        (
            json!({"memory": {"reservation": 16_777_216}}),
            "memory",
            "memory.soft_limit_in_bytes",
            "memory.low",
            "16777216",
        ),
        (json!({"pids": {"limit": 77}}), "pids", "pids.max", "pids.max", "77"),
        (json!({"pids": {"limit": -1}}), "pids", "pids.max", "pids.max", "max"),
        (json!({"pids": {"limit": 0}}), "pids", "pids.max", "pids.max", "1"),
        (json!({"pids": {}}), "pids", "pids.max", "pids.max", "max"),
        (json!({"cpu": {"cpus": "0"}}), "cpuset", "cpuset.cpus", "cpuset.cpus", "0"),
        (json!({"cpu": {"mems": "0"}}), "cpuset", "cpuset.mems", "cpuset.mems", "0"),
        (json!({"cpu": {"idle": 1}}), "cpu", "cpu.idle", "cpu.idle", "1"),
        // The shares say nothing while it is idle.
        (json!({"cpu": {"idle": 1, "shares": 500}}), "cpu", "cpu.idle", "cpu.idle", "1"),
        (json!({"cpu": {"quota": 50_000, "burst": 10_000}}), "cpu", "cpu.cfs_burst_us", "cpu.max.burst", "10000"),
    ];
    for (resources, controller, version_1, version_2, value) in cases {
        let (bundle, group) = created(resources.clone());
        assert_eq!(group.read_either(controller, version_1, version_2), *value, "{resources}");
        end(&bundle);
    }
    // What is written in another way in each version.
    let (bundle, group) = created(json!({
        "cpu": {"shares": 2048, "quota": 40_000, "period": 80_000},
        "memory": {"limit": 33_554_432, "swap": 50_331_648}
    }));
    if unified() {
        assert_eq!(group.read("cpu", "cpu.weight"), "174");
        assert_eq!(group.read("cpu", "cpu.max"), "40000 80000");
        if group.directory("memory").join("memory.swap.max").exists() {
            assert_eq!(group.read("memory", "memory.swap.max"), "16777216");
        }
    } else {
        assert_eq!(group.read("cpu", "cpu.shares"), "2048");
        assert_eq!(group.read("cpu", "cpu.cfs_quota_us"), "40000");
        assert_eq!(group.read("cpu", "cpu.cfs_period_us"), "80000");
        assert_eq!(group.read("memory", "memory.memsw.limit_in_bytes"), "50331648");
    }
    end(&bundle);
}

// covers: linux.resources.memory.swappiness linux.resources.memory.disableOOMKiller linux.resources.memory.useHierarchy linux.resources.memory.kernel linux.resources.memory.kernelTCP linux.resources.cpu.realtimeRuntime linux.resources.cpu.realtimePeriod linux.resources.network.classID linux.resources.network.priorities linux.resources.blockIO.leafWeight
#[test]
fn limits_of_version_1_only_take_effect_there_and_are_refused_elsewhere() {
    needs_root!();
    let swappiness = json!({"memory": {"swappiness": 40}});
    let oom = json!({"memory": {"disableOOMKiller": true}});
    if unified() {
        refused(swappiness, &["memory.swappiness", "cgroup v2 has no such setting"]);
        refused(oom, &["memory.disableOOMKiller", "cgroup v2 has no such setting"]);
        refused(json!({"network": {"classID": 7}}), &["linux.resources.network"]);
        refused(json!({"cpu": {"realtimeRuntime": 1000}}), &["realtimeRuntime"]);
        refused(json!({"cpu": {"realtimePeriod": 1000}}), &["realtime"]);
        refused(json!({"network": {"priorities": [{"name": "lo", "priority": 1}]}}), &["linux.resources.network"]);
        refused(json!({"blockIO": {"leafWeight": 100}}), &["blockIO.leafWeight"]);
        refused(json!({"memory": {"useHierarchy": false}}), &["memory.useHierarchy"]);
    } else {
        let (bundle, group) = created(swappiness);
        assert_eq!(group.read("memory", "memory.swappiness"), "40");
        end(&bundle);
        let (bundle, group) = created(oom);
        assert!(group.read("memory", "memory.oom_control").contains("oom_kill_disable 1"));
        update(&bundle, json!({"memory": {"disableOOMKiller": false}})).ok();
        assert!(group.read("memory", "memory.oom_control").contains("oom_kill_disable 0"));
        end(&bundle);
        refused(json!({"unified": {"memory.high": "1000000"}}), &["linux.resources.unified", "cgroup v1"]);
        // Real-time groups and leaf weights are options of the kernel that few have.
        for (resources, file, value) in [
            (json!({"cpu": {"realtimePeriod": 900_000, "realtimeRuntime": 0}}), "cpu.rt_period_us", "900000"),
            (json!({"blockIO": {"leafWeight": 300}}), "blkio.leaf_weight", "300"),
        ] {
            let controller = file.split('.').next().unwrap_or_default();
            if Path::new("/sys/fs/cgroup").join(controller).join(file).exists() {
                let (bundle, group) = created(resources);
                assert_eq!(group.read(controller, file), value);
                end(&bundle);
            } else {
                refused(resources, &[file, "No such file"]);
            }
        }
        if has("net_cls") && has("net_prio") {
            let network = json!({"classID": 1_048_577, "priorities": [{"name": "lo", "priority": 5}]});
            let (bundle, group) = created(json!({"network": network}));
            assert_eq!(group.read("net_cls", "net_cls.classid"), "1048577");
            assert!(group.read("net_prio", "net_prio.ifpriomap").lines().any(|line| line == "lo 5"));
            end(&bundle);
        }
        for controller in ["net_cls", "net_prio", "hugetlb", "rdma"] {
            if has(controller) {
                continue;
            }
            let asked = match controller {
                "net_cls" => json!({"network": {"classID": 7}}),
                "net_prio" => json!({"network": {"priorities": [{"name": "lo", "priority": 1}]}}),
                "hugetlb" => json!({"hugepageLimits": [{"pageSize": "2MB", "limit": 0}]}),
                _ => json!({"rdma": {"mlx5_1": {"hcaHandles": 3}}}),
            };
            refused(asked, &[controller, "is not mounted"]);
        }
    }
    // Unset, as clients in Go write it, and limits that are none.
    let (bundle, _) =
        created(json!({"memory": {"swappiness": 18_446_744_073_709_551_615u64, "kernel": -1, "kernelTCP": -1}}));
    end(&bundle);
    refused(json!({"memory": {"swappiness": 101}}), &["memory.swappiness", "101"]);
}

// covers: linux.resources.rdma linux.resources.hugepageLimits linux.resources.unified
#[test]
fn what_the_kernel_lacks_or_does_not_allow_is_named() {
    needs_root!();
    refused(json!({"cpu": {"cpus": "4000"}}), &["cpuset.cpus", "4000"]);
    refused(json!({"cpu": {"period": 1}}), &[if unified() { "cpu.max" } else { "cpu.cfs_period_us" }]);
    refused(json!({"rdma": {"mlx5_1": {}}}), &["rdma"]);
    refused(json!({"memory": {"limit": 33_554_432, "swap": 1_048_576}}), &["memory"]);
    if has("hugetlb") {
        refused(json!({"hugepageLimits": [{"pageSize": "3MB", "limit": 0}]}), &["hugetlb.3MB", "No such file"]);
    }
    if unified() {
        refused(json!({"unified": {"memory.nosuch": "1"}}), &["memory.nosuch", "No such file"]);
        refused(json!({"unified": {"nosuch.max": "1"}}), &["nosuch.max", "has not got the controller"]);
        refused(json!({"unified": {"../memory.max": "1"}}), &["no slashes"]);
        refused(json!({"unified": {"cgroup.procs": "1"}}), &["cgroup.procs"]);
        refused(json!({"memory": {"swap": 33_554_432}}), &["needs memory.limit"]);
    } else {
        refused(json!({"cpu": {"shares": 1}}), &["cpu.shares", "the minimum is 2"]);
    }
}

// covers: linux.resources.hugepageLimits linux.resources.blockIO.throttleReadBpsDevice linux.resources.blockIO.throttleWriteBpsDevice linux.resources.blockIO.throttleReadIOPSDevice linux.resources.blockIO.throttleWriteIOPSDevice linux.resources.unified
#[test]
fn limits_of_huge_pages_devices_and_any_file_are_read_back() {
    needs_root!();
    if has("hugetlb") && Path::new("/sys/kernel/mm/hugepages/hugepages-2048kB").exists() {
        let (bundle, group) = created(json!({"hugepageLimits": [{"pageSize": "2MB", "limit": 4_194_304}]}));
        assert_eq!(group.read_either("hugetlb", "hugetlb.2MB.limit_in_bytes", "hugetlb.2MB.max"), "4194304");
        let reserved = group.read_either("hugetlb", "hugetlb.2MB.rsvd.limit_in_bytes", "hugetlb.2MB.rsvd.max");
        assert_eq!(reserved, "4194304");
        end(&bundle);
    }
    if let Some(disk) = disk() {
        let (major, minor) = disk.split_once(':').unwrap();
        let device = |rate: u64| json!([{"major": major.parse::<u32>().unwrap(), "minor": minor.parse::<u32>().unwrap(), "rate": rate}]);
        let limits = json!({"blockIO": {
            "throttleReadBpsDevice": device(1_048_576), "throttleWriteBpsDevice": device(2_097_152),
            "throttleReadIOPSDevice": device(200), "throttleWriteIOPSDevice": device(100)
        }});
        let (bundle, group) = created(limits);
        if unified() {
            assert_eq!(group.read("io", "io.max"), format!("{disk} rbps=1048576 wbps=2097152 riops=200 wiops=100"));
        } else {
            assert_eq!(group.read("blkio", "blkio.throttle.read_bps_device"), format!("{disk} 1048576"));
            assert_eq!(group.read("blkio", "blkio.throttle.write_bps_device"), format!("{disk} 2097152"));
            assert_eq!(group.read("blkio", "blkio.throttle.read_iops_device"), format!("{disk} 200"));
            assert_eq!(group.read("blkio", "blkio.throttle.write_iops_device"), format!("{disk} 100"));
        }
        // No rate is no limit.
        update(&bundle, json!({"blockIO": {"throttleReadBpsDevice": device(0)}})).ok();
        let left = group.read_either("blkio", "blkio.throttle.read_bps_device", "io.max");
        assert!(!left.contains("1048576"), "{left}");
        end(&bundle);
    } else {
        runx_tests::skip("there is no disk to limit");
    }
    if unified() {
        let (bundle, group) = created(json!({"unified": {
            "memory.high": "20000000", "pids.max": "55", "cgroup.max.depth": "3", "cpu.max": "max 50000"
        }}));
        assert_eq!(group.read("memory", "memory.high"), "19996672");
        assert_eq!(group.read("pids", "pids.max"), "55");
        assert_eq!(group.read("", "cgroup.max.depth"), "3");
        assert_eq!(group.read("cpu", "cpu.max"), "max 50000");
        end(&bundle);
    }
}

// covers: linux.resources.blockIO.weight linux.resources.blockIO.weightDevice
#[test]
fn weights_of_disks_are_read_back_or_named() {
    needs_root!();
    let (file, value) = if unified() { ("io.bfq.weight", "500") } else { ("blkio.bfq.weight", "500") };
    let controller = file.split('.').next().unwrap_or_default();
    let weight = json!({"blockIO": {"weight": 500, "weightDevice": []}});
    let (bundle, group) = match created_or(weight) {
        Ok(made) => made,
        // No scheduler of disks by weight is in this kernel.
        Err(said) => return assert!(said.contains("weight"), "{said}"),
    };
    if group.directory(controller).join(file).exists() {
        let text = group.read(controller, file);
        assert_eq!(text.split_whitespace().last(), Some(value), "{text}");
    }
    end(&bundle);
}

#[test]
fn limits_change_while_it_runs_in_any_order() {
    needs_root!();
    let mib = |n: i64| n << 20;
    let (bundle, group) = created(json!({"memory": {"limit": mib(64), "swap": mib(128)}}));
    let accounts =
        group.directory("memory").join(if unified() { "memory.swap.max" } else { "memory.memsw.limit_in_bytes" });
    let expect = |limit: i64, swap: i64| {
        assert_eq!(group.read_either("memory", "memory.limit_in_bytes", "memory.max"), mib(limit).to_string());
        if accounts.exists() {
            let swap = if unified() { swap - limit } else { swap };
            let file = group.read_either("memory", "memory.memsw.limit_in_bytes", "memory.swap.max");
            assert_eq!(file, mib(swap).to_string());
        }
    };
    // Each step would fail if the two were written in the other order.
    for (limit, swap) in [(256, 512), (64, 64), (128, 128), (32, 512), (64, 96)] {
        update(&bundle, json!({"memory": {"limit": mib(limit), "swap": mib(swap)}})).ok();
        expect(limit, swap);
    }
    update(&bundle, json!({"memory": {"limit": -1}})).ok();
    let none = group.read_either("memory", "memory.limit_in_bytes", "memory.max");
    assert!(none == "max" || none.parse::<u64>().unwrap() > 1 << 60, "{none}");
    bundle.runx(&["update", "--memory", "50M", "--memory-swap", "60M", bundle.id()]).ok();
    expect(50, 60);
    let cpu = || {
        if unified() {
            group.read("cpu", "cpu.max")
        } else {
            format!("{} {}", group.read("cpu", "cpu.cfs_quota_us"), group.read("cpu", "cpu.cfs_period_us"))
        }
    };
    update(&bundle, json!({"cpu": {"quota": 50_000, "period": 100_000}})).ok();
    // Each keeps what it does not name.
    update(&bundle, json!({"cpu": {"period": 200_000}})).ok();
    assert_eq!(cpu(), "50000 200000");
    update(&bundle, json!({"cpu": {"quota": 5_000}})).ok();
    assert_eq!(cpu(), "5000 200000");
    update(&bundle, json!({"cpu": {"quota": 20_000, "period": 10_000, "burst": 20_000}})).ok();
    assert_eq!(cpu(), "20000 10000");
    update(&bundle, json!({"cpu": {"quota": 10_000, "burst": 1_000}})).ok();
    assert_eq!(group.read_either("cpu", "cpu.cfs_burst_us", "cpu.max.burst"), "1000");
    update(&bundle, json!({"cpu": {"quota": -1, "burst": 0}})).ok();
    assert_eq!(cpu(), if unified() { "max 10000" } else { "-1 10000" });
    update(&bundle, json!({"cpu": {"idle": 1}})).ok();
    update(&bundle, json!({"cpu": {"idle": 0, "shares": 2048}})).ok();
    assert_eq!(group.read_either("cpu", "cpu.shares", "cpu.weight"), if unified() { "174" } else { "2048" });
    update(&bundle, json!({"pids": {"limit": 5}})).ok();
    update(&bundle, json!({"pids": {}})).ok();
    assert_eq!(group.read("pids", "pids.max"), "5");
    update(&bundle, json!({"cpu": {"cpus": "4000"}})).fails(1, &["cpuset.cpus"]);
    end(&bundle);
}

// covers: linux.resources.memory.checkBeforeUpdate
#[test]
fn a_limit_below_what_is_in_use_is_refused_where_that_is_asked_for() {
    needs_root!();
    let mut bundle = Bundle::script("dd if=/dev/zero of=/tmp/full bs=1M count=24 2>/dev/null; echo full; sleep 1000");
    let group = Group::choose(&mut bundle);
    bundle.add_mount(json!({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"}));
    bundle.set("/linux", "resources", json!({"memory": {"limit": 64 << 20}}));
    bundle.create().ok();
    bundle.runx(&["start", bundle.id()]).ok();
    eventually("it uses memory", || fs::read_to_string(bundle.output()).unwrap_or_default().contains("full"));
    update(&bundle, json!({"memory": {"limit": 1 << 20, "checkBeforeUpdate": true}})).fails(1, &["bytes in use"]);
    assert_eq!(group.read_either("memory", "memory.limit_in_bytes", "memory.max"), (64 << 20).to_string());
    assert_eq!(bundle.state()["status"], "running");
    end(&bundle);
}

// covers: linux.resources.pids.limit
#[test]
fn processes_beyond_the_limit_are_not_made() {
    needs_root!();
    let mut bundle = Bundle::script("(sleep 5 & sleep 5 & sleep 5 &) 2>&1; echo done");
    bundle.set("/linux", "resources", json!({"pids": {"limit": 3}}));
    let out = bundle.run().stdout;
    assert!(out.contains("can't fork"), "{out}");
    let mut bundle = Bundle::script("true & echo made");
    bundle.set("/linux", "resources", json!({"pids": {"limit": 0}}));
    let done = bundle.run();
    assert!(!done.stdout.contains("made") && done.stderr.contains("can't fork"), "{done:?}");
    bundle.assert_nothing_left();
}

#[test]
fn what_forks_all_the_time_is_frozen_thawed_and_killed() {
    needs_root!();
    let mut bundle = Bundle::script("while :; do (:); (:) & done");
    let group = Group::choose(&mut bundle);
    bundle.set("/linux", "resources", json!({"pids": {"limit": 50}}));
    // Nobody but the cgroup knows all processes then.
    bundle.config["linux"]["namespaces"] = json!([{"type": "mount"}, {"type": "cgroup"}, {"type": "uts"}]);
    bundle.create().ok();
    bundle.runx(&["start", bundle.id()]).ok();
    for _ in 0..5 {
        bundle.runx(&["pause", bundle.id()]).ok();
        assert_eq!(bundle.state()["status"], "paused");
        let frozen = group.read_either("freezer", "freezer.state", "cgroup.events");
        assert!(frozen == "FROZEN" || frozen.contains("frozen 1"), "{frozen}");
        bundle.runx(&["resume", bundle.id()]).ok();
        assert_eq!(bundle.state()["status"], "running");
    }
    bundle.runx(&["pause", bundle.id()]).ok();
    bundle.runx(&["delete", "--force", bundle.id()]).ok();
    bundle.assert_nothing_left();
}

#[test]
fn groups_that_the_container_made_go_with_it() {
    needs_root!();
    let mut bundle = Bundle::script(
        "cd /sys/fs/cgroup; test -e cgroup.procs || cd pids; mkdir -p a/b/c d && echo $$ > a/b/c/cgroup.procs && \
         cat /proc/self/cgroup | grep -q a/b/c && echo nested; sleep 1000",
    );
    let group = Group::choose(&mut bundle);
    writable_cgroups(&mut bundle);
    bundle.create().ok();
    bundle.runx(&["start", bundle.id()]).ok();
    eventually("groups are made", || fs::read_to_string(bundle.output()).unwrap_or_default().contains("nested"));
    assert!(group.directory("pids").join("a/b/c").exists());
    let processes = bundle.runx(&["ps", "-f", "json", bundle.id()]).ok().stdout;
    assert_ne!(processes.trim(), "[]", "processes of groups below are listed");
    end(&bundle);
    assert!(!group.directory("pids").exists());
}

/// A cgroup mount that the container may write to, and the capability that it takes.
fn writable_cgroups(bundle: &mut Bundle) {
    let mounts = bundle.config["mounts"].as_array_mut().unwrap();
    mounts.retain(|mount| mount["destination"] != "/sys/fs/cgroup");
    mounts.push(json!({
        "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
        "options": ["nosuid", "noexec", "nodev", "rw"]
    }));
}

#[test]
fn statistics_count_what_was_used() {
    needs_root!();
    let mut bundle = Bundle::script("i=0; while [ $i -lt 30000 ]; do i=$((i+1)); done; echo counted; sleep 1000");
    Group::choose(&mut bundle);
    bundle.set("/linux", "resources", json!({"memory": {"limit": 33_554_432}, "pids": {"limit": 9}}));
    bundle.create().ok();
    bundle.runx(&["start", bundle.id()]).ok();
    eventually("it has worked", || fs::read_to_string(bundle.output()).unwrap_or_default().contains("counted"));
    let text = bundle.runx(&["events", "--stats", bundle.id()]).ok().stdout;
    let stats: Value = serde_json::from_str::<Value>(&text).unwrap()["data"].clone();
    let number =
        |pointer: &str| stats.pointer(pointer).and_then(Value::as_u64).unwrap_or_else(|| panic!("{pointer}: {text}"));
    assert!(number("/cpu/usage/total") > 1_000_000);
    assert!(number("/cpu/usage/user") + number("/cpu/usage/kernel") > 0);
    assert!(number("/memory/usage/usage") > 0);
    assert_eq!(number("/memory/usage/limit"), 33_554_432);
    assert!((1..=2).contains(&number("/pids/current")), "{text}");
    assert_eq!(number("/pids/limit"), 9);
    assert!(stats["memory"]["raw"].as_object().unwrap().len() > 10, "{text}");
    if unified() {
        assert!(number("/memory/raw/anon") > 0);
        if Path::new("/proc/pressure/cpu").exists() {
            assert!(stats["cpu"]["psi"].is_object(), "{text}");
        }
    } else {
        assert!(number("/memory/raw/rss") > 0);
        let per_cpu = stats["cpu"]["usage"]["percpu"].as_array().unwrap();
        assert!(per_cpu.iter().any(|n| n.as_u64().unwrap() > 0), "{text}");
        assert!(number("/memory/usage/max") >= number("/memory/usage/usage"));
        assert!(!stats["cpuset"]["cpus"].as_array().unwrap().is_empty());
    }
    end(&bundle);
}

// covers: linux.namespaces.cgroup mounts.options.attributes
#[test]
fn a_kill_for_lack_of_memory_is_told_of_once_while_the_container_runs() {
    needs_root!();
    // The one that is killed is not the first process.
    let mut bundle = Bundle::script(
        "until test -e /tmp/go; do sleep 0.05; done; dd if=/dev/zero of=/dev/null bs=200M count=1; echo $?; sleep 1000",
    );
    bundle.add_mount(json!({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"}));
    bundle.set("/linux", "resources", json!({"memory": {"limit": 16 << 20, "swap": 16 << 20}}));
    bundle.create().ok();
    bundle.runx(&["start", bundle.id()]).ok();
    let told = bundle.scratch().join("events");
    let mut events = bundle
        .command(&["events", "--interval", "100ms", bundle.id()])
        .stdout(fs::File::create(&told).unwrap())
        .spawn()
        .unwrap();
    let lines = |kind: &str| {
        let kind = format!("\"type\":\"{kind}\"");
        fs::read_to_string(&told).unwrap().lines().filter(|line| line.contains(&kind)).count()
    };
    eventually("events come", || lines("stats") > 0);
    assert_eq!(lines("oom"), 0);
    bundle.exec("touch /tmp/go").ok();
    eventually("it is told of", || lines("oom") > 0);
    eventually("it was killed", || fs::read_to_string(bundle.output()).unwrap().contains("137"));
    let so_far = lines("stats");
    eventually("it goes on", || lines("stats") > so_far + 2);
    assert_eq!((lines("oom"), bundle.state()["status"].as_str()), (1, Some("running")));
    end(&bundle);
    events.wait().unwrap();
}

#[test]
fn the_container_owns_its_group_where_it_may_write() {
    needs_root!();
    if !unified() {
        eprintln!("SKIPPED: version 1 is never given away");
        return;
    }
    let mut bundle = Bundle::script(
        "cd /sys/fs/cgroup && mkdir sub && echo 0 > sub/cgroup.procs && echo made; \
         echo 1000 > pids.max 2>/dev/null && echo raised; sleep 1000",
    );
    let group = Group::choose(&mut bundle);
    writable_cgroups(&mut bundle);
    bundle.config["process"]["user"] = json!({"uid": 1234, "gid": 1234});
    bundle.set("/linux", "resources", json!({"pids": {"limit": 20}}));
    bundle.create().ok();
    bundle.runx(&["start", bundle.id()]).ok();
    let directory = group.directory("");
    let owner = |file: &str| fs::metadata(directory.join(file)).unwrap().uid();
    for file in [".", "cgroup.procs", "cgroup.subtree_control", "cgroup.threads"] {
        assert_eq!(owner(file), 1234, "{file}");
    }
    assert_eq!(owner("pids.max"), 0);
    eventually("it made a group", || fs::read_to_string(bundle.output()).unwrap_or_default().contains("made"));
    assert!(!fs::read_to_string(bundle.output()).unwrap().contains("raised"));
    end(&bundle);
    // Read-only, as usual, it stays root's.
    let mut bundle = Bundle::script("sleep 1000");
    let group = Group::choose(&mut bundle);
    bundle.config["process"]["user"] = json!({"uid": 1234, "gid": 1234});
    bundle.create().ok();
    assert_eq!(fs::metadata(group.directory("")).unwrap().uid(), 0);
    end(&bundle);
}

#[test]
fn an_exec_goes_where_the_first_process_is_if_the_group_was_divided() {
    needs_root!();
    if !unified() {
        eprintln!("SKIPPED: version 1 lets processes be in any group");
        return;
    }
    let mut bundle = Bundle::script(
        "cd /sys/fs/cgroup && mkdir init && echo 0 > init/cgroup.procs && echo +pids +memory > cgroup.subtree_control \
         && echo divided; sleep 1000",
    );
    let group = Group::choose(&mut bundle);
    writable_cgroups(&mut bundle);
    bundle.create().ok();
    bundle.runx(&["start", bundle.id()]).ok();
    eventually("it is divided", || fs::read_to_string(bundle.output()).unwrap_or_default().contains("divided"));
    assert_eq!(group.read("", "cgroup.subtree_control"), "memory pids");
    assert_eq!(bundle.exec("cat /proc/self/cgroup").ok().stdout, "0::/init\n");
    end(&bundle);
}

/// Where nothing would ever run, nobody waits for it, and what was there stays as it is.
// covers: linux.cgroupsPath
#[test]
fn a_frozen_group_or_one_below_it_is_refused() {
    needs_root!();
    let (tree, file) =
        if unified() { ("/sys/fs/cgroup", "cgroup.freeze") } else { ("/sys/fs/cgroup/freezer", "freezer.state") };
    let (freeze, thaw) = if unified() { ("1", "0") } else { ("FROZEN", "THAWED") };
    let mut bundle = Bundle::script("echo it ran");
    let group = format!("runx-tests/{}-frozen", bundle.id());
    let directory = Path::new(tree).join(&group);
    fs::create_dir_all(&directory).unwrap();
    fs::write(directory.join(file), freeze).unwrap();
    for path in [format!("/{group}"), format!("/{group}/below")] {
        bundle.config["linux"]["cgroupsPath"] = json!(path);
        bundle.run().fails(1, &["linux.cgroupsPath", "frozen", "thaw"]);
        bundle.create().fails(1, &["linux.cgroupsPath", "frozen", "thaw"]);
        assert!(directory.exists() && !directory.join("below").exists(), "{path}");
    }
    fs::write(directory.join(file), thaw).unwrap();
    assert_eq!(bundle.run().ok().stdout, "it ran\n");
    // Groups above the container's are made, and left, in every tree.
    for tree in fs::read_dir("/sys/fs/cgroup").unwrap().flatten() {
        let _ = fs::remove_dir(tree.path().join(&group));
    }
    let _ = fs::remove_dir(&directory);
    bundle.assert_nothing_left();
}

#[test]
fn a_group_below_one_of_threads_is_refused() {
    needs_root!();
    if !unified() {
        eprintln!("SKIPPED: version 1 has no groups of threads");
        return;
    }
    let mut bundle = Bundle::script("true");
    let parent = format!("runx-tests/{}-threads", bundle.id());
    let directory = Path::new("/sys/fs/cgroup").join(&parent);
    fs::create_dir_all(directory.join("inner")).unwrap();
    fs::write(directory.join("inner/cgroup.type"), "threaded").unwrap();
    bundle.config["linux"]["cgroupsPath"] = json!(format!("/{parent}/inner/{}", bundle.id()));
    let done = bundle.run();
    fs::remove_dir(directory.join("inner")).unwrap();
    fs::remove_dir(&directory).unwrap();
    done.fails(1, &["linux.cgroupsPath", "group of threads"]);
    bundle.assert_nothing_left();
}

// covers: linux.cgroupsPath
#[test]
fn the_form_of_systemd_needs_systemds_driver() {
    needs_root!();
    let mut bundle = Bundle::script("true");
    bundle.config["linux"]["cgroupsPath"] = json!("system.slice:runx:x");
    bundle.run().fails(1, &["linux.cgroupsPath", "systemd"]);
    if !Path::new("/run/systemd/system").is_dir() {
        bundle.runx(&["--systemd-cgroup", "run", bundle.id()]).fails(1, &["not booted with systemd"]);
    }
    bundle.assert_nothing_left();
}
