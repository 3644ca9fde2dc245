//! The daemon: serves the Task API for the containers of one pod until the last one is deleted.

use std::collections::HashMap;
use std::ffi::CStr;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use containerd_shim_protos::shim_async::{Task, create_task};
use containerd_shim_protos::ttrpc::asynchronous::{Server, Service as Methods};
use nix::fcntl::{Flock, FlockArg};
use runx_core::sys;
use runx_core::sys::process::{prctl, raise_open_files, set_name};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::events::Publisher;
use crate::flags::Flags;
use crate::logging;
use crate::reaper::Reaper;
use crate::service::Service;
use crate::{sandbox, sockets, spawner};

/// The descriptor that `start` puts the socket on.
pub(crate) const LISTENER: i32 = 3;

/// The name of the process, of which the kernel shows 15 bytes.
const NAME: &CStr = c"containerd-shim-runx-v1";

/// How often the daemon looks whether containerd has forgotten one of its containers.
const SWEEP: Duration = Duration::from_secs(30);

/// How often it looks without any: it may have been started for nothing.
const IDLE_SWEEP: Duration = Duration::from_secs(15);

/// How long events may take to leave before the end.
const LAST_EVENTS: Duration = Duration::from_secs(5);

/// Threads for blocking work end this soon after it: an idle shim shall be small.
const THREAD_KEEP_ALIVE: Duration = Duration::from_millis(500);

/// Serves.
pub(crate) fn run(flags: Flags) -> Result<()> {
    let bundle = std::env::current_dir().context("find the bundle")?;
    logging::begin(&bundle, &flags.id, flags.debug);
    let served = serve(flags);
    if let Err(e) = &served {
        log::error!("{e:#}");
    }
    served
}

/// The file beside this program whose lock says that it runs (`deploy/src/stage.rs`).
const LOCK: &str = ".runx-lock";

/// A shared lock on the file beside this program that is there for it, else on the program's own, for as long as this process
/// and its spawner live: whoever replaces the programs of a node (`deploy/src/stage.rs`) keeps a directory that is locked,
/// since the other programs are found there. Who looks whether it is locked holds it for a moment: that is waited for.
fn lock_program(program: &Path) -> Option<Flock<File>> {
    let beside = program.is_absolute().then(|| File::open(program.with_file_name(LOCK)).ok()).flatten();
    let file = beside.map_or_else(|| File::open("/proc/self/exe"), Ok);
    let file = file.map_err(|e| log::warn!("open this program's file: {e}")).ok()?;
    Flock::lock(file, FlockArg::LockShared).map_err(|(_, e)| log::warn!("lock this program's file: {e}")).ok()
}

fn serve(flags: Flags) -> Result<()> {
    save_memory();
    let _lock = lock_program(&flags.program);
    let listener = listener()?;
    let address = listener.local_addr().context("look at the socket")?;
    let socket = address.as_pathname().and_then(|path| sockets::Own::at(path.to_owned()).ok());
    // The bundle goes before this daemon may.
    std::env::set_current_dir("/").context("chdir to /")?;
    prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0).context("become a subreaper")?;
    // It was executed by descriptor, and has a number for a name.
    set_name(NAME);
    // Before there are threads, and from the one that lives to the end.
    let spawner = spawner::fork()?;
    if let Err(e) = raise_open_files() {
        log::warn!("raise the limit on open files: {e}");
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .thread_keep_alive(THREAD_KEEP_ALIVE)
        .build()
        .context("start the runtime")?;
    let served = runtime.block_on(async {
        let events = Publisher::new(std::env::var("TTRPC_ADDRESS").ok(), flags.namespace.clone());
        let reaper = Reaper::default();
        let service = Arc::new(Service::new(&flags, spawner, events.clone(), reaper.clone()));
        let mut server = serve_both_versions(listener, service.clone()).await?;
        let mut children = signal(SignalKind::child()).context("watch for SIGCHLD")?;
        let mut terminate = signal(SignalKind::terminate()).context("watch for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("watch for SIGINT")?;
        // containerd's own shim describes itself, too; without a handler the signal would be the end.
        let mut describe = signal(SignalKind::user_defined1()).context("watch for SIGUSR1")?;
        reaper.reap();
        let mut was_idle = false;
        let mut next_sweep = Instant::now() + IDLE_SWEEP;
        let mut sweeping = None;
        loop {
            tokio::select! {
                _ = children.recv() => reaper.reap(),
                request = service.next_spawner_request() => service.answer_spawner_request(request),
                () = service.shut_down() => break,
                _ = terminate.recv() => break,
                _ = interrupt.recv() => break,
                _ = describe.recv() => service.describe(),
                () = reaper.wanted() => reaper.reap(),
                () = tokio::time::sleep_until(next_sweep), if sweeping.is_none() => {
                    let service = service.clone();
                    sweeping = Some(tokio::spawn(async move { service.sweep().await }));
                }
                idle = ended(&mut sweeping) => {
                    // Twice in a row: one that was just started may still be waiting for its first.
                    if idle && was_idle {
                        log::warn!("there is no container: the daemon ends");
                        break;
                    }
                    was_idle = idle;
                    sweeping = None;
                    next_sweep = Instant::now() + if idle { IDLE_SWEEP } else { SWEEP };
                    return_memory();
                }
            }
        }
        // First the socket, so that a new container does not find a daemon that goes.
        if let Some(socket) = &socket {
            socket.remove();
        }
        let _ = tokio::time::timeout(LAST_EVENTS, events.flush()).await;
        let _ = tokio::time::timeout(Duration::from_secs(1), server.shutdown()).await;
        // Nobody waits for us any more.
        if let Some(socket) = &socket {
            sockets::remove_dead(socket.path());
        }
        Ok(())
    });
    runtime.shutdown_background();
    served
}

/// What a task has found, once it has ended; without one, never.
async fn ended(task: &mut Option<JoinHandle<bool>>) -> bool {
    match task {
        Some(task) => task.await.unwrap_or(false),
        None => std::future::pending().await,
    }
}

/// A shim has next to no work, for the whole life of a pod: memory counts, and not how fast threads allocate it.
fn save_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: only sets a parameter of the allocator.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// Gives back what a burst of work needed.
fn return_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: only releases memory that nobody uses.
    unsafe {
        libc::malloc_trim(0);
    }
}

fn listener() -> Result<UnixListener> {
    // SAFETY: it is only looked at, and not kept.
    let stat = sys::fstat(unsafe { BorrowedFd::borrow_raw(LISTENER) });
    if !stat.is_ok_and(|stat| stat.st_mode & libc::S_IFMT == libc::S_IFSOCK) {
        anyhow::bail!("descriptor {LISTENER} is not a socket: the daemon is started by `start` only");
    }
    // SAFETY: it is an open socket. `start` put it there before this program began, so nobody else owns it.
    let fd: OwnedFd = unsafe { std::os::fd::FromRawFd::from_raw_fd(LISTENER) };
    sys::set_cloexec(fd.as_fd(), true).context("keep the socket")?;
    Ok(UnixListener::from(fd))
}

/// Which version containerd calls depends on how it understood the answer to `start`, so both are
/// served; their messages are the same.
async fn serve_both_versions(listener: UnixListener, service: Arc<Service>) -> Result<Server> {
    let task: Arc<dyn Task + Send + Sync> = service;
    let mut services: HashMap<String, Methods> = create_task(task.clone());
    for (_, methods) in create_task(task) {
        services.insert("containerd.task.v2.Task".to_owned(), methods);
    }
    listener.set_nonblocking(true).context("set the socket to non-blocking")?;
    let listener = std::os::fd::IntoRawFd::into_raw_fd(listener);
    // SAFETY: the descriptor is an open listener and its ownership goes to the server.
    let server = unsafe { Server::new().add_unix_listener(listener) }.context("serve the socket")?;
    let mut server = server.register_service(services).register_service(sandbox::service());
    server.start().await.context("serve the socket")?;
    Ok(server)
}
