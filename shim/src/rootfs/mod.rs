//! The mounts that make a container's root filesystem, as containerd lists them.

mod id_map;
mod loop_device;

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use containerd_shim_protos::api::Mount;
use runx_core::mount_options::MountOptions;
use runx_core::spec::LinuxIdMapping;
use runx_core::sys::{self, mount};

use loop_device::LoopDevice;

/// Makes a user namespace with mappings of user and of group ids, for id-mapped mounts.
pub(crate) type MakeUserNamespace<'a> =
    &'a dyn Fn(&[LinuxIdMapping], &[LinuxIdMapping]) -> Result<OwnedFd, runx_core::Error>;

/// Makes the mounts on `rootfs`; what was made is taken back if one fails.
pub(crate) fn mount_all(mounts: &[Mount], rootfs: &Path, namespaces: MakeUserNamespace<'_>) -> Result<(), String> {
    for entry in mounts {
        if let Err(e) = mount_one(entry, rootfs, namespaces) {
            let _ = unmount(rootfs);
            return Err(e);
        }
    }
    Ok(())
}

/// What containerd's options ask for that mount(2) does not know.
#[derive(Debug, Default)]
struct Extras<'a> {
    loop_device: bool,
    direct: bool,
    users: Option<&'a str>,
    groups: Option<&'a str>,
}

fn mount_one(entry: &Mount, rootfs: &Path, namespaces: MakeUserNamespace<'_>) -> Result<(), String> {
    let what =
        |e: io::Error| format!("mount rootfs: mount {} {:?} on {:?}: {e}", entry.type_, entry.source, entry.target);
    let root = sys::open(rootfs, libc::O_PATH | libc::O_DIRECTORY).map_err(what)?;
    // A link in an image shall not lead out of it.
    let below = entry.target.trim_start_matches('/');
    let at = if below.is_empty() {
        root
    } else {
        let how = sys::resolve::IN_ROOT | sys::resolve::NO_MAGICLINKS;
        sys::openat2(root.as_fd(), below, libc::O_PATH | libc::O_DIRECTORY, 0, how).map_err(what)?
    };
    let mut extras = Extras::default();
    let mut words = Vec::new();
    for word in &entry.options {
        match word.split_once('=') {
            Some(("uidmap", map)) => extras.users = Some(map),
            Some(("gidmap", map)) => extras.groups = Some(map),
            None if word == "loop" => extras.loop_device = true,
            _ if word.starts_with("X-containerd.") => {}
            _ => words.push(word),
        }
    }
    if extras.loop_device {
        let all = words.len();
        words.retain(|word| *word != "direct-io");
        extras.direct = words.len() < all;
    }
    let mut options = MountOptions::parse(&words, "/").map_err(|e| format!("mount rootfs: {e}"))?;
    if options.recursive_set | options.recursive_clear != 0 {
        return Err(format!("mount rootfs: recursive options of {:?} are not supported", entry.options));
    }
    let id_map = match (extras.users, extras.groups) {
        (Some(users), Some(groups)) => {
            let mappings = |text| id_map::parse(text).map_err(|e| format!("mount rootfs: {e}"));
            let (users, groups) = (mappings(users)?, mappings(groups)?);
            Some(namespaces(&users, &groups).map_err(|e| format!("mount rootfs: map ids: {e}"))?)
        }
        (None, None) => None,
        _ => return Err(format!("mount rootfs: {:?} map either users or groups, and not both", entry.options)),
    };
    // Freed by itself once the mount that keeps it goes.
    let device = match extras.loop_device {
        true => {
            let read_only = options.set & mount::attr::RDONLY != 0;
            Some(LoopDevice::attach(Path::new(&entry.source), read_only, extras.direct).map_err(what)?)
        }
        false => None,
    };
    let source = device.as_ref().map_or(&entry.source, |device| &device.path);
    // An overlay is not mapped itself, but its layers are.
    let (layers, id_map) = match id_map {
        Some(id_map) if entry.type_ == "overlay" => {
            (Some(id_map::MappedLayers::attach(&mut options.data, rootfs, id_map.as_fd()).map_err(what)?), None)
        }
        other => (None, other),
    };
    let tree = if options.bind.is_some() || entry.type_ == "bind" {
        let source = sys::open(source, libc::O_PATH).map_err(what)?;
        let tree = mount::clone_tree(source.as_fd(), "", options.bind == Some(true)).map_err(what)?;
        mount::set_attributes(tree.as_fd(), options.set, options.clear, 0, false).map_err(what)?;
        tree
    } else if fits_mount_option(&options) {
        new_filesystem(&entry.type_, source, &options).map_err(what)?
    } else {
        // Kernels without `lowerdir+` take an overlay's layers only through mount(2).
        let target = format!("/proc/self/fd/{}", at.as_raw_fd());
        return classic_mount(&entry.type_, source, &options, Path::new(&target)).map_err(what);
    };
    if let Some(id_map) = id_map {
        mount::set_id_map(tree.as_fd(), id_map.as_fd(), true).map_err(what)?;
    }
    mount::attach(tree.as_fd(), at.as_fd()).map_err(what)?;
    drop(layers);
    for flags in options.propagation {
        mount::set_attributes(tree.as_fd(), 0, 0, flags & !libc::MS_REC, flags & libc::MS_REC != 0).map_err(what)?;
    }
    Ok(())
}

/// The longest value that `fsconfig` takes, in bytes.
const VALUE_LIMIT: usize = 256;

fn fits_mount_option(options: &MountOptions) -> bool {
    options
        .data
        .iter()
        .all(|(key, value)| key == "lowerdir" || value.as_ref().is_none_or(|value| value.len() < VALUE_LIMIT))
        && (has_layers_one_by_one()
            || !options.data.iter().any(|(key, value)| {
                key == "lowerdir" && value.as_ref().is_some_and(|value| value.len() >= VALUE_LIMIT)
            }))
}

/// Whether overlayfs takes its layers one at a time, since Linux 6.8. Before 6.5 it would seem so: until it
/// knew the newer calls, all options were collected unread.
fn has_layers_one_by_one() -> bool {
    use std::sync::OnceLock;
    static KNOWN: OnceLock<bool> = OnceLock::new();
    *KNOWN.get_or_init(|| {
        let takes = |key: &str| mount::NewFilesystem::open("overlay").is_ok_and(|fs| fs.string(key, "/").is_ok());
        takes("lowerdir+") && !takes("runx-no-such-option")
    })
}

fn new_filesystem(kind: &str, source: &str, options: &MountOptions) -> io::Result<OwnedFd> {
    let filesystem = mount::NewFilesystem::open(kind)?;
    if !source.is_empty() {
        filesystem.string("source", source)?;
    }
    // Read-only is a matter of the filesystem, too: a device may not be written to.
    if options.set & mount::attr::RDONLY != 0 {
        filesystem.flag("ro")?;
    }
    for (key, value) in &options.data {
        match value {
            None => filesystem.flag(key)?,
            Some(layers) if key == "lowerdir" && kind == "overlay" && has_layers_one_by_one() => {
                for layer in layers.split(':') {
                    filesystem.string("lowerdir+", layer)?;
                }
            }
            Some(value) => filesystem.string(key, value)?,
        }
    }
    filesystem.mount(options.set)
}

/// mount(2), which takes a page of options. More than that is shortened: the layers are named from their common
/// directory, in a thread that has a working directory of its own.
fn classic_mount(kind: &str, source: &str, options: &MountOptions, target: &Path) -> io::Result<()> {
    const PAGE: usize = 4096;
    let data = join_options(&options.data);
    let mut flags = 0;
    for (attribute, flag) in [
        (mount::attr::RDONLY, libc::MS_RDONLY),
        (mount::attr::NOSUID, libc::MS_NOSUID),
        (mount::attr::NODEV, libc::MS_NODEV),
        (mount::attr::NOEXEC, libc::MS_NOEXEC),
        (mount::attr::NOATIME, libc::MS_NOATIME),
        (mount::attr::STRICTATIME, libc::MS_STRICTATIME),
        (mount::attr::NODIRATIME, libc::MS_NODIRATIME),
        (mount::attr::NOSYMFOLLOW, 256),
    ] {
        if options.set & attribute != 0 {
            flags |= flag;
        }
    }
    if data.len() < PAGE {
        return mount_call(source, target, kind, flags, &data);
    }
    let (directory, shortened) = shorten_layers(&options.data)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "the options are longer than a page"))?;
    let data = join_options(&shortened);
    let (source, target, kind) = (source.to_owned(), target.to_path_buf(), kind.to_owned());
    let thread = std::thread::spawn(move || {
        sys::process::unshare(libc::CLONE_FS)?;
        nix::unistd::chdir(&directory)?;
        mount_call(&source, &target, &kind, flags, &data)
    });
    thread.join().unwrap_or_else(|_| Err(io::Error::other("the mounting thread has failed")))
}

fn join_options(data: &[(String, Option<String>)]) -> String {
    let words: Vec<String> = data
        .iter()
        .map(|(key, value)| value.as_ref().map_or_else(|| key.clone(), |value| format!("{key}={value}")))
        .collect();
    words.join(",")
}

/// An overlay's options, in order.
type Data = Vec<(String, Option<String>)>;

/// The deepest directory that all layers are below, and the options with the layers named from there.
fn shorten_layers(data: &[(String, Option<String>)]) -> Option<(PathBuf, Data)> {
    let (_, layers) = data.iter().find(|(key, _)| key == "lowerdir")?;
    let layers: Vec<&Path> = layers.as_deref()?.split(':').map(Path::new).collect();
    let mut common = layers.first()?.parent()?.to_path_buf();
    while !layers.iter().all(|layer| layer.starts_with(&common)) {
        common = common.parent()?.to_path_buf();
    }
    let short: Option<Vec<&str>> =
        layers.iter().map(|layer| layer.strip_prefix(&common).ok().and_then(Path::to_str)).collect();
    let short = short?.join(":");
    let shortened = data
        .iter()
        .map(|(key, value)| match key.as_str() {
            "lowerdir" => (key.clone(), Some(short.clone())),
            _ => (key.clone(), value.clone()),
        })
        .collect();
    Some((common, shortened))
}

fn mount_call(source: &str, target: &Path, kind: &str, flags: libc::c_ulong, data: &str) -> io::Result<()> {
    let c = |text: &str| CString::new(text).map_err(io::Error::other);
    let (source, kind, data) = (c(source)?, c(kind)?, c(data)?);
    let target = CString::new(target.as_os_str().as_encoded_bytes()).map_err(io::Error::other)?;
    // SAFETY: all strings are NUL-terminated and outlive the call.
    let done = unsafe {
        libc::mount(source.as_ptr(), target.as_ptr(), kind.as_ptr(), flags, data.as_ptr().cast::<libc::c_void>())
    };
    if done == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Detaches everything that is mounted on `rootfs`, and what a mount that was interrupted may have left beside it.
///
/// # Errors
/// The kernel's. Nothing there is fine.
pub(crate) fn unmount_all(rootfs: &Path) -> io::Result<()> {
    let beside = id_map::MappedLayers::beside(rootfs);
    unmount(&beside)?;
    match fs::remove_dir(beside) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    unmount(rootfs)
}

/// Detaches everything that is mounted on `rootfs`. Nothing there is fine.
pub(crate) fn unmount(rootfs: &Path) -> io::Result<()> {
    loop {
        match mount::detach(rootfs) {
            Ok(()) => {}
            Err(e) if matches!(e.raw_os_error(), Some(libc::EINVAL | libc::ENOENT)) => return Ok(()),
            Err(e) => return Err(e),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_named_from_their_common_directory() {
        let data = |lower: &str| {
            vec![("index".to_owned(), Some("off".to_owned())), ("lowerdir".to_owned(), Some(lower.to_owned()))]
        };
        let (directory, short) = shorten_layers(&data("/var/lib/s/12/fs:/var/lib/s/3/fs")).unwrap();
        assert_eq!(directory, Path::new("/var/lib/s"));
        assert_eq!(join_options(&short), "index=off,lowerdir=12/fs:3/fs");
        let (directory, short) = shorten_layers(&data("/a/b")).unwrap();
        assert_eq!((directory.as_path(), join_options(&short).as_str()), (Path::new("/a"), "index=off,lowerdir=b"));
    }
}
