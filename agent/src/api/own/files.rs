//! Files: pages of a directory, copies, modes and owners, and what somebody may do with one.

use std::path::PathBuf;
use std::sync::Arc;

use axum::Json;
use axum::extract::{OriginalUri, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::json;

use super::App;
use super::failure::{Body, Failure, Result};
use super::processes::{Who, identity, page};
use crate::api::query::Query;
use crate::fs::{self, Permission};
use crate::process::users::Accounts;

fn path(app: &App, text: &str) -> Result<PathBuf> {
    if text.is_empty() || text.contains('\0') {
        return Err(Failure::invalid("path: it is missing, or holds a NUL byte"));
    }
    Ok(app.core.files.root.absolute(text))
}

fn asked(query: &Query) -> (Option<Who>, Option<Who>) {
    let get = |name: &str| query.get(name).map(|text| Who::Name(text.to_owned()));
    (get("user"), get("group"))
}

/// `GET /files?path=&offset=&limit=&user=&group=`: what is in a directory, in the order of names.
pub(super) async fn list(State(app): State<Arc<App>>, OriginalUri(uri): OriginalUri) -> Result<Response> {
    let query = Query::of(&uri);
    let (offset, limit) = page(&query)?;
    let path = path(&app, query.get("path").unwrap_or_default())?;
    let (user, group) = asked(&query);
    let work = move || app.core.files.page(&path, offset, limit, &Accounts::load());
    let (entries, total) = fs::run(identity(user.as_ref(), group.as_ref())?, work).await?;
    Ok(Json(json!({"entries": entries, "total": total, "offset": offset})).into_response())
}

/// `POST /files/copy`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Copy {
    source: String,
    destination: String,
    #[serde(default)]
    recursive: bool,
    #[serde(default)]
    overwrite: bool,
    user: Option<Who>,
    group: Option<Who>,
}

/// `POST /files/copy`.
pub(super) async fn copy(State(app): State<Arc<App>>, Body(request): Body<Copy>) -> Result<Response> {
    let (from, to) = (path(&app, &request.source)?, path(&app, &request.destination)?);
    let identity = identity(request.user.as_ref(), request.group.as_ref())?;
    let work = move || {
        app.core.files.copy(&from, &to, request.recursive, request.overwrite)?;
        app.core.files.info(&to, &Accounts::load())
    };
    Ok((StatusCode::CREATED, Json(fs::run(identity, work).await?)).into_response())
}

/// `POST /files/mode`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Mode {
    path: String,
    mode: String,
    #[serde(default)]
    recursive: bool,
    user: Option<Who>,
    group: Option<Who>,
}

/// `POST /files/mode`.
pub(super) async fn change_mode(State(app): State<Arc<App>>, Body(request): Body<Mode>) -> Result<Response> {
    let mode = u32::from_str_radix(&request.mode, 8).ok().filter(|mode| *mode <= 0o7777);
    let wrong = || Failure::invalid(format!("mode: {:?} is not octal digits such as \"0644\"", request.mode));
    let mode = mode.ok_or_else(wrong)?;
    let path = path(&app, &request.path)?;
    let identity = identity(request.user.as_ref(), request.group.as_ref())?;
    let work = move || {
        app.core.files.change_mode(&path, mode, request.recursive)?;
        app.core.files.info(&path, &Accounts::load())
    };
    Ok(Json(fs::run(identity, work).await?).into_response())
}

/// `POST /files/owner`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Owner {
    path: String,
    owner: Option<String>,
    owner_group: Option<String>,
    #[serde(default)]
    recursive: bool,
    user: Option<Who>,
    group: Option<Who>,
}

/// `POST /files/owner`.
pub(super) async fn change_owner(State(app): State<Arc<App>>, Body(request): Body<Owner>) -> Result<Response> {
    if request.owner.is_none() && request.owner_group.is_none() {
        return Err(Failure::invalid("one of owner and owner_group is needed"));
    }
    let wanted = Permission { mode: 0, owner: request.owner, group: request.owner_group };
    let ids = wanted.ids(&Accounts::load()).map_err(|e| Failure::invalid(e.to_string()))?;
    let path = path(&app, &request.path)?;
    let identity = identity(request.user.as_ref(), request.group.as_ref())?;
    let work = move || {
        app.core.files.change_owner(&path, ids, request.recursive)?;
        app.core.files.info(&path, &Accounts::load())
    };
    Ok(Json(fs::run(identity, work).await?).into_response())
}

/// `GET /files/access?path=&user=&group=`: what somebody may do with a file, by the kernel's word.
pub(super) async fn access(State(app): State<Arc<App>>, OriginalUri(uri): OriginalUri) -> Result<Response> {
    let query = Query::of(&uri);
    let path = path(&app, query.get("path").unwrap_or_default())?;
    let (user, group) = asked(&query);
    let work = move || app.core.files.access(&path);
    let rights = fs::run(identity(user.as_ref(), group.as_ref())?, work).await?;
    Ok(Json(json!({"read": rights.read, "write": rights.write, "execute": rights.execute})).into_response())
}
