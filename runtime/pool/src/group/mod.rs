//! Control groups: one for the pool, one below it for each sandbox.
//!
//! With version 1 a sandbox is in a group of each of three hierarchies and is moved there when it is made, off the path of
//! executions; with version 2 it is born in its group. Where groups may not be made there are none, and limits are those
//! of each process.

mod files;
mod lease;
mod owner;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use runx_core::cgroup::{Hierarchy, Layout};
use runx_core::sys;

use crate::error::{Error, Result};
use files::{ControlFile, PATIENCE, Setting, remove, write};
pub(crate) use lease::LeaseGroup;

/// The group of spawners, with version 2.
const SPAWNER: &str = "spawner";

/// The groups of a pool.
#[derive(Debug)]
pub(crate) struct PoolGroup {
    kind: Kind,
    next: AtomicU64,
    /// Sandboxes cannot be born in their groups, and are moved there.
    moved: AtomicBool,
    /// Its directories, locked as long as it is there.
    _locks: Vec<File>,
}

#[derive(Debug)]
enum Kind {
    V1 { memory: Option<PathBuf>, pids: Option<PathBuf>, cpu: Option<PathBuf> },
    V2 { path: PathBuf, controllers: Vec<String>, spawner: Option<u32> },
    None { why: String },
}

impl PoolGroup {
    /// Makes the pool's groups, and removes those of pools whose process is gone. Never fails: where groups cannot be
    /// made there are none, and [`Self::describe`] tells why. `spawner` is the user that clones sandboxes, who with version 2
    /// has to be allowed to have them born in their groups: the lists of processes are made his, and no limit.
    pub(crate) fn create(spawner: Option<u32>) -> Self {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let name = owner::name(COUNT.fetch_add(1, Ordering::Relaxed));
        let mut locks = Vec::new();
        let kind = match Layout::of_this_machine() {
            Ok(Layout::V1 { hierarchies }) => create_v1(hierarchies, &name, &mut locks),
            Ok(Layout::V2 { root, own }) => create_v2(root, own, &name, spawner, &mut locks),
            Err(e) => Kind::None { why: e.to_string() },
        };
        let moved = AtomicBool::new(matches!(kind, Kind::V1 { .. }));
        Self { kind, next: AtomicU64::new(0), moved, _locks: locks }
    }

    /// What there is, in words.
    pub(crate) fn describe(&self) -> String {
        match &self.kind {
            Kind::V1 { memory, pids, cpu } => {
                let named = [("memory", memory), ("pids", pids), ("cpuacct", cpu)];
                let (there, missing): (Vec<_>, Vec<_>) = named.into_iter().partition(|(_, path)| path.is_some());
                let names =
                    |list: Vec<(&'static str, _)>| list.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
                if missing.is_empty() {
                    format!("version 1: {}", names(there))
                } else {
                    format!("version 1: {}; without {}", names(there), names(missing))
                }
            }
            Kind::V2 { controllers, .. } => format!("version 2: {}", controllers.join(", ")),
            Kind::None { why } => format!("none: {why}"),
        }
    }

    /// Whether memory is limited and measured.
    pub(crate) fn has_memory(&self) -> bool {
        match &self.kind {
            Kind::V1 { memory, .. } => memory.is_some(),
            Kind::V2 { controllers, .. } => controllers.iter().any(|name| name == "memory"),
            Kind::None { .. } => false,
        }
    }

    /// Whether processes are counted and limited.
    pub(crate) fn has_processes(&self) -> bool {
        match &self.kind {
            Kind::V1 { pids, .. } => pids.is_some(),
            Kind::V2 { controllers, .. } => controllers.iter().any(|name| name == "pids"),
            Kind::None { .. } => false,
        }
    }

    /// Whether a sandbox has to be moved into its group.
    pub(crate) fn is_entered(&self) -> bool {
        self.moved.load(Ordering::Relaxed)
    }

    /// Has sandboxes moved into their groups from now on. Returns whether that is a change.
    pub(crate) fn enter_instead(&self) -> bool {
        matches!(self.kind, Kind::V2 { .. }) && !self.moved.swap(true, Ordering::Relaxed)
    }

    /// Puts a spawner where, with version 2, it can clone from into the groups of sandboxes: what has both below it is the
    /// pool's own group. Where it cannot be put there, sandboxes are moved.
    pub(crate) fn adopt(&self, spawner: u32) {
        let Kind::V2 { path, .. } = &self.kind else { return };
        if let Err(e) = write(&path.join(SPAWNER), "cgroup.procs", &spawner.to_string()) {
            log::debug!("put the spawner into {}: {e}", path.display());
        }
    }

    /// Makes the group of a sandbox.
    pub(crate) fn lease(&self) -> Result<LeaseGroup> {
        let name = self.next.fetch_add(1, Ordering::Relaxed).to_string();
        let mut group = LeaseGroup::default();
        match &self.kind {
            Kind::V1 { memory, pids, cpu } => {
                for base in [memory, pids, cpu].into_iter().flatten() {
                    group.make(base.join(&name))?;
                }
                let under = |base: &Option<PathBuf>| base.as_ref().map(|base| base.join(&name));
                if let Some(path) = under(memory) {
                    group.memory_peak = ControlFile::open(&path, "memory.max_usage_in_bytes", true)?;
                    group.memory_limit = Setting::find(&path, "memory.limit_in_bytes")?;
                    group.swap_limit = Setting::find(&path, "memory.memsw.limit_in_bytes")?;
                    group.oom = ControlFile::open(&path, "memory.oom_control", false)?;
                }
                if let Some(path) = under(pids) {
                    group.pids(&path)?;
                }
                if let Some(path) = under(cpu) {
                    group.cpu = ControlFile::open(&path, "cpuacct.usage", false)?;
                }
            }
            Kind::V2 { path, spawner, .. } => {
                let path = path.join(&name);
                group.make(path.clone())?;
                give_processes(&path, *spawner);
                group.memory_peak = match ControlFile::open(&path, "memory.peak", true)? {
                    None => ControlFile::open(&path, "memory.peak", false)?,
                    peak => peak,
                };
                group.memory_limit = Setting::find(&path, "memory.max")?;
                group.memory_current = Setting::find(&path, "memory.current")?;
                if let Some(swap) = Setting::find(&path, "memory.swap.max")? {
                    swap.write(0).map_err(|e| system("forbid swap in", &path, e))?;
                }
                group.oom = ControlFile::open(&path, "memory.events", false)?;
                group.pids(&path)?;
                group.cpu = ControlFile::open(&path, "cpu.stat", false)?;
                let open = sys::open(&path, libc::O_RDONLY | libc::O_DIRECTORY);
                group.birthplace = Some(open.map_err(|e| system("open", &path, e))?);
            }
            Kind::None { .. } => {}
        }
        Ok(group)
    }
}

impl PoolGroup {
    /// Removes the pool's groups with all below them. Their processes have to be gone or going.
    pub(crate) fn clear(&self) {
        let paths: Vec<&Path> = match &self.kind {
            Kind::V1 { memory, pids, cpu } => [memory, pids, cpu].into_iter().flatten().map(PathBuf::as_path).collect(),
            Kind::V2 { path, .. } => vec![path],
            Kind::None { .. } => Vec::new(),
        };
        for path in paths {
            if let Err(e) = remove(path, PATIENCE) {
                log::warn!("{e}");
            }
        }
    }
}

fn system(verb: &str, path: &Path, error: io::Error) -> Error {
    Error::System(runx_core::Error::system(format!("{verb} cgroup {}", path.display()), error))
}

/// The pool's directories below those of this process.
fn create_v1(hierarchies: &[Hierarchy], name: &str, locks: &mut Vec<File>) -> Kind {
    let mut failure = None;
    let mut made: Vec<PathBuf> = Vec::new();
    let mut make = |controller: &str| {
        let hierarchy = hierarchies.iter().find(|of| of.controllers.iter().any(|name| name == controller))?;
        let base = hierarchy.mount.join(hierarchy.own.strip_prefix("/").unwrap_or(&hierarchy.own));
        let path = base.join(name);
        // One directory serves the controllers that share a hierarchy.
        if made.contains(&path) {
            return Some(path);
        }
        owner::sweep(&base);
        match owner::make(&path) {
            Ok(lock) => {
                locks.push(lock);
                made.push(path.clone());
                Some(path)
            }
            Err(e) => {
                failure = Some(format!("make {}: {e}", path.display()));
                None
            }
        }
    };
    let (memory, pids, cpu) = (make("memory"), make("pids"), make("cpuacct"));
    if memory.is_none() && pids.is_none() && cpu.is_none() {
        return Kind::None { why: failure.unwrap_or_else(|| "no controller is there".into()) };
    }
    Kind::V1 { memory, pids, cpu }
}

/// The pool's directory beside the group of this process, which has processes and so cannot give its controllers on.
fn create_v2(root: &Path, own: &Path, name: &str, spawner: Option<u32>, locks: &mut Vec<File>) -> Kind {
    let base = own.parent().unwrap_or(Path::new("/"));
    let base = root.join(base.strip_prefix("/").unwrap_or(base));
    owner::sweep(&base);
    let path = base.join(name);
    match owner::make(&path) {
        Ok(lock) => locks.push(lock),
        Err(e) => return Kind::None { why: format!("make {}: {e}", path.display()) },
    }
    let mut controllers = Vec::new();
    for name in ["memory", "pids", "cpu"] {
        let enable = format!("+{name}");
        // Where it is on already, the first may be forbidden and the second not.
        let _ = write(&base, "cgroup.subtree_control", &enable);
        if write(&path, "cgroup.subtree_control", &enable).is_ok() {
            controllers.push(name.to_owned());
        }
    }
    if controllers.is_empty() {
        let _ = remove(&path, PATIENCE);
        return Kind::None { why: format!("{} has no controllers to give on", base.display()) };
    }
    give_processes(&path, spawner);
    if let Err(e) = std::fs::create_dir(path.join(SPAWNER)) {
        log::debug!("make the spawner's cgroup in {}: {e}", path.display());
    }
    Kind::V2 { path, controllers, spawner }
}

/// Lets a user put processes into a group, which is all that he can do with it.
fn give_processes(path: &Path, user: Option<u32>) {
    if let Err(e) = std::os::unix::fs::chown(path.join("cgroup.procs"), user, None) {
        log::debug!("give away the list of processes of {}: {e}", path.display());
    }
}
