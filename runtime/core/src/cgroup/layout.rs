//! How this machine's cgroups are mounted.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use super::{Cgroup, below};
use crate::error::{Context, Error, Result};
use crate::sys;

const CGROUP2_SUPER_MAGIC: i64 = 0x6367_7270;
const CGROUP_SUPER_MAGIC: i64 = 0x0027_e0eb;
const MOUNT: &str = "/sys/fs/cgroup";

/// Version 1 or 2, with the place of this process in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Layout {
    /// One directory with a hierarchy for each controller, perhaps with an unused version 2 tree beside
    /// them.
    V1 {
        /// The hierarchies.
        hierarchies: Vec<Hierarchy>,
    },
    /// One tree for all controllers.
    V2 {
        /// Where it is mounted.
        root: PathBuf,
        /// The cgroup of this process, from that root.
        own: PathBuf,
    },
}

/// One hierarchy of version 1.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hierarchy {
    /// Its controllers, or `name=…`.
    pub controllers: Vec<String>,
    /// Where it is mounted.
    pub mount: PathBuf,
    /// The cgroup of this process, from that root.
    pub own: PathBuf,
}

impl Hierarchy {
    /// The name of its directory.
    pub fn name(&self) -> String {
        self.mount.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
    }
}

impl Layout {
    /// The layout, looked at once in a process's life.
    ///
    /// # Errors
    /// As for [`Self::detect`]; a failure is not remembered.
    pub fn of_this_machine() -> Result<&'static Self> {
        static KNOWN: OnceLock<Layout> = OnceLock::new();
        if let Some(layout) = KNOWN.get() {
            return Ok(layout);
        }
        let layout = Self::detect()?;
        Ok(KNOWN.get_or_init(|| layout))
    }

    /// The directories that a container with these cgroups is in, one for each hierarchy: its own, or, of those that
    /// it lacks, the one of this process.
    pub fn shown(&self, cgroup: &Cgroup) -> Vec<PathBuf> {
        match (self, cgroup) {
            (Self::V2 { .. }, Cgroup::V2 { path, .. }) => vec![path.clone()],
            (Self::V2 { root, own }, _) => vec![below(root, Path::new("/"), own)],
            (Self::V1 { hierarchies }, _) => {
                let directories = match cgroup {
                    Cgroup::V1 { directories, .. } => directories.as_slice(),
                    _ => &[],
                };
                let own = |of: &Hierarchy| directories.iter().find(|d| d.controllers == of.controllers);
                hierarchies
                    .iter()
                    .map(|of| own(of).map_or_else(|| below(&of.mount, Path::new("/"), &of.own), |d| d.path.clone()))
                    .collect()
            }
        }
    }

    /// Looks at `/sys/fs/cgroup` and `/proc/self/cgroup`; the table of mounts, which is long on a busy
    /// node, is not read.
    ///
    /// # Errors
    /// When no cgroup filesystem is mounted there.
    pub fn detect() -> Result<Self> {
        let own = fs::read_to_string("/proc/self/cgroup").context("read /proc/self/cgroup")?;
        if sys::filesystem_magic(MOUNT).on("look at", MOUNT)? == CGROUP2_SUPER_MAGIC {
            let own = own.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("/");
            return Ok(Self::V2 { root: MOUNT.into(), own: own.into() });
        }
        let hierarchies: Vec<Hierarchy> = own.lines().filter_map(parse_line).filter_map(locate).collect();
        if hierarchies.is_empty() {
            return Err(Error::unsupported("this machine", format!("no cgroup filesystem is mounted at {MOUNT}")));
        }
        Ok(Self::V1 { hierarchies })
    }
}

/// `4:cpu,cpuacct:/user.slice` as controllers and path; `None` for version 2's line.
fn parse_line(line: &str) -> Option<(Vec<String>, PathBuf)> {
    let mut fields = line.splitn(3, ':').skip(1);
    let controllers = fields.next().filter(|list| !list.is_empty())?;
    let own = fields.next()?;
    Some((controllers.split(',').map(str::to_owned).collect(), own.into()))
}

fn locate((controllers, own): (Vec<String>, PathBuf)) -> Option<Hierarchy> {
    let joined = controllers.join(",");
    let names = std::iter::once(joined.as_str()).chain(controllers.iter().map(String::as_str));
    let mount = names
        .map(|name| Path::new(MOUNT).join(name.strip_prefix("name=").unwrap_or(name)))
        .find(|path| sys::filesystem_magic(path).is_ok_and(|magic| magic == CGROUP_SUPER_MAGIC))?;
    Some(Hierarchy { controllers, mount, own })
}

/// Version 2's tree where version 1's are beside it, as systemd mounts it.
pub(super) fn unified_beside() -> Option<&'static Path> {
    const UNIFIED: &str = "/sys/fs/cgroup/unified";
    sys::filesystem_magic(UNIFIED).is_ok_and(|magic| magic == CGROUP2_SUPER_MAGIC).then_some(Path::new(UNIFIED))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_proc_self_cgroup_are_read() {
        let (controllers, own) = parse_line("4:cpu,cpuacct:/user.slice/a:b").unwrap();
        assert_eq!(controllers, ["cpu", "cpuacct"]);
        assert_eq!(own, Path::new("/user.slice/a:b"));
        assert_eq!(parse_line("1:name=systemd:/").unwrap().0, ["name=systemd"]);
        assert_eq!(parse_line("0::/init.scope"), None);
    }
}
