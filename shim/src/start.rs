//! `start`: containerd asks for the address of the daemon that serves a container. The daemon of its
//! pod is found by its socket, or started.

use std::collections::HashMap;
use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, IntoRawFd};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use containerd_shim_protos::protobuf::Message;
use sha2::{Digest, Sha256};

use crate::daemon::LISTENER;
use crate::flags::Flags;

/// Most bytes that are read from standard input.
const INPUT_LIMIT: u64 = 4 << 20;

/// The annotations that group containers into one daemon, the same as runc's shim has.
const GROUPS: [&str; 2] = ["io.containerd.runc.v2.group", "io.kubernetes.cri.sandbox-id"];

/// Where sockets go unless containerd names another place.
const SOCKET_DIRECTORY: &str = "/run/containerd/s";

/// How containerd wants the answer.
#[derive(Debug, PartialEq, Eq)]
enum Protocol {
    /// The bare address, which every version up to 2.2 understands as Task version 2.
    Address,
    /// The bootstrap message of 2.3 and later.
    Bootstrap { socket_directory: Option<String> },
}

/// `start`. Its working directory is the bundle.
pub(crate) fn run(flags: &Flags) -> Result<()> {
    let protocol = read_input(flags)?;
    let bundle = std::env::current_dir().context("find the bundle")?;
    let group = group_of(&bundle.join("config.json"))?.unwrap_or_else(|| flags.id.clone());
    let directory = match &protocol {
        Protocol::Bootstrap { socket_directory: Some(directory) } => PathBuf::from(directory),
        _ => PathBuf::from(SOCKET_DIRECTORY),
    };
    let socket = directory.join(socket_name(flags, &group));
    if UnixStream::connect(&socket).is_err() {
        launch(flags, &socket)?;
    }
    let address = format!("unix://{}", socket.display());
    write_address(&bundle, &address)?;
    let mut stdout = io::stdout().lock();
    let reply = match protocol {
        Protocol::Address => address.into_bytes(),
        Protocol::Bootstrap { .. } => {
            let result =
                BootstrapResult { version: 3, address, protocol: "ttrpc".into(), ..BootstrapResult::default() };
            result.write_to_bytes().context("write the answer")?
        }
    };
    stdout.write_all(&reply).and_then(|()| stdout.flush()).context("write the answer")
}

fn read_input(flags: &Flags) -> Result<Protocol> {
    let mut input = Vec::new();
    io::stdin().take(INPUT_LIMIT).read_to_end(&mut input).context("read standard input")?;
    // Older versions send runtime options here, whose bytes may parse as anything; the new message
    // repeats what the flags say.
    if let Ok(params) = BootstrapParams::parse_from_bytes(&input)
        && params.instance_id == flags.id
        && params.namespace == flags.namespace
    {
        let socket_directory = params.socket_dir.filter(|directory| !directory.is_empty());
        return Ok(Protocol::Bootstrap { socket_directory });
    }
    Ok(Protocol::Address)
}

/// The name under which all containers of a group meet. It is told from other runtimes' sockets, which
/// are named the same way without the last part.
fn socket_name(flags: &Flags, group: &str) -> String {
    let path = Path::new(&flags.address).join(&flags.namespace).join(group).join("runx");
    format!("{:x}", Sha256::digest(path.as_os_str().as_encoded_bytes()))
}

fn group_of(config: &Path) -> Result<Option<String>> {
    #[derive(serde::Deserialize)]
    struct Annotated {
        #[serde(default)]
        annotations: Option<HashMap<String, String>>,
    }
    let spec: Annotated = runx_core::bundle::parse_file(config)?;
    let annotations = spec.annotations.unwrap_or_default();
    Ok(GROUPS.iter().find_map(|key| annotations.get(*key)).filter(|group| !group.is_empty()).cloned())
}

/// Starts the daemon with the socket it is to serve. It is ready for connections before it runs: they
/// wait in the socket's queue.
fn launch(flags: &Flags, socket: &Path) -> Result<()> {
    if let Some(directory) = socket.parent() {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o711)
            .create(directory)
            .with_context(|| format!("create {}", directory.display()))?;
    }
    match fs::remove_file(socket) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            return Err(e).with_context(|| format!("remove the dead socket {}", socket.display()));
        }
        _ => {}
    }
    let listener = UnixListener::bind(socket).with_context(|| format!("bind {}", socket.display()))?;
    let started = fs::set_permissions(socket, fs::Permissions::from_mode(0o600))
        .context("set the mode of the socket")
        .and_then(|()| launch_with(flags, listener));
    if started.is_err() {
        let _ = fs::remove_file(socket);
    }
    started
}

fn launch_with(flags: &Flags, listener: UnixListener) -> Result<()> {
    let program = std::env::current_exe().context("find the shim's own path")?;
    if std::env::var_os("SCHED_CORE").is_some() {
        share_core_cookie()?;
    }
    let number = listener.as_raw_fd();
    let mut command = Command::new(&program);
    command.args(["-namespace", &flags.namespace, "-id", &flags.id, "-address", &flags.address]);
    if flags.debug {
        command.arg("-debug");
    }
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
    // SAFETY: between fork and exec only system calls are made.
    unsafe {
        command.pre_exec(move || {
            if number == LISTENER {
                let fd = std::os::fd::BorrowedFd::borrow_raw(LISTENER);
                return runx_core::sys::set_cloexec(fd, false);
            }
            if libc::dup2(number, LISTENER) == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
        });
    }
    let child = command.spawn().with_context(|| format!("start {}", program.display()))?;
    // Kept until the child has its copy; this program ends right after.
    let _ = listener.into_raw_fd();
    adjust_oom_score(child.id());
    Ok(())
}

/// One more than containerd's own, so that a lack of memory ends a shim before the daemon above it.
fn adjust_oom_score(pid: u32) {
    let parent = nix::unistd::getppid();
    let score = fs::read_to_string(format!("/proc/{parent}/oom_score_adj"))
        .ok()
        .and_then(|text| text.trim().parse::<i32>().ok())
        .unwrap_or(0);
    // Without the right to it the score stays the inherited one.
    let _ = fs::write(format!("/proc/{pid}/oom_score_adj"), (score + 1).min(1000).to_string());
}

/// Processes of one container may share a core with each other and with nobody else.
fn share_core_cookie() -> Result<()> {
    const PR_SCHED_CORE: libc::c_int = 62;
    const PR_SCHED_CORE_CREATE: libc::c_ulong = 1;
    const PROCESS_GROUP: libc::c_ulong = 2;
    runx_core::sys::process::prctl(PR_SCHED_CORE, PR_SCHED_CORE_CREATE, 0, PROCESS_GROUP)
        .context("create a core scheduling cookie")
        .map(drop)
}

/// containerd 1.6 and 1.7 find the daemon again after a restart by this file.
fn write_address(bundle: &Path, address: &str) -> Result<()> {
    let temporary = bundle.join(".address");
    fs::write(&temporary, address)
        .and_then(|()| fs::rename(&temporary, bundle.join("address")))
        .with_context(|| format!("write {}", bundle.join("address").display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn socket_names_differ_by_daemon_namespace_and_group() {
        let flags = |address: &str, namespace: &str| Flags {
            address: address.into(),
            namespace: namespace.into(),
            ..Flags::default()
        };
        let names = [
            socket_name(&flags("/a.sock", "n"), "x"),
            socket_name(&flags("/b.sock", "n"), "x"),
            socket_name(&flags("/a.sock", "m"), "x"),
            socket_name(&flags("/a.sock", "n"), "y"),
        ];
        for (i, name) in names.iter().enumerate() {
            assert_eq!(name.len(), 64);
            assert!(!names[..i].contains(name));
        }
    }
}
