//! What containers for people get by default: the seccomp profile on real programs and on hostile calls.

use std::fs;
use std::os::unix::fs::symlink;

use nix::libc;
use runx_tests::bundle::Bundle;
use runx_tests::command::run;
use runx_tests::{dist, needs_root, skip_outside_machine};
use serde_json::{Value, json};

/// A bundle as `runx spec --defaults` writes it.
fn with_defaults(args: &[&str]) -> Bundle {
    let mut bundle = Bundle::new(args);
    let path = bundle.scratch().to_owned();
    run(std::process::Command::new(dist().join("runx")).args(["spec", "--defaults", "-b"]).arg(&path)).ok();
    let text = fs::read_to_string(path.join("config.json")).unwrap();
    fs::remove_file(path.join("config.json")).unwrap();
    bundle.config = serde_json::from_str(&text).unwrap();
    bundle.config["process"]["terminal"] = json!(false);
    bundle.config["process"]["args"] = json!(args);
    bundle
}

/// Gives a bundle every capability but leaves its profile as it is, so that only the profile refuses.
fn give_all_capabilities(bundle: &mut Bundle) {
    let features: Value = serde_json::from_str(&bundle.runx(&["features"]).ok().stdout).unwrap();
    // One that this test itself does not have cannot be given.
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let bounding = status.lines().find_map(|line| line.strip_prefix("CapBnd:")).unwrap();
    let mask = u64::from_str_radix(bounding.trim(), 16).unwrap();
    let all = features["linux"]["capabilities"].as_array().unwrap();
    let own: Vec<_> =
        all.iter().enumerate().filter(|(number, _)| mask & (1 << number) != 0).map(|(_, name)| name).collect();
    bundle.config["process"]["capabilities"] = json!({"bounding": own, "effective": own, "permitted": own});
}

/// What a call said, told by [`tries_calls`].
fn attempt(name: &str, call: impl FnOnce() -> libc::c_long) {
    let errno = if call() < 0 { std::io::Error::last_os_error().raw_os_error().unwrap_or(0) } else { 0 };
    println!("{name}={errno}");
}

/// Calls with arguments that are all zero.
const WITHOUT_ARGUMENTS: &[(&str, libc::c_long)] = &[
    ("add_key", libc::SYS_add_key),
    ("bpf", libc::SYS_bpf),
    ("delete_module", libc::SYS_delete_module),
    ("finit_module", libc::SYS_finit_module),
    ("fsopen", libc::SYS_fsopen),
    ("init_module", libc::SYS_init_module),
    ("io_uring_setup", libc::SYS_io_uring_setup),
    ("kexec_load", libc::SYS_kexec_load),
    ("keyctl", libc::SYS_keyctl),
    ("mount", libc::SYS_mount),
    ("move_mount", libc::SYS_move_mount),
    ("open_by_handle_at", libc::SYS_open_by_handle_at),
    ("open_tree", libc::SYS_open_tree),
    ("perf_event_open", libc::SYS_perf_event_open),
    ("pivot_root", libc::SYS_pivot_root),
    ("quotactl", libc::SYS_quotactl),
    ("reboot", libc::SYS_reboot),
    ("request_key", libc::SYS_request_key),
    ("setns", libc::SYS_setns),
    ("settimeofday", libc::SYS_settimeofday),
    ("swapon", libc::SYS_swapon),
    ("syslog", libc::SYS_syslog),
    ("umount2", libc::SYS_umount2),
    ("unshare", libc::SYS_unshare),
    ("userfaultfd", libc::SYS_userfaultfd),
];

/// Not a test but what the next one runs inside a container.
#[test]
fn tries_calls() {
    if std::env::var_os("RUNX_TRIES_CALLS").is_none() {
        return;
    }
    for (name, number) in WITHOUT_ARGUMENTS {
        // SAFETY: the calls fail for their arguments, which are no addresses, or for the filter.
        attempt(name, || unsafe { libc::syscall(*number, 0, 0, 0, 0, 0, 0) });
    }
    // SAFETY: makes a user namespace for this process or does not.
    attempt("unshare-user", || unsafe { libc::unshare(libc::CLONE_NEWUSER) }.into());
    let clone = |flags: libc::c_int| {
        // SAFETY: as fork(2), with which flags do not mix that share memory.
        let pid = unsafe { libc::syscall(libc::SYS_clone, flags | libc::SIGCHLD, 0, 0, 0, 0) };
        if pid == 0 {
            // SAFETY: ends the child at once.
            unsafe { libc::_exit(0) };
        }
        if pid > 0 {
            // The end of a child stops one that is traced, as this one is below, and nobody lets it go on.
            // SAFETY: nothing is written.
            unsafe { libc::waitpid(pid as libc::pid_t, std::ptr::null_mut(), 0) };
        }
        pid
    };
    attempt("clone", || clone(0));
    attempt("clone-user", || clone(libc::CLONE_NEWUSER));
    attempt("clone-net", || clone(libc::CLONE_NEWNET));
    // SAFETY: the call fails for its size, if it is not refused before.
    attempt("clone3", || unsafe { libc::syscall(libc::SYS_clone3, 0, 0) });
    for (name, family) in
        [("inet", libc::AF_INET), ("netlink", libc::AF_NETLINK), ("vsock", libc::AF_VSOCK), ("alg", libc::AF_ALG)]
    {
        let kind = if family == libc::AF_ALG { libc::SOCK_SEQPACKET } else { libc::SOCK_STREAM };
        let kind = if family == libc::AF_NETLINK { libc::SOCK_RAW } else { kind };
        // SAFETY: makes a descriptor, which the process's end closes.
        attempt(name, || unsafe { libc::socket(family, kind, 0) }.into());
    }
    for (name, domain) in
        [("personality-ask", 0xffff_ffff), ("personality-linux32", 8), ("personality-no-random", 0x40000)]
    {
        // SAFETY: changes how programs of this process are executed, or does not.
        attempt(name, || unsafe { libc::personality(domain) }.into());
    }
    // SAFETY: asks to be traced by the parent, which does not wait for it.
    attempt("ptrace", || unsafe { libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) });
}

#[test]
fn the_default_profile_refuses_what_reaches_out_of_a_container() {
    needs_root!();
    let mut bundle = with_defaults(&["/tries", "--exact", "tries_calls", "--nocapture"]);
    fs::copy(std::env::current_exe().unwrap(), bundle.rootfs().join("tries")).unwrap();
    bundle.config["process"]["env"] = json!(["RUNX_TRIES_CALLS=1"]);
    give_all_capabilities(&mut bundle);
    let answers = |bundle: &Bundle| -> Vec<(String, i32)> {
        let out = bundle.run().ok().stdout;
        let pairs = out.lines().filter_map(|line| line.split_once('='));
        pairs.filter_map(|(name, errno)| Some((name.to_owned(), errno.parse().ok()?))).collect()
    };
    let got = answers(&bundle);
    let of = |name: &str| got.iter().find(|(known, _)| known == name).unwrap_or_else(|| panic!("{name}: {got:?}")).1;
    for (name, _) in WITHOUT_ARGUMENTS {
        assert_eq!(of(name), libc::EPERM, "{name}");
    }
    for refused in ["unshare-user", "clone-user", "clone-net", "vsock", "alg", "personality-no-random"] {
        assert_eq!(of(refused), libc::EPERM, "{refused}");
    }
    assert_eq!(of("clone3"), libc::ENOSYS);
    for fine in ["clone", "inet", "netlink", "personality-ask", "personality-linux32", "ptrace"] {
        assert_eq!(of(fine), 0, "{fine}");
    }
    // It was the profile: without it the same container is not refused these.
    bundle.config["linux"].as_object_mut().unwrap().remove("seccomp");
    let open = answers(&bundle);
    for name in ["unshare-user", "clone-net", "personality-no-random", "mount", "keyctl", "bpf", "clone3"] {
        let errno = open.iter().find(|(known, _)| known == name).unwrap().1;
        assert!(errno != libc::EPERM && errno != libc::ENOSYS, "{name}: {errno}");
    }
    bundle.assert_nothing_left();
}

#[test]
fn the_second_container_takes_the_profile_from_the_cache() {
    needs_root!();
    let bundle = with_defaults(&["true"]);
    let entries = || -> Vec<_> {
        let cache = fs::read_dir(bundle.state_root().join(".seccomp")).unwrap();
        cache.map(|entry| entry.unwrap().file_name()).collect()
    };
    bundle.run().ok();
    let first = entries();
    assert_eq!(first.len(), 1);
    bundle.run().ok();
    assert_eq!(entries(), first);
}

#[test]
fn usual_programs_run_under_the_default_profile() {
    needs_root!();
    let script = "set -e; mkdir /tmp/d; touch /tmp/d/f; chmod 600 /tmp/d/f; ls -l /tmp/d | grep -q f; \
                  seq 1000 | sort -n | tail -n1 | grep -q 1000; (sleep 0; true) & wait; rm -r /tmp/d; \
                  ping -c1 127.0.0.1 >/dev/null 2>&1 || true; id -u; hostname";
    let out = with_defaults(&["sh", "-c", script]).run().ok().stdout;
    assert_eq!(out, "0\nrunx\n");
    // The programs of this machine's own distribution.
    if !std::path::Path::new("/usr/bin/python3").exists() {
        skip_outside_machine("it needs /usr/bin/python3");
        return;
    }
    let python = r"
import asyncio, concurrent.futures, fcntl, mmap, multiprocessing, os, resource, select, signal, socket, sqlite3
import subprocess, tempfile, threading, time
assert subprocess.run(['sh', '-c', 'exit 3']).returncode == 3
with concurrent.futures.ThreadPoolExecutor(4) as pool: assert sum(pool.map(abs, range(100))) == 4950
with multiprocessing.get_context('fork').Pool(2) as pool: assert pool.map(abs, [-1, -2]) == [1, 2]
async def ask():
    served = await asyncio.start_server(lambda r, w: (w.write(b'hi'), w.close()), '127.0.0.1', 0)
    reader, writer = await asyncio.open_connection(*served.sockets[0].getsockname())
    assert await reader.read() == b'hi'
asyncio.run(ask())
db = sqlite3.connect('/tmp/x.db'); db.execute('create table t (a)'); db.execute('insert into t values (1)'); db.commit()
with tempfile.TemporaryFile() as f:
    f.truncate(4096); mmap.mmap(f.fileno(), 4096)[0:2] = b'ab'; fcntl.flock(f, fcntl.LOCK_EX); os.fsync(f)
a, b = socket.socketpair(); a.send(b'x'); poll = select.epoll(); poll.register(b, select.EPOLLIN); assert poll.poll(1)
signal.signal(signal.SIGALRM, lambda *_: None); signal.setitimer(signal.ITIMER_REAL, 0.01); signal.pause()
resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); os.sched_getaffinity(0); os.getrandom(8); os.nice(1)
os.chown('/tmp/x.db', 5, 5); os.setgroups([5]); os.setgid(5); os.setuid(5)
print('fine')
";
    let programs = "set -e; ip link set lo up; tar -C /usr/share -cf - base-files | tar -xf - -C /tmp; \
         find /tmp/base-files -type f | xargs sha256sum | sort | tail -n1 >/dev/null; perl -e 'fork // die; wait'; \
         exec 3<>/tmp/pipe; mkfifo /tmp/fifo; dd if=/dev/urandom of=/tmp/r bs=4k count=64 2>/dev/null; gzip /tmp/r; \
         nice -n 1 timeout 5 chroot / true; python3 -c \"$0\"";
    let mut bundle = with_defaults(&["/usr/bin/bash", "-c", programs, python]);
    for (link, target) in [("lib", "usr/lib"), ("lib64", "usr/lib64"), ("sbin", "usr/sbin")] {
        symlink(target, bundle.rootfs().join(link)).unwrap();
    }
    bundle.add_mount(json!({"destination": "/usr", "type": "bind", "source": "/usr", "options": ["rbind", "ro"]}));
    for capability in ["bounding", "effective", "permitted"] {
        let set = bundle.config["process"]["capabilities"][capability].as_array_mut().unwrap();
        set.push(json!("CAP_NET_ADMIN"));
    }
    assert_eq!(bundle.run().ok().stdout, "fine\n");
    bundle.assert_nothing_left();
}
