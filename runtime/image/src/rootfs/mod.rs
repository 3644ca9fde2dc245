//! A container's root filesystem from an image: made by [`crate::Store::prepare`], mounted and removed here.
//!
//! In the container's directory, beside whatever else is there:
//!
//! | path | what |
//! |---|---|
//! | `rootfs.json` | how it is made; the first to go |
//! | `rootfs/` | where it is mounted, or the copy |
//! | `upper/`, `work/` | overlay's writable layer |
//!
//! Every function may be repeated after a kill at any moment.

mod copy;
mod overlay;

pub use copy::copy_attributes;

use std::fs::{self, DirBuilder};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags, statx};
use rustix::io::Errno;
use rustix::mount::UnmountFlags;
use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::error::{Context, Error, Result};
use crate::files;
use crate::index::Image;
use crate::layer::{Form, Layer};
use crate::store::Store;

/// How a root filesystem is made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Overlay if it is possible here, or a copy. That is found out when it is mounted first.
    #[default]
    Auto,
    /// Overlay: the image's layers below a writable one. Fast, and takes no room.
    Overlay,
    /// A copy of the image's files. By reference where the filesystem can share blocks.
    Copy,
}

/// What [`crate::Store::prepare`] shall make.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// How.
    pub kind: Kind,
}

/// `rootfs.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Record {
    kind: Kind,
    /// The image's manifest.
    image: Digest,
    /// The trees of its layers, the lowest first. Absolute.
    layers: Vec<PathBuf>,
    /// How the layers' opaque directories are marked.
    form: Form,
    /// The lease that goes with it.
    lease: PathBuf,
}

impl Record {
    fn read(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join("rootfs.json");
        let Some(content) = files::read(&path)? else { return Ok(None) };
        serde_json::from_slice(&content).map(Some).map_err(|e| Error::invalid(path.display().to_string(), e))
    }

    /// Writes it beside and renames it.
    fn write(&self, dir: &Path) -> Result<()> {
        let content = serde_json::to_vec(self).map_err(|e| Error::invalid("rootfs.json", e))?;
        let (path, beside) = (dir.join("rootfs.json"), dir.join("rootfs.json.new"));
        fs::write(&beside, content).and_then(|()| fs::rename(&beside, &path)).on("write", &path)
    }
}

/// Makes the parts. The record comes last, so that nothing half-made is mounted.
pub(crate) fn make(
    store: &Store,
    image: &Image,
    layers: &[(Layer, PathBuf)],
    dir: &Path,
    options: &Options,
) -> Result<()> {
    let form = Form::current();
    if let Some((layer, _)) = layers.iter().find(|(layer, _)| layer.form != form) {
        let what = format!("layer {} was unpacked in another user namespace", layer.diff_id);
        return Err(Error::Incomplete { image: image.display_name().into(), what });
    }
    let trees: Vec<PathBuf> = layers.iter().map(|(_, tree)| tree.clone()).collect();
    let root = trees.last().cloned();
    // Without a layer there is nothing to lay over.
    let kind = if trees.is_empty() { Kind::Copy } else { options.kind };
    let rootfs = dir.join("rootfs");
    directory(&rootfs, 0o755)?;
    if kind == Kind::Copy {
        copy_layers(&trees, form, &rootfs)?;
    } else {
        directory(&dir.join("upper"), 0o755)?;
        directory(&dir.join("work"), 0o700)?;
        if kind == Kind::Overlay {
            overlay::probe(dir, &trees, form)?;
        }
        if let Some(root) = root {
            // The root directory's own attributes are those of the writable layer.
            copy::attributes(&root, &dir.join("upper"))?;
        }
    }
    let lease = store.lease_path(dir);
    let record = Record { kind, image: image.digest.clone(), layers: trees, form, lease };
    record.write(dir)
}

/// Copies layers over each other, the lowest first.
fn copy_layers(trees: &[PathBuf], form: Form, rootfs: &Path) -> Result<()> {
    trees.iter().try_for_each(|tree| copy::apply(tree, rootfs, form.opaque()))
}

/// A copy instead of overlay, of a root filesystem that nobody has written to. A kill in the middle is repaired by the next
/// mount, which comes here again.
fn fall_back(dir: &Path, mut record: Record) -> Result<()> {
    let rootfs = dir.join("rootfs");
    files::remove_tree(&rootfs)?;
    directory(&rootfs, 0o755)?;
    copy_layers(&record.layers, record.form, &rootfs)?;
    record.kind = Kind::Copy;
    record.write(dir)?;
    ["upper", "work"].iter().try_for_each(|part| files::remove_tree(&dir.join(part)))
}

/// Whether the kernel will always say that: it has no overlay, or not here, or not for this user. Everything else may be
/// otherwise the next time, and a copy would stay for good.
fn is_impossible(error: &Error) -> bool {
    let (Error::System { source, .. } | Error::NoOverlay { source, .. }) = error else { return false };
    matches!(
        Errno::from_io_error(source),
        Some(Errno::INVAL | Errno::NODEV | Errno::PERM | Errno::ACCESS | Errno::OPNOTSUPP | Errno::NOSYS)
    )
}

/// Whether nothing was written over the layers.
fn is_untouched(dir: &Path) -> Result<bool> {
    let upper = dir.join("upper");
    fs::read_dir(&upper).map(|mut entries| entries.next().is_none()).on("list", &upper)
}

fn directory(path: &Path, mode: u32) -> Result<()> {
    DirBuilder::new().mode(0o700).create(path).on("make the directory", path)?;
    // Whatever the umask is.
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).on("set the mode of", path)
}

/// Mounts what was prepared in a directory, and gives the path of the root filesystem. If it is mounted already, or needs
/// no mount, only that. For one process at a time.
///
/// # Errors
/// [`Error::NotPrepared`], and the kernel's.
pub fn mount(dir: &Path) -> Result<PathBuf> {
    let dir = std::path::absolute(dir).on("find", dir)?;
    let record = Record::read(&dir)?.ok_or_else(|| Error::NotPrepared(dir.clone()))?;
    let rootfs = dir.join("rootfs");
    if record.kind != Kind::Copy
        && !is_mount_point(&rootfs)?
        && let Err(e) = overlay::mount(&dir, &record.layers, record.form)
    {
        if record.kind != Kind::Auto || !is_impossible(&e) || !is_untouched(&dir)? {
            return Err(e);
        }
        log::info!("{e}; a copy is made");
        fall_back(&dir, record)?;
    }
    Ok(rootfs)
}

/// Takes the mount away, and with it what is mounted below it. Nothing is wrong if there is none.
///
/// # Errors
/// The kernel's.
pub fn unmount(dir: &Path) -> Result<()> {
    let rootfs = std::path::absolute(dir).on("find", dir)?.join("rootfs");
    while is_mount_point(&rootfs)? {
        rustix::mount::unmount(&rootfs, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW).on("unmount", &rootfs)?;
    }
    Ok(())
}

/// Takes away all that [`crate::Store::prepare`] made for a directory, in whatever state it is, with what the container
/// wrote. The directory itself stays, with whatever else is in it.
///
/// # Errors
/// When something cannot be unmounted or removed.
pub fn remove(dir: &Path) -> Result<()> {
    let dir = std::path::absolute(dir).on("find", dir)?;
    // Read before it goes; a damaged one still goes.
    let lease = Record::read(&dir).ok().flatten().map(|record| record.lease);
    discard(&dir)?;
    lease.map_or(Ok(()), |lease| files::remove_file(&lease))
}

/// The same without the lease.
pub(crate) fn discard(dir: &Path) -> Result<()> {
    unmount(dir)?;
    for file in ["rootfs.json", "rootfs.json.new"] {
        files::remove_file(&dir.join(file))?;
    }
    for part in ["rootfs", "upper", "work"] {
        files::remove_tree(&dir.join(part))?;
    }
    Ok(())
}

/// Whether a directory was prepared, and how.
///
/// # Errors
/// When its record cannot be read.
pub fn prepared(dir: &Path) -> Result<Option<Kind>> {
    Ok(Record::read(dir)?.map(|record| record.kind))
}

/// Whether something is mounted exactly here. Links are not followed.
///
/// # Errors
/// The kernel's; that nothing is there is none.
pub fn is_mount_point(path: &Path) -> Result<bool> {
    match statx(CWD, path, AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT, StatxFlags::TYPE) {
        Ok(found) => Ok(found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT)),
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(false),
        Err(e) => Err(e).on("look at", path),
    }
}
