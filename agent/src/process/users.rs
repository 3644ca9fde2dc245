//! Users and groups, from /etc/passwd and /etc/group as they are at the time: libc's name service would load libraries out
//! of the container.

use std::fs;
use std::io;

/// Who a process is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
}

/// An entry of /etc/passwd.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// Its name.
    pub name: String,
    /// User id.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// Home directory.
    pub home: String,
    /// Login shell.
    pub shell: String,
}

/// The account databases, read once for a request.
#[derive(Debug, Default)]
pub struct Accounts {
    users: Vec<User>,
    /// Name, id, members.
    groups: Vec<(String, u32, Vec<String>)>,
}

impl Accounts {
    /// Those of this machine. What is missing is empty: a scratch image has neither file.
    pub fn load() -> Self {
        let text = |path| fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
        Self::parse(&text("/etc/passwd"), &text("/etc/group"))
    }

    fn parse(passwd: &str, group: &str) -> Self {
        let users = passwd.lines().filter_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next().filter(|name| !name.is_empty() && !name.starts_with('#'))?;
            fields.next()?;
            let uid = fields.next()?.parse().ok()?;
            let gid = fields.next()?.parse().ok()?;
            fields.next();
            let home = fields.next().unwrap_or_default();
            Some(User {
                name: name.to_owned(),
                uid,
                gid,
                home: home.to_owned(),
                shell: fields.next().unwrap_or_default().to_owned(),
            })
        });
        let groups = group.lines().filter_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next().filter(|name| !name.is_empty())?;
            fields.next()?;
            let gid = fields.next()?.parse().ok()?;
            let members = fields.next().unwrap_or_default().split(',').filter(|member| !member.is_empty());
            Some((name.to_owned(), gid, members.map(str::to_owned).collect()))
        });
        Self { users: users.collect(), groups: groups.collect() }
    }

    /// The first entry with a user id.
    pub fn user(&self, uid: u32) -> Option<&User> {
        self.users.iter().find(|user| user.uid == uid)
    }

    /// The entry of a name.
    pub fn user_named(&self, name: &str) -> Option<&User> {
        self.users.iter().find(|user| user.name == name)
    }

    /// The id of a group.
    pub fn group_named(&self, name: &str) -> Option<u32> {
        self.groups.iter().find(|(known, _, _)| known == name).map(|(_, gid, _)| *gid)
    }

    /// A user's name, or the number where there is none.
    pub fn name_of(&self, uid: u32) -> String {
        self.user(uid).map_or_else(|| uid.to_string(), |user| user.name.clone())
    }

    /// A group's name, or the number where there is none.
    pub fn group_name_of(&self, gid: u32) -> String {
        self.groups
            .iter()
            .find(|(_, known, _)| *known == gid)
            .map_or_else(|| gid.to_string(), |(name, _, _)| name.clone())
    }

    /// The identity that a user id and perhaps a group id mean: the primary and supplementary groups of an account, and
    /// group 0 and none where there is no account.
    pub fn identity(&self, uid: u32, gid: Option<u32>) -> Identity {
        let user = self.user(uid);
        let primary = gid.or(user.map(|user| user.gid)).unwrap_or(0);
        let member = |(_, id, members): &(String, u32, Vec<String>)| {
            user.is_some_and(|user| members.contains(&user.name)).then_some(*id)
        };
        let groups = if gid.is_none() { self.groups.iter().filter_map(member).collect() } else { Vec::new() };
        Identity { uid, gid: primary, groups }
    }
}

/// This process's own user and group.
pub fn own() -> (u32, u32) {
    (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw())
}

impl Identity {
    /// The highest number means "no change" to the kernel.
    fn check(&self) -> io::Result<()> {
        if self.uid == u32::MAX || self.gid == u32::MAX || self.groups.contains(&u32::MAX) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        Ok(())
    }

    /// Becomes this identity for files alone, in this thread alone. Who may signal the daemon does not change by that.
    ///
    /// # Errors
    /// EPERM where the process may not.
    pub fn assume_for_files(&self) -> io::Result<()> {
        self.check()?;
        // SAFETY: the list lives through the call and has the length that is given; the others take numbers.
        unsafe {
            if libc::syscall(libc::SYS_setgroups, self.groups.len(), self.groups.as_ptr()) < 0 {
                return Err(io::Error::last_os_error());
            }
            // They tell what was before, and no failure: what is now is asked for by a number that is none.
            libc::syscall(libc::SYS_setfsgid, self.gid);
            libc::syscall(libc::SYS_setfsuid, self.uid);
            let now = (libc::syscall(libc::SYS_setfsuid, u32::MAX), libc::syscall(libc::SYS_setfsgid, u32::MAX));
            if now != (self.uid.into(), self.gid.into()) {
                return Err(io::Error::from_raw_os_error(libc::EPERM));
            }
        }
        Ok(())
    }

    /// Becomes this identity, in this thread alone, by raw system calls: libc's would change all threads. It also works
    /// between fork and exec.
    ///
    /// # Errors
    /// EPERM where the process may not.
    pub fn assume(&self) -> io::Result<()> {
        self.check()?;
        let check = |code: libc::c_long| if code < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
        // SAFETY: the list lives through the call and has the length that is given; the others take numbers.
        unsafe {
            check(libc::syscall(libc::SYS_setgroups, self.groups.len(), self.groups.as_ptr()))?;
            check(libc::syscall(libc::SYS_setresgid, self.gid, self.gid, self.gid))?;
            check(libc::syscall(libc::SYS_setresuid, self.uid, self.uid, self.uid))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accounts() -> Accounts {
        Accounts::parse(
            "root:x:0:0:root:/root:/bin/bash\nann:x:1000:100:Ann:/home/ann:/bin/sh\nbroken\n:x:1:1::/:\n",
            "root:x:0:\nusers:x:100:\nwheel:x:10:ann,bob\n",
        )
    }

    #[test]
    fn a_user_has_the_groups_of_its_account() {
        assert_eq!(accounts().identity(1000, None), Identity { uid: 1000, gid: 100, groups: vec![10] });
        assert_eq!(accounts().identity(1000, Some(7)), Identity { uid: 1000, gid: 7, groups: vec![] });
        assert_eq!(accounts().identity(4242, None), Identity { uid: 4242, gid: 0, groups: vec![] });
    }

    #[test]
    fn ids_without_a_name_are_numbers() {
        let accounts = accounts();
        assert_eq!((accounts.name_of(0), accounts.name_of(77)), ("root".into(), "77".into()));
        assert_eq!((accounts.group_name_of(10), accounts.group_name_of(77)), ("wheel".into(), "77".into()));
    }
}
