//! How a registry is spoken to: with TLS and which certificates, or plainly.
//!
//! Plain HTTP is for registries on this machine, and for who asks for it. Which of both a registry speaks is found out with a
//! request that tells nothing.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use oci_client::client::{Certificate, CertificateEncoding, ClientConfig, ClientProtocol};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// How the user wants it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Options {
    /// Certificates of authorities beyond the machine's.
    pub(crate) ca_files: Vec<PathBuf>,
    /// Directories of directories named by registries.
    pub(crate) cert_dir: Option<PathBuf>,
    /// Take any certificate, and plain HTTP.
    pub(crate) insecure: bool,
    /// Registries for which that holds without being said for all.
    pub(crate) insecure_registries: Vec<String>,
    /// Certificates of authorities for one registry.
    pub(crate) registry_cas: Vec<(String, PathBuf)>,
    /// No TLS.
    pub(crate) plain_http: bool,
}

/// How long anything of the network may take until something comes.
const PATIENCE: Duration = Duration::from_secs(30);

/// How one registry is spoken to.
#[derive(Clone, Debug, Default)]
pub(crate) struct Settings {
    /// Without TLS.
    pub(crate) plain: bool,
    /// With any certificate.
    insecure: bool,
    /// Authorities beyond the machine's.
    authorities: Vec<Certificate>,
}

const AGENT: &str = concat!("runx/", env!("CARGO_PKG_VERSION"));

impl Settings {
    /// For the library that speaks to registries.
    pub(crate) fn client_config(&self) -> ClientConfig {
        ClientConfig {
            protocol: if self.plain { ClientProtocol::Http } else { ClientProtocol::Https },
            accept_invalid_certificates: self.insecure,
            extra_root_certificates: self.authorities.clone(),
            read_timeout: Some(PATIENCE),
            connect_timeout: Some(PATIENCE),
            user_agent: AGENT,
            ..ClientConfig::default()
        }
    }

    /// For those whom a registry sends us to. It goes nowhere else with what it is told.
    pub(crate) fn http(&self) -> Result<reqwest::Client> {
        let authorities: Vec<reqwest::Certificate> =
            self.authorities.iter().map(reqwest::Certificate::try_from).collect::<Result<_, _>>()?;
        reqwest::Client::builder()
            .danger_accept_invalid_certs(self.insecure)
            .tls_certs_merge(authorities)
            .redirect(reqwest::redirect::Policy::none())
            .read_timeout(PATIENCE)
            .connect_timeout(PATIENCE)
            .user_agent(AGENT)
            .build()
            .context("set up the client for token services")
    }
}

/// Finds out how one registry is spoken to.
pub(crate) async fn configure(host: &str, options: &Options, say: impl Fn(&str)) -> Result<Settings> {
    let loopback = is_loopback(host);
    let insecure = options.insecure || options.insecure_registries.iter().any(|other| other == host);
    let plain = if options.plain_http {
        true
    } else if loopback || insecure {
        speaks_plainly(host).await
    } else {
        false
    };
    if plain && !loopback {
        say(&format!("warning: {host} is spoken to without TLS: anybody between may read and change what comes"));
    }
    if insecure && !plain {
        say(&format!("warning: the certificate of {host} is not checked"));
    }
    let mut extra = Vec::new();
    for file in &options.ca_files {
        extra.extend(certificates(file)?);
    }
    for (_, file) in options.registry_cas.iter().filter(|(other, _)| other == host) {
        extra.extend(certificates(file)?);
    }
    for dir in cert_dirs(options.cert_dir.as_deref()) {
        extra.extend(of_registry(&dir.join(host))?);
    }
    Ok(Settings { plain, insecure, authorities: extra })
}

/// Where docker and podman look.
fn cert_dirs(given: Option<&Path>) -> Vec<PathBuf> {
    if let Some(dir) = given {
        return vec![dir.to_owned()];
    }
    let home = std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".config/containers/certs.d"));
    let system = ["/etc/containers/certs.d", "/etc/docker/certs.d"].map(PathBuf::from);
    home.into_iter().chain(system).collect()
}

fn of_registry(dir: &Path) -> Result<Vec<Certificate>> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Ok(Vec::new()) };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.with_context(|| format!("read {}", dir.display()))?.path();
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("crt") => found.extend(certificates(&path)?),
            Some("cert" | "key") => bail!("{}: certificates of clients are not supported", path.display()),
            _ => {}
        }
    }
    Ok(found)
}

/// All certificates of a file of PEM blocks.
fn certificates(file: &Path) -> Result<Vec<Certificate>> {
    const END: &str = "-----END CERTIFICATE-----";
    let text = std::fs::read_to_string(file).with_context(|| format!("read the certificates in {}", file.display()))?;
    let blocks = text.split_inclusive(END).filter(|block| block.contains("-----BEGIN CERTIFICATE-----"));
    let found: Vec<Certificate> = blocks
        .filter(|block| block.ends_with(END))
        .map(|block| Certificate { encoding: CertificateEncoding::Pem, data: block.as_bytes().to_vec() })
        .collect();
    ensure!(!found.is_empty(), "{} has no certificate in PEM form", file.display());
    Ok(found)
}

/// Whether a registry's host is this machine.
fn is_loopback(host: &str) -> bool {
    let bare = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or(rest),
        None => host.split(':').next().unwrap_or(host),
    };
    bare == "localhost" || bare.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// Whether it answers to HTTP without TLS. One that wants TLS ends the connection, sends an alert, or says that it is
/// wrong.
async fn speaks_plainly(host: &str) -> bool {
    let has_port = host.rsplit_once(':').is_some_and(|(_, port)| port.bytes().all(|b| b.is_ascii_digit()));
    // Without a port it would be the one for TLS.
    if !has_port {
        return false;
    }
    let ask = async {
        let mut stream = TcpStream::connect(host).await.ok()?;
        stream
            .write_all(format!("HEAD / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n").as_bytes())
            .await
            .ok()?;
        let mut answer = [0; 12];
        stream.read_exact(&mut answer).await.ok()?;
        Some(answer)
    };
    match timeout(PATIENCE, ask).await {
        Ok(Some(answer)) => answer.starts_with(b"HTTP/1.") && !answer.ends_with(b" 400"),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_machine_is_loopback() {
        for host in ["localhost", "localhost:5000", "127.0.0.1", "127.1.2.3:80", "[::1]:5000", "[::1]"] {
            assert!(is_loopback(host), "{host}");
        }
        for host in ["localhost.example", "registry.example", "10.0.0.1:5000", "127.example", "[fe80::1]:5000"] {
            assert!(!is_loopback(host), "{host}");
        }
    }

    #[test]
    fn certificates_are_found_and_what_is_none_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let host = dir.path().join("registry.example:5000");
        std::fs::create_dir(&host).unwrap();
        let block = "-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\n";
        std::fs::write(host.join("ca.crt"), format!("text\n{block}{block}")).unwrap();
        assert_eq!(of_registry(&host).unwrap().len(), 2);
        assert!(of_registry(&dir.path().join("other.example")).unwrap().is_empty());
        std::fs::write(host.join("client.key"), "x").unwrap();
        assert!(of_registry(&host).is_err());
        std::fs::write(dir.path().join("none"), "-----BEGIN CERTIFICATE-----\n").unwrap();
        assert!(certificates(&dir.path().join("none")).is_err());
        assert!(certificates(&dir.path().join("missing")).is_err());
    }
}
