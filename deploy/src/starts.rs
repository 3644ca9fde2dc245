//! How long starts took on the node, as its shims count it (`shim/src/starts.rs`), and the files of counters in general
//! (`runtime/core/src/counters.rs`).

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};

use crate::containers::{SHIMS, directories};
use crate::root::Root;
use crate::status::Metrics;

/// The file's name among the states of each of containerd's namespaces.
const FILE: &str = ".starts";

/// What is started.
const KINDS: [&str; 4] = ["sandbox", "native", "wasm", "agent"];

/// The histogram's upper bounds: in microseconds, as the shims have them, and in seconds, as Prometheus has them.
const BOUNDS: [(&str, &str); 12] = [
    ("1000", "0.001"),
    ("2500", "0.0025"),
    ("5000", "0.005"),
    ("10000", "0.01"),
    ("25000", "0.025"),
    ("50000", "0.05"),
    ("100000", "0.1"),
    ("250000", "0.25"),
    ("500000", "0.5"),
    ("1000000", "1"),
    ("2500000", "2.5"),
    ("10000000", "10"),
];

/// The most that is read of a file, in bytes: a page, as those who write it have it.
const LIMIT: u64 = 4096;

/// How often a lock is tried, a millisecond apart. Whoever has it may have been stopped.
const PATIENCE: u32 = 20;

/// Names and numbers.
pub(crate) type Numbers = BTreeMap<String, u64>;

/// The numbers of a file; none if there is no file, or something else.
pub(crate) fn numbers(root: &Root, path: &Path) -> Numbers {
    if !root.metadata(path).ok().flatten().is_some_and(|found| found.is_file()) {
        return Numbers::new();
    }
    let Ok(Some(file)) = root.open_file(path) else { return Numbers::new() };
    let mut bytes = Vec::new();
    // While somebody writes, digits of two numbers may be mixed.
    let read = match lock(file) {
        Ok(file) => (&*file).take(LIMIT).read_to_end(&mut bytes),
        Err(file) => file.take(LIMIT).read_to_end(&mut bytes),
    };
    if read.is_err() {
        return Numbers::new();
    }
    let text = String::from_utf8_lossy(&bytes);
    let lines = text.lines().filter_map(|line| line.split_once(' '));
    lines.filter_map(|(name, value)| Some((name.to_owned(), value.parse().ok()?))).collect()
}

fn lock(file: File) -> Result<Flock<File>, File> {
    let mut file = file;
    for _ in 0..PATIENCE {
        match Flock::lock(file, FlockArg::LockSharedNonblock) {
            Ok(locked) => return Ok(locked),
            Err((back, _)) => file = back,
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Err(file)
}

/// Adds the metrics of all of containerd's namespaces.
pub(crate) fn add(root: &Root, out: &mut Metrics) {
    let mut all = Numbers::new();
    for namespace in directories(root, Path::new(SHIMS)) {
        for (name, number) in numbers(root, &namespace.join(FILE)) {
            let sum = all.entry(name).or_default();
            *sum = sum.saturating_add(number);
        }
    }
    let of = |kind: &str, what: &str| all.get(&format!("{kind}.{what}")).copied().unwrap_or_default();
    out.family(
        "runx_container_start_seconds",
        "histogram",
        "What shims took for creations and starts together since the node booted, by what was started.",
    );
    for kind in KINDS {
        let mut count: u64 = 0;
        for (name, bound) in BOUNDS {
            count = count.saturating_add(of(kind, name));
            out.sample("runx_container_start_seconds_bucket", &[("kind", kind), ("le", bound)], count);
        }
        count = count.saturating_add(of(kind, "more"));
        out.sample("runx_container_start_seconds_bucket", &[("kind", kind), ("le", "+Inf")], count);
        out.sample("runx_container_start_seconds_sum", &[("kind", kind)], of(kind, "microseconds") as f64 / 1e6);
        out.sample("runx_container_start_seconds_count", &[("kind", kind)], count);
    }
    out.family("runx_container_start_failures_total", "counter", "Containers that could not be made or started.");
    out.sample("runx_container_start_failures_total", &[], all.get("failed").copied().unwrap_or_default());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(node: &Path) -> String {
        let mut out = Metrics::default();
        add(&Root::open(node).unwrap(), &mut out);
        out.0
    }

    fn has(text: &str, line: &str) {
        assert!(text.lines().any(|found| found == line), "{line}: {text}");
    }

    #[test]
    fn starts_of_all_namespaces_are_added_and_buckets_hold_those_below() {
        let node = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| {
            let directory = node.path().join("run/containerd/runx").join(name);
            std::fs::create_dir_all(&directory).unwrap();
            std::fs::write(directory.join(FILE), text).unwrap();
        };
        let none = text(node.path());
        has(&none, "runx_container_start_seconds_count{kind=\"agent\"} 0");
        has(&none, "runx_container_start_failures_total 0");
        put(
            "k8s.io",
            "failed 2\nnative.2500 3\nnative.10000 1\nnative.more 1\nnative.microseconds 1500000\nwasm.1000 x\n",
        );
        put("other", &format!("failed 1\nnative.2500 1\nwasm.1000 {}\n", u64::MAX));
        let some = text(node.path());
        for line in [
            "runx_container_start_seconds_bucket{kind=\"native\",le=\"0.001\"} 0",
            "runx_container_start_seconds_bucket{kind=\"native\",le=\"0.0025\"} 4",
            "runx_container_start_seconds_bucket{kind=\"native\",le=\"10\"} 5",
            "runx_container_start_seconds_bucket{kind=\"native\",le=\"+Inf\"} 6",
            "runx_container_start_seconds_sum{kind=\"native\"} 1.5",
            "runx_container_start_seconds_count{kind=\"native\"} 6",
            "runx_container_start_seconds_count{kind=\"wasm\"} 18446744073709551615",
            "runx_container_start_failures_total 3",
        ] {
            has(&some, line);
        }
    }

    #[test]
    fn files_that_are_none_and_locks_that_are_kept_hold_nobody_up() {
        let node = tempfile::tempdir().unwrap();
        let directory = node.path().join("run/containerd/runx/k8s.io");
        std::fs::create_dir_all(&directory).unwrap();
        let path = directory.join(FILE);
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        has(&text(node.path()), "runx_container_start_failures_total 0");
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, format!("failed 7\n{}", "x".repeat(1 << 20))).unwrap();
        let _lock = Flock::lock(File::open(&path).unwrap(), FlockArg::LockExclusive).unwrap();
        has(&text(node.path()), "runx_container_start_failures_total 7");
    }
}
