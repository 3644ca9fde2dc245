//! What a kubelet and Prometheus ask for: small answers to GET, one after the other.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

/// How long one who asks may take for all of it: nobody else is answered meanwhile.
const PATIENCE: Duration = Duration::from_secs(2);

/// The most that is read of a request, in bytes.
const LIMIT: usize = 8 << 10;

/// An answer.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    /// HTTP's code.
    pub(crate) code: u16,
    /// The media type.
    pub(crate) kind: &'static str,
    /// The body.
    pub(crate) text: String,
}

impl Answer {
    /// Plain text.
    pub(crate) fn plain(code: u16, text: impl Into<String>) -> Self {
        Self { code, kind: "text/plain; charset=utf-8", text: text.into() }
    }
}

/// Answers everybody, for ever.
pub(crate) fn serve(listener: &TcpListener, answer: impl Fn(&str) -> Answer) {
    for stream in listener.incoming() {
        match stream {
            Ok(stream) => {
                if let Err(e) = one(stream, &answer) {
                    log::debug!("a request: {e}");
                }
            }
            Err(e) => {
                log::warn!("accept a connection: {e}");
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    }
}

fn one(mut stream: TcpStream, answer: &impl Fn(&str) -> Answer) -> io::Result<()> {
    stream.set_write_timeout(Some(PATIENCE))?;
    let head = read_head(&mut stream)?;
    let mut words = head.lines().next().unwrap_or_default().split_ascii_whitespace();
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let path = target.split('?').next().unwrap_or_default();
    let reply = match method {
        "GET" | "HEAD" => answer(path),
        _ => Answer::plain(405, "only GET\n"),
    };
    let body = if method == "HEAD" { "" } else { &reply.text };
    let text = format!(
        "HTTP/1.1 {} {}\r\nContent-Type: {}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        reply.code,
        reason(reply.code),
        reply.kind,
        reply.text.len()
    );
    stream.write_all(text.as_bytes())
}

fn reason(code: u16) -> &'static str {
    match code {
        200 => "OK",
        404 => "Not Found",
        405 => "Method Not Allowed",
        _ => "Service Unavailable",
    }
}

fn read_head(stream: &mut TcpStream) -> io::Result<String> {
    let end = Instant::now() + PATIENCE;
    let mut head = Vec::new();
    let mut buffer = [0; 1024];
    while !head.windows(4).any(|four| four == b"\r\n\r\n") {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() || head.len() > LIMIT {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the request has no end"));
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut buffer)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => head.extend_from_slice(&buffer[..count]),
        }
    }
    String::from_utf8(head).map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "the request is no text"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(request: &[u8]) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let server = std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let _ = one(stream, &|path: &str| match path {
                "/x" => Answer::plain(200, "here"),
                _ => Answer::plain(404, "none"),
            });
        });
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(request).unwrap();
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut text = String::new();
        let _ = stream.read_to_string(&mut text);
        server.join().unwrap();
        text
    }

    #[test]
    fn requests_are_answered_and_what_is_none_is_not() {
        let text = ask(b"GET /x?y HTTP/1.1\r\nHost: a\r\n\r\n");
        assert!(text.starts_with("HTTP/1.1 200 OK\r\n") && text.ends_with("\r\n\r\nhere"), "{text}");
        let text = ask(b"HEAD /x HTTP/1.1\r\n\r\n");
        assert!(text.contains("Content-Length: 4") && text.ends_with("\r\n\r\n"), "{text}");
        assert!(ask(b"GET /y HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 404 "));
        assert!(ask(b"POST /x HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 405 "));
        for request in [&b""[..], b"GET /x", b"\xff\xfe\r\n\r\n", &[b'a'; 20_000]] {
            assert_eq!(ask(request), "");
        }
    }
}
