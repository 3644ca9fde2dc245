//! Groups for processes that look after containers and outlive whoever started them.
//!
//! In the groups of a session, a service or a pod such a process would be killed when these end, keep them from their
//! end, or be throttled with them. It goes to a group that is shared by all of its kind, and the last one that goes
//! removes it.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use super::files::{persist, try_write};
use super::layout::{self, Layout};
use super::{below, v1};
use crate::sys;

/// The group, below the one that containers are in. No container's name begins with a dot.
const NAME: &str = "runx/.monitors";

/// Where a process was moved to.
#[derive(Debug, Default)]
pub struct Refuge {
    places: Vec<Place>,
}

/// One hierarchy.
#[derive(Debug)]
struct Place {
    /// Where it is mounted.
    mount: PathBuf,
    /// The file that takes a process of one thread. That of version 1 spares the kernel from holding up the whole machine.
    file: &'static str,
    /// Where the process came from.
    former: PathBuf,
    /// Where it is now.
    group: PathBuf,
}

impl Refuge {
    /// Makes the group of version 2 for a process that is about to be cloned, and opens it, so that the process can be born
    /// there: to be moved takes longer. Without a descriptor it is born where this process is.
    pub fn prepare() -> (Self, Option<OwnedFd>) {
        let open = |place: &Place| {
            persist(|| {
                fs::create_dir_all(&place.group)?;
                sys::open(&place.group, libc::O_PATH | libc::O_DIRECTORY)
            })
        };
        let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let line = own.lines().find(|line| line.starts_with("0::"));
        match line.and_then(parse).and_then(|(_, own)| enter_one("", own, |place| open(place))) {
            Some((place, fd)) => (Self { places: vec![place] }, Some(fd)),
            None => (Self::default(), None),
        }
    }

    /// Takes back what [`Self::prepare`] made for a process that was not born.
    pub fn abandon(self) {
        self.places.iter().for_each(|place| remove(&place.mount, &place.group));
    }

    /// Moves this process, which has one thread, out of all groups that are not the roots of their hierarchies. An ordinary
    /// user's process goes as far up as it may. Where it may go nowhere, it stays.
    pub fn enter(&mut self) {
        let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        for (controllers, own) in own.lines().filter_map(parse) {
            self.places.extend(enter_one(controllers, own, |place| go(place, controllers)).map(|(place, ())| place));
        }
    }

    /// Moves this process out of the groups that it was moved to, and removes those that are empty then. For the end of the
    /// process.
    pub fn leave(self) {
        for Place { mount, file, former, group } in self.places {
            // The root takes everybody, but not from everybody, and not that of a container's namespace.
            // An ordinary user's process may go at most to where its group was made.
            let above = group.ancestors().skip(2).take_while(|above| above.starts_with(&mount));
            let mut places = [mount.as_path(), former.as_path()].into_iter().chain(above);
            let _ = places.any(|place| try_write(place, file, "0").is_ok());
            remove(&mount, &group);
        }
    }

    /// Removes the groups that processes left behind which were killed, or which could go nowhere: those of an ordinary user
    /// where groups have given their controllers away. They are where processes from here go.
    pub fn sweep() {
        let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        for line in own.lines() {
            let Some(mount) = line.split(':').nth(1).and_then(mount) else { continue };
            let own = parse(line).map_or(Path::new("/"), |(_, own)| own);
            for base in own.ancestors() {
                remove(&mount, &below(&mount, base, Path::new(NAME)));
            }
        }
    }
}

/// Where the hierarchy of these controllers is mounted; of version 2's, which has none in its line.
fn mount(controllers: &str) -> Option<PathBuf> {
    match Layout::of_this_machine().ok()? {
        Layout::V2 { root, .. } => controllers.is_empty().then(|| root.clone()),
        Layout::V1 { .. } if controllers.is_empty() => layout::unified_beside().map(Path::to_path_buf),
        Layout::V1 { hierarchies } => {
            let found = hierarchies.iter().find(|hierarchy| hierarchy.controllers.join(",") == controllers);
            found.map(|hierarchy| hierarchy.mount.clone())
        }
    }
}

/// A line of /proc/self/cgroup as controllers and place, if that is neither the root nor beyond the root of this namespace.
fn parse(line: &str) -> Option<(&str, &Path)> {
    let mut fields = line.splitn(3, ':').skip(1);
    let (controllers, own) = (fields.next()?, Path::new(fields.next()?));
    (own != Path::new("/") && !own.starts_with("/..")).then_some((controllers, own))
}

/// Does something with the first place, from the root down to beside this process, where that succeeds. There is none where
/// this process is in that place already.
fn enter_one<T>(controllers: &str, own: &Path, mut act: impl FnMut(&Place) -> io::Result<T>) -> Option<(Place, T)> {
    let mount = mount(controllers)?;
    let mut above: Vec<&Path> = own.ancestors().skip(1).collect();
    above.reverse();
    for base in above {
        let place = Place {
            file: if controllers.is_empty() { "cgroup.procs" } else { "tasks" },
            former: below(&mount, Path::new("/"), own),
            group: below(&mount, base, Path::new(NAME)),
            mount: mount.clone(),
        };
        if place.group == place.former {
            break;
        }
        match act(&place) {
            Ok(done) => return Some((place, done)),
            Err(e) => {
                log::debug!("no process is moved to cgroup {}: {e}", place.group.display());
                remove(&mount, &place.group);
            }
        }
    }
    None
}

fn go(place: &Place, controllers: &str) -> io::Result<()> {
    persist(|| {
        fs::create_dir_all(&place.group)?;
        if controllers.split(',').any(|controller| controller == "cpuset") {
            v1::inherit_cpuset(&place.group).map_err(|e| match place.group.exists() {
                true => io::Error::other(e),
                false => io::ErrorKind::NotFound.into(),
            })?;
        }
        try_write(&place.group, place.file, "0")
    })
}

/// Removes a group, if it is empty, and the one above, unless that is the one that root's containers are in.
fn remove(mount: &Path, group: &Path) {
    if fs::remove_dir(group).is_ok()
        && let Some(above) = group.parent().filter(|above| above.parent() != Some(mount))
    {
        let _ = fs::remove_dir(above);
    }
}
