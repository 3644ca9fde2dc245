//! The log, as runc writes it: text or JSON, to standard error or a file.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::time::SystemTime;

use anyhow::Context;
use log::{Level, LevelFilter, Log, Metadata, Record};

use crate::arguments::{Global, LogFormat};

struct Logger {
    file: Option<File>,
    format: LogFormat,
}

impl Logger {
    fn line(&self, record: &Record<'_>) -> String {
        let level = match record.level() {
            Level::Error => "error",
            Level::Warn => "warning",
            Level::Info => "info",
            Level::Debug | Level::Trace => "debug",
        };
        let time = humantime::format_rfc3339_seconds(SystemTime::now());
        let message = record.args().to_string();
        match self.format {
            LogFormat::Json => {
                format!("{}\n", serde_json::json!({"level": level, "msg": message, "time": time.to_string()}))
            }
            LogFormat::Text if needs_quotes(&message) => format!("time=\"{time}\" level={level} msg={message:?}\n"),
            LogFormat::Text => format!("time=\"{time}\" level={level} msg={message}\n"),
        }
    }
}

/// Whether a message is more than one plain word.
fn needs_quotes(message: &str) -> bool {
    message.is_empty() || !message.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._/@^+".contains(&byte))
}

impl Log for Logger {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let line = self.line(record);
        // One write each, so that the lines of several commands do not mix. There is nowhere to report that the
        // report failed.
        let _ = match &self.file {
            Some(file) => Write::write_all(&mut &*file, line.as_bytes()),
            None => std::io::stderr().write_all(line.as_bytes()),
        };
    }

    fn flush(&self) {}
}

/// Begins to log. Returns whether it goes to a file.
pub(crate) fn begin(global: &Global) -> anyhow::Result<bool> {
    let file = match &global.log {
        Some(path) => {
            let opened = OpenOptions::new().append(true).create(true).mode(0o644).open(path);
            Some(opened.with_context(|| format!("open log file {}", path.display()))?)
        }
        None => None,
    };
    let to_file = file.is_some();
    log::set_boxed_logger(Box::new(Logger { file, format: global.log_format })).context("begin to log")?;
    log::set_max_level(if global.debug { LevelFilter::Debug } else { LevelFilter::Warn });
    Ok(to_file)
}
