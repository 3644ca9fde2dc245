//! Containers of users who are not root.
//!
//! What makes and removes them does so in a user namespace of the user's: he is root in it, and has the further ids that
//! /etc/subuid and /etc/subgid give him. The monitor stays in it, and with its end the mounts that were made there go.

use std::sync::OnceLock;

use anyhow::{Result, bail};
use runx_core::rootless::{self, Ids};
use serde_json::{Value, json};

use super::options::{Network, Options};

/// The group of terminals.
const TERMINALS: u32 = 5;

/// What this process has entered with.
static ENTERED: OnceLock<Ids> = OnceLock::new();

/// Enters the user's own user namespace, unless this process is root or there already.
pub(super) fn enter() -> Result<()> {
    if rootless::is_ordinary_user() && ENTERED.get().is_none() {
        let _ = ENTERED.set(rootless::enter_own()?);
    }
    Ok(())
}

/// Whether this process is in a user namespace that [`enter`] made.
pub(super) fn has_entered() -> bool {
    ENTERED.get().is_some()
}

/// What an ordinary user cannot have.
pub(super) fn check(options: &Options) -> Result<()> {
    if !has_entered() {
        return Ok(());
    }
    if options.network == Network::Bridge && !options.given_configuration {
        bail!(
            "--network bridge needs root: say --network host for this machine's network, or --network none; both are there \
             for every user (network = \"host\" in the section [container] of the config file makes it the usual one)"
        );
    }
    if options.privileged || !options.devices.is_empty() {
        bail!("--privileged and --device need root: the devices of the machine are not this user's");
    }
    Ok(())
}

/// Changes a configuration so that it holds in the user namespace.
pub(super) fn adapt(config: &mut Value) {
    let Some(ids) = ENTERED.get() else { return };
    fit(config, ids);
}

fn fit(config: &mut Value, ids: &Ids) {
    let linux = &mut config["linux"];
    if let Some(namespaces) = linux["namespaces"].as_array_mut() {
        namespaces.push(json!({"type": "user"}));
    }
    linux["uidMappings"] = json!(ids.users);
    linux["gidMappings"] = json!(ids.groups);
    for mount in config["mounts"].as_array_mut().into_iter().flatten() {
        // The group of terminals is in the namespace only if there are so many further ids.
        if let Some(options) = mount["options"].as_array_mut().filter(|_| !ids.has_group(TERMINALS)) {
            options.retain(|option| option != "gid=5");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_group_of_terminals_is_named_only_where_it_is() {
        let ids = |groups: Value| -> Ids {
            let users = json!([{"containerID": 0, "hostID": 1000, "size": 1}]);
            Ids { users: serde_json::from_value(users).unwrap(), groups: serde_json::from_value(groups).unwrap() }
        };
        let own = json!({"containerID": 0, "hostID": 100, "size": 1});
        for (more, has) in [(0, false), (4, false), (5, true), (65_536, true)] {
            let mut groups = vec![own.clone()];
            groups.extend((more > 0).then(|| json!({"containerID": 1, "hostID": 100_000, "size": more})));
            let mut config = json!({"linux": {"namespaces": []}, "mounts": [{"options": ["nosuid", "gid=5"]}, {}]});
            fit(&mut config, &ids(json!(groups)));
            assert_eq!(config["linux"]["gidMappings"], json!(groups));
            assert_eq!(config["linux"]["uidMappings"], json!([{"containerID": 0, "hostID": 1000, "size": 1}]));
            assert_eq!(config["linux"]["namespaces"], json!([{"type": "user"}]));
            let options = if has { json!(["nosuid", "gid=5"]) } else { json!(["nosuid"]) };
            assert_eq!(config["mounts"][0]["options"], options, "{more}");
        }
    }
}
