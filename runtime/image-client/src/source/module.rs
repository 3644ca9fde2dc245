//! An image of a WASM module or component: the artifact that the CNCF's working group describes, with one layer that is the
//! module itself.

use std::fs::File;
use std::io::{self, Read as _, Seek as _};

use anyhow::{Context as _, Result, bail};
use runx_image::manifest::{Descriptor, Manifest, media_type};
use runx_image::{Image, Ingest};
use serde_json::json;

use super::rootfs::now;
use crate::plan::{Names, Plan, Stored};

/// How every module and component begins.
pub(crate) const MAGIC: &[u8] = b"\0asm";

/// From a file with a module or a component.
pub(crate) fn import_module(ingest: &Ingest, mut file: File, names: Names) -> Result<Image> {
    let mut header = [0; 8];
    file.rewind().and_then(|()| file.read_exact(&mut header)).context("read the module")?;
    let system = match header[4..] {
        [1, 0, 0, 0] => "wasip1",
        // The second number is the layer: 1 is the component model's.
        [_, _, 1, 0] => "wasip2",
        _ => bail!("it begins as a WASM module, of a version that is not known"),
    };
    let mut blob = ingest.fresh_blob()?;
    file.rewind().context("read the module")?;
    io::copy(&mut file, &mut blob).context("store the module")?;
    let (digest, size) = blob.commit()?;
    let config = json!({
        "created": humantime::format_rfc3339_seconds(now()).to_string(),
        "architecture": "wasm",
        "os": system,
        "layerDigests": [digest],
    });
    let config = config.to_string().into_bytes();
    let descriptor = |kind: &str, digest, size| Descriptor {
        media_type: kind.into(),
        digest,
        size,
        platform: None,
        annotations: [].into(),
    };
    let id = ingest.put(&config, None, "the configuration")?;
    let manifest = Manifest {
        schema_version: 2,
        media_type: Some(media_type::OCI_MANIFEST.into()),
        artifact_type: None,
        config: descriptor(media_type::WASM_CONFIG, id, config.len() as u64),
        layers: vec![descriptor(media_type::WASM, digest, size)],
        annotations: [].into(),
    };
    let manifest = serde_json::to_vec(&manifest).context("write the manifest")?;
    ingest.put(&manifest, None, "the manifest")?;
    let plan = Plan::new(&manifest, &config)?;
    Ok(ingest.commit(plan.image(&[Stored { key: None, size }], names))?)
}
