//! Events about the node: what came of installations, for those who look at the cluster and not at the node.

use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::SystemTime;

use anyhow::{Context, Result};
use humantime::format_rfc3339_seconds;
use serde_json::{Value, json};

use crate::kube::Cluster;
use crate::stage::sha256;

/// Where events about what is in no namespace are.
const EVENTS: &str = "/api/v1/namespaces/default/events";

/// Who tells.
const COMPONENT: &str = "runx-node";

/// The most that an event says, in bytes.
const LIMIT: usize = 1024;

/// How many may wait to be told. More come only while the API does not answer.
const WAITING: usize = 16;

/// What has happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reason {
    /// runx was installed, or other programs of it.
    Installed,
    /// It could not be. containerd is as it was.
    InstallFailed,
    /// containerd did not come up with it, and was restarted without it.
    RolledBack,
}

impl Reason {
    fn name(self) -> &'static str {
        match self {
            Self::Installed => "RunxInstalled",
            Self::InstallFailed => "RunxInstallFailed",
            Self::RolledBack => "RunxRolledBack",
        }
    }

    fn kind(self) -> &'static str {
        if self == Self::Installed { "Normal" } else { "Warning" }
    }
}

/// Tells events by a thread of its own: nobody waits for the API, and nothing fails with it.
#[derive(Debug)]
pub(crate) struct Events(Option<SyncSender<(Reason, String)>>);

impl Events {
    /// Begins to. Without a cluster nobody is told.
    ///
    /// # Errors
    /// When there can be no thread.
    pub(crate) fn begin(cluster: Option<Cluster>) -> Result<Self> {
        let Some(cluster) = cluster else { return Ok(Self(None)) };
        let (sender, receiver) = sync_channel(WAITING);
        let told = move || tell_all(&cluster, &receiver);
        std::thread::Builder::new().name("events".into()).spawn(told).context("start a thread")?;
        Ok(Self(Some(sender)))
    }

    /// Tells one, soon.
    pub(crate) fn tell(&self, reason: Reason, text: &str) {
        let Some(sender) = &self.0 else { return };
        if let Err(TrySendError::Full(_)) = sender.try_send((reason, text.to_owned())) {
            log::warn!("the event {} is not told: others wait for the cluster's API still", reason.name());
        }
    }
}

fn tell_all(cluster: &Cluster, events: &Receiver<(Reason, String)>) {
    for (reason, text) in events {
        if let Err(e) = tell(cluster, reason, &text) {
            log::warn!("{e:#}");
        }
    }
}

/// Tells one, and waits for the API. One that is there already has happened once more.
///
/// # Errors
/// When the API does not take it.
pub(crate) fn tell(cluster: &Cluster, reason: Reason, text: &str) -> Result<()> {
    let told = || format!("tell the event {} about node {}", reason.name(), cluster.name());
    let now = format_rfc3339_seconds(SystemTime::now()).to_string();
    let event = event(cluster.name(), reason, text, &now);
    if cluster.api().create(EVENTS, &event).with_context(told)? {
        return Ok(());
    }
    let path = format!("{EVENTS}/{}", event["metadata"]["name"].as_str().unwrap_or_default());
    let before = cluster.api().merge(&path, &json!({"lastTimestamp": now})).with_context(told)?;
    let count = before["count"].as_u64().unwrap_or(1) + 1;
    cluster.api().merge(&path, &json!({"count": count})).with_context(told).map(drop)
}

fn event(node: &str, reason: Reason, text: &str, now: &str) -> Value {
    let message = shortened(text);
    // The same one has the same name, also after a restart of this program.
    let digest = sha256(format!("{node}\n{}\n{message}", reason.name()).as_bytes());
    json!({
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": format!("{COMPONENT}.{}", &digest[..16]), "namespace": "default"},
        // As with the kubelet's events, a node's name stands for its UID.
        "involvedObject": {"apiVersion": "v1", "kind": "Node", "name": node, "uid": node},
        "type": reason.kind(),
        "reason": reason.name(),
        "message": message,
        "source": {"component": COMPONENT, "host": node},
        "reportingComponent": COMPONENT,
        "reportingInstance": node,
        "firstTimestamp": now,
        "lastTimestamp": now,
        "count": 1,
    })
}

fn shortened(text: &str) -> String {
    const MORE: &str = "…";
    if text.len() <= LIMIT {
        return text.to_owned();
    }
    format!("{}{MORE}", &text[..text.floor_char_boundary(LIMIT - MORE.len())])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_named_after_what_it_says() {
        let name = |node, reason, text, now| event(node, reason, text, now)["metadata"]["name"].clone();
        let first = name("one", Reason::Installed, "x", "2026-01-01T00:00:00Z");
        assert_eq!(first, name("one", Reason::Installed, "x", "2027-01-01T00:00:00Z"));
        for other in [
            name("two", Reason::Installed, "x", ""),
            name("one", Reason::RolledBack, "x", ""),
            name("one", Reason::Installed, "y", ""),
        ] {
            assert_ne!(first, other);
        }
    }

    #[test]
    fn long_texts_are_cut_between_characters() {
        for text in ["é".repeat(600), "x".repeat(1025), format!("x{}", "é".repeat(600))] {
            let short = shortened(&text);
            assert!(short.len() <= LIMIT && short.len() > LIMIT - 4 && short.ends_with('…'), "{}", short.len());
        }
        assert_eq!(shortened(&"x".repeat(1024)).len(), 1024);
    }
}
