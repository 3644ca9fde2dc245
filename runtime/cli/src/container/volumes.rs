//! Volumes: directories below the storage root that outlive containers.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use runx_core::sys::{self, resolve};

use super::cp::{self, Destination, Source};
use super::options::MountKind;
use super::record::{Containers, Record};

/// That a volume has what the image has at its place, or needs nothing of it.
const FILLED: &str = ".filled";

fn place(containers: &Containers, name: &str) -> PathBuf {
    containers.storage().join("volumes").join(name)
}

/// The directory of a volume, which is made if it is not there.
pub(super) fn directory(containers: &Containers, name: &str) -> Result<PathBuf> {
    let data = place(containers, name).join("_data");
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

/// Fills volumes that are new with what the image has at their places.
pub(super) fn fill(containers: &Containers, record: &Record, rootfs: &Path) -> Result<()> {
    for mount in record.options.mounts.iter().filter(|mount| mount.kind == MountKind::Volume) {
        let data = directory(containers, &mount.source)?;
        let filled = place(containers, &mount.source).join(FILLED);
        if filled.exists() {
            continue;
        }
        let is_new = fs::read_dir(&data).is_ok_and(|mut entries| entries.next().is_none());
        if mount.fill && is_new {
            copy(rootfs, &mount.target, &data)
                .with_context(|| format!("fill the volume {} from {}", mount.source, mount.target))?;
        }
        fs::write(&filled, "").with_context(|| format!("write {}", filled.display()))?;
    }
    Ok(())
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
    cp::copy_out(&root, &source, &destination)
}
