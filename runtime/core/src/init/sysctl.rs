//! Kernel parameters and names of the new namespaces.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use crate::error::{Context, Result};
use crate::plan::ContainerPlan;
use crate::sys::{self, resolve};

/// Hostname and domain name.
pub(super) fn set_names(plan: &ContainerPlan) -> Result<()> {
    if let Some(name) = &plan.hostname {
        nix::unistd::sethostname(name).with_context(|| format!("set the hostname to {name:?}"))?;
    }
    if let Some(name) = &plan.domainname {
        // SAFETY: the pointer is valid for the length that is passed.
        sys::check(unsafe { libc::setdomainname(name.as_ptr().cast(), name.len()) }.into())
            .with_context(|| format!("set the domain name to {name:?}"))?;
    }
    Ok(())
}

/// Writes each parameter through a procfs over which nothing can be mounted (CVE-2025-52881).
pub(super) fn set_all(proc: &OwnedFd, parameters: &[(String, String)]) -> Result<()> {
    for (key, value) in parameters {
        let names = crate::bundle::sysctl_path(key)?;
        let path: PathBuf = ["sys"].into_iter().chain(names.iter().map(String::as_str)).collect();
        let rules = resolve::BENEATH | resolve::NO_SYMLINKS | resolve::NO_XDEV;
        sys::openat2(proc.as_fd(), &path, libc::O_WRONLY, 0, rules)
            .and_then(|fd| File::from(fd).write_all(value.as_bytes()))
            .with_context(|| format!("set sysctl {key} to {value:?}"))?;
    }
    Ok(())
}
