//! Looking up paths that a user or a container says.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use anyhow::Result;
use runx_core::sys::{self, resolve};

use super::ids::{Ids, Owner};

/// Below a directory that was looked up: by name, and through no link.
pub(super) const BELOW: u64 = resolve::BENEATH | resolve::NO_SYMLINKS | resolve::NO_MAGICLINKS;

/// Where paths begin, and what they may lead through.
pub(super) enum Lookup {
    /// On the host, as everywhere.
    Host,
    /// In a container with this root directory. Its links stay below it, and those of a procfs, which would lead to other
    /// processes' roots and files, are not followed: having the root alone does not keep these in.
    Inside {
        root: OwnedFd,
        /// The ids of its users, where they are others than this machine's.
        ids: Option<Ids>,
    },
}

impl Lookup {
    /// Opens what a path leads to.
    pub(super) fn open(&self, path: &Path, flags: libc::c_int) -> io::Result<OwnedFd> {
        let Self::Inside { root, .. } = self else { return sys::open(path, flags) };
        match sys::openat2(root.as_fd(), path, flags, 0, resolve::IN_ROOT | resolve::NO_MAGICLINKS) {
            Err(e) if e.raw_os_error() == Some(libc::ELOOP) => {
                let reason = "it leads through a link of a procfs, or through too many links: neither is followed";
                Err(io::Error::new(e.kind(), reason))
            }
            other => other,
        }
    }

    /// Opens the directory that the last name of a path is in.
    pub(super) fn open_parent(&self, path: &Path, flags: libc::c_int) -> io::Result<OwnedFd> {
        let parent = path.parent().unwrap_or(Path::new("/"));
        self.open(if parent.as_os_str().is_empty() { Path::new(".") } else { parent }, flags | libc::O_DIRECTORY)
    }

    /// Who owns a file, for those who are there.
    pub(super) fn owner(&self, found: &libc::stat) -> Owner {
        let owner = (found.st_uid, found.st_gid);
        self.ids().map_or(owner, |ids| ids.inside(owner))
    }

    /// Whom a file has to be given to that shall belong to `owner` for those who are there.
    ///
    /// # Errors
    /// When nobody there is that.
    pub(super) fn to_own(&self, owner: Owner) -> Result<Owner> {
        self.ids().map_or(Ok(owner), |ids| ids.outside(owner))
    }

    fn ids(&self) -> Option<&Ids> {
        match self {
            Self::Host => None,
            Self::Inside { ids, .. } => ids.as_ref(),
        }
    }
}
