//! `spec`: a config.json to begin with.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, bail};
use serde_json::json;

use crate::Failure;
use crate::container_defaults::{self, seccomp};

/// Capabilities that the example keeps, as runc's does.
const CAPABILITIES: [&str; 3] = ["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"];

/// `runx spec`.
pub(crate) fn spec(bundle: Option<PathBuf>, rootless: bool, defaults: bool) -> Result<u8, Failure> {
    let path = bundle.unwrap_or_default().join("config.json");
    let write = || -> anyhow::Result<()> {
        if path.exists() {
            bail!("File {} exists. Remove it first", path.display());
        }
        let mut config = example();
        if defaults {
            set_defaults(&mut config);
        }
        if rootless {
            make_rootless(&mut config);
        }
        let text = serde_json::to_string_pretty(&config).context("write config.json")?;
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&path)
            .and_then(|mut file| file.write_all(format!("{text}\n").as_bytes()))
            .with_context(|| format!("write {}", path.display()))
    };
    write()?;
    Ok(0)
}

/// Changes the example to what `runx container run` gives, which keeps more and has a seccomp profile.
fn set_defaults(config: &mut serde_json::Value) {
    let kept = container_defaults::CAPABILITIES;
    config["process"]["capabilities"] = json!({"bounding": kept, "effective": kept, "permitted": kept});
    config["process"]["noNewPrivileges"] = json!(false);
    config["root"]["readonly"] = json!(false);
    config["linux"]["maskedPaths"] = json!(container_defaults::MASKED_PATHS);
    config["linux"]["readonlyPaths"] = json!(container_defaults::READONLY_PATHS);
    config["linux"]["seccomp"] = json!(seccomp::default_profile(kept));
}

/// Changes the example so that somebody who is not root can run it: in a user namespace where he is root, on the
/// host's network, with the host's /sys and without limits.
fn make_rootless(config: &mut serde_json::Value) {
    // SAFETY: geteuid and getegid cannot fail and touch no memory.
    let (user, group) = unsafe { (libc::geteuid(), libc::getegid()) };
    let linux = &mut config["linux"];
    if let Some(namespaces) = linux["namespaces"].as_array_mut() {
        namespaces.retain(|namespace| namespace["type"] != "network");
        namespaces.push(json!({"type": "user"}));
    }
    linux["uidMappings"] = json!([{"containerID": 0, "hostID": user, "size": 1}]);
    linux["gidMappings"] = json!([{"containerID": 0, "hostID": group, "size": 1}]);
    if let Some(linux) = linux.as_object_mut() {
        linux.remove("resources");
    }
    for mount in config["mounts"].as_array_mut().into_iter().flatten() {
        if mount["destination"] == "/sys" {
            *mount = json!({"destination": "/sys", "type": "none", "source": "/sys",
                            "options": ["rbind", "nosuid", "noexec", "nodev", "ro"]});
        }
        // Other users and groups have no number in the namespace.
        if let Some(options) = mount["options"].as_array_mut() {
            options.retain(|option| !option.as_str().is_some_and(|o| o.starts_with("gid=") || o.starts_with("uid=")));
        }
    }
}

/// A shell on a read-only root, in namespaces of its own and with few capabilities: what `runc spec`
/// gives.
fn example() -> serde_json::Value {
    json!({
        "ociVersion": "1.3.0",
        "process": {
            "terminal": true,
            "user": {"uid": 0, "gid": 0},
            "args": ["sh"],
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm"],
            "cwd": "/",
            "capabilities": {
                "bounding": CAPABILITIES,
                "effective": CAPABILITIES,
                "permitted": CAPABILITIES
            },
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": true
        },
        "root": {"path": "rootfs", "readonly": true},
        "hostname": "runx",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
             "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
             "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs",
             "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
             "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]}
        ],
        "linux": {
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "namespaces": [
                {"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"},
                {"type": "cgroup"}
            ],
            "maskedPaths": [
                "/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
                "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/sys/firmware", "/proc/scsi"
            ],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
        }
    })
}
