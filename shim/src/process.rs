//! A process of a container as containerd sees it: the first one, or one that was exec'd.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::SystemTime;

use containerd_shim_protos::api::{StateResponse, Status};
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;
use runx_core::container::Process as Handle;
use runx_core::spec::Process as ProcessSpec;
use runx_core::sys::pidfd;
use tokio::sync::watch;

use crate::container::Standing;
use crate::events::timestamp;
use crate::io::{Connections, Streams};

/// How and when a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ended {
    pub(crate) status: u32,
    pub(crate) at: SystemTime,
}

/// Where a process is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// An exec that was asked for and not started.
    Added,
    /// The first process, ready to start.
    Created,
    /// Its program runs.
    Running,
    /// It has ended, or could not be started.
    Stopped,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Process {
    /// The exec id; empty for the first process.
    pub(crate) exec_id: String,
    pub(crate) streams: Streams,
    /// What an exec is to run.
    pub(crate) spec: Option<ProcessSpec>,
    phase: Mutex<Phase>,
    pid: OnceLock<(i32, Arc<OwnedFd>)>,
    handle: Mutex<Option<Handle>>,
    connections: OnceLock<Connections>,
    /// `CloseIO` may come before the streams are connected.
    stdin_closed: AtomicBool,
    ended: watch::Sender<Option<Ended>>,
    /// Held by whoever starts or deletes it: an exit is told after its start.
    pub(crate) turn: tokio::sync::Mutex<()>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl Process {
    /// A process that does not exist yet.
    pub(crate) fn new(exec_id: String, streams: Streams, spec: Option<ProcessSpec>) -> Self {
        Self {
            exec_id,
            streams,
            spec,
            phase: Mutex::new(Phase::Added),
            pid: OnceLock::new(),
            handle: Mutex::new(None),
            connections: OnceLock::new(),
            stdin_closed: AtomicBool::new(false),
            ended: watch::Sender::new(None),
            turn: tokio::sync::Mutex::new(()),
        }
    }

    /// It exists now, and has not started.
    ///
    /// # Errors
    /// When there are no descriptors left.
    pub(crate) fn born(&self, handle: Handle, connections: Connections) -> std::io::Result<()> {
        self.exists(handle.pid(), handle.pidfd().try_clone()?, connections);
        *lock(&self.handle) = Some(handle);
        self.set_phase(Phase::Created);
        Ok(())
    }

    /// It exists now, and has started.
    pub(crate) fn runs(&self, handle: Handle, connections: Connections) {
        self.exists(handle.pid(), handle.into_pidfd(), connections);
        self.set_phase(Phase::Running);
    }

    fn exists(&self, pid: i32, pidfd: OwnedFd, connections: Connections) {
        let _ = self.pid.set((pid, Arc::new(pidfd)));
        let _ = self.connections.set(connections);
    }

    /// What starts it, once.
    pub(crate) fn take_handle(&self) -> Option<Handle> {
        lock(&self.handle).take()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.pid.get().map_or(0, |(pid, _)| *pid as u32)
    }

    pub(crate) fn pidfd(&self) -> Option<&Arc<OwnedFd>> {
        self.pid.get().map(|(_, pidfd)| pidfd)
    }

    pub(crate) fn connections(&self) -> Option<&Connections> {
        self.connections.get()
    }

    /// Connects standard input, as the process starts.
    pub(crate) fn open_stdin(&self) -> std::io::Result<()> {
        let Some(connections) = self.connections() else { return Ok(()) };
        connections.open_stdin()?;
        // What was said before there was anything to close holds now.
        if self.stdin_closed.load(Ordering::SeqCst) {
            connections.close_stdin();
        }
        Ok(())
    }

    /// Lets standard input end once its clients have closed it, too.
    pub(crate) fn close_stdin(&self) {
        self.stdin_closed.store(true, Ordering::SeqCst);
        if let Some(connections) = self.connections() {
            connections.close_stdin();
        }
    }

    pub(crate) fn phase(&self) -> Phase {
        *lock(&self.phase)
    }

    pub(crate) fn set_phase(&self, phase: Phase) {
        *lock(&self.phase) = phase;
    }

    /// It has ended; whoever waits is told.
    pub(crate) fn end(&self, ended: Ended) {
        self.set_phase(Phase::Stopped);
        self.ended.send_replace(Some(ended));
    }

    pub(crate) fn ended(&self) -> Option<Ended> {
        *self.ended.borrow()
    }

    /// Waits for the end.
    pub(crate) async fn wait(&self) -> Ended {
        let mut receiver = self.ended.subscribe();
        loop {
            if let Some(ended) = *receiver.borrow_and_update() {
                return ended;
            }
            // The sender lives in self, so it cannot go away meanwhile.
            let _ = receiver.changed().await;
        }
    }

    /// Sends a signal to it alone.
    pub(crate) fn signal(&self, signal: i32) -> std::io::Result<()> {
        match self.pidfd() {
            Some(fd) => pidfd::send_signal(fd.as_fd(), signal),
            None => Err(std::io::Error::from_raw_os_error(libc::ESRCH)),
        }
    }

    /// The answer to a State request. An exec stands still with its container.
    pub(crate) fn describe(&self, id: &str, bundle: &str, container: Standing) -> StateResponse {
        let is_init = self.exec_id.is_empty();
        let status = match (container, self.phase()) {
            (Standing::Paused, _) => Status::PAUSED,
            (Standing::Pausing, _) => Status::PAUSING,
            (_, Phase::Added | Phase::Created) => Status::CREATED,
            (_, Phase::Running) => Status::RUNNING,
            (_, Phase::Stopped) => Status::STOPPED,
        };
        let ended = self.ended();
        StateResponse {
            id: if is_init { id.to_owned() } else { self.exec_id.clone() },
            bundle: bundle.to_owned(),
            pid: self.pid(),
            status: status.into(),
            stdin: self.streams.stdin.clone(),
            stdout: self.streams.stdout.clone(),
            stderr: self.streams.stderr.clone(),
            terminal: self.streams.terminal,
            exit_status: ended.map_or(0, |ended| ended.status),
            exited_at: MessageField::some(end_time(ended)),
            exec_id: self.exec_id.clone(),
            ..StateResponse::default()
        }
    }
}

/// When a process ended. One that has not is said to have ended at the beginning of the year 1, which Go takes for no time
/// at all; without a time it would be 1970.
pub(crate) fn end_time(ended: Option<Ended>) -> Timestamp {
    const NEVER: i64 = -62_135_596_800;
    match ended {
        Some(ended) => timestamp(ended.at),
        None => Timestamp { seconds: NEVER, ..Timestamp::default() },
    }
}
