//! Events of nodes: what `runx-node run` tells the cluster of its installations, and that nothing waits for that.

use runx_tests::command::eventually;
use runx_tests::machine::{Cluster, Machine, Running, one_package, serves, started, usual};
use runx_tests::needs_machine;
use serde_json::{Value, json};

fn run(machine: &Machine, cluster: &Cluster, words: &[&str]) -> Running {
    let flags = cluster.flags();
    let flags: Vec<&str> = flags.iter().map(String::as_str).chain(words.iter().copied()).collect();
    Running::start(machine, &flags)
}

/// What the only event with a reason says, and how often.
fn only(cluster: &Cluster, reason: &str) -> (String, u64) {
    let events = cluster.events(reason);
    let [event] = &events[..] else { panic!("{reason}: {events:?}") };
    (event["message"].as_str().expect("it has one").to_owned(), event["count"].as_u64().expect("it has one"))
}

#[test]
fn what_came_of_an_installation_is_an_event_of_the_node() {
    needs_machine!();
    let machine = started(&one_package(), "events", Some(&usual(2, "")));
    let cluster = Cluster::start();
    machine.sabotage(true);
    let mut running = run(&machine, &cluster, &[]);
    eventually("it is told that it was taken back", || !cluster.events("RunxRolledBack").is_empty());
    assert_eq!(running.end(), Some(0));
    let event = &cluster.events("RunxRolledBack")[0];
    assert_eq!(event["involvedObject"], json!({"apiVersion": "v1", "kind": "Node", "name": "one", "uid": "one"}));
    assert_eq!((&event["type"], &event["source"]["component"]), (&json!("Warning"), &json!("runx-node")));
    assert!(event["message"].as_str().is_some_and(|text| text.contains("its configuration was restored")), "{event}");
    for time in ["firstTimestamp", "lastTimestamp"] {
        let text = event[time].as_str().unwrap_or_default();
        assert!(text.len() == 20 && text.starts_with("20") && text.ends_with('Z'), "{event}");
    }
    machine.sabotage(false);
    let mut running = run(&machine, &cluster, &[]);
    eventually("it is told that it is installed", || !cluster.events("RunxInstalled").is_empty());
    assert_eq!(running.end(), Some(0));
    assert_eq!(cluster.events("RunxInstalled")[0]["type"], "Normal");
    let (text, count) = only(&cluster, "RunxInstalled");
    assert!(text.ends_with("is installed; containerd was restarted") && count == 1, "{text}: {count}");
    // Where nothing was done, nothing is told.
    let mut running = run(&machine, &cluster, &[]);
    eventually("it is ready", || running.get("/readyz").0 == 200);
    assert_eq!(running.end(), Some(0));
    assert_eq!(only(&cluster, "RunxInstalled").1, 1);
    machine.set_programs("two");
    let mut running = run(&machine, &cluster, &[]);
    let upgraded = |event: &Value| event["message"].as_str().is_some_and(|text| text.contains("upgraded"));
    eventually("it is told that it was upgraded", || cluster.events("RunxInstalled").iter().any(upgraded));
    assert_eq!(running.end(), Some(0));
    // What is the same has happened again, also for another process, and where it does not even begin.
    cluster.set_node(json!({"status": {"nodeInfo": {"containerRuntimeVersion": "cri-o://1.30.4"}}}));
    for (round, words) in [(1, &[][..]), (2, &[]), (3, &["--containerd", "/nosuch"])] {
        let mut running = run(&machine, &cluster, words);
        let told = || !cluster.events("RunxInstallFailed").is_empty() && only(&cluster, "RunxInstallFailed").1 == round;
        eventually("it is told why", told);
        assert_eq!(running.end(), Some(if words.is_empty() { 0 } else { 1 }));
    }
    assert!(only(&cluster, "RunxInstallFailed").0.contains("CRI-O"));
    assert_eq!(cluster.events("RunxRolledBack").len(), 1);
    let left = run_uninstall(&machine, &cluster);
    assert_eq!(left, 1, "that is no failed installation");
}

/// Takes runx away, and tells how many failures were told by then.
fn run_uninstall(machine: &Machine, cluster: &Cluster) -> usize {
    let mut running = run(machine, cluster, &["--uninstall"]);
    eventually("it is done", || running.get("/readyz").0 == 200);
    assert_eq!(running.end(), Some(0));
    cluster.events("RunxInstallFailed").len()
}

#[test]
fn nothing_waits_for_a_cluster_that_takes_no_events() {
    needs_machine!();
    let machine = started(&one_package(), "no events", Some(&usual(2, "")));
    let cluster = Cluster::start();
    cluster.keep_events_waiting(true);
    let mut running = run(&machine, &cluster, &[]);
    eventually("an event is told", || cluster.waiting().0 == 1);
    eventually("it is ready", || running.get("/readyz").0 == 200);
    assert_eq!(cluster.waiting(), (1, 0), "it is ready while the event waits still");
    assert_eq!(running.end(), Some(0));
    serves(&machine, true);
    assert!(cluster.events("RunxInstalled").is_empty());
    machine.node(&["uninstall"]).ok();
}
