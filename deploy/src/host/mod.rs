//! What is done on the node itself and not in this process: running its programs, and restarting its containerd.

mod dbus;
mod systemd;

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::root::Root;

/// How long reading a configuration may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long a restart may take until the service says that it is up: k3s starts a whole control plane.
const RESTART_PATIENCE: Duration = Duration::from_secs(180);

/// Who does it.
#[derive(Debug)]
pub(crate) enum Host {
    /// systemd, by its socket: as a pod without any privileges over processes can.
    Systemd {
        /// The socket, as this process sees it.
        socket: PathBuf,
    },
    /// Commands.
    Commands {
        /// What comes before a program of the node, such as `chroot DIR`.
        enter: Vec<String>,
        /// What restarts containerd, for `sh -c`.
        restart: String,
    },
}

/// What a program did.
#[derive(Debug)]
pub(crate) struct Output {
    /// Whether its exit code was 0.
    pub(crate) success: bool,
    /// Its standard output.
    pub(crate) stdout: String,
    /// Its standard error.
    pub(crate) stderr: String,
}

impl Host {
    /// systemd, if the node has it.
    pub(crate) fn systemd(root: &Root) -> Result<Self> {
        let socket = root.outside(&systemd::socket()).context(
            "this node has no /run/systemd/private: without systemd, say how containerd is restarted with --restart-command",
        )?;
        Ok(Self::Systemd { socket })
    }

    /// Runs a program of the node. Paths in `command` are the node's; what it prints goes through files in `scratch`.
    ///
    /// # Errors
    /// When it cannot be started or does not end. That it fails is none.
    pub(crate) fn run(&self, root: &Root, scratch: &Path, command: &[String]) -> Result<Output> {
        root.make_directories(scratch).with_context(|| format!("make {}", scratch.display()))?;
        let files = ["stdout", "stderr"].map(|name| scratch.join(name));
        for path in &files {
            root.write(path, b"", 0o600, None).with_context(|| format!("create {}", path.display()))?;
        }
        let what = || format!("run {} on the node", command.join(" "));
        let success = match self {
            Self::Systemd { socket } => {
                let unit = format!("runx-node-{}-{}.service", std::process::id(), unique());
                let [output, errors] = &files;
                let run = systemd::Run { unit: &unit, command, output, errors };
                systemd::run(socket, &run, PATIENCE).with_context(what)?
            }
            Self::Commands { enter, .. } => {
                let words: Vec<&String> = enter.iter().chain(command).collect();
                let mut child = Command::new(words[0]);
                child.args(&words[1..]).stdin(Stdio::null());
                let open =
                    |path: &Path| -> Result<File> { Ok(File::options().append(true).open(root.outside(path)?)?) };
                child.stdout(open(&files[0]).with_context(what)?).stderr(open(&files[1]).with_context(what)?);
                finish(child, PATIENCE).with_context(what)?
            }
        };
        let [stdout, stderr] = files.map(|path| {
            let bytes = root.read(&path).ok().flatten().unwrap_or_default();
            String::from_utf8_lossy(&bytes).into_owned()
        });
        Ok(Output { success, stdout, stderr })
    }

    /// The first of some units that the node has and runs, else the first that it has.
    ///
    /// # Errors
    /// When there is none.
    pub(crate) fn unit(&self, candidates: &[String]) -> Result<Option<String>> {
        let Self::Systemd { socket } = self else { return Ok(None) };
        let mut there = None;
        for name in candidates {
            let unit = systemd::unit(socket, name).with_context(|| format!("ask systemd for {name}"))?;
            if unit.load != "loaded" {
                continue;
            }
            if unit.active == "active" {
                return Ok(Some(name.clone()));
            }
            there.get_or_insert_with(|| name.clone());
        }
        if there.is_none() && !candidates.is_empty() {
            bail!("systemd knows none of {}: say which unit runs containerd with --unit", candidates.join(", "));
        }
        Ok(there)
    }

    /// Restarts containerd.
    ///
    /// # Errors
    /// When it does not come up.
    pub(crate) fn restart(&self, unit: Option<&str>) -> Result<()> {
        match self {
            Self::Systemd { socket } => {
                let Some(unit) = unit else { return Ok(()) };
                systemd::restart(socket, unit, RESTART_PATIENCE).with_context(|| format!("restart {unit}"))
            }
            Self::Commands { restart, .. } => {
                let mut shell = Command::new("sh");
                shell.args(["-c", restart]).stdin(Stdio::null());
                match finish(shell, RESTART_PATIENCE).with_context(|| format!("restart containerd by {restart:?}"))? {
                    true => Ok(()),
                    false => bail!("restart containerd: {restart:?} failed"),
                }
            }
        }
    }
}

fn unique() -> u64 {
    use std::sync::atomic::{AtomicU64, Ordering};
    static COUNT: AtomicU64 = AtomicU64::new(0);
    COUNT.fetch_add(1, Ordering::Relaxed)
}

/// Waits for the end of a command, for so long. Tells whether its exit code was 0.
fn finish(mut command: Command, patience: Duration) -> Result<bool> {
    let mut child = command.process_group(0).spawn()?;
    let end = Instant::now() + patience;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status.success());
        }
        if Instant::now() > end {
            // SAFETY: the child is not reaped yet, so the group with its number is its own.
            unsafe { libc::kill(-(child.id() as i32), libc::SIGKILL) };
            child.wait()?;
            bail!("it does not end within {} s", patience.as_secs());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}
