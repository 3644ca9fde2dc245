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
    pack(
        archive,
        &[("manifest.json", manifest.as_bytes()), (config_name.as_str(), config.as_bytes()), ("layer.tar", &layer)],
    );
}

/// Writes an image in the CNCF layout for WASM artifacts to `archive`: one layer, which is `module` itself. `kinds` are the
/// types of its configuration and of its layer.
///
/// # Panics
/// When the archive cannot be written.
pub fn write_artifact(archive: &Path, name: &str, module: &[u8], kinds: (&str, &str)) {
    let digest = |data: &[u8]| format!("{:x}", Sha256::digest(data));
    let descriptor = |kind: &str, data: &[u8]| json!({"mediaType": kind, "digest": format!("sha256:{}", digest(data)), "size": data.len()});
    // What an ordinary configuration needs besides does no harm in the other one.
    let config = json!({
        "created": "2026-01-01T00:00:00Z",
        "architecture": "wasm",
        "os": "wasip1",
        "layerDigests": [format!("sha256:{}", digest(module))],
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": []},
    })
    .to_string();
    let manifest_kind = "application/vnd.oci.image.manifest.v1+json";
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": manifest_kind,
        "config": descriptor(kinds.0, config.as_bytes()),
        "layers": [descriptor(kinds.1, module)],
    })
    .to_string();
    let mut entry = descriptor(manifest_kind, manifest.as_bytes());
    entry["annotations"] = json!({"io.containerd.image.name": name});
    let index = json!({"schemaVersion": 2, "manifests": [entry]}).to_string();
    let blob = |data: &[u8]| format!("blobs/sha256/{}", digest(data));
    let paths = [blob(config.as_bytes()), blob(manifest.as_bytes()), blob(module)];
    pack(
        archive,
        &[
            ("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#),
            ("index.json", index.as_bytes()),
            (&paths[0], config.as_bytes()),
            (&paths[1], manifest.as_bytes()),
            (&paths[2], module),
        ],
    );
}

fn pack(archive: &Path, files: &[(&str, &[u8])]) {
    let mut out = tar::Builder::new(File::create(archive).expect("create the archive"));
    for (name, data) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(data.len() as u64);
        header.set_mode(0o644);
        out.append_data(&mut header, name, *data).expect("pack the image");
    }
    out.finish().expect("pack the image");
}
