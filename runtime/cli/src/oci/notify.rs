//! sd_notify(3) for containers: a socket of the container's own, from which the word that the service is ready
//! goes on to the service manager, with the pid that it should watch.
//!
//! The container cannot be given the manager's socket: the manager looks at who sends.

use std::ffi::OsString;
use std::fs::{self, Permissions};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use runx_core::spec::{Mount, Spec};
use runx_core::sys::{self, socket};

/// Where the container finds its socket.
const DIRECTORY: &str = "/run/notify";
const SOCKET: &str = "notify.sock";

/// How long a service manager may take to say that it has read everything, in milliseconds.
const BARRIER_TIMEOUT: i32 = 30_000;

/// The service manager's socket, if there is one.
pub(super) fn managers_socket() -> Option<OsString> {
    std::env::var_os("NOTIFY_SOCKET").filter(|address| !address.is_empty())
}

/// Adds the directory with the socket to a container, and tells its first process.
pub(super) fn add_to(spec: &mut Spec, directory: &Path) {
    let mut mount = Mount::default();
    mount.set_destination(DIRECTORY.into());
    mount.set_typ(Some("bind".to_owned()));
    mount.set_source(Some(directory.to_owned()));
    mount.set_options(Some(["bind", "nosuid", "noexec", "nodev", "ro"].map(str::to_owned).to_vec()));
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    mounts.push(mount);
    spec.set_mounts(Some(mounts));
    if let Some(process) = spec.process_mut() {
        let mut env = process.env().clone().unwrap_or_default();
        env.push(format!("NOTIFY_SOCKET={DIRECTORY}/{SOCKET}"));
        process.set_env(Some(env));
    }
}

/// The container's socket and the manager's.
#[derive(Debug)]
pub(crate) struct Proxy {
    containers: UnixDatagram,
    managers: UnixDatagram,
}

impl Proxy {
    /// Opens both.
    pub(super) fn open(directory: &Path, manager: &OsString) -> Result<Self> {
        let address = match manager.as_bytes() {
            [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
            _ => SocketAddr::from_pathname(manager),
        };
        let what = || format!("connect to NOTIFY_SOCKET {manager:?}");
        let managers = UnixDatagram::unbound().with_context(what)?;
        address.and_then(|address| managers.connect_addr(&address)).with_context(what)?;
        let what = || format!("make the socket {SOCKET} in {}", directory.display());
        let containers = bind(directory).with_context(what)?;
        containers.set_nonblocking(true).with_context(what)?;
        Ok(Self { containers, managers })
    }

    /// Readable when the container has said something.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.containers.as_fd()
    }

    /// Passes on that the service is ready, if the container said that. Returns whether it did.
    pub(super) fn forward(&self, main_pid: i32) -> Result<bool> {
        let mut buffer = [0u8; 4096];
        while let Ok(length) = self.containers.recv(&mut buffer) {
            let line = buffer[..length].split(|byte| *byte == b'\n').next().unwrap_or_default();
            if line.starts_with(b"READY=") {
                let message = [line, format!("\nMAINPID={main_pid}\n").as_bytes()].concat();
                self.managers.send(&message).context("tell the service manager that the service is ready")?;
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Waits until the container is ready or its process has ended, and passes on that it is ready.
    pub(super) fn wait(&self, pid: i32, pidfd: &OwnedFd) -> Result<()> {
        loop {
            let mut fds = [self.fd().as_raw_fd(), pidfd.as_raw_fd()].map(|fd| libc::pollfd {
                fd,
                events: libc::POLLIN,
                revents: 0,
            });
            // SAFETY: fds is a valid list of that many.
            if unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, -1) } == -1 {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error).context("wait for the container to be ready");
                }
                continue;
            }
            if self.forward(pid)? {
                return self.barrier();
            }
            if fds[1].revents != 0 {
                return Ok(());
            }
        }
    }

    /// Waits until the manager has read everything: it looks at who sent a message, and this process ends soon.
    fn barrier(&self) -> Result<()> {
        let (mut ours, theirs) = io::pipe().context("make a pipe")?;
        socket::send(self.managers.as_fd(), b"BARRIER=1", &[theirs.as_fd()])
            .context("ask the service manager whether it has read everything")?;
        drop(theirs);
        match sys::poll(ours.as_fd(), libc::POLLIN, BARRIER_TIMEOUT).context("wait for the service manager")? {
            false => log::warn!("the service manager did not answer within {} s", BARRIER_TIMEOUT / 1000),
            // It closes its end; anything it wrote would be a mistake.
            _ if ours.read(&mut [0]).is_ok_and(|length| length > 0) => {
                return Err(anyhow!("the service manager wrote to the pipe that it should close"));
            }
            _ => {}
        }
        Ok(())
    }
}

/// Binds the container's socket, by descriptor: the path may be longer than an address can hold.
fn bind(directory: &Path) -> io::Result<UnixDatagram> {
    let at = sys::open(directory, libc::O_PATH | libc::O_DIRECTORY)?;
    let path = format!("/proc/self/fd/{}/{SOCKET}", at.as_raw_fd());
    let bound = UnixDatagram::bind(&path)?;
    // Whoever the service runs as may say that it is ready.
    fs::set_permissions(path, Permissions::from_mode(0o777))?;
    Ok(bound)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_readiness_is_passed_on() {
        let directory = std::env::temp_dir().join(format!("runx-notify-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let manager = UnixDatagram::bind(directory.join("manager")).unwrap();
        let proxy = Proxy::open(&directory, &directory.join("manager").into()).unwrap();
        let container = UnixDatagram::unbound().unwrap();
        container.connect(directory.join(SOCKET)).unwrap();
        container.send(b"STATUS=almost").unwrap();
        let before = proxy.forward(7).unwrap();
        container.send(b"READY=1\nMAINPID=1").unwrap();
        let after = proxy.forward(7).unwrap();
        let mut buffer = [0; 64];
        let length = manager.recv(&mut buffer).unwrap();
        fs::remove_dir_all(directory).unwrap();
        assert!(!before && after);
        assert_eq!(&buffer[..length], b"READY=1\nMAINPID=7\n");
    }
}
