//! Messages on the wire: five bytes before each, as Connect's streams, gRPC and gRPC-Web all have it, and what each of the three
//! ends with.

use std::io::Read;
use std::time::Duration;

use axum::http::{HeaderMap, HeaderValue};
use bytes::{Buf, Bytes, BytesMut};
use serde_json::json;

use super::connect::{Failure, Result, fail};

/// The flag of a message that is compressed.
pub(super) const COMPRESSED: u8 = 1;

/// The flag of the last message of a stream of Connect.
pub(super) const LAST: u8 = 2;

/// The flag of gRPC-Web's trailers.
const TRAILERS: u8 = 0x80;

/// A part of a body: bytes, or HTTP's own trailers.
pub(super) type Frame = http_body::Frame<Bytes>;

/// Which of the three.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wire {
    Connect,
    Grpc,
    GrpcWeb,
}

/// A message with its five bytes.
pub(super) fn framed(flags: u8, payload: &[u8]) -> Bytes {
    let mut out = BytesMut::with_capacity(payload.len() + 5);
    out.extend_from_slice(&[flags]);
    out.extend_from_slice(&(payload.len() as u32).to_be_bytes());
    out.extend_from_slice(payload);
    out.freeze()
}

/// Takes a message out of a buffer, with its flags; `None` when it is not all there.
///
/// # Errors
/// When it is too large.
pub(super) fn take(buffer: &mut BytesMut, limit: usize) -> Result<Option<(u8, Bytes)>> {
    let Some(head) = buffer.first_chunk::<5>().copied() else { return Ok(None) };
    let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
    if length > limit {
        return Err(fail("resource_exhausted", format!("a message of {length} bytes")));
    }
    if buffer.len() < length + 5 {
        return Ok(None);
    }
    buffer.advance(5);
    Ok(Some((head[0], buffer.split_to(length).freeze())))
}

/// Unpacks what gzip has packed, as long as it is not too large then.
///
/// # Errors
/// That it is, or is not of gzip.
pub(super) fn unpack(bytes: &[u8], limit: usize) -> Result<Bytes> {
    let mut out = Vec::new();
    let mut reader = flate2::read::GzDecoder::new(bytes).take(limit as u64 + 1);
    reader.read_to_end(&mut out).map_err(|e| fail("invalid_argument", format!("unpack the message: {e}")))?;
    if out.len() > limit {
        return Err(fail("resource_exhausted", format!("a message of more than {limit} bytes")));
    }
    Ok(out.into())
}

/// A time as gRPC writes it: digits and a unit.
pub(super) fn timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let plain = digits.len() <= 8 && digits.bytes().all(|byte| byte.is_ascii_digit());
    let number: u64 = digits.parse().ok().filter(|_| plain)?;
    Some(match unit {
        "H" => Duration::from_secs(number * 3600),
        "M" => Duration::from_secs(number * 60),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return None,
    })
}

/// How a call ended, as gRPC's headers.
pub(super) fn status(failure: Option<&Failure>) -> HeaderMap {
    let mut out = HeaderMap::new();
    out.insert("grpc-status", HeaderValue::from(u16::from(failure.map_or(0, Failure::number))));
    if let Some(failure) = failure
        && let Ok(message) = HeaderValue::from_str(&escaped(&failure.message))
    {
        out.insert("grpc-message", message);
    }
    out
}

/// What is not printable ASCII, and the percent sign itself, in hexadecimal digits.
fn escaped(text: &str) -> String {
    let escape = |byte: u8| match byte {
        b' '..=b'~' if byte != b'%' => char::from(byte).to_string(),
        other => format!("%{other:02X}"),
    };
    text.bytes().map(escape).collect()
}

/// What a stream ends with.
pub(super) fn last(wire: Wire, failure: Option<&Failure>) -> Frame {
    match wire {
        Wire::Connect => {
            let value = failure.map_or_else(|| json!({}), |failure| json!({"error": failure.json()}));
            Frame::data(framed(LAST, value.to_string().as_bytes()))
        }
        Wire::Grpc => Frame::trailers(status(failure)),
        Wire::GrpcWeb => {
            let headers = status(failure);
            let line = |(name, value): (_, &HeaderValue)| format!("{name}: {}\r\n", value.to_str().unwrap_or_default());
            let text: String = headers.iter().map(line).collect();
            Frame::data(framed(TRAILERS, text.as_bytes()))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn times_have_units() {
        assert_eq!(timeout("10S"), Some(Duration::from_secs(10)));
        assert_eq!(timeout("250m"), Some(Duration::from_millis(250)));
        for wrong in ["", "S", "10", "x1S", "123456789S", "1ü"] {
            assert_eq!(timeout(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_packed_message_may_not_grow_without_end() {
        let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        packed.write_all(&vec![0; 1 << 20]).unwrap();
        let packed = packed.finish().unwrap();
        assert_eq!(unpack(&packed, 1 << 20).unwrap().len(), 1 << 20);
        assert_eq!(unpack(&packed, (1 << 20) - 1).unwrap_err().code, "resource_exhausted");
        assert_eq!(unpack(b"nonsense", 100).unwrap_err().code, "invalid_argument");
    }

    #[test]
    fn messages_come_in_pieces() {
        let mut buffer = BytesMut::new();
        for byte in framed(0, b"hello") {
            assert_eq!(take(&mut buffer, 100).unwrap(), None);
            buffer.extend_from_slice(&[byte]);
        }
        assert_eq!(take(&mut buffer, 100).unwrap(), Some((0, Bytes::from_static(b"hello"))));
        buffer.extend_from_slice(&[0, 0xff, 0xff, 0xff, 0xff]);
        assert_eq!(take(&mut buffer, 100).unwrap_err().code, "resource_exhausted");
    }

    #[test]
    fn texts_of_errors_are_escaped() {
        assert_eq!(escaped("100% ä\n"), "100%25 %C3%A4%0A");
    }
}
