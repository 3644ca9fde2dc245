//! Ending containers: several at once, and between two starts.

use std::fs::File;
use std::process::Stdio;

use runx_tests::command::eventually;
use runx_tests::container::Containers;
use runx_tests::needs_root;

/// A script that ends, when it is asked to, once the others were asked, too.
fn waits_for(own: &str, other: &str) -> String {
    format!(
        "rm -f /tmp/{own}.*; \
         trap 'touch /tmp/{own}.asked; while ! [ -e /tmp/{other}.asked ]; do sleep 0.05; done; touch /tmp/{own}.met; exit 0' TERM; \
         touch /tmp/{own}.on; while :; do sleep 0.05; done"
    )
}

#[test]
fn several_are_asked_at_once_and_told_of_in_the_given_order() {
    needs_root!();
    let containers = Containers::new();
    let there = |name: &str| containers.rootfs().join("tmp").join(name).exists();
    let a = containers.background("a", &[], &waits_for("a", "b"));
    let b = containers.background("b", &[], &waits_for("b", "a"));
    let on = || {
        for name in ["a.on", "b.on"] {
            eventually(name, || there(name));
        }
    };
    on();
    assert_eq!(containers.container(&["stop", "-t", "15", &b, &a]).ok().stdout, format!("{b}\n{a}\n"));
    let code = |id: &str| containers.inspect(id)["state"]["exitCode"].as_i64();
    assert_eq!((code(&a), code(&b)), (Some(0), Some(0)));
    let off = || {
        for name in ["a.on", "b.on"] {
            std::fs::remove_file(containers.rootfs().join("tmp").join(name)).unwrap();
        }
    };
    off();
    containers.container(&["start", &a, &b]).ok();
    on();
    off();
    let done = containers.container(&["restart", "-t", "15", &a, "nope", &b]);
    assert_eq!(done.stdout, format!("{a}\n{b}\n"));
    done.fails(1, &["no such container", "nope"]);
    assert_eq!((containers.status(&a), containers.status(&b)), ("running".into(), "running".into()));
    on();
    assert_eq!(containers.container(&["delete", "-t", "15", &a, &b]).ok().stdout, format!("{a}\n{b}\n"));
    assert!(there("a.met") && there("b.met"));
    containers.assert_nothing_left();
}

#[test]
fn one_that_cannot_be_ended_keeps_none_of_the_others() {
    needs_root!();
    let containers = Containers::new();
    let a = containers.background("a", &[], "sleep 600");
    let b = containers.background("b", &["--rm"], "trap 'exit 0' TERM; echo on; while :; do sleep 0.05; done");
    containers.until_logged(&b, "on");
    let done = containers.container(&["stop", "-t", "0", "nope", &a, &b]);
    assert_eq!(done.stdout, format!("{a}\n{b}\n"));
    done.fails(1, &["no such container"]);
    assert_eq!(containers.status(&a), "exited");
    // Twice is as good as once, and what is not there is fine for --force.
    assert_eq!(containers.container(&["rm", "-f", &a, "nope", &a]).ok().stdout, format!("{a}\nnope\n{a}\n"));
    containers.assert_nothing_left();
}

#[test]
fn ctrl_c_between_two_starts_ends_them() {
    needs_root!();
    let containers = Containers::new();
    let id = containers.id("a");
    let mut command =
        containers.run_command(&["--name", &id, "--restart", "always"], &["sh", "-c", "echo try; exit 3"]);
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
    let state = || containers.inspect(&id)["state"].clone();
    eventually("it waits for long", || {
        containers.container(&["ls", "-aq"]).stdout.contains(&id) && state()["restartCount"].as_i64() >= Some(4)
    });
    let mut status = None;
    eventually("the command ends", || {
        if state()["status"] == "restarting" {
            // SAFETY: kill takes numbers; the process is a child that was not waited for.
            unsafe { libc::kill(child.id() as i32, libc::SIGINT) };
            std::thread::sleep(std::time::Duration::from_millis(200));
        }
        status = child.try_wait().unwrap();
        status.is_some()
    });
    assert_eq!(status.unwrap().code(), Some(3));
    containers.until(&id, "exited");
    let count = state()["restartCount"].clone();
    std::thread::sleep(std::time::Duration::from_millis(500));
    assert_eq!(state()["restartCount"], count);
    containers.container(&["rm", &id]).ok();
    containers.assert_nothing_left();
}

#[test]
fn one_ctrl_c_while_the_next_start_is_on_its_way_is_enough() {
    needs_root!();
    let containers = Containers::new();
    let id = containers.id("a");
    let mut command =
        containers.run_command(&["--name", &id, "--restart", "always"], &["sh", "-c", "sleep 0.3; exit 3"]);
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
    let state = || containers.inspect(&id)["state"].clone();
    eventually("it waits for long", || {
        containers.container(&["ls", "-aq"]).stdout.contains(&id)
            && state()["status"] == "restarting"
            && state()["restartCount"].as_i64() >= Some(3)
    });
    // Its monitor comes to wait for the lock, and the signal after that.
    let (lock, waiting) = held_lock(&containers, &id);
    eventually("the monitor is about to start it", || waiting() == 1);
    // SAFETY: kill takes numbers; the process is a child that was not waited for.
    unsafe { libc::kill(child.id() as i32, libc::SIGINT) };
    eventually("the command waits for the lock, too", || waiting() == 2);
    drop(lock);
    let mut status = None;
    eventually("the command ends", || {
        status = child.try_wait().unwrap();
        status.is_some()
    });
    // The next start may have heard it, too, or have come to nothing.
    let code = status.unwrap().code();
    assert!(matches!(code, Some(3 | 130)), "{code:?}");
    containers.until(&id, "exited");
    containers.container(&["rm", &id]).ok();
    containers.assert_nothing_left();
}

#[test]
fn one_that_somebody_else_is_at_keeps_none_of_the_others() {
    needs_root!();
    let containers = Containers::new();
    let script = "trap 'exit 0' TERM; echo on; while :; do sleep 0.05; done";
    let [a, b] = ["a", "b"].map(|name| containers.background(name, &[], script));
    for id in [&a, &b] {
        containers.until_logged(id, "on");
    }
    let lock = File::open(containers.directory_of(&a)).unwrap();
    lock.lock().unwrap();
    let mut command = containers.command(&["container", "stop", &a, &b]);
    let mut stop = command.stdout(Stdio::null()).spawn().unwrap();
    let ended = || containers.status(&b) == "exited";
    let in_time = (0..500).any(|_| {
        std::thread::sleep(std::time::Duration::from_millis(20));
        ended()
    });
    // What has ended needs no lock to be found so.
    let again = in_time.then(|| containers.container(&["stop", &b]));
    let waits = stop.try_wait().unwrap().is_none();
    drop(lock);
    assert!(stop.wait().unwrap().success());
    assert!(in_time, "the end of one waits for the lock of another one");
    again.unwrap().ok();
    assert!(waits && containers.status(&a) == "exited");
    containers.container(&["rm", &a, &b]).ok();
    containers.assert_nothing_left();
}

/// How often a process let others go on of its own accord.
fn switches(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:")).unwrap();
    line.trim().parse().unwrap()
}

/// A container's lock, which is held, and how many wait for it.
fn held_lock(containers: &Containers, id: &str) -> (File, impl Fn() -> usize) {
    let lock = File::open(containers.directory_of(id)).unwrap();
    lock.lock().unwrap();
    let inode = std::os::unix::fs::MetadataExt::ino(&lock.metadata().unwrap());
    let waiting = move || {
        let locks = std::fs::read_to_string("/proc/locks").unwrap();
        locks.lines().filter(|line| line.contains("->") && line.contains(&format!(":{inode} "))).count()
    };
    (lock, waiting)
}

/// Whether a process looks at nothing while it waits.
fn rests(pid: u32) -> bool {
    let before = switches(pid);
    std::thread::sleep(std::time::Duration::from_secs(1));
    switches(pid) - before < 10
}

#[test]
fn who_waits_for_a_lock_or_a_monitor_does_nothing_meanwhile() {
    needs_root!();
    let containers = Containers::new();
    let id = containers.background("a", &[], "echo on; exec sleep 600");
    containers.until_logged(&id, "on");
    let stop = || {
        let mut command = containers.command(&["container", "stop", "-t", "1", &id]);
        command.stdout(Stdio::null()).spawn().unwrap()
    };
    let (lock, waiting) = held_lock(&containers, &id);
    let mut killed = stop();
    let waits = || eventually("somebody waits for the lock", || waiting() == 1);
    waits();
    let rested = rests(killed.id());
    // Who is killed leaves nobody who waits.
    killed.kill().unwrap();
    killed.wait().unwrap();
    eventually("nobody waits for the lock", || waiting() == 0);
    let mut stopped = stop();
    waits();
    // Its monitor does not come to clear up.
    let monitor = containers.inspect(&id)["state"]["monitorPid"].as_i64().unwrap() as i32;
    // SAFETY: kill takes numbers; the process is one of this test's.
    let signal = |number| assert_eq!(unsafe { libc::kill(monitor, number) }, 0);
    signal(libc::SIGSTOP);
    drop(lock);
    eventually("it has been killed", || containers.status(&id) == "stopping");
    // It has seen that in the next moment.
    let rested_then = (0..5).any(|_| rests(stopped.id()));
    let waits_still = stopped.try_wait().unwrap().is_none();
    signal(libc::SIGCONT);
    assert!(stopped.wait().unwrap().success());
    assert!(rested && rested_then && waits_still, "{rested} {rested_then} {waits_still}");
    assert_eq!(containers.status(&id), "exited");
    containers.container(&["rm", &id]).ok();
    containers.assert_nothing_left();
}
