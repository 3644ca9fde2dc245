//! Images, as archives that containerd imports.

use std::fs::File;
use std::path::Path;

use serde_json::json;
use sha2::{Digest, Sha256};

/// Writes an image of one layer, the content of `rootfs`, to `archive`.
///
/// # Panics
/// When a file cannot be read or written.
pub fn write(archive: &Path, name: &str, rootfs: &Path, entrypoint: &[&str]) {
    let mut layer = tar::Builder::new(Vec::new());
    layer.follow_symlinks(false);
    layer.append_dir_all(".", rootfs).expect("pack the layer");
    let layer = layer.into_inner().expect("pack the layer");
    let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let config = json!({
        "architecture": architecture,
        "os": "linux",
        "config": {"Env": ["PATH=/bin"], "Entrypoint": entrypoint, "WorkingDir": "/"},
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{:x}", Sha256::digest(&layer))]},
        "history": [{"created": "1970-01-01T00:00:00Z"}]
    })
    .to_string();
    let config_name = format!("{:x}.json", Sha256::digest(&config));
    let manifest = json!([{"Config": config_name, "RepoTags": [name], "Layers": ["layer.tar"]}]).to_string();
    let mut out = tar::Builder::new(File::create(archive).expect("create the archive"));
    for (name, data) in
        [("manifest.json", manifest.as_bytes()), (config_name.as_str(), config.as_bytes()), ("layer.tar", &layer)]
    {
        let mut header = tar::Header::new_gnu();
        header.set_size(data.len() as u64);
        header.set_mode(0o644);
        out.append_data(&mut header, name, data).expect("pack the image");
    }
    out.finish().expect("pack the image");
}
