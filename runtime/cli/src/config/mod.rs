//! The config file: what the flags of a machine's commands would otherwise have to say each time.
//!
//! `/etc/runx/config.toml` is for all; for somebody who is not root his own `~/.config/runx/config.toml` comes over it, key by
//! key. A command without a file pays for the question whether there is one.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::arguments::{LogFormat, bytes, is_root};
use crate::network;

/// The machine's file.
const OF_MACHINE: &str = "/etc/runx/config.toml";

/// What the files say, with the defaults of what they do not. Names are those of the flags.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct Config {
    /// As `--root`.
    pub(crate) root: Option<PathBuf>,
    /// As `--storage-root`.
    pub(crate) storage_root: Option<PathBuf>,
    /// As `--log`.
    pub(crate) log: Option<PathBuf>,
    /// As `--log-format`.
    pub(crate) log_format: Option<LogFormat>,
    /// As `--systemd-cgroup`.
    pub(crate) systemd_cgroup: bool,
    /// `[images]`.
    pub(crate) images: Images,
    /// `[network]`.
    pub(crate) network: network::Settings,
    /// `[container]`.
    pub(crate) container: Container,
    /// The files that were read, in order.
    #[serde(skip)]
    pub(crate) files: Vec<PathBuf>,
}

/// Where images come from.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct Images {
    /// The registry of names that name none.
    pub(crate) default_registry: Option<String>,
    /// How to speak to some registries, by HOST or HOST:PORT.
    pub(crate) registries: BTreeMap<String, Registry>,
}

/// How to speak to a registry.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct Registry {
    /// By HTTP, or by HTTPS without a look at its certificate.
    pub(crate) insecure: bool,
    /// File with the certificates, in PEM, of authorities that it is trusted by beside the system's.
    pub(crate) ca: Option<PathBuf>,
}

/// What `runx container run` and `create` do unless their flags say otherwise.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct Container {
    /// As `--network`.
    pub(crate) network: Option<String>,
    /// As `--memory`, in bytes.
    #[serde(deserialize_with = "size")]
    pub(crate) memory: Option<i64>,
    /// As `--cpus`.
    pub(crate) cpus: Option<f64>,
    /// As `--pids-limit`.
    pub(crate) pids_limit: Option<i64>,
    /// `[container.log]`, as `--log-opt`.
    pub(crate) log: Log,
}

/// What is kept of a container's output.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct Log {
    /// The size of a file after which the next one begins, in bytes.
    #[serde(deserialize_with = "size")]
    pub(crate) max_size: Option<i64>,
    /// How many files are kept.
    pub(crate) max_file: Option<u32>,
}

/// A number of bytes, with b, k, m or g.
fn size<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Option<i64>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "a number of bytes, or text such as \"512m\"")]
    enum Size {
        Number(i64),
        Text(String),
    }
    match Size::deserialize(from)? {
        Size::Number(number) => Ok(Some(number)),
        Size::Text(text) => bytes(&text).map(Some).map_err(|e| serde::de::Error::custom(format!("{e:#}"))),
    }
}

impl Config {
    /// Reads `file`, or if none is named those of the machine and of the user, as far as they are there.
    ///
    /// # Errors
    /// With the file, the line, and what is wrong there.
    pub(crate) fn load(file: Option<&Path>) -> Result<Self> {
        let read = |path: &Path| match fs::read_to_string(path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound && file.is_none() => Ok(None),
            // The environment may name another user's home.
            Err(_) if file.is_none() && is_denied(fs::metadata(path)) => Ok(None),
            other => other.map(Some).with_context(|| format!("read config file {}", path.display())),
        };
        let paths = file.map_or_else(usual_files, |file| vec![file.to_owned()]);
        let mut texts = Vec::new();
        for path in paths {
            if let Some(text) = read(&path)? {
                texts.push((path, text));
            }
        }
        Self::of(&texts)
    }

    /// The config that these files make together, later ones over earlier ones.
    fn of(texts: &[(PathBuf, String)]) -> Result<Self> {
        let mut config = Self::default();
        for (path, text) in texts {
            config = toml::from_str(text).map_err(|e| mistake(path, text, &e))?;
            config.validate().with_context(|| format!("config file {}", path.display()))?;
        }
        if texts.len() > 1 {
            let mut merged = toml::Table::new();
            for (path, text) in texts {
                put_over(&mut merged, toml::from_str(text).map_err(|e| mistake(path, text, &e))?);
            }
            config = Self::deserialize(merged).context("put the config files together")?;
        }
        config.files = texts.iter().map(|(path, _)| path.clone()).collect();
        Ok(config)
    }

    /// Refuses what has the right form and no sense.
    fn validate(&self) -> Result<()> {
        for (key, path) in [("root", &self.root), ("storage-root", &self.storage_root), ("log", &self.log)] {
            let Some(path) = path else { continue };
            if !path.is_absolute() || path.parent().is_none() {
                bail!("{key} = {path:?}: it is an absolute path, and not /");
            }
        }
        self.network.validate()?;
        if let Some(network) = &self.container.network {
            network.parse::<network::Kind>().context("container.network")?;
        }
        let container = &self.container;
        if container.memory.is_some_and(|memory| memory <= 0) || container.log.max_size.is_some_and(|size| size <= 0) {
            bail!("container.memory and container.log.max-size are greater than 0");
        }
        if container.cpus.is_some_and(|cpus| !cpus.is_finite() || cpus <= 0.0) {
            bail!("container.cpus is greater than 0");
        }
        if container.pids_limit == Some(0) || container.log.max_file == Some(0) {
            bail!("container.pids-limit and container.log.max-file are not 0");
        }
        for (name, registry) in &self.images.registries {
            if name.is_empty() || name.contains('/') {
                bail!("images.registries: {name:?} is no HOST or HOST:PORT");
            }
            if registry.insecure && registry.ca.is_some() {
                bail!("images.registries.{name:?} is insecure and has a ca: one of them has no effect");
            }
            if registry.ca.as_ref().is_some_and(|ca| !ca.is_absolute()) {
                bail!("images.registries.{name:?}: the path of ca is not absolute");
            }
        }
        Ok(())
    }
}

fn is_denied<T>(result: std::io::Result<T>) -> bool {
    result.is_err_and(|e| e.kind() == std::io::ErrorKind::PermissionDenied)
}

/// The machine's, and that of a user who is not root.
fn usual_files() -> Vec<PathBuf> {
    let mut files = vec![PathBuf::from(OF_MACHINE)];
    let own = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    if !is_root() {
        let directory = own("XDG_CONFIG_HOME").or_else(|| own("HOME").map(|home| home.join(".config")));
        files.extend(directory.map(|directory| directory.join("runx/config.toml")));
    }
    files
}

/// Key by key; a table goes into a table.
fn put_over(under: &mut toml::Table, over: toml::Table) {
    for (key, value) in over {
        match (under.get_mut(&key), value) {
            (Some(toml::Value::Table(under)), toml::Value::Table(over)) => put_over(under, over),
            (_, value) => {
                under.insert(key, value);
            }
        }
    }
}

/// What is wrong, and in which line.
fn mistake(path: &Path, text: &str, error: &toml::de::Error) -> anyhow::Error {
    let line = error.span().map(|span| text[..span.start.min(text.len())].matches('\n').count() + 1);
    let line = line.map(|line| format!(", line {line}")).unwrap_or_default();
    anyhow::anyhow!("config file {}{line}: {}", path.display(), error.message().trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(texts: &[&str]) -> Result<Config> {
        let texts: Vec<_> = texts.iter().map(|text| (PathBuf::from("/c.toml"), (*text).to_owned())).collect();
        Config::of(&texts)
    }

    #[test]
    fn the_documented_example_is_read_and_knows_every_key() {
        let example = include_str!("../../../../docs/config.toml");
        of(&[example]).unwrap();
        // With everything that is commented out, as well.
        let setting = |line: &&str| line.contains(" = ") || line.starts_with('[');
        let lines = example.lines().map(|line| line.strip_prefix("#").unwrap_or(line)).filter(setting);
        let all = lines.collect::<Vec<_>>().join("\n");
        let config = of(&[&all]).unwrap();
        assert_eq!(config.container.log.max_size, Some(10 << 20));
        assert!(config.root.is_some() && config.network.subnet.is_some() && !config.images.registries.is_empty());
        // The keys are those of the structures: what serde names when it meets one that it does not know.
        let table: toml::Table = toml::from_str(&all).unwrap();
        for (place, text) in [
            (None, "nope = 1".to_owned()),
            (Some("images"), "[images]\nnope = 1".to_owned()),
            (Some("network"), "[network]\nnope = 1".to_owned()),
            (Some("container"), "[container]\nnope = 1".to_owned()),
        ] {
            let error = of(&[&text]).unwrap_err().to_string();
            let table = place.map_or(&table, |place| table[place].as_table().unwrap());
            let known = error.split("expected").nth(1).unwrap().split('`').skip(1).step_by(2);
            for key in known {
                assert!(table.contains_key(key), "{key} of {place:?} is not in docs/config.toml");
            }
        }
    }

    #[test]
    fn mistakes_are_told_with_their_line() {
        for (text, words) in [
            ("root = \"/r\"\n\n[network]\nbrigde = \"x\"\n", &["line 4", "brigde", "bridge"][..]),
            ("[network]\nsubnet = \"10.0.0.1/24\"", &["line 2", "10.0.0.0/24"]),
            ("root = ", &["line 1"]),
            ("root = \"here\"", &["root", "absolute"]),
            ("root = \"/\"", &["root"]),
            ("log-format = \"xml\"", &["line 1", "xml", "text", "json"]),
            ("[container]\nmemory = \"many\"", &["line 2", "many"]),
            ("[container]\nmemory = true", &["line 2", "512m"]),
            ("[container]\nnetwork = \"vlan\"", &["container.network", "vlan"]),
            ("[container]\ncpus = 0.0", &["container.cpus"]),
            ("[images.registries.\"a\"]\ninsecure = true\nca = \"/x\"", &["insecure"]),
            ("[network]\nbridge = \"../x\"", &["network.bridge"]),
        ] {
            let error = format!("{:#}", of(&[text]).unwrap_err());
            for word in [&["/c.toml"], words].concat() {
                assert!(error.contains(word), "{word} is not in: {error}");
            }
        }
    }

    #[test]
    fn a_users_file_comes_over_the_machines_key_by_key() {
        let machine =
            "root = \"/a\"\n[network]\nbridge = \"b0\"\nmtu = 1400\n[images.registries.\"x:5000\"]\ninsecure = true\n";
        let user = "root = \"/b\"\n[network]\nmtu = 9000\n[images.registries.y]\nca = \"/ca.pem\"\n";
        let config = of(&[machine, user]).unwrap();
        assert_eq!((config.root.as_deref(), config.network.mtu), (Some(Path::new("/b")), Some(9000)));
        assert_eq!(config.network.bridge, "b0");
        assert_eq!(config.images.registries.len(), 2);
        assert_eq!(config.files.len(), 2);
    }
}
