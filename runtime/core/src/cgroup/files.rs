//! Reading and writing the kernel's control files.

use std::fs;
use std::io::{self, Write};
use std::path::Path;
use std::time::Duration;

use crate::error::{Context, Error, Result};

/// Writes one setting; the error names the file and the value. A file that the kernel does not have is never
/// created: the error says that it is missing.
pub(super) fn write(directory: &Path, file: &str, value: impl AsRef<str>) -> Result<()> {
    let value = value.as_ref();
    try_write(directory, file, value).with_context(|| format!("write {value:?} to {}", directory.join(file).display()))
}

/// As [`write`], with the kernel's bare error.
pub(super) fn try_write(directory: &Path, file: &str, value: &str) -> io::Result<()> {
    fs::OpenOptions::new().write(true).open(directory.join(file))?.write_all(value.as_bytes())
}

/// How often something is done with a group that others remove meanwhile.
const TRIES: u32 = 1000;

/// Makes a directory, with those above it. Others may remove these, being empty, in the same moment.
pub(super) fn make_directories(directory: &Path) -> io::Result<()> {
    persist(|| fs::create_dir_all(directory))
}

/// Does something with a group that others may remove meanwhile, until it was there all the time. It waits a little longer
/// each time, a fifth of a millisecond in the end: two that keep step with each other would meet again and again.
pub(super) fn persist<T>(mut act: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    let mut tries = 0;
    loop {
        match act() {
            // Also what was there in the moment in which it was to be made may be gone in the next.
            Err(e) if (is_gone(&e) || e.kind() == io::ErrorKind::AlreadyExists) && tries < TRIES => {
                std::thread::sleep(Duration::from_micros(10 * u64::from(tries.min(20))));
                tries += 1;
            }
            other => return other,
        }
    }
}

/// Whether a group, or the one above, has been removed or is being removed: then the kernel says that it has no device.
pub(super) fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENODEV)) || error.kind() == io::ErrorKind::NotFound
}

/// Whether the kernel has this file for the group.
pub(super) fn exists(directory: &Path, file: &str) -> bool {
    directory.join(file).exists()
}

/// A file's text without the last newline.
pub(super) fn read(directory: &Path, file: &str) -> io::Result<String> {
    fs::read_to_string(directory.join(file)).map(|text| text.trim_end().to_owned())
}

/// A file with one number; `max` is the largest.
pub(super) fn read_number(directory: &Path, file: &str) -> Option<u64> {
    number(&read(directory, file).ok()?)
}

/// A number, or `max`.
pub(super) fn number(text: &str) -> Option<u64> {
    if text == "max" { Some(u64::MAX) } else { text.parse().ok() }
}

/// The lines of a `key value` file; none if it is not there.
pub(super) fn read_pairs(directory: &Path, file: &str) -> Vec<(String, u64)> {
    let text = read(directory, file).unwrap_or_default();
    text.lines()
        .filter_map(|line| {
            let (key, value) = line.split_once(' ')?;
            Some((key.to_owned(), number(value)?))
        })
        .collect()
}

/// The value of a key among [`read_pairs`]'s, 0 if it is not there.
pub(super) fn pair(pairs: &[(String, u64)], key: &str) -> u64 {
    pairs.iter().find(|(name, _)| name == key).map_or(0, |(_, value)| *value)
}

/// The names in a directory that lie between `prefix` and `suffix` and hold no further dot, sorted.
pub(super) fn names_between(directory: &Path, prefix: &str, suffix: &str) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let inner = name.strip_prefix(prefix)?.strip_suffix(suffix)?;
            (!inner.is_empty() && !inner.contains('.')).then(|| inner.to_owned())
        })
        .collect();
    names.sort_unstable();
    names
}

/// Refuses a group that somebody else is in.
pub(super) fn refuse_occupied(directory: &Path) -> Result<()> {
    let text = read(directory, "cgroup.procs").unwrap_or_default();
    if text.lines().next().is_some() {
        return Err(Error::spec(format!(
            "linux.cgroupsPath: cgroup {} is not empty: another container or process uses it",
            directory.display()
        )));
    }
    Ok(())
}

/// Refuses a group that is frozen, or lies below one: its first process would stop before it could answer, and
/// whoever creates the container would wait for it without end.
pub(super) fn refuse_frozen(directory: &Path, frozen: bool) -> Result<()> {
    if frozen {
        return Err(Error::spec(format!(
            "linux.cgroupsPath: cgroup {} is frozen, itself or with one above it, and no process would run in it: thaw it first",
            directory.display()
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[test]
    fn directories_are_made_while_others_remove_those_above() {
        let directory = tempfile::tempdir().unwrap();
        let above = directory.path().join("above");
        let group = above.join("group");
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    let _ = fs::remove_dir(&above);
                    std::thread::sleep(Duration::from_micros(20));
                }
            });
            let made = (0..5000).try_for_each(|_| make_directories(&group).and_then(|()| fs::remove_dir(&group)));
            done.store(true, Ordering::Relaxed);
            made.unwrap();
        });
    }

    #[test]
    fn a_group_that_others_remove_is_tried_again_and_one_that_is_forbidden_is_not() {
        for (number, all) in [(libc::ENOENT, 3), (libc::ENODEV, 3), (libc::EACCES, 1)] {
            let mut tries = 0;
            let done = persist(|| {
                tries += 1;
                if tries < 3 { Err(io::Error::from_raw_os_error(number)) } else { Ok(()) }
            });
            assert_eq!((tries, done.is_ok()), (all, all == 3), "{number}");
        }
        // Not without end.
        assert!(persist(|| Err::<(), _>(io::ErrorKind::NotFound.into())).is_err());
    }
}
