//! Devices of the host.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use crate::container::options::{Device, Options};

/// What a container makes of /dev by itself.
const OWN: [&str; 12] =
    ["pts", "shm", "mqueue", "fd", "stdin", "stdout", "stderr", "console", "ptmx", "core", "hugepages", ".udev"];

/// Adds the devices, and who may use which.
pub(super) fn add(options: &Options, config: &mut Value) -> Result<()> {
    let (mut devices, mut rules) = (Vec::new(), Vec::new());
    if options.privileged {
        rules.push(json!({"allow": true, "access": "rwm"}));
        host(Path::new("/dev"), &mut devices);
    } else {
        rules.push(json!({"allow": false, "access": "rwm"}));
    }
    for device in &options.devices {
        let found = fs::metadata(&device.source)
            .with_context(|| format!("--device {}: look at the device", device.source.display()))?;
        if found.is_dir() {
            directory(device, &mut devices, &mut rules)?;
            continue;
        }
        let Some(entry) = describe(&device.target, &found) else {
            bail!("--device {}: it is no device", device.source.display());
        };
        rules.push(rule(&entry, &device.access));
        devices.push(entry);
    }
    config["linux"]["devices"] = Value::Array(devices);
    config["linux"]["resources"]["devices"] = Value::Array(rules);
    Ok(())
}

fn rule(entry: &Value, access: &str) -> Value {
    json!({"allow": true, "type": entry["type"], "major": entry["major"], "minor": entry["minor"], "access": access})
}

fn describe(target: &Path, found: &fs::Metadata) -> Option<Value> {
    let kind = found.file_type();
    let kind = match (kind.is_char_device(), kind.is_block_device()) {
        (true, _) => "c",
        (_, true) => "b",
        _ => return None,
    };
    let (major, minor) = (libc::major(found.rdev()), libc::minor(found.rdev()));
    Some(json!({
        "path": target, "type": kind, "major": major, "minor": minor,
        "fileMode": found.mode() & 0o777, "uid": found.uid(), "gid": found.gid(),
    }))
}

/// All devices in a directory of the host.
fn directory(device: &Device, devices: &mut Vec<Value>, rules: &mut Vec<Value>) -> Result<()> {
    let entries = fs::read_dir(&device.source).with_context(|| format!("list {}", device.source.display()))?;
    for entry in entries.flatten() {
        let Ok(found) = fs::symlink_metadata(entry.path()) else { continue };
        let target = device.target.join(entry.file_name());
        if found.is_dir() {
            let below = Device { source: entry.path(), target, access: device.access.clone() };
            directory(&below, devices, rules)?;
        } else if let Some(described) = describe(&target, &found) {
            rules.push(rule(&described, &device.access));
            devices.push(described);
        }
    }
    Ok(())
}

/// All devices of the host, but for those that a container has of its own.
fn host(directory: &Path, devices: &mut Vec<Value>) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if directory == Path::new("/dev") && OWN.iter().any(|own| entry.file_name() == *own) {
            continue;
        }
        let Ok(found) = fs::symlink_metadata(entry.path()) else { continue };
        if found.is_dir() {
            host(&entry.path(), devices);
        } else if let Some(described) = describe(&entry.path(), &found) {
            devices.push(described);
        }
    }
}
