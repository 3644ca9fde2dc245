//! Files that are there completely or not at all, and locks.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use crate::error::{Context, Error, Result};

/// How often a lock that another process has is tried again.
const AGAIN: Duration = Duration::from_millis(20);

/// Puts a file in its place: written beside, synchronised, renamed. Two writers do not meet if they hold a lock.
pub(crate) fn replace(path: &Path, content: &[u8]) -> Result<()> {
    let beside = path.with_extension("new");
    let written = File::create(&beside).and_then(|mut file| file.write_all(content).and_then(|()| file.sync_all()));
    if let Err(e) = written.and_then(|()| fs::rename(&beside, path)) {
        let _ = fs::remove_file(&beside);
        return Err(e).on("write", path);
    }
    match path.parent() {
        Some(parent) => File::open(parent).and_then(|dir| dir.sync_all()).on("synchronise", parent),
        None => Ok(()),
    }
}

/// Reads a file if it is there.
pub(crate) fn read(path: &Path) -> Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Ok(content) => Ok(Some(content)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e).on("read", path),
    }
}

/// Removes a file if it is there.
pub(crate) fn remove_file(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e).on("remove", path),
        _ => Ok(()),
    }
}

/// Removes a directory with all that is in it, if it is there.
pub(crate) fn remove_tree(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e).on("remove", path),
        _ => Ok(()),
    }
}

/// The file of a lock, made if it is missing.
pub(crate) fn lock_file(path: &Path) -> Result<File> {
    let opened = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path);
    opened.on("open the lock", path)
}

/// A lock that is had by one process at a time, and whose file is removed by its last holder.
#[derive(Debug)]
pub(crate) struct PassingLock {
    file: File,
    path: std::path::PathBuf,
}

impl PassingLock {
    /// Waits until it is had, or until `interrupted` is set. `waiting` is called once if somebody else has it.
    pub(crate) fn take(path: &Path, interrupted: &AtomicBool, waiting: impl FnOnce()) -> Result<Self> {
        let mut waiting = Some(waiting);
        loop {
            let file = lock_file(path)?;
            match file.try_lock() {
                Ok(()) => {}
                // Not by a call that blocks: nothing gets a thread out of it but the other's end.
                Err(TryLockError::WouldBlock) => {
                    if interrupted.load(Ordering::Relaxed) {
                        return Err(Error::Interrupted(format!("wait for the lock {}", path.display())));
                    }
                    if let Some(say) = waiting.take() {
                        say();
                    }
                    thread::sleep(AGAIN);
                    continue;
                }
                Err(TryLockError::Error(e)) => return Err(e).on("lock", path),
            }
            // Whoever had it before may have removed the file, and somebody else have made another one.
            let same = |there: fs::Metadata| file.metadata().is_ok_and(|ours| ours.ino() == there.ino());
            if fs::metadata(path).is_ok_and(same) {
                return Ok(Self { file, path: path.into() });
            }
        }
    }
}

impl Drop for PassingLock {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
        let _ = self.file.unlock();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use super::*;

    #[test]
    fn one_holder_at_a_time_and_no_file_after_the_last() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let inside = AtomicU32::new(0);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        let _lock = PassingLock::take(&path, &AtomicBool::new(false), || ()).unwrap();
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                        thread::yield_now();
                        inside.fetch_sub(1, Ordering::SeqCst);
                    }
                });
            }
        });
        assert!(!path.exists());
    }

    #[test]
    fn who_waits_can_be_interrupted_and_leaves_the_lock_to_its_holder() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let interrupted = AtomicBool::new(false);
        let held = PassingLock::take(&path, &interrupted, || panic!("nobody has it")).unwrap();
        let waited = PassingLock::take(&path, &interrupted, || interrupted.store(true, Ordering::Relaxed));
        assert!(matches!(waited, Err(Error::Interrupted(_))), "{waited:?}");
        assert!(path.exists(), "it is the holder's still");
        // One that is free is had without waiting.
        drop(held);
        PassingLock::take(&path, &interrupted, || panic!("nobody has it")).unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn a_file_that_cannot_be_written_leaves_the_old_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        replace(&path, b"old").unwrap();
        fs::create_dir(dir.path().join("file.new")).unwrap();
        assert!(replace(&path, b"new").is_err());
        assert_eq!(fs::read(&path).unwrap(), b"old");
    }
}
