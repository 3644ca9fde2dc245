//! Pid files: there is none, or a whole one.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

/// Writes `pid` beside `path` and renames it.
pub(super) fn write(path: &Path, pid: i32) -> Result<()> {
    let name = path.file_name().with_context(|| format!("pid file {} has no name", path.display()))?;
    let mut temporary = std::ffi::OsString::from(".");
    temporary.push(name);
    let temporary = path.with_file_name(temporary);
    fs::write(&temporary, pid.to_string())
        .and_then(|()| fs::rename(&temporary, path))
        .with_context(|| format!("write pid file {}", path.display()))
}
