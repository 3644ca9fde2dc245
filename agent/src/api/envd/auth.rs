//! Who may ask: whoever has the access token, and for files also whoever has an address that was signed with it.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, Method, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use sha2::{Digest, Sha256};

use super::App;
use super::files::Refusal;
use super::user;
use crate::api::query::Query;
use crate::api::same;

/// The header that carries the token.
const TOKEN: &str = "x-access-token";

/// What carries it where the code interpreter's SDK sends no other: for contexts.
const TRAFFIC: &str = "e2b-traffic-access-token";

const REFUSED: &str = "unauthorized access, please provide a valid access token or method signing if supported";

fn given(headers: &HeaderMap) -> Option<&[u8]> {
    headers.get(TOKEN).map(|value| value.as_bytes())
}

/// Lets requests with the right token through, and those that check it themselves; all where there is none.
pub(super) async fn check(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let open = matches!(
        (request.method(), request.uri().path()),
        (&Method::GET, "/health" | "/files") | (&Method::POST, "/files" | "/init") | (&Method::OPTIONS, _)
    );
    let token = app.state().token.clone();
    let contexts = request.uri().path() == "/contexts" || request.uri().path().starts_with("/contexts/");
    let given = match given(request.headers()) {
        None if contexts => request.headers().get(TRAFFIC).map(|value| value.as_bytes()),
        given => given,
    };
    if let (Some(token), false) = (token, open)
        && !same(token.as_bytes(), given.unwrap_or_default())
    {
        return Refusal(StatusCode::UNAUTHORIZED, REFUSED.into()).into_response();
    }
    // Also where nobody asks for it: a name that nobody has is a mistake.
    if let Err(failure) =
        request.headers().get("authorization").map_or(Ok(()), |_| user::of(&app, request.headers()).map(drop))
    {
        let streams = request.headers().get("content-type").and_then(|kind| kind.to_str().ok());
        if streams.is_some_and(|kind| kind.starts_with("application/connect+") || kind.starts_with("application/grpc"))
            && let Ok(call) = super::connect::Call::of(request.headers(), true)
        {
            return call.refuse(&failure);
        }
        return failure.unary();
    }
    next.run(request).await
}

/// Lets a request for a file through that has the token, or whose address is signed for what it wants.
///
/// # Errors
/// Why not.
pub(super) fn check_file(app: &App, headers: &HeaderMap, query: &Query, operation: &str) -> Result<(), Refusal> {
    let refuse = |text: &str| Err(Refusal(StatusCode::UNAUTHORIZED, text.to_owned()));
    let Some(token) = app.state().token.clone() else { return Ok(()) };
    if let Some(given) = given(headers) {
        if same(token.as_bytes(), given) {
            return Ok(());
        }
        return refuse("access token present in header but does not match");
    }
    let Some(signature) = query.get("signature").filter(|signature| !signature.is_empty()) else {
        return refuse("missing signature query parameter");
    };
    let expiration = match query.get("signature_expiration") {
        None => None,
        Some(text) => Some(
            text.parse::<i64>()
                .map_err(|_| Refusal(StatusCode::BAD_REQUEST, "signature_expiration is not a number".into()))?,
        ),
    };
    let path = query.get("path").unwrap_or_default();
    let wanted = sign(path, operation, query.get("username").unwrap_or_default(), &token, expiration);
    if !same(wanted.as_bytes(), signature.as_bytes()) {
        return refuse("invalid signature");
    }
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    if expiration.is_some_and(|expiration| expiration < i64::try_from(now).unwrap_or(i64::MAX)) {
        return refuse("signature is already expired");
    }
    Ok(())
}

fn sign(path: &str, operation: &str, user: &str, token: &str, expiration: Option<i64>) -> String {
    let mut text = format!("{path}:{operation}:{user}:{token}");
    if let Some(expiration) = expiration {
        text.push_str(&format!(":{expiration}"));
    }
    format!("v1_{}", base64::engine::general_purpose::STANDARD_NO_PAD.encode(Sha256::digest(text)))
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_signature_is_that_of_the_sdk() {
        let signature = super::sign("/tmp/x", "read", "root", "tok", Some(1_795_371_448));
        assert_eq!(signature, "v1_bzQsRCiHQ0TFmsa6zH2dCohyJ17CSHD0CGFHH1AzGss");
    }
}
