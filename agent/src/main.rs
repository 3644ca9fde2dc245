//! `runx-agent`: see the library.

use std::io::Write;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use nix::sys::signal::Signal;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Semaphore, mpsc, watch};

use runx_agent::api::execd::{App, router};
use runx_agent::api::{envd, own};
use runx_agent::config::{Asked, Config};
use runx_agent::process::commands::Commands;
use runx_agent::process::{self, reaper, spawn};
use runx_agent::{code, fs, logging, metrics, server};

/// How often it is looked for commands that nobody needs any more, and for memory.
const SWEEP: Duration = Duration::from_secs(3600);
const TRIM: Duration = Duration::from_secs(20);

fn main() -> ExitCode {
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
            let _ = writeln!(std::io::stderr(), "runx-agent: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(config: Config) -> anyhow::Result<()> {
    logging::begin(config.log_level, config.log_file.as_deref()).context("open the log")?;
    spawn::raise_open_files();
    save_memory();
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(512)
        // One is asked for something more often than that, and so always there: to start one may fail.
        .thread_keep_alive(3 * TRIM)
        .thread_stack_size(1 << 20)
        .enable_all()
        .build()
        .context("start the runtime")?
        .block_on(serve(config))
}

/// Few arenas: a daemon that idles in each sandbox of a node shall be small.
fn save_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: sets parameters of the allocator.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 2);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 1 << 20);
    }
}

async fn serve(config: Config) -> anyhow::Result<()> {
    // Before anybody can know of it: until then a signal would end it on the spot, or, as the first process of a PID
    // namespace, be lost.
    let signals = watch_signals()?;
    reaper::begin().context("watch for the ends of processes")?;
    let root = fs::root::Root::new(config.jail.as_deref()).with_context(|| {
        format!("open --root {}", config.jail.as_deref().unwrap_or(std::path::Path::new("/")).display())
    })?;
    let jupyter = match &config.jupyter {
        // Both or none, as the protocol has it.
        Some((host, token)) if !token.is_empty() => {
            Some(code::client::Server::new(host, token).map_err(|e| anyhow::anyhow!("--jupyter-host: {e}"))?)
        }
        _ => None,
    };
    let address = SocketAddr::from((config.address, config.port));
    let listener = TcpListener::bind(address).await.with_context(|| format!("listen on {address}"))?;
    let address = listener.local_addr().context("ask for the own address")?;
    let (connections, drain) = (config.connections, config.drain);
    let app = Arc::new(App {
        commands: Commands::new(config.policy),
        sessions: process::session::Sessions::default(),
        shells: process::interactive::Shells::default(),
        code: code::Code::new(jupyter),
        files: fs::Files { root, limit: config.file_limit },
        metrics: metrics::Metrics::new(),
        executions: Arc::new(Semaphore::new(config.executions)),
        config,
    });
    log::info!("runx-agent {} listens on {address}", env!("CARGO_PKG_VERSION"));
    let (end, ending) = watch::channel(false);
    let third = Arc::new(own::App::new(app.clone()));
    let second = match app.config.envd_port {
        None => None,
        Some(port) => {
            let address = SocketAddr::from((app.config.address, port));
            let listener = TcpListener::bind(address).await.with_context(|| format!("listen on {address}"))?;
            let address = listener.local_addr().context("ask for the own address")?;
            let second = Arc::new(envd::App::new(app.clone()));
            log::info!("the envd protocol is spoken on {address}");
            let state = second.clone();
            let token = Arc::new(move || state.token());
            let routes = envd::router(second.clone()).merge(own::router(third.clone(), token));
            Some((second, tokio::spawn(server::serve(listener, routes, connections, ending.clone()))))
        }
    };
    let state = app.clone();
    let token = Arc::new(move || state.config.token.clone());
    let routes = router(app.clone()).merge(own::router(third.clone(), token));
    let serving = tokio::spawn(server::serve(listener, routes, connections, ending));
    sweep(app.clone());
    let signal = forward_signals(&app, signals).await?;
    log::info!("ending for {signal}: what runs gets {} s", drain.as_secs_f32());
    end.send_replace(true);
    // Whoever has asked for something hears how it ended, if that is not too far.
    let (second, serving_second) = second.unzip();
    let served = async {
        let _ = serving.await;
        if let Some(serving) = serving_second {
            let _ = serving.await;
        }
    };
    if tokio::time::timeout(drain, served).await.is_err() {
        log::warn!("what still runs is killed");
    }
    app.end_all();
    third.end_all();
    if let Some(second) = second {
        second.end_all();
    }
    Ok(())
}

/// Forgets old commands, once in a while.
fn sweep(app: Arc<App>) {
    let commands = app.clone();
    tokio::spawn(async move {
        loop {
            tokio::time::sleep(SWEEP).await;
            commands.commands.sweep();
        }
    });
    tokio::spawn(async move {
        let mut last = 0;
        loop {
            let _ = tokio::task::spawn_blocking(|| ()).await;
            tokio::time::sleep(TRIM).await;
            // What a burst of work has needed is given back when it is over.
            let started = app.commands.started();
            let idle = app.executions.available_permits() == app.config.executions;
            if idle && started != last {
                last = started;
                return_memory();
            }
        }
    });
}

fn return_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes a number, and gives back what nobody has.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// The signals that are sent to the daemon from now on.
fn watch_signals() -> anyhow::Result<mpsc::Receiver<Signal>> {
    let (sender, received) = mpsc::channel(8);
    for number in [
        Signal::SIGINT,
        Signal::SIGTERM,
        Signal::SIGHUP,
        Signal::SIGQUIT,
        Signal::SIGUSR1,
        Signal::SIGUSR2,
        Signal::SIGWINCH,
    ] {
        let mut stream = signal(SignalKind::from_raw(number as i32)).context("watch for signals")?;
        let sender = sender.clone();
        tokio::spawn(async move { while stream.recv().await.is_some() && sender.send(number).await.is_ok() {} });
    }
    Ok(received)
}

/// Passes signals on to what runs. Returns the one that ends the daemon.
async fn forward_signals(app: &App, mut signals: mpsc::Receiver<Signal>) -> anyhow::Result<Signal> {
    while let Some(signal) = signals.recv().await {
        app.commands.signal_all(signal);
        if matches!(signal, Signal::SIGINT | Signal::SIGTERM) {
            return Ok(signal);
        }
    }
    anyhow::bail!("signals are not told any more")
}
