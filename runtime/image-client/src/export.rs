//! Exporting images as they came: with the same manifests, configurations and layers, and so the same digests.

use std::fs::{self, File};
use std::io::{self, IsTerminal as _, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use runx_image::manifest::{Descriptor, Index, media_type};
use runx_image::{Digest, Error, Image, Store};
use tar::{Builder, EntryType, Header};

/// How.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Format {
    /// An OCI layout in an archive.
    OciArchive,
    /// An OCI layout in a directory.
    OciDir,
}

/// Writes images. `to` is `-` for standard output. What is written is there completely or not at all.
pub(crate) fn export(store: &Store, names: &[String], to: &Path, format: Format) -> Result<()> {
    // What it needs cannot be removed meanwhile.
    let ingest = store.ingest()?;
    let mut images = Vec::new();
    for name in names {
        images.push((store.get(name)?, wanted_name(store, name)?));
    }
    let done = match format {
        Format::OciDir => to_directory(store, &images, to),
        Format::OciArchive if to == Path::new("-") => {
            let stdout = io::stdout().lock();
            ensure!(!stdout.is_terminal(), "an archive is not written to a terminal: name a file with --output");
            to_archive(store, &images, io::BufWriter::new(stdout)).map(drop)
        }
        Format::OciArchive => to_file(store, &images, to),
    };
    drop(ingest);
    done
}

/// The name that was asked for, completed; an image that was named by its id keeps all.
fn wanted_name(store: &Store, asked: &str) -> Result<Vec<String>> {
    let image = store.get(asked)?;
    let tag = runx_image::name::with_tag(asked).ok();
    let exact = image
        .names
        .iter()
        .find(|name| tag.as_ref().is_some_and(|tag| *name == tag || name.ends_with(&format!("/{tag}"))));
    Ok(exact.cloned().map_or(image.names, |name| vec![name]))
}

fn to_file(store: &Store, images: &[(Image, Vec<String>)], to: &Path) -> Result<()> {
    let dir = to.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let file = tempfile::NamedTempFile::new_in(dir).with_context(|| format!("make a file in {}", dir.display()))?;
    let written = to_archive(store, images, io::BufWriter::new(file))?;
    let file = written
        .into_inner()
        .map_err(io::IntoInnerError::into_error)
        .with_context(|| format!("write {}", to.display()))?;
    use std::os::unix::fs::PermissionsExt as _;
    file.as_file()
        .set_permissions(fs::Permissions::from_mode(0o644))
        .with_context(|| format!("write {}", to.display()))?;
    file.persist(to).with_context(|| format!("write {}", to.display()))?;
    Ok(())
}

/// All blobs, each once, with their media types.
fn blobs(images: &[(Image, Vec<String>)]) -> Vec<(Digest, Option<u64>, String)> {
    let mut blobs: Vec<(Digest, Option<u64>, String)> = Vec::new();
    for (image, _) in images {
        let manifest = (image.digest.clone(), None);
        let config = (image.config.digest.clone(), Some(image.config.size));
        let layers = image.layers.iter().map(|layer| (layer.descriptor.digest.clone(), Some(layer.descriptor.size)));
        for (digest, size) in [manifest, config].into_iter().chain(layers) {
            if !blobs.iter().any(|(other, ..)| *other == digest) {
                blobs.push((digest, size, image.display_name().to_owned()));
            }
        }
    }
    blobs
}

/// Copies a blob, and checks it on the way: the disk may have lied.
fn copy(
    store: &Store,
    (digest, size, image): &(Digest, Option<u64>, String),
    mut put: impl FnMut(u64, &mut dyn io::Read) -> Result<()>,
) -> Result<()> {
    use sha2::Digest as _;
    let path = store.blob_path(digest);
    let incomplete = |what: String| Error::Incomplete { image: image.clone(), what };
    let file = File::open(&path).map_err(|e| incomplete(format!("{digest}: {e}")))?;
    let length = file.metadata().with_context(|| format!("look at {}", path.display()))?.len();
    if size.is_some_and(|size| size != length) {
        return Err(incomplete(format!("{digest} has {length} bytes")).into());
    }
    let mut hashing = Hashing { from: file, hasher: sha2::Sha256::new() };
    put(length, &mut hashing)?;
    let found = Digest::finish(hashing.hasher);
    if found != *digest {
        return Err(incomplete(format!("the content of {digest} has the digest {found}")).into());
    }
    Ok(())
}

fn index(store: &Store, images: &[(Image, Vec<String>)]) -> Result<Vec<u8>> {
    let mut manifests = Vec::new();
    for (image, names) in images {
        let size = fs::metadata(store.blob_path(&image.digest)).map_or(0, |m| m.len());
        let plain = Descriptor {
            media_type: image.media_type.clone(),
            digest: image.digest.clone(),
            size,
            platform: None,
            annotations: [].into(),
        };
        if names.is_empty() {
            manifests.push(plain.clone());
        }
        for name in names {
            let (_, tag) = runx_image::name::split(name);
            let annotations = [
                ("io.containerd.image.name".to_owned(), name.clone()),
                ("org.opencontainers.image.ref.name".to_owned(), tag.to_owned()),
            ];
            manifests.push(Descriptor { annotations: annotations.into(), ..plain.clone() });
        }
    }
    let index = Index { schema_version: 2, media_type: Some(media_type::OCI_INDEX.into()), manifests };
    serde_json::to_vec(&index).context("write index.json")
}

const LAYOUT: &[u8] = br#"{"imageLayoutVersion":"1.0.0"}"#;

fn to_archive<W: Write>(store: &Store, images: &[(Image, Vec<String>)], to: W) -> Result<W> {
    let mut archive = Builder::new(to);
    let mut add = |name: &str, kind: EntryType, length: u64, from: &mut dyn io::Read| -> Result<()> {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(length);
        header.set_mode(if kind == EntryType::Directory { 0o755 } else { 0o644 });
        header.set_mtime(0);
        archive.append_data(&mut header, name, from).with_context(|| format!("write {name} to the archive"))
    };
    add("oci-layout", EntryType::Regular, LAYOUT.len() as u64, &mut &LAYOUT[..])?;
    let index = index(store, images)?;
    add("index.json", EntryType::Regular, index.len() as u64, &mut index.as_slice())?;
    for dir in ["blobs/", "blobs/sha256/"] {
        add(dir, EntryType::Directory, 0, &mut io::empty())?;
    }
    for blob in blobs(images) {
        let name = format!("blobs/sha256/{}", blob.0.hex());
        copy(store, &blob, |length, from| add(&name, EntryType::Regular, length, from))?;
    }
    let mut to = archive.into_inner().context("write the archive")?;
    to.flush().context("write the archive")?;
    Ok(to)
}

fn to_directory(store: &Store, images: &[(Image, Vec<String>)], to: &Path) -> Result<()> {
    if to == Path::new("-") {
        bail!("a directory is not written to standard output: name one with --output");
    }
    ensure!(!to.exists(), "{} exists already: name another directory", to.display());
    let parent = to.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let beside = tempfile::tempdir_in(parent).with_context(|| format!("make a directory in {}", parent.display()))?;
    let write =
        |name: PathBuf, content: &[u8]| fs::write(&name, content).with_context(|| format!("write {}", name.display()));
    let blobs_dir = beside.path().join("blobs/sha256");
    fs::create_dir_all(&blobs_dir).with_context(|| format!("make {}", blobs_dir.display()))?;
    for blob in blobs(images) {
        let path = blobs_dir.join(blob.0.hex());
        copy(store, &blob, |_, from| {
            let mut file = File::create(&path).with_context(|| format!("make {}", path.display()))?;
            io::copy(from, &mut file).with_context(|| format!("write {}", path.display())).map(drop)
        })?;
    }
    write(beside.path().join("index.json"), &index(store, images)?)?;
    write(beside.path().join("oci-layout"), LAYOUT)?;
    use std::os::unix::fs::PermissionsExt as _;
    fs::set_permissions(beside.path(), fs::Permissions::from_mode(0o755))
        .with_context(|| format!("make {}", to.display()))?;
    fs::rename(beside.path(), to).with_context(|| format!("make {}", to.display()))?;
    // It has its name now.
    let _ = beside.keep();
    Ok(())
}

struct Hashing<R> {
    from: R,
    hasher: sha2::Sha256,
}

impl<R: io::Read> io::Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        use sha2::Digest as _;
        let length = self.from.read(buffer)?;
        self.hasher.update(&buffer[..length]);
        Ok(length)
    }
}
