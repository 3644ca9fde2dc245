//! Users and groups by name, as the files of a container's root filesystem have them.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, BorrowedFd};

use anyhow::{Context as _, Result, bail};
use runx_core::sys::{self, resolve};

/// No honest list of users comes near this size in bytes.
const LIMIT: u64 = 1 << 20;

/// Who executes a program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct User {
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) groups: Vec<u32>,
    pub(super) home: String,
}

/// Reads a file below `root`, which does not lead out of it. What is not there is empty.
fn read(root: BorrowedFd<'_>, path: &str) -> Result<String> {
    // Only looked at: to open a device may already do something, and a FIFO waits.
    let place = match sys::openat2(root, path, libc::O_PATH, 0, resolve::IN_ROOT | resolve::NO_MAGICLINKS) {
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => return Ok(String::new()),
        other => File::from(other.with_context(|| format!("open the container's /{path}"))?),
    };
    if !place.metadata().is_ok_and(|found| found.is_file()) {
        bail!("the container's /{path} is no regular file");
    }
    let file = File::open(format!("/proc/self/fd/{}", place.as_raw_fd()))
        .with_context(|| format!("open the container's /{path}"))?;
    let mut text = Vec::new();
    file.take(LIMIT).read_to_end(&mut text).with_context(|| format!("read the container's /{path}"))?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// A number that can be an id: a name or a number that does not fit must never become root.
fn number(text: &str) -> Option<u32> {
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    text.parse().ok().filter(|id| *id != u32::MAX)
}

/// Finds `USER[:GROUP]`, both by name or number; the empty text is root. `more` are groups that he is in, too.
pub(super) fn resolve(root: BorrowedFd<'_>, text: &str, more: &[String]) -> Result<User> {
    let (user, group) = match text.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (text, None),
    };
    let passwd = read(root, "etc/passwd")?;
    let groups = read(root, "etc/group")?;
    find(&passwd, &groups, user, group, more)
}

fn find(passwd: &str, groups: &str, user: &str, group: Option<&str>, more: &[String]) -> Result<User> {
    let user = if user.is_empty() { "0" } else { user };
    let entries = || {
        passwd.lines().filter_map(|line| {
            let fields: Vec<&str> = line.split(':').collect();
            match fields[..] {
                [name, _, uid, gid, _, home, ..] => Some((name, number(uid)?, number(gid)?, home)),
                _ => None,
            }
        })
    };
    // A number is one, whatever the image calls its users: who asks for 1000 must not become root.
    let entry = match number(user) {
        Some(wanted) => entries().find(|(_, uid, ..)| *uid == wanted),
        None => entries().find(|(name, ..)| *name == user),
    };
    let (name, uid, gid, home) = match (entry, number(user)) {
        (Some(entry), _) => entry,
        (None, Some(uid)) => ("", uid, 0, "/"),
        (None, None) => bail!("--user {user:?}: the container's /etc/passwd has no such user"),
    };
    let group_lines = || {
        groups.lines().filter_map(|line| {
            let fields: Vec<&str> = line.split(':').collect();
            match fields[..] {
                [name, _, gid, members] => Some((name, number(gid)?, members)),
                _ => None,
            }
        })
    };
    let by_name = |wanted: &str| -> Result<u32> {
        let named = || group_lines().find(|(name, ..)| *name == wanted).map(|(_, gid, _)| gid);
        number(wanted)
            .or_else(named)
            .with_context(|| format!("{wanted:?}: the container's /etc/group has no such group"))
    };
    let mut all = Vec::new();
    let gid = match group {
        Some(group) => by_name(group)?,
        None => {
            let member = |members: &str| !name.is_empty() && members.split(',').any(|member| member == name);
            all.extend(group_lines().filter(|(_, _, members)| member(members)).map(|(_, gid, _)| gid));
            gid
        }
    };
    for group in more {
        all.push(by_name(group)?);
    }
    all.retain(|other| *other != gid);
    all.sort_unstable();
    all.dedup();
    Ok(User { uid, gid, groups: all, home: if home.is_empty() { "/" } else { home }.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nweb:x:33:34::/srv:/bin/sh\n42:x:7:7::/odd:\nbad:x:abc:1::/:\n";
    const GROUP: &str = "root:x:0:\n42:x:0:\n51:x:0:\nweb:x:34:\naudio:x:50:web,other\nvideo:x:51:other\n";

    fn user(text: &str, more: &[&str]) -> Result<User> {
        let (user, group) = text.split_once(':').map_or((text, None), |(user, group)| (user, Some(group)));
        let more: Vec<_> = more.iter().map(|name| (*name).to_owned()).collect();
        find(PASSWD, GROUP, user, group, &more)
    }

    #[test]
    fn users_are_found_by_name_and_number() {
        let root = User { uid: 0, gid: 0, groups: vec![], home: "/root".into() };
        assert_eq!(user("", &[]).unwrap(), root);
        assert_eq!(user("root", &[]).unwrap(), root);
        let web = User { uid: 33, gid: 34, groups: vec![50], home: "/srv".into() };
        assert_eq!(user("web", &[]).unwrap(), web);
        assert_eq!(user("33", &[]).unwrap(), web);
        assert_eq!(user("web:video", &[]).unwrap(), User { gid: 51, groups: vec![], ..web.clone() });
        assert_eq!(user("web:99", &["audio", "60"]).unwrap(), User { gid: 99, groups: vec![50, 60], ..web });
        assert_eq!(user("1000", &[]).unwrap(), User { uid: 1000, gid: 0, groups: vec![], home: "/".into() });
        // Whatever the image calls its users and groups.
        assert_eq!(user("42", &[]).unwrap(), User { uid: 42, gid: 0, groups: vec![], home: "/".into() });
        assert_eq!(user("web:51", &["42"]).unwrap().groups, [42]);
    }

    #[test]
    fn who_is_not_there_is_never_root() {
        for bad in ["nobody", "bad", "-1", "4294967295", "4294967296", "+1", "web:", "web:nogroup", "0x0"] {
            assert!(user(bad, &[]).is_err(), "{bad:?}");
        }
        assert!(user("web", &["nogroup"]).is_err());
    }
}
