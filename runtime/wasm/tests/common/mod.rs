//! Starting the runner as the runtime does: an artifact's descriptor, then the arguments.

#![allow(dead_code, reason = "each test program uses a part of it")]

use runx_wasm::compile::compile;
use runx_wasm::engine::Layout;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

/// The descriptor that the runner is told. High, since the standard library has descriptors of its
/// own open between fork and exec, and they take the lowest numbers.
const ARTIFACT_FD: i32 = 900;

/// How the module is named to the runner.
pub(crate) const NAME: &str = "/app/test.wasm";

/// Compiles a module, which must work, for the usual layout.
pub(crate) fn artifact(module: impl AsRef<[u8]>) -> File {
    artifact_for(module, Layout::Reserved)
}

/// Compiles a module, which must work.
pub(crate) fn artifact_for(module: impl AsRef<[u8]>, layout: Layout) -> File {
    file(&compile(module.as_ref(), NAME, layout.into()).expect("the module compiles"))
}

/// An anonymous file with these bytes, as the runner would get it: a descriptor for reading only.
pub(crate) fn file(bytes: &[u8]) -> File {
    let mut named = tempfile::NamedTempFile::new().expect("a temporary file");
    named.write_all(bytes).expect("written");
    File::open(named.path()).expect("opened again")
}

/// The runner on `artifact`, with `args` after the module's name, in `/` with an empty environment
/// and no stdin.
pub(crate) fn runner(artifact: &File, args: &[&str]) -> Command {
    runner_under(&[], artifact, args)
}

/// The same, started by another program: an absolute path and its arguments.
pub(crate) fn runner_under(wrapper: &[&str], artifact: &File, args: &[&str]) -> Command {
    let mut line = wrapper.to_vec();
    line.push(env!("CARGO_BIN_EXE_runx-wasm-runner"));
    let mut command = Command::new(line[0]);
    command.args(&line[1..]).arg(ARTIFACT_FD.to_string()).arg(NAME).args(args);
    command.env_clear().current_dir("/");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let artifact = artifact.try_clone().expect("a copy");
    let pass = move || {
        // Whoever runs the tests in the background may ignore it.
        // SAFETY: SIG_DFL is a valid disposition, and signal is async-signal-safe.
        unsafe { libc::signal(libc::SIGINT, libc::SIG_DFL) };
        // SAFETY: dup2 is async-signal-safe; the copy is not closed on exec.
        match unsafe { libc::dup2(artifact.as_raw_fd(), ARTIFACT_FD) } {
            -1 => Err(std::io::Error::last_os_error()),
            _ => Ok(()),
        }
    };
    // SAFETY: the closure makes async-signal-safe system calls only.
    unsafe { command.pre_exec(pass) };
    command
}

/// Runs to the end.
pub(crate) fn run(mut command: Command) -> Output {
    command.output().expect("the runner starts")
}

/// Runs a module without arguments to the end.
pub(crate) fn run_module(module: impl AsRef<[u8]>) -> Output {
    run(runner(&artifact(module), &[]))
}

/// Asserts the exit code and that nothing but the guest wrote.
#[track_caller]
pub(crate) fn expect(output: &Output, code: i32, stdout: &str, stderr: &str) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let got = (output.status.code(), text(&output.stdout), text(&output.stderr));
    assert_eq!(got, (Some(code), stdout.to_owned(), stderr.to_owned()));
}

/// Asserts an exit code with nothing on stdout, and gives stderr.
#[track_caller]
pub(crate) fn expect_failure(output: &Output, code: i32) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    assert!(output.stdout.is_empty(), "{:?}", output.stdout);
    stderr
}

/// Compiles a C program of this directory for WASI, or says why the test is skipped.
pub(crate) fn c_program(source: &str) -> Option<Vec<u8>> {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let output = directory.path().join("program.wasm");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/guest").join(source);
    let clang = |source: &Path| {
        // Without the compiler's runtime library, which is packaged by itself and not needed here.
        Command::new("clang")
            .args(["--target=wasm32-wasi", "-O1", "-nodefaultlibs", "-lc", "-o"])
            .args([&output, source])
            .output()
    };
    // Whether there is a WASI toolchain is not judged by our own programs: they must compile.
    let probe = directory.path().join("probe.c");
    std::fs::write(&probe, "#include <stdio.h>\nint main(void) { return puts(\"\"); }\n").expect("written");
    if !clang(&probe).is_ok_and(|result| result.status.success()) {
        eprintln!("skipped: no clang with wasm32-wasi, wasi-libc and wasm-ld");
        return None;
    }
    let result = clang(&source).expect("clang starts");
    assert!(result.status.success(), "{}", String::from_utf8_lossy(&result.stderr));
    Some(std::fs::read(&output).expect("the module"))
}
