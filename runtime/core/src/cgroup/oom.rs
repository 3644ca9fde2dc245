//! Learning of a lack of memory as it happens.

use std::fs;
use std::io::{self, Read, Seek};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::files::{pair, read_pairs, try_write};
use crate::error::{Context, Result};

/// Watches the cgroups of one container for processes that are killed for lack of memory.
///
/// Its descriptor becomes readable when there may be something new; [`Self::drain`] then tells what. It can be
/// waited for with epoll, and so with tokio.
#[derive(Debug)]
pub struct OomWatch {
    /// An epoll of one: the kernel's two versions notify in different ways, and this way it shows as one.
    ready: Epoll,
    source: Source,
    /// Kills that have been told of.
    told: u64,
    /// When a kill was announced that has not been counted so far.
    announced: Option<Instant>,
}

/// How long an announced kill may take. It may also not come at all, when memory is freed just then.
const ANNOUNCED_FOR: Duration = Duration::from_secs(1);

#[derive(Debug)]
enum Source {
    /// An eventfd that the kernel raises before it kills, and the directory.
    V1(EventFd, PathBuf),
    /// `memory.events`. A file and no inotify, of which a user can have a hundred only.
    V2(fs::File),
}

/// What [`OomWatch::drain`] found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OomEvents {
    /// Processes killed since it was last asked.
    pub kills: u64,
    /// The kernel has announced a kill that is not counted yet: ask again in a few milliseconds.
    pub announced: bool,
    /// Processes wait for memory since nothing may be killed (`disableOOMKiller`).
    pub stalled: bool,
    /// The cgroup is gone; there will be nothing more.
    pub gone: bool,
}

impl OomWatch {
    /// Watches a directory of version 1's memory controller.
    pub(super) fn v1(directory: &Path) -> Result<Self> {
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).context("create an eventfd")?;
        let path = directory.join("memory.oom_control");
        let control = fs::File::open(&path).on("open", &path)?;
        let text = format!("{} {}", event.as_fd().as_raw_fd(), control.as_raw_fd());
        try_write(directory, "cgroup.event_control", &text).on("watch", &path)?;
        let told = pair(&read_pairs(directory, "memory.oom_control"), "oom_kill");
        let ready = epoll_of(event.as_fd(), EpollFlags::EPOLLIN)?;
        Ok(Self { ready, source: Source::V1(event, directory.to_owned()), told, announced: None })
    }

    /// Watches a directory of version 2; `None` if it has not got the memory controller.
    pub(super) fn v2(path: &Path) -> Result<Option<Self>> {
        let path = path.join("memory.events");
        let file = match fs::File::open(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.on("open", &path)?,
        };
        let ready = epoll_of(file.as_fd(), EpollFlags::EPOLLPRI)?;
        let mut watch = Self { ready, source: Source::V2(file), told: 0, announced: None };
        // The kernel notifies of what changes after a file was read.
        watch.drain()?;
        Ok(Some(watch))
    }

    /// Tells what is new, and makes the descriptor wait for more.
    pub fn drain(&mut self) -> Result<OomEvents> {
        let (kills, mut events) = match &mut self.source {
            Source::V1(event, directory) => {
                let notified = event.read().is_ok();
                let control = read_pairs(directory, "memory.oom_control");
                let on = |key| pair(&control, key) != 0;
                if notified {
                    self.announced = Some(Instant::now());
                }
                let waits = self.announced.is_some_and(|since| since.elapsed() < ANNOUNCED_FOR);
                let events = OomEvents {
                    announced: waits && !on("oom_kill_disable"),
                    stalled: notified && on("oom_kill_disable") && on("under_oom"),
                    gone: control.is_empty(),
                    ..OomEvents::default()
                };
                (pair(&control, "oom_kill"), events)
            }
            Source::V2(file) => {
                let mut text = String::new();
                match file.rewind().and_then(|()| file.read_to_string(&mut text)) {
                    Err(e) if e.raw_os_error() == Some(libc::ENODEV) => {}
                    other => drop(other.context("read memory.events")?),
                }
                let kills = text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.parse().ok());
                (kills.unwrap_or(0), OomEvents { gone: text.is_empty(), ..OomEvents::default() })
            }
        };
        events.kills = kills.saturating_sub(self.told);
        // The kernel raises an eventfd for the last time when the directory is removed.
        if events.kills > 0 || events.stalled || events.gone {
            self.announced = None;
            events.announced = false;
        }
        if !events.gone {
            self.told = kills;
        }
        Ok(events)
    }
}

impl AsFd for OomWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ready.0.as_fd()
    }
}

fn epoll_of(fd: BorrowedFd<'_>, flags: EpollFlags) -> Result<Epoll> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).context("create an epoll")?;
    epoll.add(fd, EpollEvent::new(flags, 0)).context("add to an epoll")?;
    Ok(epoll)
}

/// A duplicate for somebody who wants to own what he waits for.
impl TryFrom<&OomWatch> for OwnedFd {
    type Error = io::Error;

    fn try_from(watch: &OomWatch) -> io::Result<Self> {
        watch.as_fd().try_clone_to_owned()
    }
}
