//! Seccomp profiles: compiled once by libseccomp, cached as the program that the kernel takes.
//!
//! Compiling a container engine's default profile takes some twenty milliseconds, more than all the
//! rest of starting a container, so the program is kept on disk under a hash of everything that makes
//! it what it is: the whole profile (every action's errno included), this module's revision and
//! libseccomp's version.

use std::fs;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use libseccomp::{ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall, ScmpVersion};
use oci_spec::runtime::{Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompFilterFlag, LinuxSeccompOperator};
use sha2::{Digest, Sha256};

use crate::error::{Context, Error, Result};

/// Changes whenever the same profile compiles to another program here.
const REVISION: u32 = 1;

/// Flags of `seccomp(2)`.
mod flag {
    pub(super) const LOG: u64 = 1 << 1;
    pub(super) const SPEC_ALLOW: u64 = 1 << 2;
    pub(super) const NEW_LISTENER: u64 = 1 << 3;
    pub(super) const WAIT_KILLABLE_RECV: u64 = 1 << 5;
}

/// A program and the flags to load it with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    /// `struct sock_filter`s.
    pub instructions: Vec<u8>,
    /// Flags of `seccomp(2)`.
    pub flags: u64,
    /// Some calls are answered by a listener.
    pub asks_listener: bool,
}

/// The program of a profile, out of the cache in `cache` or compiled and put there.
///
/// A cache that cannot be read or written is passed over: it only saves time.
pub fn program(profile: &LinuxSeccomp, cache: &Path) -> Result<Program> {
    let flags = load_flags(profile)?;
    let asks_listener = asks_listener(profile)?;
    let entry = cache.join(key(profile)?);
    if let Some(instructions) = read_trusted(&entry) {
        return Ok(Program { instructions, flags, asks_listener });
    }
    let instructions = compile(profile)?;
    if let Err(e) = store(cache, &entry, &instructions) {
        log::debug!("seccomp cache {}: {e}", entry.display());
    }
    Ok(Program { instructions, flags, asks_listener })
}

/// Whether a rule, or the default action, asks a listener.
///
/// # Errors
/// [`Error::InvalidSpec`] if somebody is to be asked and nobody is there. A listener that nobody asks is no harm, in
/// profiles that are made for several programs.
fn asks_listener(profile: &LinuxSeccomp) -> Result<bool> {
    let asks = profile.default_action() == LinuxSeccompAction::ScmpActNotify
        || profile.syscalls().iter().flatten().any(|rule| rule.action() == LinuxSeccompAction::ScmpActNotify);
    let path = profile.listener_path().as_deref().filter(|path| !path.as_os_str().is_empty());
    if asks && path.is_none() {
        return Err(Error::spec("linux.seccomp uses SCMP_ACT_NOTIFY and has no listenerPath"));
    }
    if !asks && path.is_some() {
        log::warn!("linux.seccomp.listenerPath is ignored: nothing uses SCMP_ACT_NOTIFY");
    }
    if profile.listener_metadata().as_ref().is_some_and(|text| !text.is_empty()) && path.is_none() {
        return Err(Error::spec("linux.seccomp.listenerMetadata is set without listenerPath"));
    }
    Ok(asks)
}

/// The version of libseccomp, which knows the system calls' names.
pub fn library_version() -> Option<String> {
    let version = ScmpVersion::current().ok()?;
    Some(format!("{}.{}.{}", version.major, version.minor, version.micro))
}

fn key(profile: &LinuxSeccomp) -> Result<String> {
    let canonical = serde_json::to_vec(profile).map_err(|e| Error::spec(format!("linux.seccomp: {e}")))?;
    let version = ScmpVersion::current().map_err(|e| Error::spec(format!("libseccomp: {e}")))?;
    let mut hash = Sha256::new();
    hash.update(format!("{REVISION} {} {} {}\n", version.major, version.minor, version.micro));
    hash.update(std::env::consts::ARCH);
    hash.update(&canonical);
    Ok(format!("{:x}", hash.finalize()))
}

/// The file's content, if it is one that only this user could have written.
fn read_trusted(path: &Path) -> Option<Vec<u8>> {
    let mut file = fs::OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(path).ok()?;
    let meta = file.metadata().ok()?;
    // SAFETY: geteuid cannot fail and touches no memory.
    let us = unsafe { libc::geteuid() };
    if !meta.is_file() || meta.uid() != us || meta.mode() & 0o022 != 0 || meta.len() == 0 || meta.len() % 8 != 0 {
        return None;
    }
    let mut data = Vec::with_capacity(meta.len() as usize);
    io::Read::read_to_end(&mut file, &mut data).ok()?;
    Some(data)
}

fn store(cache: &Path, entry: &Path, data: &[u8]) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(cache)?;
    let temporary = temporary_name(entry);
    let written = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&temporary)
        .and_then(|mut file| file.write_all(data))
        .and_then(|()| fs::rename(&temporary, entry));
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written
}

fn temporary_name(entry: &Path) -> PathBuf {
    let mut name = entry.as_os_str().to_owned();
    name.push(format!(".{}", std::process::id()));
    name.into()
}

fn load_flags(profile: &LinuxSeccomp) -> Result<u64> {
    let Some(flags) = profile.flags() else {
        // runc's default: without the flag the kernel turns speculation off for the whole container.
        return Ok(flag::SPEC_ALLOW);
    };
    let mut bits = 0;
    for wanted in flags {
        bits |= match wanted {
            LinuxSeccompFilterFlag::SeccompFilterFlagLog => flag::LOG,
            LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => flag::SPEC_ALLOW,
            // A container's process has one thread when its filter is loaded.
            LinuxSeccompFilterFlag::SeccompFilterFlagTsync => 0,
            LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => {
                if profile.listener_path().is_none() {
                    return Err(Error::spec(
                        "linux.seccomp.flags: SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV is for a listener, and \
                         listenerPath is not set",
                    ));
                }
                flag::WAIT_KILLABLE_RECV
            }
        };
    }
    Ok(bits)
}

fn action(action: LinuxSeccompAction, errno: Option<u32>) -> ScmpAction {
    let errno = errno.unwrap_or(libc::EPERM as u32);
    match action {
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => ScmpAction::KillThread,
        LinuxSeccompAction::ScmpActKillProcess => ScmpAction::KillProcess,
        LinuxSeccompAction::ScmpActTrap => ScmpAction::Trap,
        LinuxSeccompAction::ScmpActErrno => ScmpAction::Errno(errno as i32),
        LinuxSeccompAction::ScmpActTrace => ScmpAction::Trace(errno as u16),
        LinuxSeccompAction::ScmpActLog => ScmpAction::Log,
        LinuxSeccompAction::ScmpActAllow => ScmpAction::Allow,
        LinuxSeccompAction::ScmpActNotify => ScmpAction::Notify,
    }
}

/// The architectures that libseccomp knows and the runtime-spec names.
const ARCHITECTURES: &[(&str, Arch, ScmpArch)] = &[
    ("SCMP_ARCH_X86", Arch::ScmpArchX86, ScmpArch::X86),
    ("SCMP_ARCH_X86_64", Arch::ScmpArchX86_64, ScmpArch::X8664),
    ("SCMP_ARCH_X32", Arch::ScmpArchX32, ScmpArch::X32),
    ("SCMP_ARCH_ARM", Arch::ScmpArchArm, ScmpArch::Arm),
    ("SCMP_ARCH_AARCH64", Arch::ScmpArchAarch64, ScmpArch::Aarch64),
    ("SCMP_ARCH_MIPS", Arch::ScmpArchMips, ScmpArch::Mips),
    ("SCMP_ARCH_MIPS64", Arch::ScmpArchMips64, ScmpArch::Mips64),
    ("SCMP_ARCH_MIPS64N32", Arch::ScmpArchMips64n32, ScmpArch::Mips64N32),
    ("SCMP_ARCH_MIPSEL", Arch::ScmpArchMipsel, ScmpArch::Mipsel),
    ("SCMP_ARCH_MIPSEL64", Arch::ScmpArchMipsel64, ScmpArch::Mipsel64),
    ("SCMP_ARCH_MIPSEL64N32", Arch::ScmpArchMipsel64n32, ScmpArch::Mipsel64N32),
    ("SCMP_ARCH_PPC", Arch::ScmpArchPpc, ScmpArch::Ppc),
    ("SCMP_ARCH_PPC64", Arch::ScmpArchPpc64, ScmpArch::Ppc64),
    ("SCMP_ARCH_PPC64LE", Arch::ScmpArchPpc64le, ScmpArch::Ppc64Le),
    ("SCMP_ARCH_S390", Arch::ScmpArchS390, ScmpArch::S390),
    ("SCMP_ARCH_S390X", Arch::ScmpArchS390x, ScmpArch::S390X),
    ("SCMP_ARCH_PARISC", Arch::ScmpArchParisc, ScmpArch::Parisc),
    ("SCMP_ARCH_PARISC64", Arch::ScmpArchParisc64, ScmpArch::Parisc64),
    ("SCMP_ARCH_RISCV64", Arch::ScmpArchRiscv64, ScmpArch::Riscv64),
];

/// The names of the architectures that a profile may mention.
pub fn architectures() -> Vec<&'static str> {
    ARCHITECTURES.iter().map(|(name, ..)| *name).collect()
}

fn architecture(arch: Arch) -> Result<ScmpArch> {
    if arch == Arch::ScmpArchNative {
        return Ok(ScmpArch::native());
    }
    ARCHITECTURES.iter().find(|(_, known, _)| *known == arch).map(|(.., arch)| *arch).ok_or_else(|| {
        let field = format!("linux.seccomp architecture {arch:?}");
        Error::unsupported(field, "this libseccomp does not know it")
    })
}

fn comparison(op: LinuxSeccompOperator, value: u64, value_two: Option<u64>) -> (ScmpCompareOp, u64) {
    match op {
        LinuxSeccompOperator::ScmpCmpNe => (ScmpCompareOp::NotEqual, value),
        LinuxSeccompOperator::ScmpCmpLt => (ScmpCompareOp::Less, value),
        LinuxSeccompOperator::ScmpCmpLe => (ScmpCompareOp::LessOrEqual, value),
        LinuxSeccompOperator::ScmpCmpEq => (ScmpCompareOp::Equal, value),
        LinuxSeccompOperator::ScmpCmpGe => (ScmpCompareOp::GreaterEqual, value),
        LinuxSeccompOperator::ScmpCmpGt => (ScmpCompareOp::Greater, value),
        // The mask comes first in the spec, the value to compare with second.
        LinuxSeccompOperator::ScmpCmpMaskedEq => (ScmpCompareOp::MaskedEqual(value), value_two.unwrap_or(0)),
    }
}

/// Compiles a profile, past the cache: `struct sock_filter`s for [`load`].
///
/// # Errors
/// [`Error::InvalidSpec`] and [`Error::Unsupported`] for a profile that libseccomp refuses or does not know.
pub fn compile(profile: &LinuxSeccomp) -> Result<Vec<u8>> {
    let failed =
        |what: String| move |e: libseccomp::error::SeccompError| Error::spec(format!("linux.seccomp: {what}: {e}"));
    let default = action(profile.default_action(), profile.default_errno_ret());
    let mut filter = ScmpFilterContext::new(default).map_err(failed("default action".into()))?;
    // no_new_privs is the process's own setting, not the filter's.
    filter.set_ctl_nnp(false).map_err(failed("no_new_privs".into()))?;
    let mut architectures = vec![ScmpArch::native()];
    for arch in profile.architectures().iter().flatten() {
        let arch = architecture(*arch)?;
        filter.add_arch(arch).map_err(failed(format!("architecture {arch:?}")))?;
        if !architectures.contains(&arch) {
            architectures.push(arch);
        }
    }
    let mut newest = newest_known(&architectures);
    for rule in profile.syscalls().iter().flatten() {
        let chosen = action(rule.action(), rule.errno_ret());
        for name in rule.names() {
            newest.see(name);
            if chosen == default {
                // libseccomp refuses a rule that says what the default says.
                continue;
            }
            // Profiles name calls of many kernels and architectures; those unknown here cannot be made.
            let Ok(call) = ScmpSyscall::from_name(name) else { continue };
            add_rules(&mut filter, chosen, call, rule.args().as_deref().unwrap_or_default())
                .map_err(failed(format!("rule for {name}")))?;
        }
    }
    // SAFETY: the name is NUL-terminated.
    let file = crate::sys::owned(unsafe { libc::memfd_create(c"runx-bpf".as_ptr(), libc::MFD_CLOEXEC) }.into())
        .context("make a file for the seccomp program")?;
    filter.export_bpf(&file).map_err(failed("export".into()))?;
    let instructions = crate::sys::read_all(std::os::fd::AsFd::as_fd(&file)).context("read the seccomp program")?;
    Ok(newest.prepend_stub(default, instructions))
}

fn add_rules(
    filter: &mut ScmpFilterContext,
    action: ScmpAction,
    call: ScmpSyscall,
    args: &[oci_spec::runtime::LinuxSeccompArg],
) -> Result<(), libseccomp::error::SeccompError> {
    if args.is_empty() {
        return filter.add_rule(action, call).map(drop);
    }
    let comparators: Vec<ScmpArgCompare> = args
        .iter()
        .map(|arg| {
            let (op, datum) = comparison(arg.op(), arg.value(), arg.value_two());
            ScmpArgCompare::new(arg.index() as u32, op, datum)
        })
        .collect();
    // libseccomp takes each argument once a rule; as runc does, a repeated index means any of them.
    let repeated = (0..args.len()).any(|i| args[..i].iter().any(|other| other.index() == args[i].index()));
    if repeated {
        for comparator in comparators {
            filter.add_rule_conditional(action, call, &[comparator])?;
        }
        return Ok(());
    }
    filter.add_rule_conditional(action, call, &comparators).map(drop)
}

/// The newest system call that a profile mentions, an architecture at a time.
///
/// A profile cannot speak of calls made after it was written. Programs expect ENOSYS for a call that is
/// not there and fall back to an older one; the default action's EPERM they take for an answer. So
/// calls above the newest one that the profile names get ENOSYS, as runc does it.
struct Newest(Vec<(ScmpArch, i32)>);

fn newest_known(architectures: &[ScmpArch]) -> Newest {
    Newest(architectures.iter().map(|arch| (*arch, -1)).collect())
}

impl Newest {
    fn see(&mut self, name: &str) {
        for (arch, newest) in &mut self.0 {
            if let Ok(call) = ScmpSyscall::from_name_by_arch(name, *arch) {
                // x32 numbers carry a bit that is not part of the order.
                *newest = (*newest).max(i32::from(call) & !X32_BIT);
            }
        }
    }

    fn prepend_stub(&self, default: ScmpAction, program: Vec<u8>) -> Vec<u8> {
        if !matches!(default, ScmpAction::Errno(_)) {
            return program;
        }
        let mut out = Vec::with_capacity(program.len() + 128);
        for (arch, newest) in &self.0 {
            // x32 shares x86_64's audit number, and its calls are told by their bit.
            let Some(audit) = audit_number(*arch) else { continue };
            if *newest < 0 {
                continue;
            }
            let stub = [
                instruction(LOAD_WORD, 0, 0, ARCH_OFFSET),
                instruction(JUMP_EQUAL, 0, 4, audit),
                instruction(LOAD_WORD, 0, 0, NUMBER_OFFSET),
                instruction(JUMP_GREATER_EQUAL, 2, 0, X32_BIT as u32),
                instruction(JUMP_GREATER, 0, 1, *newest as u32),
                instruction(RETURN, 0, 0, RET_ERRNO | libc::ENOSYS as u32),
            ];
            out.extend(stub.iter().flatten());
        }
        out.extend(program);
        out
    }
}

const LOAD_WORD: u16 = 0x20;
const JUMP_EQUAL: u16 = 0x15;
const JUMP_GREATER: u16 = 0x25;
const JUMP_GREATER_EQUAL: u16 = 0x35;
const RETURN: u16 = 0x06;
const NUMBER_OFFSET: u32 = 0;
const ARCH_OFFSET: u32 = 4;
const RET_ERRNO: u32 = 0x0005_0000;
const X32_BIT: i32 = 0x4000_0000;

fn instruction(code: u16, jump_true: u8, jump_false: u8, k: u32) -> [u8; 8] {
    let mut bytes = [0u8; 8];
    bytes[..2].copy_from_slice(&code.to_ne_bytes());
    bytes[2] = jump_true;
    bytes[3] = jump_false;
    bytes[4..].copy_from_slice(&k.to_ne_bytes());
    bytes
}

/// `AUDIT_ARCH_*` of the architectures whose calls are numbered from zero.
fn audit_number(arch: ScmpArch) -> Option<u32> {
    match arch {
        ScmpArch::Native => audit_number(ScmpArch::native()),
        ScmpArch::X8664 => Some(0xc000_003e),
        ScmpArch::X86 => Some(0x4000_0003),
        ScmpArch::Aarch64 => Some(0xc000_00b7),
        ScmpArch::Arm => Some(0x4000_0028),
        ScmpArch::Riscv64 => Some(0xc000_00f3),
        ScmpArch::Ppc64Le => Some(0xc000_0015),
        ScmpArch::S390X => Some(0x8000_0016),
        _ => None,
    }
}

/// Loads a program for the calling thread and all that comes from it.
///
/// # Errors
/// EACCES without no_new_privs or `CAP_SYS_ADMIN`; EINVAL for a program the kernel refuses.
pub fn load(instructions: &[u8], flags: u64) -> Result<()> {
    install(instructions, flags).map(drop)
}

/// As [`load`], for a program that asks a listener: returns the listener's descriptor, close-on-exec.
///
/// # Errors
/// As for [`load`]; EBUSY if a filter with a listener is loaded already.
pub fn load_listening(instructions: &[u8], flags: u64) -> Result<OwnedFd> {
    let listener = install(instructions, flags | flag::NEW_LISTENER)?;
    crate::sys::owned(listener).context("load the seccomp filter")
}

fn install(instructions: &[u8], flags: u64) -> Result<libc::c_long> {
    const SECCOMP_SET_MODE_FILTER: libc::c_ulong = 1;
    let filters: Vec<libc::sock_filter> = instructions
        .chunks_exact(8)
        .map(|bytes| libc::sock_filter {
            code: u16::from_ne_bytes([bytes[0], bytes[1]]),
            jt: bytes[2],
            jf: bytes[3],
            k: u32::from_ne_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]),
        })
        .collect();
    let length = u16::try_from(filters.len())
        .map_err(|_| Error::spec("linux.seccomp: the compiled program is too long for the kernel"))?;
    let program = libc::sock_fprog { len: length, filter: filters.as_ptr().cast_mut() };
    // SAFETY: program points to as many filters as it says, and both live over the call.
    crate::sys::check(unsafe {
        libc::syscall(libc::SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &program as *const libc::sock_fprog)
    })
    .context("load the seccomp filter")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile(errno: u32) -> LinuxSeccomp {
        serde_json::from_value(serde_json::json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_ERRNO", "errnoRet": errno}]
        }))
        .unwrap()
    }

    #[test]
    fn profiles_that_differ_in_an_errno_only_have_keys_and_programs_of_their_own() {
        assert_ne!(key(&profile(1)).unwrap(), key(&profile(99)).unwrap());
        assert_ne!(compile(&profile(1)).unwrap(), compile(&profile(99)).unwrap());
    }

    #[test]
    fn the_second_use_of_a_profile_reads_the_cache() {
        let dir = std::env::temp_dir().join(format!("runx-seccomp-{}", std::process::id()));
        let first = program(&profile(5), &dir).unwrap();
        let entry = dir.join(key(&profile(5)).unwrap());
        // What the cache holds is what is used: a marked entry shows that nothing was compiled.
        let marked = [first.instructions.clone(), vec![0; 8]].concat();
        fs::write(&entry, &marked).unwrap();
        let second = program(&profile(5), &dir).unwrap();
        fs::remove_dir_all(&dir).unwrap();
        assert_eq!(second.instructions, marked);
    }

    #[test]
    fn an_entry_that_others_can_write_is_not_trusted() {
        use std::os::unix::fs::PermissionsExt;
        let dir = std::env::temp_dir().join(format!("runx-seccomp-w-{}", std::process::id()));
        let first = program(&profile(6), &dir).unwrap();
        let entry = dir.join(key(&profile(6)).unwrap());
        fs::write(&entry, [0; 16]).unwrap();
        fs::set_permissions(&entry, fs::Permissions::from_mode(0o666)).unwrap();
        let second = program(&profile(6), &dir).unwrap();
        fs::remove_dir_all(&dir).unwrap();
        assert_eq!(second, first);
    }

    #[test]
    fn calls_newer_than_the_profile_get_enosys_only_where_the_default_is_an_errno() {
        let allow = compile(&profile(1)).unwrap();
        let deny: LinuxSeccomp = serde_json::from_value(serde_json::json!({
            "defaultAction": "SCMP_ACT_ERRNO",
            "syscalls": [{"names": ["read", "openat2"], "action": "SCMP_ACT_ALLOW"}]
        }))
        .unwrap();
        let enosys = instruction(RETURN, 0, 0, RET_ERRNO | libc::ENOSYS as u32);
        let holds = |program: &[u8]| program.chunks(8).any(|i| i == enosys);
        assert!(!holds(&allow));
        assert!(holds(&compile(&deny).unwrap()));
    }
}
