//! The token that each request must have.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use serde_json::json;

use super::App;
use crate::api::same;

/// The header that carries it.
pub(super) const TOKEN: &str = "x-execd-access-token";

/// Lets requests with the right token through; all of them where there is none.
pub(super) async fn check(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let given = request.headers().get(TOKEN).map(|value| value.as_bytes()).unwrap_or_default();
    match &app.config.token {
        Some(token) if !same(token.as_bytes(), given) => {
            let text = "Unauthorized: invalid or missing header X-EXECD-ACCESS-TOKEN";
            (StatusCode::UNAUTHORIZED, Json(json!({"error": text}))).into_response()
        }
        _ => next.run(request).await,
    }
}
