//! Requests that are read to their very end, also when they are refused.

use std::future::poll_fn;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Error;
use axum::body::{Body, BodyDataStream, Bytes};
use axum::extract::Request;
use futures_util::{StreamExt, stream};

/// How much may come that nobody needs, in bytes.
const REST: usize = 64 << 10;

/// How long that is waited for.
const PATIENCE: Duration = Duration::from_secs(5);

/// What is left of a request that has been read as far as was needed.
pub(crate) struct Rest(Arc<Mutex<BodyDataStream>>);

fn next(body: &Mutex<BodyDataStream>, context: &mut Context<'_>) -> Poll<Option<Result<Bytes, Error>>> {
    body.lock().unwrap_or_else(PoisonError::into_inner).poll_next_unpin(context)
}

/// The request, and what will be left of it.
pub(crate) fn split(request: Request) -> (Request, Rest) {
    let (head, body) = request.into_parts();
    let body = Arc::new(Mutex::new(body.into_data_stream()));
    let read = body.clone();
    let stream = stream::poll_fn(move |context| next(&read, context));
    (Request::from_parts(head, Body::from_stream(stream)), Rest(body))
}

impl Rest {
    /// Reads what is left: the end of a body in chunks, as a rule, or of what is refused. Who answers before it has come
    /// closes the connection, since nobody knows where the next request begins; and who is still writing takes that for a
    /// failure: `kubectl port-forward` ends then.
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
