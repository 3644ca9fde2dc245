//! `runx container cp`: both ways, running or not, and containers that would like to lead it astray.

use std::fs;
use std::io::Read;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Stdio;

use runx_tests::command::{run, run_bytes};
use runx_tests::container::Containers;
use runx_tests::needs_root;

fn text(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|e| panic!("read {}: {e}", path.display()))
}

#[test]
fn files_and_directories_go_where_dockers_go() {
    needs_root!();
    let containers = Containers::new();
    let id = containers.background("a", &[], "sleep 600");
    let (rootfs, scratch) = (containers.rootfs(), containers.scratch().to_owned());
    let cp = |from: &str, to: &str| containers.container(&["cp", from, to]);
    let host = |path: &str| scratch.join(path).to_str().unwrap().to_owned();
    let inside = |path: &str| format!("{id}:{path}");
    fs::create_dir_all(scratch.join("src/sub")).unwrap();
    fs::write(scratch.join("src/one"), "1").unwrap();
    fs::write(scratch.join("src/sub/two"), "2").unwrap();
    fs::set_permissions(scratch.join("src/one"), fs::Permissions::from_mode(0o754)).unwrap();
    symlink("one", scratch.join("src/link")).unwrap();
    // Into a directory that is there, under another name, and its content only.
    cp(&host("src"), &inside("/tmp")).ok();
    assert_eq!((text(&rootfs.join("tmp/src/one")), text(&rootfs.join("tmp/src/sub/two"))), ("1".into(), "2".into()));
    assert_eq!(fs::metadata(rootfs.join("tmp/src/one")).unwrap().mode() & 0o7777, 0o754);
    assert_eq!(fs::read_link(rootfs.join("tmp/src/link")).unwrap(), Path::new("one"));
    cp(&host("src"), &inside("/new")).ok();
    assert_eq!(text(&rootfs.join("new/sub/two")), "2");
    cp(&host("src/."), &inside("/root")).ok();
    assert_eq!(text(&rootfs.join("root/one")), "1");
    cp(&host("src/one"), &inside("/tmp/renamed")).ok();
    assert_eq!(text(&rootfs.join("tmp/renamed")), "1");
    fs::write(scratch.join("other"), "other").unwrap();
    cp(&host("other"), &inside("tmp/renamed")).ok();
    assert_eq!(text(&rootfs.join("tmp/renamed")), "other");
    // And out of it.
    cp(&inside("/new"), &host("out")).ok();
    assert_eq!(text(&scratch.join("out/sub/two")), "2");
    cp(&inside("/new"), &host("out")).ok();
    assert_eq!(text(&scratch.join("out/new/sub/two")), "2");
    cp(&inside("/new/."), &host("out")).ok();
    cp(&inside("/new/one"), &host("single")).ok();
    assert_eq!(text(&scratch.join("single")), "1");
    // What cannot be meant.
    cp(&host("src"), &inside("/tmp/renamed")).fails(1, &["is a file"]);
    cp(&host("other"), &inside("/nope/")).fails(1, &["create the directory first"]);
    cp(&host("other"), &inside("/nope/x")).fails(1, &["/nope"]);
    cp(&host("nope"), &inside("/tmp")).fails(1, &["nope", "No such file"]);
    cp(&inside("/nope"), &host("x")).fails(1, &["/nope", "No such file"]);
    cp(&inside("/dev/null"), &host("x")).fails(1, &["no content to copy"]);
    cp(&host("other"), &host("x")).fails(1, &["CONTAINER:PATH"]);
    cp("nope:/x", &host("x")).fails(1, &["no such container"]);
    assert!(!scratch.join("x").exists());
    containers.container(&["rm", "-f", &id]).ok();
    containers.assert_nothing_left();
}

#[test]
fn a_container_that_does_not_run_is_copied_from_and_to_as_well() {
    needs_root!();
    let containers = Containers::new();
    let (id, rootfs) = (containers.id("a"), containers.rootfs());
    containers.container(&["create", "--name", &id, "--rootfs", rootfs.to_str().unwrap(), "true"]).ok();
    let file = containers.scratch().join("file");
    fs::write(&file, "content").unwrap();
    containers.container(&["cp", file.to_str().unwrap(), &format!("{id}:/root/file")]).ok();
    assert_eq!(text(&rootfs.join("root/file")), "content");
    let back = containers.scratch().join("back");
    containers.container(&["cp", &format!("{id}:/root/file"), back.to_str().unwrap()]).ok();
    assert_eq!(text(&back), "content");
    containers.container(&["rm", &id]).ok();
    containers.assert_nothing_left();
}

#[test]
fn a_tar_stream_goes_both_ways() {
    needs_root!();
    let containers = Containers::new();
    let id = containers.background("a", &[], "mkdir /d; echo x > /d/x; sleep 600");
    containers.until(&id, "running");
    runx_tests::command::eventually("the file is there", || containers.rootfs().join("d/x").exists());
    let out = run(&mut containers.command(&["container", "cp", &format!("{id}:/d"), "-"])).ok();
    let mut archive = tar::Archive::new(&out.bytes[..]);
    let names: Vec<_> =
        archive.entries().unwrap().map(|entry| entry.unwrap().path().unwrap().display().to_string()).collect();
    assert_eq!(names, ["d", "d/x"]);
    let into = |bytes: &[u8], path: &str| {
        run_bytes(&mut containers.command(&["container", "cp", "-", &format!("{id}:{path}")]), bytes)
    };
    into(&out.bytes, "/tmp").ok();
    assert_eq!(text(&containers.rootfs().join("tmp/d/x")), "x\n");
    into(&out.bytes, "/nope").fails(1, &["no directory"]);
    into(&[7; 2000], "/tmp").fails(1, &["tar stream"]);
    containers.container(&["rm", "-f", &id]).ok();
}

#[test]
fn owners_are_kept_where_that_is_asked_for_and_lent_rights_only_then() {
    needs_root!();
    let containers = Containers::new();
    let id = containers.background("a", &[], "echo x > /mine; chmod 4755 /mine; sleep 600");
    let (rootfs, scratch) = (containers.rootfs(), containers.scratch().to_owned());
    runx_tests::command::eventually("the mode is set", || {
        fs::metadata(rootfs.join("mine")).is_ok_and(|found| found.mode() & 0o7777 == 0o4755)
    });
    std::os::unix::fs::chown(rootfs.join("mine"), Some(1234), Some(5678)).unwrap();
    fs::set_permissions(rootfs.join("mine"), fs::Permissions::from_mode(0o4755)).unwrap();
    let from = format!("{id}:/mine");
    containers.container(&["cp", &from, scratch.join("plain").to_str().unwrap()]).ok();
    let plain = fs::metadata(scratch.join("plain")).unwrap();
    assert_eq!((plain.uid(), plain.gid(), plain.mode() & 0o7777), (0, 0, 0o755));
    containers.container(&["cp", "-a", &from, scratch.join("kept").to_str().unwrap()]).ok();
    let kept = fs::metadata(scratch.join("kept")).unwrap();
    assert_eq!((kept.uid(), kept.gid(), kept.mode() & 0o7777), (1234, 5678, 0o4755));
    containers.container(&["rm", "-f", &id]).ok();
}

#[test]
fn links_of_a_container_lead_nowhere_outside() {
    needs_root!();
    let containers = Containers::new();
    let (rootfs, scratch) = (containers.rootfs(), containers.scratch().to_owned());
    let secret = scratch.join("secret");
    fs::create_dir(&secret).unwrap();
    fs::write(secret.join("key"), "of the host").unwrap();
    // Both ways up and absolute, to a directory and to a file.
    symlink(format!("../../../../../../../..{}", secret.display()), rootfs.join("up")).unwrap();
    symlink(&secret, rootfs.join("absolute")).unwrap();
    symlink(secret.join("key"), rootfs.join("file")).unwrap();
    let id = containers.background("a", &[], "sleep 600");
    let out = scratch.join("out");
    for name in ["up/key", "absolute/key", "up/.", "absolute/."] {
        let done = containers.container(&["cp", &format!("{id}:/{name}"), out.to_str().unwrap()]);
        assert!(done.code == 1 && !out.exists(), "{name}: {done:?}");
    }
    // A link that is named is copied as one.
    containers.container(&["cp", &format!("{id}:/file"), out.to_str().unwrap()]).ok();
    assert!(fs::symlink_metadata(&out).unwrap().is_symlink());
    let mine = scratch.join("mine");
    fs::write(&mine, "of the user").unwrap();
    for name in ["up", "absolute", "up/new", "absolute/key", "file"] {
        containers.container(&["cp", mine.to_str().unwrap(), &format!("{id}:/{name}")]);
    }
    assert_eq!(text(&secret.join("key")), "of the host");
    assert_eq!(fs::read_dir(&secret).unwrap().count(), 1);
    containers.container(&["rm", "-f", &id]).ok();
}

#[test]
fn links_of_a_procfs_that_is_bound_lead_nowhere_outside() {
    needs_root!();
    let containers = Containers::new();
    let (rootfs, scratch) = (containers.rootfs(), containers.scratch().to_owned());
    let outside = scratch.join("outside");
    fs::create_dir_all(outside.join("victim")).unwrap();
    fs::write(outside.join("key"), "of the host").unwrap();
    let mine = scratch.join("mine");
    fs::create_dir(&mine).unwrap();
    fs::write(mine.join("key"), "of the user").unwrap();
    // The root of a process of the host, whose path through a procfs no root directory keeps in.
    let through = format!("/host/proc/{}/root{}", std::process::id(), outside.display());
    symlink(&through, rootfs.join("data")).unwrap();
    symlink(format!("{through}/key"), rootfs.join("file")).unwrap();
    let untouched = || {
        assert_eq!(text(&outside.join("key")), "of the host");
        assert_eq!(fs::read_dir(outside.join("victim")).unwrap().count(), 0);
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 2);
    };
    let (file, directory, out) = (mine.join("key"), mine.to_str().unwrap().to_owned(), scratch.join("out"));
    let (file, out_name) = (file.to_str().unwrap(), out.to_str().unwrap());
    let procfs = ["-v", "/proc:/host/proc:ro"];
    let running = containers.background("a", &procfs, "sleep 600");
    let stopped = containers.id("b");
    let program = ["--rootfs", rootfs.to_str().unwrap(), "true"];
    containers.container(&[&["create", "--name", &stopped][..], &procfs, &program].concat()).ok();
    let tar = {
        let mut builder = tar::Builder::new(Vec::new());
        builder.append_dir_all(".", &mine).unwrap();
        builder.into_inner().unwrap()
    };
    for id in [&running, &stopped] {
        let direct = format!("{through}/victim/");
        for place in ["/data", "/data/", "/data/victim", "/data/victim/", "/data/new", "/data/key", "/file", &direct] {
            for from in [file, &directory, &format!("{directory}/.")] {
                containers.container(&["cp", from, &format!("{id}:{place}")]).fails(1, &["procfs"]);
                untouched();
            }
            let mut command = containers.command(&["container", "cp", "-", &format!("{id}:{place}")]);
            run_bytes(&mut command, &tar).fails(1, &["procfs"]);
            untouched();
        }
        for place in ["/data/key", "/data/.", "/data/", "/file/.", &format!("{through}/key")] {
            containers.container(&["cp", &format!("{id}:{place}"), out_name]).fails(1, &["procfs"]);
            assert!(!out.exists(), "{place}");
            let done = run(&mut containers.command(&["container", "cp", &format!("{id}:{place}"), "-"]));
            assert!(!String::from_utf8_lossy(&done.bytes).contains("of the host"), "{place}");
            done.fails(1, &["procfs"]);
        }
    }
    // Neither is a place for a mount made there.
    let id = containers.id("c");
    let (below, at) = (format!("{directory}:/data/made/deep"), format!("{file}:/file/made"));
    for volume in [below, at] {
        let flags = ["-v", &volume];
        containers.container(&[&["create", "--name", &id][..], &procfs, &flags, &program].concat()).ok();
        let target = volume.split_once(':').unwrap().1.to_owned();
        containers.container(&["cp", file, &format!("{id}:{target}/x")]).fails(1, &[&target]);
        untouched();
        containers.container(&["rm", &id]).ok();
    }
    containers.container(&["rm", "-f", &running, &stopped]).ok();
    containers.assert_nothing_left();
}

#[test]
fn a_stream_that_climbs_or_follows_its_own_links_is_refused() {
    needs_root!();
    let containers = Containers::new();
    let id = containers.background("a", &[], "sleep 600");
    let archive = |entries: &[(&str, tar::EntryType, &str)]| {
        let mut builder = tar::Builder::new(Vec::new());
        for (name, kind, content) in entries {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(*kind);
            header.set_mode(0o644);
            header.set_size(if kind.is_file() { content.len() as u64 } else { 0 });
            // The library refuses to write such names.
            let raw = header.as_old_mut();
            raw.name[..name.len()].copy_from_slice(name.as_bytes());
            if !kind.is_file() {
                raw.linkname[..content.len()].copy_from_slice(content.as_bytes());
            }
            header.set_cksum();
            builder.append(&header, if kind.is_file() { content.as_bytes() } else { &[] }).unwrap();
        }
        builder.into_inner().unwrap()
    };
    use tar::EntryType::{Char, Link, Regular, Symlink};
    let into = |entries: &[(&str, tar::EntryType, &str)]| {
        run_bytes(&mut containers.command(&["container", "cp", "-", &format!("{id}:/tmp")]), &archive(entries))
    };
    into(&[("../etc/climbed", Regular, "x")]).fails(1, &["leads upwards"]);
    into(&[("out", Symlink, "/etc"), ("out/followed", Regular, "x")]).fails(1, &["out"]);
    into(&[("hard", Link, "../etc/passwd")]).fails(1, &["leads upwards"]);
    into(&[("null", Char, "")]).fails(1, &["only files, directories and links"]);
    for left in ["climbed", "followed"] {
        assert!(!containers.rootfs().join("etc").join(left).exists(), "{left}");
    }
    into(&[("fine", Regular, "x"), ("same", Link, "fine")]).ok();
    assert_eq!(text(&containers.rootfs().join("tmp/same")), "x");
    containers.container(&["rm", "-f", &id]).ok();
}

#[test]
fn a_file_that_changes_while_it_is_copied_spoils_nothing() {
    needs_root!();
    let containers = Containers::new();
    // It swaps a file for a FIFO, a link and a directory as fast as it can.
    let script = "cd /tmp; mkfifo() { mknod $1 p; }; while :; do echo data > v; rm -f v; mkfifo v; rm -f v; ln -s /etc/passwd v; \
                  rm -f v; mkdir v; rm -rf v; done";
    std::os::unix::fs::symlink("busybox", containers.rootfs().join("bin/ln")).unwrap();
    let id = containers.background("a", &[], script);
    for round in 0..40 {
        let out = containers.scratch().join(format!("out{round}"));
        // Whatever it catches: it ends, and what it brings is of the container.
        let done = containers.container(&["cp", &format!("{id}:/tmp"), out.to_str().unwrap()]);
        assert!(done.code <= 1, "{done:?}");
        if let Ok(mut file) = fs::File::open(out.join("v")) {
            let mut text = String::new();
            if fs::symlink_metadata(out.join("v")).unwrap().is_file() {
                file.read_to_string(&mut text).unwrap();
                assert!(text.is_empty() || text == "data\n", "{text}");
            }
        }
    }
    containers.container(&["rm", "-f", &id]).ok();
    containers.assert_nothing_left();
}

#[test]
fn who_cannot_take_a_large_copy_says_why() {
    needs_root!();
    let containers = Containers::new();
    let (id, rootfs, scratch) = (containers.id("a"), containers.rootfs(), containers.scratch().to_owned());
    containers.container(&["create", "--name", &id, "--rootfs", rootfs.to_str().unwrap(), "true"]).ok();
    fs::create_dir(rootfs.join("big")).unwrap();
    fs::write(rootfs.join("big/file"), vec![b'x'; 4 << 20]).unwrap();
    fs::write(scratch.join("there"), "").unwrap();
    // The sender cannot go on, and that is not the reason.
    let there = scratch.join("there");
    containers.container(&["cp", &format!("{id}:/big"), there.to_str().unwrap()]).fails(1, &["is a file"]);
    let nowhere = scratch.join("nowhere/file");
    containers.container(&["cp", &format!("{id}:/big/file"), nowhere.to_str().unwrap()]).fails(1, &["nowhere"]);
    containers.container(&["rm", &id]).ok();
    containers.assert_nothing_left();
}

#[test]
fn volumes_of_a_container_that_does_not_run_are_seen() {
    needs_root!();
    let containers = Containers::new();
    let (id, rootfs, scratch) = (containers.id("a"), containers.rootfs(), containers.scratch().to_owned());
    for directory in ["bound/deep", "kept"] {
        fs::create_dir_all(scratch.join(directory)).unwrap();
    }
    fs::create_dir(rootfs.join("data")).unwrap();
    fs::write(rootfs.join("data/seed"), "seed").unwrap();
    fs::write(scratch.join("file"), "content").unwrap();
    fs::write(scratch.join("single"), "of the host").unwrap();
    let host = |path: &str| scratch.join(path).to_str().unwrap().to_owned();
    let (bound, kept) = (format!("{}:/srv/bound", host("bound")), format!("{}:/kept:ro", host("kept")));
    let single = format!("{}:/srv/single", host("single"));
    let flags = ["--network", "none", "-v", "store:/data", "-v", &bound, "-v", &kept, "-v", &single];
    let script = "cat /data/seed /data/file /srv/bound/file; exec cat /srv/single";
    let program = ["--rootfs", rootfs.to_str().unwrap(), "--", "sh", "-c", script];
    containers.container(&[&["create", "--name", &id][..], &flags, &program].concat()).ok();
    let cp = |from: &str, to: &str| containers.container(&["cp", from, to]);
    let inside = |path: &str| format!("{id}:{path}");
    // What is copied into a new volume does not keep it from what the image has there.
    for place in ["/data/file", "/srv/bound/file", "/srv/single"] {
        cp(&host("file"), &inside(place)).ok();
    }
    cp(&host("file"), &inside("/kept/file")).fails(1, &["Read-only"]);
    let volume = containers.storage_root().join("volumes/store/_data");
    assert_eq!((text(&volume.join("seed")), text(&volume.join("file"))), ("seed".into(), "content".into()));
    assert_eq!(
        (text(&scratch.join("bound/file")), text(&scratch.join("single"))),
        ("content".into(), "content".into())
    );
    for below in ["data/file", "srv/bound/file", "kept/file"] {
        assert!(!rootfs.join(below).exists(), "{below}");
    }
    assert_eq!(containers.container(&["start", "-a", &id]).ok().stdout, "seedcontentcontentcontent");
    cp(&inside("/data"), &host("out")).ok();
    assert_eq!((text(&scratch.join("out/seed")), text(&scratch.join("out/file"))), ("seed".into(), "content".into()));
    cp(&inside("/srv"), &host("srv")).ok();
    assert_eq!(
        (text(&scratch.join("srv/bound/file")), text(&scratch.join("srv/single"))),
        ("content".into(), "content".into())
    );
    // The host has not seen any of these mounts.
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(scratch.to_str().unwrap()), "{mounts}");
    // A link leads no mount out of the container.
    fs::remove_dir_all(rootfs.join("srv")).unwrap();
    let outside = scratch.join("outside");
    fs::create_dir(&outside).unwrap();
    symlink(&outside, rootfs.join("srv")).unwrap();
    cp(&inside("/data/seed"), &host("seed")).ok();
    fs::remove_file(scratch.join("bound/file")).unwrap();
    cp(&host("file"), &inside("/srv/bound/file")).ok();
    assert_eq!(text(&scratch.join("bound/file")), "content");
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
    containers.container(&["rm", &id]).ok();
    fs::remove_dir_all(containers.storage_root().join("volumes")).unwrap();
    containers.assert_nothing_left();
}

#[test]
fn a_copy_that_is_killed_lets_go_of_the_container() {
    needs_root!();
    let containers = Containers::new();
    let (id, rootfs) = (containers.id("a"), containers.rootfs());
    containers.container(&["create", "--name", &id, "--rootfs", rootfs.to_str().unwrap(), "true"]).ok();
    fs::write(rootfs.join("big"), vec![b'x'; 4 << 20]).unwrap();
    let mut command = containers.command(&["container", "cp", &format!("{id}:/big"), "-"]);
    let mut copy = command.stdout(Stdio::piped()).spawn().unwrap();
    // It is in the middle of it, and nobody reads on.
    let mut stream = copy.stdout.take().unwrap();
    stream.read_exact(&mut [0; 512]).unwrap();
    copy.kill().unwrap();
    copy.wait().unwrap();
    containers.assert_is_removed(&id, stream);
    containers.assert_nothing_left();
}

#[test]
fn a_copy_out_of_a_container_changes_neither_it_nor_the_host() {
    needs_root!();
    let containers = Containers::new();
    let (id, rootfs, scratch) = (containers.id("a"), containers.rootfs(), containers.scratch().to_owned());
    fs::create_dir(scratch.join("there")).unwrap();
    fs::write(scratch.join("file"), "content").unwrap();
    let host = |path: &str| scratch.join(path).to_str().unwrap().to_owned();
    let (there, missing) = (format!("{}:/places/there", host("there")), format!("{}:/places/missing", host("missing")));
    let program = ["--rootfs", rootfs.to_str().unwrap(), "true"];
    containers.container(&[&["create", "--name", &id, "-v", &there, "-v", &missing][..], &program].concat()).ok();
    let cp = |from: &str, to: &str| containers.container(&["cp", from, to]);
    cp(&format!("{id}:/etc/passwd"), &host("out")).ok();
    cp(&host("file"), &format!("{id}:/tmp/file")).ok();
    assert!(!rootfs.join("places").exists() && !scratch.join("missing").exists());
    // Copied to, it is as after a start.
    cp(&host("file"), &format!("{id}:/places/missing/file")).ok();
    assert_eq!(text(&scratch.join("missing/file")), "content");
    assert!(!rootfs.join("places/there").exists());
    containers.container(&["rm", &id]).ok();
    containers.assert_nothing_left();
}
