//! As much of a cluster's API as the installer asks for.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard};

use serde_json::{Value, json};
use tempfile::TempDir;

/// Where events of nodes are.
const EVENTS: &str = "/api/v1/namespaces/default/events";

/// Requests that came to a cluster's API, and what it answers.
#[derive(Debug)]
pub struct Cluster {
    address: String,
    state: Arc<Mutex<State>>,
    account: TempDir,
}

#[derive(Debug, Default)]
struct State {
    labels: Vec<Value>,
    refuses: bool,
    node: Value,
    /// By name.
    events: BTreeMap<String, Value>,
    keeps_events_waiting: bool,
    waiting: usize,
    given_up: usize,
}

/// A code, and what is said with it.
type Answer = (&'static str, String);

fn refusal(code: &'static str, message: &str) -> Answer {
    (code, json!({ "message": message }).to_string())
}

impl State {
    fn answer(&mut self, first: &str, body: &[u8]) -> Answer {
        let body: Value = serde_json::from_slice(body).unwrap_or_default();
        let words: Vec<&str> = first.split_ascii_whitespace().collect();
        let [method, path, "HTTP/1.1"] = words[..] else { return refusal("400 Bad Request", first) };
        if self.refuses {
            return refusal("403 Forbidden", "not this one");
        }
        match (method, path, path.strip_prefix(EVENTS).map(|name| name.trim_start_matches('/'))) {
            ("PATCH", "/api/v1/nodes/one", _) => {
                self.labels.push(body["metadata"]["labels"].clone());
                ("200 OK", self.node.to_string())
            }
            ("POST", EVENTS, _) => {
                let name = body["metadata"]["name"].as_str().unwrap_or_default().to_owned();
                if self.events.contains_key(&name) {
                    return refusal("409 Conflict", "it exists");
                }
                self.events.insert(name, body.clone());
                ("201 Created", body.to_string())
            }
            ("PATCH", _, Some(name)) => match self.events.get_mut(name).and_then(Value::as_object_mut) {
                Some(event) => {
                    event.extend(body.as_object().cloned().unwrap_or_default());
                    ("200 OK", json!(event).to_string())
                }
                None => refusal("404 Not Found", "no such event"),
            },
            _ => refusal("400 Bad Request", first.trim()),
        }
    }
}

fn locked(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().expect("no test panics here")
}

/// Answers one request.
fn serve(stream: TcpStream, state: &Mutex<State>) {
    let mut reader = BufReader::new(stream);
    let (mut first, mut length, mut allowed) = (String::new(), 0, false);
    let _ = reader.read_line(&mut first);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap_or(0) <= 2 {
            break;
        }
        let lower = line.to_ascii_lowercase();
        if let Some(value) = lower.strip_prefix("content-length:") {
            length = value.trim().parse().unwrap_or(0);
        }
        allowed |= lower.trim() == "authorization: bearer secret";
    }
    let mut body = vec![0; length];
    let _ = reader.read_exact(&mut body);
    if first.contains(EVENTS) && locked(state).keeps_events_waiting {
        locked(state).waiting += 1;
        // Until the other side goes.
        let _ = reader.read(&mut [0]);
        locked(state).given_up += 1;
        return;
    }
    let (status, text) = match allowed {
        true => locked(state).answer(&first, &body),
        false => refusal("401 Unauthorized", "no token"),
    };
    let answer = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{text}", text.len());
    let _ = reader.get_mut().write_all(answer.as_bytes());
}

impl Cluster {
    /// An API that takes labels and events.
    ///
    /// # Panics
    /// When it cannot listen.
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
        let address = format!("http://{}", listener.local_addr().expect("it has an address"));
        let account = TempDir::with_prefix("runx-account-").expect("make a directory");
        fs::write(account.path().join("token"), "secret\n").expect("write a token");
        let state = Arc::new(Mutex::new(State { node: json!({}), ..State::default() }));
        let served = state.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let state = served.clone();
                std::thread::spawn(move || serve(stream, &state));
            }
        });
        Self { address, state, account }
    }

    /// The installer's flags for it.
    pub fn flags(&self) -> Vec<String> {
        let account = self.account.path().to_string_lossy();
        ["--node-name", "one", "--api", &self.address, "--account", &account].map(str::to_owned).to_vec()
    }

    /// Tells what the node is for the cluster, from now on.
    ///
    /// # Panics
    /// Never, unless its thread did.
    pub fn set_node(&self, node: Value) {
        locked(&self.state).node = node;
    }

    /// Whether it refuses from now on.
    ///
    /// # Panics
    /// Never, unless its thread did.
    pub fn refuse(&self, on: bool) {
        locked(&self.state).refuses = on;
    }

    /// Whether who tells an event gets no answer from now on.
    ///
    /// # Panics
    /// Never, unless its thread did.
    pub fn keep_events_waiting(&self, on: bool) {
        locked(&self.state).keeps_events_waiting = on;
    }

    /// How many have told an event and got no answer, and how many of these have given up.
    ///
    /// # Panics
    /// Never, unless its thread did.
    pub fn waiting(&self) -> (usize, usize) {
        let state = locked(&self.state);
        (state.waiting, state.given_up)
    }

    /// The events with this reason.
    ///
    /// # Panics
    /// Never, unless its thread did.
    pub fn events(&self, reason: &str) -> Vec<Value> {
        locked(&self.state).events.values().filter(|event| event["reason"] == reason).cloned().collect()
    }

    /// What became of one label, in the order of requests.
    ///
    /// # Panics
    /// Never, unless its thread did.
    pub fn label(&self, name: &str) -> Vec<Value> {
        locked(&self.state).labels.iter().filter_map(|labels| labels.get(name).cloned()).collect()
    }
}
