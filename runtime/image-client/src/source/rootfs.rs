//! An image of one layer from a root filesystem: a directory, or an archive of one.

use std::fs::File;
use std::io::{self, BufWriter, Read, Seek as _, Write};
use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, bail, ensure};
use flate2::write::GzEncoder;
use runx_image::config::{Empty, History, ImageConfiguration, RootFs};
use runx_image::manifest::{Descriptor, Manifest, Platform, media_type};
use runx_image::{Digest, Image, Ingest};
use sha2::{Digest as _, Sha256};

use crate::plan::{Names, Plan};
use crate::unpack::{Compression, Decoder, Limit};
use crate::{land, pack};

/// What the image's configuration shall say, as instructions of a Dockerfile.
#[derive(Debug)]
pub(crate) struct Change<'a> {
    pub(crate) instructions: &'a [String],
    pub(crate) platform: Option<Platform>,
}

/// From a directory. Its files are read below it, and links are not followed.
pub(crate) fn import_directory(ingest: &Ingest, dir: &Path, names: Names, change: &Change<'_>) -> Result<Image> {
    let blob = ingest.fresh_blob()?;
    // The least effort: it saves most of the room.
    let mut diff =
        Hashing { to: GzEncoder::new(BufWriter::new(blob), flate2::Compression::fast()), hasher: Sha256::new() };
    pack::directory(dir, &mut diff).with_context(|| format!("read {}", dir.display()))?;
    let diff_id = Digest::finish(diff.hasher);
    let buffered = diff.to.finish().context("compress the layer")?;
    let blob = buffered.into_inner().map_err(io::IntoInnerError::into_error).context("write the layer")?;
    let (digest, size) = blob.commit()?;
    finish(ingest, (digest, size, Compression::Gzip), diff_id, names, change, Limit::Bytes(u64::MAX))
}

/// From an archive, which becomes the layer as it is.
pub(crate) fn import_tarball(
    ingest: &Ingest,
    mut file: File,
    compression: Compression,
    names: Names,
    change: &Change<'_>,
    limit: Limit,
) -> Result<Image> {
    let mut blob = ingest.fresh_blob()?;
    // It was looked at before.
    file.rewind().context("read the archive")?;
    ensure!(io::copy(&mut file, &mut blob).context("store the archive")? > 0, "the archive is empty");
    let (digest, size) = blob.commit()?;
    let path = ingest.store().blob_path(&digest);
    let stored = File::open(&path).with_context(|| format!("open {}", path.display()))?;
    let limit = limit.of_whole(size);
    let mut hashing = Hashing { to: io::sink(), hasher: Sha256::new() };
    let mut limited = Decoder::new(stored).context("decompress the archive")?.take(limit.saturating_add(1));
    io::copy(&mut limited, &mut hashing).context("decompress the archive")?;
    if limited.limit() == 0 {
        bail!("the archive is larger than {limit} bytes when it is decompressed (--max-layer-size allows more)");
    }
    finish(ingest, (digest, size, compression), Digest::finish(hashing.hasher), names, change, Limit::Bytes(limit))
}

fn finish(
    ingest: &Ingest,
    (digest, size, compression): (Digest, u64, Compression),
    diff_id: Digest,
    names: Names,
    change: &Change<'_>,
    limit: Limit,
) -> Result<Image> {
    let created = humantime::format_rfc3339_seconds(now()).to_string();
    let platform = change.platform.clone().unwrap_or_else(Platform::host);
    let mut config = ImageConfiguration {
        created: Some(created.clone()),
        architecture: platform.architecture,
        os: platform.os,
        variant: platform.variant,
        rootfs: RootFs { kind: "layers".into(), diff_ids: vec![diff_id] },
        history: vec![History {
            created: Some(created),
            created_by: Some("runx storage import".into()),
            ..History::default()
        }],
        ..ImageConfiguration::default()
    };
    for instruction in change.instructions {
        apply(&mut config, instruction)?;
    }
    let config = serde_json::to_vec(&config).context("write the configuration")?;
    let descriptor = |media_type: String, digest: Digest, size: u64| Descriptor {
        media_type,
        digest,
        size,
        platform: None,
        annotations: [].into(),
    };
    let id = ingest.put(&config, None, "the configuration")?;
    let layer = descriptor(format!("{}{}", media_type::OCI_LAYER, compression.suffix()), digest, size);
    let manifest = Manifest {
        schema_version: 2,
        media_type: Some(media_type::OCI_MANIFEST.into()),
        artifact_type: None,
        config: descriptor(media_type::OCI_CONFIG.into(), id, config.len() as u64),
        layers: vec![layer.clone()],
        annotations: [].into(),
    };
    let manifest = serde_json::to_vec(&manifest).context("write the manifest")?;
    ingest.put(&manifest, None, "the manifest")?;
    let plan = Plan::new(&manifest, &config)?;
    let ids = plan.files.clone().unwrap_or_default();
    let landed = match land::present(ingest, &ids[0])? {
        Some(landed) => landed,
        None => land::unpack_stored(ingest, &layer, &ids[0], limit)?,
    };
    let stored = land::settle(ingest, vec![landed], &ids)?;
    Ok(ingest.commit(plan.image(&stored, names))?)
}

/// The time, or what reproducible builds say instead.
pub(super) fn now() -> SystemTime {
    let epoch = std::env::var("SOURCE_DATE_EPOCH").ok().and_then(|text| text.parse().ok());
    epoch.map_or_else(SystemTime::now, |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds))
}

/// One instruction: CMD, ENTRYPOINT, ENV, EXPOSE, LABEL, STOPSIGNAL, USER, VOLUME or WORKDIR.
fn apply(config: &mut ImageConfiguration, instruction: &str) -> Result<()> {
    let (word, rest) = instruction.trim().split_once([' ', '=']).unwrap_or((instruction.trim(), ""));
    let rest = rest.trim();
    let pair = || rest.split_once(['=', ' ']).with_context(|| format!("{instruction:?} has no NAME=VALUE"));
    let command = || -> Result<Vec<String>> {
        if rest.starts_with('[') {
            return serde_json::from_str(rest).with_context(|| format!("{instruction:?} is no list of strings"));
        }
        Ok(vec!["/bin/sh".into(), "-c".into(), rest.into()])
    };
    let run = &mut config.config;
    match word.to_ascii_uppercase().as_str() {
        _ if rest.is_empty() => bail!("{instruction:?} says nothing"),
        "CMD" => run.cmd = command()?,
        "ENTRYPOINT" => run.entrypoint = command()?,
        "ENV" => {
            let (name, value) = pair()?;
            run.env.retain(|other| other.split('=').next() != Some(name));
            run.env.push(format!("{name}={value}"));
        }
        "EXPOSE" => {
            let port = if rest.contains('/') { rest.to_owned() } else { format!("{rest}/tcp") };
            run.exposed_ports.insert(port, Empty {});
        }
        "LABEL" => {
            let (name, value) = pair()?;
            run.labels.insert(name.into(), value.into());
        }
        "STOPSIGNAL" => run.stop_signal = Some(rest.into()),
        "USER" => run.user = rest.into(),
        "VOLUME" => drop(run.volumes.insert(rest.into(), Empty {})),
        "WORKDIR" => run.working_dir = rest.into(),
        _ => bail!(
            "{instruction:?} is not supported: CMD, ENTRYPOINT, ENV, EXPOSE, LABEL, STOPSIGNAL, USER, VOLUME and WORKDIR are"
        ),
    }
    Ok(())
}

struct Hashing<W> {
    to: W,
    hasher: Sha256,
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let length = self.to.write(bytes)?;
        self.hasher.update(&bytes[..length]);
        Ok(length)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instructions_are_those_of_a_dockerfile() {
        let mut config = ImageConfiguration::default();
        for instruction in [
            r#"CMD ["a", "b c"]"#,
            "entrypoint run it",
            "ENV A=1",
            "ENV A=2",
            "LABEL x=y z",
            "USER 1:2",
            "WORKDIR /w",
            "EXPOSE 80",
            "VOLUME /data",
            "STOPSIGNAL SIGINT",
        ] {
            apply(&mut config, instruction).unwrap();
        }
        let run = config.config;
        assert_eq!(run.cmd, ["a", "b c"]);
        assert_eq!(run.entrypoint, ["/bin/sh", "-c", "run it"]);
        assert_eq!(run.env, ["A=2"]);
        assert_eq!(run.labels["x"], "y z");
        assert!(run.exposed_ports.contains_key("80/tcp") && run.volumes.contains_key("/data"));
        for bad in ["", "CMD", "RUN x", "CMD [1]", "ENV A"] {
            assert!(apply(&mut ImageConfiguration::default(), bad).is_err(), "{bad}");
        }
    }
}
