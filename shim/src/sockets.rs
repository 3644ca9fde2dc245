//! The sockets of daemons, beside those of other runtimes.

use std::collections::HashSet;
use std::fs;
use std::io;
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

/// Removes the sockets beside `socket` that nobody serves any more. Daemons take theirs with them; one that was killed
/// cannot, and containerd does not always call `delete` for it.
pub(crate) fn remove_dead(socket: &Path) {
    let Some(directory) = socket.parent() else { return };
    // In this order: one that is made in between is not in the first list.
    let ours: Vec<PathBuf> = fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(PREFIX))
        .map(|entry| entry.path())
        .collect();
    let Ok(table) = fs::read_to_string("/proc/net/unix") else { return };
    let served: HashSet<&Path> =
        table.lines().filter_map(|line| Some(Path::new(line.split(' ').next_back()?))).collect();
    for path in ours.iter().filter(|path| !served.contains(path.as_path())) {
        // It might be served from another network namespace.
        if is_dead(path) && fs::remove_file(path).is_ok() {
            log::info!("removed the dead socket {}", path.display());
        }
    }
}

/// Whether nobody serves a socket that is there.
pub(crate) fn is_dead(socket: &Path) -> bool {
    UnixStream::connect(socket).is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused)
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
}
