//! Files that the server keeps between requests: those that were uploaded, and those that commands left.
//!
//! They lie in a directory of the server's own, which goes with it. All of them together have a limit, and one that nobody
//! has asked for goes after a while: clients forget to delete them.

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// What the names of such directories begin with, and the file in each that its server has locked.
const PREFIX: &str = "runx-pool-";
const LOCK: &str = "lock";

/// What a file counts for besides its bytes: an inode, and memory for its name.
const FILE: u64 = 4096;

/// One of them.
#[derive(Debug)]
struct Kept {
    name: String,
    size: u64,
    used: Instant,
}

#[derive(Debug, Default)]
struct Table {
    kept: BTreeMap<String, Kept>,
    /// Of all, with those that are being written.
    bytes: u64,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Store {
    directory: TempDir,
    /// Held as long as the directory is somebody's.
    _lock: File,
    limit: u64,
    timeout: Option<Duration>,
    table: Mutex<Table>,
}

/// A file that is being written; it is gone when it is dropped.
#[derive(Debug)]
pub(crate) struct Draft<'a> {
    store: &'a Store,
    id: String,
    file: Option<File>,
    size: u64,
}

fn random_name() -> io::Result<String> {
    let mut bytes = [0_u8; 16];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02X}")).collect())
}

impl Store {
    /// In a new directory in one of these, the first in which it can be made.
    ///
    /// # Errors
    /// When it can be made in none.
    pub(crate) fn new(places: &[PathBuf], limit: u64, timeout: Option<Duration>) -> io::Result<Self> {
        let mut last = io::Error::new(io::ErrorKind::NotFound, "there is no place for files");
        for place in places {
            remove_left(place);
            match make_directory(place) {
                Ok((directory, lock)) => {
                    return Ok(Self { directory, _lock: lock, limit, timeout, table: Mutex::default() });
                }
                Err(e) => last = e,
            }
        }
        Err(last)
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn path(&self, id: &str) -> PathBuf {
        self.directory.path().join(id)
    }

    /// The directory.
    pub(crate) fn directory(&self) -> &std::path::Path {
        self.directory.path()
    }

    /// Begins to write a file.
    ///
    /// # Errors
    /// When it cannot be made.
    pub(crate) fn draft(&self) -> io::Result<Draft<'_>> {
        let id = random_name()?;
        let file = File::options().write(true).create_new(true).mode(0o400).open(self.path(&id))?;
        let mut draft = Draft { store: self, id, file: Some(file), size: 0 };
        draft.count(FILE)?;
        Ok(draft)
    }

    /// All, by their ids: their names.
    pub(crate) fn list(&self) -> BTreeMap<String, String> {
        self.table().kept.iter().map(|(id, kept)| (id.clone(), kept.name.clone())).collect()
    }

    /// One, open for reading, with its name.
    ///
    /// # Errors
    /// When there is none of the id.
    pub(crate) fn open(&self, id: &str) -> io::Result<(String, File)> {
        let mut table = self.table();
        // What is no id names no file.
        let missing = || io::Error::new(io::ErrorKind::NotFound, format!("there is no file {id}"));
        let kept = table.kept.get_mut(id).ok_or_else(missing)?;
        kept.used = Instant::now();
        Ok((kept.name.clone(), File::open(self.path(id))?))
    }

    /// Removes one. Whether there was one.
    pub(crate) fn remove(&self, id: &str) -> bool {
        let mut table = self.table();
        let Some(kept) = table.kept.remove(id) else { return false };
        table.bytes -= kept.size;
        let _ = fs::remove_file(self.path(id));
        true
    }

    /// Removes those that nobody has asked for.
    pub(crate) fn sweep(&self) {
        let Some(timeout) = self.timeout else { return };
        let old: Vec<String> = {
            let table = self.table();
            table.kept.iter().filter(|(_, kept)| kept.used.elapsed() > timeout).map(|(id, _)| id.clone()).collect()
        };
        for id in old {
            self.remove(&id);
        }
    }

    /// How many there are, and how large they are together, in bytes.
    pub(crate) fn size(&self) -> (usize, u64) {
        let table = self.table();
        (table.kept.len(), table.bytes)
    }
}

impl Draft<'_> {
    fn count(&mut self, size: u64) -> io::Result<()> {
        let mut table = self.store.table();
        if table.bytes + size > self.store.limit {
            let text = format!("all files together may have {} bytes", self.store.limit);
            return Err(io::Error::new(io::ErrorKind::StorageFull, text));
        }
        table.bytes += size;
        self.size += size;
        Ok(())
    }

    /// Adds to it.
    ///
    /// # Errors
    /// When all files together would be too large; and the kernel's.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.count(bytes.len() as u64)?;
        match &mut self.file {
            Some(file) => file.write_all(bytes),
            None => Ok(()),
        }
    }

    /// Keeps it under a name. Returns its id.
    pub(crate) fn keep(mut self, name: &str) -> String {
        self.file = None;
        let kept = Kept { name: name.to_owned(), size: self.size, used: Instant::now() };
        self.store.table().kept.insert(self.id.clone(), kept);
        // What is dropped now is nothing any more.
        self.size = 0;
        std::mem::take(&mut self.id)
    }
}

impl Drop for Draft<'_> {
    fn drop(&mut self) {
        if !self.id.is_empty() {
            self.store.table().bytes -= self.size;
            let _ = fs::remove_file(self.store.path(&self.id));
        }
    }
}

/// Makes a directory, which is its maker's as long as the file is open.
fn make_directory(place: &Path) -> io::Result<(TempDir, File)> {
    loop {
        let directory = tempfile::Builder::new().prefix(PREFIX).tempdir_in(place)?;
        match hold(&directory.path().join(LOCK)) {
            Ok(lock) => return Ok((directory, lock)),
            // Until it was locked, another server may have taken it for one that was left.
            Err(e) if e.kind() == io::ErrorKind::NotFound && place.exists() => {}
            Err(e) => return Err(e),
        }
    }
}

/// Makes and locks a file that is there still.
fn hold(path: &Path) -> io::Result<File> {
    let lock = File::create_new(path)?;
    lock.lock()?;
    // Whoever removed it had it locked, and this is then none but by its descriptor.
    fs::metadata(path)?;
    Ok(lock)
}

/// Removes the directories of servers that were killed.
fn remove_left(place: &Path) {
    for entry in fs::read_dir(place).into_iter().flatten().flatten() {
        if !entry.file_name().to_string_lossy().starts_with(PREFIX) {
            continue;
        }
        // One without a lock is being made.
        let Ok(lock) = File::open(entry.path().join(LOCK)) else { continue };
        match lock.try_lock() {
            Ok(()) => drop(fs::remove_dir_all(entry.path())),
            Err(TryLockError::WouldBlock | TryLockError::Error(_)) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store(limit: u64, timeout: Option<Duration>) -> Store {
        Store::new(&["/nowhere".into(), std::env::temp_dir()], limit, timeout).unwrap()
    }

    #[test]
    fn what_is_kept_is_read_and_what_is_not_kept_is_gone() {
        let store = store(10_000, None);
        let mut draft = store.draft().unwrap();
        draft.write(b"content").unwrap();
        let id = draft.keep("name");
        assert_eq!(store.list(), BTreeMap::from([(id.clone(), "name".to_owned())]));
        let mut text = String::new();
        store.open(&id).unwrap().1.read_to_string(&mut text).unwrap();
        assert_eq!(text, "content");
        store.draft().unwrap().write(b"lost").unwrap();
        assert_eq!((store.size(), fs::read_dir(store.directory()).unwrap().count()), ((1, FILE + 7), 2));
        assert!(store.remove(&id) && !store.remove(&id) && store.open(&id).is_err());
        assert_eq!((store.size(), fs::read_dir(store.directory()).unwrap().count()), ((0, 0), 1));
        assert!(store.open("../../etc/passwd").is_err());
    }

    #[test]
    fn what_a_server_has_left_that_was_killed_is_removed_and_nothing_else() {
        let place = tempfile::tempdir().unwrap();
        let used = Store::new(&[place.path().to_owned()], 1, None).unwrap();
        let left = place.path().join("runx-pool-left");
        fs::create_dir(&left).unwrap();
        fs::write(left.join(LOCK), "").unwrap();
        fs::create_dir(place.path().join("runx-pool-begun")).unwrap();
        fs::create_dir(place.path().join("other")).unwrap();
        let second = Store::new(&[place.path().to_owned()], 1, None).unwrap();
        assert!(!left.exists() && used.directory().exists() && second.directory().exists());
        assert!(place.path().join("runx-pool-begun").exists() && place.path().join("other").exists());
    }

    #[test]
    fn servers_that_start_at_once_leave_each_other_their_directories() {
        let place = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        let store = Store::new(&[place.path().to_owned()], 1 << 20, None).unwrap();
                        store.draft().unwrap().write(b"content").unwrap();
                    }
                });
            }
        });
    }

    #[test]
    fn all_together_have_a_limit_and_old_ones_go() {
        let store = store(FILE + 10, Some(Duration::ZERO));
        let mut draft = store.draft().unwrap();
        draft.write(&[0; 10]).unwrap();
        assert_eq!(draft.write(&[0]).unwrap_err().kind(), io::ErrorKind::StorageFull);
        draft.keep("full");
        assert!(store.draft().is_err());
        std::thread::sleep(Duration::from_millis(2));
        store.sweep();
        assert_eq!(store.size(), (0, 0));
        store.draft().unwrap().write(&[0; 10]).unwrap();
    }
}
