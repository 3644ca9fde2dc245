//! The state of a container on disk: one directory each, with one file that says all.
//!
//! The file is written beside and renamed, so a reader sees the old or the new one. The directory lies
//! on a tmpfs and nothing is synced. A second file, the gate, is there as long as the program has not
//! been started.

use std::collections::HashMap;
use std::fmt;
use std::fs;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::listener::Listener;
use super::process::Defaults;
use crate::cgroup::Cgroup;
use crate::error::{Context, Error, Result};
use crate::hooks::{HookState, Hooks};
use crate::rdt::Rdt;
use crate::spawn::handshake::Handshake;
use crate::sys::{self, process};

pub(super) const STATE_FILE: &str = "state.json";
const GATE: &str = "start";
/// The directory for a socket on which a service says that it is ready.
pub(super) const NOTIFY: &str = "notify";

/// The status of a container in the words of the runtime-spec, and runc's `paused`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// It is being made.
    Creating,
    /// It is ready and its program has not been started.
    Created,
    /// Its program runs.
    Running,
    /// Its processes are frozen.
    Paused,
    /// Its first process has ended.
    Stopped,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Creating => "creating",
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        })
    }
}

/// What is known of a container.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct State {
    /// Version of the runtime-spec that its config.json follows.
    pub oci_version: String,
    /// Its id.
    pub id: String,
    /// Its first process, 0 while it is being made.
    pub pid: i32,
    /// When that process started, in clock ticks since boot.
    pub start_time: u64,
    /// Its bundle.
    pub bundle: PathBuf,
    /// Its configuration, if that is not config.json in the bundle.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config: Option<PathBuf>,
    /// Its root filesystem.
    pub rootfs: PathBuf,
    /// When it was created, RFC 3339.
    pub created: String,
    /// The user who created it.
    pub owner: u32,
    /// Its cgroups.
    pub cgroup: Cgroup,
    /// Whether its PID namespace dies with its first process.
    pub own_pid_namespace: bool,
    /// `CLONE_NEW*` flags of the namespaces that an exec joins.
    pub namespaces: i32,
    /// Flags of its seccomp filter, whose program is the file beside this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seccomp_flags: Option<u64>,
    /// Who answers what the filter asks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seccomp_listener: Option<Listener>,
    /// What its description says of every process in it.
    #[serde(default, skip_serializing_if = "is_default")]
    pub defaults: Defaults,
    /// Its place in resctrl.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rdt: Option<Rdt>,
    /// Hooks that are still to be run.
    #[serde(default, skip_serializing_if = "Hooks::is_empty")]
    pub hooks: Hooks,
    /// The name of its session keyring, if it has one of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keyring: Option<String>,
    /// The annotations of its config.json.
    #[serde(default, skip_serializing_if = "HashMap::is_empty")]
    pub annotations: HashMap<String, String>,
}

fn is_default(defaults: &Defaults) -> bool {
    *defaults == Defaults::default()
}

impl State {
    /// What hooks and listeners are told.
    pub(super) fn told(&self, status: Status) -> HookState {
        HookState {
            oci_version: self.oci_version.clone(),
            id: self.id.clone(),
            status: status.to_string(),
            pid: if status == Status::Stopped { 0 } else { self.pid },
            bundle: self.bundle.clone(),
            annotations: self.annotations.clone(),
        }
    }

    /// Reads the state in `directory`.
    pub(super) fn read(directory: &Path, id: &str) -> Result<Self> {
        let path = directory.join(STATE_FILE);
        match fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text)
                .map_err(|e| Error::InvalidSpec { document: path.display().to_string(), reason: e.to_string() }),
            // Without the file the directory is one that is being made or removed, or was left by a killed create.
            Err(e) if e.kind() == io::ErrorKind::NotFound => Err(Error::NotFound(id.to_owned())),
            Err(e) => Err(e).on("read", path),
        }
    }

    /// Writes the state, whole or not at all.
    pub(super) fn write(&self, directory: &Path) -> Result<()> {
        let path = directory.join(STATE_FILE);
        let temporary = directory.join(".state.json");
        let text = serde_json::to_vec(self).map_err(|e| Error::system("write the state", io::Error::other(e)))?;
        fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)
            .and_then(|mut file| file.write_all(&text))
            .and_then(|()| fs::rename(&temporary, &path))
            .on("write", path)
    }

    /// The path of its configuration.
    pub fn config_path(&self) -> PathBuf {
        self.config.clone().unwrap_or_else(|| self.bundle.join("config.json"))
    }

    /// Whether the first process is alive.
    pub fn alive(&self) -> bool {
        self.pid > 0 && process::is_alive(self.pid, self.start_time)
    }

    pub(super) fn status(&self, directory: &Path) -> Status {
        if self.pid == 0 {
            return if locked_by_another(directory) { Status::Creating } else { Status::Stopped };
        }
        if !self.alive() {
            Status::Stopped
        } else if self.cgroup.is_frozen() {
            Status::Paused
        } else if directory.join(GATE).exists() {
            Status::Created
        } else {
            Status::Running
        }
    }

    /// The program of its seccomp filter and the flags to load it with.
    pub(super) fn seccomp(&self, directory: &Path) -> Result<Option<(Vec<u8>, u64)>> {
        let Some(flags) = self.seccomp_flags else { return Ok(None) };
        let path = directory.join("seccomp");
        Ok(Some((fs::read(&path).on("read", path)?, flags)))
    }
}

/// Makes the directory of a new container.
///
/// # Errors
/// [`Error::AlreadyExists`] if it is there.
pub(super) fn make_directory(root: &Path, directory: &Path, id: &str) -> Result<()> {
    let make = || fs::DirBuilder::new().mode(0o700).create(directory);
    let made = match make() {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(root).on("create", root)?;
            make()
        }
        other => other,
    };
    match made {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Err(Error::AlreadyExists(id.to_owned())),
        // A name may be too long for the filesystem though the specification sets no limit.
        other => other.on("create", directory),
    }
}

/// Held by the one who changes a container. It ends with its holder, however that ends.
#[derive(Debug)]
pub(super) struct Lock(#[allow(dead_code, reason = "held for what closing it does")] OwnedFd);

/// Waits for the lock of the container that is in `directory` then.
///
/// # Errors
/// [`Error::NotFound`] if there is none any more.
pub(super) fn lock(directory: &Path, id: &str) -> Result<Lock> {
    loop {
        let fd = match sys::open(directory, libc::O_RDONLY | libc::O_DIRECTORY) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(Error::NotFound(id.to_owned())),
            other => other.on("open", directory)?,
        };
        // SAFETY: flock takes a descriptor and flags.
        match sys::check(unsafe { libc::flock(fd.as_raw_fd(), libc::LOCK_EX) }.into()) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            other => other.on("lock", directory)?,
        };
        // While we waited, the container may have been deleted, and another one made in its place. What is
        // locked then is nobody's any more.
        let ours = sys::fstat(fd.as_fd()).on("look at", directory)?;
        let there = fs::metadata(directory);
        if there.is_ok_and(|there| (there.dev(), there.ino()) == (ours.st_dev, ours.st_ino)) {
            return Ok(Lock(fd));
        }
    }
}

fn locked_by_another(directory: &Path) -> bool {
    let Ok(fd) = sys::open(directory, libc::O_RDONLY | libc::O_DIRECTORY) else { return false };
    // SAFETY: flock takes a descriptor and flags.
    sys::check(unsafe { libc::flock(fd.as_raw_fd(), libc::LOCK_SH | libc::LOCK_NB) }.into()).is_err()
}

/// Marks a container as created by a gate that only its creator can pass.
pub(super) fn close_gate(directory: &Path) -> Result<()> {
    let path = directory.join(GATE);
    fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).on("create", path).map(drop)
}

/// Marks a container as created by a socket on which anybody who may enter the directory can start it.
pub(super) fn listen_gate(directory: &Path) -> Result<OwnedFd> {
    let (listener, address) = gate_socket(directory)?;
    // SAFETY: the address is valid for its length.
    let bound = unsafe { libc::bind(listener.as_raw_fd(), (&raw const address).cast(), address_length()) };
    sys::check(bound.into()).on("bind the start socket in", directory)?;
    // SAFETY: listen takes a descriptor and a number.
    sys::check(unsafe { libc::listen(listener.as_raw_fd(), 1) }.into())
        .on("listen on the start socket in", directory)?;
    Ok(listener)
}

/// Connects to the gate that [`listen_gate`] made.
pub(super) fn connect_gate(directory: &Path, id: &str) -> Result<Handshake> {
    let (socket, address) = gate_socket(directory)?;
    // SAFETY: the address is valid for its length.
    let connected = unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), address_length()) };
    match sys::check(connected.into()) {
        Err(e) if matches!(e.raw_os_error(), Some(libc::ECONNREFUSED | libc::ENOTSOCK)) => Err(Error::Init {
            message: format!("start container {id:?}: it can only be started by the process that created it"),
            errno: libc::ECONNREFUSED,
        }),
        other => other.on("connect to the start socket in", directory).map(|_| Handshake::from_fd(socket)),
    }
}

fn address_length() -> libc::socklen_t {
    size_of::<libc::sockaddr_un>() as libc::socklen_t
}

/// A socket and the gate's address, by descriptor: a path may be longer than an address can hold.
fn gate_socket(directory: &Path) -> Result<(OwnedFd, libc::sockaddr_un)> {
    // SAFETY: socket takes integers.
    let socket =
        sys::owned(unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, 0) }.into())
            .context("create the start socket")?;
    // SAFETY: sockaddr_un is plain data for which all zeroes is a valid value.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    let mut path = directory.join(GATE).into_os_string().into_encoded_bytes();
    if path.len() >= address.sun_path.len() {
        let fd = sys::open(directory, libc::O_PATH | libc::O_DIRECTORY).on("open", directory)?;
        // Left open on purpose: the address names it, and this process ends soon.
        path = format!("/proc/self/fd/{}/{GATE}", std::os::fd::IntoRawFd::into_raw_fd(fd)).into_bytes();
    }
    for (to, from) in address.sun_path.iter_mut().zip(&path) {
        *to = *from as libc::c_char;
    }
    Ok((socket, address))
}

/// Removes the gate: the program has been started.
pub(super) fn open_gate(directory: &Path) -> Result<()> {
    let path = directory.join(GATE);
    match fs::remove_file(&path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e).on("remove", path),
        _ => Ok(()),
    }
}

/// Keeps a seccomp program for the execs to come.
pub(super) fn write_seccomp(directory: &Path, program: &[u8]) -> Result<()> {
    let path = directory.join("seccomp");
    fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&path)
        .and_then(|mut file| file.write_all(program))
        .on("write", path)
}
