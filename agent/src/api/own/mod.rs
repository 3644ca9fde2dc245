//! The daemon's own protocol, for what neither of the two others has: confined and supervised processes with replay of their
//! output, more operations on files, port forwards, the system's state. HTTP and WebSocket below `/runx/v1`, on every port
//! that the daemon serves; `agent/openapi.yaml` describes it.

mod attach;
mod failure;
mod files;
mod forwards;
mod processes;
mod system;

use std::sync::Arc;
use std::time::SystemTime;

use axum::Router;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::header;
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};

use crate::api::execd::App as Core;
use crate::api::same;
use crate::forward::Forwards;
use crate::monitor::Monitor;
use crate::process::managed::Table;
use failure::Failure;

/// Where it is.
pub const PREFIX: &str = "/runx/v1";

/// The core, as this protocol uses it.
#[derive(Debug)]
pub struct App {
    core: Arc<Core>,
    processes: Table,
    forwards: Forwards,
    monitor: Monitor,
    started: SystemTime,
}

impl App {
    /// Over a core. Begins to watch resources; within a runtime.
    pub fn new(core: Arc<Core>) -> Self {
        let monitor = Monitor::begin(core.config.monitor_interval);
        Self { core, processes: Table::default(), forwards: Forwards::default(), monitor, started: SystemTime::now() }
    }

    /// Ends all that runs.
    pub fn end_all(&self) {
        self.processes.end_all();
        self.forwards.end_all();
    }
}

/// What a request must have, at the time.
pub type Token = Arc<dyn Fn() -> Option<String> + Send + Sync>;

/// All of it, with its prefix.
pub fn router<S: Clone + Send + Sync + 'static>(app: Arc<App>, token: Token) -> Router<S> {
    let limit = app.core.config.body_limit;
    let routes = Router::new()
        .route("/processes", get(processes::list).post(processes::start))
        .route("/processes/{id}", get(processes::get).delete(processes::remove))
        .route("/processes/{id}/signal", post(processes::signal))
        .route("/processes/{id}/stop", post(processes::stop))
        .route("/processes/{id}/wait", get(processes::wait))
        .route("/processes/{id}/stdin", post(processes::write).delete(processes::close_input))
        .route("/processes/{id}/size", post(processes::resize))
        .route("/processes/{id}/output", get(attach::output))
        .route("/processes/{id}/attach", get(attach::attach))
        .route("/files", get(files::list))
        .route("/files/copy", post(files::copy))
        .route("/files/mode", post(files::change_mode))
        .route("/files/owner", post(files::change_owner))
        .route("/files/access", get(files::access))
        .route("/forwards", get(forwards::list).post(forwards::create))
        .route("/forwards/{id}", delete(forwards::remove).get(forwards::get))
        .route("/system", get(system::system))
        .route("/capabilities", get(system::capabilities))
        .route("/health", get(system::health))
        .route("/resources", get(system::resources))
        .route("/resources/history", get(system::history))
        .route("/resources/watch", get(system::watch))
        .route("/resources/limits", get(system::limits).put(system::set_limits))
        .fallback(|request: Request| async move {
            Failure::not_found(format!("there is no {} {}", request.method(), request.uri().path())).into_response()
        })
        .method_not_allowed_fallback(|request: Request| async move {
            Failure::not_found(format!("there is no {} {}", request.method(), request.uri().path())).into_response()
        })
        .layer(DefaultBodyLimit::max(limit))
        .layer(middleware::from_fn_with_state(token, check))
        .with_state(app);
    Router::new().nest(PREFIX, routes)
}

/// Lets requests with the right token through, in any of the three headers; all where there is none.
async fn check(State(token): State<Token>, request: Request, next: Next) -> Response {
    let admitted = token().is_none_or(|token| {
        let header = |name: &str| request.headers().get(name).map(|value| value.as_bytes());
        let bearer = header(header::AUTHORIZATION.as_str()).and_then(|value| value.strip_prefix(b"Bearer "));
        let given = bearer.or_else(|| header("x-execd-access-token")).or_else(|| header("x-access-token"));
        same(token.as_bytes(), given.unwrap_or_default())
    });
    if admitted {
        return next.run(request).await;
    }
    Failure::unauthenticated().into_response()
}
