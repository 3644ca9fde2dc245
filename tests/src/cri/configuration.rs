//! What a node is configured with.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;

use super::{BY_PATH, CRUN, HANDLER, PAUSE, RUNC};
use crate::command::run;

/// Where distributions and installers put CNI plugins.
const PLUGINS: [&str; 2] = ["/usr/lib/cni", "/opt/cni/bin"];

pub(super) fn plugins() -> Option<&'static str> {
    let complete = |directory: &&str| {
        ["bridge", "host-local", "loopback"].iter().all(|name| Path::new(directory).join(name).exists())
    };
    PLUGINS.into_iter().find(complete)
}

/// The crun program, if it is installed.
pub fn crun() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|directory| directory.join("crun")).find(|program| program.exists())
}

/// The handlers that are worth comparing, ours first.
pub fn handlers() -> Vec<&'static str> {
    [HANDLER, RUNC].into_iter().chain(crun().map(|_| CRUN)).collect()
}

/// The version of containerd: 1.6 is `(1, 6)`.
pub fn version() -> (u32, u32) {
    version_of(Path::new("containerd"))
}

pub(super) fn version_of(program: &Path) -> (u32, u32) {
    let text = run(Command::new(program).arg("--version")).ok().stdout;
    let is_version = |word: &&str| word.starts_with(|c: char| c.is_ascii_digit()) && word.contains('.');
    let number = text.split_ascii_whitespace().map(|word| word.trim_start_matches('v')).find(is_version);
    let mut parts =
        number.expect("containerd tells its version").split('.').map(|part| part.parse().expect("a number"));
    (parts.next().expect("a major version"), parts.next().expect("a minor version"))
}

/// A newer containerd than the one that is installed, if `RUNX_NEWER_CONTAINERD` names one.
pub fn newer() -> Option<PathBuf> {
    std::env::var_os("RUNX_NEWER_CONTAINERD").map(PathBuf::from)
}

/// Addresses of their own for every node, so that several can be there at once.
pub(super) fn write_network(directory: &Path, bridge: &str) {
    let seed = bridge.bytes().fold(0u32, |sum, byte| sum.wrapping_mul(31).wrapping_add(byte.into()));
    let subnet = format!("10.{}.{}.0/24", 64 + seed % 128, seed / 128 % 256);
    let network = json!({
        "cniVersion": "0.4.0",
        "name": bridge,
        "plugins": [{
            "type": "bridge", "bridge": bridge, "isGateway": true,
            "ipam": {"type": "host-local", "dataDir": directory.join("ipam"), "ranges": [[{"subnet": subnet}]]}
        }]
    });
    fs::create_dir_all(directory.join("cni")).expect("make a directory");
    fs::write(directory.join("cni/10-network.conflist"), network.to_string()).expect("write the network");
}

/// containerd's configuration, in the form of its version.
pub(super) fn containerds(directory: &Path, version: (u32, u32)) -> String {
    let at = directory.display();
    let plugins = plugins().expect("there are plugins");
    let shim = crate::dist().join("containerd-shim-runx-v1");
    let handlers = |plugin: &str| {
        let handler = format!("[plugins.\"{plugin}\".containerd.runtimes");
        format!(
            "{handler}.{HANDLER}]\n  runtime_type = \"io.containerd.runx.v1\"\n  pod_annotations = [\"runx.test/*\", \"runx.dev/*\"]\n\
             {handler}.{BY_PATH}]\n  runtime_type = \"io.containerd.runc.v2\"\n  runtime_path = \"{}\"\n\
             {handler}.{RUNC}]\n  runtime_type = \"io.containerd.runc.v2\"\n{}",
            shim.display(),
            crun().map_or(String::new(), |program| format!(
                "{handler}.{CRUN}]\n  runtime_type = \"io.containerd.runc.v2\"\n{handler}.{CRUN}.options]\n  \
                 BinaryName = \"{}\"\n",
                program.display()
            ))
        )
    };
    // Where limits and scores may not be raised, they stay as they are.
    let common = "restrict_oom_score_adj = true\nenable_unprivileged_ports = false\nenable_unprivileged_icmp = false\n";
    let head = format!(
        "root = \"{at}/root\"\nstate = \"{at}/state\"\n[grpc]\n  address = \"{at}/c.sock\"\n\
         [ttrpc]\n  address = \"{at}/c.sock.ttrpc\"\n[debug]\n  address = \"{at}/debug.sock\"\n"
    );
    // Its socket has one place for the whole machine.
    let nri = "[plugins.\"io.containerd.nri.v1.nri\"]\n  disable = true\n";
    if version < (2, 0) {
        let cri = "io.containerd.grpc.v1.cri";
        format!(
            "version = 2\n{head}{nri}[plugins.\"{cri}\"]\nsandbox_image = \"{PAUSE}\"\nstream_server_port = \"0\"\n\
             {common}[plugins.\"{cri}\".cni]\n  bin_dir = \"{plugins}\"\n  conf_dir = \"{at}/cni\"\n{}",
            handlers(cri)
        )
    } else {
        let cri = "io.containerd.cri.v1.runtime";
        let directories =
            if version < (2, 1) { format!("bin_dir = \"{plugins}\"") } else { format!("bin_dirs = [\"{plugins}\"]") };
        format!(
            "version = 3\n{head}{nri}[plugins.\"io.containerd.cri.v1.images\".pinned_images]\n  sandbox = \"{PAUSE}\"\n\
             [plugins.\"{cri}\"]\n{common}[plugins.\"{cri}\".cni]\n  {directories}\n  conf_dir = \"{at}/cni\"\n{}",
            handlers(cri)
        )
    }
}
