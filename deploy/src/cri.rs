//! Three calls of CRI, over containerd's socket: gRPC, that is HTTP/2 with a five-byte head before each message. HTTP/2 is a
//! library's; a runtime for it is not needed, since there is one call at a time: what waits, waits in poll(2).

use std::collections::{BTreeMap, HashMap};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use bytes::{Buf, Bytes, BytesMut};
use h2::client::{Connection, SendRequest};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use prost::Message;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// How long a call may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// The largest answer that is accepted, in bytes: a list of all pods of a node is far below.
const LIMIT: usize = 16 << 20;

#[derive(Clone, PartialEq, Message)]
struct Empty {}

#[derive(Clone, PartialEq, Message)]
struct VersionResponse {
    #[prost(string, tag = "2")]
    runtime_name: String,
    #[prost(string, tag = "3")]
    runtime_version: String,
}

#[derive(Clone, PartialEq, Message)]
struct StatusRequest {
    #[prost(bool, tag = "1")]
    verbose: bool,
}

#[derive(Clone, PartialEq, Message)]
struct StatusResponse {
    #[prost(message, optional, tag = "1")]
    status: Option<RuntimeStatus>,
    #[prost(map = "string, string", tag = "2")]
    info: HashMap<String, String>,
    #[prost(message, repeated, tag = "3")]
    runtime_handlers: Vec<RuntimeHandler>,
}

#[derive(Clone, PartialEq, Message)]
struct RuntimeStatus {
    #[prost(message, repeated, tag = "1")]
    conditions: Vec<RuntimeCondition>,
}

#[derive(Clone, PartialEq, Message)]
struct RuntimeCondition {
    #[prost(string, tag = "1")]
    kind: String,
    #[prost(bool, tag = "2")]
    status: bool,
    #[prost(string, tag = "3")]
    reason: String,
    #[prost(string, tag = "4")]
    message: String,
}

#[derive(Clone, PartialEq, Message)]
struct RuntimeHandler {
    #[prost(string, tag = "1")]
    name: String,
}

#[derive(Clone, PartialEq, Message)]
struct ListPodSandboxResponse {
    #[prost(message, repeated, tag = "1")]
    items: Vec<PodSandbox>,
}

#[derive(Clone, PartialEq, Message)]
struct PodSandbox {
    #[prost(string, tag = "1")]
    id: String,
    #[prost(message, optional, tag = "2")]
    metadata: Option<PodSandboxMetadata>,
    /// 0 is ready.
    #[prost(int32, tag = "3")]
    state: i32,
    #[prost(string, tag = "7")]
    runtime_handler: String,
}

#[derive(Clone, PartialEq, Message)]
struct PodSandboxMetadata {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    uid: String,
    #[prost(string, tag = "3")]
    namespace: String,
    #[prost(uint32, tag = "4")]
    attempt: u32,
}

/// Pods of a handler, as `NAMESPACE/NAME`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Pods {
    /// Those that run.
    pub(crate) running: Vec<String>,
    /// Those that do not, and that the kubelet has not forgotten: after a restart of the node, or when their first process
    /// has died, it makes them anew.
    pub(crate) ended: Vec<String>,
}

/// What containerd says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Status {
    /// Name and version.
    pub(crate) version: String,
    /// Why it cannot have pods, if it cannot.
    pub(crate) unready: Option<String>,
    /// The handlers that it serves.
    pub(crate) handlers: Vec<String>,
}

/// Asks containerd for its state.
///
/// # Errors
/// When nobody answers, or CRI is not there.
pub(crate) fn status(socket: &Path) -> io::Result<Status> {
    let mut client = Client::connect(socket)?;
    let version: VersionResponse = client.call("Version", &Empty {})?;
    let status: StatusResponse = client.call("Status", &StatusRequest { verbose: true })?;
    let conditions = status.status.unwrap_or_default().conditions;
    let unready = match conditions.iter().find(|condition| condition.kind == "RuntimeReady") {
        Some(condition) if condition.status => None,
        Some(condition) => Some(format!("{}: {}", condition.reason, condition.message)),
        None => Some("it says nothing of RuntimeReady".to_owned()),
    };
    Ok(Status {
        version: format!("{} {}", version.runtime_name, version.runtime_version),
        unready,
        handlers: handlers(status.runtime_handlers, &status.info),
    })
}

/// Before containerd 2.0 there is no list, but its configuration.
fn handlers(list: Vec<RuntimeHandler>, info: &HashMap<String, String>) -> Vec<String> {
    let mut names: Vec<String> = list.into_iter().map(|handler| handler.name).filter(|name| !name.is_empty()).collect();
    if names.is_empty() {
        let config: Value = info.get("config").and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default();
        let runtimes = config.pointer("/containerd/runtimes").and_then(Value::as_object);
        names.extend(runtimes.into_iter().flatten().map(|(name, _)| name.clone()));
    }
    names.sort();
    names
}

/// The pods of a handler.
///
/// # Errors
/// When nobody answers.
pub(crate) fn pods(socket: &Path, handler: &str) -> io::Result<Pods> {
    let list: ListPodSandboxResponse = Client::connect(socket)?.call("ListPodSandbox", &Empty {})?;
    Ok(pods_of(list.items, handler))
}

/// Of each pod the newest attempt counts: older ones are only not removed yet.
fn pods_of(items: Vec<PodSandbox>, handler: &str) -> Pods {
    let mut newest: BTreeMap<(String, String), (u32, String, PodSandbox)> = BTreeMap::new();
    for pod in items {
        let (key, attempt, name) = match &pod.metadata {
            Some(of) => ((of.namespace.clone(), of.uid.clone()), of.attempt, format!("{}/{}", of.namespace, of.name)),
            None => ((String::new(), pod.id.clone()), 0, pod.id.clone()),
        };
        let newer =
            |(known, _, other): &(u32, String, PodSandbox)| (*known, other.state != 0) > (attempt, pod.state != 0);
        if !newest.get(&key).is_some_and(newer) {
            newest.insert(key, (attempt, name, pod));
        }
    }
    let ours = newest.into_values().filter(|(_, _, pod)| pod.runtime_handler == handler);
    let (running, ended): (Vec<_>, Vec<_>) = ours.partition(|(_, _, pod)| pod.state == 0);
    let names = |list: Vec<(u32, String, PodSandbox)>| {
        let mut names: Vec<String> = list.into_iter().map(|(_, name, _)| name).collect();
        names.sort();
        names
    };
    Pods { running: names(running), ended: names(ended) }
}

/// A socket that never waits.
struct Socket {
    stream: UnixStream,
    /// Whether the last write would have had to.
    full: Arc<AtomicBool>,
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match (&self.stream).read(buffer.initialize_unfilled()) {
            Ok(count) => {
                buffer.advance(count);
                Poll::Ready(Ok(()))
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Poll::Pending,
            Err(e) => Poll::Ready(Err(e)),
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let done = (&self.stream).write(bytes);
        let full = done.as_ref().is_err_and(|e| e.kind() == io::ErrorKind::WouldBlock);
        self.full.store(full, Ordering::Relaxed);
        if full { Poll::Pending } else { Poll::Ready(done) }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.stream.shutdown(std::net::Shutdown::Write))
    }
}

/// Remembers that something became possible while it was looked at.
#[derive(Default)]
struct Woken(AtomicBool);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Polls until it is done; in between, waits until the socket can be read, or written if that was wanted.
fn drive<T>(
    socket: &UnixStream,
    full: &AtomicBool,
    deadline: Instant,
    mut work: impl FnMut(&mut Context<'_>) -> Poll<io::Result<T>>,
) -> io::Result<T> {
    let woken = Arc::new(Woken::default());
    let waker = Waker::from(woken.clone());
    loop {
        if let Poll::Ready(done) = work(&mut Context::from_waker(&waker)) {
            return done;
        }
        if woken.0.swap(false, Ordering::Relaxed) {
            continue;
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "there is no answer"));
        }
        let wanted =
            if full.load(Ordering::Relaxed) { PollFlags::POLLIN | PollFlags::POLLOUT } else { PollFlags::POLLIN };
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(socket.as_fd(), wanted)], timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

fn failed(what: impl std::fmt::Display) -> io::Error {
    io::Error::other(what.to_string())
}

/// A connection.
struct Client {
    socket: UnixStream,
    full: Arc<AtomicBool>,
    sender: SendRequest<Bytes>,
    connection: Connection<Socket, Bytes>,
}

impl Client {
    fn connect(path: &Path) -> io::Result<Self> {
        let socket = UnixStream::connect(path)?;
        socket.set_nonblocking(true)?;
        let full = Arc::<AtomicBool>::default();
        let stream = Socket { stream: socket.try_clone()?, full: full.clone() };
        let mut handshake = pin!(h2::client::Builder::new().enable_push(false).handshake::<_, Bytes>(stream));
        let deadline = Instant::now() + PATIENCE;
        let (sender, connection) =
            drive(&socket, &full, deadline, |context| handshake.as_mut().poll(context).map_err(failed))?;
        Ok(Self { socket, full, sender, connection })
    }

    fn call<T: Message + Default>(&mut self, method: &str, message: &impl Message) -> io::Result<T> {
        let Self { socket, full, sender, connection } = self;
        let deadline = Instant::now() + PATIENCE;
        let sender = sender.clone();
        let mut work = pin!(exchange(sender, method, message));
        let bytes = drive(socket, full, deadline, |context| {
            // It carries what the call waits for; that it ends shows there.
            let ended = Pin::new(&mut *connection).poll(context);
            match (work.as_mut().poll(context), ended) {
                (Poll::Pending, Poll::Ready(Ok(()))) => Poll::Ready(Err(failed("containerd closes the connection"))),
                (Poll::Pending, Poll::Ready(Err(e))) => Poll::Ready(Err(failed(e))),
                (done, _) => done,
            }
        })?;
        T::decode(bytes).map_err(failed)
    }
}

async fn exchange(sender: SendRequest<Bytes>, method: &str, message: &impl Message) -> io::Result<Bytes> {
    let request = http::Request::post(format!("http://localhost/runtime.v1.RuntimeService/{method}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())
        .map_err(failed)?;
    let encoded = message.encode_to_vec();
    let mut framed = vec![0];
    framed.extend_from_slice(&(encoded.len() as u32).to_be_bytes());
    framed.extend_from_slice(&encoded);
    let (response, mut stream) = sender.ready().await.map_err(failed)?.send_request(request, false).map_err(failed)?;
    stream.send_data(framed.into(), true).map_err(failed)?;
    let response = response.await.map_err(failed)?;
    if response.status() != http::StatusCode::OK {
        return Err(failed(format!("{method}: HTTP status {}", response.status())));
    }
    refusal(method, response.headers())?;
    let mut body = response.into_body();
    let mut answer = BytesMut::new();
    while let Some(bytes) = body.data().await {
        let bytes = bytes.map_err(failed)?;
        if answer.len() + bytes.len() > LIMIT {
            return Err(failed(format!("{method}: the answer is larger than {LIMIT} bytes")));
        }
        answer.extend_from_slice(&bytes);
        body.flow_control().release_capacity(bytes.len()).map_err(failed)?;
    }
    refusal(method, &body.trailers().await.map_err(failed)?.unwrap_or_default())?;
    if answer.len() < 5 || answer[0] != 0 {
        return Err(failed(format!("{method}: the answer is no message")));
    }
    answer.advance(1);
    let length = answer.get_u32() as usize;
    if answer.len() != length {
        return Err(failed(format!("{method}: the answer was cut off")));
    }
    Ok(answer.freeze())
}

fn refusal(method: &str, headers: &http::HeaderMap) -> io::Result<()> {
    let text = |name| headers.get(name).and_then(|value: &http::HeaderValue| value.to_str().ok());
    match text("grpc-status") {
        None | Some("0") => Ok(()),
        Some(code) => Err(failed(format!("{method}: {} (code {code})", text("grpc-message").unwrap_or("no reason")))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn handlers_are_listed_or_in_the_configuration() {
        let info = HashMap::from([(
            "config".to_owned(),
            r#"{"containerd": {"runtimes": {"runx": {}, "runc": {}}}}"#.to_owned(),
        )]);
        assert_eq!(handlers(Vec::new(), &info), ["runc", "runx"]);
        // The nameless one is the default.
        let list = ["", "runx", "kata"].map(|name| RuntimeHandler { name: name.into() });
        assert_eq!(handlers(list.into(), &info), ["kata", "runx"]);
        assert!(handlers(Vec::new(), &HashMap::new()).is_empty());
    }

    #[test]
    fn of_a_pod_the_newest_attempt_counts_also_when_it_does_not_run() {
        let pod = |name: &str, attempt, state, handler: &str| PodSandbox {
            id: format!("{name}{attempt}"),
            metadata: Some(PodSandboxMetadata { name: name.into(), uid: name.into(), namespace: "n".into(), attempt }),
            state,
            runtime_handler: handler.into(),
        };
        let list = vec![
            pod("again", 0, 1, "runx"),
            pod("again", 1, 0, "runx"),
            pod("waits", 1, 1, "runx"),
            pod("waits", 0, 1, "runx"),
            pod("moved", 0, 1, "runx"),
            pod("moved", 1, 0, "runc"),
            pod("plain", 0, 0, ""),
        ];
        let expected = Pods { running: vec!["n/again".into()], ended: vec!["n/waits".into()] };
        assert_eq!(pods_of(list.clone(), "runx"), expected);
        assert_eq!(pods_of(list.into_iter().rev().collect(), "runx"), expected);
    }

    #[test]
    fn who_does_not_answer_and_who_answers_something_else_are_errors() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        assert_eq!(status(&path).unwrap_err().kind(), io::ErrorKind::NotFound);
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").unwrap();
        });
        assert!(status(&path).is_err());
        server.join().unwrap();
    }
}
