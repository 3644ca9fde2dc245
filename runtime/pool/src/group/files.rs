//! Control files. Those that are read after every execution are kept open, so that a read costs one call; the others are
//! opened when they are needed, so that a sandbox costs fewer descriptors.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::system;
use crate::error::{Error, Result};

/// How long the kernel may take to let go of an emptied group.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

/// One file of a group.
#[derive(Debug)]
pub(super) struct ControlFile(File);

impl ControlFile {
    /// Opens a file that the kernel may not have.
    pub(super) fn open(directory: &Path, name: &str, writable: bool) -> Option<Self> {
        OpenOptions::new().read(true).write(writable).open(directory.join(name)).ok().map(Self)
    }

    fn read<'a>(&self, buffer: &'a mut [u8; 1024]) -> Option<&'a str> {
        let length = self.0.read_at(buffer, 0).ok()?;
        std::str::from_utf8(buffer.get(..length)?).ok()
    }

    /// Its only number.
    pub(super) fn number(&self) -> Option<u64> {
        self.read(&mut [0; 1024])?.trim_end().parse().ok()
    }

    /// The number behind a key.
    pub(super) fn pair(&self, key: &str) -> Option<u64> {
        let mut buffer = [0; 1024];
        let text = self.read(&mut buffer)?;
        text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.parse().ok())
    }

    /// Writes to it, and to the kernel's count for this descriptor, which only an open file has.
    pub(super) fn write(&self, value: u64) -> io::Result<()> {
        (&self.0).write_all(value.to_string().as_bytes())
    }
}

/// A file that is there, and opened for each use.
#[derive(Debug)]
pub(super) struct Setting(PathBuf);

impl Setting {
    /// A file that the kernel may not have.
    pub(super) fn find(directory: &Path, name: &str) -> Option<Self> {
        let path = directory.join(name);
        path.exists().then_some(Self(path))
    }

    /// Its only number.
    pub(super) fn number(&self) -> Option<u64> {
        fs::read_to_string(&self.0).ok()?.trim_end().parse().ok()
    }

    pub(super) fn write(&self, value: u64) -> io::Result<()> {
        OpenOptions::new().write(true).open(&self.0)?.write_all(value.to_string().as_bytes())
    }

    pub(super) fn error(&self, verb: &str, error: io::Error) -> Error {
        system(verb, &self.0, error)
    }
}

/// Writes one setting.
pub(super) fn write(directory: &Path, name: &str, value: &str) -> io::Result<()> {
    OpenOptions::new().write(true).open(directory.join(name))?.write_all(value.as_bytes())
}

/// Removes a group and those below it. The last process leaves its group a little after it has ended; for each group that
/// is waited for as long as `patience`.
pub(super) fn remove(path: &Path, patience: Duration) -> Result<()> {
    let deadline = Instant::now() + patience;
    let mut pause = Duration::from_micros(200);
    loop {
        match fs::remove_dir(path) {
            Ok(()) => return Ok(()),
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENODEV)) => return Ok(()),
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) && Instant::now() < deadline => {}
            Err(e) => return Err(system("remove", path, e)),
        }
        for entry in fs::read_dir(path).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                remove(&entry.path(), patience)?;
            }
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}
