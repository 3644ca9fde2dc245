//! `process.Process`: processes with their input, output and end.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::extract::Request;
use axum::response::Response;
use bytes::Bytes;
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::App;
use super::connect::{Call, Failure, Messages, Result, Stream, fail};
use super::schema::{self, EMPTY, EVENT_RESPONSE, INPUT_REQUEST, LIST_RESPONSE, SELECT, SIGNAL_REQUEST};
use super::schema::{START_REQUEST, STREAM_REQUEST, UPDATE_REQUEST};
use super::user::User;
use crate::process::environment::Variables;
use crate::process::input::Refused;
use crate::process::live::{Event, Found, Live, Selector, Wanted};
use crate::process::pty;
use crate::process::reaper::Exit;
use crate::process::spawn::{Program, Start};

/// Where programs are looked for when the daemon itself has no `PATH`.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A unary method.
pub(super) async fn unary(app: Arc<App>, method: &str, call: Call, body: Bytes) -> Option<Response> {
    let app = &app;
    Some(match method {
        "List" => call.unary(body, &EMPTY, &LIST_RESPONSE, |_| async { Ok(list(app)) }).await,
        "Update" => call.unary(body, &UPDATE_REQUEST, &EMPTY, |request| update(app, request)).await,
        "SendInput" => call.unary(body, &INPUT_REQUEST, &EMPTY, |request| send_input(app, request)).await,
        "SendSignal" => call.unary(body, &SIGNAL_REQUEST, &EMPTY, |request| send_signal(app, request)).await,
        "CloseStdin" => call.unary(body, &SELECT, &EMPTY, |request| close_stdin(app, request)).await,
        _ => return None,
    })
}

/// A method with streams. `None` when there is none of the name.
pub(super) async fn stream(app: Arc<App>, method: &str, call: Call, user: User, request: Request) -> Option<Response> {
    Some(match method {
        "Start" => start(app, call, user, request).await,
        "Connect" => connect(app, call, request).await,
        "StreamInput" => stream_input(app, call, request).await,
        _ => return None,
    })
}

fn list(app: &App) -> Value {
    let all: Vec<Value> = app
        .processes
        .list()
        .iter()
        .map(|live| {
            let mut info = json!({"config": live.config, "pid": live.pid});
            if let Some(tag) = &live.tag {
                info["tag"] = tag.clone().into();
            }
            info
        })
        .collect();
    if all.is_empty() { json!({}) } else { json!({"processes": all}) }
}

fn selector(value: &Value) -> Result<Selector> {
    if let Some(pid) = value["pid"].as_u64() {
        return Ok(Selector::Pid(i32::try_from(pid).unwrap_or(-1)));
    }
    match value["tag"].as_str() {
        Some(tag) => Ok(Selector::Tag(tag.to_owned())),
        None => Err(fail("unimplemented", "the process is selected by its pid or its tag")),
    }
}

fn missing(selector: &Selector) -> Failure {
    fail(
        "not_found",
        match selector {
            Selector::Pid(pid) => format!("process with pid {pid} not found"),
            Selector::Tag(tag) => format!("process with tag {tag} not found"),
        },
    )
}

fn live(app: &App, request: &Value) -> Result<Arc<Live>> {
    let selector = selector(&request["process"])?;
    match app.processes.find(&selector) {
        Some(Found::Live(live)) => Ok(live),
        _ => Err(missing(&selector)),
    }
}

fn size(pty: &Value) -> Option<(u16, u16)> {
    let part = |name: &str| pty["size"][name].as_u64().map(|size| u16::try_from(size).unwrap_or(u16::MAX)).unwrap_or(0);
    pty.is_object().then(|| (part("cols"), part("rows")))
}

async fn update(app: &App, request: Value) -> Result<Value> {
    let live = live(app, &request)?;
    if let Some((columns, rows)) = size(&request["pty"]) {
        live.resize(columns, rows).await.map_err(|e| fail("internal", format!("resize: {e}")))?;
    }
    Ok(json!({}))
}

async fn write(live: &Live, input: &Value) -> Result<()> {
    let (bytes, terminal) = match (input["stdin"].as_str(), input["pty"].as_str()) {
        (Some(text), _) => (schema::bytes(text), false),
        (None, Some(text)) => (schema::bytes(text), true),
        (None, None) => return Err(fail("unimplemented", "there is no input")),
    };
    live.write(&bytes.unwrap_or_default(), terminal).await.map_err(|refused| {
        fail(
            "internal",
            match refused {
                Refused::Closed => "error writing to stdin: stdin not enabled or closed".to_owned(),
                Refused::OtherKind if terminal => "error writing to pty: the process is not on a terminal".to_owned(),
                Refused::OtherKind => "error writing to stdin: the process is on a terminal".to_owned(),
                Refused::Failed(e) => format!("error writing to stdin: {e}"),
            },
        )
    })
}

async fn send_input(app: &App, request: Value) -> Result<Value> {
    write(&*live(app, &request)?, &request["input"]).await.map(|()| json!({}))
}

async fn send_signal(app: &App, request: Value) -> Result<Value> {
    let live = live(app, &request)?;
    let signal = match request["signal"].as_str() {
        Some("SIGNAL_SIGKILL") => Signal::SIGKILL,
        Some("SIGNAL_SIGTERM") => Signal::SIGTERM,
        other => return Err(fail("unimplemented", format!("signal {}", other.unwrap_or("SIGNAL_UNSPECIFIED")))),
    };
    match live.signal(signal) {
        Err(e) if e.raw_os_error() == Some(libc::ESRCH) => Err(missing(&Selector::Pid(live.pid))),
        other => other.map(|()| json!({})).map_err(|e| fail("internal", format!("send {signal}: {e}"))),
    }
}

async fn close_stdin(app: &App, request: Value) -> Result<Value> {
    if live(app, &request)?.close_input().await {
        return Ok(json!({}));
    }
    Err(fail("unknown", "cannot close stdin for PTY process: send Ctrl+D (0x04) instead"))
}

async fn stream_input(app: Arc<App>, call: Call, request: Request) -> Response {
    let mut messages = Messages::new(request.into_body(), &call, &STREAM_REQUEST);
    let (stream, response) = call.stream(&EMPTY);
    tokio::spawn(async move {
        let mut selected = None;
        let done = loop {
            let message = match messages.next().await {
                Ok(Some(message)) => message,
                Ok(None) => break Ok(()),
                Err(failure) => break Err(failure),
            };
            let step = async {
                if message["start"].is_object() {
                    selected = Some(live(&app, &message["start"])?);
                } else if message["data"].is_object() {
                    let live: &Arc<Live> = selected
                        .as_ref()
                        .ok_or_else(|| fail("invalid_argument", "no process was selected before data"))?;
                    write(live, &message["data"]["input"]).await?;
                }
                Ok(())
            };
            if let Err(failure) = step.await {
                break Err(failure);
            }
        };
        if done.is_ok() && stream.send(&json!({})).await.is_err() {
            return;
        }
        stream.end(done).await;
    });
    response
}

async fn connect(app: Arc<App>, call: Call, request: Request) -> Response {
    let messages = Messages::new(request.into_body(), &call, &SELECT);
    let found = messages.only().await.and_then(|message| {
        let selector = selector(&message["process"])?;
        app.processes.find(&selector).ok_or_else(|| missing(&selector))
    });
    match found {
        Err(failure) => call.refuse(&failure),
        Ok(Found::Live(live)) => {
            let heard = live.listen();
            let (stream, response) = call.stream(&EVENT_RESPONSE);
            tokio::spawn(tell(stream, call, live.pid, heard));
            response
        }
        Ok(Found::Ended(pid, exit)) => {
            let (stream, response) = call.stream(&EVENT_RESPONSE);
            tokio::spawn(async move {
                let (sender, heard) = mpsc::channel(1);
                let _ = sender.send(Event::End(exit)).await;
                tell(stream, call, pid, heard).await;
            });
            response
        }
    }
}

async fn start(app: Arc<App>, call: Call, user: User, request: Request) -> Response {
    let messages = Messages::new(request.into_body(), &call, &START_REQUEST);
    let started = match messages.only().await {
        Ok(message) => begin(&app, call, &user, &message),
        Err(failure) => Err(failure),
    };
    match started {
        Err(failure) => call.refuse(&failure),
        Ok((live, heard)) => {
            let (stream, response) = call.stream(&EVENT_RESPONSE);
            tokio::spawn(tell(stream, call, live.pid, heard));
            response
        }
    }
}

fn begin(app: &App, call: Call, user: &User, message: &Value) -> Result<(Arc<Live>, mpsc::Receiver<Event>)> {
    let config = &message["process"];
    let texts = |value: &Value| -> Vec<String> {
        value.as_array().into_iter().flatten().filter_map(|item| item.as_str().map(str::to_owned)).collect()
    };
    let cmd = config["cmd"].as_str().unwrap_or_default().to_owned();
    let mut argv = vec![cmd];
    argv.extend(texts(&config["args"]));
    if argv[0].is_empty() || argv.iter().any(|word| word.contains('\0')) {
        return Err(fail("invalid_argument", "cmd must not be empty, and nothing of it hold a NUL byte"));
    }
    let asked = config["cwd"].as_str().unwrap_or_default();
    let mut cwd = user.path(app, asked)?;
    if asked.is_empty() && app.state().workdir.is_none() && !cwd.is_dir() {
        // Many an image has a user whose home it lacks, and nobody has asked for it.
        cwd = "/".into();
    }
    if !cwd.is_dir() {
        return Err(fail("invalid_argument", format!("cwd '{}' does not exist", cwd.display())));
    }
    let environment = environment(app, user, &config["envs"])?;
    let tag = message["tag"].as_str().map(str::to_owned);
    let terminal = size(&message["pty"]);
    let wanted = match terminal {
        Some((0, 0)) => Wanted::Terminal(pty::SIZE.0, pty::SIZE.1),
        Some((columns, rows)) => Wanted::Terminal(columns, rows),
        // Absent is true, for clients from before it could be said.
        None => Wanted::Pipes { stdin: message["stdin"].as_bool().unwrap_or(true) },
    };
    let argv = runnable(argv, &cwd, &environment);
    let identity = user.identity();
    let program = Program::Argv(argv);
    let start = |streams| Start { program, cwd, environment, identity, streams, passed: Vec::new(), confinement: None };
    let timeout = call.timeout.filter(|timeout| *timeout > Duration::ZERO);
    app.processes.start(wanted, tag, config.clone(), timeout, start).map_err(|e| {
        let code = if e.raw_os_error() == Some(libc::EPERM) { "permission_denied" } else { "invalid_argument" };
        fail(code, format!("error starting process: {e}"))
    })
}

/// The daemon's `PATH`, the user's names, what was set for all, and the request's.
fn environment(app: &App, user: &User, envs: &Value) -> Result<Variables> {
    let mut out = Variables::new();
    out.insert("PATH".into(), std::env::var("PATH").unwrap_or_else(|_| PATH.into()));
    out.insert("HOME".into(), user.home.clone());
    out.insert("USER".into(), user.name.clone());
    out.insert("LOGNAME".into(), user.name.clone());
    out.extend(app.variables());
    for (name, value) in envs.as_object().into_iter().flatten() {
        let value = value.as_str().unwrap_or_default();
        if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
            return Err(fail("invalid_argument", format!("envs: {name:?} cannot be a variable")));
        }
        out.insert(name.clone(), value.to_owned());
    }
    Ok(out)
}

fn is_program(name: &str, cwd: &Path, environment: &Variables) -> bool {
    if name.contains('/') {
        return cwd.join(name).exists();
    }
    let search = environment.get("PATH").map_or(PATH, String::as_str);
    search.split(':').any(|directory| PathBuf::from(directory).join(name).exists())
}

/// What is executed for a command: bash where it is, sh where a shell is asked for and bash is missing. What is not there at
/// all is executed by a shell, which says so as shells do, with the exit code 127.
fn runnable(argv: Vec<String>, cwd: &Path, environment: &Variables) -> Vec<String> {
    let name = argv[0].as_str();
    if is_program(name, cwd, environment) || !is_program("/bin/sh", cwd, environment) {
        return argv;
    }
    let shell = || "/bin/sh".to_owned();
    if Path::new(name).file_name().is_some_and(|name| name == "bash") {
        return [shell()].into_iter().chain(argv.into_iter().skip(1)).collect();
    }
    [shell(), "-c".into(), "exec \"$@\"".into(), "--".into()].into_iter().chain(argv).collect()
}

/// Sends what a process does.
async fn tell(stream: Stream, call: Call, pid: i32, mut heard: mpsc::Receiver<Event>) {
    let event = |event: Value| json!({"event": event});
    if stream.send(&event(json!({"start": {"pid": pid}}))).await.is_err() {
        return;
    }
    let deadline = call.timeout.map(|timeout| tokio::time::Instant::now() + timeout);
    let overdue = async {
        match deadline {
            Some(deadline) => tokio::time::sleep_until(deadline).await,
            None => std::future::pending().await,
        }
    };
    tokio::pin!(overdue);
    let done = loop {
        let next = tokio::select! {
            biased;
            next = heard.recv() => next,
            () = &mut overdue => break Err(fail("deadline_exceeded", "context deadline exceeded")),
            () = stream.closed() => return,
            () = tokio::time::sleep(call.keepalive) => {
                if stream.send(&event(json!({"keepalive": {}}))).await.is_err() {
                    return;
                }
                continue;
            }
        };
        let data = |name: &str, bytes: &Bytes| {
            let mut data = serde_json::Map::new();
            data.insert(name.to_owned(), schema::text(bytes).into());
            json!({"data": data})
        };
        let (told, last) = match &next {
            None => break Err(fail("resource_exhausted", "the output came faster than it was read")),
            Some(Event::Stdout(bytes)) => (data("stdout", bytes), false),
            Some(Event::Stderr(bytes)) => (data("stderr", bytes), false),
            Some(Event::Terminal(bytes)) => (data("pty", bytes), false),
            Some(Event::End(exit)) => (json!({"end": end(exit)}), true),
        };
        if stream.send(&event(told)).await.is_err() {
            return;
        }
        if last {
            break Ok(());
        }
    };
    stream.end(done).await;
}

/// How a process ended. What has its default is left out.
fn end(exit: &Exit) -> Value {
    match (exit.code, exit.signal) {
        (Some(0), _) => json!({"exited": true, "status": "exit status 0"}),
        (Some(code), _) => {
            let text = format!("exit status {code}");
            json!({"exitCode": code, "exited": true, "status": text, "error": text})
        }
        (None, signal) => {
            let text = format!("signal: {}", crate::process::reaper::signal_name(signal.unwrap_or(0)));
            json!({"exitCode": -1, "status": text, "error": text})
        }
    }
}
