//! The runner as a process, with modules in the text format.
#![cfg(feature = "compiler")]

mod common;

use common::{artifact, artifact_for, expect, expect_failure, file, run, run_module, runner, runner_under};
use runx_wasm::engine::Layout;
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

const HELLO: &str = include_str!("guest/hello.wat");

/// A module whose `_start` exits with `code`.
fn exiting(code: &str) -> String {
    format!(
        r#"(module
            (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
            (memory (export "memory") 1)
            (func (export "_start") (call $exit (i32.const {code}))))"#
    )
}

/// A module that reads stdin to have done so, says "up", and then loops for ever.
const SPINNING: &str = r#"(module
    (import "wasi_snapshot_preview1" "fd_read" (func $read (param i32 i32 i32 i32) (result i32)))
    (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
    (memory (export "memory") 1)
    (data (i32.const 0) "\08\00\00\00\03\00\00\00up\n")
    (data (i32.const 32) "\40\00\00\00\08\00\00\00")
    (func (export "_start")
        (drop (call $read (i32.const 0) (i32.const 32) (i32.const 1) (i32.const 48)))
        (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 16)))
        (loop $again (br $again))))"#;

/// Starts a spinning module and waits until it is up.
fn spinning(mut command: Command) -> Child {
    let mut child = command.spawn().expect("the runner starts");
    let mut up = [0; 3];
    let stdout = child.stdout.as_mut().expect("a pipe");
    stdout.read_exact(&mut up).expect("the module is up");
    child
}

fn kill(pid: u32, signal: i32) {
    let pid = i32::try_from(pid).expect("a pid");
    // SAFETY: no memory is involved; the callers have not waited for the process.
    assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
}

#[test]
fn hello() {
    expect(&run_module(HELLO), 0, "hello\n", "");
}

#[test]
fn exit_codes_are_the_modules_own() {
    for (code, expected) in [("0", 0), ("7", 7), ("126", 126), ("200", 200), ("257", 1), ("-1", 255)] {
        expect(&run_module(exiting(code)), expected, "", "");
    }
}

#[test]
fn a_trap_is_134_with_a_backtrace() {
    let output = run_module(
        r#"(module
            (func $inner unreachable)
            (func $outer (call $inner))
            (func (export "_start") (call $outer)))"#,
    );
    let stderr = expect_failure(&output, 134);
    assert!(
        stderr.starts_with("runx: /app/test.wasm: wasm trap: wasm `unreachable` instruction executed\n"),
        "{stderr}"
    );
    let at = |name: &str| stderr.find(name).unwrap_or_else(|| panic!("{name} in {stderr}"));
    assert!(at("inner") < at("outer"), "{stderr}");
}

#[test]
fn hardware_traps_are_caught_in_both_layouts() {
    for layout in Layout::ALL {
        for (body, reason) in [
            ("(drop (i32.load (i32.const 0x7fff_ffff)))", "out of bounds memory access"),
            ("(drop (i32.div_s (i32.const 1) (i32.load (i32.const 0))))", "integer divide by zero"),
            ("(call $start)", "call stack exhausted"),
        ] {
            let module = format!(r#"(module (memory 1) (func $start (export "_start") {body}))"#);
            let stderr = expect_failure(&run(runner(&artifact_for(module, layout), &[])), 134);
            assert!(stderr.contains(reason), "{layout:?}: {stderr}");
        }
    }
}

#[test]
fn recursion_may_be_as_deep_as_a_native_programs() {
    // 50 000 frames, which need more than the engine's default of half a megabyte.
    let output = run_module(
        r#"(module
            (func $down (param i32) (result i32)
                (if (result i32) (local.get 0)
                    (then (i32.add (i32.const 1) (call $down (i32.sub (local.get 0) (i32.const 1)))))
                    (else (i32.const 0))))
            (func (export "_start")
                (if (i32.ne (call $down (i32.const 50000)) (i32.const 50000)) (then unreachable))))"#,
    );
    expect(&output, 0, "", "");
}

#[test]
fn a_missing_import_is_named() {
    let output = run_module(r#"(module (import "env" "host_magic" (func)) (func (export "_start")))"#);
    let stderr = expect_failure(&output, 126);
    assert!(stderr.starts_with("runx: /app/test.wasm: cannot instantiate the module: "), "{stderr}");
    assert!(stderr.contains("env::host_magic"), "{stderr}");
}

#[test]
fn a_module_without_start_is_refused() {
    let cases = [
        ("(module)", "exports no function _start"),
        (r#"(module (func (export "_initialize")))"#, "library (reactor)"),
        (r#"(module (func (export "_start") (param i32)))"#, "parameters or results"),
        (r#"(module (memory (export "_start") 1))"#, "exports no function _start"),
    ];
    for (module, reason) in cases {
        let stderr = expect_failure(&run_module(module), 126);
        assert!(stderr.starts_with("runx: /app/test.wasm: not a WASI command: "), "{stderr}");
        assert!(stderr.contains(reason), "{stderr}");
    }
}

#[test]
fn a_damaged_artifact_is_refused() {
    let good = runx_wasm::compile::compile(HELLO.as_bytes(), "hello", Layout::Reserved.into()).expect("an artifact");
    // The ELF header's flags, by which the engine tells its own files.
    let mut other_kind = good.clone();
    other_kind[48..52].fill(0);
    for bytes in [&b""[..], b"\x7fELF", &good[..100], &good[..good.len() / 2], &other_kind, b"not an artifact"] {
        let stderr = expect_failure(&run(runner(&file(bytes), &[])), 126);
        assert!(stderr.starts_with("runx: /app/test.wasm: cannot load the compiled artifact: "), "{stderr}");
    }
}

#[test]
fn a_bad_descriptor_is_refused() {
    for fd in ["2", "77", "x", "-1", ""] {
        let output = Command::new(env!("CARGO_BIN_EXE_runx-wasm-runner")).args([fd, "a"]).output().expect("it starts");
        assert!(expect_failure(&output, 126).starts_with("runx: usage: "));
    }
    let output = Command::new(env!("CARGO_BIN_EXE_runx-wasm-runner")).output().expect("it starts");
    assert!(expect_failure(&output, 126).starts_with("runx: usage: "));
}

#[test]
fn an_address_space_limit_is_met_by_the_compact_layout() {
    let limited = |layout| {
        let mut command = runner(&artifact_for(HELLO, layout), &[]);
        let limit = || {
            let limit = libc::rlimit { rlim_cur: 1 << 30, rlim_max: 1 << 30 };
            // SAFETY: setrlimit with a valid struct, which is async-signal-safe.
            match unsafe { libc::setrlimit(libc::RLIMIT_AS, &limit) } {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        };
        // SAFETY: the closure makes one async-signal-safe system call.
        unsafe { command.pre_exec(limit) };
        run(command)
    };
    expect(&limited(Layout::Compact), 0, "hello\n", "");
    let stderr = expect_failure(&limited(Layout::Reserved), 126);
    assert!(stderr.starts_with("runx: /app/test.wasm: cannot instantiate the module: "), "{stderr}");
}

#[test]
fn signals_end_the_module_at_once() {
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGRTMIN() + 3] {
        let mut child = spinning(runner(&artifact(SPINNING), &[]));
        kill(child.id(), signal);
        let status = child.wait().expect("it ends");
        assert_eq!(status.code(), Some(128 + signal));
    }
}

#[test]
fn the_first_process_of_a_pid_namespace_ends_on_term_too() {
    let wrapper = ["/usr/bin/unshare", "--user", "--map-root-user", "--pid", "--fork"];
    let probe = Command::new(wrapper[0]).args(&wrapper[1..]).arg("true").output();
    if !probe.is_ok_and(|output| output.status.success()) {
        eprintln!("skipped: cannot make a PID namespace here");
        return;
    }
    let mut child = spinning(runner_under(&wrapper, &artifact(SPINNING), &[]));
    let children = format!("/proc/{0}/task/{0}/children", child.id());
    let children = std::fs::read_to_string(children).expect("unshare's children");
    kill(children.trim().parse().expect("one child"), libc::SIGTERM);
    assert_eq!(child.wait().expect("it ends").code(), Some(143));
}

#[test]
fn there_is_one_thread() {
    let mut child = spinning(runner(&artifact(SPINNING), &[]));
    let tasks = std::fs::read_dir(format!("/proc/{}/task", child.id())).expect("its tasks");
    let count = tasks.count();
    child.kill().expect("killed");
    child.wait().expect("it ends");
    assert_eq!(count, 1);
}
