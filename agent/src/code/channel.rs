//! The connection to a kernel's channels (Jupyter messaging protocol 5.3, over a WebSocket).

use std::time::{Duration, Instant};

use futures_util::{FutureExt, SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;

use super::Told;
use super::client::{Error, Server};
use crate::ids;

/// How long the rest of an execution may take once the kernel is idle again.
const REST: Duration = Duration::from_secs(5);

/// How long a new kernel is waited with: for what it publishes once it has replied, and for anything at all.
const SETTLE: Duration = Duration::from_millis(500);
const PATIENCE: Duration = Duration::from_secs(10);

/// How long a connection that nobody looks at is believed in.
const FRESH: Duration = Duration::from_secs(20);

/// The largest message, in bytes.
const LIMIT: usize = 256 << 20;

/// See the module.
#[derive(Debug)]
pub(super) struct Channel {
    socket: WebSocketStream<TcpStream>,
    session: String,
    quiet: bool,
    used: Instant,
}

/// One execution.
#[derive(Debug)]
pub(super) struct Execution {
    id: String,
    idle: bool,
    replied: bool,
    failed: bool,
}

impl Channel {
    pub(super) async fn open(server: &Server, kernel: &str) -> Result<Self, Error> {
        let session = ids::hex();
        let path = format!("/api/kernels/{kernel}/channels?session_id={session}");
        let refused = |e: &dyn std::fmt::Display| Error::Refused(format!("connect to kernel {kernel}: {e}"));
        let mut request = server.websocket(&path).into_client_request().map_err(|e| refused(&e))?;
        let authorization = server.authorization().parse().map_err(|_| refused(&"the token cannot be sent"))?;
        request.headers_mut().insert(http::header::AUTHORIZATION, authorization);
        let stream = server.connect().await?;
        let config = WebSocketConfig::default().max_message_size(Some(LIMIT)).max_frame_size(Some(LIMIT));
        let opened = tokio_tungstenite::client_async_with_config(request, stream, Some(config)).await;
        let (socket, _) = opened.map_err(|e| refused(&e))?;
        let mut channel = Self { socket, session, quiet: true, used: Instant::now() };
        channel.meet().await?;
        Ok(channel)
    }

    /// Waits until the kernel is heard on both of its channels. One that has just been started, or started again, may answer
    /// before the server listens to what it publishes, and an execution would then never be seen to end.
    async fn meet(&mut self) -> Result<(), Error> {
        loop {
            let id = self.send("kernel_info_request", json!({})).await?;
            let (mut replied, mut published) = (false, false);
            while !(replied && published) {
                // Without a word it may be busy, or what was sent is lost.
                let patience = if replied { SETTLE } else { PATIENCE };
                let text = match tokio::time::timeout(patience, self.socket.next()).await {
                    Err(_) => break,
                    Ok(Some(Ok(Message::Text(text)))) => text,
                    Ok(Some(Ok(Message::Close(_))) | None) => return Err(lost(&"it was closed")),
                    Ok(Some(Ok(_))) => continue,
                    Ok(Some(Err(e))) => return Err(lost(&e)),
                };
                let Ok(message) = serde_json::from_str::<Value>(&text) else { continue };
                let kind = message["header"]["msg_type"].as_str().unwrap_or_default();
                if kind == "status" && message["content"]["execution_state"] == "dead" {
                    return Err(Error::Refused("the kernel has died".into()));
                }
                if message["parent_header"]["msg_id"].as_str() == Some(id.as_str()) {
                    replied |= kind == "kernel_info_reply";
                    published |= kind == "status" && message["content"]["execution_state"] == "idle";
                }
            }
            if replied && published {
                return Ok(());
            }
        }
    }

    /// Sends a message on the shell channel. Returns its id.
    async fn send(&mut self, kind: &str, content: Value) -> Result<String, Error> {
        let id = ids::uuid();
        let message = json!({
            "header": {
                "msg_id": id,
                "username": "runx",
                "session": self.session,
                "msg_type": kind,
                "version": "5.3",
                "date": crate::api::rfc3339(std::time::SystemTime::now()),
            },
            "parent_header": {},
            "metadata": {},
            "channel": "shell",
            "buffers": [],
            "content": content,
        });
        self.socket.send(Message::text(message.to_string())).await.map_err(|e| lost(&e))?;
        Ok(id)
    }

    /// Whether it can be used once more: it was read to the end, not long ago (nobody answers the server's pings meanwhile), and
    /// nothing has come since that says that server or kernel are gone.
    pub(super) fn is_usable(&mut self) -> bool {
        if !self.quiet || self.used.elapsed() > FRESH {
            return false;
        }
        // What came since the last time belongs to nobody.
        loop {
            match self.socket.next().now_or_never() {
                None => return true,
                Some(Some(Ok(Message::Text(text)))) if !text.contains("restarting") && !text.contains("\"dead\"") => {}
                Some(Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Binary(_)))) => {}
                Some(_) => return false,
            }
        }
    }

    /// Sends code to be executed.
    pub(super) async fn request(&mut self, code: &str, silent: bool) -> Result<Execution, Error> {
        let content = json!({
            "code": code,
            "silent": silent,
            "store_history": !silent,
            "user_expressions": {},
            "allow_stdin": false,
            "stop_on_error": true,
        });
        self.quiet = false;
        let id = self.send("execute_request", content).await?;
        Ok(Execution { id, idle: false, replied: false, failed: false })
    }

    /// Waits for what comes next of an execution.
    pub(super) async fn next(&mut self, execution: &mut Execution) -> Result<Vec<Told>, Error> {
        loop {
            let message = if execution.idle {
                match tokio::time::timeout(REST, self.socket.next()).await {
                    Ok(message) => message,
                    // It has done all that it will: the reply is lost.
                    Err(_) => return Ok(vec![Told::Done]),
                }
            } else {
                self.socket.next().await
            };
            let text = match message {
                Some(Ok(Message::Text(text))) => text,
                Some(Ok(Message::Close(_))) | None => return Err(lost(&"it was closed")),
                Some(Ok(_)) => continue,
                Some(Err(e)) => return Err(lost(&e)),
            };
            let Ok(message) = serde_json::from_str::<Value>(&text) else { continue };
            let told = take(&message, execution)?;
            if execution.idle && execution.replied {
                self.quiet = true;
                self.used = Instant::now();
                return Ok(told.into_iter().chain([Told::Done]).collect());
            }
            if !told.is_empty() {
                return Ok(told);
            }
        }
    }
}

fn lost(error: &dyn std::fmt::Display) -> Error {
    Error::Refused(format!("the connection to the kernel was lost: {error}"))
}

/// What a message means for an execution.
fn take(message: &Value, execution: &mut Execution) -> Result<Vec<Told>, Error> {
    let kind = message["header"]["msg_type"].as_str().or(message["msg_type"].as_str()).unwrap_or_default();
    let content = &message["content"];
    let state = content["execution_state"].as_str().unwrap_or_default();
    if kind == "status" && matches!(state, "restarting" | "dead" | "autorestarting") {
        return Err(Error::Refused(format!("the kernel has died while it executed this ({state})")));
    }
    if message["parent_header"]["msg_id"].as_str() != Some(execution.id.as_str()) {
        return Ok(Vec::new());
    }
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let failure = || {
        let lines = content["traceback"].as_array().map(|lines| lines.iter().map(text).collect()).unwrap_or_default();
        Told::Error(text(&content["ename"]), text(&content["evalue"]), lines)
    };
    Ok(match kind {
        "stream" if content["name"] == "stderr" => vec![Told::Stderr(text(&content["text"]))],
        "stream" => vec![Told::Stdout(text(&content["text"]))],
        "execute_result" => {
            let count = content["execution_count"].as_u64();
            count.map(Told::Count).into_iter().chain([Told::Result(renamed(&content["data"]), true)]).collect()
        }
        "display_data" => vec![Told::Result(renamed(&content["data"]), false)],
        "error" => {
            execution.failed = true;
            vec![failure()]
        }
        "status" if state == "idle" => {
            execution.idle = true;
            Vec::new()
        }
        "execute_reply" => {
            execution.replied = true;
            // An abort is told in the reply only.
            let status = content["status"].as_str().unwrap_or_default();
            match status {
                "aborted" | "abort" if !execution.failed => {
                    execution.failed = true;
                    vec![Told::Error("Aborted".into(), "the execution was aborted".into(), Vec::new())]
                }
                "error" if !execution.failed && !content["ename"].is_null() => {
                    execution.failed = true;
                    vec![failure()]
                }
                _ => Vec::new(),
            }
        }
        _ => Vec::new(),
    })
}

/// The data by media types, with the plain text under the name that the protocol has for it.
fn renamed(data: &Value) -> Value {
    let Value::Object(map) = data else { return json!({}) };
    let named =
        map.iter().map(|(key, value)| (if key == "text/plain" { "text" } else { key }.to_owned(), value.clone()));
    Value::Object(named.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn execution() -> Execution {
        Execution { id: "me".into(), idle: false, replied: false, failed: false }
    }

    fn message(kind: &str, parent: &str, content: Value) -> Value {
        json!({"header": {"msg_type": kind}, "parent_header": {"msg_id": parent}, "content": content})
    }

    #[test]
    fn only_answers_to_this_request_count() {
        let mut execution = execution();
        let idle = json!({"execution_state": "idle"});
        assert_eq!(take(&message("status", "other", idle.clone()), &mut execution).unwrap(), vec![]);
        assert!(!execution.idle);
        assert_eq!(take(&message("stream", "other", json!({"text": "x"})), &mut execution).unwrap(), vec![]);
        take(&message("status", "me", idle), &mut execution).unwrap();
        assert!(execution.idle && !execution.replied);
    }

    #[test]
    fn results_and_displays_are_told() {
        let data = json!({"text/plain": "4", "image/png": "…"});
        let told =
            take(&message("execute_result", "me", json!({"execution_count": 2, "data": data})), &mut execution());
        assert_eq!(told.unwrap(), [Told::Count(2), Told::Result(json!({"text": "4", "image/png": "…"}), true)]);
        let told =
            take(&message("display_data", "me", json!({"data": {"text/html": "<b>"}})), &mut execution()).unwrap();
        assert_eq!(told, [Told::Result(json!({"text/html": "<b>"}), false)]);
    }

    #[test]
    fn a_failure_is_told_once_and_a_death_is_one() {
        let mut one = execution();
        let content = json!({"status": "error", "ename": "E", "evalue": "v", "traceback": ["t"]});
        let failed = Told::Error("E".into(), "v".into(), vec!["t".into()]);
        assert_eq!(take(&message("error", "me", content.clone()), &mut one).unwrap(), [failed]);
        assert_eq!(take(&message("execute_reply", "me", content), &mut one).unwrap(), []);
        let died = take(&message("status", "", json!({"execution_state": "restarting"})), &mut execution());
        assert!(died.unwrap_err().to_string().contains("died"));
    }
}
