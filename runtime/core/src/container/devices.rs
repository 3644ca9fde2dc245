//! The device nodes of a container.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use oci_spec::runtime::{LinuxDevice, LinuxDeviceType, Mount};

use super::prepare::Table;
use crate::error::{Context, Error, Result};
use crate::plan::Device;
use crate::sys::{self, mount};

/// Devices that every container has, config-linux.md, "Default Devices".
const DEFAULT_DEVICES: &[(&str, u32, u32)] = &[
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];

/// Their paths.
pub(super) fn default_paths() -> impl Iterator<Item = &'static str> {
    DEFAULT_DEVICES.iter().map(|(path, ..)| *path)
}

/// The nodes to make, or to bind in a user namespace; none where the host's /dev is bound.
///
/// # Errors
/// [`Error::InvalidSpec`] for a device that is none, and system errors for one that cannot be bound.
pub(super) fn list(
    mounts: &[Mount],
    listed: Option<&[LinuxDevice]>,
    bind: bool,
    table: &mut Table,
) -> Result<Option<Vec<Device>>> {
    let bound = mounts.iter().any(|mount| {
        let options = mount.options().as_deref().unwrap_or_default();
        Path::new("/").join(mount.destination()) == Path::new("/dev")
            && (mount.typ().as_deref() == Some("bind") || options.iter().any(|o| o == "bind" || o == "rbind"))
    });
    if bound {
        return Ok(None);
    }
    let mut devices: Vec<Device> = DEFAULT_DEVICES
        .iter()
        .map(|(path, major, minor)| Device {
            path: (*path).to_owned(),
            mode: libc::S_IFCHR | 0o666,
            major: *major,
            minor: *minor,
            uid: 0,
            gid: 0,
            bound: None,
        })
        .collect();
    for device in listed.unwrap_or_default() {
        let device = device_node(device)?;
        match devices.iter_mut().find(|known| known.path == device.path) {
            Some(known) => *known = device,
            None => devices.push(device),
        }
    }
    if bind {
        for device in &mut devices {
            device.bound = Some(table.add(host_node(device)?));
        }
    }
    Ok(Some(devices))
}

/// The host's node of the same name and number, as a mount of its own.
fn host_node(device: &Device) -> Result<OwnedFd> {
    let path = Path::new(&device.path);
    let node = sys::open(path, libc::O_PATH | libc::O_NOFOLLOW).on("open device", path)?;
    let stat = sys::fstat(node.as_fd()).on("look at device", path)?;
    let wanted = device.mode & libc::S_IFMT;
    if stat.st_mode & libc::S_IFMT != wanted
        || (wanted != libc::S_IFIFO && stat.st_rdev != libc::makedev(device.major, device.minor))
    {
        return Err(Error::spec(format!(
            "linux.devices: the host's {} is another device, and in a user namespace only the host's can be used",
            device.path
        )));
    }
    let tree = mount::clone_tree(node.as_fd(), "", false).on("clone the mount of device", path)?;
    // The node's /dev may be shared with all the world.
    mount::set_attributes(tree.as_fd(), 0, 0, libc::MS_PRIVATE, false).on("make private", path)?;
    Ok(tree)
}

fn device_node(device: &LinuxDevice) -> Result<Device> {
    let path = device.path();
    let kind = match device.typ() {
        LinuxDeviceType::C | LinuxDeviceType::U => libc::S_IFCHR,
        LinuxDeviceType::B => libc::S_IFBLK,
        LinuxDeviceType::P => libc::S_IFIFO,
        LinuxDeviceType::A => {
            return Err(Error::spec(format!("linux.devices: {} has no type of c, b, u or p", path.display())));
        }
    };
    let number = |n: i64| {
        u32::try_from(n).map_err(|_| Error::spec(format!("linux.devices: {}: {n} is no device number", path.display())))
    };
    let text = path
        .to_str()
        .filter(|text| text.starts_with('/'))
        .ok_or_else(|| Error::spec(format!("linux.devices: {} is not an absolute path", path.display())))?;
    Ok(Device {
        path: text.to_owned(),
        mode: kind | device.file_mode().unwrap_or(0o666) & 0o7777,
        major: number(device.major())?,
        minor: number(device.minor())?,
        uid: device.uid().unwrap_or(0),
        gid: device.gid().unwrap_or(0),
        bound: None,
    })
}
