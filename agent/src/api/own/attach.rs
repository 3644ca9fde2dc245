//! The output of a process: once, followed as NDJSON, or over a WebSocket that also takes what is typed.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::extract::{OriginalUri, Path, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::App;
use super::failure::{Failure, Result};
use super::processes::{described, find};
use crate::api::query::Query;
use crate::process::managed::{Managed, Part};
use crate::process::ring::Source;

/// The largest part, in bytes.
const PART: usize = 32 << 10;

/// How long a message may take to a client, and how often it is asked whether one is there.
const WRITE: Duration = Duration::from_secs(30);
const PING: Duration = Duration::from_secs(30);

fn name(source: Source, terminal: bool) -> &'static str {
    match source {
        _ if terminal => "terminal",
        Source::Stdout => "stdout",
        Source::Stderr => "stderr",
    }
}

/// A part of output as an event. Bytes that are no text come in Base64.
fn event(part: &Part, terminal: bool, offset: u64) -> Value {
    match part {
        Part::Bytes(source, bytes, end) => {
            let mut out = json!({"type": name(*source, terminal), "offset": offset, "end_offset": end});
            match std::str::from_utf8(bytes) {
                Ok(text) => out["text"] = text.into(),
                Err(_) => out["base64"] = STANDARD.encode(bytes).into(),
            }
            out
        }
        Part::Lost(start) => json!({"type": "lost", "offset": offset, "end_offset": start, "bytes": start - offset}),
        Part::Wait | Part::End => Value::Null,
    }
}

fn next_offset(part: &Part, offset: u64) -> u64 {
    match part {
        Part::Bytes(_, _, end) => *end,
        Part::Lost(start) => *start,
        Part::Wait | Part::End => offset,
    }
}

fn beginning(query: &Query) -> Result<u64> {
    match query.get("offset") {
        None => Ok(0),
        Some(text) => text.parse().map_err(|_| Failure::invalid(format!("offset: {text:?} is not a number"))),
    }
}

/// `GET /processes/{id}/output?offset=&follow=`: a line of JSON for each part, and at the end of the process one of type
/// `end`.
pub(super) async fn output(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
    OriginalUri(uri): OriginalUri,
) -> Result<Response> {
    let managed = find(&app, &id)?;
    let query = Query::of(&uri);
    let offset = beginning(&query)?;
    let follow = match query.get("follow") {
        None | Some("false" | "0") => false,
        Some("" | "true" | "1") => true,
        Some(other) => return Err(Failure::invalid(format!("follow: {other:?} is neither true nor false"))),
    };
    let lines = futures_util::stream::unfold((managed, offset, false), move |(managed, offset, over)| async move {
        if over {
            return None;
        }
        let mut watch = managed.watch();
        loop {
            watch.borrow_and_update();
            let part = managed.output(offset, PART);
            let terminal = managed.order.terminal.is_some();
            let line = |value: &Value| Ok::<_, Infallible>(Bytes::from(format!("{value}\n")));
            match &part {
                Part::End => {
                    let end = json!({"type": "end", "process": described(&managed)});
                    return Some((line(&end), (managed, offset, true)));
                }
                Part::Wait if !follow => return None,
                Part::Wait => {
                    let _ = watch.changed().await;
                }
                part => {
                    let told = line(&event(part, terminal, offset));
                    let next = next_offset(part, offset);
                    return Some((told, (managed, next, false)));
                }
            }
        }
    });
    Ok(([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response())
}

/// `GET /processes/{id}/attach?offset=`, a WebSocket. From the daemon: the events of [`output`] as texts. From the client:
/// binary messages are typed, texts are `{"type": "resize" | "signal" | "close_stdin", …}`.
pub(super) async fn attach(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
    OriginalUri(uri): OriginalUri,
    upgrade: std::result::Result<WebSocketUpgrade, axum::extract::ws::rejection::WebSocketUpgradeRejection>,
) -> Result<Response> {
    let managed = find(&app, &id)?;
    let offset = beginning(&Query::of(&uri))?;
    let upgrade = upgrade.map_err(|e| Failure::invalid(format!("attach: {e}")))?;
    Ok(upgrade.max_message_size(1 << 20).on_upgrade(move |socket| serve(managed, offset, socket)))
}

async fn serve(managed: Arc<Managed>, mut offset: u64, mut socket: WebSocket) {
    let terminal = managed.order.terminal.is_some();
    let mut watch = managed.watch();
    let mut ping = tokio::time::interval(PING);
    loop {
        watch.borrow_and_update();
        let part = managed.output(offset, PART);
        if part == Part::End {
            let end = json!({"type": "end", "process": described(&managed)});
            let _ = tell(&mut socket, Message::Text(end.to_string().into())).await;
            let _ = tell(&mut socket, Message::Close(None)).await;
            return;
        }
        if part != Part::Wait {
            let told = event(&part, terminal, offset).to_string();
            offset = next_offset(&part, offset);
            if !tell(&mut socket, Message::Text(told.into())).await {
                return;
            }
            // Output without end must not keep what is typed from being heard.
            let heard = tokio::time::timeout(Duration::ZERO, socket.recv()).await;
            if let Ok(message) = heard
                && !take(&managed, message, &mut socket).await
            {
                return;
            }
            continue;
        }
        tokio::select! {
            changed = watch.changed() => if changed.is_err() { return },
            message = socket.recv() => if !take(&managed, message, &mut socket).await { return },
            _ = ping.tick() => if !tell(&mut socket, Message::Ping(Bytes::new())).await { return },
        }
    }
}

async fn tell(socket: &mut WebSocket, message: Message) -> bool {
    matches!(tokio::time::timeout(WRITE, socket.send(message)).await, Ok(Ok(())))
}

/// Does what a client wants. `false` when it is gone.
async fn take(
    managed: &Managed,
    message: Option<std::result::Result<Message, axum::Error>>,
    socket: &mut WebSocket,
) -> bool {
    let Some(Ok(message)) = message else { return false };
    let done = match message {
        Message::Binary(bytes) => managed.write(&bytes).await.map_err(|e| format!("stdin: {e:?}")),
        Message::Text(text) => control(managed, &text).await,
        Message::Close(_) => return false,
        Message::Ping(_) | Message::Pong(_) => Ok(()),
    };
    match done {
        Ok(()) => true,
        Err(text) => tell(socket, Message::Text(json!({"type": "error", "message": text}).to_string().into())).await,
    }
}

async fn control(managed: &Managed, text: &str) -> std::result::Result<(), String> {
    let message: Value = serde_json::from_str(text).map_err(|e| format!("a message is not JSON: {e}"))?;
    let size = |name: &str| message[name].as_u64().and_then(|size| u16::try_from(size).ok());
    match message["type"].as_str() {
        Some("resize") => match (size("columns"), size("rows")) {
            (Some(columns), Some(rows)) => managed.resize(columns, rows).await.map_err(|e| format!("resize: {e}")),
            _ => Err("resize: columns and rows are needed".into()),
        },
        Some("signal") => {
            let name = message["signal"].as_str().unwrap_or_default();
            let signal: Signal = name.parse().map_err(|_| format!("signal: {name:?} is none"))?;
            managed.signal(signal as i32, true).map_err(|e| format!("signal: {e}"))
        }
        Some("close_stdin") => match managed.close_input().await {
            true => Ok(()),
            false => Err("close_stdin: a terminal has no end of its own".into()),
        },
        other => Err(format!("a message of type {other:?} is not known")),
    }
}
