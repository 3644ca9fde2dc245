//! Starting a process: a shell's command or a program by itself, in its own process group.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use super::confine;
use super::environment::Variables;
use super::reaper::{self, Ended};
use super::users::{self, Identity};

/// What is executed.
#[derive(Clone, Debug)]
pub enum Program {
    /// A command for `bash -c`, or `sh -c` where there is no bash.
    Shell(String),
    /// A program and its arguments.
    Argv(Vec<String>),
}

/// What its standard streams are.
#[derive(Debug)]
pub enum Streams {
    /// Input from nowhere, output and errors to these.
    Output {
        /// Standard output.
        stdout: OwnedFd,
        /// Standard error.
        stderr: OwnedFd,
    },
    /// Three of them.
    All {
        /// Standard input.
        stdin: OwnedFd,
        /// Standard output.
        stdout: OwnedFd,
        /// Standard error.
        stderr: OwnedFd,
    },
    /// A terminal, which it controls, as the leader of a session of its own.
    Terminal(OwnedFd),
}

/// All that a start needs.
pub struct Start {
    /// What is executed.
    pub program: Program,
    /// Its working directory.
    pub cwd: PathBuf,
    /// Its environment, all of it.
    pub environment: Variables,
    /// Who it is to be; `None` for who the daemon is.
    pub identity: Option<Identity>,
    /// What its standard streams are.
    pub streams: Streams,
    /// Descriptors that it gets besides, by their numbers there.
    pub passed: Vec<(OwnedFd, i32)>,
    /// What it may do less than the daemon, and where a failure of that is heard.
    pub confinement: Option<(confine::Ready, confine::Heard)>,
}

/// A process that was started and may have ended.
#[derive(Clone, Debug)]
pub struct Process {
    /// Its pid, and the number of its process group.
    pub pid: i32,
    /// Becomes `Some` at its end.
    pub ended: Ended,
}

/// The soft limit on open files that the daemon was started with: what it starts gets that one back.
static OPEN_FILES: OnceLock<libc::rlimit> = OnceLock::new();

/// Raises the daemon's own limit on open files: each stream takes a few.
pub fn raise_open_files() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the pointer is to a local.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } == 0 {
        let _ = OPEN_FILES.set(limit);
        let most = limit.rlim_max.min(1 << 20);
        let raised = libc::rlimit { rlim_cur: most.max(limit.rlim_cur), rlim_max: limit.rlim_max };
        // SAFETY: as above; with what it was it fails, no more.
        unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const raised) };
    }
}

impl Start {
    /// Starts it.
    ///
    /// # Errors
    /// That there is no such program, that it may not be executed, or that the daemon may not become the identity.
    pub fn start(self) -> io::Result<Process> {
        let (program, arguments) = match &self.program {
            Program::Shell(text) => (shell(&self.environment), vec!["-c".to_owned(), text.clone()]),
            Program::Argv(argv) => {
                let name = argv.first().map(String::as_str).unwrap_or_default();
                (find(name, &self.cwd, &self.environment)?, argv[1..].to_vec())
            }
        };
        let mut command = Command::new(&program);
        match &self.program {
            Program::Argv(argv) => command.arg0(&argv[0]),
            Program::Shell(_) => command.arg0(program.file_name().unwrap_or(program.as_os_str())),
        };
        command.args(arguments).current_dir(&self.cwd).env_clear().envs(&self.environment);
        let terminal = match self.streams {
            Streams::Output { stdout, stderr } => {
                command.stdin(Stdio::null()).stdout(stdout).stderr(stderr);
                false
            }
            Streams::All { stdin, stdout, stderr } => {
                command.stdin(stdin).stdout(stdout).stderr(stderr);
                false
            }
            Streams::Terminal(terminal) => {
                let copy = |fd: &OwnedFd| fd.try_clone();
                command.stdin(copy(&terminal)?).stdout(copy(&terminal)?).stderr(terminal);
                true
            }
        };
        // Asking for who one is already would need rights that an ordinary user lacks.
        let identity = self.identity.filter(|identity| (identity.uid, identity.gid) != users::own());
        // Copies above those that they become, so that none is overwritten before it was copied.
        let passed =
            self.passed.iter().map(|(fd, number)| Ok((above(fd)?, *number))).collect::<io::Result<Vec<_>>>()?;
        let (ready, heard) = self.confinement.unzip();
        let set_up = move || {
            for (fd, number) in &passed {
                // SAFETY: takes two numbers; the copy is open, and the number is the new program's to have.
                check(unsafe { libc::dup2(fd.as_raw_fd(), *number) })?;
            }
            if terminal {
                // SAFETY: both take numbers and no pointers.
                unsafe {
                    check(libc::setsid())?;
                    check(libc::ioctl(0, libc::TIOCSCTTY, 0))?;
                }
            } else {
                // SAFETY: takes two numbers.
                check(unsafe { libc::setpgid(0, 0) })?;
            }
            if let Some(limit) = OPEN_FILES.get() {
                // SAFETY: the pointer is to a value that is never changed.
                unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, std::ptr::from_ref(limit)) };
            }
            match (&ready, &identity) {
                (Some(ready), identity) => ready.take(identity.as_ref()),
                (None, Some(identity)) => identity.assume(),
                (None, None) => Ok(()),
            }
        };
        // SAFETY: between fork and exec only system calls are made, on values made before.
        unsafe { command.pre_exec(set_up) };
        let started = reaper::start(|| command.spawn().map(|child| child.id() as i32));
        let (pid, ended) = match heard {
            Some(heard) => started.map_err(|e| heard.name(e))?,
            None => started?,
        };
        Ok(Process { pid, ended })
    }
}

fn check(code: libc::c_int) -> io::Result<()> {
    if code < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn above(fd: &OwnedFd) -> io::Result<OwnedFd> {
    use std::os::fd::FromRawFd;
    // SAFETY: takes numbers.
    let copy = unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), libc::F_DUPFD_CLOEXEC, 32) };
    check(copy)?;
    // SAFETY: it was just made, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

/// The path of `bash`, or of `sh` where there is none.
pub fn shell(environment: &Variables) -> PathBuf {
    ["bash", "sh"]
        .iter()
        .find_map(|name| find(name, Path::new("/"), environment).ok())
        .unwrap_or_else(|| PathBuf::from("/bin/sh"))
}

/// Whether a shell's path is that of bash.
pub fn is_bash(shell: &Path) -> bool {
    shell.file_name().is_some_and(|name| name.as_bytes() == b"bash")
}

/// The program of a name: by the absolute directories of the environment's `PATH`, or relative to the working directory.
fn find(name: &str, cwd: &Path, environment: &Variables) -> io::Result<PathBuf> {
    if name.contains('/') {
        return Ok(cwd.join(name));
    }
    let search =
        environment.get("PATH").map_or("/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", String::as_str);
    let mut denied = false;
    for directory in search.split(':').filter(|directory| directory.starts_with('/')) {
        let path = Path::new(directory).join(name);
        match fs::metadata(&path) {
            Ok(meta) if meta.is_file() && meta.permissions().mode() & 0o111 != 0 => return Ok(path),
            Ok(meta) if meta.is_file() => denied = true,
            _ => {}
        }
    }
    let (kind, why) = if denied {
        (io::ErrorKind::PermissionDenied, "permission denied")
    } else {
        (io::ErrorKind::NotFound, "executable file not found in $PATH")
    };
    Err(io::Error::new(kind, format!("exec: {name:?}: {why}")))
}

/// A pipe; both ends are closed at exec.
///
/// # Errors
/// When there are too many.
pub fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?)
}

/// Variables as a list for a shell's quoting.
pub fn quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}
