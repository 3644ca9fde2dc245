//! Cgroups for somebody who may not be allowed to make any: an ordinary user, or the root of a user namespace.
//!
//! As runc has it, his container is then in the cgroups of whoever made it, as long as nothing is asked for that needs
//! its own: a limit, or a place.

use oci_spec::runtime::LinuxResources;

use super::{Cgroup, Settings, v1};
use crate::error::{Error, Result};

/// Whether an error says that somebody else is in charge.
pub(super) fn is_refusal(error: &Error) -> bool {
    matches!(error.errno(), Some(libc::EACCES | libc::EPERM | libc::EROFS))
}

/// Makes those of the directories that may be made, and tells which these are. `named` is whether the configuration
/// says where they are to be.
///
/// # Errors
/// The refusal, if they are named or needed for a limit.
pub(super) fn create(cgroup: &Cgroup, settings: &Settings<'_>, named: bool) -> Result<Cgroup> {
    let needed = |refusal: Error| match settings.resources {
        _ if named => Err(refusal),
        Some(resources) if has_limits(resources) => Err(Error::unsupported(
            "linux.resources",
            format!("no cgroup can be made for the limits without the permission to: {refusal}"),
        )),
        _ => {
            log::debug!("the container stays in this process's cgroup: {refusal}");
            Ok(())
        }
    };
    match cgroup {
        Cgroup::V1 { directories, unit: None } => {
            let (mut made, mut refused) = (Vec::new(), None);
            for directory in directories {
                match v1::create(std::slice::from_ref(directory)) {
                    Ok(()) => made.push(directory.clone()),
                    Err(e) if is_refusal(&e) => refused = Some(e),
                    Err(e) => {
                        let _ = Cgroup::V1 { directories: made, unit: None }.remove();
                        return Err(e);
                    }
                }
            }
            let made = if made.is_empty() { Cgroup::None } else { Cgroup::V1 { directories: made, unit: None } };
            if let Err(e) = refused.map_or(Ok(()), needed) {
                let _ = made.remove();
                return Err(e);
            }
            Ok(made)
        }
        _ => match cgroup.create() {
            Err(e) if is_refusal(&e) && cgroup.unit().is_none() => needed(e).map(|()| Cgroup::None),
            other => other.map(|()| cgroup.clone()),
        },
    }
}

/// Whether there is any limit among the resources, besides the rules for devices.
fn has_limits(resources: &LinuxResources) -> bool {
    fn is_set(value: &serde_json::Value) -> bool {
        match value {
            // Zero and false are what nothing was said of, as runc has it.
            serde_json::Value::Null | serde_json::Value::Bool(false) => false,
            serde_json::Value::Number(number) => number.as_f64() != Some(0.0),
            serde_json::Value::Array(list) => !list.is_empty(),
            serde_json::Value::Object(fields) => fields.values().any(is_set),
            _ => true,
        }
    }
    let mut limits = serde_json::to_value(resources).unwrap_or_default();
    if let Some(fields) = limits.as_object_mut() {
        fields.remove("devices");
    }
    is_set(&limits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_for_devices_and_empty_objects_are_no_limits() {
        let limits = |value| has_limits(&serde_json::from_value(value).unwrap());
        assert!(!limits(serde_json::json!({"devices": [{"allow": false, "access": "rwm"}], "memory": {}})));
        assert!(limits(serde_json::json!({"memory": {"limit": 1}})));
        assert!(limits(serde_json::json!({"unified": {"memory.max": "1"}})));
    }
}
