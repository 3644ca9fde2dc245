//! Checkpoints of containers, made and restored by CRIU.
//!
//! What is the container's alone, CRIU keeps and makes again: its processes, its memory, its filesystems in memory. What
//! comes from the host it is told of by name: bind mounts, devices, namespaces that were joined, and the pipes that the
//! standard streams were. The names are runc's, so that a checkpoint of the one is restored by the other.

mod dump;
mod restore;
mod rpc;

use std::fs::{self, DirBuilder};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxNamespaceType, Mount};

use crate::bundle::Bundle;
use crate::cgroup::Layout;
use crate::error::{Context, Result};
use crate::sys;
use rpc::{MountMap, Options};

pub use dump::CheckpointOptions;
pub(super) use restore::ROOT;
pub use restore::RestoreOptions;

/// The file among the images that names what the standard streams were.
const DESCRIPTORS: &str = "descriptors.json";

/// What becomes of cgroups, criu(8), `--manage-cgroups`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CgroupMode {
    /// Do nothing about them.
    Ignore,
    /// Restore the properties of those that are made.
    Soft,
    /// Restore the properties of all.
    Full,
    /// Fail if they are not there as they were.
    Strict,
}

/// What checkpoint and restore have in common.
#[derive(Clone, Debug, Default)]
pub struct Images {
    /// The directory of the images.
    pub images: PathBuf,
    /// The directory for logs and statistics, the images' if there is none.
    pub work: Option<PathBuf>,
    /// Keep TCP connections.
    pub tcp_established: bool,
    /// Keep the ends of connections over unix sockets to processes outside.
    pub ext_unix_sk: bool,
    /// It has a terminal from outside, or a session leader.
    pub shell_job: bool,
    /// Keep locks of files.
    pub file_locks: bool,
    /// Drop pages from older images once they are in newer ones.
    pub auto_dedup: bool,
    /// Neither keep nor restore what is in the network namespace.
    pub empty_network: bool,
    /// What becomes of cgroups; CRIU's own default if it is not said.
    pub cgroups: Option<CgroupMode>,
}

impl Images {
    /// Where CRIU writes its log, a file of this name.
    fn log(&self, name: &str) -> PathBuf {
        self.work.as_ref().unwrap_or(&self.images).join(name)
    }

    /// The options that these are, with directories that must stay open meanwhile.
    fn options(&self, log: &str) -> Result<(Options, Vec<OwnedFd>)> {
        const LOG_LEVEL: i32 = 4;
        const DEFAULT: i32 = 6;
        let mut open = vec![directory(&self.images)?];
        let images_dir_fd = open[0].as_raw_fd();
        let work_dir_fd = match &self.work {
            Some(path) => {
                open.push(directory(path)?);
                Some(open[1].as_raw_fd())
            }
            None => None,
        };
        let options = Options {
            images_dir_fd,
            work_dir_fd,
            log_level: Some(LOG_LEVEL),
            log_file: Some(log.to_owned()),
            notify_scripts: Some(true),
            orphan_pts_master: Some(true),
            tcp_established: Some(self.tcp_established),
            ext_unix_sk: Some(self.ext_unix_sk),
            shell_job: Some(self.shell_job),
            file_locks: Some(self.file_locks),
            auto_dedup: Some(self.auto_dedup),
            empty_ns: Some(if self.empty_network { libc::CLONE_NEWNET as u32 } else { 0 }),
            manage_cgroups: Some(true),
            manage_cgroups_mode: Some(self.cgroups.map_or(DEFAULT, |mode| match mode {
                CgroupMode::Ignore => 0,
                CgroupMode::Soft => 3,
                CgroupMode::Full => 4,
                CgroupMode::Strict => 5,
            })),
            ..Options::default()
        };
        Ok((options, open))
    }
}

/// Opens a directory, which is made if it is not there.
fn directory(path: &Path) -> Result<OwnedFd> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e).on("create", path),
        _ => {}
    }
    sys::open(path, libc::O_RDONLY | libc::O_DIRECTORY).on("open", path)
}

/// The key of a namespace that was joined and is outside of the checkpoint.
fn namespace_key(kind: LinuxNamespaceType) -> Option<&'static str> {
    match kind {
        LinuxNamespaceType::Network => Some("extRootNetNS"),
        LinuxNamespaceType::Pid => Some("extRootPidNS"),
        _ => None,
    }
}

/// Whether a mount shows something of the host.
fn is_bind(mount: &Mount) -> bool {
    let options = mount.options().as_deref().unwrap_or_default();
    mount.typ().as_deref() == Some("bind") || options.iter().any(|option| option == "bind" || option == "rbind")
}

/// The place of a mount as the container sees it, with the links that lead there followed as the container does.
fn place(rootfs: &Path, destination: &Path) -> String {
    let below = destination.strip_prefix("/").unwrap_or(destination);
    let real = |fd: &OwnedFd| fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).ok();
    let inside = || {
        let root = sys::open(rootfs, libc::O_PATH | libc::O_DIRECTORY).ok()?;
        let rules = sys::resolve::IN_ROOT | sys::resolve::NO_MAGICLINKS;
        let found = sys::openat2(root.as_fd(), below, libc::O_PATH, 0, rules).ok()?;
        Some(Path::new("/").join(real(&found)?.strip_prefix(real(&root)?).ok()?))
    };
    inside().unwrap_or_else(|| Path::new("/").join(below)).to_string_lossy().into_owned()
}

/// What of the host a container sees: its place, and where it is on the host.
fn mounts_of_the_host(bundle: &Bundle, layout: &Layout, cgroups: &[PathBuf]) -> Result<Vec<(String, PathBuf)>> {
    let linux = bundle.linux()?;
    let rootfs = bundle.rootfs()?;
    let mut out = Vec::new();
    for mount in bundle.spec().mounts().iter().flatten() {
        let destination = mount.destination();
        if is_bind(mount) {
            let source = bundle.path().join(mount.source().as_deref().unwrap_or(Path::new("")));
            out.push((place(&rootfs, destination), source));
        } else if mount.typ().as_deref() == Some("cgroup")
            && !bundle.has_namespace(LinuxNamespaceType::Cgroup)
            && let Layout::V1 { hierarchies } = layout
        {
            for (hierarchy, path) in hierarchies.iter().zip(cgroups) {
                out.push((place(&rootfs, &destination.join(hierarchy.name())), path.clone()));
            }
        }
    }
    // In a user namespace they are the host's nodes.
    if bundle.has_namespace(LinuxNamespaceType::User) {
        let listed = linux.devices().iter().flatten().map(|device| device.path().to_string_lossy().into_owned());
        let default = super::devices::default_paths().map(str::to_owned);
        for path in default.chain(listed) {
            if !out.iter().any(|(known, _)| *known == path) {
                out.push((path.clone(), path.into()));
            }
        }
    }
    Ok(out)
}

fn map(key: impl Into<String>, value: impl Into<String>) -> MountMap {
    MountMap { key: key.into(), value: value.into() }
}
