//! The store: where everything lies, and the operations on images that are there.
//!
//! Below the storage root's directory `storage`:
//!
//! | path | what |
//! |---|---|
//! | `images.json` | the list of images, replaced as a whole |
//! | `lock` | held shared while an image is taken into use, and exclusively while the list changes |
//! | `activity` | held shared by whoever fills the store, and exclusively by whoever removes what nobody needs |
//! | `blobs/sha256/HEX` | manifests, configurations and layers as they came |
//! | `layers/HEX/` | unpacked layers: `diff` and `layer.json` |
//! | `ingest/` | what is under way |
//! | `leases/` | which directories were prepared from which image |

use std::fs::{self, DirBuilder, File};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::config::ImageConfiguration;
use crate::digest::Digest;
use crate::error::{Context, Error, Result};
use crate::files;
use crate::index::{Image, Images};
use crate::layer::Layer;
use crate::manifest::DOCUMENT_LIMIT;
use crate::name;
use crate::rootfs;

/// Images on this machine. Cheap to open; any number of processes may have it open.
#[derive(Clone, Debug)]
pub struct Store {
    root: PathBuf,
}

/// That a directory was prepared from an image.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Lease {
    /// The image's manifest.
    pub(crate) image: Digest,
    /// The layers that are needed as long as the directory is there.
    pub(crate) layers: Vec<Digest>,
    /// The directory.
    pub(crate) dir: PathBuf,
}

impl Lease {
    /// Whether its directory is there still.
    pub(crate) fn is_alive(&self) -> bool {
        // Whatever else may be wrong with it, it may be needed.
        !matches!(fs::symlink_metadata(&self.dir), Err(e) if e.kind() == std::io::ErrorKind::NotFound)
    }
}

impl Store {
    /// Opens the store in the directory `storage` of a storage root, and makes what is missing of it. Only the owner may
    /// enter it: images hold programs that take their owner's rights.
    ///
    /// # Errors
    /// When its directories cannot be made.
    pub fn open(storage_root: &Path) -> Result<Self> {
        let storage_root = std::path::absolute(storage_root).on("find", storage_root)?;
        let root = storage_root.join("storage");
        let make =
            |path: &Path| DirBuilder::new().recursive(true).mode(0o700).create(path).on("make the directory", path);
        if !root.join("leases").is_dir() {
            for part in ["blobs/sha256", "layers", "ingest", "leases"] {
                make(&root.join(part))?;
            }
        }
        Ok(Self { root })
    }

    /// Its directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    pub(crate) fn path(&self, part: &str) -> PathBuf {
        self.root.join(part)
    }

    /// Where a blob is or would be.
    pub fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.root.join("blobs/sha256").join(digest.hex())
    }

    pub(crate) fn layer_path(&self, key: &Digest) -> PathBuf {
        self.root.join("layers").join(key.hex())
    }

    /// All images, in the order in which they came.
    ///
    /// # Errors
    /// When the list cannot be read.
    pub fn images(&self) -> Result<Vec<Image>> {
        // It is replaced as a whole, so no lock is needed.
        Ok(Images::read(&self.path("images.json"))?.images)
    }

    /// The image that is meant by a name, an id, the beginning of an id, or a digest.
    ///
    /// # Errors
    /// When more than one may be meant, and when the list cannot be read.
    pub fn find(&self, name_or_id: &str) -> Result<Option<Image>> {
        Ok(Images::read(&self.path("images.json"))?.find(name_or_id)?.cloned())
    }

    /// The same, where there has to be one.
    ///
    /// # Errors
    /// [`Error::NotFound`] as well.
    pub fn get(&self, name_or_id: &str) -> Result<Image> {
        self.find(name_or_id)?.ok_or_else(|| Error::NotFound(name_or_id.into()))
    }

    /// An image's configuration. For a WASM artifact, what of it there is.
    ///
    /// # Errors
    /// When it is missing or damaged.
    pub fn configuration(&self, image: &Image) -> Result<ImageConfiguration> {
        ImageConfiguration::parse(&self.document(image, &image.config.digest)?)
    }

    /// A manifest's or configuration's bytes, checked against its digest.
    ///
    /// # Errors
    /// When it is missing or damaged.
    pub fn document(&self, image: &Image, digest: &Digest) -> Result<Vec<u8>> {
        let incomplete = |what: String| Error::Incomplete { image: image.display_name().into(), what };
        let path = self.blob_path(digest);
        let length = fs::metadata(&path).map_err(|e| incomplete(format!("{digest}: {e}")))?.len();
        if length > DOCUMENT_LIMIT {
            return Err(incomplete(format!("{digest} is longer than such a document may be")));
        }
        let content = fs::read(&path).on("read", &path)?;
        let found = Digest::of(&content);
        if found != *digest {
            return Err(incomplete(format!("the content of {digest} has the digest {found}")));
        }
        Ok(content)
    }

    /// What is known of an image's unpacked layers, and where their trees are, the lowest first.
    ///
    /// # Errors
    /// When one is missing, or the image has none since it is a module.
    pub fn layers(&self, image: &Image) -> Result<Vec<(Layer, PathBuf)>> {
        let mut layers = Vec::with_capacity(image.layers.len());
        for record in &image.layers {
            let Some(key) = &record.tree else { return Err(Error::NoRootfs(image.display_name().into())) };
            let dir = self.layer_path(key);
            let incomplete =
                || Error::Incomplete { image: image.display_name().into(), what: format!("layer {key} is missing") };
            layers.push((Layer::read(&dir)?.ok_or_else(incomplete)?, dir.join("diff")));
        }
        Ok(layers)
    }

    /// Gives an image one more name, and takes it from whoever had it.
    ///
    /// # Errors
    /// When it is no name, and when the image has gone.
    pub fn tag(&self, image: &Image, name: &str) -> Result<()> {
        let name = name::with_tag(name)?;
        self.change(|images| {
            let mut image =
                images.find(image.digest.as_str())?.cloned().ok_or_else(|| Error::NotFound(name.clone()))?;
            image.names.push(name.clone());
            images.add(image);
            Ok(())
        })
    }

    /// Changes the list of images, alone.
    pub(crate) fn change<T>(&self, change: impl FnOnce(&mut Images) -> Result<T>) -> Result<T> {
        let path = self.path("images.json");
        let _lock = self.lock(true)?;
        let mut images = Images::read(&path)?;
        let changed = change(&mut images)?;
        images.write(&path)?;
        Ok(changed)
    }

    /// The lock on what exists. It ends with the file.
    pub(crate) fn lock(&self, exclusive: bool) -> Result<File> {
        let path = self.path("lock");
        let file = files::lock_file(&path)?;
        if exclusive { file.lock() } else { file.lock_shared() }.on("lock", &path)?;
        Ok(file)
    }

    /// Makes the parts of a container's root filesystem of an image in `dir`, which may exist and hold other things, and a
    /// lease, so that the image's layers stay as long as `dir` does. [`rootfs::mount`] then mounts it, and
    /// [`rootfs::remove`] takes everything away again. What is left of an earlier attempt in `dir` is replaced.
    ///
    /// # Errors
    /// When the image has gone or is a module, and when the parts cannot be made; then nothing of them is left.
    pub fn prepare(&self, image: &Image, dir: &Path, options: &rootfs::Options) -> Result<()> {
        let dir = std::path::absolute(dir).on("find", dir)?;
        rootfs::remove(&dir)?;
        DirBuilder::new().recursive(true).mode(0o700).create(&dir).on("make the directory", &dir)?;
        let lease = self.lease(image, &dir)?;
        let made = self.layers(image).and_then(|layers| rootfs::make(self, image, &layers, &dir, options));
        if let Err(e) = made {
            let cleaned = rootfs::discard(&dir).and_then(|()| files::remove_file(&lease));
            if let Err(e) = cleaned {
                log::warn!("clean up after a failure: {e}");
            }
            return Err(e);
        }
        Ok(())
    }

    fn lease(&self, image: &Image, dir: &Path) -> Result<PathBuf> {
        let _lock = self.lock(false)?;
        let Some(image) = self.find(image.digest.as_str())? else {
            return Err(Error::NotFound(image.display_name().into()));
        };
        let layers = image.layers.iter().filter_map(|layer| layer.tree.clone()).collect();
        let lease = Lease { image: image.digest, layers, dir: dir.into() };
        let path = self.lease_path(dir);
        let content = serde_json::to_vec(&lease).map_err(|e| Error::invalid("lease", e))?;
        // Nobody else writes it: a directory is prepared by whoever made it.
        let beside = path.with_extension("new");
        fs::write(&beside, content).and_then(|()| fs::rename(&beside, &path)).on("write", &path)?;
        Ok(path)
    }

    pub(crate) fn lease_path(&self, dir: &Path) -> PathBuf {
        use std::os::unix::ffi::OsStrExt;
        self.path("leases").join(format!("{}.json", Digest::of(dir.as_os_str().as_bytes()).hex()))
    }

    /// All leases, also of directories that are no more.
    pub(crate) fn leases(&self) -> Result<Vec<(PathBuf, Lease)>> {
        let dir = self.path("leases");
        let mut leases = Vec::new();
        for entry in fs::read_dir(&dir).on("read", &dir)? {
            let path = entry.on("read", &dir)?.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            // One may be removed while this reads.
            let Some(content) = files::read(&path)? else { continue };
            let lease = serde_json::from_slice(&content).map_err(|e| Error::invalid(path.display().to_string(), e))?;
            leases.push((path, lease));
        }
        Ok(leases)
    }
}
