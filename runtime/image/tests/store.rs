//! The store as its users see it: images come complete or not at all, stay while they are needed, and go completely.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use runx_image::layer::{Form, Layer};
use runx_image::manifest::{Descriptor, media_type};
use runx_image::rootfs::{self, Kind, Options};
use runx_image::{Digest, Error, Image, Ingest, LayerRecord, Prune, Store};
use rustix::fs::{CWD, FileType, Mode, XattrFlags, lsetxattr, mknodat};

fn is_root() -> bool {
    let root = fs::metadata("/proc/self").unwrap().uid() == 0;
    if !root {
        println!("SKIPPED: only root can make whiteouts that are trusted");
    }
    root
}

fn temporary() -> tempfile::TempDir {
    // Not /tmp, which may be a filesystem that overlay cannot write to.
    tempfile::tempdir_in("/var/tmp").unwrap()
}

fn descriptor(kind: &str, digest: Digest, size: usize) -> Descriptor {
    Descriptor { media_type: kind.into(), digest, size: size as u64, platform: None, annotations: BTreeMap::new() }
}

/// Stores a layer whose tree `fill` makes, and whose blob is its name.
fn layer(ingest: &Ingest, name: &str, fill: impl FnOnce(&Path)) -> LayerRecord {
    let diff_id = ingest.put(name.as_bytes(), None, "layer").unwrap();
    let place = ingest.place().unwrap();
    fill(&place.diff());
    let made = Layer {
        diff_id: diff_id.clone(),
        chain_id: None,
        size: 10,
        entries: 1,
        form: Form::current(),
        boot: String::new(),
    };
    let tree = Some(ingest.publish(place, made).unwrap());
    LayerRecord { descriptor: descriptor(media_type::OCI_LAYER, diff_id, name.len()), tree }
}

fn image(ingest: &Ingest, name: &str, layers: Vec<LayerRecord>) -> Image {
    let diff_ids: Vec<String> = layers.iter().map(|layer| layer.descriptor.digest.to_string()).collect();
    let config = serde_json::json!({"os": "linux", "architecture": "amd64", "config": {"Cmd": ["sh"]},
        "rootfs": {"type": "layers", "diff_ids": diff_ids}, "author": name});
    let config = serde_json::to_vec(&config).unwrap();
    let id = ingest.put(&config, None, "configuration").unwrap();
    let digest = ingest.put(format!("manifest of {name}").as_bytes(), None, "manifest").unwrap();
    Image {
        config: descriptor(media_type::OCI_CONFIG, id.clone(), config.len()),
        id,
        digest,
        media_type: media_type::OCI_MANIFEST.into(),
        names: vec![format!("{name}:latest")],
        repo_digests: Vec::new(),
        short: Vec::new(),
        created: None,
        stored: 0,
        size: 10,
        platform: "linux/amd64".into(),
        layers,
    }
}

/// Two layers, the upper of which changes, hides, removes and adds.
fn two_layers(ingest: &Ingest) -> Vec<LayerRecord> {
    let lower = layer(ingest, "lower", |dir| {
        fs::create_dir_all(dir.join("etc/conf.d")).unwrap();
        fs::create_dir_all(dir.join("opaque/below")).unwrap();
        fs::write(dir.join("etc/removed"), "x").unwrap();
        fs::write(dir.join("etc/kept"), "kept").unwrap();
        fs::write(dir.join("etc/conf.d/changed"), "old").unwrap();
        fs::write(dir.join("file-then-dir"), "x").unwrap();
        fs::create_dir(dir.join("dir-then-file")).unwrap();
        fs::write(dir.join("dir-then-file/x"), "x").unwrap();
        fs::hard_link(dir.join("etc/kept"), dir.join("etc/kept-too")).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", dir.join("outside")).unwrap();
        lsetxattr(dir.join("etc/kept"), "user.test", b"value", XattrFlags::empty()).unwrap();
    });
    let upper = layer(ingest, "upper", |dir| {
        fs::create_dir_all(dir.join("etc/conf.d")).unwrap();
        fs::set_permissions(dir.join("etc"), fs::Permissions::from_mode(0o711)).unwrap();
        std::os::unix::fs::lchown(dir.join("etc"), Some(12), Some(34)).unwrap();
        mknodat(CWD, dir.join("etc/removed"), FileType::CharacterDevice, Mode::empty(), 0).unwrap();
        fs::write(dir.join("etc/conf.d/changed"), "new").unwrap();
        fs::set_permissions(dir.join("etc/conf.d/changed"), fs::Permissions::from_mode(0o4755)).unwrap();
        fs::create_dir(dir.join("opaque")).unwrap();
        lsetxattr(dir.join("opaque"), Form::current().opaque(), b"y", XattrFlags::empty()).unwrap();
        fs::write(dir.join("opaque/above"), "x").unwrap();
        fs::create_dir(dir.join("file-then-dir")).unwrap();
        fs::write(dir.join("dir-then-file"), "x").unwrap();
        mknodat(CWD, dir.join("pipe"), FileType::Fifo, Mode::RUSR, 0).unwrap();
        mknodat(CWD, dir.join("null"), FileType::CharacterDevice, Mode::RUSR, rustix::fs::makedev(1, 3)).unwrap();
        let sparse = fs::File::create(dir.join("sparse")).unwrap();
        sparse.set_len(1 << 24).unwrap();
    });
    vec![lower, upper]
}

/// Everything below a directory: path, mode, owner, device, number of names, time of the last change, content.
fn listing(root: &Path) -> Vec<String> {
    fn below(root: &Path, dir: &Path, list: &mut Vec<String>) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let m = fs::symlink_metadata(&path).unwrap();
            let content = if m.is_file() {
                Digest::of(&fs::read(&path).unwrap()).to_string()
            } else {
                fs::read_link(&path).map(|to| to.display().to_string()).unwrap_or_default()
            };
            let xattr = rustix::fs::lgetxattr(&path, "user.test", &mut [0_u8; 16][..]).ok();
            let links = if m.is_dir() { 0 } else { m.nlink() };
            list.push(format!(
                "{} {:o} {}:{} {} {links} {}.{} {xattr:?} {content}",
                path.strip_prefix(root).unwrap().display(),
                m.mode(),
                m.uid(),
                m.gid(),
                m.rdev(),
                m.mtime(),
                m.mtime_nsec(),
            ));
            if m.is_dir() {
                below(root, &path, list);
            }
        }
    }
    let mut list = Vec::new();
    below(root, root, &mut list);
    list.sort();
    list
}

/// All paths in a store, but those of its locks.
fn paths(store: &Store) -> Vec<PathBuf> {
    fn below(dir: &Path, list: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if fs::symlink_metadata(&path).unwrap().is_dir() {
                below(&path, list);
            }
            list.push(path);
        }
    }
    let mut list = Vec::new();
    below(store.root(), &mut list);
    list.retain(|path| !matches!(path.file_name().unwrap().to_str(), Some("lock" | "activity" | "images.json")));
    list.sort();
    list
}

#[test]
fn a_copy_is_what_overlay_shows() {
    if !is_root() {
        return;
    }
    let dir = temporary();
    let store = Store::open(dir.path()).unwrap();
    let ingest = store.ingest().unwrap();
    let stored = ingest.commit(image(&ingest, "two", two_layers(&ingest))).unwrap();
    drop(ingest);
    let [copied, laid] = [Kind::Copy, Kind::Overlay].map(|kind| {
        let container = dir.path().join(format!("{kind:?}"));
        store.prepare(&stored, &container, &Options { kind }).unwrap();
        let rootfs = rootfs::mount(&container).unwrap();
        let again = rootfs::mount(&container).unwrap();
        assert_eq!(rootfs, again);
        let list = listing(&rootfs);
        fs::write(rootfs.join("etc/kept"), "changed here").unwrap();
        rootfs::remove(&container).unwrap();
        rootfs::remove(&container).unwrap();
        assert_eq!(fs::read_dir(&container).unwrap().count(), 0);
        list
    });
    assert_eq!(copied, laid);
    assert!(copied.iter().any(|line| line.starts_with("opaque/above ")));
    assert!(!copied.iter().any(|line| line.starts_with("opaque/below ") || line.starts_with("etc/removed ")));
    assert!(copied.iter().any(|line| line.starts_with("etc/conf.d/changed 104755 ")));
}

#[test]
fn where_overlay_is_not_possible_a_copy_takes_its_place() {
    if !is_root() {
        return;
    }
    let dir = temporary();
    let store = Store::open(dir.path()).unwrap();
    let ingest = store.ingest().unwrap();
    let stored = ingest.commit(image(&ingest, "two", two_layers(&ingest))).unwrap();
    drop(ingest);
    let outer = dir.path().join("outer");
    store.prepare(&stored, &outer, &Options::default()).unwrap();
    let list = listing(&rootfs::mount(&outer).unwrap());
    assert_eq!(rootfs::prepared(&outer).unwrap(), Some(Kind::Auto));
    // What lies on overlay can be no writable layer of another one.
    let inner = outer.join("rootfs/inner");
    fs::create_dir(&inner).unwrap();
    let refused = store.prepare(&stored, &inner, &Options { kind: Kind::Overlay });
    assert!(matches!(refused, Err(Error::NoOverlay { .. })), "{refused:?}");
    rootfs::remove(&inner).unwrap();
    store.prepare(&stored, &inner, &Options::default()).unwrap();
    // A copy that was begun and killed.
    fs::write(inner.join("rootfs/half"), "").unwrap();
    let copied = rootfs::mount(&inner).unwrap();
    assert_eq!((rootfs::prepared(&inner).unwrap(), listing(&copied)), (Some(Kind::Copy), list));
    // What is written stays.
    fs::write(copied.join("etc/kept"), "changed here").unwrap();
    rootfs::unmount(&inner).unwrap();
    assert_eq!(fs::read_to_string(rootfs::mount(&inner).unwrap().join("etc/kept")).unwrap(), "changed here");
    rootfs::remove(&inner).unwrap();
    assert_eq!(fs::read_dir(&inner).unwrap().count(), 0);
    rootfs::remove(&outer).unwrap();
}

#[test]
fn a_first_mount_that_fails_for_a_while_makes_no_copy_for_good() {
    let dir = temporary();
    let store = Store::open(dir.path()).unwrap();
    let ingest = store.ingest().unwrap();
    let stored = ingest.commit(image(&ingest, "two", two_layers(&ingest))).unwrap();
    drop(ingest);
    let container = dir.path().join("container");
    store.prepare(&stored, &container, &Options::default()).unwrap();
    // As on a disk that comes and goes.
    fs::rename(container.join("work"), container.join("elsewhere")).unwrap();
    rootfs::mount(&container).unwrap_err();
    assert_eq!(rootfs::prepared(&container).unwrap(), Some(Kind::Auto));
    fs::rename(container.join("elsewhere"), container.join("work")).unwrap();
    rootfs::mount(&container).unwrap();
    rootfs::remove(&container).unwrap();
}

#[test]
fn an_image_stays_as_long_as_a_container_needs_it_and_then_goes_completely() {
    if !is_root() {
        return;
    }
    let dir = temporary();
    let store = Store::open(dir.path()).unwrap();
    let empty = paths(&store);
    let ingest = store.ingest().unwrap();
    let stored = ingest.commit(image(&ingest, "two", two_layers(&ingest))).unwrap();
    drop(ingest);
    let container = dir.path().join("container");
    store.prepare(&stored, &container, &Options::default()).unwrap();
    let rootfs = rootfs::mount(&container).unwrap();
    assert!(matches!(store.remove("two", false), Err(Error::InUse { users, .. }) if users.len() == 1));
    assert!(store.prune(Prune::Unused, |_| true).unwrap().images.is_empty());
    // By force the image goes, and what the container needs of it stays.
    assert_eq!(store.remove("two", true).unwrap().images.len(), 1);
    assert!(store.find("two").unwrap().is_none());
    assert_eq!(fs::read_to_string(rootfs.join("etc/kept")).unwrap(), "kept");
    rootfs::unmount(&container).unwrap();
    assert!(rootfs::mount(&container).is_ok());
    rootfs::remove(&container).unwrap();
    assert!(matches!(rootfs::mount(&container), Err(Error::NotPrepared(_))));
    store.prune(Prune::Unnamed, |_| true).unwrap();
    assert_eq!(paths(&store), empty);
}

#[test]
fn a_container_directory_that_somebody_removed_holds_nothing() {
    if !is_root() {
        return;
    }
    let dir = temporary();
    let store = Store::open(dir.path()).unwrap();
    let empty = paths(&store);
    let ingest = store.ingest().unwrap();
    let stored = ingest.commit(image(&ingest, "two", two_layers(&ingest))).unwrap();
    drop(ingest);
    let container = dir.path().join("container");
    store.prepare(&stored, &container, &Options { kind: Kind::Copy }).unwrap();
    fs::remove_dir_all(&container).unwrap();
    store.remove("two", false).unwrap();
    assert_eq!(paths(&store), empty);
}

#[test]
fn what_was_not_committed_is_taken_away_and_what_was_killed_too() {
    if !is_root() {
        return;
    }
    let dir = temporary();
    let store = Store::open(dir.path()).unwrap();
    let empty = paths(&store);
    let ingest = store.ingest().unwrap();
    two_layers(&ingest);
    drop(ingest);
    assert_eq!(paths(&store), empty);
    // As a kill leaves it.
    fs::create_dir_all(store.root().join("ingest/tree-1-1-1/diff/x")).unwrap();
    fs::write(store.root().join("ingest/put-1-1-1"), "x").unwrap();
    fs::write(store.root().join(format!("ingest/{}.lock", Digest::of(b"x").hex())), "").unwrap();
    drop(store.ingest().unwrap());
    assert_eq!(paths(&store), empty);
}

#[test]
fn a_blob_goes_on_where_a_kill_stopped_it_and_is_never_wrong() {
    let dir = temporary();
    let store = Store::open(dir.path()).unwrap();
    let ingest = store.ingest().unwrap();
    let blob = descriptor("x", Digest::of(b"complete content"), 16);
    let partial = store.root().join(format!("ingest/{}.partial", blob.digest.hex()));
    fs::write(&partial, "complete").unwrap();
    let held = ingest.take(&blob.digest, || ()).unwrap();
    let mut seen = Vec::new();
    let mut writer = ingest.blob(&held, &blob, |chunk| seen.extend_from_slice(chunk)).unwrap();
    assert_eq!((writer.written(), seen.as_slice()), (8, &b"complete"[..]));
    writer.write(b" content").unwrap();
    assert!(writer.write(b"!").is_err());
    writer.commit().unwrap();
    assert!(ingest.has_blob(&blob.digest, Some(16)).unwrap());
    // What is wrong is refused, and nothing of it stays.
    let other = descriptor("x", Digest::of(b"expected"), 8);
    for content in [&b"surprise"[..], b"short", b""] {
        let mut writer = ingest.blob(&held, &other, |_| ()).unwrap();
        writer.write(content).unwrap();
        assert!(writer.commit().is_err());
        assert!(!ingest.has_blob(&other.digest, Some(8)).unwrap());
    }
    assert!(!partial.exists());
    // A damaged one that no image has yet is found out.
    fs::write(store.blob_path(&blob.digest), "complete conten?").unwrap();
    assert!(!ingest.has_blob(&blob.digest, Some(16)).unwrap());
    assert!(ingest.put(b"content", Some(&other.digest), "x").is_err());
    drop(held);
    drop(ingest);
    assert_eq!(fs::read_dir(store.root().join("blobs/sha256")).unwrap().count(), 0);
}

#[test]
fn a_layer_of_an_earlier_boot_is_not_used_until_an_image_had_it() {
    let dir = temporary();
    let store = Store::open(dir.path()).unwrap();
    let ingest = store.ingest().unwrap();
    let record = layer(&ingest, "one", |dir| fs::write(dir.join("file"), "x").unwrap());
    let key = record.tree.clone().unwrap();
    assert!(ingest.layer(&key).unwrap().is_some());
    let path = store.root().join("layers").join(key.hex()).join("layer.json");
    let mut known: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    known["boot"] = "another".into();
    fs::write(&path, known.to_string()).unwrap();
    assert!(ingest.layer(&key).unwrap().is_none());
    // It is made again, in its place.
    layer(&ingest, "one", |dir| fs::write(dir.join("file"), "again").unwrap());
    assert!(ingest.layer(&key).unwrap().is_some());
    let file = store.root().join("layers").join(key.hex()).join("diff/file");
    assert_eq!(fs::read_to_string(file).unwrap(), "again");
    ingest.commit(image(&ingest, "one", vec![record])).unwrap();
    fs::write(&path, known.to_string()).unwrap();
    assert!(ingest.layer(&key).unwrap().is_some());
}

#[test]
fn nothing_is_removed_while_somebody_fills_the_store() {
    let dir = temporary();
    let store = Store::open(dir.path()).unwrap();
    let ingest = store.ingest().unwrap();
    let first = layer(&ingest, "first", |_| ());
    let other = store.ingest().unwrap();
    let second = layer(&other, "second", |_| ());
    // The other gives up, and somebody prunes.
    drop(other);
    assert_eq!(store.prune(Prune::Unused, |_| true).unwrap().bytes, 0);
    let stored = ingest.commit(image(&ingest, "both", vec![first, second])).unwrap();
    drop(ingest);
    assert_eq!(store.layers(&stored).unwrap().len(), 2);
    assert!(!store.root().join("garbage").exists());
    assert_eq!(store.usage().unwrap().reclaimable, 0);
}

#[test]
fn who_gives_up_waits_for_nobody_and_keeps_no_part_of_a_blob() {
    let dir = temporary();
    let store = Store::open(dir.path()).unwrap();
    let (ingest, other) = (store.ingest().unwrap(), store.ingest().unwrap());
    let blob = |text: &str| descriptor(media_type::OCI_LAYER, Digest::of(text.as_bytes()), text.len());
    let (mine, others) = (blob("mine"), blob("others"));
    let _held = other.take(&others.digest, || ()).unwrap();
    let held = ingest.take(&mine.digest, || ()).unwrap();
    let mut writer = ingest.blob(&held, &mine, |_| ()).unwrap();
    writer.write(b"mi").unwrap();
    let part = store.root().join(format!("ingest/{}.partial", mine.digest.hex()));
    assert!(part.exists());
    let waited = ingest.take(&others.digest, || ingest.give_up());
    assert!(matches!(waited, Err(Error::Interrupted(_))), "{waited:?}");
    drop(writer);
    assert!(!part.exists());
}

#[test]
fn many_at_once_bring_each_blob_once() {
    let dir = temporary();
    let store = Store::open(dir.path()).unwrap();
    let brought = AtomicU32::new(0);
    thread::scope(|scope| {
        for number in 0..8 {
            let (store, brought) = (&store, &brought);
            scope.spawn(move || {
                let ingest = store.ingest().unwrap();
                let mut layers = Vec::new();
                for name in ["a", "b", "c"] {
                    let blob = descriptor("x", Digest::of(name.as_bytes()), 1);
                    let held = ingest.take(&blob.digest, || ()).unwrap();
                    if !ingest.has_blob(&blob.digest, Some(1)).unwrap() {
                        let mut writer = ingest.blob(&held, &blob, |_| ()).unwrap();
                        writer.write(name.as_bytes()).unwrap();
                        thread::yield_now();
                        writer.commit().unwrap();
                        brought.fetch_add(1, Ordering::SeqCst);
                    }
                    drop(held);
                    layers.push(layer(&ingest, name, |_| ()));
                }
                ingest.commit(image(&ingest, &format!("image{number}"), layers)).unwrap();
            });
        }
    });
    assert_eq!(brought.load(Ordering::SeqCst), 3);
    assert_eq!(store.images().unwrap().len(), 8);
    assert_eq!(fs::read_dir(store.root().join("ingest")).unwrap().count(), 0);
}

#[test]
fn an_image_with_several_names_loses_one_at_a_time() {
    let dir = temporary();
    let store = Store::open(dir.path()).unwrap();
    let ingest = store.ingest().unwrap();
    let stored = ingest.commit(image(&ingest, "one", vec![layer(&ingest, "one", |_| ())])).unwrap();
    drop(ingest);
    store.tag(&stored, "two:v2").unwrap();
    assert!(store.tag(&stored, "Not A Name").is_err());
    let removed = store.remove("one", false).unwrap();
    assert_eq!((removed.untagged, removed.images.len()), (vec!["one:latest".to_owned()], 0));
    store.tag(&stored, "three").unwrap();
    assert!(matches!(store.remove(stored.id.as_str(), false), Err(Error::Ambiguous { .. })));
    assert_eq!(store.remove(&stored.id.hex()[..12], true).unwrap().images.len(), 1);
    assert!(matches!(store.remove("two:v2", false), Err(Error::NotFound(_))));
}

#[test]
fn a_module_is_found_as_an_artifact_and_as_an_entrypoint() {
    let dir = temporary();
    let store = Store::open(dir.path()).unwrap();
    let ingest = store.ingest().unwrap();
    let digest = ingest.put(b"\0asm", None, "module").unwrap();
    let module = LayerRecord { descriptor: descriptor(media_type::WASM, digest.clone(), 4), tree: None };
    let artifact = ingest.commit(image(&ingest, "artifact", vec![module])).unwrap();
    assert!(artifact.is_module());
    assert_eq!(store.module(&artifact).unwrap(), Some(store.blob_path(&digest)));
    let container = dir.path().join("container");
    assert!(matches!(store.prepare(&artifact, &container, &Options::default()), Err(Error::NoRootfs(_))));
    assert_eq!(fs::read_dir(&container).unwrap().count(), 0);
    assert_eq!(fs::read_dir(store.root().join("leases")).unwrap().count(), 0);
    let tree = layer(&ingest, "tree", |dir| {
        fs::create_dir(dir.join("app")).unwrap();
        fs::write(dir.join("app/main.wasm"), "\0asm").unwrap();
        std::os::unix::fs::symlink("/etc/passwd", dir.join("link.wasm")).unwrap();
    });
    for (entry, found) in
        [("/app/main.wasm", true), ("main.wasm", true), ("/link.wasm", false), ("../app/main.wasm", false)]
    {
        let mut image = image(&ingest, "tree", vec![tree.clone()]);
        let config = serde_json::json!({"config": {"Entrypoint": [entry], "WorkingDir": "/app"}});
        image.config.digest = ingest.put(config.to_string().as_bytes(), None, "configuration").unwrap();
        assert_eq!(store.module(&image).unwrap().is_some(), found, "{entry}");
    }
}
