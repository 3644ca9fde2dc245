//! Ports of a container that the host listens on: `-p [IP:][HOST:]CONTAINER[/PROTOCOL]`, as docker's.

use std::fmt;
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, UdpSocket};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

/// What a port belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        })
    }
}

/// One port, in the names of the capability `portMappings` of CNI's conventions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Port {
    /// The host's address that it holds for; `None`: all of them.
    #[serde(rename = "hostIP", default, skip_serializing_if = "Option::is_none")]
    pub(crate) host_ip: Option<Ipv4Addr>,
    /// The host's port; 0 for any that is free.
    pub(crate) host_port: u16,
    /// The container's port.
    pub(crate) container_port: u16,
    /// The protocol.
    pub(crate) protocol: Protocol,
}

impl Port {
    /// Whether a packet could be meant for both.
    pub(crate) fn collides(&self, other: &Self) -> bool {
        let everywhere = self.host_ip.is_none() || other.host_ip.is_none();
        self.protocol == other.protocol
            && self.host_port == other.host_port
            && (everywhere || self.host_ip == other.host_ip)
    }

    /// Makes sure that no process of the host listens there, and chooses a port if none is asked for.
    fn settle(&mut self) -> io::Result<()> {
        let address = SocketAddrV4::new(self.host_ip.unwrap_or(Ipv4Addr::UNSPECIFIED), self.host_port);
        let bound = match self.protocol {
            // For the moment of the question.
            Protocol::Tcp => TcpListener::bind(address)?.local_addr()?,
            // Nobody listens for SCTP by accident, and its numbers are as free as UDP's.
            Protocol::Udp => UdpSocket::bind(address)?.local_addr()?,
            Protocol::Sctp if self.host_port == 0 => UdpSocket::bind(address)?.local_addr()?,
            Protocol::Sctp => return Ok(()),
        };
        self.host_port = bound.port();
        Ok(())
    }
}

impl fmt::Display for Port {
    /// As docker shows it: `0.0.0.0:8080->80/tcp`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let address = self.host_ip.unwrap_or(Ipv4Addr::UNSPECIFIED);
        write!(f, "{address}:{}->{}/{}", self.host_port, self.container_port, self.protocol)
    }
}

/// The ports of one `-p`.
///
/// # Errors
/// With what is wrong in `text`.
pub(crate) fn parse(text: &str) -> Result<Vec<Port>> {
    const FORM: &str =
        "it is [IP:][HOST:]CONTAINER[/tcp|udp|sctp], and a port is a number or a range such as 8000-8010";
    let (rest, protocol) = match text.split_once('/') {
        None | Some((_, "tcp")) => (text.split_once('/').map_or(text, |(rest, _)| rest), Protocol::Tcp),
        Some((rest, "udp")) => (rest, Protocol::Udp),
        Some((rest, "sctp")) => (rest, Protocol::Sctp),
        Some((_, other)) => bail!("invalid --publish {text:?}: the protocol {other:?} is none of tcp, udp and sctp"),
    };
    if rest.starts_with('[') {
        bail!("invalid --publish {text:?}: the containers' network has IPv4 addresses only");
    }
    let parts: Vec<_> = rest.split(':').collect();
    let (ip, host, container) = match parts[..] {
        [container] => ("", "", container),
        [host, container] => ("", host, container),
        [ip, host, container] => (ip, host, container),
        _ => bail!("invalid --publish {text:?}: {FORM}"),
    };
    let host_ip = match ip {
        "" => None,
        ip => {
            let ip: Ipv4Addr = ip.parse().with_context(|| format!("invalid --publish {text:?}: {ip:?}"))?;
            Some(ip).filter(|ip| !ip.is_unspecified())
        }
    };
    let container = range(container).with_context(|| format!("invalid --publish {text:?}: {FORM}"))?;
    let host = match host {
        "" => None,
        host => Some(range(host).with_context(|| format!("invalid --publish {text:?}: {FORM}"))?),
    };
    let count = container.1 - container.0;
    if host.is_some_and(|host| host.1 - host.0 != count) {
        bail!("invalid --publish {text:?}: the host's range and the container's have different lengths");
    }
    let one = |offset: u16| Port {
        host_ip,
        host_port: host.map_or(0, |host| host.0 + offset),
        container_port: container.0 + offset,
        protocol,
    };
    Ok((0..=count).map(one).collect())
}

/// The first and the last port.
fn range(text: &str) -> Result<(u16, u16)> {
    let number = |text: &str| match text.parse() {
        Ok(0) | Err(_) => bail!("{text:?} is no port from 1 to 65535"),
        Ok(number) => Ok(number),
    };
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last): (u16, u16) = (number(first)?, number(last)?);
    if last < first {
        bail!("{text:?} ends before it begins");
    }
    Ok((first, last))
}

/// Chooses ports where none is asked for, and makes sure that all are free: of processes of the host, and of the
/// containers that `taken` names with theirs.
///
/// # Errors
/// With the port that is not free, and whose it is.
pub(crate) fn settle(ports: &mut [Port], taken: &[(String, Vec<Port>)]) -> Result<()> {
    const TRIES: usize = 64;
    for at in 0..ports.len() {
        let (before, rest) = ports.split_at_mut(at);
        let port = &mut rest[0];
        let any = port.host_port == 0;
        for tried in 0.. {
            if any {
                port.host_port = 0;
            }
            port.settle().map_err(|e| refused(port, &e))?;
            let owner = taken.iter().find(|(_, theirs)| theirs.iter().any(|theirs| theirs.collides(port)));
            let twice = before.iter().any(|other| other.collides(port));
            match owner {
                _ if any && tried < TRIES && (twice || owner.is_some()) => {}
                Some((id, _)) => bail!("publish {port}: the host's port is container {id:?}'s"),
                None if twice => bail!("publish {port}: the host's port is published twice"),
                None => break,
            }
        }
    }
    Ok(())
}

fn refused(port: &Port, error: &io::Error) -> anyhow::Error {
    let why = match error.kind() {
        io::ErrorKind::AddrInUse => "a process of the host listens there: end it, or choose another port".to_owned(),
        io::ErrorKind::AddrNotAvailable => "that is no address of this host".to_owned(),
        _ => error.to_string(),
    };
    anyhow::anyhow!("publish {port}: {why}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(text: &str) -> Vec<String> {
        parse(text).unwrap().iter().map(ToString::to_string).collect()
    }

    #[test]
    fn ports_are_written_as_dockers_users_write_them() {
        for (text, wanted) in [
            ("80", "0.0.0.0:0->80/tcp"),
            ("8080:80", "0.0.0.0:8080->80/tcp"),
            ("8080:80/udp", "0.0.0.0:8080->80/udp"),
            ("127.0.0.1:8080:80", "127.0.0.1:8080->80/tcp"),
            ("127.0.0.1::80/sctp", "127.0.0.1:0->80/sctp"),
            ("0.0.0.0:1:2", "0.0.0.0:1->2/tcp"),
        ] {
            assert_eq!(shown(text), [wanted], "{text}");
        }
        assert_eq!(shown("8000-8001:80-81"), ["0.0.0.0:8000->80/tcp", "0.0.0.0:8001->81/tcp"]);
        assert_eq!(parse("65535-65535:1-1").unwrap().len(), 1);
    }

    #[test]
    fn mistakes_are_told() {
        for bad in
            ["", "0", "65536", "a", "1:2:3", "1:2:3:4", "80/ftp", "2-1:2-1", "1-2:1", "[::1]:80:80", "1:", "-1", "1-"]
        {
            let error = format!("{:#}", parse(bad).unwrap_err());
            assert!(error.contains("invalid --publish"), "{bad}: {error}");
        }
    }

    #[test]
    fn a_port_is_given_once() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let busy = listener.local_addr().unwrap().port();
        let mut ports = parse(&format!("127.0.0.1:{busy}:80")).unwrap();
        assert!(settle(&mut ports, &[]).unwrap_err().to_string().contains("a process of the host"));
        drop(listener);
        settle(&mut ports, &[]).unwrap();
        let taken = [("other".to_owned(), parse(&format!("{busy}:1")).unwrap())];
        let error = settle(&mut ports, &taken).unwrap_err().to_string();
        assert!(error.contains("\"other\""), "{error}");
        let mut twice = [ports.clone(), ports].concat();
        assert!(settle(&mut twice, &[]).unwrap_err().to_string().contains("twice"));
        let mut chosen = [parse("80").unwrap(), parse("81").unwrap()].concat();
        settle(&mut chosen, &taken).unwrap();
        assert!(chosen[0].host_port != 0 && chosen[0].host_port != chosen[1].host_port);
        assert!(
            settle(&mut parse("203.0.113.9:9999:80").unwrap(), &[]).unwrap_err().to_string().contains("no address")
        );
    }
}
