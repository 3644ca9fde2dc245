//! Connections: how many, and what becomes of them at the end.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::connect_info::ConnectInfo;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tower::ServiceExt;

/// How long a client may take for the head of a request.
const HEAD: Duration = Duration::from_secs(60);

/// How much of a request is held at once, in bytes.
const BUFFER: usize = 1 << 20;

/// How many requests there may be at once on one connection of HTTP/2.
const STREAMS: u32 = 1024;

/// What a connection of HTTP/2 begins with, as far as no method does.
const PREFACE: &[u8] = b"PRI";

/// Whether a client begins as HTTP/2 does. Nothing is taken from the connection.
async fn speaks_http2(stream: &TcpStream) -> io::Result<bool> {
    let mut begin = [0; PREFACE.len()];
    let look = async {
        let mut pause = Duration::from_millis(2);
        loop {
            let length = stream.peek(&mut begin).await?;
            if length == 0 || length == PREFACE.len() || !PREFACE.starts_with(&begin[..length]) {
                return Ok(begin[..length] == *PREFACE);
            }
            // The kernel says at once that there is something: the same, mostly.
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(HEAD);
        }
    };
    tokio::time::timeout(HEAD, look).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

/// Serves until `end` says so; then no new request is taken, and what is under way is finished. Returns when it is.
pub async fn serve(listener: TcpListener, router: Router, connections: usize, mut end: watch::Receiver<bool>) {
    let free = Arc::new(Semaphore::new(connections));
    loop {
        // Who cannot be served waits in the kernel's line.
        let permit = tokio::select! {
            permit = free.clone().acquire_owned() => permit,
            () = async { let _ = end.wait_for(|end| *end).await; } => break,
        };
        let Ok(permit) = permit else { break };
        let (stream, peer) = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(e) => {
                    // Out of descriptors, say: others have to be closed first.
                    log::warn!("accept a connection: {e}");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            },
            () = async { let _ = end.wait_for(|end| *end).await; } => break,
        };
        let _ = stream.set_nodelay(true);
        let (router, mut end) = (router.clone(), end.clone());
        tokio::spawn(async move {
            let _permit = permit;
            let service = service_fn(move |request: hyper::Request<Incoming>| {
                let mut request = request.map(axum::body::Body::new);
                request.extensions_mut().insert::<ConnectInfo<SocketAddr>>(ConnectInfo(peer));
                let router = router.clone();
                async move { Ok::<_, Infallible>(router.oneshot(request).await.unwrap_or_else(|never| match never {})) }
            });
            let begun = tokio::select! {
                begun = speaks_http2(&stream) => begun,
                () = async { let _ = end.wait_for(|end| *end).await; } => return,
            };
            // The two kinds of connections are driven alike, and are no kind of anything.
            macro_rules! drive {
                ($connection:expr) => {{
                    let connection = $connection;
                    tokio::pin!(connection);
                    tokio::select! {
                        done = &mut connection => done,
                        () = async { let _ = end.wait_for(|end| *end).await; } => {
                            connection.as_mut().graceful_shutdown();
                            connection.await
                        }
                    }
                }};
            }
            let done = match begun {
                Ok(true) => drive!(
                    hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                        .timer(TokioTimer::new())
                        .max_concurrent_streams(STREAMS)
                        .keep_alive_interval(HEAD)
                        .serve_connection(TokioIo::new(stream), service)
                ),
                Ok(false) => drive!(
                    hyper::server::conn::http1::Builder::new()
                        .timer(TokioTimer::new())
                        .max_buf_size(BUFFER)
                        .header_read_timeout(HEAD)
                        .serve_connection(TokioIo::new(stream), service)
                        .with_upgrades()
                ),
                Err(e) => return log::debug!("a connection from {peer}: {e}"),
            };
            if let Err(e) = done {
                log::debug!("a connection from {peer}: {e}");
            }
        });
    }
    drop(listener);
    // All that were given out are back.
    let all = u32::try_from(connections).unwrap_or(u32::MAX);
    let _ = free.acquire_many(all).await;
}
