//! The protocols, over the same core.

pub(crate) mod date;
pub mod envd;
pub mod execd;
pub(crate) mod form;
pub mod own;
pub(crate) mod query;
pub(crate) mod range;

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

/// RFC 6266, with the encoding of RFC 5987 for names that are not ASCII.
pub(crate) fn disposition(kind: &str, name: &str) -> String {
    let plain = name.chars().all(|c| c.is_ascii() && !c.is_ascii_control() && c != '"' && c != '\\');
    if plain {
        return format!("{kind}; filename=\"{name}\"");
    }
    let encoded: String = name
        .bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => char::from(byte).to_string(),
            other => format!("%{other:02X}"),
        })
        .collect();
    format!("{kind}; filename=\"{encoded}\"; filename*=UTF-8''{encoded}")
}

/// Compares in a time that says nothing of where they differ.
pub(crate) fn same(wanted: &[u8], given: &[u8]) -> bool {
    let mut different = wanted.len() ^ given.len();
    for (at, byte) in wanted.iter().enumerate() {
        different |= usize::from(byte ^ given.get(at).copied().unwrap_or(0));
        // So that no shortcut is found.
        std::hint::black_box(different);
    }
    different == 0
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

    #[test]
    fn names_of_downloads_are_encoded() {
        assert_eq!(disposition("attachment", "a b.txt"), "attachment; filename=\"a b.txt\"");
        assert_eq!(disposition("attachment", "ä\""), "attachment; filename=\"%C3%A4%22\"; filename*=UTF-8''%C3%A4%22");
    }

    #[test]
    fn only_the_same_is_the_same() {
        assert!(same(b"token", b"token"));
        for other in [&b""[..], b"toke", b"token2", b"Token", b"\0token"] {
            assert!(!same(b"token", other), "{other:?}");
        }
    }
}
