//! Shims, spawners and containerd are killed at random moments of a container's life. What ran beside goes on, and
//! nothing is left. `RUNX_ROUNDS` says how often, `RUNX_SEED` repeats a run.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use k8s_cri::v1 as api;
use runx_tests::command::eventually;
use runx_tests::cri::{HANDLER, Node, Refused};
use runx_tests::random::Random;
use runx_tests::shim::SOCKETS;
use runx_tests::{needs_cri, rounds, slow};

const STATES: &str = "/run/containerd/runx/k8s.io";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Shim,
    Spawner,
    Containerd,
}

fn kill(pid: i32) {
    // SAFETY: the pid is that of a process of this test's own node.
    unsafe { libc::kill(pid, libc::SIGKILL) };
}

fn names(directory: &Path) -> BTreeSet<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.path())
        .filter(|path| !path.file_name().is_some_and(|n| n.to_string_lossy().starts_with('.')))
        .collect()
}

/// All that a container can be seen by on this machine, from outside of containerd.
///
/// Sockets and bundles are looked at in the end: where containerd does not call `delete` for a killed shim, the next one
/// that ends removes the socket, and containerd forgets a bundle (2.3 does) until it starts again.
#[derive(Debug, PartialEq, Eq)]
struct Traces {
    states: BTreeSet<PathBuf>,
    cgroups: BTreeSet<PathBuf>,
    leases: BTreeSet<PathBuf>,
    links: usize,
    mounts: usize,
    processes: BTreeSet<i32>,
}

impl Traces {
    fn of(node: &Node, states: &BTreeSet<PathBuf>) -> Self {
        let directory = node.path().to_string_lossy().into_owned();
        let mut cgroups = BTreeSet::new();
        for root in [PathBuf::from("/sys/fs/cgroup")].into_iter().chain(names(Path::new("/sys/fs/cgroup"))) {
            let is_group = |path: &PathBuf| path.is_dir();
            cgroups.extend(names(&root.join(node.name())).into_iter().filter(is_group));
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let links = Command::new("ip").args(["-o", "link", "show", "master", node.bridge()]).output().unwrap().stdout;
        let in_group = |pid: &i32| {
            let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
            groups.contains(&node.name())
        };
        let pids = names(Path::new("/proc")).into_iter().filter_map(|path| path.file_name()?.to_str()?.parse().ok());
        let mut processes: BTreeSet<i32> = pids.filter(in_group).collect();
        processes.extend(node.shims());
        Self {
            states: names(Path::new(STATES)).difference(states).cloned().collect(),
            cgroups,
            leases: names(&node.path().join("ipam").join(node.bridge()))
                .into_iter()
                .filter(|path| path.to_string_lossy().contains("/10."))
                .collect(),
            links: String::from_utf8_lossy(&links).lines().count(),
            mounts: mounts.lines().filter(|line| line.contains(&directory)).count(),
            processes,
        }
    }
}

/// A pod with a container, from the beginning to the end, as far as it goes.
fn pod_life(node: &Node, name: &str) -> Result<(), Refused> {
    let config = node.pod_config(name);
    let pod = node.try_run_pod(&config, HANDLER)?;
    container_life(node, &pod, &config)?;
    node.client().stop_pod_sandbox(api::StopPodSandboxRequest { pod_sandbox_id: pod.clone() })?;
    node.client().remove_pod_sandbox(api::RemovePodSandboxRequest { pod_sandbox_id: pod }).map(drop)
}

fn container_life(node: &Node, pod: &str, config: &api::PodSandboxConfig) -> Result<(), Refused> {
    let script = "trap 'exit 0' TERM; while :; do sleep 0.01; done";
    let id = node.try_create(pod, &node.container_config("app", script), config)?;
    node.start_container(&id)?;
    node.exec(&id, &["/bin/true"], 10)?;
    node.client().stop_container(api::StopContainerRequest { container_id: id.clone(), timeout: 1 })?;
    node.client().remove_container(api::RemoveContainerRequest { container_id: id }).map(drop)
}

/// Removes pods as the kubelet does: again and again.
fn clean_up(node: &Node, name: &str) {
    let ours = |pod: &api::PodSandbox| pod.metadata.as_ref().is_some_and(|metadata| metadata.name == name);
    eventually("the pod can be removed", || {
        let list = node.client().list_pod_sandbox(api::ListPodSandboxRequest::default()).expect("list pods");
        let pods: Vec<String> = list.items.iter().filter(|pod| ours(pod)).map(|pod| pod.id.clone()).collect();
        for id in &pods {
            let _ = node.client().stop_pod_sandbox(api::StopPodSandboxRequest { pod_sandbox_id: id.clone() });
            let _ = node.client().remove_pod_sandbox(api::RemovePodSandboxRequest { pod_sandbox_id: id.clone() });
        }
        pods.is_empty()
    });
}

/// containerd gives a bundle a hidden name before it removes it, and does not look for those again: one that it was killed
/// over is its own leak.
fn forget_renamed_bundles(node: &Node) {
    for entry in fs::read_dir(node.path().join("state/io.containerd.runtime.v2.task/k8s.io")).unwrap().flatten() {
        if entry.file_name().to_string_lossy().starts_with('.') {
            eprintln!("faults: containerd left {}", entry.path().display());
            fs::remove_dir_all(entry.path()).unwrap();
        }
    }
}

#[test]
fn what_is_killed_at_any_moment_leaves_nothing_and_harms_nobody_else() {
    needs_cri!();
    let mut random = Random::seeded("faults");
    let (states, sockets) = (names(Path::new(STATES)), names(Path::new(SOCKETS)));
    let mut node = Node::start();
    let config = node.pod_config("witness");
    let witness_pod = node.run_pod(&config);
    let witness = node.run_container(&witness_pod, &node.container_config("app", "sleep 100000"), &config);
    let pid = node.pid(&witness);
    let (shim, spawner) = (node.shims()[0], node.spawners()[0]);
    let untouched = Traces::of(&node, &states);
    let life = Duration::from_millis(if slow() { 6000 } else { 300 });
    let mut killed = [0; 3];
    let total = rounds(12);
    while killed.iter().sum::<usize>() < total {
        let victim = [Victim::Shim, Victim::Spawner, Victim::Containerd][random.below(3) as usize];
        let moment = random.moment(life);
        let name = "doomed";
        // What containerd makes of a pod before it knows of it, a network namespace for example, it forgets itself when
        // it is killed then: its victims are containers.
        let pod = (victim == Victim::Containerd).then(|| node.run_pod(&node.pod_config(name)));
        let hit = thread::scope(|scope| {
            let node = &node;
            let lived = scope.spawn(move || match pod {
                Some(pod) => container_life(node, &pod, &node.pod_config(name)),
                None => pod_life(node, name),
            });
            thread::sleep(moment);
            let find = || match victim {
                Victim::Shim => node.shims().into_iter().find(|pid| *pid != shim),
                Victim::Spawner => node.spawners().into_iter().find(|pid| *pid != spawner),
                Victim::Containerd => node.containerd().daemon_pid(),
            };
            let mut found = find();
            while found.is_none() && !lived.is_finished() {
                thread::sleep(Duration::from_millis(1));
                found = find();
            }
            if let Some(pid) = found {
                kill(pid);
            }
            let outcome = lived.join().unwrap();
            if victim == Victim::Spawner {
                assert_eq!(outcome, Ok(()), "a killed spawner is replaced without anybody noticing");
            }
            found.is_some()
        });
        if hit {
            killed[victim as usize] += 1;
        }
        if victim == Victim::Containerd {
            node.crash();
        }
        clean_up(&node, name);
        let mut now = Traces::of(&node, &states);
        let end = std::time::Instant::now() + Duration::from_secs(if slow() { 240 } else { 60 });
        while now != untouched && std::time::Instant::now() < end {
            thread::sleep(Duration::from_millis(50));
            now = Traces::of(&node, &states);
        }
        assert_eq!(now, untouched, "after {victim:?} was killed at {moment:?}, kill {killed:?}");
        assert_eq!(node.pid(&witness), pid);
        assert_eq!(node.sh(&witness, "echo alive").ok().stdout, "alive\n");
    }
    eprintln!("faults: killed shims, spawners and containerds: {killed:?}");
    node.remove_pod(&witness_pod);
    node.crash();
    forget_renamed_bundles(&node);
    node.assert_nothing_left();
    let left: Vec<_> = names(Path::new(SOCKETS)).difference(&sockets).cloned().collect();
    assert!(left.is_empty(), "sockets are left: {left:?}");
}
