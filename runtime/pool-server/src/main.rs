//! `runx-pool-server`: programs in warm sandboxes over HTTP, in the form that go-judge's clients know. `runx pool serve`
//! starts it.

mod api;
mod config;
mod metrics;
mod model;
mod publish;
mod run;
mod store;

use std::convert::Infallible;
use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use axum::body::Body;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use runx_core::workload::WasmConfig;
use runx_pool::Pool;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Semaphore, watch};
use tower::ServiceExt;

use api::App;
use config::{Asked, Config};
use publish::Published;
use run::Runner;
use store::Store;

/// How long a client may take for the head of a request.
const HEAD: Duration = Duration::from_secs(60);

/// How many connections there may be at once.
const CONNECTIONS: usize = 16_384;

/// How long an end of the server waits for what runs.
const DRAIN: Duration = Duration::from_secs(10);

/// Who has the interface besides those who run something: `main`, this function, and the task that forgets files.
const KEPT: usize = 3;

/// How often it is looked for files that nobody has asked for.
const SWEEP: Duration = Duration::from_secs(15);

fn main() -> ExitCode {
    // The pool executes this program again, to be its spawner.
    runx_pool::spawner_main();
    let asked = Config::parse(std::env::args().skip(1), |name| std::env::var(name).ok());
    let done = match asked {
        Ok(Asked::Print(text)) => {
            let _ = std::io::stdout().write_all(text.as_bytes());
            return ExitCode::SUCCESS;
        }
        Ok(Asked::Serve(config)) => run(*config),
        Err(text) => Err(anyhow::anyhow!(text)),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            let _ = writeln!(std::io::stderr(), "runx-pool-server: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(config: Config) -> anyhow::Result<()> {
    let executable = std::env::current_exe().context("find this program's own path")?;
    let wasm = WasmConfig::beside(&executable);
    let pool = Pool::new(config.template, config.settings).context("start the pool")?;
    let store =
        Store::new(&config.directories, config.file_limit, config.file_timeout).context("make a place for files")?;
    let loopback_only = config.token.is_none() && !config.open;
    let app = Arc::new(App {
        runner: Runner { pool, store, bounds: config.bounds, wasm },
        token: config.token,
        free: Arc::new(Semaphore::new(config.parallelism)),
        parallelism: config.parallelism,
        queue: Arc::new(Semaphore::new(config.queue)),
        body_limit: config.body_limit,
        loopback_only,
        admitted: Arc::new(Semaphore::new(config.queue + config.parallelism)),
        running: std::sync::Mutex::default(),
        counters: metrics::Counters::default(),
    });
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(config.parallelism + 64)
        .enable_all()
        .build()
        .context("start the runtime")?;
    let address = config.address;
    let published = config
        .metrics_file
        .map(|path| {
            let text = app.runner.pool.metrics().prometheus();
            Published::new(path.clone(), &text).with_context(|| format!("write {} (--metrics-file)", path.display()))
        })
        .transpose()?;
    let served = runtime.block_on(serve(app.clone(), address, published));
    runtime.shutdown_timeout(Duration::from_secs(1));
    // What is still lent belongs to threads that have been given up: the pool ends it all the same.
    drop(app);
    served
}

async fn serve(app: Arc<App>, address: std::net::SocketAddr, published: Option<Published>) -> anyhow::Result<()> {
    let listener = TcpListener::bind(address).await.with_context(|| format!("listen on {address}"))?;
    let address = listener.local_addr().context("ask for the own address")?;
    println!("runx-pool-server {} listens on {address}", env!("CARGO_PKG_VERSION"));
    let (end, ending) = watch::channel(false);
    let free = Arc::new(Semaphore::new(CONNECTIONS));
    let accepting = tokio::spawn(accept(listener, api::router(app.clone()), free.clone(), ending));
    let sweeping = app.clone();
    tokio::spawn(async move {
        loop {
            tokio::time::sleep(SWEEP).await;
            sweeping.runner.store.sweep();
            if let Some(published) = &published
                && let Err(e) = published.write(&sweeping.runner.pool.metrics().prometheus())
            {
                log::warn!("write the metrics: {e}");
            }
        }
    });
    let mut interrupt = signal(SignalKind::interrupt()).context("watch for signals")?;
    let mut terminate = signal(SignalKind::terminate()).context("watch for signals")?;
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    end.send_replace(true);
    let all = u32::try_from(CONNECTIONS).unwrap_or(u32::MAX);
    let _ = tokio::time::timeout(DRAIN, async {
        let _ = accepting.await;
        let _ = free.acquire_many(all).await;
    })
    .await;
    // Who has not ended by himself is ended: the pool and the files go with the last thread.
    app.cancel_all();
    let ended = async {
        while Arc::strong_count(&app) > KEPT {
            tokio::time::sleep(Duration::from_millis(20)).await
        }
    };
    let _ = tokio::time::timeout(DRAIN, ended).await;
    Ok(())
}

/// Serves until `end` says so; then no new request is taken, and what is under way is finished.
async fn accept(listener: TcpListener, router: axum::Router, free: Arc<Semaphore>, mut end: watch::Receiver<bool>) {
    loop {
        // Who cannot be served waits in the kernel's line.
        let Ok(permit) = free.clone().acquire_owned().await else { return };
        let (stream, peer) = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(e) => {
                    log::warn!("accept a connection: {e}");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            },
            () = async { let _ = end.wait_for(|end| *end).await; } => return,
        };
        let _ = stream.set_nodelay(true);
        let (router, mut end) = (router.clone(), end.clone());
        tokio::spawn(async move {
            let _permit = permit;
            let service = service_fn(move |request: hyper::Request<Incoming>| {
                let router = router.clone();
                async move {
                    let answer = router.oneshot(request.map(Body::new)).await;
                    Ok::<_, Infallible>(answer.unwrap_or_else(|never| match never {}))
                }
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD)
                .serve_connection(TokioIo::new(stream), service)
                .with_upgrades();
            tokio::pin!(connection);
            let done = tokio::select! {
                done = &mut connection => done,
                () = async { let _ = end.wait_for(|end| *end).await; } => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
            };
            if let Err(e) = done {
                log::debug!("a connection from {peer}: {e}");
            }
        });
    }
}
