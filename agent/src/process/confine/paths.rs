//! Paths that are read-only or empty for one process: in a mount namespace of its own.

use std::ffi::{CStr, CString};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr;

/// Paths, and what becomes of them.
pub(super) struct Paths {
    readonly: Vec<CString>,
    /// With whether it is a directory.
    masked: Vec<(CString, bool)>,
    /// The working directory: what was entered before is what it was before.
    cwd: CString,
}

impl Paths {
    /// `None` when there are none. What does not exist needs no mask.
    ///
    /// # Errors
    /// A path that is not absolute, or that does not exist and is to be read-only.
    pub(super) fn new(readonly: &[String], masked: &[String], cwd: &Path) -> io::Result<Option<Self>> {
        if readonly.is_empty() && masked.is_empty() {
            return Ok(None);
        }
        let name = |path: &String| {
            if !path.starts_with('/') {
                return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("path {path:?} is not absolute")));
            }
            CString::new(path.as_str()).map_err(io::Error::from)
        };
        for path in readonly {
            if let Err(e) = std::fs::metadata(path) {
                return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("readonly_paths: {path}: {e}")));
            }
        }
        let readonly = readonly.iter().map(name).collect::<io::Result<_>>()?;
        let mut all = Vec::new();
        for path in masked {
            let name = name(path)?;
            if let Ok(meta) = std::fs::metadata(Path::new(path)) {
                all.push((name, meta.is_dir()));
            }
        }
        let cwd = CString::new(cwd.as_os_str().as_bytes())?;
        Ok(Some(Self { readonly, masked: all, cwd }))
    }

    /// Makes the namespace and the mounts. Between fork and exec.
    pub(super) fn mount(&self) -> io::Result<()> {
        // SAFETY: takes a number; this process has one thread.
        if unsafe { libc::unshare(libc::CLONE_NEWNS) } != 0 {
            return Err(io::Error::last_os_error());
        }
        call(None, c"/", None, libc::MS_REC | libc::MS_PRIVATE)?;
        for path in &self.readonly {
            call(Some(path), path, None, libc::MS_BIND | libc::MS_REC)?;
            read_only(path)?;
        }
        for (path, directory) in &self.masked {
            if *directory {
                call(Some(c"tmpfs"), path, Some(c"tmpfs"), libc::MS_RDONLY | libc::MS_NOSUID | libc::MS_NODEV)?;
            } else {
                call(Some(c"/dev/null"), path, None, libc::MS_BIND)?;
            }
        }
        // SAFETY: the path ends with NUL.
        if unsafe { libc::chdir(self.cwd.as_ptr()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

fn call(source: Option<&CStr>, target: &CStr, kind: Option<&CStr>, flags: libc::c_ulong) -> io::Result<()> {
    let pointer = |text: Option<&CStr>| text.map_or(ptr::null(), CStr::as_ptr);
    // SAFETY: all pointers are null or to texts that end with NUL and live through the call.
    let code = unsafe { libc::mount(pointer(source), target.as_ptr(), pointer(kind), flags, ptr::null()) };
    if code != 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Makes a mount and all below it read-only, and leaves everything else as it was.
fn read_only(path: &CStr) -> io::Result<()> {
    let attributes = libc::mount_attr { attr_set: libc::MOUNT_ATTR_RDONLY, attr_clr: 0, propagation: 0, userns_fd: 0 };
    // SAFETY: the path ends with NUL, the structure lives through the call and has the size that is given.
    let code = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            libc::AT_FDCWD,
            path.as_ptr(),
            libc::AT_RECURSIVE,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if code != 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
