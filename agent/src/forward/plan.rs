//! What a forward is to do, as it is asked for and as it is done.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::allow::{Range, is_loopback};
use super::tls;

/// What is spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// HTTP/1.1, upgrades included.
    Http,
    /// The same over TLS, with a certificate of the request.
    Https,
    /// HTTP requests that become WebSockets, and no others.
    Websocket,
    /// Whatever goes over TCP.
    Tcp,
    /// Datagrams.
    Udp,
}

/// A certificate and its key, as PEM.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Identity {
    certificate: String,
    key: String,
}

/// As it is asked for.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wish {
    protocol: Protocol,
    listen: String,
    target: String,
    token: Option<String>,
    #[serde(default)]
    allow: Vec<String>,
    #[serde(default)]
    insecure: bool,
    tls: Option<Identity>,
    target_ca: Option<String>,
    #[serde(default)]
    target_insecure: bool,
    #[serde(default = "connect_timeout")]
    connect_timeout_ms: u64,
    #[serde(default = "idle_timeout")]
    idle_timeout_ms: u64,
    #[serde(default)]
    retries: u32,
    #[serde(default = "retry_delay")]
    retry_delay_ms: u64,
    #[serde(default = "connections")]
    max_connections: usize,
    buffer_bytes: Option<usize>,
}

fn connect_timeout() -> u64 {
    5_000
}

fn idle_timeout() -> u64 {
    300_000
}

fn retry_delay() -> u64 {
    200
}

fn connections() -> usize {
    1024
}

/// How much of TCP is held for each way unless a request says otherwise, in bytes.
const BUFFER: usize = 8 << 10;

/// As it is done.
#[derive(Clone)]
pub struct Plan {
    /// What is spoken.
    pub protocol: Protocol,
    pub(super) listen: SocketAddr,
    /// Where to, as it was asked for.
    pub target: String,
    pub(super) host: String,
    pub(super) port: u16,
    /// What precedes the path of requests.
    pub(super) prefix: String,
    pub(super) token: Option<String>,
    pub(super) allow: Vec<Range>,
    pub(super) acceptor: Option<tokio_rustls::TlsAcceptor>,
    pub(super) connector: Option<(tokio_rustls::TlsConnector, tls::Name)>,
    pub(super) connect_timeout: Duration,
    pub(super) idle_timeout: Duration,
    pub(super) retries: u32,
    pub(super) retry_delay: Duration,
    pub(super) connections: usize,
    pub(super) buffer: usize,
}

impl std::fmt::Debug for Plan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The token and the key are nobody's business.
        write!(f, "Plan({:?} {} to {})", self.protocol, self.listen, self.target)
    }
}

impl Plan {
    /// Whether requests need a token.
    pub fn needs_token(&self) -> bool {
        self.token.is_some()
    }

    pub(super) fn is_http(&self) -> bool {
        matches!(self.protocol, Protocol::Http | Protocol::Https | Protocol::Websocket)
    }

    /// Whether a client of an address is let in.
    pub(super) fn lets_in(&self, address: IpAddr) -> bool {
        self.allow.is_empty() || self.allow.iter().any(|range| range.holds(address))
    }
}

fn host_and_port(text: &str, usual: Option<u16>) -> Result<(String, u16), String> {
    let wrong = || format!("target: {text:?} is not HOST:PORT");
    let (host, port) = match text.rsplit_once(':').filter(|(host, _)| !host.contains(':') || host.ends_with(']')) {
        Some((host, port)) => (host, Some(port.parse().map_err(|_| wrong())?)),
        None => (text, usual),
    };
    let host = host.trim_start_matches('[').trim_end_matches(']');
    match port {
        Some(port) if !host.is_empty() && port != 0 => Ok((host.to_owned(), port)),
        _ => Err(wrong()),
    }
}

impl Wish {
    /// Looks at all of it.
    ///
    /// # Errors
    /// What of it makes no sense, or would let anybody in without that having been said.
    pub fn plan(self) -> Result<Plan, String> {
        let listen: SocketAddr =
            self.listen.parse().map_err(|_| format!("listen: {:?} is not IP:PORT", self.listen))?;
        let http = matches!(self.protocol, Protocol::Http | Protocol::Https | Protocol::Websocket);
        let (secure, host, port, prefix) = if http {
            let (scheme, rest) = self.target.split_once("://").unwrap_or(("http", &self.target));
            let (secure, usual) = match scheme {
                "http" | "ws" => (false, 80),
                "https" | "wss" => (true, 443),
                other => return Err(format!("target: {other:?} is none of http, https, ws and wss")),
            };
            let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
            let (host, port) = host_and_port(authority, Some(usual))?;
            let path = path.trim_end_matches('/');
            (secure, host, port, if path.is_empty() { String::new() } else { format!("/{path}") })
        } else {
            let (host, port) = host_and_port(&self.target, None)?;
            (false, host, port, String::new())
        };
        let allow = self.allow.iter().map(|text| Range::of(text)).collect::<Result<Vec<_>, _>>();
        let allow = allow.map_err(|e| format!("allow: {e}"))?;
        if self.token.is_some() && !http {
            return Err("token: TCP and UDP have nowhere to put one; give allow, a list of addresses".into());
        }
        if self.token.as_ref().is_some_and(String::is_empty) {
            return Err("token: it is empty".into());
        }
        if !is_loopback(listen.ip()) && self.token.is_none() && allow.is_empty() && !self.insecure {
            return Err(format!(
                "listen: whoever reaches {listen} would be let in; give a token (HTTP) or allow, or insecure if that is meant"
            ));
        }
        let acceptor = match (self.protocol, self.tls) {
            (Protocol::Https, Some(identity)) => Some(tls::acceptor(&identity.certificate, &identity.key)?),
            (Protocol::Https, None) => return Err("tls: https needs a certificate and a key".into()),
            (_, Some(_)) => return Err("tls: only https has a certificate".into()),
            (_, None) => None,
        };
        if !secure && (self.target_ca.is_some() || self.target_insecure) {
            return Err("target_ca, target_insecure: the target is not https".into());
        }
        let connector = if secure {
            let name = tls::name(&host)?;
            Some((tls::connector(self.target_ca.as_deref(), self.target_insecure)?, name))
        } else {
            None
        };
        if self.max_connections == 0 || self.max_connections > 16_384 {
            return Err(format!("max_connections: {} is not from 1 to 16384", self.max_connections));
        }
        if self.buffer_bytes.is_some() && self.protocol != Protocol::Tcp {
            return Err("buffer_bytes: only TCP has a buffer".into());
        }
        if self.retries != 0 && self.protocol == Protocol::Udp {
            return Err("retries: datagrams have no connection that could be tried again".into());
        }
        let buffer = self.buffer_bytes.unwrap_or(BUFFER);
        if !(1 << 10..=1 << 20).contains(&buffer) {
            return Err(format!("buffer_bytes: {buffer} is not from 1024 to 1048576"));
        }
        if self.idle_timeout_ms == 0 || self.connect_timeout_ms == 0 || self.retries > 100 {
            return Err("timeouts must not be 0, and retries not more than 100".into());
        }
        Ok(Plan {
            protocol: self.protocol,
            listen,
            target: self.target,
            host,
            port,
            prefix,
            token: self.token,
            allow,
            acceptor,
            connector,
            connect_timeout: Duration::from_millis(self.connect_timeout_ms),
            idle_timeout: Duration::from_millis(self.idle_timeout_ms),
            retries: self.retries,
            retry_delay: Duration::from_millis(self.retry_delay_ms),
            connections: self.max_connections,
            buffer,
        })
    }
}

/// Plans are shared by all connections.
pub(super) type Shared = Arc<super::Forward>;

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(text: &str) -> Result<Plan, String> {
        serde_json::from_str::<Wish>(text).map_err(|e| e.to_string())?.plan()
    }

    #[test]
    fn who_lets_anybody_in_has_to_say_so() {
        let wish = |listen: &str, more: &str| {
            plan(&format!(r#"{{"protocol": "http", "listen": "{listen}", "target": "http://127.0.0.1:1/a/"{more}}}"#))
        };
        let open = wish("0.0.0.0:0", "").unwrap_err();
        assert!(open.contains("insecure"), "{open}");
        let closed = wish("0.0.0.0:0", r#", "token": "t0p-s3cret""#).unwrap();
        assert!(closed.needs_token() && !format!("{closed:?}").contains("t0p-s3cret"));
        assert!(wish("127.0.0.1:0", "").is_ok() && wish("[::1]:0", "").is_ok());
        assert!(wish("0.0.0.0:0", r#", "insecure": true"#).is_ok());
        assert_eq!(closed.prefix, "/a");
    }

    #[test]
    fn what_makes_no_sense_is_refused_by_its_name() {
        for (text, word) in [
            (r#"{"protocol": "tcp", "listen": "127.0.0.1:0", "target": "localhost"}"#, "target"),
            (r#"{"protocol": "tcp", "listen": "localhost:0", "target": "localhost:1"}"#, "listen"),
            (r#"{"protocol": "udp", "listen": "127.0.0.1:0", "target": "localhost:1", "token": "x"}"#, "token"),
            (r#"{"protocol": "https", "listen": "127.0.0.1:0", "target": "localhost:1"}"#, "certificate"),
            (r#"{"protocol": "http", "listen": "127.0.0.1:0", "target": "ftp://x:1"}"#, "ftp"),
            (
                r#"{"protocol": "http", "listen": "127.0.0.1:0", "target": "http://x:1", "target_insecure": true}"#,
                "https",
            ),
            (
                r#"{"protocol": "http", "listen": "127.0.0.1:0", "target": "http://x:1", "buffer_bytes": 2048}"#,
                "buffer_bytes",
            ),
            (r#"{"protocol": "udp", "listen": "127.0.0.1:0", "target": "x:1", "retries": 1}"#, "retries"),
            (r#"{"protocol": "smtp", "listen": "127.0.0.1:0", "target": "x:1"}"#, "smtp"),
        ] {
            let error = plan(text).unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
    }
}
