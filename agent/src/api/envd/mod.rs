//! The E2B envd protocol: processes and files over Connect, files over HTTP, and the code interpreter's API.

mod auth;
mod connect;
mod files;
mod filesystem;
mod freeze;
mod gzip;
mod interpreter;
mod process;
mod schema;
mod state;
mod user;
mod watch;
mod wire;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, FromRequest, Path, Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{any, delete, get, post};

use crate::api::execd::App as Core;
use crate::process::freeze::Freezer;
use crate::process::live::Processes;
use connect::Call;
pub use state::Settings;

/// The core, as this protocol uses it.
#[derive(Debug)]
pub struct App {
    core: Arc<Core>,
    processes: Arc<Processes>,
    watchers: watch::Watchers,
    freezer: Arc<Freezer>,
    state: Mutex<Settings>,
}

impl App {
    /// Over a core, with a token if there is one.
    pub fn new(core: Arc<Core>) -> Self {
        let state = Mutex::new(Settings::new(core.config.token.clone()));
        Self { core, processes: Arc::default(), watchers: watch::Watchers::default(), freezer: Arc::default(), state }
    }

    /// What requests must have now.
    pub fn token(&self) -> Option<String> {
        self.state().token.clone()
    }

    fn state(&self) -> MutexGuard<'_, Settings> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is set for all processes. What says where they are cannot be changed.
    fn variables(&self) -> BTreeMap<String, String> {
        let mut out = self.state().variables.clone();
        out.insert("E2B_SANDBOX".into(), "false".into());
        out
    }

    /// Ends all that runs.
    pub fn end_all(&self) {
        self.freezer.thaw();
        self.processes.end_all();
    }
}

/// All of it.
pub fn router(app: Arc<App>) -> Router {
    let limit = app.core.config.body_limit;
    Router::new()
        .route("/process.Process/{method}", any(call_process))
        .route("/filesystem.Filesystem/{method}", any(call_filesystem))
        .route("/health", get(state::health))
        .route("/metrics", get(state::metrics))
        .route("/envs", get(state::variables))
        .route("/init", post(state::init))
        .route("/files/compose", post(files::compose))
        .route("/freeze", post(freeze::freeze))
        .route("/unfreeze", post(freeze::thaw))
        .route("/fsfreeze", post(not_a_machine))
        .route("/fsthaw", post(not_a_machine))
        .route("/collapse", post(not_a_machine))
        .route("/upgrade", post(not_a_machine))
        .route("/execute", post(interpreter::execute))
        .route("/contexts", get(interpreter::list).post(interpreter::create))
        .route("/contexts/{id}", delete(interpreter::delete))
        .route("/contexts/{id}/restart", post(interpreter::restart))
        .layer(DefaultBodyLimit::max(limit))
        .route("/files", get(files::download).post(files::upload).layer(DefaultBodyLimit::disable()))
        .fallback(|| async { (StatusCode::NOT_FOUND, "404 page not found\n") })
        .layer(middleware::from_fn_with_state(app.clone(), auth::check))
        .layer(middleware::from_fn(other_origins))
        .with_state(app)
}

/// What only a virtual machine of its own can do.
async fn not_a_machine() -> Response {
    let text = "this sandbox is a container: it is frozen, thawed and replaced from outside".to_owned();
    files::Refusal(StatusCode::NOT_IMPLEMENTED, text).into_response()
}

/// Lets pages of any origin ask: the token is what counts.
async fn other_origins(request: Request, next: Next) -> Response {
    let preflight =
        request.method() == Method::OPTIONS && request.headers().contains_key("access-control-request-method");
    let asked = request.headers().get("access-control-request-headers").cloned();
    let from_page = request.headers().contains_key(header::ORIGIN);
    let mut response = if preflight { StatusCode::NO_CONTENT.into_response() } else { next.run(request).await };
    if from_page {
        let out = response.headers_mut();
        out.insert("access-control-allow-origin", HeaderValue::from_static("*"));
        let exposed = HeaderValue::from_static("Location, Cache-Control, X-Content-Type-Options");
        out.insert("access-control-expose-headers", exposed);
        if preflight {
            let methods = HeaderValue::from_static("HEAD, GET, POST, PUT, PATCH, DELETE");
            out.insert("access-control-allow-methods", methods);
            out.insert("access-control-allow-headers", asked.unwrap_or_else(|| HeaderValue::from_static("*")));
            out.insert("access-control-max-age", HeaderValue::from_static("7200"));
        }
    }
    response
}

fn no_method() -> Response {
    (StatusCode::NOT_FOUND, "404 page not found\n").into_response()
}

/// The head of a call of a method, of which it is known whether it is a stream.
fn head(method: &Method, headers: &HeaderMap, stream: bool) -> Result<Call, Box<Response>> {
    if method != Method::POST {
        return Err(Box::new((StatusCode::METHOD_NOT_ALLOWED, [(header::ALLOW, "POST")]).into_response()));
    }
    Call::of(headers, stream)
}

async fn body(request: Request) -> Result<Bytes, Response> {
    Bytes::from_request(request, &()).await.map_err(IntoResponse::into_response)
}

async fn call_process(State(app): State<Arc<App>>, Path(method): Path<String>, request: Request) -> Response {
    let streams = matches!(method.as_str(), "Start" | "Connect" | "StreamInput");
    let call = match head(request.method(), request.headers(), streams) {
        Ok(call) => call,
        Err(response) => return *response,
    };
    if !streams {
        return match body(request).await {
            Ok(body) => process::unary(app, &method, call, body).await.unwrap_or_else(no_method),
            Err(response) => response,
        };
    }
    // Who starts something does so as somebody; who looks at it need not.
    let user = if method == "Start" { user::of(&app, request.headers()) } else { user::default(&app) };
    match user {
        Ok(user) => process::stream(app, &method, call, user, request).await.unwrap_or_else(no_method),
        Err(failure) => call.refuse(&failure),
    }
}

async fn call_filesystem(State(app): State<Arc<App>>, Path(method): Path<String>, request: Request) -> Response {
    let streams = method == "WatchDir";
    let call = match head(request.method(), request.headers(), streams) {
        Ok(call) => call,
        Err(response) => return *response,
    };
    let user = match user::of(&app, request.headers()) {
        Ok(user) => user,
        Err(failure) => return call.refuse(&failure),
    };
    if streams {
        return watch::stream(app, call, user, request).await;
    }
    let body = match body(request).await {
        Ok(body) => body,
        Err(response) => return response,
    };
    if let Some(response) = filesystem::unary(app.clone(), &method, call, user.clone(), body.clone()).await {
        return response;
    }
    watch::unary(app, &method, call, user, body).await.unwrap_or_else(no_method)
}
