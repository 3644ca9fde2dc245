//! The interface over HTTP.

use std::collections::HashMap;
use std::io::Read;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use axum::Json;
use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::extract::{DefaultBodyLimit, FromRequest, Multipart, Path, Request as HttpRequest, State};
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
    /// Whether pages of browsers, and names that others have for this machine, are kept out: where there is no token.
    pub(crate) loopback_only: bool,
    /// How many requests may be read, wait or run at once.
    pub(crate) admitted: Arc<Semaphore>,
    /// Those that run.
    pub(crate) running: Mutex<Vec<Weak<Cancel>>>,
    /// Numbers.
    pub(crate) counters: Counters,
}

impl App {
    /// Ends all that runs, and lets nothing more begin.
    pub(crate) fn cancel_all(&self) {
        self.free.close();
        for cancel in self.running.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            if let Some(cancel) = cancel.upgrade() {
                cancel.cancel();
            }
        }
    }

    fn register(&self, cancel: &Arc<Cancel>) {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        running.retain(|one| one.strong_count() > 0);
        running.push(Arc::downgrade(cancel));
    }
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
        .layer(middleware::from_fn_with_state(app.clone(), keep_pages_out))
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

/// Without a token whoever reaches the loopback interface is served; a page in somebody's browser reaches it, too.
async fn keep_pages_out(State(app): State<Arc<App>>, request: HttpRequest, next: Next) -> Response {
    if app.loopback_only {
        let text = |name| request.headers().get(name).map(|value: &HeaderValue| value.to_str().unwrap_or_default());
        // Clients that are no browsers send the server's own, or none.
        let origin = text(header::ORIGIN).is_none_or(|text| is_loopback(text.split("://").nth(1).unwrap_or_default()));
        if !origin || !is_loopback(text(header::HOST).unwrap_or_default()) {
            return refuse(
                StatusCode::FORBIDDEN,
                "without a token, pages and other names of this machine are kept out",
            );
        }
    }
    next.run(request).await
}

/// Whether a Host header names this machine as it names itself.
fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    name.eq_ignore_ascii_case("localhost") || name.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
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
    app.register(&cancel);
    let wanted = u32::try_from(wanted).unwrap_or(u32::MAX);
    let permit = match app.free.clone().try_acquire_many_owned(wanted) {
        Ok(permit) => permit,
        Err(_) => {
            let Ok(_waiting) = app.queue.clone().try_acquire_owned() else { return Err("worker queue is full".into()) };
            app.free.clone().acquire_many_owned(wanted).await.map_err(|_| "the server is ending".to_owned())?
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
async fn run(State(app): State<Arc<App>>, request: HttpRequest) -> Response {
    // Before it is read: requests that wait are in memory.
    let Ok(_admitted) = app.admitted.clone().try_acquire_owned() else {
        return refuse(StatusCode::INTERNAL_SERVER_ERROR, "worker queue is full");
    };
    let body = match Bytes::from_request(request, &()).await {
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
    let Ok((name, file)) = app.runner.store.open(&id) else { return StatusCode::NOT_FOUND.into_response() };
    let length = file.metadata().map_or(0, |meta| meta.len());
    // No thread waits for a client that reads slowly.
    let pieces = futures_util::stream::unfold(file, |mut file| async move {
        let read = tokio::task::spawn_blocking(move || {
            let mut chunk = vec![0; CHUNK];
            file.read(&mut chunk).map(|length| {
                chunk.truncate(length);
                (Bytes::from(chunk), file)
            })
        });
        match read.await {
            Ok(Ok((chunk, file))) if !chunk.is_empty() => Some((Ok::<_, std::io::Error>(chunk), file)),
            _ => None,
        }
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

/// Requests of one WebSocket that run, by numbers of our own: their ids, which need not differ, and what ends them.
type Running = Arc<Mutex<HashMap<u64, (String, Arc<Cancel>)>>>;

async fn talk(app: Arc<App>, mut socket: WebSocket) {
    let running = Running::default();
    let (sender, mut receiver) = mpsc::channel::<String>(64);
    let mut number = 0;
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
            for (id, cancel) in all().values() {
                if *id == request.cancel_request_id {
                    cancel.cancel();
                }
            }
            continue;
        }
        let (id, cancel) = (request.request_id.clone(), Arc::<Cancel>::default());
        let Ok(admitted) = app.admitted.clone().try_acquire_owned() else {
            let answer = json!({"requestId": id, "results": [], "error": "worker queue is full"});
            if socket.send(Message::Text(answer.to_string().into())).await.is_err() {
                break;
            }
            continue;
        };
        number += 1;
        all().insert(number, (id.clone(), cancel.clone()));
        let (app, sender, running) = (app.clone(), sender.clone(), running.clone());
        tokio::spawn(async move {
            let _admitted = admitted;
            let answer = match execute(&app, request, cancel).await {
                Ok(results) => json!({"requestId": id, "results": results}),
                Err(error) => json!({"requestId": id, "results": [], "error": error}),
            };
            running.lock().unwrap_or_else(PoisonError::into_inner).remove(&number);
            let _ = sender.send(answer.to_string()).await;
        });
    }
    // Nobody waits for the rest.
    for (_, cancel) in running.lock().unwrap_or_else(PoisonError::into_inner).values() {
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
    let mut text = app.runner.pool.metrics().prometheus();
    text.push_str(&app.counters.prometheus(
        app.runner.store.size(),
        app.parallelism - app.free.available_permits(),
        app.queue.available_permits(),
    ));
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response()
}
