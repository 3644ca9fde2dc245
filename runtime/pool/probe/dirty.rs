//! Leaves one kind of trace, or all.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;

use crate::traces::{self, C_NAME, KEY, NAME, PLACES, PORT, QUEUE, TIME, check};

type Leaver = (&'static str, fn() -> io::Result<()>);

/// What can be left. Those that take a background process come last, and those that take one's place in the same order.
const ALL: [Leaver; 24] = [
    ("files", files),
    ("space", space),
    ("root-mode", root_mode),
    ("root-times", root_times),
    ("root-xattr", root_xattr),
    ("sysv-shm", sysv_shm),
    ("sysv-sem", sysv_sem),
    ("sysv-msg", sysv_msg),
    ("posix-mqueue", posix_queue),
    ("user-keyring", || traces::add_key(traces::USER_KEYRING).map(drop)),
    ("session-keyring", || traces::add_key(traces::SESSION_KEYRING).map(drop)),
    ("time-wait", time_wait),
    ("loopback-counters", time_wait),
    ("stream-flags", stream_flags),
    ("pid-counter", || (0..20).try_for_each(|_| background(|| Ok(()), false))),
    ("user-id", || Ok(())),
    ("environment", || Ok(())),
    ("memory-peak", memory),
    ("process-peak", || (0..16).try_for_each(|_| background(|| Ok(()), true))),
    ("hostname", || background(hostname, true)),
    ("mounts", || background(mounts, true)),
    ("abstract-socket", || background(abstract_socket, true)),
    ("listener", || background(listener, true)),
    ("processes", processes),
];

/// Leaves a kind of trace.
pub(crate) fn leave(kind: &str) {
    for (name, leave) in ALL.iter().filter(|(name, _)| kind == "all" || *name == kind) {
        match leave() {
            Ok(()) => println!("{name}: left"),
            Err(e) => println!("{name}: {e}"),
        }
    }
}

/// Goes on in the background once `prepare` is done, or ends.
fn background(prepare: impl Fn() -> io::Result<()>, stay: bool) -> io::Result<()> {
    let (mut reader, writer) = io::pipe()?;
    // SAFETY: the program has one thread.
    let pid = check(unsafe { libc::fork() }.into())?;
    if pid == 0 {
        drop(reader);
        // SAFETY: no argument.
        unsafe { libc::setsid() };
        if let Err(e) = prepare() {
            let _ = (&writer).write_all(e.to_string().as_bytes());
        }
        drop(writer);
        if stay {
            loop {
                // SAFETY: no argument.
                unsafe { libc::pause() };
            }
        }
        // SAFETY: ends the process.
        unsafe { libc::_exit(0) };
    }
    drop(writer);
    let mut failure = String::new();
    reader.read_to_string(&mut failure)?;
    if failure.is_empty() { Ok(()) } else { Err(io::Error::other(failure)) }
}

fn files() -> io::Result<()> {
    for place in PLACES {
        let place = Path::new(place);
        fs::write(place.join(NAME), "secret")?;
        fs::write(place.join(".hidden"), "secret")?;
        symlink("/etc", place.join("link"))?;
        let fifo = std::ffi::CString::new(place.join("fifo").into_os_string().into_encoded_bytes())?;
        // SAFETY: the path is NUL-terminated.
        check(unsafe { libc::mkfifo(fifo.as_ptr(), 0o600) }.into())?;
        drop(UnixListener::bind(place.join("socket"))?);
        let mut deep = place.join("deep");
        for _ in 0..100 {
            fs::create_dir(&deep)?;
            fs::write(deep.join("f"), "x")?;
            deep.push("d");
        }
        let forbidden = place.join("forbidden");
        fs::create_dir(&forbidden)?;
        fs::write(forbidden.join("f"), "x")?;
        fs::set_permissions(forbidden.join("f"), fs::Permissions::from_mode(0o0))?;
        fs::set_permissions(&forbidden, fs::Permissions::from_mode(0o0))?;
    }
    Ok(())
}

/// An unlinked file that a background process keeps.
fn space() -> io::Result<()> {
    background(
        || {
            let file = fs::File::create("/w/unlinked")?;
            (&file).write_all(&vec![7; 1 << 20])?;
            fs::remove_file("/w/unlinked")?;
            std::mem::forget(file);
            Ok(())
        },
        true,
    )?;
    fs::write("/tmp/space", vec![7; 1 << 20])
}

fn root_mode() -> io::Result<()> {
    fs::set_permissions("/w", fs::Permissions::from_mode(0o777))
}

fn root_times() -> io::Result<()> {
    let times = [libc::timespec { tv_sec: TIME, tv_nsec: 0 }; 2];
    // SAFETY: the path is NUL-terminated and there are two times.
    check(unsafe { libc::utimensat(libc::AT_FDCWD, c"/w".as_ptr(), times.as_ptr(), 0) }.into()).map(drop)
}

fn root_xattr() -> io::Result<()> {
    // SAFETY: the strings are NUL-terminated, and the value is valid for its length.
    check(unsafe { libc::setxattr(c"/w".as_ptr(), c"user.probe".as_ptr(), c"x".as_ptr().cast(), 1, 0) }.into())
        .map(drop)
}

fn sysv_shm() -> io::Result<()> {
    // SAFETY: only integers are passed.
    check(unsafe { libc::shmget(KEY, 4096, libc::IPC_CREAT | 0o666) }.into()).map(drop)
}

fn sysv_sem() -> io::Result<()> {
    // SAFETY: only integers are passed.
    check(unsafe { libc::semget(KEY, 1, libc::IPC_CREAT | 0o666) }.into()).map(drop)
}

fn sysv_msg() -> io::Result<()> {
    // SAFETY: only integers are passed.
    check(unsafe { libc::msgget(KEY, libc::IPC_CREAT | 0o666) }.into()).map(drop)
}

fn posix_queue() -> io::Result<()> {
    // SAFETY: the name is NUL-terminated, and without attributes the kernel's are taken.
    let queue = unsafe {
        libc::mq_open(QUEUE.as_ptr(), libc::O_CREAT | libc::O_RDWR, 0o666, std::ptr::null::<libc::mq_attr>())
    };
    check(queue.into()).map(drop)
}

/// The side that closes first stays in this state for a minute.
fn time_wait() -> io::Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, PORT))?;
    let client = TcpStream::connect((Ipv4Addr::LOCALHOST, PORT))?;
    let (mut server, _) = listener.accept()?;
    drop(client);
    server.read_to_end(&mut Vec::new())?;
    Ok(())
}

fn stream_flags() -> io::Result<()> {
    for fd in 0..3 {
        // SAFETY: only changes flags of an open file.
        check(unsafe { libc::fcntl(fd, libc::F_SETFL, libc::O_NONBLOCK | libc::O_APPEND) }.into())?;
    }
    Ok(())
}

fn memory() -> io::Result<()> {
    std::hint::black_box(vec![1u8; 96 << 20]);
    Ok(())
}

fn hostname() -> io::Result<()> {
    // Of its own, if it may have one.
    // SAFETY: only flags are passed.
    unsafe { libc::unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWUTS) };
    // SAFETY: the name is valid for its length.
    check(unsafe { libc::sethostname(C_NAME.as_ptr(), NAME.len()) }.into()).map(drop)
}

fn mounts() -> io::Result<()> {
    // SAFETY: only flags are passed.
    unsafe { libc::unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWNS) };
    let (source, target, kind) = (C_NAME.as_ptr(), c"/tmp".as_ptr(), c"tmpfs".as_ptr());
    // SAFETY: the strings are NUL-terminated, and a tmpfs needs no options.
    check(unsafe { libc::mount(source, target, kind, 0, std::ptr::null()) }.into()).map(drop)
}

fn abstract_socket() -> io::Result<()> {
    std::mem::forget(UnixListener::bind_addr(&traces::abstract_address()?)?);
    Ok(())
}

fn listener() -> io::Result<()> {
    std::mem::forget(TcpListener::bind((Ipv4Addr::LOCALHOST, PORT + 1))?);
    Ok(())
}

/// One that ignores what can be ignored, one that is stopped, one with a memfd, an inotify watch and its own name.
fn processes() -> io::Result<()> {
    let holding = || {
        // SAFETY: the name is NUL-terminated.
        check(unsafe { libc::memfd_create(C_NAME.as_ptr(), 0) }.into())?;
        // SAFETY: only flags are passed.
        let watch = check(unsafe { libc::inotify_init1(0) }.into())?;
        // SAFETY: the path is NUL-terminated.
        check(unsafe { libc::inotify_add_watch(watch as i32, c"/w".as_ptr(), libc::IN_ALL_EVENTS) }.into())?;
        for signal in 1..32 {
            // SAFETY: no handler is installed; where it is refused nothing changes.
            unsafe { libc::signal(signal, libc::SIG_IGN) };
        }
        Ok(())
    };
    background(holding, true)?;
    // SAFETY: the program has one thread.
    let pid = check(unsafe { libc::fork() }.into())?;
    if pid == 0 {
        // SAFETY: only integers are passed.
        unsafe { libc::raise(libc::SIGSTOP) };
        // SAFETY: ends the process.
        unsafe { libc::_exit(0) };
    }
    Ok(())
}
