//! `runx storage` without a registry: what is imported and exported, listed, mounted, and removed.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;
use std::process::Command;

use runx_tests::command::run;
use runx_tests::storage::{Layout, Storage, listing};
use runx_tests::user::{FURTHER, ID, OwnBundle};
use runx_tests::{image, needs_registry, needs_root, needs_user};

/// A small root filesystem.
fn rootfs(storage: &Storage) -> std::path::PathBuf {
    let dir = storage.scratch().join("tree");
    fs::create_dir_all(dir.join("bin")).unwrap();
    fs::copy("/bin/busybox", dir.join("bin/busybox")).unwrap();
    symlink("busybox", dir.join("bin/sh")).unwrap();
    fs::write(dir.join("file"), "content").unwrap();
    std::os::unix::fs::lchown(dir.join("file"), Some(123), Some(456)).unwrap();
    dir
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn all_forms_of_an_image_come_out_as_the_same_files() {
    needs_registry!();
    let storage = Storage::new();
    let layout = Layout::make(storage.scratch());
    let expected = layout.listing();
    let file = |name: &str| storage.scratch().join(name);
    let [oci, docker, gzip, zstd] = ["oci.tar", "docker.tar", "docker.tar.gz", "oci.tar.zst"].map(file);
    let copy = |to: String| run(Command::new("skopeo").args(["copy", "-q", &layout.name(), &to])).ok();
    copy(format!("oci-archive:{}", oci.display()));
    copy(format!("docker-archive:{}:team/saved:v3", docker.display()));
    run(Command::new("gzip").arg("--keep").arg(&docker)).ok();
    let sources = match run(Command::new("sh")
        .args(["-c", "command -v zstd >/dev/null && zstd -q \"$1\" -o \"$2\"", "sh"])
        .args([&oci, &zstd]))
    .code
    {
        0 => vec![layout.path(), &oci, &docker, &gzip, &zstd],
        _ => vec![layout.path(), &oci, &docker, &gzip],
    };
    for (number, source) in sources.into_iter().enumerate() {
        let name = format!("imported:{number}");
        storage.run(&["import", "--name", &name, text(source)]).ok();
        assert_eq!(storage.listing(&name), expected, "{}", source.display());
    }
    storage.run(&["import", text(&docker)]).ok();
    assert_eq!(storage.run(&["ls", "-q", "team/saved:v3"]).ok().stdout.lines().count(), 1, "docker's own name");
    storage.assert_clean();
}

#[test]
fn what_is_exported_has_the_same_digests() {
    needs_registry!();
    let (storage, other) = (Storage::new(), Storage::new());
    let layout = Layout::make(storage.scratch());
    storage.run(&["import", "--name", "team/tool:v1", text(layout.path())]).ok();
    let [archive, dir] = ["out.tar", "out"].map(|name| storage.scratch().join(name));
    storage.run(&["export", "team/tool:v1", text(&archive)]).ok();
    storage.run(&["export", "--format", "oci-dir", "--output", text(&dir), "tool:v1"]).fails(1, &["no image"]);
    storage.run(&["export", "--format", "oci-dir", "--output", text(&dir), "team/tool:v1"]).ok();
    let digest = |from: &str| {
        let said = run(Command::new("skopeo").args(["inspect", "--format", "{{.Digest}}", from])).ok();
        said.stdout.trim().to_owned()
    };
    let expected = digest(&layout.name());
    assert_eq!(digest(&format!("oci-archive:{}", archive.display())), expected);
    assert_eq!(digest(&format!("oci:{}:v1", dir.display())), expected);
    // It is what it was in another store, with its name.
    other.run(&["import", text(&archive)]).ok();
    let (here, there) = (storage.images(), other.images());
    assert_eq!((&here[0]["digest"], &here[0]["names"]), (&there[0]["digest"], &there[0]["names"]));
    // Nothing is overwritten, and nothing half-written stays.
    storage.run(&["export", "--format", "oci-dir", "-o", text(&dir), "team/tool:v1"]).fails(1, &["exists already"]);
    storage.run(&["export", "-o", "/proc/nowhere/x.tar", "team/tool:v1"]).fails(1, &["/proc/nowhere"]);
    let blob = storage.root().join("storage/blobs/sha256").join(&here[0]["layers"][0]["digest"].as_str().unwrap()[7..]);
    let mut damaged = fs::read(&blob).unwrap();
    damaged[100] ^= 1;
    fs::write(&blob, damaged).unwrap();
    let broken = storage.scratch().join("broken.tar");
    storage.run(&["export", "-o", text(&broken), "team/tool:v1"]).fails(1, &["is not complete in the store"]);
    assert!(!broken.exists());
}

#[test]
fn a_root_filesystem_becomes_an_image() {
    needs_root!();
    let storage = Storage::new();
    let tree = rootfs(&storage);
    let archive = storage.scratch().join("tree.tar");
    run(Command::new("tar").arg("-cf").arg(&archive).arg("-C").arg(&tree).arg(".")).ok();
    let change = ["--change", "CMD [\"sh\"]", "-c", "ENV A=b"];
    let import = |name: &str, source: &Path| {
        storage.run(&[&["import", "--name", name], &change[..], &[text(source)]].concat()).ok();
    };
    import("from-dir", &tree);
    import("from-tar", &archive);
    storage.run(&["import", text(&tree), "from-words", "-c", "CMD [\"sh\"]", "-c", "ENV A=b"]).ok();
    let expected = listing(&tree);
    for name in ["from-dir", "from-tar", "from-words"] {
        assert_eq!(storage.listing(name), expected, "{name}");
        let known: serde_json::Value = serde_json::from_str(&storage.run(&["inspect", name]).ok().stdout).unwrap();
        let run = &known[0]["configuration"]["config"];
        assert_eq!((&run["Cmd"][0], &run["Env"][0]), (&"sh".into(), &"A=b".into()));
    }
    storage
        .run(&["import", "--name", "x", "--change", "RUN rm -rf /", text(&tree)])
        .fails(1, &["RUN", "not supported"]);
    storage.run(&["import", "/nonexistent"]).fails(1, &["/nonexistent"]);
    storage.run(&["import", "--format", "docker", text(&archive)]).fails(1, &["no archive of docker"]);
    // Those that were made in the same second are the same image.
    let names: usize = storage.images().iter().map(|image| image["names"].as_array().unwrap().len()).sum();
    assert_eq!(names, 3);
    storage.assert_clean();
}

#[test]
fn a_hostile_archive_leaves_nothing() {
    needs_root!();
    let storage = Storage::new();
    let victim = storage.scratch().join("victim");
    fs::write(&victim, "untouched").unwrap();
    let before = storage.content();
    let mut archive = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.as_mut_bytes()[..12].copy_from_slice(b"../../victim");
    header.set_size(1);
    header.set_mode(0o644);
    header.set_cksum();
    archive.append(&header, &b"x"[..]).unwrap();
    let path = storage.scratch().join("hostile.tar");
    fs::write(&path, archive.into_inner().unwrap()).unwrap();
    storage.run(&["import", "--name", "hostile", text(&path)]).fails(1, &["refuse the entry", "../../victim"]);
    // One that becomes larger than it may.
    let zeros = storage.scratch().join("zeros");
    fs::create_dir(&zeros).unwrap();
    fs::File::create(zeros.join("zeros")).unwrap().set_len(8 << 20).unwrap();
    let bomb = storage.scratch().join("bomb.tar.gz");
    run(Command::new("tar").arg("-czf").arg(&bomb).arg("-C").arg(&zeros).arg(".")).ok();
    let few = ["import", "--name", "bomb", "--max-layer-size", "1m", text(&bomb)];
    storage.run(&few).fails(1, &["larger than", "--max-layer-size"]);
    assert_eq!(storage.content(), before);
    assert_eq!(fs::read_to_string(&victim).unwrap(), "untouched");
    storage.assert_clean();
    storage.run(&["import", "--name", "bomb", text(&bomb)]).ok();
}

#[test]
fn images_are_listed_named_and_removed() {
    needs_root!();
    let storage = Storage::new();
    let tree = rootfs(&storage);
    let import = |name: &str, label: &str| {
        fs::write(tree.join("file"), name).unwrap();
        storage.run(&["import", "--name", name, "-c", label, text(&tree)]).ok().stdout.trim().to_owned()
    };
    let first = import("team/first:v1", "LABEL kind=a");
    let second = import("second", "LABEL kind=b");
    storage.run(&["tag", "second", "localhost:5000/other:v2", "third"]).ok();
    let table = storage.run(&["ls"]).ok().stdout;
    let titles = table.lines().next().unwrap().split_ascii_whitespace().collect::<Vec<_>>();
    assert_eq!(titles, ["REPOSITORY", "TAG", "IMAGE", "ID", "CREATED", "SIZE"]);
    assert_eq!(table.lines().count(), 5, "{table}");
    let ids = |args: &[&str]| storage.run(&[&["ls", "-q", "--no-trunc"], args].concat()).ok().stdout;
    assert_eq!(ids(&["--filter", "label=kind=a"]), format!("{first}\n"));
    assert_eq!(ids(&["--filter", "reference=*other*"]), format!("{second}\n"));
    assert_eq!(ids(&["--filter", "dangling=true"]), "");
    assert_eq!(ids(&["--filter", "label=kind", "--filter", "platform=linux/nothing"]), "");
    assert_eq!(storage.run(&["ls", "-q", "second"]).ok().stdout.trim(), &second[7..19]);
    // A name alone, then the last one, then by the id.
    storage.run(&["rm", "third"]).ok();
    assert!(storage.run(&["rm", &second]).fails(1, &["ambiguous"]).stdout.is_empty());
    storage.run(&["rm", "nothing", "second", "other:v2"]).fails(1, &["nothing"]);
    assert_eq!(ids(&[]), format!("{first}\n"));
    // Another image takes the name: the one before has none, and goes.
    let third = import("team/first:v1", "LABEL kind=c");
    assert_eq!(ids(&["--filter", "dangling=true"]), format!("{first}\n"));
    storage.run(&["prune"]).ok();
    assert_eq!(ids(&[]), format!("{third}\n"));
    let df: serde_json::Value = serde_json::from_str(&storage.run(&["df", "--format", "json"]).ok().stdout).unwrap();
    assert_eq!(df["reclaimable"], 0, "{df}");
    storage.run(&["rm", &third[7..15]]).ok();
    assert!(storage.content().is_empty(), "{:?}", storage.content());
}

#[test]
fn an_image_is_mounted_read_only_and_stays_as_long() {
    needs_root!();
    let storage = Storage::new();
    storage.run(&["import", "--name", "tool", text(&rootfs(&storage))]).ok();
    let target = storage.scratch().join("target");
    fs::create_dir(&target).unwrap();
    let mount = ["mount", "--source", "tool", "--target", text(&target), "--options", "nosuid"];
    assert_eq!(storage.run(&mount).ok().stdout.trim(), text(&target));
    assert_eq!(fs::read_to_string(target.join("file")).unwrap(), "content");
    assert!(fs::write(target.join("file"), "x").unwrap_err().kind() == std::io::ErrorKind::ReadOnlyFilesystem);
    storage.run(&mount).fails(1, &["already", "umount"]);
    storage.run(&["rm", "tool"]).fails(1, &["in use"]);
    storage.run(&["prune", "--all"]).ok();
    assert_eq!(storage.images().len(), 1);
    storage.run(&["umount", "--target", text(&target)]).ok();
    storage.run(&["umount", text(&target)]).fails(1, &["nothing is mounted"]);
    // A writable one is the mount's own.
    storage.run(&["mount", "tool", text(&target), "-o", "rw"]).ok();
    fs::write(target.join("file"), "changed").unwrap();
    storage.run(&["umount", text(&target)]).ok();
    storage.run(&["mount", "tool", text(&target)]).ok();
    assert_eq!(fs::read_to_string(target.join("file")).unwrap(), "content");
    storage.run(&["umount", text(&target)]).ok();
    storage.run(&["mount", "nothing", text(&target)]).fails(1, &["no image"]);
    storage.run(&["rm", "tool"]).ok();
    assert!(fs::read_dir(storage.root().join("mounts")).unwrap().next().is_none());
    storage.assert_clean();
}

#[test]
fn directories_and_filesystems_are_mounted_with_options() {
    needs_root!();
    let storage = Storage::new();
    let dir = |name: &str| {
        let path = storage.scratch().join(name);
        fs::create_dir(&path).unwrap();
        path
    };
    let [source, target, lower, upper, work] = ["source", "target", "lower", "upper", "work"].map(dir);
    fs::write(source.join("file"), "x").unwrap();
    fs::write(lower.join("below"), "x").unwrap();
    storage.run(&["mount", "--source", text(&source), "--target", text(&target), "--options", "bind,ro"]).ok();
    assert!(target.join("file").exists());
    assert!(fs::write(target.join("new"), "x").is_err());
    storage.run(&["umount", "--target", text(&target)]).ok();
    storage.run(&["mount", "-t", "tmpfs", "--target", text(&target), "-o", "size=64k,mode=700,noexec"]).ok();
    assert_eq!(fs::metadata(&target).unwrap().mode() & 0o777, 0o700);
    assert!(fs::write(target.join("large"), vec![0; 100_000]).is_err());
    storage.run(&["umount", text(&target)]).ok();
    let layers = format!("lowerdir={},upperdir={},workdir={}", text(&lower), text(&upper), text(&work));
    storage.run(&["mount", "--source", "overlay", "--target", text(&target), "--options", &layers]).ok();
    fs::write(target.join("above"), "x").unwrap();
    assert!(target.join("below").exists() && upper.join("above").exists());
    storage.run(&["umount", text(&target)]).ok();
    storage.run(&["mount", text(&source), text(&target), "-o", "size=1k"]).fails(1, &["size", "no meaning"]);
    storage.run(&["mount", "-t", "nofs", "x", text(&target)]).fails(1, &["nofs"]);
    storage.run(&["mount", text(&source), "/nonexistent"]).fails(1, &["/nonexistent"]);
    storage.run(&["mount", text(&source)]).fails(1, &["target"]);
    storage.assert_clean();
}

#[test]
fn a_root_filesystem_for_a_container_is_made_and_removed() {
    needs_registry!();
    let (storage, registry) = (Storage::new(), runx_tests::registry::Registry::plain());
    let tree = rootfs(&storage);
    storage.run(&["import", "--name", "tool", text(&tree)]).ok();
    let archive = storage.scratch().join("tool.tar");
    storage.run(&["export", "-o", text(&archive), "tool"]).ok();
    registry.push(&format!("oci-archive:{}", archive.display()), "tool:latest", &[]);
    let name = format!("{}/tool", registry.address());
    let id = storage.scratch().file_name().unwrap().to_str().unwrap();
    let made = storage.run(&["pull", "--image", &name, "--container-id", id]).ok();
    let rootfs = Path::new(made.stdout.trim());
    assert_eq!(listing(rootfs), listing(&tree));
    storage.run(&["pull", "--image", &name, "--container-id", id]).fails(1, &["already", "cleanup"]);
    storage.run(&["rm", "--force", &name]).ok();
    assert_eq!(listing(rootfs), listing(&tree), "the files stay as long as they are needed");
    storage
        .run(&["pull", "--image", &format!("{name}:nothing"), "--container-id", "other"])
        .fails(1, &["has no image"]);
    storage.run(&["cleanup", "--container-id", id]).ok();
    assert!(!rootfs.exists());
    storage.run(&["cleanup", "--container-id", id]).fails(1, &["no root filesystem"]);
    storage.run(&["cleanup", "../x"]).fails(1, &["invalid container id"]);
    assert!(fs::read_dir(storage.root().join("rootfs")).unwrap().next().is_none());
    storage.assert_clean();
}

#[test]
fn a_wasm_artifact_is_stored_and_is_no_root_filesystem() {
    needs_root!();
    let storage = Storage::new();
    let module = b"\0asm\x01\0\0\0";
    let archive = storage.scratch().join("module.tar");
    let kinds = ("application/vnd.wasm.config.v0+json", "application/wasm");
    image::write_artifact(&archive, "localhost:5000/module:v1", module, kinds);
    storage.run(&["import", text(&archive)]).ok();
    let stored = &storage.images()[0];
    assert_eq!((&stored["module"], &stored["size"]), (&true.into(), &8.into()));
    assert_eq!(stored["platform"], "wasip1/wasm");
    let target = storage.scratch().join("target");
    fs::create_dir(&target).unwrap();
    storage.run(&["mount", "module:v1", text(&target)]).fails(1, &["WebAssembly", "runx wasm run"]);
    image::write_artifact(&archive, "chart:v1", module, ("application/vnd.example.config", "application/x"));
    storage.run(&["import", text(&archive)]).fails(1, &["neither a container's image nor a WASM module"]);
    // A module's file becomes the same artifact.
    let file = storage.scratch().join("module.wasm");
    fs::write(&file, module).unwrap();
    storage.run(&["import", text(&file), "plain"]).ok();
    let known: serde_json::Value = serde_json::from_str(&storage.run(&["inspect", "plain"]).ok().stdout).unwrap();
    assert_eq!((&known[0]["platform"], &known[0]["layers"]), (&stored["platform"], &stored["layers"]));
    assert_eq!(known[0]["configuration"]["layerDigests"][0], stored["layers"][0]["digest"]);
    fs::write(&file, b"\0asm\x0d\0\x01\0").unwrap();
    storage.run(&["import", text(&file), "component"]).ok();
    assert_eq!(storage.run(&["ls", "-q", "--filter", "platform=wasip2/wasm"]).ok().stdout.lines().count(), 1);
    fs::write(&file, b"\0asm\x07\0\0\0").unwrap();
    storage.run(&["import", text(&file), "unknown"]).fails(1, &["version"]);
    storage.run(&["rm", "module:v1", "plain", "component"]).ok();
    assert!(storage.content().is_empty(), "{:?}", storage.content());
    storage.assert_clean();
}

#[test]
fn an_ordinary_user_has_a_store_of_his_own() {
    needs_user!(obstacle_to_further_ids);
    let user = OwnBundle::script("true");
    let storage = Storage::new();
    let tree = rootfs(&storage);
    let archive = user.scratch().join("tree.tar");
    run(Command::new("tar").arg("-cf").arg(&archive).arg("-C").arg(&tree).arg(".")).ok();
    let store = user.scratch().join("home/.local/share/runx");
    let storage = |args: &[&str]| run(&mut user.command_when_known(&[&["storage"], args].concat()));
    storage(&["import", "--name", "tool", text(&archive)]).ok();
    let layers = store.join("storage/layers");
    let layer = fs::read_dir(&layers).unwrap().next().unwrap().unwrap().path().join("diff");
    let (mine, others) = (fs::metadata(layer.join("bin/busybox")).unwrap(), fs::metadata(layer.join("file")).unwrap());
    assert_eq!((mine.uid(), mine.gid()), (ID, ID), "root in the image is he");
    assert_eq!((others.uid(), others.gid()), (FURTHER.0 + 122, FURTHER.0 + 455), "others are his further ids");
    let out = user.scratch().join("home/out.tar");
    storage(&["export", "-o", text(&out), "tool"]).ok();
    storage(&["ls"]).ok();
    let target = text(user.scratch());
    storage(&["mount", "tool", target]).fails(1, &["ordinary user"]);
    storage(&["rm", "tool"]).ok();
    assert!(fs::read_dir(&layers).unwrap().next().is_none());
    // Without further ids, files of others cannot be had, and nothing stays.
    let alone = run(&mut user.command(&["storage", "import", "--name", "tool", text(&archive)]));
    alone.fails(1, &["/etc/subuid"]);
    assert!(fs::read_dir(&layers).unwrap().next().is_none());
    user.assert_nothing_left();
}
