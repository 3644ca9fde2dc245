//! As much of a cluster's API as the installer asks for.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use tempfile::TempDir;

/// Requests that came to a cluster's API, and what it answers.
#[derive(Debug)]
pub struct Cluster {
    address: String,
    labels: Arc<Mutex<Vec<Value>>>,
    refuses: Arc<Mutex<bool>>,
    node: Arc<Mutex<Value>>,
    account: TempDir,
}

impl Cluster {
    /// An API that takes labels.
    ///
    /// # Panics
    /// When it cannot listen.
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
        let address = format!("http://{}", listener.local_addr().expect("it has an address"));
        let account = TempDir::with_prefix("runx-account-").expect("make a directory");
        fs::write(account.path().join("token"), "secret\n").expect("write a token");
        let node = Arc::new(Mutex::new(json!({})));
        let this = Self { address, labels: Arc::default(), refuses: Arc::default(), node, account };
        let (labels, refuses, node) = (this.labels.clone(), this.refuses.clone(), this.node.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let refuse = *refuses.lock().expect("no test panics here");
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
                let right = first.starts_with("PATCH /api/v1/nodes/one HTTP/1.1") && allowed;
                let (status, text) = match (right, refuse) {
                    (true, false) => ("200 OK", node.lock().expect("no test panics here").to_string()),
                    (true, true) => ("403 Forbidden", r#"{"message": "not this one"}"#.to_owned()),
                    (false, _) => ("400 Bad Request", format!("{{\"message\": \"{}\"}}", first.trim())),
                };
                if right && !refuse {
                    let value: Value = serde_json::from_slice(&body).unwrap_or_default();
                    labels.lock().expect("no test panics here").push(value["metadata"]["labels"].clone());
                }
                let answer =
                    format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{text}", text.len());
                let _ = reader.get_mut().write_all(answer.as_bytes());
            }
        });
        this
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
        *self.node.lock().expect("no test panics here") = node;
    }

    /// Whether it refuses from now on.
    ///
    /// # Panics
    /// Never, unless its thread did.
    pub fn refuse(&self, on: bool) {
        *self.refuses.lock().expect("no test panics here") = on;
    }

    /// What became of one label, in the order of requests.
    ///
    /// # Panics
    /// Never, unless its thread did.
    pub fn label(&self, name: &str) -> Vec<Value> {
        let all = self.labels.lock().expect("no test panics here");
        all.iter().filter_map(|labels| labels.get(name).cloned()).collect()
    }
}
