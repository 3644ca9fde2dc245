//! The log: containerd gives each bundle a FIFO named `log` and copies what comes out of it into its
//! own.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Mutex;
use std::time::SystemTime;

use log::{Level, LevelFilter, Log, Metadata, Record};

struct FifoLog {
    fifo: Mutex<File>,
    id: String,
}

impl Log for FifoLog {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("runx") || metadata.target().starts_with("containerd_shim")
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let level = match record.level() {
            Level::Error => "error",
            Level::Warn => "warning",
            Level::Info => "info",
            Level::Debug | Level::Trace => "debug",
        };
        let time = humantime::format_rfc3339_nanos(SystemTime::now());
        let message = record.args().to_string();
        let line = format!("time=\"{time}\" level={level} msg={message:?} shim={:?}\n", self.id);
        let mut fifo = self.fifo.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        // With containerd away and the FIFO full, the newest lines are lost, and nothing waits.
        let _ = fifo.write_all(line.as_bytes());
    }

    fn flush(&self) {}
}

/// Begins to log into the FIFO of the bundle. It is held open for reading too, so that a restart of
/// containerd does not close it.
pub(crate) fn begin(bundle: &Path, id: &str, debug: bool) {
    let opened = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(bundle.join("log"));
    // Without its FIFO a shim works as well, silently.
    let Ok(fifo) = opened else { return };
    if log::set_boxed_logger(Box::new(FifoLog { fifo: Mutex::new(fifo), id: id.to_owned() })).is_ok() {
        log::set_max_level(if debug { LevelFilter::Debug } else { LevelFilter::Info });
    }
}

struct StderrLog;

impl Log for StderrLog {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        eprintln!("containerd-shim-runx-v1: {}", record.args());
    }

    fn flush(&self) {}
}

/// Writes warnings and worse to standard error, for calls that have no log.
pub(crate) fn to_stderr() {
    if log::set_boxed_logger(Box::new(StderrLog)).is_ok() {
        log::set_max_level(LevelFilter::Warn);
    }
}
