//! Volumes: directories below the storage root that outlive containers.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use runx_core::sys::{self, resolve};

use super::cp::{self, Destination, Root, Source};
use super::options::{Mount, MountKind};
use super::record::{Containers, Record};

/// That a volume has what the image has at its place, or needs nothing of it.
const FILLED: &str = ".filled";
/// What containers see of a volume.
const DATA: &str = "_data";
/// The same while it is being filled.
const NEW: &str = "_data.new";
/// That it is being filled where it is.
const FILLING: &str = ".filling";

fn place(containers: &Containers, name: &str) -> PathBuf {
    containers.storage().join("volumes").join(name)
}

/// The directory of a volume, which is made if it is not there.
pub(super) fn directory(containers: &Containers, name: &str) -> Result<PathBuf> {
    let data = place(containers, name).join(DATA);
    make(&data).with_context(|| format!("create the volume {}", data.display()))?;
    Ok(data)
}

fn make(data: &Path) -> io::Result<()> {
    if data.is_dir() {
        return Ok(());
    }
    if let Some(parent) = data.parent() {
        // A container may make programs in it that take their owner's rights: nobody else on the machine shall reach them.
        DirBuilder::new().recursive(true).mode(0o700).create(parent)?;
    }
    match DirBuilder::new().mode(0o755).create(data) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(e),
        _ => Ok(()),
    }
}

/// Removes volumes. What is not there is fine.
pub(super) fn remove(containers: &Containers, names: &[String]) -> Result<()> {
    for name in names {
        let path = place(containers, name);
        match fs::remove_dir_all(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(e).with_context(|| format!("remove the volume {}", path.display()));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Fills volumes that are new with what the image has at their places. A kill at any moment leaves a volume that is filled, or
/// one that the next start fills; and nobody sees one that is being filled.
pub(super) fn fill(containers: &Containers, record: &Record, rootfs: &Path) -> Result<()> {
    for mount in record.options.mounts.iter().filter(|mount| mount.kind == MountKind::Volume) {
        let volume = place(containers, &mount.source);
        if !volume.join(FILLED).exists() {
            fill_one(&volume, mount, rootfs).with_context(|| format!("make the volume {}", mount.source))?;
        }
    }
    Ok(())
}

fn fill_one(volume: &Path, mount: &Mount, rootfs: &Path) -> Result<()> {
    let _lock = lock(volume)?;
    if volume.join(FILLED).exists() {
        // Somebody else was at it.
        return Ok(());
    }
    let (data, new, filling) = (volume.join(DATA), volume.join(NEW), volume.join(FILLING));
    match fs::remove_dir_all(&new) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e).context("remove what a killed command left"),
        _ => {}
    }
    let is_empty = match fs::read_dir(&data) {
        Ok(mut entries) => entries.next().is_none(),
        Err(e) if e.kind() == io::ErrorKind::NotFound => true,
        Err(e) => return Err(e).with_context(|| format!("list {}", data.display())),
    };
    let model = if mount.fill { Model::find(rootfs, &mount.target)? } else { None };
    let what = || format!("fill it from {}", mount.target);
    match model {
        Some(model) if is_empty || filling.exists() => {
            DirBuilder::new().mode(0o755).create(&new).with_context(|| format!("create {}", new.display()))?;
            // What an administrator has put there, a link or a mount say, is filled and stays.
            if is_own(&data)? && !filling.exists() {
                model.copy(&new).with_context(what)?;
                // Over an empty directory, which no container has: that comes after the mark.
                fs::rename(&new, &data).with_context(|| format!("rename {}", new.display()))?;
            } else {
                fs::remove_dir(&new).with_context(|| format!("remove {}", new.display()))?;
                fs::write(&filling, "").with_context(|| format!("create {}", filling.display()))?;
                model.copy(&data).with_context(what)?;
            }
        }
        // What is in it is somebody's already, or there is nothing to put there.
        _ => make(&data).with_context(|| format!("create {}", data.display()))?,
    }
    fs::write(volume.join(FILLED), "").with_context(|| format!("mark {} as filled", volume.display()))?;
    match fs::remove_file(&filling) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("remove {}", filling.display()))
        }
        _ => Ok(()),
    }
}

/// Whether another directory can take the place of this one, or of nothing.
fn is_own(data: &Path) -> Result<bool> {
    match fs::symlink_metadata(data) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(true),
        Err(e) => Err(e).with_context(|| format!("look at {}", data.display())),
        Ok(found) => Ok(found.is_dir() && !runx_image::rootfs::is_mount_point(data)?),
    }
}

/// Makes a volume's own directory, if it is not there, and locks it for as long as the descriptor is open.
fn lock(volume: &Path) -> Result<OwnedFd> {
    loop {
        // A container may make programs in it that take their owner's rights: nobody else on the machine shall reach them.
        let made = DirBuilder::new().recursive(true).mode(0o700).create(volume);
        made.with_context(|| format!("create {}", volume.display()))?;
        let fd = match sys::open(volume, libc::O_RDONLY | libc::O_DIRECTORY) {
            // It was removed in this moment.
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            other => other.with_context(|| format!("open {}", volume.display()))?,
        };
        // SAFETY: flock takes a descriptor and flags.
        if unsafe { libc::flock(fd.as_raw_fd(), libc::LOCK_EX) } == -1 {
            let error = io::Error::last_os_error();
            if error.kind() == io::ErrorKind::Interrupted {
                continue;
            }
            return Err(error).with_context(|| format!("lock {}", volume.display()));
        }
        let ours = sys::fstat(fd.as_fd()).context("look at a directory")?;
        if fs::metadata(volume).is_ok_and(|there| (there.dev(), there.ino()) == (ours.st_dev, ours.st_ino)) {
            return Ok(fd);
        }
    }
}

/// A directory of an image, at the place of a volume.
struct Model<'a> {
    root: OwnedFd,
    found: libc::stat,
    target: &'a str,
}

impl<'a> Model<'a> {
    /// `None` if there is no directory.
    fn find(rootfs: &Path, target: &'a str) -> Result<Option<Self>> {
        let root = sys::open(rootfs, libc::O_RDONLY | libc::O_DIRECTORY).context("open the root filesystem")?;
        let rules = resolve::IN_ROOT | resolve::NO_MAGICLINKS;
        match sys::openat2(root.as_fd(), target, libc::O_PATH, 0, rules).and_then(|there| sys::fstat(there.as_fd())) {
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => Ok(None),
            Err(e) => Err(e).with_context(|| format!("look at what the image has at {target}")),
            Ok(found) => Ok(sys::is_dir(&found).then_some(Self { root, found, target })),
        }
    }

    /// Copies all that is in it, and what it is itself.
    fn copy(self, data: &Path) -> Result<()> {
        let found = self.found;
        std::os::unix::fs::chown(data, Some(found.st_uid), Some(found.st_gid))?;
        fs::set_permissions(data, std::os::unix::fs::PermissionsExt::from_mode(found.st_mode & 0o7777))?;
        let source = Source::new(Path::new(&format!("{}/.", self.target)));
        let destination = Destination { path: data.to_owned(), contents: true, archive: true, foreign: false };
        cp::copy_out(&Root::plain(self.root), &source, &destination)
    }
}
