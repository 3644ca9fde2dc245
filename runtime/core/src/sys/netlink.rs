//! The few messages of rtnetlink(7) that moving a network interface takes.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use super::{check, owned};

/// An address of an interface.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Address {
    /// `AF_INET` or `AF_INET6`.
    pub family: u8,
    /// Length of the network's prefix in bits.
    pub prefix: u8,
    /// `IFA_LOCAL`, or `IFA_ADDRESS` where there is none.
    pub local: Vec<u8>,
    /// The peer of a point-to-point interface.
    pub peer: Option<Vec<u8>>,
    /// The broadcast address.
    pub broadcast: Option<Vec<u8>>,
}

const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_BROADCAST: u16 = 4;
const IFA_FLAGS: u16 = 8;
const IFLA_IFNAME: u16 = 3;
const IFLA_NET_NS_FD: u16 = 28;
const HEADER: usize = 16;

/// A netlink socket of the caller's network namespace.
pub struct Netlink(OwnedFd);

/// A message that is being put together.
struct Message(Vec<u8>);

impl Message {
    fn new(kind: u16, flags: u16) -> Self {
        let mut bytes = vec![0; HEADER];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&(flags | libc::NLM_F_REQUEST as u16).to_ne_bytes());
        Self(bytes)
    }

    /// `struct ifinfomsg`.
    fn link(mut self, index: i32, flags: u32, change: u32) -> Self {
        self.0.extend([libc::AF_UNSPEC as u8, 0, 0, 0]);
        self.0.extend(index.to_ne_bytes());
        self.0.extend(flags.to_ne_bytes());
        self.0.extend(change.to_ne_bytes());
        self
    }

    fn attribute(mut self, kind: u16, data: &[u8]) -> Self {
        self.0.extend(((data.len() + 4) as u16).to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(data);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> io::Result<[u8; N]> {
    let short = || io::Error::new(io::ErrorKind::InvalidData, "a netlink message is too short");
    bytes.get(at..at + N).and_then(|bytes| bytes.try_into().ok()).ok_or_else(short)
}

/// The attributes of a message: number and content.
fn attributes(mut bytes: &[u8]) -> Vec<(u16, &[u8])> {
    let mut list = Vec::new();
    while let (Ok(length), Ok(kind)) = (number::<2>(bytes, 0), number::<2>(bytes, 2)) {
        let length = usize::from(u16::from_ne_bytes(length));
        let Some(data) = bytes.get(4..length) else { break };
        list.push((u16::from_ne_bytes(kind) & 0x3fff, data));
        let Some(rest) = bytes.get(length.next_multiple_of(4)..) else { break };
        bytes = rest;
    }
    list
}

impl Netlink {
    /// Opens one.
    pub fn open() -> io::Result<Self> {
        // SAFETY: only integers are passed.
        let socket =
            unsafe { libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::NETLINK_ROUTE) };
        owned(socket.into()).map(Self)
    }

    /// Sends a message and hands each part of the answer to `part`: its type and what follows the header.
    fn ask(&self, mut message: Message, mut part: impl FnMut(u16, &[u8]) -> io::Result<()>) -> io::Result<()> {
        let length = message.0.len() as u32;
        message.0[..4].copy_from_slice(&length.to_ne_bytes());
        // SAFETY: the buffer is valid for its length.
        let sent = unsafe { libc::send(self.0.as_raw_fd(), message.0.as_ptr().cast(), message.0.len(), 0) };
        check(sent as libc::c_long)?;
        let mut buffer = vec![0u8; 64 << 10];
        loop {
            // SAFETY: the buffer is writable for its length.
            let n = unsafe { libc::recv(self.0.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
            let mut rest = &buffer[..check(n as libc::c_long)? as usize];
            while rest.len() >= HEADER {
                let length = u32::from_ne_bytes(number(rest, 0)?) as usize;
                let kind = u16::from_ne_bytes(number(rest, 4)?);
                let flags = u16::from_ne_bytes(number(rest, 6)?);
                let body = rest.get(HEADER..length).ok_or(io::ErrorKind::InvalidData)?;
                match libc::c_int::from(kind) {
                    libc::NLMSG_DONE => return Ok(()),
                    libc::NLMSG_ERROR => {
                        return match i32::from_ne_bytes(number(body, 0)?) {
                            0 => Ok(()),
                            error => Err(io::Error::from_raw_os_error(-error)),
                        };
                    }
                    _ => part(kind, body)?,
                }
                if flags & libc::NLM_F_MULTI as u16 == 0 {
                    return Ok(());
                }
                rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
            }
        }
    }

    /// The number of the interface of this name.
    ///
    /// # Errors
    /// ENODEV if there is none.
    pub fn index(&self, name: &str) -> io::Result<i32> {
        let message = Message::new(libc::RTM_GETLINK, 0).link(0, 0, 0).attribute(IFLA_IFNAME, &text(name));
        let mut index = 0;
        self.ask(message, |kind, body| {
            if kind == libc::RTM_NEWLINK {
                index = i32::from_ne_bytes(number(body, 4)?);
            }
            Ok(())
        })?;
        if index == 0 { Err(io::Error::from_raw_os_error(libc::ENODEV)) } else { Ok(index) }
    }

    /// The addresses of an interface that are valid everywhere and for ever.
    pub fn lasting_addresses(&self, index: i32) -> io::Result<Vec<Address>> {
        const IFA_F_PERMANENT: u32 = 0x80;
        let mut message = Message::new(libc::RTM_GETADDR, libc::NLM_F_DUMP as u16);
        message.0.extend([0; 8]);
        let mut list = Vec::new();
        self.ask(message, |_, body| {
            let [family, prefix, flags, scope] = number(body, 0)?;
            if i32::from_ne_bytes(number(body, 4)?) != index || scope != libc::RT_SCOPE_UNIVERSE {
                return Ok(());
            }
            let attributes = attributes(body.get(8..).unwrap_or_default());
            let find = |kind: u16| attributes.iter().find(|(of, _)| *of == kind).map(|(_, data)| data.to_vec());
            let flags =
                find(IFA_FLAGS).and_then(|data| data.try_into().ok()).map_or(u32::from(flags), u32::from_ne_bytes);
            let Some(local) = find(IFA_LOCAL).or_else(|| find(IFA_ADDRESS)) else { return Ok(()) };
            if flags & IFA_F_PERMANENT != 0 {
                let peer = find(IFA_ADDRESS).filter(|peer| *peer != local);
                list.push(Address { family, prefix, local, peer, broadcast: find(IFA_BROADCAST) });
            }
            Ok(())
        })?;
        Ok(list)
    }

    /// Takes an interface down, renames it, and moves it to the network namespace `target`.
    pub fn move_to(&self, index: i32, name: &str, target: BorrowedFd<'_>) -> io::Result<()> {
        self.set_up(index, false)?;
        let message = Message::new(libc::RTM_NEWLINK, libc::NLM_F_ACK as u16)
            .link(index, 0, 0)
            .attribute(IFLA_NET_NS_FD, &target.as_raw_fd().to_ne_bytes())
            .attribute(IFLA_IFNAME, &text(name));
        self.ask(message, |_, _| Ok(()))
    }

    /// Takes an interface up or down.
    pub fn set_up(&self, index: i32, up: bool) -> io::Result<()> {
        let flag = libc::IFF_UP as u32;
        let message =
            Message::new(libc::RTM_NEWLINK, libc::NLM_F_ACK as u16).link(index, if up { flag } else { 0 }, flag);
        self.ask(message, |_, _| Ok(()))
    }

    /// Removes an interface, a virtual one.
    pub fn remove(&self, index: i32) -> io::Result<()> {
        self.ask(Message::new(libc::RTM_DELLINK, libc::NLM_F_ACK as u16).link(index, 0, 0), |_, _| Ok(()))
    }

    /// Gives an interface an address; one that it has already is fine.
    pub fn add_address(&self, index: i32, address: &Address) -> io::Result<()> {
        let flags = (libc::NLM_F_ACK | libc::NLM_F_CREATE | libc::NLM_F_EXCL) as u16;
        let mut message = Message::new(libc::RTM_NEWADDR, flags);
        message.0.extend([address.family, address.prefix, 0, libc::RT_SCOPE_UNIVERSE]);
        message.0.extend(index.to_ne_bytes());
        message = message
            .attribute(IFA_LOCAL, &address.local)
            .attribute(IFA_ADDRESS, address.peer.as_ref().unwrap_or(&address.local));
        if let Some(broadcast) = &address.broadcast {
            message = message.attribute(IFA_BROADCAST, broadcast);
        }
        match self.ask(message, |_, _| Ok(())) {
            Err(e) if e.raw_os_error() == Some(libc::EEXIST) => Ok(()),
            other => other,
        }
    }
}

fn text(name: &str) -> Vec<u8> {
    let mut bytes = name.as_bytes().to_vec();
    bytes.push(0);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_interface_is_number_one_and_an_unknown_name_is_an_error() {
        let netlink = Netlink::open().unwrap();
        assert_eq!(netlink.index("lo").unwrap(), 1);
        assert_eq!(netlink.index("no-such-device").unwrap_err().raw_os_error(), Some(libc::ENODEV));
        // 127.0.0.1 is valid on this host only.
        assert!(netlink.lasting_addresses(1).unwrap().is_empty());
    }

    #[test]
    fn broken_attributes_end_the_list() {
        assert_eq!(attributes(&[8, 0, 1, 0, 9, 9, 9, 9]), [(1, &[9u8, 9, 9, 9][..])]);
        assert!(attributes(&[200, 0, 1, 0, 9]).is_empty());
        assert!(attributes(&[0, 0, 0, 0]).is_empty());
    }
}
