//! The cluster's API: labels of the node, and objects that are looked at.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value, json};
use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::typestate::WithBody;
use ureq::{Agent, RequestBuilder};

/// The label that says how far a node is: `installing`, `true`, or `failed`. RuntimeClasses select by it.
pub(crate) const READY: &str = "runx.dev/ready";

/// The label with the programs' version.
pub(crate) const VERSION: &str = "runx.dev/version";

/// How long a call may take.
const PATIENCE: Duration = Duration::from_secs(15);

/// The most that is read of an answer, in bytes: a list of pods is long.
const ANSWER_LIMIT: u64 = 64 << 20;

/// The most that is read of a refusal, in bytes.
const REASON_LIMIT: u64 = 64 << 10;

/// Where pods find the account that they have.
const ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

type Response = ureq::http::Response<ureq::Body>;

/// The cluster's API, by the account of a pod.
#[derive(Clone, Debug)]
pub(crate) struct Api {
    address: String,
    account: PathBuf,
    agent: Agent,
}

/// The cluster's API, for one node.
#[derive(Clone, Debug)]
pub(crate) struct Cluster {
    node: String,
    api: Api,
}

/// A name is a part of a URL here.
pub(crate) fn is_name(text: &str) -> bool {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.';
    !text.is_empty() && text.len() <= 253 && text.bytes().all(inner) && !text.starts_with('.')
}

impl Api {
    /// The API of the cluster that this is a pod of, or at `address`.
    ///
    /// # Errors
    /// When it is not in a pod, or the account is not there.
    pub(crate) fn new(address: Option<&str>, account: Option<&Path>) -> Result<Self> {
        let account = account.unwrap_or(Path::new(ACCOUNT)).to_owned();
        let address = match address {
            Some(address) => address.trim_end_matches('/').to_owned(),
            None => {
                let variable = |name: &str| {
                    std::env::var(name).with_context(|| {
                        format!("{name} is not set: the API is asked from within a pod; else leave --node-name out, or name --api")
                    })
                };
                let host = variable("KUBERNETES_SERVICE_HOST")?;
                let host = if host.contains(':') { format!("[{host}]") } else { host };
                format!("https://{host}:{}", variable("KUBERNETES_SERVICE_PORT")?)
            }
        };
        let mut config =
            Agent::config_builder().http_status_as_error(false).timeout_global(Some(PATIENCE)).max_redirects(0);
        if address.starts_with("https://") {
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
        Ok(Self { address, account, agent: config.build().into() })
    }

    /// Tokens are replaced while pods run.
    fn authorization(&self) -> Result<String> {
        let path = self.account.join("token");
        let token =
            fs::read_to_string(&path).with_context(|| format!("read the account's token {}", path.display()))?;
        Ok(format!("Bearer {}", token.trim()))
    }

    /// Asks for an object, or for a list of them.
    ///
    /// # Errors
    /// When the API does not give it, with its reason.
    pub(crate) fn get(&self, path: &str) -> Result<Value> {
        let asked = self.agent.get(format!("{}{path}", self.address));
        let asked = asked.header("Authorization", self.authorization()?).header("Accept", "application/json");
        let what = || format!("ask {} for {path}", self.address);
        let mut response = asked.call().with_context(what)?;
        answer(&mut response, ANSWER_LIMIT).with_context(what)
    }

    /// Makes an object in a collection. Tells whether it was not there yet.
    ///
    /// # Errors
    /// When the API does not do it.
    pub(crate) fn create(&self, collection: &str, object: &Value) -> Result<bool> {
        let request = self.agent.post(format!("{}{collection}", self.address));
        let what = || format!("write to {}{collection}", self.address);
        let mut response = self.send(request, "application/json", object).with_context(what)?;
        if response.status() == ureq::http::StatusCode::CONFLICT {
            return Ok(false);
        }
        answer(&mut response, ANSWER_LIMIT).with_context(what).map(|_| true)
    }

    /// Changes an object, and tells what it is then.
    ///
    /// # Errors
    /// When the API does not do it.
    pub(crate) fn merge(&self, path: &str, patch: &Value) -> Result<Value> {
        let what = || format!("change {}{path}", self.address);
        let mut response = self.patch(path, patch).with_context(what)?;
        answer(&mut response, ANSWER_LIMIT).with_context(what)
    }

    fn patch(&self, path: &str, patch: &Value) -> Result<Response> {
        self.send(self.agent.patch(format!("{}{path}", self.address)), "application/merge-patch+json", patch)
    }

    fn send(&self, request: RequestBuilder<WithBody>, kind: &str, body: &Value) -> Result<Response> {
        let request = request.header("Authorization", self.authorization()?).header("Content-Type", kind);
        Ok(request.header("Accept", "application/json").send(body.to_string())?)
    }
}

/// What the API says, or why it does not.
fn answer(response: &mut Response, limit: u64) -> Result<Value> {
    let status = response.status();
    let text = response.body_mut().with_config().limit(limit).read_to_string();
    if status.is_success() {
        return serde_json::from_str(&text?).context("it answers with what is no JSON");
    }
    let said: Value = serde_json::from_str(&text.unwrap_or_default()).unwrap_or_default();
    bail!("{status}: {}", said.get("message").and_then(Value::as_str).unwrap_or("no reason given"))
}

impl Cluster {
    /// The API of the cluster that this is a pod of, or at `api`, for a node.
    ///
    /// # Errors
    /// When it is not in a pod, or the account is not there.
    pub(crate) fn of_node(node: &str, api: Option<&str>, account: Option<&Path>) -> Result<Self> {
        if !is_name(node) {
            bail!("--node-name {node:?} is no name of a node");
        }
        Ok(Self { node: node.to_owned(), api: Api::new(api, account)? })
    }

    /// Sets labels of the node; those that are `None` are taken away.
    ///
    /// # Errors
    /// When the API does not do it.
    pub(crate) fn label(&self, labels: &[(&str, Option<&str>)]) -> Result<()> {
        let labels: Map<String, Value> = labels.iter().map(|(key, value)| ((*key).to_owned(), json!(value))).collect();
        let what = || format!("label node {} by {}", self.node, self.api.address);
        let patch = json!({"metadata": {"labels": labels}});
        let mut response = self.api.patch(&self.path(), &patch).with_context(what)?;
        // A node is told with all that is on it, and nothing of it is asked for.
        if response.status().is_success() {
            return Ok(());
        }
        answer(&mut response, REASON_LIMIT).map(drop).with_context(|| format!("label node {}", self.node))
    }

    /// The node as the cluster knows it. It is what a patch that changes nothing is answered with: so no right is needed beside
    /// that to set labels, and an account that may read its own node could read all of them.
    ///
    /// # Errors
    /// When the API does not tell it.
    pub(crate) fn node(&self) -> Result<Value> {
        self.api.merge(&self.path(), &json!({})).context("ask what the node is")
    }

    /// The node's name.
    pub(crate) fn name(&self) -> &str {
        &self.node
    }

    /// The API.
    pub(crate) fn api(&self) -> &Api {
        &self.api
    }

    fn path(&self) -> String {
        format!("/api/v1/nodes/{}", self.node)
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
