//! The default seccomp filter.
//!
//! It allows everything but what no program of a sandbox needs, and what the kernel's worst days came from. It is
//! compiled once for a pool, and but for the wipe tier the init of a sandbox takes it upon itself ahead of time, so that
//! an execution only inherits it.

use runx_core::seccomp;
use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::template::Filter;

/// Calls that are denied whatever their arguments are.
const DENIED: &[&str] = &[
    // Keys outlive processes.
    "add_key",
    "keyctl",
    "request_key",
    // Mounts.
    "fsconfig",
    "fsmount",
    "fsopen",
    "fspick",
    "mount",
    "mount_setattr",
    "move_mount",
    "open_tree",
    "open_tree_attr",
    "pivot_root",
    "umount",
    "umount2",
    "chroot",
    // Namespaces.
    "setns",
    "unshare",
    // What has the kernel run or load something.
    "bpf",
    "create_module",
    "delete_module",
    "finit_module",
    "init_module",
    "kexec_file_load",
    "kexec_load",
    // What looks at others, or at the kernel.
    "fanotify_init",
    "lookup_dcookie",
    "name_to_handle_at",
    "open_by_handle_at",
    "perf_event_open",
    "syslog",
    "userfaultfd",
    // Asynchronous calls, which no filter sees.
    "io_uring_enter",
    "io_uring_register",
    "io_uring_setup",
    // The machine's own settings.
    "acct",
    "adjtimex",
    "clock_adjtime",
    "clock_settime",
    "ioperm",
    "iopl",
    "nfsservctl",
    "quotactl",
    "quotactl_fd",
    "reboot",
    "setdomainname",
    "sethostname",
    "settimeofday",
    "stime",
    "swapoff",
    "swapon",
    "uselib",
    "vhangup",
];

/// Flags of clone(2) that make namespaces. `CLONE_NEWTIME` is none of these: its bit belongs to the exit signal there.
const NEW_NAMESPACES: [libc::c_int; 7] = [
    libc::CLONE_NEWNS,
    libc::CLONE_NEWCGROUP,
    libc::CLONE_NEWUTS,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWNET,
];

/// The program for the kernel; empty without a filter.
pub(crate) fn compile(filter: Filter) -> Result<Vec<u8>> {
    let action = match filter {
        Filter::Off => return Ok(Vec::new()),
        Filter::Deny => json!({"action": "SCMP_ACT_ERRNO", "errnoRet": libc::EPERM}),
        Filter::Kill => json!({"action": "SCMP_ACT_KILL_PROCESS"}),
    };
    let rule = |names: Value, args: Value| {
        let mut rule = action.clone();
        rule["names"] = names;
        rule["args"] = args;
        rule
    };
    // On s390 the first two arguments of clone are the other way round.
    let index = if cfg!(target_arch = "s390x") { 1 } else { 0 };
    let mut rules = vec![rule(json!(DENIED), json!([]))];
    rules.extend(NEW_NAMESPACES.iter().map(|flag| {
        let arg = json!({"index": index, "value": flag, "valueTwo": flag, "op": "SCMP_CMP_MASKED_EQ"});
        rule(json!(["clone"]), json!([arg]))
    }));
    // Its flags lie in memory. The C library goes back to clone.
    rules.push(json!({"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": libc::ENOSYS}));
    let architectures = if cfg!(target_arch = "x86_64") { json!(["SCMP_ARCH_X86"]) } else { json!([]) };
    let profile = json!({"defaultAction": "SCMP_ACT_ALLOW", "architectures": architectures, "syscalls": rules});
    let profile: oci_spec::runtime::LinuxSeccomp = serde_json::from_value(profile)
        .map_err(|e| Error::Template { field: "filter", reason: format!("the profile cannot be read: {e}") })?;
    Ok(seccomp::compile(&profile)?)
}

/// The program as the kernel takes it. It has to outlive its loading.
pub(crate) fn instructions(program: &[u8]) -> Vec<libc::sock_filter> {
    program
        .chunks_exact(size_of::<libc::sock_filter>())
        .map(|bytes| libc::sock_filter {
            code: u16::from_ne_bytes([bytes[0], bytes[1]]),
            jt: bytes[2],
            jf: bytes[3],
            k: u32::from_ne_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_of_the_filter_is_a_program_that_the_kernel_would_take() {
        assert!(compile(Filter::Off).unwrap().is_empty());
        let deny = compile(Filter::Deny).unwrap();
        let kill = compile(Filter::Kill).unwrap();
        assert_ne!(deny, kill);
        for program in [deny, kill] {
            let length = instructions(&program).len();
            assert!(length > 50 && length < 4096, "{length}");
        }
    }
}
