//! Processes: confined, supervised, and known after their end.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum::Json;
use axum::body::Bytes;
use axum::extract::{OriginalUri, Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use nix::sys::signal::Signal;
use serde::Deserialize;
use serde_json::{Value, json};

use super::failure::{Body, Failure, Result};
use super::{App, PREFIX};
use crate::api::query::Query;
use crate::api::rfc3339;
use crate::process::confine::Confinement;
use crate::process::environment;
use crate::process::input::Refused;
use crate::process::managed::{Ended, Managed, Order, Restart, Snapshot, Standing};
use crate::process::spawn::Program;
use crate::process::users::{self, Accounts, Identity};

/// How much output is kept unless the request says otherwise, and at most, in bytes.
const KEEP: (usize, usize) = (1 << 20, 64 << 20);

/// How many are on a page unless the request says otherwise, and at most.
pub(super) const PAGE: (usize, usize) = (100, 1000);

/// The longest time that somebody waits in one request.
const WAIT: Duration = Duration::from_secs(600);

/// A name or a number.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum Who {
    Number(u32),
    Name(String),
}

/// Who a request is for: a user and a group, or the daemon's own where it says nothing.
///
/// # Errors
/// A name that nobody has.
pub(super) fn identity(user: Option<&Who>, group: Option<&Who>) -> Result<Option<Identity>> {
    let accounts = Accounts::load();
    let unknown = |what: &str, name: &str| Failure::invalid(format!("{what}: nobody is called {name:?} here"));
    let gid = match group {
        None => None,
        Some(Who::Number(gid)) => Some(*gid),
        Some(Who::Name(name)) => {
            let known = accounts.group_named(name).or_else(|| name.parse().ok());
            Some(known.ok_or_else(|| unknown("group", name))?)
        }
    };
    let uid = match user {
        None if gid.is_none() => return Ok(None),
        None => users::own().0,
        Some(Who::Number(uid)) => *uid,
        Some(Who::Name(name)) => {
            let known = accounts.user_named(name).map(|user| user.uid).or_else(|| name.parse().ok());
            known.ok_or_else(|| unknown("user", name))?
        }
    };
    Ok(Some(accounts.identity(uid, gid)))
}

/// Of a terminal.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Size {
    columns: u16,
    rows: u16,
}

/// `POST /processes`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Start {
    argv: Option<Vec<String>>,
    command: Option<String>,
    cwd: Option<PathBuf>,
    #[serde(default)]
    env: BTreeMap<String, String>,
    #[serde(default)]
    clear_env: bool,
    user: Option<Who>,
    group: Option<Who>,
    tag: Option<String>,
    terminal: Option<Size>,
    #[serde(default)]
    stdin: bool,
    #[serde(default = "yes")]
    stdout: bool,
    #[serde(default = "yes")]
    stderr: bool,
    keep_output_bytes: Option<usize>,
    timeout_ms: Option<u64>,
    #[serde(default = "grace")]
    grace_ms: u64,
    #[serde(default)]
    confinement: Confinement,
    #[serde(default)]
    restart: Restart,
}

fn yes() -> bool {
    true
}

fn grace() -> u64 {
    2000
}

impl Start {
    fn order(self) -> Result<Order> {
        let program = match (self.argv, self.command) {
            (Some(argv), None) if argv.first().is_some_and(|name| !name.is_empty()) => Program::Argv(argv),
            (None, Some(command)) if !command.is_empty() => Program::Shell(command),
            _ => return Err(Failure::invalid("one of argv and command is needed, and must not be empty")),
        };
        let words: Vec<&String> = match &program {
            Program::Argv(argv) => argv.iter().collect(),
            Program::Shell(command) => vec![command],
        };
        if words.iter().any(|word| word.contains('\0')) {
            return Err(Failure::invalid("argv: a NUL byte cannot be passed on"));
        }
        let cwd = self.cwd.unwrap_or_else(|| std::env::current_dir().unwrap_or_else(|_| "/".into()));
        if !cwd.is_absolute() || !cwd.is_dir() {
            return Err(Failure::invalid(format!("cwd: {} is not the absolute path of a directory", cwd.display())));
        }
        let mut variables = if self.clear_env { BTreeMap::new() } else { environment::current() };
        for (name, value) in self.env {
            if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
                return Err(Failure::invalid(format!("env: {name:?} cannot be a variable")));
            }
            variables.insert(name, value);
        }
        let keep = self.keep_output_bytes.unwrap_or(KEEP.0);
        if keep > KEEP.1 {
            return Err(Failure::invalid(format!("keep_output_bytes: {keep} is more than {}", KEEP.1)));
        }
        if self.terminal.is_some() && (self.stdin || !self.stdout || !self.stderr) {
            return Err(Failure::invalid("stdin, stdout, stderr: a terminal is all three, and is kept"));
        }
        Ok(Order {
            program,
            cwd,
            environment: variables,
            identity: identity(self.user.as_ref(), self.group.as_ref())?,
            tag: self.tag,
            terminal: self.terminal.map(|size| (size.columns, size.rows)),
            stdin: self.stdin,
            stdout: self.stdout,
            stderr: self.stderr,
            keep,
            timeout: self.timeout_ms.map(Duration::from_millis),
            grace: Duration::from_millis(self.grace_ms),
            confinement: self.confinement,
            restart: self.restart,
        })
    }
}

/// `POST /processes`.
pub(super) async fn start(State(app): State<Arc<App>>, Body(request): Body<Start>) -> Result<Response> {
    let order = request.order()?;
    let Ok(permit) = app.core.executions.clone().try_acquire_owned() else {
        return Err(Failure::exhausted(format!("there are {} executions already", app.core.config.executions)));
    };
    let managed = app.processes.start(order).await.map_err(|(managed, e)| {
        app.processes.remove(&managed);
        Failure::of("start the process", &e)
    })?;
    let kept = managed.clone();
    tokio::spawn(async move {
        kept.over().await;
        drop(permit);
    });
    let location = format!("{PREFIX}/processes/{}", managed.id);
    Ok((StatusCode::CREATED, [("location", location)], Json(described(&managed))).into_response())
}

/// A process by the id or tag of a request.
pub(super) fn find(app: &App, id: &str) -> Result<Arc<Managed>> {
    app.processes.find(id).ok_or_else(|| Failure::not_found(format!("there is no process {id}")))
}

fn state(snapshot: &Snapshot) -> &'static str {
    match snapshot.standing {
        Standing::Starting => "starting",
        Standing::Running if snapshot.halted => "stopped",
        Standing::Running => "running",
        Standing::Waiting => "restarting",
        Standing::Exited => "exited",
        Standing::Failed => "failed",
    }
}

/// What is told of a process. Its environment may hold secrets, and is not.
pub(super) fn described(managed: &Managed) -> Value {
    let snapshot = managed.snapshot();
    let order = &managed.order;
    let time = |at: SystemTime| rfc3339(at);
    let (argv, command) = match &order.program {
        Program::Argv(argv) => (Some(argv), None),
        Program::Shell(command) => (None, Some(command)),
    };
    let over = matches!(snapshot.standing, Standing::Exited | Standing::Failed | Standing::Waiting);
    let exit = snapshot.exit.filter(|_| over);
    json!({
        "id": managed.id,
        "tag": order.tag,
        "argv": argv,
        "command": command,
        "cwd": order.cwd,
        "user": order.identity.as_ref().map(|identity| identity.uid),
        "terminal": order.terminal.is_some(),
        "state": state(&snapshot),
        "pid": snapshot.pid,
        "created_at": time(managed.created),
        "started_at": snapshot.started.map(time),
        "finished_at": exit.map(|exit| time(exit.at)),
        "exit_code": exit.and_then(|exit| exit.code),
        "signal": exit.and_then(|exit| exit.signal),
        "signal_name": exit.and_then(|exit| exit.signal).and_then(|number| Signal::try_from(number).ok().map(Signal::as_str)),
        "ended_by": snapshot.ended.map(|why| match why {
            Ended::Timeout => "timeout",
            Ended::CpuTime => "cpu_time",
            Ended::Memory => "memory",
        }),
        "error": snapshot.why,
        "restarts": snapshot.restarts,
        "usage": {
            "cpu_time_ms": snapshot.cpu.as_millis() as u64,
            "memory_bytes": snapshot.memory,
            "peak_memory_bytes": snapshot.peak_memory,
            "processes": snapshot.processes,
        },
        "output": {"first_offset": snapshot.output.0, "end_offset": snapshot.output.1},
    })
}

/// A page: where it begins, and how long it is at most.
pub(super) fn page(query: &Query) -> Result<(usize, usize)> {
    let number = |name: &str, usual: usize| match query.get(name) {
        None => Ok(usual),
        Some(text) => text.parse().map_err(|_| Failure::invalid(format!("{name}: {text:?} is not a number"))),
    };
    let limit = number("limit", PAGE.0)?;
    if limit == 0 || limit > PAGE.1 {
        return Err(Failure::invalid(format!("limit: {limit} is not from 1 to {}", PAGE.1)));
    }
    Ok((number("offset", 0)?, limit))
}

/// `GET /processes`.
pub(super) async fn list(State(app): State<Arc<App>>, OriginalUri(uri): OriginalUri) -> Result<Response> {
    let query = Query::of(&uri);
    let (offset, limit) = page(&query)?;
    let wanted = query.get("state");
    let all: Vec<Value> = app.processes.list().iter().map(|one| described(one)).collect();
    let fitting: Vec<Value> =
        all.into_iter().filter(|one| wanted.is_none_or(|state| one["state"].as_str() == Some(state))).collect();
    let total = fitting.len();
    let processes: Vec<Value> = fitting.into_iter().skip(offset).take(limit).collect();
    Ok(Json(json!({"processes": processes, "total": total})).into_response())
}

/// `GET /processes/{id}`.
pub(super) async fn get(State(app): State<Arc<App>>, Path(id): Path<String>) -> Result<Response> {
    Ok(Json(described(&*find(&app, &id)?)).into_response())
}

/// `DELETE /processes/{id}`.
pub(super) async fn remove(State(app): State<Arc<App>>, Path(id): Path<String>) -> Result<StatusCode> {
    app.processes.remove(&*find(&app, &id)?);
    Ok(StatusCode::NO_CONTENT)
}

/// A signal's number, from that or from its name with or without `SIG`.
fn number(text: &Who) -> Result<i32> {
    let wrong = |name: String| Failure::invalid(format!("signal: {name} is none"));
    match text {
        Who::Number(number) => i32::try_from(*number)
            .ok()
            .filter(|number| (1..=64).contains(number))
            .ok_or_else(|| wrong(number.to_string())),
        Who::Name(name) => {
            let upper = name.to_uppercase();
            let full = if upper.starts_with("SIG") { upper } else { format!("SIG{upper}") };
            let real = full.strip_prefix("SIGRTMIN+").and_then(|more| more.parse::<i32>().ok());
            match real {
                Some(more) if (0..=30).contains(&more) => Ok(libc::SIGRTMIN() + more),
                _ => full.parse::<Signal>().map(|signal| signal as i32).map_err(|_| wrong(format!("{name:?}"))),
            }
        }
    }
}

/// `POST /processes/{id}/signal`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ASignal {
    signal: Who,
    #[serde(default = "yes")]
    group: bool,
}

fn not_running(id: &str, e: &std::io::Error) -> Failure {
    match e.raw_os_error() {
        Some(libc::ESRCH) => Failure::state(format!("process {id} does not run")),
        _ => Failure::of(&format!("signal process {id}"), e),
    }
}

/// `POST /processes/{id}/signal`.
pub(super) async fn signal(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
    Body(request): Body<ASignal>,
) -> Result<StatusCode> {
    let managed = find(&app, &id)?;
    managed.signal(number(&request.signal)?, request.group).map_err(|e| not_running(&id, &e))?;
    Ok(StatusCode::NO_CONTENT)
}

/// `POST /processes/{id}/stop`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Stop {
    #[serde(default = "grace")]
    grace_ms: u64,
}

/// `POST /processes/{id}/stop`: asks it to end, kills it after a while, and does not start it again.
pub(super) async fn stop(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
    Body(request): Body<Stop>,
) -> Result<Response> {
    let managed = find(&app, &id)?;
    managed.stop(Signal::SIGTERM);
    let grace = Duration::from_millis(request.grace_ms).min(WAIT);
    if tokio::time::timeout(grace, managed.over()).await.is_err() {
        managed.stop(Signal::SIGKILL);
        managed.over().await;
    }
    Ok(Json(described(&managed)).into_response())
}

/// `GET /processes/{id}/wait?timeout_ms=`: answers when it has ended, or with how it is when the time is up.
pub(super) async fn wait(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
    OriginalUri(uri): OriginalUri,
) -> Result<Response> {
    let managed = find(&app, &id)?;
    let longest = match Query::of(&uri).get("timeout_ms") {
        None => WAIT,
        Some(text) => Duration::from_millis(
            text.parse().map_err(|_| Failure::invalid(format!("timeout_ms: {text:?} is not a number")))?,
        )
        .min(WAIT),
    };
    let _ = tokio::time::timeout(longest, managed.over()).await;
    Ok(Json(described(&managed)).into_response())
}

/// `POST /processes/{id}/stdin`: the body is typed.
pub(super) async fn write(State(app): State<Arc<App>>, Path(id): Path<String>, body: Bytes) -> Result<StatusCode> {
    find(&app, &id)?.write(&body).await.map_err(|refused| match refused {
        Refused::Closed => Failure::state(format!("process {id} has no open standard input")),
        Refused::OtherKind => Failure::state(format!("process {id} is on a terminal")),
        Refused::Failed(text) => Failure::state(format!("write to process {id}: {text}")),
    })?;
    Ok(StatusCode::NO_CONTENT)
}

/// `DELETE /processes/{id}/stdin`.
pub(super) async fn close_input(State(app): State<Arc<App>>, Path(id): Path<String>) -> Result<StatusCode> {
    if find(&app, &id)?.close_input().await {
        return Ok(StatusCode::NO_CONTENT);
    }
    Err(Failure::state("a terminal has no end of its own: type Ctrl-D".to_owned()))
}

/// `POST /processes/{id}/size`.
pub(super) async fn resize(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
    Body(size): Body<Size>,
) -> Result<StatusCode> {
    let resized = find(&app, &id)?.resize(size.columns, size.rows).await;
    resized.map_err(|_| Failure::state(format!("process {id} is on no terminal")))?;
    Ok(StatusCode::NO_CONTENT)
}
