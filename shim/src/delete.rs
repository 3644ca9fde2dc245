//! `delete`: containerd has lost a daemon, or a create failed, and wants everything of a container gone.

use std::fs;
use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context, Result};
use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::protobuf::{Message, MessageField};
use runx_core::container::Runtime;
use runx_core::spawn::Spawner;
use runx_core::workload::WasmConfig;

use crate::flags::Flags;
use crate::{container, events, rootfs};

/// What a container counts as that was ended by `SIGKILL`.
const KILLED: u32 = 137;

/// Removes the socket that a daemon left behind which was killed. One that answers is served by a daemon that
/// has other containers.
fn remove_dead_socket(bundle: &Path) {
    let Ok(address) = fs::read_to_string(bundle.join("address")) else { return };
    let Some(socket) = address.trim().strip_prefix("unix://") else { return };
    if UnixStream::connect(socket).is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused) {
        let _ = fs::remove_file(socket);
    }
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
    let removed = runtime.delete_force(&flags.id);
    // Also where the rest failed: a mount that stays keeps the snapshot from being removed.
    rootfs::unmount(&bundle.join("rootfs")).with_context(|| format!("unmount {}", bundle.join("rootfs").display()))?;
    removed.with_context(|| format!("delete container {}", flags.id))?;
    remove_dead_socket(&bundle);
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
