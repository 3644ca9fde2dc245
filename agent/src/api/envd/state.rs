//! What is set for all: `/init`, `/envs`, `/health` and `/metrics`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use serde_json::{Value, json};

use super::App;
use crate::api::same;

/// The version of the protocol that clients go by.
const VERSION: &str = "0.6.13";

/// What `/init` has set.
#[derive(Debug, Default)]
pub struct Settings {
    pub(super) token: Option<String>,
    pub(super) user: Option<String>,
    pub(super) workdir: Option<String>,
    pub(super) variables: BTreeMap<String, String>,
    newest: Option<SystemTime>,
}

impl Settings {
    /// With a token from the beginning.
    pub fn new(token: Option<String>) -> Self {
        Self { token, ..Self::default() }
    }
}

/// `GET /health`.
pub(super) async fn health(headers: HeaderMap) -> Response {
    // The code interpreter's server answers otherwise.
    if headers.get("e2b-sandbox-port").is_some_and(|port| port == "49999") {
        return Json("OK").into_response();
    }
    (StatusCode::NO_CONTENT, [(header::CACHE_CONTROL, "no-store")]).into_response()
}

/// `GET /envs`.
pub(super) async fn variables(State(app): State<Arc<App>>) -> Response {
    ([(header::CACHE_CONTROL, "no-store")], Json(app.variables())).into_response()
}

/// `GET /metrics`.
pub(super) async fn metrics(State(app): State<Arc<App>>) -> Response {
    let snapshot = app.core.metrics.snapshot();
    let bytes = |mib: f64| (mib * 1_048_576.0) as u64;
    let (total, free, block) = nix::sys::statvfs::statvfs("/")
        .map_or((0, 0, 0), |disk| (disk.blocks(), disk.blocks_available(), disk.fragment_size()));
    let info = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let cached = info
        .lines()
        .find_map(|line| line.strip_prefix("Cached:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok())
        .unwrap_or(0);
    let numbers = json!({
        "ts": SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
        "cpu_count": snapshot.cpu_count.ceil() as u64,
        "cpu_used_pct": snapshot.cpu_used_pct,
        "mem_total": bytes(snapshot.mem_total_mib),
        "mem_used": bytes(snapshot.mem_used_mib),
        "mem_cache": cached * 1024,
        "mem_total_mib": snapshot.mem_total_mib as u64,
        "mem_used_mib": snapshot.mem_used_mib as u64,
        "disk_total": total * block,
        "disk_used": total.saturating_sub(free) * block,
    });
    ([(header::CACHE_CONTROL, "no-store")], Json(numbers)).into_response()
}

/// `POST /init`.
pub(super) async fn init(State(app): State<Arc<App>>, headers: HeaderMap, body: Bytes) -> Response {
    let refuse = |status: StatusCode, text: &str| (status, format!("{text}\n")).into_response();
    let request: Value = if body.trim_ascii().is_empty() {
        json!({})
    } else {
        match serde_json::from_slice(&body) {
            Ok(value) => value,
            Err(e) => return refuse(StatusCode::BAD_REQUEST, &format!("error parsing the body: {e}")),
        }
    };
    let token = request["accessToken"].as_str();
    if token.is_some_and(|token| token.is_empty() || token.contains('\\')) {
        return refuse(StatusCode::BAD_REQUEST, "the access token must not be empty, nor hold a backslash");
    }
    let freezer = app.freezer.clone();
    let mut state = app.state();
    if let Some(current) = state.token.clone() {
        let header = headers.get("x-access-token").map(|value| value.as_bytes()).unwrap_or_default();
        // Whoever has it may keep it.
        let known = token.map(str::as_bytes).unwrap_or(header);
        if !same(current.as_bytes(), known) {
            let text =
                if token.is_some() { "access token validation failed" } else { "access token reset not authorized" };
            return refuse(StatusCode::UNAUTHORIZED, text);
        }
    }
    // Whoever sets a sandbox up wants it to go on.
    freezer.thaw();
    let at = request["timestamp"].as_str().and_then(|text| humantime::parse_rfc3339(text).ok());
    // What is older than what is known changes nothing.
    let stale = at.is_some() && state.newest.is_some_and(|newest| at <= Some(newest));
    if !stale {
        state.newest = at.or(state.newest);
        if let Some(token) = token {
            state.token = Some(token.to_owned());
        }
        if let Some(map) = request["envVars"].as_object() {
            let text = |value: &Value| value.as_str().map(str::to_owned);
            state.variables = map.iter().filter_map(|(name, value)| Some((name.clone(), text(value)?))).collect();
        }
        for (name, place) in [("defaultUser", 0), ("defaultWorkdir", 1)] {
            if let Some(text) = request[name].as_str().filter(|text| !text.is_empty()) {
                *if place == 0 { &mut state.user } else { &mut state.workdir } = Some(text.to_owned());
            }
        }
    }
    (StatusCode::NO_CONTENT, [(header::CACHE_CONTROL, "no-store")], [("x-envd-version", VERSION)]).into_response()
}
