//! The last step: which program it is, and its exec. The only place where kinds of workload differ.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::{Parent, exit};
use crate::error::{Context, Error, Result};
use crate::plan::ProcessPlan;
use crate::spawn::handshake::{FromChild, ToChild};
use crate::sys;
use crate::workload;

/// What will be executed.
pub(super) enum Program {
    /// The user's own program.
    Native(PathBuf),
    /// One that is no file of the root filesystem.
    Given(OwnedFd),
    /// The WASM runner, with a compiled module.
    Runner { runner: OwnedFd, artifact: OwnedFd, words: String },
}

/// Everything that `execve` takes, made before the steps after which nothing may fail.
pub(super) struct Exec {
    name: String,
    program: Program,
    path: CString,
    args: Vec<CString>,
    env: Vec<CString>,
}

/// Finds the program as its user, in its working directory, by its own `PATH`.
pub(super) fn find(process: &ProcessPlan, parent: &Parent) -> Result<Program> {
    let name = process.args.first().map(String::as_str).unwrap_or_default();
    let path = match look_up(name, &process.env) {
        Err(e @ Error::Program { missing: true, .. }) if process.ask_for_module => {
            parent.tell(&FromChild::Missing { name: name.to_owned() }, &[])?;
            return match answered(parent)? {
                Answered::Runs(program) => Ok(program),
                Answered::Nothing(None) => Err(e),
                Answered::Nothing(Some(why)) => Err(with_reason(e, &why)),
            };
        }
        found => found?,
    };
    match module(name, &path)? {
        Some(module) => runner_for(name, &module, parent),
        None => Ok(Program::Native(path)),
    }
}

fn missing(name: &str, reason: impl Into<String>) -> Error {
    Error::Program { program: name.to_owned(), reason: reason.into(), missing: true }
}

fn unusable(name: &str, reason: impl Into<String>) -> Error {
    Error::Program { program: name.to_owned(), reason: reason.into(), missing: false }
}

/// Why a path cannot be executed.
enum Unfit {
    Missing(io::Error),
    Directory,
    NotExecutable,
}

fn examine(path: &Path) -> std::result::Result<(), Unfit> {
    let meta = std::fs::metadata(path).map_err(Unfit::Missing)?;
    if meta.is_dir() {
        return Err(Unfit::Directory);
    }
    // A module is data for the runner and needs no permission to be executed.
    if workload::has_module_name(path) && meta.is_file() {
        return Ok(());
    }
    if meta.permissions().mode() & 0o111 == 0 || meta.file_type().is_socket() {
        return Err(Unfit::NotExecutable);
    }
    let flags = nix::fcntl::AtFlags::AT_EACCESS;
    nix::unistd::faccessat(nix::fcntl::AT_FDCWD, path, nix::unistd::AccessFlags::X_OK, flags)
        .map_err(|_| Unfit::NotExecutable)
}

fn look_up(name: &str, env: &[String]) -> Result<PathBuf> {
    if name.contains('/') {
        let path = PathBuf::from(name);
        return match examine(&path) {
            Ok(()) => Ok(path),
            Err(Unfit::Missing(e)) if e.kind() == io::ErrorKind::NotFound => {
                Err(missing(name, format!("stat {name}: no such file or directory")))
            }
            Err(Unfit::Missing(e)) => Err(unusable(name, format!("stat {name}: {e}"))),
            Err(Unfit::Directory) => Err(unusable(name, "is a directory")),
            Err(Unfit::NotExecutable) => Err(unusable(name, "permission denied")),
        };
    }
    let search = env.iter().rev().find_map(|variable| variable.strip_prefix("PATH=")).unwrap_or_default();
    let mut denied = false;
    for directory in search.split(':') {
        let path = Path::new(if directory.is_empty() { "." } else { directory }).join(name);
        match examine(&path) {
            Ok(()) => return Ok(path),
            Err(Unfit::NotExecutable) => denied = true,
            Err(_) => {}
        }
    }
    // Module images name their entrypoint without a directory and mean the working one or the root.
    if workload::has_module_name(Path::new(name)) {
        for path in [Path::new(".").join(name), Path::new("/").join(name)] {
            if examine(&path).is_ok() {
                return Ok(path);
            }
        }
    }
    if denied {
        return Err(unusable(name, "permission denied"));
    }
    Err(missing(name, "executable file not found in $PATH"))
}

/// Opens the program if it is a WASM module, told by its first bytes or its name.
fn module(name: &str, path: &Path) -> Result<Option<File>> {
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY | libc::O_CLOEXEC;
    let opened = std::fs::OpenOptions::new().read(true).custom_flags(flags).open(path);
    let mut file = match opened {
        Ok(file) => file,
        Err(e) if workload::has_module_name(path) => {
            return Err(unusable(name, format!("open {}: {e}", path.display())));
        }
        // A program that may be executed and not read is native.
        Err(_) => return Ok(None),
    };
    if !file.metadata().with_context(|| format!("look at {}", path.display()))?.is_file() {
        return Ok(None);
    }
    let mut head = Vec::with_capacity(4);
    let read = file.by_ref().take(4).read_to_end(&mut head);
    if workload::has_module_name(path) || (read.is_ok() && head == workload::MAGIC) {
        return Ok(Some(file));
    }
    Ok(None)
}

fn runner_for(name: &str, module: &File, parent: &Parent) -> Result<Program> {
    parent.tell(&FromChild::Module { name: name.to_owned() }, &[module.as_fd()])?;
    match answered(parent)? {
        Answered::Runs(program) => Ok(program),
        Answered::Nothing(_) => Err(missing(name, "it has vanished")),
    }
}

/// The same failure, with what else is to be known.
fn with_reason(error: Error, why: &str) -> Error {
    match error {
        Error::Program { program, reason, missing } => {
            Error::Program { program, reason: format!("{reason}; {why}"), missing }
        }
        other => other,
    }
}

/// What the parent says to a module.
enum Answered {
    /// What runs it.
    Runs(Program),
    /// There is none, or why that is not known.
    Nothing(Option<String>),
}

fn answered(parent: &Parent) -> Result<Answered> {
    match parent.hear()? {
        (ToChild::Runner { words }, fds) => {
            let mut fds = fds.into_iter();
            match (fds.next(), fds.next()) {
                (Some(runner), Some(artifact)) => Ok(Answered::Runs(Program::Runner { runner, artifact, words })),
                _ => Err(Error::Died("the runner's descriptors are missing".into())),
            }
        }
        // The parent knows why and reports it itself.
        (ToChild::NoRunner, _) => exit(1),
        (ToChild::NoModule { why }, _) => Ok(Answered::Nothing(why)),
        (other, _) => Err(Error::Died(format!("expected Runner, heard {other:?}"))),
    }
}

fn strings(name: &str, list: impl Iterator<Item = impl Into<Vec<u8>>>) -> Result<Vec<CString>> {
    list.map(|word| CString::new(word).map_err(|_| unusable(name, "an argument or variable holds a NUL byte")))
        .collect()
}

impl Program {
    /// Gets everything ready; nothing is allocated or opened after this.
    pub(super) fn prepare(self, process: &ProcessPlan) -> Result<Exec> {
        let name = process.args.first().cloned().unwrap_or_default();
        let mut args = strings(&name, process.args.iter().map(String::as_str))?;
        let env = strings(&name, process.env.iter().map(String::as_str))?;
        let path = match &self {
            Self::Given(_) => CString::default(),
            Self::Native(path) => sys::cstring(path).map_err(|e| unusable(&name, e.to_string()))?,
            Self::Runner { artifact, words, .. } => {
                sys::set_cloexec(artifact.as_fd(), false).context("hand the module to the runner")?;
                let number = format!("{}{words}", artifact.as_raw_fd());
                let own = [workload::RUNNER, &number].map(str::as_bytes).map(<[u8]>::to_vec);
                args.splice(0..0, strings(&name, own.into_iter())?);
                CString::default()
            }
        };
        Ok(Exec { name, program: self, path, args, env })
    }
}

impl Exec {
    /// Becomes the program. Returns only an error.
    pub(super) fn execute(self) -> Result<()> {
        let pointers = |list: &[CString]| -> Vec<*const libc::c_char> {
            list.iter().map(|word| word.as_ptr()).chain([std::ptr::null()]).collect()
        };
        let (args, env) = (pointers(&self.args), pointers(&self.env));
        let (directory, flags) = match &self.program {
            Program::Native(_) => (libc::AT_FDCWD, 0),
            Program::Given(program) | Program::Runner { runner: program, .. } => {
                (program.as_raw_fd(), libc::AT_EMPTY_PATH)
            }
        };
        // SAFETY: path, arguments and environment are NUL-terminated, the lists end with NULL, and all
        // of it lives until the call replaces this process or fails.
        unsafe {
            if flags == 0 {
                libc::execve(self.path.as_ptr(), args.as_ptr(), env.as_ptr());
            } else {
                libc::syscall(libc::SYS_execveat, directory, self.path.as_ptr(), args.as_ptr(), env.as_ptr(), flags);
            }
        }
        let error = io::Error::last_os_error();
        let path = self.path.to_string_lossy();
        Err(match error.raw_os_error() {
            Some(libc::ENOEXEC) => unusable(&self.name, format!("exec {path}: exec format error")),
            // The file was there a moment ago: what is missing is its interpreter.
            Some(libc::ENOENT) => missing(&self.name, format!("exec {path}: no such file or directory")),
            _ => unusable(&self.name, format!("exec {path}: {error}")),
        })
    }
}
