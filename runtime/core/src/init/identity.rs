//! Who the process is and where it stands: limits, user, groups, working directory.

use std::collections::HashSet;
use std::ffi::CString;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;

use super::capabilities;
use crate::error::{Context, Error, Result};
use crate::plan::ProcessPlan;
use crate::sys::{self, process::prctl};

/// Room for the descriptors that the remaining steps open.
const WORKING_FILES: u64 = 64;

/// Becomes the root of its user namespace, where that has one: files that are made from here on belong to it.
pub(super) fn become_root() -> Result<()> {
    let failed = |e: nix::errno::Errno| (e != nix::errno::Errno::EINVAL).then_some(e);
    // EINVAL: the namespace's mappings leave root out.
    if let Some(e) = nix::unistd::setresgid(0.into(), 0.into(), 0.into()).err().and_then(failed) {
        return Err(e).context("become the root group of the user namespace");
    }
    if let Some(e) = nix::unistd::setresuid(0.into(), 0.into(), 0.into()).err().and_then(failed) {
        return Err(e).context("become root of the user namespace");
    }
    // A change of user makes a process readable for others again where it was not.
    sys::process::set_undumpable().context("hide the process's memory")
}

/// Gives the process a session keyring of its own, so that it cannot read its starter's keys. An exec finds the
/// container's by its name, which the first process allows its user.
pub(super) fn join_session_keyring(name: &str) -> Result<()> {
    const KEYCTL_JOIN_SESSION_KEYRING: libc::c_long = 1;
    let name = CString::new(name).map_err(|_| Error::spec("the container's id holds a NUL byte"))?;
    // SAFETY: the name is NUL-terminated.
    let joined = unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, name.as_ptr()) };
    match sys::check(joined) {
        // A kernel without keyrings has no keys to hide.
        Err(e) if e.raw_os_error() == Some(libc::ENOSYS) => Ok(()),
        Err(e) => Err(e).context("join a new session keyring"),
        Ok(keyring) => {
            allow_search(keyring);
            Ok(())
        }
    }
}

/// Adds the permission to search a keyring for its owner's other processes. Where that fails, an exec gets a keyring
/// of its own.
fn allow_search(keyring: libc::c_long) {
    const KEYCTL_SETPERM: libc::c_long = 5;
    // All for who possesses it; view, read, search and link for its user.
    const PERMISSIONS: libc::c_long = 0x3f1b_0000;
    // SAFETY: only integers are passed.
    unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_SETPERM, keyring, PERMISSIONS) };
}

fn set_limit(resource: u32, soft: u64, hard: u64) -> Result<()> {
    let limit = libc::rlimit64 { rlim_cur: soft, rlim_max: hard };
    // SAFETY: limit is a valid rlimit64.
    sys::check(unsafe { libc::setrlimit64(resource as _, &limit) }.into())
        .with_context(|| format!("set rlimit {} to {soft}:{hard}", limit_name(resource)))
        .map(drop)
}

fn limit_name(resource: u32) -> String {
    crate::container::rlimit_name(resource).map_or_else(|| resource.to_string(), str::to_owned)
}

/// Resource limits. The soft limit on open files comes last, in [`set_final_file_limit`].
pub(super) fn set_limits(limits: &[(u32, u64, u64)]) -> Result<()> {
    for (resource, soft, hard) in limits {
        let soft = if *resource == libc::RLIMIT_NOFILE { (*soft).max(WORKING_FILES.min(*hard)) } else { *soft };
        set_limit(*resource, soft, *hard)?;
    }
    Ok(())
}

/// The soft limit on open files as config.json has it.
pub(super) fn set_final_file_limit(limits: &[(u32, u64, u64)]) -> Result<()> {
    for (resource, soft, hard) in limits {
        if *resource == libc::RLIMIT_NOFILE {
            set_limit(*resource, *soft, *hard)?;
        }
    }
    Ok(())
}

/// User, groups, umask and capabilities. Everything stays permitted until the last step.
pub(super) fn become_user(process: &ProcessPlan) -> Result<()> {
    capabilities::drop_bounding(process)?;
    prctl(libc::PR_SET_KEEPCAPS, 1, 0, 0).context("keep capabilities over the change of user")?;
    let groups: Vec<nix::unistd::Gid> = process.groups.iter().map(|gid| (*gid).into()).collect();
    if !process.keep_groups {
        nix::unistd::setgroups(&groups)
            .with_context(|| format!("set the supplementary groups to {:?}", process.groups))?;
    } else if !process.groups.is_empty() {
        return Err(Error::unsupported(
            "process.user.additionalGids",
            "in this user namespace nobody may change his groups: it takes gidMappings written by newgidmap",
        ));
    }
    let gid = process.gid.into();
    nix::unistd::setresgid(gid, gid, gid).with_context(|| format!("become group {}", process.gid))?;
    let uid = process.uid.into();
    nix::unistd::setresuid(uid, uid, uid).with_context(|| format!("become user {}", process.uid))?;
    // A change of user makes a process readable for others again where it was not.
    sys::process::set_undumpable().context("hide the process's memory")?;
    // SAFETY: umask cannot fail and touches no memory.
    unsafe { libc::umask(process.umask.unwrap_or(0o022) as libc::mode_t) };
    if process.no_new_privileges {
        prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0).context("set no_new_privs")?;
    }
    capabilities::look_as_program(process)
}

/// Changes to the working directory.
pub(super) fn enter_directory(path: &str) -> Result<()> {
    nix::unistd::chdir(path).with_context(|| format!("chdir to cwd ({path:?}) set in config.json failed"))
}

/// Refuses a working directory outside of the root, which a descriptor leaked through /proc/self/fd
/// would be (CVE-2024-21626).
pub(super) fn check_directory(path: &str) -> Result<()> {
    // The system call, and not the library's function: that hides the kernel's "(unreachable)".
    let mut buffer = [0u8; libc::PATH_MAX as usize];
    // SAFETY: the buffer is valid for its length.
    let length = unsafe { libc::syscall(libc::SYS_getcwd, buffer.as_mut_ptr(), buffer.len()) };
    match sys::check(length) {
        Ok(_) if buffer[0] == b'/' => Ok(()),
        Ok(_) => Err(Error::Init {
            message: format!("process.cwd {path:?} is outside of the container's root"),
            errno: libc::ENOENT,
        }),
        Err(e) => Err(e).with_context(|| format!("find process.cwd {path:?}")),
    }
}

/// Leaves one variable of each name, the last one, and adds `HOME` from the container's /etc/passwd if it is missing
/// or empty, as runc does.
pub(super) fn complete_environment(process: &mut ProcessPlan) {
    let mut seen = HashSet::new();
    let mut environment: Vec<String> = std::mem::take(&mut process.env);
    environment.reverse();
    environment.retain(|variable| seen.insert(variable.split('=').next().unwrap_or_default().to_owned()));
    environment.reverse();
    environment.retain(|variable| variable != "HOME=");
    if !environment.iter().any(|variable| variable.starts_with("HOME=")) {
        let home = home_of(process.uid).unwrap_or_else(|| "/".to_owned());
        environment.push(format!("HOME={home}"));
    }
    process.env = environment;
}

fn home_of(uid: u32) -> Option<String> {
    // Whatever an image put there: no device or FIFO is waited for, and no endless file is read.
    let file = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open("/etc/passwd")
        .ok()?;
    if !file.metadata().ok()?.is_file() {
        return None;
    }
    let mut text = String::new();
    file.take(1 << 20).read_to_string(&mut text).ok()?;
    text.lines().find_map(|line| {
        let mut fields = line.split(':').skip(2);
        let of = fields.next()?.parse::<u32>().ok()?;
        (of == uid).then(|| fields.nth(2).unwrap_or("/").to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn completed(env: &[&str]) -> Vec<String> {
        let env = env.iter().map(|variable| (*variable).to_owned()).collect();
        let mut process = ProcessPlan { env, ..ProcessPlan::default() };
        complete_environment(&mut process);
        process.env
    }

    #[test]
    fn the_last_variable_of_a_name_stays_in_its_place() {
        assert_eq!(completed(&["A=1", "HOME=/x", "B=", "A=2=3", "HOME=/y"]), ["B=", "A=2=3", "HOME=/y"]);
    }

    #[test]
    fn an_empty_home_counts_as_none() {
        let env = completed(&["HOME=/x", "HOME=", "A=1"]);
        assert_eq!(env.len(), 2);
        assert_eq!(env[0], "A=1");
        assert!(env[1].starts_with("HOME=/"), "{env:?}");
    }
}
