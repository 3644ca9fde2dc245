//! Errors as the protocol has them: `{"code": …, "message": …}`.

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde_json::json;

use crate::fs;

/// An error of a request.
#[derive(Debug)]
pub(super) struct Refusal {
    status: StatusCode,
    code: &'static str,
    message: String,
}

/// The result of a request.
pub(super) type Result<T> = std::result::Result<T, Refusal>;

impl Refusal {
    /// Any.
    pub(super) fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, code, message: message.into() }
    }

    /// A body that cannot be read, or that makes no sense.
    pub(super) fn body(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "INVALID_REQUEST_BODY", message)
    }

    /// A parameter that is missing.
    pub(super) fn query(name: &str) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "MISSING_QUERY", format!("missing query parameter '{name}'"))
    }

    /// Something failed.
    pub(super) fn runtime(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "RUNTIME_ERROR", message)
    }

    /// There is no such session or context.
    pub(super) fn context(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "CONTEXT_NOT_FOUND", message)
    }

    /// It cannot be done here.
    pub(super) fn unsupported(status: StatusCode, message: impl Into<String>) -> Self {
        Self::new(status, "NOT_SUPPORTED", message)
    }

    /// Its text.
    pub(super) fn message(&self) -> &str {
        &self.message
    }
}

impl From<fs::Error> for Refusal {
    fn from(error: fs::Error) -> Self {
        let message = error.to_string();
        match error {
            fs::Error::NotFound(_) => Self::new(StatusCode::NOT_FOUND, "FILE_NOT_FOUND", message),
            fs::Error::Invalid(_) => Self::body(message),
            fs::Error::Conflict(_) => Self::new(StatusCode::CONFLICT, "INVALID_FILE", message),
            fs::Error::Identity(_) => {
                Self::new(StatusCode::NOT_IMPLEMENTED, "FILESYSTEM_IDENTITY_UNAVAILABLE", message)
            }
            fs::Error::TooLarge(_) => Self::new(StatusCode::PAYLOAD_TOO_LARGE, "INVALID_FILE", message),
            fs::Error::System(_) => Self::runtime(message),
        }
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.status, Json(json!({"code": self.code, "message": self.message}))).into_response()
    }
}
