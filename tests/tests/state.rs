//! Several commands on one container at the same instant, and pids that are somebody else's by now.

use std::fs;
use std::os::fd::AsRawFd;
use std::process::{Child, Command, Stdio};
use std::sync::Barrier;

use runx_tests::bundle::Bundle;
use runx_tests::command::{Done, eventually, run_detached};
use runx_tests::{needs_root, rounds};

/// Runs commands of the bundle all at once. Each writes to a file of its own: containers keep their creator's
/// streams.
fn at_once(bundle: &Bundle, lines: &[&[&str]]) -> Vec<Done> {
    // Written by the call, once and not by each.
    let commands: Vec<Command> = lines.iter().map(|line| bundle.command(line)).collect();
    let barrier = Barrier::new(lines.len());
    std::thread::scope(|scope| {
        let threads: Vec<_> = commands
            .into_iter()
            .enumerate()
            .map(|(i, mut command)| {
                let output = bundle.scratch().join(format!("output-{i}"));
                let _ = fs::remove_file(&output);
                let barrier = &barrier;
                scope.spawn(move || {
                    barrier.wait();
                    run_detached(&mut command, &output)
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("a command")).collect()
    })
}

/// Fails the test unless each command succeeded, or failed with one of these words.
#[track_caller]
fn assert_known(done: &[Done], words: &[&str]) {
    // A process that a signal for all of its container hit is no failure of the command.
    let hit = |done: &Done| done.code > 128 && done.code != 255 && done.stderr.is_empty();
    for done in done.iter().filter(|done| done.code != 0 && !hit(done)) {
        assert!(words.iter().any(|word| done.stderr.contains(word)), "exit code {}: {}", done.code, done.stderr);
    }
}

fn successes(done: &[Done]) -> usize {
    done.iter().filter(|done| done.code == 0).count()
}

#[test]
fn of_several_starts_one_wins() {
    needs_root!();
    let bundle = Bundle::script("echo started; sleep 100");
    for _ in 0..rounds(5) {
        bundle.create().ok();
        let start: &[&str] = &["start", bundle.id()];
        let done = at_once(&bundle, &[start; 4]);
        assert_eq!(successes(&done), 1, "{done:?}");
        assert_known(&done, &["cannot start an already running container"]);
        bundle.runx(&["delete", "--force", bundle.id()]).ok();
    }
    bundle.assert_nothing_left();
}

#[test]
fn of_several_creates_one_wins() {
    needs_root!();
    let bundle = Bundle::script("sleep 100");
    for _ in 0..rounds(5) {
        let create: &[&str] = &["create", bundle.id()];
        let done = at_once(&bundle, &[create; 4]);
        assert_eq!(successes(&done), 1, "{done:?}");
        assert_known(&done, &["container with given ID already exists"]);
        assert_eq!(bundle.state()["status"], "created");
        bundle.runx(&["delete", bundle.id()]).ok();
    }
    bundle.assert_nothing_left();
}

#[test]
fn several_deletes_delete_once() {
    needs_root!();
    let bundle = Bundle::script("sleep 100");
    for _ in 0..rounds(5) {
        bundle.begin();
        let force: &[&str] = &["delete", "--force", bundle.id()];
        let done = at_once(&bundle, &[force; 4]);
        assert_eq!(successes(&done), 4, "what is not there is fine: {done:?}");
        bundle.create().ok();
        let delete: &[&str] = &["delete", bundle.id()];
        let done = at_once(&bundle, &[delete; 4]);
        assert_eq!(successes(&done), 1, "{done:?}");
        assert_known(&done, &["container does not exist"]);
    }
    bundle.assert_nothing_left();
}

#[test]
fn everything_at_once_ends_in_order() {
    needs_root!();
    let bundle = Bundle::script("sleep 100");
    let id = bundle.id();
    let (by_force, without) = (["delete", "--force", id], ["delete", id]);
    for round in 0..rounds(5) {
        bundle.begin();
        let done = at_once(
            &bundle,
            &[
                &["kill", id, "KILL"],
                &["pause", id],
                &["resume", id],
                &["update", "--pids-limit", "50", id],
                &["state", id],
                &["kill", "--all", id, "TERM"],
                &["exec", id, "true"],
                if round % 2 == 0 { &by_force } else { &without },
            ],
        );
        assert_known(
            &done,
            &[
                "does not exist",
                "container not running",
                "container not paused",
                "is not stopped",
                "cannot exec in a",
                // An exec whose container is killed, or whose cgroup is removed, in the middle of it.
                "exec failed",
            ],
        );
        // Whatever came before or after the kill, it was one.
        if done[0].code == 0 {
            let state = || bundle.runx(&["state", id]);
            eventually("it has ended", || state().stdout.contains("\"stopped\"") || state().code != 0);
        }
        bundle.runx(&["delete", "--force", id]).ok();
        bundle.assert_nothing_left();
    }
}

#[test]
fn creates_and_deletes_in_turns_leave_nothing() {
    needs_root!();
    let bundle = Bundle::script("sleep 100");
    let (create, force): (&[&str], &[&str]) = (&["create", bundle.id()], &["delete", "--force", bundle.id()]);
    for _ in 0..rounds(5) {
        let done = at_once(&bundle, &[create, force, create, force, create, force]);
        assert_known(
            &done,
            &["already exists", "does not exist", "is not empty: another container or process uses it"],
        );
        bundle.runx(force).ok();
        bundle.assert_nothing_left();
    }
}

#[test]
fn who_waited_for_a_container_does_not_take_another_one_for_it() {
    needs_root!();
    let bundle = Bundle::script("sleep 100");
    bundle.begin();
    let directory = bundle.state_root().join(bundle.id());
    let lock = fs::File::open(&directory).unwrap();
    // SAFETY: flock takes a descriptor and flags.
    assert_eq!(unsafe { libc::flock(lock.as_raw_fd(), libc::LOCK_EX) }, 0);
    let mut waiting = bundle.command(&["delete", "--force", bundle.id()]);
    let mut pausing = bundle.command(&["pause", bundle.id()]);
    let piped = |command: &mut Command| command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut children = [piped(&mut waiting), piped(&mut pausing)];
    let waits = |child: &Child| {
        let wchan = fs::read_to_string(format!("/proc/{}/syscall", child.id())).unwrap_or_default();
        wchan.split(' ').next() == Some(&libc::SYS_flock.to_string())
    };
    eventually("both wait", || children.iter().all(waits));
    // Another container takes the place of the one that they looked at.
    let aside = bundle.state_root().join(".aside");
    fs::rename(&directory, &aside).unwrap();
    let group = format!("/runx-tests/{}-other", bundle.id());
    let mut config = bundle.config.clone();
    config["linux"]["cgroupsPath"] = group.into();
    fs::write(bundle.path().join("config.json"), config.to_string()).unwrap();
    let mut create = Command::new(runx_tests::dist().join("runx"));
    create.arg("--root").arg(bundle.state_root()).args(["create", bundle.id()]).current_dir(bundle.path());
    run_detached(&mut create, &bundle.output()).ok();
    // Who pauses has the first one in mind; who deletes by force has the name in mind.
    let first = fs::read_to_string(aside.join("state.json")).unwrap();
    children[0].kill().unwrap();
    children[0].wait().unwrap();
    drop(lock);
    let [_, pausing] = children;
    let output = pausing.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && text.contains("does not exist"), "{text}");
    assert_eq!(bundle.state()["status"], "created", "the other container is as it was");
    bundle.runx(&["delete", bundle.id()]).ok();
    // The first one again, so that it can be deleted.
    fs::rename(&aside, &directory).unwrap();
    assert_eq!(fs::read_to_string(directory.join("state.json")).unwrap(), first);
    bundle.runx(&["delete", "--force", bundle.id()]).ok();
    bundle.assert_nothing_left();
}

/// A process that has nothing to do with containers.
struct Bystander(Child);

impl Bystander {
    fn new() -> Self {
        Self(Command::new("sleep").arg("100").stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap())
    }

    fn pid(&self) -> i32 {
        self.0.id() as i32
    }

    fn lives(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }
}

impl Drop for Bystander {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Everything that could signal a container's processes, on one whose pid is a bystander's.
#[track_caller]
fn assert_spared(bundle: &Bundle, bystander: &mut Bystander) {
    let id = bundle.id();
    assert_eq!(bundle.state()["status"], "stopped");
    for signal in ["KILL", "TERM", "0"] {
        bundle.runx(&["kill", id, signal]).fails(1, &["container not running"]);
    }
    bundle.runx(&["kill", "--all", id, "TERM"]).ok();
    bundle.runx(&["exec", id, "true"]).fails(255, &["stopped"]);
    bundle.runx(&["pause", id]).fails(1, &["container not running"]);
    bundle.runx(&["start", id]).fails(1, &["stopped"]);
    bundle.runx(&["events", id]).fails(1, &["is not running"]);
    assert!(bystander.lives());
    bundle.runx(&["delete", id]).ok();
    assert!(bystander.lives());
    bundle.assert_nothing_left();
}

#[test]
fn a_pid_in_the_state_that_started_at_another_time_is_never_signalled() {
    needs_root!();
    let bundle = Bundle::running("sleep 100");
    let path = bundle.state_root().join(bundle.id()).join("state.json");
    let mut state: serde_json::Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    bundle.runx(&["kill", bundle.id(), "KILL"]).ok();
    eventually("it has stopped", || bundle.state()["status"] == "stopped");
    let mut bystander = Bystander::new();
    state["pid"] = bystander.pid().into();
    fs::write(&path, state.to_string()).unwrap();
    assert_spared(&bundle, &mut bystander);
    // By force, too.
    bundle.begin();
    let mut state: serde_json::Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    state["pid"] = bystander.pid().into();
    fs::write(&path, state.to_string()).unwrap();
    bundle.runx(&["delete", "--force", bundle.id()]).ok();
    assert!(bystander.lives());
    // The process that it does have is found by its cgroup.
    bundle.assert_nothing_left();
}

#[test]
fn a_pid_that_the_kernel_gave_to_another_process_is_never_signalled() {
    needs_root!();
    let bundle = Bundle::running("sleep 100");
    let pid = bundle.state()["pid"].as_i64().unwrap() as i32;
    bundle.runx(&["kill", bundle.id(), "KILL"]).ok();
    eventually("its pid is free", || !std::path::Path::new(&format!("/proc/{pid}")).exists());
    // The kernel takes the next number after the last one; other processes of this machine may be faster.
    for _ in 0..500 {
        if let Err(e) = fs::write("/proc/sys/kernel/ns_last_pid", (pid - 1).to_string()) {
            eprintln!("SKIPPED: the next pid cannot be chosen: {e}");
            return;
        }
        let mut bystander = Bystander::new();
        if bystander.pid() == pid {
            return assert_spared(&bundle, &mut bystander);
        }
    }
    eprintln!("SKIPPED: pid {pid} could not be had");
}
