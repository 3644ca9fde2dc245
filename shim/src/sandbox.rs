//! The Sandbox API, which is refused: a pod's sandbox is its pause container, as with containerd's default sandboxer.

use std::collections::HashMap;

use async_trait::async_trait;
use containerd_shim_protos::ttrpc::asynchronous::{MethodHandler, Service, TtrpcContext};
use containerd_shim_protos::ttrpc::{Code, Request, Response, Result, get_status};

const SERVICE: &str = "containerd.runtime.sandbox.v1.Sandbox";

const METHODS: [&str; 9] = [
    "CreateSandbox",
    "StartSandbox",
    "Platform",
    "StopSandbox",
    "WaitSandbox",
    "SandboxStatus",
    "PingSandbox",
    "ShutdownSandbox",
    "SandboxMetrics",
];

struct Refusal(&'static str);

#[async_trait]
impl MethodHandler for Refusal {
    async fn handler(&self, _: TtrpcContext, _: Request) -> Result<Response> {
        let text = format!(
            "{}: the sandbox API is not supported by this runtime: leave the option sandboxer at \"podsandbox\"",
            self.0
        );
        let mut response = Response::new();
        response.set_status(get_status(Code::UNIMPLEMENTED, text));
        Ok(response)
    }
}

/// Its methods, which say so. Without them the answer would be that the service is unknown, as an invalid argument.
pub(crate) fn service() -> HashMap<String, Service> {
    let handlers = METHODS.map(|name| {
        let handler: Box<dyn MethodHandler + Send + Sync> = Box::new(Refusal(name));
        (name.to_owned(), handler)
    });
    let service = Service { methods: HashMap::from(handlers), streams: HashMap::new() };
    HashMap::from([(SERVICE.to_owned(), service)])
}
