//! Which devices a container may use: the rules of config.json and those of every container.

mod program;
mod systemd;

use oci_spec::runtime::{LinuxDeviceType, LinuxResources};

use crate::error::{Error, Result};

pub(super) use program::attach;
pub(super) use systemd::{Allowed, allowed};

/// One rule; the last that fits decides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Rule {
    pub(super) allow: bool,
    /// `a`, `b` or `c`.
    pub(super) kind: char,
    /// `None`: any.
    pub(super) major: Option<u32>,
    /// `None`: any.
    pub(super) minor: Option<u32>,
    pub(super) read: bool,
    pub(super) write: bool,
    pub(super) mknod: bool,
}

impl Rule {
    fn new(allow: bool, kind: char, major: Option<u32>, minor: Option<u32>, access: &str) -> Result<Self> {
        if access.is_empty() || access.chars().any(|c| !"rwm".contains(c)) {
            return Err(Error::spec(format!("linux.resources.devices: access {access:?} is not made of r, w and m")));
        }
        Ok(Self {
            allow,
            kind,
            major,
            minor,
            read: access.contains('r'),
            write: access.contains('w'),
            mknod: access.contains('m'),
        })
    }

    /// Whether the rule speaks of every device and every access.
    pub(super) fn is_everything(&self) -> bool {
        self.major.is_none() && self.minor.is_none() && self.read && self.write && self.mknod && self.kind == 'a'
    }

    /// The letters of its access.
    fn access(&self) -> String {
        [(self.read, 'r'), (self.write, 'w'), (self.mknod, 'm')]
            .into_iter()
            .filter_map(|(on, letter)| on.then_some(letter))
            .collect()
    }

    /// As `devices.allow` and `devices.deny` take it.
    pub(super) fn v1_text(&self) -> String {
        let number = |n: Option<u32>| n.map_or("*".to_owned(), |n| n.to_string());
        format!("{} {}:{} {}", self.kind, number(self.major), number(self.minor), self.access())
    }
}

/// What every container may do, after its own rules: make nodes of any device (using them is another
/// matter), and use the devices that the runtime-spec says are always there.
const ALWAYS: &[(char, Option<u32>, Option<u32>, &str)] = &[
    ('c', None, None, "m"),
    ('b', None, None, "m"),
    ('c', Some(1), Some(3), "rwm"),
    ('c', Some(1), Some(5), "rwm"),
    ('c', Some(1), Some(7), "rwm"),
    ('c', Some(1), Some(8), "rwm"),
    ('c', Some(1), Some(9), "rwm"),
    ('c', Some(5), Some(0), "rwm"),
    ('c', Some(5), Some(1), "rwm"),
    ('c', Some(5), Some(2), "rwm"),
    ('c', Some(136), None, "rwm"),
];

/// The rules of config.json in their order, then those of every container.
pub(super) fn rules(resources: Option<&LinuxResources>) -> Result<Vec<Rule>> {
    let mut rules = Vec::new();
    for device in resources.and_then(|r| r.devices().as_ref()).into_iter().flatten() {
        let kind = match device.typ() {
            None | Some(LinuxDeviceType::A) => 'a',
            Some(LinuxDeviceType::B) => 'b',
            Some(LinuxDeviceType::C | LinuxDeviceType::U) => 'c',
            Some(LinuxDeviceType::P) => {
                return Err(Error::spec("linux.resources.devices: a pipe has no device numbers to allow"));
            }
        };
        let number = |n: Option<i64>| -> Result<Option<u32>> {
            match n {
                None | Some(-1) => Ok(None),
                Some(n) => u32::try_from(n)
                    .map(Some)
                    .map_err(|_| Error::spec(format!("linux.resources.devices: {n} is no device number"))),
            }
        };
        let access = device.access().as_deref().filter(|access| !access.is_empty()).unwrap_or("rwm");
        rules.push(Rule::new(device.allow(), kind, number(device.major())?, number(device.minor())?, access)?);
    }
    for (kind, major, minor, access) in ALWAYS {
        rules.push(Rule::new(true, *kind, *major, *minor, access)?);
    }
    Ok(rules)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_those_of_devices_allow() {
        let rule = Rule::new(true, 'c', Some(136), None, "rwm").unwrap();
        assert_eq!(rule.v1_text(), "c 136:* rwm");
    }
}
