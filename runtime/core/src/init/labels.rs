//! Labels of security modules, which take effect with the exec.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;

use super::Fds;
use crate::error::{Context, Result};
use crate::plan::Labels;
use crate::sys;

/// Files that are open for the labels to be written to.
pub(super) struct Pending(Vec<(File, String, &'static str)>);

/// Opens the attributes of this process on the plan's own procfs.
pub(super) fn open(labels: &Labels, fds: &Fds) -> Result<Pending> {
    let proc = fds.get(labels.proc)?;
    let attribute = |path: &str| -> io::Result<File> {
        let path = sys::cstring(path)?;
        // SAFETY: the path is NUL-terminated. Its links are the kernel's own: nothing can be mounted over this procfs.
        let opened = unsafe { libc::openat(proc.as_raw_fd(), path.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC) };
        sys::owned(opened.into()).map(File::from)
    };
    let mut pending = Vec::new();
    if let Some(profile) = &labels.apparmor {
        // The common file belongs to whichever module came first; AppArmor's own is newer.
        let file = attribute("self/attr/apparmor/exec").or_else(|_| attribute("self/attr/exec"));
        let file = file.context("open the AppArmor attribute of this process")?;
        pending.push((file, format!("exec {profile}"), "apply AppArmor profile"));
    }
    if let Some(label) = &labels.selinux {
        let file = attribute("self/attr/exec").context("open the SELinux attribute of this process")?;
        pending.push((file, label.clone(), "apply SELinux label"));
    }
    Ok(Pending(pending))
}

impl Pending {
    /// Writes the labels, each in one call.
    pub(super) fn apply(self) -> Result<()> {
        for (mut file, text, what) in self.0 {
            let written = file
                .write(text.as_bytes())
                .and_then(|n| if n == text.len() { Ok(()) } else { Err(io::Error::from(io::ErrorKind::WriteZero)) });
            written.with_context(|| format!("{what} {:?}", text.trim_start_matches("exec ")))?;
        }
        Ok(())
    }
}
