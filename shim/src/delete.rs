//! `delete`: containerd has lost a daemon, or a create failed, and wants everything of a container gone.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context, Result};
use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::protobuf::{Message, MessageField};
use nix::sys::signal::{SigSet, Signal};
use runx_core::container::Runtime;
use runx_core::spawn::Spawner;
use runx_core::workload::WasmConfig;

use crate::flags::Flags;
use crate::{container, events, logging, pod, rootfs, sockets};

/// What a container counts as that was ended by `SIGKILL`.
const KILLED: u32 = 137;

/// The socket of the daemon that containerd was told of.
fn socket_of(bundle: &Path) -> Option<PathBuf> {
    let address = fs::read_to_string(bundle.join("address")).ok()?;
    address.trim().strip_prefix("unix://").map(PathBuf::from)
}

/// Removes what is left of the other containers of a pod whose daemon is gone. With version 3 of the Task API containerd
/// asks for the first one's removal only.
fn remove_others(runtime: &Runtime, bundle: &Path, id: &str) {
    let members = pod::group_of(bundle).and_then(|group| match group {
        Some(group) => pod::members(runtime, &group),
        None => Ok(Vec::new()),
    });
    match members {
        Ok(members) => {
            for state in members.iter().map(|other| other.state()).filter(|state| state.id != id) {
                if let Err(e) = remove(runtime, &state.id, &state.bundle) {
                    log::warn!("delete container {} of the same pod: {e:#}", state.id);
                }
            }
        }
        Err(e) => log::warn!("find the other containers of the pod: {e:#}"),
    }
}

fn remove(runtime: &Runtime, id: &str, bundle: &Path) -> Result<()> {
    let removed = runtime.delete_force(id);
    // Also where the rest failed: a mount that stays keeps the snapshot from being removed.
    let root = bundle.join("rootfs");
    rootfs::unmount_all(&root).with_context(|| format!("unmount {}", root.display()))?;
    Ok(removed?)
}

/// `delete`.
pub(crate) fn run(flags: &Flags) -> Result<()> {
    // containerd shows what is said here as warnings.
    logging::to_stderr();
    // Half of it done would be worse than late.
    let ending = [Signal::SIGTERM, Signal::SIGINT].into_iter().collect::<SigSet>();
    ending.thread_block().context("block signals")?;
    let bundle = if flags.bundle.as_os_str().is_empty() {
        std::env::current_dir().context("find the bundle")?
    } else {
        flags.bundle.clone()
    };
    let root = container::recorded_root(&bundle).unwrap_or_else(|| flags.state_root());
    let runtime = Runtime::new(root, Spawner::Direct, WasmConfig::beside(&PathBuf::new()));
    if let Err(e) = remove(&runtime, &flags.id, &bundle) {
        // What counts is that nothing of it runs. containerd keeps the bundle if this fails, for another try.
        let runs = runtime.load(&flags.id).is_ok_and(|container| container.pids().is_ok_and(|pids| !pids.is_empty()));
        if runs {
            return Err(e.context(format!("delete container {}", flags.id)));
        }
        log::warn!("delete container {}: {e:#}", flags.id);
    }
    if let Some(socket) = socket_of(&bundle) {
        if sockets::is_abandoned(&socket) {
            remove_others(&runtime, &bundle, &flags.id);
        }
        sockets::remove_dead(&socket);
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
