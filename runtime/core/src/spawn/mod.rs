//! Making a process for a container.
//!
//! Only a single-threaded process may fork. The command is one and clones by itself ([`Spawner::Direct`]).
//! The shim is not; it asks a [`server`], a small single-threaded process that it started before it
//! had threads, which clones with `CLONE_PARENT`, so that the new process is the shim's own child.

pub mod handshake;
pub mod server;

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use crate::error::{Context, Error, Result};
use crate::init;
use crate::plan::Plan;
use crate::sys::process::{self, Cloned};
use crate::sys::{self, pidfd};
use handshake::Handshake;

/// A process to be made.
#[derive(Debug, Default)]
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
    /// To be born in the mount namespace of that pidfd, too, made by a process that joins both and then ends. Others in a PID
    /// namespace could otherwise reach the host's files through /proc/PID/root and /proc/PID/fd, until the new process has
    /// left them behind.
    pub mount_namespace: bool,
    /// Namespaces that are joined, in this order, by a process that then makes the wanted one and ends: with their
    /// `CLONE_NEW*` flags. For user namespaces, which nobody leaves again.
    pub first: Vec<(OwnedFd, i32)>,
    /// To be born with a copy of the host's mounts, whatever the caller's mount namespace is.
    pub host_mounts: bool,
    /// The CPUs to be born on, a bit each.
    pub cpus: Option<Vec<u64>>,
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
    let preserved = request.plan.process.preserve_fds;
    // SAFETY: refuse_threads made sure that there is no other thread.
    let cloned = unsafe { clone_for(&request, 0, &[theirs.as_fd()], preserved) }?;
    match cloned {
        Made::Child => {
            // The caller's other descriptors would be held for as long as the process waits for its
            // start: the lock on its own state among them.
            // SAFETY: this process never returns to what owned the others.
            unsafe { close_others(&request, &[theirs.as_fd()], preserved) };
            std::mem::forget(ours);
            init::run(request.plan, request.fds, theirs)
        }
        Made::Process { pid, pidfd, helper } => {
            if let Some(helper) = helper {
                pidfd::wait(helper.as_fd()).context("wait for the process that joined namespaces")?;
            }
            Ok(Spawned { pid, pidfd, handshake: ours })
        }
    }
}

/// Closes, in a new process, what the request does not need and the caller does not name.
///
/// # Safety
/// As for [`sys::close_all_but`]; it is the log's end.
unsafe fn close_others(request: &Request, keep: &[BorrowedFd<'_>], preserved: u32) {
    // Its descriptor's number will be another's.
    log::set_max_level(log::LevelFilter::Off);
    let helpers = request.first.iter().map(|(fd, _)| fd).chain(&request.pid_namespace);
    let needed = request.fds.iter().chain(helpers).map(AsRawFd::as_raw_fd);
    let first = 3i32.saturating_add_unsigned(preserved);
    // SAFETY: the caller's promise.
    unsafe { sys::close_all_but(first, needed.chain(keep.iter().map(AsRawFd::as_raw_fd)).collect()) };
}

/// A second thread here would be a mistake of ours that shows as a rare hang; better an error always.
///
/// # Errors
/// [`Error::Unsupported`] if there is one.
pub fn refuse_threads() -> Result<()> {
    let links = std::fs::symlink_metadata("/proc/self/task").context("count the threads of this process")?;
    if std::os::unix::fs::MetadataExt::nlink(&links) > 3 {
        return Err(Error::unsupported("cloning from this process", "it has more than one thread: use a spawner"));
    }
    Ok(())
}

/// What [`clone_for`] returns.
enum Made {
    /// In the new process.
    Child,
    /// In the caller.
    Process {
        pid: i32,
        pidfd: OwnedFd,
        /// A process that helped and has ended. It is a child of whoever is the new process's parent.
        helper: Option<OwnedFd>,
    },
}

impl From<Cloned> for Made {
    fn from(cloned: Cloned) -> Self {
        match cloned {
            Cloned::Child => Self::Child,
            Cloned::Parent { pid, pidfd } => Self::Process { pid, pidfd, helper: None },
        }
    }
}

/// Clones into the request's namespaces and cgroup. `keep` is what the new process needs besides the request's descriptors.
///
/// # Safety
/// As for [`process::clone`].
unsafe fn clone_for(request: &Request, extra: u64, keep: &[BorrowedFd<'_>], preserved: u32) -> Result<Made> {
    let Some(cpus) = &request.cpus else {
        // SAFETY: the caller vouches for there being one thread.
        return unsafe { clone_here_or_through(request, extra, keep, preserved) };
    };
    let own = process::affinity().context("read the CPU affinity")?;
    process::set_affinity(cpus).context("set process.execCPUAffinity.initial")?;
    // SAFETY: the caller vouches for there being one thread.
    let made = unsafe { clone_here_or_through(request, extra, keep, preserved) };
    if !matches!(made, Ok(Made::Child)) {
        process::set_affinity(&own).context("return to the own CPU affinity")?;
    }
    made
}

/// # Safety
/// As for [`process::clone`].
unsafe fn clone_here_or_through(
    request: &Request,
    extra: u64,
    keep: &[BorrowedFd<'_>],
    preserved: u32,
) -> Result<Made> {
    if request.mount_namespace || !request.first.is_empty() {
        // SAFETY: the caller vouches for there being one thread.
        return unsafe { clone_through(request, extra, keep, preserved) };
    }
    if let Some(namespace) = &request.pid_namespace {
        process::setns(namespace.as_fd(), libc::CLONE_NEWPID).context("join the PID namespace")?;
    }
    let cgroup = request.cgroup.as_ref().map(AsFd::as_fd);
    // SAFETY: the caller vouches for there being one thread.
    let cloned = unsafe { process::clone(request.namespaces | extra, cgroup) };
    cloned.context("clone a process into its namespaces").map(Made::from)
}

/// Clones by a helper that joins namespaces first, and that has closed by then whatever the new process could be robbed of
/// before it can close it itself: others in its PID namespace see it from its first moment. The helper hands back the new
/// process's descriptor, or its failure.
///
/// # Safety
/// As for [`process::clone`].
unsafe fn clone_through(request: &Request, extra: u64, keep: &[BorrowedFd<'_>], preserved: u32) -> Result<Made> {
    let (ours, theirs) = Handshake::pair()?;
    let cgroup = request.cgroup.as_ref().map(AsFd::as_fd);
    // SAFETY: the caller vouches for there being one thread.
    match unsafe { process::clone(extra, cgroup) }.context("clone a process to join namespaces")? {
        Cloned::Child => {
            let keep: Vec<_> = keep.iter().copied().chain([theirs.as_fd()]).collect();
            // SAFETY: this process never returns to what owned the others, and neither does what it clones.
            unsafe { close_others(request, &keep, preserved) };
            std::mem::forget(ours);
            // SAFETY: a process that was just cloned has one thread.
            match unsafe { join_and_clone(request) } {
                Ok(Cloned::Child) => {
                    drop(theirs);
                    return Ok(Made::Child);
                }
                Ok(Cloned::Parent { pidfd, .. }) => drop(theirs.send(&Helped::Made, &[pidfd.as_fd()])),
                Err(e) => drop(theirs.send(&Helped::Failed(e.into()), &[])),
            }
            // SAFETY: ends this process without running destructors that belong to the caller's copy.
            unsafe { libc::_exit(0) }
        }
        Cloned::Parent { pidfd: helper, .. } => {
            drop(theirs);
            let answer = ours.receive::<Helped>().context("hear from the process that joins namespaces")?;
            match answer {
                Some((Helped::Made, fds)) if fds.len() == 1 => {
                    let pidfd = fds.into_iter().next().ok_or(Error::SpawnerGone)?;
                    let pid = pidfd::pid(pidfd.as_fd()).context("find the new process's pid")?;
                    pidfd::wait_ended(helper.as_fd(), -1).context("wait for the process that joined namespaces")?;
                    Ok(Made::Process { pid, pidfd, helper: Some(helper) })
                }
                Some((Helped::Failed(failure), _)) => {
                    pidfd::wait_ended(helper.as_fd(), -1).context("wait for the process that joined namespaces")?;
                    if extra & libc::CLONE_PARENT as u64 == 0 {
                        pidfd::wait(helper.as_fd()).context("reap the process that joined namespaces")?;
                    }
                    Err(failure.into())
                }
                _ => Err(Error::Died("the process that joins namespaces said nothing".into())),
            }
        }
    }
}

/// What the helper of [`clone_through`] says.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
enum Helped {
    /// The new process's pidfd goes with this message.
    Made,
    /// It could not join, or not clone.
    Failed(handshake::Failure),
}

/// # Safety
/// As for [`process::clone`].
unsafe fn join_and_clone(request: &Request) -> Result<Cloned> {
    for (fd, kind) in &request.first {
        let name = init::namespace_name(*kind);
        process::setns(fd.as_fd(), *kind).with_context(|| format!("join the {name} namespace"))?;
    }
    if let Some(namespace) = &request.pid_namespace {
        let mounts = if request.mount_namespace { libc::CLONE_NEWNS } else { 0 };
        process::setns(namespace.as_fd(), libc::CLONE_NEWPID | mounts).context("join the container's namespaces")?;
    }
    // SAFETY: the caller vouches for there being one thread.
    unsafe { process::clone(request.namespaces | libc::CLONE_PARENT as u64, None) }
        .context("clone a process into its namespaces")
}
