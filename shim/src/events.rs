//! Events for containerd, in one line: the order in which they are published is the order in which they
//! arrive, also when containerd is away for a while.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;
use containerd_shim_protos::protobuf::{MessageField, MessageFull};
use containerd_shim_protos::shim::{event::Envelope, events::ForwardRequest};
use containerd_shim_protos::shim_async::{Client, EventsClient};
use containerd_shim_protos::ttrpc::context;
use tokio::sync::{mpsc, oneshot};

/// How often one event is tried.
const TRIES: u32 = 5;

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

/// A message with the bare name of its type, as containerd writes it.
pub(crate) fn any<M: MessageFull>(message: &M) -> Any {
    Any {
        type_url: M::descriptor().full_name().to_owned(),
        value: message.write_to_bytes().unwrap_or_default(),
        ..Any::default()
    }
}

impl Publisher {
    /// Begins to publish to the ttrpc address, in a task of the current runtime.
    pub(crate) fn new(address: Option<String>, namespace: String) -> Self {
        let (queue, receiver) = mpsc::unbounded_channel();
        tokio::spawn(forward_all(address, receiver));
        Self { queue, namespace }
    }

    /// Puts an event into the line.
    pub(crate) fn publish<M: MessageFull>(&self, topic: &str, event: &M) {
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
    let mut pause = Duration::from_millis(100);
    for attempt in 1..=TRIES {
        match try_forward(address, client, &request).await {
            Ok(()) => return,
            Err(e) => {
                *client = None;
                log::warn!("event {topic}, try {attempt}: {e}");
            }
        }
        tokio::time::sleep(pause).await;
        pause *= 3;
    }
    // After a restart containerd asks for the state of every task, so it learns the outcome anyway.
    log::error!("event {topic} is lost");
}

async fn try_forward(address: &str, client: &mut Option<EventsClient>, request: &ForwardRequest) -> Result<(), String> {
    if client.is_none() {
        let address = if address.contains("://") { address.to_owned() } else { format!("unix://{address}") };
        *client = Some(EventsClient::new(Client::connect(&address).await.map_err(|e| e.to_string())?));
    }
    let Some(client) = client else { return Err("not connected".into()) };
    let deadline = context::with_duration(TIMEOUT);
    client.forward(deadline, request).await.map(drop).map_err(|e| e.to_string())
}
