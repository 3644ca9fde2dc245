//! Files that go into a sandbox before its command runs, and out of it afterwards.

use std::fs;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use runx_core::sys::mount;
use runx_pool::{Lease, OpenOptions, Status};

use super::Runner;
use super::pipes::Collected;
use crate::model::{self, Cmd, File, FileError, Outcome};

/// How much is copied at once, in bytes.
const CHUNK: usize = 64 << 10;

fn wrong(name: &str, kind: &'static str, message: impl Into<String>) -> FileError {
    FileError { name: name.to_owned(), kind, message: message.into() }
}

impl Runner {
    /// A file's content, as a descriptor at its beginning.
    pub(super) fn source(&self, file: &File) -> Result<OwnedFd, FileError> {
        let name = file.src.as_ref().or(file.file_id.as_ref()).map_or("content", String::as_str);
        let failed = |e: io::Error| wrong(name, "CopyInOpenFile", format!("open {name}: {e}"));
        if let Some(content) = &file.content {
            return in_memory(content.as_bytes()).map_err(failed);
        }
        if let Some(id) = &file.file_id {
            return self.store.open(id).map(|(_, file)| file.into()).map_err(failed);
        }
        let src = PathBuf::from(file.src.as_deref().unwrap_or_default());
        // A link could lead out of what may be read.
        let real = fs::canonicalize(&src).map_err(failed)?;
        let prefixes = self.bounds.sources.iter().filter_map(|prefix| fs::canonicalize(prefix).ok());
        if !prefixes.into_iter().any(|prefix| real.starts_with(prefix)) {
            return Err(wrong(name, "CopyInOpenFile", format!("{name} leads out of --src-prefix")));
        }
        // A FIFO would have the server wait.
        let opened = fs::File::options().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(&real);
        let opened = opened.map_err(failed)?;
        // Somebody may have put a link in its way meanwhile: what counts is what was opened.
        let now = fs::read_link(format!("/proc/self/fd/{}", opened.as_raw_fd())).map_err(failed)?;
        if now != real {
            return Err(wrong(name, "CopyInOpenFile", format!("{name} has changed while it was opened")));
        }
        if !opened.metadata().map_err(failed)?.is_file() {
            return Err(wrong(name, "CopyInOpenFile", format!("{name} is not a regular file")));
        }
        Ok(opened.into())
    }

    /// A file's content as a descriptor that a program is given. What is behind it cannot be written by it, whoever owns it.
    pub(super) fn given(&self, file: &File) -> Result<OwnedFd, FileError> {
        let source = self.source(file)?;
        if file.content.is_some() {
            return Ok(source);
        }
        let again = |tree: OwnedFd| fs::File::open(format!("/proc/self/fd/{}", tree.as_raw_fd())).map(OwnedFd::from);
        let copied = || {
            let mut bytes = Vec::new();
            fs::File::from(source.try_clone()?).take(self.bounds.copy_out + 1).read_to_end(&mut bytes)?;
            if bytes.len() as u64 > self.bounds.copy_out {
                return Err(io::Error::new(io::ErrorKind::FileTooLarge, "it is larger than --copy-out-limit"));
            }
            in_memory(&bytes)
        };
        // Without the right to mount, a copy does it.
        let given = mount::read_only_clone(source.as_fd()).and_then(again).or_else(|_| copied());
        given.map_err(|e| wrong("files", "CopyInOpenFile", format!("give a file to a program: {e}")))
    }

    /// A path of a request: a relative one is so to the directory that commands begin in.
    fn inside(&self, path: &str) -> PathBuf {
        self.pool.template().directory_of_work().join(path)
    }

    /// Makes the files and links that a command comes with.
    pub(super) fn copy_in(&self, cmd: &Cmd, lease: &mut Lease) -> Result<(), FileError> {
        let files: Vec<_> = cmd.copy_in.iter().filter(|(_, file)| file.symlink.is_none()).collect();
        if !files.is_empty() {
            let wanted: Vec<_> =
                files.iter().map(|(path, _)| (self.inside(path), OpenOptions::Create(0o777))).collect();
            let opened = lease.open(&wanted).map_err(|e| wrong("copyIn", "CopyInCreateFile", e.to_string()))?;
            for ((path, file), fd) in files.into_iter().zip(opened) {
                let fd = fd.map_err(|e| wrong(path, "CopyInCreateFile", e.to_string()))?;
                let mut target = fs::File::from(fd);
                let copied = match &file.content {
                    Some(content) => target.write_all(content.as_bytes()),
                    None => {
                        let mut source = fs::File::from(self.source(file)?);
                        io::copy(&mut source, &mut target).map(drop)
                    }
                };
                copied.map_err(|e| wrong(path, "CopyInCopyContent", format!("copy to {path}: {e}")))?;
            }
        }
        for (path, file) in &cmd.copy_in {
            if let Some(target) = &file.symlink {
                lease.symlink(target, self.inside(path)).map_err(|e| wrong(path, "CopyInCreateFile", e.to_string()))?;
            }
        }
        Ok(())
    }

    /// Enters what was written to collected descriptors, and which of them had more than it may.
    pub(super) fn collect(
        &self,
        cmd: &Cmd,
        collected: Vec<(usize, Collected)>,
        captured: [Vec<u8>; 2],
        over: bool,
        outcome: &mut Outcome,
    ) {
        let mut all: Vec<(usize, Vec<u8>, bool)> = collected
            .into_iter()
            .map(|(fd, collected)| {
                let (bytes, more) = collected.finish();
                (fd, bytes, more)
            })
            .collect();
        for (fd, bytes) in captured.into_iter().enumerate().map(|(at, bytes)| (at + 1, bytes)) {
            if let Some(Some(File { max: Some(max), .. })) = cmd.files.get(fd) {
                let full = over && bytes.len() as i64 >= *max;
                all.push((fd, bytes, full));
            }
        }
        for (fd, bytes, more) in all {
            let Some(Some(File { name: Some(name), .. })) = cmd.files.get(fd) else { continue };
            if more {
                outcome.file_error.push(wrong(name, "CollectSizeExceeded", "more was written than is collected"));
                if outcome.status == model::status(Status::Accepted) {
                    outcome.status = model::status(Status::OutputLimitExceeded);
                }
            }
            self.tell(cmd, name, &bytes, outcome);
        }
    }

    /// Puts a content where it is wanted: into the answer, or among the files that are kept.
    fn tell(&self, cmd: &Cmd, name: &str, bytes: &[u8], outcome: &mut Outcome) {
        let kept = cmd.copy_out_cached.iter().any(|wanted| wanted.trim_end_matches('?') == name);
        if !kept {
            if let Err(error) = self.answer(name, bytes, outcome) {
                fail(outcome, error);
            }
            return;
        }
        let done = self.store.draft().and_then(|mut draft| draft.write(bytes).map(|()| draft.keep(name)));
        match done {
            Ok(id) => drop(outcome.file_ids.insert(name.to_owned(), id)),
            Err(e) => fail(outcome, wrong(name, "CopyOutCreateFile", e.to_string())),
        }
    }

    /// Puts a content into the answer, as long as that does not become too large: in JSON a byte may be six.
    fn answer(&self, name: &str, bytes: &[u8], outcome: &mut Outcome) -> Result<(), FileError> {
        let size: u64 = bytes.iter().map(|byte| if (b' '..=b'~').contains(byte) { 1 } else { 6 }).sum();
        let so_far: u64 = outcome.answered;
        if so_far + size > self.bounds.answer {
            let text = format!("the answer would be larger than --answer-limit, {}", self.bounds.answer);
            return Err(wrong(name, "CopyOutSizeExceeded", text));
        }
        outcome.answered += size;
        outcome.files.insert(name.to_owned(), String::from_utf8_lossy(bytes).into_owned());
        Ok(())
    }

    /// Takes out what the command was to leave.
    pub(super) fn copy_out(&self, cmd: &Cmd, lease: &mut Lease, outcome: &mut Outcome) {
        let is_collected = |name: &str| cmd.files.iter().flatten().any(|file| file.name.as_deref() == Some(name));
        let wanted =
            cmd.copy_out.iter().map(|name| (name, false)).chain(cmd.copy_out_cached.iter().map(|name| (name, true)));
        let wanted: Vec<(&str, bool, bool)> = wanted
            .map(|(name, cached)| match name.strip_suffix('?') {
                Some(name) => (name, cached, true),
                None => (name.as_str(), cached, false),
            })
            .filter(|(name, _, _)| !is_collected(name))
            .collect();
        if wanted.is_empty() {
            return;
        }
        let paths: Vec<_> = wanted.iter().map(|(name, _, _)| (self.inside(name), OpenOptions::Read)).collect();
        let opened = match lease.open(&paths) {
            Ok(opened) => opened,
            Err(e) => return fail(outcome, wrong("copyOut", "CopyOutOpen", e.to_string())),
        };
        for ((name, cached, optional), fd) in wanted.into_iter().zip(opened) {
            match fd {
                Err(e) if optional && e.errno() == Some(libc::ENOENT) => {}
                Err(e) => {
                    let kind = match e.errno() {
                        Some(libc::EISDIR | libc::EINVAL | libc::ELOOP | libc::ENXIO) => "CopyOutNotRegularFile",
                        _ => "CopyOutOpen",
                    };
                    fail(outcome, wrong(name, kind, e.to_string()));
                }
                Ok(fd) => {
                    if let Err(error) = self.copy_one(cmd, name, cached, fd, outcome) {
                        fail(outcome, error);
                    }
                }
            }
        }
    }

    fn copy_one(
        &self,
        cmd: &Cmd,
        name: &str,
        cached: bool,
        fd: OwnedFd,
        outcome: &mut Outcome,
    ) -> Result<(), FileError> {
        let mut file = fs::File::from(fd);
        let content = |e: io::Error| wrong(name, "CopyOutCopyContent", format!("copy {name}: {e}"));
        let size = file.metadata().map_err(content)?.len();
        let most = if cmd.copy_out_max > 0 { cmd.copy_out_max.min(self.bounds.copy_out) } else { self.bounds.copy_out };
        // Before it is read: it may be nothing but a hole.
        let most = if cached { most } else { most.min(self.bounds.answer) };
        if size > most && !cmd.copy_out_truncate {
            return Err(wrong(
                name,
                "CopyOutSizeExceeded",
                format!("{name} has {size} bytes, and {most} may be copied"),
            ));
        }
        let mut rest = Read::by_ref(&mut file).take(size.min(most));
        if !cached {
            let mut bytes = Vec::with_capacity(size.min(most) as usize);
            rest.read_to_end(&mut bytes).map_err(content)?;
            return self.answer(name, &bytes, outcome);
        }
        let create = |e: io::Error| wrong(name, "CopyOutCreateFile", format!("keep {name}: {e}"));
        let mut draft = self.store.draft().map_err(create)?;
        let mut chunk = vec![0; CHUNK];
        loop {
            match rest.read(&mut chunk).map_err(content)? {
                0 => break,
                length => draft.write(&chunk[..length]).map_err(create)?,
            }
        }
        outcome.file_ids.insert(name.to_owned(), draft.keep(name));
        Ok(())
    }
}

/// A file that cannot be had spoils what went well otherwise.
fn fail(outcome: &mut Outcome, error: FileError) {
    if outcome.status == model::status(Status::Accepted) {
        outcome.status = model::status(Status::FileError);
        outcome.error = error.message.clone();
    }
    outcome.file_error.push(error);
}

/// Bytes as a file that cannot be changed, at its beginning.
fn in_memory(bytes: &[u8]) -> io::Result<OwnedFd> {
    let flags = nix::sys::memfd::MFdFlags::MFD_CLOEXEC | nix::sys::memfd::MFdFlags::MFD_ALLOW_SEALING;
    let mut file = fs::File::from(nix::sys::memfd::memfd_create(c"content", flags)?);
    file.write_all(bytes)?;
    file.rewind()?;
    nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_ADD_SEALS(nix::fcntl::SealFlag::all()))?;
    // Another opening of it, which cannot write.
    fs::File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).map(OwnedFd::from)
}
