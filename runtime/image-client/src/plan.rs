//! What an image consists of, known from its manifest and configuration before its layers are there.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Result, bail, ensure};
use runx_image::layer::chain_ids;
use runx_image::manifest::{Document, Manifest, media_type};
use runx_image::{Digest, Image, ImageConfiguration, LayerRecord};

/// More than any engine makes: overlay takes 500.
const LAYERS_LIMIT: usize = 500;

/// The names that an image shall have.
#[derive(Clone, Debug, Default)]
pub(crate) struct Names {
    pub(crate) names: Vec<String>,
    pub(crate) repo_digests: Vec<String>,
    /// Whether the default registry completed them.
    pub(crate) short: bool,
}

/// An image before its layers.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) manifest: Manifest,
    /// The manifest's own digest and media type.
    pub(crate) digest: Digest,
    media_type: String,
    config: ImageConfiguration,
    /// What the layers are when they are unpacked; none for a module.
    pub(crate) files: Option<Vec<Ids>>,
}

/// A layer's digest before its compression, and that of it with all below it.
#[derive(Clone, Debug)]
pub(crate) struct Ids {
    pub(crate) diff_id: Digest,
    pub(crate) chain_id: Digest,
}

/// A layer that is in the store.
#[derive(Clone, Debug)]
pub(crate) struct Stored {
    /// Its tree; none for a module.
    pub(crate) key: Option<Digest>,
    pub(crate) size: u64,
}

/// Reads a manifest, which must not be an index.
pub(crate) fn manifest(content: &[u8]) -> Result<Manifest> {
    match Document::parse(content)? {
        Document::Manifest(manifest) => Ok(manifest),
        Document::Index(_) => bail!("an index names another index, where a manifest is expected"),
    }
}

impl Plan {
    /// From the two documents, whose digests are checked.
    pub(crate) fn new(content: &[u8], config: &[u8]) -> Result<Self> {
        let manifest = manifest(content)?;
        ensure!(manifest.layers.len() <= LAYERS_LIMIT, "the image has more than {LAYERS_LIMIT} layers");
        let layers = || manifest.layers.iter().map(|layer| layer.media_type.as_str());
        let kind = manifest.config.media_type.as_str();
        let is_module =
            kind == media_type::WASM_CONFIG || (manifest.layers.len() == 1 && layers().all(media_type::is_wasm));
        let known = [media_type::OCI_CONFIG, media_type::DOCKER_CONFIG, ""].contains(&kind);
        let configuration = ImageConfiguration::parse(config);
        let (configuration, files) = if is_module {
            ensure!(
                manifest.layers.len() == 1 && layers().all(media_type::is_wasm),
                "the WASM artifact has not exactly one layer of the type {}",
                media_type::WASM
            );
            (configuration.unwrap_or_default(), None)
        } else if known {
            if let Some(other) = layers().find(|layer| !media_type::is_files(layer)) {
                bail!("the image has a layer of the type {other:?}, which is not supported");
            }
            let configuration = configuration?;
            let diff_ids = &configuration.rootfs.diff_ids;
            ensure!(
                diff_ids.len() == manifest.layers.len(),
                "the image's manifest has {} layers, and its configuration {}",
                manifest.layers.len(),
                diff_ids.len()
            );
            let ids = diff_ids.iter().cloned().zip(chain_ids(diff_ids));
            let files = ids.map(|(diff_id, chain_id)| Ids { diff_id, chain_id }).collect();
            (configuration, Some(files))
        } else {
            let what = manifest.artifact_type.as_deref().unwrap_or(kind);
            bail!("this is neither a container's image nor a WASM module, but an artifact of the type {what:?}");
        };
        let media_type = manifest.media_type.clone().unwrap_or_else(|| media_type::OCI_MANIFEST.into());
        Ok(Self { digest: Digest::of(content), manifest, media_type, config: configuration, files })
    }

    /// What the store keeps of it.
    pub(crate) fn image(&self, stored: &[Stored], names: Names) -> Image {
        let records = self.manifest.layers.iter().zip(stored);
        let records = records
            .map(|(descriptor, stored)| LayerRecord { descriptor: descriptor.clone(), tree: stored.key.clone() });
        let platform = match (self.config.os.as_str(), self.config.architecture.as_str()) {
            ("", "") => "unknown".to_owned(),
            (os, architecture) => match &self.config.variant {
                Some(variant) => format!("{os}/{architecture}/{variant}"),
                None => format!("{os}/{architecture}"),
            },
        };
        Image {
            id: self.manifest.config.digest.clone(),
            digest: self.digest.clone(),
            media_type: self.media_type.clone(),
            short: if names.short { names.names.clone() } else { Vec::new() },
            names: names.names,
            repo_digests: names.repo_digests,
            created: self.config.created.clone(),
            stored: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
            size: stored.iter().map(|layer| layer.size).sum(),
            platform,
            config: self.manifest.config.clone(),
            layers: records.collect(),
        }
    }
}
