//! The Connect protocol: unary calls and streams of messages, in JSON and in protobuf's own encoding. gRPC and gRPC-Web carry
//! the same messages in the same frames, and differ in how they begin and end.

use std::time::Duration;

use axum::body::{Body, BodyDataStream};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use http_body_util::StreamBody;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::schema::{self, Message};
use super::wire::{self, COMPRESSED, LAST, Wire};

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
    /// As gRPC counts them.
    pub(super) fn number(&self) -> u8 {
        const NAMES: &str = "ok canceled unknown invalid_argument deadline_exceeded not_found already_exists permission_denied \
                             resource_exhausted failed_precondition aborted out_of_range unimplemented internal unavailable \
                             data_loss unauthenticated";
        NAMES.split_whitespace().position(|name| name == self.code).map_or(2, |number| number as u8)
    }

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

    pub(super) fn json(&self) -> Value {
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
    pub(super) wire: Wire,
    pub(super) codec: Codec,
    /// Messages that are marked so are compressed by gzip.
    gzip: bool,
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
        let (wire, codec) = match (stream, kind) {
            (false, "application/json") | (true, "application/connect+json") => (Wire::Connect, Codec::Json),
            (false, "application/proto") | (true, "application/connect+proto") => (Wire::Connect, Codec::Protobuf),
            (_, "application/grpc" | "application/grpc+proto") => (Wire::Grpc, Codec::Protobuf),
            (_, "application/grpc+json") => (Wire::Grpc, Codec::Json),
            (_, "application/grpc-web" | "application/grpc-web+proto") => (Wire::GrpcWeb, Codec::Protobuf),
            (_, "application/grpc-web+json") => (Wire::GrpcWeb, Codec::Json),
            _ => {
                let known = if stream {
                    "application/connect+json, application/connect+proto, application/grpc, application/grpc-web"
                } else {
                    "application/json, application/proto, application/grpc, application/grpc-web"
                };
                return Err(Box::new((StatusCode::UNSUPPORTED_MEDIA_TYPE, [("accept-post", known)]).into_response()));
            }
        };
        let mut call = Self { wire, codec, gzip: false, stream, timeout: None, keepalive: KEEPALIVE };
        let encoding = match (wire, stream) {
            (Wire::Connect, true) => text("connect-content-encoding"),
            (Wire::Connect, false) => text("content-encoding"),
            _ => text("grpc-encoding"),
        };
        match encoding {
            None | Some("" | "identity") => {}
            Some("gzip") => call.gzip = true,
            Some(other) => {
                let text = format!("unknown compression {other:?}: gzip and identity are known");
                return Err(Box::new(call.refuse(&fail("unimplemented", text))));
            }
        }
        let (name, limit) = match wire {
            Wire::Connect => ("connect-timeout-ms", text("connect-timeout-ms").map(milliseconds)),
            _ => ("grpc-timeout", text("grpc-timeout").map(wire::timeout)),
        };
        call.timeout = match limit {
            None => None,
            Some(Some(limit)) => Some(limit),
            Some(None) => {
                let given = text(name).unwrap_or_default();
                return Err(Box::new(call.refuse(&fail("invalid_argument", format!("{name}: {given:?} is no time")))));
            }
        };
        let interval =
            text("keepalive-ping-interval").and_then(|text| text.parse().ok()).filter(|seconds| *seconds > 0);
        call.keepalive = interval.map_or(KEEPALIVE, Duration::from_secs);
        Ok(call)
    }

    /// The answer that says that nothing came of it.
    pub(super) fn refuse(&self, failure: &Failure) -> Response {
        match (self.wire, self.stream) {
            (Wire::Connect, false) => failure.unary(),
            (Wire::Connect, true) => self.whole(vec![wire::last(self.wire, Some(failure))]),
            _ => {
                let mut response = ([(header::CONTENT_TYPE, self.kind())], ()).into_response();
                response.headers_mut().extend(wire::status(Some(failure)));
                response
            }
        }
    }

    fn kind(&self) -> HeaderValue {
        HeaderValue::from_static(match (self.wire, self.stream, self.codec) {
            (Wire::Connect, false, Codec::Json) => "application/json",
            (Wire::Connect, false, Codec::Protobuf) => "application/proto",
            (Wire::Connect, true, Codec::Json) => "application/connect+json",
            (Wire::Connect, true, Codec::Protobuf) => "application/connect+proto",
            (Wire::Grpc, _, Codec::Json) => "application/grpc+json",
            (Wire::Grpc, _, Codec::Protobuf) => "application/grpc+proto",
            (Wire::GrpcWeb, _, Codec::Json) => "application/grpc-web+json",
            (Wire::GrpcWeb, _, Codec::Protobuf) => "application/grpc-web+proto",
        })
    }

    /// An answer of frames that are all there.
    fn whole(&self, frames: Vec<wire::Frame>) -> Response {
        let frames: Vec<_> = frames.into_iter().map(Ok::<_, std::convert::Infallible>).collect();
        let body = StreamBody::new(futures_util::stream::iter(frames));
        ([(header::CONTENT_TYPE, self.kind())], Body::new(body)).into_response()
    }

    /// The only message of a call, out of its body.
    fn message(&self, body: Bytes) -> Result<Bytes> {
        match self.wire {
            Wire::Connect if self.gzip => wire::unpack(&body, LIMIT),
            Wire::Connect => Ok(body),
            _ => {
                let mut buffer = BytesMut::from(&body[..]);
                let (flags, payload) =
                    wire::take(&mut buffer, LIMIT)?.ok_or_else(|| fail("invalid_argument", "there is no message"))?;
                self.payload(flags, payload)
            }
        }
    }

    fn payload(&self, flags: u8, payload: Bytes) -> Result<Bytes> {
        match flags {
            flags if flags & COMPRESSED != 0 && self.gzip => wire::unpack(&payload, LIMIT),
            flags if flags & COMPRESSED != 0 => Err(fail("internal", "the message is compressed, and nobody said how")),
            flags if flags & LAST != 0 => Err(fail("invalid_argument", "clients have no last message")),
            _ => Ok(payload),
        }
    }

    /// Answers a unary call.
    pub(super) async fn unary<F: Future<Output = Result<Value>>>(
        &self,
        body: Bytes,
        request: &Message,
        response: &'static Message,
        work: impl FnOnce(Value) -> F,
    ) -> Response {
        let done = async { work(self.codec.read(request, &self.message(body)?)?).await };
        let done = match self.timeout {
            None => done.await,
            Some(limit) => tokio::time::timeout(limit, done)
                .await
                .unwrap_or_else(|_| Err(fail("deadline_exceeded", "context deadline exceeded"))),
        };
        match done {
            Ok(value) => {
                let message = self.codec.write(response, &value);
                match self.wire {
                    Wire::Connect => ([(header::CONTENT_TYPE, self.kind())], message).into_response(),
                    _ => {
                        let message = wire::Frame::data(wire::framed(0, &message));
                        self.whole(vec![message, wire::last(self.wire, None)])
                    }
                }
            }
            Err(failure) => self.refuse(&failure),
        }
    }

    /// Begins to answer with a stream.
    pub(super) fn stream(&self, message: &'static Message) -> (Stream, Response) {
        let (sender, receiver) = mpsc::channel::<wire::Frame>(4);
        let frames = futures_util::stream::unfold(receiver, |mut receiver| async move {
            receiver.recv().await.map(|frame| (Ok::<_, std::convert::Infallible>(frame), receiver))
        });
        let response = ([(header::CONTENT_TYPE, self.kind())], Body::new(StreamBody::new(frames))).into_response();
        (Stream { sender, wire: self.wire, codec: self.codec, message }, response)
    }
}

fn milliseconds(text: &str) -> Option<Duration> {
    let digits = text.len() <= 10 && !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|_| digits).map(Duration::from_millis)
}

/// Our end of a stream of messages.
#[derive(Debug)]
pub(super) struct Stream {
    sender: mpsc::Sender<wire::Frame>,
    wire: Wire,
    codec: Codec,
    message: &'static Message,
}

/// The client is not there any more.
#[derive(Debug)]
pub(super) struct Gone;

impl Stream {
    /// Sends a message, and waits for a client that reads slowly.
    pub(super) async fn send(&self, value: &Value) -> std::result::Result<(), Gone> {
        let bytes = wire::framed(0, &self.codec.write(self.message, value));
        self.sender.send(wire::Frame::data(bytes)).await.map_err(|_| Gone)
    }

    /// Ends it.
    pub(super) async fn end(self, done: Result<()>) {
        let _ = self.sender.send(wire::last(self.wire, done.err().as_ref())).await;
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
    call: Call,
    message: &'static Message,
}

impl Messages {
    pub(super) fn new(body: Body, call: &Call, message: &'static Message) -> Self {
        Self { body: body.into_data_stream(), buffer: BytesMut::new(), call: *call, message }
    }

    /// The next one, or `None` after the last.
    pub(super) async fn next(&mut self) -> Result<Option<Value>> {
        loop {
            if let Some((flags, payload)) = wire::take(&mut self.buffer, LIMIT)? {
                let payload = self.call.payload(flags, payload)?;
                return self.call.codec.read(self.message, &payload).map(Some);
            }
            match self.body.next().await {
                Some(Ok(bytes)) => self.buffer.extend_from_slice(&bytes),
                Some(Err(e)) => return Err(fail("canceled", format!("read the request: {e}"))),
                None if self.buffer.is_empty() => return Ok(None),
                None => return Err(fail("invalid_argument", "the message is cut off")),
            }
        }
    }

    /// The only one. What follows is read and thrown away: a connection on which something is left unread when the answer has
    /// been given would be closed, under a client that is about to send its next request.
    pub(super) async fn only(mut self) -> Result<Value> {
        let message = self.next().await;
        tokio::spawn(async move { while let Some(Ok(_)) = self.body.next().await {} });
        message?.ok_or_else(|| fail("invalid_argument", "there is no message"))
    }
}
