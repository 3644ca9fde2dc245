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

fn place(containers: &Containers, name: &str) -> PathBuf {
    containers.storage().join("volumes").join(name)
}

/// The directory of a volume, which is made if it is not there.
pub(super) fn directory(containers: &Containers, name: &str) -> Result<PathBuf> {
    let data = place(containers, name).join(DATA);
    if data.is_dir() {
        return Ok(data);
    }
    let make = || -> io::Result<()> {
        if let Some(parent) = data.parent() {
            // A container may make programs in it that take their owner's rights: nobody else on the machine shall reach them.
            DirBuilder::new().recursive(true).mode(0o700).create(parent)?;
        }
        DirBuilder::new().mode(0o755).create(&data)
    };
    match make() {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
            Err(e).with_context(|| format!("create the volume {}", data.display()))
        }
        _ => Ok(data),
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
    let (data, new) = (volume.join(DATA), volume.join(NEW));
    match fs::remove_dir_all(&new) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e).context("remove what a killed command left"),
        _ => {}
    }
    let is_new = match fs::read_dir(&data) {
        Ok(mut entries) => entries.next().is_none(),
        Err(e) if e.kind() == io::ErrorKind::NotFound => true,
        Err(e) => return Err(e).with_context(|| format!("list {}", data.display())),
    };
    if is_new && (mount.fill || !data.exists()) {
        DirBuilder::new().mode(0o755).create(&new).with_context(|| format!("create {}", new.display()))?;
        if mount.fill {
            copy(rootfs, &mount.target, &new).with_context(|| format!("fill it from {}", mount.target))?;
        }
        // Over an empty directory, which nobody has mounted: that comes after the mark.
        fs::rename(&new, &data).with_context(|| format!("rename {}", new.display()))?;
    }
    fs::write(volume.join(FILLED), "").with_context(|| format!("mark {} as filled", volume.display()))
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

fn copy(rootfs: &Path, target: &str, data: &Path) -> Result<()> {
    let root = sys::open(rootfs, libc::O_RDONLY | libc::O_DIRECTORY).context("open the root filesystem")?;
    let there = sys::openat2(root.as_fd(), target, libc::O_PATH, 0, resolve::IN_ROOT | resolve::NO_MAGICLINKS);
    match there {
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => return Ok(()),
        Err(e) => return Err(e).context("look at what the image has there"),
        Ok(there) if !sys::is_dir(&sys::fstat(there.as_fd())?) => return Ok(()),
        Ok(there) => {
            // The directory itself is the volume's, too.
            let stat = sys::fstat(there.as_fd())?;
            std::os::unix::fs::chown(data, Some(stat.st_uid), Some(stat.st_gid))?;
            fs::set_permissions(data, std::os::unix::fs::PermissionsExt::from_mode(stat.st_mode & 0o7777))?;
        }
    }
    let source = Source::new(Path::new(&format!("{target}/.")));
    let destination = Destination { path: data.to_owned(), contents: true, archive: true, foreign: false };
    cp::copy_out(&Root::plain(root), &source, &destination)
}
