//! The Task API from containerd's side, in either of its versions.

use std::time::Duration;

use containerd_shim_protos::api as pb;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::ttrpc::{self, Client, Request};
use serde_json::Value;

/// How long any answer may take, but for those that wait for a process.
const PATIENCE: Duration = Duration::from_secs(60);

/// A connection to a shim.
#[derive(Clone)]
pub struct Shim {
    client: Client,
    service: &'static str,
}

impl std::fmt::Debug for Shim {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shim").field("service", &self.service).finish_non_exhaustive()
    }
}

/// What a call returns.
pub type Answer<T> = ttrpc::Result<T>;

/// The error of a call, as its gRPC code and its text. The name of the code, which some append to the text and
/// containerd takes off again, is not a part of it.
///
/// # Panics
/// When the call succeeded, or failed on the way.
#[track_caller]
pub fn refused<T: std::fmt::Debug>(answer: Answer<T>) -> (i32, String) {
    match answer {
        Err(ttrpc::Error::RpcStatus(status)) => {
            let names = [": not found", ": already exists", ": failed precondition", ": invalid argument"];
            let text = names.iter().find_map(|name| status.message.strip_suffix(name));
            (status.code.value(), text.unwrap_or(&status.message).to_owned())
        }
        other => panic!("not refused: {other:?}"),
    }
}

impl Shim {
    /// Connects to an address, to speak version 2 or 3 of the API.
    ///
    /// # Panics
    /// When nobody listens there.
    #[track_caller]
    pub fn connect(address: &str, version: u32) -> Self {
        let service = if version == 2 { "containerd.task.v2.Task" } else { "containerd.task.v3.Task" };
        Self { client: Client::connect(address).unwrap_or_else(|e| panic!("connect to {address}: {e}")), service }
    }

    /// The same connection with another service.
    pub fn service(&self, service: &'static str) -> Self {
        Self { client: self.client.clone(), service }
    }

    /// Any call.
    pub fn call<Out: Message>(&self, method: &str, request: &impl Message, patience: Duration) -> Answer<Out> {
        let request = Request {
            service: self.service.into(),
            method: method.into(),
            timeout_nano: patience.as_nanos() as i64,
            payload: request.write_to_bytes().map_err(|e| ttrpc::Error::Others(e.to_string()))?,
            ..Request::default()
        };
        let response = self.client.request(request)?;
        Out::parse_from_bytes(&response.payload).map_err(|e| ttrpc::Error::Others(e.to_string()))
    }

    fn soon<Out: Message>(&self, method: &str, request: &impl Message) -> Answer<Out> {
        self.call(method, request, PATIENCE)
    }

    /// Create.
    pub fn create(&self, request: &pb::CreateTaskRequest) -> Answer<pb::CreateTaskResponse> {
        self.soon("Create", request)
    }

    /// Start, of a container or of an exec.
    pub fn start(&self, id: &str, exec_id: &str) -> Answer<u32> {
        let request = pb::StartRequest { id: id.into(), exec_id: exec_id.into(), ..Default::default() };
        self.soon("Start", &request).map(|answer: pb::StartResponse| answer.pid)
    }

    /// State.
    pub fn state(&self, id: &str, exec_id: &str) -> Answer<pb::StateResponse> {
        self.soon("State", &pb::StateRequest { id: id.into(), exec_id: exec_id.into(), ..Default::default() })
    }

    /// Delete.
    pub fn delete(&self, id: &str, exec_id: &str) -> Answer<pb::DeleteResponse> {
        self.soon("Delete", &pb::DeleteRequest { id: id.into(), exec_id: exec_id.into(), ..Default::default() })
    }

    /// Pids.
    pub fn pids(&self, id: &str) -> Answer<pb::PidsResponse> {
        self.soon("Pids", &pb::PidsRequest { id: id.into(), ..Default::default() })
    }

    /// Pause.
    pub fn pause(&self, id: &str) -> Answer<pb::Empty> {
        self.soon("Pause", &pb::PauseRequest { id: id.into(), ..Default::default() })
    }

    /// Resume.
    pub fn resume(&self, id: &str) -> Answer<pb::Empty> {
        self.soon("Resume", &pb::ResumeRequest { id: id.into(), ..Default::default() })
    }

    /// Kill.
    pub fn kill(&self, id: &str, exec_id: &str, signal: i32, all: bool) -> Answer<pb::Empty> {
        let request = pb::KillRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            signal: signal as u32,
            all,
            ..Default::default()
        };
        self.soon("Kill", &request)
    }

    /// Exec of a process description, with the streams that `edit` names.
    pub fn exec(
        &self,
        id: &str,
        exec_id: &str,
        process: &Value,
        edit: impl FnOnce(&mut pb::ExecProcessRequest),
    ) -> Answer<pb::Empty> {
        let spec = Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".into(),
            value: process.to_string().into_bytes(),
            ..Any::default()
        };
        let mut request = pb::ExecProcessRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            spec: MessageField::some(spec),
            ..Default::default()
        };
        edit(&mut request);
        self.soon("Exec", &request)
    }

    /// ResizePty.
    pub fn resize(&self, id: &str, exec_id: &str, width: u32, height: u32) -> Answer<pb::Empty> {
        let request =
            pb::ResizePtyRequest { id: id.into(), exec_id: exec_id.into(), width, height, ..Default::default() };
        self.soon("ResizePty", &request)
    }

    /// CloseIO of standard input.
    pub fn close_stdin(&self, id: &str, exec_id: &str) -> Answer<pb::Empty> {
        let request = pb::CloseIORequest { id: id.into(), exec_id: exec_id.into(), stdin: true, ..Default::default() };
        self.soon("CloseIO", &request)
    }

    /// Update of resources.
    pub fn update(&self, id: &str, resources: &Value) -> Answer<pb::Empty> {
        let resources = Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".into(),
            value: resources.to_string().into_bytes(),
            ..Any::default()
        };
        let request =
            pb::UpdateTaskRequest { id: id.into(), resources: MessageField::some(resources), ..Default::default() };
        self.soon("Update", &request)
    }

    /// Checkpoint.
    pub fn checkpoint(&self, id: &str, path: &str) -> Answer<pb::Empty> {
        self.soon("Checkpoint", &pb::CheckpointTaskRequest { id: id.into(), path: path.into(), ..Default::default() })
    }

    /// Wait, for as long as it takes.
    pub fn wait(&self, id: &str, exec_id: &str) -> Answer<pb::WaitResponse> {
        let request = pb::WaitRequest { id: id.into(), exec_id: exec_id.into(), ..Default::default() };
        self.call("Wait", &request, Duration::ZERO)
    }

    /// Stats.
    pub fn stats(&self, id: &str) -> Answer<pb::StatsResponse> {
        self.soon("Stats", &pb::StatsRequest { id: id.into(), ..Default::default() })
    }

    /// Connect.
    pub fn connect_task(&self, id: &str) -> Answer<pb::ConnectResponse> {
        self.soon("Connect", &pb::ConnectRequest { id: id.into(), ..Default::default() })
    }

    /// Shutdown.
    pub fn shutdown(&self, id: &str) -> Answer<pb::Empty> {
        self.soon("Shutdown", &pb::ShutdownRequest { id: id.into(), ..Default::default() })
    }
}
