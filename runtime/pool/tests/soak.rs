//! Many executions: nothing grows. A sample, or as many as `RUNX_ROUNDS` says.

mod common;

use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use common::settings;
use runx_pool::{Command, Output, Pool, Status, Template, Tier};

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("list descriptors").count()
}

fn field(pid: &str, name: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("read a status");
    let line = status.lines().find_map(|line| line.strip_prefix(name)).expect("a line");
    line.split_whitespace().next().and_then(|number| number.parse().ok()).expect("a number")
}

/// The spawner's pid.
fn spawner(lease: &runx_pool::Lease) -> String {
    let killer = lease.killer().expect("a killer");
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", killer.as_fd().as_raw_fd())).expect("read");
    let init = info.lines().find_map(|line| line.strip_prefix("Pid:")).expect("a pid").trim().to_owned();
    field(&init, "PPid:").to_string()
}

#[test]
fn many_executions_leave_no_memory_descriptor_or_process() {
    needs_root!();
    let rounds = std::env::var("RUNX_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(300);
    for tier in [Tier::Complete, Tier::Wipe, Tier::None] {
        let pool = Pool::new(Template { tier, ..Template::host() }, settings(3, 3)).expect("start a pool");
        let once = || {
            let mut lease = pool.acquire().expect("lend a sandbox");
            let outcome = lease.run(Command::new("/bin/true").stdout(Output::Capture(10))).expect("run a program");
            assert_eq!(outcome.status, Status::Accepted, "{outcome:?}");
            lease
        };
        // Threads have their stacks and the allocator its pages by then.
        (0..rounds / 10).for_each(|_| drop(once()));
        let settled = || {
            while pool.metrics().ready < 3 {
                std::thread::sleep(Duration::from_millis(1));
            }
            // What was thrown away is closed a moment later.
            std::thread::sleep(Duration::from_millis(50));
            (descriptors(), field("self", "VmRSS:"))
        };
        let before = settled();
        let first = field(&spawner(&once()), "VmRSS:");
        (0..rounds).for_each(|_| drop(once()));
        let last = field(&spawner(&once()), "VmRSS:");
        let after = settled();
        assert_eq!(before.0, after.0, "{}: descriptors", tier.name());
        assert!(after.1 < before.1 + 4096, "{}: {} kB became {} kB", tier.name(), before.1, after.1);
        assert!(last <= first + 256, "{}: the spawner's {first} kB became {last} kB", tier.name());
        assert_eq!(pool.metrics().unclean + pool.metrics().lost + pool.metrics().failed, 0, "{:?}", pool.metrics());
    }
}
