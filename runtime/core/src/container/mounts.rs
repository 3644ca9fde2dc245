//! The mounts of config.json as a plan: sources opened, trees cloned, options set.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use oci_spec::runtime::{LinuxIdMapping, Mount};

use super::prepare::{Namespaces, Table};
use super::users;
use crate::bundle::Bundle;
use crate::cgroup::{Cgroup, Layout};
use crate::error::{Context, Error, Result};
use crate::lsm;
use crate::mount_options::MountOptions;
use crate::plan::{CgroupView, MountPlan, MountSource};
use crate::spawn::Spawner;
use crate::sys;
use crate::sys::mount::{self, attr};

/// What the plan of each mount depends on.
pub(super) struct Mounts<'a> {
    pub(super) bundle: &'a Bundle,
    pub(super) namespaces: &'a Namespaces,
    pub(super) layout: &'a Layout,
    pub(super) cgroup: &'a Cgroup,
    pub(super) spawner: &'a Spawner,
    /// The root filesystem's path as config.json has it and as it is; none for the host's own root.
    pub(super) rootfs: Vec<PathBuf>,
    /// `MS_*` of linux.rootfsPropagation.
    pub(super) rootfs_propagation: u64,
    /// User namespaces that hold the mappings of id-mapped mounts, made once each.
    pub(super) id_maps: HashMap<Vec<[u32; 4]>, OwnedFd>,
}

impl Mounts<'_> {
    /// The plans of all entries, in their order.
    ///
    /// # Errors
    /// [`Error::InvalidSpec`] and [`Error::Unsupported`] name the mount; system errors what was tried with its
    /// source.
    pub(super) fn plan(&mut self, entries: &[Mount], table: &mut Table) -> Result<Vec<MountPlan>> {
        entries.iter().map(|entry| self.entry(entry, table)).collect()
    }

    fn entry(&mut self, entry: &Mount, table: &mut Table) -> Result<MountPlan> {
        let destination = Path::new("/").join(entry.destination());
        // As runc has it, a destination below the root filesystem's own path is meant from there.
        let destination = self.inside(&destination).map_or(destination, PathBuf::from);
        let destination = destination
            .to_str()
            .ok_or_else(|| Error::spec(format!("mount destination {destination:?} is not valid UTF-8")))?
            .to_owned();
        let options = MountOptions::parse(entry.options().as_deref().unwrap_or_default(), &destination)?;
        let kind = entry.typ().as_deref().unwrap_or_default();
        let mut propagation = options.propagation.clone();
        let is_bind = options.bind.is_some() || kind == "bind";
        if options.copy_up && kind != "tmpfs" {
            return Err(Error::spec(format!("mount option \"tmpcopyup\" of {destination} is for a tmpfs only")));
        }
        let source = if is_bind {
            if propagation.is_empty() && self.rootfs_propagation & libc::MS_SHARED == 0 {
                // A clone stays a peer of the host's mount; as runc does it, what the host mounts below
                // later arrives, and what the container mounts does not leave.
                propagation.push(libc::MS_SLAVE | libc::MS_REC);
            }
            self.bind(entry, &destination, &options, table)?
        } else if kind.is_empty() {
            return Err(Error::spec(format!("mount {destination} has neither a type nor a bind option")));
        } else {
            if options.recursive_set | options.recursive_clear != 0 {
                return Err(Error::unsupported(
                    format!("recursive options of mount {destination}"),
                    "a new filesystem has nothing mounted below it",
                ));
            }
            if options.id_map.is_some() || has_mappings(entry) {
                return Err(Error::unsupported(
                    format!("an id-mapped mount of type {kind} on {destination}"),
                    "only bind mounts can be id-mapped",
                ));
            }
            self.filesystem(entry, kind, &destination, options, table)?
        };
        Ok(MountPlan { destination, source, propagation })
    }

    fn filesystem(
        &self,
        entry: &Mount,
        kind: &str,
        destination: &str,
        options: MountOptions,
        table: &mut Table,
    ) -> Result<MountSource> {
        let attributes = options.set & !options.clear | options.set & attr::ATIME_MASK;
        match (kind, self.layout) {
            ("cgroup", Layout::V1 { .. }) => cgroup_v1(attributes, self.namespaces, self.layout),
            ("cgroup" | "cgroup2", Layout::V2 { .. }) => {
                cgroup_v2(attributes, self.namespaces, self.layout.shown(self.cgroup), table)
            }
            _ => {
                let mut data = options.data;
                if let Some(label) = self.bundle.linux()?.mount_label().clone().filter(|label| !label.is_empty())
                    && matches!(kind, "tmpfs" | "mqueue" | "devpts")
                {
                    let label = lsm::selinux("linux.mountLabel", Some(label))?;
                    data.push(("context".to_owned(), label));
                }
                new_filesystem(entry, kind, destination, attributes, data, options.copy_up, table)
            }
        }
    }

    fn bind(
        &mut self,
        entry: &Mount,
        destination: &str,
        options: &MountOptions,
        table: &mut Table,
    ) -> Result<MountSource> {
        if let Some((key, _)) = options.data.first() {
            return Err(Error::spec(format!("mount option {key:?} of the bind mount {destination} is unknown")));
        }
        let source = entry.source().as_deref().unwrap_or(Path::new(""));
        if source.as_os_str().is_empty() {
            return Err(Error::spec(format!("bind mount {destination} has no source")));
        }
        // A relative source is below the bundle (config.md, "Mounts").
        let source: PathBuf = self.bundle.path().join(source);
        let mapped = options.id_map.is_some() || has_mappings(entry);
        let recursive = options.bind != Some(false);
        // In a user namespace of its own the container could not map ids of the host's filesystems.
        if let Some(path) = self.inside(&source).filter(|_| !mapped || self.namespaces.user.is_none()) {
            let below = (options.recursive_set, options.recursive_clear);
            let id_map = if mapped {
                let users = self.id_map(entry, destination)?.try_clone_to_owned();
                let users = users.with_context(|| format!("keep the user namespace of mount {destination}"))?;
                Some((table.add(users), options.id_map.unwrap_or(false)))
            } else {
                None
            };
            return Ok(MountSource::Inside { path, recursive, attributes: options.of_bind(), below, id_map });
        }
        let what = |verb: &str| format!("{verb} {}, the source of mount {destination}", source.display());
        let at = sys::open(&source, libc::O_PATH).with_context(|| what("open"))?;
        let directory = sys::is_dir(&sys::fstat(at.as_fd()).with_context(|| what("look at"))?);
        let tree = mount::clone_tree(at.as_fd(), "", recursive).with_context(|| what("clone the mounts of"))?;
        // Whoever made the user namespace himself is told by the kernel what is locked.
        let keeps = self.namespaces.user.is_some() && !self.namespaces.entered_user;
        let set = options.of_bind().apply(tree.as_fd(), at.as_fd(), keeps);
        set.with_context(|| what("set options on"))?;
        let (set, clear) = (options.recursive_set, options.recursive_clear);
        if set | clear != 0 {
            mount::set_attributes(tree.as_fd(), set, clear, 0, true).with_context(|| what("set options on"))?;
        }
        if mapped {
            let recursive = options.id_map.unwrap_or(false);
            let users = self.id_map(entry, destination)?;
            mount::set_id_map(tree.as_fd(), users, recursive).with_context(|| what("map the ids of"))?;
        }
        Ok(MountSource::Tree { tree: table.add(tree), directory })
    }

    /// The path in the container of what is named by its path below the root filesystem's. What an earlier mount put
    /// there is in the container's mount namespace only.
    fn inside(&self, path: &Path) -> Option<String> {
        let below = self.rootfs.iter().find_map(|rootfs| path.strip_prefix(rootfs).ok())?;
        let plain = below.components().all(|part| matches!(part, Component::Normal(_)));
        below.to_str().filter(|_| plain).map(|below| format!("/{below}"))
    }

    /// The user namespace whose mappings an entry shall have: its own, or else the container's.
    fn id_map(&mut self, entry: &Mount, destination: &str) -> Result<BorrowedFd<'_>> {
        let linux = self.bundle.linux()?;
        let joined = self.namespaces.first.iter().find(|(_, kind)| *kind == libc::CLONE_NEWUSER);
        if let Some((joined, _)) = joined.filter(|_| !has_mappings(entry)) {
            return Ok(joined.as_fd());
        }
        let (own_uids, own_gids) = (entry.uid_mappings().as_deref(), entry.gid_mappings().as_deref());
        let (uids, gids) = if has_mappings(entry) {
            (own_uids, own_gids)
        } else {
            (linux.uid_mappings().as_deref(), linux.gid_mappings().as_deref())
        };
        let (uids, gids) = (uids.unwrap_or_default(), gids.unwrap_or_default());
        if uids.is_empty() || gids.is_empty() {
            return Err(Error::spec(format!(
                "mount {destination} is to be id-mapped and lacks uidMappings or gidMappings of its own or of a user \
                 namespace"
            )));
        }
        let numbers = |kind: u32, list: &[LinuxIdMapping]| {
            list.iter().map(|m| [kind, m.container_id(), m.host_id(), m.size()]).collect::<Vec<_>>()
        };
        let key = [numbers(0, uids), numbers(1, gids)].concat();
        if !self.id_maps.contains_key(&key) {
            let made = users::hold(self.spawner, uids, gids)?;
            self.id_maps.insert(key.clone(), made);
        }
        Ok(self.id_maps[&key].as_fd())
    }
}

fn has_mappings(entry: &Mount) -> bool {
    let filled = |list: &Option<Vec<LinuxIdMapping>>| list.as_ref().is_some_and(|list| !list.is_empty());
    filled(entry.uid_mappings()) || filled(entry.gid_mappings())
}

/// Filesystems that show what namespace they were mounted in are made by the child; others here, where
/// the host's devices and paths are.
fn new_filesystem(
    entry: &Mount,
    kind: &str,
    destination: &str,
    attributes: u64,
    data: Vec<(String, Option<String>)>,
    copy_up: bool,
    table: &mut Table,
) -> Result<MountSource> {
    let mut data = data;
    if let Some(source) = entry.source().as_deref().filter(|source| !source.as_os_str().is_empty()) {
        data.push(("source".to_owned(), Some(source.to_string_lossy().into_owned())));
    }
    if matches!(kind, "proc" | "sysfs" | "mqueue" | "tmpfs" | "devpts") {
        return Ok(MountSource::New { kind: kind.to_owned(), attributes, data, copy_up });
    }
    let made = crate::init::make_filesystem(kind, attributes, &data)
        .with_context(|| format!("mount {kind} for {destination}"))?;
    Ok(MountSource::Tree { tree: table.add(made), directory: true })
}

/// The mounts of a plan that show a version 1 container without a cgroup namespace its cgroups: their attributes, and
/// how many cgroups.
pub(super) fn bound_views(plans: &[MountPlan]) -> Vec<(u64, usize)> {
    let bound = |plan: &MountPlan| match &plan.source {
        MountSource::CgroupV1 { attributes, hierarchies, .. } => {
            let bound = hierarchies.iter().filter(|(_, view)| matches!(view, CgroupView::Bound)).count();
            (bound > 0).then_some((*attributes, bound))
        }
        _ => None,
    };
    plans.iter().filter_map(bound).collect()
}

/// Opens these views, once the cgroups are there: a tree for each [`CgroupView::Bound`] of the plan.
pub(super) fn open_views(views: &[(u64, usize)], cgroup: &Cgroup, layout: &Layout) -> Result<Vec<OwnedFd>> {
    let mut trees = Vec::new();
    for (attributes, count) in views {
        for path in layout.shown(cgroup).iter().take(*count) {
            let at = sys::open(path, libc::O_PATH | libc::O_DIRECTORY).on("open cgroup", path)?;
            let tree = mount::clone_tree(at.as_fd(), "", false).on("clone the mount of cgroup", path)?;
            mount::set_attributes(tree.as_fd(), *attributes, 0, libc::MS_PRIVATE, false).on("set options on", path)?;
            trees.push(tree);
        }
    }
    Ok(trees)
}

fn cgroup_v1(attributes: u64, namespaces: &Namespaces, layout: &Layout) -> Result<MountSource> {
    let Layout::V1 { hierarchies } = layout else {
        return Err(Error::unsupported("a mount of type cgroup", "this machine has cgroup v2"));
    };
    let mut views = Vec::new();
    let mut links = Vec::new();
    for hierarchy in hierarchies {
        let name = hierarchy.name();
        let view = if namespaces.new_cgroup {
            let mut data = vec![("source".to_owned(), Some("cgroup".to_owned()))];
            for controller in &hierarchy.controllers {
                match controller.strip_prefix("name=") {
                    Some(name) => {
                        data.push(("none".to_owned(), None));
                        data.push(("name".to_owned(), Some(name.to_owned())));
                    }
                    None => data.push((controller.clone(), None)),
                }
            }
            CgroupView::Mounted(data)
        } else {
            CgroupView::Bound
        };
        for controller in hierarchy.controllers.iter().filter(|controller| **controller != name) {
            if !controller.starts_with("name=") {
                links.push((controller.clone(), name.clone()));
            }
        }
        views.push((name, view));
    }
    Ok(MountSource::CgroupV1 { attributes, hierarchies: views, links })
}

fn cgroup_v2(attributes: u64, namespaces: &Namespaces, shown: Vec<PathBuf>, table: &mut Table) -> Result<MountSource> {
    if namespaces.new_cgroup {
        return Ok(MountSource::New {
            kind: "cgroup2".to_owned(),
            attributes,
            data: vec![("source".to_owned(), Some("cgroup".to_owned()))],
            copy_up: false,
        });
    }
    let [path] = shown.as_slice() else {
        return Err(Error::unsupported("a mount of type cgroup2", "this machine has cgroup v1"));
    };
    let at = sys::open(path, libc::O_PATH | libc::O_DIRECTORY).on("open cgroup", path)?;
    let tree = mount::clone_tree(at.as_fd(), "", false).on("clone the mount of cgroup", path)?;
    mount::set_attributes(tree.as_fd(), attributes, 0, libc::MS_PRIVATE, false).on("set options on", path)?;
    Ok(MountSource::Tree { tree: table.add(tree), directory: true })
}
