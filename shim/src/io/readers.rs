//! Whether there is somebody to read what a process is going to write.
//!
//! Clients open the FIFOs of its output in the background. One that comes when the process, and with it the last end for
//! writing, has gone already waits for ever, and so does whoever waits for the end of the output: the kubelet for a probe. So
//! nothing is started before the readers are there, as with containerd's own shim.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

use tokio::time::Instant;

use super::Streams;

/// How long is waited for readers. Where nobody comes, the output waits in the FIFO.
const PATIENCE: Duration = Duration::from_secs(10);

/// Between two looks, at most.
const PAUSE: Duration = Duration::from_millis(20);

/// Ends of FIFOs, so that those who read them do not find an end before the process has its own.
#[derive(Debug)]
pub(crate) struct Readers {
    _held: Vec<File>,
}

impl Streams {
    /// Waits until each FIFO for output has been opened by a reader. What cannot be opened is left to [`Self::open`].
    pub(crate) async fn readers(&self) -> Readers {
        let deadline = Instant::now() + PATIENCE;
        let targets = [Some(&self.stdout), (!self.terminal).then_some(&self.stderr)];
        let mut held = Vec::new();
        for target in targets.into_iter().flatten().filter(|target| !target.is_empty()) {
            let path = Path::new(target.strip_prefix("fifo://").unwrap_or(target));
            held.extend(reader_of(path, deadline).await);
        }
        Readers { _held: held }
    }
}

async fn reader_of(path: &Path, deadline: Instant) -> Option<File> {
    let mut pause = Duration::from_millis(1);
    while fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_fifo()) {
        match OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(path) {
            Ok(file) => return Some(file),
            // fifo(7): there is no reader.
            Err(e) if e.raw_os_error() == Some(libc::ENXIO) && Instant::now() < deadline => {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(PAUSE);
            }
            Err(e) => {
                log::warn!("wait for a reader of {}: {e}", path.display());
                return None;
            }
        }
    }
    None
}
