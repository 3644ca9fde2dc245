//! Runtime options of a create request.

mod toml;

use std::path::PathBuf;

use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{CodedInputStream, Message, rt};
use containerd_shim_protos::shim::oci::Options as RuncOptions;
use containerd_shim_protos::ttrpc::{self, Code};

use crate::error::status;
use toml::Value;

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
    /// The cgroup that the shim itself is put into.
    pub(crate) shim_cgroup: Option<PathBuf>,
    /// The version of the Task API that the answer to `start` names; 0 if that is left to us.
    pub(crate) task_api_version: u32,
}

const RUNCS: &str = "containerd.runc.v1.Options";
const TABLE: &str = "runtimeoptions.v1.Options";

/// Whether a message is one of those that [`parse`] reads.
pub(crate) fn is_known(any: &Any) -> bool {
    matches!(name(any), RUNCS | TABLE)
}

fn name(any: &Any) -> &str {
    any.type_url.rsplit('/').next().unwrap_or_default()
}

/// Reads the message that runc's shim takes, which is what engines send that know only that one, or the one that
/// containerd's CRI sends to every other runtime: a table of its configuration, with the same names in it.
///
/// # Errors
/// Options that would have no effect are refused by name.
pub(crate) fn parse(any: Option<&Any>) -> ttrpc::Result<Options> {
    let Some(any) = any.filter(|any| !any.type_url.is_empty()) else { return Ok(Options::default()) };
    let name = name(any);
    let invalid = |why: String| status(Code::INVALID_ARGUMENT, format!("runtime options of type {name:?}: {why}"));
    match name {
        RUNCS => from_runcs(RuncOptions::parse_from_bytes(&any.value).map_err(|e| invalid(e.to_string()))?),
        TABLE => from_runcs(from_table(&any.value).map_err(invalid)?),
        _ if any.value.is_empty() => Ok(Options::default()),
        _ => Err(status(Code::UNIMPLEMENTED, format!("runtime options of type {name:?} are not supported"))),
    }
}

fn from_runcs(options: RuncOptions) -> ttrpc::Result<Options> {
    for (field, set) in [
        ("task_api_address", !options.task_api_address.is_empty()),
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
    let path = |text: String| Some(text).filter(|text| !text.is_empty()).map(PathBuf::from);
    Ok(Options {
        no_pivot: options.no_pivot_root,
        no_new_keyring: options.no_new_keyring,
        systemd_cgroup: options.systemd_cgroup,
        io_uid: options.io_uid,
        io_gid: options.io_gid,
        root: path(options.root),
        shim_cgroup: path(options.shim_cgroup),
        task_api_version: options.task_api_version,
    })
}

/// `runtimeoptions.v1.Options`: the path of a file (field 2), or else its text (field 3).
fn from_table(message: &[u8]) -> Result<RuncOptions, String> {
    let (mut path, mut text) = (String::new(), String::new());
    let mut input = CodedInputStream::from_bytes(message);
    let mut read = || -> containerd_shim_protos::protobuf::Result<()> {
        while let Some(tag) = input.read_raw_tag_or_eof()? {
            match tag {
                18 => path = input.read_string()?,
                26 => text = input.read_string()?,
                tag => rt::skip_field_for_tag(tag, &mut input)?,
            }
        }
        Ok(())
    };
    read().map_err(|e| e.to_string())?;
    if !path.is_empty() {
        text = std::fs::read_to_string(&path).map_err(|e| format!("read {path}: {e}"))?;
    }
    let mut options = RuncOptions::default();
    for (key, value) in toml::parse(&text)? {
        // runc's names are written as in Go in containerd's configuration, and with underscores elsewhere.
        let plain: String = key.chars().filter(|c| *c != '_').map(|c| c.to_ascii_lowercase()).collect();
        match (plain.as_str(), value) {
            ("systemdcgroup", Value::Bool(on)) => options.systemd_cgroup = on,
            ("nopivotroot", Value::Bool(on)) => options.no_pivot_root = on,
            ("nonewkeyring", Value::Bool(on)) => options.no_new_keyring = on,
            ("iouid", Value::Number(id)) => options.io_uid = u32::try_from(id).map_err(|e| format!("{key}: {e}"))?,
            ("iogid", Value::Number(id)) => options.io_gid = u32::try_from(id).map_err(|e| format!("{key}: {e}"))?,
            ("root", Value::Text(path)) => options.root = path,
            ("binaryname", Value::Text(name)) => options.binary_name = name,
            ("shimcgroup", Value::Text(group)) => options.shim_cgroup = group,
            ("taskapiversion", Value::Number(n)) => {
                options.task_api_version = u32::try_from(n).map_err(|e| format!("{key}: {e}"))?;
            }
            ("criuimagepath", Value::Text(path)) => options.criu_image_path = path,
            ("criuworkpath", Value::Text(path)) => options.criu_work_path = path,
            // Where to find a program that is not run anyway.
            ("criupath", Value::Text(_)) => {}
            // A client's empty fields.
            (_, Value::Text(text)) if text.is_empty() => {}
            _ => return Err(format!("option {key} is unknown, or its value is of another type")),
        }
    }
    Ok(options)
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

    fn table(text: &str) -> Any {
        let mut value = vec![26, text.len() as u8];
        value.extend_from_slice(text.as_bytes());
        Any { type_url: "runtimeoptions.v1.Options".into(), value, ..Any::default() }
    }

    #[test]
    fn runcs_options_take_effect_or_are_refused_by_name() {
        let options =
            RuncOptions { no_pivot_root: true, systemd_cgroup: true, root: "/r".into(), ..RuncOptions::default() };
        let parsed = parse(Some(&any(&options))).unwrap();
        assert!(parsed.no_pivot && parsed.systemd_cgroup);
        assert_eq!(parsed.root, Some("/r".into()));
        let refused = RuncOptions { criu_image_path: "/x".into(), ..RuncOptions::default() };
        assert!(parse(Some(&any(&refused))).unwrap_err().to_string().contains("criu_image_path"));
    }

    #[test]
    fn a_table_of_containerds_configuration_says_the_same() {
        let text = "BinaryName = \"\"\nCriuPath = \"\"\nIoGid = 7\nShimCgroup = '/x'\nSystemdCgroup = true\n";
        let parsed = parse(Some(&table(text))).unwrap();
        assert_eq!(
            parsed,
            Options { systemd_cgroup: true, io_gid: 7, shim_cgroup: Some("/x".into()), ..Options::default() }
        );
        assert!(parse(Some(&table("no_pivot_root = true"))).unwrap().no_pivot);
        for bad in
            ["SystemdCgroup = 1", "Unknown = true", "ShimCgroup = 1", "CriuWorkPath = '/x'", "IoUid = -1", "[x]\na = 1"]
        {
            assert!(parse(Some(&table(bad))).is_err(), "{bad}");
        }
        let directory = std::env::temp_dir().join(format!("runx-options-{}", std::process::id()));
        std::fs::write(&directory, "Root = \"/r\"").unwrap();
        let path = directory.to_str().unwrap();
        let mut value = vec![18, path.len() as u8];
        value.extend_from_slice(path.as_bytes());
        let parsed = parse(Some(&Any { value, ..table("") }));
        std::fs::remove_file(&directory).unwrap();
        assert_eq!(parsed.unwrap().root, Some("/r".into()));
    }

    #[test]
    fn a_foreign_message_is_refused_unless_it_says_nothing() {
        let foreign = |value: &[u8]| Any { type_url: "x.Options".into(), value: value.into(), ..Any::default() };
        assert!(parse(Some(&foreign(b"\x08\x01"))).is_err());
        assert_eq!(parse(Some(&foreign(b""))).unwrap(), Options::default());
        assert_eq!(parse(None).unwrap(), Options::default());
        assert!(parse(Some(&Any { value: vec![26, 200], ..table("") })).is_err());
    }
}
