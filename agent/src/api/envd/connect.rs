//! The Connect protocol: unary calls and streams of messages, in JSON and in protobuf's own encoding.

use std::time::Duration;

use axum::body::{Body, BodyDataStream};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::{Buf, Bytes, BytesMut};
use futures_util::StreamExt;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::schema::{self, Message};

/// The flag of the last message of a stream.
const LAST: u8 = 2;

/// The flag of a message that is compressed.
const COMPRESSED: u8 = 1;

/// The largest message, in bytes.
const LIMIT: usize = 64 << 20;

/// How often a stream says that it is alive, unless its client wants it otherwise.
const KEEPALIVE: Duration = Duration::from_secs(90);

/// An error of a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Failure {
    pub(super) code: &'static str,
    pub(super) message: String,
}

pub(super) type Result<T> = std::result::Result<T, Failure>;

/// An error of a call.
pub(super) fn fail(code: &'static str, message: impl Into<String>) -> Failure {
    Failure { code, message: message.into() }
}

impl Failure {
    fn status(&self) -> StatusCode {
        let number = match self.code {
            "canceled" => 499,
            "invalid_argument" | "failed_precondition" | "out_of_range" => 400,
            "deadline_exceeded" => 504,
            "not_found" => 404,
            "already_exists" | "aborted" => 409,
            "permission_denied" => 403,
            "resource_exhausted" => 429,
            "unimplemented" => 501,
            "unavailable" => 503,
            "unauthenticated" => 401,
            _ => 500,
        };
        StatusCode::from_u16(number).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
    }

    fn json(&self) -> Value {
        json!({"code": self.code, "message": self.message})
    }

    /// As the answer of a unary call.
    pub(super) fn unary(&self) -> Response {
        (self.status(), axum::Json(self.json())).into_response()
    }
}

/// How messages are encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Codec {
    Json,
    Protobuf,
}

impl Codec {
    fn read(self, message: &Message, bytes: &[u8]) -> Result<Value> {
        let read = match self {
            Self::Json => serde_json::from_slice(bytes)
                .map_err(|e| e.to_string())
                .and_then(|value| schema::from_json(message, &value)),
            Self::Protobuf => schema::from_protobuf(message, bytes),
        };
        read.map_err(|e| fail("invalid_argument", format!("read the request: {e}")))
    }

    fn write(self, message: &Message, value: &Value) -> Vec<u8> {
        match self {
            Self::Json => value.to_string().into_bytes(),
            Self::Protobuf => schema::to_protobuf(message, value),
        }
    }
}

/// What the head of a call says.
#[derive(Clone, Copy, Debug)]
pub(super) struct Call {
    pub(super) codec: Codec,
    /// Whether it is a stream.
    pub(super) stream: bool,
    pub(super) timeout: Option<Duration>,
    pub(super) keepalive: Duration,
}

impl Call {
    /// Reads the head.
    ///
    /// # Errors
    /// An answer that says that this is no call of the protocol.
    pub(super) fn of(headers: &HeaderMap, stream: bool) -> std::result::Result<Self, Box<Response>> {
        let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        let kind = text("content-type").unwrap_or_default();
        let kind = kind.split(';').next().unwrap_or_default().trim();
        let codec = match (stream, kind) {
            (false, "application/json") | (true, "application/connect+json") => Codec::Json,
            (false, "application/proto") | (true, "application/connect+proto") => Codec::Protobuf,
            _ => {
                let known = if stream {
                    "application/connect+json, application/connect+proto"
                } else {
                    "application/json, application/proto"
                };
                return Err(Box::new((StatusCode::UNSUPPORTED_MEDIA_TYPE, [("accept-post", known)]).into_response()));
            }
        };
        let mut call = Self { codec, stream, timeout: None, keepalive: KEEPALIVE };
        let encoding = text(if stream { "connect-content-encoding" } else { "content-encoding" });
        if let Some(other) = encoding.filter(|encoding| !matches!(*encoding, "" | "identity")) {
            let failure = fail("unimplemented", format!("unknown compression {other:?}: identity is known"));
            return Err(Box::new(call.refuse(&failure)));
        }
        call.timeout = match text("connect-timeout-ms") {
            None => None,
            Some(text) if text.len() <= 10 && text.bytes().all(|byte| byte.is_ascii_digit()) && !text.is_empty() => {
                text.parse().ok().map(Duration::from_millis)
            }
            Some(text) => {
                let failure = fail("invalid_argument", format!("connect-timeout-ms: {text:?} is no time"));
                return Err(Box::new(call.refuse(&failure)));
            }
        };
        let interval =
            text("keepalive-ping-interval").and_then(|text| text.parse().ok()).filter(|seconds| *seconds > 0);
        call.keepalive = interval.map_or(KEEPALIVE, Duration::from_secs);
        Ok(call)
    }

    /// The answer that says that nothing came of it.
    pub(super) fn refuse(&self, failure: &Failure) -> Response {
        if !self.stream {
            return failure.unary();
        }
        let (sender, response) = self.stream_response();
        let _ = sender.try_send(last(Some(failure)));
        response
    }

    /// Answers a unary call.
    pub(super) async fn unary<F: Future<Output = Result<Value>>>(
        &self,
        body: Bytes,
        request: &Message,
        response: &'static Message,
        work: impl FnOnce(Value) -> F,
    ) -> Response {
        let done = async { work(self.codec.read(request, &body)?).await };
        let done = match self.timeout {
            None => done.await,
            Some(limit) => tokio::time::timeout(limit, done)
                .await
                .unwrap_or_else(|_| Err(fail("deadline_exceeded", "context deadline exceeded"))),
        };
        match done {
            Ok(value) => {
                let kind = if self.codec == Codec::Json { "application/json" } else { "application/proto" };
                ([(header::CONTENT_TYPE, kind)], self.codec.write(response, &value)).into_response()
            }
            Err(failure) => failure.unary(),
        }
    }

    fn stream_response(&self) -> (mpsc::Sender<Bytes>, Response) {
        let (sender, receiver) = mpsc::channel::<Bytes>(4);
        let body = Body::from_stream(futures_util::stream::unfold(receiver, |mut receiver| async move {
            receiver.recv().await.map(|bytes| (Ok::<_, std::convert::Infallible>(bytes), receiver))
        }));
        let kind = match self.codec {
            Codec::Json => HeaderValue::from_static("application/connect+json"),
            Codec::Protobuf => HeaderValue::from_static("application/connect+proto"),
        };
        (sender, ([(header::CONTENT_TYPE, kind)], body).into_response())
    }

    /// Begins to answer with a stream.
    pub(super) fn stream(&self, message: &'static Message) -> (Stream, Response) {
        let (sender, response) = self.stream_response();
        (Stream { sender, codec: self.codec, message }, response)
    }
}

fn framed(flags: u8, payload: &[u8]) -> Bytes {
    let mut out = BytesMut::with_capacity(payload.len() + 5);
    out.extend_from_slice(&[flags]);
    out.extend_from_slice(&(payload.len() as u32).to_be_bytes());
    out.extend_from_slice(payload);
    out.freeze()
}

fn last(failure: Option<&Failure>) -> Bytes {
    let value = failure.map_or_else(|| json!({}), |failure| json!({"error": failure.json()}));
    framed(LAST, value.to_string().as_bytes())
}

/// Our end of a stream of messages.
#[derive(Debug)]
pub(super) struct Stream {
    sender: mpsc::Sender<Bytes>,
    codec: Codec,
    message: &'static Message,
}

/// The client is not there any more.
#[derive(Debug)]
pub(super) struct Gone;

impl Stream {
    /// Sends a message, and waits for a client that reads slowly.
    pub(super) async fn send(&self, value: &Value) -> std::result::Result<(), Gone> {
        let bytes = framed(0, &self.codec.write(self.message, value));
        self.sender.send(bytes).await.map_err(|_| Gone)
    }

    /// Ends it.
    pub(super) async fn end(self, done: Result<()>) {
        let _ = self.sender.send(last(done.err().as_ref())).await;
    }

    /// Waits until the client is gone.
    pub(super) async fn closed(&self) {
        self.sender.closed().await;
    }
}

/// The messages that a client sends.
pub(super) struct Messages {
    body: BodyDataStream,
    buffer: BytesMut,
    codec: Codec,
    message: &'static Message,
}

impl Messages {
    pub(super) fn new(body: Body, call: &Call, message: &'static Message) -> Self {
        Self { body: body.into_data_stream(), buffer: BytesMut::new(), codec: call.codec, message }
    }

    /// The next one, or `None` after the last.
    pub(super) async fn next(&mut self) -> Result<Option<Value>> {
        loop {
            if let Some(head) = self.buffer.first_chunk::<5>().copied() {
                let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
                if length > LIMIT {
                    return Err(fail("resource_exhausted", format!("a message of {length} bytes")));
                }
                if self.buffer.len() >= length + 5 {
                    self.buffer.advance(5);
                    let payload = self.buffer.split_to(length);
                    return match head[0] {
                        flags if flags & COMPRESSED != 0 => Err(fail("internal", "the message is compressed")),
                        flags if flags & LAST != 0 => Err(fail("invalid_argument", "clients have no last message")),
                        _ => self.codec.read(self.message, &payload).map(Some),
                    };
                }
            }
            match self.body.next().await {
                Some(Ok(bytes)) => self.buffer.extend_from_slice(&bytes),
                Some(Err(e)) => return Err(fail("canceled", format!("read the request: {e}"))),
                None if self.buffer.is_empty() => return Ok(None),
                None => return Err(fail("invalid_argument", "the message is cut off")),
            }
        }
    }

    /// The only one.
    pub(super) async fn only(&mut self) -> Result<Value> {
        self.next().await?.ok_or_else(|| fail("invalid_argument", "there is no message"))
    }
}
