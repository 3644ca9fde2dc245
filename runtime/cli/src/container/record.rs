//! Containers on disk: a directory each, with a record that is written beside and renamed.
//!
//! Who changes a record holds the directory's lock. Whoever waits for a container's monitor must not, since the
//! monitor takes it to write down the end.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context as _, Result, anyhow, bail};
use runx_core::container::validate_id;
use runx_core::sys::{self, process};
use serde::{Deserialize, Serialize};

use super::options::{Defaults, Options};
use crate::Context;

const FILE: &str = "container.json";

/// Where a container is in its life, as its record says. What the kernel says comes before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Phase {
    /// It was never started.
    #[default]
    Created,
    /// It was started, and its end is not written down.
    Running,
    /// It ended and waits for its next start.
    Restarting,
    /// It ended.
    Exited,
}

/// A process: its pid, and when it started in clock ticks since boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Identity {
    pub(crate) pid: i32,
    pub(crate) start_time: u64,
}

impl Identity {
    /// This process.
    pub(crate) fn own() -> Self {
        let pid = std::process::id() as i32;
        Self { pid, start_time: process::start_time(pid).unwrap_or(0) }
    }

    /// Whether it is still there.
    pub(crate) fn alive(&self) -> bool {
        self.pid > 0 && process::is_alive(self.pid, self.start_time)
    }
}

/// What is known of a container.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Record {
    pub(crate) id: String,
    /// RFC 3339.
    pub(crate) created: String,
    /// The id of its image.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) image_id: Option<String>,
    /// Its image is a WASM module and no root filesystem.
    pub(crate) is_module: bool,
    /// Its whole command line.
    pub(crate) args: Vec<String>,
    pub(crate) rootfs: PathBuf,
    pub(crate) bundle: PathBuf,
    pub(crate) options: Options,
    /// What the image says.
    pub(crate) defaults: Defaults,
    /// The image's labels, and its own.
    pub(crate) labels: std::collections::BTreeMap<String, String>,
    /// Volumes without a name that were made for it.
    pub(crate) volumes: Vec<String>,
    pub(crate) phase: Phase,
    /// Somebody asked it to stop: it is not started again by itself.
    pub(crate) stopped: bool,
    /// RFC 3339, of its last start.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) started: Option<String>,
    /// RFC 3339, of its last end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) finished: Option<String>,
    /// Of its last end, if that is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) exit_code: Option<i32>,
    /// Whether its last end was for lack of memory.
    pub(crate) oom_killed: bool,
    /// Why it could not be started.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) error: Option<String>,
    /// How often it was started again by itself.
    pub(crate) restarts: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) monitor: Option<Identity>,
}

impl Record {
    /// Reads the record in `directory`.
    pub(crate) fn read(directory: &Path) -> Result<Self> {
        let path = directory.join(FILE);
        let text = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
        serde_json::from_slice(&text).with_context(|| format!("read {}", path.display()))
    }

    /// Writes it, whole or not at all. For the holder of the lock.
    pub(crate) fn write(&self, directory: &Path) -> Result<()> {
        let text = serde_json::to_vec(self).context("write the container's record")?;
        write_atomically(&directory.join(FILE), &text)
    }

    /// Whether its monitor is there.
    pub(crate) fn is_monitored(&self) -> bool {
        self.monitor.is_some_and(|monitor| monitor.alive())
    }
}

/// Writes a file beside and renames it.
pub(crate) fn write_atomically(path: &Path, text: &[u8]) -> Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)
        .and_then(|mut file| file.write_all(text))
        .and_then(|()| fs::rename(&temporary, path))
        .inspect_err(|_| drop(fs::remove_file(&temporary)))
        .with_context(|| format!("write {}", path.display()))
}

/// Whether there is a record in a container's directory.
pub(crate) fn is_there(directory: &Path) -> bool {
    directory.join(FILE).exists()
}

/// Now, in RFC 3339.
pub(crate) fn now() -> String {
    humantime::format_rfc3339_nanos(SystemTime::now()).to_string()
}

/// All containers below a storage root.
#[derive(Clone, Debug)]
pub(crate) struct Containers {
    storage: PathBuf,
}

/// The lock of a container's directory. Copies of it in other processes hold it, too, until one of them lets go.
#[derive(Debug)]
pub(crate) struct Lock(OwnedFd);

impl Lock {
    /// Lets go, for all who have a copy.
    pub(crate) fn release(self) {
        // SAFETY: flock takes a descriptor and flags.
        unsafe { libc::flock(self.0.as_raw_fd(), libc::LOCK_UN) };
    }
}

impl std::os::fd::AsFd for Lock {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Containers {
    /// Those of this command.
    pub(crate) fn of(context: &Context) -> Self {
        Self { storage: context.global.storage_root() }
    }

    /// The directory that they, volumes and images are in.
    pub(crate) fn storage(&self) -> &Path {
        &self.storage
    }

    /// The directory that the containers' directories are in.
    pub(crate) fn root(&self) -> PathBuf {
        self.storage.join("containers")
    }

    /// The directory of a container.
    pub(crate) fn directory(&self, id: &str) -> PathBuf {
        self.root().join(id)
    }

    /// Makes the directory of a new container, and locks it.
    pub(crate) fn make(&self, id: &str) -> Result<(PathBuf, Lock)> {
        validate_id(id)?;
        // What begins with a dot is ours: rests that are removed, and the core's own directories.
        if !id.starts_with(|first: char| first.is_ascii_alphanumeric()) {
            bail!("invalid --name {id:?}: it has to begin with a letter or a digit");
        }
        let directory = self.directory(id);
        let make = || DirBuilder::new().mode(0o700).create(&directory);
        let made = match make() {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                let root = self.root();
                DirBuilder::new()
                    .recursive(true)
                    .mode(0o711)
                    .create(&root)
                    .with_context(|| format!("create {}", root.display()))?;
                make()
            }
            other => other,
        };
        match made {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => bail!(
                "there is a container {id:?} already: choose another --name, or remove it with \"runx container rm {id}\""
            ),
            other => other.with_context(|| format!("create {}", directory.display()))?,
        }
        let lock = self.lock(id)?;
        Ok((directory, lock))
    }

    /// Waits for the lock of a container.
    pub(crate) fn lock(&self, id: &str) -> Result<Lock> {
        loop {
            if let Some(lock) = self.flock(id, libc::LOCK_EX)? {
                return Ok(lock);
            }
        }
    }

    /// The lock of a container, unless somebody has it.
    pub(crate) fn try_lock(&self, id: &str) -> Result<Option<Lock>> {
        self.flock(id, libc::LOCK_EX | libc::LOCK_NB)
    }

    /// `None` if somebody has it, or the directory was another container's meanwhile.
    fn flock(&self, id: &str, how: libc::c_int) -> Result<Option<Lock>> {
        let directory = self.directory(id);
        let fd = match sys::open(&directory, libc::O_RDONLY | libc::O_DIRECTORY) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(none(id)),
            other => other.with_context(|| format!("open {}", directory.display()))?,
        };
        // SAFETY: flock takes a descriptor and flags.
        if unsafe { libc::flock(fd.as_raw_fd(), how) } == -1 {
            let error = io::Error::last_os_error();
            if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) {
                return Ok(None);
            }
            return Err(error).with_context(|| format!("lock {}", directory.display()));
        }
        // While we waited it may have been removed, and another one made in its place.
        let ours = sys::fstat(std::os::fd::AsFd::as_fd(&fd)).context("look at a directory")?;
        let is_there =
            fs::metadata(&directory).is_ok_and(|there| (there.dev(), there.ino()) == (ours.st_dev, ours.st_ino));
        Ok(is_there.then_some(Lock(fd)))
    }

    /// Changes a record, if the container is there.
    pub(crate) fn change<T>(&self, id: &str, change: impl FnOnce(&mut Record) -> T) -> Result<T> {
        let lock = self.lock(id)?;
        self.change_locked(id, lock, change)
    }

    /// The same, unless somebody has its lock.
    pub(crate) fn try_change<T>(&self, id: &str, change: impl FnOnce(&mut Record) -> T) -> Result<Option<T>> {
        let Some(lock) = self.try_lock(id)? else { return Ok(None) };
        self.change_locked(id, lock, change).map(Some)
    }

    fn change_locked<T>(&self, id: &str, lock: Lock, change: impl FnOnce(&mut Record) -> T) -> Result<T> {
        let directory = self.directory(id);
        let mut record = Record::read(&directory)?;
        let done = change(&mut record);
        record.write(&directory)?;
        lock.release();
        Ok(done)
    }

    /// The ids of all, those that are half made, too.
    pub(crate) fn ids(&self) -> Result<Vec<String>> {
        let root = self.root();
        let entries = match fs::read_dir(&root) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.with_context(|| format!("list {}", root.display()))?,
        };
        let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        Ok(names.filter(|name| !name.starts_with('.')).collect())
    }

    /// All records, the newest first. What cannot be read is left out with a word in the log.
    pub(crate) fn all(&self) -> Result<Vec<Record>> {
        let mut all = Vec::new();
        for id in self.ids()? {
            match Record::read(&self.directory(&id)) {
                Ok(record) => all.push(record),
                Err(e) => log::debug!("container {id}: {}", crate::message(&e)),
            }
        }
        all.sort_by(|a, b| b.created.cmp(&a.created));
        Ok(all)
    }

    /// The whole id of a container that is named by it or by its beginning.
    pub(crate) fn resolve(&self, word: &str) -> Result<String> {
        // A word that is no id names nothing, and must not become a path.
        if validate_id(word).is_err() || word.starts_with('.') {
            return Err(none(word));
        }
        if self.directory(word).is_dir() {
            return Ok(word.to_owned());
        }
        let mut matching: Vec<String> = self.ids()?.into_iter().filter(|id| id.starts_with(word)).collect();
        match matching.len() {
            0 => Err(none(word)),
            1 => Ok(matching.remove(0)),
            _ => {
                matching.sort();
                Err(anyhow!("{word:?} is the beginning of several containers: {}; say more of it", matching.join(", ")))
            }
        }
    }

    /// Finds a container by its id or the beginning of it.
    pub(crate) fn find(&self, word: &str) -> Result<Record> {
        let id = self.resolve(word)?;
        let directory = self.directory(&id);
        match Record::read(&directory) {
            // It was removed in this moment.
            Err(_) if !directory.exists() => Err(none(&id)),
            other => other.with_context(|| {
                format!(
                    "container {id:?} is only half made or half removed; \"runx container rm --force {id}\" removes it"
                )
            }),
        }
    }
}

/// There is no such container.
fn none(word: &str) -> anyhow::Error {
    anyhow::Error::new(NoContainer(word.to_owned()))
}

/// The error that there is no such container.
#[derive(Debug)]
pub(crate) struct NoContainer(String);

impl std::fmt::Display for NoContainer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "no such container: {:?}; \"runx container ls --all\" lists them", self.0)
    }
}

impl std::error::Error for NoContainer {}

/// A random id, as docker's short ones.
pub(crate) fn random_id() -> Result<String> {
    let mut bytes = [0u8; 6];
    // SAFETY: the buffer is writable for its length.
    let n = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    if n != bytes.len() as isize {
        return Err(io::Error::last_os_error()).context("get random bytes");
    }
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
