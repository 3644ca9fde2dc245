//! The first argument of the programs that run artifacts in containers: which descriptor, and within which limits.
//!
//! `FD[,KEY=VALUE]...`, as `runx_core::workload::limits` writes it. `invoke` comes last, since its value may hold commas.

use std::ffi::OsStr;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use crate::engine::{Backend, Kind};

/// What the argument says.
#[derive(Debug)]
pub struct Launch {
    /// The artifact.
    pub artifact: OwnedFd,
    /// What it holds.
    pub kind: Kind,
    /// How large a linear memory may become, in bytes.
    pub memory: Option<u64>,
    /// About how many instructions are executed before it ends.
    pub fuel: Option<u64>,
    /// When it ends in any case.
    pub timeout: Option<Duration>,
    /// How its code is executed.
    pub backend: Backend,
    /// The function to call instead of `_start`.
    pub invoke: Option<String>,
}

/// Takes ownership of the descriptor that the argument names, and closes it on exec. `None` for an argument that is none,
/// and for a descriptor that is not open.
pub fn parse(argument: &OsStr) -> Option<Launch> {
    let text = argument.to_str()?;
    let (number, mut rest) = text.split_once(',').map_or((text, None), |(number, rest)| (number, Some(rest)));
    let (mut kind, mut memory, mut fuel, mut timeout, mut invoke) = (Kind::Module, None, None, None, None);
    let mut backend = Backend::Native;
    while let Some(words) = rest.take() {
        let (key, value) = words.split_once('=')?;
        if key == "invoke" {
            invoke = Some(value.to_owned());
            break;
        }
        let value = match value.split_once(',') {
            Some((value, next)) => {
                rest = Some(next);
                value
            }
            None => value,
        };
        match key {
            "kind" if value == "component" => kind = Kind::Component,
            "engine" if value == "pulley" => backend = Backend::Pulley,
            "memory" => memory = Some(value.parse().ok()?),
            "fuel" => fuel = Some(value.parse().ok()?),
            "timeout" => timeout = Some(Duration::from_millis(value.parse().ok()?)),
            _ => return None,
        }
    }
    Some(Launch { artifact: descriptor(number)?, kind, memory, fuel, timeout, backend, invoke })
}

fn descriptor(number: &str) -> Option<OwnedFd> {
    let fd: RawFd = number.parse().ok().filter(|fd| *fd > 2)?;
    // SAFETY: any number may be asked about; one that is not open fails.
    if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } != 0 {
        return None;
    }
    // SAFETY: it is open, not a standard stream, and passed to this process to own.
    Some(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::{AsRawFd, IntoRawFd};

    fn parsed(rest: &str) -> Option<Launch> {
        let file = std::fs::File::open("/dev/null").expect("open /dev/null");
        let number = file.as_raw_fd();
        let parsed = parse(OsStr::new(&format!("{number}{rest}")));
        if parsed.is_some() {
            // It has another owner now.
            let _ = file.into_raw_fd();
        }
        parsed
    }

    #[test]
    fn limits_follow_the_descriptor() {
        let launch = parsed(",kind=component,memory=5,fuel=6,timeout=1500,invoke=f(1, 2)").expect("it is one");
        assert_eq!((launch.kind, launch.memory, launch.fuel), (Kind::Component, Some(5), Some(6)));
        assert_eq!(launch.timeout, Some(Duration::from_millis(1500)));
        assert_eq!(launch.invoke.as_deref(), Some("f(1, 2)"));
        let plain = parsed("").expect("it is one");
        assert_eq!((plain.kind, plain.memory, plain.invoke), (Kind::Module, None, None));
    }

    #[test]
    fn anything_else_is_refused() {
        for bad in [",", ",memory", ",memory=x", ",size=1", "x"] {
            assert!(parsed(bad).is_none(), "{bad:?}");
        }
        for bad in ["", "1", "-1", "99999", "x"] {
            assert!(parse(OsStr::new(bad)).is_none(), "{bad:?}");
        }
    }
}
