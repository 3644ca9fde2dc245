//! Capabilities of one process.

use std::io;

/// By their numbers, from 0.
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

/// Version 3 of the system calls' structures.
const VERSION: u32 = 0x2008_0522;

#[repr(C)]
struct Header {
    version: u32,
    pid: libc::c_int,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Data {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// A set of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Set(u64);

impl Set {
    /// Of names, with or without `CAP_`; `ALL` is all of the daemon's own.
    ///
    /// # Errors
    /// A name that is none.
    pub fn of(names: &[String]) -> io::Result<Self> {
        let mut bits = 0;
        for name in names {
            let upper = name.to_uppercase();
            let short = upper.strip_prefix("CAP_").unwrap_or(&upper);
            bits |= match NAMES.iter().position(|known| *known == short) {
                Some(number) => 1 << number,
                None if short == "ALL" => Self::own().0,
                None => {
                    let text = format!("capabilities: {name:?} is not a capability");
                    return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
                }
            };
        }
        Ok(Self(bits))
    }

    /// The daemon's own.
    pub fn own() -> Self {
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
        let bits = status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("CapPrm:")?.trim(), 16).ok());
        Self(bits.unwrap_or(0))
    }

    /// All that the kernel has.
    pub fn all() -> Self {
        let last = std::fs::read_to_string("/proc/sys/kernel/cap_last_cap").ok();
        let last: u32 = last.and_then(|text| text.trim().parse().ok()).unwrap_or(NAMES.len() as u32 - 1);
        Self(u64::MAX >> (63 - last.min(63)))
    }

    /// None.
    pub const NONE: Self = Self(0);

    /// These without the one that undoes mounts.
    pub fn without_mounting(self) -> Self {
        const SYS_ADMIN: u32 = 21;
        Self(self.0 & !(1 << SYS_ADMIN))
    }

    /// Their names.
    pub fn names(self) -> Vec<String> {
        let all = NAMES.iter().enumerate().filter(|(number, _)| self.0 & (1 << number) != 0);
        all.map(|(_, name)| format!("CAP_{name}")).collect()
    }

    /// The first that another set does not have.
    pub fn without(self, other: Self) -> Option<String> {
        Self(self.0 & !other.0).names().into_iter().next()
    }

    /// Takes all others out of the bounding set, and lets these outlive a change of the user. Between fork and exec.
    pub(super) fn bound(&self) -> io::Result<()> {
        for number in 0..64_u64 {
            // SAFETY: takes numbers.
            let known = unsafe { libc::prctl(libc::PR_CAPBSET_READ, number, 0, 0, 0) };
            if known < 0 {
                break;
            }
            if known == 0 || self.0 & (1 << number) != 0 {
                continue;
            }
            // SAFETY: as above.
            if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, number, 0, 0, 0) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        // SAFETY: takes numbers.
        match unsafe { libc::prctl(libc::PR_SET_KEEPCAPS, 1, 0, 0, 0) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Has these and no others, also after exec as whoever. In a user namespace of its own a process has those of that.
    /// Between fork and exec.
    pub(super) fn take(&self, own_namespace: bool) -> io::Result<()> {
        if own_namespace {
            // It has begun with all of them, and root gets what the bounding set has at exec.
            self.bound()?;
        }
        let header = Header { version: VERSION, pid: 0 };
        let part = |shift: u32| {
            let bits = (self.0 >> shift) as u32;
            Data { effective: bits, permitted: bits, inheritable: bits }
        };
        let data = [part(0), part(32)];
        // SAFETY: both pointers are to locals of the forms that this version of the call reads.
        if unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: takes numbers.
        if unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) } != 0 {
            return Err(io::Error::last_os_error());
        }
        if own_namespace {
            return Ok(());
        }
        for number in (0..64_u64).filter(|number| self.0 & (1 << number) != 0) {
            // SAFETY: as above.
            if unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE, number, 0, 0) } != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_may_mount_loses_that_and_nothing_else() {
        let sys_admin = Set::of(&["SYS_ADMIN".to_owned()]).unwrap();
        assert_eq!(sys_admin.without_mounting(), Set::NONE);
        assert_eq!(Set::all().without_mounting().0 | sys_admin.0, Set::all().0);
    }

    #[test]
    fn names_are_those_of_the_kernel() {
        let set = |names: &[&str]| Set::of(&names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>());
        assert_eq!(set(&["CAP_CHOWN", "kill"]).unwrap(), Set(0b10_0001));
        assert_eq!(set(&["CHECKPOINT_RESTORE"]).unwrap(), Set(1 << 40));
        assert_eq!(set(&["CAP_KILL"]).unwrap().without(set(&["CHOWN"]).unwrap()).as_deref(), Some("CAP_KILL"));
        assert!(set(&["CAP_NONSENSE"]).unwrap_err().to_string().contains("NONSENSE"));
    }
}
