//! Numbers, once or every second.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};

use super::App;
use super::events;

/// `GET /metrics`.
pub(super) async fn once(State(app): State<Arc<App>>) -> Response {
    Json(app.metrics.snapshot()).into_response()
}

/// `GET /metrics/watch`.
pub(super) async fn watch(State(app): State<Arc<App>>) -> Response {
    let (sender, body) = events::channel();
    tokio::spawn(async move {
        let mut tick = tokio::time::interval(Duration::from_secs(1));
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                () = sender.closed() => return,
            }
            let mut line = serde_json::to_string(&app.metrics.snapshot()).unwrap_or_default();
            line.push('\n');
            if sender.send(line.into()).await.is_err() {
                return;
            }
        }
    });
    ([(CONTENT_TYPE, "text/event-stream"), (CACHE_CONTROL, "no-cache")], [("x-accel-buffering", "no")], body)
        .into_response()
}
