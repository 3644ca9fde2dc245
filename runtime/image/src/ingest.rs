//! Filling the store: blobs and layers that are under way, and the moment at which an image is there.
//!
//! What is downloaded or unpacked lies in `ingest` until it is complete and known to be right, and is then renamed. A
//! process that is killed leaves partial blobs, which the next one goes on with, and trees, which the next one removes.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use sha2::{Digest as _, Sha256};

use crate::digest::Digest;
use crate::error::{Context, Error, Result};
use crate::files::{self, PassingLock};
use crate::index::Image;
use crate::layer::{self, Layer};
use crate::manifest::Descriptor;
use crate::store::Store;

/// A store that is being filled. As long as there is one, nothing in the store is removed because nobody needs it yet.
/// If it ends without [`Ingest::commit`], what it brought is taken away again.
#[derive(Debug)]
pub struct Ingest {
    store: Store,
    activity: Option<File>,
    committed: AtomicBool,
    interrupted: Arc<AtomicBool>,
    /// Nobody is to wait or read any more, for that reason or because it failed.
    given_up: AtomicBool,
    counter: AtomicU64,
    boot: String,
}

/// The right to bring one blob or layer; others wait for it.
#[derive(Debug)]
pub struct Held {
    _lock: PassingLock,
}

impl Store {
    /// Begins to fill the store.
    ///
    /// # Errors
    /// When its locks cannot be had.
    pub fn ingest(&self) -> Result<Ingest> {
        let boot = layer::boot_id()?;
        let path = self.path("activity");
        let activity = files::lock_file(&path)?;
        if activity.try_lock().is_ok() {
            // Nobody else is at it, so trees that are there were left by a kill.
            self.clear_ingest(false)?;
        }
        activity.lock_shared().on("lock", &path)?;
        Ok(Ingest {
            store: self.clone(),
            activity: Some(activity),
            committed: AtomicBool::new(false),
            interrupted: Arc::default(),
            given_up: AtomicBool::new(false),
            counter: AtomicU64::new(0),
            boot,
        })
    }
}

impl Ingest {
    /// The store.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Waits for the right to bring a blob, or a layer by its key. Ask again whether it is there when it is had. `waiting`
    /// is called if another process or thread is about it. Have one at a time, or those who wait may wait for each other.
    ///
    /// # Errors
    /// When the lock's file cannot be made, and [`Error::Interrupted`] after [`Ingest::interrupt`] and [`Ingest::give_up`].
    pub fn take(&self, digest: &Digest, waiting: impl FnOnce()) -> Result<Held> {
        let path = self.store.path("ingest").join(format!("{}.lock", digest.hex()));
        PassingLock::take(&path, &self.given_up, waiting).map(|lock| Held { _lock: lock })
    }

    /// Whether a blob is there and right. One that no image has yet is read again, for the machine may have stopped before
    /// it reached the disk; if it is wrong, it is removed.
    ///
    /// # Errors
    /// When it cannot be read, and [`Error::Interrupted`] after [`Ingest::interrupt`] and [`Ingest::give_up`].
    pub fn has_blob(&self, digest: &Digest, size: Option<u64>) -> Result<bool> {
        let path = self.store.blob_path(digest);
        let Ok(metadata) = fs::metadata(&path) else { return Ok(false) };
        let length_fits = size.is_none_or(|size| size == metadata.len());
        let has = |image: &Image| {
            let mut layers = image.layers.iter().map(|layer| &layer.descriptor.digest);
            image.digest == *digest || image.config.digest == *digest || layers.any(|other| other == digest)
        };
        if length_fits && self.store.images()?.iter().any(has) {
            return Ok(true);
        }
        let right = length_fits && self.digest_of_file(&path)? == *digest;
        if !right {
            log::warn!("{} is damaged: it is fetched again", path.display());
            files::remove_file(&path)?;
        }
        Ok(right)
    }

    /// Stores content that is in memory, if it has the expected digest.
    ///
    /// # Errors
    /// [`Error::Corrupt`] if it has another one.
    pub fn put(&self, content: &[u8], expected: Option<&Digest>, what: &str) -> Result<Digest> {
        let digest = Digest::of(content);
        if let Some(expected) = expected.filter(|expected| **expected != digest) {
            let (expected, found) = (expected.to_string(), digest.to_string());
            return Err(Error::Corrupt { what: what.into(), expected, found });
        }
        let path = self.store.blob_path(&digest);
        let beside = self.fresh("put");
        if let Err(e) = fs::write(&beside, content).and_then(|()| fs::rename(&beside, &path)) {
            let _ = fs::remove_file(&beside);
            return Err(e).on("write", &path);
        }
        Ok(digest)
    }

    /// Begins to bring a blob, or goes on where a killed process stopped: `replay` is then given what is there already, in
    /// order. The right to bring it has to be held.
    ///
    /// # Errors
    /// When the file cannot be opened or read, and [`Error::Interrupted`] after [`Ingest::interrupt`] and
    /// [`Ingest::give_up`].
    pub fn blob(&self, _held: &Held, blob: &Descriptor, mut replay: impl FnMut(&[u8])) -> Result<BlobWriter> {
        let path = self.store.path("ingest").join(format!("{}.partial", blob.digest.hex()));
        let opened = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path);
        let mut file = opened.on("open", &path)?;
        let mut hasher = Sha256::new();
        let mut written = 0;
        let there = file.metadata().on("look at", &path)?.len();
        if there > blob.size {
            file.set_len(0).on("truncate", &path)?;
        } else if there > 0 {
            self.read_through(&mut file, &path, |chunk| {
                hasher.update(chunk);
                replay(chunk);
                written += chunk.len() as u64;
            })?;
        }
        let to = self.store.blob_path(&blob.digest);
        let interrupted = self.interrupted.clone();
        Ok(BlobWriter { file, path, to, blob: blob.clone(), hasher, written, done: false, interrupted })
    }

    /// Begins to bring a blob whose digest turns out at its end.
    ///
    /// # Errors
    /// When its file cannot be made.
    pub fn fresh_blob(&self) -> Result<FreshBlob> {
        let path = self.fresh("blob");
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).on("make", &path)?;
        let blobs = self.store.path("blobs/sha256");
        Ok(FreshBlob { file, path, blobs, hasher: Sha256::new(), written: 0, done: false })
    }

    /// An unpacked layer that can be used, by its key.
    ///
    /// # Errors
    /// When what is known of it cannot be read.
    pub fn layer(&self, key: &Digest) -> Result<Option<Layer>> {
        let Some(layer) = Layer::read(&self.store.layer_path(key))? else { return Ok(None) };
        let has = |image: &Image| image.layers.iter().any(|layer| layer.tree.as_ref() == Some(key));
        let trusted = layer.boot == self.boot || self.store.images()?.iter().any(has);
        Ok((trusted && layer.form == layer::Form::current()).then_some(layer))
    }

    /// A new directory to unpack a layer into. It is removed if it is not published.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn place(&self) -> Result<LayerPlace> {
        let dir = self.fresh("tree");
        fs::create_dir(&dir).and_then(|()| fs::create_dir(dir.join("diff"))).on("make", &dir)?;
        Ok(LayerPlace { dir, published: false })
    }

    /// Publishes an unpacked layer under its key: the chain's id if it is for one chain, or its diff id.
    ///
    /// # Errors
    /// When it cannot be renamed.
    pub fn publish(&self, mut place: LayerPlace, mut layer: Layer) -> Result<Digest> {
        let key = layer.chain_id.clone().unwrap_or_else(|| layer.diff_id.clone());
        layer.boot.clone_from(&self.boot);
        layer.write(&place.dir)?;
        let to = self.store.layer_path(&key);
        // For a moment only, and nobody who has this one waits for another.
        let lock = self.store.path("ingest").join(format!("publish-{}.lock", key.hex()));
        let _lock = PassingLock::take(&lock, &self.given_up, || ())?;
        // Another process may have made it meanwhile: then it is as good.
        if self.layer(&key)?.is_some() {
            return Ok(key);
        }
        if to.exists() {
            // It could not be used.
            let aside = self.fresh("tree");
            fs::rename(&to, &aside).on("move away", &to)?;
            files::remove_tree(&aside)?;
        }
        fs::rename(&place.dir, &to).on("make", &to)?;
        place.published = true;
        Ok(key)
    }

    /// The image is complete: everything goes to the disk, and then the image to the list.
    ///
    /// # Errors
    /// When a part of it is missing, and when it cannot be written.
    pub fn commit(&self, image: Image) -> Result<Image> {
        for digest in [&image.digest, &image.config.digest] {
            if !self.store.blob_path(digest).exists() {
                return Err(Error::Incomplete {
                    image: image.display_name().into(),
                    what: format!("{digest} is missing"),
                });
            }
        }
        if !image.is_module() {
            self.store.layers(&image)?;
        }
        let dir = File::open(self.store.root()).on("open", self.store.root())?;
        rustix::fs::syncfs(&dir).on("synchronise the filesystem of", self.store.root())?;
        let digest = image.digest.clone();
        let stored = self.store.change(|images| {
            images.add(image);
            images.find(digest.as_str())?.cloned().ok_or_else(|| Error::NotFound(digest.to_string()))
        })?;
        self.committed.store(true, Ordering::Relaxed);
        Ok(stored)
    }

    /// It will end because somebody does not want to wait: then blobs stay, so that the next one goes on from there. Whoever
    /// waits in [`Ingest::take`], or reads a blob, gives up.
    pub fn interrupt(&self) {
        self.interrupted.store(true, Ordering::Relaxed);
        self.give_up();
    }

    /// It has failed: whoever waits in [`Ingest::take`], or reads a blob, gives up, too. What is not complete goes as after
    /// any failure.
    pub fn give_up(&self) {
        self.given_up.store(true, Ordering::Relaxed);
    }

    /// Whether [`Ingest::interrupt`] or [`Ingest::give_up`] was called.
    pub fn is_given_up(&self) -> bool {
        self.given_up.load(Ordering::Relaxed)
    }

    fn digest_of_file(&self, path: &Path) -> Result<Digest> {
        let mut hasher = Sha256::new();
        let mut file = File::open(path).on("open", path)?;
        self.read_through(&mut file, path, |chunk| hasher.update(chunk))?;
        Ok(Digest::finish(hasher))
    }

    fn read_through(&self, file: &mut File, path: &Path, mut each: impl FnMut(&[u8])) -> Result<()> {
        let mut buffer = vec![0; 1 << 18];
        while !self.is_given_up() {
            match file.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(length) => each(&buffer[..length]),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e).on("read", path),
            }
        }
        Err(Error::Interrupted(format!("read {}", path.display())))
    }

    fn fresh(&self, kind: &str) -> PathBuf {
        let number = self.counter.fetch_add(1, Ordering::Relaxed);
        // A process that had this pid before has left nothing: trees of the dead are removed before others are made, or
        // somebody is alive who keeps them from it, and then the time tells.
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_nanos();
        self.store.path("ingest").join(format!("{kind}-{}-{now}-{number}", std::process::id()))
    }
}

impl Drop for Ingest {
    fn drop(&mut self) {
        self.activity = None;
        let committed = self.committed.load(Ordering::Relaxed);
        // What is complete stays, too; `prune` takes it away.
        let interrupted = self.interrupted.load(Ordering::Relaxed);
        let done = if interrupted { Ok(()) } else { self.store.collect_after(committed) };
        if let Err(e) = done {
            log::warn!("remove what nobody needs: {e}");
        }
    }
}

/// A blob that is under way. Its part is removed if it is given up, and stays if the process is killed.
#[derive(Debug)]
pub struct BlobWriter {
    file: File,
    path: PathBuf,
    to: PathBuf,
    blob: Descriptor,
    hasher: Sha256,
    written: u64,
    done: bool,
    interrupted: Arc<AtomicBool>,
}

impl BlobWriter {
    /// How many of its bytes are there.
    pub fn written(&self) -> u64 {
        self.written
    }

    /// Adds bytes.
    ///
    /// # Errors
    /// When they are more than the blob has, and when they cannot be written.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let length = self.written + bytes.len() as u64;
        if length > self.blob.size {
            let reason = format!("it is longer than the {} bytes that were promised", self.blob.size);
            return Err(Error::invalid(format!("blob {}", self.blob.digest), reason));
        }
        self.file.write_all(bytes).on("write", &self.path)?;
        self.hasher.update(bytes);
        self.written = length;
        Ok(())
    }

    /// Begins again from nothing.
    ///
    /// # Errors
    /// When the file cannot be truncated.
    pub fn restart(&mut self) -> Result<()> {
        self.file.set_len(0).and_then(|()| self.file.rewind()).on("truncate", &self.path)?;
        self.hasher = Sha256::new();
        self.written = 0;
        Ok(())
    }

    /// It is complete: its digest is checked, and it takes its place.
    ///
    /// # Errors
    /// [`Error::Corrupt`] if it is not what was promised.
    pub fn commit(mut self) -> Result<()> {
        if self.written != self.blob.size {
            let reason = format!("it ended after {} of {} bytes", self.written, self.blob.size);
            return Err(Error::invalid(format!("blob {}", self.blob.digest), reason));
        }
        let found = Digest::finish(std::mem::take(&mut self.hasher));
        if found != self.blob.digest {
            let (expected, found) = (self.blob.digest.to_string(), found.to_string());
            return Err(Error::Corrupt { what: "the downloaded blob".into(), expected, found });
        }
        fs::rename(&self.path, &self.to).on("make", &self.to)?;
        self.done = true;
        Ok(())
    }
}

impl Drop for BlobWriter {
    fn drop(&mut self) {
        if !self.done && !self.interrupted.load(Ordering::Relaxed) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// A blob that is made here. It is removed if it is given up.
#[derive(Debug)]
pub struct FreshBlob {
    file: File,
    path: PathBuf,
    blobs: PathBuf,
    hasher: Sha256,
    written: u64,
    done: bool,
}

impl FreshBlob {
    /// It is complete, and takes its place. Gives its digest and length.
    ///
    /// # Errors
    /// When it cannot be renamed.
    pub fn commit(mut self) -> Result<(Digest, u64)> {
        let digest = Digest::finish(std::mem::take(&mut self.hasher));
        let to = self.blobs.join(digest.hex());
        fs::rename(&self.path, &to).on("make", &to)?;
        self.done = true;
        Ok((digest, self.written))
    }
}

impl Write for FreshBlob {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let length = self.file.write(bytes)?;
        self.hasher.update(&bytes[..length]);
        self.written += length as u64;
        Ok(length)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for FreshBlob {
    fn drop(&mut self) {
        if !self.done {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// A directory that a layer is unpacked into.
#[derive(Debug)]
pub struct LayerPlace {
    dir: PathBuf,
    published: bool,
}

impl LayerPlace {
    /// The directory for the layer's tree.
    pub fn diff(&self) -> PathBuf {
        self.dir.join("diff")
    }
}

impl Drop for LayerPlace {
    fn drop(&mut self) {
        if !self.published
            && let Err(e) = files::remove_tree(&self.dir)
        {
            log::warn!("clean up: {e}");
        }
    }
}
