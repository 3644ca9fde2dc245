//! Who to be at a registry: from the files that docker and podman write when somebody logs in.
//!
//! A credential is a secret: no error and no log shows one.

use std::collections::BTreeMap;
use std::env;
use std::fmt;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use oci_client::Reference;
use oci_client::secrets::RegistryAuth;
use serde::Deserialize;

/// A text that is nobody else's business.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub(crate) struct Secret(pub(crate) String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("<secret>")
    }
}

/// Who to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Login {
    /// What a request is sent with.
    Plain(RegistryAuth),
    /// What access is asked for with.
    Identity(Secret),
}

/// The name that docker's helpers tell an identity token with.
const IS_TOKEN: &str = "<token>";

/// What such a file holds.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct AuthFile {
    auths: BTreeMap<String, Entry>,
    cred_helpers: BTreeMap<String, String>,
    creds_store: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "lowercase", default)]
struct Entry {
    auth: Option<Secret>,
    username: Option<String>,
    password: Option<Secret>,
    identitytoken: Option<Secret>,
    registrytoken: Option<Secret>,
}

/// What a helper answers.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Answer {
    username: String,
    secret: Secret,
}

/// The credentials for a repository, or nobody. `file` alone is asked if it is given.
pub(crate) fn find(registry: &str, repository: &str, file: Option<&Path>) -> Result<Login> {
    let named = file.map(Path::to_owned).or_else(|| env::var_os("REGISTRY_AUTH_FILE").map(PathBuf::from));
    let files = match &named {
        Some(file) => vec![file.clone()],
        None => usual_files(),
    };
    for path in files {
        let content = match std::fs::read(&path) {
            Ok(content) => content,
            Err(e) if e.kind() == io::ErrorKind::NotFound && named.is_none() => continue,
            Err(e) => return Err(e).with_context(|| format!("read the credentials in {}", path.display())),
        };
        let parsed: AuthFile = match serde_json::from_slice(&content) {
            Ok(parsed) => parsed,
            // serde's own text might show a part of it.
            Err(e) => bail!("the credentials in {} are no such file (line {})", path.display(), e.line()),
        };
        let found = look_in(&parsed, registry, repository);
        if let Some(auth) = found.with_context(|| format!("credentials in {}", path.display()))? {
            log::debug!("credentials for {registry} are from {}", path.display());
            return Ok(auth);
        }
    }
    Ok(Login::Plain(RegistryAuth::Anonymous))
}

/// Where docker and podman keep them, in podman's order.
fn usual_files() -> Vec<PathBuf> {
    let var = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let home = var("HOME");
    let mut files = Vec::new();
    match var("XDG_RUNTIME_DIR") {
        Some(dir) => files.push(dir.join("containers/auth.json")),
        None => files.push(format!("/run/containers/{}/auth.json", rustix::process::getuid().as_raw()).into()),
    }
    files.extend(
        var("XDG_CONFIG_HOME")
            .or_else(|| home.as_ref().map(|home| home.join(".config")))
            .map(|dir| dir.join("containers/auth.json")),
    );
    files.extend(
        var("DOCKER_CONFIG")
            .or_else(|| home.as_ref().map(|home| home.join(".docker")))
            .map(|dir| dir.join("config.json")),
    );
    files
}

fn look_in(file: &AuthFile, registry: &str, repository: &str) -> Result<Option<Login>> {
    // The most exact first: host/a/b, host/a, host.
    let mut keys = vec![format!("{registry}/{repository}")];
    while let Some((shorter, _)) = keys.last().and_then(|key| key.rsplit_once('/')) {
        keys.push(shorter.to_owned());
    }
    // docker keeps those of its usual registry by the address of an interface that is gone.
    let usual = Reference::try_from("any").context("find the usual registry")?;
    let mut asked = registry.to_owned();
    if registry == usual.registry() {
        keys.push(usual.resolve_registry().to_owned());
        asked = format!("https://{}/v1/", usual.resolve_registry());
    }
    if let Some(helper) = keys.iter().find_map(|key| file.cred_helpers.get(key)) {
        // It may know nobody there, and the image may be everybody's.
        return ask(helper, &asked);
    }
    let entry = keys.iter().find_map(|key| {
        file.auths.iter().find(|(stored, _)| plain(stored) == *key || *stored == key).map(|(_, entry)| entry)
    });
    if let Some(entry) = entry
        && let Some(auth) = of_entry(entry, registry)?
    {
        return Ok(Some(auth));
    }
    match &file.creds_store {
        // It is asked for all, and may know nobody.
        Some(helper) => Ok(ask(helper, &asked).ok().flatten()),
        None => Ok(None),
    }
}

/// docker writes some keys as addresses: `https://host/v1/`.
fn plain(key: &str) -> &str {
    match key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")) {
        Some(rest) => rest.split('/').next().unwrap_or(rest),
        None => key,
    }
}

fn of_entry(entry: &Entry, registry: &str) -> Result<Option<Login>> {
    let given = |token: &Option<Secret>| token.clone().filter(|token| !token.0.is_empty());
    if let Some(token) = given(&entry.registrytoken) {
        return Ok(Some(Login::Plain(RegistryAuth::Bearer(token.0))));
    }
    // It comes before a password, which docker leaves empty beside it.
    if let Some(token) = given(&entry.identitytoken) {
        return Ok(Some(Login::Identity(token)));
    }
    if let Some(auth) = given(&entry.auth) {
        let decoded = STANDARD.decode(auth.0).ok().and_then(|bytes| String::from_utf8(bytes).ok());
        let pair = decoded.as_deref().and_then(|text| text.split_once(':'));
        let (user, password) = pair.with_context(|| format!("those for {registry} are no base64 of NAME:PASSWORD"))?;
        return Ok(Some(Login::Plain(RegistryAuth::Basic(user.into(), password.trim_end_matches('\0').into()))));
    }
    Ok(match (&entry.username, &entry.password) {
        (Some(user), Some(password)) => Some(Login::Plain(RegistryAuth::Basic(user.clone(), password.0.clone()))),
        _ => None,
    })
}

/// Asks a program as docker does: `docker-credential-NAME get`, with the registry on its standard input.
fn ask(helper: &str, registry: &str) -> Result<Option<Login>> {
    ensure!(!helper.is_empty() && !helper.contains('/'), "the credential helper {helper:?} is no program's name");
    let program = format!("docker-credential-{helper}");
    let mut command = Command::new(&program);
    command.arg("get").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().with_context(|| format!("run the credential helper {program}"))?;
    if let Some(mut input) = child.stdin.take() {
        // It may not read it all.
        let _ = input.write_all(registry.as_bytes());
    }
    let output = child.wait_with_output().with_context(|| format!("run the credential helper {program}"))?;
    if !output.status.success() {
        log::warn!("{program} has no credentials for {registry} ({}): the pull goes on without", output.status);
        return Ok(None);
    }
    // What it says is secret, also where it is no answer.
    let answer: Option<Answer> = serde_json::from_slice(&output.stdout).ok();
    let answer = answer.with_context(|| format!("{program} gave no answer that can be read"))?;
    Ok(Some(match answer.username.as_str() {
        IS_TOKEN => Login::Identity(answer.secret),
        _ => Login::Plain(RegistryAuth::Basic(answer.username, answer.secret.0)),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(file: &str, registry: &str, repository: &str) -> Option<Login> {
        look_in(&serde_json::from_str(file).unwrap(), registry, repository).unwrap()
    }

    fn basic(user: &str, password: &str) -> Option<Login> {
        Some(Login::Plain(RegistryAuth::Basic(user.into(), password.into())))
    }

    #[test]
    fn the_most_exact_entry_is_taken() {
        let [host, team] = ["me:pass:word", "team:x"].map(|text| STANDARD.encode(text));
        let file = format!(
            r#"{{"auths":{{"reg.example:5000":{{"auth":"{host}"}},"reg.example:5000/team":{{"auth":"{team}"}},
                "https://old.example/v1/":{{"auth":"{host}"}},"empty.example":{{}},
                "two.example":{{"username":"a","password":"b"}}}}}}"#
        );
        assert_eq!(found(&file, "reg.example:5000", "tool"), basic("me", "pass:word"));
        assert_eq!(found(&file, "reg.example:5000", "team/tool"), basic("team", "x"));
        assert_eq!(found(&file, "reg.example:5000", "teams/tool"), basic("me", "pass:word"));
        assert_eq!(found(&file, "old.example", "tool"), basic("me", "pass:word"));
        assert_eq!(found(&file, "two.example", "tool"), basic("a", "b"));
        assert_eq!(found(&file, "empty.example", "tool"), None);
        assert_eq!(found(&file, "reg.example", "tool"), None);
    }

    #[test]
    fn the_usual_registry_is_found_by_dockers_old_address() {
        let usual = Reference::try_from("any").unwrap();
        let auth = STANDARD.encode("me:secret");
        let file = format!(r#"{{"auths":{{"https://{}/v1/":{{"auth":"{auth}"}}}}}}"#, usual.resolve_registry());
        assert_eq!(found(&file, usual.registry(), "library/any"), basic("me", "secret"));
        assert_eq!(found(&file, "reg.example", "library/any"), None);
    }

    #[test]
    fn an_identity_token_is_found_before_a_password_and_is_not_shown() {
        let auth = STANDARD.encode("00000000-0000-0000-0000-000000000000:");
        let file = format!(r#"{{"auths":{{"a.example":{{"auth":"{auth}","identitytoken":"secretsecret"}}}}}}"#);
        let login = found(&file, "a.example", "tool").unwrap();
        assert_eq!(login, Login::Identity(Secret("secretsecret".into())));
        assert!(!format!("{login:?}").contains("secretsecret"));
    }

    #[test]
    fn what_cannot_be_used_is_refused_without_being_shown() {
        for file in [
            r#"{"auths":{"a.example":{"auth":"secretsecret!"}}}"#,
            r#"{"credHelpers":{"a.example":"../secretsecret"}}"#,
            r#"{"credHelpers":{"a.example":"runx-no-such-helper"}}"#,
        ] {
            let e = look_in(&serde_json::from_str(file).unwrap(), "a.example", "tool").unwrap_err();
            let text = format!("{e:#}");
            assert!(!text.contains("secretsecret") || text.contains("helper"), "{text}");
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("auth.json");
        std::fs::write(&path, r#"{"auths":{"a.example":{"auth":secretsecret}}}"#).unwrap();
        let e = find("a.example", "tool", Some(&path)).unwrap_err();
        assert!(!format!("{e:#}").contains("secret"), "{e:#}");
        assert!(find("a.example", "tool", Some(Path::new("/nonexistent/auth.json"))).is_err());
    }
}
