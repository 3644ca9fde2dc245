//! Calls of containerd's gRPC API: HTTP/2 over its socket, a message with a five-byte head in each direction
//! (gRPC over HTTP2). What a shim asks for once in a container's life needs no more of a client than this.

use std::io;
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use h2::client::SendRequest;
use http::{HeaderMap, Request};
use prost::Message;
use tokio::net::UnixStream;

/// How long a call may take to be answered, and each part of an answer.
const PATIENCE: Duration = Duration::from_secs(20);

/// The status of an answer that says that there is no such thing.
const NOT_FOUND: &str = "5";

/// The largest message that is accepted, in bytes.
const LIMIT: usize = 16 << 20;

/// How much may be under way to us, in bytes.
const WINDOW: u32 = 4 << 20;

/// A connection to containerd, for one namespace.
pub(super) struct Client {
    sender: SendRequest<Bytes>,
    namespace: String,
}

/// The messages of an answer, one after the other.
pub(super) struct Answer {
    body: h2::RecvStream,
    buffer: BytesMut,
}

fn failed(what: impl std::fmt::Display) -> io::Error {
    io::Error::other(what.to_string())
}

async fn patiently<T>(work: impl Future<Output = Result<T, h2::Error>>) -> io::Result<T> {
    match tokio::time::timeout(PATIENCE, work).await {
        Ok(done) => done.map_err(failed),
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "there is no answer")),
    }
}

impl Client {
    /// Connects to the socket at `address`.
    pub(super) async fn connect(address: &str, namespace: &str) -> io::Result<Self> {
        let stream = UnixStream::connect(address.strip_prefix("unix://").unwrap_or(address)).await?;
        let mut builder = h2::client::Builder::new();
        builder.initial_window_size(WINDOW).initial_connection_window_size(WINDOW).enable_push(false);
        let (sender, connection) = patiently(builder.handshake(stream)).await?;
        tokio::spawn(async move {
            if let Err(e) = connection.await {
                log::debug!("the connection to containerd: {e}");
            }
        });
        Ok(Self { sender, namespace: namespace.to_owned() })
    }

    /// Calls a method, such as `/containerd.services.images.v1.Images/Get`.
    pub(super) async fn call(&self, method: &str, message: &impl Message) -> io::Result<Answer> {
        let request = Request::post(format!("http://containerd{method}"))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .header("containerd-namespace", &self.namespace)
            .body(())
            .map_err(failed)?;
        let encoded = message.encode_to_vec();
        let mut framed = Vec::with_capacity(encoded.len() + 5);
        framed.push(0);
        framed.extend_from_slice(&(encoded.len() as u32).to_be_bytes());
        framed.extend_from_slice(&encoded);
        let mut sender = patiently(self.sender.clone().ready()).await?;
        let (response, mut stream) = sender.send_request(request, false).map_err(failed)?;
        stream.send_data(framed.into(), true).map_err(failed)?;
        let response = patiently(response).await?;
        if response.status() != http::StatusCode::OK {
            return Err(failed(format!("{method}: HTTP status {}", response.status())));
        }
        // A failure without any message comes with the head of the answer.
        refusal(response.headers())?;
        Ok(Answer { body: response.into_body(), buffer: BytesMut::new() })
    }

    /// Calls a method whose answer is one message.
    pub(super) async fn call_once<T: Message + Default>(&self, method: &str, message: &impl Message) -> io::Result<T> {
        let mut answer = self.call(method, message).await?;
        let first = answer.next().await?.ok_or_else(|| failed(format!("{method}: the answer is empty")))?;
        // What went wrong after it is said at the end.
        answer.next::<T>().await?;
        Ok(first)
    }
}

fn refusal(headers: &HeaderMap) -> io::Result<()> {
    let text = |name| headers.get(name).and_then(|value: &http::HeaderValue| value.to_str().ok());
    match text("grpc-status") {
        None | Some("0") => Ok(()),
        Some(code) => {
            let kind = if code == NOT_FOUND { io::ErrorKind::NotFound } else { io::ErrorKind::Other };
            let message = text("grpc-message").unwrap_or("no reason given");
            Err(io::Error::new(kind, format!("{message} (code {code})")))
        }
    }
}

impl Answer {
    /// The next message, or `None` after the last one.
    pub(super) async fn next<T: Message + Default>(&mut self) -> io::Result<Option<T>> {
        loop {
            if let Some(mut head) = self.buffer.first_chunk::<5>().copied() {
                let compressed = std::mem::take(&mut head[0]);
                let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
                if compressed != 0 || length > LIMIT {
                    return Err(failed(format!("an answer of {length} bytes, compression {compressed}")));
                }
                if self.buffer.len() >= length + 5 {
                    self.buffer.advance(5);
                    return T::decode(self.buffer.split_to(length)).map(Some).map_err(failed);
                }
            }
            let more = async { self.body.data().await.transpose() };
            match patiently(more).await? {
                Some(bytes) => {
                    self.buffer.extend_from_slice(&bytes);
                    self.body.flow_control().release_capacity(bytes.len()).map_err(failed)?;
                }
                None => {
                    let trailers = patiently(self.body.trailers()).await?;
                    let trailers = trailers.unwrap_or_default();
                    if !trailers.contains_key("grpc-status") {
                        return Err(failed("the answer has no status"));
                    }
                    refusal(&trailers)?;
                    return if self.buffer.is_empty() { Ok(None) } else { Err(failed("the answer was cut off")) };
                }
            }
        }
    }
}
