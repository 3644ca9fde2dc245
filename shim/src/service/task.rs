//! The Task API, with the answers and events of containerd-shim-runc-v2.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use async_trait::async_trait;
use containerd_shim_protos::api as pb;
use containerd_shim_protos::api::Empty;
use containerd_shim_protos::events::task as topics;
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::shim::oci::ProcessDetails;
use containerd_shim_protos::shim_async::Task;
use containerd_shim_protos::ttrpc::asynchronous::TtrpcContext;
use containerd_shim_protos::ttrpc::{self, Code, Result};
use runx_core::Error;
use runx_core::bundle;
use runx_core::spec::{LinuxResources, Process as ProcessSpec};

use super::{Service, blocking, lock};
use crate::container::Standing;
use crate::error::{from_runtime, not_found, precondition, status, unknown};
use crate::events::{any, timestamp};
use crate::io::Streams;
use crate::metrics;
use crate::process::{Phase, Process};
use crate::starts::Outcome;

#[async_trait]
impl Task for Service {
    async fn state(&self, _: &TtrpcContext, request: pb::StateRequest) -> Result<pb::StateResponse> {
        let (container, process) = self.process(&request.id, &request.exec_id)?;
        Ok(process.describe(&container.id, &container.bundle.to_string_lossy(), container.standing()))
    }

    async fn create(&self, _: &TtrpcContext, request: pb::CreateTaskRequest) -> Result<pb::CreateTaskResponse> {
        let id = request.id.clone();
        let known = lock(&self.0.containers).contains_key(&id);
        if known || !lock(&self.0.creating).insert(id.clone()) {
            return Err(status(Code::ALREADY_EXISTS, format!("container {id} already exists")));
        }
        let service = self.clone();
        to_the_end(async move {
            let created = service.create_container(request).await;
            lock(&service.0.creating).remove(&id);
            service.0.created.notify_waiters();
            if created.is_err() {
                service.count(Outcome::Failed);
            } else {
                // It was meant for a daemon without containers.
                service.0.shutdown_wanted.store(false, Ordering::Relaxed);
            }
            if service.0.shutdown_wanted.load(Ordering::Relaxed) && service.is_idle() {
                service.0.shutdown.notify_one();
            }
            created
        })
        .await
    }

    async fn start(&self, _: &TtrpcContext, request: pb::StartRequest) -> Result<pb::StartResponse> {
        let (container, process) = self.process(&request.id, &request.exec_id)?;
        let service = self.clone();
        let pid = to_the_end(async move {
            if process.exec_id.is_empty() {
                service.start_init(container).await
            } else {
                service.start_exec(container, process).await
            }
        })
        .await?;
        Ok(pb::StartResponse { pid, ..pb::StartResponse::default() })
    }

    async fn delete(&self, _: &TtrpcContext, request: pb::DeleteRequest) -> Result<pb::DeleteResponse> {
        // containerd deletes what its client no longer waits for.
        self.wait_created(&request.id).await;
        let (container, process) = self.process(&request.id, &request.exec_id)?;
        let service = self.clone();
        to_the_end(async move {
            if process.exec_id.is_empty() {
                drop(container.kills.write().await);
                service.delete_init(container).await
            } else {
                service.delete_exec(&container, process).await
            }
        })
        .await
    }

    async fn pids(&self, _: &TtrpcContext, request: pb::PidsRequest) -> Result<pb::PidsResponse> {
        let container = self.container(&request.id)?;
        let execs: HashMap<u32, String> =
            container.execs().values().map(|exec| (exec.pid(), exec.exec_id.clone())).collect();
        let pids = container.core.pids().map_err(from_runtime)?;
        let processes = pids
            .into_iter()
            .map(|pid| {
                let details = execs
                    .get(&(pid as u32))
                    .map(|exec_id| any(&ProcessDetails { exec_id: exec_id.clone(), ..ProcessDetails::default() }));
                pb::ProcessInfo { pid: pid as u32, info: details.into(), ..pb::ProcessInfo::default() }
            })
            .collect();
        Ok(pb::PidsResponse { processes, ..pb::PidsResponse::default() })
    }

    async fn pause(&self, _: &TtrpcContext, request: pb::PauseRequest) -> Result<Empty> {
        let container = self.container(&request.id)?;
        match container.standing() {
            Standing::Running | Standing::Pausing => {}
            Standing::Created => return Err(unknown("cannot pause task in created state")),
            Standing::Paused => return Err(unknown("cannot pause a paused container")),
            Standing::Stopped => return Err(unknown("cannot pause a stopped container")),
        }
        let service = self.clone();
        to_the_end(async move {
            container.pausing.store(true, Ordering::Relaxed);
            let doing = container.clone();
            let paused = blocking(move || doing.core.pause().map_err(state_failure)).await;
            container.pausing.store(false, Ordering::Relaxed);
            paused?;
            let event = topics::TaskPaused { container_id: container.id.clone(), ..topics::TaskPaused::default() };
            service.0.events.publish("/tasks/paused", &event);
            Ok(Empty::new())
        })
        .await
    }

    async fn resume(&self, _: &TtrpcContext, request: pb::ResumeRequest) -> Result<Empty> {
        let container = self.container(&request.id)?;
        match container.standing() {
            Standing::Paused | Standing::Pausing => {}
            Standing::Created => return Err(unknown("cannot resume task in created state")),
            Standing::Running => return Err(unknown("cannot resume a running process")),
            Standing::Stopped => return Err(unknown("cannot resume a stopped container")),
        }
        let service = self.clone();
        to_the_end(async move {
            let doing = container.clone();
            blocking(move || doing.core.resume().map_err(state_failure)).await?;
            let event = topics::TaskResumed { container_id: container.id.clone(), ..topics::TaskResumed::default() };
            service.0.events.publish("/tasks/resumed", &event);
            Ok(Empty::new())
        })
        .await
    }

    async fn checkpoint(&self, _: &TtrpcContext, request: pb::CheckpointTaskRequest) -> Result<Empty> {
        self.container(&request.id)?;
        Err(status(Code::UNIMPLEMENTED, "checkpoint is not supported"))
    }

    async fn kill(&self, _: &TtrpcContext, request: pb::KillRequest) -> Result<Empty> {
        let (container, process) = self.process(&request.id, &request.exec_id)?;
        match process.phase() {
            Phase::Added => return Err(precondition("process not created")),
            Phase::Stopped => return Err(not_found("process already finished")),
            Phase::Created | Phase::Running => {}
        }
        let signal = request.signal as i32;
        if request.exec_id.is_empty() {
            let _answered = container.kills.read().await;
            let container = container.clone();
            blocking(move || container.core.kill(signal, request.all).map_err(from_runtime)).await?;
        } else {
            process.signal(signal).map_err(|e| match e.raw_os_error() {
                Some(libc::ESRCH) => not_found("process already finished"),
                _ => unknown(format!("send signal {signal} to exec {}: {e}", request.exec_id)),
            })?;
        }
        Ok(Empty::new())
    }

    async fn exec(&self, _: &TtrpcContext, request: pb::ExecProcessRequest) -> Result<Empty> {
        let container = self.container(&request.id)?;
        let mut spec: ProcessSpec =
            bundle::parse(&request.spec.value, "process of the exec request").map_err(from_runtime)?;
        spec.set_terminal(Some(request.terminal));
        let streams = Streams {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
        };
        match container.standing() {
            Standing::Created | Standing::Running => {}
            Standing::Pausing | Standing::Paused => return Err(unknown("cannot exec in a paused state")),
            Standing::Stopped => return Err(unknown("cannot exec in a stopped state")),
        }
        match container.execs().entry(request.exec_id.clone()) {
            Entry::Occupied(_) => {
                return Err(status(Code::ALREADY_EXISTS, format!("id {}", request.exec_id)));
            }
            Entry::Vacant(place) => {
                place.insert(Arc::new(Process::new(request.exec_id.clone(), streams, Some(spec))));
            }
        }
        let event = topics::TaskExecAdded {
            container_id: request.id,
            exec_id: request.exec_id,
            ..topics::TaskExecAdded::default()
        };
        self.0.events.publish("/tasks/exec-added", &event);
        Ok(Empty::new())
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: pb::ResizePtyRequest) -> Result<Empty> {
        let (_, process) = self.process(&request.id, &request.exec_id)?;
        if process.phase() == Phase::Stopped {
            return Err(unknown("cannot resize a stopped container"));
        }
        if let Some(connections) = process.connections() {
            let size = |n: u32| u16::try_from(n).unwrap_or(u16::MAX);
            connections
                .resize(size(request.width), size(request.height))
                .map_err(|e| unknown(format!("resize the terminal: {e}")))?;
        }
        Ok(Empty::new())
    }

    async fn close_io(&self, _: &TtrpcContext, request: pb::CloseIORequest) -> Result<Empty> {
        let (_, process) = self.process(&request.id, &request.exec_id)?;
        // As containerd's shim has it, whether or not the request names the stream.
        process.close_stdin();
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, request: pb::UpdateTaskRequest) -> Result<Empty> {
        let container = self.container(&request.id)?;
        if container.standing() == Standing::Stopped {
            return Err(unknown("cannot update a stopped container"));
        }
        let resources: LinuxResources =
            bundle::parse(&request.resources.value, "resources of the update request").map_err(from_runtime)?;
        blocking(move || container.core.update(&resources).map_err(state_failure)).await?;
        Ok(Empty::new())
    }

    async fn wait(&self, _: &TtrpcContext, request: pb::WaitRequest) -> Result<pb::WaitResponse> {
        let (_, process) = self.process(&request.id, &request.exec_id)?;
        let ended = process.wait().await;
        Ok(pb::WaitResponse {
            exit_status: ended.status,
            exited_at: MessageField::some(timestamp(ended.at)),
            ..pb::WaitResponse::default()
        })
    }

    async fn stats(&self, _: &TtrpcContext, request: pb::StatsRequest) -> Result<pb::StatsResponse> {
        let container = self.container(&request.id)?;
        // Some of the kernel's files take it a while.
        let message = blocking(move || {
            let stats = container.core.stats().map_err(|e| match e.errno() {
                Some(libc::ENOENT) => not_found("cgroup does not exist"),
                _ => from_runtime(e),
            })?;
            Ok(metrics::message(&stats))
        });
        Ok(pb::StatsResponse { stats: MessageField::some(message.await?), ..pb::StatsResponse::default() })
    }

    async fn connect(&self, _: &TtrpcContext, request: pb::ConnectRequest) -> Result<pb::ConnectResponse> {
        let task_pid = self.container(&request.id).map_or(0, |container| container.init.pid());
        Ok(pb::ConnectResponse {
            shim_pid: std::process::id(),
            task_pid,
            version: env!("CARGO_PKG_VERSION").into(),
            ..pb::ConnectResponse::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, _: pb::ShutdownRequest) -> Result<Empty> {
        if self.is_idle() {
            self.0.shutdown.notify_one();
        } else if lock(&self.0.containers).is_empty() {
            self.0.shutdown_wanted.store(true, Ordering::Relaxed);
        }
        Ok(Empty::new())
    }
}

/// Runs work in a task of its own: a request with a deadline is dropped when that has passed, and what it
/// does must not be left half done.
async fn to_the_end<T: Send + 'static>(work: impl Future<Output = Result<T>> + Send + 'static) -> Result<T> {
    tokio::spawn(work).await.unwrap_or_else(|e| Err(unknown(format!("the shim's own work failed: {e}"))))
}

/// An operation that the state does not allow is a plain error.
fn state_failure(error: Error) -> ttrpc::Error {
    match error {
        Error::WrongState { .. } => unknown(error.to_string()),
        other => from_runtime(other),
    }
}
