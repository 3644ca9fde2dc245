//! A cgroup of its own for a compiler: what a module makes it use is not the shim's, nor a container's.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use oci_spec::runtime::Spec;

use crate::cgroup::{self, Cgroup, Settings};
use crate::error::Result;

/// The most memory a compiler may use, in bytes, and how many threads it may have.
const MEMORY: i64 = 4 << 30;
const PIDS: i64 = 256;

/// What their names begin with, before the compiler's pid.
const PREFIX: &str = "runx-compiler-";

/// Half of what others get where processors are scarce.
const SHARES: u64 = 512;

/// The cgroup of one compiler, removed when this goes.
#[derive(Debug)]
pub(super) struct Group(Cgroup);

impl Group {
    /// Puts a process into a new one. Where none may be made, as for an ordinary user, its own limits have to do.
    pub(super) fn hold(pid: i32) -> Option<Self> {
        Self::make(pid).inspect_err(|e| log::debug!("the compiler gets no cgroup of its own: {e}")).ok()
    }

    fn make(pid: i32) -> Result<Self> {
        let name = format!("{PREFIX}{pid}");
        let spec = spec(&name)?;
        let settings = Settings::of(&name, &spec, false);
        let layout = cgroup::Layout::of_this_machine()?;
        let path = PathBuf::from("/").join(&name);
        let place = cgroup::place(layout, Some(&path), &name, false)?;
        sweep(&place);
        place.create()?;
        // From here on it is ours to remove.
        let group = Self(place);
        group.0.configure(&settings)?;
        group.0.adopt(pid, &settings)?;
        Ok(group)
    }
}

/// Removes the groups of compilers that are gone, and whose shims were killed before they could.
fn sweep(place: &Cgroup) {
    for parent in place.paths().into_iter().filter_map(Path::parent) {
        for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let pid = name.to_str().and_then(|name| name.strip_prefix(PREFIX));
            if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
                // It may be in use after all, and stays then.
                let _ = fs::remove_dir(entry.path());
            }
        }
    }
}

fn spec(name: &str) -> Result<Spec> {
    let text = serde_json::json!({
        "ociVersion": "1.0.2",
        "linux": {
            "cgroupsPath": name,
            "resources": {
                // It has no device nodes in reach.
                "devices": [{"allow": false, "access": "rwm"}],
                "memory": {"limit": MEMORY},
                "pids": {"limit": PIDS},
                "cpu": {"shares": SHARES},
            },
        },
    });
    serde_json::from_value(text).map_err(|e| crate::Error::spec(e.to_string()))
}

impl Drop for Group {
    fn drop(&mut self) {
        // The compiler leaves it a little after it was waited for. One that is in use stays for the next sweep.
        for path in self.0.paths() {
            for _ in 0..20 {
                match fs::remove_dir(path) {
                    Err(e) if e.raw_os_error() == Some(libc::EBUSY) => std::thread::sleep(Duration::from_millis(5)),
                    _ => break,
                }
            }
        }
    }
}
