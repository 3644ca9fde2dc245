//! What the new process does between its clone and its last step, in order.
//!
//! Each file is one concern. All paths are looked up below the container's root by descriptor, and all
//! of /proc is a private mount that nothing can be laid over.

mod capabilities;
mod console;
mod copy_up;
mod devices;
mod identity;
mod labels;
mod mounts;
mod network;
mod paths;
mod program;
mod rootfs;
mod scheduling;
mod seccomp;
mod sysctl;
mod time;

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use crate::error::{Context, Error, Result};
use crate::hooks::{self, HookState};
use crate::plan::{ContainerPlan, Fd, Gate, HooksPlan, Plan, ProcessPlan, UserNamespace};
use crate::spawn::handshake::{FromChild, Handshake, ToChild};
use crate::sys::{self, mount, process};
use program::Program;

pub(crate) use mounts::filesystem as make_filesystem;
pub use paths::make_target as make_mount_point;
pub(crate) use rootfs::open_null;

/// The descriptors of a plan.
pub(crate) struct Fds(Vec<Option<OwnedFd>>);

impl Fds {
    pub(crate) fn new(fds: Vec<OwnedFd>) -> Self {
        Self(fds.into_iter().map(Some).collect())
    }

    fn get(&self, fd: Fd) -> Result<BorrowedFd<'_>> {
        self.0
            .get(fd.0 as usize)
            .and_then(|fd| fd.as_ref())
            .map(AsFd::as_fd)
            .ok_or_else(|| Error::Died(format!("descriptor {} of the plan is missing", fd.0)))
    }
}

/// The parent's end of the conversation, and whether it has said that we are in our cgroups.
struct Parent {
    handshake: Handshake,
    in_cgroup: bool,
    in_cgroup_namespace: bool,
    /// What the process is to see of its cgroups, without a cgroup namespace.
    cgroup_views: VecDeque<OwnedFd>,
}

impl Parent {
    fn tell(&self, message: &FromChild, fds: &[BorrowedFd<'_>]) -> Result<()> {
        self.handshake.send(message, fds).context("report to the parent")
    }

    fn hear(&self) -> Result<(ToChild, Vec<OwnedFd>)> {
        match self.handshake.receive().context("hear from the parent")? {
            Some(message) => Ok(message),
            // Whoever wanted this process is gone, so nobody will ever start, stop or delete it.
            None => exit(1),
        }
    }

    /// Waits for one word; that we are in our cgroups may come before it.
    fn wait_for(&mut self, wanted: fn(&ToChild) -> bool) -> Result<()> {
        loop {
            let (word, fds) = self.hear()?;
            if matches!(word, ToChild::InCgroup) {
                self.in_cgroup = true;
                self.cgroup_views = fds.into();
            }
            match word {
                word if wanted(&word) => return Ok(()),
                ToChild::InCgroup => {}
                other => return Err(Error::Died(format!("heard {other:?} at a wrong time"))),
            }
        }
    }

    fn wait_for_cgroup(&mut self) -> Result<()> {
        if !self.in_cgroup {
            self.wait_for(|word| matches!(word, ToChild::InCgroup))?;
        }
        Ok(())
    }

    /// Enters the new cgroup namespace, whose root is the cgroup that the process is in by then.
    fn enter_cgroup_namespace(&mut self, plan: &ContainerPlan) -> Result<()> {
        if !self.in_cgroup_namespace {
            self.wait_for_cgroup()?;
            if plan.new_cgroup_namespace {
                process::unshare(libc::CLONE_NEWCGROUP).context("unshare the cgroup namespace")?;
            }
            self.in_cgroup_namespace = true;
        }
        Ok(())
    }
}

fn exit(code: i32) -> ! {
    // SAFETY: ends this process without running destructors that belong to the parent's copy.
    unsafe { libc::_exit(code) }
}

/// Runs a plan that came in a file, in the process made for it.
pub(crate) fn run_encoded(plan: &OwnedFd, fds: Vec<OwnedFd>, handshake: Handshake) -> ! {
    let decoded = sys::read_all(plan.as_fd())
        .context("read the plan")
        .and_then(|data| postcard::from_bytes(&data).map_err(|e| Error::Died(format!("the plan is malformed: {e}"))));
    match decoded {
        Ok(plan) => run(plan, fds, handshake),
        Err(e) => fail(&handshake, e),
    }
}

/// Runs a plan in the process made for it. Never returns: the process becomes the container's program
/// or reports why not.
pub(crate) fn run(plan: Plan, fds: Vec<OwnedFd>, handshake: Handshake) -> ! {
    let mut parent = Parent { handshake, in_cgroup: false, in_cgroup_namespace: false, cgroup_views: VecDeque::new() };
    match steps(plan, fds, &mut parent) {
        Ok((gate, error)) => fail(gate.as_ref().unwrap_or(&parent.handshake), error),
        Err(error) => fail(&parent.handshake, error),
    }
}

fn fail(handshake: &Handshake, error: Error) -> ! {
    // If the parent is gone there is nobody to tell.
    let _ = handshake.send(&FromChild::Failed(error.into()), &[]);
    exit(1)
}

/// All steps. Returns only if the program could not be executed, with whom to tell if it is not the
/// parent.
fn steps(plan: Plan, fds: Vec<OwnedFd>, parent: &mut Parent) -> Result<(Option<Handshake>, Error)> {
    let mut fds = Fds::new(fds);
    let Plan { hold, join, user_namespace, container, mut process, gate } = plan;
    if hold {
        // Until the other end goes.
        parent.wait_for(|_| false)?;
    }
    // SAFETY: setsid has no arguments; it fails only for a group's leader, which a fresh clone is not.
    unsafe { libc::setsid() };
    for (fd, kind) in &join {
        process::setns(fds.get(*fd)?, *kind)
            .with_context(|| format!("join the {} namespace", namespace_name(*kind)))?;
    }
    if user_namespace == Some(UserNamespace::New) {
        parent.wait_for(|word| matches!(word, ToChild::Mapped))?;
    }
    // Made before the old root goes: in a user namespace the kernel allows a new procfs only to one who
    // can still see another.
    let proc = match &container {
        Some(_) => Some(mount::private_proc().context("mount a private procfs")?),
        None => None,
    };
    if let (Some(container), Some(proc)) = (&container, &proc)
        && let Some(offsets) = &container.new_time_namespace
    {
        time::enter(proc, offsets)?;
    }
    if user_namespace.is_some() {
        identity::become_root()?;
    }
    if let Some(name) = &process.keyring {
        identity::join_session_keyring(name)?;
    }
    let listener = match gate {
        Gate::Parent => None,
        Gate::Listener(fd) => Some(fds.get(fd)?.try_clone_to_owned().context("keep the start socket")?),
    };
    match (&container, &proc) {
        (Some(container), Some(proc)) => set_up_container(container, &process, proc, &fds, parent)?,
        _ => {
            if process.terminal.is_some() {
                console::open(None, &process, parent)?;
            }
        }
    }
    drop(proc);
    parent.wait_for_cgroup()?;
    scheduling::set_cpus(&process)?;
    if let (None, Some(stdio)) = (process.terminal, process.stdio) {
        console::use_stdio(&fds, stdio)?;
    }
    console::own_stdio(process.uid);
    let seccomp = match process.seccomp {
        Some((fd, flags)) => Some((sys::read_all(fds.get(fd)?).context("read the seccomp program")?, flags)),
        None => None,
    };
    let labels = process.labels.as_ref().map(|labels| labels::open(labels, &fds)).transpose()?;
    let given = match process.program {
        Some(fd) => Some(fds.get(fd)?.try_clone_to_owned().context("keep the program")?),
        None => None,
    };
    // What is not needed any more is closed now, so that a low limit on open files is not hit.
    fds.0.clear();
    scheduling::set(&process)?;
    identity::set_limits(&process.rlimits)?;
    let early_cwd = identity::enter_directory(&process.cwd);
    identity::become_user(&process)?;
    if early_cwd.is_err() {
        // Root may be refused where the user is not, as on a network filesystem.
        identity::enter_directory(&process.cwd)?;
    }
    identity::check_directory(&process.cwd)?;
    identity::complete_environment(&mut process);
    let program = match given {
        Some(program) => Program::Given(program),
        None => program::find(&process, parent)?,
    };
    if matches!(program, Program::Runner { .. }) {
        // A module that could open /proc/self/mem would be native code.
        mounts::detach_kernel_filesystems(container.as_ref())?;
    }
    if std::process::id() == 1 {
        // Whoever sends a created container a signal means its program, and has none of its handlers yet.
        process::end_on_signals().context("let signals end the container")?;
    }
    let seccomp = match seccomp {
        // As runc has it, a listener hears of its container when that is created, and not when it is started.
        Some((instructions, flags)) if process.seccomp_listener => {
            capabilities::before_filter(&process)?;
            seccomp::load_with_listener(&instructions, flags, &parent.handshake)?;
            None
        }
        other => other,
    };
    let handshake = wait_for_start(parent, listener)?;
    let last = LastStep { hooks: container.and_then(|container| container.hooks), labels, seccomp };
    let error = last.take(&process, program).err();
    let error = error.unwrap_or_else(|| Error::Died("exec returned".into()));
    Ok((handshake, error))
}

/// Reports that all is ready and waits for the word to go on. Returns the connection over which it
/// came if that is not the parent's.
fn wait_for_start(parent: &Parent, listener: Option<OwnedFd>) -> Result<Option<Handshake>> {
    parent.tell(&FromChild::Ready, &[])?;
    // The parent keeps our state, or is gone and so are we.
    let (word, _) = parent.hear()?;
    if !matches!(word, ToChild::Start) {
        return Err(Error::Died(format!("expected Start, heard {word:?}")));
    }
    let Some(listener) = listener else { return Ok(None) };
    loop {
        // SAFETY: no address is asked for.
        let accepted = unsafe {
            libc::accept4(listener.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut(), libc::SOCK_CLOEXEC)
        };
        match sys::owned(accepted.into()) {
            Ok(connection) => {
                let connection = Handshake::from_fd(connection);
                if let Ok(Some((ToChild::Start, _))) = connection.receive() {
                    return Ok(Some(connection));
                }
            }
            Err(e) if e.raw_os_error() == Some(libc::EINTR) => {}
            Err(e) => return Err(Error::system("accept a connection on the start socket", e)),
        }
    }
}

/// What takes effect with the exec.
struct LastStep {
    hooks: Option<HooksPlan>,
    labels: Option<labels::Pending>,
    seccomp: Option<(Vec<u8>, u64)>,
}

impl LastStep {
    fn take(self, process: &ProcessPlan, program: Program) -> Result<()> {
        process::reset_signals().context("reset signals")?;
        let preserved = 3i32.saturating_add_unsigned(process.preserve_fds);
        sys::cloexec_from(preserved).context("close descriptors")?;
        let exec = program.prepare(process)?;
        identity::set_final_file_limit(&process.rlimits)?;
        if let Some(labels) = self.labels {
            labels.apply()?;
        }
        if !process.seccomp_listener {
            capabilities::before_filter(process)?;
        }
        if let Some((instructions, flags)) = self.seccomp {
            crate::seccomp::load(&instructions, flags)?;
        }
        capabilities::set_final(process)?;
        // What they execute is the image's: they may do what its program may, and no more.
        if let Some(HooksPlan { state, start_container, .. }) = &self.hooks {
            let state = HookState { status: "created".into(), pid: std::process::id() as i32, ..state.clone() };
            // A hook without an environment has the program's, which is never empty.
            let mut list = start_container.clone();
            list.iter_mut().filter(|hook| hook.env.is_empty()).for_each(|hook| hook.env.clone_from(&process.env));
            hooks::run_all("startContainer", &list, &state, Path::new(&process.cwd))?;
        }
        exec.execute()
    }
}

fn set_up_container(
    plan: &ContainerPlan,
    process: &ProcessPlan,
    proc: &OwnedFd,
    fds: &Fds,
    parent: &mut Parent,
) -> Result<()> {
    let filesystems = mounts::make(&plan.mounts)?;
    rootfs::attach(plan, fds)?;
    let early = plan.hooks.as_ref().filter(|hooks| hooks.host_rootfs.is_some());
    if early.is_none() {
        rootfs::enter(plan, fds)?;
    }
    let root = fds.get(plan.rootfs)?.try_clone_to_owned().context("keep the root filesystem")?;
    let read_only = mounts::attach_all(plan, filesystems, fds, &root, parent)?;
    if let Some(list) = &plan.devices {
        devices::make(&root, list, fds)?;
    }
    if let Some(hooks) = early {
        run_hooks_before_pivot(hooks, parent)?;
        rootfs::enter(plan, fds)?;
    }
    if process.terminal.is_some() {
        console::open(Some(&root), process, parent)?;
    }
    if process.make_cwd {
        paths::make_directory(root.as_fd(), &process.cwd)
            .with_context(|| format!("mkdir process.cwd {:?}", process.cwd))?;
    }
    if plan.loopback {
        network::bring_loopback_up()?;
    }
    if !plan.net_devices.is_empty() {
        parent.wait_for_cgroup()?;
        network::set_up(&plan.net_devices)?;
    }
    sysctl::set_names(plan)?;
    sysctl::set_all(proc, &plan.sysctl)?;
    rootfs::hide(plan, fds, &root)?;
    parent.enter_cgroup_namespace(plan)?;
    rootfs::finish(plan, &root, &read_only)
}

/// Lets the runtime run its hooks, then runs those of the container.
fn run_hooks_before_pivot(hooks: &HooksPlan, parent: &mut Parent) -> Result<()> {
    // They may look for the process in its cgroup.
    parent.wait_for_cgroup()?;
    parent.tell(&FromChild::BeforePivot, &[])?;
    parent.wait_for(|word| matches!(word, ToChild::HooksRun))?;
    let state = HookState { status: "creating".into(), pid: std::process::id() as i32, ..hooks.state.clone() };
    let directory = hooks.host_rootfs.as_deref().unwrap_or("/");
    hooks::run_all("createContainer", &hooks.create_container, &state, Path::new(directory))
}

/// The name of a namespace in messages, by its `CLONE_NEW*` flag.
pub(crate) fn namespace_name(kind: i32) -> &'static str {
    match kind {
        libc::CLONE_NEWNS => "mount",
        libc::CLONE_NEWUTS => "UTS",
        libc::CLONE_NEWIPC => "IPC",
        libc::CLONE_NEWUSER => "user",
        libc::CLONE_NEWPID => "PID",
        libc::CLONE_NEWNET => "network",
        libc::CLONE_NEWCGROUP => "cgroup",
        process::CLONE_NEWTIME => "time",
        _ => "container's",
    }
}

/// Duplicates a descriptor onto a number, without close-on-exec. What is there is closed: nothing of ours is, since the
/// first three are open from a process's beginning and everything that we open comes after them.
fn place(fd: BorrowedFd<'_>, number: i32) -> std::io::Result<()> {
    if fd.as_raw_fd() == number {
        return sys::set_cloexec(fd, false);
    }
    // SAFETY: both are plain descriptor numbers; the target is one of the standard three.
    sys::check(unsafe { libc::dup2(fd.as_raw_fd(), number) }.into()).map(drop)
}
