//! `runx-node` where something goes wrong: containerds that do not come up, kills between any two steps, drift, and others
//! at work on the same node.

use std::fs;
use std::io::Read;
use std::process::{Child, Stdio};

use runx_tests::command::eventually;
use runx_tests::machine::{
    CONFIG, Cluster, HANDLER, IMPORTS, Killed, Machine, Running, every_package, one_package, run_until, serves,
    started, status, usual, usual_for_pods,
};
use runx_tests::{needs_machine, rounds};

#[test]
fn a_containerd_that_does_not_start_gets_its_files_back_and_serves_runc() {
    needs_machine!();
    for package in every_package() {
        let imports = if package.version < (2, 0) { "" } else { IMPORTS };
        let machine = started(&package, "sabotage", Some(&usual(2, imports)));
        let cluster = Cluster::start();
        let flags = cluster.flags();
        let install: Vec<&str> =
            ["install", "--timeout", "5"].into_iter().chain(flags.iter().map(String::as_str)).collect();
        let (before, restarts) = (machine.files("etc"), machine.restarts());
        machine.sabotage(true);
        for attempt in 1..=2 {
            machine.node(&install).fails(1, &["its configuration was restored", "restart containerd"]);
            assert_eq!(machine.files("etc"), before);
            serves(&machine, false);
            assert_eq!(machine.restarts(), restarts + 2 * attempt);
        }
        assert_eq!(status(&machine)["state"], "failed");
        // No loop of restarts.
        machine.node(&install).fails(1, &["2 times", "--force"]);
        assert_eq!(machine.restarts(), restarts + 4);
        assert_eq!(cluster.label("runx.dev/ready"), ["installing", "failed", "installing", "failed"]);
        machine.sabotage(false);
        machine.node(&[&install[..], &["--force"]].concat()).ok();
        serves(&machine, true);
        assert_eq!(cluster.label("runx.dev/ready").last(), Some(&"true".into()));
        machine.node(&["uninstall"]).ok();
        assert_eq!(machine.files("etc"), before);
    }
}

#[test]
fn a_containerd_that_reads_another_file_is_found_out() {
    needs_machine!();
    let machine = Machine::prepare(&one_package(), Some(&usual(2, "")));
    machine.set_programs("one");
    machine.write("etc/other.toml", &usual(2, ""));
    fs::write(machine.path().join("config"), "/etc/other.toml").expect("write a file");
    machine.restart();
    let before = machine.files("etc");
    machine.node(&["install", "--timeout", "2"]).fails(1, &["after 2 s", "does not serve the handler \"runx\""]);
    assert_eq!(machine.files("etc"), before);
    machine.node(&["install", "--containerd-config", "/etc/other.toml"]).ok();
    serves(&machine, true);
}

#[test]
fn a_containerd_that_is_down_is_not_restarted_where_nothing_is_to_be_changed() {
    needs_machine!();
    let machine = started(&one_package(), "down", Some(&usual(2, "")));
    machine.node(&["install"]).ok();
    let restarts = machine.restarts();
    machine.stop();
    machine.node(&["install", "--timeout", "1"]).fails(1, &["containerd does not answer within 1 s"]);
    assert_eq!(machine.restarts(), restarts);
    machine.restart();
    machine.node(&["install"]).ok();
    assert_eq!(machine.restarts(), restarts + 1, "by the test alone");
}

/// Kills a command at its steps, one after the other, and lets it be done again.
fn kill_at_each_step(machine: &Machine, command: &[&str], begin: impl Fn(), end: impl Fn(&str)) {
    let stride = std::env::var_os("RUNX_ROUNDS").map_or(11, |_| 1);
    // A sample begins at another one of the first steps each time, so that all are met in the end.
    let first = std::process::id() as usize % stride;
    let mut count = 0;
    for nth in (first..).step_by(stride) {
        begin();
        match run_until(&mut machine.command(command), nth).expect("follow the installer") {
            Killed::Ended(code) => {
                assert_eq!(code, 0, "{}", machine.log());
                break;
            }
            Killed::At(step) => {
                count += 1;
                if count % 25 == 0 {
                    eprintln!("{command:?}: killed at {count} steps so far");
                }
                machine.node(command).ok();
                end(&format!("killed before step {nth}, {step}"));
            }
        }
    }
    eprintln!("{command:?}: killed at {count} steps");
    assert!(count * stride >= 60, "there are more steps than {}", count * stride);
}

#[test]
fn an_installation_that_is_killed_at_any_step_is_completed_by_the_next() {
    needs_machine!();
    for package in every_package() {
        let imports = if package.version < (2, 0) { "" } else { IMPORTS };
        let machine = started(&package, "killed while installing", Some(&usual(2, imports)));
        let before = machine.changeable();
        kill_at_each_step(
            &machine,
            &["install"],
            || {
                machine.node(&["uninstall"]).ok();
                assert_eq!(machine.changeable(), before);
            },
            |step| {
                assert_eq!(machine.node(&["status"]).code, 0, "{step}: {}", status(&machine));
                serves(&machine, true);
                let left: Vec<_> = machine
                    .changeable()
                    .into_keys()
                    .filter(|path| path.to_string_lossy().contains(".runx-new"))
                    .collect();
                assert!(left.is_empty(), "{step}: {left:?}");
                // Nothing is left to do.
                let restarts = machine.restarts();
                machine.node(&["install"]).ok();
                assert_eq!(machine.restarts(), restarts, "{step}");
            },
        );
    }
}

#[test]
fn an_uninstallation_that_is_killed_at_any_step_is_completed_by_the_next() {
    needs_machine!();
    for package in every_package() {
        let imports = if package.version < (2, 0) { "" } else { IMPORTS };
        let machine = started(&package, "killed while uninstalling", Some(&usual(2, imports)));
        let before = machine.changeable();
        kill_at_each_step(
            &machine,
            &["uninstall"],
            || drop(machine.node(&["install"]).ok()),
            |step| {
                assert_eq!(machine.changeable(), before, "{step}");
                serves(&machine, false);
            },
        );
    }
}

#[test]
fn a_rollback_that_is_killed_at_any_step_is_completed_by_the_next() {
    needs_machine!();
    let machine = started(&one_package(), "killed while rolling back", Some(&usual(2, "")));
    let before = machine.files("etc");
    let command = ["install", "--timeout", "5", "--force"];
    let stride = std::env::var_os("RUNX_ROUNDS").map_or(23, |_| 1);
    for nth in (std::process::id() as usize % stride..).step_by(stride) {
        machine.sabotage(true);
        let killed = run_until(&mut machine.command(&command), nth).expect("follow the installer");
        // Whatever it was killed at: as long as it cannot be, all is as it was, and then it is installed.
        machine.node(&command).fails(1, &["restored"]);
        assert_eq!(machine.files("etc"), before, "{killed:?} at {nth}");
        serves(&machine, false);
        machine.sabotage(false);
        machine.node(&command).ok();
        serves(&machine, true);
        machine.node(&["uninstall"]).ok();
        assert_eq!(machine.files("etc"), before, "{killed:?} at {nth}");
        if let Killed::Ended(code) = killed {
            assert_eq!(code, 1);
            break;
        }
    }
}

#[test]
fn the_daemon_tells_how_it_is_repairs_drift_and_leaves_runx_when_it_ends() {
    needs_machine!();
    let machine = started(&one_package(), "daemon", Some(&usual(2, "")));
    let mut running = Running::start(&machine, &[]);
    eventually("it is ready", || running.get("/readyz").0 == 200);
    assert_eq!(running.get("/healthz").0, 200);
    assert_eq!(running.get("/other").0, 404);
    let (_, metrics) = running.get("/metrics");
    for line in [
        "runx_install_state{state=\"installed\"} 1",
        "runx_install_state{state=\"failed\"} 0",
        "runx_handler_registered{handler=\"runx\"} 1",
        "runx_config_drift 0",
        "runx_containerd_restarts_total{reason=\"install\"} 1",
        "runx_install_rollbacks_total 0",
        "runx_containers{kind=\"native\",state=\"started\"} 0",
    ] {
        assert!(metrics.lines().any(|found| found == line), "{line}: {metrics}");
    }
    assert!(
        metrics.contains("distro=\"kubeadm\"") && metrics.contains("runx_install_duration_seconds{phase=\"restart\"}")
    );

    // Somebody else writes the file anew.
    machine.write(CONFIG, &usual(2, ""));
    machine.restart();
    eventually("it is repaired", || machine.handlers().is_some_and(|handlers| handlers.contains(&HANDLER.to_owned())));
    eventually("it says so", || {
        running.get("/metrics").1.contains("runx_containerd_restarts_total{reason=\"drift\"} 1")
    });
    eventually("it is ready", || running.get("/readyz").0 == 200);

    assert_eq!(running.end(), Some(0));
    serves(&machine, true);
    machine.node(&["uninstall"]).ok();
    assert_eq!(machine.read(CONFIG), usual(2, ""));
}

#[test]
fn the_daemon_tells_of_starts_by_kind() {
    needs_machine!();
    let machine = started(&one_package(), "starts", Some(&usual_for_pods()));
    machine.import_image();
    machine.set_real_programs("one");
    let mut running = Running::start(&machine, &[]);
    eventually("it is ready", || running.get("/readyz").0 == 200);
    let has = |line: &str| running.get("/metrics").1.lines().any(|found| found == line);
    assert!(has("runx_container_start_seconds_count{kind=\"sandbox\"} 0"), "{}", running.get("/metrics").1);
    let pod = machine.run_pod("counted", HANDLER);
    let plain = machine.run_pod("plain", "runc");
    eventually("it is counted", || has("runx_container_start_seconds_bucket{kind=\"sandbox\",le=\"+Inf\"} 1"));
    assert!(
        has("runx_container_start_seconds_count{kind=\"native\"} 0") && has("runx_container_start_failures_total 0")
    );
    machine.remove_pod(&plain);
    machine.remove_pod(&pod);
    assert_eq!(running.end(), Some(0));
    machine.node(&["uninstall"]).ok();
}

#[test]
fn a_restart_waits_its_turn_without_keeping_others_out_and_is_given_up_at_the_end() {
    needs_machine!();
    let machine = started(&one_package(), "in turn", Some(&usual(2, "")));
    let restarts = machine.restarts();
    let wait = ["--jitter", "86400"];
    let mut running = Running::start(&machine, &wait);
    eventually("it waits", || running.get("/readyz").1.contains("not on all nodes at once"));
    assert_eq!((running.get("/readyz").0, running.get("/healthz").0), (503, 200));
    assert_eq!(running.end(), Some(0));
    assert_eq!((machine.restarts(), machine.read(CONFIG)), (restarts, usual(2, "")));
    // Who installs by hand meanwhile does not wait.
    let mut running = Running::start(&machine, &wait);
    eventually("it waits", || running.get("/readyz").1.contains("not on all nodes at once"));
    machine.node(&["install"]).ok();
    assert_eq!(machine.restarts(), restarts + 1);
    assert_eq!(running.end(), Some(0));
    // Where nothing is to be restarted, nothing is waited for.
    let mut running = Running::start(&machine, &wait);
    eventually("it is ready", || running.get("/readyz").0 == 200);
    assert_eq!(running.end(), Some(0));
    machine.node(&["uninstall"]).ok();
    let mut running = Running::start(&machine, &["--jitter", "1"]);
    eventually("it is ready", || running.get("/readyz").0 == 200);
    assert_eq!(machine.restarts(), restarts + 3);
    assert_eq!(running.end(), Some(0));
    machine.node(&["uninstall"]).ok();
    assert_eq!(machine.read(CONFIG), usual(2, ""));
}

#[test]
fn the_daemon_takes_runx_away_when_it_is_asked_to() {
    needs_machine!();
    let machine = started(&one_package(), "taken away", Some(&usual(2, "")));
    machine.node(&["install"]).ok();
    let mut running = Running::start(&machine, &["--uninstall"]);
    eventually("it is done", || running.get("/readyz").0 == 200);
    serves(&machine, false);
    assert_eq!(machine.read(CONFIG), usual(2, ""));
    assert!(running.get("/metrics").1.contains("runx_install_state{state=\"absent\"} 1"));
    assert_eq!(running.end(), Some(0));
}

#[test]
fn the_daemon_is_not_ready_while_the_node_is_broken_and_says_why() {
    needs_machine!();
    let machine = started(&one_package(), "broken", Some(&usual(2, "")));
    machine.sabotage(true);
    let mut running = Running::start(&machine, &[]);
    eventually("it has given up", || running.get("/readyz").1.contains("its configuration was restored"));
    assert_eq!((running.get("/readyz").0, running.get("/healthz").0), (503, 200));
    eventually("it says so", || running.get("/metrics").1.contains("runx_install_rollbacks_total 1"));
    assert_eq!(running.end(), Some(0));
    serves(&machine, false);
}

#[test]
fn two_installers_at_once_do_not_meet() {
    needs_machine!();
    let machine = started(&one_package(), "two at once", Some(&usual(2, "")));
    for _ in 0..rounds(3) {
        let mut children: Vec<Child> = (0..4)
            .map(|_| {
                machine.command(&["install"]).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("start it")
            })
            .collect();
        let mut won = 0;
        for child in &mut children {
            let mut text = String::new();
            let _ = child.stderr.take().expect("it is piped").read_to_string(&mut text);
            match child.wait().expect("wait for it").code() {
                Some(0) => won += 1,
                code => assert!(code == Some(1) && text.contains("another runx-node is at work"), "{code:?}: {text}"),
            }
        }
        assert!(won >= 1);
        serves(&machine, true);
        machine.node(&["uninstall"]).ok();
        assert_eq!(machine.read(CONFIG), usual(2, ""));
    }
}
