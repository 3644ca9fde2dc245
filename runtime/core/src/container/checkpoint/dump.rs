//! Making a checkpoint.

use std::fs;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use oci_spec::runtime::LinuxNamespaceType;

use super::rpc::{Criu, Kind};
use super::{DESCRIPTORS, Images, map, mounts_of_the_host, namespace_key};
use crate::bundle::{Bundle, empty_path, parse_file};
use crate::cgroup::{Cgroup, Layout};
use crate::container::{Container, Status};
use crate::error::{Context, Error, Result};

/// How a checkpoint is to be made.
#[derive(Clone, Debug, Default)]
pub struct CheckpointOptions {
    /// Where it goes, and what it holds.
    pub images: Images,
    /// The directory, from that of the images, of an earlier checkpoint that this one adds to.
    pub parent: Option<PathBuf>,
    /// Let the container go on.
    pub leave_running: bool,
    /// Keep the memory only and let the container go on, for a later checkpoint to add to.
    pub pre_dump: bool,
    /// Do without connections that are being made.
    pub tcp_skip_in_flight: bool,
    /// Keep files that are open and have been removed by linking them again.
    pub link_remap: bool,
}

const LOG: &str = "dump.log";

impl Container {
    /// Makes a checkpoint. Unless it is to be left running, the container has stopped then.
    ///
    /// # Errors
    /// [`Error::WrongState`] unless it runs; [`Error::Criu`] with CRIU's own reason, and it runs on.
    pub fn checkpoint(&self, options: &CheckpointOptions) -> Result<()> {
        let (_lock, current, status) = self.lock()?;
        if !matches!(status, Status::Running | Status::Paused) {
            return Err(self.wrong_state("checkpoint", status));
        }
        let state = &current.state;
        let bundle = Bundle::new(state.bundle.clone(), parse_file(&state.config_path())?)?;
        let layout = Layout::of_this_machine()?;
        let images = &options.images;
        let (mut request, _open) = images.options(LOG)?;
        request.pid = Some(state.pid);
        request.root = Some(state.rootfs.to_string_lossy().into_owned());
        request.leave_running = Some(options.leave_running);
        request.tcp_skip_in_flight = Some(options.tcp_skip_in_flight);
        request.link_remap = Some(options.link_remap);
        request.freeze_cgroup = freezer(&state.cgroup);
        if let Some(parent) = &options.parent {
            request.parent_img = Some(parent.to_string_lossy().into_owned());
            request.track_mem = Some(true);
        }
        for namespace in bundle.linux()?.namespaces().iter().flatten() {
            let path = namespace.path().as_deref();
            if empty_path(path) {
                continue;
            }
            if let (Some(key), Some(path)) = (namespace_key(namespace.typ()), path) {
                let inode = fs::metadata(path).on("look at namespace", path)?.ino();
                let kind = if namespace.typ() == LinuxNamespaceType::Pid { "pid" } else { "net" };
                request.external.push(format!("{kind}[{inode}]:{key}"));
            }
        }
        let kind = if options.pre_dump { Kind::PreDump } else { Kind::Dump };
        if !options.pre_dump {
            let hosts = mounts_of_the_host(&bundle, layout, &layout.shown(&state.cgroup))?;
            request.ext_mnt.extend(hosts.into_iter().map(|(place, _)| map(place.clone(), place)));
            let masked = bundle.linux()?.masked_paths().iter().flatten();
            let behind_null = behind_null(state.pid)?;
            request
                .ext_mnt
                .extend(masked.filter(|path| behind_null.contains(path)).map(|path| map(path.clone(), "/dev/null")));
            write_descriptors(state.pid, &images.images)?;
        }
        let mut criu = Criu::start(images.log(LOG), &[], false)?;
        criu.request(kind, request, |notice, _| {
            log::debug!("criu: {}", notice.script.as_deref().unwrap_or("a notice"));
            Ok(())
        })?;
        Ok(())
    }
}

/// The group by which CRIU stops the processes, where there is one; else it stops each.
fn freezer(cgroup: &Cgroup) -> Option<String> {
    let path = match cgroup {
        Cgroup::V1 { directories, .. } => {
            &directories.iter().find(|directory| directory.controllers.iter().any(|c| c == "freezer"))?.path
        }
        Cgroup::V2 { path, .. } => path,
        Cgroup::None => return None,
    };
    Some(path.to_string_lossy().into_owned())
}

/// Paths of the container on which the host's /dev/null lies, proc_pid_mountinfo(5).
fn behind_null(pid: i32) -> Result<Vec<String>> {
    let file = format!("/proc/{pid}/mountinfo");
    let text = fs::read_to_string(&file).on("read", &file)?;
    let lines = text.lines().filter_map(|line| {
        let mut fields = line.split(' ').skip(3);
        (fields.next()? == "/null").then(|| fields.next().map(str::to_owned))?
    });
    Ok(lines.collect())
}

/// Notes what the standard streams are, so that others can take the place of pipes.
fn write_descriptors(pid: i32, images: &Path) -> Result<()> {
    let name = |number: i32| {
        let file = format!("/proc/{pid}/fd/{number}");
        fs::read_link(&file).map_or_else(|_| "/dev/null".to_owned(), |target| target.to_string_lossy().into_owned())
    };
    let text = serde_json::to_vec(&[0, 1, 2].map(name)).map_err(|e| Error::system("write descriptors", e))?;
    let path = images.join(DESCRIPTORS);
    fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&path)
        .and_then(|mut file| std::io::Write::write_all(&mut file, &text))
        .on("write", path)
}
