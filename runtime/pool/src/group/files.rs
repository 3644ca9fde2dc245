//! Control files, kept open: a read costs one call.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::system;
use crate::error::{Error, Result};

/// How long the kernel may take to let go of an emptied group.
const PATIENCE: Duration = Duration::from_secs(10);

/// One file of a group.
#[derive(Debug)]
pub(super) struct ControlFile {
    file: File,
    path: PathBuf,
}

impl ControlFile {
    /// Opens a file that the kernel may not have.
    pub(super) fn open(directory: &Path, name: &str, writable: bool) -> Option<Self> {
        let path = directory.join(name);
        let file = OpenOptions::new().read(true).write(writable).open(&path).ok()?;
        Some(Self { file, path })
    }

    fn read<'a>(&self, buffer: &'a mut [u8; 1024]) -> Option<&'a str> {
        let length = self.file.read_at(buffer, 0).ok()?;
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

    pub(super) fn write(&self, value: u64) -> io::Result<()> {
        (&self.file).write_all(value.to_string().as_bytes())
    }

    pub(super) fn error(&self, verb: &str, error: io::Error) -> Error {
        system(verb, &self.path, error)
    }
}

/// Writes one setting.
pub(super) fn write(directory: &Path, name: &str, value: &str) -> io::Result<()> {
    OpenOptions::new().write(true).open(directory.join(name))?.write_all(value.as_bytes())
}

/// Removes a group and those below it. The last process leaves its group a little after it has ended.
pub(super) fn remove(path: &Path) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
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
                remove(&entry.path())?;
            }
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}
