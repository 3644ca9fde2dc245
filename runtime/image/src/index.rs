//! The list of images: `images.json`.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::manifest::Descriptor;
use crate::name::{self, Name};

/// One stored image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// The digest of its configuration, which is what people call an image's id.
    pub id: Digest,
    /// The digest of its manifest.
    pub digest: Digest,
    /// The media type of its manifest.
    pub media_type: String,
    /// Its complete names, with tags; none if another image has them by now.
    #[serde(default)]
    pub names: Vec<String>,
    /// Its names with digests, of the manifest or of the index that it was chosen from.
    #[serde(default)]
    pub repo_digests: Vec<String>,
    /// Those of `names` that were completed with the default registry: a short name means them first.
    #[serde(default)]
    pub short: Vec<String>,
    /// When it was made, as RFC 3339 writes it, if it says so.
    #[serde(default)]
    pub created: Option<String>,
    /// When it came into the store, in seconds since 1970.
    pub stored: u64,
    /// The bytes that its files have when they are unpacked; for a module, the module's.
    pub size: u64,
    /// What it runs on: `linux/amd64`.
    pub platform: String,
    /// Its configuration.
    pub config: Descriptor,
    /// Its layers, the lowest first.
    pub layers: Vec<LayerRecord>,
}

/// One layer of a stored image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerRecord {
    /// As the manifest has it.
    pub descriptor: Descriptor,
    /// The name of its directory in the store, a digest; nothing where it is not one of a root filesystem.
    #[serde(default)]
    pub tree: Option<Digest>,
}

impl Image {
    /// Whether it is a WASM module or component as an artifact, and so has no root filesystem.
    pub fn is_module(&self) -> bool {
        self.layers.iter().any(|layer| layer.tree.is_none())
    }

    /// What errors and tables call it: its first name, or its id.
    pub fn display_name(&self) -> &str {
        self.names.first().map_or(self.id.as_str(), String::as_str)
    }
}

/// All stored images.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Images {
    pub(crate) images: Vec<Image>,
}

impl Images {
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let Some(content) = crate::files::read(path)? else { return Ok(Self::default()) };
        serde_json::from_slice(&content).map_err(|e| Error::invalid(path.display().to_string(), e))
    }

    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        let content = serde_json::to_vec(self).map_err(|e| Error::invalid("list of images", e))?;
        crate::files::replace(path, &content)
    }

    /// Adds an image, which takes its names from whoever had them.
    pub(crate) fn add(&mut self, mut image: Image) {
        for other in &mut self.images {
            other.names.retain(|name| !image.names.contains(name));
            other.short.retain(|name| !image.names.contains(name));
        }
        if let Some(place) = self.images.iter().position(|other| other.digest == image.digest) {
            let old = self.images.remove(place);
            merge(&mut image.names, old.names);
            merge(&mut image.repo_digests, old.repo_digests);
            merge(&mut image.short, old.short);
            image.stored = old.stored;
        }
        self.images.push(image);
    }

    /// The image that is meant by a name, an id, the beginning of an id, or a digest.
    pub(crate) fn find(&self, asked: &str) -> Result<Option<&Image>> {
        if let Ok(digest) = Digest::parse(asked) {
            let newest_first = || self.images.iter().rev();
            let with_digest = newest_first().find(|image| image.digest == digest);
            return Ok(with_digest.or_else(|| newest_first().find(|image| image.id == digest)));
        }
        if let Ok(name) = Name::parse(asked)
            && let Some(image) = self.by_name(asked, &name)?
        {
            return Ok(Some(image));
        }
        self.by_beginning(asked)
    }

    fn by_name(&self, asked: &str, name: &Name<'_>) -> Result<Option<&Image>> {
        let with_latest = format!("{asked}:latest");
        let exact = |stored: &String| stored == asked || (name.tag.is_none() && *stored == with_latest);
        if let Some(image) = self.images.iter().find(|image| image.names.iter().any(exact)) {
            return Ok(Some(image));
        }
        let mut found: Vec<(&Image, &String)> = Vec::new();
        for image in self.images.iter().rev() {
            let names = if name.digest.is_some() { &image.repo_digests } else { &image.names };
            found.extend(names.iter().filter(|stored| name::matches(name, stored)).map(|stored| (image, stored)));
        }
        if let Some((image, _)) = found.iter().find(|(image, stored)| image.short.contains(stored)) {
            return Ok(Some(image));
        }
        match found.first() {
            Some((image, _)) if found.iter().all(|(other, _)| same(image, other)) => Ok(Some(image)),
            Some(_) => {
                let candidates = found.into_iter().map(|(_, stored)| stored.clone()).collect();
                Err(Error::Ambiguous { name: asked.into(), candidates })
            }
            None => Ok(None),
        }
    }

    fn by_beginning(&self, asked: &str) -> Result<Option<&Image>> {
        let hex = asked.strip_prefix("sha256:").unwrap_or(asked);
        if hex.is_empty() || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Ok(None);
        }
        let begins = |image: &&Image| image.id.hex().starts_with(hex) || image.digest.hex().starts_with(hex);
        let found: Vec<&Image> = self.images.iter().rev().filter(begins).collect();
        match found.first() {
            Some(image) if found.iter().all(|other| same(image, other)) => Ok(Some(image)),
            Some(_) => {
                let candidates = found.iter().map(|image| image.id.to_string()).collect();
                Err(Error::Ambiguous { name: asked.into(), candidates })
            }
            None => Ok(None),
        }
    }
}

/// Two manifests of one configuration have the same files, and differ in how they are compressed.
fn same(one: &Image, other: &Image) -> bool {
    one.id == other.id
}

fn merge(into: &mut Vec<String>, from: Vec<String>) {
    for name in from {
        if !into.contains(&name) {
            into.push(name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(number: u8, names: &[&str]) -> Image {
        let digest = Digest::of(&[number]);
        let id = Digest::of(&[number, 1]);
        let config = Descriptor {
            media_type: String::new(),
            digest: id.clone(),
            size: 1,
            platform: None,
            annotations: [].into(),
        };
        Image {
            repo_digests: names.iter().map(|name| format!("{}@{digest}", name::split(name).0)).collect(),
            names: names.iter().map(|name| (*name).to_owned()).collect(),
            id,
            digest,
            media_type: String::new(),
            short: Vec::new(),
            created: None,
            stored: number.into(),
            size: 0,
            platform: "linux/amd64".into(),
            config,
            layers: Vec::new(),
        }
    }

    fn found(images: &Images, asked: &str) -> Option<u64> {
        images.find(asked).unwrap().map(|image| image.stored)
    }

    #[test]
    fn an_image_is_found_by_all_that_it_is_called() {
        let mut images = Images::default();
        images.add(image(1, &["reg.example/library/busybox:latest"]));
        images.add(image(2, &["localhost:5000/team/tool:v2"]));
        let (digest, id) = (Digest::of(&[1]), Digest::of(&[1, 1]));
        for asked in [
            "busybox".into(),
            "reg.example/busybox".into(),
            "busybox:latest".into(),
            digest.to_string(),
            id.to_string(),
            id.hex()[..12].to_owned(),
            format!("busybox@{digest}"),
        ] {
            assert_eq!(found(&images, &asked), Some(1), "{asked}");
        }
        assert_eq!(found(&images, "team/tool:v2"), Some(2));
        for asked in ["tool:v2", "busybox:1", "", "zzz", "../..", &Digest::of(b"other").to_string()] {
            assert_eq!(found(&images, asked), None, "{asked}");
        }
    }

    #[test]
    fn a_name_belongs_to_the_last_image_that_got_it() {
        let mut images = Images::default();
        images.add(image(1, &["busybox:latest", "busybox:1"]));
        images.add(image(2, &["busybox:latest"]));
        assert_eq!(found(&images, "busybox"), Some(2));
        assert_eq!(found(&images, "busybox:1"), Some(1));
        images.add(image(1, &["other:latest"]));
        assert_eq!(images.images.len(), 2);
        assert_eq!(found(&images, "busybox:1"), Some(1));
        assert_eq!(found(&images, "other"), Some(1));
    }

    #[test]
    fn what_may_mean_two_images_is_refused_unless_one_came_by_the_short_name() {
        let mut images = Images::default();
        images.add(image(1, &["one.example/busybox:latest"]));
        images.add(image(2, &["two.example/busybox:latest"]));
        assert!(matches!(images.find("busybox"), Err(Error::Ambiguous { candidates, .. }) if candidates.len() == 2));
        assert_eq!(found(&images, "one.example/busybox"), Some(1));
        let mut third = image(3, &["three.example/library/busybox:latest"]);
        third.short = third.names.clone();
        images.add(third);
        assert_eq!(found(&images, "busybox"), Some(3));
        assert!(images.find("").unwrap().is_none());
    }
}
