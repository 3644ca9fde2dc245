//! Names of hosts, without libc's name service.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The addresses of a name: a number, `localhost`, or an entry of /etc/hosts.
///
/// # Errors
/// When nobody knows it.
pub async fn addresses(name: &str) -> io::Result<Vec<IpAddr>> {
    if let Ok(address) = name.parse() {
        return Ok(vec![address]);
    }
    let text = tokio::fs::read_to_string("/etc/hosts").await.unwrap_or_default();
    let mut found = listed(&text, name);
    if found.is_empty() && name.eq_ignore_ascii_case("localhost") {
        found = vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
    }
    if found.is_empty() {
        return Err(io::Error::new(io::ErrorKind::NotFound, format!("{name} is neither an address nor in /etc/hosts")));
    }
    Ok(found)
}

fn listed(hosts: &str, name: &str) -> Vec<IpAddr> {
    let lines = hosts.lines().map(|line| line.split('#').next().unwrap_or_default());
    lines
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let address = words.next()?.parse().ok()?;
            words.any(|word| word.eq_ignore_ascii_case(name)).then_some(address)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn hosts_are_read() {
        let hosts = "127.0.0.1 localhost # comment other\n::1 localhost ip6\n10.0.0.7\tBox box.lan\nnonsense\n";
        assert_eq!(super::listed(hosts, "box"), ["10.0.0.7".parse::<std::net::IpAddr>().unwrap()]);
        assert_eq!(super::listed(hosts, "localhost").len(), 2);
        assert!(super::listed(hosts, "other").is_empty());
    }
}
