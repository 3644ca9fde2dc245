//! What the kubelet does with pods that run: probes, streams, logs, statistics, updates, and restarts of containerd.

use std::fs;
use std::path::Path;
use std::time::Duration;

use k8s_cri::v1 as api;
use runx_tests::command::eventually;
use runx_tests::cri::{Node, newer, version};
use runx_tests::{cgroup, needs_cri, repeats, rounds, skip};

#[test]
fn a_lack_of_memory_is_the_reason_that_is_given() {
    needs_cri!();
    let node = Node::start();
    let config = node.pod_config("pod");
    let pod = node.run_pod(&config);
    let limited = |name: &str, script: &str| {
        let mut container = node.container_config(name, script);
        container.linux.as_mut().unwrap().resources =
            Some(api::LinuxContainerResources { memory_limit_in_bytes: 24 << 20, ..Default::default() });
        node.run_container(&pod, &container, &config)
    };
    for round in 0..repeats(3) {
        let id = limited(&format!("hungry{round}"), "exec tail -c 200000000 /dev/zero");
        let status = node.wait(&id);
        assert_eq!((status.exit_code, status.reason.as_str()), (137, "OOMKilled"));
    }
    let id = limited("modest", "exit 0");
    assert_eq!(node.wait(&id).reason, "Completed");
    node.remove_pod(&pod);
    node.assert_nothing_left();
}

#[test]
fn probes_are_executed_and_end_in_time() {
    needs_cri!();
    let node = Node::start();
    let config = node.pod_config("pod");
    let pod = node.run_pod(&config);
    let id = node.run_container(&pod, &node.container_config("app", "sleep 1000"), &config);
    let done = node.sh(&id, "echo out; echo err >&2; exit 5");
    assert_eq!((done.code, done.stdout.as_str(), done.stderr.as_str()), (5, "out\n", "err\n"));
    let numbers: String = (1..=100_000).map(|n| format!("{n}\n")).collect();
    assert!(node.sh(&id, "seq 1 100000").ok().stdout == numbers, "output is lost or changed");
    let error = node.exec(&id, &["/no/such/program"], 0).unwrap_err();
    assert!(error.message.contains("/no/such/program"), "{error:?}");
    let error = node.exec(&id, &["/bin/sleep", "1000"], 1).unwrap_err();
    assert!(error.message.contains("timeout"), "{error:?}");
    eventually("what took too long is gone", || {
        !node.sh(&id, "ps").stdout.contains("sleep 1000\n") || {
            let list = node.sh(&id, "ps").stdout;
            list.matches("sleep 1000").count() == 1
        }
    });
    let shim = node.shims()[0];
    let count = |what: &str| fs::read_dir(format!("/proc/{shim}/{what}")).unwrap().count();
    node.exec(&id, &["/bin/true"], 0).unwrap().ok();
    let before = count("fd");
    for _ in 0..rounds(60) {
        node.exec(&id, &["/bin/true"], 10).unwrap().ok();
    }
    eventually("its descriptors are as before", || count("fd") <= before);
    eventually("its threads have ended", || count("task") == 1);
    node.remove_pod(&pod);
    node.assert_nothing_left();
}

#[test]
fn streams_of_exec_attach_and_port_forward_work() {
    needs_cri!();
    let node = Node::start();
    let config = node.pod_config("pod");
    let pod = node.run_pod(&config);
    let mut container = node.container_config("app", "while read -r line; do echo \"got $line\"; done; echo end");
    container.stdin = true;
    let id = node.run_container(&pod, &container, &config);
    // exec without and with a terminal.
    let mut stream = node.exec_stream(&id, &["/bin/sh", "-c", "read -r a; echo \"<$a>\"; echo err >&2; exit 9"], false);
    stream.write("hello\n");
    assert_eq!(stream.finish(), (9, "<hello>\n".to_owned(), "err\n".to_owned()));
    let mut stream = node.exec_stream(&id, &["/bin/sh"], true);
    stream.resize(91, 31);
    // containerd resizes when it comes to it.
    stream.write("until test \"$(stty size 2>/dev/null)\" = '31 91'; do sleep 0.1; done; stty size; tty\n");
    let shown = stream.read_until("/dev/pts/");
    assert!(shown.contains("stty size"), "the terminal echoes: {shown:?}");
    assert!(shown.contains("\n31 91\r\n"), "{shown:?}");
    stream.write("exit 4\n");
    assert_eq!(stream.finish().0, 4);
    // attach: what is written is read, and it is in the log, too.
    let mut stream = node.attach_stream(&id, true, false);
    stream.write("from outside\n");
    stream.read_until("got from outside\n");
    drop(stream);
    let mut stream = node.attach_stream(&id, true, false);
    stream.write("again\n");
    stream.read_until("got again\n");
    eventually("it is in the log", || node.log("pod", "app") == "got from outside\ngot again\n");
    // A port of the pod, behind which another container answers.
    let script = "mkdir /www; echo served > /www/index.html; exec busybox httpd -f -p 8080 -h /www";
    let server = node.container_config("server", script);
    node.run_container(&pod, &server, &config);
    let get = "printf 'GET / HTTP/1.0\\r\\n\\r\\n' | nc 127.0.0.1 8080";
    eventually("it serves", || node.sh(&id, get).stdout.contains("served"));
    let mut stream = node.port_forward_stream(&pod, 8080);
    stream.write("GET / HTTP/1.0\r\n\r\n");
    stream.hear("served");
    node.remove_pod(&pod);
    node.assert_nothing_left();
}

#[test]
fn a_terminal_of_a_container_is_attached_to() {
    needs_cri!();
    let node = Node::start();
    let config = node.pod_config("pod");
    let pod = node.run_pod(&config);
    let sized = "until test \"$(stty size 2>/dev/null)\" = '17 77'; do sleep 0.1; done; stty size";
    let mut container = node.container_config("app", &format!("read -r line; echo \"<$line>\"; {sized}; sleep 1000"));
    (container.stdin, container.tty) = (true, true);
    let id = node.run_container(&pod, &container, &config);
    let mut stream = node.attach_stream(&id, true, true);
    stream.resize(77, 17);
    stream.write("word\n");
    stream.read_until("17 77");
    node.remove_pod(&pod);
    node.assert_nothing_left();
}

#[test]
fn logs_are_rotated_without_a_loss() {
    needs_cri!();
    let node = Node::start();
    let config = node.pod_config("pod");
    let pod = node.run_pod(&config);
    // The rest comes after the last rotation, however long that takes.
    let script = "i=0; while [ $i -lt 400 ]; do i=$((i+1)); echo line $i; [ $((i % 20)) -ne 0 ] || sleep 0.02; \
                  [ $i -ne 300 ] || until test -e /tmp/go; do sleep 0.02; done; done; sleep 1000";
    let id = node.run_container(&pod, &node.container_config("app", script), &config);
    let log = node.logs("pod").join("app.log");
    let mut pieces = String::new();
    for n in 0..5 {
        std::thread::sleep(Duration::from_millis(60));
        let old = log.with_extension(format!("log.{n}"));
        fs::rename(&log, &old).unwrap();
        node.client().reopen_container_log(api::ReopenContainerLogRequest { container_id: id.clone() }).unwrap();
        pieces.push_str(&fs::read_to_string(old).unwrap());
    }
    node.sh(&id, "touch /tmp/go");
    eventually("the last line comes", || fs::read_to_string(&log).unwrap().contains("line 400\n"));
    pieces.push_str(&fs::read_to_string(&log).unwrap());
    let lines: Vec<&str> = pieces.lines().map(|line| line.splitn(4, ' ').nth(3).unwrap()).collect();
    let expected: Vec<String> = (1..=400).map(|n| format!("line {n}")).collect();
    assert_eq!(lines, expected);
    node.remove_pod(&pod);
    node.assert_nothing_left();
}

#[test]
fn statistics_are_what_the_kubelet_sums_up() {
    needs_cri!();
    let node = Node::start();
    let config = node.pod_config("pod");
    let pod = node.run_pod(&config);
    let script = "x=0; while [ $x -lt 200000 ]; do x=$((x+1)); done; sleep 1000";
    let id = node.run_container(&pod, &node.container_config("app", script), &config);
    let stats = |id: &str| {
        let request = api::ContainerStatsRequest { container_id: id.into() };
        node.client().container_stats(request).unwrap().stats.unwrap()
    };
    eventually("it has used the processor", || {
        let cpu = stats(&id).cpu.unwrap();
        cpu.usage_core_nano_seconds.is_some_and(|used| used.value > 10_000_000) && cpu.timestamp > 0
    });
    let memory = stats(&id).memory.unwrap();
    assert!(memory.working_set_bytes.unwrap().value > 0);
    assert_eq!(stats(&id).attributes.unwrap().metadata.unwrap().name, "app");
    let all = node.client().list_container_stats(api::ListContainerStatsRequest::default()).unwrap().stats;
    assert_eq!(all.len(), 1);
    if version() >= (1, 7) {
        let request = api::PodSandboxStatsRequest { pod_sandbox_id: pod.clone() };
        let stats = node.client().pod_sandbox_stats(request).unwrap().stats.unwrap().linux.unwrap();
        assert!(stats.cpu.unwrap().usage_core_nano_seconds.unwrap().value > 10_000_000);
        assert!(stats.memory.unwrap().working_set_bytes.unwrap().value > 0);
        assert!(stats.process.unwrap().process_count.unwrap().value >= 1);
        assert_eq!(stats.network.unwrap().default_interface.unwrap().name, "eth0");
        assert_eq!(stats.containers.len(), 1);
    }
    node.remove_pod(&pod);
    node.assert_nothing_left();
}

#[test]
fn resources_are_updated_while_it_runs() {
    needs_cri!();
    let node = Node::start();
    let config = node.pod_config("pod");
    let pod = node.run_pod(&config);
    let mut container = node.container_config("app", "sleep 1000");
    let resources = |memory: i64, quota: i64, shares: i64| api::LinuxContainerResources {
        memory_limit_in_bytes: memory,
        cpu_period: 100_000,
        cpu_quota: quota,
        cpu_shares: shares,
        ..Default::default()
    };
    container.linux.as_mut().unwrap().resources = Some(resources(64 << 20, 50_000, 512));
    let id = node.run_container(&pod, &container, &config);
    let group = format!("{}/{id}", node.name());
    let read = |controller: &str, v1: &str, v2: &str| {
        let path = if cgroup::unified() {
            format!("/sys/fs/cgroup/{group}/{v2}")
        } else {
            format!("/sys/fs/cgroup/{controller}/{group}/{v1}")
        };
        fs::read_to_string(&path).unwrap_or_else(|e| panic!("read {path}: {e}")).trim().to_owned()
    };
    let memory = || read("memory", "memory.limit_in_bytes", "memory.max");
    let quota = || read("cpu", "cpu.cfs_quota_us", "cpu.max").split(' ').next().unwrap().to_owned();
    assert_eq!((memory(), quota()), ((64u64 << 20).to_string(), "50000".to_owned()));
    let update = |linux| {
        let request =
            api::UpdateContainerResourcesRequest { container_id: id.clone(), linux: Some(linux), ..Default::default() };
        node.client().update_container_resources(request).unwrap();
    };
    update(resources(96 << 20, 25_000, 256));
    assert_eq!((memory(), quota()), ((96u64 << 20).to_string(), "25000".to_owned()));
    update(resources(48 << 20, 0, 0));
    assert_eq!(memory(), (48u64 << 20).to_string());
    node.remove_pod(&pod);
    node.assert_nothing_left();
}

#[test]
fn pods_outlive_a_restart_of_containerd() {
    needs_cri!();
    let mut node = Node::start();
    let config = node.pod_config("pod");
    let pod = node.run_pod(&config);
    let script = "i=0; until test -e /tmp/end; do i=$((i+1)); echo line $i; sleep 0.01; done";
    let chatty = node.run_container(&pod, &node.container_config("chatty", script), &config);
    let ending = node.run_container(
        &pod,
        &node.container_config("ending", "until test -e /tmp/end; do sleep 0.01; done; exit 7"),
        &config,
    );
    let (chatty_pid, ending_pid) = (node.pid(&chatty), node.pid(&ending));
    eventually("it talks", || node.log("pod", "chatty").contains("line 20\n"));
    node.restart_around(|| {
        fs::write(format!("/proc/{ending_pid}/root/tmp/end"), "").unwrap();
        eventually("it has ended", || !Path::new(&format!("/proc/{ending_pid}")).exists());
        std::thread::sleep(Duration::from_millis(300));
    });
    assert_eq!(node.pod_status(&pod).state(), api::PodSandboxState::SandboxReady);
    assert_eq!(node.pid(&chatty), chatty_pid);
    let status = node.wait(&ending);
    // From 1.7 on containerd itself deletes, as it starts, a task that ended while it was away.
    assert!(status.exit_code == 7 || version() >= (1, 7), "{status:?}");
    assert_eq!(node.sh(&chatty, "echo alive").ok().stdout, "alive\n");
    let before = node.log("pod", "chatty").lines().count();
    eventually("it talks on", || node.log("pod", "chatty").lines().count() > before + 20);
    fs::write(format!("/proc/{chatty_pid}/root/tmp/end"), "").unwrap();
    node.wait(&chatty);
    // Nothing that it said meanwhile is lost.
    let log = node.log("pod", "chatty");
    let expected: String = (1..=log.lines().count()).map(|n| format!("line {n}\n")).collect();
    assert_eq!(log, expected);
    node.remove_pod(&pod);
    node.assert_nothing_left();
}

#[test]
fn pods_outlive_an_upgrade_of_containerd() {
    needs_cri!();
    let Some(newer) = newer() else {
        return skip("RUNX_NEWER_CONTAINERD names no newer containerd");
    };
    let mut node = Node::start();
    let config = node.pod_config("pod");
    let pod = node.run_pod(&config);
    let old = node.run_container(&pod, &node.container_config("old", "echo here; sleep 1000"), &config);
    let pid = node.pid(&old);
    node.upgrade_to(&newer);
    assert_eq!(node.pod_status(&pod).state(), api::PodSandboxState::SandboxReady);
    assert_eq!(node.pid(&old), pid);
    assert_eq!(node.sh(&old, "echo alive").ok().stdout, "alive\n");
    let new = node.run_container(&pod, &node.container_config("new", "exit 6"), &config);
    assert_eq!(node.wait(&new).exit_code, 6);
    assert_eq!(node.shims().len(), 1);
    node.stop_container(&old, 0);
    assert_eq!(node.wait(&old).exit_code, 137);
    node.remove_pod(&pod);
    node.assert_nothing_left();
}

#[test]
fn the_end_of_a_sandbox_and_of_a_shim_are_noticed() {
    needs_cri!();
    let node = Node::start();
    let kill = |pid: i32| {
        // SAFETY: the pid is that of a process of this test's own node.
        unsafe { libc::kill(pid, libc::SIGKILL) };
    };
    let config = node.pod_config("sandbox");
    let pod = node.run_pod(&config);
    let id = node.run_container(&pod, &node.container_config("app", "sleep 1000"), &config);
    kill(node.pod_info(&pod)["pid"].as_i64().unwrap() as i32);
    eventually("the pod is not ready", || node.pod_status(&pod).state() == api::PodSandboxState::SandboxNotready);
    assert_eq!(node.container_status(&id).state(), api::ContainerState::ContainerRunning);
    node.remove_pod(&pod);
    node.assert_nothing_left();
    let config = node.pod_config("shim");
    let pod = node.run_pod(&config);
    let id = node.run_container(&pod, &node.container_config("app", "sleep 1000"), &config);
    kill(node.shims()[0]);
    let status = node.wait(&id);
    assert_ne!(status.exit_code, 0);
    eventually("the pod is not ready", || node.pod_status(&pod).state() == api::PodSandboxState::SandboxNotready);
    node.remove_pod(&pod);
    node.assert_nothing_left();
}
