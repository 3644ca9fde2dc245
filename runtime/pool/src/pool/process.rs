//! The spawner, as the pool's process knows it.

use std::ffi::OsString;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use runx_core::error::Context;
use runx_core::sys::{self, mount, pidfd, socket};

use super::lock;
use super::sandbox::Looks;
use crate::error::{Error, Result};
use crate::filter;
use crate::group::{LeaseGroup, PoolGroup};
use crate::spawner::{self, restrict};
use crate::template::{Network, Root, Template, Tier};
use crate::wire::channel::{Channel, LIMIT};
use crate::wire::setup::{BindPlan, FromSpawner, Setup, TmpfsPlan, ToSpawner};

/// Devices that know nothing and keep nothing.
const DEVICES: [&str; 5] = ["null", "zero", "full", "random", "urandom"];

/// How long a spawner may take for each step of its beginning.
const PATIENCE: Duration = Duration::from_secs(30);

/// What every spawner of a pool is started with.
#[derive(Debug)]
pub(super) struct Plan {
    setup: Setup,
    program: Option<PathBuf>,
    users: Ids,
}

/// The ids that sandboxes get.
#[derive(Clone, Copy, Debug)]
enum Ids {
    /// From a range of the host, seen from inside as 0 and what follows.
    Mapped { first: u32, count: u32 },
    /// The only one that an ordinary user has.
    Single,
    /// From a range of the host, without a user namespace.
    Host { first: u32, count: u32 },
}

impl Ids {
    /// The id of the sandbox of this number, while there are any.
    fn get(self, number: u32) -> Option<u32> {
        match self {
            // 0 is the init's.
            Self::Mapped { count, .. } => number.checked_add(1).filter(|id| *id < count),
            Self::Single => Some(1),
            Self::Host { first, count } => (number < count).then(|| first + number),
        }
    }
}

impl Plan {
    pub(super) fn new(template: &Template, program: Option<PathBuf>) -> Result<Self> {
        template.check()?;
        // SAFETY: it takes nothing and cannot fail.
        let root = unsafe { libc::geteuid() } == 0;
        let users = match (root, template.users.namespace) {
            (true, true) => Ids::Mapped { first: template.users.first, count: template.users.count },
            (true, false) => Ids::Host { first: template.users.first, count: template.users.count },
            (false, true) => Ids::Single,
            (false, false) => {
                let reason = "without a user namespace it needs root".into();
                return Err(Error::Template { field: "users", reason });
            }
        };
        let bytes = |path: &Path| path.as_os_str().as_bytes().to_vec();
        let mut binds = Vec::new();
        let mut add = |source: &Path, target: &Path, writable, device| {
            let found = fs::metadata(source).on("look at", source)?;
            let (source, target, directory) = (bytes(source), bytes(target), found.is_dir());
            binds.push(BindPlan { source, target, directory, writable, device });
            Ok::<(), Error>(())
        };
        if let Root::Directory(root) = &template.root {
            add(root, Path::new("/"), false, false)?;
        }
        // Those above come before those below.
        let mut ordered: Vec<_> = template.binds.iter().collect();
        ordered.sort_by_key(|bind| bind.target.components().count());
        for bind in ordered {
            add(&bind.source, &bind.target, bind.writable, false)?;
        }
        for name in DEVICES.iter().filter(|_| template.devices) {
            let path = Path::new("/dev").join(name);
            add(&path, &path, true, true)?;
        }
        if binds.len() > socket::MAX_FDS {
            return Err(Error::Template { field: "binds", reason: format!("more than {}", socket::MAX_FDS) });
        }
        let mut tmpfs: Vec<_> = template.tmpfs.iter().collect();
        tmpfs.sort_by_key(|tmpfs| tmpfs.target.components().count());
        let setup = Setup {
            rootfs: template.root != Root::Binds,
            binds,
            links: template.links.iter().map(|(path, target)| (bytes(path), bytes(target))).collect(),
            tmpfs: tmpfs
                .iter()
                .map(|of| TmpfsPlan { target: bytes(&of.target), size: of.size, inodes: of.inodes, mode: of.mode })
                .collect(),
            masked: template.masked.iter().map(|path| bytes(path)).collect(),
            proc: template.proc,
            devices: template.devices,
            hostname: template.hostname.clone().into_bytes(),
            own_network: template.network == Network::None,
            user_namespace: !matches!(users, Ids::Host { .. }),
            single_id: matches!(users, Ids::Single),
            filter: filter::compile(template.filter)?,
            unwiped: template.tier != Tier::Wipe,
        };
        Ok(Self { setup, program, users })
    }

    /// As whom, on the host, the spawner runs, where that is not the caller.
    pub(super) fn user(&self) -> Option<u32> {
        if let Ids::Mapped { first, .. } = self.users { Some(first) } else { None }
    }
}

/// A running spawner.
#[derive(Debug)]
pub(super) struct Spawner {
    connection: Mutex<(Channel, Vec<u8>)>,
    pidfd: OwnedFd,
    users: Ids,
    used: AtomicU32,
    /// What its sandboxes are compared with.
    pub(super) looks: Mutex<Looks>,
}

impl Spawner {
    /// Starts one. It ends with the calling thread.
    pub(super) fn start(plan: &Plan, group: &PoolGroup) -> Result<Self> {
        let (ours, theirs) = socket::pair().context("make the spawner's sockets")?;
        let channel = Channel::new(ours).context("set up the spawner's socket")?;
        let mut child = execute(plan.program.as_deref(), theirs)?;
        group.adopt(child.id());
        let begun = begin(plan, channel, &child);
        if begun.is_err() {
            let _ = child.kill();
        }
        // The program that was executed ends when it has made the spawner proper.
        let _ = child.wait();
        begun
    }

    /// Whether there is a user id left for a sandbox.
    pub(super) fn has_ids(&self) -> bool {
        self.users.get(self.used.load(Ordering::Relaxed)).is_some()
    }

    /// Whether it is there.
    pub(super) fn is_alive(&self) -> bool {
        pidfd::wait_ended(self.pidfd.as_fd(), 0).is_ok_and(|ended| !ended)
    }

    /// Makes a sandbox. Returns the socket of its init, its pidfd, and whether it waits for its cgroups.
    pub(super) fn make(&self, group: &LeaseGroup, wait: bool) -> Result<(Channel, OwnedFd)> {
        let uid = self.users.get(self.used.fetch_add(1, Ordering::Relaxed));
        let uid = uid.ok_or_else(|| Error::Spawner("all of its user ids were used".into()))?;
        let (ours, theirs) = socket::pair().context("make a sandbox's sockets")?;
        let ours = Channel::new(ours).context("set up a sandbox's socket")?;
        let birthplace = group.birthplace().filter(|_| !wait);
        let request = ToSpawner::Make { uid, cgroup: birthplace.is_some(), wait };
        let fds: Vec<_> = [theirs.as_fd()].into_iter().chain(birthplace).collect();
        let mut connection = lock(&self.connection);
        let (channel, buffer) = &mut *connection;
        let gone = |e: std::io::Error| Error::Spawner(format!("it cannot be asked for a sandbox: {e}"));
        channel.send(&request.encode(), &fds).map_err(gone)?;
        let (answer, fds) = hear(channel, buffer)?;
        match (answer, fds.into_iter().next()) {
            (FromSpawner::Made, Some(pidfd)) => Ok((ours, pidfd)),
            (FromSpawner::Failed { message, errno }, _) => Err(Error::Setup { message, errno: errno as i32 }),
            _ => Err(Error::Spawner("it answered something else".into())),
        }
    }

    /// Ends it, and with it all of its sandboxes.
    pub(super) fn kill(&self) {
        reap(&self.pidfd);
    }
}

/// Ends and reaps a spawner. As process 1 it is gone only when all others in there are.
fn reap(pidfd: &OwnedFd) {
    // Each fails if it was done before.
    let _ = pidfd::send_signal(pidfd.as_fd(), libc::SIGKILL);
    let _ = pidfd::wait_ended(pidfd.as_fd(), 10_000);
    let _ = pidfd::try_wait(pidfd.as_fd());
}

impl Drop for Spawner {
    fn drop(&mut self) {
        self.kill();
    }
}

/// As [`hear`], for at most `patience`.
fn hear_within(channel: &Channel, buffer: &mut [u8], patience: Duration) -> Result<(FromSpawner, Vec<OwnedFd>)> {
    let there = sys::poll(channel.as_fd(), libc::POLLIN, patience.as_millis() as i32);
    if !there.map_err(|e| Error::Spawner(format!("it cannot be heard: {e}")))? {
        return Err(Error::Spawner("it does not go on".into()));
    }
    hear(channel, buffer)
}

fn hear(channel: &Channel, buffer: &mut [u8]) -> Result<(FromSpawner, Vec<OwnedFd>)> {
    let received = channel.receive(buffer).map_err(|e| Error::Spawner(format!("it cannot be heard: {e}")))?;
    if received.length == 0 {
        return Err(Error::Spawner("it has ended".into()));
    }
    let message = buffer.get(..received.length).unwrap_or_default();
    let message = FromSpawner::decode(message).map_err(|e| Error::Spawner(format!("it sent a {e}")))?;
    Ok((message, received.fds))
}

/// Executes the program that becomes the spawner.
fn execute(program: Option<&Path>, socket: OwnedFd) -> Result<Child> {
    let program = program.unwrap_or(Path::new("/proc/self/exe"));
    let mut command = Command::new(program);
    command.arg0(spawner::NAME).arg(spawner::WORD).env_clear().current_dir("/");
    // The socket is its standard input: no other number is sure to be free in the new process.
    command.stdin(Stdio::from(socket)).stdout(Stdio::null()).stderr(Stdio::null());
    let own_pid = std::process::id();
    // SAFETY: the closure makes system calls only.
    unsafe {
        command.pre_exec(move || {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) == -1 {
                return Err(std::io::Error::last_os_error());
            }
            if libc::getppid() as u32 != own_pid {
                return Err(std::io::Error::from_raw_os_error(libc::ESRCH));
            }
            Ok(())
        });
    }
    command.spawn().map_err(|e| Error::Spawner(format!("execute {}: {e}", program.display())))
}

/// Hands over the setup, maps its ids, and waits until it is ready.
fn begin(plan: &Plan, channel: Channel, child: &Child) -> Result<Spawner> {
    let (setup, trees) = with_trees(&plan.setup)?;
    let fds: Vec<_> = trees.iter().map(AsFd::as_fd).collect();
    let gone = |e: std::io::Error| Error::Spawner(format!("it cannot be set up: {e}"));
    match channel.send(&ToSpawner::Setup(Box::new(setup)).encode(), &fds) {
        // It has ended; what it said before is there.
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => {}
        sent => sent.map_err(gone)?,
    }
    let mut buffer = vec![0; LIMIT];
    let (mut born, mut ready) = (None, false);
    let mut failure = None;
    let mut said = false;
    loop {
        let heard = match hear_within(&channel, &mut buffer, PATIENCE) {
            Ok(heard) => heard,
            Err(_) if !said => {
                let reason = "it has ended, or waits for something else, before it said a word; its main has to call spawner_main";
                return Err(Error::Spawner(reason.into()));
            }
            Err(e) => {
                // The program that was executed is not its parent any more; this process is.
                if let Some(pidfd) = &born {
                    reap(pidfd);
                }
                return Err(failure.unwrap_or(e));
            }
        };
        said = true;
        match heard {
            (FromSpawner::Map, _) => {
                map_ids(plan.users, child.id())?;
                channel.send(&ToSpawner::Mapped.encode(), &[]).map_err(gone)?;
            }
            (FromSpawner::Born, fds) => born = fds.into_iter().next(),
            (FromSpawner::Ready, _) => ready = true,
            // Both processes end, and one may still have to say that it made the other.
            (FromSpawner::Failed { message, .. }, _) => failure = Some(Error::Spawner(message)),
            (FromSpawner::Made, _) => return Err(Error::Spawner("it made what nobody asked for".into())),
        }
        if ready && let Some(pidfd) = born.take() {
            let connection = Mutex::new((channel, buffer));
            return Ok(Spawner {
                connection,
                pidfd,
                users: plan.users,
                used: AtomicU32::new(0),
                looks: Mutex::default(),
            });
        }
    }
}

/// The setup with its binds cloned here, where paths mean what they do for the caller and permissions are his. Who may not
/// clone mounts leaves that to the spawner.
fn with_trees(setup: &Setup) -> Result<(Setup, Vec<OwnedFd>)> {
    let mut setup = setup.clone();
    let mut trees = Vec::new();
    for bind in &mut setup.binds {
        let source = crate::sys::path(&bind.source);
        let at = sys::open(source, libc::O_PATH).on("open", source)?;
        match mount::clone_tree(at.as_fd(), "", true) {
            Err(e) if e.raw_os_error() == Some(libc::EPERM) => continue,
            tree => trees.push(tree.on("clone the mount of", source)?),
        }
        if let Some(tree) = trees.last() {
            restrict(tree.as_fd(), bind).on("restrict the mount of", source)?;
        }
        bind.source.clear();
    }
    Ok((setup, trees))
}

fn map_ids(users: Ids, pid: u32) -> Result<()> {
    // SAFETY: both take nothing and cannot fail.
    let (uid, gid) = unsafe { (libc::geteuid(), libc::getegid()) };
    let (users, groups) = match users {
        Ids::Mapped { first, count } => (format!("0 {first} {count}"), format!("0 {first} {count}")),
        Ids::Single | Ids::Host { .. } => {
            write(pid, "setgroups", "deny")?;
            (format!("1 {uid} 1"), format!("1 {gid} 1"))
        }
    };
    write(pid, "uid_map", &users)?;
    write(pid, "gid_map", &groups)
}

fn write(pid: u32, name: &str, text: &str) -> Result<()> {
    let mut path = OsString::from(format!("/proc/{pid}/"));
    path.push(name);
    Ok(fs::write(&path, text).with_context(|| format!("write {text:?} to {}", Path::new(&path).display()))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spawner_that_says_nothing_is_not_waited_for_for_ever() {
        let (ours, _theirs) = socket::pair().unwrap();
        let error = hear_within(&Channel::new(ours).unwrap(), &mut [0; 16], Duration::from_millis(1)).unwrap_err();
        assert!(error.to_string().contains("does not go on"), "{error}");
    }
}
