//! The sockets of daemons, beside those of other runtimes.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::flags::Flags;

/// Where sockets go unless containerd names another place.
pub(crate) const DIRECTORY: &str = "/run/containerd/s";

/// What our sockets' names begin with. Other runtimes' are hashes only.
const PREFIX: &str = "runx-";

/// The name under which all containers of a group meet.
pub(crate) fn name(flags: &Flags, group: &str) -> String {
    let path = Path::new(&flags.address).join(&flags.namespace).join(group);
    format!("{PREFIX}{:x}", Sha256::digest(path.as_os_str().as_encoded_bytes()))
}

/// Held by whoever makes or removes a socket of ours: between a look and what follows from it nothing changes.
#[derive(Debug)]
pub(crate) struct Lock(#[allow(dead_code, reason = "held for what closing it does")] File);

/// Locks the directory of a socket.
///
/// # Errors
/// When it is not there.
pub(crate) fn lock(socket: &Path) -> io::Result<Lock> {
    let directory = File::open(socket.parent().unwrap_or(Path::new("/")))?;
    // Of the kind that ends with its holder, whatever becomes of that.
    directory.lock()?;
    Ok(Lock(directory))
}

/// What there is at a socket's path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// Somebody listens.
    Served,
    /// The file is there, and nobody listens.
    Dead,
    /// Nothing.
    Missing,
}

/// Looks at a socket.
///
/// # Errors
/// The kernel's, other than what a [`State`] stands for.
pub(crate) fn look(socket: &Path) -> io::Result<State> {
    match UnixStream::connect(socket) {
        Ok(_) => Ok(State::Served),
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => Ok(State::Dead),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(State::Missing),
        Err(e) => Err(e),
    }
}

/// Whether a daemon that was to serve a socket is gone. One that was robbed of its file still is in the kernel's list.
pub(crate) fn is_abandoned(socket: &Path) -> bool {
    match look(socket) {
        Ok(State::Dead) => true,
        Ok(State::Missing) => !listed().is_ok_and(|table| names(&table).contains(socket)),
        Ok(State::Served) | Err(_) => false,
    }
}

/// A daemon's own socket, which it removes when it ends.
#[derive(Debug)]
pub(crate) struct Own {
    path: PathBuf,
    /// Which file it is: another daemon may have put its own there.
    identity: (u64, u64),
}

impl Own {
    /// The socket at a path.
    ///
    /// # Errors
    /// When there is none.
    pub(crate) fn at(path: PathBuf) -> io::Result<Self> {
        let identity = identity(&path)?;
        Ok(Self { path, identity })
    }

    /// Removes it, if it is still there.
    pub(crate) fn remove(&self) {
        let Ok(_lock) = lock(&self.path) else { return };
        if identity(&self.path).is_ok_and(|found| found == self.identity) {
            let _ = fs::remove_file(&self.path);
        }
    }

    /// Its path.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let meta = fs::symlink_metadata(path)?;
    Ok((meta.dev(), meta.ino()))
}

fn listed() -> io::Result<String> {
    fs::read_to_string("/proc/net/unix")
}

fn names(table: &str) -> HashSet<&Path> {
    table.lines().filter_map(|line| Some(Path::new(line.split(' ').next_back()?))).collect()
}

/// Removes the sockets beside `socket`, and itself, that nobody serves any more. Daemons take theirs with them; one that was
/// killed cannot, and containerd does not always call `delete` for it.
pub(crate) fn remove_dead(socket: &Path) {
    let (Some(directory), Ok(_lock)) = (socket.parent(), lock(socket)) else { return };
    let ours = fs::read_dir(directory).into_iter().flatten().flatten();
    let ours = ours.filter(|entry| entry.file_name().to_string_lossy().starts_with(PREFIX)).map(|entry| entry.path());
    let Ok(table) = listed() else { return };
    let served = names(&table);
    for path in ours.filter(|path| !served.contains(path.as_path())) {
        // It might be served from another network namespace.
        if look(&path).is_ok_and(|state| state == State::Dead) && fs::remove_file(&path).is_ok() {
            log::info!("removed the dead socket {}", path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn names_differ_by_daemon_namespace_and_group() {
        let flags = |address: &str, namespace: &str| Flags {
            address: address.into(),
            namespace: namespace.into(),
            ..Flags::default()
        };
        let names = [
            name(&flags("/a.sock", "n"), "x"),
            name(&flags("/b.sock", "n"), "x"),
            name(&flags("/a.sock", "m"), "x"),
            name(&flags("/a.sock", "n"), "y"),
        ];
        for (i, name) in names.iter().enumerate() {
            assert_eq!(name.len(), 69);
            assert!(!names[..i].contains(name));
        }
    }

    #[test]
    fn only_our_own_dead_sockets_are_removed() {
        let directory = std::env::temp_dir().join(format!("runx-sockets-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let [dead, foreign, living] = ["runx-dead", "dead", "runx-living"].map(|name| directory.join(name));
        for path in [&dead, &foreign] {
            drop(UnixListener::bind(path).unwrap());
        }
        let _listener = UnixListener::bind(&living).unwrap();
        remove_dead(&directory.join("any"));
        let left = [&dead, &foreign, &living].map(|path| path.exists());
        fs::remove_dir_all(&directory).unwrap();
        assert_eq!(left, [false, true, true]);
    }

    #[test]
    fn a_daemon_removes_its_own_socket_only() {
        let directory = std::env::temp_dir().join(format!("runx-own-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let path = directory.join("runx-own");
        let _first = UnixListener::bind(&path).unwrap();
        let own = Own::at(path.clone()).unwrap();
        fs::remove_file(&path).unwrap();
        assert!(!is_abandoned(&path), "it is served without its file");
        let second = UnixListener::bind(&path).unwrap();
        own.remove();
        let kept = path.exists();
        drop(second);
        assert!(is_abandoned(&path));
        Own::at(path.clone()).unwrap().remove();
        let gone = !path.exists();
        fs::remove_dir_all(&directory).unwrap();
        assert!(kept && gone);
    }
}
