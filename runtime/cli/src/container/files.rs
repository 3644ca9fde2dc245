//! A container's own files in /etc: its name, hosts and name servers.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::options::Network;
use super::record::{Containers, Record, write_atomically};
use super::spec;
use crate::network::Attached;
use crate::network::files::{FileOptions, contents};

const HOSTS: &str = "hosts";
const HOSTNAME: &str = "hostname";
const RESOLV_CONF: &str = "resolv.conf";

/// Writes them.
pub(super) fn write(directory: &Path, record: &Record, attached: &Attached) -> Result<()> {
    let options = &record.options;
    let asked = FileOptions {
        hostname: spec::hostname(record),
        add_host: options.hosts.iter().map(|(name, address)| format!("{name}:{address}")).collect(),
        dns: options.dns.clone(),
        dns_search: options.dns_search.clone(),
        dns_option: Vec::new(),
    };
    let files = contents(attached, &asked)?;
    for (name, text) in [(HOSTS, files.hosts), (HOSTNAME, files.hostname), (RESOLV_CONF, files.resolv_conf)] {
        let path = directory.join(name);
        write_atomically(&path, text.as_bytes())?;
        // Everybody in the container reads them.
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644))
            .with_context(|| format!("set the mode of {}", path.display()))?;
    }
    Ok(())
}

/// The files and where they are bound to. Who shares another's network shares what it says of names, too.
pub(super) fn bound(containers: &Containers, record: &Record, directory: &Path) -> Vec<(PathBuf, &'static str)> {
    let others = match &record.options.network {
        Network::Container(other) => Some(containers.directory(other)).filter(|there| there.join(HOSTS).exists()),
        _ => None,
    };
    let of_network = others.as_deref().unwrap_or(directory);
    vec![
        (of_network.join(HOSTS), "/etc/hosts"),
        (directory.join(HOSTNAME), "/etc/hostname"),
        (of_network.join(RESOLV_CONF), "/etc/resolv.conf"),
    ]
}
