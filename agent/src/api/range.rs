//! Parts of files (RFC 9110, section 14).

use std::sync::Arc;

use bytes::Bytes;
use futures_util::StreamExt;

use crate::fs::read::{CHUNK, Reader};

/// What of a file is asked for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Wanted {
    All,
    Range(u64, u64),
    Unsatisfiable,
}

/// `bytes=a-b`, `a-` and `-n`; of several the first that can be had.
pub(crate) fn range(header: &str, size: u64) -> Option<Wanted> {
    let list = header.trim().strip_prefix("bytes=")?;
    let mut any = None;
    for part in list.split(',') {
        let (first, last) = part.trim().split_once('-')?;
        let found = match (first.trim(), last.trim()) {
            ("", count) => {
                let count: u64 = count.parse().ok()?;
                (count > 0 && size > 0).then(|| (size.saturating_sub(count), size))
            }
            (first, "") => {
                let first: u64 = first.parse().ok()?;
                (first < size).then_some((first, size))
            }
            (first, last) => {
                let (first, last): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
                if last < first {
                    return None;
                }
                (first < size).then(|| (first, size.min(last.saturating_add(1))))
            }
        };
        any = any.or(found);
    }
    Some(any.map_or(Wanted::Unsatisfiable, |(from, to)| Wanted::Range(from, to)))
}

/// A part of a file, read piece by piece: a client that does not go on holds no thread.
pub(crate) fn range_body(reader: Reader, from: u64, to: u64) -> axum::body::Body {
    let reader = Arc::new(reader);
    let begins = (from..to).step_by(CHUNK);
    let pieces = futures_util::stream::iter(begins).map(move |at| {
        let reader = reader.clone();
        async move {
            // A piece that is not there any more is an error, so that the client does not take half of it for all.
            let read = tokio::task::spawn_blocking(move || reader.piece(at, to)).await;
            read.unwrap_or_else(|e| Err(std::io::Error::other(e))).map(Bytes::from)
        }
    });
    // The next one is read while one is sent.
    axum::body::Body::from_stream(pieces.buffered(2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_those_of_http() {
        let of = |text: &str| match range(text, 100) {
            None => "malformed".to_owned(),
            Some(Wanted::All) => "all".into(),
            Some(Wanted::Unsatisfiable) => "none".into(),
            Some(Wanted::Range(from, to)) => format!("{from}-{to}"),
        };
        for (text, wanted) in [
            ("bytes=0-9", "0-10"),
            ("bytes=90-", "90-100"),
            ("bytes=-5", "95-100"),
            ("bytes=-500", "0-100"),
            ("bytes=50-1000", "50-100"),
            ("bytes=200-, 1-2", "1-3"),
            ("bytes=100-", "none"),
            ("bytes=-0", "none"),
            ("bytes=9-3", "malformed"),
            ("bytes=x-", "malformed"),
            ("items=1-2", "malformed"),
            ("bytes=", "malformed"),
        ] {
            assert_eq!(of(text), wanted, "{text}");
        }
    }
}
