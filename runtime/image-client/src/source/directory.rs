//! A directory as a source: an OCI layout.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, fstat, openat, openat2};
use rustix::io::Errno;

use super::Source;

/// A directory whose files are looked up below it.
#[derive(Debug)]
pub(crate) struct Directory {
    fd: OwnedFd,
    path: PathBuf,
}

impl Directory {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let fd = openat(CWD, path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
        Ok(Self { fd: fd.with_context(|| format!("open {}", path.display()))?, path: path.into() })
    }
}

impl Source for Directory {
    fn open(&self, path: &str) -> Result<Option<Box<dyn Read + Send + '_>>> {
        // Links within it are honest: layouts share blobs by them.
        let how = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = match openat2(&self.fd, path, flags, Mode::empty(), how) {
            Ok(file) => file,
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
            Err(e) => return Err(e).with_context(|| format!("open {path} of {}", self.name())),
        };
        let stat = fstat(&file).with_context(|| format!("look at {path} of {}", self.name()))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            bail!("{path} of {} is no file", self.name());
        }
        Ok(Some(Box::new(File::from(file))))
    }

    fn name(&self) -> String {
        self.path.display().to_string()
    }
}
