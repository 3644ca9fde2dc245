//! Processes beside a container's first: started, and forgotten once they have ended.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::SystemTime;

use containerd_shim_protos::api as pb;
use containerd_shim_protos::events::task as topics;
use containerd_shim_protos::ttrpc::Result;
use runx_core::container::Process as Handle;

use super::{Service, blocking, delete_response};
use crate::container::{self, Container};
use crate::error::{not_found, precondition, runtime_failure, unknown};
use crate::io::Ends;
use crate::process::{Ended, Phase, Process};
use crate::reaper::Announcement;

impl Service {
    pub(super) async fn start_exec(&self, container: Arc<Container>, process: Arc<Process>) -> Result<u32> {
        let _turn = process.turn.lock().await;
        match process.phase() {
            Phase::Added => {}
            Phase::Stopped => return Err(unknown("cannot start a stopped process")),
            _ => return Err(unknown("cannot start a running process")),
        }
        if container.closing.load(Ordering::Relaxed) {
            return Err(precondition(format!("container {} init process is not running", container.id)));
        }
        let started = self.run_exec(&container, &process).await;
        if let Err(e) = started {
            // Whoever waits for it learns that it will never run.
            process.end(Ended { status: 255, at: SystemTime::now() });
            return Err(e);
        }
        if let Err(e) = process.open_stdin() {
            log::warn!("standard input of exec {}: {e}", process.exec_id);
        }
        let pid = process.pid();
        let event = topics::TaskExecStarted {
            container_id: container.id.clone(),
            exec_id: process.exec_id.clone(),
            pid,
            ..topics::TaskExecStarted::default()
        };
        self.0.events.publish("/tasks/exec-started", &event);
        self.watch(container.clone(), process.clone());
        Ok(pid)
    }

    /// Makes the process of an exec and starts it. Nothing that runs may be without streams or unknown.
    async fn run_exec(&self, container: &Arc<Container>, process: &Arc<Process>) -> Result<()> {
        let (mut handle, announcement, ends) = self.make_exec(container, process).await?;
        let started = match ends.connect(handle.take_terminal()) {
            Ok(connections) => {
                let started = blocking(move || match handle.start() {
                    Ok(()) => Ok(handle),
                    Err(e) => {
                        handle.discard();
                        Err(runtime_failure("OCI runtime exec failed", e))
                    }
                });
                started.await.map(|handle| process.runs(handle, connections))
            }
            Err(e) => {
                let discarded = blocking(move || {
                    handle.discard();
                    Ok(())
                });
                discarded.await?;
                Err(unknown(format!("connect the streams of exec {}: {e}", process.exec_id)))
            }
        };
        if started.is_ok() {
            announcement.keep();
        }
        started
    }

    async fn make_exec(
        &self,
        container: &Arc<Container>,
        process: &Arc<Process>,
    ) -> Result<(Handle, Announcement, Ends)> {
        let (stdio, ends) = self.open_streams(&process.streams, &process.exec_id, container.io_owner).await?;
        let stdio = Arc::new(stdio);
        let mut tried = false;
        loop {
            let runtime = self.runtime(None);
            let (container, process, stdio) = (container.clone(), process.clone(), stdio.clone());
            let (announcement, born) = self.0.reaper.announce();
            let made = blocking(move || {
                let spec = process.spec.as_ref().ok_or_else(|| unknown("the exec has no process"))?;
                container::exec(&runtime, &container, spec, &stdio, born)
            });
            match made.await {
                Err(e) if container::is_spawner_gone(&e) && !tried => {
                    tried = true;
                    self.replace_spawner().await?;
                }
                other => return other.map(|handle| (handle, announcement, ends)),
            }
        }
    }

    pub(super) async fn delete_exec(&self, container: &Container, process: Arc<Process>) -> Result<pb::DeleteResponse> {
        // A start that is under way comes first.
        let _turn = process.turn.lock().await;
        if matches!(process.phase(), Phase::Running | Phase::Created) {
            return Err(unknown("cannot delete a running process"));
        }
        let id = &process.exec_id;
        if !container.execs().get(id).is_some_and(|known| Arc::ptr_eq(known, &process)) {
            return Err(not_found(format!("process does not exist {id}")));
        }
        if let Some(connections) = process.connections() {
            connections.drain().await;
        }
        container.execs().remove(id);
        Ok(delete_response(&process, process.ended()))
    }
}
