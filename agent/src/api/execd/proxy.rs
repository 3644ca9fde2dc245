//! `/proxy/{port}/…`: what listens on the loopback, through the daemon's port.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use axum::extract::{ConnectInfo, Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use tokio::net::TcpStream;

use super::App;
use super::auth::TOKEN;
use crate::forward::http::{To, exchange};

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
    match to_port(request, port, &format!("/{path}{query}")).await {
        Ok(response) => response,
        Err(e) => {
            log::debug!("forward to port {port}: {e}");
            (StatusCode::BAD_GATEWAY, "Bad Gateway").into_response()
        }
    }
}

async fn to_port(mut request: Request, port: u16, path: &str) -> anyhow::Result<Response> {
    let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await?;
    let _ = stream.set_nodelay(true);
    // The application has no business with the daemon's token.
    request.headers_mut().remove(TOKEN);
    let peer = request.extensions().get::<ConnectInfo<SocketAddr>>().map(|info| info.0);
    let host = format!("127.0.0.1:{port}");
    exchange(request, stream, To { path, peer, secure: false, host: Some(&host), end: None, permit: None }).await
}
