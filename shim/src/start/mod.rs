//! `start`: containerd asks for the address of the daemon that serves a container. The daemon of its
//! pod is found by its socket, or started.

mod bootstrap;
mod launch;
mod ping;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use crate::flags::Flags;
use crate::pod;
use ping::Daemon;

/// Where sockets go unless containerd names another place.
const SOCKET_DIRECTORY: &str = "/run/containerd/s";

/// `start`. Its working directory is the bundle.
pub(crate) fn run(flags: &Flags) -> Result<()> {
    let input = bootstrap::read(flags)?;
    let bundle = std::env::current_dir().context("find the bundle")?;
    let group = pod::group_of(&bundle)?.unwrap_or_else(|| flags.id.clone());
    let directory = PathBuf::from(input.socket_directory.as_deref().unwrap_or(SOCKET_DIRECTORY));
    let socket = directory.join(socket_name(flags, &group));
    let daemon = ping::ask(&socket, &flags.id);
    match daemon.with_context(|| format!("ask the shim behind {}", socket.display()))? {
        Daemon::Alive => {}
        Daemon::Gone => launch::launch(flags, &input, &socket)?,
    }
    let address = format!("unix://{}", socket.display());
    write_address(&bundle, &address)?;
    bootstrap::answer(input.protocol, address)
}

/// The name under which all containers of a group meet. It is told from other runtimes' sockets, which
/// are named the same way without the last part.
fn socket_name(flags: &Flags, group: &str) -> String {
    let path = Path::new(&flags.address).join(&flags.namespace).join(group).join("runx");
    format!("{:x}", Sha256::digest(path.as_os_str().as_encoded_bytes()))
}

/// containerd 1.6 and 1.7 find the daemon again after a restart by this file.
fn write_address(bundle: &Path, address: &str) -> Result<()> {
    let temporary = bundle.join(".address");
    fs::write(&temporary, address)
        .and_then(|()| fs::rename(&temporary, bundle.join("address")))
        .with_context(|| format!("write {}", bundle.join("address").display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn socket_names_differ_by_daemon_namespace_and_group() {
        let flags = |address: &str, namespace: &str| Flags {
            address: address.into(),
            namespace: namespace.into(),
            ..Flags::default()
        };
        let names = [
            socket_name(&flags("/a.sock", "n"), "x"),
            socket_name(&flags("/b.sock", "n"), "x"),
            socket_name(&flags("/a.sock", "m"), "x"),
            socket_name(&flags("/a.sock", "n"), "y"),
        ];
        for (i, name) in names.iter().enumerate() {
            assert_eq!(name.len(), 64);
            assert!(!names[..i].contains(name));
        }
    }
}
