//! WASM modules in the store: artifacts that are one, and images whose entrypoint is one.

use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, statat};

use crate::error::Result;
use crate::index::Image;
use crate::store::Store;

impl Store {
    /// The file of an image's WASM module or component: of an artifact the blob, and of an image with a root filesystem
    /// whose entrypoint or command ends in `.wasm` that file in its layer. Nothing if it is an image of another kind.
    ///
    /// # Errors
    /// When the image is not complete in the store.
    pub fn module(&self, image: &Image) -> Result<Option<PathBuf>> {
        if image.is_module() {
            return Ok(image.layers.first().map(|layer| self.blob_path(&layer.descriptor.digest)));
        }
        let run = self.configuration(image)?.config;
        let Some(program) = run.entrypoint.first().or(run.cmd.first()).filter(|program| program.ends_with(".wasm"))
        else {
            return Ok(None);
        };
        let path = Path::new("/").join(&run.working_dir).join(program);
        let layers = self.layers(image)?;
        // The highest layer that has the file, or says that it has gone, decides.
        for (layer, tree) in layers.iter().rev() {
            match look_up(tree, &path, layer.form.opaque()) {
                Found::File(file) => return Ok(Some(file)),
                Found::Nothing => {}
                Found::Hidden => return Ok(None),
            }
        }
        Ok(None)
    }
}

enum Found {
    File(PathBuf),
    Nothing,
    Hidden,
}

/// Walks down a layer's tree without following links: a module is a file where the configuration says that it is.
fn look_up(tree: &Path, path: &Path, opaque: &str) -> Found {
    let mut at = tree.to_owned();
    let mut hidden = false;
    let names: Vec<_> = path.components().filter(|part| matches!(part, Component::Normal(_))).collect();
    if path.components().any(|part| part == Component::ParentDir) {
        return Found::Hidden;
    }
    for (number, name) in names.iter().enumerate() {
        at.push(name);
        let Ok(stat) = statat(CWD, &at, AtFlags::SYMLINK_NOFOLLOW) else {
            return if hidden { Found::Hidden } else { Found::Nothing };
        };
        let last = number + 1 == names.len();
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory if !last => {
                hidden |= rustix::fs::lgetxattr(&at, opaque, &mut [0_u8; 1][..]).is_ok_and(|length| length == 1);
            }
            FileType::RegularFile if last => break,
            _ => return Found::Hidden,
        }
    }
    Found::File(at)
}
