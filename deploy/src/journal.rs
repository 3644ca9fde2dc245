//! What was done to a node, on its disk: written before each step that could be cut off, so that the next run knows where to
//! go on.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use crate::root::Root;
use crate::stage::sha256;

/// The form of the file. Later ones are refused, so that they are not read wrongly. Form 1 has one change at
/// most: who knows only that one would forget the other.
const FORM: u32 = 2;

/// The name of the drop-in.
pub(crate) const DROP_IN: &str = "runx.toml";

const FILE: &str = "journal.json";
const LOCK: &str = "lock";
const ORIGINAL: &str = "original";
const PREVIOUS: &str = "previous";
const SCRATCH: &str = "check";

/// How far it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum State {
    /// Nothing was done, or all of it was undone.
    #[default]
    Absent,
    /// The configuration is being changed.
    Installing,
    /// All is done.
    Installed,
    /// containerd did not come up; the configuration is being restored.
    RollingBack,
    /// It was restored.
    Failed,
    /// It is being taken away.
    Uninstalling,
}

impl State {
    /// All of them.
    pub(crate) const ALL: [Self; 6] =
        [Self::Absent, Self::Installing, Self::Installed, Self::RollingBack, Self::Failed, Self::Uninstalling];

    /// As it is written.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Absent => "absent",
            Self::Installing => "installing",
            Self::Installed => "installed",
            Self::RollingBack => "rolling-back",
            Self::Failed => "failed",
            Self::Uninstalling => "uninstalling",
        }
    }
}

/// A file of containerd's that is changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Change {
    /// Where it is on the node.
    pub(crate) path: PathBuf,
    /// Whether it was not there before us.
    pub(crate) created: bool,
    /// The SHA-256 of what was written.
    pub(crate) written: String,
    /// Whether there is a file to take the last change back to, which may be an older one of ours.
    pub(crate) had_previous: bool,
    /// Directories that were made for it, from the top.
    #[serde(default)]
    pub(crate) directories: Vec<PathBuf>,
    /// What the names of the files that were kept of it end with.
    #[serde(default)]
    pub(crate) kept: String,
    /// Handlers that were defaults, and had to be written down beside ours.
    #[serde(default)]
    pub(crate) copies: Vec<String>,
}

impl Change {
    /// One of a file. What is kept of it does not meet what is kept of `beside`.
    pub(crate) fn new(path: PathBuf, beside: &[Self]) -> Self {
        let taken = |kept: &str| beside.iter().any(|change| change.kept == kept);
        let kept = ["", "-2", "-3"].into_iter().find(|kept| !taken(kept)).unwrap_or("-4").to_owned();
        Self {
            path,
            created: false,
            written: String::new(),
            had_previous: false,
            directories: Vec::new(),
            kept,
            copies: Vec::new(),
        }
    }
}

/// The journal.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Journal {
    form: u32,
    /// How far it is.
    pub(crate) state: State,
    /// The handler's name.
    pub(crate) handler: String,
    /// The distribution's name.
    pub(crate) distribution: String,
    /// containerd's version.
    pub(crate) containerd: String,
    /// The version of containerd's configuration.
    pub(crate) config_version: i64,
    /// Where the programs are.
    pub(crate) install_dir: PathBuf,
    /// The digest of the set of programs.
    pub(crate) programs: String,
    /// containerd's main file, without links in its path.
    #[serde(default)]
    pub(crate) main: PathBuf,
    /// What was changed.
    pub(crate) change: Option<Change>,
    /// Files that had it before and from which it is being taken.
    #[serde(default)]
    pub(crate) leaving: Vec<Change>,
    /// Whether containerd has yet to be restarted for what is on the disk.
    pub(crate) restart_pending: bool,
    /// How often containerd was restarted in vain with its files as they were before.
    #[serde(default)]
    pub(crate) vain_restarts: u32,
    /// How often the same change failed in a row.
    pub(crate) failures: u32,
    /// The change that failed: the SHA-256 of what was written.
    pub(crate) failed: Option<String>,
    /// Why it failed the last time.
    pub(crate) reason: Option<String>,
    /// How often containerd was restarted, by reason.
    pub(crate) restarts: BTreeMap<String, u64>,
    /// How often a change was taken back.
    pub(crate) rollbacks: u64,
    /// How long the phases of the last installation took, in seconds.
    pub(crate) durations: BTreeMap<String, f64>,
    /// When this was written, in seconds since 1970.
    pub(crate) updated: u64,
}

/// The directory that it is in, locked or not.
#[derive(Debug)]
pub(crate) struct Store<'a> {
    root: &'a Root,
    directory: &'a Path,
}

/// A lock that goes with its holder.
#[derive(Debug)]
pub(crate) struct Lock {
    _file: Flock<std::fs::File>,
}

impl<'a> Store<'a> {
    /// In a directory of the node.
    pub(crate) fn new(root: &'a Root, directory: &'a Path) -> Self {
        Self { root, directory }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Where files are put for containerd to read them, and for what it prints.
    pub(crate) fn scratch(&self) -> PathBuf {
        self.path(SCRATCH)
    }

    /// Reads the journal.
    ///
    /// # Errors
    /// When it is there and not ours.
    pub(crate) fn load(&self) -> Result<Journal> {
        let path = self.path(FILE);
        let Some(bytes) = self.root.read(&path).with_context(|| format!("read {}", path.display()))? else {
            return Ok(Journal::default());
        };
        let journal: Journal =
            serde_json::from_slice(&bytes).with_context(|| format!("{} is no journal of runx-node", path.display()))?;
        if !(1..=FORM).contains(&journal.form) {
            bail!(
                "{} is of form {}, and this runx-node knows 1 to {FORM}: use the one that wrote it",
                path.display(),
                journal.form
            );
        }
        Ok(journal)
    }

    /// Writes the journal.
    ///
    /// # Errors
    /// When that is not possible.
    pub(crate) fn save(&self, journal: &mut Journal) -> Result<()> {
        journal.form = FORM;
        journal.updated = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let bytes = serde_json::to_vec_pretty(journal).context("write the journal")?;
        self.write(FILE, &bytes)
    }

    fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.path(name);
        self.root.write(&path, bytes, 0o600, None).with_context(|| format!("write {}", path.display()))
    }

    /// Keeps a file that is changed as it is without us, and what the change is taken back to; `None` for no file.
    ///
    /// # Errors
    /// When they cannot be written.
    pub(crate) fn keep(&self, change: &Change, original: Option<&[u8]>, previous: Option<&[u8]>) -> Result<()> {
        for (name, bytes) in [(ORIGINAL, original), (PREVIOUS, previous)] {
            let name = format!("{name}{}", change.kept);
            match bytes {
                Some(bytes) => self.write(&name, bytes)?,
                None => self.remove(&name)?,
            }
        }
        Ok(())
    }

    /// Forgets what was kept of a file.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub(crate) fn forget(&self, change: &Change) -> Result<()> {
        [ORIGINAL, PREVIOUS].iter().try_for_each(|name| self.remove(&format!("{name}{}", change.kept)))
    }

    /// Where a file is kept as it was without us.
    pub(crate) fn original_path(&self, change: &Change) -> PathBuf {
        self.path(&format!("{ORIGINAL}{}", change.kept))
    }

    /// A file as it was without us, if it was kept.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(crate) fn original(&self, change: &Change) -> Result<Option<Vec<u8>>> {
        let path = self.original_path(change);
        self.root.read(&path).with_context(|| format!("read {}", path.display()))
    }

    /// What the last change of a file is taken back to.
    ///
    /// # Errors
    /// When it should be there and is not.
    pub(crate) fn previous(&self, change: &Change) -> Result<Option<Vec<u8>>> {
        let path = self.path(&format!("{PREVIOUS}{}", change.kept));
        if !change.had_previous {
            return Ok(None);
        }
        let found = self.root.read(&path).with_context(|| format!("read {}", path.display()))?;
        found
            .map(Some)
            .with_context(|| format!("{} is gone: restore {} by hand", path.display(), change.path.display()))
    }

    fn remove(&self, name: &str) -> Result<()> {
        let path = self.path(name);
        self.root.remove(&path).with_context(|| format!("remove {}", path.display()))
    }

    /// Removes what was for one run.
    ///
    /// # Errors
    /// When that is not possible.
    pub(crate) fn clean(&self) -> Result<()> {
        let path = self.scratch();
        self.root.remove_tree(&path).with_context(|| format!("remove {}", path.display()))
    }

    /// Removes all of it: the journal last, so that a run that is cut off is gone on with.
    ///
    /// # Errors
    /// When that is not possible.
    pub(crate) fn clear(&self, _lock: &Lock) -> Result<()> {
        self.clean()?;
        for name in self.root.names(self.directory).with_context(|| format!("read {}", self.directory.display()))? {
            if let Some(name) = name.to_str().filter(|name| name.starts_with(ORIGINAL) || name.starts_with(PREVIOUS)) {
                self.remove(name)?;
            }
        }
        // Also what a kill left of them.
        for name in [ORIGINAL, PREVIOUS, FILE, LOCK] {
            self.remove(name)?;
        }
        // Only ours, and the one above if nothing else of runx is there.
        let mut at = Some(self.directory);
        while let Some(directory) =
            at.filter(|path| path.file_name().is_some_and(|name| name != "lib" && name != "var"))
        {
            if !self.root.remove_empty(directory).with_context(|| format!("remove {}", directory.display()))? {
                break;
            }
            at = directory.parent();
        }
        Ok(())
    }

    /// Keeps others out until it is dropped.
    ///
    /// # Errors
    /// When somebody else is at work.
    pub(crate) fn lock(&self) -> Result<Lock> {
        let path = self.path(LOCK);
        let what = || format!("lock {}", path.display());
        loop {
            self.root
                .make_directories(self.directory)
                .with_context(|| format!("make {} (--state-dir)", self.directory.display()))?;
            let file = match self.root.open_or_make(&path) {
                // Somebody who is done has removed the directory just now.
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
                done => done.with_context(what)?,
            };
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => {
                    // Who had it may have removed it, and another one may be there.
                    use std::os::unix::fs::MetadataExt;
                    let there = self.root.metadata(&path).with_context(what)?;
                    let held = lock.metadata().with_context(what)?;
                    if there.is_some_and(|there| there.ino() == held.ino()) {
                        return Ok(Lock { _file: lock });
                    }
                }
                Err((_, Errno::EWOULDBLOCK)) => {
                    bail!(
                        "another runx-node is at work on this node (it holds {}): try again when it is done",
                        path.display()
                    )
                }
                Err((_, e)) => return Err(e).with_context(what),
            }
        }
    }
}

impl Journal {
    /// Whether nothing was ever done.
    pub(crate) fn is_blank(&self) -> bool {
        self.install_dir.as_os_str().is_empty()
    }

    /// What was changed of a file.
    pub(crate) fn change_of(&self, path: &Path) -> Option<&Change> {
        self.change.iter().chain(&self.leaving).find(|change| change.path == path)
    }

    /// Whether bytes are what was written to the file that was changed.
    pub(crate) fn wrote(&self, path: &Path, bytes: &[u8]) -> bool {
        self.change.as_ref().is_some_and(|change| change.path == path && change.written == sha256(bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_journal_is_kept_and_others_are_refused() {
        let node = tempfile::tempdir().unwrap();
        let root = Root::open(node.path()).unwrap();
        let store = Store::new(&root, Path::new("/var/lib/runx/node"));
        let lock = store.lock().unwrap();
        assert!(store.lock().unwrap_err().to_string().contains("another runx-node"));
        assert_eq!(store.load().unwrap().state, State::Absent);
        let mut journal = Journal { state: State::Installing, ..Journal::default() };
        store.save(&mut journal).unwrap();
        assert_eq!(store.load().unwrap(), journal);
        let path = node.path().join("var/lib/runx/node/journal.json");
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, text.replace("\"form\": 2", "\"form\": 3")).unwrap();
        assert!(store.load().unwrap_err().to_string().contains("form 3"));
        std::fs::write(&path, "{").unwrap();
        assert!(store.load().is_err());
        store.clear(&lock).unwrap();
        assert!(!node.path().join("var/lib/runx").exists() && node.path().join("var/lib").exists());
    }

    #[test]
    fn a_journal_of_the_first_form_is_read() {
        let node = tempfile::tempdir().unwrap();
        let root = Root::open(node.path()).unwrap();
        let store = Store::new(&root, Path::new("/var/lib/runx/node"));
        let directory = node.path().join("var/lib/runx/node");
        std::fs::create_dir_all(&directory).unwrap();
        let text = r#"{"form": 1, "state": "installed", "handler": "runx", "distribution": "kubeadm", "containerd": "2.1.0",
            "config_version": 3, "install_dir": "/opt/runx", "programs": "x", "restart_pending": false, "failures": 0,
            "change": {"path": "/d/config.toml", "created": false, "written": "w", "had_previous": true}, "failed": null,
            "reason": null, "restarts": {}, "rollbacks": 0, "durations": {}, "updated": 1}"#;
        std::fs::write(directory.join("journal.json"), text).unwrap();
        std::fs::write(directory.join("previous"), "before").unwrap();
        let mut journal = store.load().unwrap();
        let change = journal.change.clone().unwrap();
        assert_eq!(store.previous(&change).unwrap().unwrap(), b"before");
        assert!(journal.leaving.is_empty() && journal.vain_restarts == 0);
        // What is kept of another file does not meet it.
        let other = Change::new("/other".into(), std::slice::from_ref(&change));
        store.keep(&other, Some(b"o"), Some(b"p")).unwrap();
        assert_eq!(store.previous(&change).unwrap().unwrap(), b"before");
        store.forget(&other).unwrap();
        store.save(&mut journal).unwrap();
        assert_eq!(store.load().unwrap(), journal);
    }

    #[test]
    fn names_of_states_are_those_in_the_file() {
        for state in State::ALL {
            assert_eq!(serde_json::to_value(state).unwrap(), state.name());
        }
    }
}
