//! The pool's metrics in a file, for the metrics of the node (`deploy/src/pools.rs`): whole at any time, and gone when the server
//! has ended. One that was killed leaves a file that nobody writes any more, which is not read for long.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

/// The file. It goes with this.
#[derive(Debug)]
pub(crate) struct Published {
    path: PathBuf,
    temporary: PathBuf,
}

impl Published {
    /// Writes the file for the first time. Its directory is made if it is not there.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(crate) fn new(path: PathBuf, text: &str) -> io::Result<Self> {
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory)?;
        }
        // Two servers with the same file would take turns, and neither may have half of the other's.
        let temporary = path.with_extension(format!("{}.new", std::process::id()));
        let this = Self { path, temporary };
        this.write(text)?;
        Ok(this)
    }

    /// Writes it anew.
    ///
    /// # Errors
    /// As above.
    pub(crate) fn write(&self, text: &str) -> io::Result<()> {
        // What an earlier process of this number may have left, or somebody else has put there.
        let _ = fs::remove_file(&self.temporary);
        let mut options = fs::OpenOptions::new();
        let mut file = options.write(true).create_new(true).mode(0o644).open(&self.temporary)?;
        file.write_all(text.as_bytes())?;
        fs::rename(&self.temporary, &self.path)
    }
}

impl Drop for Published {
    fn drop(&mut self) {
        for path in [&self.temporary, &self.path] {
            let _ = fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_is_replaced_as_a_whole_and_gone_at_the_end() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pools/judge.prom");
        let published = Published::new(path.clone(), "one 1\n").unwrap();
        let first = fs::File::open(&path).unwrap();
        published.write("two 2\n").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "two 2\n");
        assert_eq!(io::read_to_string(first).unwrap(), "one 1\n");
        drop(published);
        assert_eq!(fs::read_dir(directory.path().join("pools")).unwrap().count(), 0);
    }

    #[test]
    fn a_link_in_its_place_is_not_followed() {
        let directory = tempfile::tempdir().unwrap();
        let (path, other) = (directory.path().join("judge.prom"), directory.path().join("other"));
        fs::write(&other, "kept").unwrap();
        for link in [&path, &path.with_extension(format!("{}.new", std::process::id()))] {
            std::os::unix::fs::symlink(&other, link).unwrap();
        }
        let published = Published::new(path.clone(), "one 1\n").unwrap();
        assert_eq!(
            (fs::read_to_string(&path).unwrap().as_str(), fs::read_to_string(&other).unwrap().as_str()),
            ("one 1\n", "kept")
        );
        drop(published);
        assert!(other.exists() && !path.exists());
    }
}
