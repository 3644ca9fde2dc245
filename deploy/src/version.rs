//! containerd's version, and what follows from it.

use std::fmt;

/// Major and minor version, and all of it as the program says it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Version {
    /// The first number.
    pub(crate) major: u32,
    /// The second number.
    pub(crate) minor: u32,
    /// The whole word.
    pub(crate) text: String,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Version {
    /// From what `containerd --version` prints.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        text.split_ascii_whitespace().find_map(|word| {
            let plain = word.strip_prefix('v').unwrap_or(word);
            let mut parts = plain.split('.');
            let major = parts.next()?.parse().ok()?;
            let minor = parts.next()?.parse().ok()?;
            parts.next()?;
            Some(Self { major, minor, text: plain.to_owned() })
        })
    }

    /// Whether files that are imported add to tables. Before, they replace the whole table of a plugin.
    pub(crate) fn merges_imports(&self) -> bool {
        self.major >= 2
    }

    /// The type of a runtime whose shim is at a path. 2.0 to 2.3, before 2.2.7 and 2.3.4, ask only those of runc's
    /// type for their features, and without them there are no pods with users of their own. Before 1.7 CRI does not look at the path (containerd's issue
    /// 8207), and a path as the type is what it takes.
    pub(crate) fn runtime_type(&self, shim: &str) -> String {
        match (self.major, self.minor) {
            (..=1, ..=6) => shim.to_owned(),
            (2, ..=3) => "io.containerd.runc.v2".to_owned(),
            _ => "io.containerd.runx.v1".to_owned(),
        }
    }

    /// Whether options of types that containerd does not know reach the shim. Before 1.7 only the name of a file does.
    pub(crate) fn passes_options(&self) -> bool {
        (self.major, self.minor) >= (1, 7)
    }

    /// The version of a new configuration, which this containerd and all later ones read.
    pub(crate) fn new_configuration(&self) -> i64 {
        match (self.major, self.minor) {
            (..=1, _) => 2,
            (2, ..=2) => 3,
            // It converts older ones, and warns of that.
            _ => 4,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_only_runcs_type_is_asked_for_its_features_it_is_runcs() {
        let of = |major, minor| Version { major, minor, text: String::new() }.runtime_type("/opt/shim");
        assert_eq!(of(1, 6), "/opt/shim");
        assert_eq!(of(1, 7), "io.containerd.runx.v1");
        for minor in 0..4 {
            assert_eq!(of(2, minor), "io.containerd.runc.v2", "2.{minor}");
        }
        assert_eq!(of(2, 4), "io.containerd.runx.v1");
    }

    #[test]
    fn versions_of_all_builds_are_read() {
        let of = |text| Version::parse(text).map(|version| (version.major, version.minor));
        assert_eq!(of("containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1-1+deb12u3"), Some((1, 6)));
        assert_eq!(of("containerd github.com/containerd/containerd/v2 2.1.9+unknown "), Some((2, 1)));
        assert_eq!(of("containerd containerd.io v2.3.0 abc"), Some((2, 3)));
        assert_eq!(of("containerd github.com/k3s-io/containerd v1.7.23-k3s2"), Some((1, 7)));
        assert_eq!(of("runc 1.1"), None);
    }
}
