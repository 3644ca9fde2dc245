//! Interactive shells: made and ended by requests, used over a WebSocket.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::Bytes;
use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade};
use axum::extract::{OriginalUri, Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tokio::time::{Instant, interval_at, timeout};

use super::App;
use super::body;
use super::error::{Refusal, Result};
use super::session;
use crate::api::query::Query;
use crate::process::interactive::{Hold, Interactive, Live};
use crate::process::ring::Source;

/// What the first byte of a binary message means.
const STDIN: u8 = 0x00;
const STDOUT: u8 = 0x01;
const STDERR: u8 = 0x02;
const REPLAY: u8 = 0x03;

/// The largest payload, in bytes.
const FRAME: usize = 32 << 10;

/// How often it is asked whether a client is there, how long it may be silent, and how long a message may take.
const PING: Duration = Duration::from_secs(30);
const SILENCE: Duration = Duration::from_secs(60);
const WRITE: Duration = Duration::from_secs(10);

/// The close code for whoever was taken over from.
const TAKEN_OVER: u16 = 4001;

/// `POST /pty`.
pub(super) async fn create(State(app): State<Arc<App>>, body: Bytes) -> Result<Response> {
    let fields = body::fields_or_none(&body)?;
    let cwd = session::beginning(&app, fields.text("cwd")?)?;
    let command = fields.text("command")?.filter(|command| !command.is_empty());
    if command.as_ref().is_some_and(|command| command.contains('\0')) {
        return Err(Refusal::body("a command must not contain a NUL byte"));
    }
    let shell = app.shells.create(cwd, command);
    Ok((StatusCode::CREATED, Json(json!({"session_id": shell.id}))).into_response())
}

fn find(app: &App, id: &str) -> Result<Arc<Interactive>> {
    app.shells.get(id).ok_or_else(|| Refusal::context(format!("pty session not found: {id}")))
}

/// `GET /pty/{id}`.
pub(super) async fn status(State(app): State<Arc<App>>, Path(id): Path<String>) -> Result<Response> {
    let status = find(&app, &id)?.status();
    Ok(Json(json!({
        "session_id": id,
        "running": status.running,
        "output_offset": status.output,
        "launch_attempted": status.attempted,
        "launch_failed": status.failed,
    }))
    .into_response())
}

/// `DELETE /pty/{id}`.
pub(super) async fn delete(State(app): State<Arc<App>>, Path(id): Path<String>) -> Result<Response> {
    if app.shells.close(&id) {
        Ok(StatusCode::OK.into_response())
    } else {
        find(&app, &id).map(|_| StatusCode::OK.into_response())
    }
}

/// How a client wants to use a shell.
#[derive(Clone, Copy, Debug)]
struct Wish {
    terminal: bool,
    since: u64,
    takeover: bool,
    viewer: bool,
}

/// `GET /pty/{id}/ws`.
pub(super) async fn attach(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
    OriginalUri(uri): OriginalUri,
    upgrade: std::result::Result<WebSocketUpgrade, axum::extract::ws::rejection::WebSocketUpgradeRejection>,
) -> Result<Response> {
    let shell = find(&app, &id)?;
    let query = Query::of(&uri);
    let wish = Wish {
        terminal: query.get("pty") != Some("0"),
        since: query.get("since").and_then(|text| text.parse().ok()).unwrap_or(0),
        takeover: query.get("takeover") == Some("1"),
        viewer: query.get("mode") == Some("viewer"),
    };
    if shell.is_held() && !wish.takeover && !wish.viewer {
        return Err(Refusal::new(StatusCode::CONFLICT, "ALREADY_CONNECTED", format!("pty session {id} is in use")));
    }
    let upgrade = upgrade.map_err(|e| Refusal::body(format!("a WebSocket is expected: {e}")))?;
    Ok(upgrade.max_message_size(1 << 20).on_upgrade(move |socket| async move {
        let mut client = Client { socket, offset: wish.since };
        if let Err(Gone) = serve(&mut client, &shell, wish).await {
            log::debug!("a client of pty session {} is gone", shell.id);
        }
    }))
}

/// The client is not there any more.
struct Gone;

struct Client {
    socket: WebSocket,
    offset: u64,
}

impl Client {
    async fn send(&mut self, message: Message) -> std::result::Result<(), Gone> {
        match timeout(WRITE, self.socket.send(message)).await {
            Ok(Ok(())) => Ok(()),
            _ => Err(Gone),
        }
    }

    async fn tell(&mut self, value: Value) -> std::result::Result<(), Gone> {
        self.send(Message::Text(value.to_string().into())).await
    }

    async fn complain(&mut self, code: &str, text: &str) -> std::result::Result<(), Gone> {
        self.tell(json!({"type": "error", "error": text, "code": code})).await
    }

    async fn close(&mut self, code: u16, reason: &'static str) -> std::result::Result<(), Gone> {
        let reason = Cow::Borrowed(reason).into_owned().into();
        self.send(Message::Close(Some(CloseFrame { code, reason }))).await
    }

    /// Sends the next part of what is new. Whether there was any.
    async fn catch_up(&mut self, shell: &Interactive) -> std::result::Result<bool, Gone> {
        match shell.with_ring(|ring| ring.next(self.offset, FRAME)) {
            Ok(None) => Ok(false),
            Ok(Some((source, bytes))) => {
                self.offset += bytes.len() as u64;
                let kind = if source == Source::Stdout { STDOUT } else { STDERR };
                self.send(frame(&[kind], &bytes)).await.map(|()| true)
            }
            // It was too slow: it is told where it goes on.
            Err(_) => self.replay(shell).await.map(|()| true),
        }
    }

    fn is_behind(&self, shell: &Interactive) -> bool {
        shell.with_ring(|ring| ring.end() > self.offset)
    }

    /// Sends all that is kept of what it has missed.
    async fn replay(&mut self, shell: &Interactive) -> std::result::Result<(), Gone> {
        let (from, bytes) = shell.with_ring(|ring| ring.since(self.offset));
        self.offset = from + bytes.len() as u64;
        if bytes.is_empty() {
            return Ok(());
        }
        let mut head = vec![REPLAY];
        head.extend_from_slice(&from.to_be_bytes());
        self.send(frame(&head, &bytes)).await
    }
}

fn frame(head: &[u8], bytes: &[u8]) -> Message {
    Message::Binary([head, bytes].concat().into())
}

async fn serve(client: &mut Client, shell: &Arc<Interactive>, wish: Wish) -> std::result::Result<(), Gone> {
    let hold = if wish.viewer {
        None
    } else {
        match shell.hold(wish.takeover).await {
            Some(hold) => Some(hold),
            None => {
                client.complain("ALREADY_CONNECTED", "another client is connected").await?;
                return client.close(1008, "ALREADY_CONNECTED").await;
            }
        }
    };
    let mut grown = shell.follow();
    let live = match shell.launch(wish.terminal) {
        Ok(live) => live,
        Err(e) => {
            client.complain("START_FAILED", &e.to_string()).await?;
            return client.close(1011, "START_FAILED").await;
        }
    };
    client.replay(shell).await?;
    let mode = if live.on_terminal() { "pty" } else { "pipe" };
    client.tell(json!({"type": "connected", "session_id": shell.id, "mode": mode})).await?;
    let mut done = live.done.clone();
    let mut ping = interval_at(Instant::now() + PING, PING);
    let mut heard = Instant::now();
    loop {
        let behind = client.is_behind(shell);
        // What a client says comes before what it is told: it may want the program to stop.
        tokio::select! {
            biased;
            () = evicted(hold.as_ref()) => {
                client.complain("TAKEN_OVER", "another client has taken over").await?;
                return client.close(TAKEN_OVER, "TAKEN_OVER").await;
            }
            message = client.socket.recv() => {
                heard = Instant::now();
                match message {
                    Some(Ok(message)) => if !handle(client, &live, hold.as_ref(), message).await? { return Ok(()) },
                    _ => return Err(Gone),
                }
            }
            _ = ping.tick() => {
                if heard.elapsed() > SILENCE {
                    return Err(Gone);
                }
                client.send(Message::Ping(Bytes::new())).await?;
            }
            () = std::future::ready(()), if behind => {
                tokio::select! {
                    sent = client.catch_up(shell) => { sent?; }
                    // A client that does not read is taken over from without a word.
                    () = evicted(hold.as_ref()) => return Err(Gone),
                }
            }
            () = async { let _ = done.wait_for(Option::is_some).await; }, if !behind => {
                while client.catch_up(shell).await? {}
                let exit = *live.done.borrow();
                let code = exit.and_then(|exit| exit.code).unwrap_or(-1);
                client.tell(json!({"type": "exit", "exit_code": code})).await?;
                return client.close(1000, "process exited").await;
            }
            _ = grown.changed(), if !behind => {}
        }
    }
}

async fn evicted(hold: Option<&Hold>) {
    match hold {
        Some(hold) => hold.evicted.notified().await,
        None => std::future::pending().await,
    }
}

/// Does what a client says. Whether it goes on.
async fn handle(
    client: &mut Client,
    live: &Live,
    hold: Option<&Hold>,
    message: Message,
) -> std::result::Result<bool, Gone> {
    let input = match &message {
        Message::Binary(bytes) if bytes.first() == Some(&STDIN) => Some(bytes[1..].to_vec()),
        Message::Binary(_) | Message::Ping(_) | Message::Pong(_) => return Ok(true),
        Message::Close(_) => return Ok(false),
        Message::Text(_) => None,
    };
    if let Some(bytes) = input {
        if hold.is_none() {
            client.complain("READ_ONLY", "a viewer cannot type").await?;
        } else {
            type_in(client, live, &bytes).await?;
        }
        return Ok(true);
    }
    let Message::Text(text) = message else { return Ok(true) };
    let Ok(value) = serde_json::from_str::<Value>(&text) else { return Ok(true) };
    let kind = value["type"].as_str().unwrap_or_default();
    if hold.is_none() && matches!(kind, "stdin" | "signal" | "resize") {
        client.complain("READ_ONLY", "a viewer cannot do this").await?;
        return Ok(true);
    }
    match kind {
        "stdin" => type_in(client, live, value["data"].as_str().unwrap_or_default().as_bytes()).await?,
        "signal" => {
            let signal = match value["signal"].as_str().unwrap_or_default() {
                "SIGINT" => Signal::SIGINT,
                "SIGTERM" => Signal::SIGTERM,
                "SIGKILL" => Signal::SIGKILL,
                "SIGQUIT" => Signal::SIGQUIT,
                "SIGHUP" => Signal::SIGHUP,
                other => {
                    let text = format!("unknown signal: {other}");
                    client.complain("INVALID_FRAME", &text).await?;
                    return Ok(true);
                }
            };
            if let Err(e) = live.signal(signal) {
                client.complain("RUNTIME_ERROR", &format!("signal: {e}")).await?;
            }
        }
        "resize" => {
            let size =
                |name: &str| value[name].as_u64().and_then(|size| u16::try_from(size).ok()).filter(|size| *size > 0);
            match (size("cols"), size("rows")) {
                (Some(columns), Some(rows)) => {
                    if let Err(e) = live.resize(columns, rows) {
                        client.complain("RUNTIME_ERROR", &format!("resize: {e}")).await?;
                    }
                }
                _ => client.complain("INVALID_FRAME", "resize: cols and rows are from 1 to 65535").await?,
            }
        }
        "ping" => client.tell(json!({"type": "pong"})).await?,
        other => client.complain("INVALID_FRAME", &format!("unknown type: {other}")).await?,
    }
    Ok(true)
}

async fn type_in(client: &mut Client, live: &Live, bytes: &[u8]) -> std::result::Result<(), Gone> {
    // A program that does not read what is typed does not keep the client from hearing what it says: not for long.
    match timeout(WRITE, live.write(bytes)).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(e)) => client.complain("STDIN_WRITE_FAILED", &e.to_string()).await,
        Err(_) => client.complain("STDIN_WRITE_FAILED", "the program does not read its input").await,
    }
}
