//! The protocols, over the same core.

pub mod execd;

use std::time::SystemTime;

/// A time as RFC 3339 has it, in UTC, with nanoseconds.
pub fn rfc3339(at: SystemTime) -> String {
    if at < SystemTime::UNIX_EPOCH {
        return "1970-01-01T00:00:00Z".to_owned();
    }
    humantime::format_rfc3339_nanos(at).to_string()
}
