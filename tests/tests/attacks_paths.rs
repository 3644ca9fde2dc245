//! Attacks by names: links, races and mounts that lead out of a container's root filesystem, or to the kernel's files.

use std::ffi::CString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use runx_tests::attack::{DOORS, Target, content};
use runx_tests::{needs_root, repeats};
use serde_json::{Value, json};

/// Exchanges two names for as long as it lives.
struct Racer {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<u64>>,
}

impl Racer {
    fn start(one: &Path, other: &Path) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let names = [one, other].map(|path| CString::new(path.as_os_str().as_bytes()).unwrap());
        let seen = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut rounds = 0;
            while !seen.load(Ordering::Relaxed) {
                let exchange = libc::RENAME_EXCHANGE;
                // SAFETY: both names are NUL-terminated.
                unsafe {
                    libc::renameat2(libc::AT_FDCWD, names[0].as_ptr(), libc::AT_FDCWD, names[1].as_ptr(), exchange);
                }
                rounds += 1;
            }
            rounds
        });
        Self { stop, thread: Some(thread) }
    }

    fn end(mut self) {
        self.stop.store(true, Ordering::Relaxed);
        assert!(self.thread.take().unwrap().join().unwrap() > 100, "it did not race");
    }
}

impl Drop for Racer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn without_dev(target: &mut Target) {
    let mounts = target.bundle.config["mounts"].as_array_mut().unwrap();
    mounts.retain(|mount| !mount["destination"].as_str().unwrap().starts_with("/dev"));
}

fn empty(directory: &Path) {
    assert_eq!(content(directory), Vec::<String>::new());
}

// CVE-2019-18837
#[test]
fn mount_points_behind_links_are_made_inside() {
    needs_root!();
    for door in DOORS {
        let mut target = Target::script(door, "true");
        let canary = target.canary();
        let rootfs = target.bundle.rootfs();
        fs::remove_dir_all(rootfs.join("tmp")).unwrap();
        symlink(&canary, rootfs.join("tmp")).unwrap();
        symlink(format!("../../../../../..{}", canary.display()), rootfs.join("up")).unwrap();
        for destination in ["/tmp/a", "/up/b/c", "/tmp/../up/d"] {
            target.bundle.add_mount(json!({"destination": destination, "type": "tmpfs", "source": "x"}));
        }
        target.run();
        empty(&canary);
        target.end();
    }
}

// CVE-2019-16884, CVE-2025-52881
#[test]
fn mounts_inside_of_proc_are_refused() {
    needs_root!();
    for door in DOORS {
        for destination in ["/proc/self/attr", "/proc/sys", "/proc/1/../self/attr", "//proc/./sys/net"] {
            let mut target = Target::script(door, "true");
            target.bundle.add_mount(json!({"destination": destination, "type": "tmpfs", "source": "x"}));
            target.run().refused(&["/proc"]);
            target.end();
        }
        // By way of a link of the image's.
        let mut target = Target::script(door, "true");
        symlink("/proc/sys", target.bundle.rootfs().join("link")).unwrap();
        target.bundle.add_mount(json!({"destination": "/link/net", "type": "tmpfs", "source": "x"}));
        target.run().refused(&["/link/net"]);
        target.end();
    }
}

// CVE-2019-19921, CVE-2023-27561, CVE-2023-28642, CVE-2025-54867
#[test]
fn proc_and_sys_behind_links_are_refused() {
    needs_root!();
    for door in DOORS {
        for name in ["proc", "sys"] {
            let mut target = Target::script(door, "true");
            let canary = target.canary();
            let rootfs = target.bundle.rootfs();
            fs::remove_dir(rootfs.join(name)).unwrap();
            symlink("/tmp", rootfs.join(name)).unwrap();
            target.run().refused(&["must be mounted on ordinary directory"]);
            fs::remove_file(rootfs.join(name)).unwrap();
            symlink(&canary, rootfs.join(name)).unwrap();
            target.run().refused(&["must be mounted on ordinary directory"]);
            empty(&canary);
            target.end();
        }
    }
}

// CVE-2021-30465, CVE-2024-45310
#[test]
fn links_that_race_in_a_shared_volume_lead_nowhere() {
    needs_root!();
    for door in DOORS {
        let mut target = Target::script(door, "true");
        let canary = target.canary();
        let volume = target.bundle.scratch().join("volume");
        fs::create_dir_all(volume.join("directory")).unwrap();
        symlink(&canary, volume.join("link")).unwrap();
        // From inside, and from the host's root.
        symlink(format!("/../../../../../../../..{}", canary.display()), volume.join("other")).unwrap();
        target
            .bundle
            .add_mount(json!({"destination": "/volume", "type": "bind", "source": volume, "options": ["rbind"]}));
        for destination in ["/volume/directory/mounted", "/volume/directory/deep/er"] {
            target.bundle.add_mount(json!({"destination": destination, "type": "tmpfs", "source": "x"}));
        }
        let file = target.bundle.scratch().join("file");
        fs::write(&file, "").unwrap();
        let bind =
            json!({"destination": "/volume/directory/file", "type": "bind", "source": file, "options": ["bind"]});
        target.bundle.add_mount(bind);
        let racer = Racer::start(&volume.join("directory"), &volume.join("link"));
        for _ in 0..repeats(60) {
            // It may fail, as long as nothing comes of it elsewhere.
            target.run();
        }
        racer.end();
        empty(&canary);
        target.end();
    }
}

// CVE-2021-43784
#[test]
fn nothing_overflows_with_long_paths_and_many_mappings() {
    needs_root!();
    for door in DOORS {
        let mut target = Target::script(door, "true");
        let long = format!("/{}", "x/".repeat(1 << 15));
        target.bundle.add_mount(json!({"destination": long, "type": "tmpfs", "source": "x"}));
        target.run().refused(&["x/x/x"]);
        target.end();
        let mut target = Target::script(door, "true");
        let mappings: Vec<Value> =
            (0..70_000).map(|n| json!({"containerID": n, "hostID": 100_000 + n, "size": 1})).collect();
        let namespaces = target.bundle.config["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.push(json!({"type": "user"}));
        target.bundle.config["linux"]["uidMappings"] = json!(mappings);
        target.bundle.config["linux"]["gidMappings"] = json!(mappings);
        target.run().refused(&["uid"]);
        target.end();
    }
}

// CVE-2025-31133, CVE-2025-62161
#[test]
fn a_null_device_that_the_image_replaced_masks_nothing_else() {
    needs_root!();
    for door in DOORS {
        let mut target = Target::script(door, "cat /proc/keys; cat /masked; echo x >/masked; cat /proc/sysrq-trigger");
        let secret = target.bundle.scratch().join("secret");
        fs::write(&secret, "untouched").unwrap();
        let rootfs = target.bundle.rootfs();
        fs::write(rootfs.join("masked"), "hidden").unwrap();
        without_dev(&mut target);
        symlink("/proc/sys/kernel/core_pattern", rootfs.join("dev/null")).unwrap();
        target.bundle.config["linux"]["maskedPaths"] = json!(["/proc/keys", "/masked", "/proc/sysrq-trigger"]);
        let pattern = fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap();
        let done = target.run();
        assert!(!done.output.contains(pattern.trim()) && !done.output.contains("hidden"), "{done:?}");
        assert_eq!(fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap(), pattern);
        assert_eq!(fs::read_to_string(rootfs.join("masked")).unwrap(), "hidden");
        target.end();

        // While it is being replaced, in a /dev that two containers share.
        let mut target = Target::script(door, "cat /proc/keys");
        without_dev(&mut target);
        let dev = target.bundle.scratch().join("dev");
        fs::create_dir(&dev).unwrap();
        fs::write(dev.join("null"), "").unwrap();
        symlink("/proc/sys/kernel/core_pattern", dev.join("other")).unwrap();
        target.bundle.add_mount(json!({"destination": "/dev", "type": "bind", "source": dev, "options": ["rbind"]}));
        target.bundle.config["linux"]["maskedPaths"] = json!(["/proc/keys"]);
        let racer = Racer::start(&dev.join("null"), &dev.join("other"));
        for _ in 0..repeats(20) {
            let done = target.run();
            assert!(!done.output.contains(pattern.trim()), "{done:?}");
        }
        racer.end();
        assert_eq!(fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap(), pattern);
        target.end();
    }
}

// CVE-2025-52565
#[test]
fn a_console_is_the_terminal_whatever_lies_in_dev_pts() {
    needs_root!();
    for door in DOORS {
        let mut target = Target::script(door, "stat -c %t:%F /dev/console; readlink /proc/self/fd/0");
        let canary = target.canary();
        fs::write(canary.join("file"), "untouched").unwrap();
        target.bundle.config["process"]["terminal"] = json!(true);
        let pts = target.bundle.scratch().join("pts");
        fs::create_dir(&pts).unwrap();
        for n in 0..64 {
            symlink(canary.join("file"), pts.join(n.to_string())).unwrap();
        }
        symlink(canary.join("file"), pts.join("ptmx")).unwrap();
        for mount in target.bundle.config["mounts"].as_array_mut().unwrap() {
            if mount["destination"] == "/dev/pts" {
                *mount = json!({"destination": "/dev/pts", "type": "bind", "source": pts, "options": ["rbind"]});
            }
        }
        // The command needs a terminal of its own for that, or gives it to a socket: detached it refuses.
        let done = target.run();
        assert!(!done.error.is_empty() || done.output.contains("88:character"), "{done:?}");
        assert_eq!(fs::read_to_string(canary.join("file")).unwrap(), "untouched");
        target.end();
    }
}

// CVE-2025-52881, CVE-2025-62596
#[test]
fn settings_of_the_kernel_are_written_to_the_kernel_or_not_at_all() {
    needs_root!();
    for door in DOORS {
        // An image that has a /proc of its own, under the one that is mounted.
        let mut target = Target::script(door, "cat /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/msgmax");
        let canary = target.canary();
        let rootfs = target.bundle.rootfs();
        fs::create_dir_all(rootfs.join("proc/sys/kernel")).unwrap();
        symlink(canary.join("file"), rootfs.join("proc/sys/kernel/msgmax")).unwrap();
        target.bundle.config["linux"]["sysctl"] = json!({"net.ipv4.ip_forward": "1", "kernel.msgmax": "65000"});
        assert_eq!(target.run().ok().output, "1\n65000\n");
        empty(&canary);
        target.end();
        // Names that lead elsewhere.
        for name in [
            "net/../kernel/core_pattern",
            "net...kernel.core_pattern",
            "net.ipv4/../../kernel/core_pattern",
            "kernel.core_pattern",
            "kernel/sysrq",
            "net./../kernel/sysrq",
        ] {
            let pattern = fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap();
            let mut target = Target::script(door, "true");
            target.bundle.config["linux"]["sysctl"] = json!({name: "1"});
            target.run().refused(&[]);
            assert_eq!(fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap(), pattern);
            target.end();
        }
    }
}

// CVE-2026-41579, CVE-2026-47766
#[test]
fn devices_are_made_in_the_containers_dev_only() {
    needs_root!();
    for door in DOORS {
        let mut target = Target::script(door, "true");
        let canary = target.canary();
        for name in ["ptmx", "fd", "stdin", "null"] {
            fs::write(canary.join(name), "").unwrap();
        }
        let before = content(&canary);
        let rootfs = target.bundle.rootfs();
        fs::remove_dir(rootfs.join("dev")).unwrap();
        symlink(&canary, rootfs.join("dev")).unwrap();
        without_dev(&mut target);
        target.bundle.config["linux"]["devices"] =
            json!([{"path": "/dev/made", "type": "c", "major": 1, "minor": 3, "fileMode": 438}]);
        target.run();
        assert_eq!(content(&canary), before);
        assert!(before.iter().all(|name| fs::symlink_metadata(canary.join(name)).unwrap().is_file()));
        target.end();
    }
}

// CVE-2026-88264, CVE-2026-88265
#[test]
fn links_in_an_images_dev_are_not_followed() {
    needs_root!();
    for door in DOORS {
        let mut target = Target::script(door, "cat; echo said; echo problem >&2");
        let canary = target.canary();
        fs::write(canary.join("file"), "untouched").unwrap();
        without_dev(&mut target);
        let dev = target.bundle.rootfs().join("dev");
        symlink(canary.join("made"), dev.join("console")).unwrap();
        symlink(canary.join("file"), dev.join("null")).unwrap();
        symlink(canary.join("file"), dev.join("zero")).unwrap();
        let done = target.run();
        assert!(!done.output.contains("untouched"), "{done:?}");
        assert_eq!(content(&canary), ["file"]);
        assert_eq!(fs::read_to_string(canary.join("file")).unwrap(), "untouched");
        target.end();
    }
}

// crun 1.28
#[test]
fn names_that_lead_up_are_no_names() {
    needs_root!();
    for door in DOORS {
        let target = Target::script(door, "true");
        for path in ["../../x", "/a/../../x", "..", "/x/.."] {
            let mut config = target.bundle.config.clone();
            config["linux"]["cgroupsPath"] = json!(path);
            let mut other = Target::script(runx_tests::attack::Door::Command, "true");
            other.bundle.config = config;
            other.run().refused(&["cgroupsPath"]);
            other.end();
        }
        for id in ["../x", "a/b", ".", "..", "", "a\nb", &"x".repeat(2000)] {
            let done = target.bundle.runx(&["create", id]);
            assert_eq!(done.code, 1, "{id:?}: {}", done.stderr);
            let done = target.bundle.runx(&["delete", "--force", id]);
            assert!(!target.bundle.scratch().join("x").exists() && done.code <= 1);
        }
    }
}
