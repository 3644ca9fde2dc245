//! Root filesystems whose owners are shifted, for user namespaces, by options `uidmap=` and `gidmap=`.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use runx_core::spec::{LinuxIdMapping, LinuxIdMappingBuilder};
use runx_core::sys::{self, mount};

use super::{Data, shorten_layers};

/// Parses a list of mappings in containerd's form: `CONTAINER:HOST:SIZE`, separated by commas.
///
/// # Errors
/// With what is no mapping.
pub(super) fn parse(text: &str) -> Result<Vec<LinuxIdMapping>, String> {
    let one = |entry: &str| {
        let numbers: Option<Vec<u32>> = entry.split(':').map(|number| number.parse().ok()).collect();
        let [container, host, size] = numbers?[..] else { return None };
        LinuxIdMappingBuilder::default().container_id(container).host_id(host).size(size).build().ok()
    };
    text.split(',')
        .map(|entry| {
            one(entry).ok_or_else(|| format!("{entry:?} is no mapping of ids of the form CONTAINER:HOST:SIZE"))
        })
        .collect()
}

/// The layers of an overlay through an id-mapped mount of the directory that they are all below. The overlay has clones
/// of its own of what it needs, so that this mount goes when this value does.
#[derive(Debug)]
pub(super) struct MappedLayers(PathBuf);

impl MappedLayers {
    /// Where the directory is mounted for a moment.
    pub(super) fn beside(rootfs: &Path) -> PathBuf {
        rootfs.with_file_name("mapped-layers")
    }

    /// Mounts the directory beside the root filesystem, and names the layers in the overlay's options by it.
    ///
    /// # Errors
    /// Without layers, and the kernel's.
    pub(super) fn attach(data: &mut Data, rootfs: &Path, id_map: BorrowedFd<'_>) -> io::Result<Self> {
        let (common, mut mapped) = shorten_layers(data).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidInput, "there are no layers whose ids could be mapped")
        })?;
        let at = Self::beside(rootfs);
        fs::create_dir(&at)?;
        let this = Self(at);
        let source = sys::open(&common, libc::O_PATH | libc::O_DIRECTORY)?;
        let tree = mount::clone_tree(source.as_fd(), "", true)?;
        mount::set_attributes(tree.as_fd(), mount::attr::RDONLY, 0, libc::MS_PRIVATE, true)?;
        mount::set_id_map(tree.as_fd(), id_map, true)?;
        let target = sys::open(&this.0, libc::O_PATH | libc::O_DIRECTORY)?;
        mount::attach(tree.as_fd(), target.as_fd())?;
        for (key, value) in &mut mapped {
            if key == "lowerdir"
                && let Some(layers) = value
            {
                let named: Vec<String> =
                    layers.split(':').map(|layer| this.0.join(layer).to_string_lossy().into_owned()).collect();
                *layers = named.join(":");
            }
        }
        *data = mapped;
        Ok(this)
    }
}

impl Drop for MappedLayers {
    fn drop(&mut self) {
        let _ = mount::detach(&self.0);
        if let Err(e) = fs::remove_dir(&self.0) {
            log::warn!("remove {}: {e}", self.0.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_are_lists_of_three_numbers() {
        let list = parse("0:65536:1000,1000:70000:10").unwrap();
        let numbers: Vec<_> = list.iter().map(|m| (m.container_id(), m.host_id(), m.size())).collect();
        assert_eq!(numbers, [(0, 65536, 1000), (1000, 70000, 10)]);
        for bad in ["", "0:1", "0:1:2:3", "a:0:1", "0:-1:1", "0:0:1,"] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }
}
