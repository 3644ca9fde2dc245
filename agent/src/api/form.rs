//! Multipart forms whose requests are read to their very end.

use std::future::poll_fn;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Error;
use axum::body::{Body, BodyDataStream, Bytes};
use axum::extract::multipart::{Multipart, MultipartRejection};
use axum::extract::{FromRequest, Request};
use futures_util::{StreamExt, stream};

/// How much may come behind a form's last boundary, in bytes.
const REST: usize = 64 << 10;

/// How long that is waited for.
const PATIENCE: Duration = Duration::from_secs(5);

/// What is left of a request whose form has been read.
pub(crate) struct Rest(Arc<Mutex<BodyDataStream>>);

fn next(body: &Mutex<BodyDataStream>, context: &mut Context<'_>) -> Poll<Option<Result<Bytes, Error>>> {
    body.lock().unwrap_or_else(PoisonError::into_inner).poll_next_unpin(context)
}

/// Begins to read a request's form.
pub(crate) async fn form(request: Request) -> (Result<Multipart, MultipartRejection>, Rest) {
    let (head, body) = request.into_parts();
    let body = Arc::new(Mutex::new(body.into_data_stream()));
    let read = body.clone();
    let stream = stream::poll_fn(move |context| next(&read, context));
    let request = Request::from_parts(head, Body::from_stream(stream));
    (Multipart::from_request(request, &()).await, Rest(body))
}

impl Rest {
    /// Reads what comes behind a form: the end of a body in chunks, as a rule. Who answers before it has come closes the
    /// connection, since nobody knows where the next request begins; and who is still writing takes that for a failure:
    /// `kubectl port-forward` ends then.
    pub(crate) async fn skip(self) {
        let rest = async {
            let mut left = REST;
            while let Some(Ok(bytes)) = poll_fn(|context| next(&self.0, context)).await {
                let Some(less) = left.checked_sub(bytes.len()) else { return };
                left = less;
            }
        };
        let _ = tokio::time::timeout(PATIENCE, rest).await;
    }
}
