//! The code interpreter's API: executions as lines of JSON.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Json;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::App;
use crate::code::{Context, Told, Turn};
use crate::process::spawn::quote;

/// How often an execution that says nothing says that it goes on.
const KEEPALIVE: Duration = Duration::from_secs(5);

/// Formats that results have names for of their own.
const FORMATS: [(&str, &str); 11] = [
    ("text", "text"),
    ("text/html", "html"),
    ("text/markdown", "markdown"),
    ("image/svg+xml", "svg"),
    ("image/png", "png"),
    ("image/jpeg", "jpeg"),
    ("application/pdf", "pdf"),
    ("text/latex", "latex"),
    ("application/json", "json"),
    ("application/javascript", "javascript"),
    ("e2b/chart", "chart"),
];

fn text(status: StatusCode, text: impl Into<String>) -> Response {
    (status, text.into()).into_response()
}

fn language(name: &str) -> String {
    match name {
        "" => "python".into(),
        "js" => "javascript".into(),
        "ts" => "typescript".into(),
        other => other.to_lowercase(),
    }
}

fn object(body: &Bytes) -> Result<Value, Box<Response>> {
    if body.trim_ascii().is_empty() {
        return Ok(json!({}));
    }
    serde_json::from_slice(body)
        .map_err(|e| Box::new(text(StatusCode::BAD_REQUEST, format!("error parsing the body: {e}"))))
}

fn describe(context: &Context) -> Value {
    json!({"id": context.id, "language": context.language, "cwd": context.cwd.clone().unwrap_or_else(|| "/".into())})
}

/// `GET /contexts`.
pub(super) async fn list(State(app): State<Arc<App>>) -> Response {
    Json(app.core.code.list(None).iter().map(|context| describe(context)).collect::<Vec<_>>()).into_response()
}

/// `POST /contexts`.
pub(super) async fn create(State(app): State<Arc<App>>, body: Bytes) -> Response {
    let request = match object(&body) {
        Ok(request) => request,
        Err(response) => return *response,
    };
    let language = language(request["language"].as_str().unwrap_or_default());
    let cwd = request["cwd"].as_str().filter(|cwd| !cwd.is_empty()).map(|cwd| (cwd.to_owned(), cwd.into()));
    match app.core.code.create(&language, cwd).await {
        Ok(context) => Json(describe(&context)).into_response(),
        Err(e) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("error creating a context: {e}")),
    }
}

/// `DELETE /contexts/{id}`.
pub(super) async fn delete(State(app): State<Arc<App>>, Path(id): Path<String>) -> Response {
    match app.core.code.delete(&id).await {
        Ok(true) => Json(Value::Null).into_response(),
        Ok(false) => text(StatusCode::NOT_FOUND, format!("Context {id} not found")),
        Err(e) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("error deleting the context: {e}")),
    }
}

/// `POST /contexts/{id}/restart`.
pub(super) async fn restart(State(app): State<Arc<App>>, Path(id): Path<String>) -> Response {
    let Some(context) = app.core.code.get(&id) else {
        return text(StatusCode::NOT_FOUND, format!("Context {id} not found"));
    };
    match context.restart().await {
        Ok(()) => Json(Value::Null).into_response(),
        Err(e) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("error restarting the context: {e}")),
    }
}

/// `POST /execute`.
pub(super) async fn execute(State(app): State<Arc<App>>, body: Bytes) -> Response {
    let request = match object(&body) {
        Ok(request) => request,
        Err(response) => return *response,
    };
    let (id, of) = (request["context_id"].as_str(), request["language"].as_str());
    if id.is_some() && of.is_some() {
        return text(StatusCode::BAD_REQUEST, "Only one of context_id or language can be provided");
    }
    let context = match id {
        Some(id) => match app.core.code.get(id) {
            Some(context) => context,
            None => return text(StatusCode::NOT_FOUND, format!("Context {id} not found")),
        },
        None => match app.core.code.default_of(&language(of.unwrap_or_default())).await {
            Ok(context) => context,
            Err(e) => return text(StatusCode::INTERNAL_SERVER_ERROR, e.to_string()),
        },
    };
    let mut variables = app.variables();
    // What every process is told a kernel need not be told each time.
    variables.remove("E2B_SANDBOX");
    for (name, value) in request["env_vars"].as_object().into_iter().flatten() {
        variables.insert(name.clone(), value.as_str().unwrap_or_default().to_owned());
    }
    let around = if variables.is_empty() { Some(Default::default()) } else { around(&context.language, &variables) };
    let Some(around) = around else {
        let reason = format!("env_vars cannot be set for {}", context.language);
        return text(StatusCode::BAD_REQUEST, reason);
    };
    let code = request["code"].as_str().unwrap_or_default().to_owned();
    let (lines, receiver) = mpsc::channel::<Bytes>(4);
    let body = Body::from_stream(futures_util::stream::unfold(receiver, |mut receiver| async move {
        receiver.recv().await.map(|line| (Ok::<_, std::convert::Infallible>(line), receiver))
    }));
    // Before the answer begins: who has seen its head and sends more does not come first.
    let turn = context.queue();
    tokio::spawn(run(context, turn, code, around, lines));
    ([(header::CONTENT_TYPE, "application/x-ndjson")], body).into_response()
}

/// What sets variables before an execution and takes them back after it, in languages that know how.
fn around(language: &str, variables: &BTreeMap<String, String>) -> Option<(String, String)> {
    let object = json!(variables).to_string();
    Some(match language {
        "python" => {
            let text = serde_json::to_string(&object).unwrap_or_default();
            let set = format!(
                "import os as _o, json as _j; __runx_env = dict(_o.environ); _o.environ.update(_j.loads({text})); del _o, _j"
            );
            let back = "import os as _o; _o.environ.clear(); _o.environ.update(__runx_env); del __runx_env, _o";
            (set, back.to_owned())
        }
        "javascript" | "typescript" => (format!("Object.assign(process.env, {object})"), {
            let names: Vec<&String> = variables.keys().collect();
            format!("{}.forEach((name) => delete process.env[name])", json!(names))
        }),
        "bash" => {
            let set = variables.iter().map(|(name, value)| format!("export {name}={}", quote(value)));
            let names: Vec<&str> = variables.keys().map(String::as_str).collect();
            (set.collect::<Vec<_>>().join("; "), format!("unset {}", names.join(" ")))
        }
        _ => return None,
    })
}

fn line(value: &Value) -> Bytes {
    format!("{value}\n").into()
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64)
}

async fn run(
    context: Arc<Context>,
    turn: impl Future<Output = Turn>,
    code: String,
    (before, after): (String, String),
    lines: mpsc::Sender<Bytes>,
) {
    // One execution at a time: the next one waits.
    let turn = tokio::select! {
        turn = turn => turn,
        () = lines.closed() => return,
    };
    let (tell, mut told) = mpsc::channel(64);
    let work = tokio::spawn(async move {
        let executed = async {
            if !before.is_empty() {
                turn.prepare(&before).await?;
            }
            let executed = turn
                .execute(&code, |one| {
                    let tell = tell.clone();
                    async move {
                        let _ = tell.send(one).await;
                    }
                })
                .await;
            if !after.is_empty() {
                turn.prepare(&after).await?;
            }
            executed
        };
        let result = executed.await;
        drop(turn);
        if let Err(e) = result {
            let _ = tell.send(Told::Error("ContextError".into(), e.to_string(), Vec::new())).await;
        }
    });
    loop {
        let one = tokio::select! {
            one = told.recv() => one,
            () = tokio::time::sleep(KEEPALIVE) => {
                if lines.send(line(&json!({"type": "keepalive"}))).await.is_err() { break } else { continue }
            }
            // Whoever goes away does not want it any more.
            () = lines.closed() => {
                if let Err(e) = context.interrupt().await {
                    log::warn!("interrupt context {}: {e}", context.id);
                }
                break;
            }
        };
        let value = match one {
            None => break,
            Some(Told::Done) => continue,
            Some(Told::Stdout(text)) => json!({"type": "stdout", "text": text, "timestamp": now()}),
            Some(Told::Stderr(text)) => json!({"type": "stderr", "text": text, "timestamp": now()}),
            Some(Told::Count(count)) => json!({"type": "number_of_executions", "execution_count": count}),
            Some(Told::Result(data, main)) => result(&data, main),
            Some(Told::Error(name, value, traceback)) => {
                json!({"type": "error", "name": name, "value": value, "traceback": traceback.join("\n")})
            }
        };
        if lines.send(line(&value)).await.is_err() {
            break;
        }
    }
    // What is left of it is nobody's.
    drop(told);
    let _ = work.await;
    let _ = lines.send(line(&json!({"type": "end_of_execution"}))).await;
}

/// A result by the names that it has here.
fn result(data: &Value, main: bool) -> Value {
    let mut out = json!({"type": "result", "is_main_result": main});
    let mut extra = serde_json::Map::new();
    for (key, value) in data.as_object().into_iter().flatten() {
        match FORMATS.iter().find(|(format, _)| format == key) {
            Some((_, name)) => out[*name] = value.clone(),
            None => drop(extra.insert(key.clone(), value.clone())),
        }
    }
    // The quotes of a text's representation are not its own.
    if let Some(text) = out["text"].as_str() {
        let quoted = text.len() >= 2 && ['\'', '"'].iter().any(|mark| text.starts_with(*mark) && text.ends_with(*mark));
        if quoted {
            out["text"] = text[1..text.len() - 1].to_owned().into();
        }
    }
    if !extra.is_empty() {
        out["extra"] = Value::Object(extra);
    }
    out
}
