//! Hooks: programs of the host's owner that run at six moments of a container's life.
//!
//! config.md, "POSIX-platform Hooks". Each gets the container's state on its standard input. One that fails or
//! takes too long is killed and fails what it was part of; after the container's end it only leaves a warning.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::sys::{self, pidfd};

/// Of what a hook prints, this many bytes are kept for the error message.
const OUTPUT_LIMIT: usize = 2048;

/// Milliseconds between two looks at a hook that nothing tells the end of.
const ASK_AGAIN: i32 = 5;

/// One hook.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hook {
    /// The program, absolute.
    pub path: PathBuf,
    /// Its command line, its name included; empty: the path alone.
    #[serde(default)]
    pub args: Vec<String>,
    /// Its environment, `NAME=value`; empty: that of whoever runs it.
    #[serde(default)]
    pub env: Vec<String>,
    /// Seconds after which it is killed.
    #[serde(default)]
    pub timeout: Option<u64>,
}

/// Hooks of one container.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hooks {
    /// Before pivot_root, by the runtime, deprecated in favour of the next.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub prestart: Vec<Hook>,
    /// Before pivot_root, by the runtime.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub create_runtime: Vec<Hook>,
    /// Before pivot_root, by the container's process.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub create_container: Vec<Hook>,
    /// Before the program is executed, by the container's process.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub start_container: Vec<Hook>,
    /// After the program was executed, by the runtime.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub poststart: Vec<Hook>,
    /// After the container was deleted, by the runtime.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub poststop: Vec<Hook>,
}

impl Hooks {
    /// The hooks of config.json.
    ///
    /// # Errors
    /// [`Error::InvalidSpec`] for a path that is not absolute and a timeout that is not positive.
    #[allow(deprecated, reason = "prestart hooks are deprecated and still in use")]
    pub fn of(spec: &oci_spec::runtime::Spec) -> Result<Self> {
        let Some(hooks) = spec.hooks() else { return Ok(Self::default()) };
        let convert = |kind: &str, list: &Option<Vec<oci_spec::runtime::Hook>>| {
            list.iter().flatten().map(|hook| convert(kind, hook)).collect::<Result<Vec<Hook>>>()
        };
        Ok(Self {
            prestart: convert("prestart", hooks.prestart())?,
            create_runtime: convert("createRuntime", hooks.create_runtime())?,
            create_container: convert("createContainer", hooks.create_container())?,
            start_container: convert("startContainer", hooks.start_container())?,
            poststart: convert("poststart", hooks.poststart())?,
            poststop: convert("poststop", hooks.poststop())?,
        })
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Whether some run before pivot_root, and must see the host's paths in the container's mount namespace.
    pub fn before_pivot(&self) -> bool {
        !(self.prestart.is_empty() && self.create_runtime.is_empty() && self.create_container.is_empty())
    }
}

fn convert(kind: &str, hook: &oci_spec::runtime::Hook) -> Result<Hook> {
    if !hook.path().is_absolute() {
        return Err(Error::spec(format!("hooks.{kind}: path {:?} is not absolute", hook.path())));
    }
    let timeout = match hook.timeout() {
        Some(seconds) if seconds <= 0 => {
            return Err(Error::spec(format!("hooks.{kind}: timeout {seconds} is not greater than zero")));
        }
        other => other.map(i64::unsigned_abs),
    };
    Ok(Hook {
        path: hook.path().clone(),
        args: hook.args().clone().unwrap_or_default(),
        env: hook.env().clone().unwrap_or_default(),
        timeout,
    })
}

/// The state that a hook reads, runtime.md, "State".
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HookState {
    /// Version of the runtime-spec.
    pub oci_version: String,
    /// The container's id.
    pub id: String,
    /// Its status.
    pub status: String,
    /// Its first process, as the reader's PID namespace sees it; 0 when there is none.
    // In a plan, nothing may be skipped: the text for hooks does so.
    #[serde(default)]
    pub pid: i32,
    /// The bundle's absolute path.
    pub bundle: PathBuf,
    /// The container's annotations.
    pub annotations: HashMap<String, String>,
}

/// Runs hooks one after the other until one fails.
///
/// # Errors
/// [`Error::Hook`] with what the hook said.
pub fn run_all(kind: &'static str, hooks: &[Hook], state: &HookState, directory: &Path) -> Result<()> {
    if hooks.is_empty() {
        return Ok(());
    }
    let state = state_text(state)?;
    for (number, hook) in hooks.iter().enumerate() {
        run(kind, number, hook, &state, directory)?;
    }
    Ok(())
}

/// Runs hooks one after the other; those that fail leave a warning.
pub fn run_each(kind: &'static str, hooks: &[Hook], state: &HookState, directory: &Path) {
    if hooks.is_empty() {
        return;
    }
    for (number, hook) in hooks.iter().enumerate() {
        if let Err(e) = state_text(state).and_then(|state| run(kind, number, hook, &state, directory)) {
            log::warn!("{e}");
        }
    }
}

fn state_text(state: &HookState) -> Result<Vec<u8>> {
    let text = serde_json::to_value(state).and_then(|mut value| {
        if let Some(fields) = value.as_object_mut().filter(|_| state.pid == 0) {
            fields.remove("pid");
        }
        serde_json::to_vec(&value)
    });
    text.map_err(|e| Error::system("write the state for a hook", io::Error::other(e)))
}

fn run(kind: &'static str, number: usize, hook: &Hook, state: &[u8], directory: &Path) -> Result<()> {
    let failed = |reason: String| Error::Hook { kind, number, path: hook.path.clone(), reason };
    let mut command = Command::new(&hook.path);
    if let Some((name, rest)) = hook.args.split_first() {
        command.arg0(name).args(rest);
    }
    command.current_dir(directory);
    if !hook.env.is_empty() {
        command.env_clear();
    }
    for variable in &hook.env {
        let (name, value) = variable.split_once('=').unwrap_or((variable, ""));
        command.env(name, value);
    }
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // SAFETY: the closure only makes system calls: the hook shall get its three streams, default signals, and
    // nothing else of ours.
    unsafe {
        command.pre_exec(|| {
            sys::process::reset_signals()?;
            sys::process::restore_open_files()?;
            sys::cloexec_from(3).or_else(|_| close_one_by_one())
        })
    };
    let child = command.spawn().map_err(|e| failed(e.to_string()))?;
    let mut running = Running::new(child).map_err(|e| failed(e.to_string()))?;
    let end = hook.timeout.map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let status = match running.accompany(state, end) {
        Ok(Some(status)) => status,
        Ok(None) => {
            running.kill();
            let seconds = hook.timeout.unwrap_or_default();
            return Err(failed(format!("it did not end within {seconds} s, and was killed")));
        }
        Err(e) => {
            running.kill();
            return Err(failed(format!("wait for it: {e}")));
        }
    };
    if status.success() {
        return Ok(());
    }
    let how = match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(libc::SIGSYS)) => "signal: bad system call".to_owned(),
        (None, signal) => format!("signal {}", signal.unwrap_or_default()),
    };
    Err(failed(format!("{how}, stdout: {}, stderr: {}", running.said(0), running.said(1))))
}

/// For a process whose seccomp filter is older than close_range(2).
fn close_one_by_one() -> io::Result<()> {
    for fd in 3..1024 {
        // SAFETY: only sets a flag of a descriptor, if there is one of this number.
        unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
    }
    Ok(())
}

/// A hook that runs, and what it has printed. One thread looks after all of it: the process may be one that must
/// not have a second.
struct Running {
    child: Child,
    /// None where a seccomp filter is older than pidfd_open(2): then it is asked for again and again.
    pidfd: Option<OwnedFd>,
    outputs: [(Option<OwnedFd>, Vec<u8>); 2],
}

impl Running {
    fn new(mut child: Child) -> io::Result<Self> {
        let stdout = child.stdout.take().map(OwnedFd::from);
        let stderr = child.stderr.take().map(OwnedFd::from);
        let mut streams = stdout.iter().chain(&stderr).map(AsFd::as_fd).chain(child.stdin.iter().map(AsFd::as_fd));
        let ready = streams.try_for_each(sys::set_nonblocking);
        let pidfd = pidfd::open(child.id() as i32).ok();
        match ready {
            Ok(()) => Ok(Self { child, pidfd, outputs: [(stdout, Vec::new()), (stderr, Vec::new())] }),
            Err(e) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(e)
            }
        }
    }

    /// Feeds and drains the hook until it ends; `None` if it does not in time.
    fn accompany(&mut self, state: &[u8], end: Option<Instant>) -> io::Result<Option<std::process::ExitStatus>> {
        let mut written = 0;
        loop {
            let timeout = match end {
                Some(end) => match end.checked_duration_since(Instant::now()) {
                    Some(left) => i32::try_from(left.as_millis()).unwrap_or(i32::MAX).saturating_add(1),
                    None => return Ok(None),
                },
                None => -1,
            };
            let timeout = if self.pidfd.is_some() || (0..ASK_AGAIN).contains(&timeout) { timeout } else { ASK_AGAIN };
            let number = |fd: Option<&OwnedFd>| fd.map_or(-1, AsRawFd::as_raw_fd);
            let entry = |fd, events| libc::pollfd { fd, events, revents: 0 };
            let mut fds = [
                entry(number(self.pidfd.as_ref()), libc::POLLIN),
                entry(self.child.stdin.as_ref().map_or(-1, AsRawFd::as_raw_fd), libc::POLLOUT),
                entry(number(self.outputs[0].0.as_ref()), libc::POLLIN),
                entry(number(self.outputs[1].0.as_ref()), libc::POLLIN),
            ];
            // SAFETY: fds is a valid list of that many.
            let ready = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, timeout) };
            if ready == -1 {
                let error = io::Error::last_os_error();
                if error.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                return Err(error);
            }
            if fds[1].revents != 0 {
                self.feed(state, &mut written);
            }
            for (output, fd) in self.outputs.iter_mut().zip(&fds[2..]) {
                if fd.revents != 0 {
                    drain(output);
                }
            }
            let ended = if self.pidfd.is_some() && fds[0].revents == 0 { None } else { self.child.try_wait()? };
            if let Some(status) = ended {
                // What it started may hold the pipes for ever; what it printed itself is there.
                self.outputs.iter_mut().for_each(drain);
                return Ok(Some(status));
            }
        }
    }

    fn feed(&mut self, state: &[u8], written: &mut usize) {
        let Some(stdin) = &mut self.child.stdin else { return };
        match stdin.write(&state[*written..]) {
            Ok(n) => *written += n,
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => return,
            // A hook need not read it.
            Err(_) => *written = state.len(),
        }
        if *written == state.len() {
            self.child.stdin = None;
        }
    }

    fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    fn said(&self, output: usize) -> String {
        String::from_utf8_lossy(&self.outputs[output].1).trim().to_owned()
    }
}

fn drain((fd, text): &mut (Option<OwnedFd>, Vec<u8>)) {
    let Some(pipe) = fd.take() else { return };
    let mut file = std::fs::File::from(pipe);
    let mut buffer = [0u8; 4096];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return,
            Ok(n) => text.extend(&buffer[..n.min(OUTPUT_LIMIT.saturating_sub(text.len()))]),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
            Err(_) => return,
        }
    }
    *fd = Some(file.into());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hook(script: &str, timeout: Option<u64>) -> Hook {
        let args = ["sh", "-c", script].map(str::to_owned).to_vec();
        Hook { path: "/bin/sh".into(), args, env: vec!["WORD=here".into()], timeout }
    }

    fn state() -> HookState {
        HookState { oci_version: "1.3.0".into(), id: "c1".into(), status: "creating".into(), ..HookState::default() }
    }

    #[test]
    fn a_hook_reads_the_state_and_has_its_own_environment_only() {
        let script = "read -r state; case $state in *'\"id\":\"c1\"'*) ;; *) exit 3;; esac; [ \"$WORD\" = here ] && \
                      [ -z \"$HOME\" ] && [ \"$(pwd)\" = /tmp ]";
        run_all("prestart", &[hook(script, None)], &state(), Path::new("/tmp")).unwrap();
    }

    #[test]
    fn a_hook_without_an_environment_has_ours() {
        let own = hook("[ -n \"$PATH\" ] && [ -z \"$WORD\" ]", None);
        run_all("prestart", &[Hook { env: Vec::new(), ..own }], &state(), Path::new("/tmp")).unwrap();
    }

    #[test]
    fn a_failure_says_what_the_hook_said_and_ends_the_list() {
        let hooks = [hook("echo out; echo err >&2; exit 7", None), hook("exit 8", None)];
        let error = run_all("createRuntime", &hooks, &state(), Path::new("/")).unwrap_err().to_string();
        for word in ["createRuntime", "#0", "exit status 7", "stdout: out", "stderr: err"] {
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn a_hook_that_takes_too_long_is_killed_and_what_it_leaves_behind_is_not_waited_for() {
        let error = run_all("poststart", &[hook("sleep 60", Some(1))], &state(), Path::new("/")).unwrap_err();
        assert!(error.to_string().contains("within 1 s"), "{error}");
        run_all("poststart", &[hook("sleep 10 & exit 0", Some(5))], &state(), Path::new("/")).unwrap();
    }
}
