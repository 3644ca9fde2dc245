//! What the options of a bind mount make of the attributes that the mount of its source has.
//!
//! As runc has it: without any it keeps them all. With any it has those that are asked for and no others, but for the
//! access times, which it keeps unless some are asked for (mount(2), "Remounting an existing mount"). What the source
//! restricts stays restricted where a container with a user namespace of its own could not lift it
//! (mount_namespaces(7), "Restrictions on mount namespaces").

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::sys::statvfs::FsFlags;
use serde::{Deserialize, Serialize};

use crate::sys::mount::{self, attr};

/// What options can lift, with the words that ask for it. A user namespace locks all but the last.
const LIFTED: [(u64, &str); 5] = [
    (attr::RDONLY, "rw"),
    (attr::NOSUID, "suid"),
    (attr::NODEV, "dev"),
    (attr::NOEXEC, "exec"),
    (attr::NOSYMFOLLOW, "symfollow"),
];

const LOCKED: u64 = attr::RDONLY | attr::NOSUID | attr::NODEV | attr::NOEXEC;
const TIMES: u64 = attr::ATIME_MASK | attr::NODIRATIME;

/// See the module.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BindAttributes {
    /// `MOUNT_ATTR_*` that are asked for.
    pub set: u64,
    /// `MOUNT_ATTR_*` that are asked not to be there.
    pub clear: u64,
    /// Access times are asked for.
    pub times: bool,
}

impl BindAttributes {
    /// Gives them to `tree`, a detached clone of the mounts of `source`. `keeps` is whether it is for a container that
    /// could not lift what the source restricts; where the kernel says so, it is for such a one too.
    ///
    /// # Errors
    /// The kernel's, and `EPERM`'s kind with the options' names if they ask to lift what has to be kept.
    pub fn apply(&self, tree: BorrowedFd<'_>, source: BorrowedFd<'_>, keeps: bool) -> io::Result<()> {
        if self.set | self.clear == 0 {
            return Ok(());
        }
        if !keeps {
            let lifted = LIFTED.iter().fold(0, |all, (one, _)| all | one) & !self.set;
            let times = if self.times { TIMES & !(self.set & attr::NODIRATIME) } else { 0 };
            match mount::set_attributes(tree, self.set, lifted | times, 0, false) {
                Err(e) if e.raw_os_error() == Some(libc::EPERM) => {}
                done => return done,
            }
        }
        let mut there = attributes(tree)?;
        // The filesystem itself may be read-only, which is no restriction of the mount.
        if self.clear & there & attr::RDONLY != 0 && is_writable_mount(source) {
            there &= !attr::RDONLY;
        }
        let kept = there & self.clear & LOCKED;
        if kept != 0 {
            let words: Vec<_> = LIFTED.iter().filter(|(one, _)| kept & one != 0).map(|(_, word)| *word).collect();
            return Err(refused(&words.join(",")));
        }
        if self.times && self.set & TIMES != there & TIMES {
            return Err(refused("access times other than the source's"));
        }
        let free = attr::NOSYMFOLLOW & !self.set;
        mount::set_attributes(tree, self.set & !TIMES, free, 0, false)
    }
}

fn refused(what: &str) -> io::Error {
    let why =
        format!("{what}: Operation not permitted: what the source's mount restricts is locked by the user namespace");
    io::Error::new(io::ErrorKind::PermissionDenied, why)
}

/// `MOUNT_ATTR_*` of the mount behind `fd` (statfs(2)).
fn attributes(fd: BorrowedFd<'_>) -> io::Result<u64> {
    let flags = nix::sys::statfs::fstatfs(fd)?.flags();
    let named = [
        (FsFlags::ST_RDONLY, attr::RDONLY),
        (FsFlags::ST_NOSUID, attr::NOSUID),
        (FsFlags::ST_NODEV, attr::NODEV),
        (FsFlags::ST_NOEXEC, attr::NOEXEC),
        (FsFlags::ST_NODIRATIME, attr::NODIRATIME),
    ];
    let found = named.iter().filter(|(flag, _)| flags.contains(*flag)).fold(0, |all, (_, one)| all | one);
    let times = if flags.contains(FsFlags::ST_NOATIME) {
        attr::NOATIME
    } else if flags.contains(FsFlags::ST_RELATIME) {
        0
    } else {
        attr::STRICTATIME
    };
    Ok(found | times)
}

/// Whether the mount of `fd`, not its filesystem, can be written to (proc_pid_mountinfo(5)). What is not found cannot: in a
/// container that is being made there may be no /proc of its own yet.
fn is_writable_mount(fd: BorrowedFd<'_>) -> bool {
    let about = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())).unwrap_or_default();
    let Some(id) = about.lines().find_map(|line| line.strip_prefix("mnt_id:")).map(str::trim) else { return false };
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let options = table.lines().find_map(|line| {
        let mut fields = line.split(' ');
        (fields.next() == Some(id)).then(|| fields.nth(4)).flatten()
    });
    options.is_some_and(|options| options.split(',').any(|option| option == "rw"))
}
