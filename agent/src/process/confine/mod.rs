//! What a process may do and use less than the daemon itself: limits, a cgroup, capabilities, a user namespace, paths that are
//! read-only or masked, no new privileges, a seccomp filter.
//!
//! All is made ready before the fork. Between fork and exec there are only system calls, in the order in which each still
//! has the rights that it needs, and what fails there is told by its name.

pub mod capabilities;
pub mod cgroup;
mod paths;
pub mod seccomp;

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use serde::Deserialize;

use super::users::{self, Identity};
use capabilities::Set;
use paths::Paths;

/// How much a process and its children may use. What is absent is not limited further.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Time on a processor, in milliseconds.
    pub cpu_time_ms: Option<u64>,
    /// Memory, in bytes: of the group where there is a cgroup, of the data of each process otherwise.
    pub memory_bytes: Option<u64>,
    /// How many processes there may be: in the group where there is a cgroup, of the user otherwise.
    pub processes: Option<u64>,
    /// How many descriptors each process may have open.
    pub open_files: Option<u64>,
    /// The largest file that may be written, in bytes.
    pub file_size_bytes: Option<u64>,
    /// The largest core dump, in bytes.
    pub core_bytes: Option<u64>,
    /// The largest stack, in bytes.
    pub stack_bytes: Option<u64>,
}

/// See the module. As it comes in a request.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Confinement {
    /// See [`Limits`].
    pub limits: Limits,
    /// No program that it executes gets rights that it does not have.
    pub no_new_privileges: bool,
    /// All capabilities that it may ever have, by their names; `None` for those of the daemon.
    pub capabilities: Option<Vec<String>>,
    /// A user namespace of its own, in which its user is root.
    pub user_namespace: bool,
    /// Paths that cannot be written. With any of these, or masked ones, it has no CAP_SYS_ADMIN.
    pub readonly_paths: Vec<String>,
    /// Paths that are empty for it.
    pub masked_paths: Vec<String>,
    /// `"default"`, or a profile of the OCI runtime specification.
    pub seccomp: Option<serde_json::Value>,
}

/// The steps between fork and exec, by which a failure is told.
#[derive(Clone, Copy)]
#[repr(u8)]
enum Step {
    Group,
    Limits,
    Bounding,
    Identity,
    UserNamespace,
    Paths,
    Capabilities,
    Privileges,
    Seccomp,
}

impl Step {
    fn text(number: u8) -> &'static str {
        const ALL: [(Step, &str); 9] = [
            (Step::Group, "join its cgroup"),
            (Step::Limits, "set its limits"),
            (Step::Bounding, "drop capabilities from the bounding set"),
            (Step::Identity, "become its user"),
            (Step::UserNamespace, "make its user namespace"),
            (Step::Paths, "make its paths read-only or masked"),
            (Step::Capabilities, "set its capabilities"),
            (Step::Privileges, "give up new privileges"),
            (Step::Seccomp, "load its seccomp filter"),
        ];
        ALL.iter().find(|(step, _)| *step as u8 == number).map_or("start it", |(_, text)| text)
    }
}

/// A confinement, ready for the child.
pub struct Ready {
    rlimits: Vec<(libc::c_uint, libc::rlimit)>,
    groups: Vec<File>,
    capabilities: Option<Set>,
    /// The maps of users and groups.
    user_namespace: Option<(CString, CString)>,
    paths: Option<Paths>,
    no_new_privileges: bool,
    seccomp: Vec<seccompiler::BpfProgram>,
    told: OwnedFd,
}

/// The end at which the parent hears which step failed.
#[derive(Debug)]
pub struct Heard(File);

impl Heard {
    /// Names the step in an error.
    pub fn name(mut self, error: io::Error) -> io::Error {
        // The child is gone, and what failed may be none of its steps: then there is nothing to read.
        if nix::fcntl::fcntl(&self.0, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK)).is_err() {
            return error;
        }
        let mut step = [0];
        match self.0.read(&mut step) {
            Ok(1) => io::Error::new(error.kind(), format!("{}: {error}", Step::text(step[0]))),
            _ => error,
        }
    }
}

fn rlimit(soft: u64, hard: u64) -> libc::rlimit {
    libc::rlimit { rlim_cur: soft, rlim_max: hard }
}

impl Limits {
    /// As resource limits. What a cgroup limits is left to it.
    fn rlimits(&self, group: Option<&cgroup::Group>) -> Vec<(libc::c_uint, libc::rlimit)> {
        let of_group = |controller: &str| group.is_some_and(|group| group.has(controller));
        let mut out = Vec::new();
        let mut add = |resource: libc::c_uint, value: Option<u64>| {
            if let Some(value) = value {
                out.push((resource, rlimit(value, value)));
            }
        };
        // What is only reserved does not count, and runtimes reserve a lot.
        add(libc::RLIMIT_DATA, self.memory_bytes.filter(|_| !of_group("memory")));
        add(libc::RLIMIT_NPROC, self.processes.filter(|_| !of_group("pids")));
        add(libc::RLIMIT_NOFILE, self.open_files);
        add(libc::RLIMIT_FSIZE, self.file_size_bytes);
        add(libc::RLIMIT_CORE, self.core_bytes);
        add(libc::RLIMIT_STACK, self.stack_bytes);
        if let Some(milliseconds) = self.cpu_time_ms {
            let seconds = milliseconds.div_ceil(1000).max(1);
            // The daemon watches more closely; this holds without it, and for who catches SIGXCPU.
            out.push((libc::RLIMIT_CPU, rlimit(seconds, seconds + 1)));
        }
        // None may be raised above what the daemon has.
        for (resource, limit) in &mut out {
            let mut own = rlimit(0, 0);
            // SAFETY: the pointer is to a local.
            if unsafe { libc::getrlimit(*resource, &raw mut own) } == 0 {
                limit.rlim_max = limit.rlim_max.min(own.rlim_max);
                limit.rlim_cur = limit.rlim_cur.min(limit.rlim_max);
            }
        }
        out
    }
}

impl Confinement {
    /// Whether there is none.
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }

    /// Makes it ready for a process of an identity, in a group if there is one, that begins in a directory.
    ///
    /// # Errors
    /// What of it makes no sense, or cannot be had here.
    pub fn ready(
        &self,
        identity: Option<&Identity>,
        group: Option<&cgroup::Group>,
        cwd: &Path,
    ) -> io::Result<(Ready, Heard)> {
        let (reader, told) = super::spawn::pipe()?;
        let seccomp = self.seccomp.as_ref().map(seccomp::compile).transpose()?.unwrap_or_default();
        let capabilities = self.capabilities.as_ref().map(|names| Set::of(names)).transpose()?;
        if let Some(missing) = capabilities.and_then(|wanted| wanted.without(Set::own())) {
            let text = format!("capabilities: the daemon itself has no {missing}");
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
        }
        let (uid, gid) = identity.map_or_else(users::own, |identity| (identity.uid, identity.gid));
        let mounts = !(self.readonly_paths.is_empty() && self.masked_paths.is_empty());
        // Who may mount could take away again what hides a path.
        let capabilities = match capabilities {
            Some(set) if mounts => Some(set.without_mounting()),
            None if mounts && self.user_namespace => Some(Set::all().without_mounting()),
            None if mounts && uid == 0 => Some(Set::own().without_mounting()),
            None if mounts => Some(Set::NONE),
            other => other,
        };
        let map = |id: u32| CString::new(format!("0 {id} 1\n")).map_err(io::Error::from);
        let user_namespace = if self.user_namespace { Some((map(uid)?, map(gid)?)) } else { None };
        let ready = Ready {
            rlimits: self.limits.rlimits(group),
            groups: group.map(cgroup::Group::doors).transpose()?.unwrap_or_default(),
            capabilities,
            user_namespace,
            paths: Paths::new(&self.readonly_paths, &self.masked_paths, cwd)?,
            // Without the right to do otherwise a filter needs it; it must not depend on who one is.
            no_new_privileges: self.no_new_privileges || !seccomp.is_empty(),
            seccomp,
            told,
        };
        Ok((ready, Heard(File::from(reader))))
    }
}

fn check(code: libc::c_int) -> io::Result<()> {
    if code < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

impl Ready {
    /// Between fork and exec: takes all of it upon this process, and becomes the identity on the way.
    ///
    /// # Errors
    /// The first step that fails; the parent hears which.
    pub fn take(&self, identity: Option<&Identity>) -> io::Result<()> {
        let step = |step: Step, result: io::Result<()>| {
            result.inspect_err(|_| {
                let byte = [step as u8];
                // SAFETY: the pointer is to a local, the descriptor is open. What cannot be told is missing in a text.
                unsafe { libc::write(self.told.as_raw_fd(), byte.as_ptr().cast(), 1) };
            })
        };
        step(Step::Group, self.groups.iter().try_for_each(|mut door| door.write_all(b"0")))?;
        step(Step::Limits, self.limit())?;
        step(Step::Bounding, self.capabilities.as_ref().map_or(Ok(()), Set::bound))?;
        // In a namespace of the user's own it has the rights that it takes; before that, whoever the daemon is has them.
        if self.user_namespace.is_none() {
            step(Step::Paths, self.paths.as_ref().map_or(Ok(()), Paths::mount))?;
        }
        step(Step::Identity, identity.map_or(Ok(()), Identity::assume))?;
        if let Some(maps) = &self.user_namespace {
            step(Step::UserNamespace, own_users(maps))?;
            step(Step::Paths, self.paths.as_ref().map_or(Ok(()), Paths::mount))?;
        }
        step(
            Step::Capabilities,
            self.capabilities.as_ref().map_or(Ok(()), |set| set.take(self.user_namespace.is_some())),
        )?;
        if self.no_new_privileges {
            // SAFETY: takes numbers.
            step(Step::Privileges, check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }))?;
        }
        self.seccomp.iter().try_for_each(|program| {
            let loaded = seccompiler::apply_filter(program);
            step(Step::Seccomp, loaded.map_err(|_| io::Error::last_os_error()))
        })
    }

    fn limit(&self) -> io::Result<()> {
        self.rlimits.iter().try_for_each(|(resource, limit)| {
            // SAFETY: the pointer is to a value that lives through the call.
            check(unsafe { libc::setrlimit(*resource, std::ptr::from_ref(limit)) })
        })
    }
}

/// A user namespace in which this process's user and group are root, and a mount namespace that belongs to it.
fn own_users((users, groups): &(CString, CString)) -> io::Result<()> {
    let write = |path: &std::ffi::CStr, text: &[u8]| {
        // SAFETY: the path ends with NUL; the descriptor is new, written from a slice of the length given, and closed.
        unsafe {
            let fd = libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
            check(fd)?;
            let written = libc::write(fd, text.as_ptr().cast(), text.len());
            let result = if written < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
            libc::close(fd);
            result
        }
    };
    // SAFETY: takes a number; this process has one thread.
    check(unsafe { libc::unshare(libc::CLONE_NEWUSER) })?;
    // Becoming another user has made its files in proc somebody else's.
    // SAFETY: takes numbers.
    check(unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 1, 0, 0, 0) })?;
    let mapped = write(c"/proc/self/setgroups", b"deny")
        .and_then(|()| write(c"/proc/self/uid_map", users.as_bytes()))
        .and_then(|()| write(c"/proc/self/gid_map", groups.as_bytes()));
    // Until exec this is still the daemon's memory.
    // SAFETY: takes numbers.
    check(unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) })?;
    mapped
}
