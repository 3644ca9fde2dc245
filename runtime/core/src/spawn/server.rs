//! The spawner: a process with one thread that clones on request.
//!
//! It lives in a mount namespace of its own with an almost empty table, because cloning a mount
//! namespace costs a millisecond for each thousand mounts in it and a busy node has thousands. One
//! untouched procfs and sysfs stay there: without them the kernel refuses to mount either in a user
//! namespace.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Mutex;

use serde::{Deserialize, Serialize};

use super::handshake::Handshake;
use super::{Made, Request, Spawned, clone_for, close_others};
use crate::error::{Context, Error, Result};
use crate::init;
use crate::sys::mount::{self, NewFilesystem, attr};
use crate::sys::process;
use crate::sys::{self, pidfd, socket};

/// Longest message of this protocol; plans and descriptors travel beside it.
const LIMIT: usize = 4096;

/// The first message of a request. With it go the plan as a sealed file, the child's end of the
/// handshake, and the two descriptors below if they are there; then messages with the plan's own.
#[derive(Debug, Serialize, Deserialize)]
struct Header {
    namespaces: u64,
    cgroup: bool,
    pid_namespace: bool,
    mount_namespace: bool,
    first: Vec<i32>,
    host_mounts: bool,
    cpus: Option<Vec<u64>>,
    descriptors: u32,
}

/// The answer; a pidfd goes with `Ok`, and a second one of a helper that is to be reaped.
#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    Ok { pid: i32 },
    Failed { message: String, errno: i32 },
}

/// The shim's end.
#[derive(Debug)]
pub struct Client {
    socket: Mutex<OwnedFd>,
}

impl Client {
    /// Talks to the spawner behind `socket`.
    pub fn new(socket: OwnedFd) -> Self {
        Self { socket: Mutex::new(socket) }
    }

    /// See [`super::Spawner::spawn`].
    pub(super) fn spawn(&self, request: Request) -> Result<Spawned> {
        let (ours, theirs) = Handshake::pair()?;
        let plan =
            postcard::to_stdvec(&request.plan).map_err(|e| Error::system("write the plan", io::Error::other(e)))?;
        let plan = sys::sealed_memfd(c"runx-plan", &plan).context("write the plan")?;
        let header = Header {
            namespaces: request.namespaces,
            cgroup: request.cgroup.is_some(),
            pid_namespace: request.pid_namespace.is_some(),
            mount_namespace: request.mount_namespace,
            first: request.first.iter().map(|(_, kind)| *kind).collect(),
            host_mounts: request.host_mounts,
            cpus: request.cpus.clone(),
            descriptors: request.fds.len() as u32,
        };
        let header =
            postcard::to_stdvec(&header).map_err(|e| Error::system("write the request", io::Error::other(e)))?;
        let mut first = vec![plan.as_fd(), theirs.as_fd()];
        first.extend(request.cgroup.as_ref().map(AsFd::as_fd));
        first.extend(request.pid_namespace.as_ref().map(AsFd::as_fd));
        first.extend(request.first.iter().map(|(fd, _)| fd.as_fd()));
        // A poisoned lock only says that another request panicked; the protocol's state is the socket's.
        let socket = self.socket.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let gone = |e: io::Error| match e.raw_os_error() {
            Some(libc::EPIPE | libc::ECONNRESET) => Error::SpawnerGone,
            _ => Error::system("ask the spawner for a process", e),
        };
        match socket::send(socket.as_fd(), &header, &first) {
            // A spawner that could not begin has left word why.
            Err(e) if e.raw_os_error() == Some(libc::EPIPE) => {}
            other => {
                other.map_err(gone)?;
                if let Err(e) = socket::send_fds(socket.as_fd(), b"f", &request.fds) {
                    // It would take the next request for the rest of this one: it has to go.
                    socket::shut_down(socket.as_fd());
                    return Err(gone(e));
                }
            }
        }
        let answer = socket::receive(socket.as_fd(), LIMIT).map_err(gone)?;
        let Some((data, mut fds)) = answer else { return Err(Error::SpawnerGone) };
        match postcard::from_bytes(&data) {
            Ok(Answer::Ok { pid }) if !fds.is_empty() => {
                let pidfd = fds.remove(0);
                for helper in fds {
                    pidfd::wait(helper.as_fd()).context("reap the process that joined namespaces")?;
                }
                Ok(Spawned { pid, pidfd, handshake: ours })
            }
            Ok(Answer::Failed { message, errno }) => Err(Error::Init { message, errno }),
            _ => Err(Error::Died("the spawner answered something else".into())),
        }
    }
}

/// Makes this process a spawner and serves `control` until the other end closes it.
///
/// # Errors
/// When the mount namespace cannot be made; requests that fail are answered, not returned.
pub fn serve(control: OwnedFd) -> Result<()> {
    process::set_undumpable().context("hide the spawner's memory")?;
    process::set_name(c"runx-spawner");
    let host_mounts = sys::open("/proc/self/ns/mnt", libc::O_RDONLY).context("open /proc/self/ns/mnt")?;
    if let Err(e) = trim_mount_namespace() {
        let answer = Answer::Failed { message: format!("start the spawner: {e}"), errno: e.errno().unwrap_or(0) };
        if let Ok(answer) = postcard::to_stdvec(&answer) {
            let _ = socket::send(control.as_fd(), &answer, &[]);
        }
        return Err(e);
    }
    let own_pids = sys::open("/proc/self/ns/pid", libc::O_RDONLY).context("open /proc/self/ns/pid")?;
    let own_mounts = sys::open("/proc/self/ns/mnt", libc::O_RDONLY).context("open /proc/self/ns/mnt")?;
    while let Some((data, fds)) = socket::receive(control.as_fd(), LIMIT).context("hear a request")? {
        let (request, plan, theirs) = receive_request(&control, &data, fds)?;
        let prepared = if request.host_mounts {
            process::setns(host_mounts.as_fd(), libc::CLONE_NEWNS).context("enter the host's mount namespace")
        } else {
            Ok(())
        };
        // SAFETY: the spawner never starts a thread.
        let cloned = prepared.and_then(|()| unsafe {
            clone_for(&request, libc::CLONE_PARENT as u64, &[plan.as_fd(), theirs.as_fd()], 0)
        });
        let (answer, pidfds) = match cloned {
            Ok(Made::Child) => {
                // SAFETY: this process never returns to what owned the others.
                unsafe { close_others(&request, &[plan.as_fd(), theirs.as_fd()], 0) };
                std::mem::forget((control, own_pids, own_mounts, host_mounts));
                init::run_encoded(&plan, request.fds, theirs)
            }
            Ok(Made::Process { pid, pidfd, helper }) => {
                (Answer::Ok { pid }, [pidfd].into_iter().chain(helper).collect::<Vec<OwnedFd>>())
            }
            Err(e) => (Answer::Failed { message: e.to_string(), errno: e.errno().unwrap_or(0) }, Vec::new()),
        };
        let joined = !request.mount_namespace && request.first.is_empty();
        if request.pid_namespace.is_some() && joined {
            process::setns(own_pids.as_fd(), libc::CLONE_NEWPID).context("return to the spawner's PID namespace")?;
        }
        if request.host_mounts {
            process::setns(own_mounts.as_fd(), libc::CLONE_NEWNS).context("return to the spawner's mounts")?;
        }
        let answer = postcard::to_stdvec(&answer).map_err(|e| Error::system("write an answer", io::Error::other(e)))?;
        let pidfds: Vec<_> = pidfds.iter().map(AsFd::as_fd).collect();
        socket::send(control.as_fd(), &answer, &pidfds).context("answer a request")?;
    }
    Ok(())
}

fn receive_request(control: &OwnedFd, data: &[u8], fds: Vec<OwnedFd>) -> Result<(Request, OwnedFd, Handshake)> {
    let broken = || Error::Died("the request to the spawner is malformed".into());
    let header: Header = postcard::from_bytes(data).map_err(|_| broken())?;
    let mut fds = fds.into_iter();
    let plan = fds.next().ok_or_else(broken)?;
    let theirs = Handshake::from_fd(fds.next().ok_or_else(broken)?);
    let cgroup = if header.cgroup { Some(fds.next().ok_or_else(broken)?) } else { None };
    let pid_namespace = if header.pid_namespace { Some(fds.next().ok_or_else(broken)?) } else { None };
    let mut first = Vec::with_capacity(header.first.len());
    for kind in header.first {
        first.push((fds.next().ok_or_else(broken)?, kind));
    }
    let mut table = Vec::with_capacity(header.descriptors as usize);
    while table.len() < header.descriptors as usize {
        let (_, more) = socket::receive(control.as_fd(), LIMIT).context("hear a request")?.ok_or_else(broken)?;
        table.extend(more);
    }
    let request = Request {
        plan: crate::plan::Plan::default(),
        fds: table,
        namespaces: header.namespaces,
        cgroup,
        pid_namespace,
        mount_namespace: header.mount_namespace,
        first,
        host_mounts: header.host_mounts,
        cpus: header.cpus,
    };
    Ok((request, plan, theirs))
}

/// Leaves a mount namespace with a root of nothing but /proc and /sys.
fn trim_mount_namespace() -> Result<()> {
    process::unshare(libc::CLONE_NEWNS).context("unshare the mount namespace")?;
    // Before anything is detached: what is shared would be detached on the node too.
    mount::set_propagation_of_all(libc::MS_PRIVATE).context("make all mounts private")?;
    let tmpfs = NewFilesystem::open("tmpfs").context("open a tmpfs")?;
    tmpfs.string("size", "64k").context("limit the spawner's root")?;
    tmpfs.string("mode", "755").context("set the mode of the spawner's root")?;
    let root = tmpfs.mount(attr::NOSUID | attr::NODEV | attr::NOEXEC).context("mount a tmpfs")?;
    for name in ["proc", "sys"] {
        sys::mkdirat(root.as_fd(), name, 0o555).with_context(|| format!("mkdir {name} in the spawner's root"))?;
    }
    let at = sys::open("/", libc::O_PATH | libc::O_DIRECTORY).context("open /")?;
    mount::attach(root.as_fd(), at.as_fd()).context("attach the spawner's root")?;
    for (kind, name) in [("proc", "proc"), ("sysfs", "sys")] {
        let target = sys::openat2(root.as_fd(), name, libc::O_PATH, 0, sys::resolve::BENEATH).on("open", name)?;
        let filesystem = NewFilesystem::open(kind)
            .and_then(|fs| fs.mount(attr::NOSUID | attr::NODEV | attr::NOEXEC))
            .with_context(|| format!("mount {kind} for the spawner"))?;
        mount::attach(filesystem.as_fd(), target.as_fd()).with_context(|| format!("attach {kind} for the spawner"))?;
    }
    match mount::pivot_into(&root) {
        // An initramfs cannot be pivoted away from.
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
            mount::move_into(&root, false).context("enter the spawner's root")
        }
        other => other.context("pivot into the spawner's root"),
    }
}
