//! Names of images: `[HOST[:PORT]/]PATH[:TAG][@DIGEST]`.
//!
//! A registry's client completes a name before it asks (which host, which tag); the store keeps the complete one. Here
//! shorter forms are found again without knowing which host completes them.

use crate::digest::Digest;
use crate::error::{Error, Result};

/// A name, taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Name<'a> {
    /// The registry, where the name says one: it has a dot or a port, or is `localhost`.
    pub host: Option<&'a str>,
    /// The repository in it.
    pub path: &'a str,
    /// The tag, where the name says one.
    pub tag: Option<&'a str>,
    /// The digest, where the name says one.
    pub digest: Option<Digest>,
}

impl<'a> Name<'a> {
    /// Takes a name apart, and checks it.
    ///
    /// # Errors
    /// When it breaks the distribution-spec's rules for names.
    pub fn parse(name: &'a str) -> Result<Self> {
        let wrong = |reason| Err(Error::InvalidName { name: name.into(), reason });
        let (rest, digest) = match name.split_once('@') {
            Some((rest, digest)) => (rest, Some(Digest::parse(digest)?)),
            None => (name, None),
        };
        let (rest, tag) = match rest.rsplit_once(':') {
            Some((before, tag)) if !tag.contains('/') => (before, Some(tag)),
            _ => (rest, None),
        };
        let (host, path) = match rest.split_once('/') {
            Some((host, path)) if host.contains(['.', ':']) || host == "localhost" => (Some(host), path),
            _ => (None, rest),
        };
        if name.len() > 512 {
            return wrong("it is longer than 512 bytes");
        }
        if host.is_some_and(|host| !is_host(host)) {
            return wrong("its registry is no host name");
        }
        if !path.split('/').all(is_component) {
            return wrong("its parts must be lower-case letters and digits, with single separators between them");
        }
        if tag.is_some_and(|tag| !is_tag(tag)) {
            return wrong("its tag must be letters, digits, dots, dashes and underscores, 128 at most");
        }
        Ok(Self { host, path, tag, digest })
    }

    /// Whether a stored name, complete with tag or digest, is what this one means.
    fn means(&self, stored: &Self) -> bool {
        let tag = self.tag.or_else(|| self.digest.is_none().then_some("latest"));
        let library = |short: &str| stored.path.strip_prefix("library/") == Some(short);
        let path = self.path == stored.path || (!self.path.contains('/') && library(self.path));
        let host = self.host.is_none() || self.host == stored.host;
        let version = match &self.digest {
            Some(digest) => stored.digest.as_ref() == Some(digest),
            None => stored.tag == tag && stored.digest.is_none(),
        };
        host && path && version
    }
}

/// Completes a name that nobody's registry completes: with the tag `latest`.
///
/// # Errors
/// When it is no name for an image, or is one of a digest, which nobody gives.
pub fn with_tag(name: &str) -> Result<String> {
    let parsed = Name::parse(name)?;
    if parsed.digest.is_some() {
        return Err(Error::InvalidName {
            name: name.into(),
            reason: "a name with a digest cannot be given to an image",
        });
    }
    Ok(if parsed.tag.is_some() { name.to_owned() } else { format!("{name}:latest") })
}

/// Whether `stored` is meant by `asked`.
pub(crate) fn matches(asked: &Name<'_>, stored: &str) -> bool {
    Name::parse(stored).is_ok_and(|stored| asked.means(&stored))
}

/// What people are shown: the repository and the tag of a stored name.
pub fn split(stored: &str) -> (&str, &str) {
    let bare = stored.split_once('@').map_or(stored, |(bare, _)| bare);
    match bare.rsplit_once(':') {
        Some((repository, tag)) if !tag.contains('/') => (repository, tag),
        _ => (bare, "<none>"),
    }
}

fn is_host(host: &str) -> bool {
    let begins = host.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric() || b == b'[');
    begins && host.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._:[]".contains(&b))
}

fn is_component(part: &str) -> bool {
    let lower = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = part.as_bytes();
    let ends = bytes.first().is_some_and(|b| lower(*b)) && bytes.last().is_some_and(|b| lower(*b));
    let separators = part.split(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit()).filter(|s| !s.is_empty());
    ends && separators.into_iter().all(|s| matches!(s, "." | "_" | "__") || s.bytes().all(|b| b == b'-'))
}

fn is_tag(tag: &str) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    (1..=128).contains(&tag.len()) && word(tag.as_bytes()[0]) && tag.bytes().all(|b| word(b) || b == b'.' || b == b'-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_taken_apart() {
        let parsed = Name::parse("localhost:5000/a/b-c:v1.2").unwrap();
        assert_eq!((parsed.host, parsed.path, parsed.tag), (Some("localhost:5000"), "a/b-c", Some("v1.2")));
        let parsed = Name::parse("busybox").unwrap();
        assert_eq!((parsed.host, parsed.path, parsed.tag), (None, "busybox", None));
        let parsed = Name::parse("team/tool").unwrap();
        assert_eq!((parsed.host, parsed.path), (None, "team/tool"));
        let digest = Digest::of(b"x");
        assert_eq!(Name::parse(&format!("a@{digest}")).unwrap().digest, Some(digest));
    }

    #[test]
    fn names_that_break_the_rules_are_refused() {
        for bad in [
            "",
            "A",
            "a//b",
            "/a",
            "a/",
            "a:",
            "a:-x",
            "a b",
            "../x",
            "a/../b",
            ".a",
            "a.",
            "a@sha256:1",
            "a..b",
            "a\n",
            "a:b:c",
            "h st.x/a",
            "-",
            "a___b",
            "a:\u{e9}",
        ] {
            assert!(Name::parse(bad).is_err(), "{bad:?}");
        }
        assert!(Name::parse(&"a".repeat(513)).is_err());
        assert!(with_tag(&format!("a@{}", Digest::of(b"x"))).is_err());
    }

    #[test]
    fn short_forms_mean_complete_names() {
        let means = |asked: &str, stored: &str| matches(&Name::parse(asked).unwrap(), stored);
        assert!(means("busybox", "reg.example/library/busybox:latest"));
        assert!(means("busybox", "busybox:latest"));
        assert!(means("busybox:1", "reg.example/library/busybox:1"));
        assert!(means("reg.example/busybox", "reg.example/library/busybox:latest"));
        assert!(means("team/tool:2", "localhost:5000/team/tool:2"));
        assert!(!means("tool:2", "localhost:5000/team/tool:2"));
        assert!(!means("busybox", "reg.example/library/busybox:1"));
        assert!(!means("other.example/busybox", "reg.example/library/busybox:latest"));
        let (one, other) = (Digest::of(b"1"), Digest::of(b"2"));
        assert!(means(&format!("busybox@{one}"), &format!("reg.example/library/busybox@{one}")));
        assert!(!means(&format!("busybox@{one}"), &format!("reg.example/library/busybox@{other}")));
        assert!(!means("busybox", &format!("reg.example/library/busybox@{one}")));
    }
}
