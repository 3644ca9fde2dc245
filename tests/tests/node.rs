//! `runx-node` on machines with real containerds: the one that is installed, and those of `RUNX_CONTAINERDS`.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Stdio};

use runx_tests::command::eventually;
use runx_tests::machine::{self, CONFIG, Cluster, HANDLER, Killed, Machine, Package, packages, run_until};
use runx_tests::{rounds, skip, skip_outside_machine};
use serde_json::Value;

macro_rules! needs_machine {
    () => {
        if let Some(why) = machine::obstacle() {
            skip_outside_machine(&why);
            return;
        }
    };
}

/// All containerds; it is said aloud if there is only the installed one.
fn every_package() -> Vec<Package> {
    let all = packages();
    if all.len() < 2 {
        skip("other containerds than the installed one: RUNX_CONTAINERDS names none");
    }
    all
}

fn one_package() -> Package {
    packages().remove(0)
}

/// The head of a configuration whose containerd runs anywhere, and the key of CRI's table.
fn head(version: i64) -> (String, &'static str) {
    let cri = match version {
        1 => "cri",
        2 => "io.containerd.grpc.v1.cri",
        _ => "io.containerd.cri.v1.runtime",
    };
    let first = if version == 1 { String::new() } else { format!("version = {version}\n") };
    (format!("# The node's own.\n{first}"), cri)
}

/// As it is on most nodes: with runc, and with a setting that must not be lost.
fn usual(version: i64, imports: &str) -> String {
    let (head, cri) = head(version);
    let image = if version < 3 {
        format!("[plugins.\"{cri}\"]\n  sandbox_image = \"{}\"   # ours\n", machine::PAUSE)
    } else {
        format!("[plugins.\"io.containerd.cri.v1.images\".pinned_images]\n  sandbox = '{}'\n", machine::PAUSE)
    };
    format!(
        "{head}{imports}{image}\n[plugins.\"{cri}\".containerd.runtimes.runc]\n  runtime_type = \"io.containerd.runc.v2\"\n  \
         [plugins.\"{cri}\".containerd.runtimes.runc.options]\n    SystemdCgroup = false\n\
         [plugins.\"io.containerd.nri.v1.nri\"]\n  disable = true\n[plugins.\"{cri}\".cni]\n  conf_dir = '/etc/cni/net.d'"
    )
}

const IMPORTS: &str = "imports = [\"/etc/containerd/conf.d/*.toml\"]\n";

/// Main files that a containerd may have, and what they are called here.
fn configurations(package: &Package) -> Vec<(&'static str, Option<String>)> {
    let mut all = vec![
        ("no main file", None),
        ("version 2 with runc", Some(usual(2, ""))),
        ("version 2 with nothing", Some("version = 2\n".to_owned())),
        ("version 2 with a directory of drop-ins", Some(usual(2, IMPORTS))),
    ];
    if package.version < (2, 0) {
        let (head, cri) = head(1);
        all.push(("version 1", Some(format!("{head}[plugins.{cri}]\n  sandbox_image = 'x'\n"))));
        all.push((
            "version 2 in one line",
            Some("version = 2\nplugins = {\"io.containerd.grpc.v1.cri\" = {sandbox_image = 'x', containerd = {default_runtime_name = \
                  'runc', runtimes = {runc = {runtime_type = 'io.containerd.runc.v2'}}}}} # all\n".to_owned()),
        ));
    } else {
        all.push(("version 3 with runc", Some(usual(3, ""))));
        all.push(("version 3 with a directory of drop-ins", Some(usual(3, IMPORTS))));
        all.push(("version 3 with nothing", Some("version = 3\n".to_owned())));
    }
    if package.version >= (2, 3) {
        all.push(("version 4", Some(usual(4, IMPORTS))));
    }
    all
}

fn started(package: &Package, name: &str, config: Option<&str>) -> Machine {
    eprintln!("containerd {}.{}: {name}", package.version.0, package.version.1);
    let machine = Machine::start(package, config);
    machine.set_programs("one");
    machine
}

fn status(machine: &Machine) -> Value {
    let done = machine.node(&["status", "--format", "json"]);
    serde_json::from_str(&done.stdout).unwrap_or_else(|e| panic!("{e}: {} {}", done.stdout, done.stderr))
}

#[track_caller]
fn serves(machine: &Machine, expected: bool) {
    let handlers = machine.handlers().expect("containerd is ready for pods");
    assert!(handlers.contains(&"runc".to_owned()), "{handlers:?}");
    assert_eq!(handlers.contains(&HANDLER.to_owned()), expected, "{handlers:?}");
}

#[test]
fn it_is_installed_once_upgraded_without_a_restart_and_leaves_every_byte_as_it_was() {
    needs_machine!();
    for package in every_package() {
        for (name, config) in configurations(&package) {
            let machine = started(&package, name, config.as_deref());
            let (before, restarts) = (machine.changeable(), machine.restarts());
            serves(&machine, false);
            assert_eq!(machine.node(&["status"]).code, 3);

            let done = machine.node(&["install"]).ok();
            assert!(done.stdout.contains("containerd was restarted"), "{}", done.stdout);
            serves(&machine, true);
            assert_eq!(machine.restarts(), restarts + 1);
            assert_eq!(machine.node(&["status"]).ok().code, 0);
            let installed = machine.changeable();

            let done = machine.node(&["install"]).ok();
            assert!(done.stdout.contains("containerd was not restarted"), "{}", done.stdout);
            assert_eq!(machine.changeable(), installed, "a second installation changes nothing");
            assert_eq!(machine.restarts(), restarts + 1);

            let old = fs::read_link(machine.root().join("opt/runx/current")).expect("there is a link");
            machine.set_programs("two");
            machine.node(&["install"]).ok();
            assert_ne!(fs::read_link(machine.root().join("opt/runx/current")).expect("there is a link"), old);
            assert_eq!(machine.restarts(), restarts + 1, "an upgrade restarts nothing");
            assert_eq!(
                machine.files("etc"),
                installed
                    .iter()
                    .filter(|(path, _)| path.starts_with(machine.root().join("etc")))
                    .map(|(path, file)| (path.clone(), file.clone()))
                    .collect()
            );

            machine.node(&["uninstall"]).ok();
            assert_eq!(machine.restarts(), restarts + 2);
            serves(&machine, false);
            assert_eq!(machine.changeable(), before);
            assert_eq!(machine.node(&["status"]).code, 3);
            assert!(machine.node(&["uninstall"]).ok().stdout.contains("nothing to do"));
            assert_eq!(machine.changeable(), before);
            machine.assert_only_containerd();
        }
    }
}

#[test]
fn the_handler_has_the_kubelets_cgroup_driver_and_the_annotations() {
    needs_machine!();
    for package in every_package() {
        let machine =
            started(&package, "systemd", Some(&usual(2, "").replace("SystemdCgroup = false", "SystemdCgroup = true")));
        machine.node(&["install"]).ok();
        let text = machine.read(CONFIG);
        if package.version < (1, 7) {
            assert!(text.contains("ConfigPath = \"/opt/runx/current/systemd-cgroup.toml\""), "{text}");
            assert_eq!(machine.read("opt/runx/current/systemd-cgroup.toml"), "SystemdCgroup = true\n");
        } else {
            assert_eq!(text.matches("SystemdCgroup = true").count(), 2, "{text}");
        }
        assert!(text.contains("pod_annotations = [\"runx.dev/*\"]"), "{text}");
        assert!(text.contains("runtime_path = \"/opt/runx/current/containerd-shim-runx-v1\""), "{text}");
        // 2.0 and 2.1 ask only runtimes of runc's type for what they can do, and 1.6 takes a path only so.
        let kind = match package.version {
            (1, ..=6) => "/opt/runx/current/containerd-shim-runx-v1",
            (2, 0 | 1) => "io.containerd.runc.v2",
            _ => "io.containerd.runx.v1",
        };
        assert!(text.contains(&format!("runtime_type = \"{kind}\"\n  runtime_path")), "{text}");
        assert_eq!(
            fs::metadata(machine.root().join(CONFIG))
                .map(|it| std::os::unix::fs::PermissionsExt::mode(&it.permissions()) & 0o777)
                .ok(),
            Some(0o640)
        );
    }
}

#[test]
fn a_main_file_that_somebody_changed_meanwhile_keeps_that_change() {
    needs_machine!();
    let machine = started(&one_package(), "changed", Some(&usual(2, "")));
    machine.node(&["install"]).ok();
    let more = "\n[debug]\n  level = \"info\"\n";
    machine.write(CONFIG, &(machine.read(CONFIG) + more));
    assert!(status(&machine)["drift"].as_str().is_some_and(|drift| drift.contains("was changed")));
    machine.node(&["uninstall"]).ok();
    let left = machine.read(CONFIG);
    assert!(left.starts_with(&usual(2, "")) && left.ends_with(more) && !left.contains("runtimes.runx"), "{left}");
    machine.restart();
    serves(&machine, false);
}

#[test]
fn a_node_that_cannot_be_installed_on_is_left_alone() {
    needs_machine!();
    for package in every_package() {
        let old = package.version < (2, 0);
        let (head, cri) = head(2);
        let mut cases = vec![
            ("no TOML", "version = 2\n[plugins\n".to_owned(), vec!["is no TOML", "config.toml"]),
            ("another version", "version = 9\n".to_owned(), vec!["version = 9"]),
            ("CRI is off", format!("{head}disabled_plugins = [\"{cri}\"]\n"), vec!["CRI plugin is switched off"]),
            (
                "a value of another type",
                format!("{head}[plugins.\"{cri}\"]\n  enable_selinux = \"perhaps\"\n"),
                vec!["does not read its own configuration"],
            ),
            ("an import that is missing", format!("{head}imports = [\"/nosuch.toml\"]\n"), vec!["nosuch.toml"]),
            (
                "somebody else's handler",
                format!("{head}[plugins.\"{cri}\".containerd.runtimes.runx]\n  runtime_type = \"x\"\n"),
                vec!["\"runx\"", "not by runx-node"],
            ),
        ];
        if old {
            cases.push(("version 3", "version = 3\n".to_owned(), vec!["version 3", "reads up to 2"]));
        } else {
            cases.push(("version 1", "[plugins.cri]\n".to_owned(), vec!["containerd config migrate"]));
        }
        for (name, config, words) in cases {
            eprintln!("containerd {}.{}: {name}", package.version.0, package.version.1);
            // containerd would not start, and need not.
            let machine = Machine::prepare(&package, Some(&config));
            machine.set_programs("one");
            let before = machine.files("etc");
            machine.node(&["install"]).fails(1, &words);
            assert_eq!(machine.files("etc"), before, "{name}");
            assert_eq!(machine.restarts(), 0, "{name}");
        }
    }
}

#[test]
fn drop_ins_that_would_take_runc_away_are_never_written() {
    needs_machine!();
    for package in every_package() {
        let machine = started(&package, "drop-ins", Some(&usual(2, IMPORTS)));
        machine.node(&["install"]).ok();
        let drop_in = machine.root().join("etc/containerd/conf.d/runx.toml").exists();
        assert_eq!(drop_in, package.version >= (2, 0));
        if drop_in {
            assert_eq!(machine.read(CONFIG), usual(2, IMPORTS));
            assert!(machine.read("etc/containerd/conf.d/runx.toml").contains("version = 2\n"), "as the main file");
        }
        serves(&machine, true);
    }
    // Where somebody's drop-in replaces CRI's table already, ours in the main file would be nothing.
    let package = one_package();
    if package.version < (2, 0) {
        let machine = Machine::prepare(&package, Some(&usual(2, IMPORTS)));
        let (head, cri) = head(2);
        machine.write(
            "etc/containerd/conf.d/other.toml",
            &format!("{head}[plugins.\"{cri}\"]\n  sandbox_image = \"y\"\n"),
        );
        machine.restart();
        machine.set_programs("one");
        let (before, restarts) = (machine.files("etc"), machine.restarts());
        machine.node(&["install"]).fails(1, &["nothing was changed"]);
        assert_eq!((machine.files("etc"), machine.restarts()), (before, restarts));
    }
}

#[test]
fn a_containerd_that_does_not_start_gets_its_files_back_and_serves_runc() {
    needs_machine!();
    for package in every_package() {
        let imports = if package.version < (2, 0) { "" } else { IMPORTS };
        let machine = started(&package, "sabotage", Some(&usual(2, imports)));
        let cluster = Cluster::start();
        let flags = cluster.flags();
        let install: Vec<&str> =
            ["install", "--timeout", "5"].into_iter().chain(flags.iter().map(String::as_str)).collect();
        let (before, restarts) = (machine.files("etc"), machine.restarts());
        machine.sabotage(true);
        for attempt in 1..=2 {
            machine.node(&install).fails(1, &["its configuration was restored", "restart containerd"]);
            assert_eq!(machine.files("etc"), before);
            serves(&machine, false);
            assert_eq!(machine.restarts(), restarts + 2 * attempt);
        }
        assert_eq!(status(&machine)["state"], "failed");
        // No loop of restarts.
        machine.node(&install).fails(1, &["2 times", "--force"]);
        assert_eq!(machine.restarts(), restarts + 4);
        assert_eq!(cluster.label("runx.dev/ready"), ["installing", "failed", "installing", "failed"]);
        machine.sabotage(false);
        machine.node(&[&install[..], &["--force"]].concat()).ok();
        serves(&machine, true);
        assert_eq!(cluster.label("runx.dev/ready").last(), Some(&"true".into()));
        machine.node(&["uninstall"]).ok();
        assert_eq!(machine.files("etc"), before);
    }
}

#[test]
fn a_containerd_that_reads_another_file_is_found_out() {
    needs_machine!();
    let machine = Machine::prepare(&one_package(), Some(&usual(2, "")));
    machine.set_programs("one");
    machine.write("etc/other.toml", &usual(2, ""));
    fs::write(machine.path().join("config"), "/etc/other.toml").expect("write a file");
    machine.restart();
    let before = machine.files("etc");
    machine.node(&["install", "--timeout", "2"]).fails(1, &["after 2 s", "does not serve the handler \"runx\""]);
    assert_eq!(machine.files("etc"), before);
    machine.node(&["install", "--containerd-config", "/etc/other.toml"]).ok();
    serves(&machine, true);
}

#[test]
fn a_containerd_that_is_down_is_not_restarted_where_nothing_is_to_be_changed() {
    needs_machine!();
    let machine = started(&one_package(), "down", Some(&usual(2, "")));
    machine.node(&["install"]).ok();
    let restarts = machine.restarts();
    machine.stop();
    machine.node(&["install", "--timeout", "1"]).fails(1, &["containerd does not answer within 1 s"]);
    assert_eq!(machine.restarts(), restarts);
    machine.restart();
    machine.node(&["install"]).ok();
    assert_eq!(machine.restarts(), restarts + 1, "by the test alone");
}

/// Kills a command at its steps, one after the other, and lets it be done again.
fn kill_at_each_step(machine: &Machine, command: &[&str], begin: impl Fn(), end: impl Fn(&str)) {
    let stride = std::env::var_os("RUNX_ROUNDS").map_or(11, |_| 1);
    // A sample begins at another one of the first steps each time, so that all are met in the end.
    let first = std::process::id() as usize % stride;
    let mut count = 0;
    for nth in (first..).step_by(stride) {
        begin();
        match run_until(&mut machine.command(command), nth).expect("follow the installer") {
            Killed::Ended(code) => {
                assert_eq!(code, 0, "{}", machine.log());
                break;
            }
            Killed::At(step) => {
                count += 1;
                machine.node(command).ok();
                end(&format!("killed before step {nth}, {step}"));
            }
        }
    }
    eprintln!("{command:?}: killed at {count} steps");
    assert!(count * stride >= 60, "there are more steps than {}", count * stride);
}

#[test]
fn an_installation_that_is_killed_at_any_step_is_completed_by_the_next() {
    needs_machine!();
    for package in every_package() {
        let imports = if package.version < (2, 0) { "" } else { IMPORTS };
        let machine = started(&package, "killed while installing", Some(&usual(2, imports)));
        let before = machine.changeable();
        kill_at_each_step(
            &machine,
            &["install"],
            || {
                machine.node(&["uninstall"]).ok();
                assert_eq!(machine.changeable(), before);
            },
            |step| {
                assert_eq!(machine.node(&["status"]).code, 0, "{step}: {}", status(&machine));
                serves(&machine, true);
                let left: Vec<_> = machine
                    .changeable()
                    .into_keys()
                    .filter(|path| path.to_string_lossy().contains(".runx-new"))
                    .collect();
                assert!(left.is_empty(), "{step}: {left:?}");
                // Nothing is left to do.
                let restarts = machine.restarts();
                machine.node(&["install"]).ok();
                assert_eq!(machine.restarts(), restarts, "{step}");
            },
        );
    }
}

#[test]
fn an_uninstallation_that_is_killed_at_any_step_is_completed_by_the_next() {
    needs_machine!();
    for package in every_package() {
        let imports = if package.version < (2, 0) { "" } else { IMPORTS };
        let machine = started(&package, "killed while uninstalling", Some(&usual(2, imports)));
        let before = machine.changeable();
        kill_at_each_step(
            &machine,
            &["uninstall"],
            || drop(machine.node(&["install"]).ok()),
            |step| {
                assert_eq!(machine.changeable(), before, "{step}");
                serves(&machine, false);
            },
        );
    }
}

#[test]
fn a_rollback_that_is_killed_at_any_step_is_completed_by_the_next() {
    needs_machine!();
    let machine = started(&one_package(), "killed while rolling back", Some(&usual(2, "")));
    let before = machine.files("etc");
    let command = ["install", "--timeout", "5", "--force"];
    let stride = std::env::var_os("RUNX_ROUNDS").map_or(23, |_| 1);
    for nth in (std::process::id() as usize % stride..).step_by(stride) {
        machine.sabotage(true);
        let killed = run_until(&mut machine.command(&command), nth).expect("follow the installer");
        // Whatever it was killed at: as long as it cannot be, all is as it was, and then it is installed.
        machine.node(&command).fails(1, &["restored"]);
        assert_eq!(machine.files("etc"), before, "{killed:?} at {nth}");
        serves(&machine, false);
        machine.sabotage(false);
        machine.node(&command).ok();
        serves(&machine, true);
        machine.node(&["uninstall"]).ok();
        assert_eq!(machine.files("etc"), before, "{killed:?} at {nth}");
        if let Killed::Ended(code) = killed {
            assert_eq!(code, 1);
            break;
        }
    }
}

#[test]
fn pods_outlive_an_upgrade_and_keep_their_programs_and_nobody_uninstalls_under_them() {
    needs_machine!();
    for package in every_package() {
        let config = usual(2, "").replace(
            "[plugins.\"io.containerd.nri",
            "[plugins.\"io.containerd.grpc.v1.cri\"]\n  restrict_oom_score_adj = true\n[plugins.\"io.containerd.nri",
        );
        // One table, one head.
        let config = config
            .replacen("[plugins.\"io.containerd.grpc.v1.cri\"]\n  restrict_oom_score_adj = true\n", "", 1)
            .replacen(
                "[plugins.\"io.containerd.grpc.v1.cri\"]\n",
                "[plugins.\"io.containerd.grpc.v1.cri\"]\n  restrict_oom_score_adj = true\n",
                1,
            );
        let machine = started(&package, "pods", Some(&config));
        machine.import_image();
        machine.set_real_programs("one");
        let before = machine.changeable();
        machine.node(&["install"]).ok();
        let plain = machine.run_pod("plain", "runc");
        let ours = machine.run_pod("ours", HANDLER);
        let restarts = machine.restarts();

        machine.set_real_programs("two");
        machine.node(&["install"]).ok();
        assert_eq!(machine.restarts(), restarts);
        assert!(machine.pod_is_ready(&plain) && machine.pod_is_ready(&ours));
        let newer = machine.run_pod("newer", HANDLER);
        let used = |machine: &Machine| {
            let sets = status(machine)["programs"].as_array().cloned().expect("there are programs");
            sets.iter().filter(|set| set["inUse"] == true).count()
        };
        assert_eq!(used(&machine), 2, "each pod has its own programs: {}", status(&machine));

        machine.node(&["uninstall"]).fails(1, &["2 running pods", "test/newer, test/ours", "--force"]);
        serves(&machine, true);
        machine.remove_pod(&ours);
        eventually("its shim ends", || used(&machine) == 1);
        // Just after a change nothing goes; the link's age is what counts.
        let link = machine.root().join("opt/runx/current");
        let past = [nix::sys::time::TimeSpec::new(1, 0); 2];
        let flags = nix::sys::stat::UtimensatFlags::NoFollowSymlink;
        nix::sys::stat::utimensat(nix::fcntl::AT_FDCWD, &link, &past[0], &past[1], flags).expect("make the link older");
        machine.node(&["install"]).ok();
        assert_eq!(status(&machine)["programs"].as_array().map(Vec::len), Some(1), "what nobody uses goes");

        let done = machine.node(&["uninstall", "--force"]).ok();
        assert!(done.stdout.contains("1 sets of programs"), "{}", done.stdout);
        assert!(machine.pod_is_ready(&newer) && machine.pod_is_ready(&plain));
        machine.remove_pod(&newer);
        machine.remove_pod(&plain);
        eventually("its shim ends", || used(&machine) == 0);
        machine.node(&["uninstall"]).ok();
        assert_eq!(machine.changeable(), before);
        machine.assert_only_containerd();
    }
}

#[test]
fn labels_are_set_last_and_a_cluster_that_refuses_stops_everything_before() {
    needs_machine!();
    let machine = started(&one_package(), "labels", Some(&usual(2, "")));
    let cluster = Cluster::start();
    let flags = cluster.flags();
    let with = |words: &[&'static str]| -> Vec<String> {
        words.iter().map(|word| (*word).to_owned()).chain(flags.clone()).collect()
    };
    let node = |words: &[&'static str]| machine.node(&with(words).iter().map(String::as_str).collect::<Vec<_>>());
    let (before, restarts) = (machine.files("etc"), machine.restarts());
    cluster.refuse(true);
    node(&["install"]).fails(1, &["403", "not this one"]);
    assert_eq!((machine.files("etc"), machine.restarts()), (before, restarts));
    cluster.refuse(false);
    node(&["install"]).ok();
    assert_eq!(cluster.label("runx.dev/ready"), ["installing", "true"]);
    machine.set_programs("two");
    node(&["install"]).ok();
    assert_eq!(cluster.label("runx.dev/ready"), ["installing", "true", "true"], "an upgrade turns nobody away");
    node(&["uninstall"]).ok();
    assert_eq!(cluster.label("runx.dev/ready").last(), Some(&Value::Null));
    assert_eq!(cluster.label("runx.dev/version").last(), Some(&Value::Null));
    let done = machine.node(&["install", "--node-name", "one", "--api", "http://127.0.0.1:1", "--account", "/nosuch"]);
    done.fails(1, &["/nosuch/token"]);
}

/// `runx-node run`, ended when this goes.
struct Running {
    child: Child,
    address: String,
}

impl Running {
    fn start(machine: &Machine, words: &[&str]) -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("find a port");
        let address = listener.local_addr().expect("it has an address").to_string();
        drop(listener);
        let mut command =
            machine.command(&[&["run", "--listen", &address, "--interval", "1", "--timeout", "5"], words].concat());
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().expect("start runx-node");
        Self { child, address }
    }

    fn get(&self, path: &str) -> (u16, String) {
        let Ok(mut stream) = TcpStream::connect(&self.address) else { return (0, String::new()) };
        let _ = stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: node\r\n\r\n").as_bytes());
        let mut text = String::new();
        let _ = stream.read_to_string(&mut text);
        let code = text.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or(0);
        (code, text.split_once("\r\n\r\n").map_or(String::new(), |(_, body)| body.to_owned()))
    }

    fn end(&mut self) -> Option<i32> {
        // SAFETY: only a signal, to a child that is not reaped.
        unsafe { libc::kill(self.child.id() as i32, libc::SIGTERM) };
        self.child.wait().expect("wait for it").code()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn the_daemon_tells_how_it_is_repairs_drift_and_leaves_runx_when_it_ends() {
    needs_machine!();
    let machine = started(&one_package(), "daemon", Some(&usual(2, "")));
    let mut running = Running::start(&machine, &[]);
    eventually("it is ready", || running.get("/readyz").0 == 200);
    assert_eq!(running.get("/healthz").0, 200);
    assert_eq!(running.get("/other").0, 404);
    let (_, metrics) = running.get("/metrics");
    for line in [
        "runx_install_state{state=\"installed\"} 1",
        "runx_install_state{state=\"failed\"} 0",
        "runx_handler_registered{handler=\"runx\"} 1",
        "runx_config_drift 0",
        "runx_containerd_restarts_total{reason=\"install\"} 1",
        "runx_install_rollbacks_total 0",
        "runx_containers{kind=\"native\",state=\"started\"} 0",
    ] {
        assert!(metrics.lines().any(|found| found == line), "{line}: {metrics}");
    }
    assert!(
        metrics.contains("distro=\"kubeadm\"") && metrics.contains("runx_install_duration_seconds{phase=\"restart\"}")
    );

    // Somebody else writes the file anew.
    machine.write(CONFIG, &usual(2, ""));
    machine.restart();
    eventually("it is repaired", || machine.handlers().is_some_and(|handlers| handlers.contains(&HANDLER.to_owned())));
    eventually("it says so", || {
        running.get("/metrics").1.contains("runx_containerd_restarts_total{reason=\"drift\"} 1")
    });
    eventually("it is ready", || running.get("/readyz").0 == 200);

    assert_eq!(running.end(), Some(0));
    serves(&machine, true);
    machine.node(&["uninstall"]).ok();
    assert_eq!(machine.read(CONFIG), usual(2, ""));
}

#[test]
fn the_daemon_takes_runx_away_when_it_is_asked_to() {
    needs_machine!();
    let machine = started(&one_package(), "taken away", Some(&usual(2, "")));
    machine.node(&["install"]).ok();
    let mut running = Running::start(&machine, &["--uninstall"]);
    eventually("it is done", || running.get("/readyz").0 == 200);
    serves(&machine, false);
    assert_eq!(machine.read(CONFIG), usual(2, ""));
    assert!(running.get("/metrics").1.contains("runx_install_state{state=\"absent\"} 1"));
    assert_eq!(running.end(), Some(0));
}

#[test]
fn the_daemon_is_not_ready_while_the_node_is_broken_and_says_why() {
    needs_machine!();
    let machine = started(&one_package(), "broken", Some(&usual(2, "")));
    machine.sabotage(true);
    let mut running = Running::start(&machine, &[]);
    eventually("it has given up", || running.get("/readyz").1.contains("its configuration was restored"));
    assert_eq!((running.get("/readyz").0, running.get("/healthz").0), (503, 200));
    eventually("it says so", || running.get("/metrics").1.contains("runx_install_rollbacks_total 1"));
    assert_eq!(running.end(), Some(0));
    serves(&machine, false);
}

#[test]
fn drop_ins_of_k3s_go_where_its_own_file_imports_them_and_an_older_one_is_refused() {
    needs_machine!();
    let k3s = "var/lib/rancher/k3s/agent/etc/containerd";
    for package in every_package() {
        let directory = format!("/{k3s}/config-v3.toml.d/*.toml");
        let imports = format!("imports = [\"{directory}\"]\n");
        for with in [true, false] {
            let version = if package.version < (2, 0) { 2 } else { 3 };
            let machine = Machine::prepare(&package, None);
            machine.write(&format!("{k3s}/config.toml"), &usual(version, if with { &imports } else { "" }));
            fs::write(machine.path().join("config"), format!("/{k3s}/config.toml")).expect("write a file");
            machine.set_programs("one");
            machine.restart();
            let words = ["--containerd", "/usr/local/bin/containerd", "--socket", "/run/containerd/containerd.sock"];
            let before = machine.files("var/lib/rancher");
            let done = machine.node(&[&["install"], &words[..]].concat());
            if with && package.version >= (2, 0) {
                done.ok();
                serves(&machine, true);
                assert!(machine.read(&format!("{k3s}/config-v3.toml.d/runx.toml")).contains("version = 3"));
                machine.node(&[&["uninstall"], &words[..]].concat()).ok();
            } else {
                done.fails(1, &["k3s", "upgrade k3s"]);
            }
            assert_eq!(machine.files("var/lib/rancher"), before);
        }
    }
}

#[test]
fn two_installers_at_once_do_not_meet() {
    needs_machine!();
    let machine = started(&one_package(), "two at once", Some(&usual(2, "")));
    for _ in 0..rounds(3) {
        let mut children: Vec<Child> = (0..4)
            .map(|_| {
                machine.command(&["install"]).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("start it")
            })
            .collect();
        let mut won = 0;
        for child in &mut children {
            let mut text = String::new();
            let _ = child.stderr.take().expect("it is piped").read_to_string(&mut text);
            match child.wait().expect("wait for it").code() {
                Some(0) => won += 1,
                code => assert!(code == Some(1) && text.contains("another runx-node is at work"), "{code:?}: {text}"),
            }
        }
        assert!(won >= 1);
        serves(&machine, true);
        machine.node(&["uninstall"]).ok();
        assert_eq!(machine.read(CONFIG), usual(2, ""));
    }
}

#[test]
fn flags_that_are_wrong_are_refused_before_anything_is_done() {
    needs_machine!();
    let machine = Machine::prepare(&one_package(), Some(&usual(2, "")));
    machine.set_programs("one");
    for (words, code, word) in [
        (&["install", "--handler", "Runx"][..], 1, "no name of a handler"),
        (&["install", "--handler", "runc"], 1, "containerd's own"),
        (&["install", "--install-dir", "opt"], 1, "no absolute path"),
        (&["install", "--install-dir", "/opt/../etc"], 1, "no absolute path"),
        (&["install", "--timeout", "soon"], 1, "number of seconds"),
        (&["install", "--distribution", "k3s"], 1, "it looks like kubeadm"),
        (&["install", "--containerd", "/nosuch"], 1, "/nosuch"),
        (&["install", "--nosuch"], 2, "--nosuch"),
        (&["status", "--format", "xml"], 1, "table, json"),
    ] {
        machine.node(words).fails(code, &[word]);
    }
    fs::remove_dir_all(machine.path().join("programs")).expect("remove the programs");
    machine.node(&["install"]).fails(1, &["--programs"]);
    assert!(!machine.root().join("opt/runx").exists() && !machine.root().join("var/lib/runx").exists());
    assert!(!Path::new("/opt/runx").exists());
}
