//! Filters of system calls: a profile of the OCI runtime specification, as far as one filter of seccompiler can say it, or
//! one of our own.

use std::collections::HashMap;
use std::io;

use seccompiler::{BpfProgram, sock_filter};
use serde::Deserialize;
use serde_json::{Value, json};

/// What the profile `"default"` refuses with EPERM: what a program in a sandbox has no business with.
const REFUSED: &[&str] = &[
    "acct",
    "add_key",
    "bpf",
    "chroot",
    "clock_adjtime",
    "clock_settime",
    "delete_module",
    "fanotify_init",
    "finit_module",
    "fsconfig",
    "fsmount",
    "fsopen",
    "fspick",
    "init_module",
    "io_uring_enter",
    "io_uring_register",
    "io_uring_setup",
    "kexec_file_load",
    "kexec_load",
    "keyctl",
    "mount",
    "mount_setattr",
    "move_mount",
    "name_to_handle_at",
    "open_by_handle_at",
    "open_tree",
    "perf_event_open",
    "pivot_root",
    "process_vm_readv",
    "process_vm_writev",
    "ptrace",
    "quotactl",
    "reboot",
    "request_key",
    "setns",
    "settimeofday",
    "swapoff",
    "swapon",
    "syslog",
    "umount2",
    "unshare",
    "userfaultfd",
    "vhangup",
];

/// The flags of clone(2) that make namespaces.
const NAMESPACES: &[libc::c_int] = &[
    libc::CLONE_NEWCGROUP,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWNET,
    libc::CLONE_NEWNS,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWUTS,
];

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Profile {
    default_action: String,
    #[serde(default)]
    default_errno_ret: Option<u32>,
    #[serde(default)]
    architectures: Vec<String>,
    #[serde(default)]
    syscalls: Vec<Rule>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Rule {
    names: Vec<String>,
    action: String,
    #[serde(default)]
    errno_ret: Option<u32>,
    #[serde(default)]
    args: Vec<Argument>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Argument {
    index: u8,
    value: u64,
    #[serde(default)]
    value_two: Option<u64>,
    op: String,
}

fn wrong(text: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, format!("seccomp: {text}"))
}

fn action(name: &str, errno: Option<u32>) -> io::Result<Value> {
    Ok(match name {
        "SCMP_ACT_ALLOW" => json!("allow"),
        "SCMP_ACT_ERRNO" => json!({"errno": errno.unwrap_or(libc::EPERM as u32)}),
        "SCMP_ACT_KILL" | "SCMP_ACT_KILL_THREAD" => json!("kill_thread"),
        "SCMP_ACT_KILL_PROCESS" => json!("kill_process"),
        "SCMP_ACT_LOG" => json!("log"),
        "SCMP_ACT_TRAP" => json!("trap"),
        other => return Err(wrong(format!("action {other:?} cannot be had here"))),
    })
}

impl Argument {
    fn condition(&self) -> io::Result<Value> {
        let op = match self.op.as_str() {
            "SCMP_CMP_NE" => json!("ne"),
            "SCMP_CMP_LT" => json!("lt"),
            "SCMP_CMP_LE" => json!("le"),
            "SCMP_CMP_EQ" => json!("eq"),
            "SCMP_CMP_GE" => json!("ge"),
            "SCMP_CMP_GT" => json!("gt"),
            "SCMP_CMP_MASKED_EQ" => json!({"masked_eq": self.value}),
            other => return Err(wrong(format!("comparison {other:?} is not known"))),
        };
        let value = if op.is_object() { self.value_two.unwrap_or(0) } else { self.value };
        Ok(json!({"index": self.index, "type": "qword", "op": op, "val": value}))
    }
}

/// The programs of a profile, or of `"default"`; the kernel does what the strictest of them says.
///
/// # Errors
/// What of it is not known, or needs more than one action besides the default.
pub fn compile(profile: &Value) -> io::Result<Vec<BpfProgram>> {
    let mut all = Vec::new();
    if profile.as_str() == Some("default") {
        // Its flags are out of a filter's sight; libraries take clone(2) when it is not there.
        let action = json!({"errno": libc::ENOSYS});
        all.push(build(
            &json!({"mismatch_action": "allow", "match_action": action, "filter": [{"syscall": "clone3"}]}),
        )?);
    }
    if cfg!(target_arch = "x86_64") {
        all.push(no_x32());
    }
    // The last: it may refuse to load another one.
    all.push(program(profile)?);
    Ok(all)
}

/// Refuses the x32 numbers of system calls, which are those of the same architecture with a bit more, and match no rule.
fn no_x32() -> BpfProgram {
    const X32: u32 = 0x4000_0000;
    let statement = |code: u32, k: u32| sock_filter { code: code as u16, jt: 0, jf: 0, k };
    let refused = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
    vec![
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0),
        sock_filter { code: (libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K) as u16, jt: 0, jf: 1, k: X32 },
        statement(libc::BPF_RET | libc::BPF_K, refused),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW),
    ]
}

fn program(profile: &Value) -> io::Result<BpfProgram> {
    let filter = match profile.as_str() {
        Some("default") => {
            let mut rules: Vec<Value> = REFUSED.iter().map(|name| json!({"syscall": name})).collect();
            rules.extend(NAMESPACES.iter().map(|flag| {
                let masked = json!({"index": 0, "type": "qword", "op": {"masked_eq": flag}, "val": flag});
                json!({"syscall": "clone", "args": [masked]})
            }));
            json!({"mismatch_action": "allow", "match_action": {"errno": libc::EPERM}, "filter": rules})
        }
        Some(other) => return Err(wrong(format!("there is no profile of the name {other:?}"))),
        None => of_profile(&serde_json::from_value(profile.clone()).map_err(wrong)?)?,
    };
    build(&filter)
}

fn build(filter: &Value) -> io::Result<BpfProgram> {
    let text = json!({"filter": filter}).to_string();
    let arch = std::env::consts::ARCH.try_into().map_err(wrong)?;
    let mut all: HashMap<String, _> = seccompiler::compile_from_json(text.as_bytes(), arch).map_err(wrong)?;
    all.remove("filter").ok_or_else(|| wrong("nothing came of it"))
}

/// Whether there is a system call of the name on this machine.
fn known(name: &Value) -> bool {
    let filter = json!({"filter": {"mismatch_action": "allow", "match_action": "log", "filter": [{"syscall": name}]}});
    let arch = std::env::consts::ARCH.try_into();
    arch.is_ok_and(|arch| seccompiler::compile_from_json(filter.to_string().as_bytes(), arch).is_ok())
}

fn of_profile(profile: &Profile) -> io::Result<Value> {
    let own = format!("SCMP_ARCH_{}", std::env::consts::ARCH.to_uppercase());
    if !profile.architectures.is_empty() && !profile.architectures.contains(&own) {
        return Err(wrong(format!("the profile is not for {own}")));
    }
    let mismatch = action(&profile.default_action, profile.default_errno_ret)?;
    let mut matching: Option<Value> = None;
    let mut rules = Vec::new();
    for rule in &profile.syscalls {
        let action = action(&rule.action, rule.errno_ret)?;
        if action == mismatch {
            // It would happen anyhow; a rule before or after it says otherwise only for calls that it names.
            continue;
        }
        if matching.as_ref().is_some_and(|known| *known != action) {
            return Err(wrong("one action besides the default can be had, and there are more"));
        }
        matching = Some(action);
        let conditions = rule.args.iter().map(Argument::condition).collect::<io::Result<Vec<_>>>()?;
        for name in &rule.names {
            let mut out = json!({"syscall": name});
            if !conditions.is_empty() {
                out["args"] = conditions.clone().into();
            }
            rules.push(out);
        }
    }
    if matching.as_ref().is_some_and(|action| *action == json!("allow") || *action == json!("log")) {
        // What is not let through is refused anyhow, and profiles name calls of all machines and times.
        rules.retain(|rule| known(&rule["syscall"]));
    }
    let Some(matching) = matching else {
        return Err(wrong("no rule differs from the default action"));
    };
    Ok(json!({"mismatch_action": mismatch, "match_action": matching, "filter": rules}))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn profiles_become_programs_or_are_refused_by_what_is_wrong() {
        assert!(compile(&json!("default")).unwrap().last().unwrap().len() > REFUSED.len());
        let rule = |action: &str, name: &str| json!({"names": [name], "action": action});
        let profile = |rules: Vec<Value>| json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules});
        assert!(compile(&profile(vec![rule("SCMP_ACT_ERRNO", "mkdir")])).is_ok());
        for (value, word) in [
            (json!("strict"), "strict"),
            (profile(vec![rule("SCMP_ACT_NOTIFY", "mkdir")]), "SCMP_ACT_NOTIFY"),
            (profile(vec![rule("SCMP_ACT_ERRNO", "no_such_call")]), "no_such_call"),
            (profile(vec![rule("SCMP_ACT_ERRNO", "mkdir"), rule("SCMP_ACT_KILL", "mount")]), "one action"),
            (json!({"defaultAction": "SCMP_ACT_ALLOW", "flags": []}), "flags"),
            (json!({"defaultAction": "SCMP_ACT_ALLOW"}), "no rule"),
        ] {
            let text = compile(&value).unwrap_err().to_string();
            assert!(text.contains(word), "{text}");
        }
        // Who lists what is allowed may name what only others have.
        let rules = vec![rule("SCMP_ACT_ALLOW", "read"), rule("SCMP_ACT_ALLOW", "no_such_call")];
        assert!(compile(&json!({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": rules})).is_ok());
    }
}
