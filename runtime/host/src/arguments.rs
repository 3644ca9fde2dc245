//! What this program is told, by `runx wasm` or by the container's process.

use std::ffi::{OsStr, OsString};
use std::io::{Read, Seek};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use runx_wasm::engine::{Backend, Kind};
use runx_wasm::launch;

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verb {
    /// Run a command to its end.
    Run,
    /// Answer HTTP requests.
    Serve,
    /// Print what it imports and exports.
    Inspect,
}

/// A directory of the host that a module sees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Directory {
    pub(crate) host: String,
    pub(crate) guest: String,
    pub(crate) read_only: bool,
}

/// All of it.
#[derive(Debug)]
pub(crate) struct Arguments {
    pub(crate) verb: Verb,
    /// In a container everything of this process is the module's: its directories, its environment, its network.
    pub(crate) in_container: bool,
    pub(crate) artifact: OwnedFd,
    pub(crate) kind: Kind,
    pub(crate) backend: Backend,
    /// Where a server's metrics are.
    pub(crate) metrics: Option<SocketAddr>,
    pub(crate) fuel: Option<u64>,
    pub(crate) memory: Option<usize>,
    pub(crate) timeout: Option<Duration>,
    pub(crate) directories: Vec<Directory>,
    pub(crate) env: Vec<(String, String)>,
    pub(crate) invoke: Option<String>,
    pub(crate) network: bool,
    /// Ports that it may listen on without the rest of the network.
    pub(crate) ports: Vec<u16>,
    pub(crate) address: SocketAddr,
    /// The module's arguments, of which the first names it.
    pub(crate) args: Vec<String>,
}

impl Arguments {
    /// A copy, for a place that outlives this one.
    pub(crate) fn try_clone(&self) -> Result<Self> {
        Ok(Self {
            artifact: self.artifact.try_clone().context("duplicate the artifact's descriptor")?,
            directories: self.directories.clone(),
            env: self.env.clone(),
            invoke: self.invoke.clone(),
            args: self.args.clone(),
            ports: self.ports.clone(),
            ..*self
        })
    }
}

/// Where a component in a container listens, as `host:port`.
const ADDRESS_VARIABLE: &str = "RUNX_HTTP_ADDR";

/// Where its metrics are, as `host:port`; nowhere by default.
const METRICS_VARIABLE: &str = "RUNX_METRICS_ADDR";

const DEFAULT_ADDRESS: &str = "0.0.0.0:8080";

const USAGE: &str =
    "usage: runx-wasm-host ARTIFACT_FD ARG0 [ARG]... | run|serve|inspect --artifact FD [FLAG]... -- ARG0 [ARG]...";

/// Reads the command line.
pub(crate) fn parse(words: impl Iterator<Item = OsString>) -> Result<Arguments> {
    let mut words = words.map(|word| word.to_string_lossy().into_owned());
    let first = words.next().context(USAGE)?;
    let verb = match first.as_str() {
        "run" => Verb::Run,
        "serve" => Verb::Serve,
        "inspect" => Verb::Inspect,
        number => return in_container(number, words.collect()),
    };
    let mut out = Flags::default();
    while let Some(flag) = words.next() {
        if flag == "--" {
            break;
        }
        let value = words.next().with_context(|| format!("{flag} needs a value"))?;
        out.set(&flag, value)?;
    }
    let args: Vec<String> = words.collect();
    ensure!(!args.is_empty(), USAGE);
    Ok(Arguments {
        verb,
        in_container: false,
        artifact: descriptor(&out.artifact)?,
        kind: out.kind.context("--kind is missing")?,
        backend: out.backend,
        metrics: out.metrics,
        fuel: out.fuel,
        memory: out.memory,
        timeout: out.timeout,
        directories: out.directories,
        env: out.env,
        invoke: out.invoke,
        network: out.network,
        ports: out.ports,
        address: out.address.unwrap_or(DEFAULT_ADDRESS.parse()?),
        args,
    })
}

/// As the last step of a container, the words are those of `runx-wasm-runner`.
fn in_container(number: &str, args: Vec<String>) -> Result<Arguments> {
    ensure!(!args.is_empty(), USAGE);
    let address = match std::env::var(ADDRESS_VARIABLE) {
        Ok(text) => text.parse().with_context(|| format!("{ADDRESS_VARIABLE}={text} is no address and port"))?,
        Err(_) => DEFAULT_ADDRESS.parse()?,
    };
    let metrics = match std::env::var(METRICS_VARIABLE) {
        Ok(text) => Some(text.parse().with_context(|| format!("{METRICS_VARIABLE}={text} is no address and port"))?),
        Err(_) => None,
    };
    let env = std::env::vars_os().map(|(key, value)| (lossy(key), lossy(value))).collect();
    let launch =
        launch::parse(OsStr::new(number)).with_context(|| format!("{number:?} names no open descriptor\n{USAGE}"))?;
    Ok(Arguments {
        verb: Verb::Run,
        in_container: true,
        artifact: launch.artifact,
        kind: launch.kind,
        backend: launch.backend,
        metrics,
        fuel: launch.fuel,
        memory: launch.memory.and_then(|memory| usize::try_from(memory).ok()),
        timeout: launch.timeout,
        directories: Vec::new(),
        env,
        invoke: launch.invoke,
        network: true,
        ports: Vec::new(),
        address,
        args,
    })
}

fn lossy(text: OsString) -> String {
    text.to_string_lossy().into_owned()
}

#[derive(Default)]
struct Flags {
    artifact: String,
    kind: Option<Kind>,
    backend: Backend,
    metrics: Option<SocketAddr>,
    fuel: Option<u64>,
    memory: Option<usize>,
    timeout: Option<Duration>,
    directories: Vec<Directory>,
    env: Vec<(String, String)>,
    invoke: Option<String>,
    network: bool,
    ports: Vec<u16>,
    address: Option<SocketAddr>,
}

impl Flags {
    fn set(&mut self, flag: &str, value: String) -> Result<()> {
        let number = || value.parse::<u64>().with_context(|| format!("{flag} {value:?} is no number"));
        match flag {
            "--artifact" => self.artifact = value,
            "--kind" => {
                self.kind = Some(match value.as_str() {
                    "module" => Kind::Module,
                    "component" => Kind::Component,
                    _ => bail!("--kind {value:?} is neither module nor component"),
                });
            }
            "--engine" if value == "pulley" => self.backend = Backend::Pulley,
            "--metrics" => {
                self.metrics =
                    Some(value.parse().with_context(|| format!("--metrics {value:?} is no address and port"))?);
            }
            "--fuel" => self.fuel = Some(number()?),
            "--memory" => self.memory = Some(usize::try_from(number()?).context("--memory is too large")?),
            "--timeout" => self.timeout = Some(Duration::from_millis(number()?)),
            "--dir" => self.directories.push(directory(&value)?),
            "--env-fd" => self.env = environment(&value)?,
            "--invoke" => self.invoke = Some(value),
            "--port" => self.ports.push(value.parse().with_context(|| format!("--port {value:?} is no port"))?),
            "--network" => self.network = value == "host",
            "--addr" => {
                self.address = Some(value.parse().with_context(|| format!("--addr {value:?} is no address and port"))?);
            }
            _ => bail!("{flag:?} is unknown\n{USAGE}"),
        }
        Ok(())
    }
}

/// Variables from a file of our starter's, each ended by a NUL. They may be secrets, and everybody can read arguments.
fn environment(number: &str) -> Result<Vec<(String, String)>> {
    let mut text = String::new();
    let mut file = std::fs::File::from(descriptor(number)?);
    file.rewind().and_then(|()| file.read_to_string(&mut text)).context("read the environment")?;
    let variables = text.split_terminator('\0').filter_map(|variable| variable.split_once('='));
    Ok(variables.map(|(key, value)| (key.to_owned(), value.to_owned())).collect())
}

/// `HOST::GUEST[:ro]`.
fn directory(text: &str) -> Result<Directory> {
    let (rest, read_only) = text.strip_suffix(":ro").map_or((text, false), |rest| (rest, true));
    let (host, guest) = rest.split_once("::").unwrap_or((rest, rest));
    ensure!(!host.is_empty() && !guest.is_empty(), "--dir {text:?} is not HOST::GUEST[:ro]");
    Ok(Directory { host: host.to_owned(), guest: guest.to_owned(), read_only })
}

fn descriptor(text: &str) -> Result<OwnedFd> {
    let launch =
        launch::parse(OsStr::new(text)).with_context(|| format!("{text:?} names no open descriptor\n{USAGE}"))?;
    Ok(launch.artifact)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_may_be_read_only() {
        let parsed = directory("/srv/data::/data:ro").unwrap();
        assert_eq!(parsed, Directory { host: "/srv/data".into(), guest: "/data".into(), read_only: true });
        let same = directory("/srv").unwrap();
        assert_eq!((same.host.as_str(), same.guest.as_str(), same.read_only), ("/srv", "/srv", false));
        assert!(directory("::/x").is_err());
        assert!(directory("").is_err());
    }

    #[test]
    fn what_is_no_descriptor_is_refused() {
        for bad in ["", "1", "x", "99999"] {
            assert!(descriptor(bad).is_err(), "{bad}");
        }
    }
}
