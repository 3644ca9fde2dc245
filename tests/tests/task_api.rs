//! The Task API without containerd: every call in every state, beside containerd's own shim.

use std::collections::{BTreeSet, HashMap};

use containerd_shim_protos::api as pb;
use containerd_shim_protos::cgroups::metrics as v1;
use containerd_shim_protos::cgroups_v2::metrics as v2;
use containerd_shim_protos::events::task as topics;
use containerd_shim_protos::protobuf::{Message, MessageFull, text_format};
use containerd_shim_protos::shim::event::Envelope;
use runx_tests::command::eventually;
use runx_tests::shim::{Answer, Host, Make, Shim, refused};
use runx_tests::{needs_root, needs_runcs_shim};
use serde_json::json;

/// What both shims are asked, and what they answer, with names in the place of numbers.
struct Transcript<'a> {
    host: &'a Host,
    shim: Shim,
    lines: Vec<String>,
    pids: HashMap<u32, String>,
}

impl Transcript<'_> {
    fn say(&mut self, what: &str, answer: &str) {
        self.lines.push(format!("{what}: {answer}"));
    }

    fn pid(&mut self, name: &str, pid: u32) {
        self.pids.insert(pid, name.to_owned());
    }

    fn name(&self, pid: u32) -> String {
        if pid == 0 { "0".into() } else { self.pids.get(&pid).cloned().unwrap_or_else(|| "?".into()) }
    }

    /// Notes the outcome of a call: its error's code and text, or what `show` makes of the answer.
    fn note<T: std::fmt::Debug>(&mut self, what: &str, answer: Answer<T>, show: impl FnOnce(&Self, &T) -> String) {
        let line = match answer {
            Ok(answer) => show(self, &answer),
            Err(_) => {
                let (code, text) = refused(answer);
                format!("code {code}, {text}")
            }
        };
        self.say(what, &line);
    }

    fn state(&mut self, what: &str, id: &str, exec: &str) {
        let answer = self.shim.state(id, exec);
        self.note(what, answer, |this, state| {
            let at = state.exited_at.as_ref().map_or(0, |at| at.seconds);
            format!(
                "{} {:?} pid {} exit {} at {} terminal {} stdout {:?}",
                state.id,
                state.status.enum_value_or_default(),
                this.name(state.pid),
                state.exit_status,
                if at > 0 { "now".into() } else { at.to_string() },
                state.terminal,
                state.stdout.rsplit('/').next().unwrap_or_default(),
            )
        });
    }

    fn event(&self, envelope: &Envelope) -> String {
        let any = envelope.event.as_ref().expect("an envelope holds an event");
        let data = &any.value;
        fn parsed<M: Message>(data: &[u8]) -> M {
            M::parse_from_bytes(data).expect("the event is of its topic's type")
        }
        let rest = match envelope.topic.as_str() {
            "/tasks/create" => {
                let event: topics::TaskCreate = parsed(data);
                let io = event.io.unwrap_or_default();
                format!(
                    "{} pid {} bundle {} rootfs {} stdin {:?} terminal {}",
                    event.container_id,
                    self.name(event.pid),
                    event.bundle.ends_with(&event.container_id),
                    event.rootfs.len(),
                    io.stdin,
                    io.terminal
                )
            }
            "/tasks/start" => {
                let event: topics::TaskStart = parsed(data);
                format!("{} pid {}", event.container_id, self.name(event.pid))
            }
            "/tasks/exit" => {
                let event: topics::TaskExit = parsed(data);
                let at = event.exited_at.as_ref().is_some_and(|at| at.seconds > 0);
                let (id, pid) = (&event.id, self.name(event.pid));
                format!("{} {id} pid {pid} status {} at {at}", event.container_id, event.exit_status)
            }
            "/tasks/delete" => {
                let event: topics::TaskDelete = parsed(data);
                let at = event.exited_at.as_ref().is_some_and(|at| at.seconds > 0);
                let (id, pid) = (&event.id, self.name(event.pid));
                format!("{} {id:?} pid {pid} status {} at {at}", event.container_id, event.exit_status)
            }
            "/tasks/exec-added" => {
                let event: topics::TaskExecAdded = parsed(data);
                format!("{} {}", event.container_id, event.exec_id)
            }
            "/tasks/exec-started" => {
                let event: topics::TaskExecStarted = parsed(data);
                format!("{} {} pid {}", event.container_id, event.exec_id, self.name(event.pid))
            }
            "/tasks/oom" | "/tasks/paused" | "/tasks/resumed" => {
                let event: topics::TaskOOM = parsed(data);
                event.container_id
            }
            other => panic!("an event of topic {other}"),
        };
        format!("event {} {} in {}: {rest}", envelope.topic, any.type_url, envelope.namespace == self.host.namespace())
    }
}

fn sleeper() -> serde_json::Value {
    json!({"user": {"uid": 0, "gid": 0}, "args": ["sleep", "1000"], "cwd": "/", "env": ["PATH=/bin"]})
}

/// Every call in every state of a container and of an exec.
fn life(make: Make) -> Vec<String> {
    let host = Host::new(make);
    host.make_bundle("a", &["/bin/sleep", "1000"], |_| ());
    let shim = host.shim("a");
    let mut t = Transcript { host: &host, shim: shim.clone(), lines: Vec::new(), pids: HashMap::new() };
    let done = |_: &Transcript<'_>, _: &pb::Empty| "done".to_owned();
    let deleted = |this: &Transcript<'_>, answer: &pb::DeleteResponse| {
        let at = answer.exited_at.as_ref().map_or(0, |at| at.seconds);
        format!("deleted pid {} status {} at {}", this.name(answer.pid), answer.exit_status, at.signum())
    };
    // Before there is anything.
    t.state("state of nothing", "a", "");
    t.note("start of nothing", shim.start("a", ""), |_, _| "started".into());
    t.note("kill of nothing", shim.kill("a", "", 9, false), done);
    t.note("delete of nothing", shim.delete("a", ""), deleted);
    t.note("wait for nothing", shim.wait("a", ""), |_, _| "waited".into());
    t.note("pids of nothing", shim.pids("a"), |_, _| "pids".into());
    t.note("stats of nothing", shim.stats("a"), |_, _| "stats".into());
    t.note("pause of nothing", shim.pause("a"), done);
    t.note("exec in nothing", shim.exec("a", "e", &sleeper(), |_| ()), done);
    t.note("update of nothing", shim.update("a", &json!({})), done);
    t.note("connect to nothing", shim.connect_task("a"), |this, answer| format!("task {}", this.name(answer.task_pid)));
    // Created.
    let pid = shim.create(&host.create_request("a")).expect("create").pid;
    t.pid("init", pid);
    t.state("created", "a", "");
    t.note("connect", shim.connect_task("a"), |this, answer| format!("task {}", this.name(answer.task_pid)));
    t.note("pause of a created", shim.pause("a"), done);
    t.note("resume of a created", shim.resume("a"), done);
    t.note("update of a created", shim.update("a", &json!({"cpu": {"shares": 512}})), done);
    t.note("resize without a terminal", shim.resize("a", "", 80, 24), done);
    t.note("close of no stdin", shim.close_stdin("a", ""), done);
    t.note("pids of a created", shim.pids("a"), |this, answer| {
        answer.processes.iter().map(|process| this.name(process.pid)).collect::<Vec<_>>().join(" ")
    });
    t.note("shutdown", shim.shutdown("a"), done);
    t.note("start", shim.start("a", ""), |this, pid| format!("pid {}", this.name(*pid)));
    // Running.
    t.state("running", "a", "");
    t.note("second start", shim.start("a", ""), |_, _| "started".into());
    // Not so of an exec: that it was started twice makes containerd's shim, from 1.7 on, count an end too many, and fall
    // over one of these ends.
    t.note("delete of a running", shim.delete("a", ""), deleted);
    t.note("resume of a running", shim.resume("a"), done);
    t.note("update of a running", shim.update("a", &json!({"memory": {"limit": 64 << 20}})), done);
    t.note("unknown exec's state", shim.state("a", "none"), |_, _| "state".into());
    t.note("unknown exec's start", shim.start("a", "none"), |_, _| "started".into());
    t.note("unknown exec's kill", shim.kill("a", "none", 9, false), done);
    t.note("unknown exec's delete", shim.delete("a", "none"), deleted);
    t.note("unknown exec's resize", shim.resize("a", "none", 1, 1), done);
    // An exec.
    t.note("exec", shim.exec("a", "e", &sleeper(), |_| ()), done);
    t.note("exec of the same id", shim.exec("a", "e", &sleeper(), |_| ()), done);
    t.state("added exec", "a", "e");
    t.note("kill of an added exec", shim.kill("a", "e", 9, false), done);
    let answer = shim.start("a", "e");
    if let Ok(pid) = &answer {
        t.pid("exec", *pid);
    }
    t.note("start of an exec", answer, |this, pid| format!("pid {}", this.name(*pid)));
    t.state("running exec", "a", "e");
    t.note("delete of a running exec", shim.delete("a", "e"), deleted);
    t.note("pids with an exec", shim.pids("a"), |this, answer| {
        let mut list: Vec<String> = answer
            .processes
            .iter()
            .map(|process| {
                let info = process.info.as_ref().map(|info| (info.type_url.clone(), info.value.clone()));
                format!("{} {info:?}", this.name(process.pid))
            })
            .collect();
        list.sort();
        list.join(", ")
    });
    // Paused.
    t.note("pause", shim.pause("a"), done);
    t.state("paused", "a", "");
    t.state("exec in a paused", "a", "e");
    t.note("second pause", shim.pause("a"), done);
    t.note("start of a paused", shim.start("a", ""), |_, _| "started".into());
    t.note("delete of a paused", shim.delete("a", ""), deleted);
    t.note("update of a paused", shim.update("a", &json!({"cpu": {"shares": 256}})), done);
    t.note("exec in a paused", shim.exec("a", "p", &sleeper(), |_| ()), done);
    t.note("resume", shim.resume("a"), done);
    t.state("resumed", "a", "");
    // The exec ends.
    t.note("kill of an exec", shim.kill("a", "e", 9, false), done);
    t.note("wait for an exec", shim.wait("a", "e"), |_, answer| format!("status {}", answer.exit_status));
    t.state("ended exec", "a", "e");
    t.note("kill of an ended exec", shim.kill("a", "e", 9, false), done);
    t.note("resize of an ended exec", shim.resize("a", "e", 1, 1), done);
    t.note("start of an ended exec", shim.start("a", "e"), |_, _| "started".into());
    t.note("delete of an exec", shim.delete("a", "e"), deleted);
    t.note("second delete of an exec", shim.delete("a", "e"), deleted);
    // One that is never started.
    t.note("exec of what will not start", shim.exec("a", "n", &sleeper(), |_| ()), done);
    t.note("delete of what was not started", shim.delete("a", "n"), deleted);
    // An exec that is there when the first process ends.
    t.note("last exec", shim.exec("a", "l", &sleeper(), |_| ()), done);
    let answer = shim.start("a", "l");
    if let Ok(pid) = &answer {
        t.pid("last", *pid);
    }
    t.note("start of the last exec", answer, |this, pid| format!("pid {}", this.name(*pid)));
    t.note("kill", shim.kill("a", "", 9, false), done);
    t.note("wait", shim.wait("a", ""), |_, answer| format!("status {}", answer.exit_status));
    // Stopped.
    t.state("stopped", "a", "");
    t.state("exec of a stopped", "a", "l");
    t.note("kill of a stopped", shim.kill("a", "", 9, false), done);
    t.note("pause of a stopped", shim.pause("a"), done);
    t.note("resume of a stopped", shim.resume("a"), done);
    t.note("update of a stopped", shim.update("a", &json!({})), done);
    t.note("exec in a stopped", shim.exec("a", "s", &sleeper(), |_| ()), done);
    t.note("start of a stopped", shim.start("a", ""), |_, _| "started".into());
    t.note("wait for a stopped", shim.wait("a", ""), |_, answer| format!("status {}", answer.exit_status));
    t.note("delete", shim.delete("a", ""), deleted);
    t.note("second delete", shim.delete("a", ""), deleted);
    host.topics_until("a", "/tasks/delete");
    for envelope in host.events("a") {
        let line = t.event(&envelope);
        t.lines.push(line);
    }
    let _ = shim.shutdown("a");
    let lines = t.lines;
    host.assert_nothing_left();
    lines
}

#[test]
fn every_call_in_every_state_is_answered_as_containerds_shim_does() {
    needs_root!();
    needs_runcs_shim!();
    let (ours, theirs) = (life(Make::Runx), life(Make::Runc));
    for (ours, theirs) in ours.iter().zip(&theirs) {
        assert_eq!(ours, theirs);
    }
    assert_eq!(ours.len(), theirs.len());
}

/// The names of all fields that say something, with those of the messages that they are in.
fn filled(message: &impl MessageFull) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    let mut within: Vec<String> = Vec::new();
    for line in text_format::print_to_string_pretty(message).lines().map(str::trim) {
        if let Some(name) = line.strip_suffix(" {") {
            within.push(name.to_owned());
        } else if line == "}" {
            within.pop();
        } else if let Some((name, _)) = line.split_once(':') {
            names.insert(within.iter().map(String::as_str).chain([name]).collect::<Vec<_>>().join("."));
        }
    }
    names
}

fn statistics(make: Make) -> (String, BTreeSet<String>) {
    let host = Host::new(make);
    host.make_bundle(
        "a",
        // Processor time, and memory that is taken and given back, beside memory that stays.
        &[
            "/bin/sh",
            "-c",
            "x=0; while [ $x -lt 100000 ]; do x=$((x+1)); done; \
                            dd if=/dev/zero of=/dev/null bs=16M count=1; exec sleep 1000",
        ],
        |config| {
            config["linux"]["resources"] = json!({
                "devices": [{"allow": false, "access": "rwm"}],
                "memory": {"limit": 64 << 20}, "pids": {"limit": 50}, "cpu": {"quota": 20000, "period": 100_000}
            });
        },
    );
    let shim = host.shim("a");
    shim.create(&host.create_request("a")).expect("create");
    let pid = shim.start("a", "").expect("start");
    // Its share of a processor is small, and others may be busy on it.
    eventually("it has used and given back what is counted", || {
        std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name == "sleep\n")
    });
    let (mut kind, mut names) = (String::new(), BTreeSet::new());
    // The kernel adds up what its processors count every few seconds only, and until then shows zeros.
    for _ in 0..12 {
        std::thread::sleep(std::time::Duration::from_millis(300));
        let any = shim.stats("a").expect("stats").stats.unwrap();
        names.extend(match any.type_url.as_str() {
            "io.containerd.cgroups.v1.Metrics" => filled(&v1::Metrics::parse_from_bytes(&any.value).expect("metrics")),
            "io.containerd.cgroups.v2.Metrics" => filled(&v2::Metrics::parse_from_bytes(&any.value).expect("metrics")),
            other => panic!("statistics of type {other}"),
        });
        kind.clone_from(&any.type_url);
    }
    shim.kill("a", "", 9, false).expect("kill");
    shim.wait("a", "").expect("wait");
    shim.delete("a", "").expect("delete");
    let _ = shim.shutdown("a");
    host.assert_nothing_left();
    (kind, names)
}

#[test]
fn statistics_say_all_that_containerds_shim_says() {
    needs_root!();
    needs_runcs_shim!();
    let (mut ours, theirs) = (statistics(Make::Runx), statistics(Make::Runc));
    assert_eq!(ours.0, theirs.0);
    // What the kernel counts now and then.
    let by_chance = [
        "maj",
        "dirty",
        "writeback",
        "file",
        "cache",
        "slab",
        "workingset",
        "pgactivate",
        "pgscan",
        "kernel",
        "io.",
        "blkio",
        "thp",
    ];
    let expected: Vec<_> = theirs.1.iter().filter(|name| !by_chance.iter().any(|word| name.contains(word))).collect();
    // A counter that the kernel left at zero in one life is not so in all of them; a field that is not there is never.
    for _ in 0..2 {
        if expected.iter().any(|name| !ours.1.contains(*name)) {
            ours.1.extend(statistics(Make::Runx).1);
        }
    }
    let missing: Vec<_> = expected.into_iter().filter(|name| !ours.1.contains(*name)).collect();
    assert!(missing.is_empty(), "missing: {missing:?}");
}
