//! Kubernetes' termination message: what `kubectl describe` says of a container that ended.
//!
//! The kubelet mounts a file of its own at `/dev/termination-log`, unless the pod names another path, and reads it after the
//! container's end. A module that traps has no chance to say anything there, so it is done in its place.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

/// Where the kubelet's file is by default.
const PATH: &str = "/dev/termination-log";

/// As much as the kubelet reads, in bytes.
const LIMIT: usize = 4096;

/// Leaves a message for the kubelet, if it has mounted a file for it and the container wrote nothing there itself.
/// Elsewhere nothing happens.
pub fn tell(message: &str) {
    tell_at(Path::new(PATH), message);
}

fn tell_at(path: &Path, message: &str) {
    let Some(directory) = path.parent().and_then(|directory| fs::metadata(directory).ok()) else { return };
    let mut options = OpenOptions::new();
    options.write(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY);
    let Ok(mut file) = options.open(path) else { return };
    let mounted = |file: &fs::Metadata| file.is_file() && file.len() == 0 && file.dev() != directory.dev();
    if file.metadata().is_ok_and(|file| mounted(&file)) {
        // Nobody is left to be told of a failure.
        let _ = file.write_all(&message.as_bytes()[..message.floor_char_boundary(LIMIT)]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_nobody_mounted_is_left_alone() {
        let path = std::env::temp_dir().join(format!("runx-termination-{}", std::process::id()));
        fs::write(&path, "").unwrap();
        tell_at(&path, "message");
        assert_eq!(fs::read(&path).unwrap(), b"");
        fs::remove_file(&path).unwrap();
        tell_at(&path, "message");
        assert!(!path.exists());
    }
}
