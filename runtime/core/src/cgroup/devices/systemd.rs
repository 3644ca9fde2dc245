//! The rules as systemd can hold them: a list of what is allowed.
//!
//! With version 1 systemd writes its own idea of the devices into the group, also at every daemon-reload, so it has
//! to have the right one.

use super::Rule;

/// What systemd is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::cgroup) enum Allowed {
    /// Every device.
    Everything,
    /// These only: a path or pattern as `DeviceAllow=` takes it, and the access.
    Only(Vec<(String, String)>),
}

/// What a list of rules, the last of which decides, comes down to. systemd can only allow; where the rules are
/// finer than that, it is told less than what they allow.
pub(in crate::cgroup) fn allowed(rules: &[Rule]) -> Allowed {
    let mut everything = false;
    let mut list: Vec<Rule> = Vec::new();
    for rule in rules {
        if rule.is_everything() {
            everything = rule.allow;
            list.clear();
        } else if everything {
            if !rule.allow {
                // All but some: nothing that systemd could be told.
                everything = false;
            }
        } else if rule.allow {
            list.extend(halves(rule));
        } else {
            for denied in halves(rule) {
                list.retain_mut(|allowed| {
                    if !overlap(&denied, allowed) {
                        return true;
                    }
                    allowed.read &= !denied.read;
                    allowed.write &= !denied.write;
                    allowed.mknod &= !denied.mknod;
                    allowed.read || allowed.write || allowed.mknod
                });
            }
        }
    }
    if everything {
        return Allowed::Everything;
    }
    Allowed::Only(list.iter().filter_map(entry).collect())
}

/// A rule for both kinds of device as one for each.
fn halves(rule: &Rule) -> Vec<Rule> {
    let kinds: &[char] = if rule.kind == 'a' { &['b', 'c'] } else { &[rule.kind] };
    kinds.iter().map(|kind| Rule { kind: *kind, ..rule.clone() }).collect()
}

fn overlap(a: &Rule, b: &Rule) -> bool {
    let number = |a: Option<u32>, b: Option<u32>| a.is_none() || b.is_none() || a == b;
    a.kind == b.kind && number(a.major, b.major) && number(a.minor, b.minor)
}

fn entry(rule: &Rule) -> Option<(String, String)> {
    let kind = if rule.kind == 'b' { "block" } else { "char" };
    let path = match (rule.major, rule.minor) {
        (Some(major), Some(minor)) => format!("/dev/{kind}/{major}:{minor}"),
        (Some(major), None) => format!("{kind}-{major}"),
        (None, None) => format!("{kind}-*"),
        // One minor number of every major: nothing that systemd could be told.
        (None, Some(_)) => return None,
    };
    Some((path, rule.access()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(allow: bool, kind: char, major: Option<u32>, minor: Option<u32>, access: &str) -> Rule {
        Rule::new(allow, kind, major, minor, access).unwrap()
    }

    fn only(rules: &[Rule]) -> Vec<String> {
        match allowed(rules) {
            Allowed::Only(list) => list.into_iter().map(|(path, access)| format!("{path} {access}")).collect(),
            Allowed::Everything => panic!("everything is allowed"),
        }
    }

    #[test]
    fn what_is_allowed_is_listed() {
        let deny = rule(false, 'a', None, None, "rwm");
        let rules = [
            deny.clone(),
            rule(true, 'c', Some(1), Some(3), "rw"),
            rule(true, 'b', Some(8), None, "r"),
            rule(true, 'a', None, None, "m"),
        ];
        assert_eq!(only(&rules), ["/dev/char/1:3 rw", "block-8 r", "block-* m", "char-* m"]);
        assert!(only(&[deny, rule(true, 'c', None, Some(7), "rw")]).is_empty());
    }

    #[test]
    fn everything_allowed_is_everything_and_an_exception_makes_it_nothing() {
        let allow = rule(true, 'a', None, None, "rwm");
        assert_eq!(allowed(std::slice::from_ref(&allow)), Allowed::Everything);
        assert!(only(&[allow, rule(false, 'b', Some(8), Some(0), "rwm")]).is_empty());
    }

    #[test]
    fn what_is_denied_later_is_never_told_as_allowed() {
        let rules = [rule(true, 'c', Some(10), None, "rwm"), rule(false, 'c', Some(10), Some(5), "w")];
        assert_eq!(only(&rules), ["char-10 rm"]);
    }
}
