//! Networks of containers: a bridge by CNI plugins, published ports, and what is left of them.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::time::Duration;

use runx_tests::command::{eventually, run};
use runx_tests::network::{Host, within};
use runx_tests::{needs_bridges, random::Random};
use serde_json::Value;

fn address(attached: &Value) -> String {
    attached["addresses"][0].as_str().unwrap().split('/').next().unwrap().to_owned()
}

fn netns(attached: &Value) -> &Path {
    Path::new(attached["netns"].as_str().unwrap())
}

/// What a web server says that answers with one word.
fn fetch(from: &Path, address: &str) -> std::io::Result<String> {
    within(from, || {
        let mut stream = TcpStream::connect_timeout(&address.parse().unwrap(), Duration::from_secs(5))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        stream.write_all(b"GET /word HTTP/1.0\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text.rsplit("\r\n\r\n").next().unwrap_or_default().to_owned())
    })
}

/// Whether a datagram comes back.
fn echoes(from: &Path, address: &str) -> bool {
    within(from, || {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let mut buffer = [0; 16];
        socket.send_to(b"ping", address).is_ok()
            && socket.recv(&mut buffer).is_ok_and(|length| &buffer[..length] == b"ping")
    })
}

const SERVE: &str = "mkdir -p /www; echo $0 >/www/word; exec /bin/busybox httpd -f -p 80 -h /www";

#[test]
fn containers_reach_each_other_and_the_host_reaches_their_published_ports() {
    needs_bridges!();
    let host = Host::new();
    let first = SERVE.replace("$0", "first");
    let (one, attached) =
        host.container(&first, &["-p", "8080:80", "-p", "5353:53/udp", "-p", "127.0.0.1:9000-9001:80-81"]);
    let (two, other) = host.container("sleep 100", &[]);
    assert_ne!(address(&attached), address(&other));
    assert_eq!(attached["gateway"], other["gateway"]);
    let answer = |from: &Path, address: &str| {
        let mut last = Err(std::io::ErrorKind::NotConnected.into());
        eventually("the server answers", || {
            last = fetch(from, address);
            last.is_ok()
        });
        last.unwrap()
    };
    // From a container to another, by busybox in it.
    let direct = format!("{}:80", address(&attached));
    assert_eq!(answer(&host.path(), &direct), "first\n");
    let wget = format!("/bin/busybox wget -qO- http://{}/word", address(&attached));
    assert_eq!(two.exec(&wget).ok().stdout, "first\n");
    // By the host's own address and by the loopback one; TCP and UDP.
    let gateway = attached["gateway"].as_str().unwrap();
    let served = within(netns(&attached), || UdpSocket::bind("0.0.0.0:53")).unwrap();
    let echo = std::thread::spawn(move || {
        let mut buffer = [0; 16];
        for _ in 0..3 {
            let (length, from) = served.recv_from(&mut buffer).unwrap();
            served.send_to(&buffer[..length], from).unwrap();
        }
    });
    for (address, datagrams) in [("127.0.0.1", true), (gateway, true)] {
        assert_eq!(answer(&host.path(), &format!("{address}:8080")), "first\n");
        assert_eq!(echoes(&host.path(), &format!("{address}:5353")), datagrams, "{address}");
    }
    // A range for one address: only there.
    assert_eq!(answer(&host.path(), "127.0.0.1:9000"), "first\n");
    assert!(fetch(&host.path(), &format!("{gateway}:9000")).is_err());
    // A container reaches published ports as well, its own too.
    for from in [&attached, &other] {
        assert_eq!(answer(netns(from), &format!("{gateway}:8080")), "first\n");
    }
    assert!(echoes(netns(&other), &format!("{gateway}:5353")));
    echo.join().unwrap();
    assert!(host.runx(&["network", "ls"]).ok().stdout.contains("127.0.0.1:9001->81/tcp"));
    host.runx(&["network", "check", one.id()]).ok();
    for bundle in [&one, &two] {
        bundle.runx(&["delete", "-f", bundle.id()]).ok();
        host.runx(&["network", "detach", bundle.id()]).ok();
        bundle.assert_nothing_left();
    }
    assert!(fetch(&host.path(), "127.0.0.1:8080").is_err());
    host.assert_nothing_left();
}

#[test]
fn containers_reach_others_with_the_hosts_address_and_others_reach_published_ports() {
    needs_bridges!();
    let (host, outside) = (Host::new(), Host::new());
    host.ip(&format!("link add wan type veth peer name eth0 netns {}", outside.path().display()));
    host.ip("addr add 198.51.100.1/24 dev wan");
    host.ip("link set wan up");
    outside.ip("addr add 198.51.100.2/24 dev eth0");
    outside.ip("link set eth0 up");
    // As where docker is beside it: nothing passes that nobody lets pass.
    run(host.command("iptables").args(["-P", "FORWARD", "DROP"])).ok();
    let attached = host.attach("c", &["-p", "8080:80"]);
    let listener = within(&outside.path(), || TcpListener::bind("198.51.100.2:7000")).unwrap();
    let peer = std::thread::spawn(move || listener.accept().unwrap().1.ip().to_string());
    within(netns(&attached), || {
        TcpStream::connect_timeout(&"198.51.100.2:7000".parse().unwrap(), Duration::from_secs(5)).unwrap();
    });
    assert_eq!(peer.join().unwrap(), "198.51.100.1");
    let served = within(netns(&attached), || TcpListener::bind("0.0.0.0:80")).unwrap();
    let client = std::thread::spawn(move || served.accept().unwrap().1.ip().to_string());
    within(&outside.path(), || {
        TcpStream::connect_timeout(&"198.51.100.1:8080".parse().unwrap(), Duration::from_secs(5)).unwrap();
    });
    // Who asks from outside is seen as he is.
    assert_eq!(client.join().unwrap(), "198.51.100.2");
    host.runx(&["network", "detach", "c"]).ok();
    host.ip("link delete wan");
    host.assert_nothing_left();
}

#[test]
fn published_ports_on_the_loopback_address_open_nothing_else_there() {
    needs_bridges!();
    let host = Host::new();
    let attached = host.attach("c", &["-p", "127.0.0.1:8080:80"]);
    let private = within(&host.path(), || TcpListener::bind("127.0.0.1:7000")).unwrap();
    let gateway = attached["gateway"].as_str().unwrap();
    // A container that sends what is for 127.0.0.1 out to the host, as one can that makes its own packets.
    let inside = |words: &str| {
        let mut words = words.split(' ');
        let mut command = std::process::Command::new(words.next().unwrap());
        within(netns(&attached), || run(command.args(words)).ok());
    };
    inside("ip addr del 127.0.0.1/8 dev lo");
    inside(&format!("ip route add 127.0.0.1 via {gateway} dev eth0"));
    within(netns(&attached), || std::fs::write("/proc/sys/net/ipv4/conf/eth0/route_localnet", "1").unwrap());
    let reaches = || {
        within(netns(&attached), || {
            TcpStream::connect_timeout(&"127.0.0.1:7000".parse().unwrap(), Duration::from_millis(700)).is_ok()
        })
    };
    assert!(!reaches());
    // It was the host's rule.
    run(host.command("iptables").args(["-F", "INPUT"])).ok();
    assert!(reaches());
    drop(private);
    host.runx(&["network", "check", "c"]).fails(1, &["rules"]);
    host.runx(&["network", "detach", "c"]).ok();
    host.assert_nothing_left();
}

#[test]
fn nothing_is_left_whenever_the_one_who_attaches_is_killed() {
    needs_bridges!();
    let host = Host::new();
    let mut random = Random::seeded("attach");
    let mut unfinished = 0;
    for _ in 0..runx_tests::repeats(10) {
        let mut child = host
            .runx_command(&["network", "attach", "c", "-p", "8080:80"])
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(random.moment(Duration::from_millis(150)));
        child.kill().unwrap();
        unfinished += u32::from(!child.wait().unwrap().success());
        host.runx(&["network", "detach", "c"]).ok();
        host.assert_nothing_left();
        // And so where the one who detaches is killed, too.
        host.attach("c", &["-p", "8080:80"]);
        let mut child = host.runx_command(&["network", "detach", "c"]).spawn().unwrap();
        std::thread::sleep(random.moment(Duration::from_millis(100)));
        child.kill().unwrap();
        child.wait().unwrap();
        host.runx(&["network", "detach", "c"]).ok();
        host.assert_nothing_left();
    }
    assert!(unfinished > 0, "nobody was killed in time");
}

#[test]
fn an_attached_container_that_is_attached_again_stays_as_it_is_and_a_broken_one_is_made_anew() {
    needs_bridges!();
    let host = Host::new();
    let first = host.attach("c", &["-p", "80"]);
    assert_ne!(first["ports"][0]["hostPort"], 0);
    assert_eq!(host.attach("c", &["-p", "80"]), first);
    within(netns(&first), || run(std::process::Command::new("ip").args(["link", "delete", "eth0"])).ok());
    host.runx(&["network", "check", "c"]).fails(1, &["\"c\"", "CHECK"]);
    let second = host.attach("c", &["-p", "80"]);
    host.runx(&["network", "check", "c"]).ok();
    // What a container does to its own interface keeps nothing from being removed.
    let foreign = "addr flush dev eth0; addr add 10.99.0.1/24 dev eth0; link set eth0 name other";
    for words in foreign.split("; ") {
        within(netns(&second), || run(std::process::Command::new("ip").args(words.split(' '))).ok());
    }
    host.runx(&["network", "detach", "c"]).ok();
    host.runx(&["network", "detach", "c", "never-there"]).ok();
    host.assert_nothing_left();
    // Nor what others do to the host.
    host.attach("c", &["-p", "8080:80"]);
    run(host.command("iptables").args(["-t", "nat", "-F"])).ok();
    host.runx(&["network", "check", "c"]).fails(1, &["rules"]);
    host.ip("link delete runx0");
    host.runx(&["network", "detach", "c"]).ok();
    host.assert_nothing_left();
}

#[test]
fn many_at_once_get_addresses_of_their_own() {
    needs_bridges!();
    let host = Host::new();
    let ids: Vec<_> = (0..8).map(|i| format!("c{i}")).collect();
    let attached: Vec<_> = std::thread::scope(|scope| {
        let all: Vec<_> = ids.iter().map(|id| scope.spawn(|| address(&host.attach(id, &["-p", "80"])))).collect();
        all.into_iter().map(|one| one.join().unwrap()).collect()
    });
    let unique: std::collections::BTreeSet<_> = attached.iter().collect();
    assert_eq!(unique.len(), ids.len(), "{attached:?}");
    assert_eq!(
        host.runx(&["network", "ls", "-q"]).ok().stdout,
        ids.iter().map(|id| format!("{id}\n")).collect::<String>()
    );
    std::thread::scope(|scope| {
        for id in &ids {
            scope.spawn(|| host.runx(&["network", "detach", id]).ok());
        }
    });
    host.assert_nothing_left();
}

#[test]
fn subnets_and_ports_that_are_taken_are_not_given() {
    needs_bridges!();
    let host = Host::new();
    host.ip("link add other type bridge");
    host.ip("addr add 10.87.0.1/16 dev other");
    host.ip("link set other up");
    assert!(address(&host.attach("a", &["-p", "8080:80"])).starts_with("10.86."));
    host.runx(&["network", "attach", "b", "-p", "8080:80"]).fails(1, &["8080", "\"a\""]);
    let busy = within(&host.path(), || TcpListener::bind("0.0.0.0:8081")).unwrap();
    host.runx(&["network", "attach", "b", "-p", "8081:80"]).fails(1, &["8081", "listens there"]);
    drop(busy);
    host.runx(&["network", "attach", "b", "-p", "8081:80", "-p", "8081:81"]).fails(1, &["8081", "twice"]);
    // Another protocol's port is another one.
    host.attach("b", &["-p", "8080:80/udp"]);
    // The subnet of a bridge that is used does not change under it.
    host.configure("subnet = \"10.77.0.0/24\"");
    host.runx(&["network", "attach", "c"]).fails(1, &["10.86.0.0/16", "network.subnet"]);
    host.runx(&["network", "detach", "a", "b"]).ok();
    host.assert_nothing_left();
    assert!(address(&host.attach("c", &[])).starts_with("10.77.0."));
    host.runx(&["network", "detach", "c"]).ok();
    host.configure("subnet = \"10.87.9.0/24\"");
    host.runx(&["network", "attach", "c"]).fails(1, &["10.87.9.0/24", "other", "network.subnet"]);
    host.assert_nothing_left();
}

#[test]
fn a_bridge_stays_for_the_next_container_until_it_is_pruned() {
    needs_bridges!();
    let host = Host::with("keep = true");
    let first = host.attach("a", &[]);
    host.runx(&["network", "prune"]).fails(1, &["runx0", " a:"]);
    host.runx(&["network", "detach", "a"]).ok();
    let link = || host.ip("-oneline link show dev runx0").split(':').next().unwrap().to_owned();
    let before = link();
    let second = host.attach("b", &["-p", "8080:80"]);
    assert_eq!((link(), &second["gateway"]), (before, &first["gateway"]));
    host.runx(&["network", "check", "b"]).ok();
    host.runx(&["network", "detach", "b"]).ok();
    // Another range is asked for, or the host has got a route to this one: it is made anew.
    host.configure("keep = true\nsubnet = \"10.55.0.0/24\"");
    assert_eq!(host.attach("c", &[])["gateway"], "10.55.0.1");
    host.runx(&["network", "detach", "c"]).ok();
    host.configure("keep = true");
    host.ip("link add other type bridge");
    host.ip("addr add 10.55.0.9/24 dev other");
    host.ip("link set other up");
    assert_ne!(host.attach("d", &[])["gateway"], "10.55.0.1");
    host.runx(&["network", "detach", "d"]).ok();
    assert_eq!(host.runx(&["network", "prune"]).ok().stdout, "runx0\n");
    assert_eq!(host.runx(&["network", "prune"]).ok().stdout, "");
    host.assert_nothing_left();
}

#[test]
fn a_bridge_that_was_there_before_stays() {
    needs_bridges!();
    let host = Host::with("bridge = \"lan\"\nsubnet = \"10.66.0.0/24\"\nmtu = 1400");
    host.ip("link add lan type bridge");
    host.ip("addr add 10.66.0.1/24 dev lan");
    let attached = host.attach("c", &[]);
    let shown =
        within(netns(&attached), || run(std::process::Command::new("ip").args(["link", "show", "eth0"])).ok().stdout);
    assert!(shown.contains("mtu 1400"), "{shown}");
    host.runx(&["network", "detach", "c"]).ok();
    assert!(host.ip("addr show dev lan").contains("10.66.0.1/24"));
    host.assert_nothing_left();
}

#[test]
fn what_is_missing_is_told_with_how_to_get_it() {
    needs_bridges!();
    let host = Host::with("plugins = [\"/no/such\"]");
    host.runx(&["network", "attach", "c"])
        .fails(1, &["bridge", "/no/such", "containernetworking-plugins", "network.plugins"]);
    host.assert_nothing_left();
    // A plugin that fails is told in its own words, and what those before it made is removed.
    host.configure("chain = [{ type = \"tuning\", sysctl = { \"net.no.such\" = \"1\" } }]");
    host.runx(&["network", "attach", "c"]).fails(1, &["CNI plugin tuning, ADD", "net/no/such"]);
    host.assert_nothing_left();
    for (words, wanted) in [
        (&["--network", "none", "-p", "80"][..], &["--network bridge"][..]),
        (&["--network", "host", "-p", "80"], &["--network bridge"]),
        (&["--network", "vlan"], &["vlan", "bridge, none, host or container:ID"]),
        (&["--network", "container:nobody"], &["nobody"]),
        (&["-p", "80/ftp"], &["ftp"]),
    ] {
        host.runx(&[&["network", "attach", "c"], words].concat()).fails(1, wanted);
    }
    assert!(host.attach("c", &["--network", "none"])["netns"].is_null());
    host.assert_nothing_left();
}

#[test]
fn a_container_shares_anothers_network() {
    needs_bridges!();
    let host = Host::new();
    let (one, attached) = host.container("sleep 100", &[]);
    // It is below the bundle's own root.
    let root = one.state_root();
    let shared = |of: &str| {
        let target = format!("container:{of}");
        let args =
            ["--root", root.to_str().unwrap(), "network", "attach", "other", "--network", &target, "--format", "json"];
        let done = host.runx(&args).ok();
        serde_json::from_str::<Value>(&done.stdout).unwrap()
    };
    let inode = |path: &Path| std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(path).unwrap());
    let namespace = shared(one.id());
    assert_eq!(inode(netns(&namespace)), inode(netns(&attached)));
    one.runx(&["kill", one.id(), "KILL"]).ok();
    eventually("it has ended", || one.state()["status"] == "stopped");
    let target = format!("container:{}", one.id());
    let args = ["--root", root.to_str().unwrap(), "network", "attach", "other", "--network", &target];
    host.runx(&args).fails(1, &[one.id(), "does not run"]);
    host.runx(&["network", "detach", one.id()]).ok();
    host.assert_nothing_left();
}
