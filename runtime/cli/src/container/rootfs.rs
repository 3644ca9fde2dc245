//! A container's root filesystem: of an image, or a directory of the user's.

use std::fs::{self, DirBuilder};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use runx_image::{Store, rootfs};

use super::options::Defaults;
use super::record::{Containers, Record};
use crate::Context;
use crate::arguments::Pull;
use crate::storage::client;

/// What a module that is an image of its own is called in its container.
const MODULE: &str = "main.wasm";

/// An image of the store.
pub(super) struct Image {
    store: Store,
    image: runx_image::Image,
}

/// Finds an image, and fetches it where it is not there or that is asked for.
pub(super) fn image(context: &Context, containers: &Containers, name: &str, pull: Pull) -> Result<Image> {
    let store = Store::open(containers.storage())?;
    if pull != Pull::Always
        && let Some(image) = store.find(name)?
    {
        return Ok(Image { store, image });
    }
    if pull == Pull::Never {
        bail!("there is no image {name:?} here, and --pull never was given: \"runx storage pull {name}\" fetches it");
    }
    fetch(context, containers, name)?;
    match store.find(name)? {
        Some(image) => Ok(Image { store, image }),
        None => bail!("the image {name:?} was fetched and removed again in this moment"),
    }
}

fn fetch(context: &Context, containers: &Containers, name: &str) -> Result<()> {
    let mut command = client::command(context, containers.storage(), "pull")
        .with_context(|| format!("there is no image {name:?} here, and it cannot be fetched"))?;
    command.arg("--").arg(name);
    // What it prints is about the way there, and standard output is the container's.
    // SAFETY: standard error stays open for as long as this program runs.
    let stderr = unsafe { std::os::fd::BorrowedFd::borrow_raw(2) };
    command.stdout(stderr.try_clone_to_owned().context("pass standard error on")?);
    let status = command.status().context("run the program that fetches images")?;
    if !status.success() {
        bail!("the image {name:?} could not be fetched; \"runx storage ls\" lists those that are here");
    }
    Ok(())
}

/// Makes a container's root filesystem in its directory, and notes what the image says.
pub(super) fn prepare(directory: &Path, image: &Image, record: &mut Record) -> Result<()> {
    let Image { store, image } = image;
    let config = store.configuration(image)?.config;
    record.image_id = Some(image.id.as_str().to_owned());
    record.defaults = Defaults {
        entrypoint: config.entrypoint,
        command: config.cmd,
        env: config.env,
        user: config.user,
        cwd: config.working_dir,
        stop_signal: config.stop_signal.filter(|signal| !signal.is_empty()),
        volumes: config.volumes.into_keys().collect(),
        labels: config.labels.into_iter().collect(),
    };
    if image.is_module() {
        let module = store.module(image)?.context("the image has no layer that is a WASM module")?;
        return place_module(&module, directory, record);
    }
    store.prepare(image, directory, &rootfs::Options::default())?;
    Ok(())
}

/// An image that is a module and no root filesystem: it becomes the one file of a directory. A copy, since the container
/// may write it.
fn place_module(module: &Path, directory: &Path, record: &mut Record) -> Result<()> {
    let rootfs = directory.join("rootfs");
    let copy = || -> std::io::Result<()> {
        DirBuilder::new().mode(0o755).create(&rootfs)?;
        fs::copy(module, rootfs.join(MODULE))?;
        fs::set_permissions(rootfs.join(MODULE), fs::Permissions::from_mode(0o444))
    };
    copy().with_context(|| format!("copy the module {} to {}", module.display(), rootfs.display()))?;
    if record.defaults.entrypoint.is_empty() {
        record.defaults.entrypoint = vec![format!("/{MODULE}")];
    } else {
        record.defaults.entrypoint[0] = format!("/{MODULE}");
    }
    record.is_module = true;
    Ok(())
}

/// Where the root filesystem of a new container will be.
pub(super) fn place(directory: &Path, record: &Record) -> PathBuf {
    record.options.rootfs.clone().unwrap_or_else(|| directory.join("rootfs"))
}

/// Mounts it, and tells where. Fine to repeat.
pub(super) fn mount(directory: &Path, record: &Record) -> Result<PathBuf> {
    if record.is_module {
        return Ok(directory.join("rootfs"));
    }
    // Of a bundle that was given with its configuration it is what that says.
    let given = record.options.given_configuration.then_some(&record.rootfs);
    let Some(rootfs) = given.or(record.options.rootfs.as_ref()) else { return Ok(rootfs::mount(directory)?) };
    if !rootfs.is_dir() {
        bail!("the root filesystem {} is not there any more, or no directory", rootfs.display());
    }
    Ok(rootfs.clone())
}

/// Whether it is, or may be, of an image.
fn is_prepared(record: &Record) -> bool {
    !record.is_module && (record.image_id.is_some() || record.created.is_empty())
}

/// Takes the mount away. Fine to repeat.
pub(super) fn unmount(directory: &Path, record: &Record) -> Result<()> {
    if is_prepared(record) {
        rootfs::unmount(directory)?;
    }
    Ok(())
}

/// Removes what was made of it. A directory of the user's stays.
pub(super) fn remove(directory: &Path, record: &Record) -> Result<()> {
    if is_prepared(record) {
        rootfs::remove(directory)?;
    }
    Ok(())
}

/// The absolute path of a directory that is to be a root filesystem.
pub(super) fn given(path: &Path) -> Result<PathBuf> {
    let path = std::fs::canonicalize(path).with_context(|| format!("--rootfs {}", path.display()))?;
    if !path.is_dir() {
        bail!("--rootfs {} is no directory", path.display());
    }
    Ok(path)
}
