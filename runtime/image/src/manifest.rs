//! Manifests and indexes, as the image-spec and Docker's schema 2 describe them.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::error::{Error, Result};

/// Media types that are known here.
pub mod media_type {
    /// An index of the image-spec.
    pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
    /// A manifest of the image-spec.
    pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
    /// A configuration of the image-spec.
    pub const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
    /// A layer of the image-spec, not compressed.
    pub const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
    /// Docker's index.
    pub const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
    /// Docker's manifest.
    pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
    /// Docker's configuration.
    pub const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
    /// The configuration of a WASM artifact.
    pub const WASM_CONFIG: &str = "application/vnd.wasm.config.v0+json";
    /// A WASM module or component as a layer.
    pub const WASM: &str = "application/wasm";

    /// Whether a layer is a WASM module or component, also in the forms before there was a common one.
    pub fn is_wasm(kind: &str) -> bool {
        kind == WASM || (kind.starts_with("application/vnd.") && kind.ends_with("+wasm"))
    }

    /// Whether a layer is an archive of files.
    pub fn is_files(kind: &str) -> bool {
        let archive = kind.starts_with("application/vnd.oci.image.layer.")
            || (kind.starts_with("application/vnd.docker.") && kind.contains(".diff.tar"))
            || kind == "application/vnd.docker.image.rootfs.diff.tar";
        archive && !kind.contains("encrypted")
    }
}

/// The largest manifest, index or configuration that is read, in bytes: what registries accept, too.
pub const DOCUMENT_LIMIT: u64 = 4 << 20;

/// A reference to content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// What it is.
    #[serde(default)]
    pub media_type: String,
    /// Its digest.
    pub digest: Digest,
    /// Its length in bytes.
    pub size: u64,
    /// What it is for, in an index.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
    /// Whatever else is said of it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

/// What an image runs on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    /// As Go calls it: `amd64`, `arm64`, `wasm`.
    #[serde(default)]
    pub architecture: String,
    /// As Go calls it: `linux`, `wasip1`.
    #[serde(default)]
    pub os: String,
    /// The variant of the processor: `v7`, `v8`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
}

impl Platform {
    /// This machine's.
    pub fn host() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            "x86" => "386",
            "powerpc64" => "ppc64le",
            other => other,
        };
        Self { architecture: architecture.into(), os: "linux".into(), variant: None }
    }

    /// Reads `OS/ARCHITECTURE[/VARIANT]`.
    ///
    /// # Errors
    /// When it is not of that form.
    pub fn parse(text: &str) -> Result<Self> {
        let parts: Vec<&str> = text.split('/').collect();
        match parts[..] {
            [os, architecture] if !os.is_empty() && !architecture.is_empty() => {
                Ok(Self { architecture: architecture.into(), os: os.into(), variant: None })
            }
            [os, architecture, variant] if parts.iter().all(|part| !part.is_empty()) => {
                Ok(Self { architecture: architecture.into(), os: os.into(), variant: Some(variant.into()) })
            }
            _ => Err(Error::invalid("platform", format!("{text:?} is not of the form OS/ARCHITECTURE[/VARIANT]"))),
        }
    }

    /// Whether what runs on `other` runs where this one is asked for.
    fn accepts(&self, other: &Self) -> bool {
        let variant = match (self.variant.as_deref(), other.variant.as_deref()) {
            (None, _) | (_, None) => true,
            (Some(wanted), Some(offered)) => wanted == offered,
        };
        self.os == other.os && self.architecture == other.architecture && variant
    }

    fn is_wasm(&self) -> bool {
        self.architecture == "wasm"
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        self.variant.as_ref().map_or(Ok(()), |variant| write!(f, "/{variant}"))
    }
}

/// One image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    /// Always 2.
    pub schema_version: u32,
    /// What this document is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub media_type: Option<String>,
    /// What kind of artifact it is, if it is not a container's image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    /// Its configuration.
    pub config: Descriptor,
    /// Its layers, the lowest first.
    pub layers: Vec<Descriptor>,
    /// Whatever else is said of it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

/// Images for several platforms.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Index {
    /// Always 2.
    pub schema_version: u32,
    /// What this document is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub media_type: Option<String>,
    /// Their manifests.
    pub manifests: Vec<Descriptor>,
}

/// What a registry has under a name.
#[derive(Clone, Debug)]
pub enum Document {
    /// One image.
    Manifest(Manifest),
    /// A choice of images.
    Index(Index),
}

impl Document {
    /// Reads a manifest or an index.
    ///
    /// # Errors
    /// When it is neither, and by name when it is one of formats that nobody makes any more.
    pub fn parse(content: &[u8]) -> Result<Self> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Probe {
            #[serde(default)]
            schema_version: u32,
            #[serde(default)]
            media_type: Option<String>,
            #[serde(default)]
            manifests: Option<serde::de::IgnoredAny>,
            #[serde(default)]
            layers: Option<serde::de::IgnoredAny>,
        }
        let bad = |reason: String| Error::invalid("image manifest", reason);
        let probe: Probe = serde_json::from_slice(content).map_err(|e| bad(e.to_string()))?;
        if probe.schema_version != 2 {
            return Err(bad(format!(
                "its schemaVersion is {}, and only 2 is supported: push the image again with a present tool",
                probe.schema_version
            )));
        }
        // A document that is both could be taken for either by different readers.
        match (probe.media_type.as_deref(), probe.manifests.is_some(), probe.layers.is_some()) {
            (_, true, true) => Err(bad("it has manifests and layers at once".into())),
            (None | Some(media_type::OCI_INDEX | media_type::DOCKER_INDEX), true, false) => {
                serde_json::from_slice(content).map(Self::Index).map_err(|e| bad(e.to_string()))
            }
            (None | Some(media_type::OCI_MANIFEST | media_type::DOCKER_MANIFEST), false, true) => {
                serde_json::from_slice(content).map(Self::Manifest).map_err(|e| bad(e.to_string()))
            }
            (kind, ..) => Err(bad(format!("its media type is {}", kind.unwrap_or("unknown")))),
        }
    }
}

impl Index {
    /// The image for a platform. Where a platform is not asked for by name, one for WASM is taken if there is none for the
    /// machine.
    ///
    /// # Errors
    /// When there is none; the text says which there are.
    pub fn choose(&self, wanted: Option<&Platform>) -> Result<&Descriptor> {
        // Attestations that builders add are for the platform unknown/unknown.
        let known = || self.manifests.iter().filter(|m| m.platform.as_ref().is_none_or(|p| p.os != "unknown"));
        let platform = wanted.cloned().unwrap_or_else(Platform::host);
        let fits = |m: &&Descriptor| m.platform.as_ref().is_some_and(|p| platform.accepts(p));
        let exact = known().filter(|m| m.platform.as_ref() == Some(&platform)).chain(known().filter(fits)).next();
        let wasm = || known().find(|m| m.platform.as_ref().is_some_and(Platform::is_wasm)).filter(|_| wanted.is_none());
        let only = || match known().collect::<Vec<_>>()[..] {
            [one] if one.platform.is_none() => Some(one),
            _ => None,
        };
        exact.or_else(wasm).or_else(only).ok_or_else(|| {
            let there: Vec<String> = known().filter_map(|m| m.platform.as_ref()).map(ToString::to_string).collect();
            let there = if there.is_empty() { "nothing".into() } else { there.join(", ") };
            Error::invalid("image index", format!("it has nothing for {platform}, but {there} (see --platform)"))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index(platforms: &[&str]) -> Index {
        let manifests = platforms.iter().map(|text| {
            let platform = (!text.is_empty()).then(|| Platform::parse(text).unwrap());
            let digest = Digest::of(text.as_bytes());
            Descriptor {
                media_type: media_type::OCI_MANIFEST.into(),
                digest,
                size: 1,
                platform,
                annotations: BTreeMap::new(),
            }
        });
        Index { schema_version: 2, media_type: None, manifests: manifests.collect() }
    }

    fn chosen(platforms: &[&str], wanted: Option<&str>) -> Option<String> {
        let wanted = wanted.map(|text| Platform::parse(text).unwrap());
        let index = index(platforms);
        index.choose(wanted.as_ref()).ok().map(|m| m.platform.as_ref().map_or(String::new(), ToString::to_string))
    }

    #[test]
    fn the_platform_that_is_asked_for_is_chosen_and_no_other() {
        let all = ["linux/arm/v6", "linux/arm/v7", "linux/amd64", "unknown/unknown", "linux/arm64/v8"];
        assert_eq!(chosen(&all, Some("linux/amd64")).unwrap(), "linux/amd64");
        assert_eq!(chosen(&all, Some("linux/arm64")).unwrap(), "linux/arm64/v8");
        assert_eq!(chosen(&all, Some("linux/arm/v7")).unwrap(), "linux/arm/v7");
        assert_eq!(chosen(&all, Some("linux/riscv64")), None);
        assert_eq!(chosen(&all, Some("unknown/unknown")), None);
        assert_eq!(chosen(&["wasip1/wasm", "linux/s390x"], None).unwrap(), "wasip1/wasm");
        assert_eq!(chosen(&["wasip1/wasm", "linux/s390x"], Some("linux/amd64")), None);
        assert_eq!(chosen(&["", "unknown/unknown"], None).unwrap(), "");
    }

    #[test]
    fn documents_of_two_kinds_or_of_none_are_refused() {
        let parse = |text: &str| Document::parse(text.as_bytes());
        let zero = Digest::of(b"");
        let config = format!(r#"{{"digest":"{zero}","size":0}}"#);
        assert!(matches!(
            parse(&format!(r#"{{"schemaVersion":2,"config":{config},"layers":[]}}"#)),
            Ok(Document::Manifest(_))
        ));
        assert!(matches!(parse(r#"{"schemaVersion":2,"manifests":[]}"#), Ok(Document::Index(_))));
        for bad in [
            "",
            "[]",
            r#"{"schemaVersion":1,"layers":[]}"#,
            &format!(r#"{{"schemaVersion":2,"config":{config},"layers":[],"manifests":[]}}"#),
            &format!(r#"{{"schemaVersion":2,"mediaType":"{}","config":{config},"layers":[]}}"#, media_type::OCI_INDEX),
            r#"{"schemaVersion":2,"config":{"digest":"sha256:no","size":0},"layers":[]}"#,
            r#"{"schemaVersion":2,"mediaType":"text/plain","layers":[]}"#,
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
