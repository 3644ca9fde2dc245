//! Uploads: pairs of `metadata` and `file` in a multipart form, written as they come.
//!
//! Beyond the protocol, a file may come in parts: its metadata has an `upload_id` of the client's choice, the `offset` that
//! this part begins at, and `"complete": false` unless it is the last. `GET /files/upload?path=&upload_id=` says how much
//! there is, to go on after a connection was lost.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::Bytes;
use axum::extract::multipart::{Field, Multipart};
use axum::extract::{FromRequest, OriginalUri, Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde_json::json;
use tokio::sync::mpsc;

use super::App;
use super::body;
use super::error::{Refusal, Result};
use super::files;
use super::identity::As;
use crate::api::form::split;
use crate::api::query::Query;
use crate::fs::write::Part;
use crate::fs::{self, Permission};

/// The largest metadata, in bytes.
const METADATA_LIMIT: usize = 64 << 10;

/// How long a client may send nothing of a file.
const SILENCE: Duration = Duration::from_secs(120);

/// How many pieces of a file wait for the disk.
const WAITING: usize = 8;

#[derive(Debug)]
struct Metadata {
    path: PathBuf,
    permission: Permission,
    part: Option<Part>,
}

enum Piece {
    Data(Bytes),
    End,
}

fn bad(code: &'static str, message: impl Into<String>) -> Refusal {
    Refusal::new(StatusCode::BAD_REQUEST, code, message)
}

/// `POST /files/upload`.
pub(super) async fn upload(State(app): State<Arc<App>>, who: As, request: Request) -> Result<Response> {
    let (request, rest) = split(request);
    let done = read(&app, &who, request).await;
    rest.skip().await;
    done
}

async fn read(app: &Arc<App>, who: &As, request: Request) -> Result<Response> {
    let form = Multipart::from_request(request, &()).await;
    let mut form = form.map_err(|e| bad("INVALID_FILE", format!("error parsing multipart form: {e}")))?;
    let mut waiting = VecDeque::new();
    let (mut described, mut written) = (0, 0);
    loop {
        let field =
            form.next_field().await.map_err(|e| bad("INVALID_FILE", format!("error reading multipart form: {e}")))?;
        let Some(field) = field else { break };
        // A plain field is none of them.
        if field.file_name().is_none() {
            continue;
        }
        match field.name() {
            Some("metadata") => {
                waiting.push_back(metadata(app, field).await?);
                described += 1;
            }
            Some("file") => {
                let Some(metadata) = waiting.pop_front() else {
                    return Err(bad("INVALID_FILE_METADATA", "metadata must come before its file"));
                };
                write(app, who, metadata, field).await?;
                written += 1;
            }
            _ => {}
        }
    }
    match (described, written) {
        (0, _) => Err(bad("INVALID_FILE_METADATA", "metadata is missing")),
        (_, 0) => Err(bad("INVALID_FILE_CONTENT", "file is missing")),
        (described, written) if described != written => {
            Err(bad("INVALID_FILE", format!("there are {described} metadata and {written} files")))
        }
        _ => Ok(StatusCode::OK.into_response()),
    }
}

async fn metadata(app: &App, mut field: Field<'_>) -> Result<Metadata> {
    let wrong = |message: String| bad("INVALID_FILE_METADATA", message);
    let mut text = Vec::new();
    while let Some(bytes) = field.chunk().await.map_err(|e| wrong(format!("error reading metadata: {e}")))? {
        text.extend_from_slice(&bytes);
        if text.len() > METADATA_LIMIT {
            return Err(wrong(format!("metadata has more than {METADATA_LIMIT} bytes")));
        }
    }
    let relabel = |e: Refusal| wrong(e.message().to_owned());
    let fields = body::fields(&text).map_err(relabel)?;
    let path = fields.text("path").map_err(relabel)?.filter(|path| !path.is_empty());
    let path = path.ok_or_else(|| wrong("metadata path is empty".into()))?;
    let part = match fields.text("upload_id").map_err(relabel)? {
        None => None,
        Some(upload) => {
            let offset = fields.number("offset").map_err(relabel)?.unwrap_or(0);
            let offset = u64::try_from(offset).map_err(|_| wrong("offset is negative".into()))?;
            let complete = !fields.has("complete") || fields.flag("complete").map_err(relabel)?;
            Some(Part { upload, offset, complete })
        }
    };
    Ok(Metadata { path: files::path(app, &path)?, permission: files::permission(&fields).map_err(relabel)?, part })
}

async fn write(app: &Arc<App>, who: &As, metadata: Metadata, mut field: Field<'_>) -> Result<()> {
    let (sender, mut receiver) = mpsc::channel(WAITING);
    let files = app.clone();
    let work = tokio::spawn(fs::run(who.0.clone(), move || {
        let files = &files.files;
        let mut writer = files.writer(&metadata.path, &metadata.permission, metadata.part)?;
        loop {
            match receiver.blocking_recv() {
                Some(Piece::Data(bytes)) => writer.write(&bytes)?,
                Some(Piece::End) => return writer.finish(files),
                // The client is gone: what it has sent is not the file.
                None => return Err(fs::Error::System("the upload was cut off".into())),
            }
        }
    }));
    let cut = loop {
        let Ok(chunk) = tokio::time::timeout(SILENCE, field.chunk()).await else {
            return Err(Refusal::new(StatusCode::REQUEST_TIMEOUT, "INVALID_FILE_CONTENT", "the upload does not go on"));
        };
        match chunk {
            Ok(Some(bytes)) => {
                if sender.send(Piece::Data(bytes)).await.is_err() {
                    // Why it is not taken any more, the work says.
                    break None;
                }
            }
            Ok(None) => {
                let _ = sender.send(Piece::End).await;
                break None;
            }
            Err(e) => break Some(e),
        }
    };
    drop(sender);
    let done = work.await.map_err(|e| Refusal::runtime(e.to_string()))?;
    if let Some(error) = cut {
        return Err(bad("INVALID_FILE_CONTENT", format!("error reading file: {error}")));
    }
    Ok(done?)
}

/// `GET /files/upload`.
pub(super) async fn progress(State(app): State<Arc<App>>, who: As, OriginalUri(uri): OriginalUri) -> Result<Response> {
    let query = Query::of(&uri);
    let path = files::path(&app, body::require(&query, "path")?)?;
    let upload = body::require(&query, "upload_id")?.to_owned();
    let offset = fs::run(who.0, move || app.files.uploaded(&path, &upload)).await?;
    Ok(Json(json!({"offset": offset})).into_response())
}
