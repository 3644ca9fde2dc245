//! `runx container` of an ordinary user.

use std::fs;
use std::path::PathBuf;

use runx_tests::command::{Done, eventually, run};
use runx_tests::user::OwnBundle;
use runx_tests::{leftovers, needs_user};

/// His containers: below his home, with the root filesystem of his bundle.
struct Own(OwnBundle);

impl Own {
    fn new() -> Self {
        Self(OwnBundle::script("true"))
    }

    fn id(&self, name: &str) -> String {
        format!("{}-{name}", self.0.id())
    }

    #[track_caller]
    fn container(&self, args: &[&str]) -> Done {
        run(&mut self.0.command(&[&["container"], args].concat()))
    }

    #[track_caller]
    fn run(&self, flags: &[&str], args: &[&str]) -> Done {
        let rootfs = self.0.rootfs();
        let words = [&["run"], flags, &["--rootfs", rootfs.to_str().unwrap(), "--"], args].concat();
        self.container(&words)
    }

    fn records(&self) -> PathBuf {
        self.0.scratch().join("home/.local/share/runx/containers")
    }

    #[track_caller]
    fn assert_nothing_left(&self) {
        leftovers::assert_none(&self.id(""), &[self.records(), self.0.state_root()]);
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        let _ = self.0.command(&["container", "rm", "--force", "--all"]).output();
    }
}

#[test]
fn an_ordinary_user_runs_containers_with_the_machines_network_or_none() {
    needs_user!(obstacle);
    let own = Own::new();
    for network in ["none", "host"] {
        let script = "id -u; echo x > /tmp/made; ip -o link | wc -l; exit 7";
        let done = own.run(&["--rm", "--network", network], &["sh", "-c", script]);
        assert!(done.code == 7 && done.stdout.starts_with("0\n"), "{network}: {done:?}");
    }
    assert_eq!(
        std::os::unix::fs::MetadataExt::uid(&fs::metadata(own.0.rootfs().join("tmp/made")).unwrap()),
        runx_tests::user::ID
    );
    own.run(&["--rm"], &["true"]).fails(125, &["--network bridge needs root", "--network host"]);
    own.run(&["--rm", "--network", "none", "--privileged"], &["true"]).fails(125, &["need root"]);
    own.assert_nothing_left();
}

#[test]
fn his_containers_have_a_life_like_others() {
    needs_user!(obstacle);
    let own = Own::new();
    let id = own.id("a");
    let script = "trap 'exit 3' TERM; echo on; while :; do sleep 0.1; done";
    own.run(&["-d", "--network", "none", "--name", &id], &["sh", "-c", script]).ok();
    eventually("it prints", || own.container(&["logs", &id]).stdout == "on\n");
    assert_eq!(own.container(&["exec", &id, "sh", "-c", "echo in; exit 5"]).code, 5);
    assert!(own.container(&["ls"]).ok().stdout.contains("running"));
    let file = own.0.scratch().join("home/file");
    own.container(&["cp", &format!("{id}:/etc/passwd"), file.to_str().unwrap()]).ok();
    assert!(fs::read_to_string(&file).unwrap().contains("root:x:0"));
    own.container(&["stop", &id]).ok();
    assert!(own.container(&["ls", "-a"]).ok().stdout.contains("exited (3)"));
    own.container(&["start", &id]).ok();
    own.container(&["rm", "-f", &id]).ok();
    own.assert_nothing_left();
}
