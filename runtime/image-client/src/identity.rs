//! Identity tokens: what a registry's token service gave when somebody logged in, instead of a password. It gives an access
//! token for one for a while (OAuth 2.0, RFC 6749, section 6; the distribution project's "Docker Registry v2 Bearer token
//! specification" and "OAuth2 token authentication").

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use http_auth::parse_challenges;
use oci_client::client::Client;
use oci_client::errors::OciDistributionError;
use oci_client::secrets::RegistryAuth;
use reqwest::{Response, StatusCode, header};
use serde::Deserialize;
use tokio::sync::Mutex;

use crate::auth::Secret;
use crate::reference::Wanted;
use crate::registry::{self, Tries};
use crate::tls::Settings;

/// Who asks, for the service's own records.
const CLIENT: &str = "runx";
/// How long an access token is good for where that is not said, by that specification.
const LASTS: u64 = 60;
/// The most that is read of an answer, in bytes.
const LIMIT: usize = 64 << 10;

/// An identity at a registry.
pub(crate) struct Identity {
    settings: Settings,
    http: reqwest::Client,
    state: Mutex<State>,
}

struct State {
    token: Secret,
    /// A client with an access token, and until when that is good.
    access: Option<(Client, Instant)>,
}

/// Whom a registry has sent us to.
#[derive(Debug)]
struct Service {
    realm: reqwest::Url,
    name: Option<String>,
}

impl Service {
    /// Reads a registry's header `WWW-Authenticate`.
    fn named(host: &str, words: &str, plain: bool) -> Result<Self> {
        let challenges = parse_challenges(words).unwrap_or_default();
        let bearer = challenges.iter().find(|challenge| challenge.scheme.eq_ignore_ascii_case("bearer"));
        let of = |name: &str| {
            let mut params = bearer.into_iter().flat_map(|challenge| &challenge.params);
            params.find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.to_unescaped())
        };
        let realm = of("realm").with_context(|| {
            format!(
                "those for {host} are an identity token, and the registry names nobody who takes it: log in with a name and a \
                 password"
            )
        })?;
        let realm = reqwest::Url::parse(&realm).with_context(|| format!("{host} gives access by {realm:?}"))?;
        // As safely as the registry itself is spoken to.
        ensure!(
            realm.scheme() == "https" || realm.scheme() == "http" && plain,
            "{host} gives access by {realm}, without TLS: an identity token is not sent there"
        );
        Ok(Self { realm, name: of("service") })
    }
}

/// What the service gives.
#[derive(Deserialize)]
struct Granted {
    #[serde(alias = "token")]
    access_token: Secret,
    expires_in: Option<u64>,
    /// The one to come with the next time.
    refresh_token: Option<Secret>,
}

/// Why it does not.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Refused {
    error: String,
}

impl Identity {
    pub(crate) fn new(token: Secret, settings: Settings) -> Result<Self> {
        let http = settings.http()?;
        Ok(Self { settings, http, state: Mutex::new(State { token, access: None }) })
    }

    /// A client that the registry lets in now.
    ///
    /// # Errors
    /// When the registry, or who it sends us to, does not take the token.
    pub(crate) async fn client(&self, wanted: &Wanted) -> Result<Client> {
        let mut state = self.state.lock().await;
        if let Some((client, until)) = &state.access
            && Instant::now() < *until
        {
            return Ok(client.clone());
        }
        let client = registry::client(self.settings.client_config())?;
        let Some(service) = self.service(wanted).await? else {
            // It wants nothing from anybody.
            client.store_auth_if_needed(wanted.host(), &RegistryAuth::Anonymous).await;
            let access = state.access.insert((client, Instant::now() + Duration::from_secs(LASTS)));
            return Ok(access.0.clone());
        };
        let asked = Instant::now();
        let granted = self.ask(&service, &state.token, wanted).await?;
        if let Some(next) = granted.refresh_token.filter(|next| !next.0.is_empty()) {
            state.token = next;
        }
        client.store_auth_if_needed(wanted.host(), &RegistryAuth::Bearer(granted.access_token.0)).await;
        // Somewhat earlier: a request takes its time, too.
        let lasts = Duration::from_secs(granted.expires_in.unwrap_or(LASTS)).mul_f32(0.75);
        let access = state.access.insert((client, asked + lasts));
        Ok(access.0.clone())
    }

    /// Asks the registry who gives access to it. `None` if it lets everybody in.
    async fn service(&self, wanted: &Wanted) -> Result<Option<Service>> {
        let host = wanted.host();
        let url = format!("{}://{host}/v2/", if self.settings.plain { "http" } else { "https" });
        let response = self.patiently(|| self.http.get(&url), &format!("ask {host} who gives access to it")).await?;
        if response.status() != StatusCode::UNAUTHORIZED {
            return Ok(None);
        }
        let words = response.headers().get(header::WWW_AUTHENTICATE).and_then(|words| words.to_str().ok());
        Service::named(host, words.unwrap_or_default(), self.settings.plain).map(Some)
    }

    /// Asks for an access token.
    async fn ask(&self, service: &Service, token: &Secret, wanted: &Wanted) -> Result<Granted> {
        let scope = format!("repository:{}:pull", wanted.reference.repository());
        let mut form = vec![
            ("grant_type", "refresh_token"),
            ("client_id", CLIENT),
            ("scope", &scope),
            ("refresh_token", token.0.as_str()),
        ];
        form.extend(service.name.as_ref().map(|name| ("service", name.as_str())));
        let (host, realm) = (wanted.host(), &service.realm);
        let asked = format!("ask {realm} for access to {host}");
        let response = self.patiently(|| self.http.post(realm.clone()).form(&form), &asked).await?;
        let status = response.status();
        let content = content(response).await.with_context(|| asked.clone())?;
        if status.is_success() {
            // What it says is secret, also where it cannot be read.
            let granted: Option<Granted> = serde_json::from_slice(&content).ok();
            let granted = granted.filter(|granted| !granted.access_token.0.is_empty());
            return granted.with_context(|| format!("{asked}: it answers without a token"));
        }
        // A word of RFC 6749, section 5.2, and nothing longer: others may repeat what they were told.
        let said: Refused = serde_json::from_slice(&content).unwrap_or_default();
        let is_word = said.error.len() <= 40 && said.error.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
        let reason =
            if is_word && !said.error.is_empty() { format!("{status}, {}", said.error) } else { status.to_string() };
        bail!(
            "{host} does not accept the stored identity token for {}: log in again ({reason} by {realm})",
            wanted.reference
        )
    }

    /// Sends a request, again where what is wrong may pass.
    async fn patiently(&self, request: impl Fn() -> reqwest::RequestBuilder, what: &str) -> Result<Response> {
        let mut tries = Tries::default();
        loop {
            let e = match request().send().await {
                Ok(response)
                    if response.status().is_server_error() || response.status() == StatusCode::TOO_MANY_REQUESTS =>
                {
                    let (code, url) = (response.status().as_u16(), response.url().to_string());
                    OciDistributionError::ServerError { code, url, message: String::new() }
                }
                Ok(response) => return Ok(response),
                Err(e) => e.into(),
            };
            tries.again(&e).await.map_err(|()| anyhow!(e).context(what.to_owned()))?;
        }
    }
}

/// The content of an answer.
async fn content(mut response: Response) -> Result<Vec<u8>> {
    let mut content = Vec::new();
    while let Some(chunk) = response.chunk().await? {
        content.extend_from_slice(&chunk);
        ensure!(content.len() <= LIMIT, "it answers with more than {LIMIT} bytes");
    }
    Ok(content)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_goes_to_whom_the_registry_names_and_nowhere_without_tls() {
        let named = |words: &str, plain| Service::named("reg.example", words, plain).map_err(|e| e.to_string());
        let words = |realm: &str| format!("Basic realm=\"x\", bearer Realm=\"{realm}\", service=\"a \\\"b\\\"\"");
        let service = named(&words("https://auth.example/token"), false).unwrap();
        assert_eq!((service.realm.as_str(), service.name.as_deref()), ("https://auth.example/token", Some("a \"b\"")));
        assert!(named(&words("http://auth.example/token"), false).unwrap_err().contains("without TLS"));
        assert!(named(&words("file:///token"), true).unwrap_err().contains("without TLS"));
        named(&words("http://auth.example/token"), true).unwrap();
        for none in ["Basic realm=\"x\"", "", "Bearer service=\"x\"", "\"\""] {
            assert!(named(none, true).unwrap_err().contains("names nobody"), "{none}");
        }
    }
}
