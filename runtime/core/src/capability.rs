//! Capabilities by name and number, capabilities(7).

use oci_spec::runtime::{Capabilities, LinuxCapabilities};

use crate::plan::CapabilitySets;

/// In the order of the kernel's numbers.
const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// `CAP_SYS_ADMIN` as a bit.
pub(crate) const SYS_ADMIN: u64 = 1 << 21;

/// The bit of a capability; the name may carry the `CAP_` prefix, in any case.
pub(crate) fn bit(name: &str) -> Option<u64> {
    let upper = name.to_ascii_uppercase();
    let short = upper.strip_prefix("CAP_").unwrap_or(&upper);
    NAMES.iter().position(|known| *known == short).map(|number| 1 << number)
}

/// The name of a capability by its number.
pub(crate) fn name(number: libc::c_ulong) -> String {
    let known = usize::try_from(number).ok().and_then(|number| NAMES.get(number));
    known.map_or_else(|| format!("capability {number}"), |name| format!("CAP_{name}"))
}

/// All names with their prefix.
pub(crate) fn names() -> Vec<String> {
    NAMES.iter().map(|name| format!("CAP_{name}")).collect()
}

fn mask(set: Option<&Capabilities>) -> u64 {
    set.into_iter().flatten().filter_map(|capability| bit(&capability.to_string())).fold(0, |mask, bit| mask | bit)
}

/// The sets of config.json as masks.
pub(crate) fn sets(capabilities: &LinuxCapabilities) -> CapabilitySets {
    CapabilitySets {
        bounding: mask(capabilities.bounding().as_ref()),
        effective: mask(capabilities.effective().as_ref()),
        inheritable: mask(capabilities.inheritable().as_ref()),
        permitted: mask(capabilities.permitted().as_ref()),
        ambient: mask(capabilities.ambient().as_ref()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_the_kernels() {
        assert_eq!(bit("CAP_CHOWN"), Some(1));
        assert_eq!(bit("cap_sys_admin"), Some(SYS_ADMIN));
        assert_eq!(bit("CHECKPOINT_RESTORE"), Some(1 << 40));
        assert_eq!(bit("CAP_NO_SUCH"), None);
    }

    #[test]
    fn every_name_of_the_spec_crate_has_a_number() {
        let all: Capabilities =
            NAMES.iter().map(|name| serde_json::from_value(format!("CAP_{name}").into()).unwrap()).collect();
        assert_eq!(all.len(), NAMES.len());
        assert_eq!(mask(Some(&all)), (1 << NAMES.len()) - 1);
    }
}
