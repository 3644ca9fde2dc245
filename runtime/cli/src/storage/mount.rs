//! `runx storage mount` and `umount`.
//!
//! An image's mount has its parts below the storage root, in `mounts`, by the place that it is mounted at.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow, bail};
use runx_core::mount_options::MountOptions;
use runx_core::rootless;
use runx_core::sys;
use runx_core::sys::mount::{self as calls, NewFilesystem, attr};
use runx_image::{Digest, Store, rootfs};

use super::remove_place;
use crate::arguments::ImageMount;
use crate::{Failure, print};

/// `runx storage mount`.
pub(super) fn mount(root: &Path, wanted: &ImageMount) -> Result<u8, Failure> {
    if rootless::is_unprivileged() {
        Err(anyhow!("mount {}: an ordinary user's mounts end with the command that made them", wanted.source))?;
    }
    let target = wanted.target.as_deref().map(place_of).transpose()?;
    let shown = target.as_deref().map_or_else(|| wanted.source.clone(), |target| target.display().to_string());
    let options = MountOptions::parse(&wanted.options, &shown)?;
    if options.id_map.is_some() || options.copy_up {
        Err(anyhow!("mount {shown}: idmap, ridmap and tmpcopyup are for containers' mounts"))?;
    }
    let is_path = wanted.source.starts_with(['/', '.']);
    let has_layers = options.data.iter().any(|(key, _)| key.starts_with("lowerdir"));
    let kind = match wanted.kind.as_deref() {
        Some("bind") => Kind::Bind,
        Some(kind) => Kind::Filesystem(kind),
        None if options.bind.is_some() => Kind::Bind,
        None if has_layers => Kind::Filesystem("overlay"),
        None if is_path => Kind::Bind,
        None => Kind::Image,
    };
    if kind == Kind::Image {
        return image(root, wanted, &options, target.as_deref());
    }
    let target = target.with_context(|| format!("mount {}: it needs a target", wanted.source))?;
    let mounted = match kind {
        Kind::Filesystem(kind) => filesystem(kind, &wanted.source, &options),
        _ => bind(Path::new(&wanted.source), &options),
    };
    let mounted = mounted.with_context(|| format!("mount {}", wanted.source))?;
    attach(&mounted, &target, &options)?;
    Ok(0)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind<'a> {
    Image,
    Bind,
    Filesystem(&'a str),
}

fn image(root: &Path, wanted: &ImageMount, options: &MountOptions, target: Option<&Path>) -> Result<u8, Failure> {
    let store = Store::open(root)?;
    let image = store.get(&wanted.source)?;
    if let Some((option, _)) = options.data.first() {
        Err(anyhow!("mount image {}: the option {option:?} has no meaning for an image", wanted.source))?;
    }
    let parts = match target {
        Some(target) => parts_of(root, target),
        None => root.join("mounts").join(image.id.hex()),
    };
    if rootfs::prepared(&parts)?.is_some() {
        if target.is_some() {
            Err(anyhow!(
                "an image is mounted at {} already: \"runx storage umount {0}\" takes it away",
                target.unwrap_or(&parts).display()
            ))?;
        }
        // Once is enough for all who only look.
        return print(&format!("{}\n", rootfs::mount(&parts)?.display()));
    }
    let made = (|| -> Result<PathBuf> {
        store.prepare(&image, &parts, &rootfs::Options::default())?;
        let mounted = rootfs::mount(&parts)?;
        let writable = wanted.options.iter().any(|option| option == "rw");
        let mut options = MountOptions { set: options.set, clear: options.clear, ..MountOptions::default() };
        if !writable {
            options.set |= attr::RDONLY;
        }
        // All users of the machine see it: an image's devices and programs of root's are no more than files, unless they are
        // asked for.
        for (word, attribute) in [("suid", attr::NOSUID), ("dev", attr::NODEV)] {
            if !wanted.options.iter().any(|option| option == word) {
                options.set |= attribute;
            }
        }
        let mount = bind(&mounted, &options)?;
        let target = target.unwrap_or(&mounted);
        attach(&mount, target, &options)?;
        Ok(target.to_owned())
    })();
    match made {
        Ok(path) => print(&format!("{}\n", path.display())),
        Err(e) => {
            remove_place(&parts).context("clean up")?;
            Err(e.context(format!("mount image {}", wanted.source)).into())
        }
    }
}

/// Where the parts of an image are that is mounted at a place.
fn parts_of(root: &Path, target: &Path) -> PathBuf {
    root.join("mounts").join(Digest::of(target.as_os_str().as_bytes()).hex())
}

/// The absolute path of a place to mount at, without links.
fn place_of(target: &Path) -> Result<PathBuf> {
    fs::canonicalize(target).with_context(|| format!("the target {} has to be there", target.display()))
}

fn bind(source: &Path, options: &MountOptions) -> Result<OwnedFd> {
    let dir = sys::open("/", libc::O_PATH | libc::O_DIRECTORY).context("open /")?;
    let absolute = std::path::absolute(source).context("find it")?;
    if let Some((option, _)) = options.data.first() {
        bail!("the option {option:?} has no meaning for a bind mount");
    }
    let recursive = options.bind == Some(true);
    let mount =
        calls::clone_tree(dir.as_fd(), &absolute, recursive).with_context(|| format!("bind {}", source.display()))?;
    attributes(&mount, options)?;
    Ok(mount)
}

fn filesystem(kind: &str, source: &str, options: &MountOptions) -> Result<OwnedFd> {
    let new = NewFilesystem::open(kind).with_context(|| format!("begin a filesystem of type {kind:?}"))?;
    new.string("source", source).context("set the source")?;
    for (key, value) in &options.data {
        let set = match value {
            None => new.flag(key),
            // As a whole it may be too long for the kernel; each layer by itself is not.
            Some(layers) if kind == "overlay" && key == "lowerdir" => split_layers(layers)
                .iter()
                .try_for_each(|layer| new.string("lowerdir+", layer))
                .or_else(|_| new.string(key, layers)),
            Some(value) => new.string(key, value),
        };
        set.with_context(|| format!("set the option {key:?}"))?;
    }
    let read_only = options.set & attr::RDONLY != 0;
    if read_only {
        new.flag("ro").context("set the option \"ro\"")?;
    }
    let mount = new.mount(0).with_context(|| format!("make the filesystem of type {kind:?}"))?;
    attributes(&mount, options)?;
    Ok(mount)
}

/// The layers of an overlay's option: a colon stands between them, and one after a backslash in a name.
fn split_layers(text: &str) -> Vec<String> {
    let mut layers = vec![String::new()];
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        let last = layers.len() - 1;
        match c {
            ':' => layers.push(String::new()),
            '\\' => layers[last].extend(chars.next()),
            c => layers[last].push(c),
        }
    }
    layers
}

fn attributes(mount: &OwnedFd, options: &MountOptions) -> Result<()> {
    let recursive = options.recursive_set | options.recursive_clear != 0;
    if recursive {
        calls::set_attributes(mount.as_fd(), options.recursive_set, options.recursive_clear, 0, true)
            .context("set the options of the mounts below")?;
    }
    if options.set | options.clear != 0 {
        calls::set_attributes(mount.as_fd(), options.set, options.clear, 0, false)
            .context("set the mount's options")?;
    }
    Ok(())
}

fn attach(mount: &OwnedFd, target: &Path, options: &MountOptions) -> Result<()> {
    let place = sys::open(target, libc::O_PATH).with_context(|| format!("open {}", target.display()))?;
    calls::attach(mount.as_fd(), place.as_fd()).with_context(|| format!("mount at {}", target.display()))?;
    for flags in &options.propagation {
        let recursive = flags & libc::MS_REC != 0;
        calls::set_attributes(mount.as_fd(), 0, 0, flags & !libc::MS_REC, recursive)
            .with_context(|| format!("set the propagation of {}", target.display()))?;
    }
    Ok(())
}

/// `runx storage umount`.
pub(super) fn umount(root: &Path, target: &Path) -> Result<u8, Failure> {
    let target = place_of(target)?;
    let own = target.parent().filter(|dir| dir.parent() == Some(&root.join("mounts")) && target.ends_with("rootfs"));
    if let Some(parts) = own {
        remove_place(parts)?;
        return Ok(0);
    }
    let parts = parts_of(root, &target);
    let is_image = rootfs::prepared(&parts)?.is_some();
    if rootfs::is_mount_point(&target)? {
        calls::detach(&target).with_context(|| format!("unmount {}", target.display()))?;
    } else if !is_image {
        Err(anyhow!("nothing is mounted at {}", target.display()))?;
    }
    if is_image {
        remove_place(&parts)?;
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_stand_between_colons() {
        assert_eq!(split_layers("/a:/b"), ["/a", "/b"]);
        assert_eq!(split_layers(r"/a\:b:/c"), ["/a:b", "/c"]);
    }
}
