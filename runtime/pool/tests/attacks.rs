//! Attacks on the pool by what runs in it. Each is contained, the pool is well afterwards, and nothing is left behind.

mod common;

use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command as Process, Stdio};
use std::time::{Duration, Instant};

use common::{PROBE, assert_healthy, patient, pool, probe, run, settings, text};
use runx_pool::{Error, Limits, OpenOptions, Pool, Status, Template, Tier};

/// Runs an attack in each tier and checks that the pool is well after it.
fn contained(name: &str, limits: &Limits, check: impl Fn(&runx_pool::Outcome)) {
    for tier in [Tier::Complete, Tier::Wipe, Tier::None] {
        let pool = pool(Template { tier, ..Template::host() }, 1);
        let mut lease = pool.acquire().expect("lend a sandbox");
        let outcome = lease.run(probe(&["attack", name]).limits(limits.clone())).expect("run the attack");
        check(&outcome);
        drop(lease);
        assert_healthy(&pool);
        assert_healthy(&pool);
    }
}

fn within(milliseconds: u64) -> Limits {
    Limits { wall: Some(Duration::from_millis(milliseconds)), ..Limits::default() }
}

#[test]
fn fork_bomb() {
    needs_root!();
    contained("forks", &within(300), |outcome| {
        assert_eq!(outcome.status, Status::TimeLimitExceeded, "{outcome:?}");
        assert!(outcome.processes.is_none_or(|count| count <= 64), "{outcome:?}");
    });
}

#[test]
fn memory_bomb() {
    needs_root!();
    contained("memory", &Limits { memory: Some(64 << 20), ..patient() }, |outcome| {
        assert_eq!(outcome.status, Status::MemoryLimitExceeded, "{outcome:?}");
    });
}

#[test]
fn output_bomb() {
    needs_root!();
    contained("output", &patient(), |outcome| {
        assert_eq!((outcome.status, outcome.stdout.len()), (Status::OutputLimitExceeded, 1 << 20));
    });
}

#[test]
fn disk_and_inode_bomb() {
    needs_root!();
    let limits = Limits { file_size: 1 << 40, ..patient() };
    contained("disk", &limits, |outcome| {
        // The tmpfs has 128 MiB.
        assert_eq!(text(outcome), format!("{} Some({})\n", 128 << 20, libc::ENOSPC), "{outcome:?}");
    });
    contained("inodes", &limits, |outcome| {
        // One is the root's.
        assert_eq!(text(outcome), format!("4095 Some({})\n", libc::ENOSPC), "{outcome:?}");
    });
}

#[test]
fn sleep_for_ever() {
    needs_root!();
    contained("sleep", &within(50), |outcome| assert_eq!(outcome.status, Status::TimeLimitExceeded, "{outcome:?}"));
}

#[test]
fn signals_to_init_ptrace_of_it_and_descriptor_theft() {
    needs_root!();
    contained("init", &patient(), |outcome| {
        assert_eq!(text(outcome), "traced false stolen false read false limited false\n", "{outcome:?}");
    });
}

#[test]
fn peeking_at_proc() {
    needs_root!();
    contained("peek", &patient(), |outcome| {
        assert_eq!(text(outcome), "processes []\ngroups true\n", "{outcome:?}");
    });
}

#[test]
fn traps_for_who_opens_and_removes_files() {
    needs_root!();
    let pool = pool(Template::host(), 1);
    let mut lease = pool.acquire().expect("lend a sandbox");
    assert_eq!(run(&mut lease, &["attack", "traps"]).code(), 0);
    let names = ["memory", "environ", "fifo", "directory", "/proc/1/environ", "/proc/self/fd/3", "/dev/null", ""];
    for how in [OpenOptions::Read, OpenOptions::Write, OpenOptions::Create(0o644)] {
        let files: Vec<_> = names.iter().map(|name| (Path::new("/w").join(name), how)).collect();
        for (file, (path, _)) in lease.open(&files).expect("open files").into_iter().zip(&files) {
            assert!(matches!(file, Err(Error::File { .. })), "{} was opened: {how:?}", path.display());
        }
    }
    let outside = |how| vec![(PathBuf::from("/w/outside"), how)];
    assert!(lease.open(&outside(OpenOptions::Create(0o644))).expect("open").remove(0).is_err());
    // The way round ends in the sandbox's own root.
    assert!(lease.open(&[("/w/around".into(), OpenOptions::Read)]).expect("open").remove(0).is_ok());
    lease.delete("/w/tree").expect("remove a tree");
    assert!(lease.delete("/usr/bin/env").is_err() && lease.delete("/").is_err() && lease.delete("/w/..").is_err());
    assert!(lease.open(&[("/w/kept".into(), OpenOptions::Read)]).expect("open").remove(0).is_ok());
    drop(lease);
    assert_healthy(&pool);
}

fn send(socket: BorrowedFd<'_>, message: &[u8], fds: &[BorrowedFd<'_>]) {
    // It may have ended at the last one.
    let _ = runx_core::sys::socket::send(socket, message, fds);
}

#[test]
fn garbage_on_the_socket() {
    needs_root!();
    let pool = Pool::new(Template::host(), settings(2, 2)).expect("start a pool");
    let long = vec![6; 100_000];
    let fd: OwnedFd = std::fs::File::open("/dev/null").expect("open /dev/null").into();
    // Of no kind, cut off, with a length that lies, an execution without descriptors, and what comes only once.
    let messages: [&[u8]; 7] = [b"\xff", b"\x06", b"\x03\xff\xff\xff\xff", &long, b"\x02\x00", b"\x01", b"hello"];
    for message in messages {
        for fds in [&[][..], &[fd.as_fd(); 200][..]] {
            let mut lease = pool.acquire().expect("lend a sandbox");
            send(lease.as_fd(), message, fds);
            let failed = lease.run(probe(&["detect"]));
            assert!(matches!(failed, Err(Error::Gone(_))), "{message:?}: {failed:?}");
            drop(lease);
        }
    }
    assert_healthy(&pool);
    assert!(pool.metrics().lost >= 14, "{:?}", pool.metrics());
    // Any bytes: whatever the sandbox makes of them, the pool stays well.
    let mut number = u64::from(std::process::id()) | 1;
    for _ in 0..30 {
        let mut message = [0u8; 64];
        for byte in &mut message {
            number = number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            *byte = (number >> 56) as u8;
        }
        message[0] %= 9;
        let length = number as usize % message.len() + 1;
        let mut lease = pool.acquire().expect("lend a sandbox");
        send(lease.as_fd(), &message[..length], &[]);
        let _ = lease.run(probe(&["detect"]));
    }
    assert_healthy(&pool);
}

#[test]
fn a_spawner_that_is_killed_is_replaced() {
    needs_root!();
    let pool = Pool::new(Template::host(), settings(2, 0)).expect("start a pool");
    assert_healthy(&pool);
    let lease = pool.acquire().expect("lend a sandbox");
    // Its own spawner is the parent of the init, whose pid the kernel tells of the socket's other end.
    let spawner = parent_of_init(&lease);
    drop(lease);
    let handle = runx_core::sys::pidfd::open(spawner).expect("a handle");
    // SAFETY: the process is this pool's spawner.
    unsafe { libc::kill(spawner, libc::SIGKILL) };
    // As process 1 it has ended when its sandboxes have.
    assert!(runx_core::sys::pidfd::wait_ended(handle.as_fd(), 60_000).expect("wait"));
    for _ in 0..5 {
        assert_healthy(&pool);
    }
    assert_eq!(pool.metrics().spawners, 2);
}

fn parent_of_init(lease: &runx_pool::Lease) -> i32 {
    let killer = lease.killer().expect("a killer");
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", killer.as_fd().as_raw_fd())).expect("read");
    let pid = info.lines().find_map(|line| line.strip_prefix("Pid:")).expect("a pid").trim().to_owned();
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("read");
    status.lines().find_map(|line| line.strip_prefix("PPid:")).and_then(|pid| pid.trim().parse().ok()).expect("a pid")
}

/// A program with a pool, in a process of its own so that what is left of it can be told from others'.
struct Manager(Child);

impl Manager {
    fn start(how: &str) -> Self {
        Self::begin(Process::new(PROBE), how)
    }

    fn begin(mut command: Process, how: &str) -> Self {
        command.args(["manager", how]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("start a program with a pool");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("a pipe")).read_line(&mut line).expect("hear the program");
        assert_eq!(line, "running\n");
        Self(child)
    }

    fn group(&self) -> String {
        format!("runx-pool-{}-", self.0.id())
    }

    fn end(&mut self) {
        self.0.stdin.take().expect("a pipe").write_all(b"x").expect("tell the program");
        self.0.wait().expect("wait for the program");
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Processes in groups of this name.
fn processes(group: &str) -> Vec<String> {
    let pids = std::fs::read_dir("/proc").expect("list /proc").flatten().map(|entry| entry.path());
    let all = pids.filter(|path| std::fs::read_to_string(path.join("cgroup")).unwrap_or_default().contains(group));
    all.map(|path| path.display().to_string()).collect()
}

fn groups(directory: &Path, name: &str, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        if entry.file_name().to_string_lossy().starts_with(name) {
            found.push(entry.path());
        } else {
            groups(&entry.path(), name, found);
        }
    }
}

#[track_caller]
fn eventually_none<T: std::fmt::Debug>(list: impl Fn() -> Vec<T>) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !list().is_empty() {
        assert!(Instant::now() < deadline, "left behind: {:?}", list());
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn an_ordinary_user_has_a_pool_too() {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::process::CommandExt;
    needs_root!();
    const NOBODY: u32 = 65534;
    let place = tempfile::TempDir::with_prefix("runx-pool-test-").expect("make a directory");
    std::fs::set_permissions(place.path(), std::fs::Permissions::from_mode(0o755)).expect("open the directory");
    let program = place.path().join("probe");
    std::fs::copy(PROBE, &program).expect("copy the probe");
    let mut command = Process::new(&program);
    command.uid(NOBODY).gid(NOBODY).current_dir("/");
    let mut manager = Manager::begin(command, "drop");
    let parent = manager.0.id().to_string();
    let children = || {
        let all = std::fs::read_dir("/proc").expect("list /proc").flatten();
        let of = all.filter(|entry| {
            let status = std::fs::read_to_string(entry.path().join("status")).unwrap_or_default();
            status.lines().any(|line| line.strip_prefix("PPid:").is_some_and(|pid| pid.trim() == parent))
        });
        of.count()
    };
    assert_eq!(children(), 1, "the spawner");
    manager.end();
    assert_eq!(children(), 0);
}

/// Gives this thread, and what it starts, a mount namespace in which nobody else's mounts appear.
fn own_mounts() {
    // SAFETY: no pointers are passed but to strings that end with a zero, and to none.
    unsafe {
        assert_eq!(libc::unshare(libc::CLONE_NEWNS), 0, "{}", std::io::Error::last_os_error());
        let (none, root) = (std::ptr::null(), c"/".as_ptr());
        let made = libc::mount(none, root, none.cast(), libc::MS_REC | libc::MS_PRIVATE, none.cast());
        assert_eq!(made, 0, "{}", std::io::Error::last_os_error());
    }
}

#[test]
fn nothing_is_left_of_a_pool_however_its_process_ends() {
    needs_root!();
    own_mounts();
    let mounts = || std::fs::read_to_string("/proc/thread-self/mountinfo").expect("read the mounts");
    let before = mounts();
    for how in ["drop", "exit", "kill"] {
        let mut manager = Manager::start(how);
        let group = manager.group();
        let is_there = || {
            let mut found = Vec::new();
            groups(Path::new("/sys/fs/cgroup"), &group, &mut found);
            found
        };
        let had_groups = !is_there().is_empty();
        assert!(!had_groups || !processes(&group).is_empty(), "its programs are in no group");
        manager.end();
        eventually_none(|| processes(&group));
        if how == "drop" {
            assert!(is_there().is_empty(), "{:?}", is_there());
        } else {
            // Nobody was there to remove them. The next pool does.
            drop(pool(Template::host(), 1));
            eventually_none(is_there);
        }
    }
    // Others' go when the host removes the directories that they are on.
    let now = mounts();
    let new: Vec<_> = now.lines().filter(|mount| !before.lines().any(|known| known == *mount)).collect();
    assert!(new.is_empty(), "{new:?}");
}
