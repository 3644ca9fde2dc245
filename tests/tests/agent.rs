//! `runx-agent` as the program of containers, from images that hold nothing else or little.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::Stdio;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use runx_tests::bundle::Bundle;
use runx_tests::command::eventually;
use runx_tests::containerd::{Containerd, RUNTIME};
use runx_tests::{dist, needs_containerd, needs_root};
use serde_json::{Value, json};

const TOKEN: &str = "the-token-of-this-test";

/// A daemon in a container.
struct Agent<'a> {
    containerd: &'a Containerd,
    id: &'static str,
    port: u16,
}

impl<'a> Agent<'a> {
    /// Starts one from an image of a root filesystem, to which the daemon is added.
    fn start(containerd: &'a Containerd, id: &'static str, rootfs: &PathBuf, flags: &[&str]) -> Self {
        fs::create_dir_all(rootfs).unwrap();
        fs::copy(dist().join("runx-agent"), rootfs.join("runx-agent")).unwrap();
        let image = format!("runx.test/{id}:1");
        containerd.import(&image, rootfs, &["/runx-agent"]);
        let log = containerd.path().join(format!("{id}.log"));
        let uri = format!("file://{}", log.display());
        let environment = format!("EXECD_ACCESS_TOKEN={TOKEN}");
        let begin = ["run", "-d", "--runtime", RUNTIME, "--net-host", "--log-uri", &uri, "--env", &environment];
        let end = [image.as_str(), id, "/runx-agent", "--port", "0", "--address", "127.0.0.1"];
        containerd.ctr(&[&begin[..], flags, &end].concat()).ok();
        let port = || {
            let text = fs::read_to_string(&log).unwrap_or_default();
            let (_, rest) = text.split_once("listens on 127.0.0.1:")?;
            rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
        };
        eventually("it listens", || port().is_some());
        Self { containerd, id, port: port().unwrap() }
    }

    fn ask(&self, method: &str, path: &str, kind: &str, body: &[u8]) -> (u16, String) {
        let mut connection = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-EXECD-ACCESS-TOKEN: {TOKEN}\r\n\
             Content-Type: {kind}\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        connection.write_all(head.as_bytes()).unwrap();
        connection.write_all(body).unwrap();
        let mut answer = Vec::new();
        connection.read_to_end(&mut answer).unwrap();
        let text = String::from_utf8_lossy(&answer).into_owned();
        (text.split(' ').nth(1).unwrap().parse().unwrap(), text)
    }

    /// What a command writes, and the exit code in its last event.
    fn run(&self, request: &Value) -> (Vec<String>, Option<String>) {
        let (status, text) = self.ask("POST", "/command", "application/json", request.to_string().as_bytes());
        assert_eq!(status, 200, "{text}");
        let events: Vec<Value> = text
            .lines()
            .filter(|line| line.starts_with("{\"type\""))
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        let of = |kind: &str| events.iter().filter(move |event| event["type"] == kind).cloned().collect::<Vec<_>>();
        let out = of("stdout").iter().map(|event| event["text"].as_str().unwrap().to_owned()).collect();
        let error = of("error").first().map(|event| event["error"]["evalue"].as_str().unwrap().to_owned());
        assert_eq!(of("execution_complete").len(), usize::from(error.is_none()), "{text}");
        (out, error)
    }

    fn upload(&self, path: &str, content: &str) {
        let metadata = json!({"path": path, "mode": 640});
        let body = format!(
            "--b\r\nContent-Disposition: form-data; name=\"metadata\"; filename=\"metadata\"\r\n\r\n{metadata}\r\n\
             --b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"f\"\r\n\r\n{content}\r\n--b--\r\n"
        );
        let (status, text) = self.ask("POST", "/files/upload", "multipart/form-data; boundary=b", body.as_bytes());
        assert_eq!(status, 200, "{text}");
    }
}

impl Drop for Agent<'_> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            // It ends for TERM, also as PID 1.
            self.containerd.ctr(&["task", "kill", "-s", "SIGTERM", self.id]).ok();
            eventually("it has ended", || self.containerd.status(self.id).as_deref() == Some("STOPPED"));
            self.containerd.ctr(&["task", "delete", self.id]).ok();
            self.containerd.ctr(&["container", "rm", self.id]).ok();
        }
    }
}

#[test]
fn it_is_all_that_an_image_needs_to_hold() {
    needs_containerd!();
    let containerd = Containerd::start();
    {
        let agent = Agent::start(&containerd, "scratch", &containerd.path().join("scratch"), &[]);
        let (out, error) = agent.run(&json!({"argv": ["/runx-agent", "--version"]}));
        assert_eq!((out.len(), error), (1, None), "{out:?}");
        assert!(out[0].starts_with("runx-agent version "), "{out:?}");
        // There is no shell, and that is said.
        let (out, error) = agent.run(&json!({"command": "true"}));
        assert!(out.is_empty() && error.is_some_and(|error| error.contains("no such file")));
        agent.upload("/new/file", "content");
        let (status, text) = agent.ask("GET", "/files/download?path=/new/file", "text/plain", b"");
        assert!(status == 200 && text.ends_with("\r\n\r\ncontent"), "{text}");
        let (_, text) = agent.ask("GET", "/files/info?path=/new/file", "text/plain", b"");
        assert!(text.contains(r#""mode":640"#) && text.contains(r#""owner":"0""#), "{text}");
    }
    containerd.assert_nothing_left();
}

#[test]
fn where_there_is_no_bash_sh_serves_and_orphans_are_waited_for() {
    needs_containerd!();
    let containerd = Containerd::start();
    {
        let agent = Agent::start(&containerd, "busybox", &containerd.path().join("rootfs"), &["--read-only"]);
        let (out, _) = agent.run(&json!({"command": "echo $0 $PPID; exit 0"}));
        assert_eq!(out, ["sh 1"], "{out:?}");
        let (_, error) = agent.run(&json!({"command": "exit 7"}));
        assert_eq!(error.as_deref(), Some("7"));
        for _ in 0..10 {
            agent.run(&json!({"command": "(setsid sh -c 'sleep 0.1; exit 3' &)"}));
        }
        eventually("its orphans were waited for", || {
            let (out, _) = agent.run(&json!({"command": "ls -d /proc/[0-9]* | wc -l"}));
            out[0].trim().parse::<u32>().unwrap() <= 5
        });
        // A session needs no place to write to either.
        let (_, text) = agent.ask("POST", "/session", "application/json", b"");
        let id = text.split("\"session_id\":\"").nth(1).unwrap().split('"').next().unwrap().to_owned();
        let path = format!("/session/{id}/run");
        agent.ask("POST", &path, "application/json", br#"{"command": "export A=1; cd /bin"}"#);
        let (_, text) = agent.ask("POST", &path, "application/json", br#"{"command": "echo $A $PWD"}"#);
        assert!(text.contains(r#""text":"1 /bin""#), "{text}");
    }
    containerd.assert_nothing_left();
}

/// A request to a port of the host's loopback, with a token.
fn get(port: u16, path: &str, token: &str) -> Option<String> {
    let mut connection = TcpStream::connect(("127.0.0.1", port)).ok()?;
    let head = format!(
        "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-EXECD-ACCESS-TOKEN: {token}\r\nX-Access-Token: {token}\r\n\r\n"
    );
    connection.write_all(head.as_bytes()).ok()?;
    let mut answer = String::new();
    connection.read_to_string(&mut answer).ok()?;
    Some(answer)
}

/// Two ports that nobody has at the moment.
fn free_ports() -> (u16, u16) {
    let bind = || std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let (one, two) = (bind(), bind());
    (one.local_addr().unwrap().port(), two.local_addr().unwrap().port())
}

#[test]
fn an_annotation_puts_it_beside_a_containers_own_program() {
    needs_containerd!();
    let containerd = Containerd::start();
    let (port, envd_port) = free_ports();
    let (own, second) = (format!("runx.dev/agent.port={port}"), format!("runx.dev/agent.envd-port={envd_port}"));
    let annotations = ["--annotation", "runx.dev/agent=true", "--annotation", &own, "--annotation", &second];
    // With a root filesystem that cannot be written.
    let begin = ["run", "-d", "--null-io", "--runtime", RUNTIME, "--net-host", "--read-only"];
    let image = runx_tests::containerd::BUSYBOX;
    let program = [image, "host", "/bin/sh", "-c", "ls -a / > /dev/null; sleep 1000"];
    containerd.ctr(&[&begin[..], &annotations, &program].concat()).ok();
    let inside = |script: &str| containerd.ctr(&["task", "exec", "--exec-id", "x", "host", "/bin/sh", "-c", script]);
    let mut token = String::new();
    eventually("it has a token", || {
        token = inside("cat /dev/.runx-agent/token").stdout;
        token.len() == 32
    });
    eventually("it answers", || get(port, "/ping", &token).is_some_and(|answer| answer.starts_with("HTTP/1.1 200")));
    assert!(get(port, "/ping", "wrong").unwrap().starts_with("HTTP/1.1 401"));
    assert!(get(envd_port, "/health", "").unwrap().starts_with("HTTP/1.1 204"));
    // It is the container's user, in its cgroup, and nowhere in its files.
    // The brackets keep the one who asks out of the answer.
    let find = "grep -l '^[r]unx-agent' /proc/[0-9]*/cmdline 2>/dev/null";
    let agents = inside(find).stdout;
    let pid: String = agents.chars().skip(6).take_while(char::is_ascii_digit).collect();
    let uid = inside(&format!("grep ^Uid: /proc/{pid}/status")).stdout;
    assert!(uid.contains("0\t0\t0\t0"), "{uid}");
    assert_eq!(inside("ls / | grep -c runx").stdout.trim(), "0");
    // It comes back when it dies, and its token stays.
    inside(&format!("kill -9 {pid}"));
    eventually("it is another one", || {
        let now = inside(find).stdout;
        now.starts_with("/proc/") && !now.contains(&format!("/proc/{pid}/")) && get(port, "/ping", &token).is_some()
    });
    assert!(get(port, "/ping", &token).unwrap().starts_with("HTTP/1.1 200"));
    // It ends with the container.
    containerd.end("host");
    eventually("it is gone", || TcpStream::connect(("127.0.0.1", port)).is_err());
    // What cannot be read is refused.
    let wrong = ["--annotation", "runx.dev/agent=perhaps"];
    let program = [image, "wrong", "/bin/true"];
    containerd.ctr(&[&begin[..], &wrong, &program].concat()).fails(1, &["runx.dev/agent", "perhaps"]);
    containerd.ctr(&["container", "rm", "wrong"]);
    containerd.assert_nothing_left();
}

#[test]
fn people_put_it_into_a_running_container_by_hand() {
    needs_root!();
    let bundle = Bundle::script("sleep 1000");
    bundle.runx_detached(&["run", "-d", "--bundle", &bundle.path().to_string_lossy(), bundle.id()]).ok();
    let words = ["agent", "--container", bundle.id(), "--", "--port", "0", "--address", "127.0.0.1"];
    let mut agent = bundle.command(&words).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(agent.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert!(line.contains("listens on 127.0.0.1:"), "{line}");
    assert_eq!(bundle.exec("cat /dev/.runx-agent/token").ok().stdout.len(), 32);
    // It is the program, and not a file of the container.
    let seen = bundle.exec("cat /proc/[0-9]*/cmdline | tr '\\0' ' '; ls /").ok().stdout;
    assert!(seen.contains("runx-agent --generate-token"), "{seen}");
    assert!(!seen.lines().any(|line| line.trim() == "runx-agent"), "{seen}");
    kill(Pid::from_raw(agent.id().cast_signed()), Signal::SIGTERM).unwrap();
    assert_eq!(agent.wait().unwrap().code(), Some(0));
    bundle.runx(&["delete", "-f", bundle.id()]).ok();
    bundle.runx(&["agent", "--container", "nobody"]).fails(1, &["nobody"]);
    bundle.assert_nothing_left();
}
