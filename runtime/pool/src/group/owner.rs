//! Whose groups are whose, so that what killed pools left can be removed and no other.
//!
//! The name tells the process, and a lock on the directory that it lives: in another PID namespace the name alone would tell
//! of a stranger, or of nobody.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use runx_core::sys;

use super::files::{PATIENCE, remove};

/// All groups of ours are called this, and what follows tells whose they are.
const PREFIX: &str = "runx-pool-";

/// The name of this process' group of a number.
pub(super) fn name(number: u64) -> String {
    let pid = std::process::id();
    let start = sys::process::start_time(pid as i32).unwrap_or(0);
    format!("{PREFIX}{pid}-{start}-{number}")
}

/// Makes a group. It is its maker's as long as what this returns is open. What fails leaves none.
pub(super) fn make(path: &Path) -> io::Result<File> {
    loop {
        fs::create_dir(path)?;
        match hold(path) {
            Ok(lock) => return Ok(lock),
            // Until it was locked, somebody who does not see this process may have removed it.
            Err(e) if is_gone(&e) => {}
            Err(e) => {
                let _ = fs::remove_dir(path);
                return Err(e);
            }
        }
    }
}

/// Locks a group that is there still.
fn hold(path: &Path) -> io::Result<File> {
    let lock = File::open(path)?;
    lock.lock()?;
    // Whoever removed it had it locked, and this is then none but by its descriptor.
    fs::metadata(path)?;
    Ok(lock)
}

fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV))
}

/// Removes what pools have left whose process was killed. Their sandboxes died with it.
pub(super) fn sweep(base: &Path) {
    for entry in fs::read_dir(base).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(owner) = name.to_str().and_then(|name| name.strip_prefix(PREFIX)) else { continue };
        let mut numbers = owner.split('-').map(|part| part.parse::<u64>().ok());
        let (Some(Some(pid)), Some(Some(start))) = (numbers.next(), numbers.next()) else { continue };
        if sys::process::is_alive(pid as i32, start) {
            continue;
        }
        let Ok(directory) = File::open(entry.path()) else { continue };
        if directory.try_lock().is_ok() {
            let _ = remove(&entry.path(), PATIENCE);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_of_a_process_that_is_not_seen_from_here_are_left_alone_until_it_is_gone() {
        let place = tempfile::TempDir::with_prefix("runx-pool-test-").unwrap();
        // That of process 1 in another PID namespace: the one here began at another time.
        let theirs = place.path().join("runx-pool-1-18446744073709551615-0");
        let lock = make(&theirs).unwrap();
        sweep(place.path());
        assert!(theirs.is_dir());
        drop(lock);
        sweep(place.path());
        assert!(!theirs.exists());
    }

    #[test]
    fn only_what_pools_have_left_is_removed() {
        let place = tempfile::TempDir::with_prefix("runx-pool-test-").unwrap();
        for name in ["runx-pool-left", "runx-pool-1-", "another", &name(0)] {
            fs::create_dir(place.path().join(name)).unwrap();
        }
        fs::create_dir(place.path().join("runx-pool-1-18446744073709551615-0")).unwrap();
        sweep(place.path());
        let mut left: Vec<_> = fs::read_dir(place.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        let mut expected = ["another", "runx-pool-1-", &name(0), "runx-pool-left"].map(std::ffi::OsString::from);
        expected.sort();
        assert_eq!(left, expected);
    }

    #[test]
    fn a_group_that_is_somebodys_is_nobody_elses() {
        let place = tempfile::TempDir::with_prefix("runx-pool-test-").unwrap();
        let path = place.path().join(name(0));
        let _lock = make(&path).unwrap();
        assert_eq!(make(&path).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
    }
}
