//! The token that each request must have.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use serde_json::json;

use super::App;

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

/// Compares in a time that says nothing of where they differ.
fn same(wanted: &[u8], given: &[u8]) -> bool {
    let mut different = wanted.len() ^ given.len();
    for (at, byte) in wanted.iter().enumerate() {
        different |= usize::from(byte ^ given.get(at).copied().unwrap_or(0));
        // So that no shortcut is found.
        std::hint::black_box(different);
    }
    different == 0
}

#[cfg(test)]
mod tests {
    #[test]
    fn only_the_same_is_the_same() {
        assert!(super::same(b"token", b"token"));
        for other in [&b""[..], b"toke", b"token2", b"Token", b"\0token"] {
            assert!(!super::same(b"token", other), "{other:?}");
        }
    }
}
