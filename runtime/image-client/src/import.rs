//! Importing images from directories and archives.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::PathBuf;

use anyhow::{Context as _, Result, bail, ensure};
use runx_image::manifest::{Descriptor, Document, Index, Manifest, Platform, media_type};
use runx_image::name::{Name, with_tag};
use runx_image::{Digest, Error, Image, Ingest, Store};
use serde::Deserialize;

use crate::land;
use crate::plan::{Names, Plan, Stored};
use crate::progress::Progress;
use crate::source::{self, Archive, Change, Directory, Source, document};
use crate::unpack::{Compression, Limit};

/// How deep indexes may be in each other.
const DEPTH: usize = 4;

/// What a source is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Format {
    /// A directory or archive with oci-layout.
    Oci,
    /// An archive of `docker save`.
    Docker,
    /// A directory or archive of a root filesystem.
    Rootfs,
}

/// What to import, and how.
#[derive(Debug)]
pub(crate) struct Options {
    pub(crate) source: PathBuf,
    pub(crate) name: Option<String>,
    pub(crate) format: Option<Format>,
    pub(crate) platform: Option<Platform>,
    pub(crate) changes: Vec<String>,
    /// What a layer may become when it is decompressed.
    pub(crate) limit: Limit,
}

/// Imports all images of a source.
pub(crate) fn import(store: &Store, options: &Options, progress: &Progress) -> Result<Vec<Image>> {
    let name = options.name.as_deref().map(with_tag).transpose()?;
    let ingest = store.ingest()?;
    let importer = Importer { ingest: &ingest, options, name, progress };
    if options.source.is_dir() {
        let dir = Directory::open(&options.source)?;
        return match importer.format(dir.open("oci-layout")?.is_some(), false)? {
            Format::Oci => importer.oci(&dir),
            Format::Docker => bail!("{} is a directory, and docker writes archives", options.source.display()),
            Format::Rootfs => {
                let change = importer.change();
                Ok(vec![source::import_directory(&ingest, &options.source, importer.names(), &change)?])
            }
        };
    }
    let (file, magic) = source::open(&options.source, store)?;
    let compression = Compression::of(&magic);
    if magic == source::MAGIC {
        ensure!(
            options.changes.is_empty() && options.format.is_none(),
            "{} is a WASM module, which --change and --format have no meaning for",
            options.source.display()
        );
        return Ok(vec![source::import_module(&ingest, file, importer.names())?]);
    }
    if options.format == Some(Format::Rootfs) {
        return importer.tarball(file, compression);
    }
    let limit = options.limit.of_whole(file.metadata().map_or(0, |m| m.len()));
    let archive = Archive::read(&options.source, &file, compression, store, limit)?;
    match importer.format(archive.has("oci-layout") && archive.has("index.json"), archive.has("manifest.json"))? {
        Format::Oci => importer.oci(&archive),
        Format::Docker => importer.docker(&archive),
        Format::Rootfs => importer.tarball(file, compression),
    }
}

struct Importer<'a> {
    ingest: &'a Ingest,
    options: &'a Options,
    /// With a tag.
    name: Option<String>,
    progress: &'a Progress,
}

/// `manifest.json` of docker's archives.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

impl Importer<'_> {
    fn format(&self, is_oci: bool, is_docker: bool) -> Result<Format> {
        let source = self.options.source.display();
        let found = match self.options.format {
            Some(Format::Oci) => {
                ensure!(is_oci, "{source} is no OCI layout: it has no oci-layout and index.json");
                Format::Oci
            }
            Some(Format::Docker) => {
                ensure!(is_docker, "{source} is no archive of docker: it has no manifest.json");
                Format::Docker
            }
            Some(Format::Rootfs) => Format::Rootfs,
            None if is_oci => Format::Oci,
            None if is_docker => Format::Docker,
            None => Format::Rootfs,
        };
        let plain = self.options.changes.is_empty() || found == Format::Rootfs;
        ensure!(plain, "--change is for root filesystems; {source} has a configuration already");
        Ok(found)
    }

    fn change(&self) -> Change<'_> {
        Change { instructions: &self.options.changes, platform: self.options.platform.clone() }
    }

    fn names(&self) -> Names {
        Names { names: self.name.clone().into_iter().collect(), ..Names::default() }
    }

    fn tarball(&self, file: std::fs::File, compression: Compression) -> Result<Vec<Image>> {
        let limit = self.options.limit;
        let image = source::import_tarball(self.ingest, file, compression, self.names(), &self.change(), limit);
        Ok(vec![image.with_context(|| format!("import {}", self.options.source.display()))?])
    }

    fn oci(&self, source: &dyn Source) -> Result<Vec<Image>> {
        let content =
            document(source, "index.json")?.with_context(|| format!("{} has no index.json", source.name()))?;
        let Document::Index(index) = Document::parse(&content)? else {
            bail!("index.json of {} is no index", source.name());
        };
        let mut images = Vec::new();
        for descriptor in self.wanted(&index, source)? {
            let annotations = &descriptor.annotations;
            let (names, top) = match &self.name {
                Some(name) => (vec![name.clone()], descriptor),
                None => (annotated(annotations), descriptor),
            };
            let (digest, content) = self.manifest(source, top, DEPTH)?;
            let manifest = crate::plan::manifest(&content)?;
            let config = self.read(source, &manifest.config)?;
            let plan = Plan::new(&content, &config)?;
            self.ingest.put(&content, Some(&digest), "the manifest")?;
            self.ingest.put(&config, Some(&plan.manifest.config.digest), "the configuration")?;
            let path = |blob: &Descriptor| format!("blobs/sha256/{}", blob.digest.hex());
            let paths: Vec<String> = plan.manifest.layers.iter().map(path).collect();
            images.push(self.finish(source, &plan, &paths, names)?);
        }
        ensure!(!images.is_empty(), "{} has no image", source.name());
        Ok(images)
    }

    /// Which of a layout's images are wanted: all, or the one that gets the name.
    fn wanted<'i>(&self, index: &'i Index, source: &dyn Source) -> Result<Vec<&'i Descriptor>> {
        let all: Vec<&Descriptor> = index.manifests.iter().collect();
        let Some(name) = self.name.as_deref().filter(|_| all.len() > 1) else { return Ok(all) };
        let tag = Name::parse(name)?.tag;
        let has = |d: &&&Descriptor| {
            let reference = d.annotations.get(REF_NAME).map(String::as_str);
            reference.is_some() && (reference == tag || reference == Some(name))
        };
        if let Some(one) = all.iter().find(has) {
            return Ok(vec![one]);
        }
        // Several, for platforms: one is chosen.
        if all.iter().all(|d| d.platform.is_some()) {
            return Ok(vec![index.choose(self.options.platform.as_ref())?]);
        }
        let there: Vec<&str> = all.iter().filter_map(|d| d.annotations.get(REF_NAME)).map(String::as_str).collect();
        bail!(
            "{} has several images ({}), and none is called as the tag of {name}: name one of them by the tag, or leave the \
             name away",
            source.name(),
            there.join(", ")
        )
    }

    /// The manifest that a descriptor leads to, through indexes.
    fn manifest(&self, source: &dyn Source, descriptor: &Descriptor, depth: usize) -> Result<(Digest, Vec<u8>)> {
        let content = self.read(source, descriptor)?;
        match Document::parse(&content)? {
            Document::Manifest(_) => Ok((descriptor.digest.clone(), content)),
            Document::Index(_) if depth == 0 => bail!("{} has too many indexes in each other", source.name()),
            Document::Index(index) => {
                let chosen = index.choose(self.options.platform.as_ref())?;
                self.manifest(source, chosen, depth - 1)
            }
        }
    }

    /// A document by its digest, which is checked.
    fn read(&self, source: &dyn Source, descriptor: &Descriptor) -> Result<Vec<u8>> {
        let path = format!("blobs/sha256/{}", descriptor.digest.hex());
        let content = document(source, &path)?.with_context(|| format!("{} lacks {path}", source.name()))?;
        let found = Digest::of(&content);
        if found != descriptor.digest {
            let (expected, found) = (descriptor.digest.to_string(), found.to_string());
            return Err(Error::Corrupt { what: format!("{path} of {}", source.name()), expected, found }.into());
        }
        Ok(content)
    }

    fn docker(&self, source: &dyn Source) -> Result<Vec<Image>> {
        let content =
            document(source, "manifest.json")?.with_context(|| format!("{} has no manifest.json", source.name()))?;
        let saved: Vec<Saved> =
            serde_json::from_slice(&content).with_context(|| format!("manifest.json of {}", source.name()))?;
        ensure!(
            self.name.is_none() || saved.len() == 1,
            "{} has {} images, which cannot have one name",
            source.name(),
            saved.len()
        );
        let mut images = Vec::new();
        for saved in saved {
            let lacks = |path: &str| format!("{} lacks {path}, which its manifest.json names", source.name());
            let config = document(source, &saved.config)?.with_context(|| lacks(&saved.config))?;
            let parsed = runx_image::ImageConfiguration::parse(&config)?;
            ensure!(
                parsed.rootfs.diff_ids.len() == saved.layers.len(),
                "{}: manifest.json has {} layers, and the configuration {}",
                source.name(),
                saved.layers.len(),
                parsed.rootfs.diff_ids.len()
            );
            let mut layers = Vec::new();
            for path in &saved.layers {
                layers.push(self.layer_of(source, path).with_context(|| lacks(path))?);
            }
            let digest = self.ingest.put(&config, None, "the configuration")?;
            let config_descriptor = descriptor(media_type::OCI_CONFIG.into(), digest, config.len() as u64);
            let manifest = Manifest {
                schema_version: 2,
                media_type: Some(media_type::OCI_MANIFEST.into()),
                artifact_type: None,
                config: config_descriptor,
                layers,
                annotations: BTreeMap::new(),
            };
            let content = serde_json::to_vec(&manifest).context("write the manifest")?;
            self.ingest.put(&content, None, "the manifest")?;
            let plan = Plan::new(&content, &config)?;
            let names = match &self.name {
                Some(name) => vec![name.clone()],
                None => {
                    saved.repo_tags.unwrap_or_default().iter().map(|name| with_tag(name)).collect::<Result<_, _>>()?
                }
            };
            images.push(self.finish(source, &plan, &saved.layers, names)?);
        }
        ensure!(!images.is_empty(), "{} has no image", source.name());
        Ok(images)
    }

    /// Stores a layer of an archive that does not say its digest.
    fn layer_of(&self, source: &dyn Source, path: &str) -> Result<Descriptor> {
        let mut file = source.open(path)?.context("it is not there")?;
        let mut magic = Vec::new();
        file.by_ref().take(4).read_to_end(&mut magic)?;
        let kind = format!("{}{}", media_type::OCI_LAYER, Compression::of(&magic).suffix());
        let mut blob = self.ingest.fresh_blob()?;
        std::io::copy(&mut magic.as_slice().chain(file), &mut blob)?;
        let (digest, size) = blob.commit()?;
        Ok(descriptor(kind, digest, size))
    }

    /// Brings the layers, and the image.
    fn finish(&self, source: &dyn Source, plan: &Plan, paths: &[String], names: Vec<String>) -> Result<Image> {
        for (blob, path) in plan.manifest.layers.iter().zip(paths) {
            self.blob(source, blob, path).with_context(|| format!("layer {}", blob.digest))?;
        }
        let stored = match &plan.files {
            Some(files) => {
                let mut landed = Vec::new();
                for (blob, ids) in plan.manifest.layers.iter().zip(files) {
                    landed.push(match land::present(self.ingest, ids)? {
                        Some(landed) => landed,
                        None => land::unpack_stored(self.ingest, blob, ids, self.options.limit)
                            .with_context(|| format!("layer {}", blob.digest))?,
                    });
                }
                land::settle(self.ingest, landed, files)?
            }
            None => plan.manifest.layers.iter().map(|layer| Stored { key: None, size: layer.size }).collect(),
        };
        let names = Names { names, ..Names::default() };
        Ok(self.ingest.commit(plan.image(&stored, names))?)
    }

    fn blob(&self, source: &dyn Source, blob: &Descriptor, path: &str) -> Result<()> {
        let held = self.ingest.take(&blob.digest, || ())?;
        let part = self.progress.part(&blob.digest.hex()[..12], blob.size);
        if self.ingest.has_blob(&blob.digest, Some(blob.size))? {
            part.done("exists", blob.size);
            return Ok(());
        }
        part.state("copying");
        let mut writer = self.ingest.blob(&held, blob, |_| ())?;
        writer.restart()?;
        let mut file = source.open(path)?.with_context(|| format!("{} lacks {path}", source.name()))?;
        let mut buffer = vec![0; 1 << 18];
        loop {
            match file.read(&mut buffer).with_context(|| format!("read {path} of {}", source.name()))? {
                0 => break,
                length => writer.write(&buffer[..length])?,
            }
            part.at(writer.written());
        }
        writer.commit()?;
        part.done("done", blob.size);
        Ok(())
    }
}

const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// Where containerd, and docker with it, writes the complete name.
const FULL_NAME: &str = "io.containerd.image.name";

/// The names that a layout gives. A tag alone is none.
fn annotated(annotations: &BTreeMap<String, String>) -> Vec<String> {
    let full =
        annotations.get(FULL_NAME).or_else(|| annotations.get(REF_NAME).filter(|name| name.contains([':', '/'])));
    full.and_then(|name| with_tag(name).ok()).into_iter().collect()
}

fn descriptor(media_type: String, digest: Digest, size: u64) -> Descriptor {
    Descriptor { media_type, digest, size, platform: None, annotations: BTreeMap::new() }
}
