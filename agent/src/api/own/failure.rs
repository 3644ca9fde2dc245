//! Errors of the daemon's own protocol: `{"code": …, "message": …}`, codes as gRPC names them.

use std::io;

use axum::Json;
use axum::extract::rejection::JsonRejection;
use axum::extract::{FromRequest, Request};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde_json::json;

use crate::fs;

/// An error of a request.
#[derive(Debug)]
pub(super) struct Failure {
    status: StatusCode,
    code: &'static str,
    message: String,
}

/// The result of a request.
pub(super) type Result<T> = std::result::Result<T, Failure>;

impl Failure {
    fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, code, message: message.into() }
    }

    /// The request makes no sense.
    pub(super) fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_argument", message)
    }

    /// There is no such thing.
    pub(super) fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "not_found", message)
    }

    /// Not as things are.
    pub(super) fn state(message: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, "failed_precondition", message)
    }

    /// There is too much of something.
    pub(super) fn exhausted(message: impl Into<String>) -> Self {
        Self::new(StatusCode::TOO_MANY_REQUESTS, "resource_exhausted", message)
    }

    /// No token, or a wrong one.
    pub(super) fn unauthenticated() -> Self {
        let text = "the access token is missing or wrong: it belongs into Authorization: Bearer";
        Self::new(StatusCode::UNAUTHORIZED, "unauthenticated", text)
    }

    /// What the kernel says of an attempt.
    pub(super) fn of(attempt: &str, error: &io::Error) -> Self {
        let text = format!("{attempt}: {error}");
        match error.kind() {
            io::ErrorKind::NotFound => Self::not_found(text),
            io::ErrorKind::PermissionDenied => Self::new(StatusCode::FORBIDDEN, "permission_denied", text),
            io::ErrorKind::InvalidInput => Self::invalid(text),
            io::ErrorKind::AlreadyExists => Self::new(StatusCode::CONFLICT, "already_exists", text),
            io::ErrorKind::AddrInUse => Self::new(StatusCode::CONFLICT, "already_exists", text),
            _ => Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", text),
        }
    }
}

impl From<fs::Error> for Failure {
    fn from(error: fs::Error) -> Self {
        let message = error.to_string();
        match error {
            fs::Error::NotFound(_) => Self::not_found(message),
            fs::Error::Invalid(_) => Self::invalid(message),
            fs::Error::Conflict(_) => Self::new(StatusCode::CONFLICT, "already_exists", message),
            fs::Error::Identity(_) => Self::new(StatusCode::FORBIDDEN, "permission_denied", message),
            fs::Error::TooLarge(_) => Self::new(StatusCode::PAYLOAD_TOO_LARGE, "resource_exhausted", message),
            fs::Error::System(_) => {
                let denied = message.contains("Permission denied") || message.contains("not permitted");
                match denied {
                    true => Self::new(StatusCode::FORBIDDEN, "permission_denied", message),
                    false => Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", message),
                }
            }
        }
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        (self.status, Json(json!({"code": self.code, "message": self.message}))).into_response()
    }
}

/// A body in JSON. What is wrong with it is told as all errors are.
pub(super) struct Body<T>(pub(super) T);

impl<T: serde::de::DeserializeOwned, S: Send + Sync> FromRequest<S> for Body<T> {
    type Rejection = Failure;

    async fn from_request(request: Request, state: &S) -> Result<Self> {
        match Json::<T>::from_request(request, state).await {
            Ok(Json(value)) => Ok(Self(value)),
            Err(JsonRejection::BytesRejection(e)) => Err(Failure::new(e.status(), "resource_exhausted", e.body_text())),
            Err(e) => Err(Failure::invalid(e.body_text())),
        }
    }
}
