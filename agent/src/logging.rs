//! The log: a JSON object for each line, to standard output or a file.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use log::{LevelFilter, Log, Metadata, Record};
use serde_json::json;

struct Logger(Option<Mutex<File>>);

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // What libraries have to say is for their makers.
        metadata.target().starts_with("runx") && metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let level = record.level().as_str().to_lowercase();
        let line =
            json!({"level": level, "ts": crate::api::rfc3339(SystemTime::now()), "msg": record.args().to_string()});
        // There is nobody to tell that a log cannot be written.
        let _ = match &self.0 {
            Some(file) => writeln!(file.lock().unwrap_or_else(PoisonError::into_inner), "{line}"),
            None => writeln!(io::stdout().lock(), "{line}"),
        };
    }

    fn flush(&self) {}
}

/// Begins to log.
///
/// # Errors
/// When the file cannot be opened.
pub fn begin(level: LevelFilter, file: Option<&Path>) -> io::Result<()> {
    let open = |path| OpenOptions::new().create(true).append(true).mode(0o600).open(path);
    let logger = Logger(file.map(open).transpose()?.map(Mutex::new));
    if log::set_boxed_logger(Box::new(logger)).is_ok() {
        log::set_max_level(level);
    }
    Ok(())
}
