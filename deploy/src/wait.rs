//! Waiting until a DaemonSet of `runx-node run` has done its work on all nodes: for a hook after an upgrade or a rollback, which
//! then fails where a node does, and says which.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail};
use serde_json::Value;

use crate::arguments::Arguments;
use crate::kube::{Api, is_name};

/// How often it is looked.
const INTERVAL: Duration = Duration::from_secs(2);

/// How many nodes are named in an error.
const NAMED: usize = 10;

/// How far a DaemonSet is, as its status says.
#[derive(Debug, PartialEq, Eq)]
struct Rollout {
    /// Its pods are of the newest template, and the status is of it.
    wanted: u64,
    updated: u64,
    ready: u64,
    observed: bool,
}

impl Rollout {
    fn of(set: &Value) -> Self {
        let number = |path: &str| set.pointer(path).and_then(Value::as_u64).unwrap_or_default();
        Self {
            wanted: number("/status/desiredNumberScheduled"),
            updated: number("/status/updatedNumberScheduled"),
            ready: number("/status/numberReady"),
            observed: number("/status/observedGeneration") >= number("/metadata/generation").max(1),
        }
    }

    fn is_done(&self) -> bool {
        self.observed && self.updated >= self.wanted && self.ready >= self.wanted
    }

    fn text(&self) -> String {
        format!("{} of {} nodes have the newest pod, {} are ready", self.updated, self.wanted, self.ready)
    }
}

/// The nodes whose pods are not ready, each with what Kubernetes says of it.
fn not_ready(pods: &Value) -> Vec<String> {
    let text = |value: &Value, path: &str| value.pointer(path).and_then(Value::as_str).map(str::to_owned);
    let list = pods.get("items").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let mut out = Vec::new();
    for pod in list {
        let conditions = pod.pointer("/status/conditions").and_then(Value::as_array);
        let is_ready = |condition: &Value| condition["type"] == "Ready" && condition["status"] == "True";
        if conditions.is_some_and(|conditions| conditions.iter().any(is_ready)) {
            continue;
        }
        let node = text(pod, "/spec/nodeName");
        let name = text(pod, "/metadata/name").unwrap_or_default();
        // A pod without a node has no log.
        let verb = if node.is_some() { "logs" } else { "describe pod" };
        let namespace = text(pod, "/metadata/namespace").map(|name| format!(" --namespace {name}")).unwrap_or_default();
        let why = text(pod, "/status/containerStatuses/0/state/waiting/reason")
            .map_or_else(|| format!("kubectl {verb} {name}{namespace} says why"), |why| format!("pod {name}: {why}"));
        out.push(format!("{} ({why})", node.as_deref().unwrap_or("no node yet")));
    }
    out.sort();
    out
}

/// The labels that a DaemonSet knows its pods by, as a list of a URL.
fn selector(set: &Value) -> String {
    let labels = set.pointer("/spec/selector/matchLabels").and_then(Value::as_object);
    let pairs = labels.into_iter().flatten().filter_map(|(key, value)| Some((key, value.as_str()?)));
    let pairs: Vec<String> = pairs.map(|(key, value)| format!("{}%3D{value}", key.replace('/', "%2F"))).collect();
    pairs.join("%2C")
}

/// Waits.
///
/// # Errors
/// When it takes longer than it may, with the nodes that are not ready; and when the API gives nothing in that time.
pub(crate) fn wait(arguments: &Arguments) -> Result<()> {
    let given = arguments.get("daemonset").ok_or_else(|| anyhow!("--daemonset NAMESPACE/NAME is missing"))?;
    let (namespace, name) = given
        .split_once('/')
        .filter(|(namespace, name)| is_name(namespace) && is_name(name))
        .ok_or_else(|| anyhow!("--daemonset {given:?} is not NAMESPACE/NAME"))?;
    let patience = arguments.seconds("timeout", 60).map_err(|e| anyhow!(e))?;
    let api = Api::new(arguments.get("api"), arguments.get("account").map(Path::new))?;
    let path = format!("/apis/apps/v1/namespaces/{namespace}/daemonsets/{name}");
    let end = Instant::now() + patience;
    let mut told = String::new();
    loop {
        let problem = match api.get(&path) {
            Ok(set) => {
                let rollout = Rollout::of(&set);
                let text = rollout.text();
                if text != told {
                    println!("{given}: {text}");
                    told.clone_from(&text);
                }
                if rollout.is_done() {
                    return Ok(());
                }
                Ok((set, text))
            }
            Err(e) => Err(e),
        };
        if Instant::now() < end {
            std::thread::sleep(INTERVAL.min(end.saturating_duration_since(Instant::now())));
            continue;
        }
        let (set, text) = problem?;
        let pods = api.get(&format!("/api/v1/namespaces/{namespace}/pods?labelSelector={}", selector(&set)));
        let nodes = pods.map(|pods| not_ready(&pods)).unwrap_or_else(|e| vec![format!("{e:#}")]);
        let more = nodes.len().saturating_sub(NAMED);
        let mut list = nodes[..nodes.len() - more].join(", ");
        if more > 0 {
            list.push_str(&format!(" and {more} more"));
        }
        bail!(
            "after {} s {text}. Not ready: {}",
            patience.as_secs(),
            if list.is_empty() { "no pod is made yet" } else { &list }
        );
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn it_is_done_when_every_node_has_a_ready_pod_of_the_newest_template() {
        let set = |generation: u64, observed: u64, wanted: u64, updated: u64, ready: u64| {
            json!({"metadata": {"generation": generation}, "status": {"observedGeneration": observed,
                "desiredNumberScheduled": wanted, "updatedNumberScheduled": updated, "numberReady": ready}})
        };
        let done = |set: &Value| Rollout::of(set).is_done();
        assert!(done(&set(2, 2, 3, 3, 3)) && done(&set(1, 1, 0, 0, 0)));
        for wrong in [
            set(2, 1, 3, 3, 3),
            set(2, 2, 3, 2, 3),
            set(2, 2, 3, 3, 2),
            json!({"metadata": {"generation": 1}}),
            json!({}),
        ] {
            assert!(!done(&wrong), "{wrong}");
        }
    }

    #[test]
    fn nodes_are_named_with_what_is_known_of_them() {
        let pods = json!({"items": [
            {"metadata": {"name": "a"}, "spec": {"nodeName": "one"},
             "status": {"conditions": [{"type": "Ready", "status": "True"}]}},
            {"metadata": {"name": "b", "namespace": "runx"}, "spec": {"nodeName": "two"},
             "status": {"conditions": [{"type": "Ready", "status": "False"}]}},
            {"metadata": {"name": "c"}, "spec": {"nodeName": "three"},
             "status": {"containerStatuses": [{"state": {"waiting": {"reason": "ImagePullBackOff"}}}]}},
            {"metadata": {"name": "d"}},
        ]});
        let expected = [
            "no node yet (kubectl describe pod d says why)",
            "three (pod c: ImagePullBackOff)",
            "two (kubectl logs b --namespace runx says why)",
        ];
        assert_eq!(not_ready(&pods), expected);
        assert!(not_ready(&json!({})).is_empty());
        let set = json!({"spec": {"selector": {"matchLabels": {"a.example/b": "c", "d": "e"}}}});
        assert_eq!(selector(&set), "a.example%2Fb%3Dc%2Cd%3De");
    }

    /// An API that answers each request with the next of these, and with the last one from then on; and what was asked for.
    fn api(answers: Vec<(u16, Value)>) -> (String, std::sync::mpsc::Receiver<String>) {
        use std::io::{BufRead, BufReader, Write};
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let (sender, asked) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let mut answers = answers.into_iter();
            let mut next = answers.next();
            for stream in listener.incoming().flatten() {
                let mut reader = BufReader::new(stream);
                let mut first = String::new();
                let _ = reader.read_line(&mut first);
                let (mut line, mut allowed) = (String::new(), false);
                while reader.read_line(&mut line).is_ok_and(|count| count > 2) {
                    allowed |= line.trim().eq_ignore_ascii_case("authorization: bearer secret");
                    line.clear();
                }
                let (code, body) = next.clone().filter(|_| allowed).unwrap_or((401, Value::Null));
                let body = body.to_string();
                let head = format!("HTTP/1.1 {code} x\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
                let _ = reader.get_mut().write_all(format!("{head}{body}").as_bytes());
                let _ = sender.send(first.split(' ').nth(1).unwrap_or_default().to_owned());
                next = answers.next().or(next);
            }
        });
        (address, asked)
    }

    fn waited(daemonset: &str, api: &str) -> Result<()> {
        let account = tempfile::tempdir().unwrap();
        std::fs::write(account.path().join("token"), "secret").unwrap();
        let account = account.path().to_string_lossy().into_owned();
        let words = ["wait", "--daemonset", daemonset, "--timeout", "1", "--api", api, "--account", &account];
        match Arguments::parse(words.map(str::to_owned), |_| None).unwrap() {
            crate::arguments::Asked::Do(arguments) => wait(&arguments),
            crate::arguments::Asked::Print(text) => panic!("{text}"),
        }
    }

    fn rollout(updated: u64, ready: u64) -> (u16, Value) {
        let status = json!({"observedGeneration": 4, "desiredNumberScheduled": 2, "updatedNumberScheduled": updated,
            "numberReady": ready});
        let selector = json!({"matchLabels": {"app.kubernetes.io/name": "runx"}});
        (200, json!({"metadata": {"generation": 4}, "spec": {"selector": selector}, "status": status}))
    }

    #[test]
    fn it_ends_when_all_is_done_also_after_a_look_that_failed() {
        let (address, asked) = api(vec![(503, json!({"message": "not yet"})), rollout(2, 2)]);
        waited("runx/runx-node", &address).unwrap();
        assert_eq!(asked.recv().unwrap(), "/apis/apps/v1/namespaces/runx/daemonsets/runx-node");
    }

    #[test]
    fn it_fails_when_the_time_is_over_and_names_the_nodes() {
        let pods = json!({"items": [{"metadata": {"name": "p"}, "spec": {"nodeName": "two"}}]});
        let (address, asked) = api(vec![rollout(1, 1), rollout(2, 1), (200, pods)]);
        let error = waited("runx/runx-node", &address).unwrap_err().to_string();
        let expected =
            "after 1 s 2 of 2 nodes have the newest pod, 1 are ready. Not ready: two (kubectl logs p says why)";
        assert_eq!(error, expected);
        let last = asked.iter().nth(2).unwrap();
        assert_eq!(last, "/api/v1/namespaces/runx/pods?labelSelector=app.kubernetes.io%2Fname%3Drunx");
    }

    #[test]
    fn what_the_api_refuses_and_names_that_are_none_are_errors() {
        let (address, _asked) = api(vec![(403, json!({"message": "no such right"}))]);
        let error = format!("{:#}", waited("runx/runx-node", &address).unwrap_err());
        assert!(
            error.contains("403") && error.contains("no such right") && error.contains("daemonsets/runx-node"),
            "{error}"
        );
        for name in ["runx", "runx/", "/x", "a/b/c", "../x", "a/B"] {
            let error = waited(name, "http://127.0.0.1:1").unwrap_err().to_string();
            assert!(error.contains("NAMESPACE/NAME"), "{name}: {error}");
        }
    }
}
