//! Whatever is wrong with what a user gives is named, with runc's exit code, and leaves nothing.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};

use runx_tests::bundle::Bundle;
use runx_tests::needs_root;
use serde_json::{Value, json};

/// Changes a good bundle, runs it, and expects the failure.
#[track_caller]
fn refused(change: impl FnOnce(&mut Bundle), words: &[&str]) {
    let mut bundle = Bundle::script("echo it ran");
    change(&mut bundle);
    let done = bundle.run().fails(1, words);
    assert_eq!(done.stdout, "");
    // `create` says the same as `run`.
    bundle.create().fails(1, words);
    bundle.assert_nothing_left();
}

#[test]
fn config_json_is_missing_malformed_or_too_deep() {
    needs_root!();
    let write = |text: &'static str| {
        move |bundle: &mut Bundle| {
            bundle.config = Value::Null;
            fs::write(bundle.path().join("config.json"), text).unwrap();
        }
    };
    refused(
        |bundle| {
            bundle.config = Value::Null;
            fs::remove_file(bundle.path().join("config.json")).unwrap();
        },
        &["config.json", "No such file"],
    );
    refused(write("{\"ociVersion\": "), &["config.json", "line 1"]);
    refused(write("{}"), &["invalid config.json", "ociVersion"]);
    refused(write("[]"), &["config.json"]);
}

// covers: ociVersion
#[test]
fn fields_that_contradict_the_specification_are_named() {
    needs_root!();
    refused(|b| b.set("", "ociVersion", json!("2.0.0")), &["ociVersion", "2.0.0"]);
    refused(|b| b.set("/process", "args", json!([])), &["process.args"]);
    refused(|b| b.set("/process", "cwd", json!("tmp")), &["process.cwd"]);
    refused(|b| b.set("/linux", "namespaces", json!([{"type": "pid"}])), &["mount namespace"]);
    refused(|b| b.set("/linux", "rootfsPropagation", json!("sideways")), &["rootfsPropagation", "sideways"]);
    refused(|b| b.set("/linux", "cgroupsPath", json!("../../x")), &["cgroupsPath"]);
    refused(|b| b.set("/linux", "cgroupsPath", json!("a.slice:runx:x")), &["systemd"]);
    refused(|b| b.add_mount(json!({"destination": "/proc/self/attr", "type": "tmpfs"})), &["inside /proc"]);
    refused(
        |b| b.set("/process", "rlimits", json!([{"type": "RLIMIT_NOFILE", "soft": 9, "hard": 8}])),
        &["RLIMIT_NOFILE"],
    );
}

// covers: linux.sysctl hostname domainname
#[test]
fn names_that_two_fields_give_differently_are_refused() {
    needs_root!();
    for (field, key) in [("hostname", "kernel.hostname"), ("domainname", "kernel.domainname")] {
        let both = |value: &'static str| {
            move |b: &mut Bundle| {
                b.set("", field, json!("one"));
                b.set("/linux", "sysctl", json!({key: value}));
            }
        };
        refused(both("other"), &[key, "other", field, "one"]);
        let mut bundle = Bundle::script("cat /proc/sys/kernel/hostname /proc/sys/kernel/domainname");
        both("one")(&mut bundle);
        assert!(bundle.run().ok().stdout.contains("one\n"));
        bundle.assert_nothing_left();
    }
}

#[test]
fn fields_without_effect_are_refused_by_name() {
    needs_root!();
    refused(|b| b.set("/linux", "uidMappings", json!([{"containerID": 0, "hostID": 1, "size": 1}])), &["uidMappings"]);
    refused(
        |b| b.config["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "user"})),
        &["user namespace", "uidMappings"],
    );
    refused(
        |b| b.set("/linux", "timeOffsets", json!({"boottime": {"secs": 1}})),
        &["timeOffsets", "without a new time namespace"],
    );
    refused(
        |b| b.add_mount(json!({"destination": "/x", "type": "proc", "options": ["tmpcopyup"]})),
        &["tmpcopyup", "/x"],
    );
    refused(|b| b.add_mount(json!({"destination": "/x", "type": "tmpfs", "options": ["idmap"]})), &["id-mapped", "/x"]);
    refused(|b| b.set("/linux", "personality", json!({"domain": "LINUX", "flags": ["X"]})), &["personality"]);
    refused(|b| b.set("", "hooks", json!({"poststop": [{"path": "true"}]})), &["hooks.poststop", "absolute"]);
    refused(
        |b| b.set("", "hooks", json!({"prestart": [{"path": "/bin/true", "timeout": 0}]})),
        &["hooks.prestart", "timeout"],
    );
}

// covers: process.selinuxLabel linux.mountLabel process.apparmorProfile
#[test]
fn labels_without_their_security_module_are_refused() {
    needs_root!();
    if !std::path::Path::new("/sys/module/apparmor/parameters/enabled").exists() {
        refused(|b| b.set("/process", "apparmorProfile", json!("x")), &["apparmorProfile", "not enabled"]);
    }
    if !std::path::Path::new("/sys/fs/selinux/enforce").exists() {
        refused(|b| b.set("/process", "selinuxLabel", json!("x")), &["selinuxLabel", "not enabled"]);
        refused(|b| b.set("/linux", "mountLabel", json!("x")), &["mountLabel", "not enabled"]);
    }
}

#[test]
fn the_root_filesystem_is_not_there_or_no_directory() {
    needs_root!();
    refused(|b| b.set("/root", "path", json!("nothing")), &["nothing", "No such file"]);
    refused(
        |b| {
            fs::write(b.path().join("file"), "").unwrap();
            b.set("/root", "path", json!("file"));
        },
        &["file", "not a directory"],
    );
}

#[test]
fn the_program_is_not_there_or_cannot_be_executed() {
    needs_root!();
    let program = |program: &'static str| move |b: &mut Bundle| b.set("/process", "args", json!([program]));
    refused(program("nosuch"), &["exec: \"nosuch\": executable file not found in $PATH"]);
    refused(program("/no/such"), &["exec: \"/no/such\": stat /no/such: no such file or directory"]);
    refused(program("/etc/passwd"), &["exec: \"/etc/passwd\": permission denied"]);
    refused(program("/etc"), &["exec: \"/etc\": is a directory"]);
}

#[test]
fn a_program_that_the_kernel_refuses_is_reported_by_the_start() {
    needs_root!();
    let file = |text: &str| {
        let mut bundle = Bundle::new(&["/bin/odd"]);
        let path = bundle.rootfs().join("bin/odd");
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        bundle.config["root"]["readonly"] = json!(true);
        bundle
    };
    let bundle = file("no format at all");
    bundle.run().fails(1, &["/bin/odd", "exec format error"]);
    bundle.assert_nothing_left();
    let bundle = file("#!/no/interpreter\n");
    bundle.create().ok();
    bundle.runx(&["start", bundle.id()]).fails(1, &["/bin/odd", "no such file"]);
    bundle.runx(&["delete", bundle.id()]).ok();
    bundle.assert_nothing_left();
}

#[test]
fn a_mount_source_is_missing() {
    needs_root!();
    refused(
        |b| b.add_mount(json!({"destination": "/d", "type": "bind", "source": "/no/source", "options": ["bind"]})),
        &["/no/source", "/d", "No such file"],
    );
    refused(|b| b.add_mount(json!({"destination": "/d", "type": "nosuchfs", "source": "x"})), &["nosuchfs", "/d"]);
}

#[test]
fn ids_that_exist_or_are_no_names_are_refused() {
    needs_root!();
    let bundle = Bundle::script("sleep 100");
    bundle.create().ok();
    bundle.run().fails(1, &["already exists", bundle.id()]);
    assert_eq!(bundle.state()["status"], "created", "the first one is untouched");
    bundle.runx(&["delete", bundle.id()]).ok();
    for id in ["../x", "a/b", "..", "", "a b"] {
        bundle.runx(&["run", id]).fails(1, &["invalid container id"]);
        bundle.runx(&["state", id]).fails(1, &["invalid container id"]);
    }
    bundle.runx(&["state", "nobody"]).fails(1, &["does not exist"]);
    bundle.runx(&["start", "nobody"]).fails(1, &["does not exist"]);
    bundle.runx(&["kill", bundle.id(), "SIGNOPE"]).fails(1, &["SIGNOPE"]);
    bundle.assert_nothing_left();
}

// covers: linux.cgroupsPath
#[test]
fn two_containers_do_not_share_a_cgroup() {
    needs_root!();
    let mut first = Bundle::script("sleep 100");
    let group = json!(format!("/runx-tests/{}", first.id()));
    first.set("/linux", "cgroupsPath", group.clone());
    first.create().ok();
    let mut second = Bundle::script("true");
    second.set("/linux", "cgroupsPath", group);
    second.run().fails(1, &["cgroup", "not empty"]);
    assert_eq!(first.state()["status"], "created", "the first one is untouched");
    first.runx(&["delete", first.id()]).ok();
    first.assert_nothing_left();
    second.assert_nothing_left();
}

#[test]
fn links_in_an_image_lead_nowhere_outside() {
    needs_root!();
    // /proc and /sys must be real directories.
    for name in ["proc", "sys"] {
        refused(
            |b| {
                fs::remove_dir(b.rootfs().join(name)).unwrap();
                symlink("/tmp", b.rootfs().join(name)).unwrap();
            },
            &["must be mounted on ordinary directory"],
        );
    }
    // A mount point behind a link is looked for below the root.
    let mut bundle = Bundle::script("true");
    let canary = bundle.scratch().join("canary");
    fs::create_dir(&canary).unwrap();
    fs::remove_dir_all(bundle.rootfs().join("tmp")).unwrap();
    symlink(&canary, bundle.rootfs().join("tmp")).unwrap();
    bundle.config["root"]["readonly"] = json!(false);
    bundle.add_mount(json!({"destination": "/tmp/x", "type": "tmpfs", "source": "x"}));
    bundle.run();
    assert_eq!(fs::read_dir(&canary).unwrap().count(), 0);
    bundle.assert_nothing_left();
}

#[test]
fn device_nodes_do_not_land_on_the_host() {
    needs_root!();
    let mut bundle = Bundle::script("true");
    let canary = bundle.scratch().join("canary");
    fs::create_dir(&canary).unwrap();
    fs::remove_dir(bundle.rootfs().join("dev")).unwrap();
    symlink(&canary, bundle.rootfs().join("dev")).unwrap();
    bundle.config["root"]["readonly"] = json!(false);
    bundle.config["mounts"]
        .as_array_mut()
        .unwrap()
        .retain(|mount| !mount["destination"].as_str().unwrap().starts_with("/dev"));
    bundle.run();
    assert_eq!(fs::read_dir(&canary).unwrap().count(), 0);
    bundle.assert_nothing_left();
}

#[test]
fn a_working_directory_behind_a_leaked_descriptor_is_refused() {
    needs_root!();
    for fd in 3..40 {
        let mut bundle = Bundle::script("echo it ran");
        bundle.set("/process", "cwd", json!(format!("/proc/self/fd/{fd}")));
        let done = bundle.run();
        assert_eq!((done.code, done.stdout.as_str()), (1, ""), "{}", done.stderr);
        bundle.assert_nothing_left();
    }
}
