//! `filesystem.Filesystem`: what is there, and what is done to it, as the user that a request is for.

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::response::Response;
use bytes::Bytes;
use serde_json::{Value, json};

use super::App;
use super::connect::{Call, Failure, Result, fail};
use super::schema::{EMPTY, ENTRY_RESPONSE, LIST_DIR_REQUEST, LIST_DIR_RESPONSE, MOVE_REQUEST, PATH};
use super::user::User;
use crate::fs::root::{Place, Stat, names};
use crate::fs::{self};
use crate::process::users::Accounts;

/// The prefix of extended attributes that are told.
pub(super) const METADATA: &str = "user.e2b.";

/// How deep is listed.
const DEPTH: u64 = 512;

/// A unary method. `None` when there is none of the name.
pub(super) async fn unary(app: Arc<App>, method: &str, call: Call, user: User, body: Bytes) -> Option<Response> {
    let path = |name: &str, request: &Value| user.path(&app, request[name].as_str().unwrap_or_default());
    let (app, who) = (&app, &user);
    Some(match method {
        "Stat" => {
            call.unary(body, &PATH, &ENTRY_RESPONSE, |request| async move {
                let path = path("path", &request)?;
                run(app, who, move |app| stat(app, &path)).await
            })
            .await
        }
        "MakeDir" => {
            call.unary(body, &PATH, &ENTRY_RESPONSE, |request| async move {
                let path = path("path", &request)?;
                run(app, who, move |app| make(app, &path)).await
            })
            .await
        }
        "Move" => {
            call.unary(body, &MOVE_REQUEST, &ENTRY_RESPONSE, |request| async move {
                let (from, to) = (path("source", &request)?, path("destination", &request)?);
                run(app, who, move |app| rename(app, &from, &to)).await
            })
            .await
        }
        "Remove" => {
            call.unary(body, &PATH, &EMPTY, |request| async move {
                let path = path("path", &request)?;
                run(app, who, move |app| {
                    app.core.files.remove_tree(&path).map_err(of_core)?;
                    Ok(json!({}))
                })
                .await
            })
            .await
        }
        "ListDir" => {
            call.unary(body, &LIST_DIR_REQUEST, &LIST_DIR_RESPONSE, |request| async move {
                let path = path("path", &request)?;
                let depth = request["depth"].as_u64().unwrap_or(0).clamp(1, DEPTH);
                run(app, who, move |app| list(app, &path, depth)).await
            })
            .await
        }
        _ => return None,
    })
}

/// Does something on a thread that may block, as the user.
pub(super) async fn run<T: Send + 'static>(
    app: &Arc<App>,
    user: &User,
    work: impl FnOnce(&App) -> Result<T> + Send + 'static,
) -> Result<T> {
    let app = app.clone();
    let done = fs::run(user.identity(), move || Ok(work(&app))).await;
    done.map_err(of_core)?
}

fn of_core(error: fs::Error) -> Failure {
    let text = error.to_string();
    match error {
        fs::Error::NotFound(_) => fail("not_found", text),
        fs::Error::Invalid(_) => fail("invalid_argument", text),
        fs::Error::Conflict(_) => fail("failed_precondition", text),
        fs::Error::Identity(_) => fail("permission_denied", text),
        fs::Error::TooLarge(_) => fail("resource_exhausted", text),
        fs::Error::System(_) if text.contains("Permission denied") => fail("permission_denied", text),
        fs::Error::System(_) => fail("internal", text),
    }
}

/// What the kernel said.
pub(super) fn of_kernel(attempt: &str, path: &Path, error: &io::Error) -> Failure {
    let text = format!("{attempt} {}: {error}", path.display());
    match error.raw_os_error() {
        Some(libc::ENOENT) => fail("not_found", format!("file not found: {}", path.display())),
        Some(libc::ENOTDIR) => fail("invalid_argument", text),
        Some(libc::EACCES | libc::EPERM) => fail("permission_denied", text),
        Some(libc::ELOOP) => fail("failed_precondition", text),
        _ => fail("internal", text),
    }
}

fn stat(app: &App, path: &Path) -> Result<Value> {
    Ok(json!({"entry": entry(app, path, &Accounts::load())?}))
}

/// What is told of a path.
pub(super) fn entry(app: &App, path: &Path, accounts: &Accounts) -> Result<Value> {
    let root = &app.core.files.root;
    let place = root.place(path).map_err(|e| of_kernel("open the directory of", path, &e))?;
    let own = place.stat().map_err(|e| of_kernel("stat", path, &e))?;
    Ok(described(app, path, &place, &own, accounts))
}

fn described(app: &App, path: &Path, place: &Place, own: &Stat, accounts: &Accounts) -> Value {
    let is_link = own.st_mode & libc::S_IFMT == libc::S_IFLNK;
    // Of a link it is told what it leads to.
    let target = is_link.then(|| {
        let opened = app.core.files.root.open(path, libc::O_PATH, 0).ok()?;
        Place::new(opened, ".").stat().or_else(|_| of_descriptor(app, path)).ok()
    });
    let (kind, mode) = match target.unwrap_or(Some(*own)) {
        Some(stat) => (stat.st_mode & libc::S_IFMT, stat.st_mode & 0o777),
        None => (0, 0),
    };
    let mut out = json!({
        "name": path.file_name().map_or_else(|| "/".into(), |name| name.to_string_lossy().into_owned()),
        "path": path.to_string_lossy(),
        "size": own.st_size.to_string(),
        "mode": mode,
        "permissions": permissions(own.st_mode),
        "owner": accounts.name_of(own.st_uid),
        "group": accounts.group_name_of(own.st_gid),
    });
    match kind {
        libc::S_IFREG => out["type"] = "FILE_TYPE_FILE".into(),
        libc::S_IFDIR => out["type"] = "FILE_TYPE_DIRECTORY".into(),
        _ => {}
    }
    if own.st_mtime > 0 {
        let since = std::time::Duration::new(own.st_mtime as u64, own.st_mtime_nsec.clamp(0, 999_999_999) as u32);
        if let Some(at) = std::time::UNIX_EPOCH.checked_add(since) {
            out["modifiedTime"] = crate::api::rfc3339(at).into();
        }
    }
    if is_link {
        let real = if app.core.files.root.is_jail() { place.read_link() } else { std::fs::canonicalize(path) };
        out["symlinkTarget"] = real.unwrap_or_else(|_| path.to_owned()).to_string_lossy().into();
    }
    let metadata = metadata(path);
    if !metadata.is_empty() {
        out["metadata"] = Value::Object(metadata);
    }
    // Defaults are left out.
    for (name, default) in [("size", json!("0")), ("mode", json!(0))] {
        if out[name] == default
            && let Some(map) = out.as_object_mut()
        {
            map.remove(name);
        }
    }
    out
}

fn of_descriptor(app: &App, path: &Path) -> io::Result<Stat> {
    let file = app.core.files.root.open(path, libc::O_PATH, 0)?;
    let mut stat = std::mem::MaybeUninit::<Stat>::zeroed();
    // SAFETY: the name is a string with its NUL, and empty: what is open is meant; the pointer is to a local.
    unsafe {
        use std::os::fd::AsRawFd;
        if libc::fstatat(file.as_raw_fd(), c"".as_ptr(), stat.as_mut_ptr(), libc::AT_EMPTY_PATH) != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(stat.assume_init())
    }
}

/// As Go prints modes: a letter for what it is, letters for special bits, and the nine permissions.
fn permissions(mode: u32) -> String {
    let mut out = String::new();
    out.push_str(match mode & libc::S_IFMT {
        libc::S_IFDIR => "d",
        libc::S_IFLNK => "L",
        libc::S_IFIFO => "p",
        libc::S_IFSOCK => "S",
        libc::S_IFBLK => "D",
        libc::S_IFCHR => "Dc",
        _ => "",
    });
    for (bit, letter) in [(libc::S_ISUID, 'u'), (libc::S_ISGID, 'g'), (libc::S_ISVTX, 't')] {
        if mode & bit != 0 {
            out.push(letter);
        }
    }
    if out.is_empty() {
        out.push('-');
    }
    for shift in (0..9).rev() {
        out.push(if mode >> shift & 1 == 0 { '-' } else { ['x', 'w', 'r'][shift % 3] });
    }
    out
}

/// The attributes of a file that clients have set.
fn metadata(path: &Path) -> serde_json::Map<String, Value> {
    let mut out = serde_json::Map::new();
    for name in attributes(path) {
        let Some(key) = name.to_str().ok().and_then(|name| name.strip_prefix(METADATA)) else { continue };
        if let Some(value) = attribute(path, &name).and_then(|value| String::from_utf8(value).ok()) {
            out.insert(key.to_owned(), value.into());
        }
    }
    out
}

/// The names of a file's attributes.
pub(super) fn attributes(path: &Path) -> Vec<CString> {
    let Ok(path) = CString::new(path.as_os_str().as_bytes()) else { return Vec::new() };
    let mut names = vec![0u8; 16 << 10];
    // SAFETY: the path ends with its NUL; the buffer has the length that is given.
    let length = unsafe { libc::listxattr(path.as_ptr(), names.as_mut_ptr().cast(), names.len()) };
    let Ok(length) = usize::try_from(length) else { return Vec::new() };
    names.truncate(length);
    names.split(|byte| *byte == 0).filter(|name| !name.is_empty()).filter_map(|name| CString::new(name).ok()).collect()
}

fn attribute(path: &Path, name: &CString) -> Option<Vec<u8>> {
    let path = CString::new(path.as_os_str().as_bytes()).ok()?;
    let mut value = vec![0u8; 8 << 10];
    // SAFETY: both names end with their NULs; the buffer has the length that is given.
    let length = unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
    value.truncate(usize::try_from(length).ok()?);
    Some(value)
}

fn make(app: &App, path: &Path) -> Result<Value> {
    let root = &app.core.files.root;
    if let Ok(stat) = root.place(path).and_then(|place| place.stat()) {
        let there = || format!("path already exists: {}", path.display());
        return Err(match stat.st_mode & libc::S_IFMT {
            libc::S_IFDIR => fail("already_exists", there()),
            _ => fail("invalid_argument", format!("{} and is not a directory", there())),
        });
    }
    root.make_directories(path, 0o755).map_err(|e| match e.raw_os_error() {
        Some(libc::ENOTDIR) => fail("internal", format!("create {}: {e}", path.display())),
        _ => of_kernel("create", path, &e),
    })?;
    stat(app, path)
}

fn rename(app: &App, from: &Path, to: &Path) -> Result<Value> {
    let root = &app.core.files.root;
    let source = root.place(from).map_err(|e| of_kernel("open the directory of", from, &e))?;
    source.stat().map_err(|e| of_kernel("stat", from, &e))?;
    if let Some(parent) = to.parent() {
        root.make_directories(parent, 0o755).map_err(|e| of_kernel("create", parent, &e))?;
    }
    let target = root.place(to).map_err(|e| of_kernel("open the directory of", to, &e))?;
    source.rename(&target, true).map_err(|e| match e.raw_os_error() {
        Some(libc::EACCES | libc::EPERM) => of_kernel("move", from, &e),
        _ => fail("internal", format!("move {} to {}: {e}", from.display(), to.display())),
    })?;
    stat(app, to)
}

fn list(app: &App, path: &Path, depth: u64) -> Result<Value> {
    let directory = app
        .core
        .files
        .root
        .open(path, libc::O_RDONLY | libc::O_DIRECTORY, 0)
        .map_err(|e| of_kernel("open", path, &e))?;
    let accounts = Accounts::load();
    let mut entries = Vec::new();
    walk(app, path, directory, depth, &accounts, &mut entries).map_err(|e| of_kernel("read", path, &e))?;
    Ok(if entries.is_empty() { json!({}) } else { json!({"entries": entries}) })
}

fn walk(
    app: &App,
    path: &Path,
    directory: std::os::fd::OwnedFd,
    depth: u64,
    accounts: &Accounts,
    entries: &mut Vec<Value>,
) -> io::Result<()> {
    let copy = directory.try_clone()?;
    for name in names(directory)? {
        let path: PathBuf = path.join(&name);
        let place = Place::new(copy.try_clone()?, name);
        // It may be gone by now.
        let Ok(stat) = place.stat() else { continue };
        entries.push(described(app, &path, &place, &stat, accounts));
        if depth > 1
            && stat.st_mode & libc::S_IFMT == libc::S_IFDIR
            && let Ok(below) = place.open(libc::O_RDONLY | libc::O_DIRECTORY, 0)
        {
            walk(app, &path, below, depth - 1, accounts, entries)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_are_printed_as_go_does() {
        for (mode, text) in [
            (libc::S_IFREG | 0o644, "-rw-r--r--"),
            (libc::S_IFDIR | 0o755, "drwxr-xr-x"),
            (libc::S_IFDIR | 0o1777, "dtrwxrwxrwx"),
            (libc::S_IFLNK | 0o777, "Lrwxrwxrwx"),
            (libc::S_IFREG | 0o4755, "urwxr-xr-x"),
            (libc::S_IFCHR | 0o666, "Dcrw-rw-rw-"),
        ] {
            assert_eq!(permissions(mode), text);
        }
    }
}
