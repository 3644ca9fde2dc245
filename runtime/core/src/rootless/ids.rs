//! The ids that are a user's: his own, and those that /etc/subuid and /etc/subgid give him.

use std::fs;
use std::ops::Range;

use oci_spec::runtime::{LinuxIdMapping, LinuxIdMappingBuilder};

/// The most lines that the kernel takes for one mapping (user_namespaces(7)).
const LINES: usize = 340;

/// What a user's own user namespace has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ids {
    /// Users: root is the user himself, and his subordinate ids follow without a gap.
    pub users: Vec<LinuxIdMapping>,
    /// Groups, likewise.
    pub groups: Vec<LinuxIdMapping>,
}

impl Ids {
    /// Those of the user who this process is. There is nobody but root if no file gives him others.
    pub fn own() -> Self {
        let (user, group) = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
        // Not by the C library, which loads what knows users elsewhere: a static program may not have that.
        let read = |file: &str| fs::read_to_string(file).unwrap_or_default();
        // Whatever he says of himself: newuidmap knows better.
        let said = std::env::var("USER").ok();
        let name = name_of(&read("/etc/passwd"), user).or(said).unwrap_or_default();
        Self::of((user, &name), group, &read("/etc/subuid"), &read("/etc/subgid"))
    }

    /// Both files go by the user: subgid(5) has no lines for groups.
    fn of((user, name): (u32, &str), group: u32, subuid: &str, subgid: &str) -> Self {
        let mappings = |own: u32, text: &str| mappings(own, subordinate(text, name, user));
        Self { users: mappings(user, subuid), groups: mappings(group, subgid) }
    }

    /// Whether the namespace has a group of this number.
    pub fn has_group(&self, id: u32) -> bool {
        self.groups.iter().any(|mapping| range(mapping.container_id(), mapping.size()).contains(&id.into()))
    }
}

fn name_of(passwd: &str, user: u32) -> Option<String> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(user)).then(|| name.to_owned())
    })
}

/// The ranges that belong to a user by his name or his number: the first id and how many, in the file's order.
fn subordinate(text: &str, name: &str, user: u32) -> Vec<(u32, u32)> {
    let number = user.to_string();
    let range = |line: &str| {
        let mut fields = line.trim().split(':');
        let owner = fields.next().filter(|owner| !owner.is_empty())?;
        let (first, count) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
        ((owner == name || owner == number) && count > 0).then_some((first, count))
    };
    text.lines().filter_map(range).collect()
}

/// A range in numbers that it cannot overflow.
fn range(first: u32, count: u32) -> Range<u64> {
    u64::from(first)..u64::from(first) + u64::from(count)
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

/// Root is the user himself, and the ranges follow. One with an id that is mapped already, as when a file names a user both
/// by name and by number, would make the kernel refuse them all: it is left out.
fn mappings(own: u32, ranges: Vec<(u32, u32)>) -> Vec<LinuxIdMapping> {
    let mapping = |inside: u32, outside: u32, size: u32| {
        let builder = LinuxIdMappingBuilder::default();
        builder.container_id(inside).host_id(outside).size(size).build().ok()
    };
    let mut all: Vec<_> = mapping(0, own, 1).into_iter().collect();
    let mut taken = vec![range(own, 1)];
    let mut inside = 1_u32;
    for (first, count) in ranges {
        let outside = range(first, count);
        // -1 is no id, and so is nothing behind it.
        let ends = outside.end > u32::MAX.into() || range(inside, count).end > u32::MAX.into();
        if ends || all.len() == LINES || taken.iter().any(|other| overlap(other, &outside)) {
            continue;
        }
        all.extend(mapping(inside, first, count));
        taken.push(outside);
        inside += count;
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(mappings: &[LinuxIdMapping]) -> Vec<(u32, u32, u32)> {
        mappings.iter().map(|m| (m.container_id(), m.host_id(), m.size())).collect()
    }

    #[test]
    fn subordinate_ids_are_those_of_the_name_or_the_number() {
        let text = "alice:100000:65536\n# comment\nbob:1:x\n1000:300000:10\nalice:200000:0\nmallory:5:5\n1000000:6:6\n";
        assert_eq!(subordinate(text, "alice", 1000), [(100_000, 65536), (300_000, 10)]);
        assert!(subordinate(text, "bob", 1001).is_empty());
        assert!(subordinate(":1:1\n", "", 7).is_empty());
    }

    #[test]
    fn names_are_found_by_numbers() {
        let passwd = "root:x:0:0::/root:/bin/sh\n\nbroken\nalice:x:1000:100::/:/bin/sh\n";
        assert_eq!(name_of(passwd, 1000).as_deref(), Some("alice"));
        assert_eq!(name_of(passwd, 100), None);
    }

    #[test]
    fn groups_go_by_the_user_and_not_by_his_group() {
        let subgid = "100:900000:7\n1000:300000:10\nalice:100000:65536\n";
        let ids = Ids::of((1000, "alice"), 100, "alice:200000:5\n", subgid);
        assert_eq!(numbers(&ids.users), [(0, 1000, 1), (1, 200_000, 5)]);
        assert_eq!(numbers(&ids.groups), [(0, 100, 1), (1, 300_000, 10), (11, 100_000, 65536)]);
        assert!(ids.has_group(0) && ids.has_group(65_546) && !ids.has_group(65_547));
        let alone = Ids::of((1000, ""), 100, "", "");
        assert_eq!((numbers(&alone.users), numbers(&alone.groups)), (vec![(0, 1000, 1)], vec![(0, 100, 1)]));
        assert!(!alone.has_group(5));
    }

    #[test]
    fn what_the_kernel_would_refuse_is_left_out() {
        let mapped = |ranges: &[(u32, u32)]| numbers(&mappings(1000, ranges.to_vec()));
        let first = [(0, 1000, 1), (1, 100_000, 65536)];
        assert_eq!(mapped(&[(100_000, 65536)]), first);
        // The same again, a part of it, and one with the user himself.
        assert_eq!(mapped(&[(100_000, 65536), (100_000, 65536), (165_535, 2), (999, 2)]), first);
        assert_eq!(mapped(&[(100_000, 65536), (165_536, 2)])[2], (65_537, 165_536, 2));
        // Numbers that are none.
        assert_eq!(mapped(&[(u32::MAX, 1), (u32::MAX - 1, 2), (100_000, 65536), (5, u32::MAX)]), first);
        let many: Vec<_> = (0..400).map(|n| (100_000 + n * 2, 1)).collect();
        assert_eq!(mappings(1000, many).len(), LINES);
    }
}
