//! The calls of CRI, one after the other.

use std::path::Path;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use k8s_cri::v1 as api;
use k8s_cri::v1::image_service_client::ImageServiceClient;
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use tokio::net::UnixStream;
use tokio::runtime::{Builder, Runtime};
use tonic::transport::{Channel, Endpoint, Uri};
use tower::service_fn;

/// No call takes longer unless it hangs.
const PATIENCE: Duration = Duration::from_secs(240);

/// An error of a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// The gRPC code.
    pub code: i32,
    /// The text.
    pub message: String,
}

/// A connection.
#[derive(Debug)]
pub struct Client {
    pub(super) runtime: Runtime,
    client: RuntimeServiceClient<Channel>,
    images: ImageServiceClient<Channel>,
}

macro_rules! calls {
    ($($name:ident: $request:ident -> $response:ident;)+) => {
        impl Client {
            $(
                #[doc = concat!("`", stringify!($request), "`.")]
                ///
                /// # Errors
                /// What the other side says.
                pub fn $name(&self, request: api::$request) -> Result<api::$response, Refused> {
                    let mut client = self.client.clone();
                    let call = async move { tokio::time::timeout(PATIENCE, client.$name(request)).await };
                    match self.runtime.block_on(call) {
                        Ok(Ok(response)) => Ok(response.into_inner()),
                        Ok(Err(e)) => Err(Refused { code: e.code() as i32, message: e.message().to_owned() }),
                        Err(_) => panic!("{} hangs", stringify!($name)),
                    }
                }
            )+
        }
    };
}

calls! {
    version: VersionRequest -> VersionResponse;
    status: StatusRequest -> StatusResponse;
    run_pod_sandbox: RunPodSandboxRequest -> RunPodSandboxResponse;
    stop_pod_sandbox: StopPodSandboxRequest -> StopPodSandboxResponse;
    remove_pod_sandbox: RemovePodSandboxRequest -> RemovePodSandboxResponse;
    pod_sandbox_status: PodSandboxStatusRequest -> PodSandboxStatusResponse;
    list_pod_sandbox: ListPodSandboxRequest -> ListPodSandboxResponse;
    create_container: CreateContainerRequest -> CreateContainerResponse;
    start_container: StartContainerRequest -> StartContainerResponse;
    stop_container: StopContainerRequest -> StopContainerResponse;
    remove_container: RemoveContainerRequest -> RemoveContainerResponse;
    list_containers: ListContainersRequest -> ListContainersResponse;
    container_status: ContainerStatusRequest -> ContainerStatusResponse;
    update_container_resources: UpdateContainerResourcesRequest -> UpdateContainerResourcesResponse;
    reopen_container_log: ReopenContainerLogRequest -> ReopenContainerLogResponse;
    exec_sync: ExecSyncRequest -> ExecSyncResponse;
    exec: ExecRequest -> ExecResponse;
    attach: AttachRequest -> AttachResponse;
    port_forward: PortForwardRequest -> PortForwardResponse;
    container_stats: ContainerStatsRequest -> ContainerStatsResponse;
    list_container_stats: ListContainerStatsRequest -> ListContainerStatsResponse;
    pod_sandbox_stats: PodSandboxStatsRequest -> PodSandboxStatsResponse;
}

impl Client {
    /// Connects to a socket.
    ///
    /// # Panics
    /// When nobody listens there.
    pub fn connect(socket: &Path) -> Self {
        Self::try_connect(socket).expect("connect to containerd")
    }

    /// As [`Self::connect`]; `None` when nobody listens.
    ///
    /// # Panics
    /// When no thread can be started.
    pub fn try_connect(socket: &Path) -> Option<Self> {
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("start a runtime");
        let path = socket.to_owned();
        let connector = service_fn(move |_: Uri| {
            let path = path.clone();
            async move { Ok::<_, std::io::Error>(TokioIo::new(UnixStream::connect(path).await?)) }
        });
        let endpoint = Endpoint::from_static("http://localhost");
        let channel = runtime.block_on(endpoint.connect_with_connector(connector)).ok()?;
        // A long line of output is one message.
        let client = RuntimeServiceClient::new(channel.clone()).max_decoding_message_size(64 << 20);
        Some(Self { runtime, client, images: ImageServiceClient::new(channel) })
    }

    /// Whether an image is known to CRI, which hears of those that others bring.
    pub fn knows_image(&self, name: &str) -> bool {
        let mut images = self.images.clone();
        let image = api::ImageSpec { image: name.into(), ..Default::default() };
        let request = api::ImageStatusRequest { image: Some(image), verbose: false };
        let call = async move { tokio::time::timeout(PATIENCE, images.image_status(request)).await };
        let answer = self.runtime.block_on(call).expect("image_status hangs");
        answer.is_ok_and(|answer| answer.into_inner().image.is_some())
    }
}
