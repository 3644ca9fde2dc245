//! Walking directories: search and list. What is found is told piece by piece, so that a tree of any size takes no memory.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use super::glob::Glob;
use super::root::{Place, names};
use super::{Error, FileInfo, Files, Result};
use crate::process::users::Accounts;

/// How deep is walked.
const DEPTH: usize = 512;

/// Takes what is found; `false` when nobody wants more.
pub type Tell<'a> = &'a mut dyn FnMut(FileInfo) -> bool;

impl Files {
    /// A directory that may be walked, opened.
    ///
    /// # Errors
    /// That it is missing, or no directory.
    pub fn open_directory(&self, path: &Path) -> Result<OwnedFd> {
        self.root.open(path, libc::O_RDONLY | libc::O_DIRECTORY, 0).map_err(|e| match e.raw_os_error() {
            Some(libc::ENOTDIR) => Error::Invalid(format!("path is not a directory: {}", path.display())),
            _ => Error::of("open", path, &e),
        })
    }

    /// Tells all files below a directory whose own names match, in the order of their names. Symbolic links are told and
    /// not followed; what may not be read is left out.
    ///
    /// # Errors
    /// When the directory itself cannot be read.
    pub fn search(&self, path: &Path, directory: OwnedFd, glob: &Glob, tell: Tell<'_>) -> Result<()> {
        let accounts = Accounts::load();
        let mut visit = |path: &Path, place: &Place, directory: bool| {
            if directory {
                return Ok(true);
            }
            if !glob.matches(&place.name().to_string_lossy()) {
                return Ok(true);
            }
            match place.stat() {
                Ok(stat) => Ok(tell(FileInfo::new(path, &stat, &accounts))),
                Err(_) => Ok(true),
            }
        };
        walk(path, directory, DEPTH, &mut visit).map(drop).map_err(|e| Error::of("read", path, &e))
    }

    /// Tells what is in a directory, down to a depth, each directory before what is in it.
    ///
    /// # Errors
    /// When the directory itself cannot be read.
    pub fn list(&self, path: &Path, directory: OwnedFd, depth: usize, tell: Tell<'_>) -> Result<()> {
        if depth == 0 {
            return Ok(());
        }
        let accounts = Accounts::load();
        let mut visit = |path: &Path, place: &Place, _: bool| match place.stat() {
            Ok(stat) => Ok(tell(FileInfo::new(path, &stat, &accounts))),
            Err(_) => Ok(true),
        };
        walk(path, directory, depth.min(DEPTH), &mut visit).map(drop).map_err(|e| Error::of("read", path, &e))
    }
}

/// Visits what is in an open directory and below. Returns whether to go on.
fn walk(
    path: &Path,
    directory: OwnedFd,
    depth: usize,
    visit: &mut dyn FnMut(&Path, &Place, bool) -> io::Result<bool>,
) -> io::Result<bool> {
    let copy = directory.try_clone()?;
    for name in names(directory)? {
        let path: PathBuf = path.join(&name);
        let place = Place::new(copy.try_clone()?, name);
        // It may be gone by now.
        let Ok(stat) = place.stat() else { continue };
        let is_directory = stat.st_mode & libc::S_IFMT == libc::S_IFDIR;
        if !visit(&path, &place, is_directory)? {
            return Ok(false);
        }
        if is_directory
            && depth > 1
            && let Ok(below) = place.open(libc::O_RDONLY | libc::O_DIRECTORY, 0)
            && !walk(&path, below, depth - 1, visit).unwrap_or(true)
        {
            return Ok(false);
        }
    }
    Ok(true)
}
