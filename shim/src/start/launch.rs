//! Starting a daemon.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use runx_core::cgroup::Layout;
use runx_core::sys::{self, mount, process};

use super::bootstrap::Input;
use crate::daemon::LISTENER;
use crate::flags::Flags;
use crate::sockets::{self, State};
use crate::spawner::place;

/// Starts the daemon with the socket it is to serve. It is ready for connections before it runs: they
/// wait in the socket's queue. If another `start` was faster, nothing is started.
///
/// # Errors
/// What the kernel refuses; the socket is removed then.
pub(super) fn launch(flags: &Flags, input: &Input, socket: &Path) -> Result<()> {
    if let Some(directory) = socket.parent() {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .with_context(|| format!("create {}", directory.display()))?;
    }
    let _lock = sockets::lock(socket).context("lock the directory of the sockets")?;
    match sockets::look(socket).with_context(|| format!("look at {}", socket.display()))? {
        State::Served => return Ok(()),
        State::Dead => {
            fs::remove_file(socket).with_context(|| format!("remove the dead socket {}", socket.display()))?;
        }
        State::Missing => {}
    }
    let listener = UnixListener::bind(socket).with_context(|| format!("bind {}", socket.display()))?;
    let started = fs::set_permissions(socket, fs::Permissions::from_mode(0o600))
        .context("set the mode of the socket")
        .and_then(|()| launch_with(flags, input, &listener));
    if started.is_err() {
        let _ = fs::remove_file(socket);
    }
    started
}

fn launch_with(flags: &Flags, input: &Input, listener: &UnixListener) -> Result<()> {
    let program = std::env::current_exe().context("find the shim's own path")?;
    let own = sys::open("/proc/self/exe", libc::O_PATH).context("open /proc/self/exe")?;
    let clone = mount::read_only_clone(own.as_fd()).context("clone the mount of the shim's program")?;
    let groups = match &input.options.shim_cgroup {
        Some(path) => groups(path)?,
        None => Vec::new(),
    };
    if std::env::var_os("SCHED_CORE").is_some() {
        share_core_cookie()?;
    }
    let mut command = Command::new(format!("/proc/self/fd/{}", clone.as_raw_fd()));
    command.arg0(&program).args(["-namespace", &flags.namespace, "-id", &flags.id, "-address", &flags.address]);
    command.arg("-program").arg(&program);
    if flags.debug || input.debug {
        command.arg("-debug");
    }
    if let Some(events) = input.events.as_ref().filter(|_| std::env::var_os("TTRPC_ADDRESS").is_none()) {
        command.env("TTRPC_ADDRESS", events);
    }
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
    let score = oom_score();
    let number = listener.as_raw_fd();
    // SAFETY: between fork and exec only system calls are made.
    unsafe {
        command.pre_exec(move || {
            // Before it runs, so that what it starts begins there, too.
            for group in &groups {
                nix::unistd::write(group, b"0")?;
            }
            // Without the right to it the score stays the inherited one.
            if let Ok(file) = open(c"/proc/self/oom_score_adj", OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::empty()) {
                let _ = nix::unistd::write(&file, score.as_bytes());
            }
            place(number, LISTENER)
        });
    }
    command.spawn().with_context(|| format!("start {}", program.display())).map(drop)
}

/// The files that take a process into a cgroup, in each hierarchy that has it.
fn groups(path: &Path) -> Result<Vec<File>> {
    let roots: Vec<&PathBuf> = match Layout::of_this_machine()? {
        Layout::V1 { hierarchies } => hierarchies.iter().map(|hierarchy| &hierarchy.mount).collect(),
        Layout::V2 { root, .. } => vec![root],
    };
    let below = path.strip_prefix("/").unwrap_or(path);
    let mut files = Vec::new();
    for root in roots {
        let file = root.join(below).join("cgroup.procs");
        match OpenOptions::new().write(true).open(&file) {
            Ok(file) => files.push(file),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e).with_context(|| format!("open {}, of runtime option shim_cgroup", file.display())),
        }
    }
    if files.is_empty() {
        bail!("runtime option shim_cgroup: there is no cgroup {}", path.display());
    }
    Ok(files)
}

/// One more than containerd's own, so that a lack of memory ends a shim before the daemon above it.
fn oom_score() -> String {
    let parent = nix::unistd::getppid();
    let score = fs::read_to_string(format!("/proc/{parent}/oom_score_adj"))
        .ok()
        .and_then(|text| text.trim().parse::<i32>().ok())
        .unwrap_or(0);
    (score + 1).min(1000).to_string()
}

/// Processes of one container may share a core with each other and with nobody else.
fn share_core_cookie() -> Result<()> {
    const PR_SCHED_CORE: libc::c_int = 62;
    const PR_SCHED_CORE_CREATE: libc::c_ulong = 1;
    const PROCESS_GROUP: libc::c_ulong = 2;
    process::prctl(PR_SCHED_CORE, PR_SCHED_CORE_CREATE, 0, PROCESS_GROUP)
        .context("create a core scheduling cookie")
        .map(drop)
}
