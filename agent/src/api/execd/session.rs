//! Shell sessions.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use nix::sys::signal::Signal;
use serde_json::json;

use super::App;
use super::body;
use super::command;
use super::error::{Refusal, Result};
use super::events::{self, Batch};
use crate::process::environment;
use crate::process::reaper;

/// A directory that is made if it is missing: where sessions and contexts begin.
pub(super) fn beginning(app: &App, name: Option<String>) -> Result<PathBuf> {
    let own = std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/"));
    let Some(name) = name.filter(|name| !name.is_empty()) else { return Ok(own) };
    let path = own.join(super::files::expand(&name, &environment::own())?);
    app.make_outside(&path).map_err(|e| Refusal::runtime(format!("create working directory {name}: {e}")))?;
    Ok(path)
}

/// `POST /session`.
pub(super) async fn create(State(app): State<Arc<App>>, body: Bytes) -> Result<Response> {
    let fields = body::fields_or_none(&body)?;
    let cwd = beginning(&app, fields.text("cwd")?)?;
    let session = app.sessions.create(cwd);
    Ok(Json(json!({"session_id": session.id})).into_response())
}

/// `POST /session/{id}/run`.
pub(super) async fn run(State(app): State<Arc<App>>, Path(id): Path<String>, body: Bytes) -> Result<Response> {
    let fields = body::fields(&body)?;
    // The names of older clients count, too.
    let text = match fields.text("command")? {
        Some(text) => Some(text),
        None => fields.text("code")?,
    };
    let text =
        text.filter(|text| !text.is_empty()).ok_or_else(|| Refusal::body("command must be given, and not be empty"))?;
    if text.contains('\0') {
        return Err(Refusal::body("a command must not contain a NUL byte"));
    }
    let limit = match fields.number("timeout")? {
        Some(limit) => Some(limit),
        None => fields.number("timeout_ms")?,
    };
    let timeout = command::timeout(limit)?;
    let cwd = match fields.text("cwd")?.filter(|name| !name.is_empty()) {
        Some(name) => Some(command::directory(Some(&name), &environment::current())?),
        None => None,
    };
    let session = app
        .sessions
        .get(&id)
        .ok_or_else(|| Refusal::runtime(format!("error running commands: session not found: {id}")))?;
    let permit = app.admit()?;
    let begun = Instant::now();
    let (output, run) = session
        .run(&text, cwd, timeout)
        .map_err(|e| Refusal::runtime(format!("error running commands: start a shell: {e}")))?;
    let (mut sender, response) = events::stream();
    let mode = app.config.line_mode;
    tokio::spawn(async move {
        let _permit = permit;
        let mut batch = Batch::default();
        batch.init(&id);
        sender.send(&mut batch).await;
        let (gone, process) = (sender.watch(), run.process());
        // The next command begins where this one ended, so that is taken over before its end is told.
        let follow = command::follow(output, sender, mode, begun, Some(Box::new(move || drop(run))));
        tokio::pin!(follow);
        tokio::select! {
            () = &mut follow => {}
            () = gone.closed() => {
                // Nobody else could end it.
                let _ = reaper::signal_group(&process, Signal::SIGKILL);
                follow.await;
            }
        }
    });
    Ok(response)
}

/// `DELETE /session/{id}`.
pub(super) async fn delete(State(app): State<Arc<App>>, Path(id): Path<String>) -> Result<Response> {
    if app.sessions.close(&id) {
        return Ok(StatusCode::OK.into_response());
    }
    Err(Refusal::context(format!("session not found: {id}")))
}
