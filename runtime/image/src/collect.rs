//! Taking things away: images that are not wanted, and what no image and no container needs.

use std::collections::HashSet;
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::digest::Digest;
use crate::error::{Context, Error, Result};
use crate::files;
use crate::index::{Image, Images};
use crate::layer::Layer;
use crate::name::Name;
use crate::store::{Lease, Store};

/// What was removed.
#[derive(Clone, Debug, Default)]
pub struct Removed {
    /// Names that were taken from images.
    pub untagged: Vec<String>,
    /// Images that are no more.
    pub images: Vec<Image>,
    /// How many bytes were freed. Nothing while the store is being filled: then they are freed when that ends.
    pub bytes: u64,
}

/// Which images [`Store::prune`] removes. None of them are in use by a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prune {
    /// Those without a name.
    Unnamed,
    /// All.
    Unused,
}

/// What the store takes on the disk, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Manifests, configurations and layers as they came.
    pub blobs: u64,
    /// Unpacked layers.
    pub layers: u64,
    /// Of both, what no image and no container needs.
    pub reclaimable: u64,
    /// What is under way, or was left by a kill.
    pub ingest: u64,
}

impl Store {
    /// Removes a name, or an image. By a name an image loses that name, and goes with its last one; by its id it goes with
    /// all names, unless it has several and `force` is not given.
    ///
    /// # Errors
    /// [`Error::NotFound`], and [`Error::InUse`] if a container was made of it and `force` is not given. A container keeps
    /// the layers that it needs even then.
    pub fn remove(&self, name_or_id: &str, force: bool) -> Result<Removed> {
        let mut removed = self.change(|images| {
            let leases = self.leases()?;
            let image = images.find(name_or_id)?.ok_or_else(|| Error::NotFound(name_or_id.into()))?.clone();
            let by_name = image.names.iter().find(|stored| is_meant(name_or_id, stored)).cloned();
            let several = image.names.len() > 1;
            if let Some(name) = by_name.filter(|_| several) {
                let image = images.images.iter_mut().find(|other| other.digest == image.digest);
                image.into_iter().for_each(|image| {
                    image.names.retain(|other| *other != name);
                    image.short.retain(|other| *other != name);
                });
                return Ok(Removed { untagged: vec![name], ..Removed::default() });
            }
            let users = users(&image, &leases);
            if !force {
                if !users.is_empty() {
                    return Err(Error::InUse { name: name_or_id.into(), users });
                }
                if several {
                    return Err(Error::Ambiguous { name: name_or_id.into(), candidates: image.names });
                }
            }
            images.images.retain(|other| other.digest != image.digest);
            Ok(Removed { untagged: image.names.clone(), images: vec![image], bytes: 0 })
        })?;
        removed.bytes = self.collect(false)?;
        Ok(removed)
    }

    /// Removes images that no container was made of: those without a name, or all. Then all that no image and no
    /// container needs goes, and what killed processes left.
    ///
    /// # Errors
    /// When something cannot be removed.
    pub fn prune(&self, which: Prune, matches: impl Fn(&Image) -> bool) -> Result<Removed> {
        let gone = self.change(|images| {
            let leases = self.leases()?;
            let goes = |image: &Image| {
                (which == Prune::Unused || image.names.is_empty()) && users(image, &leases).is_empty() && matches(image)
            };
            let gone: Vec<Image> = images.images.iter().filter(|image| goes(image)).cloned().collect();
            images.images.retain(|image| !goes(image));
            Ok(gone)
        })?;
        let untagged = gone.iter().flat_map(|image| image.names.clone()).collect();
        Ok(Removed { untagged, images: gone, bytes: self.collect(true)? })
    }

    /// What the store takes on the disk.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn usage(&self) -> Result<Usage> {
        let mut usage = Usage::default();
        let needed = self.needed()?;
        for name in names_in(&self.path("blobs/sha256"))? {
            let size = fs::metadata(self.path("blobs/sha256").join(&name)).map_or(0, |m| m.len());
            usage.blobs += size;
            if !is_in(&needed.blobs, &name) {
                usage.reclaimable += size;
            }
        }
        for name in names_in(&self.path("layers"))? {
            let size = Layer::read(&self.path("layers").join(&name))?.map_or(0, |layer| layer.size);
            usage.layers += size;
            if !is_in(&needed.layers, &name) {
                usage.reclaimable += size;
            }
        }
        for name in names_in(&self.path("ingest"))? {
            usage.ingest += size_of(&self.path("ingest").join(name));
        }
        Ok(usage)
    }

    /// The directories that were prepared from an image and are there still.
    ///
    /// # Errors
    /// When the leases cannot be read.
    pub fn users(&self, image: &Image) -> Result<Vec<String>> {
        Ok(users(image, &self.leases()?))
    }

    /// Removes what no image and no container needs, unless the store is being filled; then whoever fills it does so when
    /// he is done. Gives the bytes that were freed.
    pub(crate) fn collect(&self, partial: bool) -> Result<u64> {
        let path = self.path("activity");
        let activity = files::lock_file(&path)?;
        if activity.try_lock().is_err() {
            let marker = self.path("garbage");
            fs::write(&marker, []).on("write", &marker)?;
            return Ok(0);
        }
        files::remove_file(&self.path("garbage"))?;
        let _lock = self.lock(true)?;
        let mut freed = self.clear_ingest(partial)?;
        for (path, lease) in self.leases()? {
            if !lease.is_alive() {
                files::remove_file(&path)?;
            }
        }
        let needed = self.needed()?;
        for name in names_in(&self.path("layers"))? {
            if !is_in(&needed.layers, &name) {
                let dir = self.path("layers").join(&name);
                freed += Layer::read(&dir).ok().flatten().map_or(0, |layer| layer.size);
                // What is found without this is no layer, so half of one is never used.
                files::remove_file(&dir.join("layer.json"))?;
                files::remove_tree(&dir)?;
            }
        }
        for name in names_in(&self.path("blobs/sha256"))? {
            if !is_in(&needed.blobs, &name) {
                let path = self.path("blobs/sha256").join(&name);
                freed += fs::metadata(&path).map_or(0, |m| m.len());
                files::remove_file(&path)?;
            }
        }
        Ok(freed)
    }

    /// What the end of filling the store leaves to do.
    pub(crate) fn collect_after(&self, committed: bool) -> Result<()> {
        if !committed || self.path("garbage").exists() {
            self.collect(false)?;
        }
        Ok(())
    }

    /// Removes what killed processes left, and their partial blobs only if `partial`. Nobody may be filling the store.
    pub(crate) fn clear_ingest(&self, partial: bool) -> Result<u64> {
        let mut freed = 0;
        for name in names_in(&self.path("ingest"))? {
            let path = self.path("ingest").join(&name);
            if path.extension().is_some_and(|extension| extension == "partial") && !partial {
                continue;
            }
            freed += size_of(&path);
            if path.is_dir() { files::remove_tree(&path)? } else { files::remove_file(&path)? }
        }
        Ok(freed)
    }

    fn needed(&self) -> Result<Needed> {
        let images = Images::read(&self.path("images.json"))?.images;
        let leases = self.leases()?;
        let hex = |digest: &Digest| digest.hex().to_owned();
        let mut needed = Needed::default();
        for image in &images {
            needed.blobs.extend([hex(&image.digest), hex(&image.config.digest)]);
            needed.blobs.extend(image.layers.iter().map(|layer| hex(&layer.descriptor.digest)));
            needed.layers.extend(image.layers.iter().filter_map(|layer| layer.tree.as_ref()).map(hex));
        }
        for (_, lease) in leases.iter().filter(|(_, lease)| lease.is_alive()) {
            needed.layers.extend(lease.layers.iter().map(hex));
        }
        Ok(needed)
    }
}

#[derive(Default)]
struct Needed {
    blobs: HashSet<String>,
    layers: HashSet<String>,
}

fn is_in(set: &HashSet<String>, name: &OsString) -> bool {
    name.to_str().is_some_and(|name| set.contains(name))
}

fn is_meant(asked: &str, stored: &str) -> bool {
    Name::parse(asked).is_ok_and(|asked| asked.digest.is_none() && crate::name::matches(&asked, stored))
}

fn users(image: &Image, leases: &[(std::path::PathBuf, Lease)]) -> Vec<String> {
    let of_it = leases.iter().map(|(_, lease)| lease).filter(|lease| lease.image == image.digest && lease.is_alive());
    of_it.map(|lease| lease.dir.display().to_string()).collect()
}

fn names_in(dir: &Path) -> Result<Vec<OsString>> {
    let entries = fs::read_dir(dir).on("read", dir)?;
    entries.map(|entry| entry.map(|entry| entry.file_name()).on("read", dir)).collect()
}

/// The blocks that a file, or a tree, has on the disk, in bytes. What vanishes meanwhile counts as nothing.
fn size_of(path: &Path) -> u64 {
    let Ok(metadata) = fs::symlink_metadata(path) else { return 0 };
    let below = match fs::read_dir(path) {
        Ok(entries) if metadata.is_dir() => entries.flatten().map(|entry| size_of(&entry.path())).sum(),
        _ => 0,
    };
    below + metadata.blocks() * 512
}
