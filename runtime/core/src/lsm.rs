//! Labels of security modules: AppArmor profiles and SELinux contexts.
//!
//! A label that is asked for and cannot be had is an error: a process must not run unconfined in silence.

use std::fs;

use crate::error::{Error, Result};

/// Whether the kernel confines by AppArmor profiles.
pub fn apparmor_enabled() -> bool {
    fs::read_to_string("/sys/module/apparmor/parameters/enabled").is_ok_and(|text| text.starts_with('Y'))
}

/// Whether the kernel confines by SELinux contexts.
pub fn selinux_enabled() -> bool {
    std::path::Path::new("/sys/fs/selinux/enforce").exists()
}

/// The profile to ask for.
///
/// # Errors
/// [`Error::Unsupported`] where the kernel has no AppArmor.
pub(crate) fn apparmor(profile: Option<String>) -> Result<Option<String>> {
    match profile {
        Some(profile) if !apparmor_enabled() => {
            // What every process is without AppArmor.
            if profile == "unconfined" {
                return Ok(None);
            }
            let field = format!("process.apparmorProfile {profile:?}");
            Err(Error::unsupported(field, "AppArmor is not enabled in this machine's kernel"))
        }
        other => Ok(other),
    }
}

/// The context to ask for.
///
/// # Errors
/// [`Error::Unsupported`] where the kernel has no SELinux.
pub(crate) fn selinux(field: &str, label: Option<String>) -> Result<Option<String>> {
    match label {
        Some(label) if !selinux_enabled() => {
            Err(Error::unsupported(format!("{field} {label:?}"), "SELinux is not enabled in this machine's kernel"))
        }
        other => Ok(other),
    }
}
