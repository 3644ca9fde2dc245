//! What the daemon is told at its start: flags, then variables, then defaults.

use std::collections::HashMap;
use std::fs;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::code::sql;
use crate::ids;
use crate::process::commands::Policy;
use crate::process::lines::LineMode;

/// The protocol's port.
const PORT: u16 = 44_772;

/// See the module.
#[derive(Debug)]
pub struct Config {
    /// Where it listens.
    pub address: Ipv4Addr,
    /// Where it listens; 0 for any that is free.
    pub port: u16,
    /// Where it speaks the envd protocol, if it does; 0 for any port that is free.
    pub envd_port: Option<u16>,
    /// What each request must have.
    pub token: Option<String>,
    /// A Jupyter server and its token.
    pub jupyter: Option<(String, String)>,
    /// Where SQL is executed.
    pub sql: SocketAddr,
    /// How output is told.
    pub line_mode: LineMode,
    /// The directory that files are in.
    pub jail: Option<PathBuf>,
    /// The largest file that may be written, in bytes.
    pub file_limit: u64,
    /// The largest body of a request that is no upload, in bytes.
    pub body_limit: usize,
    /// How many executions there may be at once.
    pub executions: usize,
    /// How many connections there may be at once.
    pub connections: usize,
    /// What is kept of commands.
    pub policy: Policy,
    /// How long an end of the daemon waits for what runs.
    pub drain: Duration,
    /// How often resources are looked at for their history; zero for never.
    pub monitor_interval: Duration,
    /// What is logged.
    pub log_level: log::LevelFilter,
    /// Where to.
    pub log_file: Option<PathBuf>,
}

/// One flag: its name, the variable for it, what it takes, what it is.
type Flag = (&'static str, Option<&'static str>, &'static str, &'static str);

const FLAGS: &[Flag] = &[
    ("port", None, "PORT", "listen on this port (44772; 0: any)"),
    (
        "envd-port",
        Some("RUNX_ENVD_PORT"),
        "PORT",
        "speak E2B's envd protocol on this port, 49983 by custom (not at all)",
    ),
    ("address", None, "IPV4", "listen on this address (127.0.0.1 without a token, 0.0.0.0 with one)"),
    ("access-token", Some("EXECD_ACCESS_TOKEN"), "TOKEN", "what each request must have in X-EXECD-ACCESS-TOKEN"),
    ("access-token-file", None, "FILE", "a file that holds it"),
    ("generate-token", None, "FILES", "make one, in the first of these files that can be made, for its user alone"),
    ("insecure", None, "", "listen on all addresses although there is no token"),
    ("jupyter-host", Some("JUPYTER_HOST"), "URL", "a Jupyter server for code, such as http://127.0.0.1:44771"),
    ("jupyter-token", Some("JUPYTER_TOKEN"), "TOKEN", "the server's token"),
    ("sql-address", None, "IP:PORT", "a MySQL server for SQL, used as root without a password (127.0.0.1:3306)"),
    ("line-mode", Some("EXECD_LINE_MODE"), "MODE", "legacy: lines without their ends; preserving: with them (legacy)"),
    ("root", None, "DIRECTORY", "keep all file operations inside of this directory"),
    ("max-file-size", None, "BYTES", "the largest file that may be written (no limit)"),
    ("max-body-size", None, "BYTES", "the largest body of a request that is no upload (33554432)"),
    ("max-executions", None, "NUMBER", "how many commands, codes and sessions may run at once (8192)"),
    ("max-connections", None, "NUMBER", "how many connections there may be at once (16384)"),
    ("operation-capacity", Some("EXECD_OPERATION_CAPACITY"), "NUMBER", "how many finished commands are kept (4096)"),
    ("max-log-size", None, "BYTES", "how much of a background command's output is kept (67108864)"),
    ("drain-timeout", None, "DURATION", "how long an end waits for what runs (10s)"),
    ("monitor-interval", None, "DURATION", "how often resources are looked at for their history; 0: never (5s)"),
    ("log-level", None, "LEVEL", "0 to 7: fatal 2, error 3, warn 4, info 6, debug 7 (6)"),
    ("log-file", Some("EXECD_LOG_FILE"), "FILE", "log there and not to standard output"),
    (
        "graceful-shutdown-timeout",
        Some("EXECD_API_GRACE_SHUTDOWN"),
        "DURATION",
        "accepted: streams end at once, whatever it is",
    ),
    ("jupyter-idle-poll-interval", Some("EXECD_JUPYTER_IDLE_POLL_INTERVAL"), "DURATION", "accepted: nothing is polled"),
];

/// What was asked for.
#[derive(Debug)]
pub enum Asked {
    /// To serve.
    Serve(Box<Config>),
    /// A text.
    Print(String),
}

fn number<T: std::str::FromStr>(name: &str, text: &str) -> Result<T, String> {
    text.parse().map_err(|_| format!("--{name}: {text:?} is not a number that fits"))
}

/// A duration as Go writes it: `500ms`, `2s`, `1m30s`.
fn duration(name: &str, text: &str) -> Result<Duration, String> {
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    humantime::parse_duration(text).map_err(|_| format!("--{name}: {text:?} is not a duration such as 500ms, 2s or 1m"))
}

impl Config {
    /// Reads arguments and variables.
    ///
    /// # Errors
    /// What is wrong with them. A token is in none of the texts.
    pub fn parse(
        arguments: impl Iterator<Item = String>,
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Asked, String> {
        let mut given: HashMap<&str, String> = HashMap::new();
        let mut arguments = arguments;
        while let Some(argument) = arguments.next() {
            if matches!(argument.as_str(), "-h" | "-help" | "--help") {
                return Ok(Asked::Print(usage()));
            }
            if matches!(argument.as_str(), "-v" | "-version" | "--version") {
                return Ok(Asked::Print(format!("runx-agent version {}\n", env!("CARGO_PKG_VERSION"))));
            }
            let word = argument.strip_prefix("--").or_else(|| argument.strip_prefix('-'));
            let Some(word) = word.filter(|word| !word.is_empty()) else {
                return Err("arguments are flags only: see --help".into());
            };
            let (name, value) =
                word.split_once('=').map_or((word, None), |(name, value)| (name, Some(value.to_owned())));
            let Some((name, _, takes, _)) = FLAGS.iter().find(|flag| flag.0 == name) else {
                return Err(format!("unknown flag --{name}: see --help"));
            };
            let value = match (takes.is_empty(), value) {
                (true, None) => "true".to_owned(),
                (_, Some(value)) => value,
                (false, None) => arguments.next().ok_or_else(|| format!("--{name} needs a value"))?,
            };
            given.insert(name, value);
        }
        for (name, from, _, _) in FLAGS {
            if let Some(value) = from.and_then(&variable)
                && !value.is_empty()
            {
                given.entry(name).or_insert(value);
            }
        }
        Self::of(&given).map(|config| Asked::Serve(Box::new(config)))
    }

    fn of(given: &HashMap<&str, String>) -> Result<Self, String> {
        let get = |name: &str| given.get(name).map(String::as_str).filter(|value| !value.is_empty());
        let token = match (get("access-token"), get("access-token-file")) {
            (Some(token), _) => Some(token.to_owned()),
            (None, Some(path)) => {
                let text =
                    std::fs::read_to_string(path).map_err(|e| format!("--access-token-file: read {path}: {e}"))?;
                let token = text.trim().to_owned();
                // An empty file is a mistake, and must not open the daemon to everybody.
                if token.is_empty() {
                    return Err(format!("--access-token-file: {path} is empty"));
                }
                Some(token)
            }
            (None, None) => get("generate-token").map(generated_token).transpose()?,
        };
        let insecure = matches!(get("insecure"), Some("true" | "1"));
        let address = match get("address") {
            Some(text) => text.parse().map_err(|_| format!("--address: {text:?} is not an IPv4 address"))?,
            None if token.is_some() || insecure => Ipv4Addr::UNSPECIFIED,
            None => Ipv4Addr::LOCALHOST,
        };
        if token.is_none() && !insecure && !address.is_loopback() {
            return Err(format!(
                "--address {address}: without an access token whoever reaches it runs commands; give --access-token-file, or \
                 --insecure if that is meant"
            ));
        }
        for name in ["graceful-shutdown-timeout", "jupyter-idle-poll-interval"] {
            get(name).map(|text| duration(name, text)).transpose()?;
        }
        let jupyter =
            get("jupyter-host").map(|host| (host.to_owned(), get("jupyter-token").unwrap_or_default().to_owned()));
        if let Some((host, _)) = jupyter.as_ref().filter(|(host, _)| !host.starts_with("http")) {
            return Err(format!("--jupyter-host: {host:?} must begin with http:// or https://"));
        }
        let level: u8 = get("log-level").map_or(Ok(6), |text| number("log-level", text))?;
        Ok(Self {
            address,
            port: get("port").map_or(Ok(PORT), |text| number("port", text))?,
            envd_port: get("envd-port").map(|text| number("envd-port", text)).transpose()?,
            token,
            jupyter,
            sql: get("sql-address").map_or(Ok(sql::SERVER), |text| {
                text.parse().map_err(|_| format!("--sql-address: {text:?} is not an address and a port"))
            })?,
            line_mode: match get("line-mode") {
                None | Some("legacy") => LineMode::Legacy,
                Some("preserving") => LineMode::Preserving,
                Some(other) => return Err(format!("--line-mode: {other:?} is neither legacy nor preserving")),
            },
            jail: get("root").map(PathBuf::from),
            file_limit: get("max-file-size").map_or(Ok(u64::MAX), |text| number("max-file-size", text))?,
            body_limit: get("max-body-size").map_or(Ok(32 << 20), |text| number("max-body-size", text))?,
            executions: get("max-executions").map_or(Ok(8192), |text| number("max-executions", text))?,
            connections: get("max-connections").map_or(Ok(16_384), |text| number("max-connections", text))?,
            policy: Policy {
                output: get("max-log-size").map_or(Ok(64 << 20), |text| number("max-log-size", text))?,
                finished: get("operation-capacity").map_or(Ok(4096), |text| number("operation-capacity", text))?,
            },
            drain: get("drain-timeout").map_or(Ok(Duration::from_secs(10)), |text| duration("drain-timeout", text))?,
            monitor_interval: get("monitor-interval")
                .map_or(Ok(Duration::from_secs(5)), |text| duration("monitor-interval", text))?,
            log_level: match level {
                0..=3 => log::LevelFilter::Error,
                4 => log::LevelFilter::Warn,
                5 | 6 => log::LevelFilter::Info,
                _ => log::LevelFilter::Debug,
            },
            log_file: get("log-file").map(PathBuf::from),
        })
    }
}

/// The token in the first of several files that only this user can read; it is made where it is missing.
fn generated_token(files: &str) -> Result<String, String> {
    let mut reasons = Vec::new();
    for path in files.split(',').map(Path::new) {
        match token_in(path) {
            Ok(token) => return Ok(token),
            Err(e) => reasons.push(format!("{}: {e}", path.display())),
        }
    }
    Err(format!("--generate-token: there is no place for it: {}", reasons.join("; ")))
}

fn token_in(path: &Path) -> io::Result<String> {
    if let Some(directory) = path.parent() {
        match fs::DirBuilder::new().mode(0o700).create(directory) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
            _ => {}
        }
    }
    let mut options = fs::OpenOptions::new();
    options.write(true).create_new(true).mode(0o600).custom_flags(libc::O_NOFOLLOW);
    match options.open(path) {
        Ok(mut file) => {
            let token = ids::hex();
            file.write_all(token.as_bytes())?;
            Ok(token)
        }
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
            // From before this daemon was started again; not somebody else's, who would know it.
            let file =
                fs::OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)?;
            let meta = file.metadata()?;
            if !meta.is_file() || meta.uid() != crate::process::users::own().0 || meta.mode() & 0o077 != 0 {
                return Err(io::Error::other("others may have written or read it"));
            }
            let mut token = String::new();
            file.take(256).read_to_string(&mut token)?;
            if token.len() < 16 { Err(io::Error::other("it holds no token")) } else { Ok(token) }
        }
        Err(e) => Err(e),
    }
}

fn usage() -> String {
    let mut out = String::from(
        "runx-agent: the daemon inside a sandbox, for OpenSandbox's and E2B's SDKs\n\nusage: runx-agent [--FLAG VALUE]...\n\nflags:\n",
    );
    for (name, from, takes, text) in FLAGS {
        let from = from.map(|from| format!(" [{from}]")).unwrap_or_default();
        out.push_str(&format!("  {:34} {text}{from}\n", format!("--{name} {takes}")));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn parse(arguments: &[&str], variables: &[(&str, &str)]) -> Result<Config, String> {
        let find =
            |name: &str| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned());
        match Config::parse(arguments.iter().map(|word| (*word).to_owned()), find)? {
            Asked::Serve(config) => Ok(*config),
            Asked::Print(text) => Err(text),
        }
    }

    #[test]
    fn without_a_token_it_is_closed() {
        assert_eq!(parse(&[], &[]).unwrap().address, Ipv4Addr::LOCALHOST);
        assert_eq!(parse(&["--insecure"], &[]).unwrap().address, Ipv4Addr::UNSPECIFIED);
        assert!(parse(&["--address", "0.0.0.0"], &[]).unwrap_err().contains("--insecure"));
        let config = parse(&[], &[("EXECD_ACCESS_TOKEN", "t")]).unwrap();
        assert_eq!((config.address, config.token.as_deref()), (Ipv4Addr::UNSPECIFIED, Some("t")));
        let empty = tempfile::NamedTempFile::new().unwrap();
        assert!(
            parse(&["--access-token-file", &empty.path().to_string_lossy()], &[]).unwrap_err().contains("is empty")
        );
    }

    #[test]
    fn a_token_is_made_once_and_is_nobody_elses() {
        let top = tempfile::tempdir().unwrap();
        let path = top.path().join("private/token");
        let files = format!("/proc/none/token,{}", path.display());
        let token = |files: &str| parse(&["--generate-token", files], &[]).map(|config| config.token);
        let made = token(&files).unwrap().unwrap();
        assert_eq!((made.len(), fs::metadata(&path).unwrap().mode() & 0o777), (32, 0o600));
        assert_eq!(token(&files).unwrap().unwrap(), made);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(token(&files).unwrap_err().contains("others may have"));
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink(top.path().join("elsewhere"), &path).unwrap();
        assert!(token(&files).is_err() && !top.path().join("elsewhere").exists());
    }

    #[test]
    fn flags_come_in_gos_forms_and_before_variables() {
        let config = parse(&["-port", "1", "--log-level=7", "-jupyter-host=http://a"], &[("JUPYTER_HOST", "http://b")]);
        let config = config.unwrap();
        assert_eq!((config.port, config.log_level), (1, log::LevelFilter::Debug));
        assert_eq!(config.jupyter.unwrap().0, "http://a");
        for wrong in [&["--port", "x"][..], &["--unknown"], &["word"], &["--port"], &["--jupyter-host", "ftp://x"]] {
            assert!(parse(wrong, &[]).is_err(), "{wrong:?}");
        }
        assert!(parse(&[], &[("EXECD_API_GRACE_SHUTDOWN", "soon")]).is_err());
    }
}
