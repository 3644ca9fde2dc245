//! Mounts: what every container has, its own files in /etc, and what the user names.

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use crate::container::options::{Mount, MountKind, Options};
use crate::container::record::{Containers, Record};
use crate::container::{files, volumes};

const SHM_SIZE: i64 = 64 << 20;

/// All mounts, in the order in which they are made.
pub(super) fn mounts(containers: &Containers, record: &Record, directory: &Path) -> Result<Vec<Value>> {
    let options = &record.options;
    let mut all = usual(options);
    for (source, target) in files::bound(containers, record, directory) {
        all.push(json!({
            "destination": target, "type": "bind", "source": source, "options": ["rbind", "rprivate"],
        }));
    }
    for mount in &options.mounts {
        let one = described(containers, mount)?;
        // What the user mounts there takes the place of the usual.
        all.retain(|other| other["destination"] != one["destination"]);
        all.push(one);
    }
    // What is above comes first, or it would hide what is below.
    all.sort_by_key(|mount| mount["destination"].as_str().map_or(0, |path| Path::new(path).components().count()));
    Ok(all)
}

fn usual(options: &Options) -> Vec<Value> {
    let shm = format!("size={}", options.shm_size.filter(|size| *size > 0).unwrap_or(SHM_SIZE));
    let access = if options.privileged { "rw" } else { "ro" };
    let sys = match options.network {
        // The host's network namespace shows itself only through the host's own /sys.
        crate::container::options::Network::Host if runx_core::rootless::is_unprivileged() => json!({
            "destination": "/sys", "type": "none", "source": "/sys",
            "options": ["rbind", "nosuid", "noexec", "nodev", access],
        }),
        _ => json!({
            "destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", access],
        }),
    };
    vec![
        json!({"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]}),
        json!({
            "destination": "/dev", "type": "tmpfs", "source": "tmpfs",
            "options": ["nosuid", "strictatime", "mode=755", "size=65536k"],
        }),
        sys,
        json!({
            "destination": "/dev/pts", "type": "devpts", "source": "devpts",
            "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        }),
        json!({
            "destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
            "options": ["nosuid", "noexec", "nodev"],
        }),
        json!({
            "destination": "/dev/shm", "type": "tmpfs", "source": "shm",
            "options": ["nosuid", "noexec", "nodev", "mode=1777", shm],
        }),
        json!({
            "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
            "options": ["nosuid", "noexec", "nodev", "relatime", access],
        }),
    ]
}

fn described(containers: &Containers, mount: &Mount) -> Result<Value> {
    let (kind, source) = match source(containers, mount)? {
        None => ("tmpfs", PathBuf::from("tmpfs")),
        Some(source) => ("bind", source),
    };
    Ok(json!({"destination": mount.target, "type": kind, "source": source, "options": mount.options}))
}

/// What is bound to the mount's place: a volume's directory, or a path of the host. `None` for a tmpfs.
pub(in crate::container) fn source(containers: &Containers, mount: &Mount) -> Result<Option<PathBuf>> {
    Ok(match mount.kind {
        MountKind::Tmpfs => None,
        MountKind::Volume => Some(volumes::directory(containers, &mount.source)?),
        MountKind::Bind => Some(host_path(mount)?),
    })
}

/// A path of the host, which is made where that is asked for.
fn host_path(mount: &Mount) -> Result<PathBuf> {
    let path = PathBuf::from(&mount.source);
    if path.exists() {
        return Ok(path);
    }
    if !mount.make {
        bail!("bind {:?} to {:?}: the host has no such file or directory", mount.source, mount.target);
    }
    let made = DirBuilder::new().recursive(true).mode(0o755).create(&path);
    made.with_context(|| format!("create {} to bind it to {:?}", path.display(), mount.target))?;
    Ok(path)
}
