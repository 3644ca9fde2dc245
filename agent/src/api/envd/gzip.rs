//! Bodies packed by gzip: files that come so, and those that are wanted so.

use std::io;

use async_compression::Level;
use async_compression::tokio::bufread::{GzipDecoder, GzipEncoder};
use axum::body::Body;
use futures_util::TryStreamExt;
use tokio_util::io::{ReaderStream, StreamReader};

/// How much is packed at once, in bytes.
const CHUNK: usize = 64 << 10;

/// What is in a body, unpacked as it comes.
pub(super) fn unpacked(body: Body) -> Body {
    let stream = body.into_data_stream().map_err(io::Error::other);
    let mut decoder = GzipDecoder::new(StreamReader::new(stream));
    // Parts that were packed one after the other are one file.
    decoder.multiple_members(true);
    Body::from_stream(ReaderStream::with_capacity(decoder, CHUNK))
}

/// A body, packed as it is read: quickly rather than well, on a processor that has other work.
pub(super) fn packed(body: Body) -> Body {
    let stream = body.into_data_stream().map_err(io::Error::other);
    let encoder = GzipEncoder::with_quality(StreamReader::new(stream), Level::Fastest);
    Body::from_stream(ReaderStream::with_capacity(encoder, CHUNK))
}

/// Whether a file is to be packed, by what its client accepts; `None` when he accepts nothing that there is.
///
/// Most clients accept gzip by default and gain nothing by it on the same machine: it is packed for who accepts nothing else,
/// or puts it before what is not packed. Of a part of a file, or of one that may be unchanged, it never is.
pub(super) fn wanted(accepted: Option<&str>, part: bool) -> Option<bool> {
    let Some(accepted) = accepted.filter(|text| !text.trim().is_empty()) else { return Some(false) };
    let weight = |name: &str| {
        accepted.split(',').find_map(|item| {
            let mut words = item.split(';').map(str::trim);
            let found = words.next().is_some_and(|word| word.eq_ignore_ascii_case(name));
            let weight = words.find_map(|word| word.strip_prefix("q=").or_else(|| word.strip_prefix("Q=")));
            found.then(|| weight.map_or(1.0, |weight| weight.parse::<f32>().unwrap_or(0.0)))
        })
    };
    let (gzip, identity, any) = (weight("gzip"), weight("identity"), weight("*"));
    let plain = identity.or(any).is_none_or(|weight| weight > 0.0);
    let gzip_weight = gzip.or(any).unwrap_or(0.0);
    let only = accepted.trim().eq_ignore_ascii_case("gzip");
    let first = identity.is_some_and(|identity| gzip_weight > identity);
    match (part, plain) {
        (true, true) => Some(false),
        (true, false) => None,
        (false, true) => Some(gzip_weight > 0.0 && (only || first)),
        (false, false) if gzip_weight > 0.0 => Some(true),
        (false, false) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::wanted;

    #[test]
    fn who_wants_it_packed_gets_it_so() {
        for (accepted, packed) in [
            ("gzip", Some(true)),
            ("gzip, deflate", Some(false)),
            ("gzip;q=1, identity;q=0.5", Some(true)),
            ("gzip;q=0.2, identity;q=0.5", Some(false)),
            ("gzip, identity;q=0", Some(true)),
            ("br, *;q=0", None),
            ("identity;q=0, *", Some(true)),
            ("deflate", Some(false)),
            ("", Some(false)),
        ] {
            assert_eq!(wanted(Some(accepted), false), packed, "{accepted}");
        }
        assert_eq!((wanted(Some("gzip"), true), wanted(Some("gzip, identity;q=0"), true)), (Some(false), None));
        assert_eq!(wanted(None, false), Some(false));
    }
}
