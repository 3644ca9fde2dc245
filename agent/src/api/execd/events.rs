//! Event streams: bare JSON objects, each followed by two newlines.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::body::Body;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::Stream;
use serde_json::Value;
use tokio::sync::mpsc;

/// How many parts of a stream wait for a client that does not read.
const WAITING: usize = 4;

/// How often a stream without events says that it is alive.
pub(super) const KEEPALIVE: Duration = Duration::from_secs(3);

/// Milliseconds since 1970.
pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

/// Events that will be sent together.
#[derive(Debug, Default)]
pub(super) struct Batch(Vec<u8>);

impl Batch {
    fn begin(&mut self, kind: &str) {
        self.0.extend_from_slice(b"{\"type\":\"");
        self.0.extend_from_slice(kind.as_bytes());
        self.0.push(b'"');
    }

    fn end(&mut self) {
        self.0.extend_from_slice(format!(",\"timestamp\":{}", now()).as_bytes());
    }

    fn close(&mut self) {
        self.0.extend_from_slice(b"}\n\n");
    }

    /// An event with a text.
    pub(super) fn text(&mut self, kind: &str, text: &[u8]) {
        self.begin(kind);
        if !text.is_empty() {
            self.0.extend_from_slice(b",\"text\":");
            string(&mut self.0, text);
        }
        self.end();
        self.close();
    }

    /// What each stream begins with: the id, and that it is alive.
    pub(super) fn init(&mut self, id: &str) {
        self.text("init", id.as_bytes());
        self.ping();
    }

    /// That the stream is alive.
    pub(super) fn ping(&mut self) {
        self.text("ping", b"pong");
    }

    /// The end, after this time.
    pub(super) fn complete(&mut self, took: Duration) {
        self.begin("execution_complete");
        if took.as_millis() > 0 {
            self.0.extend_from_slice(format!(",\"execution_time\":{}", took.as_millis()).as_bytes());
        }
        self.end();
        self.close();
    }

    /// How many executions there were.
    pub(super) fn count(&mut self, count: u64) {
        self.begin("execution_count");
        if count > 0 {
            self.0.extend_from_slice(format!(",\"execution_count\":{count}").as_bytes());
        }
        self.end();
        self.close();
    }

    /// What an execution has resulted in, by media types.
    pub(super) fn results(&mut self, results: &Value) {
        self.begin("result");
        self.end();
        self.0.extend_from_slice(b",\"results\":");
        self.0.extend_from_slice(escape(&results.to_string()).as_bytes());
        self.close();
    }

    /// The end, with an error.
    pub(super) fn error(&mut self, name: &str, value: &str, traceback: &[String]) {
        self.begin("error");
        self.end();
        self.0.extend_from_slice(b",\"error\":{\"ename\":");
        string(&mut self.0, name.as_bytes());
        self.0.extend_from_slice(b",\"evalue\":");
        string(&mut self.0, value.as_bytes());
        self.0.extend_from_slice(b",\"traceback\":[");
        for (number, line) in traceback.iter().enumerate() {
            if number > 0 {
                self.0.push(b',');
            }
            string(&mut self.0, line.as_bytes());
        }
        self.0.extend_from_slice(b"]}");
        self.close();
    }

    /// Whether there are none.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How large it is, in bytes.
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    fn take(&mut self) -> Bytes {
        std::mem::take(&mut self.0).into()
    }
}

/// Writes a JSON string. Invalid UTF-8 becomes U+FFFD, byte by byte, and what clients take for the end of a line is
/// escaped.
fn string(out: &mut Vec<u8>, bytes: &[u8]) {
    out.push(b'"');
    for chunk in bytes.utf8_chunks() {
        let mut plain = 0;
        let text = chunk.valid();
        for (at, c) in text.char_indices() {
            let escape: &[u8] = match c {
                '"' => b"\\\"",
                '\\' => b"\\\\",
                '\n' => b"\\n",
                '\r' => b"\\r",
                '\t' => b"\\t",
                '\0'..='\u{1f}' | '\u{7f}'..='\u{9f}' | '\u{2028}' | '\u{2029}' => {
                    out.extend_from_slice(&text.as_bytes()[plain..at]);
                    out.extend_from_slice(format!("\\u{:04x}", c as u32).as_bytes());
                    plain = at + c.len_utf8();
                    continue;
                }
                _ => continue,
            };
            out.extend_from_slice(&text.as_bytes()[plain..at]);
            out.extend_from_slice(escape);
            plain = at + 1;
        }
        out.extend_from_slice(&text.as_bytes()[plain..]);
        for _ in chunk.invalid() {
            out.extend_from_slice("\u{fffd}".as_bytes());
        }
    }
    out.push(b'"');
}

/// Escapes in finished JSON what clients take for the end of a line. It occurs in strings only.
fn escape(json: &str) -> String {
    let mut out = String::with_capacity(json.len());
    for c in json.chars() {
        match c {
            '\u{7f}'..='\u{9f}' | '\u{2028}' | '\u{2029}' => out.push_str(&format!("\\u{:04x}", c as u32)),
            other => out.push(other),
        }
    }
    out
}

/// The daemon's end of a stream.
#[derive(Debug)]
pub(super) struct Sender {
    channel: mpsc::Sender<Bytes>,
    gone: bool,
}

impl Sender {
    /// Sends, and waits for a client that reads slowly. Whether it is still there.
    pub(super) async fn send(&mut self, batch: &mut Batch) -> bool {
        if batch.is_empty() || self.gone {
            *batch = Batch::default();
            return !self.gone;
        }
        self.gone = self.channel.send(batch.take()).await.is_err();
        !self.gone
    }

    /// Says that it is alive, if the client has read what came before.
    pub(super) fn ping(&mut self) {
        let mut batch = Batch::default();
        batch.ping();
        if let Err(mpsc::error::TrySendError::Closed(_)) = self.channel.try_send(batch.take()) {
            self.gone = true;
        }
    }

    /// With which it can be waited for that the client is gone. The stream stays open as long as this is there.
    pub(super) fn watch(&self) -> mpsc::Sender<Bytes> {
        self.channel.clone()
    }
}

/// The client's end of a stream.
struct Receiver(mpsc::Receiver<Bytes>);

impl Stream for Receiver {
    type Item = Result<Bytes, std::convert::Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_recv(context).map(|bytes| bytes.map(Ok))
    }
}

/// Bytes that are made elsewhere, as a body.
pub(super) fn channel() -> (mpsc::Sender<Bytes>, Body) {
    let (sender, receiver) = mpsc::channel(WAITING);
    (sender, Body::from_stream(Receiver(receiver)))
}

/// A stream and the answer that carries it.
pub(super) fn stream() -> (Sender, Response) {
    let (channel, body) = channel();
    let headers = [(CONTENT_TYPE, "text/event-stream"), (CACHE_CONTROL, "no-cache")];
    let response = (headers, [("x-accel-buffering", "no"), ("connection", "keep-alive")], body).into_response();
    (Sender { channel, gone: false }, response)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_one_line_whatever_it_holds() {
        let mut batch = Batch::default();
        let text = b"a\"b\\c\n\r\t\x0b\x1c\x7f\xc2\x85\xe2\x80\xa8 \xff\xfe \xe4\xbd end";
        batch.text("stdout", text);
        batch.error("E\u{2029}", "", &["one".into(), "two".into()]);
        batch.results(&serde_json::json!({"text": "x\u{2028}y"}));
        batch.complete(Duration::from_micros(10));
        batch.count(3);
        let out = String::from_utf8(batch.0).unwrap();
        let events: Vec<&str> = out.split_terminator("\n\n").collect();
        assert_eq!(events.len(), 5);
        for event in &events {
            assert!(!event.contains(|c: char| c.is_control() || ('\u{80}'..='\u{9f}').contains(&c)), "{event:?}");
            assert!(!event.contains(['\u{2028}', '\u{2029}']), "{event:?}");
        }
        let first: Value = serde_json::from_str(events[0]).unwrap();
        let replaced = "a\"b\\c\n\r\t\u{b}\u{1c}\u{7f}\u{85}\u{2028} \u{fffd}\u{fffd} \u{fffd}\u{fffd} end";
        assert_eq!(first["text"], replaced);
        let third: Value = serde_json::from_str(events[2]).unwrap();
        assert_eq!(third["results"]["text"], "x\u{2028}y");
        assert!(!events[3].contains("execution_time"));
    }
}
