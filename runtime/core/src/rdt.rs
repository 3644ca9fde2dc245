//! Intel RDT: cache and memory bandwidth of a container, by the resctrl filesystem.
//!
//! config-linux.md, "IntelRdt". A class of service is a directory; what is written to its files applies to the
//! processes in it, and to those that they make.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use oci_spec::runtime::LinuxIntelRdt;
use serde::{Deserialize, Serialize};

use crate::error::{Context, Error, Result};

const MOUNT: &str = "/sys/fs/resctrl";

/// Whether this machine offers it.
pub fn enabled() -> bool {
    Path::new(MOUNT).join("schemata").exists()
}

/// A container's place in resctrl.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rdt {
    /// The class of service.
    class: PathBuf,
    /// The container's monitoring group.
    monitor: Option<PathBuf>,
    /// The class is this container's own and goes with it.
    own: bool,
}

impl Rdt {
    /// Where container `id` will be. Nothing is made.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where there is no resctrl, [`Error::InvalidSpec`] for a class that is no name.
    pub(crate) fn place(spec: &LinuxIntelRdt, id: &str) -> Result<Self> {
        if !enabled() {
            return Err(Error::unsupported("linux.intelRdt", format!("no resctrl filesystem is mounted at {MOUNT}")));
        }
        Self::place_below(Path::new(MOUNT), spec, id)
    }

    fn place_below(root: &Path, spec: &LinuxIntelRdt, id: &str) -> Result<Self> {
        let named = spec.clos_id().as_deref().filter(|name| !name.is_empty());
        let class = match named {
            // The specification's word for the default class.
            Some("/") => root.to_path_buf(),
            Some(name) if name.contains('/') || name == "." || name == ".." => {
                return Err(Error::spec(format!("linux.intelRdt.closID {name:?} is not the name of a directory")));
            }
            Some(name) => root.join(name),
            None => root.join(id),
        };
        let own = !class.exists();
        if !own && named.is_none() {
            return Err(Error::spec(format!("linux.intelRdt: the class {} is there already", class.display())));
        }
        let monitor = spec.enable_monitoring().unwrap_or(false).then(|| class.join("mon_groups").join(id));
        Ok(Self { class, monitor, own })
    }

    /// Makes the class if it is not there, and sets it as described; a class that was there must already be so.
    pub(crate) fn set_up(&self, spec: &LinuxIntelRdt) -> Result<()> {
        if self.own {
            match fs::create_dir(&self.class) {
                Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e).on("create", &self.class),
                _ => {}
            }
        }
        let lines = schemata(spec);
        if !lines.is_empty() {
            let path = self.class.join("schemata");
            fs::write(&path, format!("{}\n", lines.join("\n")))
                .with_context(|| format!("write {lines:?} to {}", path.display()))?;
        }
        if let Some(monitor) = &self.monitor {
            fs::create_dir(monitor).on("create", monitor)?;
        }
        Ok(())
    }

    /// Puts a process into the class and the monitoring group.
    pub(crate) fn join(&self, pid: i32) -> Result<()> {
        for directory in [Some(&self.class), self.monitor.as_ref()].into_iter().flatten() {
            let path = directory.join("tasks");
            fs::write(&path, pid.to_string()).with_context(|| format!("write {pid} to {}", path.display()))?;
        }
        Ok(())
    }

    /// Removes what is the container's own. What is not there is fine.
    pub(crate) fn remove(&self) -> Result<()> {
        let class = self.own.then_some(&self.class);
        for directory in [self.monitor.as_ref(), class].into_iter().flatten() {
            match fs::remove_dir(directory) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e).on("remove", directory),
                _ => {}
            }
        }
        Ok(())
    }
}

/// The lines for the class's file, the general ones last: they have the last word.
fn schemata(spec: &LinuxIntelRdt) -> Vec<String> {
    let split = |text: &Option<String>| {
        text.iter().flat_map(|text| text.lines()).filter(|line| !line.trim().is_empty()).map(str::to_owned).collect()
    };
    // The cache's own field says nothing about bandwidth, which has a field too.
    let mut cache: Vec<String> = split(spec.l3_cache_schema());
    let bandwidth: Vec<String> = split(spec.mem_bw_schema());
    if !bandwidth.is_empty() {
        cache.retain(|line| !line.trim_start().starts_with("MB:"));
    }
    [cache, bandwidth, spec.schemata().clone().unwrap_or_default()].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(value: serde_json::Value) -> LinuxIntelRdt {
        serde_json::from_value(value).unwrap()
    }

    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("runx-rdt-{name}-{}", std::process::id()));
            fs::create_dir_all(&path).unwrap();
            Self(path)
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn a_class_of_its_own_is_made_filled_and_is_the_containers_to_remove() {
        let root = Scratch::new("own");
        let spec = spec(serde_json::json!({"l3CacheSchema": "L3:0=f\nMB:0=1", "memBwSchema": "MB:0=20",
            "schemata": ["L2:0=3"]}));
        let rdt = Rdt::place_below(&root.0, &spec, "c1").unwrap();
        rdt.set_up(&spec).unwrap();
        rdt.join(42).unwrap();
        assert_eq!(fs::read_to_string(root.0.join("c1/schemata")).unwrap(), "L3:0=f\nMB:0=20\nL2:0=3\n");
        assert_eq!(fs::read_to_string(root.0.join("c1/tasks")).unwrap(), "42");
        // On resctrl the files go with the directory.
        fs::remove_file(root.0.join("c1/schemata")).unwrap();
        fs::remove_file(root.0.join("c1/tasks")).unwrap();
        rdt.remove().unwrap();
        rdt.remove().unwrap();
        assert!(!root.0.join("c1").exists());
    }

    #[test]
    fn a_class_that_was_there_stays() {
        let root = Scratch::new("shared");
        fs::create_dir_all(root.0.join("gold/mon_groups")).unwrap();
        let spec = spec(serde_json::json!({"closID": "gold", "enableMonitoring": true}));
        let rdt = Rdt::place_below(&root.0, &spec, "c1").unwrap();
        rdt.set_up(&spec).unwrap();
        assert!(root.0.join("gold/mon_groups/c1").is_dir());
        rdt.remove().unwrap();
        assert!(root.0.join("gold").is_dir() && !root.0.join("gold/mon_groups/c1").exists());
        for bad in ["..", "a/b", "."] {
            let spec = LinuxIntelRdt::default();
            let mut spec = spec;
            spec.set_clos_id(Some(bad.into()));
            assert!(Rdt::place_below(&root.0, &spec, "c1").is_err(), "{bad}");
        }
    }
}
