//! A SEQPACKET socket whose messages tell who sent them.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use runx_core::sys::socket;

/// Longest message, in bytes. The kernel's default send buffer holds one of this size.
pub(crate) const LIMIT: usize = 128 * 1024;

/// One end of a connection.
#[derive(Debug)]
pub(crate) struct Channel {
    socket: OwnedFd,
}

/// What came.
#[derive(Debug, Default)]
pub(crate) struct Received {
    /// Its length in the buffer; 0 is the end of the stream.
    pub(crate) length: usize,
    /// Descriptors, close-on-exec.
    pub(crate) fds: Vec<OwnedFd>,
    /// The sender's pid in this PID namespace, 0 for one from outside.
    pub(crate) pid: i32,
}

impl Channel {
    /// Takes a socket and has the kernel name each message's sender from here on.
    pub(crate) fn new(socket: OwnedFd) -> io::Result<Self> {
        let on: libc::c_int = 1;
        // SAFETY: the option's value is an int that lives over the call.
        let set = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PASSCRED,
                (&raw const on).cast(),
                size_of::<libc::c_int>() as libc::socklen_t,
            )
        };
        if set == -1 { Err(io::Error::last_os_error()) } else { Ok(Self { socket }) }
    }

    /// Sends one message with descriptors.
    ///
    /// # Errors
    /// `InvalidInput` for one that is too long; otherwise the kernel's.
    pub(crate) fn send(&self, data: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        if data.len() > LIMIT {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the message is longer than 128 KiB"));
        }
        socket::send(self.socket.as_fd(), data, fds)
    }

    /// Waits for one message. Nothing of the buffer beyond its length is changed, so that it is taken from the system
    /// page by page, as far as messages go.
    ///
    /// # Errors
    /// `InvalidData` for one that is longer than the buffer or carries more descriptors than the kernel passes at once;
    /// otherwise the kernel's.
    pub(crate) fn receive(&self, buffer: &mut [u8]) -> io::Result<Received> {
        // SAFETY: CMSG_SPACE only computes.
        let space = unsafe {
            libc::CMSG_SPACE((socket::MAX_FDS * size_of::<RawFd>()) as u32)
                + libc::CMSG_SPACE(size_of::<libc::ucred>() as u32)
        } as usize;
        // u64 keeps the control buffer aligned for cmsghdr.
        let mut control = [0u64; 160];
        debug_assert!(size_of_val(&control) >= space);
        let mut part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
        // SAFETY: msghdr is plain data for which all zeroes is a valid value.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = &mut part;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = space as _;
        let length = loop {
            // SAFETY: message and all it points to live over the call.
            let got = unsafe { libc::recvmsg(self.socket.as_raw_fd(), &mut message, libc::MSG_CMSG_CLOEXEC) };
            if got >= 0 {
                break got as usize;
            }
            let error = io::Error::last_os_error();
            // A peer that closed with our bytes unread is reported once, and before what it had sent.
            if !matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::ConnectionReset) {
                return Err(error);
            }
        };
        let mut received = Received { length, fds: Vec::new(), pid: 0 };
        // SAFETY: the kernel filled the control buffer with well-formed headers; the descriptors in them are new and ours.
        unsafe {
            let mut header = libc::CMSG_FIRSTHDR(&message);
            while !header.is_null() {
                let data = libc::CMSG_DATA(header);
                match ((*header).cmsg_level, (*header).cmsg_type) {
                    (libc::SOL_SOCKET, libc::SCM_RIGHTS) => {
                        let count = ((*header).cmsg_len as usize - libc::CMSG_LEN(0) as usize) / size_of::<RawFd>();
                        for i in 0..count {
                            let fd = data.cast::<RawFd>().add(i).read_unaligned();
                            received.fds.push(OwnedFd::from_raw_fd(fd));
                        }
                    }
                    (libc::SOL_SOCKET, libc::SCM_CREDENTIALS) => {
                        received.pid = data.cast::<libc::ucred>().read_unaligned().pid;
                    }
                    _ => {}
                }
                header = libc::CMSG_NXTHDR(&message, header);
            }
        }
        if message.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a message is longer than the protocol allows"));
        }
        Ok(received)
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_comes_with_its_sender_and_its_descriptors() {
        let (a, b) = socket::pair().unwrap();
        let (a, b) = (Channel::new(a).unwrap(), Channel::new(b).unwrap());
        a.send(b"word", &[a.as_fd(), b.as_fd()]).unwrap();
        let mut buffer = [0; 16];
        let got = b.receive(&mut buffer).unwrap();
        assert_eq!((&buffer[..got.length], got.fds.len()), (&b"word"[..], 2));
        assert_eq!(got.pid, std::process::id() as i32);
        a.send(&[7; 17], &[]).unwrap();
        assert_eq!(b.receive(&mut buffer).unwrap_err().kind(), io::ErrorKind::InvalidData);
        drop(a);
        drop(got);
        assert_eq!(b.receive(&mut buffer).unwrap().length, 0);
        assert!(b.send(&[0; LIMIT + 1], &[]).is_err());
    }

    #[test]
    fn as_many_descriptors_as_the_kernel_passes_fit() {
        let (a, b) = socket::pair().unwrap();
        let (a, b) = (Channel::new(a).unwrap(), Channel::new(b).unwrap());
        a.send(b"x", &vec![a.as_fd(); socket::MAX_FDS]).unwrap();
        assert_eq!(b.receive(&mut [0; 4]).unwrap().fds.len(), socket::MAX_FDS);
    }
}
