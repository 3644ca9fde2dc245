//! User namespaces: writing their mappings, and holding one for the sake of its mappings only.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};

use oci_spec::runtime::LinuxIdMapping;

use crate::error::{Context, Error, Result};
use crate::plan::Plan;
use crate::spawn::{Request, Spawner};
use crate::sys::{self, pidfd};

/// The kernel takes this many lines.
const LINES: usize = 340;

/// Checks a list of mappings.
///
/// # Errors
/// [`Error::InvalidSpec`] naming `field`.
pub(crate) fn check(field: &str, mappings: &[LinuxIdMapping]) -> Result<()> {
    if mappings.len() > LINES {
        let reason = format!("{field} has {} entries, and the kernel takes at most {LINES}", mappings.len());
        return Err(Error::spec(reason));
    }
    for mapping in mappings {
        let (inside, outside, size) = (mapping.container_id(), mapping.host_id(), mapping.size());
        if size == 0 {
            return Err(Error::spec(format!("{field}: the size of the mapping of {inside} to {outside} is 0")));
        }
        if inside.checked_add(size - 1).is_none() || outside.checked_add(size - 1).is_none() {
            return Err(Error::spec(format!("{field}: {size} ids from {inside} to {outside} are beyond the last id")));
        }
    }
    Ok(())
}

/// Writes the mappings of the user namespace that process `pid` was born in. Only the first write counts, and the
/// process waits for it.
pub(super) fn write_maps(pid: i32, uids: &[LinuxIdMapping], gids: &[LinuxIdMapping]) -> Result<()> {
    for (file, mappings) in [("uid_map", uids), ("gid_map", gids)] {
        let path = format!("/proc/{pid}/{file}");
        let text: String = mappings
            .iter()
            .map(|mapping| format!("{} {} {}\n", mapping.container_id(), mapping.host_id(), mapping.size()))
            .collect();
        fs::write(&path, &text).with_context(|| format!("write {:?} to {path}", text.trim_end()))?;
    }
    Ok(())
}

/// A user namespace with these mappings, in which no process stays: what an id-mapped mount takes its mappings
/// from.
pub(super) fn hold(spawner: &Spawner, uids: &[LinuxIdMapping], gids: &[LinuxIdMapping]) -> Result<OwnedFd> {
    let plan = Plan { hold: true, ..Plan::default() };
    let spawned = spawner.spawn(Request { plan, namespaces: libc::CLONE_NEWUSER as u64, ..Request::default() })?;
    let path = format!("/proc/{}/ns/user", spawned.pid);
    let opened = write_maps(spawned.pid, uids, gids).and_then(|()| sys::open(&path, libc::O_RDONLY).on("open", &path));
    // It ends when the conversation does.
    drop(spawned.handshake);
    pidfd::wait(spawned.pidfd.as_fd()).context("wait for the holder of a user namespace")?;
    opened
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(inside: u32, outside: u32, size: u32) -> LinuxIdMapping {
        serde_json::from_value(serde_json::json!({"containerID": inside, "hostID": outside, "size": size})).unwrap()
    }

    #[test]
    fn mappings_that_the_kernel_would_not_take_are_refused() {
        check("linux.uidMappings", &[mapping(0, 1000, u32::MAX - 1000)]).unwrap();
        assert!(check("linux.uidMappings", &[mapping(0, 1000, 0)]).is_err());
        assert!(check("linux.uidMappings", &[mapping(0, 1001, u32::MAX - 1000 + 1)]).is_err());
        assert!(check("linux.uidMappings", &vec![mapping(0, 0, 1); 341]).is_err());
    }
}
