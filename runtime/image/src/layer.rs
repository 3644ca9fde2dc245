//! Layers as the store keeps them: each is a directory of its own in the form that overlay wants, so that layers can be
//! unpacked at the same time and none has to know what lies below it.
//!
//! The exception is a layer whose archive names files below directories that it does not name itself. Such a directory's
//! owner and mode are those of the layer below, so the layer is kept for this chain of layers alone.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::error::{Context, Error, Result};

/// The extended attribute that makes a directory hide what is below it, as the machine's root may set it.
pub const OPAQUE_TRUSTED: &str = "trusted.overlay.opaque";
/// The same for the root of a user namespace; overlay is then mounted with `userxattr`.
pub const OPAQUE_USER: &str = "user.overlay.opaque";

/// Which attributes overlay uses where this process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Form {
    /// `trusted.overlay.*`
    Trusted,
    /// `user.overlay.*`
    User,
}

impl Form {
    /// The one for this process: only in the machine's own user namespace may attributes be trusted.
    pub fn current() -> Self {
        let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
        let initial = map.is_empty() || map.split_ascii_whitespace().eq(["0", "0", "4294967295"]);
        if initial { Self::Trusted } else { Self::User }
    }

    /// The attribute of an opaque directory.
    pub fn opaque(self) -> &'static str {
        match self {
            Self::Trusted => OPAQUE_TRUSTED,
            Self::User => OPAQUE_USER,
        }
    }
}

/// What is known of an unpacked layer; `layer.json` beside its tree.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Layer {
    /// The digest of its archive, not compressed.
    pub diff_id: Digest,
    /// The chain that it is for, if it is for one alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chain_id: Option<Digest>,
    /// The sum of its files' lengths in bytes.
    pub size: u64,
    /// How many entries it has.
    pub entries: u64,
    /// How opaque directories are marked.
    pub form: Form,
    /// The kernel's id of the boot in which it was unpacked: until an image has it, it is trusted in this one only, because
    /// it may not have reached the disk.
    pub boot: String,
}

/// The id of a chain of layers, as the image-spec defines it: for each layer, of it with all that are below it.
pub fn chain_ids(diff_ids: &[Digest]) -> Vec<Digest> {
    let mut chains: Vec<Digest> = Vec::with_capacity(diff_ids.len());
    for diff_id in diff_ids {
        let chain = match chains.last() {
            Some(below) => Digest::of(format!("{below} {diff_id}").as_bytes()),
            None => diff_id.clone(),
        };
        chains.push(chain);
    }
    chains
}

impl Layer {
    /// Reads `layer.json` of a layer's directory; nothing if there is none.
    pub(crate) fn read(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join("layer.json");
        let Some(content) = crate::files::read(&path)? else { return Ok(None) };
        let parsed = serde_json::from_slice(&content);
        parsed.map(Some).map_err(|e| Error::invalid(path.display().to_string(), e))
    }

    pub(crate) fn write(&self, dir: &Path) -> Result<()> {
        let path = dir.join("layer.json");
        let content = serde_json::to_vec(self).map_err(|e| Error::invalid("layer", e))?;
        std::fs::write(&path, content).on("write", &path)
    }
}

/// The kernel's id of this boot.
pub fn boot_id() -> Result<String> {
    const FILE: &str = "/proc/sys/kernel/random/boot_id";
    std::fs::read_to_string(FILE).on("read", FILE).map(|id| id.trim_end().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chains_are_those_of_the_image_spec() {
        let [a, b, c] = [b"a", b"b", b"c"].map(|x| Digest::of(x));
        let ab = Digest::of(format!("{a} {b}").as_bytes());
        let abc = Digest::of(format!("{ab} {c}").as_bytes());
        assert_eq!(chain_ids(&[a.clone(), b, c]), [a, ab, abc]);
        assert!(chain_ids(&[]).is_empty());
    }
}
