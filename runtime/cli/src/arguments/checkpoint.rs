//! What `checkpoint` and `restore` are told.

use std::path::{Component, Path, PathBuf};

use anyhow::{Result, bail};
use runx_core::container::{CgroupMode, CheckpointOptions, Images};

use super::scan::Words;

/// `runx checkpoint`.
#[derive(Debug)]
pub(crate) struct Checkpoint {
    pub(crate) id: String,
    pub(crate) options: CheckpointOptions,
}

/// `runx restore`.
#[derive(Debug)]
pub(crate) struct Restore {
    pub(crate) id: String,
    pub(crate) bundle: PathBuf,
    pub(crate) images: Images,
    pub(crate) console_socket: Option<PathBuf>,
    pub(crate) pid_file: Option<PathBuf>,
    pub(crate) detach: bool,
    pub(crate) no_subreaper: bool,
    pub(crate) lsm_profile: Option<String>,
    pub(crate) lsm_mount_context: Option<String>,
}

pub(super) fn checkpoint(id: String, words: &mut Words) -> Result<Checkpoint> {
    let images = images(words)?;
    let parent = words.path("parent-path");
    if let Some(parent) = &parent {
        if parent.is_absolute() {
            bail!("--parent-path {}: it is relative to the directory of the images", parent.display());
        }
        // CRIU takes none that is not there for none at all.
        if !images.images.join(parent).is_dir() {
            bail!("--parent-path {}: there is no such directory from {}", parent.display(), images.images.display());
        }
    }
    let options = CheckpointOptions {
        images,
        parent,
        leave_running: words.on("leave-running"),
        pre_dump: words.on("pre-dump"),
        tcp_skip_in_flight: words.on("tcp-skip-in-flight"),
        link_remap: words.on("link-remap"),
    };
    Ok(Checkpoint { id, options })
}

pub(super) fn restore(id: String, words: &mut Words) -> Result<Restore> {
    Ok(Restore {
        id,
        bundle: words.path("bundle").unwrap_or_else(|| ".".into()),
        images: images(words)?,
        console_socket: words.path("console-socket"),
        pid_file: words.path("pid-file"),
        detach: words.on("detach"),
        no_subreaper: words.on("no-subreaper"),
        lsm_profile: words.text("lsm-profile")?.map(str::to_owned),
        lsm_mount_context: words.text("lsm-mount-context")?.map(str::to_owned),
    })
}

fn images(words: &mut Words) -> Result<Images> {
    let absolute = |path: PathBuf| -> Result<PathBuf> {
        let path = std::path::absolute(path)?;
        if path.components().all(|part| part == Component::RootDir) {
            bail!("the directory of a checkpoint must not be /");
        }
        Ok(path)
    };
    let cgroups = match words.text("manage-cgroups-mode")? {
        None | Some("") => None,
        Some("soft") => Some(CgroupMode::Soft),
        Some("full") => Some(CgroupMode::Full),
        Some("strict") => Some(CgroupMode::Strict),
        Some("ignore") => Some(CgroupMode::Ignore),
        Some(other) => bail!("invalid --manage-cgroups-mode {other:?}: it is soft, full, strict or ignore"),
    };
    let empty_network = match words.text("empty-ns")? {
        None => false,
        Some("network") => true,
        Some(other) => bail!("invalid --empty-ns {other:?}: only the network namespace can be left empty"),
    };
    Ok(Images {
        images: absolute(words.path("image-path").unwrap_or_else(|| Path::new("checkpoint").into()))?,
        work: words.path("work-path").map(absolute).transpose()?,
        tcp_established: words.on("tcp-established"),
        ext_unix_sk: words.on("ext-unix-sk"),
        shell_job: words.on("shell-job"),
        file_locks: words.on("file-locks"),
        auto_dedup: words.on("auto-dedup"),
        empty_network,
        cgroups,
    })
}
