//! What a sandbox looks like, to be compared with what it has to look like.

use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};

use runx_core::Result;
use runx_core::error::Context;
use runx_core::sys::mount::{NewFilesystem, attr};
use runx_core::sys::{self, resolve};

use super::Init;
use super::execute;
use crate::wire::messages::Look;

impl Init<'_> {
    /// Looks at processes, and, with a procfs, at mounts, descriptors and, if a reset is to leave none, IPC objects.
    pub(super) fn look(&self) -> Result<Look> {
        let mut look = Look { processes: execute::others(), ..Look::default() };
        if let Some(proc) = &self.proc {
            look.mounts = hash_mounts(&read(proc, "self/mountinfo")?);
            look.descriptors = entries(proc, "self/fd")?;
            look.ipc = self.ipc(proc)?;
        }
        Ok(look)
    }

    /// System V objects, by their tables without the headings, and POSIX queues.
    fn ipc(&self, proc: &OwnedFd) -> Result<u32> {
        if self.setup.unwiped {
            // It is new, or may keep what is in it.
            return Ok(0);
        }
        let mut count = 0;
        for path in ["sysvipc/shm", "sysvipc/sem", "sysvipc/msg"] {
            count += read(proc, path)?.lines().skip(1).count() as u32;
        }
        let queues = NewFilesystem::open("mqueue")
            .and_then(|queues| queues.mount(attr::NOSUID | attr::NODEV | attr::NOEXEC))
            .and_then(|queues| sys::openat2(queues.as_fd(), ".", libc::O_RDONLY | libc::O_DIRECTORY, 0, 0))
            .and_then(crate::sys::names);
        Ok(count + queues.context("list POSIX message queues")?.len() as u32)
    }
}

fn read(proc: &OwnedFd, path: &str) -> Result<String> {
    let file = sys::openat2(proc.as_fd(), path, libc::O_RDONLY, 0, resolve::IN_ROOT).on("open", path)?;
    let mut text = String::new();
    std::fs::File::from(file).read_to_string(&mut text).on("read", path)?;
    Ok(text)
}

fn entries(proc: &OwnedFd, path: &str) -> Result<u32> {
    let flags = libc::O_RDONLY | libc::O_DIRECTORY;
    let directory = sys::openat2(proc.as_fd(), path, flags, 0, resolve::IN_ROOT).on("open", path)?;
    crate::sys::names(directory).map(|names| names.len() as u32).on("list", path)
}

/// Filesystems that a sandbox mounts itself. The options of others are the host's business, which may remount them.
const OWN: [&str; 2] = ["tmpfs", "proc"];

/// A hash of a mount table without what differs between two sandboxes that are alike: the numbers of mounts and devices,
/// the user that a tmpfs belongs to, and options of filesystems that are bound.
fn hash_mounts(table: &str) -> u64 {
    // FNV-1a: it only has to tell, nobody chooses what goes in.
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    let mut add = |bytes: &[u8]| {
        for byte in bytes.iter().chain(b" ") {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    };
    for line in table.lines() {
        let (fields, options) = line.rsplit_once(' ').unwrap_or((line, ""));
        for field in fields.split(' ').skip(3) {
            add(field.as_bytes());
        }
        let kind = fields.rsplit(' ').nth(1).unwrap_or_default();
        let options = if OWN.contains(&kind) { options } else { "" };
        for option in options.split(',').filter(|option| !option.starts_with("uid=") && !option.starts_with("gid=")) {
            add(option.as_bytes());
        }
        add(b"\n");
    }
    hash
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_that_are_alike_have_the_same_hash_and_others_do_not() {
        let table = |id: u32, uid: u32, more: &str| {
            format!(
                "{id} 1 0:{id} / / ro,nosuid - tmpfs none ro,size=64k\n{id} 3 0:9 / /w rw - tmpfs none rw,size=1m,uid={uid}\n{more}"
            )
        };
        let one = hash_mounts(&table(20, 1, ""));
        assert_eq!(one, hash_mounts(&table(77, 2, "")));
        assert_ne!(one, hash_mounts(&table(20, 1, "5 1 0:4 / /tmp rw - tmpfs none rw\n")));
        assert_ne!(one, hash_mounts(&table(20, 1, "").replace("ro,nosuid", "rw,nosuid")));
        assert_ne!(one, hash_mounts(""));
        assert_ne!(one, hash_mounts(&table(20, 1, "").replace("size=64k", "size=65k")));
        // Of a bind its own options count, and not those of the filesystem.
        let bind =
            |own: &str, all: &str| hash_mounts(&format!("5 1 8:1 /usr /usr {own} master:1 - ext4 /dev/sda1 {all}\n"));
        assert_eq!(bind("ro,nosuid", "rw,errors=continue"), bind("ro,nosuid", "ro"));
        assert_ne!(bind("ro,nosuid", "rw"), bind("rw,nosuid", "rw"));
    }
}
