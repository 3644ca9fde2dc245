//! The OpenSandbox execd protocol: HTTP, with events as streams.

mod auth;
mod body;
mod code;
mod command;
mod error;
mod events;
mod files;
mod identity;
mod isolated;
mod metrics;
mod proxy;
mod pty;
mod session;
mod upload;

use std::io;
use std::path::Path;
use std::sync::Arc;

use axum::Router;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::{Method, StatusCode, header};
use axum::middleware;
use axum::response::{IntoResponse, Response};
use axum::routing::{any, delete, get, post};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::code::Code;
use crate::config::Config;
use crate::fs::Files;
use crate::metrics::Metrics;
use crate::process::commands::Commands;
use crate::process::interactive::Shells;
use crate::process::session::Sessions;
use error::{Refusal, Result};

/// The core, as the protocol uses it.
#[derive(Debug)]
pub struct App {
    /// What the daemon was told.
    pub config: Config,
    /// Commands.
    pub commands: Commands,
    /// Shell sessions.
    pub sessions: Sessions,
    /// Interactive shells.
    pub shells: Shells,
    /// Code contexts.
    pub code: Code,
    /// Files.
    pub files: Files,
    /// Numbers.
    pub metrics: Metrics,
    /// How many executions there may still be.
    pub executions: Arc<Semaphore>,
}

impl App {
    /// The right to execute something, given back when it is dropped.
    fn admit(&self) -> Result<OwnedSemaphorePermit> {
        self.executions.clone().try_acquire_owned().map_err(|_| {
            let text = format!("there are {} executions already", self.config.executions);
            Refusal::new(StatusCode::TOO_MANY_REQUESTS, "SERVICE_UNAVAILABLE", text)
        })
    }

    /// Makes a directory for something that runs: programs see all that the daemon sees, also where files are kept inside
    /// of one directory.
    fn make_outside(&self, path: &Path) -> io::Result<()> {
        std::fs::create_dir_all(path)
    }

    /// Ends all that runs.
    pub fn end_all(&self) {
        self.commands.signal_all(nix::sys::signal::Signal::SIGKILL);
        self.sessions.close_all();
        self.shells.close_all();
    }
}

/// The eleven operations on files.
fn file_routes(limit: usize) -> Router<Arc<App>> {
    Router::new()
        .route("/files/info", get(files::info))
        .route("/files", delete(files::remove))
        .route("/files/mv", post(files::rename))
        .route("/files/permissions", post(files::change))
        .route("/files/search", get(files::search))
        .route("/files/replace", post(files::replace))
        .route("/files/download", get(files::download))
        .route("/directories/list", get(files::list))
        .route("/directories", post(files::make).delete(files::remove_trees))
        .layer(DefaultBodyLimit::max(limit))
        .route("/files/upload", post(upload::upload).get(upload::progress).layer(DefaultBodyLimit::disable()))
}

/// All of it.
pub fn router(app: Arc<App>) -> Router {
    let limit = app.config.body_limit;
    Router::new()
        .route("/ping", get(|| async { StatusCode::OK }))
        .route("/command", get(command::list).post(command::run).delete(command::interrupt))
        .route("/command/status/{id}", get(command::status))
        .route("/command/{id}/logs", get(command::logs))
        .route("/session", post(session::create))
        .route("/session/{id}/run", post(session::run))
        .route("/session/{id}", delete(session::delete))
        .route("/code", post(code::run).delete(command::interrupt))
        .route("/code/context", post(code::create))
        .route("/code/contexts", get(code::list).delete(code::delete_all))
        .route("/code/contexts/{id}", get(code::get).delete(code::delete))
        .route("/metrics", get(metrics::once))
        .route("/metrics/watch", get(metrics::watch))
        .route("/pty", post(pty::create))
        .route("/pty/{id}", get(pty::status).delete(pty::delete))
        .route("/pty/{id}/ws", get(pty::attach))
        .route("/v1/isolated/capabilities", get(isolated::capabilities))
        .route("/v1/isolated/{*rest}", any(isolated::unavailable))
        .layer(DefaultBodyLimit::max(limit))
        .merge(file_routes(limit))
        .nest("/v1/filesystem/{uid}/{gid}", file_routes(limit))
        .route("/proxy/{*rest}", any(proxy::forward))
        .route("/proxy/", any(proxy::forward))
        .fallback(unknown)
        .method_not_allowed_fallback(unknown)
        .layer(middleware::from_fn_with_state(app.clone(), auth::check))
        .with_state(app)
}

/// What no route is for. A path with a slash at its end leads to the one without.
async fn unknown(State(_): State<Arc<App>>, request: Request) -> Response {
    let uri = request.uri();
    if let Some(path) = uri.path().strip_suffix('/').filter(|path| !path.is_empty() && !path.starts_with("//")) {
        let query = uri.query().map(|query| format!("?{query}")).unwrap_or_default();
        let status = if request.method() == Method::GET {
            StatusCode::MOVED_PERMANENTLY
        } else {
            StatusCode::TEMPORARY_REDIRECT
        };
        return (status, [(header::LOCATION, format!("{path}{query}"))]).into_response();
    }
    (StatusCode::NOT_FOUND, [(header::CONTENT_TYPE, "text/plain")], "404 page not found").into_response()
}
