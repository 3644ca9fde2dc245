//! How long it takes until a pod's container runs, as the kubelet asks for it: the sandbox, create and start; and then
//! an exec of `true`. At last the memory that the shims of a pod with five containers take.
//!
//!     cri-bench ROUNDS GAP_MS

use std::time::{Duration, Instant};

use k8s_cri::v1 as api;
use runx_tests::bench::{Row, Stopwatch, arguments, modes, pss};
use runx_tests::cri::{Node, handlers};
use serde_json::json;

const CONTAINERS: usize = 5;

/// A pod and the container that is to be in it, on a network of their own or on the node's.
fn configs(node: &Node, name: &str, own_network: bool) -> (api::PodSandboxConfig, api::ContainerConfig) {
    let mut pod = node.pod_config(name);
    let mut container = node.container_config("app", "sleep 1000");
    if !own_network {
        pod.hostname = String::new();
        let of_pod = pod.linux.as_mut().and_then(|linux| linux.security_context.as_mut()?.namespace_options.as_mut());
        let of_container =
            container.linux.as_mut().and_then(|linux| linux.security_context.as_mut()?.namespace_options.as_mut());
        for options in [of_pod, of_container] {
            options.expect("it has options").network = api::NamespaceMode::Node.into();
        }
    }
    (pod, container)
}

fn main() {
    let (rounds, gap) = arguments();
    let node = Node::start();
    for (bundle, own_network) in [("own network", true), ("the node's network", false)] {
        for (mode, pause) in modes(gap) {
            for round in 0..rounds {
                for runtime in handlers() {
                    let (config, container) = configs(&node, &format!("{runtime}-{round}"), own_network);
                    std::thread::sleep(pause);
                    let mut watch = Stopwatch::start();
                    let request =
                        api::RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: runtime.into() };
                    let pod = node.client().run_pod_sandbox(request).expect("run the sandbox").pod_sandbox_id;
                    watch.lap("RunPodSandbox");
                    let id = node.try_create(&pod, &container, &config).expect("create");
                    watch.lap("CreateContainer");
                    node.start_container(&id).expect("start");
                    watch.lap("StartContainer");
                    std::thread::sleep(pause);
                    let begun = Instant::now();
                    node.exec(&id, &["/bin/true"], 0).expect("exec").ok();
                    let exec = begun.elapsed();
                    node.remove_pod(&pod);
                    // The first fills caches.
                    if round > 0 {
                        let row = Row { suite: "pods", bundle, mode, runtime };
                        watch.report(&row, "until it runs");
                        row.print("ExecSync", exec);
                    }
                }
            }
        }
    }
    for runtime in handlers() {
        let config = node.pod_config(&format!("{runtime}-memory"));
        let pod = node.try_run_pod(&config, runtime).expect("run the sandbox");
        for n in 0..CONTAINERS {
            node.run_container(&pod, &node.container_config(&format!("app{n}"), "sleep 1000"), &config);
        }
        std::thread::sleep(Duration::from_secs(2));
        let shims = node.shims();
        let all = [shims.clone(), node.spawners()].concat();
        println!(
            "{}",
            json!({"suite": "memory", "bundle": format!("a pod of {CONTAINERS} containers"), "runtime": runtime,
                   "shims": shims.len(), "kib": pss(&all)})
        );
        node.remove_pod(&pod);
    }
    node.assert_nothing_left();
}
