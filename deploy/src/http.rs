//! What a kubelet and Prometheus ask for: small answers to GET. Nobody keeps others waiting.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long one who asks may take for all of it.
const PATIENCE: Duration = Duration::from_secs(2);

/// How many requests from one address are answered at the same time, and from all of them: more are turned away.
const AT_ONCE: (usize, usize) = (4, 64);

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

/// Who is being answered.
type Busy = Arc<Mutex<HashMap<IpAddr, usize>>>;

/// One of them.
struct Turn {
    busy: Busy,
    peer: IpAddr,
}

impl Turn {
    fn take(busy: &Busy, peer: IpAddr) -> Option<Self> {
        let mut all = busy.lock().unwrap_or_else(PoisonError::into_inner);
        let (of_one, of_all) = (all.get(&peer).copied().unwrap_or(0), all.values().sum::<usize>());
        if of_one >= AT_ONCE.0 || of_all >= AT_ONCE.1 {
            return None;
        }
        all.insert(peer, of_one + 1);
        Some(Self { busy: busy.clone(), peer })
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut all = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        match all.get_mut(&self.peer) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(all.remove(&self.peer)),
        }
    }
}

/// Answers everybody, for ever.
pub(crate) fn serve(listener: &TcpListener, answer: impl Fn(&str) -> Answer + Send + Sync + 'static) {
    let (answer, busy) = (Arc::new(answer), Busy::default());
    loop {
        let (stream, peer) = match listener.accept() {
            Ok(found) => found,
            Err(e) => {
                log::warn!("accept a connection: {e}");
                std::thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        let Some(turn) = Turn::take(&busy, peer.ip()) else { continue };
        let answer = answer.clone();
        let work = move || {
            let _turn = turn;
            if let Err(e) = one(stream, &*answer) {
                log::debug!("a request: {e}");
            }
        };
        if let Err(e) = std::thread::Builder::new().name("request".into()).spawn(work) {
            log::warn!("start a thread: {e}");
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
    fn who_does_not_ask_keeps_nobody_waiting() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || serve(&listener, |_| Answer::plain(200, "here")));
        let silent: Vec<TcpStream> = (1..AT_ONCE.0).map(|_| TcpStream::connect(address).unwrap()).collect();
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        assert!(text.ends_with("here"), "{text}");
        // None of them had to be given up for that.
        for mut stream in silent {
            stream.set_nonblocking(true).unwrap();
            assert_eq!(stream.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        }
        let busy = Busy::default();
        let turns: Vec<_> = (0..=AT_ONCE.0).map(|_| Turn::take(&busy, address.ip())).collect();
        assert!(turns.iter().filter(|turn| turn.is_some()).count() == AT_ONCE.0);
        assert!(Turn::take(&busy, "10.0.0.1".parse().unwrap()).is_some(), "others are answered still");
        drop(turns);
        assert!(busy.lock().unwrap().is_empty());
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
