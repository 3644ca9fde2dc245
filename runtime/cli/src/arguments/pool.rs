//! What the commands of `runx pool` are told.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use runx_pool::{Bind, Filter, Network, Tier};

use super::scan::Words;
use super::units::{bytes, duration};
use super::{ListFormat, list_format};

/// `runx pool …`.
#[derive(Debug)]
pub(crate) enum Pool {
    Exec(Box<PoolExec>),
    Stat { format: ListFormat },
    Serve { flags: Vec<OsString> },
}

/// `runx pool exec`.
#[derive(Debug)]
pub(crate) struct PoolExec {
    pub(crate) program: String,
    pub(crate) args: Vec<OsString>,
    pub(crate) tier: Tier,
    pub(crate) cpu: Option<Duration>,
    pub(crate) wall: Option<Duration>,
    pub(crate) memory: Option<u64>,
    pub(crate) processes: Option<u64>,
    pub(crate) network: Network,
    pub(crate) filter: Filter,
    pub(crate) rootfs: Option<PathBuf>,
    pub(crate) binds: Vec<Bind>,
    pub(crate) cwd: Option<PathBuf>,
    pub(crate) env: Vec<String>,
    pub(crate) json: bool,
}

/// The command `name`, of which `first` is the first word and `rest` what follows.
pub(super) fn build(
    name: &str,
    first: String,
    rest: impl Iterator<Item = OsString>,
    words: &mut Words,
) -> Result<Pool> {
    if name == "pool stat" {
        return Ok(Pool::Stat { format: list_format(words)? });
    }
    let tier = match words.text("tier")? {
        None => Tier::default(),
        Some(text) => [Tier::Complete, Tier::Wipe, Tier::None]
            .into_iter()
            .find(|tier| tier.name() == text)
            .with_context(|| format!("invalid --tier {text:?}: it is complete, wipe or none"))?,
    };
    let network = match words.text("network")? {
        None | Some("none") => Network::None,
        Some("host") => Network::Host,
        Some(other) => bail!("invalid --network {other:?}: it is none or host"),
    };
    let filter = match words.text("seccomp")? {
        None | Some("deny") => Filter::Deny,
        Some("kill") => Filter::Kill,
        Some("off") => Filter::Off,
        Some(other) => bail!("invalid --seccomp {other:?}: it is deny, kill or off"),
    };
    let json = match words.text("format")? {
        None => false,
        Some("json") => true,
        Some(other) => bail!("invalid --format {other:?}: it is json"),
    };
    let memory = words.text("memory")?.map(bytes).transpose()?;
    if memory.is_some_and(|memory| memory <= 0) {
        bail!("invalid --memory: a sandbox always has a limit");
    }
    let processes = words.number("processes")?;
    if processes == Some(0) {
        bail!("invalid --processes 0: the program is one");
    }
    Ok(Pool::Exec(Box::new(PoolExec {
        program: first,
        args: rest.collect(),
        tier,
        cpu: words.text("cpu-time")?.map(|text| seconds("cpu-time", text)).transpose()?,
        wall: words.text("wall-time")?.map(|text| seconds("wall-time", text)).transpose()?,
        memory: memory.map(i64::unsigned_abs),
        processes,
        network,
        filter,
        rootfs: words.path("rootfs"),
        binds: words.texts("bind")?.iter().map(|text| bind(text)).collect::<Result<_>>()?,
        cwd: words.path("cwd"),
        env: words.texts("env")?,
        json,
    })))
}

/// A time with a unit, or a number of seconds.
fn seconds(flag: &str, text: &str) -> Result<Duration> {
    if text.ends_with(|c: char| c.is_ascii_digit()) {
        duration(flag, &format!("{text}s"))
    } else {
        duration(flag, text)
    }
}

fn bind(text: &str) -> Result<Bind> {
    let mut parts = text.split(':');
    let (source, target, mode, more) = (parts.next(), parts.next(), parts.next(), parts.next());
    match (source, target, mode, more) {
        (Some(source), Some(target), None | Some("ro" | "rw"), None) if !source.is_empty() && !target.is_empty() => {
            let source = std::path::absolute(source).with_context(|| format!("--bind {text}"))?;
            Ok(Bind { source, target: target.into(), writable: mode == Some("rw") })
        }
        _ => bail!("invalid --bind {text:?}: it is HOST:PATH or HOST:PATH:rw"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_seconds_unless_they_say_otherwise() {
        for (text, milliseconds) in [("2", 2000), ("0.5", 500), ("20ms", 20), ("1m", 60_000)] {
            assert_eq!(seconds("x", text).unwrap(), Duration::from_millis(milliseconds), "{text}");
        }
        assert!(seconds("x", "0").is_err() && seconds("x", "-1").is_err() && seconds("x", "x").is_err());
    }

    #[test]
    fn binds_have_two_paths_and_a_mode() {
        assert_eq!(bind("/a:/b").unwrap(), Bind { source: "/a".into(), target: "/b".into(), writable: false });
        assert!(bind("/a:/b:rw").unwrap().writable);
        for bad in ["/a", "/a:", ":/b", "/a:/b:x", "/a:/b:rw:x"] {
            assert!(bind(bad).is_err(), "{bad}");
        }
    }
}
