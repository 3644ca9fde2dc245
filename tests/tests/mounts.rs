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

// covers: mounts.options.attributes
// covers: mounts.options.attributes
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

// covers: mounts.options.recursive
// covers: mounts.options.recursive mounts.options.attributes
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

// covers: mounts.options.propagation
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

// covers: mounts.destination mounts.type mounts.source mounts.options.filesystem
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

// covers: mounts.destination
#[test]
fn a_mount_point_behind_a_link_that_leads_nowhere_is_made_where_it_leads() {
    needs_root!();
    let mut bundle = Bundle::script("readlink /etc/resolv.conf; cat /run/resolve/stub; cat /far/away/config");
    bundle.config["root"]["readonly"] = json!(false);
    let _ = fs::remove_file(bundle.rootfs().join("etc/resolv.conf"));
    symlink("../run/resolve/stub", bundle.rootfs().join("etc/resolv.conf")).unwrap();
    symlink("/../../jump/to", bundle.rootfs().join("far")).unwrap();
    let beside = bundle.path().join("beside");
    fs::create_dir(&beside).unwrap();
    fs::write(beside.join("config"), "content\n").unwrap();
    bundle.add_mount(
        json!({"destination": "/etc/resolv.conf", "type": "bind", "source": beside.join("config"), "options": ["bind"]}),
    );
    bundle.add_mount(json!({"destination": "/far/away", "type": "bind", "source": beside, "options": ["bind"]}));
    assert_eq!(bundle.run().ok().stdout, "../run/resolve/stub\ncontent\ncontent\n");
    assert!(bundle.rootfs().join("jump/to/away").is_dir());
    bundle.assert_nothing_left();
}

// covers: mounts.options.attributes
#[test]
fn a_read_only_tmpfs_still_gets_devices_and_what_is_mounted_below_it() {
    needs_root!();
    let mut bundle = Bundle::script(
        "test -c /dev/null && touch /below/it/file && echo made; touch /dev/x 2>/dev/null || echo read-only; \
         touch /below/x 2>/dev/null || echo read-only",
    );
    bundle.config["root"]["readonly"] = json!(false);
    let mounts = bundle.config["mounts"].as_array_mut().unwrap();
    let dev = mounts.iter_mut().find(|mount| mount["destination"] == "/dev").unwrap();
    dev["options"].as_array_mut().unwrap().push(json!("ro"));
    bundle.add_mount(json!({"destination": "/below", "type": "tmpfs", "source": "x", "options": ["ro"]}));
    bundle.add_mount(json!({"destination": "/below/it", "type": "tmpfs", "source": "x"}));
    assert_eq!(bundle.run().ok().stdout, "made\nread-only\nread-only\n");
    bundle.assert_nothing_left();
}

// covers: mounts.type
#[test]
fn a_tmpfs_has_the_mode_of_the_directory_below_or_is_open_for_all() {
    needs_root!();
    let mut bundle = Bundle::script("stat -c %a /there /new /asked");
    bundle.config["root"]["readonly"] = json!(false);
    fs::create_dir(bundle.rootfs().join("there")).unwrap();
    fs::set_permissions(bundle.rootfs().join("there"), fs::Permissions::from_mode(0o710)).unwrap();
    for destination in ["/there", "/new"] {
        bundle.add_mount(json!({"destination": destination, "type": "tmpfs", "source": "x"}));
    }
    bundle.add_mount(json!({"destination": "/asked", "type": "tmpfs", "source": "x", "options": ["mode=1500"]}));
    assert_eq!(bundle.run().ok().stdout, "710\n1777\n1500\n");
    bundle.assert_nothing_left();
}

// covers: mounts.source
#[test]
fn a_source_in_the_container_shows_what_an_earlier_mount_put_there() {
    needs_root!();
    let mut bundle = Bundle::script("cat /second/name; touch /second/x 2>/dev/null || echo read-only");
    bundle.config["root"]["readonly"] = json!(false);
    let data = bundle.scratch().join("data");
    fs::create_dir_all(data.join("inner")).unwrap();
    fs::write(data.join("inner/name"), "inner\n").unwrap();
    bundle.add_mount(json!({"destination": "/first", "type": "bind", "source": data, "options": ["rbind"]}));
    let inner = bundle.rootfs().join("first/inner");
    // The destination may be named by the host's path too.
    let second = bundle.rootfs().join("second");
    bundle.add_mount(json!({"destination": second, "type": "bind", "source": inner, "options": ["rbind", "ro"]}));
    assert_eq!(bundle.run().ok().stdout, "inner\nread-only\n");
    bundle.assert_nothing_left();
}

// covers: linux.maskedPaths
#[test]
fn a_path_that_is_named_twice_is_masked_once() {
    needs_root!();
    let mut bundle = Bundle::script("grep -c ' /root ' /proc/self/mounts; grep -c ' /etc/passwd ' /proc/self/mounts");
    bundle.set("/linux", "maskedPaths", json!(["/root", "/etc/passwd", "/root/", "/etc/passwd"]));
    assert_eq!(bundle.run().ok().stdout, "1\n1\n");
    bundle.assert_nothing_left();
}

// covers: root.path
#[test]
fn without_pivot_root_nothing_of_the_host_is_in_sight() {
    needs_root!();
    // A procfs without masks anywhere in the mount namespace would let a user namespace mount another.
    let mut bundle =
        Bundle::script("ls / | tr '\\n' ' '; unshare -mrpf mount -t proc x /proc 2>/dev/null || echo refused");
    for set in ["bounding", "permitted", "effective"] {
        bundle.config["process"]["capabilities"][set].as_array_mut().unwrap().push(json!("CAP_SETFCAP"));
    }
    let pivoted = bundle.run().ok().stdout;
    let run = ["run", "--no-pivot", "--bundle", bundle.path().to_str().unwrap(), bundle.id()].map(str::to_owned);
    let run: Vec<&str> = run.iter().map(String::as_str).collect();
    assert_eq!(bundle.runx(&run).ok().stdout, pivoted);
    assert!(pivoted.ends_with("refused\n"), "{pivoted}");
    // With the root filesystem at its own path in a copy of the host's mounts.
    bundle.set("", "hooks", json!({"createRuntime": [{"path": "/bin/true"}]}));
    assert_eq!(bundle.runx(&run).ok().stdout, pivoted);
    bundle.assert_nothing_left();
}

// covers: mounts.type
#[test]
fn the_hosts_proc_is_bound_whatever_its_type_is_called() {
    needs_root!();
    let ours = std::process::id();
    for kind in ["none", "bind"] {
        let mut bundle = Bundle::script(&format!(
            "cut -d' ' -f1 /proc/{ours}/stat; grep -c ' /proc rw,nosuid.* - proc ' /proc/self/mountinfo"
        ));
        let proc = json!({
            "destination": "/proc", "type": kind, "source": "/proc", "options": ["rbind", "nosuid", "noexec", "nodev"]
        });
        let mounts = bundle.config["mounts"].as_array_mut().unwrap();
        mounts.iter_mut().filter(|mount| mount["destination"] == "/proc").for_each(|mount| *mount = proc.clone());
        let namespaces = bundle.config["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.retain(|namespace| namespace["type"] != "pid");
        let script = bundle.run().ok().stdout;
        assert!(script.starts_with(&format!("{ours}\n1")), "{kind}: {script}");
        bundle.assert_nothing_left();
    }
}
