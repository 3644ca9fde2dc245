//! Looks for every kind of trace, and prints those that are there.

use std::fs;
use std::net::{Ipv4Addr, TcpStream};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;

use crate::traces::{self, KEY, NAME, PLACES, PORT, QUEUE, TIME};

/// Prints a line for each kind that is found, and the user id.
pub(crate) fn look() {
    let root = fs::metadata("/w").expect("look at /w");
    let found: [(&str, bool); 22] = [
        // First: looking leaves traces itself.
        ("loopback-counters", counted_packets()),
        ("time-wait", in_time_wait()),
        ("root-mode", root.mode() & 0o7777 != 0o755),
        ("root-times", root.mtime() == TIME || root.atime() == TIME),
        ("root-xattr", has_xattr()),
        ("files", PLACES.iter().any(|place| !is_empty(place))),
        ("space", is_used("/w") || is_used("/tmp")),
        // SAFETY: only integers are passed, to this call and the next two.
        ("sysv-shm", unsafe { libc::shmget(KEY, 0, 0) } != -1 || has_rows("shm")),
        // SAFETY: as above.
        ("sysv-sem", unsafe { libc::semget(KEY, 0, 0) } != -1 || has_rows("sem")),
        // SAFETY: as above.
        ("sysv-msg", unsafe { libc::msgget(KEY, 0) } != -1 || has_rows("msg")),
        // SAFETY: the name is NUL-terminated.
        ("posix-mqueue", unsafe { libc::mq_open(QUEUE.as_ptr(), libc::O_RDONLY) } != -1),
        ("user-keyring", traces::find_key(traces::USER_KEYRING)),
        ("session-keyring", traces::find_key(traces::SESSION_KEYRING)),
        ("abstract-socket", traces::abstract_address().and_then(|at| UnixStream::connect_addr(&at)).is_ok()),
        ("listener", TcpStream::connect((Ipv4Addr::LOCALHOST, PORT + 1)).is_ok()),
        ("processes", other_processes()),
        ("mounts", read("/proc/self/mountinfo").contains(NAME)),
        ("hostname", read("/proc/sys/kernel/hostname").contains(NAME)),
        (
            "environment",
            std::env::vars_os().count() > 0 || fs::read("/proc/1/environ").is_ok_and(|all| !all.is_empty()),
        ),
        ("stream-flags", (0..3).any(has_flags)),
        ("pid-counter", std::process::id() != 2),
        ("inherited", inherited()),
    ];
    for (kind, _) in found.iter().filter(|(_, found)| *found) {
        println!("found {kind}");
    }
    // SAFETY: it takes nothing and cannot fail.
    println!("uid {}", unsafe { libc::getuid() });
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_else(|e| panic!("read {path}: {e}"))
}

fn is_empty(place: &str) -> bool {
    fs::read_dir(place).is_ok_and(|mut entries| entries.next().is_none())
}

fn is_used(place: &str) -> bool {
    let place = std::ffi::CString::new(place).expect("no NUL byte");
    // SAFETY: statvfs is plain data for which all zeroes is a valid value.
    let mut out: libc::statvfs = unsafe { std::mem::zeroed() };
    // SAFETY: the path is NUL-terminated and out is writable.
    let done = unsafe { libc::statvfs(place.as_ptr(), &mut out) };
    // The root directory is an inode.
    done == -1 || out.f_bfree != out.f_blocks || out.f_ffree + 1 != out.f_files
}

fn has_xattr() -> bool {
    let mut names = [0u8; 256];
    // SAFETY: the buffer is writable for its length.
    let length = unsafe { libc::listxattr(c"/w".as_ptr(), names.as_mut_ptr().cast(), names.len()) };
    length > 0 && String::from_utf8_lossy(&names).contains("user.")
}

fn has_rows(table: &str) -> bool {
    read(&format!("/proc/sysvipc/{table}")).lines().count() > 1
}

fn other_processes() -> bool {
    let own = std::process::id().to_string();
    fs::read_dir("/proc").expect("list /proc").flatten().any(|entry| {
        let name = entry.file_name().to_string_lossy().into_owned();
        name.parse::<u32>().is_ok() && name != own && name != "1"
    })
}

fn counted_packets() -> bool {
    let table = read("/proc/self/net/dev");
    let line = table.lines().find(|line| line.trim_start().starts_with("lo:"));
    line.is_none_or(|line| line.split_whitespace().skip(1).any(|count| count != "0"))
}

fn in_time_wait() -> bool {
    read("/proc/self/net/tcp").lines().skip(1).any(|line| line.split_whitespace().nth(3) == Some("06"))
}

fn has_flags(fd: i32) -> bool {
    // SAFETY: only reads flags.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
    flags & (libc::O_APPEND | libc::O_NONBLOCK) != 0
}

/// Descriptors beside the streams, blocked or ignored signals, capabilities, groups.
fn inherited() -> bool {
    let descriptors = fs::read_dir("/proc/self/fd").expect("list descriptors").count();
    let status = read("/proc/self/status");
    let is_set = |name: &str| {
        let line =
            status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_else(|| panic!("{name} is missing"));
        !line.trim().chars().all(|c| c == '0') && !line.trim().is_empty()
    };
    // SIGPIPE is ignored by the standard library: bit 12.
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).map(str::trim);
    let ignored = u64::from_str_radix(ignored.unwrap_or("1"), 16).unwrap_or(1) & !(1 << 12);
    let masks = ["SigBlk:", "CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:", "Groups:"];
    // The list itself is a descriptor.
    descriptors != 4 || ignored != 0 || masks.iter().any(|name| is_set(name)) || !status.contains("NoNewPrivs:\t1")
}
