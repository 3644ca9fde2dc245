//! What can be set about networks: the section `[network]` of the config file.

use std::path::PathBuf;

use anyhow::{Result, bail};
use serde::Deserialize;

use super::subnet::Subnet;

/// The network of the machine's containers.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct Settings {
    /// The network's name, as plugins know it.
    pub(crate) name: String,
    /// The bridge that containers are connected by.
    pub(crate) bridge: String,
    /// Addresses for containers; unless set, a range that no route of the host has.
    pub(crate) subnet: Option<Subnet>,
    /// The largest packet, if it is not the plugin's choice.
    pub(crate) mtu: Option<u32>,
    /// Where CNI plugins are looked for, in this order.
    pub(crate) plugins: Vec<PathBuf>,
    /// Further plugins that each container goes through, with their configuration: bandwidth, firewall (for firewalld), tuning.
    pub(crate) chain: Vec<serde_json::Value>,
    /// Whether the host's iptables are told to let the containers' packets pass.
    pub(crate) firewall: bool,
    /// Whether the bridge stays when its last container goes, as docker's does: the next container starts sooner.
    pub(crate) keep: bool,
    /// Where the leases of addresses are, and what holds for all containers of the bridge. Best on a tmpfs: none of it
    /// outlives the machine's run.
    pub(crate) state: PathBuf,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            name: "runx".to_owned(),
            bridge: "runx0".to_owned(),
            subnet: None,
            mtu: None,
            plugins: ["/opt/cni/bin", "/usr/lib/cni", "/usr/libexec/cni"].map(PathBuf::from).to_vec(),
            chain: Vec::new(),
            firewall: true,
            keep: true,
            state: PathBuf::from("/run/runx/.networks"),
        }
    }
}

impl Settings {
    /// Refuses what cannot be meant.
    ///
    /// # Errors
    /// With the key and what is wrong.
    pub(crate) fn validate(&self) -> Result<()> {
        let fits = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        for (key, name, most) in [("bridge", &self.bridge, 15), ("name", &self.name, 64)] {
            let begins = name.starts_with(|c: char| c.is_ascii_alphanumeric());
            if !begins || name.len() > most || !name.chars().all(fits) {
                bail!(
                    "network.{key} = {name:?}: it is a name of 1 to {most} letters, digits and -_. that begins with one"
                );
            }
        }
        if let Some(bad) = self.plugins.iter().chain([&self.state]).find(|path| !path.is_absolute()) {
            bail!("network: the directory {bad:?} is not absolute");
        }
        if self.plugins.is_empty() {
            bail!("network.plugins has no directory");
        }
        if let Some(bad) = self.chain.iter().find(|plugin| !plugin["type"].is_string()) {
            bail!("network.chain: {bad} names no plugin as its type");
        }
        if self.mtu.is_some_and(|mtu| !(68..=65535).contains(&mtu)) {
            bail!("network.mtu is 68 to 65535 bytes");
        }
        Ok(())
    }
}
