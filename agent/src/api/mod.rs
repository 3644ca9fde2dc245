//! The protocols, over the same core.

pub mod execd;

use std::time::{Duration, SystemTime};

/// The end of the year 9999, in seconds since 1970.
const LAST_SECOND: u64 = 253_402_300_799;

/// A time as RFC 3339 has it, in UTC, with nanoseconds.
pub fn rfc3339(at: SystemTime) -> String {
    // Years have four digits there, and files may have times of any.
    let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let last = Duration::from_secs(LAST_SECOND);
    humantime::format_rfc3339_nanos(SystemTime::UNIX_EPOCH + since.min(last)).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_time_has_a_form() {
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        assert_eq!(rfc3339(at(0)), "1970-01-01T00:00:00.000000000Z");
        assert_eq!(rfc3339(at(300_000_000_000)), "9999-12-31T23:59:59.000000000Z");
        assert_eq!(rfc3339(SystemTime::UNIX_EPOCH - Duration::from_secs(5)), "1970-01-01T00:00:00.000000000Z");
    }
}
