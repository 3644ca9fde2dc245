//! What the module gets to see: arguments, environment, streams and directories.

use crate::Error;
use crate::stdio::{Stderr, Stdin, Stdout};
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use wasmtime_wasi::p1::WasiP1Ctx;
use wasmtime_wasi::{FsPerms, WasiCtxBuilder};

/// The context of a module with the process's environment, streams and file system.
pub(crate) fn context(name: &str, args: &[OsString]) -> Result<WasiP1Ctx, Error> {
    let mut builder = WasiCtxBuilder::new();
    // One thread, and it is the module's: a file operation need not go through another.
    builder.allow_blocking_current_thread(true);
    builder.stdin(Stdin).stdout(Stdout).stderr(Stderr);
    for arg in args {
        builder.arg(arg.to_string_lossy());
    }
    for (key, value) in std::env::vars_os() {
        builder.env(key.to_string_lossy(), value.to_string_lossy());
    }
    let cwd = std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/"));
    for preopen in preopens(&cwd, top_level) {
        let result = builder.preopened_dir(&preopen.path, &preopen.name, FsPerms::ReadWrite);
        if let (Err(error), true) = (result, preopen.required) {
            let attempt = format!("cannot open the directory {}", preopen.path.display());
            return Err(Error::Setup { name: name.to_owned(), attempt, reason: format!("{error:#}") });
        }
    }
    Ok(builder.build_p1())
}

/// A directory and the name under which the module finds it.
#[derive(Debug, PartialEq, Eq)]
struct Preopen {
    path: PathBuf,
    name: String,
    /// Whether the module is not started without it.
    required: bool,
}

impl Preopen {
    fn new(path: impl Into<PathBuf>, name: impl Into<String>, required: bool) -> Preopen {
        Preopen { path: path.into(), name: name.into(), required }
    }
}

/// The directories of `/`, by name; `None` if it cannot be listed.
fn top_level() -> Option<Vec<OsString>> {
    let entries = std::fs::read_dir("/").ok()?;
    let directory = |kind: std::fs::FileType| kind.is_dir() || kind.is_symlink();
    Some(
        entries
            .flatten()
            .filter(|entry| entry.file_type().is_ok_and(directory))
            .map(|entry| entry.file_name())
            .collect(),
    )
}

/// What to preopen, in the order of the descriptors (3 and up).
///
/// Preview 1 has no working directory. Each language's library finds its own way from a path to a
/// preopened directory:
///
/// * wasi-libc (C, C++, Rust, and what is built on them) starts in `/`, always. It drops leading
///   slashes of paths and leading `/` and `./` of preopen names, takes the longest name that is a
///   prefix of the path by whole components, and of equally long ones the last. So it cannot tell
///   `x` from `/x`, nor a preopen `.` from `/`.
/// * Go starts in `$PWD`, or else in the name of the first preopen; its names are absolute.
/// * Zig takes descriptor 3 for the working directory.
///
/// In the working directory `/` a single preopen serves all of them. In another one, Go and Zig
/// get it first, under its absolute name, and then `/`. For wasi-libc, `.` comes last, which makes
/// it the home of every path without a better match, and each directory of `/` is a better match
/// for the paths under it. What remains is an ambiguity that nobody outside of the module can
/// resolve: with wasi-libc, a relative path that begins with the name of a directory of `/` means
/// that directory, and a file directly in `/` is looked for in the working directory.
///
/// Symbolic links are followed only within the preopened directory that a path goes through, and
/// never if they are absolute; so with another working directory, links from one directory of `/`
/// into another are refused too.
fn preopens(cwd: &Path, top_level: impl FnOnce() -> Option<Vec<OsString>>) -> Vec<Preopen> {
    if cwd == Path::new("/") {
        return vec![Preopen::new("/", "/", true)];
    }
    let mut list = vec![Preopen::new(cwd, cwd.to_string_lossy(), true), Preopen::new("/", "/", true)];
    // Without them `.` would take the absolute paths too, which are worth more than relative ones.
    if let Some(names) = top_level() {
        let mut names: Vec<&str> = names.iter().map(OsString::as_os_str).filter_map(OsStr::to_str).collect();
        names.sort_unstable();
        list.extend(names.iter().map(|name| Preopen::new(format!("/{name}"), format!("/{name}"), false)));
        list.push(Preopen::new(cwd, ".", true));
    }
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(cwd: &str, top_level: Option<&[&str]>) -> Vec<String> {
        let top_level = top_level.map(|names| names.iter().map(OsString::from).collect());
        preopens(Path::new(cwd), || top_level).into_iter().map(|preopen| preopen.name).collect()
    }

    #[test]
    fn the_root_serves_a_module_that_starts_in_it() {
        assert_eq!(names("/", Some(&["etc"])), ["/"]);
    }

    #[test]
    fn another_working_directory_is_first_and_last() {
        assert_eq!(names("/srv/app", Some(&["srv", "etc"])), ["/srv/app", "/", "/etc", "/srv", "."]);
    }

    #[test]
    fn absolute_paths_win_where_the_root_cannot_be_listed() {
        assert_eq!(names("/srv", None), ["/srv", "/"]);
    }
}
