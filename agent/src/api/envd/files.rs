//! `/files`: what files hold.

use std::collections::HashSet;
use std::ffi::CString;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::Json;
use axum::extract::multipart::Multipart;
use axum::extract::{FromRequest, OriginalUri, Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::{Bytes, BytesMut};
use futures_util::{Stream, StreamExt};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::App;
use super::auth;
use super::filesystem::METADATA;
use super::gzip;
use super::user::{self, User};
use crate::api::form::split;
use crate::api::query::Query;
use crate::api::range::{Wanted, range, range_body};
use crate::fs;

/// What is written at once, in bytes: a small file is one write.
const BLOCK: usize = 256 << 10;

/// The most that metadata may have, in bytes.
const METADATA_LIMIT: usize = 4096;

/// An error of these endpoints.
#[derive(Debug)]
pub(super) struct Refusal(pub(super) StatusCode, pub(super) String);

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let body = format!("{}\n", json!({"code": self.0.as_u16(), "message": self.1}));
        let headers =
            [(header::CONTENT_TYPE, "application/json; charset=utf-8"), (header::X_CONTENT_TYPE_OPTIONS, "nosniff")];
        (self.0, headers, body).into_response()
    }
}

type Result<T> = std::result::Result<T, Refusal>;

fn refuse(status: StatusCode, text: impl Into<String>) -> Refusal {
    Refusal(status, text.into())
}

impl From<fs::Error> for Refusal {
    fn from(error: fs::Error) -> Self {
        let text = error.to_string();
        let status = match error {
            fs::Error::NotFound(_) => StatusCode::NOT_FOUND,
            fs::Error::Invalid(_) => StatusCode::BAD_REQUEST,
            fs::Error::Conflict(_) => StatusCode::CONFLICT,
            fs::Error::Identity(_) => StatusCode::FORBIDDEN,
            fs::Error::TooLarge(_) => StatusCode::PAYLOAD_TOO_LARGE,
            fs::Error::System(_) if text.contains("Permission denied") => StatusCode::FORBIDDEN,
            fs::Error::System(_) if text.contains("No space left") => StatusCode::INSUFFICIENT_STORAGE,
            fs::Error::System(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self(status, text)
    }
}

fn user_of(app: &App, name: Option<&str>) -> Result<User> {
    let found = match name.filter(|name| !name.is_empty()) {
        Some(name) => user::named(name).ok_or_else(|| format!("invalid username: '{name}'")),
        None => user::default(app).map_err(|failure| failure.message),
    };
    found.map_err(|text| refuse(StatusCode::UNAUTHORIZED, text))
}

fn path_of(app: &App, user: &User, text: &str) -> Result<PathBuf> {
    user.path(app, text).map_err(|failure| refuse(StatusCode::BAD_REQUEST, failure.message))
}

/// `GET /files`.
pub(super) async fn download(
    State(app): State<Arc<App>>,
    OriginalUri(uri): OriginalUri,
    headers: HeaderMap,
) -> Result<Response> {
    let query = Query::of(&uri);
    auth::check_file(&app, &headers, &query, "read")?;
    let user = user_of(&app, query.get("username"))?;
    let path = path_of(&app, &user, query.get("path").unwrap_or_default())?;
    let (core, opened) = (app.clone(), path.clone());
    let reader = fs::run(user.identity(), move || core.core.files.reader(&opened)).await.map_err(|e| match e {
        fs::Error::NotFound(_) => refuse(StatusCode::NOT_FOUND, format!("path '{}' does not exist", path.display())),
        other => other.into(),
    })?;
    let size = reader.size;
    let part = headers.contains_key(header::RANGE) || headers.contains_key(header::IF_MODIFIED_SINCE);
    let accepted = headers.get(header::ACCEPT_ENCODING).and_then(|value| value.to_str().ok());
    let packed = gzip::wanted(accepted, part)
        .ok_or_else(|| refuse(StatusCode::NOT_ACCEPTABLE, "no acceptable encoding: gzip and identity are known"))?;
    let modified = HeaderValue::from_str(&crate::api::date::http(reader.modified)).ok();
    let asked = headers.get(header::RANGE).and_then(|value| value.to_str().ok());
    let unchanged = modified.is_some() && headers.get(header::IF_MODIFIED_SINCE) == modified.as_ref();
    let (status, from, to) = match asked.and_then(|text| range(text, size)) {
        None if unchanged => return Ok(StatusCode::NOT_MODIFIED.into_response()),
        None | Some(Wanted::All) => (StatusCode::OK, 0, size),
        Some(Wanted::Range(from, to)) => (StatusCode::PARTIAL_CONTENT, from, to),
        Some(Wanted::Unsatisfiable) => {
            let range = [(header::CONTENT_RANGE, format!("bytes */{size}"))];
            return Ok((StatusCode::RANGE_NOT_SATISFIABLE, range, "invalid range: failed to overlap\n").into_response());
        }
    };
    let body = range_body(reader, from, to);
    let mut response = if packed { gzip::packed(body).into_response() } else { body.into_response() };
    *response.status_mut() = status;
    let out = response.headers_mut();
    out.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    if packed {
        out.insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    } else {
        out.insert(header::CONTENT_LENGTH, HeaderValue::from(to - from));
        out.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    }
    out.insert(header::VARY, HeaderValue::from_static("Accept-Encoding"));
    if let Some(modified) = modified {
        out.insert(header::LAST_MODIFIED, modified);
    }
    if status == StatusCode::PARTIAL_CONTENT
        && let Ok(value) = HeaderValue::from_str(&format!("bytes {from}-{}/{size}", to - 1))
    {
        out.insert(header::CONTENT_RANGE, value);
    }
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let disposition = crate::api::disposition("inline", &name);
    if let Ok(value) = HeaderValue::from_str(&disposition) {
        out.insert(header::CONTENT_DISPOSITION, value);
    }
    Ok(response)
}

/// `POST /files`.
pub(super) async fn upload(
    State(app): State<Arc<App>>,
    OriginalUri(uri): OriginalUri,
    request: Request,
) -> Result<Response> {
    let query = Query::of(&uri);
    auth::check_file(&app, request.headers(), &query, "write")?;
    let (request, rest) = split(request);
    let done = store(&app, &query, request).await;
    rest.skip().await;
    done
}

async fn store(app: &Arc<App>, query: &Query, request: Request) -> Result<Response> {
    let user = user_of(app, query.get("username"))?;
    let metadata = metadata(request.headers())?;
    let request = match request.headers().get(header::CONTENT_ENCODING).map(HeaderValue::as_bytes) {
        None | Some(b"identity") => request,
        Some(b"gzip") => request.map(gzip::unpacked),
        Some(_) => {
            let text = "unsupported content encoding: gzip and identity are known";
            return Err(refuse(StatusCode::BAD_REQUEST, text));
        }
    };
    let kind = request.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let given = query.get("path").filter(|path| !path.is_empty());
    if kind.starts_with("application/octet-stream") {
        let text = "path query parameter is required for raw body upload";
        let path = path_of(app, &user, given.ok_or_else(|| refuse(StatusCode::BAD_REQUEST, text))?)?;
        let body = request.into_body().into_data_stream();
        let written = write(app, &user, path, &metadata, body).await?;
        return Ok(Json(json!([written])).into_response());
    }
    if !kind.starts_with("multipart/") {
        return Err(refuse(StatusCode::BAD_REQUEST, format!("unsupported content type: {kind}")));
    }
    let bad = |e: &dyn std::fmt::Display| refuse(StatusCode::BAD_REQUEST, format!("error parsing multipart form: {e}"));
    let form = Multipart::from_request(request, &()).await;
    let mut form = form.map_err(|e| bad(&e))?;
    let (mut out, mut seen) = (Vec::new(), HashSet::new());
    while let Some(field) = form.next_field().await.map_err(|e| bad(&e))? {
        if field.name() != Some("file") {
            continue;
        }
        let name = match given {
            Some(path) => path.to_owned(),
            None => field.file_name().unwrap_or_default().to_owned(),
        };
        if name.is_empty() {
            return Err(refuse(StatusCode::BAD_REQUEST, "a file has no name, and there is no path"));
        }
        let path = path_of(app, &user, &name)?;
        if !seen.insert(path.clone()) {
            return Err(refuse(StatusCode::BAD_REQUEST, format!("{} is there twice", path.display())));
        }
        out.push(write(app, &user, path, &metadata, field).await?);
    }
    Ok(Json(out).into_response())
}

/// Writes a file in its place, with as few events for those who watch as can be.
async fn write<E: std::fmt::Display>(
    app: &Arc<App>,
    user: &User,
    path: PathBuf,
    metadata: &[(String, String)],
    mut body: impl Stream<Item = std::result::Result<Bytes, E>> + Unpin,
) -> Result<Value> {
    let (sender, mut receiver) = mpsc::channel::<Option<Bytes>>(4);
    let (core, target, set) = (app.clone(), path.clone(), metadata.to_vec());
    let owner = user.identity.clone();
    let work = tokio::spawn(fs::run(user.identity(), move || {
        let mut file = create(&core, &target, &owner)?;
        let mut written = 0u64;
        loop {
            match receiver.blocking_recv() {
                Some(Some(bytes)) => {
                    written += bytes.len() as u64;
                    if written > core.core.files.limit {
                        let text = format!("{}: files may have {} bytes", target.display(), core.core.files.limit);
                        return Err(fs::Error::TooLarge(text));
                    }
                    file.write_all(&bytes).map_err(|e| fs::Error::of("write", &target, &e))?;
                }
                Some(None) => break,
                None => return Err(fs::Error::System("the upload was cut off".into())),
            }
        }
        set_metadata(&target, &set);
        Ok(())
    }));
    let mut block = BytesMut::new();
    let mut cut = None;
    loop {
        match body.next().await {
            Some(Ok(bytes)) => {
                block.extend_from_slice(&bytes);
                if block.len() >= BLOCK && sender.send(Some(block.split().freeze())).await.is_err() {
                    break;
                }
            }
            Some(Err(e)) => {
                cut = Some(e.to_string());
                break;
            }
            None => {
                if block.is_empty() || sender.send(Some(block.split().freeze())).await.is_ok() {
                    let _ = sender.send(None).await;
                }
                break;
            }
        }
    }
    drop(sender);
    let done = work.await.map_err(|e| refuse(StatusCode::INTERNAL_SERVER_ERROR, e.to_string()))?;
    if let Some(error) = cut {
        return Err(refuse(StatusCode::BAD_REQUEST, format!("error reading the body: {error}")));
    }
    done?;
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let mut out = json!({"path": path.to_string_lossy(), "name": name, "type": "file"});
    if !metadata.is_empty() {
        out["metadata"] = metadata.iter().map(|(key, value)| (key.clone(), Value::from(value.clone()))).collect();
    }
    Ok(out)
}

/// Opens a file to be written from its beginning, and gives it to its user.
fn create(app: &App, path: &Path, owner: &crate::process::users::Identity) -> fs::Result<File> {
    let root = &app.core.files.root;
    if let Some(parent) = path.parent() {
        root.make_directories(parent, 0o755).map_err(|e| fs::Error::of("create", parent, &e))?;
    }
    let chown = |file: &File| {
        // SAFETY: takes numbers. Also where it is right already: those who watch hear of it.
        if unsafe { libc::fchown(file.as_raw_fd(), owner.uid, owner.gid) } != 0 {
            log::debug!("give {} to its user: {}", path.display(), std::io::Error::last_os_error());
        }
    };
    let flags = libc::O_WRONLY | libc::O_NONBLOCK;
    let failed = |e: std::io::Error| match e.raw_os_error() {
        Some(libc::EISDIR) => fs::Error::Invalid(format!("path is a directory: {}", path.display())),
        _ => fs::Error::of("open", path, &e),
    };
    match root.open_file(path, flags, 0) {
        Ok(file) => {
            chown(&file);
            if file.metadata().is_ok_and(|meta| meta.is_file() && meta.len() > 0) {
                file.set_len(0).map_err(|e| fs::Error::of("truncate", path, &e))?;
            }
            Ok(file)
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            let file = root.open_file(path, flags | libc::O_CREAT, 0o666).map_err(failed)?;
            chown(&file);
            Ok(file)
        }
        Err(e) => Err(failed(e)),
    }
}

/// The metadata of an upload's headers.
fn metadata(headers: &HeaderMap) -> Result<Vec<(String, String)>> {
    let invalid = |text: &str| refuse(StatusCode::BAD_REQUEST, format!("invalid metadata: {text}"));
    let (mut out, mut size) = (Vec::new(), 0);
    for name in headers.keys() {
        let Some(key) = name.as_str().strip_prefix("x-metadata-") else { continue };
        let Some(value) = headers.get(name) else { continue };
        let value = value.to_str().map_err(|_| invalid("values are printable ASCII"))?;
        if key.is_empty() || key.len() > 246 || !value.bytes().all(|byte| (0x20..=0x7e).contains(&byte)) {
            return Err(invalid("keys have up to 246 bytes, and values are printable ASCII"));
        }
        size += METADATA.len() + key.len() + value.len();
        if size > METADATA_LIMIT {
            return Err(invalid("it is too large"));
        }
        out.push((key.to_owned(), value.to_owned()));
    }
    Ok(out)
}

/// Replaces the metadata of a file. Not every filesystem has a place for it.
fn set_metadata(path: &Path, metadata: &[(String, String)]) {
    let Ok(target) = CString::new(path.as_os_str().as_bytes()) else { return };
    for name in super::filesystem::attributes(path) {
        if name.to_bytes().starts_with(METADATA.as_bytes()) {
            // SAFETY: both names end with their NULs.
            unsafe { libc::removexattr(target.as_ptr(), name.as_ptr()) };
        }
    }
    for (key, value) in metadata {
        let Ok(name) = CString::new(format!("{METADATA}{key}")) else { continue };
        // SAFETY: both names end with their NULs, and the value has the length that is given.
        unsafe { libc::setxattr(target.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0) };
    }
}

/// `POST /files/compose`.
pub(super) async fn compose(State(app): State<Arc<App>>, body: Bytes) -> Result<Response> {
    let bad = |text: &str| refuse(StatusCode::BAD_REQUEST, text);
    let request: Value = serde_json::from_slice(&body).map_err(|e| bad(&format!("error parsing the body: {e}")))?;
    let user = user_of(&app, request["username"].as_str())?;
    let destination = request["destination"].as_str().filter(|path| !path.is_empty());
    let destination = path_of(&app, &user, destination.ok_or_else(|| bad("destination is required"))?)?;
    let sources = request["source_paths"].as_array().filter(|list| !list.is_empty());
    let sources = sources.ok_or_else(|| bad("source_paths must not be empty"))?;
    let sources = sources
        .iter()
        .map(|path| path_of(&app, &user, path.as_str().ok_or_else(|| bad("source_paths holds texts"))?))
        .collect::<Result<Vec<_>>>()?;
    if sources.contains(&destination) {
        return Err(bad("the destination is one of the sources"));
    }
    let (core, to) = (app.clone(), destination.clone());
    fs::run(user.identity(), move || {
        let files = &core.core.files;
        let mut writer = files.writer(&to, &fs::Permission::default(), None)?;
        for source in &sources {
            let reader = files.reader(source)?;
            let mut at = 0;
            while at < reader.size {
                let bytes = reader.piece(at, reader.size).map_err(|e| fs::Error::of("read", source, &e))?;
                at += bytes.len() as u64;
                writer.write(&bytes)?;
            }
        }
        writer.finish(files)?;
        sources.iter().try_for_each(|source| files.remove_file(source))
    })
    .await?;
    let name = destination.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    Ok(Json(json!({"path": destination.to_string_lossy(), "name": name, "type": "file"})).into_response())
}
