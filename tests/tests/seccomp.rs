//! Seccomp: actions, comparisons, flags, and a listener that answers.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;

use runx_tests::bundle::Bundle;
use runx_tests::command::{eventually, run_detached};
use runx_tests::{descriptors, needs_root};
use serde_json::{Value, json};

fn filtered(script: &str, profile: Value) -> Bundle {
    let mut bundle = Bundle::script(script);
    bundle.set("/linux", "seccomp", profile);
    bundle.config["root"]["readonly"] = json!(false);
    bundle
}

fn rule(action: &str) -> Value {
    json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mkdir", "mkdirat"], "action": action}]})
}

// covers: linux.seccomp.defaultAction linux.seccomp.syscalls
#[test]
fn each_action_does_what_it_says() {
    needs_root!();
    let outcome = |action: &str| {
        let bundle = filtered("mkdir /made 2>&1; echo code $?; test -d /made && echo made", rule(action));
        let done = bundle.run();
        bundle.assert_nothing_left();
        (done.code, done.stdout)
    };
    for allowing in ["SCMP_ACT_ALLOW", "SCMP_ACT_LOG"] {
        assert!(outcome(allowing).1.ends_with("code 0\nmade\n"), "{allowing}");
    }
    let (_, out) = outcome("SCMP_ACT_ERRNO");
    assert!(out.contains("Operation not permitted") && out.contains("code 1"), "{out}");
    // Without a tracer the call is not made.
    let (_, out) = outcome("SCMP_ACT_TRACE");
    assert!(out.contains("not implemented") && !out.ends_with("made\n"), "{out}");
    for killing in ["SCMP_ACT_KILL", "SCMP_ACT_KILL_THREAD", "SCMP_ACT_KILL_PROCESS", "SCMP_ACT_TRAP"] {
        let (_, out) = outcome(killing);
        // 128 and SIGSYS.
        assert!(out.contains("code 159") && !out.ends_with("made\n"), "{killing}: {out}");
    }
}

// covers: linux.seccomp.syscalls.args
#[test]
fn every_comparison_compares() {
    needs_root!();
    // The mode of a chmod decides, whichever of its calls the C library makes.
    let refused = |op: &str, value: u64, two: Option<u64>, mode: &str| {
        let rule = |name: &str, index: u32| {
            let mut arg = json!({"index": index, "value": value, "op": op});
            if let Some(two) = two {
                arg["valueTwo"] = json!(two);
            }
            json!({"names": [name], "action": "SCMP_ACT_KILL_PROCESS", "args": [arg]})
        };
        let rules = [rule("chmod", 1), rule("fchmodat", 2)];
        let profile = json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules});
        let bundle = filtered(&format!("chmod {mode} /etc/passwd; echo $?"), profile);
        let out = bundle.run().ok().stdout;
        out.lines().last() == Some("159")
    };
    // Written in octal, as chmod has them.
    for (op, value, two, hit, miss) in [
        ("SCMP_CMP_EQ", 0o22, None, "022", "077"),
        ("SCMP_CMP_GE", 0o77, None, "077", "022"),
        ("SCMP_CMP_GT", 0o22, None, "077", "022"),
        ("SCMP_CMP_MASKED_EQ", 0o70, Some(0o70), "077", "007"),
    ] {
        assert!(refused(op, value, two, hit), "{op} {value} {hit}");
        assert!(!refused(op, value, two, miss), "{op} {value} {miss}");
    }
    for (op, value) in [("SCMP_CMP_NE", 0o1000), ("SCMP_CMP_LT", 0o1000), ("SCMP_CMP_LE", 0o777)] {
        assert!(refused(op, value, None, "022"), "{op}");
    }
}

// covers: linux.seccomp.defaultErrnoRet linux.seccomp.syscalls.errnoRet linux.seccomp.architectures
#[test]
fn errnos_are_those_of_the_profile_and_architectures_are_known() {
    needs_root!();
    let profile = json!({
        "defaultAction": "SCMP_ACT_ALLOW", "defaultErrnoRet": 1,
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28}]
    });
    let out = filtered("mkdir /x 2>&1", profile).run().stdout;
    assert!(out.contains("No space left"), "{out}");
    let mut profile = rule("SCMP_ACT_ALLOW");
    profile["architectures"] = json!(["SCMP_ARCH_PDP11"]);
    filtered("true", profile).run().fails(1, &["SCMP_ARCH_PDP11"]);
}

// covers: linux.seccomp.flags
#[test]
fn flags_are_accepted_where_they_mean_something() {
    needs_root!();
    for flag in ["SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW", "SECCOMP_FILTER_FLAG_TSYNC"] {
        let mut profile = rule("SCMP_ACT_ERRNO");
        profile["flags"] = json!([flag]);
        let out = filtered("grep Seccomp: /proc/self/status; mkdir /x 2>&1", profile).run().stdout;
        assert!(out.contains("Seccomp:\t2") && out.contains("not permitted"), "{flag}: {out}");
    }
    let mut profile = rule("SCMP_ACT_ERRNO");
    profile["flags"] = json!(["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"]);
    filtered("true", profile).run().fails(1, &["WAIT_KILLABLE_RECV", "listenerPath"]);
}

/// `struct seccomp_notif` and `struct seccomp_notif_resp`, of which only the ids matter here.
fn answer_one(listener: &OwnedFd, errno: i32) -> u32 {
    const RECEIVE: u64 = 0xc050_2100;
    const SEND: u64 = 0xc018_2101;
    let mut request = [0u64; 10];
    // SAFETY: the buffer has the size of struct seccomp_notif.
    let received = unsafe { libc::ioctl(listener.as_raw_fd(), RECEIVE as _, request.as_mut_ptr()) };
    assert_eq!(received, 0, "{}", std::io::Error::last_os_error());
    let mut response = [request[0], 0, (-errno) as u32 as u64];
    // SAFETY: the buffer has the size of struct seccomp_notif_resp: id, value, error and flags.
    let sent = unsafe { libc::ioctl(listener.as_raw_fd(), SEND as _, response.as_mut_ptr()) };
    assert_eq!(sent, 0, "{}", std::io::Error::last_os_error());
    (request[1] & 0xffff_ffff) as u32
}

fn with_listener(script: &str) -> (Bundle, UnixListener) {
    let mut profile = rule("SCMP_ACT_NOTIFY");
    let mut bundle = filtered(script, Value::Null);
    let path = bundle.scratch().join("listener.sock");
    profile["listenerPath"] = json!(path);
    profile["listenerMetadata"] = json!("some words");
    bundle.set("/linux", "seccomp", profile);
    (bundle, UnixListener::bind(&path).unwrap())
}

// covers: linux.seccomp.listenerPath linux.seccomp.listenerMetadata
#[test]
fn a_listener_gets_the_descriptor_and_the_state_and_answers() {
    needs_root!();
    let (bundle, socket) = with_listener("mkdir /made 2>&1; sleep 100");
    bundle.create().ok();
    let pid = bundle.state()["pid"].clone();
    let id = bundle.id().to_owned();
    let agent = std::thread::spawn(move || {
        let (text, descriptor) = descriptors::receive(&descriptors::accept(&socket));
        let state: Value = serde_json::from_slice(&text).unwrap();
        assert_eq!(state["fds"], json!(["seccompFd"]));
        assert_eq!(state["metadata"], "some words");
        assert_eq!(state["state"]["id"], json!(id));
        assert_eq!(state["state"]["status"], "creating");
        assert_eq!(state["pid"], pid);
        assert_eq!(state["state"]["pid"], pid);
        // ENOMEDIUM: nothing else would say so.
        answer_one(&descriptor, 123);
        // An exec brings a filter, and so a descriptor, of its own.
        let (text, second) = descriptors::receive(&descriptors::accept(&socket));
        let state: Value = serde_json::from_slice(&text).unwrap();
        assert_ne!(state["pid"], pid);
        assert_eq!(state["state"]["status"], "running");
        answer_one(&second, 123);
        (descriptor, second)
    });
    bundle.runx(&["start", bundle.id()]).ok();
    let said = || fs::read_to_string(bundle.output()).unwrap_or_default();
    eventually("the answer arrived", || said().contains("No medium found"));
    let out = bundle.exec("mkdir /again 2>&1; true").ok().stdout;
    assert!(out.contains("No medium found"), "{out}");
    agent.join().unwrap();
    bundle.runx(&["delete", "--force", bundle.id()]).ok();
    bundle.assert_nothing_left();
}

// covers: linux.seccomp.listenerPath
#[test]
fn a_listener_that_is_asked_and_not_there_fails_the_container() {
    needs_root!();
    let (bundle, socket) = with_listener("echo it ran");
    drop(socket);
    let done = bundle.run().fails(1, &["listenerPath", "refused"]);
    assert_eq!(done.stdout, "");
    bundle.assert_nothing_left();
    run_detached(&mut bundle.command(&["create", bundle.id()]), &bundle.output()).fails(1, &["listenerPath"]);
    bundle.assert_nothing_left();
    filtered("true", rule("SCMP_ACT_NOTIFY")).run().fails(1, &["SCMP_ACT_NOTIFY", "listenerPath"]);
    let mut profile = rule("SCMP_ACT_ERRNO");
    profile["listenerPath"] = json!("/no/such/socket");
    let done = filtered("true", profile).run().ok();
    assert!(done.stderr.contains("listenerPath is ignored"), "{}", done.stderr);
}
