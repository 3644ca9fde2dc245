//! What a container reads about names: /etc/hosts, /etc/hostname and /etc/resolv.conf, as docker makes them.

use std::fs;
use std::net::IpAddr;
use std::path::Path;

use anyhow::{Context, Result, bail};

use super::{Attached, Namespace};

/// What is asked for.
#[derive(Clone, Debug, Default)]
pub(crate) struct FileOptions {
    /// The container's name for itself.
    pub(crate) hostname: String,
    /// `--add-host`: NAME:ADDRESS, or NAME:host-gateway for the host.
    pub(crate) add_host: Vec<String>,
    /// `--dns`: name servers instead of the host's.
    pub(crate) dns: Vec<String>,
    /// `--dns-search`: domains instead of the host's; `.` for none.
    pub(crate) dns_search: Vec<String>,
    /// `--dns-option`: options instead of the host's.
    pub(crate) dns_option: Vec<String>,
}

/// The files' contents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Files {
    pub(crate) hosts: String,
    pub(crate) hostname: String,
    pub(crate) resolv_conf: String,
}

/// The host's resolver configuration, and the one that systemd-resolved has asked of the network, if that is what is in the
/// first one.
const RESOLV_CONF: &str = "/etc/resolv.conf";
const BEHIND_SYSTEMD: &str = "/run/systemd/resolve/resolv.conf";

/// The files of a container that is attached as `attached` says. One that shares another's network shares its files, too, and
/// needs none.
///
/// # Errors
/// With what is wrong in the options.
pub(crate) fn contents(attached: &Attached, options: &FileOptions) -> Result<Files> {
    let read = |path: &str| match fs::read_to_string(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(String::new()),
        other => other.with_context(|| format!("read {path}")),
    };
    let on_host = attached.namespace == Namespace::Host;
    let base = if on_host { read("/etc/hosts")? } else { LOCALHOST.to_owned() };
    let resolv_conf = read(RESOLV_CONF)?;
    let resolv_conf = if !on_host && asks_systemd(&resolv_conf) && Path::new(BEHIND_SYSTEMD).exists() {
        read(BEHIND_SYSTEMD)?
    } else {
        resolv_conf
    };
    Ok(Files {
        hosts: hosts(base, attached, options)?,
        hostname: format!("{}\n", options.hostname),
        resolv_conf: resolver(&resolv_conf, on_host, &attached.dns, options)?,
    })
}

const LOCALHOST: &str = "127.0.0.1\tlocalhost\n\
                         ::1\tlocalhost ip6-localhost ip6-loopback\n\
                         fe00::\tip6-localnet\n\
                         ff00::\tip6-mcastprefix\n\
                         ff02::1\tip6-allnodes\n\
                         ff02::2\tip6-allrouters\n";

fn hosts(base: String, attached: &Attached, options: &FileOptions) -> Result<String> {
    let mut out = base;
    if !out.is_empty() && !out.ends_with('\n') {
        out.push('\n');
    }
    for text in &options.add_host {
        let (name, address) =
            text.split_once(':').with_context(|| format!("invalid --add-host {text:?}: it is NAME:ADDRESS"))?;
        let address = match address {
            "host-gateway" => match (attached.gateway, &attached.namespace) {
                (Some(gateway), _) => gateway,
                (None, Namespace::Host) => IpAddr::from([127, 0, 0, 1]),
                (None, _) => bail!("invalid --add-host {text:?}: this container's network has no way to the host"),
            },
            // As docker has it, also in brackets.
            address => address
                .trim_start_matches('[')
                .trim_end_matches(']')
                .parse()
                .with_context(|| format!("invalid --add-host {text:?}: {address:?} is no IP address"))?,
        };
        if name.is_empty() || name.contains(|c: char| c.is_whitespace() || c.is_control() || c == '#') {
            bail!("invalid --add-host {text:?}: {name:?} is no host's name");
        }
        out.push_str(&format!("{address}\t{name}\n"));
    }
    if attached.namespace != Namespace::Host && !options.hostname.is_empty() {
        let (short, _) = options.hostname.split_once('.').unwrap_or((&options.hostname, ""));
        let names = if short == options.hostname { short.to_owned() } else { format!("{} {short}", options.hostname) };
        for address in &attached.addresses {
            out.push_str(&format!("{}\t{names}\n", address.address));
        }
        if attached.addresses.is_empty() {
            // Nothing else would tell a program its own name's address.
            out.push_str(&format!("127.0.0.1\t{names}\n"));
        }
    }
    Ok(out)
}

fn is_loopback(server: &str) -> bool {
    // With the interface of a link-local address.
    let address = server.split('%').next().unwrap_or(server);
    address.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// Whether the name server is systemd-resolved on this host.
fn asks_systemd(resolv_conf: &str) -> bool {
    values(resolv_conf, "nameserver").any(|server| server.starts_with("127.0.0.53") || server.starts_with("127.0.0.54"))
}

/// What follows a keyword, resolv.conf(5).
fn values<'a>(text: &'a str, keyword: &'a str) -> impl Iterator<Item = &'a str> {
    text.lines().filter_map(move |line| {
        let rest = line.trim_start().strip_prefix(keyword)?;
        rest.starts_with(char::is_whitespace).then(|| rest.trim())
    })
}

fn resolver(host: &str, on_host: bool, network: &[String], options: &FileOptions) -> Result<String> {
    for server in &options.dns {
        if server.parse::<IpAddr>().is_err() {
            bail!("invalid --dns {server:?}: it is no IP address");
        }
    }
    let hosts = || values(host, "nameserver").filter(|server| on_host || !is_loopback(server)).map(str::to_owned);
    let servers = match (options.dns.is_empty(), network.is_empty()) {
        (false, _) => options.dns.clone(),
        (true, false) => network.to_vec(),
        (true, true) => hosts().collect(),
    };
    if servers.is_empty() && values(host, "nameserver").next().is_some() {
        log::warn!(
            "the host's name servers listen on its loopback interface only, which containers do not reach: name one by --dns, \
             or names will not be resolved"
        );
    }
    // The last line counts, resolv.conf(5).
    let last = |keyword| values(host, keyword).last().map(str::to_owned);
    let search = match &options.dns_search[..] {
        [] => last("search").or_else(|| last("domain")),
        [none] if none == "." => None,
        domains => Some(domains.join(" ")),
    };
    let settings = if options.dns_option.is_empty() {
        let all: Vec<_> = values(host, "options").collect();
        Some(all.join(" ")).filter(|all| !all.is_empty())
    } else {
        Some(options.dns_option.join(" "))
    };
    if [&search, &settings].into_iter().flatten().any(|text| text.contains(char::is_control)) {
        bail!("invalid --dns-search or --dns-option: a value has a line break in it");
    }
    let mut out: String = servers.iter().map(|server| format!("nameserver {server}\n")).collect();
    out.extend(search.map(|domains| format!("search {domains}\n")));
    out.extend(settings.map(|settings| format!("options {settings}\n")));
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::super::Address;
    use super::*;

    fn on_bridge() -> Attached {
        Attached {
            namespace: Namespace::Path("/x".into()),
            addresses: vec![Address { address: IpAddr::from([10, 87, 0, 2]), prefix: 16 }],
            gateway: Some(IpAddr::from([10, 87, 0, 1])),
            dns: Vec::new(),
            ports: Vec::new(),
        }
    }

    #[test]
    fn a_container_knows_itself_and_whom_it_was_told_of() {
        let options = FileOptions {
            hostname: "web.example.org".into(),
            add_host: ["db:10.0.0.7", "me:host-gateway", "six:[2001:db8::1]", "six2:2001:db8::2"]
                .map(String::from)
                .to_vec(),
            ..FileOptions::default()
        };
        let text = hosts(LOCALHOST.to_owned(), &on_bridge(), &options).unwrap();
        for line in [
            "127.0.0.1\tlocalhost",
            "10.87.0.2\tweb.example.org web",
            "10.0.0.7\tdb",
            "10.87.0.1\tme",
            "2001:db8::1\tsix",
            "2001:db8::2\tsix2",
        ] {
            assert!(text.lines().any(|have| have == line), "{line}: {text}");
        }
        for bad in ["x", "x:y", ":10.0.0.1", "a b:10.0.0.1", "a\n1.1.1.1 b:10.0.0.1"] {
            let options = FileOptions { add_host: vec![bad.into()], ..FileOptions::default() };
            assert!(hosts(String::new(), &on_bridge(), &options).is_err(), "{bad:?}");
        }
        let alone = Attached { namespace: Namespace::New, addresses: Vec::new(), gateway: None, ..on_bridge() };
        assert!(
            hosts(
                String::new(),
                &alone,
                &FileOptions { add_host: vec!["a:host-gateway".into()], ..FileOptions::default() }
            )
            .is_err()
        );
    }

    #[test]
    fn resolvers_that_only_the_host_reaches_are_left_out() {
        let host = "# made by somebody\nnameserver 127.0.0.53\nnameserver 10.0.0.53\nnameserver ::1\nsearch a.org b.org\noptions edns0\noptions trust-ad\n";
        let text = resolver(host, false, &[], &FileOptions::default()).unwrap();
        assert_eq!(text, "nameserver 10.0.0.53\nsearch a.org b.org\noptions edns0 trust-ad\n");
        assert!(asks_systemd(host) && !asks_systemd("nameserver 10.0.0.1\n#nameserver 127.0.0.53\n"));
        // On the host's network they are as good as for the host.
        assert!(resolver(host, true, &[], &FileOptions::default()).unwrap().starts_with("nameserver 127.0.0.53\n"));
        assert!(
            resolver(host, false, &["10.1.1.1".into()], &FileOptions::default())
                .unwrap()
                .starts_with("nameserver 10.1.1.1\ns")
        );
    }

    #[test]
    fn what_is_asked_for_comes_instead_of_the_hosts() {
        let host = "nameserver 10.0.0.53\nsearch a.org\noptions edns0\n";
        let options = FileOptions {
            dns: vec!["10.9.9.9".into(), "2001:db8::53".into()],
            dns_search: vec!["c.org".into()],
            dns_option: vec!["ndots:2".into(), "use-vc".into()],
            ..FileOptions::default()
        };
        let text = resolver(host, false, &[], &options).unwrap();
        assert_eq!(text, "nameserver 10.9.9.9\nnameserver 2001:db8::53\nsearch c.org\noptions ndots:2 use-vc\n");
        let none = FileOptions { dns_search: vec![".".into()], ..FileOptions::default() };
        assert_eq!(resolver(host, false, &[], &none).unwrap(), "nameserver 10.0.0.53\noptions edns0\n");
        for (dns, search) in [("x", "a"), ("10.0.0.1", "a\nnameserver 10.6.6.6")] {
            let bad = FileOptions { dns: vec![dns.into()], dns_search: vec![search.into()], ..FileOptions::default() };
            assert!(resolver(host, false, &[], &bad).is_err(), "{dns} {search}");
        }
    }
}
