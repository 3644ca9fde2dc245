//! Code contexts and their executions.

use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::body::Bytes;
use axum::extract::{OriginalUri, Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::App;
use super::body;
use super::command;
use super::error::{Refusal, Result};
use super::events::{self, Batch, KEEPALIVE};
use super::session;
use crate::api::query::Query;
use crate::code::client::Error;
use crate::code::{Context, Told, Turn, sql};

/// What the protocol calls languages and are none of a kernel.
const NOT_KERNELS: [&str; 3] = ["command", "background-command", "sql"];

/// Languages of kernels.
const KERNELS: [&str; 6] = ["bash", "python", "java", "javascript", "typescript", "go"];

/// How much a kernel may tell before a client reads it.
const WAITING: usize = 64;

fn describe(context: &Context) -> Value {
    let mut out = json!({"id": context.id, "language": context.language});
    if let Some(cwd) = &context.cwd {
        out["cwd"] = cwd.clone().into();
    }
    out
}

/// `POST /code/context`.
pub(super) async fn create(State(app): State<Arc<App>>, body: Bytes) -> Result<Response> {
    let fields = body::fields(&body)?;
    let language = fields.text("language")?.unwrap_or_default();
    let cwd = match fields.text("cwd")?.filter(|name| !name.is_empty()) {
        Some(name) => Some((name.clone(), session::beginning(&app, Some(name))?)),
        None => None,
    };
    if NOT_KERNELS.contains(&language.as_str()) || language.is_empty() {
        return Err(Refusal::runtime(format!("error creating code context: unsupported language {language:?}")));
    }
    let context = app
        .code
        .create(&language, cwd)
        .await
        .map_err(|e| Refusal::runtime(format!("error creating code context: {e}")))?;
    Ok(Json(describe(&context)).into_response())
}

/// `GET /code/contexts`.
pub(super) async fn list(State(app): State<Arc<App>>, OriginalUri(uri): OriginalUri) -> Result<Response> {
    let query = Query::of(&uri);
    let language = query.get("language").filter(|language| !language.is_empty());
    if let Some(language) = language.filter(|language| NOT_KERNELS.contains(language)) {
        return Err(Refusal::runtime(format!("error listing code contexts: unsupported language {language}")));
    }
    let contexts: Vec<Value> = app.code.list(language).iter().map(|context| describe(context)).collect();
    Ok(Json(contexts).into_response())
}

/// `DELETE /code/contexts`.
pub(super) async fn delete_all(State(app): State<Arc<App>>, OriginalUri(uri): OriginalUri) -> Result<Response> {
    let query = Query::of(&uri);
    let language = body::require(&query, "language")?;
    for context in app.code.list(Some(language)) {
        app.code
            .delete(&context.id)
            .await
            .map_err(|e| Refusal::runtime(format!("error deleting code context: {e}")))?;
    }
    Ok(StatusCode::OK.into_response())
}

/// `GET /code/contexts/{id}`.
pub(super) async fn get(State(app): State<Arc<App>>, Path(id): Path<String>) -> Result<Response> {
    match app.code.get(&id) {
        Some(context) => Ok(Json(describe(&context)).into_response()),
        None => Err(Refusal::context(format!("context not found: {id}"))),
    }
}

/// `DELETE /code/contexts/{id}`.
pub(super) async fn delete(State(app): State<Arc<App>>, Path(id): Path<String>) -> Result<Response> {
    match app.code.delete(&id).await {
        Ok(true) => Ok(StatusCode::OK.into_response()),
        Ok(false) => Err(Refusal::context(format!("context not found: {id}"))),
        Err(e) => Err(Refusal::runtime(format!("error deleting code context: {e}"))),
    }
}

/// `POST /code`.
pub(super) async fn run(State(app): State<Arc<App>>, body: Bytes) -> Result<Response> {
    let fields = body::fields(&body)?;
    let code = fields.text("code")?.filter(|code| !code.is_empty());
    let code = code.ok_or_else(|| Refusal::body("code must be given, and not be empty"))?;
    let context = fields.object("context")?.unwrap_or_default();
    let language = context.text("language")?.unwrap_or_default();
    let id = context.text("id")?.filter(|id| !id.is_empty());
    match language.as_str() {
        "" | "command" if id.is_none() => {
            return command::execute(&app, command::Request::of_text(&app, &code)?, false);
        }
        "background-command" => return command::execute(&app, command::Request::of_text(&app, &code)?, true),
        "sql" => return statement(&app, code),
        "" => {}
        known if KERNELS.contains(&known) => {}
        other => return Err(Refusal::runtime(format!("error running codes: unknown language: {other}"))),
    }
    let failed = |e: Error| Refusal::runtime(format!("error running codes: {e}"));
    if !app.code.is_configured() {
        return Err(failed(Error::Refused(
            "language runtime server not configured, please check your image runtime".into(),
        )));
    }
    let context = match id {
        Some(id) => app
            .code
            .get(&id)
            .ok_or_else(|| Refusal::runtime(format!("error running codes: context not found: {id}")))?,
        None => app.code.default_of(&language).await.map_err(failed)?,
    };
    let permit = app.admit()?;
    // Before the answer begins: who has seen its head and sends more does not come first.
    let turn = context.turn();
    let (mut sender, response) = events::stream();
    tokio::spawn(async move {
        let _permit = permit;
        let mut batch = Batch::default();
        batch.init(&context.id);
        let Some(turn) = turn else {
            batch.error("RUNTIME_ERROR", "session is busy", &["session is busy".to_owned()]);
            sender.send(&mut batch).await;
            return;
        };
        sender.send(&mut batch).await;
        execute(turn, code, sender).await;
    });
    Ok(response)
}

/// Executes SQL.
fn statement(app: &Arc<App>, statement: String) -> Result<Response> {
    let permit = app.admit()?;
    let begun = Instant::now();
    let server = app.config.sql;
    let (mut sender, response) = events::stream();
    tokio::spawn(async move {
        let _permit = permit;
        let mut batch = Batch::default();
        batch.init(&crate::ids::uuid());
        sender.send(&mut batch).await;
        let executed = sql::execute(server, &statement);
        tokio::pin!(executed);
        let mut alive = tokio::time::interval_at(tokio::time::Instant::now() + KEEPALIVE, KEEPALIVE);
        let executed = loop {
            tokio::select! {
                executed = &mut executed => break executed,
                _ = alive.tick() => sender.ping(),
            }
        };
        match executed {
            Ok(table) => {
                batch.count(1);
                batch.results(&json!({"text": table.to_string()}));
                batch.complete(begun.elapsed());
            }
            Err(failure) => batch.error(failure.name, &failure.text, &[]),
        }
        sender.send(&mut batch).await;
    });
    Ok(response)
}

/// Executes code and sends what comes of it.
async fn execute(turn: Turn, code: String, mut sender: events::Sender) {
    let begun = Instant::now();
    let (tell, mut told) = mpsc::channel(WAITING);
    let work = tokio::spawn(async move {
        let result = turn
            .execute(&code, |one| {
                let tell = tell.clone();
                async move {
                    // Without a client the kernel goes on, and nobody hears of it.
                    let _ = tell.send(one).await;
                }
            })
            .await;
        // Before the end is told, so that the next execution is not too early.
        drop(turn);
        if let Err(e) = result {
            let text = e.to_string();
            let _ = tell.send(Told::Error("RUNTIME_ERROR".into(), text.clone(), vec![text])).await;
        }
    });
    let mut alive = tokio::time::interval_at(tokio::time::Instant::now() + KEEPALIVE, KEEPALIVE);
    alive.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut batch = Batch::default();
    let mut done = false;
    loop {
        let one = tokio::select! {
            one = told.recv() => one,
            _ = alive.tick() => {
                sender.ping();
                continue;
            }
        };
        match one {
            None => break,
            Some(Told::Stdout(text)) if !text.is_empty() => batch.text("stdout", text.as_bytes()),
            Some(Told::Stderr(text)) if !text.is_empty() => batch.text("stderr", text.as_bytes()),
            Some(Told::Stdout(_) | Told::Stderr(_)) => {}
            Some(Told::Count(count)) => batch.count(count),
            Some(Told::Result(data, _)) => batch.results(&data),
            Some(Told::Error(name, value, lines)) => {
                batch.text("status", b"error");
                batch.error(&name, &value, &lines);
            }
            Some(Told::Done) => {
                done = true;
                continue;
            }
        }
        // As long as nobody reads, the kernel's messages wait, and nothing else does.
        sender.send(&mut batch).await;
    }
    let _ = work.await;
    if done {
        batch.complete(begun.elapsed());
        sender.send(&mut batch).await;
    }
}
