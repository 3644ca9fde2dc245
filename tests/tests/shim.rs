//! The shim's commands, as each version of containerd calls them, and the life of its daemon.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use containerd_shim_protos::api as pb;
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult, Extension};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::shim::oci::Options;
use containerd_shim_protos::types::introspection::RuntimeInfo;
use runx_tests::command::{eventually, run, run_bytes};
use runx_tests::shim::{Host, Make, SOCKETS, Shim, read_reply, refused};
use runx_tests::{cgroup, needs_root, repeats};
use serde_json::{Value, json};

fn options(options: &Options) -> Any {
    Any { type_url: "containerd.runc.v1.Options".into(), value: options.write_to_bytes().unwrap(), ..Any::default() }
}

/// A table as CRI sends it to runtimes other than runc's.
fn table(text: &str) -> Any {
    let mut value = vec![26, text.len() as u8];
    value.extend_from_slice(text.as_bytes());
    Any { type_url: "runtimeoptions.v1.Options".into(), value, ..Any::default() }
}

fn kill(pid: i32, signal: i32) {
    // SAFETY: the pid is that of a process of this test.
    unsafe { libc::kill(pid, signal) };
}

fn sleeping(host: &Host, id: &str) -> Shim {
    host.make_bundle(id, &["/bin/sleep", "1000"], |_| ());
    let shim = host.shim(id);
    shim.create(&host.create_request(id)).unwrap();
    shim.start(id, "").unwrap();
    shim
}

fn end(shim: &Shim, id: &str) {
    shim.kill(id, "", libc::SIGKILL, false).unwrap();
    shim.wait(id, "").unwrap();
    shim.delete(id, "").unwrap();
    let _ = shim.shutdown(id);
}

#[test]
fn start_answers_each_version_of_containerd_in_its_words() {
    needs_root!();
    let host = Host::new(Make::Runx);
    // Up to 2.2: the bare address, whatever the options, but for the one that asks for version 3.
    host.make_bundle("old", &["/bin/true"], |_| ());
    let reply = host.start_command("old").ok().stdout;
    assert!(reply.starts_with(&format!("unix://{SOCKETS}/")), "{reply}");
    assert_eq!(fs::read_to_string(host.bundle("old").join("address")).unwrap(), reply);
    let with = |any: Any| run_bytes(&mut host.command("old", &["start"]), &any.write_to_bytes().unwrap()).ok().stdout;
    assert_eq!(with(options(&Options::default())), reply);
    assert_eq!(with(table("SystemdCgroup = false\nBinaryName = \"/usr/bin/x\"\n")), reply);
    assert_eq!(with(table("TaskAPIVersion = 2")), reply);
    let expected = json!({"version": 3, "address": reply, "protocol": "ttrpc"});
    for asks in [options(&Options { task_api_version: 3, ..Options::default() }), table("TaskAPIVersion = 3")] {
        assert_eq!(serde_json::from_str::<Value>(&with(asks)).unwrap(), expected);
    }
    // From 2.3 on: a message for a message.
    host.make_bundle("new", &["/bin/true"], |_| ());
    let sockets = host.path().join("sockets");
    let extension = |any| Extension { value: MessageField::some(any), ..Extension::default() };
    let foreign = Any { type_url: "io.example.v1.Unknown".into(), value: vec![8, 1], ..Any::default() };
    let params = BootstrapParams {
        instance_id: "new".into(),
        namespace: host.namespace().into(),
        containerd_version: "2.3.0".into(),
        extensions: vec![extension(foreign), extension(options(&Options::default()))],
        socket_dir: Some(sockets.to_string_lossy().into_owned()),
        ..BootstrapParams::default()
    };
    let reply = run_bytes(&mut host.command("new", &["start"]), &params.write_to_bytes().unwrap()).ok().bytes;
    let result = BootstrapResult::parse_from_bytes(&reply).unwrap();
    assert_eq!((result.version, result.protocol.as_str()), (3, "ttrpc"));
    assert!(result.address.starts_with(&format!("unix://{}/", sockets.display())), "{}", result.address);
    // Both versions of the API are served on both sockets.
    for id in ["old", "new"] {
        let (address, _) = read_reply(&fs::read_to_string(host.bundle(id).join("address")).unwrap());
        for version in [2, 3] {
            let shim = Shim::connect(&address, version);
            assert!(host.daemons().contains(&(shim.connect_task(id).unwrap().shim_pid as i32)));
        }
        let _ = Shim::connect(&address, 2).shutdown(id);
    }
    host.assert_nothing_left();
    assert_eq!(fs::read_dir(sockets).unwrap().count(), 0, "a socket is left");
}

#[test]
fn start_refuses_options_that_it_does_not_know_by_their_names() {
    needs_root!();
    let host = Host::new(Make::Runx);
    host.make_bundle("a", &["/bin/true"], |_| ());
    let refused = |any: Any, words: &[&str]| {
        run_bytes(&mut host.command("a", &["start"]), &any.write_to_bytes().unwrap()).fails(1, words);
    };
    refused(table("NoSuchOption = true"), &["NoSuchOption", "unknown"]);
    refused(table("[nested]\nx = 1"), &["[nested]"]);
    refused(table("SystemdCgroup = \"yes\""), &["SystemdCgroup", "type"]);
    refused(options(&Options { criu_work_path: "/x".into(), ..Options::default() }), &["criu_work_path"]);
    refused(options(&Options { task_api_version: 7, ..Options::default() }), &["task_api_version 7"]);
    refused(options(&Options { shim_cgroup: "/no-such".into(), ..Options::default() }), &["shim_cgroup", "/no-such"]);
    refused(Any { type_url: "io.example.Other".into(), value: vec![8, 1], ..Any::default() }, &["io.example.Other"]);
    host.assert_nothing_left();
}

#[test]
fn containers_of_a_pod_share_one_shim() {
    needs_root!();
    let host = Host::new(Make::Runx);
    let group = |config: &mut Value| config["annotations"] = json!({"io.kubernetes.cri.sandbox-id": "pod"});
    let mut pids = HashSet::new();
    let mut shims = Vec::new();
    for id in ["pod", "c1", "c2", "c3", "c4"] {
        host.make_bundle(id, &["/bin/sleep", "1000"], group);
        let shim = host.shim(id);
        pids.insert(shim.connect_task(id).unwrap().shim_pid);
        shim.create(&host.create_request(id)).unwrap();
        shim.start(id, "").unwrap();
        shims.push((id, shim));
    }
    assert_eq!(pids.len(), 1);
    // The daemon and its spawner.
    assert_eq!(host.daemons().len(), 2);
    for (id, shim) in &shims[1..] {
        end(shim, id);
    }
    assert_eq!(shims[0].1.state("pod", "").unwrap().status.enum_value(), Ok(pb::Status::RUNNING));
    end(&shims[0].1, "pod");
    host.assert_nothing_left();
}

#[test]
fn the_shim_and_its_spawner_are_in_the_cgroup_that_is_asked_for() {
    needs_root!();
    let host = Host::new(Make::Runx);
    let name = format!("{}-shims", host.namespace());
    let directories: Vec<PathBuf> = if cgroup::unified() {
        vec![Path::new("/sys/fs/cgroup").join(&name)]
    } else {
        ["memory", "cpu", "pids"].map(|controller| Path::new("/sys/fs/cgroup").join(controller).join(&name)).to_vec()
    };
    for directory in &directories {
        fs::create_dir(directory).unwrap();
    }
    host.make_bundle("a", &["/bin/sleep", "1000"], |_| ());
    let any = options(&Options { shim_cgroup: format!("/{name}"), ..Options::default() });
    let reply = run_bytes(&mut host.command("a", &["start"]), &any.write_to_bytes().unwrap()).ok().stdout;
    let shim = Shim::connect(&reply, 2);
    let pid = shim.create(&host.create_request("a")).unwrap().pid;
    shim.start("a", "").unwrap();
    let mut daemons: Vec<String> = host.daemons().iter().map(i32::to_string).collect();
    daemons.sort();
    for directory in &directories {
        let text = fs::read_to_string(directory.join("cgroup.procs")).unwrap();
        let mut members: Vec<String> = text.lines().map(str::to_owned).collect();
        members.sort();
        assert_eq!(members, daemons, "in {}", directory.display());
    }
    let own = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    assert!(!own.contains(&name), "the container is in its own: {own}");
    end(&shim, "a");
    eventually("the shim has ended", || host.daemons().is_empty());
    // One that is about to end has no command line, but is still there.
    for directory in &directories {
        eventually("it can be removed", || fs::remove_dir(directory).is_ok());
    }
    host.assert_nothing_left();
}

#[test]
fn info_describes_the_runtime() {
    needs_root!();
    let program = runx_tests::dist().join("containerd-shim-runx-v1");
    let given = options(&Options { systemd_cgroup: true, ..Options::default() });
    for (input, echoed) in [(Vec::new(), false), (given.write_to_bytes().unwrap(), true)] {
        let done = run_bytes(Command::new(&program).arg("-info"), &input).ok();
        let info = RuntimeInfo::parse_from_bytes(&done.bytes).unwrap();
        assert_eq!(info.name, "io.containerd.runx.v1");
        assert!(!info.version.version.is_empty());
        assert_eq!(info.options.as_ref().is_some_and(|options| *options == given), echoed);
        let features = info.features.as_ref().unwrap();
        assert!(
            features.type_url.ends_with("opencontainers/runtime-spec/1/features/Features"),
            "{}",
            features.type_url
        );
        let features: Value = serde_json::from_slice(&features.value).unwrap();
        // What the kubelet and CRI look at.
        assert!(features["mountOptions"].as_array().unwrap().contains(&json!("rro")));
        assert!(features["linux"]["namespaces"].as_array().unwrap().contains(&json!("user")));
        assert_eq!(features["linux"]["mountExtensions"]["idmap"]["enabled"], true);
    }
    let version = run(Command::new(&program).arg("-v")).ok().stdout;
    assert!(version.contains("containerd-shim-runx-v1") && version.contains("Version"), "{version}");
    run(Command::new(&program).arg("-nope")).fails(1, &["-nope"]);
}

#[test]
fn what_is_not_supported_says_so() {
    needs_root!();
    let host = Host::new(Make::Runx);
    let shim = sleeping(&host, "a");
    let unimplemented = 12;
    let (code, text) = refused(shim.checkpoint("a", "/tmp/x"));
    assert_eq!((code, text.contains("checkpoint")), (unimplemented, true), "{text}");
    let sandbox = shim.service("containerd.runtime.sandbox.v1.Sandbox");
    for method in ["CreateSandbox", "StartSandbox", "SandboxStatus", "PingSandbox", "NoSuchMethod"] {
        let answer = sandbox.call::<pb::Empty>(method, &pb::Empty::new(), Duration::from_secs(10));
        let (code, text) = refused(answer);
        assert_eq!((code, text.contains(method)), (unimplemented, true), "{text}");
    }
    let mut restore = host.create_request("b");
    restore.checkpoint = "/tmp/x".into();
    assert_eq!(refused(shim.create(&restore)).0, unimplemented);
    end(&shim, "a");
    host.assert_nothing_left();
}

#[test]
fn delete_cleans_up_after_a_daemon_that_was_killed_at_any_moment() {
    needs_root!();
    let host = Host::new(Make::Runx);
    for round in 0..repeats(20) {
        let id = format!("k{round}");
        host.make_bundle(&id, &["/bin/sleep", "1000"], |_| ());
        let shim = host.shim(&id);
        let daemon = shim.connect_task(&id).unwrap().shim_pid as i32;
        let request = host.create_request(&id);
        let (creating, killed) = (shim.clone(), id.clone());
        let worker = std::thread::spawn(move || {
            let _ = creating.create(&request);
            let _ = creating.start(&killed, "");
        });
        // Over the whole of a create and start.
        std::thread::sleep(Duration::from_micros(round as u64 * 600));
        kill(daemon, libc::SIGKILL);
        worker.join().unwrap();
        let answer = host.delete_command(&id).ok().bytes;
        assert_eq!(pb::DeleteResponse::parse_from_bytes(&answer).unwrap().exit_status, 137);
        // Twice does no harm.
        host.delete_command(&id).ok();
        let socket = fs::read_to_string(host.bundle(&id).join("address")).unwrap();
        assert!(!Path::new(socket.strip_prefix("unix://").unwrap()).exists(), "the socket is left");
        host.assert_nothing_left();
    }
}

#[test]
fn delete_of_a_pods_first_container_ends_the_others_of_a_dead_daemon_and_of_no_living_one() {
    needs_root!();
    let host = Host::new(Make::Runx);
    let group = |config: &mut Value| config["annotations"] = json!({"io.kubernetes.cri.sandbox-id": "pod"});
    let mut running = Vec::new();
    for id in ["pod", "c1", "c2", "failed"] {
        host.make_bundle(id, &["/bin/sleep", "1000"], group);
        let shim = host.shim(id);
        if id != "failed" {
            running.push(shim.create(&host.create_request(id)).unwrap().pid);
            shim.start(id, "").unwrap();
        }
    }
    let alive = |pid: &u32| Path::new(&format!("/proc/{pid}")).exists();
    // As after a create that failed: the others are somebody's.
    host.delete_command("failed").ok();
    assert!(running.iter().all(alive));
    let daemon = host.shim("pod").connect_task("pod").unwrap().shim_pid as i32;
    kill(daemon, libc::SIGKILL);
    eventually("it is gone", || !Path::new(&format!("/proc/{daemon}")).exists());
    host.delete_command("pod").ok();
    eventually("all have ended", || !running.iter().any(alive));
    // Versions that ask for each of them may do so.
    host.delete_command("c1").ok();
    host.assert_nothing_left();
}

#[test]
fn signals_to_the_daemon_do_what_containerds_shim_does_with_them() {
    needs_root!();
    let host = Host::new(Make::Runx);
    let shim = sleeping(&host, "a");
    let daemon = shim.connect_task("a").unwrap().shim_pid as i32;
    let _ = host.log("a");
    kill(daemon, libc::SIGUSR1);
    let mut log = String::new();
    eventually("it describes itself", || {
        log.push_str(&host.log("a"));
        log.contains("container a") && log.contains("Running")
    });
    kill(daemon, libc::SIGPIPE);
    assert_eq!(shim.state("a", "").unwrap().status.enum_value(), Ok(pb::Status::RUNNING));
    let address = fs::read_to_string(host.bundle("a").join("address")).unwrap();
    kill(daemon, libc::SIGTERM);
    eventually("it ends", || host.daemons().is_empty());
    assert!(!Path::new(address.strip_prefix("unix://").unwrap()).exists(), "the socket is left");
    // containerd notices and cleans up.
    host.delete_command("a").ok();
    host.assert_nothing_left();
}

#[test]
fn a_socket_whose_server_is_dead_or_hangs_is_not_handed_out() {
    needs_root!();
    let host = Host::new(Make::Runx);
    host.make_bundle("a", &["/bin/sleep", "1000"], |_| ());
    let shim = host.shim("a");
    let daemon = shim.connect_task("a").unwrap().shim_pid as i32;
    kill(daemon, libc::SIGSTOP);
    host.start_command("a").fails(1, &["does not answer", SOCKETS]);
    kill(daemon, libc::SIGKILL);
    eventually("it is gone", || !host.daemons().contains(&daemon));
    // Its socket is still there, and taken over.
    let shim = host.shim("a");
    assert_ne!(shim.connect_task("a").unwrap().shim_pid as i32, daemon);
    let _ = shim.shutdown("a");
    host.assert_nothing_left();
}

#[test]
fn events_wait_for_containerd_and_keep_their_order() {
    needs_root!();
    let mut host = Host::new(Make::Runx);
    let shim = sleeping(&host, "a");
    assert_eq!(host.topics_until("a", "/tasks/start"), ["/tasks/create", "/tasks/start"]);
    host.go_deaf();
    let process = json!({"user": {"uid": 0, "gid": 0}, "args": ["true"], "cwd": "/", "env": ["PATH=/bin"]});
    for exec in ["e1", "e2"] {
        shim.exec("a", exec, &process, |_| ()).unwrap();
        shim.start("a", exec).unwrap();
        shim.wait("a", exec).unwrap();
        shim.delete("a", exec).unwrap();
    }
    shim.kill("a", "", libc::SIGKILL, false).unwrap();
    shim.wait("a", "").unwrap();
    shim.delete("a", "").unwrap();
    std::thread::sleep(Duration::from_millis(300));
    host.listen();
    let exec = ["/tasks/exec-added", "/tasks/exec-started", "/tasks/exit"];
    let expected = [&["/tasks/create", "/tasks/start"][..], &exec, &exec, &["/tasks/exit", "/tasks/delete"]].concat();
    assert_eq!(host.topics_until("a", "/tasks/delete"), expected);
    let _ = shim.shutdown("a");
    host.assert_nothing_left();
}

#[test]
fn a_full_disk_fails_a_create_with_its_reason_and_leaves_nothing() {
    needs_root!();
    let mut host = Host::new(Make::Runx);
    let disk = host.path().join("disk");
    fs::create_dir(&disk).unwrap();
    run(Command::new("mount").args(["-t", "tmpfs", "-o", "size=128k", "none"]).arg(&disk)).ok();
    host.options = Some(options(&Options { root: disk.to_string_lossy().into_owned(), ..Options::default() }));
    let filling = disk.join("filling");
    let states = disk.join(host.namespace());
    // With ever more room, until it is enough for one container.
    let mut failures = 0;
    for round in 0..40 {
        let id = format!("a{round}");
        let _ = fs::remove_file(&filling);
        let _ = fs::write(&filling, vec![b'x'; (128 << 10) - (4096 * round)]);
        host.make_bundle(&id, &["/bin/true"], |_| ());
        let shim = host.shim(&id);
        match shim.create(&host.create_request(&id)) {
            Ok(_) => {
                shim.start(&id, "").unwrap();
                shim.wait(&id, "").unwrap();
                shim.delete(&id, "").unwrap();
                let _ = shim.shutdown(&id);
                break;
            }
            Err(_) => {
                let (_, text) = refused(shim.create(&host.create_request(&id)));
                assert!(text.contains("No space left on device"), "{text}");
                failures += 1;
                let left: Vec<_> = fs::read_dir(&states).into_iter().flatten().flatten().map(|e| e.path()).collect();
                assert!(left.iter().all(|path| path.ends_with(".seccomp")), "{left:?}");
                let _ = shim.shutdown(&id);
            }
        }
    }
    assert!(failures > 0);
    eventually("all shims have ended", || host.daemons().is_empty());
    run(Command::new("umount").arg(&disk)).ok();
    host.assert_nothing_left();
}

#[test]
fn a_daemon_is_executed_from_a_file_that_cannot_be_written() {
    needs_root!();
    let host = Host::new(Make::Runx);
    let shim = sleeping(&host, "a");
    for pid in host.daemons() {
        let own = fs::File::open(format!("/proc/{pid}/exe")).unwrap();
        let flags = nix::sys::statvfs::fstatvfs(&own).unwrap().flags();
        assert!(flags.contains(nix::sys::statvfs::FsFlags::ST_RDONLY), "the file of process {pid}");
    }
    end(&shim, "a");
    host.assert_nothing_left();
}

#[test]
fn a_spawner_does_not_keep_the_environment_of_containerd() {
    needs_root!();
    let host = Host::new(Make::Runx);
    host.make_bundle("a", &["/bin/sleep", "1000"], |_| ());
    let done = run(host.command("a", &["start"]).env("SECRET", "hidden-from-containers").stdin(Stdio::null())).ok();
    let shim = Shim::connect(&done.stdout, 2);
    let daemon = shim.connect_task("a").unwrap().shim_pid as i32;
    let environment = |pid: i32| fs::read_to_string(format!("/proc/{pid}/environ")).unwrap();
    assert!(environment(daemon).contains("hidden-from-containers"));
    let spawner = host.daemons().into_iter().find(|pid| *pid != daemon).expect("there is a spawner");
    eventually("it has forgotten", || !environment(spawner).contains("hidden"));
    let pid = shim.create(&host.create_request("a")).unwrap().pid as i32;
    assert!(
        !environment(pid).contains("hidden"),
        "before its last step, a container's process is a copy of the spawner"
    );
    shim.start("a", "").unwrap();
    end(&shim, "a");
    host.assert_nothing_left();
}

#[test]
fn starts_of_one_pod_at_the_same_time_make_one_daemon() {
    needs_root!();
    let host = Host::new(Make::Runx);
    let group = |config: &mut Value| config["annotations"] = json!({"io.kubernetes.cri.sandbox-id": "pod"});
    let ids: Vec<String> = (0..6).map(|n| if n == 0 { "pod".into() } else { format!("c{n}") }).collect();
    for round in 0..repeats(5) {
        for id in &ids {
            let _ = fs::remove_dir_all(host.bundle(id));
            host.make_bundle(id, &["/bin/true"], group);
        }
        let starts: Vec<_> = ids
            .iter()
            .map(|id| host.command(id, &["start"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
            .collect();
        let mut replies = HashSet::new();
        for start in starts {
            let output = start.wait_with_output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            replies.insert(output.stdout);
        }
        assert_eq!((round, replies.len()), (round, 1), "{replies:?}");
        let address = String::from_utf8(replies.into_iter().next().unwrap()).unwrap();
        let shim = Shim::connect(&address, 2);
        let daemon = shim.connect_task("pod").unwrap().shim_pid as i32;
        assert!(host.daemons().contains(&daemon));
        // One daemon, with or without its spawner by now.
        assert!(host.daemons().len() <= 2, "{:?}", host.daemons());
        let _ = shim.shutdown("pod");
        eventually("it has ended", || host.daemons().is_empty());
    }
    host.assert_nothing_left();
}

#[test]
fn of_deletes_at_the_same_time_one_is_answered_and_the_others_find_nothing() {
    needs_root!();
    let host = Host::new(Make::Runx);
    let not_found = 5;
    let shim = sleeping(&host, "a");
    shim.kill("a", "", libc::SIGKILL, false).unwrap();
    shim.wait("a", "").unwrap();
    let deletes: Vec<_> = (0..4)
        .map(|_| {
            std::thread::spawn({
                let shim = shim.clone();
                move || shim.delete("a", "")
            })
        })
        .collect();
    let (done, others): (Vec<_>, Vec<_>) =
        deletes.into_iter().map(|delete| delete.join().unwrap()).partition(Result::is_ok);
    assert_eq!(done.len(), 1, "{done:?} {others:?}");
    assert_eq!(done[0].as_ref().unwrap().exit_status, 137);
    for answer in others {
        assert_eq!(refused(answer).0, not_found);
    }
    assert_eq!(host.topics_until("a", "/tasks/delete").iter().filter(|topic| *topic == "/tasks/delete").count(), 1);
    let _ = shim.shutdown("a");
    host.assert_nothing_left();
}

#[test]
fn hooks_of_every_kind_run_for_a_task_and_are_reaped_by_those_who_wait() {
    needs_root!();
    let host = Host::new(Make::Runx);
    let log = host.file("hooks");
    let hook = host.script("hook", &format!("#!/bin/sh\necho $1 >>{}\n", log.display()));
    let kinds = ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"];
    for round in 0..repeats(10) {
        let _ = fs::remove_file(&log);
        let id = format!("a{round}");
        host.make_bundle(&id, &["/bin/sleep", "1000"], |config| {
            for kind in kinds {
                config["hooks"][kind] = json!([{"path": hook, "args": ["hook", kind]}]);
            }
            // Inside of the container there is neither the script nor the log.
            config["hooks"]["startContainer"] =
                json!([{"path": "/bin/sh", "args": ["sh", "-c", "echo inside >/tmp/started"]}]);
            config["annotations"] = json!({"io.kubernetes.cri.sandbox-id": "pod"});
        });
        let shim = host.shim(&id);
        let pid = shim.create(&host.create_request(&id)).unwrap().pid;
        shim.start(&id, "").unwrap();
        assert_eq!(fs::read_to_string(format!("/proc/{pid}/root/tmp/started")).unwrap(), "inside\n");
        // Those that nobody waits for are reaped meanwhile.
        let orphan = json!({"user": {"uid": 0, "gid": 0}, "args": ["sh", "-c", "sleep 0.01 & sleep 0.01 &"],
            "cwd": "/", "env": ["PATH=/bin"]});
        shim.exec(&id, "e", &orphan, |_| ()).unwrap();
        shim.start(&id, "e").unwrap();
        assert_eq!(shim.wait(&id, "e").unwrap().exit_status, 0);
        shim.delete(&id, "e").unwrap();
        shim.kill(&id, "", libc::SIGKILL, false).unwrap();
        assert_eq!(shim.wait(&id, "").unwrap().exit_status, 137);
        shim.delete(&id, "").unwrap();
        let text = fs::read_to_string(&log).unwrap();
        let expected = ["prestart", "createRuntime", "createContainer", "poststart", "poststop"];
        assert_eq!(text.lines().collect::<Vec<_>>(), expected, "round {round}");
        if round + 1 == repeats(10) {
            let _ = shim.shutdown(&id);
        }
    }
    host.assert_nothing_left();
}

#[test]
fn a_mount_of_a_rootfs_stays_inside_of_it() {
    needs_root!();
    let host = Host::new(Make::Runx);
    host.make_bundle("a", &["/bin/sleep", "1000"], |_| ());
    let victim = host.file("victim");
    fs::create_dir(&victim).unwrap();
    let rootfs = host.path().join("rootfs");
    std::os::unix::fs::symlink(&victim, rootfs.join("evil")).unwrap();
    let shim = host.shim("a");
    let mut request = host.create_request("a");
    let mut second = request.rootfs[0].clone();
    second.source = "none".into();
    second.type_ = "tmpfs".into();
    second.options = vec![];
    second.target = "/evil".into();
    request.rootfs.push(second);
    let answer = shim.create(&request);
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(&victim.to_string_lossy().into_owned()), "{mounts}");
    if answer.is_ok() {
        end(&shim, "a");
    } else {
        host.delete_command("a").ok();
        let _ = shim.shutdown("a");
    }
    host.assert_nothing_left();
}
