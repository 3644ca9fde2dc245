//! Network interfaces of the host that a container gets, config-linux.md, "Network Devices".

use std::os::fd::AsFd;

use oci_spec::runtime::{Linux, LinuxNamespaceType};

use crate::bundle::Bundle;
use crate::error::{Context, Error, Result};
use crate::plan::NetDevice;
use crate::sys::{self, netlink::Netlink};

/// An interface that is to be moved.
#[derive(Debug)]
pub(super) struct Moved {
    host_name: String,
    index: i32,
    name: String,
}

/// Checks names and namespaces.
///
/// # Errors
/// [`Error::InvalidSpec`] naming the interface.
pub(crate) fn check(bundle: &Bundle) -> Result<()> {
    let mut seen = Vec::new();
    for (host_name, device) in bundle.linux()?.net_devices().iter().flatten() {
        if !bundle.has_namespace(LinuxNamespaceType::Network) {
            return Err(Error::spec("linux.netDevices is set without a network namespace"));
        }
        let name = name_of(host_name, device);
        for name in [host_name.as_str(), name] {
            if !is_valid(name) {
                return Err(Error::spec(format!("linux.netDevices: {name:?} is not the name of an interface")));
            }
        }
        if seen.contains(&name) {
            return Err(Error::spec(format!("linux.netDevices: two interfaces shall be called {name:?}")));
        }
        seen.push(name);
    }
    Ok(())
}

fn name_of<'a>(host_name: &'a str, device: &'a oci_spec::runtime::LinuxNetDevice) -> &'a str {
    device.name().as_deref().filter(|name| !name.is_empty()).unwrap_or(host_name)
}

/// As the kernel's `dev_valid_name`.
fn is_valid(name: &str) -> bool {
    const LIMIT: usize = 15;
    !name.is_empty()
        && name.len() <= LIMIT
        && name != "."
        && name != ".."
        && !name
            .bytes()
            .any(|byte| byte == b'/' || byte == b':' || byte == b'%' || byte.is_ascii_whitespace() || byte == 0)
}

/// Finds the interfaces, and what the container's process has to set on them once they are there.
pub(super) fn find(linux: &Linux) -> Result<Vec<(Moved, NetDevice)>> {
    let Some(devices) = linux.net_devices().as_ref().filter(|devices| !devices.is_empty()) else {
        return Ok(Vec::new());
    };
    let netlink = Netlink::open().context("open a netlink socket")?;
    let mut found = Vec::new();
    for (host_name, device) in devices {
        let index = netlink.index(host_name).with_context(|| format!("find network interface {host_name}"))?;
        let addresses = netlink
            .lasting_addresses(index)
            .with_context(|| format!("read the addresses of network interface {host_name}"))?;
        let name = name_of(host_name, device).to_owned();
        let moved = Moved { host_name: host_name.clone(), index, name: name.clone() };
        found.push((moved, NetDevice { name, addresses }));
    }
    Ok(found)
}

/// Moves the interfaces into the network namespace of process `pid`.
pub(super) fn move_all(devices: &[Moved], pid: i32) -> Result<()> {
    if devices.is_empty() {
        return Ok(());
    }
    let netlink = Netlink::open().context("open a netlink socket")?;
    let path = format!("/proc/{pid}/ns/net");
    let target = sys::open(&path, libc::O_RDONLY).on("open", &path)?;
    for Moved { host_name, index, name } in devices {
        netlink
            .move_to(*index, name, target.as_fd())
            .with_context(|| format!("move network interface {host_name} into the container as {name}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_that_the_kernel_takes() {
        for good in ["eth0", "a", "fifteen-letters"] {
            assert!(is_valid(good), "{good}");
        }
        for bad in ["", ".", "..", "sixteen--letters", "a b", "a/b", "a:b", "eth%d"] {
            assert!(!is_valid(bad), "{bad}");
        }
    }
}
