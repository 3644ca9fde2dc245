//! Descriptors that arrive over a socket.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

/// Accepts one connection within a minute.
///
/// # Panics
/// When nobody connects.
pub fn accept(listener: &UnixListener) -> UnixStream {
    listener.set_nonblocking(true).expect("make the listener non-blocking");
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false).expect("make the connection blocking");
                return stream;
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock && Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(e) => panic!("nobody connected: {e}"),
        }
    }
}

/// Receives one message with a descriptor.
///
/// # Panics
/// When the message carries none.
pub fn receive(stream: &UnixStream) -> (Vec<u8>, OwnedFd) {
    let mut data = vec![0u8; 16 << 10];
    let mut part = libc::iovec { iov_base: data.as_mut_ptr().cast(), iov_len: data.len() };
    let mut control = [0u64; 8];
    // SAFETY: msghdr is plain data, and everything it points to lives over the call.
    unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &mut part;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = size_of_val(&control) as _;
        let length = libc::recvmsg(stream.as_raw_fd(), &mut message, libc::MSG_CMSG_CLOEXEC);
        assert!(length > 0, "no message came");
        data.truncate(length as usize);
        let header = libc::CMSG_FIRSTHDR(&message);
        assert!(!header.is_null(), "no descriptor came");
        (data, OwnedFd::from_raw_fd(libc::CMSG_DATA(header).cast::<i32>().read_unaligned()))
    }
}
