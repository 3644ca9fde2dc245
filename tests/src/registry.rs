//! A real registry on this machine, and a proxy before it that does what networks do.

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tempfile::TempDir;

use crate::command::{Done, eventually, run};

/// Who may pull.
pub const USER: (&str, &str) = ("somebody", "a pass:word");

/// Programs that the tests need, with their packages.
const PROGRAMS: [(&str, &str); 3] = [("docker-registry", "docker-registry"), ("skopeo", "skopeo"), ("umoci", "umoci")];

/// Why there can be no registry here, if there can be none.
pub fn obstacle() -> Option<String> {
    if let Some(why) = crate::obstacle() {
        return Some(why);
    }
    let found =
        |name: &str| ["/usr/bin", "/bin", "/usr/local/bin"].iter().any(|bin| Path::new(bin).join(name).exists());
    let missing = PROGRAMS.iter().find(|(program, _)| !found(program));
    missing.map(|(program, package)| format!("it needs {program} (package {package})"))
}

/// Returns from the test, aloud, where there can be no registry. The virtual machine has none, and would add nothing.
#[macro_export]
macro_rules! needs_registry {
    () => {
        if let Some(why) = $crate::registry::obstacle() {
            $crate::skip(&why);
            return;
        }
    };
}

/// A registry. It ends with this.
#[derive(Debug)]
pub struct Registry {
    process: Child,
    directory: TempDir,
    address: String,
    secure: bool,
}

impl Registry {
    /// One without TLS, which lets everybody in.
    ///
    /// # Panics
    /// When it does not start.
    pub fn plain() -> Self {
        Self::start(false)
    }

    /// One with TLS and a password.
    ///
    /// # Panics
    /// When it does not start.
    pub fn secure() -> Self {
        Self::start(true)
    }

    fn start(secure: bool) -> Self {
        let directory = TempDir::with_prefix_in("runx-test-", "/var/tmp").expect("make a directory");
        let at = |name: &str| directory.path().join(name).display().to_string();
        // Somebody else may take it in between; then it does not start, and the test says so.
        let port = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("find a port").port();
        let address = format!("127.0.0.1:{port}");
        let mut config = format!(
            "version: 0.1\nlog: {{level: warn}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp:\n  addr: {address}\n",
            at("blobs")
        );
        if secure {
            let made = rcgen::generate_simple_self_signed(["localhost".to_owned(), "127.0.0.1".to_owned()]);
            let made = made.expect("make a certificate");
            fs::write(at("ca.crt"), made.cert.pem()).expect("write the certificate");
            fs::write(at("key.pem"), made.signing_key.serialize_pem()).expect("write the key");
            let hash = bcrypt::hash(USER.1, 4).expect("hash the password");
            fs::write(at("htpasswd"), format!("{}:{hash}\n", USER.0)).expect("write the passwords");
            config.push_str(&format!("  tls: {{certificate: {}, key: {}}}\n", at("ca.crt"), at("key.pem")));
            config.push_str(&format!("auth: {{htpasswd: {{realm: tests, path: {}}}}}\n", at("htpasswd")));
        }
        fs::write(at("config.yml"), config).expect("write the configuration");
        let log = fs::File::create(at("log")).expect("make the log");
        let process = Command::new("docker-registry")
            .args(["serve", &at("config.yml")])
            .stdout(log.try_clone().expect("share the log"))
            .stderr(log)
            .stdin(Stdio::null())
            .spawn()
            .expect("start the registry");
        let registry = Self { process, directory, address, secure };
        registry.write_auth("auth.json", USER.1);
        registry.write_auth("wrong.json", "another secret");
        eventually("the registry listens", || TcpStream::connect(&registry.address).is_ok());
        registry
    }

    fn write_auth(&self, name: &str, password: &str) {
        let pair = base64(format!("{}:{password}", USER.0).as_bytes());
        let text = serde_json::json!({"auths": {&self.address: {"auth": pair}}}).to_string();
        fs::write(self.path(name), text).expect("write the credentials");
    }

    /// `HOST:PORT`.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// A file of it: `auth.json`, `wrong.json` with another password, `ca.crt`.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Pushes an image, given in skopeo's words.
    ///
    /// # Panics
    /// When that fails.
    pub fn push(&self, from: &str, name: &str, flags: &[&str]) {
        let mut command = Command::new("skopeo");
        command.args(["copy", "--quiet", "--dest-tls-verify=false"]).args(flags);
        if self.secure {
            command.arg("--dest-authfile").arg(self.path("auth.json"));
        }
        run(command.args([from, &format!("docker://{}/{name}", self.address)])).ok();
    }

    /// Asks it with skopeo.
    #[track_caller]
    pub fn inspect(&self, name: &str, flags: &[&str]) -> Done {
        let mut command = Command::new("skopeo");
        command.args(["inspect", "--tls-verify=false"]).args(flags);
        if self.secure {
            command.arg("--authfile").arg(self.path("auth.json"));
        }
        run(command.arg(format!("docker://{}/{name}", self.address)))
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::new();
    for chunk in bytes.chunks(3) {
        let group = chunk.iter().fold(0_u32, |sum, byte| sum << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
        for place in 0..4 {
            let digit = DIGITS[(group >> (18 - 6 * place)) as usize & 63];
            out.push(if place <= chunk.len() { char::from(digit) } else { '=' });
        }
    }
    out
}

/// What the proxy does to an answer with a blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Ends the connection after so many bytes, so many times.
    Cut {
        /// Of the body.
        after: usize,
        /// Then no more.
        times: usize,
    },
    /// Changes one byte of the body.
    Corrupt,
    /// Pauses after each 64 KiB.
    Slow(Duration),
    /// Knows no ranges, and ends the first connection after so many bytes.
    NoRanges {
        /// Of the body.
        after: usize,
    },
}

/// A request that came by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// `GET /v2/…`
    pub line: String,
    /// Its header, if it asked for a part.
    pub range: Option<String>,
}

/// Who lets only those in who have an access token, and gives them one for an identity token, which is another one then.
#[derive(Debug)]
struct Guard {
    identity: String,
    /// For how long an access token is said to be good, in seconds.
    lasts: u64,
    /// How many were given.
    given: usize,
    /// The form that was sent last.
    form: HashMap<String, String>,
}

impl Guard {
    /// Answers a request that is not for the registry. `None` if it is, and may come in.
    fn answer(&mut self, address: &str, line: &str, authorization: &str, body: &str) -> Option<String> {
        let json = |status: &str, text: serde_json::Value| {
            let text = text.to_string();
            format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{text}", text.len())
        };
        if line == "POST /token" {
            self.form = body
                .split('&')
                .filter_map(|pair| pair.split_once('='))
                .map(|(k, v)| (decoded(k), decoded(v)))
                .collect();
            let is = |key: &str, value: &str| self.form.get(key).is_some_and(|found| found == value);
            if !is("grant_type", "refresh_token") || !is("refresh_token", &self.identity) || !is("service", "tests") {
                // As some do, it repeats what it was told.
                let told = format!("{} is nobody", self.form.get("refresh_token").cloned().unwrap_or_default());
                let refused = serde_json::json!({"error": "invalid_grant", "error_description": told});
                return Some(json("401 Unauthorized", refused));
            }
            self.given += 1;
            self.identity = format!("identity-{}", self.given);
            let token = format!("access-{}", self.given);
            return Some(json(
                "200 OK",
                serde_json::json!({"access_token": token, "expires_in": self.lasts, "refresh_token": self.identity}),
            ));
        }
        if (1..=self.given).any(|number| authorization == format!("Bearer access-{number}")) {
            return None;
        }
        let realm = format!("WWW-Authenticate: Bearer realm=\"http://{address}/token\",service=\"tests\"");
        Some(format!("HTTP/1.1 401 Unauthorized\r\n{realm}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"))
    }
}

/// A part of a form.
fn decoded(text: &str) -> String {
    let mut parts = text.split('%');
    let mut out = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let (digits, rest) = part.split_at(part.len().min(2));
        out.push(char::from(u8::from_str_radix(digits, 16).unwrap_or(b'?')));
        out.push_str(rest);
    }
    out
}

/// A proxy before a registry without TLS.
#[derive(Debug)]
pub struct Proxy {
    address: String,
    state: Arc<State>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct State {
    registry: String,
    /// By the blob's digest, or all.
    fault: Mutex<Option<Fault>>,
    guard: Mutex<Option<Guard>>,
    requests: Mutex<Vec<Request>>,
    ended: AtomicBool,
}

impl Proxy {
    /// Starts one.
    ///
    /// # Panics
    /// When it cannot listen.
    pub fn before(registry: &Registry) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
        let address = listener.local_addr().expect("listen").to_string();
        let state = Arc::new(State {
            registry: registry.address.clone(),
            fault: Mutex::new(None),
            guard: Mutex::new(None),
            requests: Mutex::default(),
            ended: AtomicBool::new(false),
        });
        let (shared, own) = (state.clone(), address.clone());
        let thread = thread::spawn(move || {
            for client in listener.incoming().flatten() {
                if shared.ended.load(Ordering::SeqCst) {
                    return;
                }
                let state = shared.clone();
                let own = own.clone();
                thread::spawn(move || drop(serve(&state, &own, client)));
            }
        });
        Self { address, state, thread: Some(thread) }
    }

    /// `HOST:PORT`.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// What it does from now on to blobs of layers: those of more than 4 KiB.
    pub fn set(&self, fault: Option<Fault>) {
        *self.state.fault.lock().expect("the fault") = fault;
    }

    /// Lets only those in, from now on, who come with an identity token, for which access tokens are given that are good for so
    /// many seconds.
    ///
    /// # Panics
    /// Never, unless its thread did.
    pub fn guard(&self, identity: &str, lasts: u64) {
        let guard = Guard { identity: identity.to_owned(), lasts, given: 0, form: HashMap::new() };
        *self.state.guard.lock().expect("the guard") = Some(guard);
    }

    /// How many access tokens were given, and what was asked for last.
    ///
    /// # Panics
    /// Where there is no guard.
    pub fn given(&self) -> (usize, HashMap<String, String>) {
        let guard = self.state.guard.lock().expect("the guard");
        let guard = guard.as_ref().expect("there is one");
        (guard.given, guard.form.clone())
    }

    /// The requests for blobs until now.
    pub fn blobs(&self) -> Vec<Request> {
        let requests = self.state.requests.lock().expect("the requests");
        requests
            .iter()
            .filter(|request| request.line.starts_with("GET ") && request.line.contains("/blobs/"))
            .cloned()
            .collect()
    }

    /// How often each blob was asked for.
    pub fn counts(&self) -> HashMap<String, usize> {
        let mut counts = HashMap::new();
        for request in self.blobs() {
            *counts.entry(request.line).or_default() += 1;
        }
        counts
    }

    /// Forgets the requests until now.
    pub fn forget(&self) {
        self.state.requests.lock().expect("the requests").clear();
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.state.ended.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(&self.address);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// One request for each connection: both sides are told so.
fn serve(state: &State, address: &str, client: TcpStream) -> std::io::Result<()> {
    let mut reader = BufReader::new(client.try_clone()?);
    let mut head = String::new();
    let mut request = Request { line: String::new(), range: None };
    let (mut authorization, mut length) = (String::new(), 0);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let lower = line.to_ascii_lowercase();
        if request.line.is_empty() {
            request.line = line.rsplit_once(' ').map_or(line.as_str(), |(before, _)| before).to_owned();
        }
        if let Some(range) = lower.strip_prefix("range:") {
            request.range = Some(range.trim().to_owned());
            if matches!(*state.fault.lock().expect("the fault"), Some(Fault::NoRanges { .. })) {
                continue;
            }
        }
        if let Some(value) = lower.strip_prefix("content-length:") {
            length = value.trim().parse().unwrap_or(0);
        }
        if lower.starts_with("authorization:") {
            authorization = line["authorization:".len()..].trim().to_owned();
        }
        if lower.starts_with("connection:") {
            continue;
        }
        if line.trim().is_empty() {
            head.push_str("Connection: close\r\n\r\n");
            break;
        }
        head.push_str(&line);
    }
    state.requests.lock().expect("the requests").push(request.clone());
    let mut client = client;
    if let Some(guard) = state.guard.lock().expect("the guard").as_mut() {
        let mut body = vec![0; length];
        reader.read_exact(&mut body)?;
        let body = String::from_utf8_lossy(&body);
        if let Some(answer) = guard.answer(address, &request.line, &authorization, &body) {
            client.write_all(answer.as_bytes())?;
            return client.shutdown(Shutdown::Both);
        }
    }
    let mut upstream = TcpStream::connect(&state.registry)?;
    upstream.write_all(head.as_bytes())?;
    let mut upstream = BufReader::new(upstream);
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        if upstream.read_until(b'\n', &mut answer)? == 0 {
            break;
        }
    }
    client.write_all(&answer)?;
    let length = String::from_utf8_lossy(&answer).lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().ok())?
    });
    let is_layer =
        request.line.starts_with("GET ") && request.line.contains("/blobs/") && length.is_some_and(|l| l > 4096);
    let fault = is_layer.then(|| take(state)).flatten();
    pass_on(&mut upstream, &mut client, fault)?;
    client.shutdown(Shutdown::Both)
}

/// The fault for this answer; one that ends after some times does.
fn take(state: &State) -> Option<Fault> {
    let mut fault = state.fault.lock().expect("the fault");
    let present = *fault;
    *fault = match present {
        Some(Fault::Cut { times: 0, .. }) => return None,
        Some(Fault::Cut { after, times }) => Some(Fault::Cut { after, times: times - 1 }),
        // Still without ranges, and with the whole of it.
        Some(Fault::NoRanges { .. }) => Some(Fault::NoRanges { after: usize::MAX }),
        other => other,
    };
    present
}

fn pass_on(from: &mut impl Read, to: &mut impl Write, fault: Option<Fault>) -> std::io::Result<()> {
    let mut left = match fault {
        Some(Fault::Cut { after, .. } | Fault::NoRanges { after }) => after,
        _ => usize::MAX,
    };
    let mut buffer = vec![0; 1 << 16];
    let mut first = true;
    while left > 0 {
        let wanted = buffer.len().min(left);
        let got = from.read(&mut buffer[..wanted])?;
        if got == 0 {
            break;
        }
        if first && fault == Some(Fault::Corrupt) {
            buffer[got / 2] ^= 1;
        }
        first = false;
        to.write_all(&buffer[..got])?;
        if let Some(Fault::Slow(pause)) = fault {
            thread::sleep(pause);
        }
        left -= got;
    }
    Ok(())
}
