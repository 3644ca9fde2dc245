//! Names of images in registries, completed.

use anyhow::{Context as _, Result};
use oci_client::Reference;
use runx_image::Digest;
use runx_image::name::Name;

use crate::plan::Names;

/// A name, and how it was completed.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    pub(crate) reference: Reference,
    /// The host was not in it.
    short: bool,
}

impl Wanted {
    /// Reads a name. Without a host it is `default_registry`'s, or that of the library that speaks to registries.
    pub(crate) fn parse(name: &str, default_registry: Option<&str>) -> Result<Self> {
        // As other programs write it.
        let name = name.strip_prefix("docker://").unwrap_or(name);
        let short = Name::parse(name)?.host.is_none();
        let whole = match default_registry {
            Some(host) if short => format!("{}/{name}", host.trim_end_matches('/')),
            _ => name.to_owned(),
        };
        let reference = whole.parse().with_context(|| format!("invalid image name {name:?}"))?;
        Ok(Self { reference, short })
    }

    /// The registry as the name has it.
    pub(crate) fn registry(&self) -> &str {
        self.reference.registry()
    }

    /// The host and port that are spoken to.
    pub(crate) fn host(&self) -> &str {
        self.reference.resolve_registry()
    }

    /// The same repository by a digest.
    pub(crate) fn at(&self, digest: &Digest) -> Reference {
        self.reference.clone_with_digest(digest.to_string())
    }

    /// What the image is called afterwards. `digests` are those of the manifest, and of the index it was chosen from.
    pub(crate) fn names(&self, digests: &[&Digest]) -> Names {
        let repository = format!("{}/{}", self.reference.registry(), self.reference.repository());
        let tag = self.reference.tag();
        Names {
            names: tag.map(|tag| format!("{repository}:{tag}")).into_iter().collect(),
            repo_digests: digests.iter().map(|digest| format!("{repository}@{digest}")).collect(),
            short: self.short,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_completed_and_short_ones_remembered() {
        let wanted = Wanted::parse("busybox", Some("registry.example:5000")).unwrap();
        assert_eq!(wanted.registry(), "registry.example:5000");
        let names = wanted.names(&[&Digest::of(b"x")]);
        assert_eq!(names.names, ["registry.example:5000/busybox:latest"]);
        assert!(names.short);
        let wanted = Wanted::parse("docker://localhost:5000/team/tool:v2", Some("registry.example")).unwrap();
        assert_eq!(wanted.names(&[]).names, ["localhost:5000/team/tool:v2"]);
        assert!(!wanted.names(&[]).short);
        let by_digest = format!("localhost:5000/tool@{}", Digest::of(b"x"));
        let names = Wanted::parse(&by_digest, None).unwrap().names(&[&Digest::of(b"x")]);
        assert_eq!((names.names.len(), names.repo_digests), (0, vec![by_digest]));
        for bad in ["", "UPPER", "a b", "../x", "localhost:5000/", "a@sha256:1"] {
            assert!(Wanted::parse(bad, None).is_err(), "{bad}");
        }
    }
}
