//! Mounts: options on one mount and on all below it, propagation, a tmpfs that begins with what lies below.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::PathBuf;
use std::process::Command;

use runx_tests::bundle::Bundle;
use runx_tests::command::run;
use runx_tests::needs_root;
use serde_json::json;

/// Mounts that a test made on the host, unmounted when it ends.
struct HostMounts(Vec<PathBuf>);

impl HostMounts {
    fn tmpfs(&mut self, path: PathBuf) {
        run(Command::new("mount").args(["-t", "tmpfs", "runx-test"]).arg(&path)).ok();
        self.0.push(path);
    }
}

impl Drop for HostMounts {
    fn drop(&mut self) {
        for path in self.0.iter().rev() {
            let _ = Command::new("umount").arg("-l").arg(path).status();
        }
    }
}

/// The options of the mount at `at` in the output of mount(8).
fn options(out: &str, at: &str) -> Vec<String> {
    let line = out.lines().find(|line| line.contains(&format!(" on {at} "))).unwrap_or_else(|| panic!("{at} in {out}"));
    let list = line.rsplit_once('(').unwrap().1.trim_end_matches(')');
    list.split(',').map(str::to_owned).collect()
}

// covers: mounts.options.ro mounts.options.nosuid mounts.options.nodev mounts.options.noexec mounts.options.nosymfollow
// covers: mounts.options.noatime mounts.options.nodiratime mounts.options.strictatime mounts.options.relatime
#[test]
fn each_attribute_is_on_the_mount_and_not_below_it() {
    needs_root!();
    let mut bundle = Bundle::script("mount");
    let data = bundle.scratch().join("data");
    fs::create_dir_all(data.join("below")).unwrap();
    let mut host = HostMounts(Vec::new());
    host.tmpfs(data.clone());
    fs::create_dir(data.join("below")).unwrap();
    host.tmpfs(data.join("below"));
    for option in ["ro", "nosuid", "nodev", "noexec", "nosymfollow", "noatime", "nodiratime", "relatime"] {
        let destination = format!("/{option}");
        bundle.config["root"]["readonly"] = json!(false);
        bundle.add_mount(
            json!({"destination": destination, "type": "bind", "source": data, "options": ["rbind", option]}),
        );
    }
    bundle.add_mount(
        json!({"destination": "/strict", "type": "bind", "source": data, "options": ["rbind", "strictatime"]}),
    );
    let out = bundle.run().ok().stdout;
    for option in ["ro", "nosuid", "nodev", "noexec", "nosymfollow", "noatime", "nodiratime", "relatime"] {
        let has = |at: &str| options(&out, at).contains(&option.to_owned());
        assert!(has(&format!("/{option}")), "{option}: {out}");
        if option != "relatime" {
            assert!(!has(&format!("/{option}/below")), "{option}: {out}");
        }
    }
    assert!(!options(&out, "/strict").iter().any(|option| option.ends_with("atime")), "{out}");
    drop(host);
    bundle.assert_nothing_left();
}

// covers: mounts.options.rro mounts.options.rnosuid mounts.options.rnodev mounts.options.rnoexec
// covers: mounts.options.rnosymfollow mounts.options.rnoatime mounts.options.rw
#[test]
fn recursive_attributes_are_on_everything_below_and_can_be_cleared() {
    needs_root!();
    let mut bundle = Bundle::script("mount");
    let data = bundle.scratch().join("data");
    fs::create_dir(&data).unwrap();
    let mut host = HostMounts(Vec::new());
    host.tmpfs(data.clone());
    fs::create_dir(data.join("below")).unwrap();
    host.tmpfs(data.join("below"));
    bundle.config["root"]["readonly"] = json!(false);
    let list = ["rro", "rnosuid", "rnodev", "rnoexec", "rnosymfollow", "rnoatime"];
    for option in list {
        bundle.add_mount(json!({
            "destination": format!("/{option}"), "type": "bind", "source": data, "options": ["rbind", option]
        }));
    }
    bundle.add_mount(
        json!({"destination": "/cleared", "type": "bind", "source": data, "options": ["rbind", "ro", "rrw"]}),
    );
    let out = bundle.run().ok().stdout;
    for option in list {
        for at in [format!("/{option}"), format!("/{option}/below")] {
            assert!(options(&out, &at).contains(&option[1..].to_owned()), "{at}: {out}");
        }
    }
    assert!(options(&out, "/cleared").contains(&"rw".to_owned()), "{out}");
    drop(host);
    bundle.assert_nothing_left();
}

// covers: mounts.options.tmpcopyup
#[test]
fn a_tmpfs_begins_with_what_lies_below() {
    needs_root!();
    let mut bundle = Bundle::script(
        "cat /filled/a /filled/sub/b; readlink /filled/link; stat -c '%a %u' /filled/sub /filled/sub/b; \
         stat -c %a /filled; touch /filled/new; stat -f -c %T /filled; ls /filled | sort | tr '\\n' ' '",
    );
    let filled = bundle.rootfs().join("filled");
    fs::create_dir_all(filled.join("sub")).unwrap();
    fs::write(filled.join("a"), "first\n").unwrap();
    fs::write(filled.join("sub/b"), "second\n").unwrap();
    symlink("/nowhere/else", filled.join("link")).unwrap();
    fs::set_permissions(filled.join("sub"), fs::Permissions::from_mode(0o1750)).unwrap();
    fs::set_permissions(filled.join("sub/b"), fs::Permissions::from_mode(0o604)).unwrap();
    fs::set_permissions(&filled, fs::Permissions::from_mode(0o751)).unwrap();
    std::os::unix::fs::chown(filled.join("sub/b"), Some(12), Some(13)).unwrap();
    bundle.add_mount(json!({"destination": "/filled", "type": "tmpfs", "source": "x", "options": ["tmpcopyup"]}));
    let out = bundle.run().ok().stdout;
    assert_eq!(out, "first\nsecond\n/nowhere/else\n1750 0\n604 12\n751\ntmpfs\na link new sub ");
    assert!(!filled.join("new").exists());
    bundle.config["mounts"].as_array_mut().unwrap().pop();
    bundle.config["process"]["args"] = json!(["sh", "-c", "cat /filled/a; touch /filled/new || echo read-only"]);
    bundle.add_mount(json!({"destination": "/filled", "type": "tmpfs", "source": "x", "options": ["ro", "tmpcopyup"]}));
    assert_eq!(bundle.run().ok().stdout, "first\nread-only\n");
    bundle.assert_nothing_left();
}

// covers: linux.rootfsPropagation
#[test]
fn the_root_has_the_propagation_asked_for() {
    needs_root!();
    for (word, mark) in [("shared", "shared:"), ("private", ""), ("unbindable", "unbindable"), ("slave", "")] {
        let mut bundle = Bundle::script("cat /proc/self/mountinfo");
        bundle.set("/linux", "rootfsPropagation", json!(word));
        let out = bundle.run().ok().stdout;
        let root = out.lines().find(|line| line.split(' ').nth(4) == Some("/")).unwrap().to_owned();
        let optional = root.split(" - ").next().unwrap().to_owned();
        if mark.is_empty() {
            assert!(!optional.contains("shared:") && !optional.contains("unbindable"), "{word}: {root}");
        } else {
            assert!(optional.contains(mark), "{word}: {root}");
        }
        bundle.assert_nothing_left();
    }
    let mut bundle = Bundle::script("true");
    bundle.set("/linux", "rootfsPropagation", json!("sideways"));
    bundle.run().fails(1, &["rootfsPropagation", "sideways"]);
}

// covers: mounts.options.shared mounts.options.slave mounts.options.private mounts.options.unbindable
#[test]
fn a_mount_has_the_propagation_asked_for() {
    needs_root!();
    let words = ["shared", "rshared", "slave", "rslave", "private", "rprivate", "unbindable", "runbindable"];
    let mut bundle = Bundle::script("cat /proc/self/mountinfo");
    bundle.config["root"]["readonly"] = json!(false);
    for word in words {
        bundle.add_mount(json!({
            "destination": format!("/{word}"), "type": "tmpfs", "source": "x", "options": [word]
        }));
    }
    let out = bundle.run().ok().stdout;
    for word in words {
        let line = out.lines().find(|line| line.split(' ').nth(4) == Some(&format!("/{word}"))).unwrap();
        let optional = line.split(" - ").next().unwrap();
        assert_eq!(optional.contains("shared:"), word.ends_with("shared"), "{line}");
        assert_eq!(optional.contains("unbindable"), word.ends_with("unbindable"), "{line}");
    }
    bundle.assert_nothing_left();
}

// covers: mounts.destination mounts.type mounts.source mounts.options.sync
#[test]
fn relative_destinations_and_filesystem_options_are_understood() {
    needs_root!();
    let mut bundle = Bundle::script("mount; ls /relative/source");
    bundle.config["root"]["readonly"] = json!(false);
    fs::create_dir(bundle.path().join("beside")).unwrap();
    fs::write(bundle.path().join("beside/config"), "").unwrap();
    bundle
        .add_mount(json!({"destination": "relative/source", "type": "bind", "source": "beside", "options": ["bind"]}));
    bundle.add_mount(
        json!({"destination": "/synced", "type": "tmpfs", "source": "x", "options": ["sync", "size=4096k", "nr_inodes=100"]}),
    );
    let out = bundle.run().ok().stdout;
    let synced = options(&out, "/synced");
    for word in ["sync", "size=4096k", "nr_inodes=100"] {
        assert!(synced.contains(&word.to_owned()), "{out}");
    }
    assert!(out.ends_with("config\n"), "{out}");
    bundle.add_mount(json!({"destination": "/bad", "type": "tmpfs", "source": "x", "options": ["nonsense=1"]}));
    bundle.run().fails(1, &["/bad", "nonsense"]);
    bundle.assert_nothing_left();
}

// covers: linux.maskedPaths linux.readonlyPaths
#[test]
fn any_path_can_be_masked_or_made_read_only() {
    needs_root!();
    let mut bundle = Bundle::script(
        "wc -c < /etc/passwd; ls /bin/.. > /dev/null; ls /root | wc -l; touch /tmp/x 2>/dev/null || echo read-only; \
         touch /etc/y && echo writable",
    );
    bundle.config["root"]["readonly"] = json!(false);
    fs::write(bundle.rootfs().join("root/secret"), "").unwrap();
    bundle.set("/linux", "maskedPaths", json!(["/etc/passwd", "/root", "/no/such/path"]));
    bundle.set("/linux", "readonlyPaths", json!(["/tmp", "/also/missing"]));
    assert_eq!(bundle.run().ok().stdout, "0\n0\nread-only\nwritable\n");
    bundle.assert_nothing_left();
}
