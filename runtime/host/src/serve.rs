//! Answering HTTP requests with a component of the worlds `wasi:http/proxy` (0.2) and `wasi:http/service` (0.3).
//!
//! Each request of a 0.2 component has an instance of its own, from a pool. One of 0.3 may take several requests at once and
//! one after the other, as its world foresees. Bodies are streams in both directions.

use std::convert::Infallible;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context as TaskContext, Poll};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::server::conn::http1;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioTimer;
use runx_wasm::run::Outcome;
use runx_wasm::signals;
use tokio::net::{TcpListener, TcpStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use wasmtime::{Store, StoreContextMut};
use wasmtime_wasi_http::handler::{
    HandlerState, Instance, ProxyHandler, ProxyPre, ShouldAccept, WorkerExpiration, WorkerState, WorkerStatus,
};
use wasmtime_wasi_http::io::TokioIo;
use wasmtime_wasi_http::{WasiBody, WasiHttpView, p2, p3};

use crate::arguments::Arguments;
use crate::artifact::{Artifact, Program};
use crate::context::{self, Host};
use crate::linker;
use crate::metrics::{self, Metrics};

/// Connections at once. Those beyond it wait.
const CONNECTIONS: usize = 1000;

/// Requests that one instance of a 0.3 component answers in its life, and at once.
const REUSE: (usize, usize) = (128, 16);

/// How long an instance without work is kept.
const IDLE: Duration = Duration::from_secs(1);

/// How long requests that are under way may take once the end was asked for.
const GRACE: Duration = Duration::from_secs(30);

/// How long a client may take to send a request's head, and between requests.
const SILENCE: Duration = Duration::from_secs(30);

/// How long an instance may compute before it is another one's turn.
const TURN: Duration = Duration::from_millis(10);

type Guest = wasmtime::component::GuestTaskId;

/// Serves until SIGINT or SIGTERM.
pub(crate) async fn serve(arguments: &Arguments, artifact: Artifact) -> Result<Outcome> {
    let name = &arguments.args[0];
    let Program::Component(component) = artifact.program else {
        bail!("{name}: this is a core module; what serves HTTP is a component");
    };
    let linker = linker::linker(&artifact.engine)?;
    let pre =
        linker.instantiate_pre(&component).map_err(|e| anyhow!("{name}: cannot instantiate the component: {e:#}"))?;
    let (pre, reuse) = match p3::bindings::ServicePre::new(pre.clone()) {
        // An instance's fuel is for a request.
        Ok(service) if arguments.fuel.is_some() => (ProxyPre::P3(service), (1, 1)),
        Ok(service) => (ProxyPre::P3(service), REUSE),
        Err(_) => match p2::bindings::ProxyPre::new(pre) {
            Ok(proxy) => (ProxyPre::P2(proxy), (1, 1)),
            Err(_) => bail!("{name}: it exports neither wasi:http/handler (0.3) nor wasi:http/incoming-handler (0.2)"),
        },
    };
    // What is installed besides would be called, too.
    signals::release(libc::SIGINT).and_then(|()| signals::release(libc::SIGTERM))?;
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let listener =
        TcpListener::bind(arguments.address).await.with_context(|| format!("listen on {}", arguments.address))?;
    say(format_args!("Serving HTTP on http://{}/", listener.local_addr()?));
    let settings = Arc::new(Settings::of(arguments)?);
    let metrics = Arc::new(Metrics::default());
    if let Some(address) = arguments.metrics {
        let listener = TcpListener::bind(address).await.with_context(|| format!("listen on {address}"))?;
        tokio::spawn(metrics::serve(listener, metrics.clone()));
    }
    tick(artifact.engine.clone())?;
    let handler = ProxyHandler::new(State { engine: artifact.engine, settings, pre, reuse, metrics });
    let slots = Arc::new(Semaphore::new(CONNECTIONS));
    let ending = watch::Sender::new(false);
    loop {
        let accepted = async {
            let slot = slots.clone().acquire_owned().await?;
            let (stream, _) = listener.accept().await?;
            anyhow::Ok((slot, stream))
        };
        tokio::select! {
            _ = interrupt.recv() => break,
            _ = terminate.recv() => break,
            accepted = accepted => match accepted {
                Ok((slot, stream)) => drop(tokio::spawn(talk(stream, handler.clone(), slot, ending.subscribe()))),
                // Out of descriptors, say: the next may be better.
                Err(e) => {
                    say(format_args!("runx: accept a connection: {e:#}"));
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            },
        }
    }
    drop(listener);
    // Connections that are idle end now, the others with their request.
    ending.send_replace(true);
    let all = slots.acquire_many(CONNECTIONS as u32);
    tokio::select! {
        _ = tokio::time::timeout(GRACE, all) => {}
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    Ok(Outcome::Exited(0))
}

/// A line on stderr. A server goes on when nobody reads it.
fn say(line: std::fmt::Arguments<'_>) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// The part of the arguments that every instance needs.
struct Settings {
    arguments: Arguments,
}

impl Settings {
    fn of(arguments: &Arguments) -> Result<Self> {
        Ok(Self { arguments: arguments.try_clone()? })
    }
}

struct State {
    engine: wasmtime::Engine,
    settings: Arc<Settings>,
    pre: ProxyPre<Host>,
    /// Requests for an instance: in its life, and at once.
    reuse: (usize, usize),
    metrics: Arc<Metrics>,
}

impl HandlerState for State {
    type StoreData = Host;
    type WorkerExpiration = Expiration;
    type WorkerState = Worker;

    async fn instantiate(&self) -> wasmtime::Result<Instance<Host, Expiration, Worker>> {
        let arguments = &self.settings.arguments;
        let mut store =
            context::component_store(&self.engine, arguments).map_err(|e| wasmtime::Error::msg(format!("{e:#}")))?;
        let proxy = self.pre.instantiate_async(&mut store).await?;
        let limit = arguments.timeout.unwrap_or(Duration::MAX);
        self.metrics.instance_made();
        Ok(Instance {
            store,
            proxy,
            view: WasiHttpView::http,
            expiration: Expiration { limit, sleep: Box::pin(tokio::time::sleep(Duration::MAX)) },
            state: Worker { limit, reuse: self.reuse, metrics: self.metrics.clone() },
        })
    }
}

/// When an instance ends that does nothing, or too much.
struct Expiration {
    limit: Duration,
    sleep: Pin<Box<tokio::time::Sleep>>,
}

impl WorkerExpiration for Expiration {
    fn poll(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>, status: WorkerStatus, start: Instant) -> Poll<()> {
        let limit = if matches!(status, WorkerStatus::Idle) { IDLE } else { self.limit };
        let Some(deadline) = start.checked_add(limit).map(tokio::time::Instant::from_std) else { return Poll::Pending };
        if self.sleep.deadline() != deadline {
            self.sleep.as_mut().reset(deadline);
        }
        self.sleep.as_mut().poll(cx)
    }
}

struct Worker {
    limit: Duration,
    reuse: (usize, usize),
    metrics: Arc<Metrics>,
}

impl WorkerState for Worker {
    type StoreData = Host;
    type RequestData = ();

    fn should_accept_request(&self, at_once: usize, in_all: usize) -> ShouldAccept {
        match (in_all >= self.reuse.0, at_once >= self.reuse.1) {
            (true, _) => ShouldAccept::Never,
            (_, true) => ShouldAccept::No,
            _ => ShouldAccept::Yes,
        }
    }

    fn on_request_start(
        &self,
        _: StoreContextMut<'_, Host>,
        (): (),
        _: Guest,
    ) -> Pin<Box<dyn Future<Output = ()> + 'static + Send + Sync>> {
        Box::pin(tokio::time::sleep(self.limit))
    }

    fn drop(&self, _: Store<Host>, result: wasmtime::Result<()>) {
        self.metrics.instance_gone(result.is_err());
        if let Err(e) = result {
            say(format_args!("runx: an instance failed: {e:#}"));
        }
    }
}

async fn talk(
    stream: TcpStream,
    handler: ProxyHandler<State>,
    slot: OwnedSemaphorePermit,
    mut ending: watch::Receiver<bool>,
) {
    // Small pieces of a stream shall not wait for more.
    let _ = stream.set_nodelay(true);
    let service = hyper::service::service_fn(move |request: Request<hyper::body::Incoming>| {
        let handler = handler.clone();
        async move { Ok::<_, Infallible>(answer(&handler, request).await) }
    });
    // Who says nothing has no place for ever.
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(SILENCE).keep_alive(true);
    let mut connection = pin!(http.serve_connection(TokioIo::new(stream), service));
    // A client that breaks off, or speaks something else, is his own loss.
    tokio::select! {
        _ = connection.as_mut() => {}
        () = async { drop(ending.wait_for(|ending| *ending).await) } => {
            connection.as_mut().graceful_shutdown();
            let _ = connection.await;
        }
    }
    drop(slot);
}

/// Lets instances that do not wait for anything take turns, from a thread of its own.
fn tick(engine: wasmtime::Engine) -> Result<()> {
    let turns = move || {
        loop {
            std::thread::sleep(TURN);
            engine.increment_epoch();
        }
    };
    std::thread::Builder::new().name("turns".into()).spawn(turns).context("start the thread that counts turns")?;
    Ok(())
}

/// A request names its path only, and the host in a header. A component may ask for the whole of its address.
fn complete_address<T>(request: &mut Request<T>) {
    let host = request.headers().get(hyper::header::HOST).and_then(|host| host.to_str().ok()).map(str::to_owned);
    let mut parts = request.uri().clone().into_parts();
    if parts.scheme.is_some() {
        return;
    }
    let Some(authority) = host.and_then(|host| host.parse().ok()) else { return };
    parts.scheme = Some(http::uri::Scheme::HTTP);
    parts.authority = Some(authority);
    if parts.path_and_query.is_none() {
        parts.path_and_query = Some(http::uri::PathAndQuery::from_static("/"));
    }
    if let Ok(uri) = http::Uri::from_parts(parts) {
        *request.uri_mut() = uri;
    }
}

async fn answer(handler: &ProxyHandler<State>, request: Request<hyper::body::Incoming>) -> Response<WasiBody> {
    let mut request = request;
    complete_address(&mut request);
    let request = request.map(|body| body.map_err(Into::into).boxed_unsync());
    let begun = Instant::now();
    let handled = handler.handle((), request).await;
    let status = handled.as_ref().map_or(500, |response| response.status().as_u16());
    handler.state().metrics.request(status, begun.elapsed());
    match handled {
        Ok(response) => response,
        Err(e) => {
            // Why is for who runs it, and not for who asks.
            say(format_args!("runx: a request failed: {e:#}"));
            let text = Full::new(Bytes::from_static(b"the component failed\n")).map_err(|never| match never {});
            let mut response = Response::new(text.boxed_unsync());
            *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
            response
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_gets_the_host_of_its_header() {
        let mut request = Request::builder().uri("/a?b").header("host", "example:81").body(()).unwrap();
        complete_address(&mut request);
        assert_eq!(request.uri(), "http://example:81/a?b");
        let mut request = Request::builder().uri("/a").header("host", "not a host").body(()).unwrap();
        complete_address(&mut request);
        assert_eq!(request.uri(), "/a");
    }
}
