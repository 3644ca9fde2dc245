//! `runx pool`: the command. What sandboxes are is tested beside the library, in runtime/pool/tests.

use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use runx_tests::command::{Done, run, run_with};
use runx_tests::{dist, needs_root};
use serde_json::Value;

#[track_caller]
fn pool(args: &[&str], input: &str) -> Done {
    run_with(Command::new(dist().join("runx")).arg("pool").args(args).env("GIVEN", "by the caller"), input)
}

/// The last line of standard error.
#[track_caller]
fn report(done: &Done) -> Value {
    let line = done.stderr.lines().last().expect("a line on standard error");
    serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))
}

#[test]
fn a_program_has_the_callers_streams_and_its_exit_code_is_told() {
    needs_root!();
    let done =
        pool(&["exec", "--env", "A=b", "--env", "GIVEN", "--", "sh", "-c", "cat; echo $A $GIVEN; pwd; exit 7"], "in\n");
    assert_eq!((done.code, done.stdout.as_str(), done.stderr.as_str()), (7, "in\nb by the caller\n/w\n", ""));
    assert_eq!(pool(&["exec", "sh", "-c", "kill -9 $$"], "").code, 128 + 9);
    pool(&["exec", "no-such-program"], "").fails(127, &["no-such-program", "No such file"]);
    pool(&["exec", "/etc/alternatives"], "").fails(126, &["Permission denied"]);
    for (wrong, word) in
        [("--tier=best", "complete"), ("--network=all", "none"), ("--memory=-1", "memory"), ("--bind=x", "HOST:PATH")]
    {
        pool(&["exec", wrong, "true"], "").fails(1, &[word]);
    }
}

#[test]
fn limits_have_verdicts() {
    needs_root!();
    let done = pool(&["exec", "--format", "json", "--wall-time", "50ms", "sleep", "1000"], "");
    assert_eq!((done.code, report(&done)["status"].as_str()), (128 + 9, Some("TimeLimitExceeded")));
    let script = "while :; do :; done";
    let done = pool(&["exec", "--format", "json", "--cpu-time", "0.1", "sh", "-c", script], "");
    assert_eq!(report(&done)["status"], "TimeLimitExceeded");
    let done = pool(&["exec", "--memory", "16m", "--format", "json", "tail", "/dev/zero"], "");
    assert_eq!(report(&done)["status"], "MemoryLimitExceeded");
    let done = pool(&["exec", "--format", "json", "true"], "").ok();
    let report = report(&done);
    assert_eq!((report["status"].as_str(), report["exitCode"].as_i64()), (Some("Accepted"), Some(0)));
    assert!(report["wallNanoseconds"].as_u64().is_some_and(|time| time > 0), "{report}");
    pool(&["exec", "--seccomp", "kill", "unshare", "-U", "true"], "").fails(128 + 31, &["DangerousSyscall"]);
}

#[test]
fn stat_tells_what_there_is() {
    needs_root!();
    let text = pool(&["stat"], "").ok().stdout;
    for word in ["cgroups", "memory", "user ids", "processors"] {
        assert!(text.lines().any(|line| line.starts_with(word)), "{text}");
    }
    let stat: Value = serde_json::from_str(&pool(&["stat", "--format", "json"], "").ok().stdout).expect("JSON");
    let kernel = run(Command::new("uname").arg("-r")).ok().stdout;
    assert_eq!(stat["kernel"].as_str(), Some(kernel.trim()));
    assert_eq!(stat["memoryLimits"].as_bool(), stat["processLimits"].as_bool());
}

/// Both are in one cgroup, and each makes groups for its sandboxes there.
#[test]
fn pools_leave_those_of_other_pid_namespaces_alone() {
    needs_root!();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                for _ in (0..500).take_while(|_| !done.load(Ordering::Relaxed)) {
                    pool(&["stat"], "").ok();
                }
            });
        }
        let runx = dist().join("runx");
        let all: Vec<Done> = (0..10)
            .map(|_| {
                let mut apart = Command::new("unshare");
                apart.args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]).arg(&runx);
                run(apart.args(["pool", "exec", "--memory", "64m", "--", "echo", "here"]))
            })
            .collect();
        done.store(true, Ordering::Relaxed);
        for one in all {
            assert_eq!((one.code, one.stdout.as_str(), one.stderr.as_str()), (0, "here\n", ""));
        }
    });
}

#[test]
fn a_module_is_compiled_once_and_run_within_its_limits() {
    needs_root!();
    let directory = tempfile::tempdir().expect("make a directory");
    let write = |name: &str, text: &str| {
        let path = directory.path().join(name);
        std::fs::write(&path, text).expect("write a module");
        path.to_string_lossy().into_owned()
    };
    let echo = write(
        "exit.wat",
        r#"(module (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
            (memory (export "memory") 1) (func (export "_start") (call $exit (i32.const 7))))"#,
    );
    for _ in 0..2 {
        assert_eq!(pool(&["exec", "--memory", "64m", "--", &echo], "").code, 7);
    }
    let forever = write("loop.wat", r#"(module (memory (export "memory") 1) (func (export "_start") (loop (br 0))))"#);
    let done = pool(&["exec", "--format", "json", "--cpu-time", "0.1", "--", &forever], "");
    assert_eq!(report(&done)["status"], "TimeLimitExceeded");
    let wrong = write("wrong.wasm", "nonsense");
    pool(&["exec", "--", &wrong], "").fails(1, &["wrong.wasm"]);
    pool(&["exec", "--", "/none.wasm"], "").fails(1, &["/none.wasm", "No such file"]);
}
