//! `runx container run`: programs, their exit codes, and what they are given.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use runx_tests::command::{eventually, run};
use runx_tests::container::Containers;
use runx_tests::needs_root;

#[test]
fn a_program_runs_with_its_output_and_exit_code_and_nothing_is_left() {
    needs_root!();
    let containers = Containers::new();
    let id = containers.id("a");
    let done = containers.script(&["--rm", "--name", &id], "echo out; echo err >&2; exit 7");
    assert_eq!((done.code, done.stdout.as_str(), done.stderr.as_str()), (7, "out\n", "err\n"));
    containers.assert_nothing_left();
}

#[test]
fn what_cannot_be_run_has_dockers_exit_codes_and_leaves_nothing() {
    needs_root!();
    let containers = Containers::new();
    let id = containers.id("a");
    containers.run(&["--name", &id], &["nope"]).fails(127, &["nope", "not found"]);
    containers.run(&["--name", &id], &["/etc/passwd"]).fails(126, &["/etc/passwd", "permission denied"]);
    containers.run(&["--name", &id, "-u", "nobody"], &["true"]).fails(125, &["nobody", "no such user"]);
    containers.run(&["--name", &id, "-w", "rel"], &["true"]).fails(125, &["rel", "not absolute"]);
    containers.run(&["--name", "a/b"], &["true"]).fails(125, &["a/b"]);
    containers.run(&["--name", ".seccomp"], &["true"]).fails(125, &[".seccomp", "letter or a digit"]);
    containers.run(&["--name", &id, "--mount", "type=bind,src=/nope,dst=/x"], &["true"]).fails(125, &["/nope"]);
    containers.container(&["run", "--rootfs", "/nope", "true"]).fails(125, &["--rootfs /nope"]);
    containers.container(&["run", "--pull", "never", "nope"]).fails(125, &["nope", "runx storage pull nope"]);
    assert_eq!(containers.container(&["ls", "-aq"]).ok().stdout, "");
    containers.assert_nothing_left();
}

#[test]
fn an_id_is_taken_only_once_and_a_random_one_is_there_without() {
    needs_root!();
    let containers = Containers::new();
    let id = containers.background("a", &[], "sleep 600");
    containers.run(&["--name", &id], &["true"]).fails(125, &["already", "runx container rm"]);
    let cidfile = containers.scratch().join("cid");
    let flags = ["-d", "--cidfile", cidfile.to_str().unwrap()];
    let random = containers.script(&flags, "exit 0").ok().stdout.trim().to_owned();
    assert!(random.len() == 12 && random.bytes().all(|byte| byte.is_ascii_hexdigit()), "{random}");
    assert_eq!(fs::read_to_string(cidfile).unwrap(), random);
    containers.container(&["rm", "-f", &id, &random]).ok();
    containers.assert_nothing_left();
}

#[test]
fn the_environment_is_that_of_a_container_and_not_the_callers() {
    needs_root!();
    let containers = Containers::new();
    let file = containers.scratch().join("env");
    fs::write(&file, "# a comment\nFROM_FILE=1\nPASSED\n\nBOTH=file\n").unwrap();
    let flags = ["--rm", "--env-file", file.to_str().unwrap(), "-e", "SAID=a=b c", "-e", "BOTH=flag", "-e", "ABSENT"];
    let mut command = containers.run_command(&flags, &["env"]);
    command.env("PASSED", "yes").env("SECRET", "no").env_remove("ABSENT");
    let out = run(&mut command).ok().stdout;
    let lines: Vec<&str> = out.lines().collect();
    for line in ["FROM_FILE=1", "PASSED=yes", "SAID=a=b c", "BOTH=flag", "HOME=/root"] {
        assert!(lines.contains(&line), "{line} is not in {lines:?}");
    }
    assert!(lines.iter().any(|line| line.starts_with("PATH=/usr/local/sbin:")), "{lines:?}");
    assert!(!out.contains("SECRET") && !out.contains("ABSENT") && !out.contains("BOTH=file"), "{lines:?}");
}

#[test]
fn users_and_groups_are_those_of_the_container() {
    needs_root!();
    let containers = Containers::new();
    fs::write(containers.rootfs().join("etc/group"), "root:x:0:\nuser:x:1000:\naudio:x:63:user\n").unwrap();
    let id = |flags: &[&str]| {
        let flags = [&["--rm"], flags].concat();
        containers.script(&flags, "id -u; id -g; id -G; echo $HOME; pwd").ok().stdout.replace('\n', " ")
    };
    assert_eq!(id(&[]), "0 0 0 /root / ");
    assert_eq!(id(&["-u", "user"]), "1000 1000 1000 63 /home/user / ");
    assert_eq!(id(&["-u", "1000"]), "1000 1000 1000 63 /home/user / ");
    assert_eq!(id(&["-u", "7:8", "--group-add", "audio", "-w", "/tmp"]), "7 8 8 63 / /tmp ");
    // A link that leads out of the root filesystem leads to its own file.
    fs::remove_file(containers.rootfs().join("etc/passwd")).unwrap();
    std::os::unix::fs::symlink("/../../../../../../etc/shadow", containers.rootfs().join("etc/passwd")).unwrap();
    containers.run(&["--rm", "-u", "daemon"], &["true"]).fails(125, &["no such user"]);
}

#[test]
fn capabilities_are_dockers_and_change_with_the_flags() {
    needs_root!();
    let containers = Containers::new();
    let caps = |flags: &[&str]| {
        let flags = [&["--rm"], flags].concat();
        let out = containers.script(&flags, "grep -E 'Cap(Eff|Bnd)|NoNewPrivs|Seccomp:' /proc/self/status").ok().stdout;
        let value = |name: &str| {
            let line = out.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
            u64::from_str_radix(line.trim_start_matches(':').trim(), 16).unwrap()
        };
        (value("CapEff"), value("CapBnd"), value("NoNewPrivs"), value("Seccomp"))
    };
    const DEFAULT: u64 = 0xa804_25fb;
    assert_eq!(caps(&[]), (DEFAULT, DEFAULT, 0, 2));
    assert_eq!(caps(&["-u", "1000"]), (0, DEFAULT, 0, 2));
    assert_eq!(caps(&["--cap-drop", "ALL", "--cap-add", "chown"]), (1, 1, 0, 2));
    assert_eq!(
        caps(&["--cap-drop", "CAP_CHOWN", "--security-opt", "no-new-privileges"]),
        (DEFAULT & !1, DEFAULT & !1, 1, 2)
    );
    assert_eq!(caps(&["--security-opt", "seccomp=unconfined"]).3, 0);
    let all = caps(&["--privileged"]);
    assert!(all.0 & !DEFAULT != 0 && all.3 == 0, "{all:?}");
}

#[test]
fn a_seccomp_profile_of_the_users_holds() {
    needs_root!();
    let containers = Containers::new();
    let profile = containers.scratch().join("profile.json");
    let rule = r#"{"defaultAction": "SCMP_ACT_ALLOW", "archMap": [{"architecture": "SCMP_ARCH_X86_64", "subArchitectures": []},
        {"architecture": "SCMP_ARCH_AARCH64", "subArchitectures": []}],
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "args": null}]}"#;
    fs::write(&profile, rule).unwrap();
    let option = format!("seccomp={}", profile.display());
    let done = containers.script(&["--rm", "--security-opt", &option], "touch /tmp/x && mkdir /tmp/d");
    assert!(done.code != 0 && done.stderr.contains("not permitted"), "{done:?}");
    assert!(containers.rootfs().join("tmp/x").exists() && !containers.rootfs().join("tmp/d").exists());
}

#[test]
fn a_read_only_root_is_one_and_what_is_mounted_can_be_written() {
    needs_root!();
    let containers = Containers::new();
    let data = containers.scratch().join("data");
    fs::create_dir(&data).unwrap();
    let bind = format!("{}:/data", data.display());
    let read_only = format!("{}:/ro:ro", data.display());
    let flags = ["--rm", "--read-only", "-v", &bind, "-v", &read_only, "--tmpfs", "/t:size=1m"];
    let script = "touch /x 2>&1; echo one > /data/file; touch /ro/x 2>&1; cat /ro/file; \
                  dd if=/dev/zero of=/t/big bs=1024 count=2048 2>/dev/null; stat -c %s /t/big; touch /dev/shm/x && echo shm";
    let out = containers.script(&flags, script).ok().stdout;
    assert_eq!(out.matches("Read-only file system").count(), 2, "{out}");
    assert!(out.contains("one\n1048576\nshm\n"), "{out}");
    assert_eq!(fs::read_to_string(data.join("file")).unwrap(), "one\n");
    containers.assert_nothing_left();
}

#[test]
fn a_volume_keeps_its_files_and_one_without_a_name_goes_with_its_container() {
    needs_root!();
    let containers = Containers::new();
    fs::create_dir(containers.rootfs().join("seed")).unwrap();
    fs::write(containers.rootfs().join("seed/first"), "seeded").unwrap();
    fs::set_permissions(containers.rootfs().join("seed"), fs::Permissions::from_mode(0o711)).unwrap();
    let volume = containers.scratch().join("storage/volumes/data/_data");
    containers.script(&["--rm", "-v", "data:/seed"], "cat /seed/first; echo more > /seed/second").ok();
    assert_eq!(fs::read_to_string(volume.join("first")).unwrap(), "seeded");
    assert_eq!(fs::metadata(&volume).unwrap().permissions().mode() & 0o777, 0o711);
    // What was filled once is not filled again.
    fs::remove_file(volume.join("first")).unwrap();
    fs::remove_file(volume.join("second")).unwrap();
    assert_eq!(containers.script(&["--rm", "-v", "data:/seed"], "ls /seed").ok().stdout, "");
    containers.script(&["--rm", "-v", "/anonymous"], "touch /anonymous/x").ok();
    let names: Vec<_> = fs::read_dir(containers.scratch().join("storage/volumes")).unwrap().flatten().collect();
    assert_eq!(names.len(), 1, "{names:?}");
    fs::remove_dir_all(containers.scratch().join("storage/volumes")).unwrap();
    containers.assert_nothing_left();
}

#[test]
fn names_and_the_kernel_are_shown_as_a_container_has_them() {
    needs_root!();
    let containers = Containers::new();
    let flags =
        ["--rm", "--hostname", "box", "--add-host", "db:10.1.2.3", "--dns", "10.9.9.9", "--dns-search", "x.test"];
    let out = containers.script(&flags, "hostname; cat /etc/hostname /etc/hosts /etc/resolv.conf").ok().stdout;
    assert!(out.starts_with("box\nbox\n"), "{out}");
    assert!(
        out.contains("10.1.2.3\tdb\n") && out.contains("nameserver 10.9.9.9\n") && out.contains("search x.test\n"),
        "{out}"
    );
    let script = "cat /proc/kcore | head -c 1 | wc -c; echo 1 > /proc/sys/kernel/hostname; cat /proc/1/cgroup; \
                  ip -o link | wc -l; stat -c %a /dev/shm; ls /dev";
    let done = containers.script(&["--rm"], script);
    assert!(done.stdout.starts_with("0\n") && done.stderr.contains("Read-only"), "{done:?}");
    assert!(!done.stdout.contains("/runx/"), "the cgroup namespace hides where it is: {}", done.stdout);
    assert!(done.stdout.contains("\n1\n1777\n"), "{}", done.stdout);
    assert!(!done.stdout.contains("sda") && !done.stdout.contains("vda"), "{}", done.stdout);
    // On the host's network there is more than one interface, or at least the host's name.
    let host = containers
        .command(&[
            "container",
            "run",
            "--rm",
            "--network",
            "host",
            "--rootfs",
            containers.rootfs().to_str().unwrap(),
            "hostname",
        ])
        .output()
        .unwrap();
    let own = nix::unistd::gethostname().unwrap();
    assert_eq!(String::from_utf8_lossy(&host.stdout).trim(), own.to_string_lossy());
}

#[test]
fn limits_take_effect_and_update_changes_them() {
    needs_root!();
    let containers = Containers::new();
    let flags =
        ["--memory", "64m", "--cpus", "0.5", "--pids-limit", "20", "--cpu-shares", "512", "--ulimit", "nofile=100:200"];
    let id = containers.background("a", &flags, "ulimit -n; ulimit -Hn; sleep 600");
    containers.until_logged(&id, "100\n200\n");
    let limit = |controller: &str, v1: &str, v2: &str| {
        let (old, new) =
            (format!("/sys/fs/cgroup/{controller}/runx/{id}/{v1}"), format!("/sys/fs/cgroup/runx/{id}/{v2}"));
        fs::read_to_string(old).or_else(|_| fs::read_to_string(new)).unwrap().trim().to_owned()
    };
    let all = || {
        (
            limit("memory", "memory.limit_in_bytes", "memory.max"),
            limit("cpu", "cpu.cfs_quota_us", "cpu.max").replace(" 100000", ""),
            limit("pids", "pids.max", "pids.max"),
        )
    };
    assert_eq!(all(), ("67108864".into(), "50000".into(), "20".into()));
    containers.container(&["update", "--memory", "96m", "--cpus", "2", "--pids-limit", "30", &id]).ok();
    assert_eq!(all(), ("100663296".into(), "200000".into(), "30".into()));
    let inspected = containers.inspect(&id);
    assert_eq!(inspected["limits"]["memory"], 96 << 20);
    containers.container(&["stop", "-t", "0", &id]).ok();
    // They hold for the next start, too.
    containers.container(&["start", &id]).ok();
    assert_eq!(all().0, "100663296");
    // And for one by the policy, after the program ends by itself.
    containers.container(&["update", "--restart", "always", "--memory", "80m", &id]).ok();
    let before = containers.inspect(&id)["state"]["pid"].as_i64().unwrap();
    // SAFETY: kill takes numbers; the process is this test's container.
    assert_eq!(unsafe { libc::kill(before as i32, libc::SIGKILL) }, 0);
    eventually("it runs again", || {
        let state = &containers.inspect(&id)["state"];
        state["status"] == "running" && state["pid"] != before
    });
    assert_eq!(all(), ("83886080".into(), "200000".into(), "30".into()));
    containers.container(&["rm", "-f", &id]).ok();
    containers.assert_nothing_left();
}

#[test]
fn who_takes_too_much_memory_is_killed_and_that_is_told() {
    needs_root!();
    let containers = Containers::new();
    let id = containers.id("a");
    // Awk-less busybox: a shell variable grows without end.
    let script = "x=0123456789; while true; do x=$x$x; done";
    let done = containers.script(&["--name", &id, "--memory", "16m", "--memory-swap", "16m"], script);
    assert_eq!(done.code, 137, "{done:?}");
    assert_eq!(containers.inspect(&id)["state"]["oomKilled"], true);
    containers.container(&["rm", &id]).ok();
    containers.assert_nothing_left();
}

#[test]
fn a_bundle_is_taken_as_it_is_or_written() {
    needs_root!();
    let containers = Containers::new();
    let (id, bundle) = (containers.id("a"), containers.scratch().join("bundle"));
    let (rootfs, place) = (containers.rootfs(), bundle.to_str().unwrap().to_owned());
    let create = ["create", "--network", "none", "--id", &id, "--rootfs", rootfs.to_str().unwrap()];
    containers.container(&[&create[..], &["--bundle", &place, "-c", "echo", "-a", "hi"]].concat()).ok();
    assert_eq!(containers.container(&["start", "-a", &id]).ok().stdout, "hi\n");
    let text = fs::read_to_string(bundle.join("config.json")).unwrap();
    containers.container(&["delete", "--id", &id]).ok();
    // It was ours to write and the user's to keep.
    fs::write(bundle.join("config.json"), text.replace("\"hi\"", "\"from the bundle\"")).unwrap();
    let hosts = containers.directory_of(&id);
    fs::create_dir_all(&hosts).unwrap();
    for name in ["hosts", "hostname", "resolv.conf"] {
        fs::write(hosts.join(name), "").unwrap();
    }
    let other = containers.id("b");
    let done = containers.container(&["run", "--rm", "--id", &other, "--bundle", &place]).ok();
    assert_eq!(done.stdout, "from the bundle\n");
    containers
        .container(&["run", "--id", &other, "--bundle", &place, "--read-only"])
        .fails(125, &["decides", "--read-only"]);
    fs::remove_dir_all(hosts).unwrap();
    containers.assert_nothing_left();
}

#[test]
fn a_container_may_use_anothers_network() {
    needs_root!();
    let containers = Containers::new();
    let id = containers.background("a", &["--hostname", "one"], "sleep 600");
    let rootfs = containers.rootfs();
    let flags = ["run", "--rm", "--network", &format!("container:{id}"), "--rootfs", rootfs.to_str().unwrap()];
    let own = containers.container(&[&flags[..], &["readlink", "/proc/self/ns/net"]].concat()).ok().stdout;
    let theirs = containers.container(&["exec", &id, "readlink", "/proc/self/ns/net"]).ok().stdout;
    assert_eq!(own, theirs);
    containers.container(&["stop", "-t", "0", &id]).ok();
    containers.container(&[&flags[..], &["true"]].concat()).fails(125, &["exited", "runx container start"]);
    containers.container(&["rm", &id]).ok();
    containers.assert_nothing_left();
}
