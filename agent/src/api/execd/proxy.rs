//! `/proxy/{port}/…`: what listens on the loopback, through the daemon's port.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use axum::body::Body;
use axum::extract::{ConnectInfo, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use super::App;
use super::auth::TOKEN;

/// Headers that are about one connection, and not about the message.
const OF_A_CONNECTION: [&str; 6] =
    ["connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding"];

/// Any request below `/proxy/`.
pub(super) async fn forward(State(_): State<Arc<App>>, request: Request) -> Response {
    let uri = request.uri().clone();
    let rest = uri.path().strip_prefix("/proxy/").unwrap_or_default();
    let (port, path) = rest.split_once('/').unwrap_or((rest, ""));
    if port.is_empty() {
        return (StatusCode::BAD_REQUEST, "port is required").into_response();
    }
    let Some(port) = port.parse::<u16>().ok().filter(|port| *port > 0) else {
        return (StatusCode::BAD_REQUEST, format!("invalid port: {port}")).into_response();
    };
    let query = uri.query().map(|query| format!("?{query}")).unwrap_or_default();
    match exchange(request, port, &format!("/{path}{query}")).await {
        Ok(response) => response,
        Err(e) => {
            log::debug!("forward to port {port}: {e}");
            (StatusCode::BAD_GATEWAY, "Bad Gateway").into_response()
        }
    }
}

async fn exchange(mut request: Request, port: u16, path: &str) -> anyhow::Result<Response> {
    let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await?;
    let _ = stream.set_nodelay(true);
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(async move {
        if let Err(e) = connection.with_upgrades().await {
            log::debug!("a forwarded connection: {e}");
        }
    });
    let client = request.extensions().get::<ConnectInfo<SocketAddr>>().map(|info| info.0.ip().to_string());
    let upgrade = upgrade_of(request.headers());
    let ours = upgrade.as_ref().map(|_| hyper::upgrade::on(&mut request));
    *request.uri_mut() = path.parse::<Uri>()?;
    let headers = request.headers_mut();
    clean(headers);
    // The application has no business with the daemon's token.
    headers.remove(TOKEN);
    headers.remove("x-forwarded-host");
    let first = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
    let from = first("x-forwarded-for").or_else(|| first("x-real-ip")).or(client);
    if let Some(value) = from.and_then(|from| HeaderValue::from_str(&from).ok()) {
        headers.insert("x-forwarded-for", value);
    }
    headers.insert("x-forwarded-proto", HeaderValue::from_static("http"));
    if !headers.contains_key(header::HOST) {
        headers.insert(header::HOST, HeaderValue::from_str(&format!("127.0.0.1:{port}"))?);
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
        tokio::spawn(async move {
            match tokio::try_join!(ours, theirs) {
                Ok((ours, theirs)) => {
                    let (mut ours, mut theirs) = (TokioIo::new(ours), TokioIo::new(theirs));
                    // Either side may end it.
                    let _ = tokio::io::copy_bidirectional(&mut ours, &mut theirs).await;
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
