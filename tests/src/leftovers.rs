//! What a container may have left on the machine, found by its unique name.

use std::fs;
use std::path::{Path, PathBuf};

/// Everything that carries `name`: cgroups of either version, units of systemd, mounts, processes by cgroup or
/// command line; and what is in the given directories, which should be empty or missing.
pub fn find(name: &str, directories: &[PathBuf]) -> Vec<String> {
    let mut left = Vec::new();
    find_cgroups(Path::new("/sys/fs/cgroup"), name, 0, &mut left);
    find_units(name, &mut left);
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    left.extend(mounts.lines().filter(|line| line.contains(name)).map(|line| format!("mount {line}")));
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        let groups = fs::read_to_string(entry.path().join("cgroup")).unwrap_or_default();
        let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        let ours = pid == std::process::id() as i32;
        if !ours && (groups.contains(name) || command.contains(name)) {
            left.push(format!("process {pid}: {command}"));
        }
    }
    for directory in directories {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            // Caches belong to the root and not to a container.
            if !entry.file_name().to_string_lossy().starts_with('.') {
                left.push(format!("file {}", entry.path().display()));
            }
        }
    }
    left
}

/// Units that were made through systemd's interface. Those that failed stay there without a cgroup.
fn find_units(name: &str, left: &mut Vec<String>) {
    for entry in fs::read_dir("/run/systemd/transient").into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().contains(name) {
            left.push(format!("unit {}", entry.file_name().display()));
        }
    }
}

/// Version 2 has one tree here, version 1 one in each directory.
fn find_cgroups(directory: &Path, name: &str, depth: usize, left: &mut Vec<String>) {
    if depth > 10 {
        return;
    }
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        if entry.file_name().to_string_lossy().contains(name) {
            left.push(format!("cgroup {}", entry.path().display()));
        } else {
            find_cgroups(&entry.path(), name, depth + 1, left);
        }
    }
}

/// Fails the test if there is anything; processes and mounts get a moment to go.
///
/// # Panics
/// With what is left.
#[track_caller]
pub fn assert_none(name: &str, directories: &[PathBuf]) {
    let mut left = Vec::new();
    for _ in 0..100 {
        left = find(name, directories);
        if left.is_empty() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    panic!("left behind: {left:#?}");
}
