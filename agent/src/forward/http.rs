//! HTTP requests, passed on to somebody else: one connection to him for each, upgrades included.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::body::Body;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode, Uri, header};
use axum::response::IntoResponse;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{OwnedSemaphorePermit, watch};

use super::Forward;
use super::plan::{Protocol, Shared};
use crate::api::same;

/// Headers that are about one connection, and not about the message.
const OF_A_CONNECTION: [&str; 6] =
    ["connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding"];

/// What a forward asks for, besides `Authorization: Bearer`.
const TOKEN: &str = "x-runx-forward-token";

/// Serves one connection of a forward.
pub(super) async fn serve(
    forward: &Shared,
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    peer: SocketAddr,
    permit: Permit,
) -> io::Result<()> {
    let service = service_fn(|request: Request<hyper::body::Incoming>| {
        let (forward, permit) = (forward.clone(), permit.clone());
        async move { Ok::<_, Infallible>(pass(&forward, request.map(Body::new), peer, permit).await) }
    });
    hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(forward.plan.idle_timeout)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades()
        .await
        .map_err(io::Error::other)
}

/// Whether a request has the token; it is taken out of it.
fn admitted(forward: &Forward, headers: &mut HeaderMap) -> bool {
    let Some(token) = &forward.plan.token else { return true };
    let own = headers.remove(TOKEN);
    if let Some(own) = &own {
        return same(token.as_bytes(), own.as_bytes());
    }
    let bearer = headers.get(header::AUTHORIZATION).and_then(|value| value.as_bytes().strip_prefix(b"Bearer "));
    let admitted = same(token.as_bytes(), bearer.unwrap_or_default());
    if admitted {
        headers.remove(header::AUTHORIZATION);
    }
    admitted
}

async fn pass(forward: &Shared, mut request: Request<Body>, peer: SocketAddr, permit: Permit) -> Response<Body> {
    let count = |counter: &std::sync::atomic::AtomicU64| counter.fetch_add(1, Ordering::Relaxed);
    if !admitted(forward, request.headers_mut()) {
        count(&forward.counters.refused);
        let ask = [(header::WWW_AUTHENTICATE, "Bearer")];
        return (StatusCode::UNAUTHORIZED, ask, "this forward needs its token\n").into_response();
    }
    let websocket =
        upgrade_of(request.headers()).is_some_and(|name| name.as_bytes().eq_ignore_ascii_case(b"websocket"));
    if forward.plan.protocol == Protocol::Websocket && !websocket {
        count(&forward.counters.refused);
        return (StatusCode::UPGRADE_REQUIRED, [(header::UPGRADE, "websocket")]).into_response();
    }
    let open = forward.open();
    let query = request.uri().query().map(|query| format!("?{query}")).unwrap_or_default();
    let path = format!("{}{}{query}", forward.plan.prefix, request.uri().path());
    let secure = forward.plan.acceptor.is_some();
    let exchanged = async {
        let stream = forward.connect().await?;
        let to =
            To { path: &path, peer: Some(peer), secure, host: None, end: Some(&forward.end), permit: Some(permit) };
        match &forward.plan.connector {
            Some((connector, name)) => exchange(request, connector.connect(name.clone(), stream).await?, to).await,
            None => exchange(request, stream, to).await,
        }
    };
    // An answer may take as long as it does once it has begun.
    let answer = tokio::time::timeout(forward.plan.idle_timeout, exchanged).await;
    drop(open);
    match answer {
        Ok(Ok(response)) => response,
        Ok(Err(e)) => {
            count(&forward.counters.failed);
            log::debug!("forward {}: {e}", forward.id);
            (StatusCode::BAD_GATEWAY, format!("{} does not answer\n", forward.plan.target)).into_response()
        }
        Err(_) => {
            count(&forward.counters.failed);
            (StatusCode::GATEWAY_TIMEOUT, format!("{} took too long\n", forward.plan.target)).into_response()
        }
    }
}

/// How a request is passed on.
#[derive(Clone, Debug)]
pub struct To<'a> {
    /// Its path and query there.
    pub path: &'a str,
    /// Who sent it.
    pub peer: Option<SocketAddr>,
    /// Whether it came over TLS.
    pub secure: bool,
    /// Whom it is for, where it does not say so itself.
    pub host: Option<&'a str>,
    /// What an upgraded connection ends with, besides its two sides.
    pub end: Option<&'a watch::Sender<bool>>,
    /// What an upgraded connection holds as long as it is open.
    pub permit: Option<Permit>,
}

/// A place among the connections that there may be.
pub type Permit = Arc<OwnedSemaphorePermit>;

/// Passes a request on over a connection, and its answer back.
///
/// # Errors
/// When the other side does not speak HTTP, or ends.
pub async fn exchange(
    mut request: Request<Body>,
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    to: To<'_>,
) -> anyhow::Result<Response<Body>> {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(async move {
        if let Err(e) = connection.with_upgrades().await {
            log::debug!("a forwarded connection: {e}");
        }
    });
    let upgrade = upgrade_of(request.headers());
    let ours = upgrade.as_ref().map(|_| hyper::upgrade::on(&mut request));
    *request.uri_mut() = to.path.parse::<Uri>()?;
    let headers = request.headers_mut();
    clean(headers);
    headers.remove("x-forwarded-host");
    let first = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
    let client = to.peer.map(|peer| peer.ip().to_string());
    let from = first("x-forwarded-for").or_else(|| first("x-real-ip")).or(client);
    if let Some(value) = from.and_then(|from| HeaderValue::from_str(&from).ok()) {
        headers.insert("x-forwarded-for", value);
    }
    headers.insert("x-forwarded-proto", HeaderValue::from_static(if to.secure { "https" } else { "http" }));
    if let (Some(host), false) = (to.host, headers.contains_key(header::HOST)) {
        headers.insert(header::HOST, HeaderValue::from_str(host)?);
    }
    if let Some(protocol) = &upgrade {
        headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(header::UPGRADE, protocol.clone());
    }
    let mut response = sender.send_request(request).await?;
    if response.status() == StatusCode::SWITCHING_PROTOCOLS
        && let Some(ours) = ours
    {
        let theirs = hyper::upgrade::on(&mut response);
        let end = to.end.map(watch::Sender::subscribe);
        let ended = async move {
            match end {
                Some(mut end) => drop(end.wait_for(|end| *end).await),
                None => std::future::pending().await,
            }
        };
        let permit = to.permit;
        tokio::spawn(async move {
            let _permit = permit;
            match tokio::try_join!(ours, theirs) {
                Ok((ours, theirs)) => {
                    let (mut ours, mut theirs) = (TokioIo::new(ours), TokioIo::new(theirs));
                    tokio::select! {
                        _ = tokio::io::copy_bidirectional(&mut ours, &mut theirs) => {}
                        () = ended => {}
                    }
                }
                Err(e) => log::debug!("a forwarded upgrade: {e}"),
            }
        });
        let protocol = response.headers().get(header::UPGRADE).cloned();
        let mut response = response.map(|_| Body::empty());
        clean(response.headers_mut());
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        if let Some(protocol) = protocol {
            response.headers_mut().insert(header::UPGRADE, protocol);
        }
        return Ok(response);
    }
    clean(response.headers_mut());
    Ok(response.map(Body::new))
}

/// The protocol that a request wants to go on with.
fn upgrade_of(headers: &HeaderMap) -> Option<HeaderValue> {
    let wanted = headers.get_all(header::CONNECTION).iter().filter_map(|value| value.to_str().ok());
    let upgrade = wanted.flat_map(|value| value.split(',')).any(|word| word.trim().eq_ignore_ascii_case("upgrade"));
    if upgrade { headers.get(header::UPGRADE).cloned() } else { None }
}

/// Takes away what is about one connection, also what the connection header names.
fn clean(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|word| word.trim().parse().ok())
        .collect();
    for name in named {
        headers.remove(name);
    }
    for name in OF_A_CONNECTION {
        headers.remove(name);
    }
    headers.remove(header::UPGRADE);
}
