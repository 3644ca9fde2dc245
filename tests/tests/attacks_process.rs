//! Attacks by processes: on the runtime's own, on what they inherit, on identities, filters and cgroups.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use runx_tests::attack::{DOORS, Door, Target, installed, programs};
use runx_tests::bundle::Bundle;
use runx_tests::command::run;
use runx_tests::{needs_root, repeats};
use serde_json::{Value, json};

fn give_capabilities(target: &mut Target, more: &[&str]) {
    for set in ["bounding", "effective", "permitted"] {
        let list = target.bundle.config["process"]["capabilities"][set].as_array_mut().unwrap();
        list.extend(more.iter().map(|name| json!(name)));
    }
}

/// Looks at every process in sight for as long as it runs, and tries to write what those that are not the image's run.
/// While a program runs, nobody can write to it, so it is held until it has ended.
const SCANNER: &str = "hold() { n=0; while [ $n -lt 40 ]; do \
      if echo x 2>/dev/null >>/proc/self/fd/9; then echo \"WROTE $1\"; return; fi; n=$((n+1)); sleep 0.05; done; }; \
    while :; do for p in /proc/[0-9]*; do \
    l=$(readlink $p/exe 2>/dev/null); \
    case \"$l\" in ''|/bin/busybox) ;; *) echo \"saw $l\"; \
      { hold \"$l\" 9<$p/exe & } 2>/dev/null; \
      for f in $p/fd/* $p/cwd $p/root; do t=$(readlink $f 2>/dev/null); case \"$t\" in ''|/dev/null|/dev/pts/*) ;; \
        /*) for n in var config.json state.json cgroup.procs; do test -e $f/$n && echo \"REACHED $f/$n $t\"; done;; \
    esac; done;; esac; done; done";

// CVE-2016-9962, CVE-2019-5736
#[test]
fn the_runtimes_own_processes_are_neither_overwritten_nor_a_way_out() {
    needs_root!();
    let before = programs();
    for door in DOORS {
        for tracing in [false, true] {
            let mut target = Target::script(door, SCANNER);
            if tracing {
                give_capabilities(&mut target, &["CAP_SYS_PTRACE", "CAP_DAC_OVERRIDE", "CAP_SYS_ADMIN"]);
            }
            let rootfs = target.bundle.rootfs();
            fs::write(rootfs.join("interpreted"), "#!/proc/self/exe\n").unwrap();
            fs::set_permissions(rootfs.join("interpreted"), fs::Permissions::from_mode(0o755)).unwrap();
            // By this one would know the host's root.
            assert!(!rootfs.join("var").exists() && std::path::Path::new("/var").exists());
            target.start();
            for n in 0..repeats(30) {
                let program = if n % 3 == 0 { "/interpreted" } else { "/proc/self/exe" };
                target.exec("x", |process| process["args"] = json!([program, "--version"]));
                target.exec("true", |_| ());
            }
            let seen = target.output();
            assert!(!seen.contains("WROTE") && !seen.contains("REACHED"), "{door:?}: {seen}");
            target.end();
        }
        let mut target = Target::script(door, "x");
        target.bundle.config["process"]["args"] = json!(["/proc/self/exe", "--version"]);
        target.run();
        target.end();
    }
    assert_eq!(programs(), before, "a program of ours was changed");
}

// CVE-2022-29162, CVE-2022-27650, CVE-2025-27612
#[test]
fn capabilities_of_an_exec_are_not_inheritable() {
    needs_root!();
    let mut target = Target::script(Door::Command, "sleep 1000");
    target.start();
    let id = target.bundle.id().to_owned();
    let done = target.bundle.runx(&["exec", "--cap", "CAP_SYS_ADMIN", &id, "grep", "Cap", "/proc/self/status"]).ok();
    let line = |name: &str| done.stdout.lines().find(|line| line.starts_with(name)).unwrap().to_owned();
    assert!(line("CapInh:").ends_with("\t0000000000000000"), "{}", done.stdout);
    // It was given: bit 21.
    let effective = u64::from_str_radix(line("CapEff:").split_whitespace().last().unwrap(), 16).unwrap();
    assert!(effective & 1 << 21 != 0, "{}", done.stdout);
    target.end();
    for door in DOORS {
        let mut target = Target::script(door, "sleep 1000");
        target.start();
        let done = target.exec("grep CapInh /proc/self/status", |_| ()).ok();
        assert!(done.output.trim_end().ends_with("\t0000000000000000"), "{}", done.output);
        target.end();
    }
}

// CVE-2023-25809
#[test]
fn a_user_namespace_without_a_cgroup_namespace_does_not_reach_the_hosts_cgroups() {
    needs_root!();
    for door in DOORS {
        let look = "for f in /sys/fs/cgroup/cgroup.procs /sys/fs/cgroup/*/cgroup.procs /sys/fs/cgroup/*/release_agent; do \
                    test -e $f && echo $$ 2>/dev/null >$f && echo \"WROTE $f\"; done; \
                    for d in /sys/fs/cgroup /sys/fs/cgroup/*; do test -e $d/cgroup.procs && mkdir $d/mine 2>/dev/null && \
                    echo MADE; done; true";
        let mut target = Target::script(door, look);
        let config = &mut target.bundle.config;
        config["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "user"}));
        let namespaces = config["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.retain(|namespace| namespace["type"] != "cgroup");
        let mapping = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
        config["linux"]["uidMappings"] = mapping.clone();
        config["linux"]["gidMappings"] = mapping;
        let mounts = config["mounts"].as_array_mut().unwrap();
        mounts.retain(|mount| mount["destination"] != "/sys/fs/cgroup");
        mounts.push(json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
            "options": ["nosuid", "noexec", "nodev", "relatime"]}));
        for path in [target.bundle.path(), target.bundle.scratch().to_owned(), target.bundle.rootfs()] {
            fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
        }
        let done = target.run();
        assert!(!done.output.contains("WROTE") && !done.output.contains("MADE"), "{door:?}: {done:?}");
        target.end();
    }
}

// A class of its own: what a container sees of cgroups ends with its own.
#[test]
fn cgroups_above_a_containers_own_are_out_of_reach() {
    needs_root!();
    for door in DOORS {
        let look = "cat /proc/self/cgroup | sed 's/.*://' | sort -u; \
                    for up in /sys/fs/cgroup/.. /sys/fs/cgroup/*/..; do ls $up/ 2>/dev/null | grep -x 'release_agent'; done; \
                    for f in /sys/fs/cgroup/*/release_agent /sys/fs/cgroup/*/devices.allow; do \
                      echo 'a *:* rwm' 2>/dev/null >$f && echo \"WROTE $f\"; done; true";
        let mut target = Target::script(door, look);
        let rootfs = target.bundle.rootfs();
        let _ = std::os::unix::fs::symlink("busybox", rootfs.join("bin/sed"));
        let namespaces = target.bundle.config["linux"]["namespaces"].as_array_mut().unwrap();
        if !namespaces.iter().any(|namespace| namespace["type"] == "cgroup") {
            namespaces.push(json!({"type": "cgroup"}));
        }
        let done = target.run().ok();
        assert_eq!(done.output, "/\n", "{door:?}");
        target.end();
    }
}

// CVE-2024-21626
#[test]
fn no_descriptor_of_the_hosts_is_left_open_and_no_directory_is_reached_by_one() {
    needs_root!();
    for door in DOORS {
        let look = "cd /proc/self/fd; for f in *; do t=$(readlink $f); case $t in /proc/*/fd|pipe:*|/dev/null) ;; *) echo $f $t;; \
                    esac; done";
        let mut target = Target::script(door, &format!("{look}; sleep 1000"));
        target.start();
        let log = target.bundle.scratch().to_string_lossy().into_owned();
        let alien = |text: &str| -> Vec<String> {
            // The command's own streams are the test's files.
            text.lines().filter(|line| !line.contains(&log) && line.contains('/')).map(str::to_owned).collect()
        };
        let done = target.exec(look, |_| ()).ok();
        assert_eq!(alien(&done.output), Vec::<String>::new(), "{door:?}");
        assert_eq!(alien(&target.output()), Vec::<String>::new(), "{door:?}");
        for fd in 3..24 {
            for path in [format!("/proc/self/fd/{fd}"), format!("/proc/self/fd/{fd}/../..")] {
                let done = target.exec("pwd; ls", |process| process["cwd"] = json!(path));
                assert!(!done.error.is_empty(), "{door:?} {path}: {done:?}");
            }
        }
        target.end();
        for fd in 3..24 {
            let mut target = Target::script(door, "pwd; ls");
            target.bundle.config["process"]["cwd"] = json!(format!("/proc/self/fd/{fd}"));
            target.run().refused(&[]);
            target.end();
        }
    }
}

// A class of its own: hooks are the host's, and what they start with is not the container's.
#[test]
fn a_hook_gets_nothing_of_the_containers_environment_or_descriptors() {
    needs_root!();
    for door in DOORS {
        let mut target = Target::script(door, "true");
        let log = target.bundle.scratch().join("hooked");
        let script = target.bundle.scratch().join("hook");
        let text = format!("#!/bin/sh\nexec >>{} 2>&1\nenv\nls /proc/self/fd\n", log.display());
        fs::write(&script, text).unwrap();
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
        target.bundle.config["process"]["env"] =
            json!(["PATH=/evil:/bin", "LD_PRELOAD=/evil.so", "BASH_ENV=/evil.sh", "ENV=/evil.sh", "GIVEN=evil"]);
        for kind in ["prestart", "createRuntime", "poststart", "poststop"] {
            target.bundle.config["hooks"][kind] = json!([{"path": script}]);
        }
        target.run().ok();
        target.end();
        let told = fs::read_to_string(&log).unwrap();
        assert_eq!(told.lines().filter(|line| line.starts_with("PWD=")).count(), 4, "{door:?}: {told}");
        assert!(!told.contains("evil"), "{door:?}: {told}");
        // The directory that ls reads is the fourth.
        let highest = told.lines().filter_map(|line| line.parse::<u32>().ok()).max();
        assert!(highest <= Some(10), "{door:?}: {told}");
    }
}

// A class of its own.
#[test]
fn devices_that_are_not_in_the_list_cannot_be_opened() {
    needs_root!();
    for door in DOORS {
        let look = "mknod /tmp/mem c 1 1 && (head -c 1 /tmp/mem >/dev/null 2>&1 && echo READ mem); \
                    mknod /tmp/kmsg c 1 11 && (head -c 1 /tmp/kmsg >/dev/null 2>&1 && echo READ kmsg); \
                    for n in 0 1 16; do mknod /tmp/b$n b 254 $n; head -c 1 /tmp/b$n >/dev/null 2>&1 && echo READ b$n; done; \
                    mknod /tmp/null c 1 3 && echo x >/tmp/null && echo fine";
        let mut target = Target::script(door, look);
        give_capabilities(&mut target, &["CAP_MKNOD"]);
        assert_eq!(target.run().ok().output, "fine\n", "{door:?}");
        // Nor by one that an exec makes.
        target.bundle.config["process"]["args"] = json!(["sleep", "1000"]);
        target.start();
        assert_eq!(target.exec(&format!("rm -f /tmp/*; {look}"), |_| ()).ok().output, "fine\n", "{door:?}");
        target.end();
    }
}

/// A program of a few instructions, without a libc: an ELF file of one segment.
fn program(code: &[u8], text: &[u8]) -> Vec<u8> {
    let base: u64 = 0x40_0000;
    let mut file = Vec::new();
    file.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    file.extend([2u16, 62].iter().flat_map(|n| n.to_le_bytes()));
    file.extend(1u32.to_le_bytes());
    file.extend([base + 120, 64, 0].iter().flat_map(|n| n.to_le_bytes()));
    file.extend(0u32.to_le_bytes());
    file.extend([64u16, 56, 1, 0, 0, 0].iter().flat_map(|n| n.to_le_bytes()));
    let size = (120 + code.len() + text.len()) as u64;
    file.extend([1u32, 5].iter().flat_map(|n| n.to_le_bytes()));
    file.extend([0, base, base, size, size, 4096].iter().flat_map(|n: &u64| n.to_le_bytes()));
    file.extend(code);
    file.extend(text);
    file
}

/// Calls mkdir of another architecture's table, and exits with 7 if that did not end the program.
fn foreign_mkdir(x32: bool) -> Vec<u8> {
    let mut code = Vec::new();
    if x32 {
        // mov eax, 0x40000000 + 83; mov edi, path; mov esi, 0777; syscall
        code.extend(b"\xb8\x53\x00\x00\x40\xbf\0\0\0\0\xbe\xff\x01\x00\x00\x0f\x05");
    } else {
        // mov eax, 39; mov ebx, path; mov ecx, 0777; int 0x80
        code.extend(b"\xb8\x27\x00\x00\x00\xbb\0\0\0\0\xb9\xff\x01\x00\x00\xcd\x80");
    }
    // mov eax, 60; mov edi, 7; syscall
    code.extend(b"\xb8\x3c\x00\x00\x00\xbf\x07\x00\x00\x00\x0f\x05");
    let path = (0x40_0000u32 + 120 + code.len() as u32).to_le_bytes();
    code[6..10].copy_from_slice(&path);
    program(&code, b"/tmp/made\0")
}

// A class of its own.
#[cfg(target_arch = "x86_64")]
#[test]
fn a_filter_is_not_passed_by_another_architectures_calls() {
    needs_root!();
    for door in DOORS {
        for x32 in [false, true] {
            let mut target = Target::script(door, "x");
            let file = target.bundle.rootfs().join("bin/foreign");
            fs::write(&file, foreign_mkdir(x32)).unwrap();
            fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
            target.bundle.config["process"]["args"] = json!(["/bin/foreign"]);
            target.bundle.config["linux"]["seccomp"] = json!({
                "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
                "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1}]
            });
            let done = target.run();
            assert!(!target.bundle.rootfs().join("tmp/made").exists(), "{door:?}, x32 {x32}: {done:?}");
            target.end();
        }
        // Without a filter the program does what it is made for, where the kernel has that table.
        let mut target = Target::script(door, "x");
        let file = target.bundle.rootfs().join("bin/foreign");
        fs::write(&file, foreign_mkdir(false)).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
        target.bundle.config["process"]["args"] = json!(["/bin/foreign"]);
        let done = target.run();
        assert!(done.code == 7 || done.code > 128, "{done:?}");
        target.end();
    }
}

// crun's: two profiles that differ in one number.
#[test]
fn a_profile_that_differs_in_its_errno_is_another_profile() {
    needs_root!();
    for door in DOORS {
        for (errno, words) in [(13, "Permission denied"), (38, "Function not implemented"), (13, "Permission denied")] {
            let mut target = Target::script(door, "mkdir /tmp/x");
            target.bundle.config["linux"]["seccomp"] = json!({
                "defaultAction": "SCMP_ACT_ALLOW",
                "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": errno}]
            });
            let done = target.run();
            assert!(done.output.contains(words), "{errno}: {done:?}");
            target.end();
        }
    }
}

// CVE-2026-30892
#[test]
fn a_user_that_cannot_be_read_is_not_root() {
    needs_root!();
    let mut target = Target::script(Door::Command, "sleep 1000");
    target.start();
    let id = target.bundle.id().to_owned();
    let long = "9".repeat(40);
    for user in [
        "",
        "1x",
        "-1",
        "4294967296",
        "4294967295",
        "1:",
        "1:2:3",
        ":",
        ":1",
        "root",
        "user",
        " 1",
        "1 ",
        "+1",
        "0x0",
        &long,
    ] {
        let done = target.bundle.runx(&["exec", "-u", user, &id, "id", "-u"]);
        assert!(done.code != 0 && done.stdout.is_empty(), "{user:?}: {done:?}");
    }
    assert_eq!(target.bundle.runx(&["exec", "-u", "12:34", &id, "id"]).ok().stdout.trim_end(), "uid=12 gid=34");
    target.end();
    // Numbers that do not fit are refused in a description, too.
    for door in DOORS {
        for uid in [json!(4_294_967_296u64), json!(-1), json!("0"), json!(0.5)] {
            let mut target = Target::script(door, "id -u");
            target.bundle.config["process"]["user"]["uid"] = uid;
            target.run().refused(&[]);
            target.end();
        }
    }
}

/// What a program is born with, from /proc/self/status and beside it, without what differs from run to run.
fn traits(text: &str) -> Vec<String> {
    let varies = [
        "Name",
        "Pid",
        "Tgid",
        "Ngid",
        "PPid",
        "NS",
        "Vm",
        "Rss",
        "Hugetlb",
        "voluntary",
        "nonvoluntary",
        "FDSize",
        "SigQ",
    ];
    text.lines()
        .filter(|line| !varies.iter().any(|name| line.starts_with(name)))
        .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
        .collect()
}

// A class of its own.
#[test]
fn nothing_of_its_parents_is_left_on_a_process() {
    needs_root!();
    if !installed("runc") {
        runx_tests::skip_outside_machine("it needs runc to be compared with");
        return;
    }
    let look = "exec 2>/dev/null; cat /proc/self/status /proc/self/limits /proc/self/oom_score_adj /proc/self/timerslack_ns; \
                cat /proc/self/personality /proc/self/coredump_filter /proc/self/loginuid /proc/self/attr/current; \
                umask; env | sort; ls -l /proc/self/fd | wc -l; cat /proc/self/sched | grep -E 'policy|prio'; pwd";
    let runc = {
        let mut bundle = Bundle::script(look);
        bundle.set("/process", "oomScoreAdj", json!(0));
        fs::write(bundle.path().join("config.json"), bundle.config.to_string()).unwrap();
        let mut command = std::process::Command::new("runc");
        command.arg("--root").arg(bundle.scratch().join("runc")).args(["run", bundle.id()]).current_dir(bundle.path());
        traits(&run(&mut command).ok().stdout)
    };
    for door in DOORS {
        let mut target = Target::script(door, look);
        target.bundle.config["root"]["readonly"] = json!(true);
        target.bundle.set("/process", "oomScoreAdj", json!(0));
        let ours = traits(&target.run().output);
        let only =
            |a: &[String], b: &[String]| -> Vec<String> { a.iter().filter(|x| !b.contains(x)).cloned().collect() };
        assert_eq!((only(&ours, &runc), only(&runc, &ours)), (vec![], vec![]), "{door:?}: ours and runc's");
        target.end();
    }
}

// A class of its own.
#[test]
fn the_spawner_and_the_runner_are_out_of_a_containers_sight() {
    needs_root!();
    let before = programs();
    // In the host's PID namespace, with all that is needed to trace.
    let look = "for p in /proc/[0-9]*; do n=$(cat $p/comm 2>/dev/null); case \"$n\" in runx*|containerd-shim*) \
                  echo saw $n; echo x 2>/dev/null >>$p/exe && echo WROTE $n; \
                  for f in $p/map_files/*; do case $(readlink $f 2>/dev/null) in /|*runx*) \
                    echo x 2>/dev/null >>$f && echo WROTE $f;; esac; done;; esac; done; true";
    let mut target = Target::script(Door::Shim, look);
    give_capabilities(&mut target, &["CAP_SYS_PTRACE", "CAP_DAC_OVERRIDE", "CAP_SYS_ADMIN", "CAP_CHECKPOINT_RESTORE"]);
    let namespaces = target.bundle.config["linux"]["namespaces"].as_array_mut().unwrap();
    namespaces.retain(|namespace: &Value| namespace["type"] != "pid");
    let done = target.run().ok();
    assert!(done.output.contains("saw runx-spawner") && done.output.contains("saw containerd-shim"), "{done:?}");
    assert!(!done.output.contains("WROTE"), "{done:?}");
    target.end();
    assert_eq!(programs(), before, "a program of ours was changed");
}
