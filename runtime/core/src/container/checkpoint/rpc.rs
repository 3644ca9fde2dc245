//! The part of CRIU's RPC that is used here: criu's images/rpc.proto, and `criu swrk`, which serves one request on a
//! socket that it is started with.

use std::io::{BufRead, BufReader};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::fcntl::{FcntlArg, fcntl};
use prost::Message;

use crate::error::{Context, Error, Result};
use crate::spawn::refuse_threads;
use crate::sys::{self, socket};

/// What a request asks for, and what a response answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
pub(super) enum Kind {
    Empty = 0,
    Dump = 1,
    Restore = 2,
    PreDump = 4,
    Notify = 6,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct MountMap {
    #[prost(string, required, tag = "1")]
    pub(super) key: String,
    #[prost(string, required, tag = "2")]
    pub(super) value: String,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct JoinNamespace {
    #[prost(string, required, tag = "1")]
    pub(super) namespace: String,
    #[prost(string, required, tag = "2")]
    pub(super) file: String,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct InheritFd {
    #[prost(string, required, tag = "1")]
    pub(super) key: String,
    #[prost(int32, required, tag = "2")]
    pub(super) fd: i32,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct CgroupRoot {
    #[prost(string, optional, tag = "1")]
    pub(super) controllers: Option<String>,
    #[prost(string, required, tag = "2")]
    pub(super) path: String,
}

/// `criu_opts`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Options {
    #[prost(int32, required, tag = "1")]
    pub(super) images_dir_fd: i32,
    #[prost(int32, optional, tag = "2")]
    pub(super) pid: Option<i32>,
    #[prost(bool, optional, tag = "3")]
    pub(super) leave_running: Option<bool>,
    #[prost(bool, optional, tag = "4")]
    pub(super) ext_unix_sk: Option<bool>,
    #[prost(bool, optional, tag = "5")]
    pub(super) tcp_established: Option<bool>,
    #[prost(bool, optional, tag = "6")]
    pub(super) evasive_devices: Option<bool>,
    #[prost(bool, optional, tag = "7")]
    pub(super) shell_job: Option<bool>,
    #[prost(bool, optional, tag = "8")]
    pub(super) file_locks: Option<bool>,
    #[prost(int32, optional, tag = "9")]
    pub(super) log_level: Option<i32>,
    #[prost(string, optional, tag = "10")]
    pub(super) log_file: Option<String>,
    #[prost(bool, optional, tag = "12")]
    pub(super) notify_scripts: Option<bool>,
    #[prost(string, optional, tag = "13")]
    pub(super) root: Option<String>,
    #[prost(string, optional, tag = "14")]
    pub(super) parent_img: Option<String>,
    #[prost(bool, optional, tag = "15")]
    pub(super) track_mem: Option<bool>,
    #[prost(bool, optional, tag = "16")]
    pub(super) auto_dedup: Option<bool>,
    #[prost(int32, optional, tag = "17")]
    pub(super) work_dir_fd: Option<i32>,
    #[prost(bool, optional, tag = "18")]
    pub(super) link_remap: Option<bool>,
    #[prost(message, repeated, tag = "23")]
    pub(super) ext_mnt: Vec<MountMap>,
    #[prost(bool, optional, tag = "24")]
    pub(super) manage_cgroups: Option<bool>,
    #[prost(message, repeated, tag = "25")]
    pub(super) cg_root: Vec<CgroupRoot>,
    #[prost(bool, optional, tag = "26")]
    pub(super) rst_sibling: Option<bool>,
    #[prost(message, repeated, tag = "27")]
    pub(super) inherit_fd: Vec<InheritFd>,
    #[prost(int32, optional, tag = "34")]
    pub(super) manage_cgroups_mode: Option<i32>,
    #[prost(string, repeated, tag = "37")]
    pub(super) external: Vec<String>,
    #[prost(uint32, optional, tag = "38")]
    pub(super) empty_ns: Option<u32>,
    #[prost(message, repeated, tag = "39")]
    pub(super) join_ns: Vec<JoinNamespace>,
    #[prost(string, optional, tag = "44")]
    pub(super) freeze_cgroup: Option<String>,
    #[prost(bool, optional, tag = "46")]
    pub(super) tcp_skip_in_flight: Option<bool>,
    #[prost(bool, optional, tag = "50")]
    pub(super) orphan_pts_master: Option<bool>,
    #[prost(string, optional, tag = "53")]
    pub(super) lsm_profile: Option<String>,
    #[prost(string, optional, tag = "63")]
    pub(super) lsm_mount_context: Option<String>,
}

#[derive(Clone, PartialEq, Message)]
struct Request {
    #[prost(enumeration = "Kind", required, tag = "1")]
    kind: i32,
    #[prost(message, optional, tag = "2")]
    options: Option<Options>,
    #[prost(bool, optional, tag = "3")]
    notify_success: Option<bool>,
}

#[derive(Clone, PartialEq, Message)]
struct Restored {
    #[prost(int32, required, tag = "1")]
    pid: i32,
}

/// Something that happens while a request is served, and may not go on before it is answered.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Notice {
    #[prost(string, optional, tag = "1")]
    pub(super) script: Option<String>,
    #[prost(int32, optional, tag = "2")]
    pub(super) pid: Option<i32>,
}

#[derive(Clone, PartialEq, Message)]
struct Response {
    #[prost(enumeration = "Kind", required, tag = "1")]
    kind: i32,
    #[prost(bool, required, tag = "2")]
    success: bool,
    #[prost(message, optional, tag = "4")]
    restored: Option<Restored>,
    #[prost(message, optional, tag = "5")]
    notice: Option<Notice>,
    #[prost(int32, optional, tag = "7")]
    errno: Option<i32>,
    #[prost(string, optional, tag = "9")]
    reason: Option<String>,
}

/// The longest response in bytes: they hold numbers and short words.
const RESPONSE_LIMIT: usize = 64 << 10;

/// A running `criu swrk`, of which nothing is left when this is dropped.
pub(super) struct Criu {
    process: Child,
    socket: OwnedFd,
    /// The numbers of inherited descriptors in it.
    inherited: Vec<i32>,
    /// Where it says what it does.
    log: PathBuf,
}

/// Descriptors that CRIU inherits have numbers from here on, which nothing else has in a command.
const INHERITED: i32 = 64;

impl Criu {
    /// Starts it with `inherited`, and with this process's standard streams, or none. `log` is the file that the options
    /// of the request will name.
    ///
    /// # Errors
    /// When it is not installed, or this process has more than one thread.
    pub(super) fn start(log: PathBuf, inherited: &[OwnedFd], streams: bool) -> Result<Self> {
        refuse_threads()?;
        let (ours, theirs) = socket::pair().context("make a socket pair")?;
        let lifted = std::iter::once(&theirs)
            .chain(inherited)
            .map(|fd| sys::owned(fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(INHERITED))?.into()))
            .collect::<std::io::Result<Vec<_>>>()
            .context("duplicate descriptors")?;
        let numbers: Vec<_> = lifted.iter().map(AsRawFd::as_raw_fd).collect();
        let mut command = Command::new("criu");
        command.args(["swrk", &numbers[0].to_string()]);
        if !streams {
            command.stdin(Stdio::null()).stdout(Stdio::null());
        }
        let hand_over = move || {
            sys::process::reset_signals()?;
            lifted.iter().try_for_each(|fd| sys::set_cloexec(fd.as_fd(), false))
        };
        // SAFETY: there is no other thread, whose locks the new process could wait for.
        unsafe { command.pre_exec(hand_over) };
        let process = command.spawn().map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => {
                Error::unsupported("a checkpoint", "criu, which makes and restores them, is not installed")
            }
            _ => Error::system("run criu", e),
        })?;
        Ok(Self { process, socket: ours, inherited: numbers[1..].to_vec(), log })
    }

    /// The number in CRIU of an inherited descriptor, by its place.
    pub(super) fn inherited(&self, place: usize) -> i32 {
        self.inherited[place]
    }

    /// Its pid.
    pub(super) fn pid(&self) -> i32 {
        self.process.id() as i32
    }

    /// Serves a request. `notice` answers what happens meanwhile. Returns the restored process's pid, if there is one.
    ///
    /// # Errors
    /// CRIU's own reason, from its log.
    pub(super) fn request(
        &mut self,
        kind: Kind,
        options: Options,
        mut notice: impl FnMut(&Notice, Vec<OwnedFd>) -> Result<()>,
    ) -> Result<Option<i32>> {
        let mut request = Request { kind: kind.into(), options: Some(options), notify_success: None };
        loop {
            self.send(&request)?;
            let Some((data, fds)) = socket::receive(self.socket.as_fd(), RESPONSE_LIMIT).context("hear from criu")?
            else {
                return Err(self.failed("it ended without an answer".into()));
            };
            let response = Response::decode(data.as_slice())
                .map_err(|e| Error::Died(format!("criu's answer is malformed: {e}")))?;
            if !response.success {
                let errno = response.errno.filter(|errno| *errno != 0).map(std::io::Error::from_raw_os_error);
                let reason = response.reason.or(errno.map(|e| e.to_string()));
                return Err(self.failed(reason.unwrap_or_else(|| "it gives no reason".into())));
            }
            match (response.kind == i32::from(Kind::Notify), response.notice) {
                (true, Some(notified)) => {
                    notice(&notified, fds)?;
                    request = Request { kind: Kind::Notify.into(), options: None, notify_success: Some(true) };
                }
                (true, None) => return Err(Error::Died("criu's notice says nothing".into())),
                (false, _) => return Ok(response.restored.map(|restored| restored.pid)),
            }
        }
    }

    fn send(&self, request: &Request) -> Result<()> {
        let data = request.encode_to_vec();
        match socket::send(self.socket.as_fd(), &data, &[]) {
            Err(e) if e.raw_os_error() == Some(libc::EPIPE) => Err(self.failed("it ended before it was asked".into())),
            other => other.context("ask criu"),
        }
    }

    /// An error with what CRIU's log says of it.
    fn failed(&self, reason: String) -> Error {
        let said = errors_in(&self.log);
        let reason = if said.is_empty() { reason } else { said };
        Error::Criu { reason, log: self.log.clone() }
    }
}

impl Drop for Criu {
    fn drop(&mut self) {
        // It ends when the conversation does; after a pre-dump it would wait for the next.
        socket::shut_down(self.socket.as_fd());
        let _ = self.process.wait();
    }
}

/// The first lines of a log that CRIU marks as errors, without the time and the place in CRIU's source.
fn errors_in(log: &Path) -> String {
    const LINES: usize = 3;
    let Ok(file) = std::fs::File::open(log) else { return String::new() };
    let lines = BufReader::new(file).lines().map_while(std::io::Result::ok);
    let errors = lines.filter_map(|line| line.split_once("Error (").map(|(_, rest)| rest.to_owned()));
    errors
        .map(|rest| rest.split_once("): ").map_or(rest.clone(), |(_, said)| said.trim().to_owned()))
        .take(LINES)
        .collect::<Vec<_>>()
        .join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_tells_its_first_errors_alone() {
        let log = std::env::temp_dir().join(format!("runx-criu-log-{}", std::process::id()));
        let text = "(00.1) Version: 3\n(00.2) Error (criu/vdso.c:381): vdso: Unexpected bounds\nWarn  (x): y\n\
                    Error (criu/a.c:1): b: c\n(00.3) Error (a): d\n(00.3) Error (a): e\n";
        std::fs::write(&log, text).unwrap();
        assert_eq!(errors_in(&log), "vdso: Unexpected bounds; b: c; d");
        std::fs::remove_file(&log).unwrap();
        assert_eq!(errors_in(&log), "");
    }

    #[test]
    fn a_request_is_encoded_as_the_protocol_has_it() {
        let options = Options { images_dir_fd: 5, pid: Some(7), ..Options::default() };
        let request = Request { kind: Kind::Dump.into(), options: Some(options), notify_success: None };
        assert_eq!(request.encode_to_vec(), [0x08, 1, 0x12, 4, 0x08, 5, 0x10, 7]);
    }
}
