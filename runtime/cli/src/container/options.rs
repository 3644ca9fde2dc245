//! What a container is to be: all that `create` and `run` were told, kept in its record.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::network::Kind;
use crate::network::ports::Port;

/// What the flags of `create` and `run` ask for.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Options {
    /// The image's name as it was given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) image: Option<String>,
    /// A directory to be the root filesystem, instead of an image.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) rootfs: Option<PathBuf>,
    /// Where its config.json is, if not with the record.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) bundle: Option<PathBuf>,
    /// That config.json was there already and is taken as it is.
    pub(crate) given_configuration: bool,
    /// Its command, or the arguments of the entrypoint.
    pub(crate) command: Vec<String>,
    /// What is executed instead of the image's entrypoint; an empty list for none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) entrypoint: Option<Vec<String>>,
    pub(crate) tty: bool,
    /// Standard input stays open.
    pub(crate) interactive: bool,
    /// Standard input ends with that of the one who is attached; else it stays open for the next.
    pub(crate) stdin_once: bool,
    /// It is removed at its end.
    pub(crate) auto_remove: bool,
    pub(crate) env: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) cwd: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) user: Option<String>,
    pub(crate) groups: Vec<String>,
    pub(crate) mounts: Vec<Mount>,
    pub(crate) read_only: bool,
    pub(crate) limits: Limits,
    /// Name, soft and hard limit.
    pub(crate) ulimits: Vec<(String, u64, u64)>,
    pub(crate) cap_add: Vec<String>,
    pub(crate) cap_drop: Vec<String>,
    pub(crate) security: Security,
    pub(crate) privileged: bool,
    pub(crate) devices: Vec<Device>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) hostname: Option<String>,
    pub(crate) network: Network,
    pub(crate) publish: Vec<Port>,
    pub(crate) dns: Vec<String>,
    pub(crate) dns_search: Vec<String>,
    /// Host names and their addresses.
    pub(crate) hosts: Vec<(String, String)>,
    pub(crate) restart: Restart,
    pub(crate) annotations: Vec<(String, String)>,
    pub(crate) labels: Vec<(String, String)>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) stop_signal: Option<String>,
    /// Seconds until what does not stop is killed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) stop_timeout: Option<u64>,
    /// The size of /dev/shm in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) shm_size: Option<i64>,
    pub(crate) sysctls: Vec<(String, String)>,
    pub(crate) log: LogOptions,
}

impl Options {
    /// How long `stop` waits, docker's default.
    pub(crate) fn stop_timeout(&self) -> Duration {
        Duration::from_secs(self.stop_timeout.unwrap_or(10))
    }
}

/// Limits on what it uses.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Limits {
    /// Bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) memory: Option<i64>,
    /// Bytes of memory and swap together; -1 for no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) memory_swap: Option<i64>,
    /// Bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) memory_reservation: Option<i64>,
    /// Processors, in thousandths.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) cpus: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) cpu_shares: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) cpuset_cpus: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) cpuset_mems: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) pids: Option<i64>,
}

/// What is mounted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Mount {
    pub(crate) kind: MountKind,
    /// A path of the host, or a volume's name; empty for a volume without one, and a tmpfs.
    pub(crate) source: String,
    pub(crate) target: String,
    /// As in config.json.
    pub(crate) options: Vec<String>,
    /// Make the host's directory if it is not there, as `-v` does.
    #[serde(default)]
    pub(crate) make: bool,
    /// Fill a new volume with what the image has there.
    #[serde(default)]
    pub(crate) fill: bool,
}

/// Kinds of mounts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum MountKind {
    /// A path of the host.
    Bind,
    /// A directory below the storage root.
    Volume,
    /// Memory.
    Tmpfs,
}

/// A device of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Device {
    pub(crate) source: PathBuf,
    pub(crate) target: PathBuf,
    /// Of `rwm`.
    pub(crate) access: String,
}

/// `--security-opt`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Security {
    pub(crate) seccomp: Seccomp,
    /// A profile's name, or `unconfined`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) apparmor: Option<String>,
    pub(crate) no_new_privileges: bool,
    /// An SELinux label of its processes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) label: Option<String>,
}

/// Which system calls are allowed.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Seccomp {
    /// The usual profile.
    #[default]
    Default,
    /// All.
    Unconfined,
    /// What a file says, which was read when the container was created.
    Profile(serde_json::Value),
}

/// `--network`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Network {
    /// A bridge, with published ports.
    #[default]
    Bridge,
    /// Nothing but a loopback interface.
    None,
    /// The host's.
    Host,
    /// That of another container.
    Container(String),
}

impl std::fmt::Display for Network {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Bridge => f.write_str("bridge"),
            Self::None => f.write_str("none"),
            Self::Host => f.write_str("host"),
            Self::Container(id) => write!(f, "container:{id}"),
        }
    }
}

impl std::str::FromStr for Network {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        Ok(match text.parse()? {
            Kind::Bridge => Self::Bridge,
            Kind::None => Self::None,
            Kind::Host => Self::Host,
            Kind::Container(id) => Self::Container(id),
        })
    }
}

impl From<&Network> for Kind {
    fn from(network: &Network) -> Self {
        match network {
            Network::Bridge => Self::Bridge,
            Network::None => Self::None,
            Network::Host => Self::Host,
            Network::Container(id) => Self::Container(id.clone()),
        }
    }
}

/// `--restart`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Restart {
    /// Never.
    #[default]
    No,
    /// When it failed, at most that often; 0 for no limit.
    OnFailure(u32),
    /// Whenever it ends, unless it was stopped.
    Always,
    /// The same: nothing starts containers when the machine does.
    UnlessStopped,
}

impl std::fmt::Display for Restart {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::No => f.write_str("no"),
            Self::OnFailure(0) => f.write_str("on-failure"),
            Self::OnFailure(most) => write!(f, "on-failure:{most}"),
            Self::Always => f.write_str("always"),
            Self::UnlessStopped => f.write_str("unless-stopped"),
        }
    }
}

/// `--log-opt`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct LogOptions {
    /// Bytes of one file.
    pub(crate) max_size: u64,
    /// How many files there are at most.
    pub(crate) max_file: u32,
}

impl Default for LogOptions {
    fn default() -> Self {
        Self { max_size: 10 << 20, max_file: 3 }
    }
}

/// What an image says of the containers made of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Defaults {
    pub(crate) entrypoint: Vec<String>,
    pub(crate) command: Vec<String>,
    pub(crate) env: Vec<String>,
    pub(crate) user: String,
    pub(crate) cwd: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) stop_signal: Option<String>,
    /// Paths that are to be volumes.
    pub(crate) volumes: Vec<String>,
    pub(crate) labels: Vec<(String, String)>,
}
