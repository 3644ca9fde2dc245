//! Runtime options of a create request.

use std::path::PathBuf;

use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::shim::oci::Options as RuncOptions;
use containerd_shim_protos::ttrpc::{self, Code};

use crate::error::status;

/// What the options change.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Options {
    pub(crate) no_pivot: bool,
    pub(crate) no_new_keyring: bool,
    pub(crate) systemd_cgroup: bool,
    pub(crate) io_uid: u32,
    pub(crate) io_gid: u32,
    /// Where the state goes, if not to the usual place.
    pub(crate) root: Option<PathBuf>,
}

/// Reads the message that runc's shim takes. It is what engines send that know only that one.
///
/// # Errors
/// Options that would have no effect are refused by name.
pub(crate) fn parse(any: Option<&Any>) -> ttrpc::Result<Options> {
    let Some(any) = any.filter(|any| !any.type_url.is_empty()) else { return Ok(Options::default()) };
    let name = any.type_url.rsplit('/').next().unwrap_or_default();
    if name != "containerd.runc.v1.Options" {
        if any.value.is_empty() {
            return Ok(Options::default());
        }
        return Err(status(Code::UNIMPLEMENTED, format!("runtime options of type {name:?} are not supported")));
    }
    let options = RuncOptions::parse_from_bytes(&any.value)
        .map_err(|e| status(Code::INVALID_ARGUMENT, format!("runtime options of type {name:?}: {e}")))?;
    for (field, set) in [
        ("shim_cgroup", !options.shim_cgroup.is_empty()),
        ("criu_image_path", !options.criu_image_path.is_empty()),
        ("criu_work_path", !options.criu_work_path.is_empty()),
    ] {
        if set {
            return Err(status(Code::UNIMPLEMENTED, format!("runtime option {field} is not supported")));
        }
    }
    if !options.binary_name.is_empty() {
        log::info!("runtime option binary_name {:?} is ignored: runx runs containers itself", options.binary_name);
    }
    Ok(Options {
        no_pivot: options.no_pivot_root,
        no_new_keyring: options.no_new_keyring,
        systemd_cgroup: options.systemd_cgroup,
        io_uid: options.io_uid,
        io_gid: options.io_gid,
        root: Some(options.root).filter(|root| !root.is_empty()).map(PathBuf::from),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn any(options: &RuncOptions) -> Any {
        Any {
            type_url: "types.containerd.io/containerd.runc.v1.Options".into(),
            value: options.write_to_bytes().unwrap(),
            ..Any::default()
        }
    }

    #[test]
    fn runcs_options_take_effect_or_are_refused_by_name() {
        let options =
            RuncOptions { no_pivot_root: true, systemd_cgroup: true, root: "/r".into(), ..RuncOptions::default() };
        let parsed = parse(Some(&any(&options))).unwrap();
        assert!(parsed.no_pivot && parsed.systemd_cgroup);
        assert_eq!(parsed.root, Some("/r".into()));
        let refused = RuncOptions { shim_cgroup: "/x".into(), ..RuncOptions::default() };
        assert!(parse(Some(&any(&refused))).unwrap_err().to_string().contains("shim_cgroup"));
    }

    #[test]
    fn a_foreign_message_is_refused_unless_it_says_nothing() {
        let foreign = |value: &[u8]| Any { type_url: "x.Options".into(), value: value.into(), ..Any::default() };
        assert!(parse(Some(&foreign(b"\x08\x01"))).is_err());
        assert_eq!(parse(Some(&foreign(b""))).unwrap(), Options::default());
        assert_eq!(parse(None).unwrap(), Options::default());
    }
}
