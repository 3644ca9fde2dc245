//! A container's own files in /etc: its name, hosts and name servers.

use std::fs;
use std::net::IpAddr;
use std::path::Path;

use anyhow::Result;

use super::options::Network;
use super::record::{Record, write_atomically};
use super::spec;

/// Their names in the container's directory, and where they are bound to.
pub(super) const BOUND: [(&str, &str); 3] =
    [("hosts", "/etc/hosts"), ("hostname", "/etc/hostname"), ("resolv.conf", "/etc/resolv.conf")];

/// Where systemd-resolved writes the servers that it asks itself.
const RESOLVED: &str = "/run/systemd/resolve/resolv.conf";

/// Writes them. `addresses` are the container's own.
pub(super) fn write(directory: &Path, record: &Record, addresses: &[IpAddr], gateway: Option<IpAddr>) -> Result<()> {
    let name = spec::hostname(record);
    let texts = [hosts(record, &name, addresses, gateway), format!("{name}\n"), resolv_conf(record)];
    for ((file, _), text) in BOUND.iter().zip(texts) {
        let path = directory.join(file);
        write_atomically(&path, text.as_bytes())?;
        // Everybody in the container reads them.
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o644))?;
    }
    Ok(())
}

fn hosts(record: &Record, name: &str, addresses: &[IpAddr], gateway: Option<IpAddr>) -> String {
    let options = &record.options;
    let mut out = match options.network {
        Network::Host => fs::read_to_string("/etc/hosts").unwrap_or_default(),
        _ => "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nfe00::\tip6-localnet\nff00::\tip6-mcastprefix\n\
              ff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n"
            .to_owned(),
    };
    if !out.is_empty() && !out.ends_with('\n') {
        out.push('\n');
    }
    for (host, target) in &options.hosts {
        let target = match target.as_str() {
            "host-gateway" => gateway.map_or_else(|| "127.0.0.1".to_owned(), |address| address.to_string()),
            target => target.to_owned(),
        };
        out.push_str(&format!("{target}\t{host}\n"));
    }
    for address in addresses {
        out.push_str(&format!("{address}\t{name}\n"));
    }
    if addresses.is_empty() && options.network == Network::None {
        out.push_str(&format!("127.0.0.1\t{name}\n"));
    }
    out
}

fn resolv_conf(record: &Record) -> String {
    let options = &record.options;
    let host = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let own_network = options.network != Network::Host;
    // A server on the host's loopback interface is not there for others.
    let local = |line: &&str| {
        let address = line.trim().strip_prefix("nameserver").map(str::trim).and_then(|text| text.parse::<IpAddr>().ok());
        address.is_some_and(|address| address.is_loopback())
    };
    let host = match own_network && host.lines().any(|line| local(&line)) {
        true => fs::read_to_string(RESOLVED).unwrap_or(host),
        false => host,
    };
    let keep = |line: &&str| {
        let line = line.trim();
        !(own_network && local(&line)
            || !options.dns.is_empty() && line.starts_with("nameserver")
            || !options.dns_search.is_empty() && (line.starts_with("search") || line.starts_with("domain")))
    };
    let mut out: String = host.lines().filter(keep).map(|line| format!("{line}\n")).collect();
    if !options.dns_search.is_empty() {
        out.push_str(&format!("search {}\n", options.dns_search.join(" ")));
    }
    for server in &options.dns {
        out.push_str(&format!("nameserver {server}\n"));
    }
    out
}
