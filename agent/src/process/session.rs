//! Shell sessions: commands one after the other, each in a shell of its own that begins where the last one ended, with its
//! exported variables and its directory.
//!
//! The shell itself writes them down at its end, to a file that only it was given; nothing that a command prints can be
//! taken for it.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::sys::signal::Signal;

use super::commands::end_after;
use super::environment;
use super::output::{Output, Pipes};
use super::reaper;
use super::spawn::{self, Process, Program, Start, Streams};
use crate::ids;

/// The descriptor of the script, and the one that the state is written to. Of one digit: dash knows no others.
const SCRIPT: i32 = 8;
const STATE: i32 = 9;

/// How much of exported variables is kept, in bytes.
const STATE_LIMIT: usize = 4 << 20;

/// How long a command may take that says nothing about it.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(24 * 3600);

#[derive(Debug, Default)]
struct Kept {
    cwd: PathBuf,
    /// A script that exports the variables again.
    exports: Vec<u8>,
}

/// A session.
#[derive(Debug)]
pub struct Session {
    /// A UUID.
    pub id: String,
    kept: Mutex<Kept>,
    /// The process groups of what runs in it.
    running: Mutex<Vec<Process>>,
}

/// A command that runs in a session. When this goes, it is killed if it still runs, and otherwise the session takes over
/// the directory and the variables that it ended with.
#[derive(Debug)]
pub struct Run {
    process: Process,
    session: Arc<Session>,
    state: File,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// All sessions.
#[derive(Debug, Default)]
pub struct Sessions(Mutex<HashMap<String, Arc<Session>>>);

impl Sessions {
    /// A new one that begins in a directory.
    pub fn create(&self, cwd: PathBuf) -> Arc<Session> {
        let kept = Mutex::new(Kept { cwd, exports: Vec::new() });
        let session = Arc::new(Session { id: ids::uuid(), kept, running: Mutex::default() });
        lock(&self.0).insert(session.id.clone(), session.clone());
        session
    }

    /// The session of an id.
    pub fn get(&self, id: &str) -> Option<Arc<Session>> {
        lock(&self.0).get(id).cloned()
    }

    /// Forgets it and kills what runs in it. Whether there was one.
    pub fn close(&self, id: &str) -> bool {
        let Some(session) = lock(&self.0).remove(id) else { return false };
        for process in lock(&session.running).drain(..) {
            let _ = reaper::signal_group(&process, Signal::SIGKILL);
        }
        true
    }

    /// Kills everything.
    pub fn close_all(&self) {
        let ids: Vec<String> = lock(&self.0).keys().cloned().collect();
        for id in ids {
            self.close(&id);
        }
    }
}

impl Session {
    /// Runs a command, in `cwd` if that is given, which the session is in from then on. Standard output and error are one.
    ///
    /// # Errors
    /// When no shell can be started.
    pub fn run(
        self: &Arc<Self>,
        text: &str,
        cwd: Option<PathBuf>,
        timeout: Option<Duration>,
    ) -> io::Result<(Output, Run)> {
        let mut environment = environment::current();
        let shell = spawn::shell(&environment);
        let (cwd, script) = {
            let kept = lock(&self.kept);
            let cwd = cwd.unwrap_or_else(|| kept.cwd.clone());
            let script = script(text, &cwd.to_string_lossy(), &kept.exports);
            (cwd, script)
        };
        // The shell believes it if it is right, and keeps a path that leads over symbolic links.
        environment.insert("PWD".into(), cwd.to_string_lossy().into_owned());
        let mut program = memory(c"runx-session")?;
        program.write_all(&script)?;
        let state = memory(c"runx-session-state")?;
        let (reader, writer) = spawn::pipe()?;
        let pipes = Pipes::new(reader, None)?;
        let flags: &[&str] = if spawn::is_bash(&shell) { &["--noprofile", "--norc"] } else { &[] };
        let mut argv = vec![shell.to_string_lossy().into_owned()];
        argv.extend(flags.iter().map(|flag| (*flag).to_owned()));
        argv.extend(["-c".to_owned(), format!(". /proc/self/fd/{SCRIPT}")]);
        // The script says that it is gone.
        let cwd = if cwd.is_dir() { cwd } else { PathBuf::from("/") };
        let process = Start {
            program: Program::Argv(argv),
            cwd,
            environment,
            identity: None,
            streams: Streams::Output { stdout: writer.try_clone()?, stderr: writer },
            passed: vec![(program.into(), SCRIPT), (OwnedFd::from(state.try_clone()?), STATE)],
            confinement: None,
        }
        .start()?;
        end_after(&process, Some(timeout.unwrap_or(DEFAULT_TIMEOUT)));
        lock(&self.running).push(process.clone());
        Ok((pipes.of(process.ended.clone()), Run { process, session: self.clone(), state }))
    }
}

/// What the shell runs: the variables of the last command, this one, and the writing down.
fn script(text: &str, cwd: &str, exports: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    out.extend_from_slice(exports);
    // The variables hold the directory that the last command was in.
    out.extend_from_slice(format!("\ncd -- {}\n", spawn::quote(cwd)).as_bytes());
    // Once: the command may have a trap of its own, which then runs as well.
    out.extend_from_slice(
        b"__runx_keep() { [ -n \"$__runx_kept\" ] || { printf '%s\\0' \"$PWD\"; export -p; } >&9 2>/dev/null; __runx_kept=1; }\n",
    );
    out.extend_from_slice(b"trap '__runx_status=$?; __runx_keep; exit $__runx_status' EXIT\n");
    out.extend_from_slice(text.as_bytes());
    // Two: the first may be escaped.
    out.extend_from_slice(b"\n\n__runx_status=$?; __runx_keep; exit $__runx_status\n");
    out
}

fn memory(name: &std::ffi::CStr) -> io::Result<File> {
    // SAFETY: the name ends with its NUL; the descriptor is new and nobody else's.
    unsafe {
        match libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) {
            -1 => Err(io::Error::last_os_error()),
            fd => Ok(File::from_raw_fd(fd)),
        }
    }
}

impl Run {
    /// Its process.
    pub fn process(&self) -> Process {
        self.process.clone()
    }

    /// Takes over the directory and the variables that the command ended with.
    fn keep(&self) {
        let length = self.state.metadata().map_or(0, |meta| meta.len());
        // Nothing was written: it was killed, or became another program.
        if length == 0 || length > STATE_LIMIT as u64 {
            return;
        }
        let mut bytes = vec![0; length as usize];
        if let Err(e) = self.state.read_exact_at(&mut bytes, 0) {
            return log::warn!("session {}: read its state: {e}", self.session.id);
        }
        let Some(at) = bytes.iter().position(|byte| *byte == 0) else { return };
        let exports = bytes.split_off(at + 1);
        bytes.pop();
        let cwd = PathBuf::from(std::ffi::OsString::from_vec(bytes));
        if !cwd.as_os_str().as_bytes().starts_with(b"/") {
            return;
        }
        *lock(&self.session.kept) = Kept { cwd, exports };
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        if self.process.ended.borrow().is_none() {
            let _ = reaper::signal_group(&self.process, Signal::SIGKILL);
        } else {
            self.keep();
        }
        lock(&self.session.running).retain(|process| process.pid != self.process.pid);
    }
}
