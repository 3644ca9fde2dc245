//! Cgroups for single processes, below the daemon's own: where that is writable and, with version 2, delegated.
//!
//! In an ordinary container it is not, and resource limits serve alone; whoever asks is told so.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use super::Limits;
use crate::ids;
use crate::metrics;

/// The controllers that are used.
const CONTROLLERS: [&str; 3] = ["memory", "pids", "cpuacct"];

/// Where groups are made.
#[derive(Debug)]
pub struct Place {
    /// Version 2's one directory, or those of version 1's controllers.
    tops: Vec<(&'static str, PathBuf)>,
    unified: bool,
}

/// A group of one process and its children; removed when it is dropped.
#[derive(Debug)]
pub struct Group {
    parts: Vec<(&'static str, PathBuf)>,
    unified: bool,
}

/// What a group has used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Used {
    /// Time on a processor.
    pub cpu: Duration,
    /// Memory now, in bytes.
    pub memory: u64,
    /// The most that it was, in bytes, where the kernel says so.
    pub peak_memory: Option<u64>,
    /// How many processes there are.
    pub processes: u64,
    /// How often memory ran out and something was killed for it.
    pub killed_for_memory: u64,
}

/// The place of this daemon, looked for once.
///
/// # Errors
/// Why there is none.
pub fn place() -> Result<&'static Place, String> {
    static PLACE: OnceLock<Result<Place, String>> = OnceLock::new();
    PLACE.get_or_init(Place::find).as_ref().map_err(Clone::clone)
}

impl Place {
    fn find() -> Result<Self, String> {
        let tops: Vec<_> = CONTROLLERS
            .iter()
            .filter_map(|name| Some((*name, metrics::group(Some(name)).filter(|top| top.is_dir())?)))
            .collect();
        let place = if tops.is_empty() {
            let top = metrics::group(None).filter(|top| top.join("cgroup.controllers").exists());
            let top = top.ok_or("no cgroup is mounted in this container")?;
            delegate(&top)?;
            Self { tops: vec![("", top)], unified: true }
        } else {
            Self { tops, unified: false }
        };
        // By the only proof that there is.
        place.make(&Limits::default()).map(drop).map_err(|e| format!("{}: {e}", place.tops[0].1.display()))?;
        Ok(place)
    }

    /// Makes a group with limits.
    ///
    /// # Errors
    /// The kernel's.
    pub fn make(&self, limits: &Limits) -> io::Result<Group> {
        let name = format!("runx-{}", ids::hex());
        let mut group = Group { parts: Vec::new(), unified: self.unified };
        for (controller, top) in &self.tops {
            let path = top.join(&name);
            fs::create_dir(&path)?;
            group.parts.push((controller, path));
        }
        let names = if self.unified { ["memory.max", "pids.max"] } else { ["memory.limit_in_bytes", "pids.max"] };
        for (controller, file, value) in
            [("memory", names[0], limits.memory_bytes), ("pids", names[1], limits.processes)]
        {
            if let (Some(value), Some(path)) = (value, group.part(controller)) {
                fs::write(path.join(file), value.to_string())?;
                // What does not fit must not go on elsewhere. Not every kernel counts that.
                let _ = match file {
                    "memory.max" => fs::write(path.join("memory.swap.max"), "0"),
                    "memory.limit_in_bytes" => fs::write(path.join("memory.memsw.limit_in_bytes"), value.to_string()),
                    _ => Ok(()),
                };
            }
        }
        Ok(group)
    }
}

/// Lets the groups below one have controllers. The kernel wants no process in it then, except at the top of a namespace's
/// tree: the daemon goes into one of its own where it is alone.
fn delegate(top: &Path) -> Result<(), String> {
    let control = top.join("cgroup.subtree_control");
    let enable = || fs::write(&control, "+memory +pids");
    let enabled = || {
        let names = fs::read_to_string(&control).unwrap_or_default();
        ["memory", "pids"].iter().all(|name| names.split_whitespace().any(|known| known == *name))
    };
    if enabled() || enable().is_ok() {
        return Ok(());
    }
    let own = std::process::id().to_string();
    let procs = fs::read_to_string(top.join("cgroup.procs")).unwrap_or_default();
    if procs.split_whitespace().any(|pid| pid != own) {
        return Err(format!("{}: others are in the group, and it is not delegated", top.display()));
    }
    let leaf = top.join("runx-agent");
    let moved =
        fs::create_dir(&leaf).or_else(|e| if e.kind() == io::ErrorKind::AlreadyExists { Ok(()) } else { Err(e) });
    let moved = moved.and_then(|()| fs::write(leaf.join("cgroup.procs"), &own)).and_then(|()| enable());
    moved.map_err(|e| format!("{}: {e}", top.display()))
}

fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn field(path: &Path, name: &str) -> Option<u64> {
    let text = fs::read_to_string(path).ok()?;
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
}

impl Group {
    fn part(&self, controller: &str) -> Option<&Path> {
        let found = self.parts.iter().find(|(name, _)| self.unified || *name == controller);
        found.map(|(_, path)| path.as_path())
    }

    /// Whether a controller is among its own: what it cannot limit is limited otherwise.
    pub fn has(&self, controller: &str) -> bool {
        self.part(controller).is_some()
    }

    /// The files through which a process enters, by writing `0`.
    ///
    /// # Errors
    /// When one cannot be opened.
    pub fn doors(&self) -> io::Result<Vec<File>> {
        self.parts.iter().map(|(_, path)| OpenOptions::new().write(true).open(path.join("cgroup.procs"))).collect()
    }

    /// What it has used.
    pub fn used(&self) -> Used {
        let read = |controller: &str, file: &str| self.part(controller).and_then(|path| number(&path.join(file)));
        let of = |controller: &str, file: &str, name: &str| {
            self.part(controller).and_then(|path| field(&path.join(file), name)).unwrap_or(0)
        };
        let processes = read("pids", "pids.current").unwrap_or(0);
        if self.unified {
            return Used {
                cpu: Duration::from_micros(of("", "cpu.stat", "usage_usec")),
                memory: read("", "memory.current").unwrap_or(0),
                peak_memory: read("", "memory.peak"),
                processes,
                killed_for_memory: of("", "memory.events", "oom_kill"),
            };
        }
        Used {
            cpu: Duration::from_nanos(read("cpuacct", "cpuacct.usage").unwrap_or(0)),
            memory: read("memory", "memory.usage_in_bytes").unwrap_or(0),
            peak_memory: read("memory", "memory.max_usage_in_bytes"),
            processes,
            killed_for_memory: of("memory", "memory.oom_control", "oom_kill"),
        }
    }

    /// Kills all in it, those that have left the process group among them.
    pub fn kill(&self) {
        let Some((_, path)) = self.parts.first() else { return };
        if self.unified && fs::write(path.join("cgroup.kill"), "1").is_ok() {
            return;
        }
        // Nobody starts another one meanwhile.
        if let Some(path) = self.part("pids") {
            let _ = fs::write(path.join("pids.max"), "0");
        }
        // Some may be starting others meanwhile.
        for _ in 0..64 {
            let procs = fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default();
            // 0 is one of another namespace, and would mean the daemon's own group.
            let pids: Vec<i32> =
                procs.split_whitespace().filter_map(|pid| pid.parse().ok()).filter(|pid| *pid > 0).collect();
            if pids.is_empty() {
                break;
            }
            for pid in pids {
                let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::SIGKILL);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let gone = |path: &Path| match fs::remove_dir(path) {
            Err(e) => e.kind() == io::ErrorKind::NotFound,
            Ok(()) => true,
        };
        if self.parts.iter().all(|(_, path)| gone(path)) {
            return;
        }
        // The last ones of it are still being buried.
        let parts = std::mem::take(&mut self.parts);
        let unified = self.unified;
        std::thread::spawn(move || {
            let group = std::mem::ManuallyDrop::new(Self { parts, unified });
            for _ in 0..200 {
                group.kill();
                std::thread::sleep(Duration::from_millis(10));
                if group.parts.iter().all(|(_, path)| gone(path)) {
                    return;
                }
            }
            log::warn!("a cgroup cannot be removed: {:?}", group.parts);
        });
    }
}
