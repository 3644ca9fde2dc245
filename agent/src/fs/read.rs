//! Reading files: all of one, a range of it, or some of its lines.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::SystemTime;

use super::{Error, Files, Result};

/// How much is read at once, in bytes.
pub const CHUNK: usize = 512 << 10;

/// A file that is read.
#[derive(Debug)]
pub struct Reader {
    /// The file.
    pub file: File,
    /// How large it was when it was opened, in bytes.
    pub size: u64,
    /// When it was changed last.
    pub modified: SystemTime,
}

impl Files {
    /// Opens a file for reading.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::Invalid`] for a directory or something else that has no content to send.
    pub fn reader(&self, path: &Path) -> Result<Reader> {
        let file =
            self.root.open_file(path, libc::O_RDONLY | libc::O_NONBLOCK, 0).map_err(|e| Error::of("open", path, &e))?;
        let meta = file.metadata().map_err(|e| Error::of("stat", path, &e))?;
        if !meta.is_file() {
            let what = if meta.is_dir() { "a directory" } else { "not a regular file" };
            return Err(Error::Invalid(format!("{} is {what}", path.display())));
        }
        Ok(Reader { size: meta.len(), modified: meta.modified().unwrap_or(SystemTime::UNIX_EPOCH), file })
    }
}

impl Reader {
    /// What is at an offset, at most up to another one. What the file has lost meanwhile is an error: its length was promised.
    ///
    /// # Errors
    /// Those of reading.
    pub fn piece(&self, from: u64, to: u64) -> std::io::Result<Vec<u8>> {
        let mut buffer = vec![0; usize::try_from(to - from).unwrap_or(CHUNK).min(CHUNK)];
        self.file.read_exact_at(&mut buffer, from)?;
        Ok(buffer)
    }

    /// Tells lines from number `first` on (the first of all is 1), at most `most` of them, with a newline between two and
    /// none after the last.
    ///
    /// # Errors
    /// Those of reading.
    pub fn lines(&self, first: u64, most: Option<u64>, tell: &mut dyn FnMut(Vec<u8>) -> bool) -> std::io::Result<()> {
        let last = most.map_or(u64::MAX, |most| first.saturating_add(most) - 1);
        let (mut number, mut told) = (1u64, 0u64);
        // Within the line: a carriage return counts only if no newline follows.
        let mut held_return = false;
        let mut begun = false;
        let mut buffer = vec![0; CHUNK];
        while number <= last {
            let length = (&self.file).read(&mut buffer)?;
            if length == 0 {
                break;
            }
            let mut out = Vec::new();
            for byte in &buffer[..length] {
                let wanted = number >= first && number <= last;
                if wanted && !begun {
                    begun = true;
                    if told > 0 {
                        out.push(b'\n');
                    }
                    told += 1;
                }
                if *byte == b'\n' {
                    held_return = false;
                    number += 1;
                    begun = false;
                    if number > last {
                        break;
                    }
                    continue;
                }
                if held_return && wanted {
                    out.push(b'\r');
                }
                held_return = *byte == b'\r';
                if wanted && !held_return {
                    out.push(*byte);
                }
            }
            if !out.is_empty() && !tell(out) {
                return Ok(());
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(content: &str, first: u64, most: Option<u64>) -> String {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("f");
        std::fs::write(&path, content).unwrap();
        let files = Files { root: crate::fs::root::Root::new(None).unwrap(), limit: 0 };
        let mut out = Vec::new();
        files
            .reader(&path)
            .unwrap()
            .lines(first, most, &mut |bytes| {
                out.extend(bytes);
                true
            })
            .unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn lines_are_a_window() {
        let text = "one\r\ntwo\n\nfour\nfi\rve";
        assert_eq!(lines(text, 1, None), "one\ntwo\n\nfour\nfi\rve");
        assert_eq!(lines(text, 2, Some(2)), "two\n");
        assert_eq!(lines(text, 4, Some(1)), "four");
        assert_eq!(lines(text, 5, Some(9)), "fi\rve");
        assert_eq!(lines(text, 6, None), "");
        assert_eq!(lines("a\n", 1, Some(5)), "a");
    }
}
