//! As whom a file operation is done: `/v1/filesystem/{uid}/{gid}` before its path says so.

use std::collections::HashMap;

use axum::RequestPartsExt;
use axum::extract::{FromRequestParts, OriginalUri, Path};
use axum::http::request::Parts;

use super::error::{Refusal, Result};
use crate::process::users::Identity;

/// Who; the daemon itself where the path does not say.
#[derive(Debug)]
pub(super) struct As(pub(super) Option<Identity>);

impl<S: Send + Sync> FromRequestParts<S> for As {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self> {
        let asked = parts.extensions.get::<OriginalUri>().is_some_and(|uri| uri.path().starts_with("/v1/filesystem"));
        let names = match parts.extract::<Path<HashMap<String, String>>>().await {
            Ok(Path(names)) => names,
            Err(_) if !asked => return Ok(Self(None)),
            // What cannot be read is no reason to do it as the daemon.
            Err(e) => return Err(Refusal::body(format!("the path cannot be read: {e}"))),
        };
        let (Some(uid), Some(gid)) = (names.get("uid"), names.get("gid")) else {
            return if asked { Err(Refusal::body("the path names no user and group")) } else { Ok(Self(None)) };
        };
        let number = |name: &str, text: &str| {
            let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
            text.parse::<u32>()
                .ok()
                .filter(|id| digits && *id != u32::MAX)
                .ok_or_else(|| Refusal::body(format!("{name}: {text:?} is not a number from 0 to 4294967294")))
        };
        Ok(Self(Some(Identity { uid: number("uid", uid)?, gid: number("gid", gid)?, groups: Vec::new() })))
    }
}
