//! Where the processes that look after containers are: in nobody's cgroups who may take them away.

use std::ffi::{CStr, CString};
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use runx_tests::command::{eventually, run};
use runx_tests::container::Containers;
use runx_tests::{dist, needs_root};
use serde_json::Value;
use tempfile::TempDir;

/// The roots of all hierarchies.
fn hierarchies() -> Vec<PathBuf> {
    let root = Path::new("/sys/fs/cgroup");
    if root.join("cgroup.procs").exists() {
        return vec![root.to_owned()];
    }
    let mut all: Vec<_> = fs::read_dir(root).unwrap().flatten().filter(|e| e.file_type().unwrap().is_dir()).collect();
    all.retain(|entry| entry.path().join("cgroup.procs").exists());
    all.into_iter().map(|entry| entry.path()).collect()
}

/// Cgroups as of a session or a service, one in each hierarchy, until this is dropped.
struct Session(Vec<PathBuf>);

impl Session {
    fn new(name: &str) -> Self {
        let session = Self(hierarchies().into_iter().map(|root| root.join(name)).collect());
        for group in &session.0 {
            fs::create_dir(group).unwrap();
            for file in ["cpuset.cpus", "cpuset.mems"].iter().filter(|_| group.join("tasks").exists()) {
                if let Ok(value) = fs::read_to_string(group.parent().unwrap().join(file)) {
                    fs::write(group.join(file), value).unwrap();
                }
            }
        }
        session
    }

    /// Lets a command run in it.
    fn hold(&self, command: &mut Command) {
        let file = |group: &PathBuf| CString::new(group.join("cgroup.procs").into_os_string().into_vec()).unwrap();
        let files: Vec<CString> = self.0.iter().map(file).collect();
        let join = move || files.iter().try_for_each(|file| join(file));
        // SAFETY: between fork and exec only open, write and close are called; nothing is allocated there, and no lock of
        // another thread is needed.
        unsafe { command.pre_exec(join) };
    }

    /// Whether it can be taken away, as a service manager does when the last process has gone.
    fn end(&self) -> io::Result<()> {
        let gone = |e: &io::Error| e.kind() == io::ErrorKind::NotFound;
        self.0.iter().try_for_each(|group| fs::remove_dir(group).or_else(|e| if gone(&e) { Ok(()) } else { Err(e) }))
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        for group in &self.0 {
            let _ = [group.join("runx/.monitors"), group.join("runx")].map(fs::remove_dir);
        }
        let _ = self.end();
    }
}

/// Moves this process to the group of a cgroup.procs, by nothing but system calls.
fn join(file: &CStr) -> io::Result<()> {
    // SAFETY: the name ends with its NUL, and the text has the length that is given.
    unsafe {
        let fd = libc::open(file.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        let written = libc::write(fd, c"0".as_ptr().cast(), 1);
        let error = io::Error::last_os_error();
        libc::close(fd);
        if written == 1 { Ok(()) } else { Err(error) }
    }
}

/// Whether nothing is there of the monitors' groups that no monitor is in.
fn no_empty_group() -> bool {
    hierarchies().iter().all(|root| {
        let group = root.join("runx/.monitors");
        fs::read_to_string(group.join("cgroup.procs")).map_or(true, |processes| !processes.is_empty())
    })
}

#[test]
fn a_session_that_ends_takes_no_monitor_with_it_and_is_not_held() {
    needs_root!();
    let containers = Containers::new();
    let id = containers.id("a");
    let session = Session::new(&containers.id("session"));
    let script = "trap 'exit 3' TERM; echo on; while :; do sleep 0.05; done";
    let flags = ["-d", "--name", &id, "--restart", "on-failure:1"];
    let mut command = containers.run_command(&flags, &["sh", "-c", script]);
    session.hold(&mut command);
    run(&mut command).ok();
    let state = containers.inspect(&id)["state"].clone();
    for pid in [&state["pid"], &state["monitorPid"]] {
        let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
        assert!(!groups.contains("session"), "{groups}");
    }
    session.end().unwrap();
    // It does its work from there, to the end.
    containers.until_logged(&id, "on");
    // SAFETY: kill takes numbers; the process is one of this test's.
    assert_eq!(unsafe { libc::kill(state["pid"].as_i64().unwrap() as i32, libc::SIGTERM) }, 0);
    eventually("it was started again", || containers.inspect(&id)["state"]["restartCount"] == 1);
    containers.until(&id, "running");
    containers.container(&["stop", "-t", "0", &id]).ok();
    containers.container(&["rm", &id]).ok();
    containers.assert_nothing_left();
    eventually("the monitors' groups are gone or used", no_empty_group);
}

#[test]
fn a_container_that_cannot_start_and_a_monitor_that_was_killed_leave_no_group() {
    needs_root!();
    let containers = Containers::new();
    let session = Session::new(&containers.id("session"));
    let mut command = containers.run_command(&["--rm"], &["/nope"]);
    session.hold(&mut command);
    run(&mut command).fails(127, &["/nope"]);
    let id = containers.id("a");
    let mut command = containers.run_command(&["-d", "--name", &id], &["sleep", "600"]);
    session.hold(&mut command);
    run(command.stdin(Stdio::null())).ok();
    let monitor = containers.inspect(&id)["state"]["monitorPid"].as_i64().unwrap();
    // SAFETY: as above.
    assert_eq!(unsafe { libc::kill(monitor as i32, libc::SIGKILL) }, 0);
    containers.container(&["rm", "-f", &id]).ok();
    eventually("the session can end", || session.end().is_ok());
    containers.assert_nothing_left();
    eventually("the monitors' groups are gone or used", no_empty_group);
}

#[test]
fn a_group_that_a_killed_monitor_left_below_a_session_goes_with_the_next_command() {
    needs_root!();
    let containers = Containers::new();
    let session = Session::new(&containers.id("session"));
    // As of an ordinary user, who may make groups only there.
    let left: Vec<PathBuf> = session.0.iter().map(|group| group.join("runx/.monitors")).collect();
    left.iter().for_each(|group| fs::create_dir_all(group).unwrap());
    let id = containers.id("a");
    run(containers.run_command(&["-d", "--name", &id], &["sleep", "600"]).stdin(Stdio::null())).ok();
    assert!(left.iter().all(|group| group.exists()), "a command from elsewhere does not know of it");
    let monitor = containers.inspect(&id)["state"]["monitorPid"].as_i64().unwrap();
    // SAFETY: as above.
    assert_eq!(unsafe { libc::kill(monitor as i32, libc::SIGKILL) }, 0);
    let mut command = containers.command(&["container", "rm", "-f", &id]);
    session.hold(&mut command);
    run(&mut command).ok();
    for group in left {
        assert!(!group.parent().unwrap().exists(), "{}", group.display());
    }
    session.end().unwrap();
    containers.assert_nothing_left();
}

/// Who started a process.
fn parent(pid: i64) -> i64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    // The name is in parentheses, and may hold anything.
    stat.rsplit_once(')').unwrap().1.split_ascii_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Modules or native programs below a root of their own.
struct Watched<'a> {
    group: &'a str,
    root: PathBuf,
}

impl Watched<'_> {
    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(dist().join("runx"));
        command.arg("--root").arg(&self.root).arg(self.group).args(args);
        command
    }

    /// Starts one in a session.
    fn start(&self, session: &Session, id: &str, program: &[&str]) {
        let mut command = self.command(&[&["run", "-d", "--name", id], program].concat());
        session.hold(&mut command);
        run(&mut command).ok();
    }

    fn state(&self, id: &str) -> Value {
        serde_json::from_str(&run(&mut self.command(&["state", id])).ok().stdout).unwrap()
    }

    fn pid(&self, id: &str) -> i64 {
        self.state(id)["pid"].as_i64().unwrap()
    }
}

impl Drop for Watched<'_> {
    fn drop(&mut self) {
        for id in ["a", "b"] {
            run(&mut self.command(&["rm", "--force", id]));
        }
    }
}

#[test]
fn who_watches_a_module_or_a_native_program_leaves_the_session_and_the_program_stays() {
    needs_root!();
    let place = TempDir::with_prefix("runx-test-").unwrap();
    let (name, module) = (place.path().file_name().unwrap().to_str().unwrap(), place.path().join("spin.wat"));
    fs::write(&module, "(module (func (export \"_start\") (loop $on (br $on))))").unwrap();
    for (group, program) in [("wasm", &[module.to_str().unwrap()][..]), ("process", &["sleep", "600"])] {
        let session = Session::new(&format!("{name}-{group}"));
        let watched = Watched { group, root: place.path().join("state") };
        watched.start(&session, "a", program);
        let pid = watched.pid("a");
        let groups = |pid: i64| fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
        let (own, watcher) = (groups(pid), groups(parent(pid)));
        assert!(own.contains(name) && !own.contains(".monitors"), "{own}");
        assert!(watcher.contains("/runx/.monitors") && !watcher.contains(name), "{watcher}");
        // SAFETY: kill takes numbers; the process is one of this test's.
        assert_eq!(unsafe { libc::kill(pid as i32, libc::SIGKILL) }, 0);
        // Somebody is there who writes down the end.
        eventually("the end is written down", || watched.state("a")["exitCode"] == 137);
        session.end().unwrap();
        eventually("the monitors' groups are gone or used", no_empty_group);
    }
}

#[test]
fn a_group_that_a_killed_watcher_left_goes_when_the_program_is_removed() {
    needs_root!();
    let place = TempDir::with_prefix("runx-test-").unwrap();
    let session = Session::new(place.path().file_name().unwrap().to_str().unwrap());
    let watched = Watched { group: "process", root: place.path().join("state") };
    watched.start(&session, "a", &["sleep", "600"]);
    // SAFETY: as above.
    assert_eq!(unsafe { libc::kill(parent(watched.pid("a")) as i32, libc::SIGKILL) }, 0);
    run(&mut watched.command(&["rm", "--force", "a"])).ok();
    eventually("the session can end", || session.end().is_ok());
    eventually("the monitors' groups are gone or used", no_empty_group);
}
