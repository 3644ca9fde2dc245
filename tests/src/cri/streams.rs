//! The streams of exec, attach and port-forward: one WebSocket with a channel for each.

use std::collections::HashMap;
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use k8s_cri::v1 as api;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::http::HeaderValue;

use super::Node;

/// How long anything on a stream may take to come.
const PATIENCE: Duration = Duration::from_secs(60);

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const STATUS: u8 = 3;
const RESIZE: u8 = 4;

/// A session, with what has come so far.
pub struct Stream<'a> {
    node: &'a Node,
    socket: WebSocketStream<TcpStream>,
    come: HashMap<u8, Vec<u8>>,
    ended: bool,
}

impl std::fmt::Debug for Stream<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stream").field("come", &self.come).finish_non_exhaustive()
    }
}

impl Node {
    fn open(&self, url: &str) -> Stream<'_> {
        let address = url.strip_prefix("http://").expect("an address of the streaming server");
        let host = address.split('/').next().expect("it has a host").to_owned();
        let mut request = format!("ws://{address}").into_client_request().expect("an address");
        request.headers_mut().insert("Sec-WebSocket-Protocol", HeaderValue::from_static("v4.channel.k8s.io"));
        let socket = self.client.runtime.block_on(async {
            let tcp = TcpStream::connect(host).await.expect("connect to the streaming server");
            tokio_tungstenite::client_async(request, tcp).await.expect("open a stream").0
        });
        Stream { node: self, socket, come: HashMap::new(), ended: false }
    }

    /// Executes a command with streams.
    ///
    /// # Panics
    /// When that is refused.
    #[track_caller]
    pub fn exec_stream(&self, id: &str, command: &[&str], tty: bool) -> Stream<'_> {
        let request = api::ExecRequest {
            container_id: id.into(),
            cmd: command.iter().map(|word| (*word).to_owned()).collect(),
            tty,
            stdin: true,
            stdout: true,
            stderr: !tty,
        };
        self.open(&self.client.exec(request).expect("exec").url)
    }

    /// Attaches to a container's first process.
    ///
    /// # Panics
    /// When that is refused.
    #[track_caller]
    pub fn attach_stream(&self, id: &str, stdin: bool, tty: bool) -> Stream<'_> {
        let request = api::AttachRequest { container_id: id.into(), stdin, tty, stdout: true, stderr: !tty };
        self.open(&self.client.attach(request).expect("attach").url)
    }

    /// Forwards a port of a pod.
    ///
    /// # Panics
    /// When that is refused.
    #[track_caller]
    pub fn port_forward_stream(&self, pod: &str, port: u16) -> Stream<'_> {
        let request = api::PortForwardRequest { pod_sandbox_id: pod.into(), port: vec![port.into()] };
        let url = self.client.port_forward(request).expect("forward a port").url;
        let mut stream = self.open(&format!("{url}?port={port}"));
        // Each channel begins with its port.
        stream.wait(STDIN, |bytes| bytes.len() >= 2);
        assert_eq!(stream.come.remove(&STDIN), Some(port.to_le_bytes().to_vec()));
        stream
    }
}

impl Stream<'_> {
    fn send(&mut self, channel: u8, bytes: &[u8]) {
        let message = [&[channel], bytes].concat();
        self.node.client.runtime.block_on(self.socket.send(Message::binary(message))).expect("send");
    }

    /// Writes to standard input, or to the port.
    ///
    /// # Panics
    /// When the stream has ended.
    pub fn write(&mut self, text: &str) {
        self.send(STDIN, text.as_bytes());
    }

    /// Changes the size of the terminal.
    ///
    /// # Panics
    /// When the stream has ended.
    pub fn resize(&mut self, columns: u16, rows: u16) {
        self.send(RESIZE, format!("{{\"Width\":{columns},\"Height\":{rows}}}").as_bytes());
    }

    #[track_caller]
    fn wait(&mut self, channel: u8, mut enough: impl FnMut(&[u8]) -> bool) {
        while !enough(self.come.get(&channel).map_or(&[], Vec::as_slice)) && !self.ended {
            let next = async { tokio::time::timeout(PATIENCE, self.socket.next()).await };
            match self.node.client.runtime.block_on(next) {
                Ok(Some(Ok(Message::Binary(bytes)))) => {
                    let (channel, bytes) = bytes.split_first().expect("a message names its channel");
                    self.come.entry(*channel).or_default().extend(bytes);
                }
                Ok(Some(Ok(Message::Close(_)) | Err(_)) | None) => self.ended = true,
                Ok(Some(Ok(_))) => {}
                Err(_) => panic!("nothing comes: {self:?}"),
            }
        }
    }

    /// Waits until standard output holds a text, and returns all of it.
    ///
    /// # Panics
    /// When it does not come.
    #[track_caller]
    pub fn read_until(&mut self, text: &str) -> String {
        self.wait(STDOUT, |bytes| String::from_utf8_lossy(bytes).contains(text));
        let all = self.text(STDOUT);
        assert!(all.contains(text), "{text:?} does not come, but: {self:?}");
        all
    }

    /// Waits until a forwarded port has said a text.
    ///
    /// # Panics
    /// When it does not.
    #[track_caller]
    pub fn hear(&mut self, text: &str) {
        self.wait(STDIN, |bytes| String::from_utf8_lossy(bytes).contains(text));
        assert!(self.text(STDIN).contains(text), "{text:?} does not come, but: {self:?}");
    }

    fn text(&self, channel: u8) -> String {
        self.come.get(&channel).map(|bytes| String::from_utf8_lossy(bytes).into_owned()).unwrap_or_default()
    }

    /// Waits for the end of the command: its exit code, standard output and standard error.
    ///
    /// # Panics
    /// When it does not end.
    #[track_caller]
    pub fn finish(mut self) -> (i32, String, String) {
        self.wait(STATUS, |bytes| serde_json::from_slice::<Value>(bytes).is_ok());
        let status: Value = serde_json::from_str(&self.text(STATUS)).unwrap_or_else(|_| panic!("no status: {self:?}"));
        let code = match status["status"].as_str() {
            Some("Success") => 0,
            _ => {
                let causes = status.pointer("/details/causes").and_then(Value::as_array);
                let code = causes.into_iter().flatten().find(|cause| cause["reason"] == "ExitCode");
                let code = code.and_then(|cause| cause["message"].as_str()?.parse().ok());
                code.unwrap_or_else(|| panic!("no exit code: {status}"))
            }
        };
        (code, self.text(STDOUT), self.text(STDERR))
    }
}
