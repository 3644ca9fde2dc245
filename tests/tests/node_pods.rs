//! `runx-node` and the pods of a node: whom it leaves alone, what keeps programs, and what the node's labels say.

use std::fs::{self, File};
use std::process::Command;
use std::time::Duration;

use k8s_cri::v1 as api;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use runx_tests::command::{Done, eventually, run};
use runx_tests::machine::{
    CONFIG, Cluster, HANDLER, Machine, Package, Running, every_package, one_package, serves, started, status, usual,
};
use runx_tests::needs_machine;
use serde_json::json;

/// A machine with pods of our handler.
fn with_pods(name: &str) -> Machine {
    with_pods_on(&one_package(), name)
}

fn with_pods_on(package: &Package, name: &str) -> Machine {
    let config = usual(2, "").replacen(
        "[plugins.\"io.containerd.grpc.v1.cri\"]\n",
        "[plugins.\"io.containerd.grpc.v1.cri\"]\n  restrict_oom_score_adj = true\n",
        1,
    );
    let machine = started(package, name, Some(&config));
    machine.import_image();
    machine.set_real_programs("one");
    machine.node(&["install"]).ok();
    machine
}

fn ctr(machine: &Machine, words: &[&str]) -> Done {
    let mut command = Command::new("nsenter");
    run(command.args(&machine.enter()[1..]).args(["ctr", "--namespace", "k8s.io"]).args(words))
}

fn in_use(machine: &Machine) -> Vec<bool> {
    let sets = status(machine)["programs"].as_array().cloned().unwrap_or_default();
    sets.iter().map(|set| set["inUse"] == true).collect()
}

#[test]
fn a_pod_that_ended_and_may_be_started_again_is_not_uninstalled_under() {
    needs_machine!();
    let machine = with_pods("ended pods");
    let pod = machine.run_pod("ended", HANDLER);
    machine.client().stop_pod_sandbox(api::StopPodSandboxRequest { pod_sandbox_id: pod.clone() }).expect("stop a pod");
    let restarts = machine.restarts();
    machine.node(&["uninstall"]).fails(1, &["do not run now", "test/ended", "--force"]);
    assert_eq!(machine.restarts(), restarts);
    serves(&machine, true);
    machine.remove_pod(&pod);
    eventually("its shim ends", || in_use(&machine) == [false]);
    machine.node(&["uninstall"]).ok();
    serves(&machine, false);
}

#[test]
fn containers_outlive_restarts_of_containerd_which_has_no_shim_of_ours_in_its_path() {
    needs_machine!();
    for package in every_package() {
        let machine = with_pods_on(&package, "restarts under pods");
        let pod = machine.run_pod("outlives", HANDLER);
        let container = machine.run_in_pod(&pod, "outlives", "first");
        for _ in 0..2 {
            machine.restart();
            assert!(machine.pod_is_ready(&pod), "{}", machine.log());
            assert_eq!(machine.container_state(&container), api::ContainerState::ContainerRunning, "{}", machine.log());
        }
        // It is ours still: another one comes beside it, and it ends as it is told to.
        let second = machine.run_in_pod(&pod, "outlives", "second");
        assert_eq!(machine.container_state(&second), api::ContainerState::ContainerRunning);
        let stop = api::StopContainerRequest { container_id: container.clone(), timeout: 0 };
        machine.client().stop_container(stop).expect("stop a container");
        assert_eq!(machine.container_state(&container), api::ContainerState::ContainerExited);
        // Also where runx is taken away under them.
        machine.node(&["uninstall", "--force"]).ok();
        let tasks = ctr(&machine, &["tasks", "ls"]).ok();
        assert!(tasks.stdout.lines().any(|line| line.contains(&second) && line.contains("RUNNING")), "{tasks:?}");
        machine.node(&["install"]).ok();
        machine.remove_pod(&pod);
        machine.node(&["uninstall"]).ok();
    }
}

#[test]
fn a_shim_that_starts_while_somebody_looks_at_its_lock_waits_and_has_it_then() {
    needs_machine!();
    let machine = with_pods("a lock that is looked at");
    let lock = File::open(machine.root().join("opt/runx/current/.runx-lock")).expect("open the lock");
    let looked_at = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, e)| e).expect("lock it");
    let pod = std::thread::scope(|scope| {
        let pod = scope.spawn(|| machine.run_pod("waits", HANDLER));
        std::thread::sleep(Duration::from_millis(500));
        drop(looked_at);
        pod.join().expect("the pod runs")
    });
    assert_eq!(in_use(&machine), [true]);
    // Also when the set is repaired: the programs are new files then.
    let shim = fs::canonicalize(machine.root().join("opt/runx/current/containerd-shim-runx-v1")).expect("it is there");
    let damaged = shim.with_extension("damaged");
    fs::write(&damaged, "x").expect("write a file");
    fs::rename(&damaged, &shim).expect("damage the shim");
    machine.node(&["install"]).ok();
    assert_eq!(in_use(&machine), [true]);
    machine.remove_pod(&pod);
    eventually("its shim ends", || in_use(&machine) == [false]);
}

#[test]
fn the_nodes_label_is_what_containerd_serves_whatever_happens_to_its_files() {
    needs_machine!();
    let machine = started(&one_package(), "a label that follows", Some(&usual(2, "")));
    let cluster = Cluster::start();
    let flags = cluster.flags();
    let mut running = Running::start(&machine, &flags.iter().map(String::as_str).collect::<Vec<_>>());
    let last = || cluster.label("runx.dev/ready").last().cloned();
    eventually("it is installed", || last() == Some("true".into()));
    // Somebody may take it away: it is set again after a while.
    let count = |value: &str| cluster.label("runx.dev/ready").iter().filter(|it| it.as_str() == Some(value)).count();
    let set = count("true");
    eventually("it is set again", || count("true") > set);
    // Somebody has containerd read another file, and ours cannot be read.
    machine.write("etc/other.toml", &usual(2, ""));
    fs::write(machine.path().join("config"), "/etc/other.toml").expect("write a file");
    machine.write(CONFIG, "version = 2\n[a]\npassword = \"secret\n");
    machine.restart();
    eventually("nobody is sent there", || last() == Some("failed".into()));
    eventually("it says why", || running.get("/readyz").1.contains("no TOML: line 3"));
    assert!(!running.get("/readyz").1.contains("secret"));
    assert!(running.get("/metrics").1.contains("runx_node_failing 1"));
    fs::remove_file(machine.path().join("config")).expect("remove a file");
    machine.write(CONFIG, &usual(2, ""));
    machine.restart();
    eventually("it is installed again", || last() == Some("true".into()));
    assert_eq!(running.end(), Some(0));
    machine.node(&["uninstall"]).ok();
}

#[test]
fn no_pods_are_sent_to_a_handler_of_our_name_that_is_somebody_elses() {
    needs_machine!();
    let theirs = "\n[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runx]\n  runtime_type = \"io.containerd.runc.v2\"\n";
    let config = usual(2, "") + theirs;
    let machine = started(&one_package(), "another's handler", Some(&config));
    let cluster = Cluster::start();
    let flags = cluster.flags();
    let mut running = Running::start(&machine, &flags.iter().map(String::as_str).collect::<Vec<_>>());
    serves(&machine, true);
    let told = || cluster.label("runx.dev/ready");
    let failed = || told().iter().filter(|it| it.as_str() == Some("failed")).count();
    eventually("it is told twice", || failed() >= 2);
    assert!(told().iter().all(|it| it.as_str() == Some("failed")), "{:?}", told());
    assert_eq!(machine.read(CONFIG), config);
    running.end();
}

#[test]
fn a_node_that_the_cluster_knows_for_another_than_it_looks_like_is_refused_by_name() {
    needs_machine!();
    // A containerd that is not the kubelet's is all that a pod sees there.
    let machine = started(&one_package(), "another runtime", Some(&usual(2, "")));
    let cluster = Cluster::start();
    let mut flags = cluster.flags();
    flags.extend(["--distribution", "kubeadm"].map(str::to_owned));
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let install = [&["install"], &flags[..]].concat();
    let runtime = |version: &str| json!({"status": {"nodeInfo": {"containerRuntimeVersion": version}}});
    let microk8s = json!({"metadata": {"labels": {"microk8s.io/cluster": "true"}}});
    let (before, restarts) = (machine.changeable(), machine.restarts());
    for (node, words) in [
        (runtime("cri-o://1.30.4"), ["CRI-O", "/etc/crio/crio.conf.d"]),
        (microk8s.clone(), ["MicroK8s", "template"]),
        (runtime("docker://27.0.1"), ["docker://27.0.1", "containerd"]),
        (runtime("containerd://1.7.11-k3s2"), ["k3s or rke2", "--distribution"]),
    ] {
        cluster.set_node(node);
        machine.node(&install).fails(1, &words);
        assert_eq!((machine.changeable(), machine.restarts()), (before.clone(), restarts), "{words:?}");
    }
    assert!(cluster.label("runx.dev/ready").is_empty(), "no pods are sent there");
    // Where no containerd is to be seen at all, it is named as well.
    cluster.set_node(runtime("cri-o://1.30.4"));
    let nowhere = [&install[..], &["--containerd", "/nosuch"]].concat();
    machine.node(&nowhere).fails(1, &["CRI-O"]);
    // What was there already is not served any more, and can be taken away.
    cluster.set_node(runtime("containerd://2.1.4"));
    machine.node(&install).ok();
    cluster.set_node(microk8s);
    let mut running = Running::start(&machine, &flags);
    eventually("it says why", || running.get("/readyz").1.contains("MicroK8s"));
    eventually("nobody is sent there", || cluster.label("runx.dev/ready").last() == Some(&"failed".into()));
    assert_eq!(running.end(), Some(0));
    assert_eq!(cluster.label("runx.dev/ready"), ["installing", "true", "failed"]);
    machine.node(&[&["uninstall"], &flags[..]].concat()).ok();
    assert_eq!(machine.changeable(), before);
}

#[test]
fn programs_of_a_refused_installation_go_when_the_next_one_is_for_another_place() {
    needs_machine!();
    let theirs = "\n[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runx]\n  runtime_type = \"io.containerd.runc.v2\"\n";
    let machine = started(&one_package(), "two places", Some(&(usual(2, "") + theirs)));
    machine.node(&["install", "--install-dir", "/opt/first"]).fails(1, &["not by runx-node"]);
    machine.write(CONFIG, &usual(2, ""));
    machine.restart();
    machine.node(&["install", "--install-dir", "/opt/second"]).ok();
    assert!(!machine.root().join("opt/first").exists());
    machine.node(&["uninstall", "--install-dir", "/opt/second"]).ok();
    assert!(!machine.root().join("opt/second").exists());
    assert_eq!(machine.read(CONFIG), usual(2, ""));
}

#[test]
fn a_pools_file_that_becomes_a_fifo_keeps_nobody_waiting() {
    needs_machine!();
    let machine = started(&one_package(), "a pool's file", Some(&usual(2, "")));
    machine.node(&["install"]).ok();
    let file = machine.root().join("var/lib/runx/pools/judge.prom");
    fs::create_dir_all(file.parent().expect("it has a parent")).expect("make a directory");
    fs::write(&file, "runx_pool_ready 4\n").expect("write a file");
    let mut running = Running::start(&machine, &[]);
    let pools = |count: usize| {
        let wanted = format!("runx_pools {count}");
        running.get("/metrics").1.lines().any(|line| line == wanted)
    };
    eventually("the pool is told of", || pools(1));
    let fifo = file.with_extension("new");
    mkfifo(&fifo, Mode::S_IRUSR | Mode::S_IWUSR).expect("make a FIFO");
    fs::rename(&fifo, &file).expect("put it in the file's place");
    // Nobody writes into it, and each look meets it.
    eventually("it is looked at on", || pools(0));
    fs::write(file.with_file_name("other.prom"), "runx_pool_ready 1\n").expect("write a file");
    eventually("the next pool is told of", || pools(1));
    assert_eq!(running.get("/readyz").0, 200);
    assert_eq!(running.end(), Some(0));
    machine.node(&["uninstall"]).ok();
}
