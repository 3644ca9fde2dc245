//! Attacks. Each prints what it achieved, or does not end.

use std::fs;
use std::io::{self, Write};

use crate::traces::check;

pub(crate) fn attack(name: &str) {
    match name {
        "forks" => loop {
            // SAFETY: the program has one thread.
            unsafe { libc::fork() };
        },
        "memory" => {
            let mut all = Vec::new();
            loop {
                all.push(std::hint::black_box(vec![1u8; 1 << 20]));
            }
        }
        "output" => loop {
            let _ = io::stdout().write_all(&[b'x'; 4096]);
        },
        "disk" => disk(),
        "inodes" => inodes(),
        "sleep" => loop {
            // SAFETY: no argument.
            unsafe { libc::pause() };
        },
        "spin" => loop {
            std::hint::spin_loop();
        },
        "spin-unseen" => spin_unseen(),
        "signal" => {
            // SAFETY: only integers are passed.
            unsafe { libc::raise(libc::SIGILL) };
        }
        "bpf" => {
            // SAFETY: the call is refused, or fails for want of arguments.
            let done = unsafe { libc::syscall(libc::SYS_bpf, 0, 0, 0) };
            println!("bpf: {:?}", check(done).map_err(|e| e.raw_os_error()));
        }
        "init" => init(),
        "calls" => calls(),
        "peek" => peek(),
        "large-file" => {
            let file = fs::File::create("/w/large").expect("make a file");
            for _ in 0..1024 {
                (&file).write_all(&[7; 4096]).expect("write");
            }
        }
        "traps" => traps(),
        _ => panic!("no such attack: {name}"),
    }
}

fn disk() {
    let file = fs::File::create("/w/bomb").expect("make a file");
    let mut written = 0u64;
    let failed = loop {
        match (&file).write(&[7; 1 << 16]) {
            Ok(length) => written += length as u64,
            Err(e) => break e,
        }
    };
    println!("{written} {:?}", failed.raw_os_error());
}

fn inodes() {
    let mut made = 0u64;
    let failed = loop {
        match fs::File::create(format!("/w/{made}")) {
            Ok(_) => made += 1,
            Err(e) => break e,
        }
    };
    println!("{made} {:?}", failed.raw_os_error());
}

/// Children that nobody waits for are in no parent's account.
fn spin_unseen() {
    // SAFETY: no handler is installed.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
    loop {
        // SAFETY: the program has one thread.
        if unsafe { libc::fork() } == 0 {
            for _ in 0..20_000_000u64 {
                std::hint::spin_loop();
            }
            // SAFETY: ends the process.
            unsafe { libc::_exit(0) };
        }
        // SAFETY: there is nothing to write to.
        unsafe { libc::wait(std::ptr::null_mut()) };
    }
}

/// Everything that reaches for process 1.
fn init() {
    for signal in [libc::SIGTERM, libc::SIGKILL, libc::SIGSTOP, libc::SIGSEGV] {
        // SAFETY: only integers are passed.
        unsafe { libc::kill(1, signal) };
    }
    // SAFETY: only integers are passed.
    unsafe { libc::kill(-1, libc::SIGKILL) };
    // SAFETY: only integers are passed.
    let traced = unsafe { libc::ptrace(libc::PTRACE_ATTACH, 1, 0, 0) } != -1;
    // SAFETY: only integers are passed.
    let handle = unsafe { libc::syscall(libc::SYS_pidfd_open, 1, 0) };
    let stolen = (0..16).any(|fd| {
        // SAFETY: only integers are passed.
        unsafe { libc::syscall(libc::SYS_pidfd_getfd, handle, fd, 0) != -1 }
    });
    let mut word = 0u64;
    let local = libc::iovec { iov_base: (&raw mut word).cast(), iov_len: 8 };
    let remote = libc::iovec { iov_base: (&raw const word).cast_mut().cast(), iov_len: 8 };
    // SAFETY: the local part is writable; the remote one is another process's.
    let read = unsafe { libc::process_vm_readv(1, &local, 1, &remote, 1, 0) } != -1;
    let limit = libc::rlimit64 { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the limit is valid, and the old one is not asked for.
    let limited = unsafe { libc::prlimit64(1, libc::RLIMIT_NOFILE, &limit, std::ptr::null_mut()) } != -1;
    println!("traced {traced} stolen {stolen} read {read} limited {limited}");
}

/// What the default filter is to refuse, by number and arguments.
fn calls() {
    let calls: [(&str, libc::c_long, [u64; 2]); 9] = [
        ("keyctl", libc::SYS_keyctl, [0, 0]),
        ("add_key", libc::SYS_add_key, [0, 0]),
        ("unshare", libc::SYS_unshare, [libc::CLONE_NEWUSER as u64, 0]),
        ("setns", libc::SYS_setns, [0, 0]),
        ("mount", libc::SYS_mount, [0, 0]),
        ("clone", libc::SYS_clone, [(libc::CLONE_NEWUSER | libc::SIGCHLD) as u64, 0]),
        ("perf_event_open", libc::SYS_perf_event_open, [0, 0]),
        ("io_uring_setup", libc::SYS_io_uring_setup, [1, 0]),
        ("userfaultfd", libc::SYS_userfaultfd, [0, 0]),
    ];
    for (name, number, [a, b]) in calls {
        // SAFETY: every one is refused; what is not fails for want of arguments.
        let done = unsafe { libc::syscall(number, a, b, 0, 0, 0) };
        println!("{name} {:?}", check(done).map_err(|e| e.raw_os_error()));
    }
    let limit = libc::rlimit64 { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the limit is valid, and the old one is not asked for.
    let done = unsafe { libc::prlimit64(0, libc::RLIMIT_CORE, &limit, std::ptr::null_mut()) };
    println!("prlimit64 {:?}", check(done.into()).map_err(|e| e.raw_os_error()));
    // SAFETY: the limit is valid; on these machines it has 64 bits in any case.
    let done = unsafe { libc::syscall(libc::SYS_setrlimit, libc::RLIMIT_CORE, &raw const limit) };
    println!("setrlimit {:?}", check(done).map_err(|e| e.raw_os_error()));
    let mut limit = limit;
    // SAFETY: the old limit is writable.
    let done = unsafe { libc::prlimit64(0, libc::RLIMIT_CORE, std::ptr::null(), &mut limit) };
    println!("core {done} {} {}", limit.rlim_cur, limit.rlim_max);
    // SAFETY: only integers are passed; what is opened ends with the program.
    let done = unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0) };
    println!("socket {:?}", check(done.into()).map_err(|e| e.raw_os_error()));
    // SAFETY: without arguments it fails in any case.
    let done = unsafe { libc::syscall(libc::SYS_clone3, 0, 0) };
    println!("clone3 {:?}", check(done).map_err(|e| e.raw_os_error()));
    println!("thread {}", std::thread::spawn(|| 7).join().is_ok());
}

/// What /proc tells of others.
fn peek() {
    let mut seen = Vec::new();
    for entry in fs::read_dir("/proc").expect("list /proc").flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.parse::<u32>().is_ok_and(|pid| pid != std::process::id()) {
            seen.push(name);
        }
    }
    println!("processes {seen:?}");
    for name in ["mem", "environ", "maps", "cmdline", "fd", "root", "cwd", "exe", "ns/mnt", "status"] {
        let path = format!("/proc/1/{name}");
        let reached = fs::read_dir(&path).is_ok() || fs::read_link(&path).is_ok() || fs::read(&path).is_ok();
        if reached {
            println!("reached {path}");
        }
    }
    for path in ["/proc/kcore", "/proc/keys", "/proc/key-users", "/proc/timer_list"] {
        if fs::read(path).is_ok_and(|bytes| !bytes.is_empty()) {
            println!("reached {path}");
        }
    }
    for path in
        ["/proc/sysrq-trigger", "/proc/sys/kernel/hostname", "/proc/sys/vm/drop_caches", "/proc/self/oom_score_adj"]
    {
        if fs::OpenOptions::new().write(true).open(path).is_ok() {
            println!("writable {path}");
        }
    }
    for path in ["/root", "/home", "/var", "/etc/passwd", "/etc/shadow", "/run", "/sys", "/boot"] {
        if fs::symlink_metadata(path).is_ok() {
            println!("visible {path}");
        }
    }
    for path in ["/usr/x", "/x", "/dev/x", "/proc/x"] {
        if fs::write(path, "x").is_ok() {
            println!("written {path}");
        }
    }
    let groups = fs::read_to_string("/proc/self/cgroup").expect("read the own cgroups");
    println!("groups {}", groups.lines().all(|line| line.ends_with(":/")));
}

/// What waits for who opens or removes files in here.
fn traps() {
    for (target, name) in [("/proc/1/mem", "memory"), ("/proc/self/environ", "environ"), ("/usr/bin/env", "outside")] {
        std::os::unix::fs::symlink(target, format!("/w/{name}")).expect("make a link");
    }
    // SAFETY: the path is NUL-terminated.
    check(unsafe { libc::mkfifo(c"/w/fifo".as_ptr(), 0o666) }.into()).expect("make a FIFO");
    fs::create_dir("/w/directory").expect("make a directory");
    fs::write("/w/kept", "kept").expect("write a file");
    fs::create_dir("/w/tree").expect("make a directory");
    std::os::unix::fs::symlink("/w", "/w/tree/up").expect("make a link");
    fs::write("/w/plain", "plain").expect("write a file");
    std::os::unix::fs::symlink("/../../../../w/plain", "/w/around").expect("make a link");
}
