//! The mounts that make a container's root filesystem, as containerd lists them.

use std::ffi::CString;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

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
    if options.recursive_set | options.recursive_clear != 0 {
        return Err(format!("mount rootfs: recursive options of {:?} are not supported", entry.options));
    }
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

/// mount(2), which takes a page of options. More than that is shortened: the layers are named from their common
/// directory, in a thread that has a working directory of its own.
fn classic_mount(entry: &Mount, options: &MountOptions, target: &Path) -> io::Result<()> {
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
        return mount_call(&entry.source, target, &entry.type_, flags, &data);
    }
    let (directory, shortened) = shorten_layers(&options.data)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "the options are longer than a page"))?;
    let data = join_options(&shortened);
    let (source, target, kind) = (entry.source.clone(), target.to_path_buf(), entry.type_.clone());
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
