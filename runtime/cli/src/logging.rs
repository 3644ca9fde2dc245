//! The log, as runc writes it: text or JSON, to standard error or a file.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::sync::Mutex;
use std::time::SystemTime;

use anyhow::Context;
use log::{Level, LevelFilter, Log, Metadata, Record};

use crate::arguments::{Global, LogFormat};

struct Logger {
    file: Option<Mutex<File>>,
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
            LogFormat::Text => format!("time=\"{time}\" level={level} msg={message:?}\n"),
        }
    }
}

impl Log for Logger {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let line = self.line(record);
        // There is nowhere to report that the report failed.
        let _ = match &self.file {
            Some(file) => match file.lock() {
                Ok(mut file) => file.write_all(line.as_bytes()),
                Err(poisoned) => poisoned.into_inner().write_all(line.as_bytes()),
            },
            None => std::io::stderr().write_all(line.as_bytes()),
        };
    }

    fn flush(&self) {}
}

/// Begins to log. Returns whether it goes to a file.
pub(crate) fn begin(global: &Global) -> anyhow::Result<bool> {
    let file = match &global.log {
        Some(path) => {
            let opened = OpenOptions::new().append(true).create(true).open(path);
            Some(Mutex::new(opened.with_context(|| format!("open log file {}", path.display()))?))
        }
        None => None,
    };
    let to_file = file.is_some();
    log::set_boxed_logger(Box::new(Logger { file, format: global.log_format })).context("begin to log")?;
    log::set_max_level(if global.debug { LevelFilter::Debug } else { LevelFilter::Warn });
    Ok(to_file)
}
