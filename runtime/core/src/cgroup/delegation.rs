//! Who is to own a container's cgroup.

use std::path::Path;

use oci_spec::runtime::{LinuxNamespaceType, Spec};

/// The uid on this machine of the user who gets the container's cgroup, by the runtime-spec's rules ("Cgroup
/// ownership"): the one who runs the container's process, if it has a cgroup namespace of its own and sees its
/// cgroups where it may write. `None` where it stays with root.
pub(super) fn owner(spec: &Spec) -> Option<u32> {
    let linux = spec.linux().as_ref()?;
    let own_namespace = linux.namespaces().iter().flatten().any(|namespace| {
        namespace.typ() == LinuxNamespaceType::Cgroup
            && namespace.path().as_ref().is_none_or(|path| path.as_os_str().is_empty())
    });
    let writable = spec.mounts().iter().flatten().any(|mount| {
        mount.source().as_deref() == Some(Path::new("cgroup"))
            && Path::new("/").join(mount.destination()) == Path::new("/sys/fs/cgroup")
            && !mount.options().iter().flatten().any(|option| option == "ro")
    });
    if !own_namespace || !writable {
        return None;
    }
    let uid = spec.process().as_ref()?.user().uid();
    let mappings = linux.uid_mappings().as_deref().unwrap_or_default();
    if mappings.is_empty() {
        return Some(uid);
    }
    mappings.iter().find_map(|mapping| {
        let offset = uid.checked_sub(mapping.container_id()).filter(|offset| *offset < mapping.size())?;
        mapping.host_id().checked_add(offset)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(uid: u32, options: &str, namespaces: &str, mappings: &str) -> Spec {
        let text = format!(
            r#"{{"ociVersion": "1.2.0", "process": {{"cwd": "/", "user": {{"uid": {uid}, "gid": 0}}}},
                "mounts": [{{"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
                             "options": [{options}]}}],
                "linux": {{"namespaces": [{namespaces}], "uidMappings": [{mappings}]}}}}"#
        );
        serde_json::from_str(&text).unwrap()
    }

    #[test]
    fn a_writable_group_in_a_namespace_of_its_own_belongs_to_its_user() {
        let own = r#"{"type": "cgroup"}"#;
        let mapping = r#"{"containerID": 0, "hostID": 100000, "size": 65536}"#;
        assert_eq!(owner(&spec(5, r#""rw""#, own, "")), Some(5));
        assert_eq!(owner(&spec(5, "", own, mapping)), Some(100_005));
        assert_eq!(owner(&spec(70_000, "", own, mapping)), None);
        assert_eq!(owner(&spec(5, r#""ro""#, own, "")), None);
        assert_eq!(owner(&spec(5, "", "", "")), None);
        assert_eq!(owner(&spec(5, "", r#"{"type": "cgroup", "path": "/proc/1/ns/cgroup"}"#, "")), None);
    }
}
