//! Pods come and go, and what stays does not grow. `RUNX_ROUNDS` says how many.

use std::fs;
use std::path::PathBuf;

use runx_tests::command::eventually;
use runx_tests::cri::{HANDLER, Node};
use runx_tests::{needs_cri, rounds};

/// What a process holds.
#[derive(Clone, Copy, Debug)]
struct Held {
    descriptors: usize,
    threads: usize,
    /// Memory of its own, in KiB.
    anonymous: u64,
}

impl Held {
    fn by(pid: i32) -> Self {
        let count = |what: &str| fs::read_dir(format!("/proc/{pid}/{what}")).unwrap().count();
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let line = status.lines().find(|line| line.starts_with("RssAnon:")).unwrap();
        Self {
            descriptors: count("fd"),
            threads: count("task"),
            anonymous: line.split_ascii_whitespace().nth(1).unwrap().parse().unwrap(),
        }
    }
}

/// What the machine holds for a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Machine {
    mounts: usize,
    cgroups: usize,
    shims: usize,
    spawners: usize,
}

impl Machine {
    fn of(node: &Node) -> Self {
        let directory = node.path().to_string_lossy().into_owned();
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let below =
            |path: PathBuf| fs::read_dir(path).into_iter().flatten().flatten().filter(|e| e.path().is_dir()).count();
        let root = PathBuf::from("/sys/fs/cgroup");
        let trees = fs::read_dir(&root).unwrap().flatten().map(|entry| entry.path()).chain([root.clone()]);
        Self {
            mounts: mounts.lines().filter(|line| line.contains(&directory)).count(),
            cgroups: trees.map(|tree| below(tree.join(node.name()))).sum(),
            shims: node.shims().len(),
            spawners: node.spawners().len(),
        }
    }
}

#[test]
fn what_stays_does_not_grow_with_what_has_been() {
    needs_cri!();
    let node = Node::start();
    let config = node.pod_config("staying");
    let staying = node.run_pod(&config);
    let app = node.run_container(&staying, &node.container_config("app", "sleep 1000000"), &config);
    let (shim, spawner) = (node.shims()[0], node.spawners()[0]);
    let total = rounds(20);
    // By then everything has been done that makes caches and buffers.
    let warm = (total / 2).clamp(1, 100);
    let mut before = None;
    for round in 1..=total {
        // A pod of its own, and a container and a command in the one that stays.
        let name = format!("passing{}", round % 10);
        let passing = node.pod_config(&name);
        let pod = node.try_run_pod(&passing, HANDLER).unwrap();
        let id = node.run_container(&pod, &node.container_config("app", "echo here"), &passing);
        assert_eq!(node.wait(&id).exit_code, 0);
        node.remove_pod(&pod);
        let short = node.run_container(&staying, &node.container_config("short", "exit 3"), &config);
        assert_eq!(node.wait(&short).exit_code, 3);
        node.remove_container(&short);
        node.exec(&app, &["/bin/true"], 10).unwrap().ok();
        if round == warm || round == total || round % 100 == 0 {
            let machine = || Machine::of(&node);
            eventually("the passing pod is gone", || machine().shims == 1 && machine().spawners == 1);
            eventually("its threads have ended", || Held::by(shim).threads == 1);
            let now = (machine(), Held::by(shim), Held::by(spawner));
            eprintln!("soak: {round} of {total}: {now:?}");
            let Some((machine, of_shim, of_spawner)) = before else {
                before = Some(now);
                continue;
            };
            assert_eq!(now.0, machine);
            for (now, before) in [(now.1, of_shim), (now.2, of_spawner)] {
                assert!(now.descriptors <= before.descriptors, "{now:?} after {before:?}");
                assert!(now.threads <= before.threads, "{now:?} after {before:?}");
                assert!(now.anonymous <= before.anonymous + 256, "{now:?} after {before:?}");
            }
        }
    }
    node.remove_pod(&staying);
    node.assert_nothing_left();
}
