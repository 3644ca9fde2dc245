//! Writing files, in such a way that under their names there is the old content or the new one, and never half of it.
//!
//! What is written goes to a file without a name in the same directory, which gets the name at the end. Where that cannot
//! be (the path is a symbolic link, a device, a file that is mounted, or lies in a directory that may not be written), it
//! goes to where temporary files are, and is copied when it is complete.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::root::{self, Place};
use super::{Error, Files, Permission, Result};
use crate::process::users::Accounts;
use crate::{ids, process::store};

/// What the names of parts begin with that wait for their rest.
const PART: &str = ".runx-part-";

/// A part of an upload that will be gone on with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// What its uploader calls it.
    pub upload: String,
    /// How much he has sent before.
    pub offset: u64,
    /// It is the last one.
    pub complete: bool,
}

/// A file that is being written.
#[derive(Debug)]
pub struct Writer {
    file: File,
    path: PathBuf,
    permission: Permission,
    written: u64,
    limit: u64,
    how: How,
}

#[derive(Debug)]
enum How {
    /// Gets its name at the end.
    Link(Place),
    /// Has another name until then.
    Rename { part: Place, to: Place, kept: Option<Part> },
    /// Is copied.
    Copy,
}

/// The permissions of a new file, less the umask.
const MODE: u32 = 0o777;

impl Files {
    /// Begins to write a file, and makes the directories above it.
    ///
    /// # Errors
    /// The kernel's; that the path is a directory; and [`Error::Conflict`] when a part does not begin where the last one
    /// ended.
    pub fn writer(&self, path: &Path, permission: &Permission, part: Option<Part>) -> Result<Writer> {
        // Before anything is written.
        super::from_digits(permission.mode)?;
        permission.ids(&Accounts::load())?;
        if let Some(parent) = path.parent() {
            self.root
                .make_directories(parent, 0o777)
                .map_err(|e| Error::System(format!("create directory {}: {e}", parent.display())))?;
        }
        let failed = |e: io::Error| Error::System(format!("open {} for writing: {e}", path.display()));
        let place = self.root.place(path).map_err(failed)?;
        let kind = match place.stat() {
            Ok(stat) => Some(stat.st_mode & libc::S_IFMT),
            Err(e) if e.kind() == io::ErrorKind::NotFound => None,
            Err(e) => return Err(failed(e)),
        };
        if kind == Some(libc::S_IFDIR) || place.name() == "." {
            return Err(Error::System(format!("path is a directory: {}", path.display())));
        }
        let writer = |file, how, written| Writer {
            file,
            path: path.to_owned(),
            permission: permission.clone(),
            written,
            limit: self.limit,
            how,
        };
        if let Some(part) = part {
            return self.go_on(path, place, part).map(|(file, how, written)| writer(file, how, written));
        }
        if matches!(kind, None | Some(libc::S_IFREG)) {
            let directory = place.beside(".").map_err(failed)?;
            match directory.open(libc::O_TMPFILE | libc::O_RDWR, MODE) {
                Ok(file) => return Ok(writer(file.into(), How::Link(place), 0)),
                Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR | libc::ENOENT)) => {
                    let part = place.beside(format!(".runx-{}", ids::hex())).map_err(failed)?;
                    match part.open(libc::O_RDWR | libc::O_CREAT | libc::O_EXCL, MODE) {
                        Ok(file) => return Ok(writer(file.into(), How::Rename { part, to: place, kept: None }, 0)),
                        Err(e) if kind.is_none() => return Err(failed(e)),
                        Err(_) => {}
                    }
                }
                // The file may be writable where its directory is not.
                Err(_) if kind.is_some() => {}
                Err(e) => return Err(failed(e)),
            }
        }
        // That it may be written shows before all of it was sent.
        self.root.open(path, libc::O_WRONLY | libc::O_NONBLOCK, 0).map(drop).or_else(|e| match e.kind() {
            // A link to what is not there yet.
            io::ErrorKind::NotFound => Ok(()),
            _ => Err(failed(e)),
        })?;
        let file = store::nameless().map_err(|e| Error::System(format!("make a temporary file: {e}")))?;
        Ok(writer(file, How::Copy, 0))
    }

    fn go_on(&self, path: &Path, to: Place, part: Part) -> Result<(File, How, u64)> {
        let failed = |e: io::Error| Error::System(format!("open a part of {}: {e}", path.display()));
        let place = part_place(&to, &part.upload)?.map_err(failed)?;
        let file = File::from(place.open(libc::O_RDWR | libc::O_CREAT, 0o600).map_err(failed)?);
        let there = file.metadata().map_err(failed)?.len();
        if part.offset == 0 && there > 0 {
            file.set_len(0).map_err(failed)?;
        } else if part.offset != there {
            return Err(Error::Conflict(format!(
                "upload {} of {} is at offset {there}, not {}",
                part.upload,
                path.display(),
                part.offset
            )));
        }
        (&file).seek(io::SeekFrom::Start(part.offset)).map_err(failed)?;
        let offset = part.offset;
        Ok((file, How::Rename { part: place, to, kept: Some(part) }, offset))
    }

    /// How much of an upload is there.
    ///
    /// # Errors
    /// [`Error::NotFound`] when nothing is.
    pub fn uploaded(&self, path: &Path, upload: &str) -> Result<u64> {
        let place = self.root.place(path).map_err(|e| Error::of("open the directory of", path, &e))?;
        let part = part_place(&place, upload)?.map_err(|e| Error::of("look for a part of", path, &e))?;
        let stat = part.stat().map_err(|e| Error::of("look for a part of", path, &e))?;
        Ok(stat.st_size.max(0) as u64)
    }
}

fn part_place(to: &Place, upload: &str) -> Result<io::Result<Place>> {
    let fits = upload.len() <= 64 && upload.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
    if upload.is_empty() || !fits {
        return Err(Error::Invalid("upload_id: it is 1 to 64 letters, digits, '-', '_' and '.'".into()));
    }
    Ok(to.beside(format!("{PART}{upload}")))
}

impl Writer {
    /// Adds to it.
    ///
    /// # Errors
    /// When the disk is full, say, and [`Error::TooLarge`].
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.written += bytes.len() as u64;
        if self.written > self.limit {
            return Err(Error::TooLarge(format!("{}: files may have {} bytes", self.path.display(), self.limit)));
        }
        self.file.write_all(bytes).map_err(|e| Error::System(format!("write {}: {e}", self.path.display())))
    }

    /// Puts it in its place.
    ///
    /// # Errors
    /// The kernel's. What was there stays then.
    pub fn finish(mut self, files: &Files) -> Result<()> {
        let failed = |path: &Path, e: &io::Error| Error::System(format!("write {}: {e}", path.display()));
        let accounts = Accounts::load();
        let how = std::mem::replace(&mut self.how, How::Copy);
        let path = self.path.clone();
        if let How::Rename { kept: Some(part), .. } = &how
            && !part.complete
        {
            return Ok(());
        }
        let (How::Link(to) | How::Rename { to, .. }) = &how else { return self.copy(files, &accounts) };
        // Before it has the name: nobody may see more of it than he will.
        let ready = self.keep_old(to).map_err(|e| failed(&path, &e)).and_then(|()| {
            let copy = self.file.try_clone().map_err(|e| failed(&path, &e))?;
            if matches!(how, How::Rename { kept: Some(_), .. }) && self.permission.mode == 0 && to.stat().is_err() {
                root::change_mode(
                    &OwnedFd::from(self.file.try_clone().map_err(|e| failed(&path, &e))?),
                    MODE & !umask(),
                )
                .map_err(|e| failed(&path, &e))?;
            }
            self.permission.apply(&copy.into(), &path, &accounts)
        });
        if let Err(e) = ready {
            discard(&how);
            return Err(e);
        }
        let placed = match &how {
            How::Link(to) => link_over(&self.file, to),
            How::Rename { part, to, .. } => part.rename(to, true),
            How::Copy => Ok(()),
        };
        match placed {
            // A file is mounted there, or may be written where its directory may not.
            Err(e) if matches!(e.raw_os_error(), Some(libc::EBUSY | libc::EACCES | libc::EPERM)) => {
                let copied = self.copy(files, &accounts);
                discard(&how);
                copied
            }
            Err(e) => {
                discard(&how);
                Err(failed(&path, &e))
            }
            Ok(()) => Ok(()),
        }
    }

    /// What is replaced bequeaths its mode and owner.
    fn keep_old(&self, to: &Place) -> io::Result<()> {
        let Ok(old) = to.stat() else { return Ok(()) };
        if old.st_mode & libc::S_IFMT != libc::S_IFREG {
            return Ok(());
        }
        let file = OwnedFd::from(self.file.try_clone()?);
        let new = self.file.metadata()?;
        if (new.uid(), new.gid()) != (old.st_uid, old.st_gid) {
            // Who may not give it away keeps it.
            let _ = root::change_owner(&file, Some(old.st_uid), Some(old.st_gid));
        }
        root::change_mode(&file, old.st_mode & 0o777)
    }

    fn copy(&mut self, files: &Files, accounts: &Accounts) -> Result<()> {
        let path = self.path.clone();
        let failed = |e: io::Error| Error::System(format!("write {}: {e}", path.display()));
        // A jail's link leads to where the jail says, also when it leads to nothing yet.
        let mut target =
            files.root.open_file(&self.path, libc::O_WRONLY | libc::O_CREAT | libc::O_TRUNC, MODE).map_err(failed)?;
        self.file.rewind().map_err(failed)?;
        let mut buffer = vec![0; 256 << 10];
        loop {
            let length = self.file.read(&mut buffer).map_err(failed)?;
            if length == 0 {
                break;
            }
            target.write_all(&buffer[..length]).map_err(failed)?;
        }
        self.permission.apply(&target.into(), &path, accounts)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // Not finished: what would be gone on with stays.
        discard(&self.how);
    }
}

fn discard(how: &How) {
    if let How::Rename { part, kept: None, .. } = how {
        let _ = part.unlink(false);
    }
}

/// Gives a file without a name one that may be taken.
fn link_over(file: &File, to: &Place) -> io::Result<()> {
    match to.link(file) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
            let between = to.beside(format!(".runx-{}", ids::hex()))?;
            between.link(file)?;
            between.rename(to, true).inspect_err(|_| {
                let _ = between.unlink(false);
            })
        }
        other => other,
    }
}

/// What files are made without. Nothing in this program changes it.
fn umask() -> u32 {
    static UMASK: std::sync::OnceLock<u32> = std::sync::OnceLock::new();
    *UMASK.get_or_init(|| {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("Umask:"));
        line.and_then(|text| u32::from_str_radix(text.trim(), 8).ok()).unwrap_or(0o022)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn files(jail: Option<&Path>) -> Files {
        Files { root: root::Root::new(jail).unwrap(), limit: 1000 }
    }

    fn names(directory: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn half_a_file_never_has_the_name() {
        let top = tempfile::tempdir().unwrap();
        let path = top.path().join("new/file");
        let files = files(None);
        let mut writer = files.writer(&path, &Permission::default(), None).unwrap();
        writer.write(b"half").unwrap();
        drop(writer);
        assert_eq!(names(path.parent().unwrap()), Vec::<String>::new());
        fs::write(&path, "old").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        let mut writer = files.writer(&path, &Permission::default(), None).unwrap();
        writer.write(b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"old");
        writer.finish(&files).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
        assert_eq!(names(path.parent().unwrap()), ["file"]);
    }

    #[test]
    fn a_link_stays_and_what_it_leads_to_is_written() {
        let top = tempfile::tempdir().unwrap();
        fs::write(top.path().join("target"), "old and long").unwrap();
        symlink("target", top.path().join("link")).unwrap();
        let files = files(None);
        let mut writer =
            files.writer(&top.path().join("link"), &Permission { mode: 600, ..Permission::default() }, None).unwrap();
        writer.write(b"new").unwrap();
        assert_eq!(fs::read(top.path().join("target")).unwrap(), b"old and long");
        writer.finish(&files).unwrap();
        assert_eq!(fs::read(top.path().join("target")).unwrap(), b"new");
        assert_eq!(names(top.path()), ["link", "target"]);
    }

    #[test]
    fn an_upload_goes_on_where_it_was_cut() {
        let top = tempfile::tempdir().unwrap();
        let path = top.path().join("file");
        let files = files(None);
        let part = |offset, complete| Some(Part { upload: "u1".into(), offset, complete });
        let mut writer = files.writer(&path, &Permission::default(), part(0, true)).unwrap();
        writer.write(b"first").unwrap();
        drop(writer);
        assert!(!path.exists());
        assert_eq!(files.uploaded(&path, "u1").unwrap(), 5);
        let wrong = files.writer(&path, &Permission::default(), part(3, true)).unwrap_err();
        assert!(matches!(&wrong, Error::Conflict(text) if text.contains("offset 5")), "{wrong}");
        let mut writer = files.writer(&path, &Permission::default(), part(5, true)).unwrap();
        writer.write(b" second").unwrap();
        writer.finish(&files).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"first second");
        assert_eq!(names(top.path()), ["file"]);
        assert!(
            files
                .writer(&path, &Permission::default(), Some(Part { upload: "../x".into(), offset: 0, complete: true }))
                .is_err()
        );
    }

    #[test]
    fn what_is_too_large_is_refused_and_leaves_nothing() {
        let top = tempfile::tempdir().unwrap();
        let files = files(None);
        let mut writer = files.writer(&top.path().join("file"), &Permission::default(), None).unwrap();
        writer.write(&[0; 900]).unwrap();
        assert!(matches!(writer.write(&[0; 200]), Err(Error::TooLarge(_))));
        drop(writer);
        assert_eq!(names(top.path()), Vec::<String>::new());
    }
}
