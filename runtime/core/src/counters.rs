//! Small files of counters, to which many processes add, and which a node's metrics are read from.
//!
//! A line has a name and a number of twenty digits. A file is therefore as long after an addition as before it, and whoever is
//! killed in the middle of one leaves numbers that are whole; its lock goes with the process.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};

/// The most that is read of a file, in bytes: a page, which the kernel writes at once.
pub const LIMIT: u64 = 4096;

/// How long others wait for the lock whom something waits for.
pub const SHORT: Duration = Duration::from_millis(50);

/// How long the lock is waited for where nothing waits meanwhile. On a busy machine a process may keep it for a while that
/// has just lost the processor.
pub const LONG: Duration = Duration::from_secs(10);

/// The shortest and the longest time between two tries.
const AGAIN: (Duration, Duration) = (Duration::from_micros(200), Duration::from_millis(10));

/// The numbers of a file, of which it has one for each of `names`. What is not there or no number counts as nothing.
///
/// # Errors
/// Those of reading. A file that is not there has counted nothing.
pub fn read(path: &Path, names: &[&str]) -> io::Result<Vec<u64>> {
    match fs::OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(vec![0; names.len()]),
        file => {
            let file = lock(file?, FlockArg::LockSharedNonblock, SHORT)?;
            Ok(parse(&contents(&file)?, names))
        }
    }
}

/// Adds to numbers, each of which is beside its name. The file is made if it is not there; other names than these leave it.
/// Its lock is waited for no longer than `patience`.
///
/// # Errors
/// When it is somebody else's, or another process has it for longer than that, and those of the file.
pub fn add(path: &Path, numbers: &[(&str, u64)], patience: Duration) -> io::Result<()> {
    let mut options = fs::OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    let file = options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)?;
    let found = file.metadata()?;
    if !found.is_file() || found.uid() != nix::unistd::geteuid().as_raw() {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, "it is no file of this user's"));
    }
    let mut file = lock(file, FlockArg::LockExclusiveNonblock, patience)?;
    let names: Vec<&str> = numbers.iter().map(|(name, _)| *name).collect();
    let totals = parse(&contents(&file)?, &names);
    let mut out = String::new();
    for ((name, more), total) in numbers.iter().zip(totals) {
        // Writing to a string does not fail.
        let _ = writeln!(out, "{name} {:020}", total.saturating_add(*more));
    }
    file.rewind()?;
    file.write_all(out.as_bytes())?;
    file.set_len(out.len() as u64)
}

fn parse(text: &str, names: &[&str]) -> Vec<u64> {
    let mut numbers = vec![0; names.len()];
    for (name, value) in text.lines().filter_map(|line| line.split_once(' ')) {
        if let Some(at) = names.iter().position(|known| *known == name) {
            numbers[at] = value.parse().unwrap_or(0);
        }
    }
    numbers
}

/// Locks the file, for which nobody waits without end: whoever has it may have been stopped.
fn lock(file: File, how: FlockArg, patience: Duration) -> io::Result<Flock<File>> {
    let mut file = file;
    let end = Instant::now() + patience;
    let mut pause = AGAIN.0;
    loop {
        match Flock::lock(file, how) {
            Ok(locked) => return Ok(locked),
            Err((back, nix::Error::EWOULDBLOCK | nix::Error::EINTR)) => {
                if Instant::now() >= end {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                file = back;
                std::thread::sleep(pause);
                pause = AGAIN.1.min(pause * 2);
            }
            Err((_, e)) => return Err(e.into()),
        }
    }
}

fn contents(file: &File) -> io::Result<String> {
    let mut bytes = Vec::new();
    file.take(LIMIT).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Names the file of one that adds until it is killed.
    const FOR_EVER: &str = "RUNX_TEST_COUNTERS";

    #[test]
    fn many_at_once_lose_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("counters");
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        add(&path, &[("hits", 1), ("time", 2)], LONG).unwrap();
                    }
                });
            }
        });
        assert_eq!(read(&path, &["time", "other", "hits"]).unwrap(), [400, 0, 200]);
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
    }

    #[test]
    fn a_lock_that_is_kept_for_a_while_loses_no_number_of_who_has_time() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("counters");
        add(&path, &[("hits", 1)], LONG).unwrap();
        let held = Flock::lock(File::open(&path).unwrap(), FlockArg::LockExclusiveNonblock).unwrap();
        assert_eq!(add(&path, &[("hits", 1)], SHORT).unwrap_err().kind(), io::ErrorKind::TimedOut);
        std::thread::scope(|scope| {
            let patient = scope.spawn(|| add(&path, &[("hits", 1)], LONG));
            std::thread::sleep(SHORT * 4);
            drop(held);
            patient.join().unwrap().unwrap();
        });
        assert_eq!(read(&path, &["hits"]).unwrap(), [2]);
    }

    /// What the next test kills.
    #[test]
    fn adds_for_ever_where_it_is_told_to() {
        let Some(path) = std::env::var_os(FOR_EVER) else { return };
        loop {
            let _ = add(Path::new(&path), &[("one", 1), ("two", 1)], LONG);
        }
    }

    #[test]
    fn one_that_is_killed_while_it_adds_leaves_whole_numbers_and_no_lock() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("counters");
        let names = ["one", "two"];
        for _ in 0..30 {
            let mut child = std::process::Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "counters::tests::adds_for_ever_where_it_is_told_to"])
                .env(FOR_EVER, &path)
                .stdout(std::process::Stdio::null())
                .spawn()
                .unwrap();
            // It may have the lock all the time.
            let bound = Instant::now() + Duration::from_secs(60);
            let counted = loop {
                let ended = child.try_wait().unwrap();
                let counted = fs::metadata(&path).is_ok_and(|found| found.len() > 0);
                if counted || ended.is_some() || Instant::now() > bound {
                    break counted && ended.is_none();
                }
                std::thread::sleep(Duration::from_micros(100));
            };
            child.kill().unwrap();
            let status = child.wait().unwrap();
            assert!(counted, "it counts until it is killed: {status}");
            let before = read(&path, &names).unwrap();
            assert!(before[0] > 0 && before[0] == before[1], "{before:?}");
            add(&path, &[("one", 1), ("two", 1)], LONG).unwrap();
            assert_eq!(read(&path, &names).unwrap(), [before[0] + 1, before[1] + 1]);
            fs::remove_file(&path).unwrap();
        }
    }

    #[test]
    fn what_is_not_there_or_broken_counts_as_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("counters");
        assert_eq!(read(&path, &["hits"]).unwrap(), [0]);
        fs::write(&path, "hits many\nother 3\ncompiles 7\n\u{0}\u{1}").unwrap();
        assert_eq!(read(&path, &["hits", "compiles"]).unwrap(), [0, 7]);
        add(&path, &[("hits", 2), ("compiles", 1)], LONG).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), format!("hits {:020}\ncompiles {:020}\n", 2, 8));
    }

    #[test]
    fn what_is_no_file_is_left_alone_and_holds_nobody_up() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        fs::write(at("other"), "kept").unwrap();
        std::os::unix::fs::symlink(at("other"), at("link")).unwrap();
        nix::unistd::mkfifo(&at("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        fs::create_dir(at("directory")).unwrap();
        for name in ["link", "pipe", "directory"] {
            assert!(add(&at(name), &[("hits", 1)], LONG).is_err(), "{name}");
        }
        assert_eq!(fs::read_to_string(at("other")).unwrap(), "kept");
    }
}
