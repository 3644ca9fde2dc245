//! What shims count of their starts, for the node's metrics: by kind, whoever starts at the same time, and whoever is killed.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use runx_tests::command::eventually;
use runx_tests::shim::{Host, Make, Shim};
use runx_tests::wasm::show_everything;
use runx_tests::{needs_root, repeats};
use serde_json::json;

fn file(host: &Host) -> PathBuf {
    PathBuf::from("/run/containerd/runx").join(host.namespace()).join(".starts")
}

/// The numbers of the file, each of which has to be whole.
fn numbers(host: &Host) -> BTreeMap<String, u64> {
    let text = fs::read_to_string(file(host)).unwrap_or_default();
    let lines = text.lines().map(|line| {
        let (name, number) = line.split_once(' ').unwrap_or_else(|| panic!("{line:?} is no line: {text}"));
        assert_eq!(number.len(), 20, "{line:?}");
        (name.to_owned(), number.parse().unwrap_or_else(|e| panic!("{line:?}: {e}")))
    });
    lines.collect()
}

/// How many of a kind have started.
fn started(host: &Host, kind: &str) -> u64 {
    let of = |name: &String| {
        name.strip_prefix(kind).is_some_and(|rest| rest.starts_with('.')) && !name.ends_with("microseconds")
    };
    numbers(host).iter().filter(|(name, _)| of(name)).map(|(_, number)| number).sum()
}

fn run(host: &Host, id: &str) -> Shim {
    let shim = host.shim(id);
    shim.create(&host.create_request(id)).unwrap();
    shim.start(id, "").unwrap();
    shim
}

fn end(shim: &Shim, id: &str) {
    let _ = shim.kill(id, "", libc::SIGKILL, false);
    shim.wait(id, "").unwrap();
    shim.delete(id, "").unwrap();
    let _ = shim.shutdown(id);
}

fn ports() -> [String; 2] {
    let listeners = [0; 2].map(|_| std::net::TcpListener::bind("127.0.0.1:0").unwrap());
    listeners.map(|listener| listener.local_addr().unwrap().port().to_string())
}

#[test]
fn starts_are_counted_by_kind_and_failures_too() {
    needs_root!();
    let host = Host::new(Make::Runx);
    host.make_bundle("native", &["/bin/sleep", "1000"], |_| ());
    host.make_bundle("sandbox", &["/bin/sleep", "1000"], |spec| {
        spec["annotations"] = json!({"io.kubernetes.cri.container-type": "sandbox"});
    });
    host.make_bundle("module", &["/app.wasm"], |_| ());
    fs::write(host.path().join("rootfs/app.wasm"), show_everything(host.namespace())).unwrap();
    let [own, second] = ports();
    host.make_bundle("agent", &["/bin/sleep", "1000"], |spec| {
        spec["annotations"] =
            json!({"runx.dev/agent": "true", "runx.dev/agent.port": own, "runx.dev/agent.envd-port": second});
    });
    host.make_bundle("wrong", &["/nosuch"], |_| ());
    let kinds = |native, sandbox, wasm, agent| {
        let found = ["native", "sandbox", "wasm", "agent"].map(|kind| started(&host, kind));
        found == [native, sandbox, wasm, agent]
    };
    for (id, expected) in
        [("native", [1, 0, 0, 0]), ("sandbox", [1, 1, 0, 0]), ("module", [1, 1, 1, 0]), ("agent", [2, 1, 1, 1])]
    {
        let shim = run(&host, id);
        let [native, sandbox, wasm, agent] = expected;
        eventually(&format!("{id} is counted: {:?}", numbers(&host)), || kinds(native, sandbox, wasm, agent));
        end(&shim, id);
    }
    let micros = numbers(&host)["native.microseconds"];
    assert!(micros > 0);
    let shim = host.shim("wrong");
    let refused = shim.create(&host.create_request("wrong")).is_err() || shim.start("wrong", "").is_err();
    assert!(refused);
    eventually("a failure is counted", || numbers(&host)["failed"] == 1);
    assert!(kinds(2, 1, 1, 1) && numbers(&host)["native.microseconds"] == micros);
    let _ = shim.shutdown("wrong");
    host.delete_command("wrong");
    host.assert_nothing_left();
}

#[test]
fn many_shims_at_once_count_every_start() {
    needs_root!();
    let host = Host::new(Make::Runx);
    let ids: Vec<String> = (0..repeats(12)).map(|at| format!("m{at}")).collect();
    for id in &ids {
        host.make_bundle(id, &["/bin/sleep", "1000"], |_| ());
    }
    std::thread::scope(|scope| {
        for id in &ids {
            let host = &host;
            scope.spawn(move || end(&run(host, id), id));
        }
    });
    eventually("all are counted", || started(&host, "native") == ids.len() as u64);
    host.assert_nothing_left();
}

#[test]
fn a_killed_shim_leaves_whole_numbers_and_the_next_one_counts_on() {
    needs_root!();
    let host = Host::new(Make::Runx);
    let mut before = 0;
    for round in 0..repeats(15) {
        let id = format!("k{round}");
        host.make_bundle(&id, &["/bin/sleep", "1000"], |_| ());
        let shim = run(&host, &id);
        // Around the moment at which it counts.
        std::thread::sleep(Duration::from_micros(round as u64 * 40));
        let daemon = shim.connect_task(&id).map(|task| task.shim_pid as i32);
        // SAFETY: only a signal, to this test's shim.
        unsafe { libc::kill(daemon.unwrap(), libc::SIGKILL) };
        host.delete_command(&id).ok();
        let now = started(&host, "native");
        assert!((before..=round as u64 + 1).contains(&now), "{before}, then {now}");
        before = now;
    }
    host.make_bundle("last", &["/bin/sleep", "1000"], |_| ());
    end(&run(&host, "last"), "last");
    eventually("it is counted", || started(&host, "native") == before + 1);
    host.assert_nothing_left();
}

#[test]
fn what_lies_in_the_files_place_or_has_its_lock_stops_no_start() {
    needs_root!();
    let host = Host::new(Make::Runx);
    host.make_bundle("first", &["/bin/sleep", "1000"], |_| ());
    end(&run(&host, "first"), "first");
    eventually("it is counted", || started(&host, "native") == 1);
    let lock =
        nix::fcntl::Flock::lock(fs::File::open(file(&host)).unwrap(), nix::fcntl::FlockArg::LockExclusive).unwrap();
    host.make_bundle("second", &["/bin/sleep", "1000"], |_| ());
    end(&run(&host, "second"), "second");
    drop(lock);
    // A link out of there is not followed.
    let elsewhere = host.path().join("elsewhere");
    fs::write(&elsewhere, "kept").unwrap();
    fs::remove_file(file(&host)).unwrap();
    std::os::unix::fs::symlink(&elsewhere, file(&host)).unwrap();
    host.make_bundle("third", &["/bin/sleep", "1000"], |_| ());
    end(&run(&host, "third"), "third");
    assert_eq!(fs::read_to_string(&elsewhere).unwrap(), "kept");
    host.assert_nothing_left();
}
