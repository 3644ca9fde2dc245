//! An ordinary user's way to a container.
//!
//! Whoever is not root may make user namespaces only, and no mounts. So a command of his does not make the user
//! namespace that its container asks for: it enters it, with a mount namespace beside it, before anything else is made.
//! From there on it does what root does, and what the kernel still keeps from it fails by name.
//!
//! Ids beyond the user's own are mapped by newuidmap(1) and newgidmap(1), which know from /etc/subuid and /etc/subgid
//! which are his.

mod ids;

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::sync::OnceLock;

use oci_spec::runtime::{LinuxIdMapping, LinuxNamespaceType};

use crate::bundle::{Bundle, empty_path};
use crate::error::{Context, Error, Result};
use crate::spawn::refuse_threads;
use crate::sys::{self, pidfd, process};
pub use ids::Ids;

/// Who called, if this process has entered a user namespace since.
static CALLER: OnceLock<u32> = OnceLock::new();

/// Whether this process is not root, and so cannot make a container from where it is.
pub fn is_ordinary_user() -> bool {
    !nix::unistd::geteuid().is_root()
}

/// Whether this process is not the machine's root, though it may be the root of a user namespace. Looked at once, and by
/// an ordinary user not before he is in one.
pub fn is_unprivileged() -> bool {
    static KNOWN: OnceLock<bool> = OnceLock::new();
    is_ordinary_user()
        || *KNOWN.get_or_init(|| {
            let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
            // Without user namespaces there is no such file.
            !map.is_empty() && map.split_ascii_whitespace().ne(["0", "0", "4294967295"])
        })
}

/// The user who called, as the caller's user namespace knows him.
pub(crate) fn caller() -> u32 {
    CALLER.get().copied().unwrap_or_else(|| nix::unistd::geteuid().as_raw())
}

/// Whether nobody can change his supplementary groups in the user namespace of process `pid`, or in this one's.
pub(crate) fn keeps_groups(pid: Option<i32>) -> bool {
    let file = pid.map_or_else(|| "/proc/self/setgroups".to_owned(), |pid| format!("/proc/{pid}/setgroups"));
    is_unprivileged() && fs::read_to_string(file).is_ok_and(|word| word.trim_end() == "deny")
}

/// Enters the user namespace that a configuration asks for. This process must have one thread, and remains in it.
///
/// # Errors
/// When the configuration asks for none, when the kernel allows none, and when ids are to be mapped that are not the
/// user's.
pub fn enter(bundle: &Bundle) -> Result<()> {
    let linux = bundle.linux()?;
    let wanted = linux.namespaces().iter().flatten().find(|namespace| namespace.typ() == LinuxNamespaceType::User);
    let Some(wanted) = wanted else {
        return Err(Error::unsupported(
            "a container without a user namespace",
            "only root can make one; \"runx spec --rootless\" writes a configuration for other users",
        ));
    };
    match wanted.path().as_deref().filter(|path| !empty_path(Some(path))) {
        Some(path) => {
            let namespace = sys::open(path, libc::O_RDONLY).on("open the user namespace", path)?;
            join(namespace.as_fd())
        }
        None => {
            let ids = |list: &Option<Vec<LinuxIdMapping>>| list.clone().unwrap_or_default();
            make(&ids(linux.uid_mappings()), &ids(linux.gid_mappings()))
        }
    }
}

/// Enters an existing user namespace: its file, or a pidfd of a process in it. As for [`enter`], this process must have
/// one thread.
///
/// # Errors
/// The kernel's, unless it is one of this user's.
pub fn join(namespace: BorrowedFd<'_>) -> Result<()> {
    remember_caller();
    process::setns(namespace, libc::CLONE_NEWUSER).context("join the user namespace")?;
    process::unshare(libc::CLONE_NEWNS).context("unshare the mount namespace")
}

/// Enters a new user namespace with all ids that are the user's ([`Ids::own`]): he is its root, and its other users are his
/// subordinate ids. As for [`enter`], this process must have one thread. Returns what was mapped.
///
/// # Errors
/// As for [`enter`]; and when he has subordinate ids, but newuidmap(1) or newgidmap(1) is not installed.
pub fn enter_own() -> Result<Ids> {
    let ids = Ids::own();
    make(&ids.users, &ids.groups)?;
    Ok(ids)
}

fn remember_caller() {
    let _ = CALLER.set(nix::unistd::geteuid().as_raw());
}

/// Enters a new user namespace with these mappings. They are written by a process that stays outside.
fn make(uids: &[LinuxIdMapping], gids: &[LinuxIdMapping]) -> Result<()> {
    refuse_threads()?;
    remember_caller();
    let this = std::process::id();
    let (ours, theirs) = UnixStream::pair().context("make a socket pair")?;
    // SAFETY: refuse_threads made sure that there is no other thread.
    match unsafe { process::clone(0, None) }.context("clone a process to map ids")? {
        process::Cloned::Child => {
            drop(ours);
            let said = map_when_asked(theirs, this, uids, gids);
            // SAFETY: ends this process without running destructors that belong to the caller's copy.
            unsafe { libc::_exit(said.is_err().into()) }
        }
        process::Cloned::Parent { pidfd, .. } => {
            drop(theirs);
            let entered = enter_and_ask(ours);
            // Its socket is closed by now, so it ends.
            pidfd::wait(pidfd.as_fd()).context("wait for the process that maps ids")?;
            entered
        }
    }
}

fn enter_and_ask(mut helper: UnixStream) -> Result<()> {
    process::unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWNS)
        .map_err(|e| Error::system("make a user namespace (does this machine let ordinary users make them?)", e))?;
    let mut answer = String::new();
    helper
        .write_all(b"m")
        .and_then(|()| helper.shutdown(std::net::Shutdown::Write))
        .and_then(|()| helper.read_to_string(&mut answer))
        .context("hear from the process that maps ids")?;
    match answer.strip_prefix("mapped") {
        Some(_) => Ok(()),
        None if answer.is_empty() => Err(Error::Died("the process that maps ids said nothing".into())),
        None => Err(Error::system("map the ids of the user namespace", io::Error::other(answer))),
    }
}

/// What the process outside does: waits for the word, maps, and tells what came of it.
fn map_when_asked(
    mut caller: UnixStream,
    pid: u32,
    uids: &[LinuxIdMapping],
    gids: &[LinuxIdMapping],
) -> io::Result<()> {
    if caller.read(&mut [0])? == 0 {
        // It could not enter, and says why itself.
        return Ok(());
    }
    let said = match map(pid, uids, gids) {
        Ok(()) => "mapped".to_owned(),
        Err(why) => why,
    };
    caller.write_all(said.as_bytes())
}

fn map(pid: u32, uids: &[LinuxIdMapping], gids: &[LinuxIdMapping]) -> Result<(), String> {
    if is_own(uids, nix::unistd::geteuid().as_raw()) {
        write_map(pid, "uid_map", uids)?;
    } else {
        map_with("newuidmap", pid, "uidMappings", uids)?;
    }
    if is_own(gids, nix::unistd::getegid().as_raw()) {
        // Who could leave a group would get at what is closed to its members.
        let file = format!("/proc/{pid}/setgroups");
        fs::write(&file, "deny").map_err(|e| format!("write \"deny\" to {file}: {e}"))?;
        write_map(pid, "gid_map", gids)
    } else {
        map_with("newgidmap", pid, "gidMappings", gids)
    }
}

/// Whether a mapping is of nothing but one's own id, which everybody may write.
fn is_own(mappings: &[LinuxIdMapping], id: u32) -> bool {
    matches!(mappings, [one] if one.host_id() == id && one.size() == 1)
}

fn write_map(pid: u32, file: &str, mappings: &[LinuxIdMapping]) -> Result<(), String> {
    let path = format!("/proc/{pid}/{file}");
    let text: String =
        mappings.iter().map(|m| format!("{} {} {}\n", m.container_id(), m.host_id(), m.size())).collect();
    fs::write(&path, &text).map_err(|e| format!("write {:?} to {path}: {e}", text.trim_end()))
}

fn map_with(program: &str, pid: u32, field: &str, mappings: &[LinuxIdMapping]) -> Result<(), String> {
    let numbers = mappings.iter().flat_map(|m| [m.container_id(), m.host_id(), m.size()]);
    let done = Command::new(program).arg(pid.to_string()).args(numbers.map(|number| number.to_string())).output();
    match done {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr);
            Err(format!("linux.{field}: {program} ended with {}: {}", output.status, said.trim()))
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => Err(format!(
            "linux.{field} has more than the own id, and {program} is not installed: it comes with the package uidmap"
        )),
        Err(e) => Err(format!("linux.{field}: run {program}: {e}")),
    }
}

/// A change of this process's own `oom_score_adj`, for one that may not change another's: what it clones has it, too.
/// Taken back when this is dropped.
#[derive(Debug)]
pub(crate) struct Lent {
    file: OwnedFd,
    before: String,
}

impl Lent {
    /// Makes the change.
    pub(crate) fn lend(adjustment: i32) -> Result<Self> {
        const FILE: &str = "/proc/self/oom_score_adj";
        let before = fs::read_to_string(FILE).on("read", FILE)?;
        // Held, since it cannot be opened again once this process's memory is hidden.
        let file = sys::open(FILE, libc::O_WRONLY).on("open", FILE)?;
        let changed = nix::unistd::write(&file, adjustment.to_string().as_bytes());
        changed.with_context(|| format!("set process.oomScoreAdj to {adjustment}"))?;
        Ok(Self { file, before })
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Err(e) = nix::unistd::write(&self.file, self.before.as_bytes()) {
            log::debug!("return to oom_score_adj {}: {e}", self.before.trim_end());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_own_id_alone_needs_no_help() {
        let mapping = |inside: u32, outside: u32, size: u32| -> LinuxIdMapping {
            serde_json::from_value(serde_json::json!({"containerID": inside, "hostID": outside, "size": size})).unwrap()
        };
        assert!(is_own(&[mapping(0, 1000, 1)], 1000));
        assert!(is_own(&[mapping(7, 1000, 1)], 1000));
        assert!(!is_own(&[mapping(0, 1001, 1)], 1000));
        assert!(!is_own(&[mapping(0, 1000, 2)], 1000));
        assert!(!is_own(&[mapping(0, 1000, 1), mapping(1, 100_000, 1)], 1000));
        assert!(!is_own(&[], 1000));
    }
}
