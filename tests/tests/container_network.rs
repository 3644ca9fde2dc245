//! `runx container` on a bridge: what its containers reach, what reaches them, and what is left of it.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::time::Duration;

use runx_tests::bundle::fill_rootfs;
use runx_tests::command::{Done, eventually};
use runx_tests::network::{Host, within};
use runx_tests::{leftovers, needs_bridges};
use serde_json::Value;
use tempfile::TempDir;

/// A host with a root filesystem, and containers that end with it.
struct Place {
    host: Host,
    directory: TempDir,
}

impl Place {
    fn new() -> Self {
        let directory = TempDir::with_prefix("runx-test-").unwrap();
        fs::create_dir(directory.path().join("rootfs")).unwrap();
        fill_rootfs(&directory.path().join("rootfs"));
        Self { host: Host::new(), directory }
    }

    fn path(&self, name: &str) -> String {
        self.directory.path().join(name).to_str().unwrap().to_owned()
    }

    /// An id that is this test's only.
    fn id(&self, name: &str) -> String {
        format!("{}-{name}", self.directory.path().file_name().unwrap().to_str().unwrap())
    }

    fn container(&self, args: &[&str]) -> Done {
        self.host.runx(&[&["--storage-root", &self.path("storage"), "container"], args].concat())
    }

    /// Runs a script in a new container.
    fn run(&self, name: &str, flags: &[&str], script: &str) -> Done {
        let (id, rootfs) = (self.id(name), self.path("rootfs"));
        self.container(&[&["run", "--name", &id, "--rootfs", &rootfs], flags, &["--", "sh", "-c", script]].concat())
    }

    fn inspect(&self, name: &str) -> Value {
        let text = self.container(&["inspect", &self.id(name)]).ok().stdout;
        serde_json::from_str::<Value>(&text).unwrap()[0].clone()
    }

    /// The address of a container's interface.
    fn address(&self, name: &str) -> String {
        let list: Value =
            serde_json::from_str(&self.host.runx(&["network", "ls", "--format", "json"]).ok().stdout).unwrap();
        let one = list.as_array().unwrap().iter().find(|one| one["id"] == self.id(name).as_str()).unwrap();
        one["addresses"][0].as_str().unwrap().split('/').next().unwrap().to_owned()
    }

    /// What a web server of the host's says.
    fn fetch(&self, address: &str) -> Option<String> {
        within(&self.host.path(), || {
            let mut stream = TcpStream::connect_timeout(&address.parse().unwrap(), Duration::from_secs(2)).ok()?;
            stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
            stream.write_all(b"GET /word HTTP/1.0\r\n\r\n").ok()?;
            let mut text = String::new();
            stream.read_to_string(&mut text).ok()?;
            text.ends_with('\n').then(|| text.rsplit("\r\n\r\n").next().unwrap_or_default().trim().to_owned())
        })
    }

    fn assert_nothing_left(&self) {
        self.host.assert_nothing_left();
        leftovers::assert_none(&self.id(""), &[PathBuf::from(self.path("storage/containers"))]);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let storage = self.path("storage");
        let args = ["--storage-root", &storage, "container", "rm", "--force", "--volumes", "--all"];
        let _ = self.host.runx_command(&args).output();
    }
}

const SERVE: &str = "mkdir -p /www; echo served >/www/word; exec /bin/busybox httpd -f -p 80 -h /www";

#[test]
fn a_published_port_leads_to_its_container_while_that_runs_and_again_after_a_restart() {
    needs_bridges!();
    let place = Place::new();
    place.run("web", &["-d", "-p", "8080:80"], SERVE).ok();
    let served = || place.fetch("127.0.0.1:8080").as_deref() == Some("served");
    eventually("it is served", served);
    // Another container reaches it by its address, and the host by the port.
    let fetch = format!("/bin/busybox wget -qO- http://{}/word", place.address("web"));
    assert_eq!(place.run("client", &["--rm"], &fetch).ok().stdout, "served\n");
    let listed = place.container(&["ls"]).ok().stdout;
    assert!(listed.contains("8080->80/tcp"), "{listed}");
    place.run("second", &["-d", "-p", "8080:80"], SERVE).fails(125, &["8080", &place.id("web")]);
    place.container(&["stop", "-t", "0", &place.id("web")]).ok();
    assert!(place.fetch("127.0.0.1:8080").is_none());
    place.host.assert_nothing_left();
    place.container(&["start", &place.id("web")]).ok();
    eventually("it is served again", served);
    place.container(&["rm", "--force", &place.id("web")]).ok();
    place.assert_nothing_left();
}

#[test]
fn a_container_reads_its_own_name_and_what_it_was_told_of_others() {
    needs_bridges!();
    let place = Place::new();
    let flags = [
        "--rm",
        "--hostname",
        "web.example.org",
        "--add-host",
        "db:10.0.0.7",
        "--add-host",
        "host.internal:host-gateway",
        "--dns",
        "10.9.9.9",
        "--dns-search",
        "example.org",
    ];
    let script = "cat /etc/hostname /etc/resolv.conf /etc/hosts; ip route";
    let out = place.run("c", &flags, script).ok().stdout;
    let has = |line: &str| assert!(out.lines().any(|have| have.trim_end() == line), "{line:?} is not in {out}");
    for line in ["web.example.org", "nameserver 10.9.9.9", "search example.org", "127.0.0.1\tlocalhost", "10.0.0.7\tdb"]
    {
        has(line);
    }
    let route = out.lines().find_map(|line| line.strip_prefix("default via ")).unwrap();
    let gateway = route.split(' ').next().unwrap();
    has(&format!("{gateway}\thost.internal"));
    assert!(out.lines().any(|line| line.starts_with("10.") && line.contains("web.example.org web")), "{out}");
    place.assert_nothing_left();
}

#[test]
fn nothing_of_a_network_is_left_when_its_container_and_its_monitor_are_killed() {
    needs_bridges!();
    let place = Place::new();
    // Both, and each of them.
    for (round, victims) in [&["monitor", "container"][..], &["container"], &["monitor"]].into_iter().enumerate() {
        let name = format!("c{round}");
        place.run(&name, &["-d", "-p", "8080:80"], SERVE).ok();
        eventually("it is served", || place.fetch("127.0.0.1:8080").is_some());
        let record = PathBuf::from(place.path(&format!("storage/containers/{}/container.json", place.id(&name))));
        let record: Value = serde_json::from_str(&fs::read_to_string(record).unwrap()).unwrap();
        let pid = |victim: &str| match victim {
            "monitor" => record["monitor"]["pid"].as_i64().unwrap(),
            _ => place.inspect(&name)["state"]["pid"].as_i64().unwrap(),
        };
        let pids: Vec<_> = victims.iter().map(|victim| pid(victim)).collect();
        for pid in pids {
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid as i32), nix::sys::signal::Signal::SIGKILL).unwrap();
        }
        if !victims.contains(&"monitor") {
            // The monitor sees to it.
            eventually("its network is gone", || place.host.runx(&["network", "ls", "-q"]).ok().stdout.is_empty());
        }
        place.container(&["rm", "--force", &place.id(&name)]).ok();
        place.assert_nothing_left();
    }
}
