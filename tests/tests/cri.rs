//! Pods and containers as the kubelet asks containerd for them.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use k8s_cri::v1 as api;
use runx_tests::command::{eventually, run};
use runx_tests::cri::{BY_PATH, Node, RUNC, own_namespaces, version};
use runx_tests::wasm::Forget;
use runx_tests::{needs_cri, rounds, skip, wasm};

fn security(config: &mut api::ContainerConfig) -> &mut api::LinuxContainerSecurityContext {
    config.linux.as_mut().unwrap().security_context.as_mut().unwrap()
}

fn pod_security(config: &mut api::PodSandboxConfig) -> &mut api::LinuxSandboxSecurityContext {
    config.linux.as_mut().unwrap().security_context.as_mut().unwrap()
}

fn namespace_of(pid: i32, kind: &str) -> String {
    fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap().to_string_lossy().into_owned()
}

fn host_namespace(kind: &str) -> String {
    fs::read_link(format!("/proc/self/ns/{kind}")).unwrap().to_string_lossy().into_owned()
}

fn mount(host: &Path, inside: &str) -> api::Mount {
    api::Mount { host_path: host.to_string_lossy().into_owned(), container_path: inside.into(), ..Default::default() }
}

#[test]
fn a_pod_of_several_containers_has_one_shim_and_shared_namespaces() {
    needs_cri!();
    let node = Node::start();
    let config = node.pod_config("pod");
    let pod = node.run_pod(&config);
    let status = node.pod_status(&pod);
    assert_eq!(status.state(), api::PodSandboxState::SandboxReady);
    let address = status.network.unwrap().ip;
    assert!(address.starts_with("10."), "{address}");
    let containers: Vec<String> = ["one", "two", "three"]
        .map(|name| node.run_container(&pod, &node.container_config(name, "sleep 1000"), &config))
        .to_vec();
    assert_eq!(node.shims().len(), 1);
    let pids: Vec<i32> = containers.iter().map(|id| node.pid(id)).collect();
    for kind in ["net", "ipc", "uts"] {
        let shared = namespace_of(pids[0], kind);
        assert!(pids.iter().all(|pid| namespace_of(*pid, kind) == shared), "{kind}");
        assert_ne!(shared, host_namespace(kind), "{kind}");
    }
    for kind in ["pid", "mnt"] {
        assert_ne!(namespace_of(pids[0], kind), namespace_of(pids[1], kind), "{kind}");
    }
    assert_eq!(node.sh(&containers[0], "hostname; cat /etc/hostname").ok().stdout, "pod\npod\n");
    assert!(node.sh(&containers[0], "ip addr show eth0").ok().stdout.contains(&address));
    assert!(node.sh(&containers[0], "grep -c pod /etc/hosts; cat /etc/resolv.conf").code == 0);
    // What one opens on the loopback the other reaches.
    node.sh(&containers[0], "echo from one | nc -l -p 7000 >/dev/null 2>&1 &");
    eventually("the neighbour answers", || {
        node.sh(&containers[1], "nc 127.0.0.1 7000 </dev/null").stdout == "from one\n"
    });
    // They share memory in /dev/shm.
    node.sh(&containers[0], "echo shared > /dev/shm/x").ok();
    assert_eq!(node.sh(&containers[1], "cat /dev/shm/x").ok().stdout, "shared\n");
    node.remove_pod(&pod);
    node.assert_nothing_left();
}

#[test]
fn a_container_goes_through_its_life() {
    needs_cri!();
    let node = Node::start();
    let config = node.pod_config("pod");
    let pod = node.run_pod(&config);
    // An init container, then one that fails and is started again, as the kubelet does.
    let init = node.run_container(&pod, &node.container_config("init", "echo prepared"), &config);
    let status = node.wait(&init);
    assert_eq!((status.exit_code, status.reason.as_str()), (0, "Completed"));
    assert_eq!(node.log("pod", "init"), "prepared\n");
    node.remove_container(&init);
    for attempt in 0..3 {
        let mut container = node.container_config("app", "echo try; exit 3");
        container.metadata.as_mut().unwrap().attempt = attempt;
        let id = node.run_container(&pod, &container, &config);
        let status = node.wait(&id);
        assert_eq!((status.exit_code, status.reason.as_str()), (3, "Error"));
        assert!(status.started_at > 0 && status.finished_at > 0);
        node.remove_container(&id);
    }
    // One that ends when it is asked to, one that must be killed, and one that is never started.
    let script = "trap 'echo asked; exit 0' TERM; echo ready; while :; do sleep 0.05; done";
    let polite = node.run_container(&pod, &node.container_config("polite", script), &config);
    eventually("it is ready", || node.log("pod", "polite") == "ready\n");
    node.stop_container(&polite, 30);
    assert_eq!(node.wait(&polite).exit_code, 0);
    assert_eq!(node.log("pod", "polite"), "ready\nasked\n");
    let stubborn = node.run_container(&pod, &node.container_config("stubborn", "trap '' TERM; sleep 1000"), &config);
    node.stop_container(&stubborn, 1);
    assert_eq!(node.wait(&stubborn).exit_code, 137);
    // Stopping twice does no harm.
    node.stop_container(&stubborn, 1);
    let created = node.try_create(&pod, &node.container_config("created", "sleep 1"), &config).unwrap();
    node.remove_container(&created);
    node.remove_pod(&pod);
    node.assert_nothing_left();
}

#[test]
fn namespaces_of_the_node_are_given_to_those_who_ask() {
    needs_cri!();
    let node = Node::start();
    let on_node = |options: &mut api::NamespaceOption| {
        options.network = api::NamespaceMode::Node.into();
        options.pid = api::NamespaceMode::Node.into();
        options.ipc = api::NamespaceMode::Node.into();
    };
    let mut config = node.pod_config("host");
    config.hostname = String::new();
    on_node(pod_security(&mut config).namespace_options.as_mut().unwrap());
    let pod = node.run_pod(&config);
    let mut container = node.container_config("app", "sleep 1000");
    on_node(security(&mut container).namespace_options.as_mut().unwrap());
    let id = node.run_container(&pod, &container, &config);
    let pid = node.pid(&id);
    for kind in ["net", "pid", "ipc"] {
        assert_eq!(namespace_of(pid, kind), host_namespace(kind), "{kind}");
    }
    // In the node's PID namespace its children outlive it, unless somebody ends them.
    node.sh(&id, "sleep 1234 >/dev/null 2>&1 & echo started").ok();
    node.stop_container(&id, 0);
    node.remove_pod(&pod);
    node.assert_nothing_left();

    // One PID namespace for the whole pod, and a debugging container in another one's.
    let mut config = node.pod_config("shared");
    pod_security(&mut config).namespace_options.as_mut().unwrap().pid = api::NamespaceMode::Pod.into();
    let pod = node.run_pod(&config);
    let mut container = node.container_config("app", "sleep 4321");
    security(&mut container).namespace_options.as_mut().unwrap().pid = api::NamespaceMode::Pod.into();
    let app = node.run_container(&pod, &container, &config);
    assert!(
        node.sh(&app, "cat /proc/1/cmdline").ok().stdout.contains("2147483647"),
        "the sandbox is its first process"
    );
    let mut debugger = node.container_config("debugger", "sleep 1000");
    let options = security(&mut debugger).namespace_options.as_mut().unwrap();
    options.pid = api::NamespaceMode::Target.into();
    options.target_id = app.clone();
    let debugger = node.run_container(&pod, &debugger, &config);
    assert!(node.sh(&debugger, "ps").ok().stdout.contains("sleep 4321"));
    assert_eq!(namespace_of(node.pid(&debugger), "pid"), namespace_of(node.pid(&app), "pid"));
    node.remove_pod(&pod);
    node.assert_nothing_left();
}

#[test]
fn security_contexts_take_effect() {
    needs_cri!();
    let node = Node::start();
    let mut config = node.pod_config("pod");
    config.linux.as_mut().unwrap().sysctls = HashMap::from([("net.ipv4.ip_forward".into(), "1".into())]);
    pod_security(&mut config).privileged = true;
    let pod = node.run_pod(&config);
    let out = |name: &str, edit: &dyn Fn(&mut api::LinuxContainerSecurityContext), script: &str| {
        let mut container = node.container_config(name, &format!("{{ {script}\n}} 2>&1"));
        edit(security(&mut container));
        let id = node.run_container(&pod, &container, &config);
        node.wait(&id);
        node.log("pod", name)
    };
    let effective = "grep CapEff /proc/self/status";
    let capabilities = |text: &str| u64::from_str_radix(text.split_ascii_whitespace().nth(1).unwrap(), 16).unwrap();
    let default = capabilities(&out("default", &|_| (), effective));
    assert_eq!(default & 1 << 21, 0, "CAP_SYS_ADMIN");
    let changed = |context: &mut api::LinuxContainerSecurityContext| {
        context.capabilities = Some(api::Capability {
            add_capabilities: vec!["SYS_ADMIN".into()],
            drop_capabilities: vec!["CHOWN".into()],
            ..Default::default()
        });
    };
    assert_eq!(capabilities(&out("changed", &changed, effective)), default & !1 | 1 << 21);
    let privileged = |context: &mut api::LinuxContainerSecurityContext| context.privileged = true;
    let text = out(
        "privileged",
        &privileged,
        "mount -t tmpfs none /tmp && ls /dev/loop-control; grep Seccomp: /proc/self/status",
    );
    assert!(text.contains("/dev/loop-control") && text.contains("Seccomp:\t0"), "{text}");
    let runtime_default = |context: &mut api::LinuxContainerSecurityContext| {
        context.seccomp = Some(api::SecurityProfile {
            profile_type: api::security_profile::ProfileType::RuntimeDefault.into(),
            ..Default::default()
        });
    };
    let text = out("seccomp", &runtime_default, "grep Seccomp: /proc/self/status; unshare -U true");
    assert!(text.contains("Seccomp:\t2"), "{text}");
    let read_only = |context: &mut api::LinuxContainerSecurityContext| context.readonly_rootfs = true;
    assert!(out("readonly", &read_only, "touch /x").contains("Read-only file system"));
    let user = |context: &mut api::LinuxContainerSecurityContext| {
        context.run_as_user = Some(api::Int64Value { value: 1000 });
        context.run_as_group = Some(api::Int64Value { value: 2000 });
        context.supplemental_groups = vec![3000];
        context.no_new_privs = true;
    };
    let text = out("user", &user, "id -u; id -g; id -G; grep NoNewPrivs /proc/self/status");
    assert!(text.starts_with("1000\n2000\n") && text.contains("3000") && text.contains("NoNewPrivs:\t1"), "{text}");
    let paths = |context: &mut api::LinuxContainerSecurityContext| {
        context.masked_paths = vec!["/proc/keys".into(), "/root".into()];
        context.readonly_paths = vec!["/tmp".into()];
    };
    let text = out("paths", &paths, "wc -c < /proc/keys; ls -A /root | wc -l; touch /tmp/x");
    assert!(text.starts_with("0\n0\n") && text.contains("Read-only"), "{text}");
    assert_eq!(out("sysctl", &|_| (), "cat /proc/sys/net/ipv4/ip_forward"), "1\n");
    node.remove_pod(&pod);
    node.assert_nothing_left();
}

#[test]
fn volumes_are_mounted_with_their_propagation() {
    needs_cri!();
    let node = Node::start();
    let config = node.pod_config("pod");
    let pod = node.run_pod(&config);
    let volume = node.path().join("volume");
    for name in ["below", "from-inside"] {
        fs::create_dir_all(volume.join(name)).unwrap();
    }
    fs::write(volume.join("file"), "content\n").unwrap();
    // As the kubelet has it, the directory is a mount of its own, shared with the host.
    run(Command::new("mount").arg("--bind").arg(&volume).arg(&volume)).ok();
    run(Command::new("mount").arg("--make-shared").arg(&volume)).ok();
    let termination = node.path().join("termination");
    fs::write(&termination, "").unwrap();
    let mut container = node.container_config("app", "echo last words > /dev/termination-log; sleep 1000");
    container.mounts = vec![
        api::Mount { readonly: true, ..mount(&volume, "/ro") },
        mount(&volume, "/private"),
        api::Mount {
            propagation: api::MountPropagation::PropagationHostToContainer.into(),
            ..mount(&volume, "/slave")
        },
        api::Mount { propagation: api::MountPropagation::PropagationBidirectional.into(), ..mount(&volume, "/shared") },
        mount(&termination, "/dev/termination-log"),
    ];
    security(&mut container).privileged = true;
    let mut privileged = config.clone();
    pod_security(&mut privileged).privileged = true;
    node.remove_pod(&pod);
    let pod = node.run_pod(&privileged);
    let id = node.run_container(&pod, &container, &privileged);
    assert_eq!(node.sh(&id, "cat /ro/file /private/file").ok().stdout, "content\ncontent\n");
    assert!(node.sh(&id, "touch /ro/new 2>&1").stdout.contains("Read-only"));
    node.sh(&id, "echo new > /private/new").ok();
    assert_eq!(fs::read_to_string(volume.join("new")).unwrap(), "new\n");
    run(Command::new("mount").args(["-t", "tmpfs", "none"]).arg(volume.join("below"))).ok();
    fs::write(volume.join("below/late"), "late\n").unwrap();
    assert_eq!(node.sh(&id, "cat /slave/below/late").ok().stdout, "late\n");
    assert_eq!(node.sh(&id, "cat /shared/below/late").ok().stdout, "late\n");
    assert_ne!(node.sh(&id, "cat /private/below/late").code, 0, "a private volume sees no later mounts");
    node.sh(&id, "mount -t tmpfs none /shared/from-inside && echo up > /shared/from-inside/up").ok();
    assert_eq!(fs::read_to_string(volume.join("from-inside/up")).unwrap(), "up\n");
    assert_eq!(fs::read_to_string(&termination).unwrap(), "last words\n");
    node.remove_pod(&pod);
    for name in ["from-inside", "below", "."] {
        run(Command::new("umount").arg(volume.join(name))).ok();
    }
    node.assert_nothing_left();
}

#[test]
fn users_of_a_pod_can_be_its_own() {
    needs_cri!();
    if version() < (1, 7) {
        return skip("containerd 1.6 knows no user namespaces of pods");
    }
    let node = Node::start();
    let mapping = || vec![api::IdMapping { container_id: 0, host_id: 131_072, length: 65_536 }];
    let options = || {
        let users = api::UserNamespace { mode: api::NamespaceMode::Pod.into(), uids: mapping(), gids: mapping() };
        api::NamespaceOption { userns_options: Some(users), ..own_namespaces() }
    };
    let mut config = node.pod_config("pod");
    pod_security(&mut config).namespace_options = Some(options());
    config.annotations.insert("runx.dev/agent".into(), "true".into());
    let pod = node.run_pod(&config);
    let volume = node.path().join("volume");
    fs::create_dir(&volume).unwrap();
    let mut container =
        node.container_config("app", "id -u; touch /new /tmp/new; ls -n / | grep -c ' 0 *0 '; sleep 1000");
    security(&mut container).namespace_options = Some(options());
    let id = node.run_container(&pod, &container, &config);
    let pid = node.pid(&id);
    assert_ne!(namespace_of(pid, "user"), host_namespace("user"));
    let map = fs::read_to_string(format!("/proc/{pid}/uid_map")).unwrap();
    assert_eq!(map.split_ascii_whitespace().collect::<Vec<_>>(), ["0", "131072", "65536"]);
    assert_eq!(fs::metadata(format!("/proc/{pid}")).unwrap().uid(), 131_072);
    eventually("it says who it is", || node.log("pod", "app").lines().count() >= 2);
    let log = node.log("pod", "app");
    assert!(log.starts_with("0\n"), "{log}");
    assert_ne!(log.lines().nth(1), Some("0"), "its files belong to its root: {log}");
    assert_eq!(node.sh(&id, "id -u; cat /proc/self/uid_map | tr -s ' '").ok().stdout, "0\n 0 131072 65536\n");
    // So is its agent's user, which has a token all the same.
    eventually("its agent answers", || {
        let ask = "(printf 'GET /runx/v1/system HTTP/1.0\\r\\nAuthorization: Bearer %s\\r\\n\\r\\n' \
                   $(cat /dev/.runx-agent/token); sleep 1) | nc 127.0.0.1 44772";
        node.sh(&id, ask).stdout.contains("\"uid\":0")
    });
    let agent = node.sh(&id, "grep -l '^[r]unx-agent' /proc/[0-9]*/cmdline").ok().stdout;
    let maps = node.sh(&id, &format!("cat /proc/{}/uid_map", digits(&agent))).stdout;
    assert_eq!(maps.split_ascii_whitespace().collect::<Vec<_>>(), ["0", "131072", "65536"]);
    node.remove_pod(&pod);
    node.assert_nothing_left();
}

#[test]
fn features_of_the_handler_are_known() {
    needs_cri!();
    if version() < (2, 0) {
        return skip("containerd tells of features from 2.0 on");
    }
    let node = Node::start();
    let status = node.client().status(api::StatusRequest { verbose: false }).unwrap();
    let handler = |name: &str| {
        let found = status.runtime_handlers.iter().find(|handler| handler.name == name);
        found.unwrap_or_else(|| panic!("no {name}: {:?}", status.runtime_handlers)).features.unwrap_or_default()
    };
    let features = handler(BY_PATH);
    assert!(features.user_namespaces && features.recursive_read_only_mounts, "{features:?}");
    // For runtimes of other types than runc's containerd does not ask before 2.2.7 and 2.3.4.
    if version() >= (2, 4) {
        assert_eq!(handler("runx"), features);
    }
    let config = node.pod_config("pod");
    let pod = node.try_run_pod(&config, BY_PATH).unwrap();
    let volume = node.path().join("volume");
    fs::create_dir_all(volume.join("below")).unwrap();
    run(Command::new("mount").args(["-t", "tmpfs", "none"]).arg(volume.join("below"))).ok();
    let mut container = node.container_config("app", "sleep 1000");
    container.mounts = vec![api::Mount { readonly: true, recursive_read_only: true, ..mount(&volume, "/v") }];
    let id = node.run_container(&pod, &container, &config);
    assert!(node.sh(&id, "touch /v/below/x 2>&1").stdout.contains("Read-only"));
    node.remove_pod(&pod);
    run(Command::new("umount").arg(volume.join("below"))).ok();
    node.assert_nothing_left();
}

#[test]
fn a_module_and_a_native_program_share_a_pod() {
    needs_cri!();
    let node = Node::start();
    let module = wasm::show_everything(&node.name());
    let _forget = Forget(module.clone().into_bytes());
    let waits = format!(
        "(module (; {} ;) (memory (export \"memory\") 0) (func (export \"_start\") (loop $l (br $l))))",
        node.name()
    );
    let _forget_it = Forget(waits.clone().into_bytes());
    let rootfs = node.path().join("module");
    fs::create_dir_all(rootfs.join("etc")).unwrap();
    fs::write(rootfs.join("show.wat"), &module).unwrap();
    fs::write(rootfs.join("etc/marker"), "the marker\n").unwrap();
    node.containerd().import("runx.test/module:1", &rootfs, &["/show.wat"]);
    node.wait_for_image("runx.test/module:1");
    let config = node.pod_config("pod");
    let pod = node.run_pod(&config);
    let native = node.run_container(&pod, &node.container_config("native", "sleep 1000"), &config);
    let mut container = node.container_config("module", "");
    container.image.as_mut().unwrap().image = "runx.test/module:1".into();
    container.command.clear();
    container.args = vec!["/show.wat".into()];
    container.envs = vec![api::KeyValue { key: "NAME".into(), value: "value".into() }];
    let id = node.run_container(&pod, &container, &config);
    let status = node.wait(&id);
    assert_eq!(status.exit_code, 2, "the number of its arguments: {}", node.log("pod", "module"));
    let log = node.log("pod", "module");
    assert!(log.contains("NAME=value") && log.contains("the marker"), "{log}");
    assert_eq!(node.shims().len(), 1);
    assert_eq!(node.sh(&native, "echo undisturbed").ok().stdout, "undisturbed\n");
    // A component reaches what the native program serves on the pod's loopback.
    let component = wasm::connects(&node.name());
    let _forget = Forget(component.clone());
    fs::write(rootfs.join("connects.wasm"), &component).unwrap();
    fs::write(rootfs.join("waits.wat"), &waits).unwrap();
    node.containerd().import("runx.test/module:2", &rootfs, &[]);
    node.wait_for_image("runx.test/module:2");
    node.sh(&native, "echo from the native one | nc -l -p 7000 >/dev/null 2>&1 &");
    eventually("the native program listens", || node.sh(&native, "netstat -ltn").stdout.contains(":7000"));
    let run = |name: &str, program: &str| {
        let mut container = node.container_config(name, "");
        container.image.as_mut().unwrap().image = "runx.test/module:2".into();
        container.command = vec![program.into()];
        container.args.clear();
        node.run_container(&pod, &container, &config)
    };
    let id = run("connects", "/connects.wasm");
    assert_eq!(node.wait(&id).exit_code, 0, "{}", node.log("pod", "connects"));
    assert!(node.log("pod", "connects").contains("from the native one"), "{}", node.log("pod", "connects"));
    // There is no shell beside a module, and that is said.
    let id = run("waits", "/waits.wat");
    let refused = node.exec(&id, &["sh", "-c", "true"], 10).unwrap_err().message;
    assert!(refused.contains("sh") && refused.contains("the container runs a WASM module"), "{refused}");
    node.remove_pod(&pod);
    node.assert_nothing_left();
}

#[test]
fn an_artifact_is_the_image_of_a_pods_container() {
    needs_cri!();
    if version() < (1, 7) {
        return skip("this containerd cannot unpack an image with a layer of the type application/wasm: 1.7.7 can");
    }
    let node = Node::start();
    let module = wat::parse_str(wasm::show_everything(&node.name())).unwrap();
    let _forget = Forget(module.clone());
    let kinds = ("application/vnd.wasm.config.v0+json", "application/wasm");
    node.containerd().import_artifact("runx.test/artifact:1", &module, kinds, &[]);
    node.wait_for_image("runx.test/artifact:1");
    let config = node.pod_config("pod");
    let pod = node.run_pod(&config);
    let mut container = node.container_config("artifact", "");
    container.image.as_mut().unwrap().image = "runx.test/artifact:1".into();
    container.command = vec!["/hello.wasm".into()];
    container.args = vec!["one".into()];
    let id = node.run_container(&pod, &container, &config);
    assert_eq!(node.wait(&id).exit_code, 2, "{}", node.log("pod", "artifact"));
    node.remove_pod(&pod);
    node.assert_nothing_left();
}

#[test]
fn an_annotated_pod_has_an_agent_and_others_have_none() {
    needs_cri!();
    let node = Node::start();
    let port_of = |pod: &str, port: u16| {
        let address = node.pod_status(pod).network.unwrap().ip;
        std::net::TcpStream::connect((address.as_str(), port)).is_ok()
    };
    let plain = node.pod_config("plain");
    let quiet = node.run_pod(&plain);
    node.run_container(&quiet, &node.container_config("plain", "sleep 1000"), &plain);
    let mut config = node.pod_config("sandbox");
    for (key, value) in [
        ("runx.dev/agent", "true"),
        ("runx.dev/agent.containers", "first, second, fourth"),
        ("runx.dev/agent.port.second", "44800"),
        ("runx.dev/agent.envd-port.second", "0"),
    ] {
        config.annotations.insert(key.into(), value.into());
    }
    let pod = node.run_pod(&config);
    // As an ordinary user, with a root filesystem that cannot be written.
    let user = |name: &str| {
        let mut container = node.container_config(name, "sleep 1000");
        let context = security(&mut container);
        context.run_as_user = Some(api::Int64Value { value: 1000 });
        context.readonly_rootfs = true;
        container
    };
    let first = node.run_container(&pod, &user("first"), &config);
    let second = node.run_container(&pod, &user("second"), &config);
    let third = node.run_container(&pod, &node.container_config("third", "sleep 1000"), &config);
    for port in [44_772, 49_983, 44_800] {
        eventually("it listens", || port_of(&pod, port));
    }
    assert!(!port_of(&quiet, 44_772));
    let agents =
        |id: &str| node.sh(id, "cat /proc/[0-9]*/cmdline | tr '\\0' ' ' | grep -c -- '[-]-generate-token'").stdout;
    assert_eq!([agents(&first), agents(&second), agents(&third)].map(|text| text.trim().to_owned()), ["1", "1", "0"]);
    // The token is its user's, in memory, and the agent answers it alone.
    let ask = "t=$(cat /dev/.runx-agent/token /dev/shm/.runx-agent/token 2>/dev/null); \
               (printf 'GET /ping HTTP/1.0\\r\\nX-EXECD-ACCESS-TOKEN: %s\\r\\n\\r\\n' $t; sleep 1) | nc 127.0.0.1 44772 | head -1";
    let answered = node.sh(&first, ask);
    assert!(answered.stdout.starts_with("HTTP/1.0 200"), "{answered:?}");
    let refused = node.sh(&third, &ask.replace("$t;", "wrong;"));
    assert!(refused.stdout.starts_with("HTTP/1.0 401"), "{refused:?}");
    // Both SDKs drive it at once, where they are.
    let python = agent_python();
    if python.exists() {
        let token = node.sh(&first, "cat /dev/.runx-agent/token /dev/shm/.runx-agent/token 2>/dev/null").stdout;
        let address = node.pod_status(&pod).network.unwrap().ip;
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("agent/both.py");
        let mut both = Command::new(&python);
        both.arg(script).args([address.as_str(), "44772", "49983", "/dev/shm"]).env("AGENT_TOKEN", token.trim());
        assert_eq!(run(both.env("PYTHONDONTWRITEBYTECODE", "1")).ok().stdout, "both\n");
    }
    // Another one with the same port is refused, and nothing of it is left.
    let fourth = node.try_create(&pod, &user("fourth"), &config).unwrap();
    let refused = node.start_container(&fourth).unwrap_err().message;
    assert!(refused.contains("port 44772") && refused.contains(&first), "{refused}");
    node.remove_container(&fourth);
    // What is stopped takes its agent with it.
    node.stop_container(&first, 0);
    eventually("it is gone", || !port_of(&pod, 44_772));
    assert!(port_of(&pod, 44_800));
    node.remove_pod(&pod);
    node.remove_pod(&quiet);
    node.assert_nothing_left();
}

#[test]
fn an_agent_takes_its_token_from_a_secret_and_shares_the_pids_of_its_pod() {
    needs_cri!();
    let node = Node::start();
    let mut config = node.pod_config("shared");
    pod_security(&mut config).namespace_options.as_mut().unwrap().pid = api::NamespaceMode::Pod.into();
    config.annotations.insert("runx.dev/agent".into(), "true".into());
    config.annotations.insert("runx.dev/agent.token-file".into(), "/var/run/secrets/agent/token".into());
    let pod = node.run_pod(&config);
    let secret = node.path().join("secret");
    fs::create_dir(&secret).unwrap();
    fs::write(secret.join("token"), "from-a-secret\n").unwrap();
    let mut container = node.container_config("app", "sleep 4321");
    security(&mut container).namespace_options.as_mut().unwrap().pid = api::NamespaceMode::Pod.into();
    container.mounts = vec![api::Mount { readonly: true, ..mount(&secret, "/var/run/secrets/agent") }];
    let app = node.run_container(&pod, &container, &config);
    let ask = |token: &str| {
        let request = format!("printf 'GET /ping HTTP/1.0\\r\\nX-EXECD-ACCESS-TOKEN: {token}\\r\\n\\r\\n'");
        node.sh(&app, &format!("({request}; sleep 1) | nc 127.0.0.1 44772 | head -1")).stdout
    };
    eventually("it answers", || ask("from-a-secret").starts_with("HTTP/1.0 200"));
    assert!(ask("another").starts_with("HTTP/1.0 401"));
    // One of many in its namespace, it still waits for those whom its commands leave behind.
    let pid = digits(&node.sh(&app, "grep -l '^[r]unx-agent' /proc/[0-9]*/cmdline").ok().stdout);
    let body = r#"{"command": "(setsid sleep 0.1 &)"}"#;
    let request = format!(
        "printf 'POST /command HTTP/1.0\\r\\nX-EXECD-ACCESS-TOKEN: from-a-secret\\r\\nContent-Length: {}\\r\\n\\r\\n{body}'",
        body.len()
    );
    let done = node.sh(&app, &format!("({request}; sleep 1) | nc 127.0.0.1 44772"));
    assert!(done.stdout.contains("execution_complete"), "{done:?}");
    eventually("nobody waits to be buried", || {
        node.sh(&app, "cat /proc/[0-9]*/stat | grep -c ' Z '").stdout.trim() == "0"
    });
    // Its end is not the container's, nor the pod's.
    node.sh(&app, &format!("kill -9 {pid}")).ok();
    eventually("another one answers", || ask("from-a-secret").starts_with("HTTP/1.0 200"));
    assert_eq!(node.container_status(&app).state, api::ContainerState::ContainerRunning as i32);
    node.stop_container(&app, 0);
    node.remove_pod(&pod);
    node.assert_nothing_left();
}

/// The Python that has the SDKs, which `tests/agent/run` makes.
fn agent_python() -> PathBuf {
    let made = std::env::var_os("RUNX_AGENT_ENV").map(PathBuf::from);
    let made = made.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/agent-env"));
    made.join("bin/python")
}

/// The first number in a text.
fn digits(text: &str) -> String {
    text.chars().skip_while(|c| !c.is_ascii_digit()).take_while(char::is_ascii_digit).collect()
}

#[test]
fn what_cannot_run_is_told_of_by_its_name_and_leaves_nothing() {
    needs_cri!();
    let node = Node::start();
    let config = node.pod_config("pod");
    let pod = node.run_pod(&config);
    let refused = |name: &str, edit: &dyn Fn(&mut api::ContainerConfig), words: &[&str]| {
        let mut container = node.container_config(name, "true");
        edit(&mut container);
        let error = match node.try_create(&pod, &container, &config) {
            Ok(id) => {
                let started = node.start_container(&id);
                let error = started.expect_err(name);
                node.remove_container(&id);
                error
            }
            Err(error) => error,
        };
        for word in words {
            assert!(error.message.contains(word), "{word:?} is not in {error:?}");
        }
    };
    refused("missing", &|c| c.command = vec!["/no/such/program".into()], &["/no/such/program", "no such file"]);
    refused("not-executable", &|c| c.command = vec!["/etc/passwd".into()], &["/etc/passwd", "permission denied"]);
    refused("cwd", &|c| c.working_dir = "/etc/passwd".into(), &["/etc/passwd"]);
    refused("mount", &|c| c.mounts = vec![mount(node.path(), "/etc/passwd")], &["/etc/passwd", "ot a directory"]);
    // A pod whose sandbox cannot be made.
    let mut bad = node.pod_config("bad");
    bad.linux.as_mut().unwrap().sysctls = HashMap::from([("net.no.such.switch".into(), "1".into())]);
    let error = node.try_run_pod(&bad, "runx").unwrap_err();
    assert!(error.message.contains("net.no.such.switch") || error.message.contains("net/no/such/switch"), "{error:?}");
    let id = node.run_container(&pod, &node.container_config("app", "exit 0"), &config);
    assert_eq!(node.wait(&id).exit_code, 0, "the pod is as good as before");
    node.remove_pod(&pod);
    node.assert_nothing_left();
}

#[test]
fn many_containers_at_once_are_all_served() {
    needs_cri!();
    let node = Node::start();
    let config = node.pod_config("pod");
    let pod = node.run_pod(&config);
    let count = rounds(24);
    let ids: Vec<String> = std::thread::scope(|scope| {
        let start = |n: usize| {
            let (node, pod, config) = (&node, &pod, &config);
            scope.spawn(move || node.run_container(pod, &node.container_config(&format!("c{n}"), "sleep 1000"), config))
        };
        let threads: Vec<_> = (0..count).map(start).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(node.shims().len(), 1);
    for id in &ids {
        assert_eq!(node.container_status(id).state(), api::ContainerState::ContainerRunning);
    }
    node.remove_pod(&pod);
    node.assert_nothing_left();
}

#[test]
fn pods_of_containerds_own_runtime_are_undisturbed() {
    needs_cri!();
    let node = Node::start();
    let (ours, theirs) = (node.pod_config("ours"), node.pod_config("theirs"));
    let their_pod = node.try_run_pod(&theirs, RUNC).unwrap();
    let their_container = node.run_container(&their_pod, &node.container_config("app", "sleep 1000"), &theirs);
    let our_pod = node.run_pod(&ours);
    let our_container = node.run_container(&our_pod, &node.container_config("app", "sleep 1000"), &ours);
    for id in [&their_container, &our_container] {
        assert_eq!(node.sh(id, "echo here").ok().stdout, "here\n");
    }
    node.remove_pod(&our_pod);
    assert_eq!(node.sh(&their_container, "echo still here").ok().stdout, "still here\n");
    node.remove_pod(&their_pod);
    node.assert_nothing_left();
}
