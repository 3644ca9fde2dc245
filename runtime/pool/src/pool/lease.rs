//! A sandbox that is lent.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use runx_core::error::Context;

use super::Shared;
use super::sandbox::Sandbox;
use super::stop::{Killer, Stop};
use crate::command::Command;
use crate::error::{Error, Result};
use crate::outcome::Outcome;
use crate::wire::messages::{FromInit, OpenFile, ToInit};

/// How a file of a sandbox is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenOptions {
    /// For reading.
    Read,
    /// For reading and writing. It has to be there.
    Write,
    /// For reading and writing, empty, and made with these permission bits, with directories above it, if it is not there.
    /// What is made belongs to the programs' user.
    Create(u32),
}

/// A sandbox that is lent to one caller. What one program leaves, files and all but processes, the next one finds, until
/// the lease is dropped.
#[derive(Debug)]
pub struct Lease {
    shared: Arc<Shared>,
    /// Only while it is dropped there is none.
    sandbox: Option<Sandbox>,
    /// There is one when somebody has asked for a killer.
    stop: OnceLock<Arc<Stop>>,
    broken: bool,
}

impl Lease {
    pub(super) fn new(shared: Arc<Shared>, sandbox: Sandbox) -> Self {
        Self { shared, sandbox: Some(sandbox), stop: OnceLock::new(), broken: false }
    }

    /// Runs a program to its end, and ends all that it has left running.
    ///
    /// # Errors
    /// [`Error::Command`] for what cannot be told to a sandbox, and [`Error::Gone`] if it has ended. How the program ends
    /// is no error.
    pub fn run(&mut self, command: Command) -> Result<Outcome> {
        let Self { shared, sandbox, stop, .. } = self;
        let outcome = match sandbox {
            Some(sandbox) => sandbox.run(command, &shared.template, stop.get().map(AsRef::as_ref)),
            None => Err(Error::Closed),
        };
        match &outcome {
            Ok(outcome) => self.shared.counters.executed(outcome),
            Err(e) => self.note(e),
        }
        outcome
    }

    /// Opens files, with as few round trips as can be. Only regular files are opened, and none of /proc; what is on the
    /// way of a path is looked up in the sandbox's root.
    ///
    /// # Errors
    /// [`Error::Gone`] if the sandbox has ended. That a file cannot be opened is told in its place in the list.
    pub fn open(&mut self, files: &[(PathBuf, OpenOptions)]) -> Result<Vec<Result<OwnedFd>>> {
        let mut all = Vec::with_capacity(files.len());
        // So many descriptors fit into an answer.
        for chunk in files.chunks(200) {
            let asked = chunk.iter().map(|(path, options)| OpenFile {
                path: path.as_os_str().as_bytes().to_vec(),
                write: *options != OpenOptions::Read,
                create: matches!(options, OpenOptions::Create(_)),
                mode: if let OpenOptions::Create(mode) = options { *mode } else { 0 },
            });
            let (errors, mut fds) = match self.ask(ToInit::Open(asked.collect()))? {
                (FromInit::Opened(errors), fds) if errors.len() == chunk.len() => (errors, fds.into_iter()),
                _ => return Err(self.strange()),
            };
            for ((path, _), errno) in chunk.iter().zip(errors) {
                let opened = match errno {
                    0 => fds.next().ok_or_else(|| self.strange())?,
                    errno => {
                        all.push(Err(file("open", path, errno)));
                        continue;
                    }
                };
                all.push(Ok(opened));
            }
        }
        Ok(all)
    }

    /// Makes a symbolic link, with directories above it.
    ///
    /// # Errors
    /// [`Error::File`] if it cannot be made, [`Error::Gone`] if the sandbox has ended.
    pub fn symlink(&mut self, target: impl AsRef<Path>, path: impl AsRef<Path>) -> Result<()> {
        let bytes = |path: &Path| path.as_os_str().as_bytes().to_vec();
        let link = (bytes(target.as_ref()), bytes(path.as_ref()));
        self.done("link", path.as_ref(), ToInit::Symlink(vec![link]))
    }

    /// Removes a file, or a directory with all that is in it. Links are removed and not followed.
    ///
    /// # Errors
    /// [`Error::File`] if it cannot be removed, [`Error::Gone`] if the sandbox has ended.
    pub fn delete(&mut self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        self.done("delete", path, ToInit::Delete(vec![path.as_os_str().as_bytes().to_vec()]))
    }

    /// What ends a program, from another thread, for as long as this lease is there.
    ///
    /// # Errors
    /// When no more descriptors can be opened.
    pub fn killer(&self) -> Result<Killer> {
        let sandbox = self.sandbox.as_ref().ok_or(Error::Closed)?;
        let stop = match self.stop.get() {
            Some(stop) => stop,
            None => {
                let new = Arc::new(Stop::new()?);
                self.stop.get_or_init(|| new)
            }
        };
        let init = sandbox.pidfd.try_clone().context("duplicate a pidfd")?;
        Ok(Killer { stop: Arc::clone(stop), init })
    }

    fn done(&mut self, operation: &'static str, path: &Path, message: ToInit) -> Result<()> {
        match self.ask(message)?.0 {
            FromInit::Done(errors) => match errors.first() {
                Some(0) => Ok(()),
                Some(errno) => Err(file(operation, path, *errno)),
                None => Err(self.strange()),
            },
            _ => Err(self.strange()),
        }
    }

    fn ask(&mut self, message: ToInit) -> Result<(FromInit, Vec<OwnedFd>)> {
        let asked = self.sandbox.as_mut().ok_or(Error::Closed)?.ask(&message);
        if let Err(e) = &asked {
            self.note(e);
        }
        asked
    }

    /// An answer to another question: nothing that it says can be relied on any more.
    fn strange(&mut self) -> Error {
        self.broken = true;
        Error::Gone("it answered something else".into())
    }

    fn note(&mut self, error: &Error) {
        self.broken |= matches!(error, Error::Gone(_));
    }
}

fn file(operation: &'static str, path: &Path, errno: u32) -> Error {
    Error::File { operation, path: path.to_owned(), source: io::Error::from_raw_os_error(errno as i32) }
}

/// The socket to the sandbox's init. It becomes readable when the sandbox ends.
impl AsFd for Lease {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.sandbox {
            Some(sandbox) => sandbox.channel.as_fd(),
            None => unreachable!("a lease without a sandbox is being dropped"),
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(sandbox) = self.sandbox.take() {
            let broken = self.broken || !sandbox.is_alive();
            self.shared.give_back(sandbox, broken);
        }
    }
}
