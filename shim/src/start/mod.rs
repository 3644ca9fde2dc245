//! `start`: containerd asks for the address of the daemon that serves a container. The daemon of its
//! pod is found by its socket, or started.

mod bootstrap;
mod launch;
mod ping;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::flags::Flags;
use crate::{pod, sockets};
use ping::Daemon;

/// `start`. Its working directory is the bundle.
pub(crate) fn run(flags: &Flags) -> Result<()> {
    let input = bootstrap::read(flags)?;
    let bundle = std::env::current_dir().context("find the bundle")?;
    let group = pod::group_of(&bundle)?.unwrap_or_else(|| flags.id.clone());
    let directory = PathBuf::from(input.socket_directory.as_deref().unwrap_or(sockets::DIRECTORY));
    let socket = directory.join(sockets::name(flags, &group));
    let daemon = ping::ask(&socket, &flags.id);
    match daemon.with_context(|| format!("ask the shim behind {}", socket.display()))? {
        Daemon::Alive => {}
        Daemon::Gone => launch::launch(flags, &input, &socket)?,
    }
    let address = format!("unix://{}", socket.display());
    write_address(&bundle, &address)?;
    bootstrap::answer(input.protocol, address)
}

/// containerd 1.6 and 1.7 find the daemon again after a restart by this file.
fn write_address(bundle: &Path, address: &str) -> Result<()> {
    let temporary = bundle.join(".address");
    fs::write(&temporary, address)
        .and_then(|()| fs::rename(&temporary, bundle.join("address")))
        .with_context(|| format!("write {}", bundle.join("address").display()))
}
