//! `runx container` of an ordinary user.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use runx_tests::command::{Done, eventually, run};
use runx_tests::user::{FURTHER, ID, OwnBundle};
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
fn all_his_further_ids_are_in_his_containers_by_his_name_and_his_number() {
    needs_user!(obstacle_to_further_ids);
    let own = Own::new();
    let second = FURTHER.0 + FURTHER.1;
    for file in ["subuid", "subgid"] {
        let path = own.0.scratch().join("etc").join(file);
        let text = fs::read_to_string(&path).unwrap();
        // The first one once more, which the kernel would refuse.
        fs::write(&path, format!("{text}{ID}:{}:{}\n{ID}:{second}:10\n", FURTHER.0, FURTHER.1)).unwrap();
    }
    let (rootfs, script) =
        (own.0.rootfs(), "cat /proc/self/uid_map /proc/self/gid_map; touch /tmp/f; chown 65546:65546 /tmp/f");
    let words = ["container", "run", "--rm", "--network", "none", "--rootfs", rootfs.to_str().unwrap(), "--"];
    let done = run(&mut own.0.command_when_known(&[&words[..], &["sh", "-c", script]].concat())).ok();
    let lines: Vec<_> = done.stdout.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    let expected = [format!("0 {ID} 1"), format!("1 {} {}", FURTHER.0, FURTHER.1), format!("65537 {second} 10")];
    assert_eq!(lines, [&expected[..], &expected[..]].concat());
    let made = fs::metadata(rootfs.join("tmp/f")).unwrap();
    assert_eq!((made.uid(), made.gid()), (second + 9, second + 9));
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
