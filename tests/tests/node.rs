//! `runx-node` on machines with real containerds: the one that is installed, and those of `RUNX_CONTAINERDS`.

use std::fs;
use std::path::Path;
use std::process::Command;

use runx_tests::command::{eventually, run};
use runx_tests::machine::{
    CONFIG, Cluster, HANDLER, IMPORTS, Machine, configurations, every_package, head, one_package, serves, started,
    status, usual, usual_for_pods,
};
use runx_tests::needs_machine;
use serde_json::Value;

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
            (2, ..=3) => "io.containerd.runc.v2",
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
fn pods_outlive_an_upgrade_and_keep_their_programs_and_nobody_uninstalls_under_them() {
    needs_machine!();
    for package in every_package() {
        let machine = started(&package, "pods", Some(&usual_for_pods()));
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
fn programs_that_are_not_what_was_built_are_refused_by_name_before_anything_is_done() {
    needs_machine!();
    let machine = Machine::prepare(&one_package(), Some(&usual(2, "")));
    machine.set_programs("one");
    let programs = machine.path().join("programs");
    let sum = |names: &[&str]| {
        let done = run(Command::new("sha256sum").args(names).current_dir(&programs)).ok();
        fs::write(programs.join("SHA256SUMS"), done.stdout).expect("write the sums");
    };
    let refused = |words: &[&str]| {
        machine.node(&["install"]).fails(1, words);
        assert!(!machine.root().join("opt/runx").exists() && !machine.root().join("var/lib/runx").exists());
        assert_eq!((machine.read(CONFIG), machine.restarts()), (usual(2, ""), 0));
    };
    sum(&["runx", "containerd-shim-runx-v1"]);
    fs::write(programs.join("runx"), "other").expect("damage a program");
    refused(&["programs/runx", "SHA256SUMS", "damaged"]);
    fs::remove_file(programs.join("runx")).expect("remove a program");
    refused(&["names runx, which is missing"]);
    sum(&["containerd-shim-runx-v1"]);
    fs::write(programs.join("more"), "").expect("add a program");
    refused(&["programs/more", "damaged"]);
    fs::write(programs.join("SHA256SUMS"), "nonsense\n").expect("damage the sums");
    refused(&["\"nonsense\"", "no line of sha256sum"]);
    // The installer itself need not lie among them.
    fs::write(programs.join("runx-node"), "").expect("add a program");
    sum(&["containerd-shim-runx-v1", "more", "runx-node"]);
    fs::remove_file(programs.join("runx-node")).expect("remove a program");
    machine.restart();
    machine.node(&["install"]).ok();
    serves(&machine, true);
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
