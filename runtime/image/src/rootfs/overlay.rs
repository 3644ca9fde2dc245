//! Mounting overlay.
//!
//! By the new mount interface, which takes each layer by itself; kernels before 6.5 cannot, and get all in one string. It
//! may be a page long, and in it colons and commas have meanings, so layers are named by descriptors there.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, open};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MoveMountFlags, UnmountFlags, fsconfig_create,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount,
};

use crate::error::{Context, Error, Result};
use crate::layer::Form;

/// Whether it can be mounted with these directories. Where the kernel has to mount it somewhere to find out, it is mounted
/// and taken away again.
pub(super) fn probe(dir: &Path, layers: &[PathBuf], form: Form) -> Result<()> {
    match detached(dir, layers, form) {
        Ok(_) => Ok(()),
        Err(_) => {
            by_string(dir, layers, form)?;
            let rootfs = dir.join("rootfs");
            rustix::mount::unmount(&rootfs, UnmountFlags::DETACH).on("unmount", &rootfs)
        }
    }
}

/// Mounts it at `rootfs`.
pub(super) fn mount(dir: &Path, layers: &[PathBuf], form: Form) -> Result<()> {
    match detached(dir, layers, form) {
        Ok(mount) => {
            let rootfs = dir.join("rootfs");
            let moved = move_mount(&mount, "", CWD, &rootfs, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH);
            moved.on("mount overlay at", &rootfs)
        }
        Err(_) => by_string(dir, layers, form),
    }
}

fn detached(dir: &Path, layers: &[PathBuf], form: Form) -> rustix::io::Result<OwnedFd> {
    let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&context, "source", "overlay")?;
    for layer in layers.iter().rev() {
        fsconfig_set_string(&context, "lowerdir+", layer)?;
    }
    fsconfig_set_string(&context, "upperdir", dir.join("upper"))?;
    fsconfig_set_string(&context, "workdir", dir.join("work"))?;
    if form == Form::User {
        fsconfig_set_flag(&context, "userxattr")?;
    }
    fsconfig_create(&context)?;
    fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())
}

fn by_string(dir: &Path, layers: &[PathBuf], form: Form) -> Result<()> {
    let held =
        |path: &Path| open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).map(File::from);
    let name = |file: &File| format!("/proc/self/fd/{}", file.as_raw_fd());
    let lower: Vec<File> = layers.iter().rev().map(|path| held(path).on("open", path)).collect::<Result<_>>()?;
    let [upper, work] = ["upper", "work"].map(|part| dir.join(part));
    let (upper, work) = (held(&upper).on("open", &upper)?, held(&work).on("open", &work)?);
    let mut data = format!(
        "lowerdir={},upperdir={},workdir={}",
        lower.iter().map(name).collect::<Vec<_>>().join(":"),
        name(&upper),
        name(&work)
    );
    if form == Form::User {
        data.push_str(",userxattr");
    }
    let refused = |source: io::Error| Error::NoOverlay { dir: dir.into(), source };
    let data = std::ffi::CString::new(data).map_err(|e| refused(e.into()))?;
    let mounted = rustix::mount::mount("overlay", dir.join("rootfs"), "overlay", MountFlags::empty(), data.as_c_str());
    mounted.map_err(|e| refused(e.into()))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn both_ways_mount_the_same_and_many_layers() {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let dir = dir.path().join("with,comma:and=more");
        fs::create_dir(&dir).unwrap();
        let layers: Vec<PathBuf> = (0..100).map(|number| dir.join(format!("layer{number:060}"))).collect();
        for (number, layer) in layers.iter().enumerate() {
            fs::create_dir(layer).unwrap();
            fs::write(layer.join("top"), number.to_string()).unwrap();
            fs::write(layer.join(format!("file{number}")), "").unwrap();
        }
        for part in ["upper", "work", "rootfs"] {
            fs::create_dir(dir.join(part)).unwrap();
        }
        if probe(&dir, &layers, Form::current()).is_err() {
            println!("SKIPPED: overlay cannot be mounted below {}", dir.display());
            return;
        }
        let ways = [mount as fn(&Path, &[PathBuf], Form) -> Result<()>, by_string];
        for way in ways {
            way(&dir, &layers, Form::current()).unwrap();
            let rootfs = dir.join("rootfs");
            let top = fs::read_to_string(rootfs.join("top")).unwrap();
            let count = fs::read_dir(&rootfs).unwrap().count();
            rustix::mount::unmount(&rootfs, UnmountFlags::DETACH).unwrap();
            assert_eq!((top.as_str(), count), ("99", 101));
        }
    }
}
