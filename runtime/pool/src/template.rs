//! What the sandboxes of a pool are like.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// What stays between two leases of a sandbox. `docs/pool.md` has the table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tier {
    /// Nothing: each lease has a sandbox that nobody had before.
    #[default]
    Complete,
    /// The namespaces: processes are ended, each tmpfs is replaced, and a new session keyring begins.
    Wipe,
    /// All but processes.
    None,
}

impl Tier {
    /// Its name on a command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Complete => "complete",
            Self::Wipe => "wipe",
            Self::None => "none",
        }
    }
}

/// What a sandbox can reach over the network.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Network {
    /// Itself: a network namespace of its own with a loopback interface.
    #[default]
    None,
    /// Whatever the pool's process can.
    Host,
}

/// What happens to system calls that no program of a sandbox needs: keyrings, mounts, new namespaces, `bpf`,
/// `perf_event_open`, `userfaultfd`, modules, `kexec`, `io_uring` and the like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Filter {
    /// They fail with `EPERM`; `clone3`, whose arguments a filter cannot see, with `ENOSYS`.
    #[default]
    Deny,
    /// They end the program, with the verdict [`Status::DangerousSyscall`](crate::Status::DangerousSyscall). `clone3` fails
    /// with `ENOSYS`, since the C library calls it for threads, and what is refused for some arguments only fails as well:
    /// sockets of some families, and another limit of core files.
    Kill,
    /// No filter. What a program can do then is bounded by its namespaces and its lack of capabilities.
    Off,
}

/// Where a sandbox's root directory comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Root {
    /// An empty one, with [`Template::binds`] in it.
    Binds,
    /// A directory of the host, read-only. The places of mounts have to be there, and what programs are to reach has to be
    /// open to all users.
    Directory(PathBuf),
}

/// A file or directory of the host that sandboxes see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bind {
    /// Where it is on the host. With a directory comes what is mounted below it.
    pub source: PathBuf,
    /// Where it is in a sandbox.
    pub target: PathBuf,
    /// Whether programs may write to it, as far as its own permissions allow. Nobody resets what they write.
    pub writable: bool,
}

/// A filesystem in memory that every lease begins with empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tmpfs {
    /// Where it is.
    pub target: PathBuf,
    /// Its size in bytes.
    pub size: u64,
    /// How many files and directories it holds.
    pub inodes: u64,
    /// The permission bits of its root, which belongs to the program's user.
    pub mode: u32,
}

/// As whom programs run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Users {
    /// Make a user namespace for the pool, so that not even root in it is somebody outside.
    pub namespace: bool,
    /// The first user and group id of the host that belong to the pool.
    pub first: u32,
    /// How many there are: each sandbox gets one for itself. When all were used, a new spawner begins.
    pub count: u32,
}

impl Default for Users {
    /// Ids that systemd's documentation names as used by nobody.
    fn default() -> Self {
        Self { namespace: true, first: 0x7000_0000, count: 65_536 }
    }
}

/// What every sandbox of a pool is like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    /// Its root directory.
    pub root: Root,
    /// Files and directories of the host.
    pub binds: Vec<Bind>,
    /// Symbolic links: path and target. With [`Root::Binds`] only.
    pub links: Vec<(PathBuf, PathBuf)>,
    /// Filesystems in memory, the only places that can be written to.
    pub tmpfs: Vec<Tmpfs>,
    /// Paths that look empty: files as /dev/null, directories as an empty one.
    pub masked: Vec<PathBuf>,
    /// Whether programs see a /proc. It is read-only, and shows a program the processes of its own user only.
    pub proc: bool,
    /// Whether there is a /dev with the harmless devices.
    pub devices: bool,
    /// Its host name.
    pub hostname: String,
    /// Its network.
    pub network: Network,
    /// Its seccomp filter.
    pub filter: Filter,
    /// As whom programs run. An ordinary user has one id only, his own.
    pub users: Users,
    /// What stays between leases.
    pub tier: Tier,
    /// Limit on the memory of a sandbox with all its tmpfs, in bytes, where there are cgroups.
    pub memory: Option<u64>,
    /// Limit on processes and threads at once, beside the sandbox's init, where there are cgroups.
    pub processes: Option<u64>,
}

const MIB: u64 = 1 << 20;

impl Template {
    /// A sandbox that sees the host's programs and libraries, with /w to work in and /tmp, of 128 MiB and 4096 files each,
    /// and /dev/shm. Nothing else of the host is there: no /etc but what the dynamic linker reads, no home, no /var.
    pub fn host() -> Self {
        let mut template = Self {
            root: Root::Binds,
            binds: Vec::new(),
            links: Vec::new(),
            tmpfs: ["/w", "/tmp"].map(|path| tmpfs(path, 128 * MIB, 4096, 0o755)).into(),
            masked: ["kcore", "keys", "key-users", "timer_list"].map(|name| Path::new("/proc").join(name)).into(),
            proc: true,
            devices: true,
            hostname: "pool".into(),
            network: Network::default(),
            filter: Filter::default(),
            users: Users::default(),
            tier: Tier::default(),
            memory: Some(512 * MIB),
            processes: Some(64),
        };
        template.tmpfs.push(tmpfs("/dev/shm", 64 * MIB, 1024, 0o1777));
        for name in ["usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32"] {
            let path = Path::new("/").join(name);
            match std::fs::read_link(&path) {
                Ok(target) => template.links.push((path, target)),
                Err(_) if path.is_dir() => template.bind(&path),
                Err(_) => {}
            }
        }
        for name in ["ld.so.cache", "ld.so.conf", "ld.so.conf.d", "alternatives"] {
            let path = Path::new("/etc").join(name);
            if path.exists() {
                template.bind(&path);
            }
        }
        template
    }

    /// A sandbox whose root is a directory of the host, read-only, with a tmpfs each at /tmp and /w if it has these
    /// directories, and at /dev/shm.
    pub fn directory(root: impl Into<PathBuf>) -> Self {
        let root = root.into();
        let mut template = Self { binds: Vec::new(), links: Vec::new(), ..Self::host() };
        template.tmpfs.retain(|tmpfs| {
            let inside = tmpfs.target.strip_prefix("/").unwrap_or(&tmpfs.target);
            tmpfs.target.starts_with("/dev") || root.join(inside).is_dir()
        });
        template.proc = root.join("proc").is_dir();
        template.devices = root.join("dev").is_dir();
        if !template.devices {
            template.tmpfs.retain(|tmpfs| !tmpfs.target.starts_with("/dev"));
        }
        template.root = Root::Directory(root);
        template
    }

    /// Shows a file or directory of the host, read-only, at its own path.
    fn bind(&mut self, path: &Path) {
        self.binds.push(Bind { source: path.to_owned(), target: path.to_owned(), writable: false });
    }

    /// The directory that programs begin in unless told otherwise: the first tmpfs, or the root.
    pub fn directory_of_work(&self) -> &Path {
        self.tmpfs.first().map_or(Path::new("/"), |tmpfs| &tmpfs.target)
    }

    /// Whether it makes sense.
    ///
    /// # Errors
    /// [`Error::Template`] with the field and the reason.
    pub fn check(&self) -> Result<()> {
        let bad = |field, reason: String| Err(Error::Template { field, reason });
        let targets = self.binds.iter().map(|bind| &bind.target).chain(self.tmpfs.iter().map(|tmpfs| &tmpfs.target));
        for path in targets.chain(self.links.iter().map(|(path, _)| path)).chain(&self.masked) {
            let plain = path
                .components()
                .all(|part| matches!(part, std::path::Component::RootDir | std::path::Component::Normal(_)));
            if !path.is_absolute() || !plain || path.parent().is_none() {
                return bad("path", format!("{} is not an absolute path below the root", path.display()));
            }
        }
        // The kernel takes 0 for no limit, and what is 0 after it was rounded up to pages.
        let limits = 1..=u64::MAX >> 2;
        if self.tmpfs.iter().any(|tmpfs| !limits.contains(&tmpfs.size) || !limits.contains(&tmpfs.inodes)) {
            return bad("tmpfs", "a size or number of files is 0 or too large".into());
        }
        if self.hostname.is_empty() || self.hostname.len() > 64 || self.hostname.contains('\0') {
            return bad("host name", format!("{:?} is empty, or longer than 64 bytes", self.hostname));
        }
        let covered =
            |path: &Path| self.tmpfs.iter().any(|tmpfs| path != tmpfs.target && path.starts_with(&tmpfs.target));
        if let Some(bind) = self.binds.iter().find(|bind| covered(&bind.target)) {
            return bad("binds", format!("{} is inside of a tmpfs", bind.target.display()));
        }
        if !self.devices && !self.masked.is_empty() {
            return bad("masked", "without devices there is no /dev/null to cover files with".into());
        }
        if self.root != Root::Binds && !self.links.is_empty() {
            return bad("links", "the root directory of the host is not written to".into());
        }
        let Users { first, count, .. } = self.users;
        if count < 2 || first == 0 || first.checked_add(count).is_none_or(|end| end == u32::MAX) {
            return bad("users", format!("{count} ids from {first} are not a range of two or more beside root"));
        }
        Ok(())
    }
}

fn tmpfs(path: &str, size: u64, inodes: u64, mode: u32) -> Tmpfs {
    Tmpfs { target: path.into(), size, inodes, mode }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_made_is_refused_by_name() {
        assert!(Template::host().check().is_ok());
        type Change = (&'static str, fn(&mut Template));
        let changes: [Change; 8] = [
            ("tmpfs", |t| t.tmpfs[0].size = 0),
            ("tmpfs", |t| t.tmpfs[0].size = u64::MAX),
            ("tmpfs", |t| t.tmpfs[0].inodes = 0),
            ("path", |t| t.tmpfs[0].target = "w".into()),
            ("path", |t| t.binds.push(Bind { source: "/".into(), target: "/a/../b".into(), writable: false })),
            ("host name", |t| t.hostname.clear()),
            ("users", |t| t.users.first = 0),
            ("users", |t| t.users.first = u32::MAX - 10),
        ];
        for (field, change) in changes {
            let mut template = Template::host();
            change(&mut template);
            let error = template.check().unwrap_err().to_string();
            assert!(error.contains(field), "{error}");
        }
    }
}
