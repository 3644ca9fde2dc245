//! The fields of `process` and those of `linux` that are about the process itself.

use std::fs;

use runx_tests::bundle::Bundle;
use runx_tests::command::eventually;
use runx_tests::needs_root;
use serde_json::{Value, json};

/// Starts a container that sleeps, and returns its pid.
fn running(bundle: &Bundle) -> i32 {
    bundle.create().ok();
    bundle.runx(&["start", bundle.id()]).ok();
    bundle.state()["pid"].as_i64().unwrap() as i32
}

fn end(bundle: &Bundle) {
    bundle.runx(&["delete", "--force", bundle.id()]).ok();
    bundle.assert_nothing_left();
}

fn field(pid: i32, file: &str, name: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap();
    let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{name} in {text}"));
    line.split_once(':').unwrap().1.trim().to_owned()
}

fn io_priority(pid: i32) -> i64 {
    // SAFETY: only integers are passed.
    unsafe { libc::syscall(libc::SYS_ioprio_get, 1, pid) }
}

/// Policy, nice value and real-time priority.
fn scheduling(pid: i32) -> (i32, i32, i32) {
    // SAFETY: sched_param is plain data; both calls only read.
    unsafe {
        let mut parameters: libc::sched_param = std::mem::zeroed();
        assert_eq!(libc::sched_getparam(pid, &mut parameters), 0);
        (libc::sched_getscheduler(pid), libc::getpriority(libc::PRIO_PROCESS, pid as u32), parameters.sched_priority)
    }
}

// covers: process.scheduler process.ioPriority
#[test]
fn a_process_and_its_execs_are_scheduled_as_described() {
    needs_root!();
    let mut bundle = Bundle::script("sleep 100");
    bundle.set("/process", "scheduler", json!({"policy": "SCHED_BATCH", "nice": 7}));
    bundle.set("/process", "ioPriority", json!({"class": "IOPRIO_CLASS_IDLE", "priority": 0}));
    let pid = running(&bundle);
    assert_eq!(scheduling(pid), (libc::SCHED_BATCH, 7, 0));
    assert_eq!(io_priority(pid), 3 << 13);
    let pid_file = bundle.scratch().join("pid");
    let exec = ["exec", "-d", "--pid-file", &pid_file.to_string_lossy(), bundle.id(), "sleep", "50"];
    let mut command = bundle.command(&exec);
    runx_tests::command::run_detached(&mut command, &bundle.output()).ok();
    let exec: i32 = fs::read_to_string(&pid_file).unwrap().parse().unwrap();
    assert_eq!((scheduling(exec).0, io_priority(exec)), (libc::SCHED_BATCH, 3 << 13));
    end(&bundle);
}

// covers: process.scheduler
#[test]
fn an_idle_scheduler_takes_effect_and_an_impossible_one_is_refused() {
    needs_root!();
    let mut bundle = Bundle::script("sleep 100");
    bundle.set("/process", "scheduler", json!({"policy": "SCHED_IDLE", "flags": ["SCHED_RESET_ON_FORK"]}));
    let pid = running(&bundle);
    assert_eq!(scheduling(pid).0 & 0xff, libc::SCHED_IDLE);
    end(&bundle);
    let mut bundle = Bundle::script("true");
    bundle.set("/process", "scheduler", json!({"policy": "SCHED_FIFO", "priority": 100}));
    bundle.run().fails(1, &["process.scheduler", "Invalid argument"]);
    for (runtime, deadline, period) in [(0, 0, 0), (1000, 2000, 2000), (5000, 4000, 0), (2000, 9000, 8000)] {
        let times = json!({"policy": "SCHED_DEADLINE", "runtime": runtime, "deadline": deadline, "period": period});
        bundle.set("/process", "scheduler", times);
        bundle.run().fails(1, &["process.scheduler", "runtime <= deadline <= period", &runtime.to_string()]);
    }
    bundle.assert_nothing_left();
}

// covers: linux.personality
#[test]
fn a_32_bit_personality_is_shown_by_the_process_and_its_execs() {
    needs_root!();
    let mut bundle = Bundle::script("sleep 100");
    bundle.set("/linux", "personality", json!({"domain": "LINUX32"}));
    let pid = running(&bundle);
    assert_eq!(fs::read_to_string(format!("/proc/{pid}/personality")).unwrap().trim(), "00000008");
    assert_eq!(bundle.exec("cat /proc/self/personality").ok().stdout.trim(), "00000008");
    end(&bundle);
}

// covers: linux.memoryPolicy
#[test]
fn a_memory_policy_is_the_processes() {
    needs_root!();
    let mut bundle = Bundle::script("sleep 100");
    let policy = json!({"mode": "MPOL_BIND", "nodes": "0", "flags": ["MPOL_F_STATIC_NODES"]});
    bundle.set("/linux", "memoryPolicy", policy);
    let pid = running(&bundle);
    let maps = fs::read_to_string(format!("/proc/{pid}/numa_maps")).unwrap();
    assert!(maps.lines().next().unwrap().contains("bind=static:0"), "{maps}");
    assert!(bundle.exec("head -n 1 /proc/self/numa_maps").ok().stdout.contains("bind=static:0"));
    end(&bundle);
    let mut bundle = Bundle::script("true");
    bundle.set("/linux", "memoryPolicy", json!({"mode": "MPOL_BIND", "nodes": "900"}));
    bundle.run().fails(1, &["linux.memoryPolicy"]);
    bundle.set("/linux", "memoryPolicy", json!({"mode": "MPOL_BIND", "nodes": "x"}));
    bundle.run().fails(1, &["linux.memoryPolicy.nodes", "\"x\""]);
    bundle.assert_nothing_left();
}

// covers: process.execCPUAffinity
#[test]
fn an_exec_runs_on_the_cpus_of_its_description_and_the_first_process_on_all() {
    needs_root!();
    let mut bundle = Bundle::script("sleep 100");
    bundle.set("/process", "execCPUAffinity", json!({"initial": "0", "final": "0"}));
    let pid = running(&bundle);
    let all = field(pid, "status", "Cpus_allowed_list");
    assert_eq!(all, field(1, "status", "Cpus_allowed_list"));
    let exec = |bundle: &Bundle| bundle.exec("grep Cpus_allowed_list /proc/self/status").ok().stdout;
    assert_eq!(exec(&bundle).split_whitespace().nth(1), Some("0"));
    end(&bundle);
    // Who starts a container on one CPU does not bind the container to it.
    let bundle = Bundle::script("grep Cpus_allowed_list /proc/self/status");
    let command = bundle.command(&["run", bundle.id()]);
    let mut bound = std::process::Command::new("taskset");
    bound.args(["-c", "0"]).arg(command.get_program()).args(command.get_args()).current_dir(bundle.path());
    let out = runx_tests::command::run(&mut bound).ok().stdout;
    assert_eq!(out.split_whitespace().nth(1), Some(all.as_str()));
    bundle.assert_nothing_left();
    let mut bundle = Bundle::script("true");
    bundle.set("/process", "execCPUAffinity", json!({"initial": "zero"}));
    bundle.run().fails(1, &["CPU"]);
}

// covers: process.noNewPrivileges
#[test]
fn an_exec_has_the_containers_session_keyring() {
    needs_root!();
    let mut bundle = Bundle::script("cat /proc/keys; echo end; sleep 100");
    bundle.set("/linux", "maskedPaths", json!([]));
    running(&bundle);
    let read = || fs::read_to_string(bundle.output()).unwrap_or_default();
    eventually("it has printed", || read().contains("end"));
    let serial = |text: &str| {
        let line = text.lines().find(|line| line.contains(&format!("_ses.{}", bundle.id())));
        line.map(|line| line.split_whitespace().next().unwrap().to_owned())
    };
    let first = serial(&read());
    assert!(first.is_some(), "{}", read());
    assert_eq!(serial(&bundle.exec("cat /proc/keys").ok().stdout), first);
    end(&bundle);
}

// covers: process.capabilities.ambient process.capabilities.inheritable
#[test]
fn an_ordinary_user_keeps_ambient_capabilities_and_no_others() {
    needs_root!();
    let mut bundle = Bundle::script("grep ^Cap /proc/self/status");
    let set = json!(["CAP_NET_BIND_SERVICE", "CAP_KILL"]);
    let ambient = json!(["CAP_NET_BIND_SERVICE"]);
    bundle.set(
        "/process",
        "capabilities",
        json!({
            "bounding": set, "effective": set, "permitted": set, "inheritable": ambient, "ambient": ambient
        }),
    );
    bundle.set("/process", "user", json!({"uid": 1000, "gid": 1000}));
    let out = bundle.run().ok().stdout;
    let value = |name: &str| {
        let line = out.lines().find(|line| line.starts_with(name)).unwrap();
        u64::from_str_radix(line.split_whitespace().nth(1).unwrap(), 16).unwrap()
    };
    let (bind, kill) = (1 << 10, 1 << 5);
    assert_eq!(value("CapAmb"), bind);
    assert_eq!((value("CapPrm"), value("CapEff")), (bind, bind));
    assert_eq!(value("CapBnd"), bind | kill);
    bundle.assert_nothing_left();
}

// covers: domainname hostname
#[test]
fn host_and_domain_name_are_set() {
    needs_root!();
    let mut bundle = Bundle::script("hostname; cat /proc/sys/kernel/domainname");
    bundle.set("", "hostname", json!("some-host"));
    bundle.set("", "domainname", json!("some.domain"));
    assert_eq!(bundle.run().ok().stdout, "some-host\nsome.domain\n");
    bundle.assert_nothing_left();
}

// covers: process.rlimits
#[test]
fn every_resource_limit_is_set() {
    needs_root!();
    const NAMES: &[(&str, &str)] = &[
        ("RLIMIT_CPU", "Max cpu time"),
        ("RLIMIT_FSIZE", "Max file size"),
        ("RLIMIT_DATA", "Max data size"),
        ("RLIMIT_STACK", "Max stack size"),
        ("RLIMIT_CORE", "Max core file size"),
        ("RLIMIT_RSS", "Max resident set"),
        ("RLIMIT_NPROC", "Max processes"),
        ("RLIMIT_NOFILE", "Max open files"),
        ("RLIMIT_MEMLOCK", "Max locked memory"),
        ("RLIMIT_AS", "Max address space"),
        ("RLIMIT_LOCKS", "Max file locks"),
        ("RLIMIT_SIGPENDING", "Max pending signals"),
        ("RLIMIT_MSGQUEUE", "Max msgqueue size"),
        ("RLIMIT_NICE", "Max nice priority"),
        ("RLIMIT_RTPRIO", "Max realtime priority"),
        ("RLIMIT_RTTIME", "Max realtime timeout"),
    ];
    let own = fs::read_to_string("/proc/self/limits").unwrap();
    let mut bundle = Bundle::script("cat /proc/self/limits");
    let mut wanted = Vec::new();
    for (name, title) in NAMES {
        let line = own.lines().find(|line| line.starts_with(title)).unwrap();
        let hard = line[title.len()..].split_whitespace().nth(1).unwrap().to_owned();
        // Lowered by one where there is a limit, and to something large where there is none.
        let hard: u64 = hard.parse().map_or(1 << 40, |hard: u64| hard.saturating_sub(1));
        wanted.push((*title, hard));
        bundle.config["process"]["rlimits"].as_array_mut().unwrap().retain(|limit| limit["type"] != *name);
        let limit = json!({"type": name, "hard": hard, "soft": hard});
        bundle.config["process"]["rlimits"].as_array_mut().unwrap().push(limit);
    }
    let out = bundle.run().ok().stdout;
    for (title, hard) in wanted {
        let line = out.lines().find(|line| line.starts_with(title)).unwrap();
        let words: Vec<&str> = line[title.len()..].split_whitespace().take(2).collect();
        assert_eq!(words, [hard.to_string(), hard.to_string()], "{title}");
    }
    bundle.assert_nothing_left();
    let limit = |value: Value| {
        let mut bundle = Bundle::script("true");
        bundle.set("/process", "rlimits", json!([value]));
        bundle.run()
    };
    limit(json!({"type": "RLIMIT_NOFILE", "hard": 1, "soft": 2})).fails(1, &["RLIMIT_NOFILE", "over"]);
    limit(json!({"type": "RLIMIT_NONE", "hard": 1, "soft": 1})).fails(1, &["RLIMIT_NONE"]);
}

// covers: process.capabilities.bounding
#[test]
fn a_capability_that_nobody_knows_leaves_a_warning() {
    needs_root!();
    let mut bundle = Bundle::script("grep CapBnd /proc/self/status");
    for set in ["bounding", "permitted", "effective"] {
        bundle.set("/process/capabilities", set, json!(["CAP_CHOWN", "CAP_OF_TOMORROW"]));
    }
    let done = bundle.run().ok();
    assert_eq!(done.stdout, "CapBnd:\t0000000000000001\n");
    assert!(done.stderr.contains("CAP_OF_TOMORROW"), "{}", done.stderr);
    bundle.assert_nothing_left();
}

// covers: process.env
#[test]
fn the_last_of_two_variables_of_a_name_counts() {
    needs_root!();
    let mut bundle = Bundle::new(&["env"]);
    bundle.set("/process", "env", json!(["PATH=/nowhere", "ONE=1", "HOME=", "PATH=/bin", "ONE=2"]));
    assert_eq!(bundle.run().ok().stdout, "PATH=/bin\nONE=2\nHOME=/root\n");
    bundle.assert_nothing_left();
}

// covers: process.scheduler process.user.uid
#[test]
fn an_execs_description_needs_no_user_and_names_flags_as_the_specification_does() {
    needs_root!();
    let bundle = Bundle::script("sleep 100");
    running(&bundle);
    let description = bundle.scratch().join("process.json");
    let text = json!({
        "args": ["sh", "-c", "id -u; cut -d' ' -f19 /proc/self/stat; true"], "cwd": "/", "env": ["PATH=/bin"],
        "scheduler": {"policy": "SCHED_BATCH", "nice": -1, "flags": ["SCHED_FLAG_RESET_ON_FORK"]},
    });
    fs::write(&description, text.to_string()).unwrap();
    let exec = bundle.runx(&["exec", "--process", description.to_str().unwrap(), bundle.id()]).ok();
    // The niceness is the shell's own: what it starts is ordinary again.
    assert_eq!(exec.stdout, "0\n0\n");
    end(&bundle);
}

#[test]
fn a_signal_ends_a_created_container_and_a_started_one_has_its_programs_handlers_alone() {
    needs_root!();
    for signal in ["TERM", "HUP", "INT", "USR1"] {
        let bundle = Bundle::script("sleep 100");
        bundle.create().ok();
        bundle.runx(&["kill", bundle.id(), signal]).ok();
        eventually("it has stopped", || bundle.state()["status"] == "stopped");
        bundle.runx(&["start", bundle.id()]).fails(1, &["stopped"]);
        bundle.runx(&["delete", bundle.id()]).ok();
        bundle.assert_nothing_left();
    }
    // Without a handler the kernel lets the first process of a PID namespace be.
    let bundle = Bundle::new(&["sleep", "100"]);
    let pid = running(&bundle);
    bundle.runx(&["kill", bundle.id(), "TERM"]).ok();
    let caught = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    assert!(caught.contains("SigCgt:\t0000000000000000"), "{caught}");
    assert_eq!(bundle.state()["status"], "running");
    end(&bundle);
}
