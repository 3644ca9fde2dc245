//! `runx storage`: images on this machine, and mounts.
//!
//! What is light is done here. What speaks to registries, reads archives or decompresses is done by `runx-image-client`
//! beside this program.

pub(crate) mod client;
mod filter;
mod ls;
mod mount;
mod remove;

use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, anyhow};
use runx_core::container::Status;
use runx_core::rootless;
use runx_image::{Store, rootfs};

use crate::arguments::Storage;
use crate::{Context, Failure, print};

/// `runx storage …`.
pub(crate) fn storage(context: &Context, command: Storage) -> Result<u8, Failure> {
    let root = context.global.storage_root();
    if changes_files(&command) && rootless::is_ordinary_user() {
        // Images' files belong to many: ids of the user's, which only mean something in his own user namespace.
        rootless::enter_own()?;
    }
    match command {
        Storage::Pull { image, container: None, flags, .. } => {
            let mut command = client::command(context, &root, "pull")?;
            become_it(command.args(flags).arg("--").arg(image))
        }
        Storage::Pull { image, container: Some(id), quiet, flags } => {
            let mut command = client::command(context, &root, "pull")?;
            command.args(flags).args(quiet.then_some("--quiet")).arg("--").arg(&image);
            pull_for(&root, &id, command)
        }
        Storage::Import { flags } => become_it(client::command(context, &root, "import")?.args(flags)),
        Storage::Export { flags } => become_it(client::command(context, &root, "export")?.args(flags)),
        Storage::Ls(ls) => ls::ls(&Store::open(&root)?, &ls),
        Storage::Inspect { images } => ls::inspect(&Store::open(&root)?, &images),
        Storage::Df { format } => ls::df(&Store::open(&root)?, format),
        Storage::Tag { image, names } => {
            let store = Store::open(&root)?;
            let image = store.get(&image)?;
            names.iter().try_for_each(|name| store.tag(&image, name))?;
            Ok(0)
        }
        Storage::Rm { images, force } => remove::rm(&Store::open(&root)?, &images, force),
        Storage::Prune { all, force, filters } => remove::prune(&Store::open(&root)?, all, force, &filters),
        Storage::Mount(wanted) => mount::mount(&root, &wanted),
        Storage::Umount { target } => mount::umount(&root, &target),
        Storage::Cleanup { container } => cleanup(context, &root, &container),
    }
}

fn changes_files(command: &Storage) -> bool {
    !matches!(command, Storage::Ls(_) | Storage::Inspect { .. } | Storage::Df { .. } | Storage::Tag { .. })
}

/// Becomes the program that does it.
fn become_it(command: &mut Command) -> Result<u8, Failure> {
    let program = Path::new(command.get_program()).display().to_string();
    Err(command.exec()).with_context(|| format!("execute {program}")).map_err(Failure::from)
}

/// Where the root filesystem for a container is that is not one of `runx container`.
fn place(root: &Path, id: &str) -> PathBuf {
    root.join("rootfs").join(id)
}

/// Pulls an image, and makes and mounts a root filesystem of it.
fn pull_for(root: &Path, id: &str, mut command: Command) -> Result<u8, Failure> {
    let dir = place(root, id);
    if rootless::is_unprivileged() {
        Err(anyhow!("--container-id mounts a root filesystem, which an ordinary user's command cannot leave behind"))?;
    }
    if rootfs::prepared(&dir)?.is_some() {
        Err(anyhow!(
            "container {id:?} has a root filesystem in {} already: \"runx storage cleanup {id}\" removes it",
            dir.display()
        ))?;
    }
    let program = Path::new(command.get_program()).display().to_string();
    let output = command.stderr(Stdio::inherit()).output().with_context(|| format!("run {program}"))?;
    if !output.status.success() {
        // It has said why.
        return Ok(output.status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1));
    }
    let digest = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    let store = Store::open(root)?;
    let image = store.get(&digest)?;
    let made = store
        .prepare(&image, &dir, &rootfs::Options::default())
        .and_then(|()| rootfs::mount(&dir))
        .with_context(|| format!("make the root filesystem of container {id:?}"));
    match made {
        Ok(path) => print(&format!("{}\n", path.display())),
        Err(e) => {
            remove_place(&dir).context("clean up")?;
            Err(e.into())
        }
    }
}

fn remove_place(dir: &Path) -> Result<()> {
    rootfs::remove(dir)?;
    match std::fs::remove_dir(dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}

/// Removes a container's root filesystem, unless the container is there.
fn cleanup(context: &Context, root: &Path, id: &str) -> Result<u8, Failure> {
    let dir = place(root, id);
    match context.runtime().load(id) {
        Ok(container) if container.status() != Status::Stopped => {
            Err(busy(id, &container.status().to_string()))?;
        }
        Ok(_) | Err(runx_core::Error::NotFound(_)) => {}
        Err(e) => Err(e)?,
    }
    if !dir.exists() {
        Err(missing(root, id))?;
    }
    remove_place(&dir)?;
    Ok(0)
}

fn busy(id: &str, status: &str) -> anyhow::Error {
    anyhow!("container {id:?} is {status}, and needs its root filesystem: \"runx delete --force {id}\" ends it")
}

fn missing(root: &Path, id: &str) -> anyhow::Error {
    if root.join("containers").join(id).exists() {
        return anyhow!("container {id:?} is one of runx container: \"runx container rm {id}\" removes it");
    }
    anyhow!("there is no root filesystem for container {id:?} below {}", root.join("rootfs").display())
}

/// A number of bytes as people read it.
fn human(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["kB", "MB", "GB", "TB", "PB"];
    if bytes < 1000 {
        return format!("{bytes}B");
    }
    let mut value = bytes as f64;
    let mut unit = "";
    for next in UNITS {
        if value < 999.5 {
            break;
        }
        value /= 1000.0;
        unit = next;
    }
    if value < 9.995 {
        format!("{value:.2}{unit}")
    } else if value < 99.95 {
        format!("{value:.1}{unit}")
    } else {
        format!("{value:.0}{unit}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_three_digits() {
        for (bytes, text) in [
            (0, "0B"),
            (999, "999B"),
            (1000, "1.00kB"),
            (1_982_256, "1.98MB"),
            (45_600_000, "45.6MB"),
            (999_600, "1.00MB"),
            (123_456_789_000, "123GB"),
        ] {
            assert_eq!(human(bytes), text, "{bytes}");
        }
    }
}
