//! The ids of a container with users of its own, and those that they are where this process is.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use runx_core::spec::{LinuxIdMapping, LinuxNamespaceType, Spec};

/// What ids are that have no number in a user namespace: the kernel's default, which nobody changes.
const NOBODY: u32 = 65534;

/// A user and a group.
pub(super) type Owner = (u32, u32);

/// Some ids that follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Range {
    inside: u32,
    outside: u32,
    size: u32,
}

/// How a user namespace maps ids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Ids {
    users: Vec<Range>,
    groups: Vec<Range>,
}

impl Ids {
    /// Those of the user namespace that a process is in, which is not this one's own.
    pub(super) fn of_process(pid: i32) -> Result<Self> {
        let read = |file: &str| -> Result<Vec<Range>> {
            let path = format!("/proc/{pid}/{file}");
            let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
            parse(&text).with_context(|| format!("{path} holds no mappings of ids: {text:?}"))
        };
        Ok(Self { users: read("uid_map")?, groups: read("gid_map")? })
    }

    /// Those that a container with this configuration gets when root starts it. `None` where it gets this machine's.
    ///
    /// # Errors
    /// For a user namespace that is there already: it is known in a process only what it maps.
    pub(super) fn configured(id: &str, config: &Spec) -> Result<Option<Self>> {
        let Some(linux) = config.linux() else { return Ok(None) };
        let mut namespaces = linux.namespaces().iter().flatten();
        let Some(own) = namespaces.find(|namespace| namespace.typ() == LinuxNamespaceType::User) else {
            return Ok(None);
        };
        if let Some(path) = own.path().as_deref().filter(|path| *path != Path::new("")) {
            bail!(
                "container {id:?} has the users of the namespace {}, and whose files are whose is known only where it runs: \
                 start it, and copy then",
                path.display()
            );
        }
        let ranges = |list: &Option<Vec<LinuxIdMapping>>| {
            let range = |m: &LinuxIdMapping| Range { inside: m.container_id(), outside: m.host_id(), size: m.size() };
            list.iter().flatten().map(range).collect()
        };
        Ok(Some(Self { users: ranges(linux.uid_mappings()), groups: ranges(linux.gid_mappings()) }))
    }

    /// What the container sees of an owner.
    pub(super) fn inside(&self, (uid, gid): Owner) -> Owner {
        let find =
            |ranges: &[Range], id| translate(ranges, id, |range| (range.outside, range.inside)).unwrap_or(NOBODY);
        (find(&self.users, uid), find(&self.groups, gid))
    }

    /// Who an owner is that the container names.
    ///
    /// # Errors
    /// When it has no such user or group.
    pub(super) fn outside(&self, (uid, gid): Owner) -> Result<Owner> {
        let find = |ranges: &[Range], id| translate(ranges, id, |range| (range.inside, range.outside));
        let uid = find(&self.users, uid).with_context(|| format!("its owner {uid} is no user of the container's"))?;
        let gid = find(&self.groups, gid).with_context(|| format!("its group {gid} is no group of the container's"))?;
        Ok((uid, gid))
    }
}

/// Finds what an id is on the other side. `sides` tells the first id of a range on this one and on the other one.
fn translate(ranges: &[Range], id: u32, sides: impl Fn(&Range) -> (u32, u32)) -> Option<u32> {
    ranges.iter().find_map(|range| {
        let (from, to) = sides(range);
        to.checked_add(id.checked_sub(from).filter(|offset| *offset < range.size)?)
    })
}

/// Reads a file of the form of /proc/PID/uid_map (user_namespaces(7)).
fn parse(text: &str) -> Option<Vec<Range>> {
    let line = |line: &str| {
        let numbers: Option<Vec<u32>> = line.split_ascii_whitespace().map(|word| word.parse().ok()).collect();
        match numbers?[..] {
            [inside, outside, size] => Some(Range { inside, outside, size }),
            _ => None,
        }
    };
    let ranges: Vec<_> = text.lines().map(line).collect::<Option<_>>()?;
    // So says one that nobody has written a mapping to yet.
    if ranges.is_empty() { None } else { Some(ranges) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(namespaces: &str) -> Spec {
        let mappings =
            r#"[{"containerID": 0, "hostID": 100000, "size": 1000}, {"containerID": 1000, "hostID": 7, "size": 2}]"#;
        let text = format!(
            r#"{{"ociVersion": "1.2.0", "linux": {{"namespaces": [{namespaces}], "uidMappings": {mappings}, "gidMappings": {mappings}}}}}"#
        );
        serde_json::from_str(&text).unwrap()
    }

    #[test]
    fn ids_are_the_containers_on_one_side_and_this_machines_on_the_other() {
        let ids = Ids::configured("a", &spec(r#"{"type": "user"}"#)).unwrap().unwrap();
        assert_eq!(ids.outside((0, 999)).unwrap(), (100_000, 100_999));
        assert_eq!(ids.outside((1001, 1000)).unwrap(), (8, 7));
        assert_eq!(ids.inside((100_000, 8)), (0, 1001));
        // Neither has these.
        assert_eq!(ids.inside((0, 101_000)), (NOBODY, NOBODY));
        assert!(ids.outside((1002, 0)).unwrap_err().to_string().contains("owner 1002"));
        assert!(ids.outside((0, u32::MAX)).unwrap_err().to_string().contains("group 4294967295"));
        // The kernel tells the same in its own form.
        let told = parse("         0     100000       1000\n      1000          7          2\n").unwrap();
        assert_eq!(told, ids.users);
    }

    #[test]
    fn what_is_not_known_is_not_guessed() {
        assert_eq!(Ids::configured("a", &spec(r#"{"type": "mount"}"#)).unwrap(), None);
        let joined = Ids::configured("a", &spec(r#"{"type": "user", "path": "/run/ns/user"}"#)).unwrap_err();
        assert!(joined.to_string().contains("/run/ns/user") && joined.to_string().contains("start it"), "{joined}");
        for text in ["", "0 0\n", "0 0 1 1\n", "0 a 1\n", "0 0 4294967296\n"] {
            assert_eq!(parse(text), None, "{text:?}");
        }
    }
}
