//! Commands: in the foreground with their output as events, or in the background with a log.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use axum::Json;
use axum::body::Bytes;
use axum::extract::{OriginalUri, Path as UrlPath, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::json;

use super::App;
use super::body::{self, Fields};
use super::error::{Refusal, Result};
use super::events::{self, Batch, KEEPALIVE, Sender};
use crate::api::query::Query;
use crate::api::rfc3339;
use crate::process::commands::{Command, Prepared, State as Standing};
use crate::process::environment::{self, Variables};
use crate::process::lines::{LineMode, Lines};
use crate::process::output::{Output, Piece};
use crate::process::reaper::{self, Exit};
use crate::process::spawn::{Program, Start, Streams};
use crate::process::users::{Accounts, Identity};

/// How much of a log is sent in one answer, in bytes.
const LOG_LIMIT: usize = 64 << 20;

/// How much output becomes one part of a stream, in bytes of events.
const PART: usize = 64 << 10;

/// A command, read from a request.
#[derive(Debug)]
pub(super) struct Request {
    program: Program,
    text: String,
    cwd: PathBuf,
    environment: Variables,
    identity: Option<Identity>,
    timeout: Option<Duration>,
    lines: LineMode,
}

impl Request {
    fn parse(app: &App, fields: &Fields) -> Result<Self> {
        let command = fields.text("command")?.filter(|text| !text.is_empty());
        let argv = fields.texts("argv")?;
        let program = match (command, argv) {
            (Some(_), Some(_)) => return Err(Refusal::body("only one of command and argv may be given")),
            (None, None) => return Err(Refusal::body("one of command and argv must be given, and not be empty")),
            (Some(text), None) => Program::Shell(text),
            (None, Some(argv)) if argv.first().is_none_or(String::is_empty) => {
                return Err(Refusal::body("argv must not be empty, nor its first item"));
            }
            (None, Some(argv)) => Program::Argv(argv),
        };
        let text = match &program {
            Program::Shell(text) => text.clone(),
            Program::Argv(argv) => argv.join(" "),
        };
        if matches!(&program, Program::Argv(argv) if argv.iter().any(|word| word.contains('\0'))) || text.contains('\0')
        {
            return Err(Refusal::body("a command must not contain a NUL byte"));
        }
        let mut environment = environment::current();
        for (name, value) in fields.map("envs")? {
            if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
                return Err(Refusal::body(format!("envs: {name:?} cannot be a variable")));
            }
            environment.insert(name, value);
        }
        let cwd = directory(fields.text("cwd")?.as_deref(), &environment)?;
        let identity = match (fields.id("uid")?, fields.id("gid")?) {
            (None, Some(_)) => return Err(Refusal::body("gid requires uid")),
            (None, None) => None,
            (Some(uid), gid) => Some(Accounts::load().identity(uid, gid)),
        };
        let lines = match fields.text("line_mode")?.as_deref() {
            None => app.config.line_mode,
            Some("legacy") => LineMode::Legacy,
            Some("preserving") => LineMode::Preserving,
            Some(other) => return Err(Refusal::body(format!("line_mode: {other:?} is neither legacy nor preserving"))),
        };
        Ok(Self { program, text, cwd, environment, identity, timeout: timeout(fields.number("timeout")?)?, lines })
    }

    /// A shell's command in the daemon's directory, as the code API has it.
    pub(super) fn of_text(app: &App, text: &str) -> Result<Self> {
        let environment = environment::current();
        let cwd = directory(None, &environment)?;
        let program = Program::Shell(text.to_owned());
        let (text, lines) = (text.to_owned(), app.config.line_mode);
        if text.contains('\0') {
            return Err(Refusal::body("a command must not contain a NUL byte"));
        }
        Ok(Self { program, text, cwd, environment, identity: None, timeout: None, lines })
    }

    fn prepared(self) -> Prepared {
        Box::new(move |streams: Streams| Start {
            program: self.program,
            cwd: self.cwd,
            environment: self.environment,
            identity: self.identity,
            streams,
            passed: Vec::new(),
            confinement: None,
        })
    }
}

/// A time limit in milliseconds; none or 0 is no limit.
pub(super) fn timeout(milliseconds: Option<i64>) -> Result<Option<Duration>> {
    match milliseconds {
        None | Some(0) => Ok(None),
        Some(limit) => match u64::try_from(limit) {
            Ok(limit) => Ok(Some(Duration::from_millis(limit))),
            Err(_) => Err(Refusal::body(format!("timeout: {limit} is negative"))),
        },
    }
}

/// The directory that a request names, or the daemon's.
pub(super) fn directory(name: Option<&str>, environment: &Variables) -> Result<PathBuf> {
    let own = || std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/"));
    let Some(name) = name.filter(|name| !name.is_empty()) else { return Ok(own()) };
    let path = own().join(super::files::expand(name, environment).map_err(|e| Refusal::body(e.message().to_owned()))?);
    match std::fs::metadata(&path) {
        Ok(meta) if meta.is_dir() => Ok(path),
        Ok(_) => Err(Refusal::body(format!("working directory {name} is not a directory"))),
        Err(e) => Err(Refusal::body(format!("working directory {name}: {e}"))),
    }
}

/// `POST /command`.
pub(super) async fn run(State(app): State<Arc<App>>, body: Bytes) -> Result<Response> {
    let fields = body::fields(&body)?;
    let request = Request::parse(&app, &fields)?;
    execute(&app, request, fields.flag("background")?)
}

/// Starts a command and answers with its events.
pub(super) fn execute(app: &Arc<App>, request: Request, background: bool) -> Result<Response> {
    let permit = app.admit()?;
    let failed = |e: std::io::Error| Refusal::runtime(format!("error running commands: {e}"));
    let (text, timeout) = (request.text.clone(), request.timeout);
    let begun = Instant::now();
    let mut batch = Batch::default();
    if background {
        let command = app.commands.background(&text, timeout, request.prepared()).map_err(failed)?;
        if let Some(mut ended) = command.ended() {
            tokio::spawn(async move {
                let _permit = permit;
                let _ = ended.wait_for(Option::is_some).await;
            });
        }
        let (mut sender, response) = events::stream();
        batch.init(&command.id);
        match command.state() {
            Standing::Failed(reason, _) => batch.error("CommandExecError", &reason, std::slice::from_ref(&reason)),
            _ => batch.complete(begun.elapsed()),
        }
        tokio::spawn(async move { sender.send(&mut batch).await });
        return Ok(response);
    }
    let lines = request.lines;
    let started = app.commands.foreground(&text, timeout, request.prepared()).map_err(failed)?;
    let (mut sender, response) = events::stream();
    batch.init(&started.command.id);
    tokio::spawn(async move {
        let _permit = permit;
        match started.output {
            Err(reason) => {
                batch.error("CommandExecError", &reason, std::slice::from_ref(&reason));
                sender.send(&mut batch).await;
            }
            Ok(output) => {
                sender.send(&mut batch).await;
                follow(output, sender, lines, begun, None).await;
            }
        }
    });
    Ok(response)
}

/// Called between the end of a process and the event that tells of it.
pub(super) type BeforeEnd = Box<dyn FnOnce() + Send>;

/// Sends what a process writes as events, until it has ended.
pub(super) async fn follow(
    mut output: Output,
    mut sender: Sender,
    mode: LineMode,
    begun: Instant,
    before_end: Option<BeforeEnd>,
) {
    let (mut out, mut err) = (Lines::new(mode), Lines::new(mode));
    let mut batch = Batch::default();
    let mut alive = tokio::time::interval_at(tokio::time::Instant::now() + KEEPALIVE, KEEPALIVE);
    alive.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let exit = loop {
        tokio::select! {
            piece = output.next() => match piece {
                Piece::Stdout(bytes) => out.push(bytes, |line| batch.text("stdout", line)),
                Piece::Stderr(bytes) => err.push(bytes, |line| batch.text("stderr", line)),
                Piece::Exited(exit) => break exit,
            },
            _ = alive.tick() => sender.ping(),
        }
        // Whether anybody reads it or not, the process goes on; but it waits for a client that is slow.
        sender.send(&mut batch).await;
    };
    out.finish(|line| batch.text("stdout", line));
    err.finish(|line| batch.text("stderr", line));
    if batch.len() > PART {
        sender.send(&mut batch).await;
    }
    if let Some(before_end) = before_end {
        before_end();
    }
    ended(&mut batch, &exit, begun.elapsed());
    sender.send(&mut batch).await;
}

/// The last event of a process.
fn ended(batch: &mut Batch, exit: &Exit, took: Duration) {
    match exit.code {
        Some(0) => batch.complete(took),
        Some(code) => batch.error("CommandExecError", &code.to_string(), &[describe(exit)]),
        None => batch.error("CommandExecError", "-1", &[describe(exit)]),
    }
}

/// How a process ended, in the protocol's words.
fn describe(exit: &Exit) -> String {
    match (exit.code, exit.signal) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(signal)) => format!("signal: {}", reaper::signal_name(signal)),
        (None, None) => "it ended".to_owned(),
    }
}

fn status_of(command: &Command) -> serde_json::Value {
    let mut out = json!({
        "id": command.id,
        "content": command.text,
        "running": false,
        "started_at": rfc3339(command.started),
    });
    let mut finished = |at: SystemTime, code: i32, error: Option<String>| {
        out["exit_code"] = code.into();
        out["finished_at"] = rfc3339(at).into();
        if let Some(error) = error {
            out["error"] = error.into();
        }
    };
    match command.state() {
        Standing::Running => out["running"] = true.into(),
        Standing::Failed(reason, at) => finished(at, 255, Some(reason)),
        Standing::Ended(exit) => {
            let error = (exit.code != Some(0)).then(|| describe(&exit));
            finished(exit.at, exit.code.unwrap_or(-1), error);
        }
    }
    out
}

/// `GET /command/status/{id}`.
pub(super) async fn status(State(app): State<Arc<App>>, UrlPath(id): UrlPath<String>) -> Result<Response> {
    match app.commands.get(&id) {
        Some(command) => Ok(Json(status_of(&command)).into_response()),
        None => Err(Refusal::new(StatusCode::NOT_FOUND, "INVALID_REQUEST_BODY", format!("command not found: {id}"))),
    }
}

/// `GET /command`.
pub(super) async fn list(State(app): State<Arc<App>>) -> Response {
    let commands: Vec<_> = app.commands.list().iter().map(|command| status_of(command)).collect();
    ([(header::CACHE_CONTROL, "no-store")], Json(json!({"commands": commands}))).into_response()
}

/// `GET /command/{id}/logs`.
pub(super) async fn logs(
    State(app): State<Arc<App>>,
    UrlPath(id): UrlPath<String>,
    OriginalUri(uri): OriginalUri,
) -> Result<Response> {
    let Some(command) = app.commands.get(&id) else {
        return Err(Refusal::body(format!("command not found: {id}")));
    };
    if command.store.is_none() {
        return Err(Refusal::body(format!("command {id} is not running in background")));
    }
    let cursor = Query::of(&uri).get("cursor").and_then(|text| text.parse::<i64>().ok()).unwrap_or(0);
    let cursor = u64::try_from(cursor).map_err(|_| Refusal::body(format!("cursor {cursor} is negative")))?;
    let read = tokio::task::spawn_blocking(move || {
        command.store.as_ref().map_or(Ok((Vec::new(), cursor)), |store| store.read(cursor, LOG_LIMIT))
    });
    let read = read.await.map_err(|e| Refusal::runtime(e.to_string()))?;
    let (bytes, next) = read.map_err(|e| Refusal::runtime(format!("read the log of command {id}: {e}")))?;
    let mut response = ([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], bytes).into_response();
    response.headers_mut().insert("EXECD-COMMANDS-TAIL-CURSOR", HeaderValue::from(next));
    Ok(response)
}

/// `DELETE /command?id=` and `DELETE /code?id=`.
pub(super) async fn interrupt(State(app): State<Arc<App>>, OriginalUri(uri): OriginalUri) -> Result<Response> {
    let query = Query::of(&uri);
    let id = body::require(&query, "id")?;
    if let Some(context) = app.code.get(id) {
        context.interrupt().await.map_err(|e| Refusal::runtime(format!("error interrupting code execution: {e}")))?;
        return Ok(StatusCode::OK.into_response());
    }
    if let Some(command) = app.commands.get(id) {
        command.interrupt().await.map_err(|e| Refusal::runtime(format!("error interrupting command {id}: {e}")))?;
        return Ok(StatusCode::OK.into_response());
    }
    if app.sessions.close(id) {
        return Ok(StatusCode::OK.into_response());
    }
    Err(Refusal::runtime("error interrupting code execution: no such session"))
}
