//! SEQPACKET sockets that carry messages and descriptors.

use super::{check, owned};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// The most descriptors that the kernel takes in one message, `SCM_MAX_FD`.
pub const MAX_FDS: usize = 253;

/// A pair of connected SEQPACKET sockets, close-on-exec.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds: [RawFd; 2] = [-1; 2];
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
    // SAFETY: fds has room for the two descriptors.
    let made = unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, fds.as_mut_ptr()) };
    check(made.into())?;
    Ok((owned(fds[0].into())?, owned(fds[1].into())?))
}

/// Sends one message with descriptors.
///
/// # Errors
/// `InvalidInput` for more than [`MAX_FDS`] descriptors; otherwise the kernel's.
pub fn send(socket: BorrowedFd<'_>, data: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    if fds.len() > MAX_FDS {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many descriptors for one message"));
    }
    let raw: Vec<RawFd> = fds.iter().map(|fd| fd.as_raw_fd()).collect();
    let payload = size_of_val(raw.as_slice());
    // u64 keeps the control buffer aligned for cmsghdr.
    // SAFETY: CMSG_SPACE only computes.
    let mut control = vec![0u64; unsafe { libc::CMSG_SPACE(payload as u32) } as usize / 8 + 1];
    let mut part = libc::iovec { iov_base: data.as_ptr() as *mut _, iov_len: data.len() };
    // SAFETY: msghdr is plain data for which all zeroes is a valid value.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &mut part;
    message.msg_iovlen = 1;
    if !raw.is_empty() {
        message.msg_control = control.as_mut_ptr().cast();
        // SAFETY: the control buffer holds CMSG_SPACE(payload) bytes, so the first header and its data
        // lie inside it.
        unsafe {
            message.msg_controllen = libc::CMSG_SPACE(payload as u32) as _;
            let header = libc::CMSG_FIRSTHDR(&message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(payload as u32) as _;
            std::ptr::copy_nonoverlapping(raw.as_ptr().cast::<u8>(), libc::CMSG_DATA(header), payload);
        }
    }
    loop {
        // SAFETY: message and all it points to live over the call.
        match check(unsafe { libc::sendmsg(socket.as_raw_fd(), &message, libc::MSG_NOSIGNAL) } as libc::c_long) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => return other.map(drop),
        }
    }
}

/// Receives one message; `None` when the peer has closed its end. Descriptors are close-on-exec.
///
/// # Errors
/// `InvalidData` if the message is longer than `limit` bytes; otherwise the kernel's.
pub fn receive(socket: BorrowedFd<'_>, limit: usize) -> io::Result<Option<(Vec<u8>, Vec<OwnedFd>)>> {
    let mut data = vec![0u8; limit];
    // SAFETY: CMSG_SPACE only computes.
    let space = unsafe { libc::CMSG_SPACE((MAX_FDS * size_of::<RawFd>()) as u32) } as usize;
    let mut control = vec![0u64; space / 8 + 1];
    let mut part = libc::iovec { iov_base: data.as_mut_ptr().cast(), iov_len: data.len() };
    // SAFETY: msghdr is plain data for which all zeroes is a valid value.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = space as _;
    let length = loop {
        // SAFETY: message and all it points to live over the call.
        match check(unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, libc::MSG_CMSG_CLOEXEC) } as libc::c_long)
        {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            // The peer closed with our bytes unread. That is reported once, and before what it had sent.
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => {}
            Err(e) => return Err(e),
            Ok(n) => break n as usize,
        }
    };
    let mut fds = Vec::new();
    // SAFETY: the kernel filled the control buffer with well-formed headers; the descriptors in them
    // are new and ours.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(&message);
        while !header.is_null() {
            if (*header).cmsg_level == libc::SOL_SOCKET && (*header).cmsg_type == libc::SCM_RIGHTS {
                let count = ((*header).cmsg_len as usize - libc::CMSG_LEN(0) as usize) / size_of::<RawFd>();
                let first = libc::CMSG_DATA(header).cast::<RawFd>();
                for i in 0..count {
                    fds.push(OwnedFd::from_raw_fd(first.add(i).read_unaligned()));
                }
            }
            header = libc::CMSG_NXTHDR(&message, header);
        }
    }
    if message.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0 {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "message is longer than the protocol allows"));
    }
    if length == 0 && fds.is_empty() {
        return Ok(None);
    }
    data.truncate(length);
    Ok(Some((data, fds)))
}

/// Sends all of `fds`, in as many messages as that takes. Each message carries `data`.
pub fn send_fds<F: AsFd>(socket: BorrowedFd<'_>, data: &[u8], fds: &[F]) -> io::Result<()> {
    let all: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
    for chunk in all.chunks(MAX_FDS) {
        send(socket, data, chunk)?;
    }
    Ok(())
}

/// Ends a connection for both sides, whoever has copies of it.
pub fn shut_down(socket: BorrowedFd<'_>) {
    // SAFETY: only a borrowed descriptor and a number are passed. It fails where the other side is gone.
    unsafe { libc::shutdown(socket.as_raw_fd(), libc::SHUT_RDWR) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_words_of_a_peer_that_did_not_listen_are_heard() {
        let (ours, theirs) = pair().unwrap();
        send(ours.as_fd(), b"unread", &[]).unwrap();
        send(theirs.as_fd(), b"last words", &[]).unwrap();
        drop(theirs);
        let heard = receive(ours.as_fd(), 64).unwrap().map(|(data, _)| data);
        assert_eq!(heard.as_deref(), Some(&b"last words"[..]));
        assert!(receive(ours.as_fd(), 64).unwrap().is_none());
    }
}
