//! Containers of users who are not root.
//!
//! What makes and removes them does so in a user namespace of the user's: he is root in it, and has the further ids that
//! /etc/subuid and /etc/subgid give him. The monitor stays in it, and with its end the mounts that were made there go.

use std::fs;
use std::sync::OnceLock;

use anyhow::{Context as _, Result, bail};
use runx_core::bundle::Bundle;
use runx_core::rootless;
use serde_json::{Value, json};

use super::options::{Network, Options};

/// The mappings of users and groups that this process has entered with.
static ENTERED: OnceLock<(Value, Value)> = OnceLock::new();

/// Enters the user's own user namespace, unless this process is root or there already.
pub(super) fn enter() -> Result<()> {
    if !rootless::is_ordinary_user() || ENTERED.get().is_some() {
        return Ok(());
    }
    let (user, group) = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
    // The C library would load a library for the question, which a static program cannot.
    let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let name = passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(user)).then(|| name.to_owned())
    });
    let mappings = |own: u32, file: &str| {
        let mut all = vec![json!({"containerID": 0, "hostID": own, "size": 1})];
        let further = further(&fs::read_to_string(file).unwrap_or_default(), name.as_deref(), user);
        all.extend(further.map(|(first, size)| json!({"containerID": 1, "hostID": first, "size": size})));
        Value::Array(all)
    };
    let (users, groups) = (mappings(user, "/etc/subuid"), mappings(group, "/etc/subgid"));
    let spec = json!({
        "ociVersion": "1.2.0",
        "process": {"cwd": "/", "args": ["true"], "user": {"uid": 0, "gid": 0}},
        "root": {"path": "/"},
        "linux": {"namespaces": [{"type": "user"}, {"type": "mount"}], "uidMappings": users, "gidMappings": groups},
    });
    let spec = serde_json::from_value(spec).context("describe the user namespace")?;
    rootless::enter(&Bundle::new("/".into(), spec)?)?;
    let _ = ENTERED.set((users, groups));
    Ok(())
}

/// The first range of further ids that a user has, by his name or number (subuid(5)).
fn further(text: &str, name: Option<&str>, id: u32) -> Option<(u32, u32)> {
    text.lines().find_map(|line| {
        let mut fields = line.trim().split(':');
        let owner = fields.next()?;
        let is_his = Some(owner) == name || owner.parse() == Ok(id);
        is_his.then(|| Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?)))?
    })
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
    let Some((users, groups)) = ENTERED.get() else { return };
    let linux = &mut config["linux"];
    if let Some(namespaces) = linux["namespaces"].as_array_mut() {
        namespaces.push(json!({"type": "user"}));
    }
    let has_groups = groups.as_array().is_some_and(|list| list.len() > 1);
    linux["uidMappings"] = users.clone();
    linux["gidMappings"] = groups.clone();
    for mount in config["mounts"].as_array_mut().into_iter().flatten() {
        // The group of terminals has a number in the namespace only if there are further ids.
        if let Some(options) = mount["options"].as_array_mut().filter(|_| !has_groups) {
            options.retain(|option| option != "gid=5");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn further_ids_are_found_by_name_and_number() {
        let text = "root:1:2\nalice:100000:65536\n1001:200000:10\nbad:x:y\n";
        assert_eq!(further(text, Some("alice"), 5), Some((100_000, 65_536)));
        assert_eq!(further(text, Some("bob"), 1001), Some((200_000, 10)));
        assert_eq!(further(text, Some("bad"), 7), None);
        assert_eq!(further(text, None, 7), None);
    }
}
