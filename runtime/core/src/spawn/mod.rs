//! Making a process for a container.
//!
//! Only a single-threaded process may fork. The command is one and clones by itself ([`Spawner::Direct`]).
//! The shim is not; it asks a [`server`], a small single-threaded process that it started before it
//! had threads, which clones with `CLONE_PARENT`, so that the new process is the shim's own child.

pub mod handshake;
pub mod server;

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use crate::error::{Context, Error, Result};
use crate::init;
use crate::plan::Plan;
use crate::sys;
use crate::sys::process::{self, Cloned};
use handshake::Handshake;

/// A process to be made.
#[derive(Debug)]
pub struct Request {
    /// What it does.
    pub plan: Plan,
    /// The descriptors that the plan speaks of.
    pub fds: Vec<OwnedFd>,
    /// `CLONE_NEW*` flags.
    pub namespaces: u64,
    /// A cgroup v2 directory to be born in.
    pub cgroup: Option<OwnedFd>,
    /// A PID namespace to be born in: a namespace file, or a pidfd of a process in it.
    pub pid_namespace: Option<OwnedFd>,
    /// To be born in the mount namespace of that pidfd, too. Others in a PID namespace could otherwise reach
    /// the host's files through /proc/PID/root, until the new process has left them behind.
    pub mount_namespace: bool,
}

/// A process that is being set up.
#[derive(Debug)]
pub struct Spawned {
    /// Its pid in this PID namespace.
    pub pid: i32,
    /// A descriptor of it.
    pub pidfd: OwnedFd,
    /// To talk with it.
    pub handshake: Handshake,
}

/// Who clones.
#[derive(Clone, Debug)]
pub enum Spawner {
    /// This process, which must have one thread only.
    Direct,
    /// The spawner behind this connection.
    Server(Arc<server::Client>),
}

impl Spawner {
    /// Makes the process.
    ///
    /// # Errors
    /// The kernel's, naming the call; for a server also its death.
    pub fn spawn(&self, request: Request) -> Result<Spawned> {
        match self {
            Self::Direct => spawn_here(request),
            Self::Server(client) => client.spawn(request),
        }
    }
}

fn spawn_here(request: Request) -> Result<Spawned> {
    refuse_threads()?;
    process::set_undumpable().context("hide this process's memory")?;
    let (ours, theirs) = Handshake::pair()?;
    let home = if request.mount_namespace { Some(Home::remember()?) } else { None };
    // SAFETY: refuse_threads made sure that there is no other thread.
    let cloned = unsafe { clone_for(&request, 0) }?;
    match cloned {
        Cloned::Child => {
            // The caller's other descriptors would be held for as long as the process waits for its
            // start: the lock on its own state among them.
            let keep = request.fds.iter().map(AsRawFd::as_raw_fd).chain([theirs.as_fd().as_raw_fd()]);
            sys::close_all_but(3 + request.plan.process.preserve_fds as i32, keep.collect());
            std::mem::forget(ours);
            init::run(request.plan, request.fds, theirs)
        }
        Cloned::Parent { pid, pidfd } => {
            if let Some(home) = home {
                home.return_to()?;
            }
            Ok(Spawned { pid, pidfd, handshake: ours })
        }
    }
}

/// The mount namespace and directories that a process comes back to.
struct Home {
    namespace: OwnedFd,
    root: OwnedFd,
    directory: OwnedFd,
}

impl Home {
    fn remember() -> Result<Self> {
        let open = |path: &str, flags| sys::open(path, flags).on("open", path);
        Ok(Self {
            namespace: open("/proc/self/ns/mnt", libc::O_RDONLY)?,
            root: open("/", libc::O_PATH | libc::O_DIRECTORY)?,
            directory: open(".", libc::O_PATH | libc::O_DIRECTORY)?,
        })
    }

    fn return_to(&self) -> Result<()> {
        process::setns(self.namespace.as_fd(), libc::CLONE_NEWNS).context("return to the own mount namespace")?;
        nix::unistd::fchdir(&self.root).context("return to the own root")?;
        nix::unistd::chroot(".").context("return to the own root")?;
        nix::unistd::fchdir(&self.directory).context("return to the own directory")
    }
}

/// A second thread here would be a mistake of ours that shows as a rare hang; better an error always.
fn refuse_threads() -> Result<()> {
    let links = std::fs::symlink_metadata("/proc/self/task").context("count the threads of this process")?;
    if std::os::unix::fs::MetadataExt::nlink(&links) > 3 {
        return Err(Error::unsupported("cloning from this process", "it has more than one thread: use a spawner"));
    }
    Ok(())
}

/// Clones into the request's namespaces and cgroup.
///
/// # Safety
/// As for [`process::clone`].
unsafe fn clone_for(request: &Request, extra: u64) -> Result<Cloned> {
    if let Some(namespace) = &request.pid_namespace {
        let kinds = libc::CLONE_NEWPID | if request.mount_namespace { libc::CLONE_NEWNS } else { 0 };
        process::setns(namespace.as_fd(), kinds).context("join the container's namespaces")?;
    }
    let cgroup = request.cgroup.as_ref().map(AsFd::as_fd);
    // SAFETY: the caller vouches for there being one thread.
    unsafe { process::clone(request.namespaces | extra, cgroup) }.context("clone a process into its namespaces")
}
