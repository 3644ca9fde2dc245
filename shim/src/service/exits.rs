//! The ends of processes, and kills for lack of memory: noticing them, and telling of them in order.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use containerd_shim_protos::events::task as topics;
use containerd_shim_protos::protobuf::MessageField;
use tokio::io::Interest;

use super::{Service, blocking};
use crate::container::Container;
use crate::error::from_runtime;
use crate::events::timestamp;
use crate::process::{Ended, Phase, Process};
use crate::reaper::exit_of;

/// What a process that cannot be waited for counts as.
const LOST: u32 = 255;

/// How long the first process's exit waits for those of the others.
const OTHERS_EXIT: Duration = Duration::from_secs(10);

impl Service {
    /// Waits for a process's end in a task of its own, and tells of it.
    pub(super) fn watch(&self, container: Arc<Container>, process: Arc<Process>) {
        self.0.reaper.add(process.pid() as i32);
        let service = self.clone();
        tokio::spawn(async move {
            let status = match process.pidfd() {
                Some(pidfd) => exit_of(pidfd.clone()).await,
                None => None,
            };
            let status = status.unwrap_or(LOST);
            service.0.reaper.remove(process.pid() as i32);
            if let Some(connections) = process.connections() {
                connections.process_ended();
            }
            service.finish(&container, &process, status).await;
        });
    }

    /// Tells of processes killed for lack of memory as it happens, until the first process ends.
    pub(super) fn watch_oom(&self, container: Arc<Container>) {
        let Some(descriptor) = container.oom_descriptor() else { return };
        let events = self.0.events.clone();
        tokio::spawn(async move {
            let watcher = match crate::io::watched(descriptor, Interest::READABLE) {
                Ok(watcher) => watcher,
                Err(e) => return log::warn!("container {}: watch for out-of-memory kills: {e}", container.id),
            };
            let init = container.init.clone();
            let ended = init.wait();
            tokio::pin!(ended);
            loop {
                tokio::select! {
                    _ = &mut ended => return,
                    ready = watcher.readable() => match ready {
                        Ok(mut guard) => guard.clear_ready(),
                        Err(_) => return,
                    },
                }
                // What was announced comes a little later.
                let mut found = container.tell_oom(&events);
                while found.announced {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                    found = container.tell_oom(&events);
                }
                if found.gone {
                    return;
                }
            }
        });
    }

    async fn finish(&self, container: &Arc<Container>, process: &Arc<Process>, status: u32) {
        let is_init = process.exec_id.is_empty();
        // A start that is under way comes first.
        let turn = process.turn.lock().await;
        let ended = Ended { status, at: SystemTime::now() };
        if is_init {
            container.closing.store(true, Ordering::Relaxed);
            if !container.core.state().own_pid_namespace {
                let container = container.clone();
                let killed = blocking(move || container.core.kill(libc::SIGKILL, true).map_err(from_runtime)).await;
                if let Err(e) = killed {
                    log::warn!("end what a container's first process left: {e}");
                }
            }
            self.wait_for_others(container).await;
        }
        container.tell_oom(&self.0.events);
        process.end(ended);
        drop(turn);
        let event = topics::TaskExit {
            container_id: container.id.clone(),
            id: if is_init { container.id.clone() } else { process.exec_id.clone() },
            pid: process.pid(),
            exit_status: ended.status,
            exited_at: MessageField::some(timestamp(ended.at)),
            ..topics::TaskExit::default()
        };
        self.0.events.publish("/tasks/exit", &event);
    }

    /// The first process's exit is the last that is told of.
    async fn wait_for_others(&self, container: &Container) {
        let execs: Vec<_> = container.execs().values().cloned().collect();
        let all = async {
            for exec in execs {
                // One that is being started is running, or has failed, when it gives up its turn; the next
                // is refused.
                drop(exec.turn.lock().await);
                if exec.phase() == Phase::Running {
                    exec.wait().await;
                }
            }
        };
        if tokio::time::timeout(OTHERS_EXIT, all).await.is_err() {
            log::warn!("container {}: processes outlive the first one", container.id);
        }
    }
}
