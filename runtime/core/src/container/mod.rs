//! The lifecycle of containers: create, start, exec, kill, pause, resume, update, delete.

mod checkpoint;
mod create;
mod devices;
mod exec;
mod listener;
mod mounts;
pub(crate) mod net_devices;
mod prepare;
pub(crate) mod process;
mod signals;
mod state;
pub(crate) mod users;

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxIdMapping, LinuxResources};

use crate::cgroup::Stats;
use crate::error::{Context, Error, Result};
use crate::hooks::{self, HookState};
use crate::spawn::Spawner;
use crate::spawn::handshake::{FromChild, Handshake, ToChild};
use crate::sys::pidfd::{self, Exit};
use crate::workload::WasmConfig;
use crate::workload::limits::Limits;
use crate::workload::provided::ModuleSource;

pub use checkpoint::{CgroupMode, CheckpointOptions, Images, RestoreOptions};
pub use create::CreateOptions;
pub use exec::{ExecOptions, Group};
pub use listener::Listener;
pub use process::Defaults;
pub(crate) use process::rlimit_name;
use state::Lock;
pub use state::{State, Status};

/// Containers below one root directory.
#[derive(Debug)]
pub struct Runtime {
    root: PathBuf,
    spawner: Spawner,
    wasm: WasmConfig,
}

/// Checks a container id: letters, digits and `_+-.`, 1 to 1024 of them, neither `.` nor `..`. It
/// becomes the name of directories.
///
/// # Errors
/// [`Error::InvalidId`] with the rule that is broken.
pub fn validate_id(id: &str) -> Result<()> {
    let reason = if id.is_empty() {
        "it is empty"
    } else if id.len() > 1024 {
        "it is longer than 1024 bytes"
    } else if id == "." || id == ".." {
        "it names a directory"
    } else if !id.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_+-.".contains(&byte)) {
        "only letters, digits and _+-. are allowed"
    } else {
        return Ok(());
    };
    Err(Error::InvalidId { id: id.to_owned(), reason })
}

impl Runtime {
    /// Containers whose state is below `root`. Nothing is read or made yet.
    pub fn new(root: impl Into<PathBuf>, spawner: Spawner, wasm: WasmConfig) -> Self {
        Self { root: root.into(), spawner, wasm }
    }

    /// The root directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    fn directory(&self, id: &str) -> Result<PathBuf> {
        validate_id(id)?;
        Ok(self.root.join(id))
    }

    /// A directory that goes with the container, for a socket on which its service can say that it is ready. It
    /// is there if [`CreateOptions::notify`] was set.
    ///
    /// # Errors
    /// [`Error::InvalidId`].
    pub fn notify_directory(&self, id: &str) -> Result<PathBuf> {
        Ok(self.directory(id)?.join(state::NOTIFY))
    }

    /// A user namespace without processes, from which id-mapped mounts can take these mappings.
    ///
    /// # Errors
    /// Mappings that the kernel does not take.
    pub fn user_namespace(&self, users: &[LinuxIdMapping], groups: &[LinuxIdMapping]) -> Result<OwnedFd> {
        users::check("the mappings of users", users)?;
        users::check("the mappings of groups", groups)?;
        users::hold(&self.spawner, users, groups)
    }

    /// Finds a container.
    ///
    /// # Errors
    /// [`Error::NotFound`] if there is none with this id.
    pub fn load(&self, id: &str) -> Result<Container> {
        let directory = self.directory(id)?;
        let state = State::read(&directory, id)?;
        Ok(Container { directory, state })
    }

    /// All containers, by id. What cannot be read is left out with a word in the log.
    pub fn list(&self) -> Result<Vec<Container>> {
        let entries = match fs::read_dir(&self.root) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.on("list", &self.root)?,
        };
        let mut containers = Vec::new();
        for entry in entries.flatten() {
            let name = entry.file_name();
            let Some(id) = name.to_str().filter(|id| !id.starts_with('.')) else { continue };
            match self.load(id) {
                Ok(container) => containers.push(container),
                // It is being made, or has just gone.
                Err(Error::NotFound(_)) => {}
                Err(e) => log::warn!("list {id}: {e}"),
            }
        }
        containers.sort_by(|a, b| a.state.id.cmp(&b.state.id));
        Ok(containers)
    }

    /// Removes everything that a killed `create` may have left of `id`, whether or not there is a
    /// state to read. What is not there is fine.
    pub fn delete_force(&self, id: &str) -> Result<()> {
        let directory = self.directory(id)?;
        let _lock = match state::lock(&directory, id) {
            Err(Error::NotFound(_)) => return Ok(()),
            other => other?,
        };
        match State::read(&directory, id) {
            Ok(state) => Container { directory, state }.delete_locked(true),
            Err(e) => {
                // A state that cannot be read names no process and no cgroup: it was never written
                // whole, so neither was made.
                if !matches!(e, Error::NotFound(_)) {
                    log::warn!("container {id}: {e}; removing its directory");
                }
                remove_directory(&directory)
            }
        }
    }
}

/// Is told the pid of a container's process as soon as there is one, which may end and be waited for from then on.
pub struct Born(pub Box<dyn FnOnce(i32) + Send>);

impl std::fmt::Debug for Born {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Born")
    }
}

/// A process in a container that has not been waited for.
#[derive(Debug)]
pub struct Process {
    pid: i32,
    pidfd: OwnedFd,
    handshake: Option<Handshake>,
    terminal: Option<OwnedFd>,
    /// Who answers what its seccomp filter asks, and what that one is told.
    listener: Option<(Listener, HookState)>,
    /// What bounds it if it is a module.
    limits: Limits,
    /// Where its program may be if it is no file.
    modules: Option<Box<dyn ModuleSource>>,
    /// Its program turned out to be a module.
    is_module: bool,
}

impl Process {
    /// Whether its program is a WASM module or component.
    pub fn is_module(&self) -> bool {
        self.is_module
    }

    /// Its pid in this PID namespace.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// A descriptor of it; readable once it has ended.
    pub fn pidfd(&self) -> &OwnedFd {
        &self.pidfd
    }

    /// All that is left of a process that was started.
    pub fn into_pidfd(self) -> OwnedFd {
        self.pidfd
    }

    /// The master side of its terminal, the first time.
    pub fn take_terminal(&mut self) -> Option<OwnedFd> {
        self.terminal.take()
    }

    /// Lets it take its last step, the exec of its program.
    ///
    /// # Errors
    /// [`Error::Program`] if the exec failed, [`Error::Finished`] if it has ended before.
    pub fn start(&mut self) -> Result<()> {
        let Some(handshake) = self.handshake.take() else {
            return Err(Error::Init { message: "the process was started before".into(), errno: 0 });
        };
        start_over(&handshake)
    }

    /// Waits for the end, and reaps it.
    pub fn wait(&self) -> Result<Exit> {
        pidfd::wait(self.pidfd.as_fd()).with_context(|| format!("wait for process {}", self.pid))
    }

    /// Ends and reaps a process that will not be started.
    pub fn discard(&self) {
        let _ = pidfd::send_signal(self.pidfd.as_fd(), libc::SIGKILL);
        // Another waiter in this process may have been faster.
        let _ = pidfd::wait(self.pidfd.as_fd());
    }
}

/// Says "start" and hears whether the exec worked: then the other end just closes.
fn start_over(handshake: &Handshake) -> Result<()> {
    match handshake.send(&ToChild::Start, &[]) {
        Err(e) if e.raw_os_error() == Some(libc::EPIPE) => return Err(Error::Finished),
        other => other.context("tell the process to start")?,
    }
    match handshake.receive().context("hear whether the process started")? {
        None => Ok(()),
        Some((FromChild::Failed(failure), _)) => Err(failure.into()),
        Some((other, _)) => Err(Error::Died(format!("the process said {other:?} instead of starting"))),
    }
}

/// A container, as its state on disk says.
#[derive(Debug)]
pub struct Container {
    directory: PathBuf,
    state: State,
}

impl Container {
    /// Its state when it was read.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Its status now.
    pub fn status(&self) -> Status {
        self.state.status(&self.directory)
    }

    /// Its first process's pid, if that is alive.
    pub fn pid(&self) -> Option<i32> {
        self.state.alive().then_some(self.state.pid)
    }

    fn wrong_state(&self, operation: &'static str, status: Status) -> Error {
        Error::WrongState { operation, id: self.state.id.clone(), status: status.to_string() }
    }

    /// A descriptor of the first process; readable once it has ended.
    ///
    /// # Errors
    /// [`Error::Finished`] if it has ended, even if its pid is another's by now.
    pub fn first_process(&self) -> Result<OwnedFd> {
        let pidfd = match pidfd::open(self.state.pid) {
            Err(e) if matches!(e.raw_os_error(), Some(libc::ESRCH | libc::EINVAL)) => return Err(Error::Finished),
            other => other.with_context(|| format!("open process {}", self.state.pid))?,
        };
        // Asked after the descriptor is there: now it can only be the one or the other.
        if self.state.alive() { Ok(pidfd) } else { Err(Error::Finished) }
    }

    /// Starts the program of a created container. If a hook fails, there is no container any more (runtime.md,
    /// "Lifecycle", steps 7, 9 and 12).
    ///
    /// # Errors
    /// [`Error::WrongState`] unless it is created; [`Error::Program`] if the exec failed; [`Error::HookInside`] and
    /// [`Error::Hook`].
    pub fn start(&self) -> Result<()> {
        let (_lock, current, status) = self.lock()?;
        if status != Status::Created {
            return Err(self.wrong_state("start", status));
        }
        let handshake = state::connect_gate(&self.directory, &self.state.id)?;
        let started = start_over(&handshake).and_then(|()| current.set_started());
        if let Err(e @ (Error::Hook { .. } | Error::HookInside { .. })) = &started
            && let Err(left) = current.delete_locked(true)
        {
            log::warn!("container {} is left after \"{e}\": {left}; delete it", current.state.id);
        }
        started
    }

    /// Notes that the program was started through [`Process::start`], and runs the hooks that come then.
    ///
    /// # Errors
    /// [`Error::Hook`]; the container has been killed then.
    pub fn set_started(&self) -> Result<()> {
        state::open_gate(&self.directory)?;
        let told = self.state.told(Status::Running);
        let run = hooks::run_all("poststart", &self.state.hooks.poststart, &told, &self.state.bundle);
        if run.is_err() {
            match self.first_process() {
                Ok(init) => drop(pidfd::send_signal(init.as_fd(), libc::SIGKILL)),
                Err(e) => log::debug!("after a failed hook: {e}"),
            }
        }
        run
    }

    /// Stops all processes where they are.
    pub fn pause(&self) -> Result<()> {
        let (_lock, current, status) = self.lock()?;
        match status {
            Status::Running | Status::Created => {
                current.state.cgroup.freeze()?;
                // Frozen processes of version 1 do not die. A kill that came just before shall not be undone.
                if crate::sys::process::is_being_killed(current.state.pid) {
                    current.state.cgroup.thaw()?;
                    return Err(self.wrong_state("pause", Status::Stopped));
                }
                Ok(())
            }
            status => Err(self.wrong_state("pause", status)),
        }
    }

    /// Lets stopped processes go on.
    pub fn resume(&self) -> Result<()> {
        let (_lock, current, status) = self.lock()?;
        match status {
            Status::Paused => current.state.cgroup.thaw(),
            status => Err(self.wrong_state("resume", status)),
        }
    }

    /// Changes limits while it runs.
    pub fn update(&self, resources: &LinuxResources) -> Result<()> {
        let (_lock, current, status) = self.lock()?;
        match status {
            Status::Stopped => Err(self.wrong_state("update", status)),
            _ => current.state.cgroup.update(resources),
        }
    }

    /// What the kernel counts for it.
    pub fn stats(&self) -> Result<Stats> {
        self.state.cgroup.stats()
    }

    /// Removes the container: its cgroups and its state.
    ///
    /// A created container is ended first, and with `force` a running one too.
    ///
    /// # Errors
    /// [`Error::WrongState`] if it runs and `force` is not given.
    pub fn delete(&self, force: bool) -> Result<()> {
        let (_lock, current, _) = self.lock()?;
        current.delete_locked(force)
    }

    /// As [`Self::delete`], for the holder of the lock who has read the state under it.
    fn delete_locked(&self, force: bool) -> Result<()> {
        match self.status_under_lock() {
            Status::Stopped => {}
            Status::Created | Status::Creating => self.end()?,
            _ if force => self.end()?,
            status => return Err(self.wrong_state("delete", status)),
        }
        // Processes that outlived the first one, in a PID namespace shared with others.
        self.state.cgroup.kill_all()?;
        self.state.cgroup.remove()?;
        let state = &self.state;
        if let Some(rdt) = &state.rdt {
            rdt.remove()?;
        }
        remove_directory(&self.directory)?;
        hooks::run_each("poststop", &state.hooks.poststop, &state.told(Status::Stopped), &state.bundle);
        Ok(())
    }

    /// Locks the container, and tells what it is now and its status: it may have been created, or deleted,
    /// while we waited.
    ///
    /// # Errors
    /// [`Error::NotFound`] if it is gone, even if another one has its id by now.
    fn lock(&self) -> Result<(Lock, Self, Status)> {
        let lock = state::lock(&self.directory, &self.state.id)?;
        let state = State::read(&self.directory, &self.state.id)?;
        if state.created != self.state.created {
            return Err(Error::NotFound(state.id));
        }
        let current = Self { directory: self.directory.clone(), state };
        let status = current.status_under_lock();
        Ok((lock, current, status))
    }

    /// As [`Self::status`], for the holder of the lock: nobody else is creating it.
    fn status_under_lock(&self) -> Status {
        if self.state.pid == 0 { Status::Stopped } else { self.status() }
    }

    fn end(&self) -> Result<()> {
        let init = match self.first_process() {
            Ok(init) => init,
            Err(Error::Finished) => return Ok(()),
            Err(e) => return Err(e),
        };
        let _ = pidfd::send_signal(init.as_fd(), libc::SIGKILL);
        if self.state.cgroup.is_frozen() {
            self.state.cgroup.thaw()?;
        }
        if !pidfd::wait_ended(init.as_fd(), 10_000).context("wait for the container's end")? {
            return Err(Error::system(
                format!("end container {:?}: process {} does not die", self.state.id, self.state.pid),
                io::Error::from_raw_os_error(libc::ETIMEDOUT),
            ));
        }
        Ok(())
    }
}

fn remove_directory(directory: &Path) -> Result<()> {
    // The state goes last: until then the rest can be found and removed again.
    let state = directory.join(state::STATE_FILE);
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        if path == directory.join(state::NOTIFY) {
            let _ = fs::remove_dir_all(path);
        } else if path == directory.join(checkpoint::ROOT) {
            // Of a killed restore, with whose mount namespace the mount there has gone.
            let _ = fs::remove_dir(path);
        } else if path != state {
            let _ = fs::remove_file(path);
        }
    }
    for path in [&state] {
        match fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e).on("remove", path),
            _ => {}
        }
    }
    match fs::remove_dir(directory) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e).on("remove", directory),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_that_are_no_plain_names_are_refused() {
        for good in ["a", "web-1", "A_b+c.d", "..."] {
            assert!(validate_id(good).is_ok(), "{good}");
        }
        let long = "x".repeat(1025);
        for bad in ["", ".", "..", "a/b", "../x", "a b", "ü", "a\0b", &long] {
            assert!(matches!(validate_id(bad), Err(Error::InvalidId { .. })), "{bad}");
        }
    }
}
