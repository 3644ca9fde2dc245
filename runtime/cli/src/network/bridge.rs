//! Containers on a bridge of the host, by the distribution's CNI plugins.

use std::net::Ipv4Addr;
use std::path::Path;

use anyhow::{Context, Result, bail};
use runx_core::rootless;
use runx_core::sys::netlink::Netlink;
use serde_json::{Value, json};

use super::cni::{self, Attachment};
use super::firewall::Rules;
use super::place::{Claim, Network, Place, Record, Shared};
use super::ports::{self, Port};
use super::settings::Settings;
use super::{Address, Attached, Namespace, firewall, netns, subnet};

/// The container's interface.
const INTERFACE: &str = "eth0";

/// Attaches a container. One that is attached already, with all that is asked for, stays as it is.
pub(super) fn attach(root: &Path, id: &str, asked: &[Port], settings: &Settings) -> Result<Attached> {
    if rootless::is_unprivileged() {
        bail!(
            "only root can connect containers to a bridge of the host: use --network host, which shares yours, or --network \
             none"
        );
    }
    look_for_programs(settings, !asked.is_empty())?;
    let place = Place::open(root, id, true)?.context("its directory was removed")?;
    if let Some(record) = place.record()? {
        if record.complete
            && same_ports(&record.ports, asked)
            && check(&place, &record).inspect_err(|e| log::debug!("{e:#}")).is_ok()
        {
            return attached(&place, &record);
        }
        remove(root, id, &place, Some(record))?;
    }
    make(root, id, asked, settings, &place).map_err(|error| {
        let record = place.record().unwrap_or_default();
        match remove(root, id, &place, record).and_then(|()| place.remove()) {
            Ok(()) => error,
            Err(left) => error.context(format!("what was made could not be removed again ({left:#}), and before that")),
        }
    })
}

/// Whether the ports are those that are asked for, of which some may be any.
fn same_ports(have: &[Port], asked: &[Port]) -> bool {
    let fits = |(have, asked): (&Port, &Port)| {
        *have
            == Port { host_port: if asked.host_port == 0 { have.host_port } else { asked.host_port }, ..asked.clone() }
    };
    have.len() == asked.len() && have.iter().zip(asked).all(fits)
}

fn make(root: &Path, id: &str, asked: &[Port], settings: &Settings, place: &Place) -> Result<Attached> {
    let key = key(root, id);
    let bridge = settings.state.join(&settings.bridge);
    let mut ports = asked.to_vec();
    let shared = Shared::open(&bridge)?;
    let claims = shared.claims(&key)?;
    let taken: Vec<_> = claims.into_iter().map(|claim| (claim.id, claim.ports)).collect();
    ports::settle(&mut ports, &taken)?;
    let subnet = subnet_of(&shared, settings, !taken.is_empty())?;
    let mut attachment = Attachment {
        network: settings.name.clone(),
        chain: chain(settings, subnet, &shared.leases(), !ports.is_empty()),
        capabilities: json!({"portMappings": ports}),
        path: settings.plugins.clone(),
        container: key.clone(),
        interface: INTERFACE.to_owned(),
        result: None,
    };
    let mut record =
        Record { id: id.to_owned(), attachment: attachment.clone(), ports: ports.clone(), bridge, complete: false };
    place.write(&record)?;
    shared.set_claim(&key, &Claim { root: root.to_owned(), id: id.to_owned(), ports })?;
    if let Some(rules) = Rules::of(&settings.bridge, settings.firewall) {
        rules.ensure(subnet).with_context(|| format!("make the rules of bridge {}", settings.bridge))?;
    }
    drop(shared);
    netns::create(&place.netns())?;
    attachment.add(&place.netns(), &place.lock, |so_far| {
        record.attachment = so_far.clone();
        place.write(&record)
    })?;
    record.complete = true;
    place.write(&record)?;
    attached(place, &record)
}

/// The addresses of the bridge. With the first container they are chosen, and what is left of earlier ones is removed, unless it
/// can stay as it is.
fn subnet_of(shared: &Shared, settings: &Settings, used: bool) -> Result<subnet::Subnet> {
    let there = Netlink::open().and_then(|netlink| netlink.index(&settings.bridge)).is_ok();
    let known = shared.network()?;
    let ours = known.as_ref().map_or(!there, |network| network.ours);
    let network = |subnet| Network { subnet, ours, firewall: settings.firewall, keep: settings.keep };
    if let Some(known) = &known {
        let asked = settings.subnet.is_none_or(|asked| asked == known.subnet);
        if used && !asked {
            bail!(
                "containers on bridge {} have addresses of {}: network.subnet takes effect when the last of them has gone",
                settings.bridge,
                known.subnet
            );
        }
        let free = || subnet::choose(Some(known.subnet), &settings.bridge).is_ok();
        if used || there && asked && known.firewall == settings.firewall && free() {
            let same = network(known.subnet);
            if same != *known {
                shared.set_network(&same)?;
            }
            return Ok(known.subnet);
        }
        take_down(shared, &settings.bridge)?;
    }
    shared.clear()?;
    let made = network(subnet::choose(settings.subnet, &settings.bridge)?);
    shared.set_network(&made)?;
    Ok(made.subnet)
}

/// Removes the bridge, unless it was there before us, and its rules. For who knows that no container uses it.
fn take_down(shared: &Shared, name: &str) -> Result<()> {
    if let Some(rules) = Rules::of(name, true) {
        rules.remove().with_context(|| format!("remove the rules of bridge {name}"))?;
    }
    if shared.network()?.is_some_and(|network| network.ours) {
        remove_link(name).with_context(|| format!("remove bridge {name}"))?;
    }
    shared.clear()
}

/// Removes the bridge and its rules if no container uses it. Whether there was one.
pub(super) fn prune(settings: &Settings) -> Result<bool> {
    let shared = Shared::open(&settings.state.join(&settings.bridge))?;
    if shared.network()?.is_none() {
        return Ok(false);
    }
    let users: Vec<_> = shared.claims("")?.into_iter().map(|claim| claim.id).collect();
    if !users.is_empty() {
        bail!("bridge {} is used by the containers {}: stop or detach them first", settings.bridge, users.join(", "));
    }
    take_down(&shared, &settings.bridge).map(|()| true)
}

/// The plugins, in order, and what they are told.
fn chain(settings: &Settings, subnet: subnet::Subnet, leases: &Path, publish: bool) -> Vec<Value> {
    let mut bridge = json!({
        "type": "bridge",
        "bridge": settings.bridge,
        "isGateway": true,
        // A container reaches its own published ports.
        "hairpinMode": true,
        "ipam": {
            "type": "host-local",
            "dataDir": leases,
            "ranges": [[{"subnet": subnet}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        },
    });
    if let Some(mtu) = settings.mtu {
        bridge["mtu"] = json!(mtu);
    }
    let mut chain = vec![bridge];
    if publish {
        chain.push(json!({"type": "portmap", "capabilities": {"portMappings": true}, "snat": true}));
    }
    chain.extend(settings.chain.iter().cloned());
    chain
}

/// Refuses with what to install, before anything is made.
fn look_for_programs(settings: &Settings, publish: bool) -> Result<()> {
    let further = settings.chain.iter().filter_map(|plugin| plugin["type"].as_str());
    let needed = ["bridge", "host-local"].into_iter().chain(publish.then_some("portmap")).chain(further);
    for name in needed {
        if cni::find(&settings.plugins, name).is_none() {
            bail!("{}", cni::missing(name, &settings.plugins));
        }
    }
    if firewall::iptables().is_none() {
        bail!(
            "bridges need iptables, which is not there: install it (apt install iptables, or dnf install \
             iptables-nft), or use --network host or --network none"
        );
    }
    Ok(())
}

/// Whether what an attached container was given is still as it was.
pub(super) fn check(place: &Place, record: &Record) -> Result<()> {
    if !netns::is_there(&place.netns()) {
        bail!("its network namespace is gone");
    }
    record.attachment.check(&place.netns(), &place.lock)?;
    let network = Shared::open(&record.bridge)?.network()?.context("nothing is known of its bridge any more")?;
    if let Some(rules) = Rules::of(bridge_name(record), network.firewall)
        && !rules.are_there(network.subnet)?
    {
        bail!("the host's rules for bridge {} are gone", bridge_name(record));
    }
    if !record.ports.is_empty() && !firewall::publishes(&record.attachment.network, &record.attachment.container)? {
        bail!("the rules for its published ports are gone");
    }
    Ok(())
}

/// Detaches a container. One that is not attached is fine, and so is a second time.
pub(super) fn detach(root: &Path, id: &str) -> Result<()> {
    let Some(place) = Place::open(root, id, false)? else { return Ok(()) };
    let record = place.record()?;
    remove(root, id, &place, record)?;
    place.remove()
}

/// Undoes what `record` tells of, but for the directory. Goes on after a failure as far as it makes sense, so that a repetition
/// has less to do.
fn remove(root: &Path, id: &str, place: &Place, record: Option<Record>) -> Result<()> {
    let Some(record) = record else { return netns::remove(&place.netns()) };
    let key = key(root, id);
    let kept = Some(place.netns()).filter(|file| netns::is_there(file));
    let deleted = record.attachment.delete(kept.as_deref(), &place.lock);
    deleted.with_context(|| format!("detach container {id:?} from its network"))?;
    netns::remove(&place.netns())?;
    let shared = Shared::open(&record.bridge)?;
    shared.remove_claim(&key)?;
    let kept = shared.network()?.is_none_or(|network| network.keep);
    if !kept && shared.claims(&key)?.is_empty() {
        take_down(&shared, bridge_name(&record))?;
    }
    Ok(())
}

fn bridge_name(record: &Record) -> &str {
    record.attachment.chain.first().and_then(|bridge| bridge["bridge"].as_str()).unwrap_or_default()
}

fn remove_link(name: &str) -> std::io::Result<()> {
    let netlink = Netlink::open()?;
    match netlink.index(name).and_then(|index| netlink.remove(index)) {
        Err(e) if e.raw_os_error() == Some(libc::ENODEV) => Ok(()),
        other => other,
    }
}

/// What is attached, from a plugin's result.
fn attached(place: &Place, record: &Record) -> Result<Attached> {
    let result = record.attachment.result.as_ref().context("the CNI plugins told no result")?;
    Ok(Attached { namespace: Namespace::Path(place.netns()), ports: record.ports.clone(), ..describe(result) })
}

/// Addresses, gateway and name servers of a plugin's result.
pub(super) fn describe(result: &Value) -> Attached {
    let ips = || result["ips"].as_array().into_iter().flatten();
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let parse = |address: &str| {
        let (address, prefix) = address.split_once('/')?;
        Some(Address { address: address.parse().ok()?, prefix: prefix.parse().ok()? })
    };
    Attached {
        namespace: Namespace::New,
        addresses: ips().filter_map(|ip| parse(ip["address"].as_str()?)).collect(),
        gateway: ips().find_map(|ip| ip["gateway"].as_str()?.parse::<Ipv4Addr>().ok()).map(Into::into),
        dns: result["dns"]["nameservers"].as_array().into_iter().flatten().filter_map(text).collect(),
        ports: Vec::new(),
    }
}

/// A container's name for plugins: its id, or where another root could have the same one, or where it is nothing that plugins
/// take, that and a number made of both.
fn key(root: &Path, id: &str) -> String {
    let plain: String = id.chars().filter(|c| c.is_ascii_alphanumeric() || "_.-".contains(*c)).take(48).collect();
    let plain = plain.trim_start_matches(|c: char| !c.is_ascii_alphanumeric());
    // FNV-1a: no secret, only short.
    let bytes = root.as_os_str().as_encoded_bytes().iter().chain(b"/").chain(id.as_bytes());
    let hash =
        bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3));
    if plain.is_empty() { format!("{hash:016x}") } else { format!("{plain}-{hash:016x}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_for_plugins_are_their_own_and_allowed() {
        let names: Vec<_> =
            ["web", "_+web", "web+", "+", ".."].iter().map(|id| key(Path::new("/run/runx"), id)).collect();
        for (i, name) in names.iter().enumerate() {
            assert!(name.starts_with(|c: char| c.is_ascii_alphanumeric()) && !name.contains('+'), "{name}");
            assert!(!names[..i].contains(name), "{name}");
        }
        assert_ne!(key(Path::new("/a"), "web"), key(Path::new("/b"), "web"));
        assert!(key(Path::new("/a"), &"x".repeat(1024)).len() < 80);
    }

    #[test]
    fn results_are_told_as_they_are() {
        let found = describe(&json!({"ips": [{"address": "10.87.0.2/16", "gateway": "10.87.0.1", "interface": 2}],
                                     "dns": {"nameservers": ["10.0.0.53"]}}));
        assert_eq!(found.addresses[0].to_string(), "10.87.0.2/16");
        assert_eq!(found.gateway.unwrap().to_string(), "10.87.0.1");
        assert_eq!(found.dns, ["10.0.0.53"]);
    }
}
