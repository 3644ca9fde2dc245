//! The node's labels, by the cluster's API.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value, json};
use ureq::Agent;
use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};

/// The label that says how far a node is: `installing`, `true`, or `failed`. RuntimeClasses select by it.
pub(crate) const READY: &str = "runx.dev/ready";

/// The label with the programs' version.
pub(crate) const VERSION: &str = "runx.dev/version";

/// How long a call may take.
const PATIENCE: Duration = Duration::from_secs(15);

/// Where pods find the account that they have.
const ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// The cluster's API, for one node.
#[derive(Debug)]
pub(crate) struct Cluster {
    node: String,
    api: String,
    account: PathBuf,
    agent: Agent,
}

/// A name is a part of a URL here.
fn is_name(text: &str) -> bool {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.';
    !text.is_empty() && text.len() <= 253 && text.bytes().all(inner) && !text.starts_with('.')
}

impl Cluster {
    /// The API of the cluster that this is a pod of, or at `api`.
    ///
    /// # Errors
    /// When it is not in a pod, or the account is not there.
    pub(crate) fn of_node(node: &str, api: Option<&str>, account: Option<&Path>) -> Result<Self> {
        if !is_name(node) {
            bail!("--node-name {node:?} is no name of a node");
        }
        let account = account.unwrap_or(Path::new(ACCOUNT)).to_owned();
        let api = match api {
            Some(api) => api.trim_end_matches('/').to_owned(),
            None => {
                let variable = |name: &str| {
                    std::env::var(name).with_context(|| {
                        format!("{name} is not set: labels are set from within a pod; else leave --node-name out, or name --api")
                    })
                };
                let host = variable("KUBERNETES_SERVICE_HOST")?;
                let host = if host.contains(':') { format!("[{host}]") } else { host };
                format!("https://{host}:{}", variable("KUBERNETES_SERVICE_PORT")?)
            }
        };
        let mut config =
            Agent::config_builder().http_status_as_error(false).timeout_global(Some(PATIENCE)).max_redirects(0);
        if api.starts_with("https://") {
            let path = account.join("ca.crt");
            let text = fs::read(&path).with_context(|| format!("read the cluster's authority {}", path.display()))?;
            let mut authorities = Vec::new();
            for item in parse_pem(&text) {
                if let PemItem::Certificate(found) = item.with_context(|| format!("read {}", path.display()))? {
                    authorities.push(found);
                }
            }
            let provider = Arc::new(rustls::crypto::ring::default_provider());
            let tls = TlsConfig::builder().root_certs(RootCerts::from(authorities));
            config = config.tls_config(tls.unversioned_rustls_crypto_provider(provider).build());
        }
        Ok(Self { node: node.to_owned(), api, account, agent: config.build().into() })
    }

    /// Sets labels of the node; those that are `None` are taken away.
    ///
    /// # Errors
    /// When the API does not do it.
    pub(crate) fn label(&self, labels: &[(&str, Option<&str>)]) -> Result<()> {
        let labels: Map<String, Value> = labels.iter().map(|(key, value)| ((*key).to_owned(), json!(value))).collect();
        let body = json!({"metadata": {"labels": labels}}).to_string();
        // Tokens are replaced while pods run.
        let path = self.account.join("token");
        let token =
            fs::read_to_string(&path).with_context(|| format!("read the account's token {}", path.display()))?;
        let mut response = self
            .agent
            .patch(format!("{}/api/v1/nodes/{}", self.api, self.node))
            .header("Authorization", format!("Bearer {}", token.trim()))
            .header("Content-Type", "application/merge-patch+json")
            .header("Accept", "application/json")
            .send(body)
            .with_context(|| format!("label node {} by {}", self.node, self.api))?;
        if response.status().is_success() {
            return Ok(());
        }
        let status = response.status();
        let text = response.body_mut().with_config().limit(64 << 10).read_to_string().unwrap_or_default();
        let answer: Value = serde_json::from_str(&text).unwrap_or_default();
        let message = answer.get("message").and_then(Value::as_str).unwrap_or("no reason given");
        bail!("label node {}: {status}: {message}", self.node)
    }
}

/// A text as the value of a label: other characters and what is too long are left out.
pub(crate) fn label_value(text: &str) -> String {
    let kept: String =
        text.chars().filter(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.')).take(63).collect();
    kept.trim_matches(|c: char| !c.is_ascii_alphanumeric()).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_none_never_reach_the_api() {
        for name in ["", "a/b", "A", "..", "a?b", "a%2fb"] {
            assert!(Cluster::of_node(name, Some("http://127.0.0.1:1"), None).is_err(), "{name}");
        }
    }

    /// A server with a certificate for 127.0.0.1 that answers one request; and the certificate that it is known by.
    fn server(answer: &'static str) -> (String, String, std::thread::JoinHandle<String>) {
        use std::io::{BufRead, BufReader, Read, Write};
        let made = rcgen::generate_simple_self_signed(vec!["127.0.0.1".to_owned()]).unwrap();
        let key = rustls::pki_types::PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
        let config = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![made.cert.der().clone()], key)
            .unwrap();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("https://{}", listener.local_addr().unwrap());
        let served = std::thread::spawn(move || {
            let (mut tcp, _) = listener.accept().unwrap();
            let mut tls = rustls::ServerConnection::new(Arc::new(config)).unwrap();
            let mut reader = BufReader::new(rustls::Stream::new(&mut tls, &mut tcp));
            let (mut head, mut length) = (String::new(), 0);
            loop {
                let mut line = String::new();
                if reader.read_line(&mut line).unwrap_or(0) <= 2 {
                    break;
                }
                if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                    length = value.trim().parse().unwrap();
                }
                head.push_str(&line);
            }
            let mut body = vec![0; length];
            let _ = reader.read_exact(&mut body);
            let _ = reader.get_mut().write_all(answer.as_bytes());
            format!("{head}{}", String::from_utf8(body).unwrap())
        });
        (address, made.cert.pem(), served)
    }

    fn account(authority: &str) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("token"), "secret\n").unwrap();
        fs::write(directory.path().join("ca.crt"), authority).unwrap();
        directory
    }

    #[test]
    fn labels_go_to_the_clusters_own_server_by_its_own_authority() {
        let (api, authority, served) = server("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}");
        let account = account(&authority);
        let cluster = Cluster::of_node("one", Some(&api), Some(account.path())).unwrap();
        cluster.label(&[(READY, Some("true")), (VERSION, None)]).unwrap();
        let request = served.join().unwrap();
        assert!(request.starts_with("PATCH /api/v1/nodes/one HTTP/1.1\r\n"), "{request}");
        assert!(request.to_ascii_lowercase().contains("authorization: bearer secret"), "{request}");
        let body = r#"{"metadata":{"labels":{"runx.dev/ready":"true","runx.dev/version":null}}}"#;
        assert!(request.ends_with(body), "{request}");
    }

    #[test]
    fn a_server_that_the_authority_does_not_know_gets_no_token() {
        let (api, _, served) = server("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}");
        let other = rcgen::generate_simple_self_signed(vec!["127.0.0.1".to_owned()]).unwrap();
        let account = account(&other.cert.pem());
        let cluster = Cluster::of_node("one", Some(&api), Some(account.path())).unwrap();
        let error = format!("{:#}", cluster.label(&[(READY, None)]).unwrap_err());
        assert!(error.contains("label node one") && !error.contains("secret"), "{error}");
        assert!(!served.join().unwrap().contains("secret"));
    }

    #[test]
    fn values_of_labels_are_made_of_any_text() {
        assert_eq!(label_value("0.1.0+x y"), "0.1.0xy");
        assert_eq!(label_value("-a-"), "a");
        assert_eq!(label_value(&"x".repeat(70)).len(), 63);
    }
}
