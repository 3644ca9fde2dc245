//! Files and directories: what the protocols' file operations are made of.
//!
//! Everything here blocks, and is run by [`run`] on a thread that may do so, as the daemon or as somebody else.

pub mod glob;
pub mod ops;
pub mod read;
pub mod root;
pub mod tree;
pub mod walk;
pub mod write;

use std::io;
use std::path::Path;

use serde::Serialize;

use crate::process::users::{self, Accounts, Identity};
use root::{Root, Stat};

/// Why a file operation failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no such file.
    #[error("{0}")]
    NotFound(String),
    /// The request makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// Something else is in its way.
    #[error("{0}")]
    Conflict(String),
    /// The daemon may not act as that user.
    #[error("{0}")]
    Identity(String),
    /// It is larger than what is allowed.
    #[error("{0}")]
    TooLarge(String),
    /// Whatever the kernel says.
    #[error("{0}")]
    System(String),
}

/// The result of a file operation.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// What was attempted, on what, and what the kernel said.
    pub fn of(attempt: &str, path: &Path, error: &io::Error) -> Self {
        let text = format!("{attempt} {}: {error}", path.display());
        match error.kind() {
            io::ErrorKind::NotFound => Self::NotFound(text),
            _ => Self::System(text),
        }
    }
}

/// Runs file operations on a thread that may block, as `identity` if there is one.
///
/// # Errors
/// Those of `work`, and [`Error::Identity`] when the daemon may not become that.
pub async fn run<T: Send + 'static>(
    identity: Option<Identity>,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let gone = |_| Error::System("the operation was given up".to_owned());
    let Some(identity) = identity else {
        return tokio::task::spawn_blocking(work).await.map_err(|e| Error::System(e.to_string()))?;
    };
    let (sender, receiver) = tokio::sync::oneshot::channel();
    // A thread that has become somebody else never comes back, so it is nobody's but this operation's.
    let spawned = std::thread::Builder::new().name("as-user".into()).stack_size(1 << 20).spawn(move || {
        let result = match become_user(&identity) {
            Ok(()) => work(),
            Err(e) => Err(Error::Identity(format!("act as user {} and group {}: {e}", identity.uid, identity.gid))),
        };
        let _ = sender.send(result);
    });
    spawned.map_err(|e| Error::System(format!("start a thread: {e}")))?;
    receiver.await.map_err(gone)?
}

fn become_user(identity: &Identity) -> io::Result<()> {
    match identity.assume_for_files() {
        // Who one is already one may be without any rights, if with one's own groups.
        Err(_) if (identity.uid, identity.gid) == users::own() => Ok(()),
        other => other,
    }
}

/// What is told of a file.
#[derive(Clone, Debug, Serialize)]
pub struct FileInfo {
    /// Its absolute path.
    pub path: String,
    /// `file`, `directory`, `symlink` or `other`.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// In bytes.
    pub size: i64,
    /// RFC 3339.
    pub modified_at: String,
    /// RFC 3339; of the last change of its inode, since nothing else is kept everywhere.
    pub created_at: String,
    /// Name or number.
    pub owner: String,
    /// Name or number.
    pub group: String,
    /// Its permissions, octal digits read as a decimal number: 644.
    pub mode: u32,
}

impl FileInfo {
    /// Of what is at a path.
    pub fn new(path: &Path, stat: &Stat, accounts: &Accounts) -> Self {
        Self {
            path: path.to_string_lossy().into_owned(),
            kind: match stat.st_mode & libc::S_IFMT {
                libc::S_IFREG => "file",
                libc::S_IFDIR => "directory",
                libc::S_IFLNK => "symlink",
                _ => "other",
            },
            size: stat.st_size,
            modified_at: time(stat.st_mtime, stat.st_mtime_nsec),
            created_at: time(stat.st_ctime, stat.st_ctime_nsec),
            owner: accounts.name_of(stat.st_uid),
            group: accounts.group_name_of(stat.st_gid),
            mode: digits(stat.st_mode & 0o777),
        }
    }
}

/// 0o644 as 644.
pub fn digits(mode: u32) -> u32 {
    (mode >> 6 & 7) * 100 + (mode >> 3 & 7) * 10 + (mode & 7)
}

/// 644 as 0o644.
///
/// # Errors
/// [`Error::System`] for digits that are not octal, as the protocol has it.
pub fn from_digits(digits: i64) -> Result<u32> {
    u32::from_str_radix(&digits.to_string(), 8)
        .ok()
        .filter(|mode| *mode <= 0o7777)
        .ok_or_else(|| Error::System(format!("invalid mode {digits}: it is made of octal digits")))
}

fn time(seconds: i64, nanoseconds: i64) -> String {
    let (seconds, nanoseconds) = (u64::try_from(seconds).unwrap_or(0), u32::try_from(nanoseconds).unwrap_or(0));
    let since = std::time::Duration::new(seconds, nanoseconds.min(999_999_999));
    crate::api::rfc3339(std::time::UNIX_EPOCH.checked_add(since).unwrap_or(std::time::UNIX_EPOCH))
}

/// What a request wants a file's owner and mode to be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Permission {
    /// Octal digits as a decimal number; 0 changes nothing.
    pub mode: i64,
    /// A user's name or number.
    pub owner: Option<String>,
    /// A group's name or number.
    pub group: Option<String>,
}

impl Permission {
    /// Makes an open file so. Owner first: a change of it takes some bits of the mode away.
    ///
    /// # Errors
    /// A name that nobody has, and the kernel's.
    pub fn apply(&self, file: &std::os::fd::OwnedFd, path: &Path, accounts: &Accounts) -> Result<()> {
        let (uid, gid) = self.ids(accounts)?;
        if uid.is_some() || gid.is_some() {
            root::change_owner(file, uid, gid).map_err(|e| Error::of("change the owner of", path, &e))?;
        }
        if self.mode != 0 {
            root::change_mode(file, from_digits(self.mode)?).map_err(|e| Error::of("change the mode of", path, &e))?;
        }
        Ok(())
    }

    /// The numbers of owner and group.
    ///
    /// # Errors
    /// A name that nobody has.
    pub fn ids(&self, accounts: &Accounts) -> Result<(Option<u32>, Option<u32>)> {
        let find = |name: &Option<String>, known: &dyn Fn(&str) -> Option<u32>, what: &str| match name.as_deref() {
            None | Some("") => Ok(None),
            Some(name) => known(name)
                .or_else(|| name.parse().ok())
                .map(Some)
                .ok_or_else(|| Error::System(format!("{what}: unknown {what} {name}"))),
        };
        Ok((
            find(&self.owner, &|name| accounts.user_named(name).map(|user| user.uid), "user")?,
            find(&self.group, &|name| accounts.group_named(name), "group")?,
        ))
    }
}

/// What file operations share.
#[derive(Debug)]
pub struct Files {
    /// Where paths lead.
    pub root: Root,
    /// The largest file that may be written, in bytes.
    pub limit: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_are_octal_digits() {
        assert_eq!((digits(0o644), digits(0o7), from_digits(755).unwrap()), (644, 7, 0o755));
        assert!(from_digits(788).is_err() && from_digits(-1).is_err() && from_digits(77777).is_err());
    }
}
