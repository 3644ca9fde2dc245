//! `runx container cp` and the users of containers that have some of their own.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use runx_tests::command::{eventually, run, run_bytes};
use runx_tests::container::Containers;
use runx_tests::needs_root;

fn text(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|e| panic!("read {}: {e}", path.display()))
}

/// A bundle for the root filesystem of `containers`, and its configuration to be changed.
fn bundle(containers: &Containers) -> (PathBuf, serde_json::Value) {
    let (rootfs, bundle, id) = (containers.rootfs(), containers.scratch().join("bundle"), containers.id("first"));
    let place = bundle.to_str().unwrap();
    let create = ["create", "--network", "none", "--name", &id, "--rootfs", rootfs.to_str().unwrap()];
    containers.container(&[&create[..], &["--bundle", place, "-c", "true"]].concat()).ok();
    containers.container(&["start", "-a", &id]).ok();
    let mut config: serde_json::Value = serde_json::from_str(&text(&bundle.join("config.json"))).unwrap();
    containers.container(&["rm", &id]).ok();
    // What has gone with the container.
    let mounts = config["mounts"].as_array_mut().unwrap();
    mounts.retain(|mount| !mount["source"].as_str().is_some_and(|source| source.contains(&id)));
    (bundle, config)
}

#[test]
fn owners_are_those_that_a_container_with_users_of_its_own_sees() {
    needs_root!();
    let containers = Containers::new();
    let (rootfs, scratch) = (containers.rootfs(), containers.scratch().to_owned());
    let (bundle, mut config) = bundle(&containers);
    // Two ranges, the second of which is elsewhere; nobody but these is there.
    let mapping = serde_json::json!([
        {"containerID": 0, "hostID": 100_000, "size": 1000}, {"containerID": 1000, "hostID": 300_000, "size": 1000},
    ]);
    let linux = &mut config["linux"];
    linux["namespaces"].as_array_mut().unwrap().push(serde_json::json!({"type": "user"}));
    (linux["uidMappings"], linux["gidMappings"]) = (mapping.clone(), mapping);
    config["process"]["args"] = serde_json::json!(["sleep", "600"]);
    let volume = scratch.join("volume");
    fs::create_dir(&volume).unwrap();
    config["mounts"].as_array_mut().unwrap().push(serde_json::json!({
        "destination": "/made/volume", "type": "bind", "source": volume, "options": ["bind"],
    }));
    fs::write(bundle.join("config.json"), config.to_string()).unwrap();
    let own = |path: &Path, uid, gid| std::os::unix::fs::lchown(path, Some(uid), Some(gid)).unwrap();
    for directory in [&rootfs, &rootfs.join("tmp"), &volume] {
        own(directory, 100_000, 100_000);
    }
    let owner = |path: &Path| fs::symlink_metadata(path).map(|found| (found.uid(), found.gid())).unwrap();
    let host = |path: &str| scratch.join(path).to_str().unwrap().to_owned();
    fs::create_dir(scratch.join("src")).unwrap();
    fs::write(scratch.join("src/file"), "content").unwrap();
    symlink("file", scratch.join("src/link")).unwrap();
    own(&scratch.join("src/file"), 5, 1006);
    let id = containers.id("a");
    containers.container(&["create", "--name", &id, "--bundle", bundle.to_str().unwrap()]).ok();
    let cp = |args: &[&str]| containers.container(&[&["cp"], args].concat());
    let inside = |path: &str| format!("{id}:{path}");
    for round in ["stopped", "running"] {
        if round == "running" {
            containers.container(&["start", &id]).ok();
        }
        let (target, stream) = (format!("/tmp/{round}"), format!("/tmp/{round}-stream"));
        let below = |name: &str| rootfs.join(&target[1..]).join(name);
        // Into it: its root's, and with -a whose they are there.
        cp(&[&host("src"), &inside(&target)]).ok();
        let all = ["", "file", "link"].map(|name| owner(&below(name)));
        assert_eq!(all, [(100_000, 100_000); 3], "{round}");
        cp(&["-a", &host("src/file"), &inside(&format!("{target}/kept"))]).ok();
        assert_eq!(owner(&below("kept")), (100_005, 300_006), "{round}");
        own(&scratch.join("src/file"), 2000, 0);
        cp(&["-a", &host("src/file"), &inside("/tmp/x")]).fails(1, &["owner 2000 is no user of the container's"]);
        own(&scratch.join("src/file"), 5, 1006);
        assert!(!rootfs.join("tmp/x").exists(), "{round}");
        // Out of it the other way around; who is nobody there is nobody here.
        own(&below("file"), 300_999, 99_999);
        let out = run(&mut containers.command(&["container", "cp", &inside(&target), "-"])).ok();
        let mut archive = tar::Archive::new(&out.bytes[..]);
        let mut owners: Vec<_> = archive
            .entries()
            .unwrap()
            .map(|entry| {
                let entry = entry.unwrap();
                let name = entry.path().unwrap().file_name().unwrap().to_str().unwrap().to_owned();
                (name, entry.header().uid().unwrap(), entry.header().gid().unwrap())
            })
            .collect();
        owners.sort();
        let expected = [("file", 1999, 65534), ("kept", 5, 1006), ("link", 0, 0), (round, 0, 0)];
        assert_eq!(owners, expected.map(|(name, uid, gid)| (name.to_owned(), uid, gid)), "{round}");
        cp(&["-a", &inside(&format!("{target}/kept")), &host("kept")]).ok();
        cp(&[&inside(&format!("{target}/kept")), &host("plain")]).ok();
        assert_eq!((owner(&scratch.join("kept")), owner(&scratch.join("plain"))), ((5, 1006), (0, 0)), "{round}");
        // A stream, and the directories that it does not name.
        fs::create_dir(rootfs.join(&stream[1..])).unwrap();
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_uid(7);
        header.set_gid(8);
        header.set_mode(0o644);
        header.set_size(0);
        builder.append_data(&mut header, "deep/er/file", &[][..]).unwrap();
        let into = ["container", "cp", "-a", "-", &inside(&stream)];
        run_bytes(&mut containers.command(&into), &builder.into_inner().unwrap()).ok();
        let all = ["deep", "deep/er", "deep/er/file"].map(|name| owner(&rootfs.join(&stream[1..]).join(name)));
        assert_eq!(all, [(100_000, 100_000), (100_000, 100_000), (100_007, 100_008)], "{round}");
        // What is bound, and what is made for it.
        cp(&[&host("src/file"), &inside(&format!("/made/volume/{round}"))]).ok();
        assert_eq!((owner(&rootfs.join("made")), owner(&volume.join(round))), ((100_000, 100_000), (100_000, 100_000)));
    }
    // The container sees it so, too.
    let seen = containers.container(&["exec", &id, "stat", "-c", "%u:%g", "/tmp/running", "/tmp/running/kept"]).ok();
    assert_eq!(seen.stdout, "0:0\n5:1006\n");
    containers.container(&["rm", "-f", &id]).ok();
    // Users that are another namespace's are known only where it runs; and where there is no root, nobody can make files.
    let namespaces = config["linux"]["namespaces"].as_array_mut().unwrap();
    namespaces.last_mut().unwrap()["path"] = serde_json::json!("/proc/self/ns/user");
    fs::write(bundle.join("config.json"), config.to_string()).unwrap();
    containers.container(&["create", "--name", &id, "--bundle", bundle.to_str().unwrap()]).ok();
    cp(&[&host("src/file"), &inside("/tmp/x")]).fails(1, &["/proc/self/ns/user", "start it"]);
    containers.container(&["rm", &id]).ok();
    config["linux"]["namespaces"].as_array_mut().unwrap().last_mut().unwrap()["path"].take();
    config["linux"]["uidMappings"].as_array_mut().unwrap().remove(0);
    fs::write(bundle.join("config.json"), config.to_string()).unwrap();
    containers.container(&["create", "--name", &id, "--bundle", bundle.to_str().unwrap()]).ok();
    cp(&[&host("src/file"), &inside("/tmp/x")]).fails(1, &["is its root's, and it has none"]);
    cp(&[&inside("/etc/passwd"), &host("passwd")]).ok();
    assert!(!rootfs.join("tmp/x").exists());
    containers.container(&["rm", &id]).ok();
    containers.assert_nothing_left();
}

#[test]
fn a_copy_as_another_user_that_is_killed_lets_go_of_the_container_as_well() {
    needs_root!();
    let containers = Containers::new();
    let (bundle, mut config) = bundle(&containers);
    let mapping = serde_json::json!([{"containerID": 0, "hostID": 100_000, "size": 1000}]);
    config["linux"]["namespaces"].as_array_mut().unwrap().push(serde_json::json!({"type": "user"}));
    (config["linux"]["uidMappings"], config["linux"]["gidMappings"]) = (mapping.clone(), mapping);
    fs::write(bundle.join("config.json"), config.to_string()).unwrap();
    let id = containers.id("a");
    containers.container(&["create", "--name", &id, "--bundle", bundle.to_str().unwrap()]).ok();
    let mut command = containers.command(&["container", "cp", "-", &format!("{id}:/tmp")]);
    let mut copy = command.stdin(Stdio::piped()).spawn().unwrap();
    let mut stream = copy.stdin.take().unwrap();
    let mut header = tar::Header::new_gnu();
    header.set_path("file").unwrap();
    header.set_mode(0o644);
    header.set_size(1 << 20);
    header.set_cksum();
    stream.write_all(header.as_bytes()).unwrap();
    // It is in the middle of it, and nobody writes on.
    eventually("the file is there", || containers.rootfs().join("tmp/file").exists());
    copy.kill().unwrap();
    copy.wait().unwrap();
    containers.assert_is_removed(&id, stream);
    containers.assert_nothing_left();
}

#[test]
fn an_id_mapped_mount_of_a_container_that_does_not_run_is_refused_by_name() {
    needs_root!();
    let containers = Containers::new();
    let (rootfs, scratch) = (containers.rootfs(), containers.scratch().to_owned());
    let (id, mapped) = (containers.id("b"), scratch.join("mapped"));
    fs::create_dir(&mapped).unwrap();
    fs::write(scratch.join("file"), "content").unwrap();
    let (bundle, mut config) = bundle(&containers);
    let place = bundle.to_str().unwrap();
    let file = scratch.join("file");
    let cp = |to: &str| containers.container(&["cp", file.to_str().unwrap(), &format!("{id}:{to}")]);
    containers.container(&["create", "--name", &id, "--bundle", place]).ok();
    cp("/tmp/file").ok();
    assert_eq!(text(&rootfs.join("tmp/file")), "content");
    containers.container(&["rm", &id]).ok();
    let mapping = serde_json::json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
    config["mounts"].as_array_mut().unwrap().push(serde_json::json!({
        "destination": "/mapped", "type": "bind", "source": mapped, "options": ["bind", "idmap"],
        "uidMappings": mapping, "gidMappings": mapping,
    }));
    fs::write(bundle.join("config.json"), config.to_string()).unwrap();
    containers.container(&["create", "--name", &id, "--bundle", place]).ok();
    cp("/mapped/file").fails(1, &["/mapped", "start it"]);
    assert_eq!(fs::read_dir(&mapped).unwrap().count(), 0);
    containers.container(&["rm", &id]).ok();
    containers.assert_nothing_left();
}
