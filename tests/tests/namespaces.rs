//! User and time namespaces, and mounts with mapped ids.

use std::fs;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::Path;

use runx_tests::bundle::{Bundle, give};
use runx_tests::command::eventually;
use runx_tests::needs_root;
use serde_json::{Value, json};

/// Ids of the host that belong to nobody else.
const BASE: u32 = 1_200_000;

/// A bundle in a user namespace of its own, with a root filesystem that belongs to it.
fn in_user_namespace(script: &str) -> Bundle {
    let mut bundle = Bundle::script(script);
    bundle.own_users(BASE);
    bundle
}

// covers: linux.namespaces.user linux.uidMappings linux.gidMappings
#[test]
fn root_of_a_user_namespace_is_an_ordinary_user_of_the_host() {
    needs_root!();
    let mut bundle = in_user_namespace(
        "id -u; cat /proc/self/uid_map; touch /made; echo x > /dev/null && echo null; head -c 3 /dev/zero | wc -c;\
         mknod /tmp/node c 1 3 2>/dev/null && echo node; mount | grep -c ' on /proc '; cat /proc/self/setgroups;\
         stat -c %u /proc/self/exe; cat /proc/sys/user/max_net_namespaces",
    );
    bundle.set("/linux", "sysctl", json!({"user.max_net_namespaces": "77"}));
    let out = bundle.run().ok().stdout;
    let lines: Vec<String> = out.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    assert_eq!(lines, ["0", &format!("0 {BASE} 65536"), "null", "3", "1", "allow", "0", "77"]);
    assert_eq!(fs::metadata(bundle.rootfs().join("made")).unwrap().uid(), BASE);
    bundle.assert_nothing_left();
}

// covers: linux.namespaces.user process.rlimits process.user.uid
#[test]
fn an_exec_enters_the_user_namespace_with_its_limits_and_groups() {
    needs_root!();
    let mut bundle = in_user_namespace("sleep 100");
    bundle.config["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "hard": 512, "soft": 256}]);
    bundle.create().ok();
    bundle.runx(&["start", bundle.id()]).ok();
    let pid = bundle.state()["pid"].as_i64().unwrap();
    assert_eq!(fs::metadata(format!("/proc/{pid}")).unwrap().uid(), BASE);
    let out = bundle.runx(&[
        "exec",
        "--user",
        "1000:1000",
        bundle.id(),
        "sh",
        "-c",
        "id -u; id -g; ulimit -n; readlink /proc/self/ns/user; cat /proc/self/oom_score_adj",
    ]);
    let out = out.ok().stdout;
    let link = fs::read_link(format!("/proc/{pid}/ns/user")).unwrap();
    assert_eq!(out.lines().collect::<Vec<_>>(), ["1000", "1000", "256", &link.to_string_lossy(), "0"]);
    let out = bundle.exec("id -u; touch /tmp/by-exec").ok().stdout;
    assert_eq!(out, "0\n");
    assert_eq!(fs::metadata(bundle.rootfs().join("tmp/by-exec")).unwrap().uid(), BASE);
    bundle.runx(&["delete", "--force", bundle.id()]).ok();
    bundle.assert_nothing_left();
}

/// As the containers of a pod with `hostUsers: false`: the first makes the namespaces, the others join.
// covers: linux.namespaces.user linux.namespaces.path
#[test]
fn a_user_namespace_is_joined_together_with_those_it_owns() {
    needs_root!();
    let first = in_user_namespace("sleep 100");
    first.create().ok();
    first.runx(&["start", first.id()]).ok();
    let pid = first.state()["pid"].as_i64().unwrap();
    let mut second = in_user_namespace(
        "id -u; for n in user uts ipc net; do readlink /proc/self/ns/$n; done; echo $$; hostname; \
         cat /proc/self/cgroup | head -n 1 | grep -c ':/$'",
    );
    let path = |name: &str| format!("/proc/{pid}/ns/{name}");
    second.config["linux"]["namespaces"] = json!([
        {"type": "user", "path": path("user")}, {"type": "uts", "path": path("uts")},
        {"type": "ipc", "path": path("ipc")}, {"type": "network", "path": path("net")},
        {"type": "pid"}, {"type": "mount"}, {"type": "cgroup"}
    ]);
    second.set("", "hostname", json!(""));
    let out = second.run().ok().stdout;
    let link = |name: &str| fs::read_link(path(name)).unwrap().to_string_lossy().into_owned();
    let expected = ["0", &link("user"), &link("uts"), &link("ipc"), &link("net"), "1", "runx", "1"];
    assert_eq!(out.lines().collect::<Vec<_>>(), expected);
    first.runx(&["delete", "--force", first.id()]).ok();
    first.assert_nothing_left();
    second.assert_nothing_left();
}

/// As a rootful engine's user namespace with a network that it made itself.
// covers: linux.namespaces.path
#[test]
fn a_new_user_namespace_goes_with_a_network_of_the_host() {
    needs_root!();
    let holder = Bundle::script("sleep 100");
    holder.create().ok();
    holder.runx(&["start", holder.id()]).ok();
    let pid = holder.state()["pid"].as_i64().unwrap();
    let mut bundle = in_user_namespace("readlink /proc/self/ns/net; id -u");
    for namespace in bundle.config["linux"]["namespaces"].as_array_mut().unwrap() {
        if namespace["type"] == "network" {
            namespace["path"] = json!(format!("/proc/{pid}/ns/net"));
        }
    }
    // A sysfs shows the network namespace, which here belongs to another user namespace.
    bundle.config["mounts"].as_array_mut().unwrap().retain(|mount| mount["type"] != "sysfs");
    bundle.config["mounts"].as_array_mut().unwrap().retain(|mount| mount["destination"] != "/sys/fs/cgroup");
    let out = bundle.run().ok().stdout;
    let link = fs::read_link(format!("/proc/{pid}/ns/net")).unwrap().to_string_lossy().into_owned();
    assert_eq!(out.lines().collect::<Vec<_>>(), [link.as_str(), "0"]);
    holder.runx(&["delete", "--force", holder.id()]).ok();
    holder.assert_nothing_left();
    bundle.assert_nothing_left();
}

// covers: process.terminal
#[test]
fn a_terminal_works_in_a_user_namespace() {
    needs_root!();
    let mut bundle = in_user_namespace("tty; test -c /dev/console && echo console; stat -c %u /dev/console");
    bundle.config["process"]["terminal"] = json!(true);
    let socket = bundle.scratch().join("console.sock");
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    bundle.runx(&["create", "--console-socket", &socket.to_string_lossy(), bundle.id()]).ok();
    let (_, master) = runx_tests::descriptors::receive(&runx_tests::descriptors::accept(&listener));
    bundle.runx(&["start", bundle.id()]).ok();
    let mut out = String::new();
    let mut file = fs::File::from(master);
    let mut buffer = [0u8; 256];
    while let Ok(n) = std::io::Read::read(&mut file, &mut buffer) {
        out.push_str(&String::from_utf8_lossy(&buffer[..n]));
    }
    assert_eq!(out.replace('\r', ""), "/dev/pts/0\nconsole\n0\n");
    bundle.runx(&["delete", "--force", bundle.id()]).ok();
    bundle.assert_nothing_left();
}

// covers: linux.uidMappings linux.gidMappings
#[test]
fn mappings_that_cannot_be_are_refused() {
    needs_root!();
    for (value, word) in [
        (json!([{"containerID": 0, "hostID": 1, "size": 0}]), "size"),
        (json!([{"containerID": 0, "hostID": 4294967295u32, "size": 2}]), "beyond"),
        (Value::Array(vec![json!({"containerID": 0, "hostID": 1, "size": 1}); 341]), "340"),
    ] {
        let mut bundle = in_user_namespace("true");
        bundle.set("/linux", "uidMappings", value);
        bundle.run().fails(1, &["linux.uidMappings", word]);
        bundle.assert_nothing_left();
    }
    // The kernel's own refusal is passed on: two ranges that overlap.
    let mut bundle = in_user_namespace("true");
    let overlap = json!([{"containerID": 0, "hostID": 1, "size": 10}, {"containerID": 5, "hostID": 100, "size": 10}]);
    bundle.set("/linux", "uidMappings", overlap);
    bundle.run().fails(1, &["uid_map", "Invalid argument"]);
    bundle.assert_nothing_left();
}

// covers: linux.namespaces.time linux.timeOffsets
#[test]
fn a_time_namespace_has_its_clocks_set() {
    needs_root!();
    let mut bundle = Bundle::script("cat /proc/self/timens_offsets; cut -d. -f1 /proc/uptime; sleep 100");
    fs::remove_file(bundle.rootfs().join("bin/cut")).ok();
    std::os::unix::fs::symlink("busybox", bundle.rootfs().join("bin/cut")).unwrap();
    bundle.config["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "time"}));
    let offsets = json!({"monotonic": {"secs": 1000, "nanosecs": 5}, "boottime": {"secs": 5_000_000}});
    bundle.set("/linux", "timeOffsets", offsets);
    bundle.create().ok();
    bundle.runx(&["start", bundle.id()]).ok();
    let read = || fs::read_to_string(bundle.output()).unwrap_or_default();
    eventually("it has printed", || read().lines().count() >= 3);
    let out = read();
    let words: Vec<Vec<&str>> = out.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(words[0], ["monotonic", "1000", "5"]);
    assert_eq!(words[1], ["boottime", "5000000", "0"]);
    assert!(words[2][0].parse::<u64>().unwrap() >= 5_000_000, "{out}");
    let inside = bundle.exec("cut -d. -f1 /proc/uptime").ok().stdout;
    assert!(inside.trim().parse::<u64>().unwrap() >= 5_000_000, "{inside}");
    bundle.runx(&["delete", "--force", bundle.id()]).ok();
    bundle.assert_nothing_left();
}

// covers: linux.namespaces.time linux.namespaces.user
#[test]
fn a_time_namespace_belongs_to_the_user_namespace() {
    needs_root!();
    let mut bundle = in_user_namespace("cat /proc/self/timens_offsets");
    bundle.config["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "time"}));
    bundle.set("/linux", "timeOffsets", json!({"boottime": {"secs": 12345}}));
    let out = bundle.run().ok().stdout;
    assert!(out.contains("12345"), "{out}");
    bundle.assert_nothing_left();
}

/// Whether the scratch directory's filesystem can be mounted with mapped ids.
fn file_of(bundle: &Bundle, id: u32) -> std::path::PathBuf {
    let data = bundle.scratch().join("data");
    fs::create_dir(&data).unwrap();
    fs::write(data.join("file"), "x").unwrap();
    chown(data.join("file"), Some(id), Some(id)).unwrap();
    data
}

// covers: mounts.uidMappings mounts.gidMappings mounts.options.idmap
#[test]
fn a_mount_shows_files_with_mapped_ids() {
    needs_root!();
    let mut bundle = Bundle::script("stat -c %u:%g /data/file; touch /data/new");
    bundle.config["root"]["readonly"] = json!(false);
    let data = file_of(&bundle, 7);
    let maps = json!([{"containerID": 7, "hostID": 3007, "size": 1}, {"containerID": 0, "hostID": 0, "size": 1}]);
    bundle.add_mount(json!({
        "destination": "/data", "type": "bind", "source": data, "options": ["bind", "idmap"],
        "uidMappings": maps, "gidMappings": maps
    }));
    assert_eq!(bundle.run().ok().stdout, "3007:3007\n");
    assert_eq!(fs::metadata(data.join("new")).unwrap().uid(), 0);
    bundle.assert_nothing_left();
}

// covers: mounts.uidMappings mounts.gidMappings mounts.source
#[test]
fn a_mount_of_what_an_earlier_one_put_into_the_container_shows_mapped_ids_too() {
    needs_root!();
    let mut bundle = Bundle::script("stat -c %u:%g /first/file /second/file /second/below/file");
    bundle.config["root"]["readonly"] = json!(false);
    let data = file_of(&bundle, 7);
    fs::create_dir(data.join("below")).unwrap();
    bundle.add_mount(json!({"destination": "/first", "type": "bind", "source": data, "options": ["bind"]}));
    bundle.add_mount(json!({"destination": "/first/below", "type": "bind", "source": data, "options": ["bind"]}));
    let maps = json!([{"containerID": 7, "hostID": 3007, "size": 1}]);
    for (option, below) in [("idmap", "7:7"), ("ridmap", "3007:3007")] {
        bundle.config["mounts"].as_array_mut().unwrap().retain(|mount| mount["destination"] != "/second");
        bundle.add_mount(json!({
            "destination": "/second", "type": "bind", "source": bundle.rootfs().join("first"),
            "options": ["rbind", option], "uidMappings": maps, "gidMappings": maps
        }));
        assert_eq!(bundle.run().ok().stdout, format!("7:7\n3007:3007\n{below}\n"), "{option}");
    }
    bundle.assert_nothing_left();
}

// covers: mounts.options.idmap
#[test]
fn an_idmap_option_alone_takes_the_containers_own_mappings() {
    needs_root!();
    for option in ["idmap", "ridmap"] {
        let mut bundle = in_user_namespace("stat -c %u:%g /data/file; touch /data/new");
        let data = file_of(&bundle, 7);
        give(&data, 0);
        chown(data.join("file"), Some(7), Some(7)).unwrap();
        bundle.add_mount(json!({"destination": "/data", "type": "bind", "source": data, "options": ["rbind", option]}));
        assert_eq!(bundle.run().ok().stdout, "7:7\n", "{option}");
        // On the disk it is what it is inside.
        assert_eq!(fs::metadata(data.join("new")).unwrap().uid(), 0);
        bundle.assert_nothing_left();
    }
    let mut bundle = Bundle::script("true");
    let data = file_of(&bundle, 7);
    bundle.add_mount(json!({"destination": "/data", "type": "bind", "source": data, "options": ["bind", "idmap"]}));
    bundle.run().fails(1, &["/data", "uidMappings"]);
    bundle.assert_nothing_left();
}

// covers: linux.netDevices
#[test]
fn a_network_interface_moves_with_its_addresses_and_another_name() {
    needs_root!();
    let mut bundle = Bundle::script("ip addr show inside; ip link show | grep -c ': '");
    let unique = std::process::id() % 100_000;
    let (ours, peer) = (format!("rxa{unique}"), format!("rxb{unique}"));
    let ip = |args: &[&str]| runx_tests::command::run(std::process::Command::new("ip").args(args));
    if ip(&["link", "add", &ours, "type", "veth", "peer", "name", &peer]).code != 0 {
        runx_tests::skip("it needs ip(8) and a kernel with veth");
        return;
    }
    ip(&["addr", "add", "10.231.7.9/24", "dev", &ours]).ok();
    ip(&["link", "set", &ours, "up"]).ok();
    bundle.set("/linux", "netDevices", json!({ours.clone(): {"name": "inside"}}));
    let done = bundle.run();
    // It goes with the namespace; after a failure it does not.
    let gone = ip(&["link", "del", &peer]);
    let out = done.ok().stdout;
    assert!(out.contains("inet 10.231.7.9/24") && out.contains("UP"), "{out}");
    assert_eq!(out.lines().last(), Some("2"), "{out}");
    drop(gone);
    bundle.assert_nothing_left();
    for (value, words) in [
        (json!({"no-such-device": {}}), ["no-such-device", "No such device"]),
        (json!({"lo": {"name": "a name"}}), ["netDevices", "a name"]),
        (json!({"lo": {"name": "x"}, "eth0": {"name": "x"}}), ["netDevices", "\"x\""]),
    ] {
        bundle.set("/linux", "netDevices", value);
        bundle.run().fails(1, &words);
        bundle.assert_nothing_left();
    }
}

// covers: linux.intelRdt
#[test]
fn resource_director_is_refused_where_the_machine_has_none() {
    needs_root!();
    if Path::new("/sys/fs/resctrl/schemata").exists() {
        runx_tests::skip("this machine has resctrl");
        return;
    }
    let mut bundle = Bundle::script("true");
    bundle.set("/linux", "intelRdt", json!({"closID": "gold", "l3CacheSchema": "L3:0=f"}));
    bundle.run().fails(1, &["linux.intelRdt", "resctrl"]);
    bundle.assert_nothing_left();
}

// covers: linux.namespaces.user process.rlimits
#[test]
fn a_low_limit_on_open_files_does_not_hinder_the_mounts() {
    needs_root!();
    let mut bundle = in_user_namespace("ulimit -n");
    bundle.set("/process", "rlimits", json!([{"type": "RLIMIT_NOFILE", "soft": 12, "hard": 12}]));
    for n in 0..20 {
        bundle.add_mount(json!({"destination": format!("/tmp/{n}"), "type": "tmpfs", "source": "x"}));
    }
    assert_eq!(bundle.run().ok().stdout, "12\n");
    bundle.assert_nothing_left();
}

// covers: mounts.options.idmap linux.namespaces.path
#[test]
fn an_idmap_option_takes_the_mappings_of_a_joined_user_namespace() {
    needs_root!();
    let owner = in_user_namespace("sleep 100");
    owner.create().ok();
    let pid = owner.state()["pid"].as_i64().unwrap();
    let mut bundle = in_user_namespace("stat -c %u /mapped/file");
    for namespace in bundle.config["linux"]["namespaces"].as_array_mut().unwrap() {
        if namespace["type"] == "user" {
            namespace["path"] = json!(format!("/proc/{pid}/ns/user"));
        }
    }
    for field in ["uidMappings", "gidMappings"] {
        bundle.config["linux"].as_object_mut().unwrap().remove(field);
    }
    let data = file_of(&bundle, 0);
    bundle.add_mount(json!({"destination": "/mapped", "type": "bind", "source": data, "options": ["rbind", "idmap"]}));
    assert_eq!(bundle.run().ok().stdout, "0\n");
    owner.runx(&["delete", "--force", owner.id()]).ok();
    bundle.assert_nothing_left();
}
