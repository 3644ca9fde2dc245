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

/// Those of them that an old libseccomp does not know by name, which in a list of what is denied would allow them. All are
/// newer than number 424, from which on all architectures have the same numbers.
const DENIED_BY_NUMBER: [libc::c_long; 13] = [
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_open_tree,
    libc::SYS_move_mount,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_quotactl_fd,
    // open_tree_attr, which the libc crate does not have: 467.
    libc::SYS_mount_setattr + 25,
    libc::SYS_clone3,
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

/// Kinds of sockets that no namespace keeps inside, that speak to the machine below or to the kernel's keys and crypto, or
/// that load seldom used modules.
const FAMILIES: [libc::c_int; 5] = [libc::AF_VSOCK, libc::AF_ALG, libc::AF_RDS, libc::AF_TIPC, AF_QIPCRTR];

/// The libc crate does not have it for every C library.
const AF_QIPCRTR: libc::c_int = 42;

/// The kernel takes these arguments as 32 bits, whatever the register holds above them.
const WORD: u64 = 0xffff_ffff;

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
    let is =
        |index: u32, value: u64| json!({"index": index, "value": WORD, "valueTwo": value, "op": "SCMP_CMP_MASKED_EQ"});
    let errno = |names: Value, errno: i32, args: Value| json!({"names": names, "action": "SCMP_ACT_ERRNO", "errnoRet": errno, "args": args});
    // As from a kernel without them, which programs know how to take. libseccomp also refuses a 32-bit program's socketcall to
    // make a socket, whose arguments lie in memory.
    rules.extend(
        FAMILIES
            .iter()
            .map(|family| errno(json!(["socket", "socketpair"]), libc::EAFNOSUPPORT, json!([is(0, *family as u64)]))),
    );
    // It is 1 as long as nobody lowers it: see `limit_core_files`.
    let core = u64::from(libc::RLIMIT_CORE);
    rules.push(errno(json!(["setrlimit"]), libc::EPERM, json!([is(0, core)])));
    let given = json!({"index": 2, "value": 0, "op": "SCMP_CMP_NE"});
    rules.push(errno(json!(["prlimit64"]), libc::EPERM, json!([is(1, core), given])));
    // Its flags lie in memory. The C library goes back to clone.
    rules.push(json!({"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": libc::ENOSYS}));
    let architectures = if cfg!(target_arch = "x86_64") { json!(["SCMP_ARCH_X86"]) } else { json!([]) };
    let profile = json!({"defaultAction": "SCMP_ACT_ALLOW", "architectures": architectures, "syscalls": rules});
    let profile: oci_spec::runtime::LinuxSeccomp = serde_json::from_value(profile)
        .map_err(|e| Error::Template { field: "filter", reason: format!("the profile cannot be read: {e}") })?;
    let denied = if filter == Filter::Kill { libc::SECCOMP_RET_KILL_PROCESS } else { errno_of(libc::EPERM) };
    Ok([by_number(denied), seccomp::compile(&profile)?].concat())
}

fn errno_of(errno: i32) -> u32 {
    libc::SECCOMP_RET_ERRNO | errno as u32
}

/// What comes before the rest: refuses [`DENIED_BY_NUMBER`], on whatever architecture the call is made.
fn by_number(denied: u32) -> Vec<u8> {
    const LOAD_WORD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    const JUMP_EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    const JUMP_GREATER_EQUAL: u32 = libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K;
    const RETURN: u32 = libc::BPF_RET | libc::BPF_K;
    let mut program = Vec::new();
    let mut add = |code: u32, jt: u8, jf: u8, k: u32| {
        program.extend((code as u16).to_ne_bytes());
        program.extend([jt, jf]);
        program.extend(k.to_ne_bytes());
    };
    let first = DENIED_BY_NUMBER.iter().min().copied().unwrap_or(0);
    // The number is the first word of what a filter sees. Most are below all of these.
    add(LOAD_WORD, 0, 0, 0);
    add(JUMP_GREATER_EQUAL, 0, 2 * DENIED_BY_NUMBER.len() as u8, first as u32);
    for number in DENIED_BY_NUMBER {
        add(JUMP_EQUAL, 0, 1, number as u32);
        add(RETURN, 0, 0, if number == libc::SYS_clone3 { errno_of(libc::ENOSYS) } else { denied });
    }
    program
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

    /// What the kernel would do: runs a program for a call, and returns its verdict.
    fn verdict(program: &[u8], arch: u32, number: libc::c_long, args: [u64; 3]) -> u32 {
        let mut data = [(number as u32).to_ne_bytes(), arch.to_ne_bytes()].concat();
        data.extend([0; 8]);
        data.extend(args.iter().chain(&[0; 3]).flat_map(|arg| arg.to_ne_bytes()));
        let program = instructions(program);
        let (mut at, mut a) = (0usize, 0u32);
        loop {
            let libc::sock_filter { code, jt, jf, k } = program[at];
            at += 1;
            let mut jump = |taken: bool| at += usize::from(if taken { jt } else { jf });
            match code {
                0x20 => a = u32::from_ne_bytes(data[k as usize..k as usize + 4].try_into().unwrap()),
                0x05 => at += k as usize,
                0x15 => jump(a == k),
                0x25 => jump(a > k),
                0x35 => jump(a >= k),
                0x45 => jump(a & k != 0),
                0x54 => a &= k,
                0x06 => return k,
                _ => panic!("instruction {code:#x}"),
            }
        }
    }

    const ALLOWED: u32 = 0x7fff_0000;

    fn refused(errno: i32) -> u32 {
        0x0005_0000 | errno as u32
    }

    #[cfg(target_arch = "x86_64")]
    const NATIVE: u32 = 0xc000_003e;
    #[cfg(target_arch = "aarch64")]
    const NATIVE: u32 = 0xc000_00b7;

    #[test]
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    fn sockets_to_elsewhere_cannot_be_made_and_others_can() {
        for filter in [Filter::Deny, Filter::Kill] {
            let program = compile(filter).unwrap();
            let make = |number, family: u64| verdict(&program, NATIVE, number, [family, 1, 0]);
            for number in [libc::SYS_socket, libc::SYS_socketpair] {
                for family in [40, 38, 21, 30, 42, 40 | 7 << 32] {
                    assert_eq!(make(number, family), refused(libc::EAFNOSUPPORT), "{filter:?} {family:#x}");
                }
                for family in [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK] {
                    assert_eq!(make(number, family as u64), ALLOWED, "{filter:?} {family}");
                }
            }
            #[cfg(target_arch = "x86_64")]
            {
                const X86: u32 = 0x4000_0003;
                const SOCKETCALL: libc::c_long = 102;
                // To make a socket or a pair, and to connect one that came from elsewhere.
                for (call, expected) in
                    [(1, refused(libc::EAFNOSUPPORT)), (8, refused(libc::EAFNOSUPPORT)), (3, ALLOWED)]
                {
                    assert_eq!(verdict(&program, X86, SOCKETCALL, [call, 0, 0]), expected, "{filter:?} {call}");
                }
                assert_eq!(verdict(&program, X86, 359, [40, 1, 0]), refused(libc::EAFNOSUPPORT), "{filter:?}");
                assert_eq!(verdict(&program, X86, 359, [1, 1, 0]), ALLOWED, "{filter:?}");
            }
        }
    }

    #[test]
    fn new_calls_are_refused_though_libseccomp_may_not_know_them() {
        // As if it knew none, and allowed all.
        let mut program = by_number(refused(libc::EPERM));
        program.extend(6u16.to_ne_bytes().iter().chain(&[0, 0]).chain(&ALLOWED.to_ne_bytes()));
        for number in DENIED_BY_NUMBER {
            let errno = if number == libc::SYS_clone3 { libc::ENOSYS } else { libc::EPERM };
            assert_eq!(verdict(&program, 0, number, [0; 3]), refused(errno), "{number}");
        }
        for number in [0, libc::SYS_pidfd_open, libc::SYS_openat2, libc::SYS_mount_setattr + 26, 0x4000_0000] {
            assert_eq!(verdict(&program, 0, number, [0; 3]), ALLOWED, "{number}");
        }
        #[cfg(target_arch = "x86_64")]
        for (filter, denied) in [(Filter::Deny, refused(libc::EPERM)), (Filter::Kill, libc::SECCOMP_RET_KILL_PROCESS)] {
            let program = compile(filter).unwrap();
            for arch in [NATIVE, 0x4000_0003] {
                assert_eq!(verdict(&program, arch, libc::SYS_io_uring_setup, [0; 3]), denied);
                assert_eq!(verdict(&program, arch, 467, [0; 3]), denied);
                assert_eq!(verdict(&program, arch, libc::SYS_clone3, [0; 3]), refused(libc::ENOSYS));
            }
        }
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn the_limit_of_core_files_cannot_be_changed() {
        let core = u64::from(libc::RLIMIT_CORE);
        for filter in [Filter::Deny, Filter::Kill] {
            let program = compile(filter).unwrap();
            // With 32 bits, the numbers of setrlimit and prlimit64 are these.
            for (arch, set, both) in [(NATIVE, libc::SYS_setrlimit, libc::SYS_prlimit64), (0x4000_0003, 75, 340)] {
                assert_eq!(verdict(&program, arch, set, [core, 1, 0]), refused(libc::EPERM));
                assert_eq!(verdict(&program, arch, set, [core + 1, 1, 0]), ALLOWED);
                assert_eq!(verdict(&program, arch, both, [0, core, 1]), refused(libc::EPERM));
                assert_eq!(verdict(&program, arch, both, [0, core, 0]), ALLOWED);
                assert_eq!(verdict(&program, arch, both, [0, core + 1, 1]), ALLOWED);
            }
            let set = |args| verdict(&program, NATIVE, libc::SYS_prlimit64, args);
            assert_eq!(set([0, core | 1 << 32, 1]), refused(libc::EPERM));
            assert_eq!(set([0, core, 1 << 32]), refused(libc::EPERM));
        }
    }
}
