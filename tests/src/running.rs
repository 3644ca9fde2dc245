//! Containers that run while a test looks at them.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use serde_json::json;

use crate::bundle::Bundle;
use crate::command::{Done, run_detached};

impl Bundle {
    /// A container that runs a shell script, in a cgroup of a known path.
    ///
    /// # Panics
    /// When it does not start.
    #[track_caller]
    pub fn running(script: &str) -> Self {
        let mut bundle = Self::script(script);
        bundle.set("/linux", "cgroupsPath", json!(format!("/runx-tests/{}", bundle.id())));
        bundle.begin();
        bundle
    }

    /// Creates and starts it.
    #[track_caller]
    pub fn begin(&self) {
        self.create().ok();
        self.runx(&["start", self.id()]).ok();
    }

    /// `runx` with arguments whose processes outlive it; their output goes where a created container's does.
    #[track_caller]
    pub fn runx_detached(&self, args: &[&str]) -> Done {
        run_detached(&mut self.command(args), &self.output())
    }

    /// The first of a container's control files that is there: of a version 1 controller, or of version 2.
    pub fn group_file(&self, controller: &str, v1: &str, v2: &str) -> PathBuf {
        let group = format!("runx-tests/{}", self.id());
        let root = PathBuf::from("/sys/fs/cgroup");
        let old = root.join(controller).join(&group).join(v1);
        if old.exists() { old } else { root.join(group).join(v2) }
    }

    /// What a control file says.
    ///
    /// # Panics
    /// When there is none.
    #[track_caller]
    pub fn limit(&self, controller: &str, v1: &str, v2: &str) -> String {
        let path = self.group_file(controller, v1, v2);
        fs::read_to_string(&path).unwrap_or_else(|e| panic!("read {}: {e}", path.display())).trim().to_owned()
    }
}

/// Receives a message and the descriptor that comes with it on a new connection.
///
/// # Panics
/// When none comes.
#[track_caller]
pub fn receive_descriptor(listener: &UnixListener) -> (String, OwnedFd) {
    let (stream, _) = listener.accept().expect("accept a connection");
    let mut bytes = [0u8; 64];
    let mut part = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    let mut control = [0u64; 8];
    // SAFETY: msghdr is plain data, and everything it points to lives over the call.
    let (length, fd) = unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &mut part;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = size_of_val(&control) as _;
        let length = libc::recvmsg(stream.as_raw_fd(), &mut message, 0);
        assert!(length > 0, "receive a descriptor: {}", io::Error::last_os_error());
        let header = libc::CMSG_FIRSTHDR(&message);
        assert!(!header.is_null(), "no descriptor came");
        (length as usize, OwnedFd::from_raw_fd(libc::CMSG_DATA(header).cast::<i32>().read_unaligned()))
    };
    (String::from_utf8_lossy(&bytes[..length]).into_owned(), fd)
}
