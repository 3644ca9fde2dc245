//! Capabilities, and what is hidden of the kernel.

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use crate::container::options::Options;
use crate::container_defaults::{CAPABILITIES, MASKED_PATHS, READONLY_PATHS};

/// All capabilities in the order of their numbers, capabilities(7).
const NAMES: [&str; 41] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

/// All that this process could give.
pub(in crate::container) fn all_capabilities() -> Result<Vec<String>> {
    let (_, permitted, _) = runx_core::sys::capabilities::get().context("read this process's capabilities")?;
    let own = NAMES.iter().enumerate().filter(|(number, _)| permitted & (1 << number) != 0);
    Ok(own.map(|(_, name)| (*name).to_owned()).collect())
}

/// The capabilities that are asked for: docker's, with what is added and without what is dropped.
pub(super) fn wanted(options: &Options) -> Result<Vec<String>> {
    let all = |list: &[String]| list.iter().any(|name| name == "ALL");
    let mut set: Vec<String> = if options.privileged || all(&options.cap_add) {
        all_capabilities()?
    } else if all(&options.cap_drop) {
        Vec::new()
    } else {
        CAPABILITIES.iter().map(|name| (*name).to_owned()).collect()
    };
    for name in options.cap_add.iter().filter(|name| *name != "ALL") {
        if !set.contains(name) {
            set.push(name.clone());
        }
    }
    set.retain(|name| !options.cap_drop.contains(name));
    Ok(set)
}

/// `process.capabilities`. Who is not root gets none at first, as after any exec, but programs may raise them.
pub(super) fn capabilities(options: &Options, is_root: bool) -> Result<Value> {
    let set = wanted(options)?;
    let at_first = if is_root { set.as_slice() } else { &[] };
    Ok(json!({"bounding": set, "effective": at_first, "permitted": at_first, "inheritable": [], "ambient": []}))
}

/// Hides parts of /proc and /sys, and names security profiles.
pub(super) fn add(options: &Options, config: &mut Value) {
    if !options.privileged {
        config["linux"]["maskedPaths"] = json!(MASKED_PATHS);
        config["linux"]["readonlyPaths"] = json!(READONLY_PATHS);
    }
    if let Some(profile) = options.security.apparmor.as_ref().filter(|profile| *profile != "unconfined") {
        config["process"]["apparmorProfile"] = json!(profile);
    }
    if let Some(label) = &options.security.label {
        config["process"]["selinuxLabel"] = json!(label);
    }
}
