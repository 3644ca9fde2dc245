//! The mounts that make a container's root filesystem, as containerd lists them.

use std::ffi::CString;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use containerd_shim_protos::api::Mount;
use runx_core::mount_options::MountOptions;
use runx_core::sys::{self, mount};

/// Makes the mounts on `rootfs`; what was made is taken back if one fails.
pub(crate) fn mount_all(mounts: &[Mount], rootfs: &Path) -> Result<(), String> {
    for entry in mounts {
        if let Err(e) = mount_one(entry, rootfs) {
            let _ = unmount(rootfs);
            return Err(e);
        }
    }
    Ok(())
}

fn mount_one(entry: &Mount, rootfs: &Path) -> Result<(), String> {
    let target = match entry.target.trim_start_matches('/') {
        "" => rootfs.to_path_buf(),
        below if below.split('/').any(|part| part == "..") => {
            return Err(format!("mount rootfs: target {:?} contains \"..\"", entry.target));
        }
        below => rootfs.join(below),
    };
    let what =
        |e: io::Error| format!("mount rootfs: mount {} {:?} on {}: {e}", entry.type_, entry.source, target.display());
    let words: Vec<&String> = entry.options.iter().filter(|option| !option.starts_with("X-containerd.")).collect();
    if let Some(word) = words.iter().find(|word| matches!(word.split('=').next(), Some("loop" | "uidmap" | "gidmap"))) {
        return Err(format!("mount rootfs: option {word:?} is not supported"));
    }
    let options = MountOptions::parse(&words, "/").map_err(|e| format!("mount rootfs: {e}"))?;
    let at = sys::open(&target, libc::O_PATH | libc::O_DIRECTORY).map_err(what)?;
    let tree = if options.bind.is_some() || entry.type_ == "bind" {
        let source = sys::open(&entry.source, libc::O_PATH).map_err(what)?;
        let tree = mount::clone_tree(source.as_fd(), "", options.bind == Some(true)).map_err(what)?;
        mount::set_attributes(tree.as_fd(), options.set, options.clear, 0, false).map_err(what)?;
        tree
    } else if fits_mount_option(&options) {
        new_filesystem(entry, &options).map_err(what)?
    } else {
        // Kernels without `lowerdir+` take an overlay's layers only through mount(2).
        return classic_mount(entry, &options, &target).map_err(what);
    };
    let mounted = mount::attach(tree.as_fd(), at.as_fd());
    mounted.map_err(what)?;
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

/// Whether overlayfs takes its layers one at a time, since Linux 6.8.
fn has_layers_one_by_one() -> bool {
    use std::sync::OnceLock;
    static KNOWN: OnceLock<bool> = OnceLock::new();
    *KNOWN.get_or_init(|| {
        mount::NewFilesystem::open("overlay").is_ok_and(|overlay| overlay.string("lowerdir+", "/").is_ok())
    })
}

fn new_filesystem(entry: &Mount, options: &MountOptions) -> io::Result<std::os::fd::OwnedFd> {
    let filesystem = mount::NewFilesystem::open(&entry.type_)?;
    if !entry.source.is_empty() {
        filesystem.string("source", &entry.source)?;
    }
    for (key, value) in &options.data {
        match value {
            None => filesystem.flag(key)?,
            Some(layers) if key == "lowerdir" && entry.type_ == "overlay" && has_layers_one_by_one() => {
                for layer in layers.split(':') {
                    filesystem.string("lowerdir+", layer)?;
                }
            }
            Some(value) => filesystem.string(key, value)?,
        }
    }
    filesystem.mount(options.set)
}

fn classic_mount(entry: &Mount, options: &MountOptions, target: &Path) -> io::Result<()> {
    let c = |text: &str| CString::new(text).map_err(io::Error::other);
    let data: Vec<String> = options
        .data
        .iter()
        .map(|(key, value)| value.as_ref().map_or_else(|| key.clone(), |value| format!("{key}={value}")))
        .collect();
    let mut flags = 0;
    for (attribute, flag) in [
        (mount::attr::RDONLY, libc::MS_RDONLY),
        (mount::attr::NOSUID, libc::MS_NOSUID),
        (mount::attr::NODEV, libc::MS_NODEV),
        (mount::attr::NOEXEC, libc::MS_NOEXEC),
    ] {
        if options.set & attribute != 0 {
            flags |= flag;
        }
    }
    let (source, kind, data) = (c(&entry.source)?, c(&entry.type_)?, c(&data.join(","))?);
    let target = c(&target.to_string_lossy())?;
    // SAFETY: all strings are NUL-terminated and outlive the call.
    let done = unsafe {
        libc::mount(source.as_ptr(), target.as_ptr(), kind.as_ptr(), flags, data.as_ptr().cast::<libc::c_void>())
    };
    if done == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
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
