//! Programs in C, compiled with clang and wasi-libc where they are installed: how a real library
//! finds files, and what it does with streams.
#![cfg(feature = "compiler")]

mod common;

use common::{artifact, c_program, expect, expect_failure, run, runner};
use std::ffi::CString;
use std::fs::{File, Permissions};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use tempfile::TempDir;

fn scratch() -> TempDir {
    tempfile::tempdir().expect("a temporary directory")
}

fn name(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// The program for files, or nothing where there is no C compiler.
fn files() -> Option<File> {
    c_program("files.c").map(artifact)
}

fn in_directory(artifact: &File, directory: &Path, args: &[&str]) -> Command {
    let mut command = runner(artifact, args);
    command.current_dir(directory);
    command
}

#[test]
fn arguments_environment_and_stdin_arrive() {
    let Some(program) = c_program("echo.c") else {
        return;
    };
    let mut command = runner(&artifact(program), &["two words", "", "ü"]);
    command.env("PATH", "/bin").env("EMPTY", "").stdin(Stdio::piped());
    // Would change the engine's settings, or the messages, if it were the runner's own.
    command.env("WASMTIME_BACKTRACE_DETAILS", "1").env("RUST_BACKTRACE", "1");
    let mut child = command.spawn().expect("the runner starts");
    let input: String = (0..20_000).map(|n| format!("line {n}\n")).collect();
    let mut stdin = child.stdin.take().expect("a pipe");
    let copy = input.clone();
    let writer = std::thread::spawn(move || stdin.write_all(copy.as_bytes()));
    let output = child.wait_with_output().expect("it ends");
    writer.join().expect("no panic").expect("all was read");
    let head = "arg /app/test.wasm\narg two words\narg \narg ü\n\
        env EMPTY=\nenv PATH=/bin\nenv RUST_BACKTRACE=1\nenv WASMTIME_BACKTRACE_DETAILS=1\n";
    expect(&output, 4, &format!("{head}{input}"), "");
}

#[test]
fn stdin_from_a_file_and_from_a_non_blocking_pipe() {
    let Some(program) = c_program("echo.c") else {
        return;
    };
    let program = artifact(program);
    let directory = scratch();
    let path = directory.path().join("input");
    std::fs::write(&path, "from a file\n").expect("written");
    let mut command = runner(&program, &[]);
    command.stdin(File::open(&path).expect("open"));
    expect(&run(command), 1, "arg /app/test.wasm\nfrom a file\n", "");

    let mut command = runner(&program, &[]);
    command.stdin(Stdio::piped());
    let (reader, mut writer) = std::io::pipe().expect("a pipe");
    // SAFETY: sets a flag of an open descriptor.
    let set = unsafe { libc::fcntl(reader.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) };
    assert_eq!(set, 0);
    command.stdin(reader);
    let mut child = command.spawn().expect("the runner starts");
    drop(command);
    let mut first = [0; 19];
    child.stdout.as_mut().expect("a pipe").read_exact(&mut first).expect("the first line");
    writer.write_all(b"late\n").expect("written");
    drop(writer);
    expect(&child.wait_with_output().expect("it ends"), 1, "late\n", "");
}

#[test]
fn a_closed_stdout_gives_epipe() {
    let Some(program) = c_program("pipe.c") else {
        return;
    };
    let mut child = runner(&artifact(program), &[]).spawn().expect("the runner starts");
    drop(child.stdout.take());
    assert_eq!(child.wait().expect("it ends").code(), Some(64));
}

#[test]
fn poll_on_stdin_times_out_and_wakes_up() {
    let Some(program) = c_program("poll.c") else {
        return;
    };
    let mut command = runner(&artifact(program), &[]);
    command.stdin(Stdio::piped());
    let mut child = command.spawn().expect("the runner starts");
    let mut first = [0; 8];
    child.stdout.as_mut().expect("a pipe").read_exact(&mut first).expect("a line");
    assert_eq!(&first, b"nothing\n");
    child.stdin.as_mut().expect("a pipe").write_all(b"x").expect("written");
    let output = child.wait_with_output().expect("it ends");
    expect(&output, 0, "input\n", "");
}

#[test]
fn absolute_and_relative_paths_in_the_root() {
    let Some(program) = files() else { return };
    let directory = scratch();
    let file = directory.path().join("new");
    // wasi-libc takes a path without a leading slash from its working directory, which is /.
    let relative = name(&file).trim_start_matches('/');
    let args = ["w", name(&file), "r", relative, "u", name(&file), "l", "/"];
    expect(&run(runner(&program, &args)), 0, "data\n", "");
    assert_eq!(std::fs::read(&file).expect("the file"), b"data\n");
}

#[test]
fn relative_paths_resolve_against_the_working_directory() {
    let Some(program) = files() else { return };
    let directory = scratch();
    std::fs::create_dir(directory.path().join("sub")).expect("a directory");
    let args = ["w", "new", "w", "./sub/new", "r", "new", "r", "sub/new", "l", ".", "u", "new"];
    expect(&run(in_directory(&program, directory.path(), &args)), 0, "data\ndata\n", "");
    for file in ["new", "sub/new"] {
        assert_eq!(std::fs::read(directory.path().join(file)).expect("the file"), b"data\n");
    }
}

#[test]
fn absolute_paths_work_from_another_working_directory() {
    let Some(program) = files() else { return };
    let (cwd, other) = (scratch(), scratch());
    let file = other.path().join("new");
    let args = ["w", name(&file), "r", name(&file), "c", name(other.path()), "r", "new"];
    expect(&run(in_directory(&program, cwd.path(), &args)), 0, "data\ndata\n", "");
    assert_eq!(std::fs::read_dir(cwd.path()).expect("listed").count(), 0);
}

/// What the documentation of the directories says cannot be told apart; if this fails, a way was
/// found and the documentation is out of date.
#[test]
fn the_name_of_a_directory_of_the_root_is_that_directory() {
    let Some(program) = files() else { return };
    let directory = scratch();
    let top = Path::new("/").join(directory.path().iter().nth(1).expect("not the root"));
    let below = directory.path().strip_prefix(&top).expect("below").join("new");
    let relative = Path::new(top.file_name().expect("a name")).join(below);
    let args = ["w", name(&relative)];
    expect(&run(in_directory(&program, directory.path(), &args)), 0, "", "");
    assert!(directory.path().join("new").exists());
}

#[test]
fn procfs_is_out_of_reach() {
    let Some(program) = files() else { return };
    if !Path::new("/proc/self/mem").exists() {
        eprintln!("skipped: /proc is not mounted");
        return;
    }
    let directory = scratch();
    for link in [("..", "up"), ("proc", "down")] {
        // From the scratch directory: as many steps up as it is deep, then into /proc.
        let up = directory.path().iter().skip(1).map(|_| "../").collect::<String>();
        let target = if link.0 == ".." { up } else { format!("{up}proc/self") };
        std::os::unix::fs::symlink(target, directory.path().join(link.1)).expect("a link");
    }
    let link = |rest: &str| format!("{}/{rest}", name(directory.path()));
    let paths = [
        "/proc/self/mem".to_owned(),
        "/proc/thread-self/mem".to_owned(),
        "/proc/1/../self/mem".to_owned(),
        link("up/proc/self/mem"),
        link("down/mem"),
    ];
    for path in &paths {
        // The same file is open to a native process: what refuses it is the runner.
        std::fs::File::options().read(true).write(true).open(path).expect("native access");
        for cwd in [Path::new("/"), directory.path()] {
            for action in ["m", "r"] {
                let output = run(in_directory(&program, cwd, &[action, path]));
                let stderr = expect_failure(&output, 1);
                // The library itself does not let a link lead out of a preopened directory.
                let outside = cwd != Path::new("/") && stderr.contains("not permitted");
                assert!(outside || stderr.contains("Permission denied"), "{path} from {cwd:?}: {stderr}");
            }
        }
    }
    // Nor through a directory of it, while other places stay open.
    for (path, code) in [("/proc", 1), ("/proc/self", 1), ("/", 0), (name(directory.path()), 0)] {
        let output = run(runner(&program, &["l", path]));
        assert_eq!(output.status.code(), Some(code), "{path}: {output:?}");
    }
}

/// What the runner may count on in a container: nothing but the system call interface.
#[test]
fn neither_proc_nor_dev_nor_root_is_needed() {
    let Some(program) = files() else { return };
    // SAFETY: no memory is involved.
    if unsafe { libc::geteuid() } != 0 {
        eprintln!("skipped: chroot needs root");
        return;
    }
    let root = scratch();
    let work = root.path().join("project");
    std::fs::create_dir(&work).expect("a directory");
    for path in [root.path(), &work] {
        std::fs::set_permissions(path, Permissions::from_mode(0o777)).expect("permissions");
    }
    let output = run(confined(&program, root.path(), &["w", "new", "r", "/project/new", "u", "new"]));
    expect(&output, 0, "data\n", "");
    assert!(work.join("new").exists());
}

/// The runner executed by descriptor in `/project` of a root directory with nothing else in it, as an
/// unprivileged user, without environment.
fn confined(artifact: &File, root: &Path, args: &[&str]) -> Command {
    let string = |text: &[u8]| CString::new(text).expect("no NUL");
    let mut command = runner(artifact, args);
    let program = File::open(command.get_program()).expect("the runner");
    let root = string(root.as_os_str().as_bytes());
    let argv: Vec<CString> =
        std::iter::once(command.get_program()).chain(command.get_args()).map(|arg| string(arg.as_bytes())).collect();
    let enter = move || {
        let mut pointers = [std::ptr::null(); 16];
        for (pointer, arg) in pointers.iter_mut().take(15).zip(&argv) {
            *pointer = arg.as_ptr();
        }
        // SAFETY: system calls with C strings and null-terminated arrays that outlive them; the
        // last one ends this program.
        unsafe {
            let entered = libc::chroot(root.as_ptr()) == 0
                && libc::chdir(c"/project".as_ptr()) == 0
                && libc::setgid(65534) == 0
                && libc::setuid(65534) == 0;
            if entered {
                libc::fexecve(program.as_raw_fd(), pointers.as_ptr(), pointers[15..].as_ptr());
            }
        }
        Err(std::io::Error::last_os_error())
    };
    // SAFETY: the closure makes async-signal-safe system calls and does not allocate.
    unsafe { command.pre_exec(enter) };
    command
}
