//! Restoring a container from a checkpoint.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use oci_spec::runtime::LinuxNamespaceType;

use super::rpc::{CgroupRoot, Criu, InheritFd, JoinNamespace, Kind, Notice, Options};
use super::{DESCRIPTORS, Images, is_bind, map, mounts_of_the_host, namespace_key};
use crate::bundle::{Bundle, empty_path};
use crate::cgroup::{self, Layout};
use crate::container::create::Cleanup;
use crate::container::state::{self, State, Status};
use crate::container::{Container, Process, Runtime, prepare, process};
use crate::error::{Context, Error, Result};
use crate::hooks::{self, Hooks};
use crate::init;
use crate::spawn::refuse_threads;
use crate::sys::{self, mount, pidfd};
use crate::workload::limits::Limits;

/// How a container is to be restored.
#[derive(Clone, Debug, Default)]
pub struct RestoreOptions {
    /// Where the checkpoint is, and what is to be restored.
    pub images: Images,
    /// Let systemd make the cgroup.
    pub systemd_cgroup: bool,
    /// The absolute path of the configuration, if it is not config.json in the bundle.
    pub config: Option<PathBuf>,
    /// Another LSM profile for its processes than they had, `TYPE:NAME`.
    pub lsm_profile: Option<String>,
    /// Another SELinux context for its mounts than they had.
    pub lsm_mount_context: Option<String>,
}

const LOG: &str = "restore.log";

/// The root filesystem's place in CRIU's mount namespace, which has to be a mount of its own.
pub(in crate::container) const ROOT: &str = "criu-root";

impl Runtime {
    /// Makes the container `id` from a checkpoint of one with the same configuration. Its processes go on where they
    /// were, with this process's standard streams in the place of pipes that they had.
    ///
    /// This process must have one thread. It stays in a mount namespace of its own, which sees what is mounted in the
    /// one before.
    ///
    /// # Errors
    /// As for [`Runtime::create`], and [`Error::Criu`] with CRIU's own reason; nothing is left behind.
    pub fn restore(&self, id: &str, bundle: &Bundle, options: &RestoreOptions) -> Result<(Container, Process)> {
        let linux = bundle.linux()?;
        // CRIU knows nothing of these, and they are not made again here.
        for (field, asked) in [
            ("linux.intelRdt", linux.intel_rdt().is_some()),
            ("linux.netDevices", linux.net_devices().as_ref().is_some_and(|list| !list.is_empty())),
        ] {
            if asked {
                return Err(Error::unsupported(field, "a container that is restored does not get it"));
            }
        }
        self.in_new_directory(id, bundle, options.systemd_cgroup, |layout, cgroup, directory| {
            let filter = process::filter(linux.seccomp().as_ref(), &self.root.join(".seccomp"))?;
            let hooks = Hooks::of(bundle.spec())?;
            let state = State::first(id, bundle, options.config.clone(), cgroup, filter.as_ref(), &hooks)?;
            if let Some(filter) = &filter {
                state::write_seccomp(directory, &filter.instructions)?;
            }
            restore(bundle, options, state, &hooks, directory, layout)
        })
    }
}

fn restore(
    bundle: &Bundle,
    options: &RestoreOptions,
    mut state: State,
    hooks: &Hooks,
    directory: &Path,
    layout: &Layout,
) -> Result<(Container, Process)> {
    let id = state.id.clone();
    let cgroup = state.cgroup.clone();
    let settings = cgroup::Settings::of(&id, bundle.spec(), false);
    state.write(directory)?;
    cgroup.make(&settings)?;
    let cleanup = Cleanup::of(&cgroup, None, settings, true);
    cgroup.configure(&settings)?;
    let root = Root::attach(&state.rootfs, directory.join(ROOT))?;
    let (mut request, _open) = options.images.options(LOG)?;
    request.root = Some(root.path.to_string_lossy().into_owned());
    request.evasive_devices = Some(true);
    request.rst_sibling = Some(true);
    request.lsm_profile.clone_from(&options.lsm_profile);
    request.lsm_mount_context.clone_from(&options.lsm_mount_context);
    let hosts = mounts_of_the_host(bundle, layout, &layout.shown(&cgroup))?;
    request.ext_mnt.extend(hosts.into_iter().map(|(place, source)| map(place, source.to_string_lossy())));
    request.ext_mnt.push(map("/dev/null", "/dev/null"));
    make_mount_points(bundle, &root.tree)?;
    inherit_streams(&options.images.images, &mut request)?;
    let (keys, inherited) = namespaces(bundle, &mut request)?;
    let mut criu = Criu::start(options.images.log(LOG), &inherited, true)?;
    for (place, key) in keys.into_iter().enumerate() {
        request.inherit_fd.push(InheritFd { key: key.to_owned(), fd: criu.inherited(place) });
    }
    // What it forks is in its cgroups.
    cgroup.adopt(criu.pid(), &settings)?;
    request.cg_root = cgroup_roots(criu.pid())?;
    let mut terminal = None;
    let restored = criu.request(Kind::Restore, request, |notice, fds| {
        log::debug!("criu: {}", notice.script.as_deref().unwrap_or("a notice"));
        match notice.script.as_deref() {
            Some("orphan-pts-master") => terminal = fds.into_iter().next(),
            Some("setup-namespaces") => run_hooks(notice, &state, hooks)?,
            Some("post-restore") => keep(notice, &mut state, directory)?,
            _ => {}
        }
        Ok(())
    });
    drop(criu);
    drop(root);
    let pid = restored?.ok_or_else(|| Error::Died("criu restored nothing".into()))?;
    let pidfd = pidfd::open(pid).with_context(|| format!("open the restored process {pid}"))?;
    cleanup.disarm();
    let container = Container { directory: directory.to_owned(), state };
    Ok((
        container,
        Process {
            pid,
            pidfd,
            handshake: None,
            terminal,
            limits: Limits::default(),
            modules: None,
            is_module: false,
            listener: None,
        },
    ))
}

/// The root filesystem on a place that is a mount, as CRIU wants it, in a mount namespace of this process's own: the
/// directories that CRIU is given have to be in the same one.
struct Root {
    path: PathBuf,
    tree: OwnedFd,
}

impl Root {
    fn attach(rootfs: &Path, path: PathBuf) -> Result<Self> {
        refuse_threads()?;
        sys::process::unshare(libc::CLONE_NEWNS).context("unshare the mount namespace")?;
        let all = sys::open("/", libc::O_PATH).on("open", "/")?;
        mount::set_attributes(all.as_fd(), 0, 0, libc::MS_SLAVE, true).context("receive mounts only")?;
        let tree = prepare::rootfs_tree(rootfs)?;
        fs::DirBuilder::new().mode(0o700).create(&path).on("create", &path)?;
        let this = Self { tree, path };
        let place = sys::open(&this.path, libc::O_PATH | libc::O_DIRECTORY).on("open", &this.path)?;
        mount::attach(this.tree.as_fd(), place.as_fd()).on("mount the root filesystem on", &this.path)?;
        Ok(this)
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        // It may not have come to the mount.
        let _ = mount::detach(&self.path);
        if let Err(e) = fs::remove_dir(&self.path) {
            log::warn!("after a restore: remove {}: {e}", self.path.display());
        }
    }
}

/// The places of mounts, which CRIU does not make. Those on a filesystem in memory it restores.
fn make_mount_points(bundle: &Bundle, root: &OwnedFd) -> Result<()> {
    let mounts = bundle.spec().mounts().as_deref().unwrap_or_default();
    for mount in mounts {
        let destination = mount.destination();
        let below_another = mounts
            .iter()
            .any(|other| destination != other.destination() && destination.starts_with(other.destination()));
        if below_another {
            continue;
        }
        let source = bundle.path().join(mount.source().as_deref().unwrap_or(Path::new("")));
        let directory = !is_bind(mount) || source.is_dir();
        init::make_mount_point(root.as_fd(), destination, directory).on("make the mount point", destination)?;
    }
    Ok(())
}

/// Names the namespaces that are not made anew. Returns those that CRIU inherits, with their keys.
fn namespaces(bundle: &Bundle, request: &mut Options) -> Result<(Vec<&'static str>, Vec<OwnedFd>)> {
    let (mut keys, mut inherited) = (Vec::new(), Vec::new());
    for namespace in bundle.linux()?.namespaces().iter().flatten() {
        let Some(path) = namespace.path().as_deref().filter(|path| !empty_path(Some(path))) else { continue };
        let kind = namespace.typ();
        if let Some(key) = namespace_key(kind) {
            keys.push(key);
            inherited.push(sys::open(path, libc::O_RDONLY).on("open the namespace to join", path)?);
            continue;
        }
        if kind == LinuxNamespaceType::Cgroup || kind == LinuxNamespaceType::Time {
            return Err(Error::unsupported(
                format!("restoring a container in the {kind} namespace {}", path.display()),
                "criu cannot join one",
            ));
        }
        let name = if kind == LinuxNamespaceType::Mount { "mnt".to_owned() } else { kind.to_string() };
        request.join_ns.push(JoinNamespace { namespace: name, file: path.to_string_lossy().into_owned() });
    }
    Ok((keys, inherited))
}

/// Puts this process's standard streams in the place of pipes.
fn inherit_streams(images: &Path, request: &mut Options) -> Result<()> {
    let path = images.join(DESCRIPTORS);
    let text = fs::read(&path).on("read", &path)?;
    let names: Vec<String> = serde_json::from_slice(&text)
        .map_err(|e| Error::InvalidSpec { document: path.display().to_string(), reason: e.to_string() })?;
    for (number, name) in names.into_iter().enumerate().take(3) {
        if name.starts_with("pipe:") {
            request.inherit_fd.push(InheritFd { key: name, fd: number as i32 });
        }
    }
    Ok(())
}

/// The cgroups of a process, as CRIU is told of them.
fn cgroup_roots(pid: i32) -> Result<Vec<CgroupRoot>> {
    let file = format!("/proc/{pid}/cgroup");
    let text = fs::read_to_string(&file).on("read", &file)?;
    let roots = text.lines().filter_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let controllers = fields.next()?.to_owned();
        Some(CgroupRoot { controllers: Some(controllers), path: fields.next()?.to_owned() })
    });
    Ok(roots.collect())
}

fn run_hooks(notice: &Notice, state: &State, hooks: &Hooks) -> Result<()> {
    let told = hooks::HookState { pid: notice.pid.unwrap_or(0), ..state.told(Status::Creating) };
    hooks::run_all("prestart", &hooks.prestart, &told, &state.bundle)?;
    hooks::run_all("createRuntime", &hooks.create_runtime, &told, &state.bundle)
}

/// Notes the restored process, before it goes on.
fn keep(notice: &Notice, state: &mut State, directory: &Path) -> Result<()> {
    let pid = notice.pid.ok_or_else(|| Error::Died("criu's notice names no process".into()))?;
    state.pid = pid;
    state.start_time =
        sys::process::start_time(pid).ok_or_else(|| Error::Died("it ended while it was being restored".into()))?;
    // CRIU restores into a time namespace, too.
    let time = |of: &str| fs::metadata(format!("/proc/{of}/ns/time")).map(|file| file.ino()).ok();
    if time("self") != time(&pid.to_string()) {
        state.namespaces |= sys::process::CLONE_NEWTIME;
    }
    state.write(directory)
}

impl State {
    /// The state of a container that is about to be restored.
    fn first(
        id: &str,
        bundle: &Bundle,
        config: Option<PathBuf>,
        cgroup: cgroup::Cgroup,
        filter: Option<&crate::seccomp::Program>,
        hooks: &Hooks,
    ) -> Result<Self> {
        let namespaces = prepare::namespaces(bundle, false, &mut prepare::Table::default())?;
        let keyring = None;
        Self::new(id, bundle, config, cgroup, filter, hooks, &namespaces, keyring)
    }
}
