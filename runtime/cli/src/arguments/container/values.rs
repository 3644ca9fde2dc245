//! The forms of the values that flags of `runx container` take.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};

use crate::arguments::units::duration;
use crate::container::options::{Device, Network, Restart};

/// `KEY=VALUE`.
pub(super) fn pair(flag: &str, text: &str) -> Result<(String, String)> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => bail!("--{flag} {text:?} is not KEY=VALUE"),
    }
}

/// Variables: those without a value have the caller's, or are not there.
pub(super) fn environment(given: &[String]) -> Vec<String> {
    let one = |text: &String| match text.contains('=') {
        true => Some(text.clone()),
        false => std::env::var(text).ok().map(|value| format!("{text}={value}")),
    };
    given.iter().filter_map(one).collect()
}

/// A file with a variable a line, and lines that begin with `#`.
pub(super) fn env_file(file: &str) -> Result<Vec<String>> {
    let text = std::fs::read_to_string(file).with_context(|| format!("--env-file: read {file}"))?;
    let mut lines = Vec::new();
    for line in text.lines().map(str::trim_start).filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let name = line.split('=').next().unwrap_or_default();
        if name.is_empty() || name.contains(char::is_whitespace) {
            // The line may hold a secret.
            bail!("--env-file {file}: a line is not NAME=VALUE: its name is empty or holds a space");
        }
        lines.push(line.to_owned());
    }
    Ok(environment(&lines))
}

/// `no`, `on-failure[:N]`, `always` or `unless-stopped`.
pub(super) fn restart(text: &str) -> Result<Restart> {
    Ok(match text {
        "no" => Restart::No,
        "always" => Restart::Always,
        "unless-stopped" => Restart::UnlessStopped,
        "on-failure" => Restart::OnFailure(0),
        other => match other.strip_prefix("on-failure:").and_then(|most| most.parse().ok()) {
            Some(most) => Restart::OnFailure(most),
            None => bail!("--restart {text:?} is none of no, on-failure[:N], always and unless-stopped"),
        },
    })
}

/// `bridge`, `none`, `host` or `container:ID`.
pub(super) fn network(text: &str) -> Result<Network> {
    text.parse()
}

/// A number of processors in thousandths.
pub(super) fn cpus(text: &str) -> Result<i64> {
    let number: f64 = text.parse().ok().with_context(|| format!("--cpus {text:?} is not a number such as 1.5"))?;
    // The kernel's smallest quota is 1 ms of 100.
    if !(0.01..=100_000.0).contains(&number) {
        bail!("--cpus {text}: it is at least 0.01");
    }
    Ok((number * 1000.0).round() as i64)
}

/// `NAME=SOFT[:HARD]`.
pub(super) fn ulimit(text: &str) -> Result<(String, u64, u64)> {
    let invalid = || format!("--ulimit {text:?} is not NAME=SOFT[:HARD], such as nofile=1024:2048");
    let (name, values) = text.split_once('=').with_context(invalid)?;
    const NAMES: [&str; 16] = [
        "as",
        "core",
        "cpu",
        "data",
        "fsize",
        "locks",
        "memlock",
        "msgqueue",
        "nice",
        "nofile",
        "nproc",
        "rss",
        "rtprio",
        "rttime",
        "sigpending",
        "stack",
    ];
    if !NAMES.contains(&name) {
        bail!("--ulimit {text:?}: {name:?} is none of {}", NAMES.join(", "));
    }
    let number = |text: &str| match text {
        "-1" | "unlimited" => Ok(u64::MAX),
        text => text.parse().ok().with_context(invalid),
    };
    let (soft, hard) = values.split_once(':').unwrap_or((values, values));
    let (soft, hard) = (number(soft)?, number(hard)?);
    if soft > hard {
        bail!("--ulimit {text:?}: the soft limit is above the hard one");
    }
    Ok((name.to_owned(), soft, hard))
}

/// A capability's name with `CAP_`, or `ALL`.
pub(super) fn capability(text: &str) -> Result<String> {
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("CAP_").unwrap_or(&upper);
    if name == "ALL" {
        return Ok("ALL".to_owned());
    }
    let name = format!("CAP_{name}");
    let known: Result<runx_core::spec::Capability, _> = serde_json::from_value(name.clone().into());
    known.map(|_| name).map_err(|_| anyhow::anyhow!("{text:?} is not a capability: capabilities(7) lists them"))
}

/// `PATH[:PATH[:rwm]]`.
pub(super) fn device(text: &str) -> Result<Device> {
    let parts: Vec<&str> = text.split(':').collect();
    let is_access = |part: &str| !part.is_empty() && part.chars().all(|c| "rwm".contains(c));
    let (source, target, access) = match parts[..] {
        [source] => (source, source, "rwm"),
        [source, access] if is_access(access) => (source, source, access),
        [source, target] => (source, target, "rwm"),
        [source, target, access] if is_access(access) => (source, target, access),
        _ => bail!("--device {text:?} is not PATH[:PATH[:rwm]]"),
    };
    if !source.starts_with('/') || !target.starts_with('/') {
        bail!("--device {text:?}: a device's path is absolute");
    }
    Ok(Device { source: PathBuf::from(source), target: PathBuf::from(target), access: access.to_owned() })
}

/// A host's name.
pub(super) fn hostname(name: &str) -> Result<String> {
    let label = |part: &str| {
        !part.is_empty()
            && !part.starts_with('-')
            && !part.ends_with('-')
            && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
    };
    if name.len() > 64 || !name.split('.').all(label) {
        bail!("--hostname {name:?}: a host's name is up to 64 letters, digits, - and dots between them");
    }
    Ok(name.to_owned())
}

/// An IP address.
pub(super) fn address(flag: &str, text: &str) -> Result<String> {
    match text.parse::<IpAddr>() {
        Ok(_) => Ok(text.to_owned()),
        Err(_) => bail!("--{flag} {text:?} is not an IP address"),
    }
}

/// `NAME:ADDRESS`.
pub(super) fn host(text: &str) -> Result<(String, String)> {
    let (name, target) = text
        .split_once([':', '='])
        .filter(|(name, _)| !name.is_empty() && !name.contains(char::is_whitespace))
        .with_context(|| format!("--add-host {text:?} is not NAME:ADDRESS"))?;
    let target = target.trim_start_matches('[').trim_end_matches(']');
    if target != "host-gateway" {
        address("add-host", target).with_context(|| format!("--add-host {text:?}"))?;
    }
    Ok((name.to_owned(), target.to_owned()))
}

/// A time: RFC 3339, seconds since 1970, or how long ago.
pub(super) fn time(flag: &str, text: &str) -> Result<SystemTime> {
    if let Ok(seconds) = text.parse::<f64>() {
        let since = Duration::try_from_secs_f64(seconds).with_context(|| format!("--{flag} {text:?}"))?;
        return Ok(SystemTime::UNIX_EPOCH + since);
    }
    if text.contains('-') {
        return humantime::parse_rfc3339_weak(text)
            .with_context(|| format!("--{flag} {text:?} is not a time such as 2006-01-02T15:04:05Z"));
    }
    let ago = duration(flag, text)?;
    SystemTime::now().checked_sub(ago).with_context(|| format!("--{flag} {text:?} is before all times"))
}

/// Keys that leave a container alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DetachKeys(pub(crate) Vec<u8>);

impl Default for DetachKeys {
    /// Ctrl-P, Ctrl-Q.
    fn default() -> Self {
        Self(vec![16, 17])
    }
}

impl DetachKeys {
    /// Keys as docker writes them: letters and `ctrl-LETTER`, with commas; `none` for no keys.
    pub(super) fn parse(text: &str) -> Result<Self> {
        if text == "none" {
            return Ok(Self(Vec::new()));
        }
        let key = |name: &str| match (name.as_bytes(), name.strip_prefix("ctrl-").map(str::as_bytes)) {
            ([letter], _) if letter.is_ascii_graphic() => Ok(*letter),
            (_, Some([letter])) if letter.is_ascii_alphabetic() => Ok(letter.to_ascii_lowercase() - b'a' + 1),
            (_, Some([sign])) if b"@[\\]^_".contains(sign) => Ok(*sign & 31),
            _ => Err(anyhow::anyhow!(
                "--detach-keys {text:?}: {name:?} is neither a letter nor ctrl- and one of a-z@[\\]^_"
            )),
        };
        text.split(',').map(key).collect::<Result<_>>().map(Self)
    }
}

/// What `ls` is to show.
#[derive(Clone, Debug, Default)]
pub(crate) struct Selection(Vec<(String, String)>);

impl Selection {
    /// `KEY=VALUE`, several times.
    pub(super) fn parse(texts: &[String]) -> Result<Self> {
        const KEYS: [&str; 7] = ["id", "name", "status", "image", "ancestor", "label", "exited"];
        const STATUSES: [&str; 8] =
            ["created", "running", "paused", "restarting", "exited", "stopped", "starting", "stopping"];
        let mut out = Vec::new();
        for text in texts {
            let (key, value) = pair("filter", text)?;
            if !KEYS.contains(&key.as_str()) {
                bail!("--filter {text:?}: {key:?} is none of {}", KEYS.join(", "));
            }
            if key == "status" && !STATUSES.contains(&value.as_str()) {
                bail!("--filter {text:?}: a status is one of {}", STATUSES.join(", "));
            }
            if key == "exited" && value.parse::<i32>().is_err() {
                bail!("--filter {text:?}: an exit code is a number");
            }
            out.push((key, value));
        }
        Ok(Self(out))
    }

    /// Whether it asks for containers that do not run.
    pub(crate) fn names_status(&self) -> bool {
        self.0.iter().any(|(key, _)| key == "status" || key == "exited")
    }

    /// Whether `matches` finds all keys; of the values of one key, one is enough, but all labels are wanted.
    pub(crate) fn selects(&self, matches: impl Fn(&str, &str) -> bool) -> bool {
        self.0.iter().all(|(key, value)| {
            if key == "label" {
                return matches(key, value);
            }
            self.0.iter().filter(|(other, _)| other == key).any(|(_, value)| matches(key, value))
        })
    }
}
