//! How sandboxes come and go, and how programs are ended from outside.

mod common;

use std::time::Duration;

use common::{assert_healthy, patient, pool, probe, settings};
use runx_pool::{Bind, Command, Lease, Limits, OpenOptions, Pool, Status, Template, Tier};

#[test]
fn what_is_thrown_away_does_not_pile_up() {
    needs_root!();
    let (size, burst) = (2, 2);
    let pool = Pool::new(Template::host(), settings(size, burst)).expect("start a pool");
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..50 {
                    drop(pool.acquire().expect("lend a sandbox"));
                    // As many as there may be were lent when makers began to wait.
                    let ending = pool.metrics().ending;
                    assert!(ending <= 3 * (size + burst) as u64, "{ending} are ending");
                }
            });
        }
    });
    while pool.metrics().ending > 0 {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(pool.metrics().destroyed >= 200, "{:?}", pool.metrics());
}

fn sleep(lease: &mut Lease, limits: Limits) -> runx_pool::Outcome {
    lease.run(probe(&["attack", "sleep"]).limits(limits)).expect("run a program")
}

#[test]
fn a_kill_that_comes_early_is_not_lost() {
    needs_root!();
    let pool = pool(Template::host(), 1);
    let mut lease = pool.acquire().expect("lend a sandbox");
    let killer = lease.killer().expect("a killer");
    killer.kill();
    let done = lease.run(Command::new("touch").arg("/w/begun").env("PATH", "/usr/bin:/bin")).expect("run");
    assert_eq!((done.status, done.signal), (Status::Signalled, Some(libc::SIGKILL)), "{done:?}");
    assert!(lease.open(&[("/w/begun".into(), OpenOptions::Read)]).expect("open").remove(0).is_err());
    assert_eq!(lease.run(Command::new("/bin/true")).expect("run").status, Status::Accepted);
    // At any moment: before the message, with it, before the program is there, and when it is.
    for round in 0..100u64 {
        std::thread::scope(|scope| {
            let killer = &killer;
            scope.spawn(move || {
                std::thread::sleep(Duration::from_micros(round * 20));
                killer.kill();
            });
            let done = sleep(&mut lease, patient());
            assert_eq!((done.status, done.signal), (Status::Signalled, Some(libc::SIGKILL)), "{done:?}");
        });
    }
    assert_eq!(pool.metrics().lost, 0);
}

#[test]
fn a_killer_does_nothing_when_its_lease_is_over() {
    needs_root!();
    for tier in [Tier::Wipe, Tier::None] {
        let pool = pool(Template { tier, ..Template::host() }, 1);
        let killer = pool.acquire().and_then(|lease| lease.killer()).expect("a killer");
        let mut lease = pool.acquire().expect("lend it again");
        killer.kill();
        let ended = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            let (ended, killer) = (&ended, &killer);
            scope.spawn(move || {
                while !ended.load(std::sync::atomic::Ordering::Relaxed) {
                    killer.kill();
                    std::thread::yield_now();
                }
            });
            let done = lease.run(Command::new("/bin/sleep").arg("0.1").limits(patient()));
            ended.store(true, std::sync::atomic::Ordering::Relaxed);
            assert_eq!(done.expect("run").status, Status::Accepted, "{tier:?}");
        });
        assert_eq!(pool.metrics().made, 1, "it is the same sandbox");
    }
}

#[test]
fn time_that_is_over_before_the_program_begins_does_not_cost_the_sandbox() {
    needs_root!();
    let pool = pool(Template::host(), 1);
    let mut lease = pool.acquire().expect("lend a sandbox");
    for round in 0..100 {
        let wall = Some(Duration::from_micros(round * 10));
        let done = sleep(&mut lease, Limits { wall, ..Limits::default() });
        assert_eq!(done.status, Status::TimeLimitExceeded, "{done:?}");
    }
    assert_eq!(lease.run(Command::new("/bin/true")).expect("run").status, Status::Accepted);
}

/// A tmpfs of the host.
struct Mounted(tempfile::TempDir);

impl Mounted {
    fn mount(&self, options: &str) {
        let mut command = std::process::Command::new("mount");
        let done = command.args(["-t", "tmpfs", "-o", options, "none"]).arg(self.0.path()).status();
        assert!(done.expect("run mount").success());
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg(self.0.path()).status();
    }
}

#[test]
fn a_filesystem_that_the_host_mounts_otherwise_is_no_fault_of_sandboxes() {
    needs_root!();
    let mounted = Mounted(tempfile::TempDir::with_prefix("runx-pool-test-").expect("make a directory"));
    mounted.mount("size=64k");
    let mut template = Template::host();
    template.binds.push(Bind { source: mounted.0.path().into(), target: "/bound".into(), writable: false });
    let pool = pool(template, 1);
    assert_healthy(&pool);
    mounted.mount("remount,size=128k");
    for _ in 0..10 {
        assert_healthy(&pool);
    }
    let metrics = pool.metrics();
    assert_eq!((metrics.spawners, metrics.failed), (2, 0), "{metrics:?}");
}

#[test]
fn a_sandbox_that_is_asked_whether_it_is_well_is_still_there() {
    needs_root!();
    let often = Duration::from_micros(1);
    let settings = runx_pool::Settings { queue: 0, check_every: often, ..settings(1, 0) };
    let pool = Pool::new(Template { tier: Tier::None, ..Template::host() }, settings).expect("start a pool");
    for _ in 0..200 {
        while pool.metrics().ready == 0 {
            std::thread::yield_now();
        }
        // Nobody else takes it.
        drop(pool.acquire().expect("lend it"));
    }
    assert_eq!(pool.metrics().made, 1);
}

#[test]
fn limits_that_are_too_large_are_none_and_one_that_is_passed_already_is_exceeded() {
    needs_root!();
    let pool = pool(Template::host(), 1);
    let mut lease = pool.acquire().expect("lend a sandbox");
    let (most, time) = (Some(u64::MAX), Some(Duration::MAX));
    let limits = Limits {
        cpu: time,
        wall: time,
        memory: most,
        processes: most,
        file_size: u64::MAX,
        open_files: u64::MAX,
        stack: most,
        address_space: most,
        data: most,
    };
    let done = lease.run(Command::new("/bin/true").limits(limits)).expect("run a program");
    assert_eq!(done.status, Status::Accepted, "{done:?}");
    if !runx_pool::stat().memory_limits {
        return;
    }
    let fill =
        Command::new("dd").args(["if=/dev/zero", "of=/w/fill", "bs=1M", "count=48"]).env("PATH", "/usr/bin:/bin");
    assert_eq!(lease.run(fill).expect("fill a tmpfs").status, Status::Accepted);
    let little = Limits { memory: Some(16 << 20), ..patient() };
    let done = lease.run(Command::new("/bin/true").limits(little)).expect("run a program");
    assert_eq!(done.status, Status::MemoryLimitExceeded, "{done:?}");
    assert_eq!(lease.run(Command::new("/bin/true")).expect("run a program").status, Status::Accepted);
}

/// The word that spawners are told is in its name, so that this program, which is none, runs it when it is executed as one.
#[test]
fn a_program_that_does_not_serve_as_a_spawner_is_told_so() {
    let error = Pool::new(Template::host(), runx_pool::Settings::default()).expect_err("a pool").to_string();
    assert!(error.contains("spawner_main"), "{error}");
}
