//! The network namespace's loopback interface, which the kernel creates down, and those that come from the host.

use std::os::fd::AsRawFd;

use crate::error::{Context, Result};
use crate::plan::NetDevice;
use crate::sys::{self, netlink::Netlink};

/// Brings `lo` up, with 127.0.0.1 and ::1, which the kernel then adds.
pub(super) fn bring_loopback_up() -> Result<()> {
    // SAFETY: only integers are passed.
    let socket = sys::owned(unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) }.into())
        .context("open a socket to bring lo up")?;
    // SAFETY: ifreq is plain data for which all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: the request holds a NUL-terminated name and the flags, as SIOCSIFFLAGS reads them.
    sys::check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &request) }.into())
        .context("bring the loopback interface up")
        .map(drop)
}

/// Gives the host's interfaces their addresses back, and brings them up.
pub(super) fn set_up(devices: &[NetDevice]) -> Result<()> {
    let netlink = Netlink::open().context("open a netlink socket")?;
    for device in devices {
        let name = &device.name;
        let index = netlink.index(name).with_context(|| format!("find network interface {name}"))?;
        for address in &device.addresses {
            netlink
                .add_address(index, address)
                .with_context(|| format!("give network interface {name} an address that it had"))?;
        }
        netlink.set_up(index, true).with_context(|| format!("bring network interface {name} up"))?;
    }
    Ok(())
}
