//! Loggers: programs that take a container's output, named by `binary://` and `binary-v2://` URIs in the place of a
//! FIFO.
//!
//! As with containerd's shim, such a program finds standard output, standard error and a pipe on descriptors 3, 4 and 5,
//! closes the latter when it is ready (for `binary-v2`, after it has written a byte), and has nothing but the ids of the
//! container in its environment.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use runx_core::sys::pidfd;
use runx_core::sys::process::restore_open_files;
use tokio::sync::watch;

use super::{Owner, pipe};
use crate::reaper::exit_of;

/// How long it may take until it is ready.
const READY: Duration = Duration::from_secs(30);

/// How long it may take to end by itself once there is no more output.
const END_OF_OUTPUT: Duration = Duration::from_secs(2);

/// How long it may take to end once it is asked to.
const TERMINATION: Duration = Duration::from_secs(12);

/// A URI of a logger.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Address {
    program: PathBuf,
    args: Vec<String>,
    /// Whether being ready has to be said; else closing the pipe is enough, even by an early end.
    strict: bool,
}

impl Address {
    /// Parses a URI such as `binary:///path/of/program?key=value`; `None` if it is not a logger's.
    pub(super) fn parse(uri: &str) -> Option<io::Result<Self>> {
        let (scheme, rest) = uri.split_once("://")?;
        let strict = match scheme {
            "binary" => false,
            "binary-v2" => true,
            _ => return None,
        };
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let path = path.split('#').next().unwrap_or(path);
        if !path.starts_with('/') {
            let text = format!("{uri:?} names no program by an absolute path");
            return Some(Err(io::Error::new(io::ErrorKind::InvalidInput, text)));
        }
        let mut args = Vec::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            args.extend([decode(key, true), decode(value, true)]);
        }
        Some(Ok(Self { program: decode(path, false).into(), args, strict }))
    }
}

/// Percent-decodes a part of a URI; what is not an escape stays as it is.
pub(super) fn decode(text: &str, plus_is_space: bool) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let escaped = text.get(at + 1..at + 3).filter(|_| bytes[at] == b'%');
        match escaped.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(byte) => {
                out.push(byte);
                at += 3;
            }
            None => {
                out.push(if plus_is_space && bytes[at] == b'+' { b' ' } else { bytes[at] });
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// A logger that runs. Dropping it asks it to end.
#[derive(Debug)]
pub(super) struct Logger {
    pidfd: Arc<OwnedFd>,
    ended: watch::Receiver<bool>,
}

impl Logger {
    /// Starts a logger and waits until it is ready. Returns the ends of the pipes that are written to.
    ///
    /// It is called where a runtime is entered, in a thread that may wait.
    pub(super) fn start(address: &Address, owner: Owner<'_>) -> io::Result<(Self, [OwnedFd; 2])> {
        let shown = address.program.display();
        let failed = |what: &str, e: io::Error| io::Error::new(e.kind(), format!("{what} logger {shown}: {e}"));
        let (stdout, to_stdout) = pipe(owner.ids)?;
        let (stderr, to_stderr) = pipe(owner.ids)?;
        let (ready, to_ready) = pipe((0, 0))?;
        let mut command = Command::new(&address.program);
        command.args(&address.args).env_clear();
        command.env("CONTAINER_ID", owner.id).env("CONTAINER_NAMESPACE", owner.namespace);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        // Above the numbers that they get, so that none overwrites another.
        let moved = |fd: &OwnedFd| -> io::Result<OwnedFd> {
            let number = nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(16))?;
            // SAFETY: it was just made, and nobody else knows it.
            Ok(unsafe { OwnedFd::from_raw_fd(number) })
        };
        let high = [moved(&stdout)?, moved(&stderr)?, moved(&to_ready)?];
        let numbers = [high[0].as_raw_fd(), high[1].as_raw_fd(), high[2].as_raw_fd()];
        // SAFETY: between fork and exec only system calls are made.
        unsafe {
            command.pre_exec(move || {
                restore_open_files()?;
                for (number, target) in numbers.iter().zip(3..) {
                    if libc::dup2(*number, target) == -1 {
                        return Err(io::Error::last_os_error());
                    }
                }
                Ok(())
            });
        }
        let expectation = owner.reaper.expect();
        let spawned = command.spawn();
        drop((stdout, stderr, to_ready, high));
        let pid = spawned.map_err(|e| failed("start", e))?.id() as i32;
        let pidfd = Arc::new(pidfd::open(pid).map_err(|e| failed("watch", e))?);
        owner.reaper.add(pid);
        drop(expectation);
        let (told, ended) = watch::channel(false);
        let (waited, reaper) = (pidfd.clone(), owner.reaper.clone());
        tokio::spawn(async move {
            exit_of(waited).await;
            reaper.remove(pid);
            told.send_replace(true);
        });
        let logger = Self { pidfd, ended };
        match wait_ready(&ready).map_err(|e| failed("wait for", e))? {
            true => {}
            false if address.strict => {
                return Err(failed("wait for", io::Error::other("it ended, or closed its pipe, before it was ready")));
            }
            false => {}
        }
        Ok((logger, [to_stdout, to_stderr]))
    }

    async fn ends_within(&self, limit: Duration) -> bool {
        let mut ended = self.ended.clone();
        tokio::time::timeout(limit, async move { ended.wait_for(|ended| *ended).await.map(drop) }).await.is_ok()
    }

    /// Ends it, after its output has come to an end: by itself, else asked, else killed.
    pub(super) async fn end(self) {
        if self.ends_within(END_OF_OUTPUT).await {
            return;
        }
        let _ = pidfd::send_signal(self.pidfd.as_fd(), libc::SIGTERM);
        if !self.ends_within(TERMINATION).await {
            log::warn!("a logger does not end: it is killed");
            let _ = pidfd::send_signal(self.pidfd.as_fd(), libc::SIGKILL);
            self.ends_within(TERMINATION).await;
        }
    }
}

impl Drop for Logger {
    fn drop(&mut self) {
        if !*self.ended.borrow() {
            let _ = pidfd::send_signal(self.pidfd.as_fd(), libc::SIGTERM);
        }
    }
}

/// Waits for a byte, `true`, or the end of the pipe.
fn wait_ready(pipe: &OwnedFd) -> io::Result<bool> {
    let end = Instant::now() + READY;
    loop {
        let left = end.saturating_duration_since(Instant::now()).as_millis() as libc::c_int;
        let mut poll = libc::pollfd { fd: pipe.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: poll is one valid pollfd.
        match unsafe { libc::poll(&mut poll, 1, left) } {
            -1 => match io::Error::last_os_error() {
                e if e.kind() == io::ErrorKind::Interrupted => {}
                e => return Err(e),
            },
            0 => {
                let text = format!("it was not ready within {} s", READY.as_secs());
                return Err(io::Error::new(io::ErrorKind::TimedOut, text));
            }
            _ => return Ok(nix::unistd::read(pipe, &mut [0u8; 1])? > 0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_name_a_program_and_its_arguments() {
        let parsed = |uri| Address::parse(uri).unwrap().unwrap();
        let address = parsed("binary:///usr/bin/my%20logger?--file=/var/log/a%26b&flag&x=1+2");
        let args = ["--file", "/var/log/a&b", "flag", "", "x", "1 2"].map(str::to_owned).to_vec();
        assert_eq!(address, Address { program: "/usr/bin/my logger".into(), args, strict: false });
        assert!(parsed("binary-v2:///l").strict);
        for other in ["", "/run/fifo", "file:///x", "fifo:///x"] {
            assert!(Address::parse(other).is_none(), "{other}");
        }
        assert!(Address::parse("binary://relative").unwrap().is_err());
        assert_eq!(parsed("binary:///a%2").program, PathBuf::from("/a%2"));
    }

    #[test]
    fn uris_of_any_form_are_read_or_refused() {
        let good: [&[u8]; 2] = [b"binary:///usr/bin/my%20logger?--file=/a%26b&flag&x=1+2", b"binary-v2:///%ff/%"];
        runx_fuzz::feed("a logger's URI", &good, 20_000, |bytes| {
            let text = String::from_utf8_lossy(bytes);
            if let Some(Ok(address)) = Address::parse(&text) {
                assert!(address.program.is_absolute());
            }
        });
    }
}
