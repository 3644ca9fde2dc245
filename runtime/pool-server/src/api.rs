//! The interface over HTTP.

use std::collections::HashMap;
use std::io::Read;
use std::sync::{Arc, Mutex, PoisonError};

use axum::Json;
use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::rejection::BytesRejection;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::extract::{DefaultBodyLimit, Multipart, Path, Request as HttpRequest, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde_json::{Value, json};
use tokio::sync::{Semaphore, mpsc};

use crate::metrics::Counters;
use crate::model::{Outcome, Request};
use crate::run::{Cancel, Runner, check};

/// How much of a file is sent at once, in bytes.
const CHUNK: usize = 64 << 10;

/// What the interface is made of.
pub(crate) struct App {
    /// What requests are run with.
    pub(crate) runner: Runner,
    /// What each request must have.
    pub(crate) token: Option<String>,
    /// How many commands may still be run at once.
    pub(crate) free: Arc<Semaphore>,
    /// How many may run at once.
    pub(crate) parallelism: usize,
    /// How many requests may still wait.
    pub(crate) queue: Arc<Semaphore>,
    /// The largest request, in bytes.
    pub(crate) body_limit: usize,
    /// Numbers.
    pub(crate) counters: Counters,
}

/// All of it.
pub(crate) fn router(app: Arc<App>) -> Router {
    let limit = app.body_limit;
    Router::new()
        .route("/run", post(run))
        .route("/file", get(list).post(upload))
        .route("/file/{id}", get(download).delete(remove))
        .route("/ws", get(websocket))
        .route("/metrics", get(metrics))
        .layer(middleware::from_fn_with_state(app.clone(), authorize))
        .route("/version", get(version))
        .route("/config", get(config))
        .layer(DefaultBodyLimit::max(limit))
        .with_state(app)
}

/// Compares in a time that says nothing of where they differ.
fn same(wanted: &[u8], given: &[u8]) -> bool {
    let mut different = wanted.len() ^ given.len();
    for (at, byte) in wanted.iter().enumerate() {
        different |= usize::from(byte ^ given.get(at).copied().unwrap_or(0));
        // So that no shortcut is found.
        std::hint::black_box(different);
    }
    different == 0
}

async fn authorize(State(app): State<Arc<App>>, request: HttpRequest, next: Next) -> Response {
    let admitted = app.token.as_ref().is_none_or(|token| {
        let given = request.headers().get(header::AUTHORIZATION).map(HeaderValue::as_bytes).unwrap_or_default();
        same(token.as_bytes(), given.strip_prefix(b"Bearer ").unwrap_or_default())
    });
    if admitted { next.run(request).await } else { StatusCode::UNAUTHORIZED.into_response() }
}

fn refuse(status: StatusCode, text: impl Into<String>) -> Response {
    (status, Json(text.into())).into_response()
}

/// Gives a request up when nobody waits for it any more.
struct Abandoned(Option<Arc<Cancel>>);

impl Drop for Abandoned {
    fn drop(&mut self) {
        if let Some(cancel) = self.0.take() {
            cancel.cancel();
        }
    }
}

/// Runs a request when it is its turn.
///
/// # Errors
/// When too many wait, or it needs more than there is.
async fn execute(app: &Arc<App>, request: Request, cancel: Arc<Cancel>) -> Result<Vec<Outcome>, String> {
    let wanted = request.cmd.len();
    if wanted > app.parallelism {
        return Err(format!("{wanted} commands cannot run at once: --parallelism is {}", app.parallelism));
    }
    let mut abandoned = Abandoned(Some(cancel.clone()));
    let wanted = u32::try_from(wanted).unwrap_or(u32::MAX);
    let permit = match app.free.clone().try_acquire_many_owned(wanted) {
        Ok(permit) => permit,
        Err(_) => {
            let Ok(_waiting) = app.queue.clone().try_acquire_owned() else { return Err("worker queue is full".into()) };
            app.free.clone().acquire_many_owned(wanted).await.map_err(|e| e.to_string())?
        }
    };
    let runner = app.clone();
    let done = tokio::task::spawn_blocking(move || {
        let _permit = permit;
        runner.runner.run(&request, &cancel)
    });
    let outcomes = done.await.map_err(|e| e.to_string());
    abandoned.0 = None;
    if let Ok(outcomes) = &outcomes {
        app.counters.executed(outcomes);
    }
    outcomes
}

fn parse(app: &App, body: &[u8]) -> Result<Request, String> {
    let request: Request = serde_json::from_slice(body).map_err(|e| e.to_string())?;
    if request.cancel_request_id.is_empty() {
        check(&request, &app.runner.bounds)?;
    }
    Ok(request)
}

/// `POST /run`.
async fn run(State(app): State<Arc<App>>, body: Result<Bytes, BytesRejection>) -> Response {
    let body = match body {
        Ok(body) => body,
        Err(e) => return refuse(e.status(), e.body_text()),
    };
    let request = match parse(&app, &body) {
        Ok(request) => request,
        Err(text) => return refuse(StatusCode::BAD_REQUEST, text),
    };
    match execute(&app, request, Arc::default()).await {
        Ok(outcomes) => Json(outcomes).into_response(),
        Err(text) => refuse(StatusCode::INTERNAL_SERVER_ERROR, text),
    }
}

/// `GET /file`.
async fn list(State(app): State<Arc<App>>) -> Response {
    Json(app.runner.store.list()).into_response()
}

/// `POST /file`.
async fn upload(State(app): State<Arc<App>>, mut form: Multipart) -> Response {
    loop {
        let mut field = match form.next_field().await {
            Ok(Some(field)) if field.name() == Some("file") => field,
            Ok(Some(_)) => continue,
            Ok(None) => return refuse(StatusCode::BAD_REQUEST, "http: no such file"),
            Err(e) => return refuse(e.status(), e.body_text()),
        };
        let name = field.file_name().unwrap_or_default().to_owned();
        let failed = |e: std::io::Error| match e.kind() {
            std::io::ErrorKind::StorageFull => refuse(StatusCode::INSUFFICIENT_STORAGE, e.to_string()),
            _ => refuse(StatusCode::INTERNAL_SERVER_ERROR, e.to_string()),
        };
        let mut draft = match app.runner.store.draft() {
            Ok(draft) => draft,
            Err(e) => return failed(e),
        };
        loop {
            match field.chunk().await {
                Ok(Some(bytes)) => {
                    if let Err(e) = draft.write(&bytes) {
                        return failed(e);
                    }
                }
                Ok(None) => return Json(draft.keep(&name)).into_response(),
                Err(e) => return refuse(e.status(), e.body_text()),
            }
        }
    }
}

/// `GET /file/{id}`.
async fn download(State(app): State<Arc<App>>, Path(id): Path<String>) -> Response {
    let Ok((name, mut file)) = app.runner.store.open(&id) else { return StatusCode::NOT_FOUND.into_response() };
    let length = file.metadata().map_or(0, |meta| meta.len());
    let (sender, receiver) = mpsc::channel::<std::io::Result<Bytes>>(4);
    tokio::task::spawn_blocking(move || {
        loop {
            let mut chunk = vec![0; CHUNK];
            let piece = match file.read(&mut chunk) {
                Ok(0) => return,
                Ok(length) => {
                    chunk.truncate(length);
                    Ok(chunk.into())
                }
                Err(e) => Err(e),
            };
            let over = piece.is_err();
            if sender.blocking_send(piece).is_err() || over {
                return;
            }
        }
    });
    let pieces = futures_util::stream::unfold(receiver, |mut receiver| async move {
        receiver.recv().await.map(|piece| (piece, receiver))
    });
    let mut response = Body::from_stream(pieces).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(length));
    let name: String = name.chars().filter(|c| !c.is_control() && *c != '"' && *c != '\\').collect();
    if let Ok(value) = HeaderValue::from_str(&format!("attachment; filename=\"{name}\"")) {
        headers.insert(header::CONTENT_DISPOSITION, value);
    }
    response
}

/// `DELETE /file/{id}`.
async fn remove(State(app): State<Arc<App>>, Path(id): Path<String>) -> StatusCode {
    if app.runner.store.remove(&id) { StatusCode::OK } else { StatusCode::NOT_FOUND }
}

/// `GET /ws`: requests as messages, and their results as they come.
async fn websocket(State(app): State<Arc<App>>, upgrade: WebSocketUpgrade) -> Response {
    let limit = app.body_limit;
    upgrade.max_message_size(limit).max_frame_size(limit).on_upgrade(move |socket| talk(app, socket))
}

/// Requests of one WebSocket that run, by their ids.
type Running = Arc<Mutex<HashMap<String, Arc<Cancel>>>>;

async fn talk(app: Arc<App>, mut socket: WebSocket) {
    let running = Running::default();
    let (sender, mut receiver) = mpsc::channel::<String>(64);
    loop {
        let text = tokio::select! {
            message = socket.recv() => match message {
                Some(Ok(Message::Text(text))) => text.as_bytes().to_vec(),
                Some(Ok(Message::Binary(bytes))) => bytes.to_vec(),
                Some(Ok(Message::Ping(_) | Message::Pong(_))) => continue,
                _ => break,
            },
            answer = receiver.recv() => {
                let Some(answer) = answer else { break };
                if socket.send(Message::Text(answer.into())).await.is_err() {
                    break;
                }
                continue;
            }
        };
        let request = match parse(&app, &text) {
            Ok(request) => request,
            Err(error) => {
                let id = serde_json::from_slice::<Value>(&text)
                    .ok()
                    .and_then(|value| value["requestId"].as_str().map(str::to_owned));
                let answer = json!({"requestId": id.unwrap_or_default(), "results": [], "error": error});
                if socket.send(Message::Text(answer.to_string().into())).await.is_err() {
                    break;
                }
                continue;
            }
        };
        let all = || running.lock().unwrap_or_else(PoisonError::into_inner);
        if !request.cancel_request_id.is_empty() {
            if let Some(cancel) = all().get(&request.cancel_request_id) {
                cancel.cancel();
            }
            continue;
        }
        let (id, cancel) = (request.request_id.clone(), Arc::<Cancel>::default());
        all().insert(id.clone(), cancel.clone());
        let (app, sender, running) = (app.clone(), sender.clone(), running.clone());
        tokio::spawn(async move {
            let answer = match execute(&app, request, cancel).await {
                Ok(results) => json!({"requestId": id, "results": results}),
                Err(error) => json!({"requestId": id, "results": [], "error": error}),
            };
            running.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
            let _ = sender.send(answer.to_string()).await;
        });
    }
    // Nobody waits for the rest.
    for cancel in running.lock().unwrap_or_else(PoisonError::into_inner).values() {
        cancel.cancel();
    }
}

/// What this server can do, as go-judge tells it.
fn features() -> Value {
    json!({
        "copyOutOptional": true,
        "pipeProxy": true,
        "symlink": true,
        "addressSpaceLimit": true,
        "stream": false,
        "procPeak": true,
        "copyOutTruncate": true,
        "pipeProxyZeroCopy": false,
        "fixSymlinkEscape": true,
    })
}

/// `GET /version`.
async fn version() -> Response {
    let mut out = features();
    out["buildVersion"] = concat!("runx-", env!("CARGO_PKG_VERSION")).into();
    out["platform"] = std::env::consts::ARCH.into();
    out["os"] = std::env::consts::OS.into();
    Json(out).into_response()
}

/// `GET /config`.
async fn config(State(app): State<Arc<App>>) -> Response {
    let mut out = features();
    let template = app.runner.pool.template();
    let tmpfs: Vec<Value> = template
        .tmpfs
        .iter()
        .map(|tmpfs| json!({"target": tmpfs.target, "size": tmpfs.size, "inodes": tmpfs.inodes}))
        .collect();
    out["fileStorePath"] = app.runner.store.directory().to_string_lossy().into();
    out["runnerConfig"] = json!({
        "cgroup": app.runner.pool.cgroups(),
        "tier": template.tier.name(),
        "tmpfs": tmpfs,
        "hostName": template.hostname,
        "workDir": template.directory_of_work(),
        "memory": template.memory,
        "parallelism": app.parallelism,
    });
    Json(out).into_response()
}

/// `GET /metrics`.
async fn metrics(State(app): State<Arc<App>>) -> Response {
    let waiting = app.queue.available_permits();
    let mut text = app.runner.pool.metrics().prometheus();
    text.push_str(&app.counters.prometheus(
        app.runner.store.size(),
        app.parallelism - app.free.available_permits(),
        waiting,
    ));
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response()
}
