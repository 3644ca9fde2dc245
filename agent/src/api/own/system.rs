//! The system: what it is, what can be had on it, how it is.

use std::convert::Infallible;
use std::fs;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Json;
use axum::body::Body as HttpBody;
use axum::extract::{OriginalUri, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use nix::sys::utsname::uname;
use serde_json::{Value, json};

use super::App;
use super::failure::{Body, Failure, Result};
use crate::api::query::Query;
use crate::api::rfc3339;
use crate::monitor::Limits;
use crate::process::confine::capabilities::Set;
use crate::process::confine::cgroup;
use crate::process::managed::Standing;
use crate::process::users::{self, Accounts};

/// A value of /etc/os-release.
fn release(name: &str) -> Option<String> {
    let text = fs::read_to_string("/etc/os-release").or_else(|_| fs::read_to_string("/usr/lib/os-release")).ok()?;
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='))?;
    Some(value.trim_matches(['"', '\'']).to_owned())
}

/// `GET /system`.
pub(super) async fn system(State(app): State<Arc<App>>) -> Response {
    let kernel = uname();
    let text = |part: &dyn Fn(&nix::sys::utsname::UtsName) -> String| kernel.as_ref().ok().map(part);
    let (uid, gid) = users::own();
    let sample = app.monitor.now();
    Json(json!({
        "hostname": text(&|name| name.nodename().to_string_lossy().into_owned()),
        "kernel": text(&|name| name.release().to_string_lossy().into_owned()),
        "architecture": std::env::consts::ARCH,
        "os": release("PRETTY_NAME"),
        "os_id": release("ID"),
        "cpu_count": sample.cpu_count,
        "memory_total": sample.memory_total,
        "disk_total": sample.disk_total,
        "uid": uid,
        "gid": gid,
        "user": Accounts::load().name_of(uid),
        "agent_version": env!("CARGO_PKG_VERSION"),
        "agent_pid": std::process::id(),
        "agent_started_at": rfc3339(app.started),
    }))
    .into_response()
}

/// `GET /capabilities`: what of a confinement can be had here, and by which means.
pub(super) async fn capabilities(State(_): State<Arc<App>>) -> Response {
    let answer = tokio::task::spawn_blocking(|| {
        let place = cgroup::place();
        let in_group = place.is_ok();
        let own = Set::own();
        let has = |name: &str| own.names().iter().any(|known| known == name);
        let users = fs::read_to_string("/proc/sys/user/max_user_namespaces").ok();
        let users = users.and_then(|text| text.trim().parse::<u64>().ok()).is_some_and(|most| most > 0);
        let means = |group: &str, limit: &str| if in_group { group.to_owned() } else { limit.to_owned() };
        json!({
            "limits": {
                "cpu_time_ms": means("cgroup", "rlimit, of each process"),
                "memory_bytes": means("cgroup", "rlimit, of the data of each process"),
                "processes": means("cgroup", if has("CAP_SYS_RESOURCE") || has("CAP_SYS_ADMIN") {
                    "none: the daemon's user is exempt from its rlimit"
                } else {
                    "rlimit, of the user"
                }),
                "open_files": "rlimit",
                "file_size_bytes": "rlimit",
                "core_bytes": "rlimit",
                "stack_bytes": "rlimit",
            },
            "cgroup": {"available": in_group, "why_not": place.as_ref().err()},
            "no_new_privileges": true,
            "seccomp": true,
            "capabilities": own.names(),
            "other_users": has("CAP_SETUID") && has("CAP_SETGID"),
            "user_namespace": users,
            "readonly_and_masked_paths": if has("CAP_SYS_ADMIN") {
                "yes"
            } else if users {
                "with user_namespace"
            } else {
                "no"
            },
        })
    });
    Json(answer.await.unwrap_or(Value::Null)).into_response()
}

/// `GET /health`: by component. 503 when one does not work; a resource above its limit is told, and no failure.
pub(super) async fn health(State(app): State<Arc<App>>) -> Response {
    let sample = app.monitor.now();
    let short = app.monitor.limits().exceeded(&sample);
    let all = app.processes.list();
    let failed = |standing| matches!(standing, Standing::Failed | Standing::Waiting);
    let troubled: Vec<Value> = all
        .iter()
        .map(|one| (one, one.snapshot()))
        .filter(|(_, snapshot)| failed(snapshot.standing))
        .map(|(one, snapshot)| json!({"id": one.id, "tag": one.order.tag, "error": snapshot.why}))
        .collect();
    let free = app.core.executions.available_permits();
    let root = app.core.files.root.absolute("/");
    let readable = app.core.files.root.open(&root, libc::O_RDONLY | libc::O_DIRECTORY, 0);
    let working = |works: bool| if works { "ok" } else { "failing" };
    let files = readable.as_ref().err().map(|e| format!("open {}: {e}", root.display()));
    let status = if readable.is_ok() && free > 0 {
        if short.is_empty() && troubled.is_empty() { "ok" } else { "degraded" }
    } else {
        "failing"
    };
    let code = if status == "failing" { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK };
    let answer = json!({
        "status": status,
        "components": {
            "processes": {
                "status": if free == 0 { "failing" } else if troubled.is_empty() { "ok" } else { "degraded" },
                "free_executions": free,
                "not_running": troubled,
            },
            "files": {"status": working(readable.is_ok()), "error": files},
            "code": {"status": if app.core.config.jupyter.is_some() { "ok" } else { "not configured" }},
            "forwards": {"status": "ok", "count": app.forwards.list().len()},
            "resources": {"status": if short.is_empty() { "ok" } else { "degraded" }, "above_limit": short},
        },
    });
    (code, Json(answer)).into_response()
}

/// `GET /resources`.
pub(super) async fn resources(State(app): State<Arc<App>>) -> Response {
    Json(app.monitor.now()).into_response()
}

/// `GET /resources/history?seconds=`.
pub(super) async fn history(State(app): State<Arc<App>>, OriginalUri(uri): OriginalUri) -> Result<Response> {
    let seconds: u64 = match Query::of(&uri).get("seconds") {
        None => u64::MAX,
        Some(text) => text.parse().map_err(|_| Failure::invalid(format!("seconds: {text:?} is not a number")))?,
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
    let samples = app.monitor.since(now.saturating_sub(seconds.saturating_mul(1000)));
    let interval = app.core.config.monitor_interval.as_millis() as u64;
    Ok(Json(json!({"interval_ms": interval, "samples": samples})).into_response())
}

/// `GET /resources/watch`: a line of JSON for each sample, with what is above its limit.
pub(super) async fn watch(State(app): State<Arc<App>>) -> Result<Response> {
    if app.core.config.monitor_interval.is_zero() {
        return Err(Failure::state("no samples are taken: --monitor-interval is 0"));
    }
    let watch = app.monitor.watch();
    let lines = futures_util::stream::unfold((app, watch), |(app, mut watch)| async move {
        watch.changed().await.ok()?;
        let sample = watch.borrow_and_update().clone()?;
        let above = app.monitor.limits().exceeded(&sample);
        let line = format!("{}\n", json!({"sample": sample, "above_limit": above}));
        Some((Ok::<_, Infallible>(Bytes::from(line)), (app, watch)))
    });
    Ok(([(header::CONTENT_TYPE, "application/x-ndjson")], HttpBody::from_stream(lines)).into_response())
}

/// `GET /resources/limits`.
pub(super) async fn limits(State(app): State<Arc<App>>) -> Response {
    Json(app.monitor.limits()).into_response()
}

/// `PUT /resources/limits`.
pub(super) async fn set_limits(State(app): State<Arc<App>>, Body(limits): Body<Limits>) -> Result<Response> {
    let shares = [limits.cpu_percent, limits.memory_percent, limits.disk_percent];
    if let Some(wrong) = shares.iter().flatten().find(|share| !(0.0..=100.0).contains(*share)) {
        return Err(Failure::invalid(format!("{wrong} is not from 0 to 100")));
    }
    app.monitor.set_limits(limits.clone());
    Ok(Json(limits).into_response())
}
