//! `delete`: containerd has lost a daemon, or a create failed, and wants everything of a container gone.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context, Result};
use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::protobuf::{Message, MessageField};
use runx_core::container::Runtime;
use runx_core::spawn::Spawner;
use runx_core::workload::WasmConfig;

use crate::flags::Flags;
use crate::{container, events, pod, rootfs, sockets};

/// What a container counts as that was ended by `SIGKILL`.
const KILLED: u32 = 137;

/// Whether the daemon that containerd was told of is gone. The socket of one that was killed is removed.
fn daemon_is_gone(bundle: &Path) -> bool {
    let Ok(address) = fs::read_to_string(bundle.join("address")) else { return false };
    let Some(socket) = address.trim().strip_prefix("unix://") else { return false };
    let socket = Path::new(socket);
    let dead = sockets::is_dead(socket);
    if dead {
        let _ = fs::remove_file(socket);
    }
    sockets::remove_dead(socket);
    dead || !socket.exists()
}

/// Removes what is left of the other containers of a pod whose daemon is gone. With version 3 of the Task API containerd
/// asks for the first one's removal only.
fn remove_others(runtime: &Runtime, bundle: &Path, id: &str) -> Result<()> {
    let Some(group) = pod::group_of(bundle)? else { return Ok(()) };
    for other in pod::members(runtime, &group)? {
        let state = other.state();
        if state.id != id {
            remove(runtime, &state.id, &state.bundle).with_context(|| format!("delete container {}", state.id))?;
        }
    }
    Ok(())
}

fn remove(runtime: &Runtime, id: &str, bundle: &Path) -> Result<()> {
    let removed = runtime.delete_force(id);
    let root = bundle.join("rootfs");
    // Also where the rest failed: a mount that stays keeps the snapshot from being removed.
    rootfs::unmount(&root).with_context(|| format!("unmount {}", root.display()))?;
    Ok(removed?)
}

/// `delete`.
pub(crate) fn run(flags: &Flags) -> Result<()> {
    let bundle = if flags.bundle.as_os_str().is_empty() {
        std::env::current_dir().context("find the bundle")?
    } else {
        flags.bundle.clone()
    };
    let root = container::recorded_root(&bundle).unwrap_or_else(|| flags.state_root());
    let runtime = Runtime::new(root, Spawner::Direct, WasmConfig::beside(&PathBuf::new()));
    remove(&runtime, &flags.id, &bundle).with_context(|| format!("delete container {}", flags.id))?;
    if daemon_is_gone(&bundle)
        && let Err(e) = remove_others(&runtime, &bundle, &flags.id)
    {
        // This container is gone, which is what was asked for.
        eprintln!("containerd-shim-runx-v1: clean up after a lost shim: {e:#}");
    }
    let pid = fs::read_to_string(bundle.join(container::PID_FILE)).ok().and_then(|text| text.trim().parse().ok());
    let response = DeleteResponse {
        pid: pid.unwrap_or(0),
        exit_status: KILLED,
        exited_at: MessageField::some(events::timestamp(SystemTime::now())),
        ..DeleteResponse::default()
    };
    let bytes = response.write_to_bytes().context("write the answer")?;
    io::stdout().write_all(&bytes).context("write the answer")
}
