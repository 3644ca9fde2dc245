//! Containers of an ordinary user: nobody's help but newuidmap's, and nothing that he could not have had before.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use runx_tests::command::{eventually, run, run_detached};
use runx_tests::user::{FURTHER, ID, OwnBundle};
use runx_tests::{needs_cgroup_v2, needs_user};
use serde_json::json;

#[test]
fn an_ordinary_user_is_root_of_a_container_with_his_own_id_alone() {
    needs_user!(obstacle);
    let mut bundle = OwnBundle::script("id -u; id -G; cat /proc/self/uid_map /proc/self/setgroups; touch /new; exit 7");
    bundle.config["root"]["readonly"] = json!(false);
    let done = bundle.run();
    assert_eq!(done.code, 7, "{}", done.stderr);
    let lines: Vec<_> = done.stdout.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    assert_eq!(lines, ["0", "0", &format!("0 {ID} 1"), "deny"], "{}", done.stderr);
    let made = fs::metadata(bundle.rootfs().join("new")).expect("the file is there");
    assert_eq!((made.uid(), made.gid()), (ID, ID));
    bundle.assert_nothing_left();
}

#[test]
fn his_container_lives_through_all_commands() {
    needs_user!(obstacle);
    let bundle = OwnBundle::script("trap 'exit 3' TERM; echo begun; while :; do sleep 0.1; done");
    bundle.detached(&["create", bundle.id()]).ok();
    assert_eq!(bundle.state()["status"], "created");
    // What is in the container until its start is this program, which nobody inside can write to.
    let init = bundle.state()["pid"].as_i64().expect("it has a pid");
    let program = fs::read_link(format!("/proc/{init}/exe")).expect("it has a program");
    assert!(program.starts_with("/memfd:runx") || !program.starts_with(bundle.scratch()), "{program:?}");
    bundle.runx(&["exec", bundle.id(), "true"]).fails(255, &["that has not been started"]);
    bundle.runx(&["start", bundle.id()]).ok();
    eventually("the program begins", || {
        fs::read_to_string(bundle.scratch().join("output")).is_ok_and(|text| text == "begun\n")
    });
    let listed = bundle.runx(&["list"]).ok().stdout;
    assert!(listed.contains(&format!("#{ID}")) || listed.contains(&ID.to_string()), "{listed}");
    let done = bundle.runx(&["exec", bundle.id(), "sh", "-c", "id -u; readlink /proc/self/ns/user; exit 4"]);
    assert_eq!(done.code, 4, "{}", done.stderr);
    let namespace = fs::read_link(format!("/proc/{init}/ns/user")).expect("it has a user namespace");
    assert_eq!(done.stdout, format!("0\n{}\n", namespace.display()));
    let seen: Vec<i64> = serde_json::from_str(&bundle.runx(&["ps", "--format", "json", bundle.id()]).ok().stdout)
        .expect("ps prints JSON");
    assert!(seen.contains(&init), "{seen:?} has no {init}");
    bundle.runx(&["kill", bundle.id(), "TERM"]).ok();
    eventually("it ends", || bundle.state()["status"] == "stopped");
    bundle.runx(&["delete", bundle.id()]).ok();
    bundle.assert_nothing_left();
}

#[test]
fn all_of_his_containers_processes_are_killed_without_a_cgroup() {
    needs_user!(obstacle);
    let bundle = OwnBundle::script("sleep 1000 & sleep 1000 & wait");
    bundle.detached(&["run", "--detach", bundle.id()]).ok();
    let count = || {
        let text = bundle.runx(&["ps", "--format", "json", bundle.id()]).ok().stdout;
        serde_json::from_str::<Vec<i32>>(&text).expect("ps prints JSON").len()
    };
    eventually("three processes run", || count() == 3);
    bundle.runx(&["kill", "--all", bundle.id(), "KILL"]).ok();
    eventually("it ends", || bundle.state()["status"] == "stopped");
    bundle.runx(&["delete", bundle.id()]).ok();
    bundle.assert_nothing_left();
}

#[test]
fn newuidmap_gives_his_container_further_users() {
    needs_user!(obstacle_to_further_ids);
    let mut bundle = OwnBundle::script("id -u; id -G; touch /tmp/mine; stat -c %u /tmp/mine");
    bundle.map_further_ids();
    bundle.config["process"]["user"] = json!({"uid": 5, "gid": 6, "additionalGids": [7]});
    bundle.config["root"]["readonly"] = json!(false);
    fs::set_permissions(bundle.rootfs().join("tmp"), std::os::unix::fs::PermissionsExt::from_mode(0o777))
        .expect("open /tmp");
    let done = bundle.run_when_known().ok();
    assert_eq!(done.stdout, "5\n6 7\n5\n");
    let made = fs::metadata(bundle.rootfs().join("tmp/mine")).expect("the file is there");
    assert_eq!((made.uid(), made.gid()), (FURTHER.0 + 4, FURTHER.0 + 5));
    bundle.assert_nothing_left();
}

#[test]
fn an_exec_is_in_the_groups_that_it_asks_for_where_newgidmap_was() {
    needs_user!(obstacle_to_further_ids);
    let mut bundle = OwnBundle::script("sleep 1000");
    bundle.map_further_ids();
    let args = ["run", "--detach", bundle.id()];
    run_detached(&mut bundle.command_when_known(&args), &bundle.scratch().join("output")).ok();
    let args = ["exec", "--user", "8:9", "--additional-gids", "10", bundle.id(), "sh", "-c", "id -u; id -G"];
    assert_eq!(bundle.runx(&args).ok().stdout, "8\n9 10\n");
    bundle.runx(&["delete", "--force", bundle.id()]).ok();
    bundle.assert_nothing_left();
}

#[test]
fn further_ids_are_refused_without_newuidmap_and_where_they_are_not_his() {
    needs_user!(obstacle_to_further_ids);
    let mut bundle = OwnBundle::script("true");
    bundle.map_further_ids();
    let mut command = bundle.command(&["run", bundle.id()]);
    let done = run(command.env("PATH", bundle.scratch().join("home")));
    done.fails(1, &["linux.uidMappings", "newuidmap is not installed", "package uidmap"]);
    bundle.config["linux"]["uidMappings"][1]["hostID"] = json!(1000);
    bundle.run_when_known().fails(1, &["map the ids of the user namespace", "newuidmap", "not allowed"]);
    bundle.config["linux"]["uidMappings"] = json!([{"containerID": 0, "hostID": 0, "size": 1}]);
    bundle.run_when_known().fails(1, &["newuidmap", "not allowed"]);
    bundle.assert_nothing_left();
}

#[test]
fn groups_that_nobody_may_change_are_neither_given_nor_left() {
    needs_user!(obstacle);
    let mut bundle = OwnBundle::script("id -G");
    bundle.config["process"]["user"]["additionalGids"] = json!([0]);
    bundle.run().fails(1, &["process.user.additionalGids", "newgidmap"]);
    bundle.assert_nothing_left();
}

#[test]
fn what_only_root_can_have_is_refused_by_name() {
    needs_user!(obstacle);
    let mut bundle = OwnBundle::script("true");
    let usual = bundle.config.clone();
    bundle.config["linux"]["resources"] = json!({"memory": {"limit": 100_000_000}});
    bundle.run().fails(1, &["linux.resources", "create cgroup", "Permission denied"]);
    bundle.config = usual.clone();
    bundle.config["linux"]["cgroupsPath"] = json!("/runx-tests/rootless");
    bundle.run().fails(1, &["create cgroup", "Permission denied"]);
    bundle.config = usual.clone();
    bundle.config["process"]["oomScoreAdj"] = json!(-900);
    bundle.run().fails(1, &["process.oomScoreAdj to -900", "Permission denied"]);
    bundle.config = usual.clone();
    bundle.config["linux"]["namespaces"]
        .as_array_mut()
        .expect("namespaces are a list")
        .retain(|namespace| namespace["type"] != "user");
    for key in ["uidMappings", "gidMappings"] {
        bundle.config["linux"].as_object_mut().expect("linux is an object").remove(key);
    }
    bundle.run().fails(1, &["without a user namespace", "runx spec --rootless"]);
    bundle.config = usual;
    bundle.runx(&["--rootless=false", "run", bundle.id()]).fails(1, &["create cgroup", "Permission denied"]);
    bundle.assert_nothing_left();
}

#[test]
fn a_container_without_a_cgroup_says_what_it_cannot_do() {
    needs_user!(obstacle);
    let mut bundle = OwnBundle::script("cat /proc/self/oom_score_adj; sleep 1000");
    bundle.config["process"]["oomScoreAdj"] = json!(444);
    bundle.detached(&["run", "--detach", bundle.id()]).ok();
    eventually("it has its score", || {
        fs::read_to_string(bundle.scratch().join("output")).is_ok_and(|text| text == "444\n")
    });
    bundle.runx(&["pause", bundle.id()]).fails(1, &["no cgroup of its own"]);
    bundle.runx(&["events", "--stats", bundle.id()]).fails(1, &["no cgroup of its own"]);
    bundle.runx(&["update", "--memory", "1g", bundle.id()]).fails(1, &["no cgroup of its own"]);
    bundle.runx(&["exec", "--cgroup", "x", bundle.id(), "true"]).fails(255, &["no cgroup of its own"]);
    assert_eq!(bundle.state()["status"], "running");
    bundle.runx(&["delete", "--force", bundle.id()]).ok();
    bundle.assert_nothing_left();
}

#[test]
fn limits_hold_in_a_group_that_was_given_to_him() {
    needs_cgroup_v2!();
    needs_user!(obstacle);
    let mut bundle = OwnBundle::script("cat /sys/fs/cgroup/pids.max; sleep 1000");
    let given = Path::new("/sys/fs/cgroup").join(format!("given-{}", bundle.id()));
    let inner = given.join("shell");
    fs::create_dir_all(&inner).expect("make the groups");
    for path in [given.clone(), given.join("cgroup.procs"), given.join("cgroup.subtree_control"), inner.clone()] {
        std::os::unix::fs::chown(&path, Some(ID), Some(ID)).expect("give the group away");
    }
    std::os::unix::fs::chown(inner.join("cgroup.procs"), Some(ID), Some(ID)).expect("give the group away");
    fs::write("/sys/fs/cgroup/cgroup.subtree_control", "+pids").expect("enable the controller");
    fs::write(given.join("cgroup.subtree_control"), "+pids").expect("enable the controller");
    bundle.config["linux"]["resources"] = json!({"pids": {"limit": 33}});
    let output = bundle.scratch().join("output");
    let start = |args: &[&str]| {
        // Whoever is in a group given to him, as a session of systemd's is, makes his container's beside it.
        let command = bundle.command(args);
        let mut inside = std::process::Command::new("sh");
        let script = format!(
            "echo $$ > {}/cgroup.procs && exec setpriv --reuid {ID} --regid {ID} --clear-groups -- \"$@\"",
            inner.display()
        );
        inside.args(["-c", &script, "sh"]).arg(command.get_program()).args(command.get_args());
        inside.current_dir(bundle.path());
        run_detached(&mut inside, &output)
    };
    start(&["run", "--detach", bundle.id()]).ok();
    eventually("the limit is seen", || fs::read_to_string(&output).is_ok_and(|text| text == "33\n"));
    assert!(given.join(bundle.id()).is_dir());
    start(&["pause", bundle.id()]).ok();
    assert_eq!(bundle.state()["status"], "paused");
    start(&["resume", bundle.id()]).ok();
    start(&["delete", "--force", bundle.id()]).ok();
    assert!(!given.join(bundle.id()).exists());
    fs::remove_dir(inner).and_then(|()| fs::remove_dir(given)).expect("remove the groups");
    bundle.assert_nothing_left();
}

#[test]
fn a_module_is_compiled_once_for_him_and_kept_where_it_is_his() {
    needs_user!(obstacle);
    let mut bundle = OwnBundle::script("");
    bundle.add_file("module.wat", &runx_tests::wasm::show_everything(bundle.id()));
    bundle.config["process"]["args"] = json!(["/module.wat", "word"]);
    for _ in 0..2 {
        let done = bundle.run();
        assert!(done.stdout.starts_with("/module.wat\0word\0"), "{} {}", done.stdout, done.stderr);
        assert_eq!(done.code, 2, "{}", done.stderr);
    }
    let cache = bundle.scratch().join("home/.cache/runx/wasm");
    let about = fs::metadata(&cache).expect("his cache is there");
    assert_eq!((about.uid(), about.mode() & 0o777), (ID, 0o700));
    bundle.assert_nothing_left();
}

#[test]
fn podman_runs_it_for_an_ordinary_user() {
    needs_user!(obstacle_to_further_ids);
    if let Some(why) = runx_tests::podman::obstacle() {
        runx_tests::skip(&why);
        return;
    }
    let bundle = OwnBundle::script("");
    let archive = bundle.scratch().join("rootfs.tar");
    let mut tar = tar::Builder::new(fs::File::create(&archive).expect("create the archive"));
    tar.follow_symlinks(false);
    tar.append_dir_all(".", bundle.rootfs()).and_then(|()| tar.finish()).expect("pack the rootfs");
    fs::create_dir(bundle.scratch().join("home/run")).expect("make a directory");
    std::os::unix::fs::chown(bundle.scratch().join("home/run"), Some(ID), Some(ID)).expect("give it away");
    let config = "[containers]\ndefault_ulimits = [\"nofile=1024:1024\", \"nproc=1024:1024\"]\n\
                  [engine]\nlock_type = \"file\"\n";
    fs::write(bundle.scratch().join("containers.conf"), config).expect("write the configuration");
    let at = |name: &str| bundle.scratch().join(name).to_string_lossy().into_owned();
    let podman = |args: &[&str]| {
        let mut words: Vec<String> =
            ["podman", "--cgroup-manager", "cgroupfs", "--events-backend", "file", "--storage-driver", "vfs"]
                .map(str::to_owned)
                .into();
        for (flag, value) in [
            ("--runtime", at("bin/runx")),
            ("--root", at("home/root")),
            ("--runroot", at("home/runroot")),
            ("--tmpdir", at("home/libpod")),
        ] {
            words.extend([flag.to_owned(), value]);
        }
        words.extend(args.iter().map(|word| (*word).to_owned()));
        let mut command = bundle.known(&words);
        command.env("XDG_RUNTIME_DIR", at("home/run")).env("CONTAINERS_CONF", at("containers.conf"));
        run(command.env("TMPDIR", at("home")))
    };
    podman(&["import", &archive.to_string_lossy(), runx_tests::podman::IMAGE]).ok();
    let image = runx_tests::podman::IMAGE;
    let done = podman(&["run", "--rm", "--network", "none", "--user", "33:44", image, "sh", "-c", "id -u; id -g"]);
    assert_eq!(done.ok().stdout, "33\n44\n");
    podman(&["run", "--detach", "--name", "c", "--network", "none", image, "sleep", "1000"]).ok();
    assert_eq!(podman(&["exec", "c", "cat", "/proc/1/comm"]).ok().stdout, "sleep\n");
    podman(&["rm", "--force", "--time", "0", "c"]).ok();
    assert_eq!(
        podman(&["run", "--rm", "--network", "none", "--userns", "keep-id", image, "id", "-u"]).ok().stdout,
        format!("{ID}\n")
    );
    // Its files belong to further ids.
    podman(&["unshare", "rm", "-rf", &at("home/root"), &at("home/runroot")]).ok();
    podman(&["system", "migrate"]);
}
