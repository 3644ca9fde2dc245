//! What is known of an attached container, on disk, and who may change it.
//!
//! A container's directory is `<root>/.network/<id>`: a record, and the file that keeps its network namespace. What holds for
//! all containers of a bridge, whatever root they have, is `<state>/<bridge>`: the subnet, the leases of addresses, and a claim
//! for each container.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use runx_core::container::validate_id;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::cni::Attachment;
use super::ports::Port;
use super::subnet::Subnet;

/// Below a root: the directories of its attached containers.
const DIRECTORY: &str = ".network";

/// How long to wait for somebody else who works on the same container or bridge.
const PATIENCE: Duration = Duration::from_secs(90);

/// What DEL needs to know, and `ls` tells.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Record {
    /// The container.
    pub(super) id: String,
    /// What plugins are told.
    pub(super) attachment: Attachment,
    /// Its published ports.
    pub(super) ports: Vec<Port>,
    /// Where the bridge's leases and claims are.
    pub(super) bridge: PathBuf,
    /// Whether all of it was made.
    pub(super) complete: bool,
}

/// A container's directory, locked.
pub(super) struct Place {
    directory: PathBuf,
    /// Plugins inherit it.
    pub(super) lock: OwnedFd,
}

impl Place {
    /// Locks a container's directory, and makes it if that is asked for. `None` if it is not there.
    pub(super) fn open(root: &Path, id: &str, make: bool) -> Result<Option<Self>> {
        validate_id(id)?;
        let directory = root.join(DIRECTORY).join(id);
        let end = Instant::now() + PATIENCE;
        loop {
            if make {
                make_directory(&directory)?;
            }
            let opened = File::options().read(true).custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW).open(&directory);
            let file = match opened {
                Err(e) if e.kind() == std::io::ErrorKind::NotFound && make => continue,
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
                other => other.with_context(|| format!("open {}", directory.display()))?,
            };
            lock(&file, end).with_context(|| format!("wait for who works on the network of container {id:?}"))?;
            // Who had it before may have removed it.
            let same = |now: fs::Metadata| {
                file.metadata().is_ok_and(|mine| (mine.dev(), mine.ino()) == (now.dev(), now.ino()))
            };
            if fs::symlink_metadata(&directory).is_ok_and(same) {
                return Ok(Some(Self { directory, lock: file.into() }));
            }
        }
    }

    /// The containers below a root that are attached, or were when somebody was killed.
    pub(super) fn all(root: &Path) -> Result<Vec<String>> {
        let directory = root.join(DIRECTORY);
        let entries = match fs::read_dir(&directory) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.with_context(|| format!("list {}", directory.display()))?,
        };
        let mut ids: Vec<_> = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
        ids.sort();
        Ok(ids)
    }

    /// The file that keeps the network namespace.
    pub(super) fn netns(&self) -> PathBuf {
        self.directory.join("netns")
    }

    /// What was written last; `None` if nothing was.
    pub(super) fn record(&self) -> Result<Option<Record>> {
        read(&record_path(&self.directory))
    }

    pub(super) fn write(&self, record: &Record) -> Result<()> {
        write(&record_path(&self.directory), record)
    }

    /// Removes it, with all that is in it.
    pub(super) fn remove(self) -> Result<()> {
        fs::remove_dir_all(&self.directory).with_context(|| format!("remove {}", self.directory.display()))?;
        if let Some(parent) = self.directory.parent() {
            // With the last one.
            let _ = fs::remove_dir(parent);
        }
        Ok(())
    }
}

fn record_path(directory: &Path) -> PathBuf {
    directory.join("record.json")
}

/// The record of a container that is not to be changed.
pub(super) fn peek(root: &Path, id: &str) -> Result<Option<Record>> {
    validate_id(id)?;
    read(&record_path(&root.join(DIRECTORY).join(id)))
}

/// The file that keeps a container's network namespace, if there is one.
pub(super) fn netns(root: &Path, id: &str) -> Option<PathBuf> {
    let file = root.join(DIRECTORY).join(id).join("netns");
    super::netns::is_there(&file).then_some(file)
}

/// A container that has addresses and ports of a bridge.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Claim {
    pub(super) root: PathBuf,
    pub(super) id: String,
    pub(super) ports: Vec<Port>,
}

/// The addresses of a bridge.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Network {
    pub(super) subnet: Subnet,
    /// Whether the bridge goes with its last container: it was not there before the first one.
    pub(super) ours: bool,
    /// Whether the host's iptables let its packets pass.
    pub(super) firewall: bool,
    /// Whether it stays when its last container goes.
    pub(super) keep: bool,
}

/// What all containers of a bridge have in common, locked.
pub(super) struct Shared {
    directory: PathBuf,
    _lock: File,
}

impl Shared {
    pub(super) fn open(directory: &Path) -> Result<Self> {
        make_directory(directory)?;
        let path = directory.join("lock");
        let file = File::options().create(true).truncate(false).write(true).mode(0o600).open(&path);
        let file = file.with_context(|| format!("open {}", path.display()))?;
        lock(&file, Instant::now() + PATIENCE).with_context(|| format!("wait for {}", path.display()))?;
        Ok(Self { directory: directory.to_owned(), _lock: file })
    }

    /// Where the plugin for addresses keeps its leases.
    pub(super) fn leases(&self) -> PathBuf {
        self.directory.join("leases")
    }

    fn network_path(&self) -> PathBuf {
        self.directory.join("network.json")
    }

    pub(super) fn network(&self) -> Result<Option<Network>> {
        read(&self.network_path())
    }

    pub(super) fn set_network(&self, network: &Network) -> Result<()> {
        write(&self.network_path(), network)
    }

    fn claim_path(&self, key: &str) -> PathBuf {
        self.directory.join("claims").join(key)
    }

    /// The claims of containers that are there, but for that of `key`. Those that are left of others are removed.
    pub(super) fn claims(&self, key: &str) -> Result<Vec<Claim>> {
        let directory = self.directory.join("claims");
        let mut claims = Vec::new();
        for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
            let path = entry.path();
            if entry.file_name() == key || entry.file_name().to_string_lossy().ends_with(".new") {
                continue;
            }
            let Some(claim) = read::<Claim>(&path)? else { continue };
            if record_path(&claim.root.join(DIRECTORY).join(&claim.id)).exists() {
                claims.push(claim);
            } else {
                let _ = fs::remove_file(&path);
            }
        }
        Ok(claims)
    }

    pub(super) fn set_claim(&self, key: &str, claim: &Claim) -> Result<()> {
        make_directory(&self.directory.join("claims"))?;
        write(&self.claim_path(key), claim)
    }

    pub(super) fn remove_claim(&self, key: &str) -> Result<()> {
        let path = self.claim_path(key);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(e).with_context(|| format!("remove {}", path.display()))
            }
            _ => Ok(()),
        }
    }

    /// Forgets the subnet and all leases: nobody is left. The lock stays, for who waits for it.
    pub(super) fn clear(&self) -> Result<()> {
        for directory in [self.leases(), self.directory.join("claims")] {
            match fs::remove_dir_all(&directory) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                    return Err(e).with_context(|| format!("remove {}", directory.display()));
                }
                _ => {}
            }
        }
        match fs::remove_file(self.network_path()) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e).context("forget the network's subnet"),
            _ => Ok(()),
        }
    }
}

fn make_directory(path: &Path) -> Result<()> {
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.with_context(|| format!("create {}", path.display()))
}

/// `flock(2)`, until `end`. The lock goes with the last descriptor of this opening, which plugins have, too.
fn lock(file: &File, end: Instant) -> Result<()> {
    loop {
        // SAFETY: only integers are passed.
        if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } == 0 {
            return Ok(());
        }
        let error = std::io::Error::last_os_error();
        match error.kind() {
            std::io::ErrorKind::WouldBlock if Instant::now() < end => std::thread::sleep(Duration::from_millis(2)),
            std::io::ErrorKind::WouldBlock => bail!("it is locked for {} seconds", PATIENCE.as_secs()),
            std::io::ErrorKind::Interrupted => {}
            _ => return Err(error).context("lock it"),
        }
    }
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    match fs::read(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Ok(text) => serde_json::from_slice(&text).map(Some).with_context(|| format!("read {}", path.display())),
        Err(e) => Err(e).with_context(|| format!("read {}", path.display())),
    }
}

/// Beside it and renamed: nobody sees half of it.
fn write(path: &Path, content: &impl Serialize) -> Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    let text = serde_json::to_vec(content).context("write a record of the network")?;
    File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)
        .and_then(|mut file| file.write_all(&text))
        .and_then(|()| fs::rename(&temporary, path))
        .with_context(|| format!("write {}", path.display()))
}
