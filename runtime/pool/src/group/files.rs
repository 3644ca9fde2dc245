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
    /// Opens a file that the kernel may not have, or, if `writable`, not let be written. Any other failure is one: what is
    /// not counted only because descriptors ran out would make verdicts wrong.
    pub(super) fn open(directory: &Path, name: &str, writable: bool) -> Result<Option<Self>> {
        let path = directory.join(name);
        match OpenOptions::new().read(true).write(writable).open(&path) {
            Ok(file) => Ok(Some(Self(file))),
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(e) if writable && e.raw_os_error() == Some(libc::EACCES) => Ok(None),
            Err(e) => Err(system("open", &path, e)),
        }
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
    pub(super) fn find(directory: &Path, name: &str) -> Result<Option<Self>> {
        let path = directory.join(name);
        match path.try_exists() {
            Ok(there) => Ok(there.then_some(Self(path))),
            Err(e) => Err(system("look for", &path, e)),
        }
    }

    /// Its only number, if it is one.
    pub(super) fn number(&self) -> Result<Option<u64>> {
        let text = fs::read_to_string(&self.0).map_err(|e| system("read", &self.0, e))?;
        Ok(text.trim_end().parse().ok())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_not_there_is_none() {
        let place = tempfile::TempDir::with_prefix("runx-pool-test-").unwrap();
        let path = place.path();
        std::os::unix::fs::symlink("loop", path.join("loop")).unwrap();
        fs::write(path.join("number"), "7\n").unwrap();
        assert!(ControlFile::open(path, "none", true).unwrap().is_none());
        assert!(ControlFile::open(path, "loop", true).is_err());
        assert_eq!(ControlFile::open(path, "number", true).unwrap().and_then(|file| file.number()), Some(7));
        assert!(Setting::find(path, "none").unwrap().is_none());
        assert!(Setting::find(path, "loop").is_err());
        let setting = Setting::find(path, "number").unwrap().unwrap();
        assert_eq!(setting.number().unwrap(), Some(7));
        fs::remove_file(path.join("number")).unwrap();
        assert!(setting.number().is_err());
    }
}
