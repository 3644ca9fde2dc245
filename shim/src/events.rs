//! Events for containerd, in one line: the order in which they are published is the order in which they
//! arrive, also when containerd is away for a while.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use containerd_shim_protos::cgroups::metrics as v1;
use containerd_shim_protos::cgroups_v2::metrics as v2;
use containerd_shim_protos::events::task as topics;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::shim::oci::ProcessDetails;
use containerd_shim_protos::shim::{event::Envelope, events::ForwardRequest};
use containerd_shim_protos::shim_async::{Client, EventsClient};
use containerd_shim_protos::ttrpc::asynchronous::transport::Socket;
use containerd_shim_protos::ttrpc::{self, context};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};

/// How often one event is tried that containerd answers with an error.
const TRIES: u32 = 3;

/// How long one event is kept while containerd cannot be reached: it may be restarting, on a busy node.
const PATIENCE: Duration = Duration::from_secs(120);

/// The longest pause between two tries.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// How long containerd may take for one event.
const TIMEOUT: Duration = Duration::from_secs(5);

enum Item {
    Event(Box<Envelope>),
    Flush(oneshot::Sender<()>),
}

/// Publishes events.
#[derive(Clone, Debug)]
pub(crate) struct Publisher {
    queue: mpsc::UnboundedSender<Item>,
    namespace: String,
}

/// A time as protobuf has it.
pub(crate) fn timestamp(time: SystemTime) -> Timestamp {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp { seconds: since.as_secs() as i64, nanos: since.subsec_nanos() as i32, ..Timestamp::default() }
}

/// A message whose full name is known.
///
/// The descriptors that come with the messages know it too, but to ask one makes all of them, which costs a
/// millisecond and 400 KB that every shim would hold for ever.
pub(crate) trait Named: Message {
    /// The name with its package.
    const FULL_NAME: &'static str;
}

macro_rules! named {
    ($($message:ty = $name:literal,)+) => {
        $(impl Named for $message {
            const FULL_NAME: &'static str = $name;
        })+

        #[cfg(test)]
        #[test]
        fn names_are_those_of_the_protocol() {
            use containerd_shim_protos::protobuf::MessageFull;
            $(assert_eq!(<$message as Named>::FULL_NAME, <$message>::descriptor().full_name());)+
        }
    };
}

named! {
    topics::TaskCreate = "containerd.events.TaskCreate",
    topics::TaskStart = "containerd.events.TaskStart",
    topics::TaskExit = "containerd.events.TaskExit",
    topics::TaskDelete = "containerd.events.TaskDelete",
    topics::TaskOOM = "containerd.events.TaskOOM",
    topics::TaskExecAdded = "containerd.events.TaskExecAdded",
    topics::TaskExecStarted = "containerd.events.TaskExecStarted",
    topics::TaskPaused = "containerd.events.TaskPaused",
    topics::TaskResumed = "containerd.events.TaskResumed",
    ProcessDetails = "containerd.runc.v1.ProcessDetails",
    v1::Metrics = "io.containerd.cgroups.v1.Metrics",
    v2::Metrics = "io.containerd.cgroups.v2.Metrics",
}

/// A message with the bare name of its type, as containerd writes it.
pub(crate) fn any<M: Named>(message: &M) -> Any {
    Any { type_url: M::FULL_NAME.to_owned(), value: message.write_to_bytes().unwrap_or_default(), ..Any::default() }
}

impl Publisher {
    /// Begins to publish to the ttrpc address, in a task of the current runtime.
    pub(crate) fn new(address: Option<String>, namespace: String) -> Self {
        let (queue, receiver) = mpsc::unbounded_channel();
        tokio::spawn(forward_all(address, receiver));
        Self { queue, namespace }
    }

    /// Puts an event into the line.
    pub(crate) fn publish<M: Named>(&self, topic: &str, event: &M) {
        let envelope = Envelope {
            timestamp: MessageField::some(timestamp(SystemTime::now())),
            namespace: self.namespace.clone(),
            topic: topic.to_owned(),
            event: MessageField::some(any(event)),
            ..Envelope::default()
        };
        // The line ends only with the daemon.
        let _ = self.queue.send(Item::Event(Box::new(envelope)));
    }

    /// Waits until all events so far have been sent or given up.
    pub(crate) async fn flush(&self) {
        let (done, waiter) = oneshot::channel();
        if self.queue.send(Item::Flush(done)).is_ok() {
            let _ = waiter.await;
        }
    }
}

async fn forward_all(address: Option<String>, mut queue: mpsc::UnboundedReceiver<Item>) {
    let mut client = None;
    while let Some(item) = queue.recv().await {
        match item {
            Item::Flush(done) => drop(done.send(())),
            Item::Event(envelope) => match &address {
                Some(address) => forward(address, &mut client, *envelope).await,
                None => log::warn!("event {} is lost: containerd gave no TTRPC_ADDRESS", envelope.topic),
            },
        }
    }
}

async fn forward(address: &str, client: &mut Option<EventsClient>, envelope: Envelope) {
    let topic = envelope.topic.clone();
    let request = ForwardRequest { envelope: MessageField::some(envelope), ..ForwardRequest::default() };
    let begun = Instant::now();
    let mut pause = Duration::from_millis(50);
    let mut answers = 0;
    loop {
        let error = match try_forward(address, client, &request).await {
            Ok(()) => return,
            Err(ttrpc::Error::RpcStatus(status)) => {
                answers += 1;
                status.message
            }
            Err(e) => e.to_string(),
        };
        *client = None;
        if answers >= TRIES || begun.elapsed() > PATIENCE {
            // After a restart containerd asks for the state of every task, so it learns the outcome anyway.
            return log::error!("event {topic} is lost: {error}");
        }
        log::debug!("event {topic}: {error}");
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

async fn try_forward(address: &str, client: &mut Option<EventsClient>, request: &ForwardRequest) -> ttrpc::Result<()> {
    let connected = match client {
        Some(client) => client,
        None => client.insert(EventsClient::new(Client::new(dial(address).await?))),
    };
    connected.forward(context::with_duration(TIMEOUT), request).await.map(drop)
}

/// Connects without waiting for a containerd that stands still: its queue may be full.
async fn dial(address: &str) -> ttrpc::Result<Socket> {
    let path = address.strip_prefix("unix://").unwrap_or(address);
    match tokio::time::timeout(TIMEOUT, UnixStream::connect(path)).await {
        Ok(Ok(stream)) => Ok(stream.into()),
        Ok(Err(e)) => Err(ttrpc::Error::Socket(e.to_string())),
        Err(_) => Err(ttrpc::Error::Socket("containerd does not take the connection".into())),
    }
}
