//! Files and directories.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use axum::Json;
use axum::body::Bytes;
use axum::extract::{OriginalUri, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};

use super::App;
use super::body::{self, Fields};
use super::error::{Refusal, Result};
use super::events;
use super::identity::As;
use crate::api::disposition;
use crate::api::query::Query;
use crate::api::range::{Wanted, range, range_body};
use crate::fs::glob::Glob;
use crate::fs::{self, FileInfo, Permission};
use crate::process::environment::{self, Variables};
use crate::process::users::Accounts;

/// Replaces `$NAME` and a leading `~` in a path.
///
/// # Errors
/// Variables that nobody knows, by their names.
pub(super) fn expand(text: &str, environment: &Variables) -> Result<String> {
    let (out, unknown) = environment::expand(text, |name| environment.get(name).cloned());
    if !unknown.is_empty() {
        return Err(Refusal::runtime(format!("path {text}: undefined environment variables: {}", unknown.join(","))));
    }
    if out.contains('\0') {
        return Err(Refusal::body("a path must not contain a NUL byte"));
    }
    let home = || environment.get("HOME").cloned().filter(|home| !home.is_empty()).unwrap_or_else(|| "/".into());
    Ok(match out.strip_prefix('~') {
        Some("") => home(),
        Some(rest) if rest.starts_with('/') => format!("{}{rest}", home().trim_end_matches('/')),
        _ => out,
    })
}

/// The path that a request means.
pub(super) fn path(app: &App, text: &str) -> Result<PathBuf> {
    if text.is_empty() {
        return Err(Refusal::body("a path must not be empty"));
    }
    Ok(app.files.root.absolute(&expand(text, &environment::own())?))
}

/// What a request wants a file to be like.
pub(super) fn permission(fields: &Fields) -> Result<Permission> {
    Ok(Permission {
        mode: fields.number("mode")?.unwrap_or(0),
        owner: fields.text("owner")?,
        group: fields.text("group")?,
    })
}

/// The paths of a query, as they were asked for and as they are meant.
fn paths(app: &App, query: &Query) -> Result<Vec<(String, PathBuf)>> {
    query.all("path").into_iter().map(|text| Ok((text.to_owned(), path(app, text)?))).collect()
}

/// `GET /files/info`.
pub(super) async fn info(State(app): State<Arc<App>>, who: As, OriginalUri(uri): OriginalUri) -> Result<Response> {
    let paths = paths(&app, &Query::of(&uri))?;
    let infos = fs::run(who.0, move || {
        let accounts = Accounts::load();
        let mut out = Map::new();
        for (asked, path) in paths {
            let info = app.files.info(&path, &accounts)?;
            out.insert(asked, serde_json::to_value(info).unwrap_or_default());
        }
        Ok(out)
    });
    Ok(Json(Value::Object(infos.await?)).into_response())
}

/// `DELETE /files`.
pub(super) async fn remove(State(app): State<Arc<App>>, who: As, OriginalUri(uri): OriginalUri) -> Result<Response> {
    let paths = paths(&app, &Query::of(&uri))?;
    fs::run(who.0, move || paths.iter().try_for_each(|(_, path)| app.files.remove_file(path))).await?;
    Ok(StatusCode::OK.into_response())
}

/// `POST /files/mv`.
pub(super) async fn rename(State(app): State<Arc<App>>, who: As, body: Bytes) -> Result<Response> {
    let Value::Array(list) = body::value(&body)? else {
        return Err(Refusal::body("error parsing request body: expected an array"));
    };
    let mut pairs = Vec::new();
    for item in list {
        let fields = Fields::of(item)?;
        let one = |name: &str| -> Result<PathBuf> {
            let text = fields.text(name)?.filter(|text| !text.is_empty());
            path(&app, &text.ok_or_else(|| Refusal::body(format!("{name} must be given")))?)
        };
        pairs.push((one("src")?, one("dest")?));
    }
    fs::run(who.0, move || pairs.iter().try_for_each(|(from, to)| app.files.rename(from, to))).await?;
    Ok(StatusCode::OK.into_response())
}

/// The permissions of a body, by paths.
fn permissions(app: &App, body: &[u8]) -> Result<Vec<(PathBuf, Permission)>> {
    body::fields(body)?
        .entries()
        .map(|(text, value)| Ok((path(app, &text)?, permission(&Fields::of(value)?)?)))
        .collect()
}

/// `POST /files/permissions`.
pub(super) async fn change(State(app): State<Arc<App>>, who: As, body: Bytes) -> Result<Response> {
    let list = permissions(&app, &body)?;
    fs::run(who.0, move || {
        let accounts = Accounts::load();
        list.iter().try_for_each(|(path, permission)| app.files.change(path, permission, &accounts))
    })
    .await?;
    Ok(StatusCode::OK.into_response())
}

/// `POST /files/replace`.
pub(super) async fn replace(
    State(app): State<Arc<App>>,
    who: As,
    OriginalUri(uri): OriginalUri,
    body: Bytes,
) -> Result<Response> {
    let mut list = Vec::new();
    for (asked, value) in body::fields(&body)?.entries() {
        let fields = Fields::of(value)?;
        let path = path(&app, &asked)?;
        list.push((asked, path, fields.text("old")?.unwrap_or_default(), fields.text("new")?.unwrap_or_default()));
    }
    let counts = fs::run(who.0, move || {
        let mut out = Map::new();
        for (asked, path, old, new) in list {
            let count = app.files.replace(&path, &old, &new)?;
            out.insert(asked, json!({"replacedCount": count}));
        }
        Ok(out)
    });
    let counts = counts.await?;
    Ok(match Query::of(&uri).get("verbose") {
        Some("true" | "1") => Json(Value::Object(counts)).into_response(),
        _ => StatusCode::OK.into_response(),
    })
}

/// Sends what a walk finds as a JSON array, piece by piece.
async fn array(
    who: As,
    open: impl FnOnce() -> fs::Result<std::os::fd::OwnedFd> + Send + 'static,
    walk: impl FnOnce(std::os::fd::OwnedFd, fs::walk::Tell<'_>) -> fs::Result<()> + Send + 'static,
) -> Result<Response> {
    let (sender, body) = events::channel();
    // Before the answer begins it is known whether there is one.
    let (opened, begun) = tokio::sync::oneshot::channel();
    let work = fs::run(who.0, move || {
        let directory = match open() {
            Ok(directory) => {
                let _ = opened.send(());
                directory
            }
            Err(e) => return Err(e),
        };
        let mut out = vec![b'['];
        let mut first = true;
        let done = walk(directory, &mut |info: FileInfo| {
            if !std::mem::replace(&mut first, false) {
                out.push(b',');
            }
            // A struct of texts and numbers is JSON always.
            let _ = serde_json::to_writer(&mut out, &info);
            out.len() < 32 << 10 || sender.blocking_send(std::mem::take(&mut out).into()).is_ok()
        });
        if let Err(e) = done {
            log::warn!("a walk ended early: {e}");
            // It ends without the closing bracket: half an answer is none.
            let _ = sender.blocking_send(out.into());
            return Ok(());
        }
        out.push(b']');
        let _ = sender.blocking_send(out.into());
        Ok(())
    });
    let mut work = tokio::spawn(work);
    tokio::select! {
        biased;
        Ok(()) = begun => {}
        ended = &mut work => ended.map_err(|e| Refusal::runtime(e.to_string()))??,
    }
    Ok(([(header::CONTENT_TYPE, "application/json; charset=utf-8")], body).into_response())
}

/// `GET /files/search`.
pub(super) async fn search(State(app): State<Arc<App>>, who: As, OriginalUri(uri): OriginalUri) -> Result<Response> {
    let query = Query::of(&uri);
    let path = path(&app, body::require(&query, "path")?)?;
    let pattern = query.get("pattern").filter(|pattern| !pattern.is_empty()).unwrap_or("**");
    let glob =
        Glob::new(pattern).map_err(|e| Refusal::runtime(format!("error searching files: pattern {pattern}: {e}")))?;
    let (opener, top) = (app.clone(), path.clone());
    let open = move || opener.files.open_directory(&top);
    array(who, open, move |directory, tell| app.files.search(&path, directory, &glob, tell)).await
}

/// `GET /directories/list`.
pub(super) async fn list(State(app): State<Arc<App>>, who: As, OriginalUri(uri): OriginalUri) -> Result<Response> {
    let query = Query::of(&uri);
    let path = path(&app, body::require(&query, "path")?)?;
    let depth = match query.get("depth").filter(|text| !text.is_empty()) {
        None => 1,
        Some(text) => text.parse().map_err(|_| Refusal::body(format!("depth: {text:?} is not a number from 0 up")))?,
    };
    let (opener, top) = (app.clone(), path.clone());
    let open = move || {
        let info = opener.files.info(&top, &Accounts::default())?;
        if info.kind == "symlink" {
            return Err(fs::Error::Invalid(format!("path is a symbolic link: {}", top.display())));
        }
        opener.files.open_directory(&top)
    };
    array(who, open, move |directory, tell| app.files.list(&path, directory, depth, tell)).await
}

/// `POST /directories`.
pub(super) async fn make(State(app): State<Arc<App>>, who: As, body: Bytes) -> Result<Response> {
    let list = permissions(&app, &body)?;
    fs::run(who.0, move || {
        let accounts = Accounts::load();
        list.iter().try_for_each(|(path, permission)| app.files.make_directory(path, permission, &accounts))
    })
    .await?;
    Ok(StatusCode::OK.into_response())
}

/// `DELETE /directories`.
pub(super) async fn remove_trees(
    State(app): State<Arc<App>>,
    who: As,
    OriginalUri(uri): OriginalUri,
) -> Result<Response> {
    let paths = paths(&app, &Query::of(&uri))?;
    fs::run(who.0, move || paths.iter().try_for_each(|(_, path)| app.files.remove_tree(path))).await?;
    Ok(StatusCode::OK.into_response())
}

/// `GET /files/download`.
pub(super) async fn download(
    State(app): State<Arc<App>>,
    who: As,
    OriginalUri(uri): OriginalUri,
    headers: HeaderMap,
) -> Result<Response> {
    let query = Query::of(&uri);
    let path = path(&app, body::require(&query, "path")?)?;
    let window = |name: &str| match query.get(name) {
        None => Ok(None),
        Some(text) => match text.parse::<u64>() {
            Ok(number) if number > 0 => Ok(Some(number)),
            _ => Err(Refusal::body(format!("{name}: {text:?} is not a number from 1 up"))),
        },
    };
    let (offset, limit) = (window("offset")?, window("limit")?);
    let asked = headers.get(header::RANGE).map(|value| value.to_str().unwrap_or_default().to_owned());
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let reader = fs::run(who.0, move || app.files.reader(&path)).await?;
    if offset.is_some() || limit.is_some() {
        if asked.is_some() {
            return Err(Refusal::body("a range cannot be combined with offset and limit"));
        }
        let body = send(move |tell| reader.lines(offset.unwrap_or(1), limit, tell));
        return Ok(([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], body).into_response());
    }
    let size = reader.size;
    let wanted = match asked {
        None => Wanted::All,
        Some(text) => range(&text, size).ok_or_else(|| {
            Refusal::new(StatusCode::RANGE_NOT_SATISFIABLE, "UNKNOWN", format!("invalid range: {text}"))
        })?,
    };
    let modified = http_date(reader.modified);
    if matches!(wanted, Wanted::All) && headers.get(header::IF_MODIFIED_SINCE).is_some_and(|since| *since == modified) {
        return Ok(StatusCode::NOT_MODIFIED.into_response());
    }
    let (status, from, to) = match wanted {
        Wanted::All => (StatusCode::OK, 0, size),
        Wanted::Range(from, to) => (StatusCode::PARTIAL_CONTENT, from, to),
        Wanted::Unsatisfiable => {
            let range = format!("bytes */{size}");
            let text = "invalid range: failed to overlap\n";
            return Ok((StatusCode::RANGE_NOT_SATISFIABLE, [(header::CONTENT_RANGE, range)], text).into_response());
        }
    };
    let mut response = range_body(reader, from, to).into_response();
    *response.status_mut() = status;
    let out = response.headers_mut();
    out.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    out.insert(header::CONTENT_LENGTH, HeaderValue::from(to - from));
    out.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    out.insert(header::LAST_MODIFIED, modified);
    if status == StatusCode::PARTIAL_CONTENT
        && let Ok(value) = HeaderValue::from_str(&format!("bytes {from}-{}/{size}", to - 1))
    {
        out.insert(header::CONTENT_RANGE, value);
    }
    if let Ok(value) = HeaderValue::from_str(&disposition("attachment", &name)) {
        out.insert(header::CONTENT_DISPOSITION, value);
    }
    Ok(response)
}

/// Sends what is read on a thread that may block.
fn send(
    read: impl FnOnce(&mut dyn FnMut(Vec<u8>) -> bool) -> std::io::Result<()> + Send + 'static,
) -> axum::body::Body {
    let (sender, receiver) = tokio::sync::mpsc::channel::<std::io::Result<Bytes>>(4);
    tokio::task::spawn_blocking(move || {
        let read = read(&mut |bytes| sender.blocking_send(Ok(bytes.into())).is_ok());
        if let Err(e) = read {
            // So that the client does not take half of it for all.
            let _ = sender.blocking_send(Err(e));
        }
    });
    axum::body::Body::from_stream(futures_util::stream::unfold(receiver, |mut receiver| async move {
        receiver.recv().await.map(|item| (item, receiver))
    }))
}

fn http_date(at: SystemTime) -> HeaderValue {
    HeaderValue::from_str(&crate::api::date::http(at))
        .unwrap_or_else(|_| HeaderValue::from_static("Thu, 01 Jan 1970 00:00:00 GMT"))
}
