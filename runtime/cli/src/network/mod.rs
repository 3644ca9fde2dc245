//! A container's network: none, the host's, another container's, or a bridge of the host.
//!
//! For a bridge the network namespace is made before the container and kept by a file, and the distribution's CNI plugins
//! connect it. What they made is on disk, so that anybody can detach the container, also after this process, the container or
//! its watcher was killed at any moment.

mod bridge;
mod cni;
pub(crate) mod command;
pub(crate) mod files;
mod firewall;
mod netns;
mod place;
pub(crate) mod ports;
mod settings;
mod subnet;

use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result, bail};
use runx_core::container::Runtime;

use ports::Port;
pub(crate) use settings::Settings;

/// Which network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Nothing but a loopback interface.
    None,
    /// The host's.
    Host,
    /// That of a container that runs.
    Container(String),
    /// A bridge of the host.
    Bridge,
}

impl FromStr for Kind {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "none" => Ok(Self::None),
            "host" => Ok(Self::Host),
            "bridge" | "default" => Ok(Self::Bridge),
            _ => match text.strip_prefix("container:") {
                Some(id) if !id.is_empty() => Ok(Self::Container(id.to_owned())),
                _ => bail!("invalid --network {text:?}: it is bridge, none, host or container:ID"),
            },
        }
    }
}

/// What is asked for.
#[derive(Clone, Debug)]
pub(crate) struct NetworkOptions<'a> {
    pub(crate) kind: Kind,
    /// Ports to publish, which takes a bridge.
    pub(crate) ports: Vec<Port>,
    pub(crate) settings: &'a Settings,
}

/// The network namespace for a container's config.json.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Namespace {
    /// The caller's: there is no entry for it.
    Host,
    /// A new one: an entry without a path.
    New,
    /// The one of this path.
    Path(PathBuf),
}

/// An address and the length of its network's prefix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Address {
    pub(crate) address: IpAddr,
    pub(crate) prefix: u8,
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

/// What a container got.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Attached {
    pub(crate) namespace: Namespace,
    pub(crate) addresses: Vec<Address>,
    pub(crate) gateway: Option<IpAddr>,
    /// Name servers that the network has, if it says.
    pub(crate) dns: Vec<String>,
    /// Published ports, with those of the host that were chosen.
    pub(crate) ports: Vec<Port>,
}

impl Attached {
    fn without_addresses(namespace: Namespace) -> Self {
        Self { namespace, addresses: Vec::new(), gateway: None, dns: Vec::new(), ports: Vec::new() }
    }
}

/// Gives container `id` its network, before it is created. What is on disk of an attached one is below the runtime's root. To
/// be undone by [`detach`], whatever becomes of the container; a failure leaves nothing to undo.
///
/// # Errors
/// With what is missing and how to get it, what is not free, or what a plugin said.
pub(crate) fn attach(runtime: &Runtime, id: &str, options: &NetworkOptions<'_>) -> Result<Attached> {
    if options.kind != Kind::Bridge && !options.ports.is_empty() {
        let why = match &options.kind {
            Kind::Host => "with the host's network its ports are the host's already",
            Kind::Container(_) => "they belong to the container whose network it is",
            _ => "the container has no network that they could be reached by",
        };
        bail!("--publish takes --network bridge: {why}");
    }
    match &options.kind {
        Kind::None => Ok(Attached::without_addresses(Namespace::New)),
        Kind::Host => Ok(Attached::without_addresses(Namespace::Host)),
        Kind::Container(other) => {
            join(runtime, other).with_context(|| format!("use the network of container {other:?}"))
        }
        Kind::Bridge => bridge::attach(runtime.root(), id, &options.ports, options.settings)
            .with_context(|| format!("attach container {id:?} to bridge {}", options.settings.bridge)),
    }
}

fn join(runtime: &Runtime, other: &str) -> Result<Attached> {
    let container = runtime.load(other)?;
    let pid = container.pid().context("it does not run: start it first")?;
    match (place::netns(runtime.root(), other), place::peek(runtime.root(), other)?) {
        (Some(file), Some(record)) => {
            let result = record.attachment.result.as_ref();
            Ok(Attached { namespace: Namespace::Path(file), ..bridge::describe(result.unwrap_or_default()) })
        }
        _ => Ok(Attached::without_addresses(Namespace::Path(PathBuf::from(format!("/proc/{pid}/ns/net"))))),
    }
}

/// Takes a container's network away: addresses, ports, and the namespace. One without is fine, and so is a second time.
///
/// # Errors
/// With what could not be removed; what is known of the container stays then, for another try.
pub(crate) fn detach(root: &Path, id: &str) -> Result<()> {
    bridge::detach(root, id)
}

/// Removes the bridge and its rules, if no container uses it. Whether there was one.
///
/// # Errors
/// With the containers that use it.
pub(crate) fn prune(settings: &Settings) -> Result<bool> {
    bridge::prune(settings)
}

/// The ids below `root` that have something to detach.
pub(crate) fn all(root: &Path) -> Result<Vec<String>> {
    place::Place::all(root)
}

/// What container `id` was given, while it is attached to a bridge.
pub(crate) fn of(root: &Path, id: &str) -> Result<Option<Attached>> {
    let Some(record) = place::peek(root, id)? else { return Ok(None) };
    let namespace = place::netns(root, id).map_or(Namespace::New, Namespace::Path);
    let result = record.attachment.result.as_ref();
    Ok(Some(Attached { namespace, ports: record.ports.clone(), ..bridge::describe(result.unwrap_or_default()) }))
}

/// Whether what an attached container was given is still as it was.
///
/// # Errors
/// With what is not.
pub(crate) fn check(root: &Path, id: &str) -> Result<()> {
    let place =
        place::Place::open(root, id, false)?.with_context(|| format!("container {id:?} is attached to no bridge"))?;
    let record = place.record()?.filter(|record| record.complete);
    let record = record.with_context(|| format!("container {id:?} was never attached completely: detach it"))?;
    bridge::check(&place, &record).with_context(|| format!("check the network of container {id:?}"))
}
