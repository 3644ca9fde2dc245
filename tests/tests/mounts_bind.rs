//! Bind mounts of sources whose mounts have options: which of them they have, with a user namespace and without.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use runx_tests::bundle::Bundle;
use runx_tests::command::{Done, run};
use runx_tests::needs_root;
use serde_json::json;

/// Ids of the host that belong to nobody else.
const BASE: u32 = 1_300_000;

const WORDS: [&str; 8] = ["ro", "nosuid", "nodev", "noexec", "nosymfollow", "noatime", "nodiratime", "relatime"];

/// A tmpfs on the host, unmounted when it ends.
struct Source(PathBuf);

impl Source {
    fn new(path: PathBuf, filesystem: &str, mount: &str) -> Self {
        fs::create_dir_all(&path).unwrap();
        run(Command::new("mount").args(["-t", "tmpfs", "-o", filesystem, "runx-test"]).arg(&path)).ok();
        let made = Self(path);
        run(Command::new("mount").args(["-o", &format!("remount,bind,{mount}")]).arg(&made.0)).ok();
        made
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

fn bundle(user_namespace: bool) -> Bundle {
    let mut bundle = Bundle::script("grep ' /mnt ' /proc/self/mounts");
    bundle.config["root"]["readonly"] = json!(false);
    if user_namespace {
        bundle.own_users(BASE);
    }
    bundle
}

/// What is printed of a bind mount with `options` of `source`.
fn bound(bundle: &mut Bundle, source: &Source, options: &str) -> Done {
    let options: Vec<_> = options.split(',').collect();
    bundle.config["mounts"].as_array_mut().unwrap().retain(|mount| mount["destination"] != "/mnt");
    bundle.add_mount(json!({"destination": "/mnt", "type": "bind", "source": source.0, "options": options}));
    bundle.run()
}

fn words(line: &str) -> BTreeSet<&str> {
    let options = line.split_whitespace().nth(3).unwrap_or_else(|| panic!("no options in {line:?}"));
    options.split(',').filter(|word| WORDS.contains(word)).collect()
}

/// The mount options of sources, those of bind mounts, and what these have then.
type Case = (&'static str, &'static str, &'static str);

fn check(cases: &[Case], user_namespace: bool) {
    let mut bundle = bundle(user_namespace);
    for (number, (source, options, expected)) in cases.iter().enumerate() {
        let source_mount = Source::new(bundle.scratch().join(format!("source-{number}")), "rw", source);
        let out = bound(&mut bundle, &source_mount, options).ok().stdout;
        let expected: BTreeSet<_> = expected.split(',').filter(|word| !word.is_empty()).collect();
        assert_eq!(words(&out), expected, "{options} of {source}: {out}");
    }
    bundle.assert_nothing_left();
}

// covers: mounts.options.bind mounts.options.attributes
#[test]
fn a_bind_mount_without_options_has_those_of_its_source_and_one_with_options_those_alone() {
    needs_root!();
    let cases = [
        ("ro,noexec,nosymfollow,nodiratime", "bind", "ro,noexec,nosymfollow,nodiratime,relatime"),
        ("ro,noexec,noatime", "rbind,rprivate", "ro,noexec,noatime"),
        ("ro,noexec,nosymfollow,nodiratime", "bind,dev", "nodiratime,relatime"),
        ("ro,noexec", "bind,nosuid,nodev,rprivate", "nosuid,nodev,relatime"),
        ("ro", "rbind,rprivate,rw", "relatime"),
        ("nosuid,nodev,noexec", "bind,ro", "ro,relatime"),
        ("nosuid,nodev,noexec", "bind,dev,suid,exec", "relatime"),
        ("nodev,nosymfollow", "bind,ro,symfollow", "ro,relatime"),
    ];
    check(&cases, false);
}

// covers: mounts.options.attributes
#[test]
fn a_bind_mount_keeps_the_access_times_of_its_source_unless_it_asks_for_others() {
    needs_root!();
    let cases = [
        ("noatime", "bind", "noatime"),
        ("noatime", "bind,ro", "ro,noatime"),
        ("noatime", "bind,norelatime", "noatime"),
        ("noatime", "bind,atime", "noatime"),
        ("noatime", "bind,relatime", "relatime"),
        ("noatime", "bind,nodiratime", "nodiratime,relatime"),
        ("nodiratime", "bind,strictatime", ""),
        ("noatime", "bind,nodiratime,strictatime", "nodiratime"),
        ("strictatime", "bind,noatime", "noatime"),
    ];
    check(&cases, false);
}

// covers: mounts.options.bind mounts.options.attributes linux.namespaces.user
#[test]
fn in_a_user_namespace_a_bind_mount_keeps_what_its_source_restricts() {
    needs_root!();
    let cases = [
        ("ro,noexec,nosymfollow,nodiratime", "bind", "ro,noexec,nosymfollow,nodiratime,relatime"),
        ("ro,noexec,nosymfollow,nodiratime", "bind,dev", "ro,noexec,nodiratime,relatime"),
        ("ro", "bind,nosuid,nodev,rprivate", "ro,nosuid,nodev,relatime"),
        ("nosuid,nodev,noexec,noatime", "bind,ro", "ro,nosuid,nodev,noexec,noatime"),
        ("nodev,nosymfollow", "bind,rw", "nodev,relatime"),
        ("nosuid,noatime", "bind,ro,exec", "ro,nosuid,noatime"),
        ("noatime,nodiratime", "bind,norelatime", "noatime,nodiratime"),
        ("noatime", "bind,noatime", "noatime"),
    ];
    check(&cases, true);
}

// covers: mounts.options.attributes linux.namespaces.user
#[test]
fn in_a_user_namespace_no_bind_mount_lifts_what_its_source_restricts() {
    needs_root!();
    let mut bundle = bundle(true);
    let cases = [
        ("ro", "bind,rw,nosuid", "rw"),
        ("nodev,nosuid,noexec", "bind,dev,suid", "suid,dev"),
        ("noexec", "bind,ro,exec", "exec"),
        ("relatime", "bind,noatime", "access times"),
        ("noatime", "bind,relatime", "access times"),
        ("strictatime", "bind,nodiratime", "access times"),
    ];
    for (number, (source, options, word)) in cases.iter().enumerate() {
        let source = Source::new(bundle.scratch().join(format!("source-{number}")), "rw", source);
        bound(&mut bundle, &source, options).fails(1, &["/mnt", word, "locked", "Operation not permitted"]);
    }
    bundle.assert_nothing_left();
}

/// Containerd asks for `rw` on all that it is not told to mount read-only.
// covers: mounts.options.attributes linux.namespaces.user
#[test]
fn in_a_user_namespace_a_read_only_filesystem_may_be_mounted_as_if_it_were_not() {
    needs_root!();
    let mut bundle = bundle(true);
    let source = Source::new(bundle.scratch().join("source"), "ro", "rw,nosuid");
    let out = bound(&mut bundle, &source, "rbind,rprivate,rw").ok().stdout;
    assert_eq!(words(&out), BTreeSet::from(["nosuid", "relatime", "ro"]), "{out}");
    drop(source);
    bundle.assert_nothing_left();
}
