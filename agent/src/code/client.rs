//! HTTP requests to a Jupyter server.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// The largest answer, in bytes.
const LIMIT: usize = 16 << 20;

/// Where a Jupyter server is, and what it wants to hear.
#[derive(Clone, Debug)]
pub struct Server {
    host: String,
    port: u16,
    prefix: String,
    token: String,
}

/// Why it did not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be reached.
    #[error("reach {0}: {1}")]
    Unreachable(String, io::Error),
    /// It said something else.
    #[error("{0}")]
    Refused(String),
}

fn refused(error: impl std::fmt::Display) -> Error {
    Error::Refused(error.to_string())
}

impl Server {
    /// Of a URL: `http://HOST[:PORT][/PREFIX]`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn new(url: &str, token: &str) -> Result<Self, String> {
        let rest = match (url.strip_prefix("http://"), url.strip_prefix("https://")) {
            (Some(rest), _) => rest,
            (_, Some(_)) => {
                return Err(format!("{url}: Jupyter over TLS is not supported: it is reached on the loopback"));
            }
            _ => return Err(format!("{url}: it must begin with http://")),
        };
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let (host, port) = match authority.rsplit_once(':').filter(|(host, _)| !host.ends_with(':')) {
            Some((host, port)) => (host, port.parse().map_err(|_| format!("{url}: {port:?} is no port"))?),
            None => (authority, 80),
        };
        let host = host.trim_start_matches('[').trim_end_matches(']');
        if host.is_empty() {
            return Err(format!("{url}: it names no host"));
        }
        let prefix = path.trim_matches('/');
        let prefix = if prefix.is_empty() { String::new() } else { format!("/{prefix}") };
        Ok(Self { host: host.to_owned(), port, prefix, token: token.to_owned() })
    }

    fn address(&self) -> String {
        format!("{}:{}", self.host, self.port)
    }

    /// A connection to it.
    ///
    /// # Errors
    /// [`Error::Unreachable`].
    pub async fn connect(&self) -> Result<TcpStream, Error> {
        let unreachable = |e| Error::Unreachable(self.address(), e);
        let addresses = crate::resolve::addresses(&self.host).await.map_err(unreachable)?;
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        for address in addresses {
            match tokio::time::timeout(PATIENCE, TcpStream::connect(SocketAddr::new(address, self.port))).await {
                Ok(Ok(stream)) => {
                    let _ = stream.set_nodelay(true);
                    return Ok(stream);
                }
                Ok(Err(e)) => last = e,
                Err(_) => last = io::ErrorKind::TimedOut.into(),
            }
        }
        Err(unreachable(last))
    }

    /// The path of an operation, with the server's own before it.
    pub fn path(&self, path: &str) -> String {
        format!("{}{path}", self.prefix)
    }

    /// The request that opens a WebSocket.
    pub fn websocket(&self, path: &str) -> String {
        format!("ws://{}{}", self.address(), self.path(path))
    }

    /// What its requests have in their `Authorization` header.
    pub fn authorization(&self) -> String {
        format!("Token {}", self.token)
    }

    /// Asks it. An answer without a body is `null`.
    ///
    /// # Errors
    /// When it cannot be reached, or answers with another status than those.
    pub async fn ask(
        &self,
        method: Method,
        path: &str,
        body: Option<Value>,
        good: &[StatusCode],
    ) -> Result<Value, Error> {
        let what = format!("{method} {path}");
        let answer = tokio::time::timeout(PATIENCE, self.exchange(method, path, body)).await;
        let (status, bytes) = answer.map_err(|_| refused(format_args!("{what}: there is no answer")))??;
        if !good.contains(&status) {
            let text = String::from_utf8_lossy(&bytes);
            let text: String = text.chars().take(500).collect();
            return Err(refused(format_args!("{what}: status {status}: {text}")));
        }
        if bytes.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_slice(&bytes).map_err(|e| refused(format_args!("{what}: {e}")))
    }

    async fn exchange(&self, method: Method, path: &str, body: Option<Value>) -> Result<(StatusCode, Bytes), Error> {
        let stream = self.connect().await?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(refused)?;
        let connection = tokio::spawn(connection);
        let mut request = Request::builder()
            .method(method)
            .uri(self.path(path))
            .header(header::HOST, self.address())
            .header(header::CONNECTION, "close")
            .header(header::CONTENT_TYPE, "application/json");
        if !self.token.is_empty() {
            request = request.header(header::AUTHORIZATION, self.authorization());
        }
        let body = body.map(|body| body.to_string()).unwrap_or_default();
        let request = request.body(Full::new(Bytes::from(body))).map_err(refused)?;
        let response = sender.send_request(request).await.map_err(refused)?;
        let status = response.status();
        let bytes = Limited::new(response.into_body(), LIMIT).collect().await.map_err(refused)?.to_bytes();
        connection.abort();
        Ok((status, bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_is_taken_apart() {
        let server = Server::new("http://127.0.0.1:44771/base/", "t").unwrap();
        assert_eq!((server.address().as_str(), server.path("/api").as_str()), ("127.0.0.1:44771", "/base/api"));
        assert_eq!(Server::new("http://localhost", "").unwrap().address(), "localhost:80");
        for url in ["127.0.0.1:1", "https://x", "http://", "http://x:y"] {
            assert!(Server::new(url, "").is_err(), "{url}");
        }
    }
}
