//! Each verdict, provoked by a real program.

mod common;

use std::io::{Read, Seek, SeekFrom, Write};
use std::path::PathBuf;
use std::time::Duration;

use common::{assert_healthy, pool, probe, run, settings, text};
use runx_pool::{
    Command, Error, Filter, Input, Limits, Network, OpenOptions, Outcome, Output, Pool, Status, Template, Tier,
};

/// Without a pool of its own: what is shared is not what is tested.
fn outcome(template: Template, command: Command) -> Outcome {
    let pool = pool(template, 1);
    let outcome = pool.acquire().and_then(|mut lease| lease.run(command)).expect("run a program");
    assert_healthy(&pool);
    outcome
}

fn limited(words: &[&str], limits: Limits) -> Outcome {
    outcome(Template::host(), probe(words).limits(Limits { wall: limits.wall.or(common::patient().wall), ..limits }))
}

fn shell(script: &str) -> Command {
    Command::new("sh").arg("-c").arg(script).stdout(Output::Capture(1 << 16)).stderr(Output::Capture(1 << 16))
}

#[test]
fn programs_that_end_by_themselves() {
    needs_root!();
    let pool = pool(Template::host(), 1);
    let one = |command: Command| pool.acquire().and_then(|mut lease| lease.run(command)).expect("run a program");
    let done = one(shell("cat; echo error >&2; pwd; id -u >/dev/null").stdin(Input::Bytes(b"in\n".to_vec())));
    assert_eq!(
        (done.status, done.stdout.as_slice(), done.stderr.as_slice()),
        (Status::Accepted, &b"in\n/w\n"[..], &b"error\n"[..])
    );
    assert!(done.wall > Duration::ZERO && done.cpu > Duration::ZERO && done.memory > 0, "{done:?}");
    let done = one(shell("exit 3"));
    assert_eq!((done.status, done.exit_code, done.code()), (Status::NonZeroExitStatus, 3, 3));
    let done = one(probe(&["attack", "signal"]));
    assert_eq!((done.status, done.signal), (Status::Signalled, Some(libc::SIGILL)));
    let done = one(Command::new("/no/such/program"));
    assert_eq!(done.status, Status::InternalError);
    assert!(done.error.as_deref().is_some_and(|text| text.contains("execute the program: No such file")), "{done:?}");
    let done = one(shell("true").directory("/nowhere"));
    assert!(done.error.as_deref().is_some_and(|text| text.contains("working directory")), "{done:?}");
    let done = one(shell("true").stdin(Input::Path("/w/missing".into())));
    assert_eq!(done.status, Status::FileError);
    assert!(done.error.as_deref().is_some_and(|text| text.contains("/w/missing")), "{done:?}");
    // Everything large goes through as well.
    let large = vec![b'x'; 3 << 20];
    let done = one(shell("wc -c").stdin(Input::Bytes(large)));
    assert_eq!(text(&done).trim(), (3 << 20).to_string());
}

#[test]
fn time_limits() {
    needs_root!();
    let cpu = Some(Duration::from_millis(100));
    for attack in ["spin", "spin-unseen"] {
        let done = limited(&["attack", attack], Limits { cpu, ..Limits::default() });
        assert_eq!(done.status, Status::TimeLimitExceeded, "{attack}: {done:?}");
        assert!(done.cpu > Duration::from_millis(100), "{attack}: {done:?}");
    }
    let wall = Some(Duration::from_millis(50));
    let done = limited(&["attack", "sleep"], Limits { wall, ..Limits::default() });
    assert_eq!(done.status, Status::TimeLimitExceeded, "{done:?}");
    assert!(done.cpu < Duration::from_secs(10), "{done:?}");
    let done = limited(&["detect"], Limits { cpu: Some(Duration::from_secs(50)), ..Limits::default() });
    assert_eq!(done.status, Status::Accepted, "{done:?}");
}

#[test]
fn memory_limits() {
    needs_root!();
    let limits = Limits { memory: Some(32 << 20), ..Limits::default() };
    let done = limited(&["attack", "memory"], limits);
    assert_eq!(done.status, Status::MemoryLimitExceeded, "{done:?}");
    let done = limited(&["dirty", "memory-peak"], Limits { memory: Some(256 << 20), ..Limits::default() });
    assert_eq!(done.status, Status::Accepted, "{done:?}");
    assert!(done.memory > 96 << 20 && done.memory < 256 << 20, "{done:?}");
}

#[test]
fn output_limits() {
    needs_root!();
    let command = |limit| {
        Command::new("probe").program(common::program()).args(["attack", "output"]).stdout(Output::Capture(limit))
    };
    for limit in [0, 1000, 200_000] {
        let done = outcome(Template::host(), command(limit));
        assert_eq!((done.status, done.stdout.len() as u64), (Status::OutputLimitExceeded, limit));
    }
    let limits = Limits { file_size: 8192, ..common::patient() };
    let done = outcome(Template::host(), probe(&["attack", "large-file"]).limits(limits));
    assert_eq!(done.status, Status::OutputLimitExceeded, "{done:?}");
    // All that it may write is not too much.
    let done = outcome(Template::host(), shell("printf 12345").stdout(Output::Capture(5)));
    assert_eq!((done.status, done.stdout.as_slice()), (Status::Accepted, &b"12345"[..]));
}

#[test]
fn the_filter_refuses_or_ends() {
    needs_root!();
    for tier in [Tier::Complete, Tier::None] {
        let template = |filter| Template { tier, filter, ..Template::host() };
        let done = outcome(template(Filter::Deny), probe(&["attack", "calls"]));
        let refused = format!("Err(Some({}))", libc::EPERM);
        let others = ["clone3", "core", "socket", "thread"];
        for line in text(&done).lines().filter(|line| !others.iter().any(|other| line.starts_with(other))) {
            assert!(line.ends_with(&refused), "{tier:?}: {line}");
        }
        assert!(text(&done).contains(&format!("clone3 Err(Some({}))", libc::ENOSYS)), "{}", text(&done));
        assert!(text(&done).contains(&format!("socket Err(Some({}))", libc::EAFNOSUPPORT)), "{}", text(&done));
        assert!(text(&done).contains("core 0 1 1\n"), "{}", text(&done));
        assert!(text(&done).contains("thread true"), "{}", text(&done));
        let done = outcome(template(Filter::Kill), probe(&["attack", "bpf"]));
        assert_eq!((done.status, done.signal), (Status::DangerousSyscall, Some(libc::SIGSYS)), "{tier:?}");
        let done = outcome(template(Filter::Kill), shell("ls / >/dev/null; (true) & wait"));
        assert_eq!(done.status, Status::Accepted, "{done:?}");
    }
}

#[test]
fn what_one_program_leaves_the_next_of_the_lease_finds_and_files_go_in_and_out() {
    needs_root!();
    let pool = pool(Template::host(), 1);
    let mut lease = pool.acquire().expect("lend a sandbox");
    let list =
        [("/w/a/b/source", OpenOptions::Create(0o644)), ("/w/none", OpenOptions::Read), ("/w", OpenOptions::Read)];
    let files = lease.open(&list.map(|(path, how)| (PathBuf::from(path), how))).expect("open files");
    let mut files = files.into_iter();
    let mut source = std::fs::File::from(files.next().expect("an answer").expect("a file"));
    source.write_all(b"echo compiled > /w/out; rm /w/a/b/source").expect("write");
    for wrong in files {
        assert!(matches!(wrong, Err(Error::File { .. })), "{wrong:?}");
    }
    lease.symlink("a/b/source", "/w/links/../script").expect_err("a link through a directory that is not there");
    lease.symlink("a/b/source", "/w/script").expect("make a link");
    let done = lease.run(shell("sh /w/script && touch /w/a/b/mine")).expect("run");
    assert_eq!(done.status, Status::Accepted, "{done:?}");
    let done = lease
        .run(shell("cat").stdin(Input::Path("/w/out".into())).stdout(Output::Path("/w/copy".into())))
        .expect("run");
    assert_eq!(done.status, Status::Accepted, "{done:?}");
    let copy = lease.open(&[("/w/copy".into(), OpenOptions::Write)]).expect("open").remove(0).expect("a file");
    let mut copy = std::fs::File::from(copy);
    let mut text = String::new();
    copy.seek(SeekFrom::Start(0)).and_then(|_| copy.read_to_string(&mut text)).expect("read");
    assert_eq!(text, "compiled\n");
    lease.delete("/w/a").expect("remove a tree");
    assert!(matches!(lease.delete("/w/a"), Err(Error::File { .. })));
    let done = lease.run(shell("ls -A /w")).expect("run");
    assert_eq!(common::text(&done), "copy\nout\nscript\n");
}

#[test]
fn a_program_is_ended_by_another_thread() {
    needs_root!();
    let pool = pool(Template::host(), 1);
    let mut lease = pool.acquire().expect("lend a sandbox");
    let killer = lease.killer().expect("a killer");
    let (reader, writer) = std::io::pipe().expect("make a pipe");
    let thread = std::thread::spawn(move || {
        let mut reader = reader;
        let mut word = [0; 6];
        reader.read_exact(&mut word).expect("hear the program");
        killer.kill();
    });
    let done = lease.run(shell("echo began; exec sleep 1000").stdout(Output::Fd(writer.into()))).expect("run");
    thread.join().expect("the other thread");
    assert_eq!((done.status, done.signal), (Status::Signalled, Some(libc::SIGKILL)));
    assert_eq!(lease.run(shell("true")).expect("run").status, Status::Accepted);
}

#[test]
fn requests_wait_in_turn_up_to_a_number_and_a_time() {
    needs_root!();
    let settings = runx_pool::Settings { queue: 1, timeout: Duration::from_millis(1), ..settings(1, 0) };
    let pool = Pool::new(Template::host(), settings).expect("start a pool");
    let mut lease = pool.acquire_within(Duration::from_secs(60)).expect("lend a sandbox");
    assert!(matches!(pool.acquire(), Err(Error::Timeout(_))));
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| pool.acquire_within(Duration::from_secs(60)));
        while pool.metrics().queued == 0 {
            std::thread::yield_now();
        }
        assert!(matches!(pool.acquire(), Err(Error::QueueFull(1))));
        run(&mut lease, &["detect"]);
        drop(lease);
        assert!(waiting.join().expect("the other thread").is_ok());
    });
    assert_eq!(pool.metrics().refused, 2);
    assert!(pool.metrics().prometheus().contains("runx_pool_executions_total{status=\"Accepted\"} 1\n"));
    assert!(pool.drain(Duration::from_secs(60)));
}

#[test]
fn sandboxes_that_are_old_or_used_up_are_replaced() {
    needs_root!();
    let (often, old) = (Duration::from_millis(5), Duration::from_millis(1));
    let settings_of = |check_every, max_age| runx_pool::Settings { check_every, max_age, ..settings(1, 0) };
    let pool = Pool::new(Template::host(), settings_of(often, old)).expect("start a pool");
    while pool.metrics().destroyed < 3 {
        std::thread::sleep(often);
    }
    assert_healthy(&pool);
    // Those that are well and young stay.
    let pool = Pool::new(Template::host(), settings_of(old, Duration::from_secs(3600))).expect("start a pool");
    for _ in 0..10 {
        assert_healthy(&pool);
        std::thread::sleep(often);
    }
    let metrics = pool.metrics();
    assert_eq!((metrics.destroyed, metrics.lost), (10, 0), "{metrics:?}");
    let template = Template { tier: Tier::None, ..Template::host() };
    let pool = Pool::new(template, runx_pool::Settings { max_uses: 2, ..settings(1, 0) }).expect("start a pool");
    for _ in 0..6 {
        assert_healthy(&pool);
    }
    let metrics = pool.metrics();
    assert_eq!((metrics.destroyed, metrics.lost), (3, 0), "{metrics:?}");
}

#[test]
fn a_sandbox_needs_neither_proc_nor_devices_nor_a_writable_place() {
    needs_root!();
    for tier in [Tier::Complete, Tier::Wipe, Tier::None] {
        for namespace in [true, false] {
            let mut template = Template { tier, proc: false, devices: false, ..Template::host() };
            template.users.namespace = namespace;
            template.masked.clear();
            template.tmpfs.clear();
            let pool = pool(template, 1);
            for _ in 0..3 {
                let done = pool.acquire().and_then(|mut lease| lease.run(shell("echo /proc/* /dev/*; pwd; echo >/x")));
                let done = done.expect("run a program");
                assert_eq!(text(&done), "/proc/* /dev/*\n/\n", "{tier:?} {namespace}: {done:?}");
                assert_ne!(done.exit_code, 0, "{done:?}");
            }
            assert_eq!(pool.metrics().unclean + pool.metrics().lost, 0);
        }
    }
}

#[test]
fn what_keeps_a_sandbox_from_being_made_is_told() {
    needs_root!();
    let mut template = Template::host();
    // That this is no directory is only seen when something is to be mounted there.
    template.tmpfs[0].target = "/dev/zero".into();
    let pool = pool(template, 1);
    let error = pool.acquire().expect_err("a mount on a device").to_string();
    assert!(error.contains("/dev/zero") && error.contains("Not a directory"), "{error}");
}

#[test]
fn without_a_user_namespace_programs_are_users_of_the_hosts_range() {
    needs_root!();
    let mut template = Template::host();
    template.users.namespace = false;
    let first = template.users.first;
    let pool = pool(template, 1);
    let mut ids = Vec::new();
    for _ in 0..2 {
        let mut lease = pool.acquire().expect("lend a sandbox");
        let done = lease.run(shell("id -u; id -G; touch /w/x")).expect("run");
        assert_eq!(done.status, Status::Accepted, "{done:?}");
        ids.push(text(&done));
        let done = run(&mut lease, &["attack", "init"]);
        assert_eq!(text(&done), "traced false stolen false read false limited false\n");
        assert!(text(&run(&mut lease, &["attack", "peek"])).ends_with("groups true\n"));
    }
    assert_eq!(ids, [0, 1].map(|number| format!("{0}\n{0}\n", first + number)));
}

#[test]
fn there_can_be_more_sandboxes_than_a_user_may_have_keys() {
    needs_root!();
    let most = std::fs::read_to_string("/proc/sys/kernel/keys/maxkeys").ok().and_then(|text| text.trim().parse().ok());
    let size = most.unwrap_or(200usize).min(300) + 5;
    let pool = pool(Template::host(), size);
    while pool.metrics().ready < size as u64 {
        assert_eq!(pool.metrics().failed, 0, "{:?}", pool.acquire().err());
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_pool_that_closes_waits_for_what_is_lent_or_ends_it() {
    needs_root!();
    let pool = pool(Template::host(), 1);
    let mut lease = pool.acquire().expect("lend a sandbox");
    assert!(!pool.drain(Duration::from_millis(1)));
    assert!(matches!(lease.run(shell("true")), Err(Error::Gone(_))));
}

#[test]
fn a_template_is_what_sandboxes_are_like() {
    needs_root!();
    let rootfs = tempfile::TempDir::with_prefix("runx-pool-test-").expect("make a directory");
    for name in ["w", "tmp", "proc", "dev", "own"] {
        std::fs::create_dir(rootfs.path().join(name)).expect("make a directory");
    }
    std::fs::write(rootfs.path().join("own/file"), "of the root").expect("write a file");
    std::fs::write(rootfs.path().join("own/hidden"), "hidden").expect("write a file");
    let mut template = Template::directory(rootfs.path());
    template.masked.push("/own/hidden".into());
    template.hostname = "another".into();
    template.network = Network::Host;
    // Nobody but root can reach it: the pool's process opens it for its sandboxes.
    let binds = Template::host();
    template.binds = binds.binds;
    for bind in &template.binds {
        let at = rootfs.path().join(bind.target.strip_prefix("/").expect("absolute"));
        if bind.source.is_dir() {
            std::fs::create_dir_all(at).expect("make a directory");
        } else {
            std::fs::create_dir_all(at.parent().expect("a parent")).expect("make a directory");
            std::fs::write(at, "").expect("make a file");
        }
    }
    for (path, target) in binds.links {
        let at = rootfs.path().join(path.strip_prefix("/").expect("absolute"));
        std::os::unix::fs::symlink(target, at).expect("make a link");
    }
    let pool = pool(template, 1);
    let mut lease = pool.acquire().expect("lend a sandbox");
    let done = lease
        .run(shell("cat /own/file; cat /own/hidden; uname -n; touch /own/new 2>&1 | wc -l; wc -l < /proc/net/dev"))
        .expect("run");
    let own = std::fs::read_to_string("/proc/net/dev").expect("read").lines().count();
    assert_eq!(text(&done), format!("of the rootanother\n1\n{own}\n"), "{done:?}");
    drop(lease);
    let mut missing = Template::directory(rootfs.path());
    missing.tmpfs.push(runx_pool::Tmpfs { target: "/nowhere".into(), size: 1, inodes: 1, mode: 0o755 });
    let error = Pool::new(missing, settings(1, 0)).expect_err("a place that is not there").to_string();
    assert!(error.contains("/nowhere"), "{error}");
    let own = std::process::id();
    let dead = |status: &str| status.contains("State:\tZ") && status.contains(&format!("PPid:\t{own}\n"));
    let processes = std::fs::read_dir("/proc").expect("list /proc").flatten();
    let left = processes.filter(|entry| {
        std::fs::read_to_string(entry.path().join("status")).is_ok_and(|text| dead(&text) && text.contains("runx-pool"))
    });
    // Another test's may be about to be reaped, so not all of them count.
    let left: Vec<_> = left.map(|entry| entry.path()).collect();
    std::thread::sleep(Duration::from_millis(if left.is_empty() { 0 } else { 500 }));
    let stay: Vec<_> =
        left.iter().filter(|path| std::fs::read_to_string(path.join("status")).is_ok_and(|text| dead(&text))).collect();
    assert!(stay.is_empty(), "nobody waits for {stay:?}");
}
