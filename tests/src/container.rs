//! `runx container` with roots of its own, and terminals for it.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::pty::{Winsize, openpty};
use nix::sys::termios::{Termios, tcgetattr};
use serde_json::Value;
use tempfile::TempDir;

use crate::bundle::fill_rootfs;
use crate::command::{Done, eventually, run, run_with};
use crate::{dist, leftovers};

/// Containers with a state root, a storage root and a root filesystem of their own.
#[derive(Debug)]
pub struct Containers {
    directory: TempDir,
}

impl Default for Containers {
    fn default() -> Self {
        Self::new()
    }
}

impl Containers {
    /// No containers yet.
    ///
    /// # Panics
    /// When the directories cannot be made.
    pub fn new() -> Self {
        let directory = TempDir::with_prefix("runx-test-").expect("make a directory");
        fs::create_dir(directory.path().join("rootfs")).expect("make the rootfs");
        fill_rootfs(&directory.path().join("rootfs"));
        // What this machine's own config file says is nothing to the tests.
        fs::write(directory.path().join("config.toml"), "").expect("write a config file");
        Self { directory }
    }

    /// An id that is this test's only.
    pub fn id(&self, name: &str) -> String {
        let unique = self.directory.path().file_name().expect("it has a name").to_string_lossy();
        format!("{unique}-{name}")
    }

    /// A place for files of the test.
    pub fn scratch(&self) -> &Path {
        self.directory.path()
    }

    /// A root filesystem with busybox.
    pub fn rootfs(&self) -> PathBuf {
        self.directory.path().join("rootfs")
    }

    /// Where the state is.
    pub fn state_root(&self) -> PathBuf {
        self.directory.path().join("state")
    }

    /// Where records, logs, volumes and images are.
    pub fn storage_root(&self) -> PathBuf {
        self.directory.path().join("storage")
    }

    /// The directory with a container's record.
    pub fn directory_of(&self, id: &str) -> PathBuf {
        self.storage_root().join("containers").join(id)
    }

    /// `runx` with these roots.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(dist().join("runx"));
        command.arg("--root").arg(self.state_root()).arg("--storage-root").arg(self.storage_root());
        command.arg("--config-file").arg(self.directory.path().join("config.toml")).args(args);
        command.current_dir(self.directory.path());
        command
    }

    /// Runs `runx container …`.
    #[track_caller]
    pub fn container(&self, args: &[&str]) -> Done {
        run(&mut self.command(&[&["container"], args].concat()))
    }

    /// The words of `runx container run` with the root filesystem and without a network, flags before the program.
    pub fn words<'a>(&self, rootfs: &'a str, flags: &[&'a str], args: &[&'a str]) -> Vec<&'a str> {
        [&["container", "run", "--network", "none", "--rootfs", rootfs], flags, &["--"], args].concat()
    }

    /// `runx container run` of a program of the root filesystem, not started.
    pub fn run_command(&self, flags: &[&str], args: &[&str]) -> Command {
        let rootfs = self.rootfs();
        self.command(&self.words(rootfs.to_str().expect("it is UTF-8"), flags, args))
    }

    /// `runx container run` of a program of the root filesystem.
    #[track_caller]
    pub fn run(&self, flags: &[&str], args: &[&str]) -> Done {
        run(&mut self.run_command(flags, args))
    }

    /// `runx container run` of a shell script.
    #[track_caller]
    pub fn script(&self, flags: &[&str], script: &str) -> Done {
        self.run(flags, &["sh", "-c", script])
    }

    /// `runx container run` with something on standard input.
    #[track_caller]
    pub fn run_with(&self, flags: &[&str], args: &[&str], input: &str) -> Done {
        run_with(&mut self.run_command(flags, args), input)
    }

    /// Starts a shell script in the background. Returns the id.
    #[track_caller]
    pub fn background(&self, name: &str, flags: &[&str], script: &str) -> String {
        let id = self.id(name);
        let flags = [&["-d", "--name", &id], flags].concat();
        let done = self.script(&flags, script).ok();
        assert_eq!(done.stdout.trim(), id);
        id
    }

    /// What `inspect` says of a container.
    ///
    /// # Panics
    /// When it says nothing.
    #[track_caller]
    pub fn inspect(&self, id: &str) -> Value {
        let text = self.container(&["inspect", id]).ok().stdout;
        let all: Vec<Value> = serde_json::from_str(&text).expect("inspect prints JSON");
        all.into_iter().next().expect("inspect knows the container")
    }

    /// A container's status.
    #[track_caller]
    pub fn status(&self, id: &str) -> String {
        self.inspect(id)["state"]["status"].as_str().expect("there is a status").to_owned()
    }

    /// Waits until a container has a status.
    #[track_caller]
    pub fn until(&self, id: &str, status: &str) {
        eventually(&format!("{id} is {status}"), || self.status(id) == status);
    }

    /// Waits until a container has printed something.
    #[track_caller]
    pub fn until_logged(&self, id: &str, text: &str) {
        eventually(&format!("{id} prints {text:?}"), || self.container(&["logs", id]).stdout.contains(text));
    }

    /// Removes a container; nothing that ends only with `held` is waited for.
    ///
    /// # Panics
    /// When it is not removed as long as `held` is there.
    #[track_caller]
    pub fn assert_is_removed<T>(&self, id: &str, held: T) {
        let mut remove = self.command(&["container", "rm", id]).stdout(Stdio::null()).spawn().expect("start runx");
        let mut status = None;
        let mut tries = 0;
        while status.is_none() && tries < 500 {
            tries += 1;
            std::thread::sleep(Duration::from_millis(20));
            status = remove.try_wait().expect("wait for runx");
        }
        drop(held);
        remove.wait().expect("wait for runx");
        assert!(status.expect("it waits for what is held").success());
    }

    /// Fails the test if anything is left of its containers.
    ///
    /// # Panics
    /// With what is left.
    #[track_caller]
    pub fn assert_nothing_left(&self) {
        let directories = ["containers", "volumes"].map(|name| self.storage_root().join(name));
        leftovers::assert_none(&self.id(""), &[&directories[..], &[self.state_root()]].concat());
    }
}

impl Drop for Containers {
    fn drop(&mut self) {
        let _ = self.command(&["container", "rm", "--force", "--volumes", "--all"]).output();
    }
}

/// A command on a terminal.
#[derive(Debug)]
pub struct Terminal {
    master: File,
    /// Open for as long as the terminal is looked at.
    slave: OwnedFd,
    /// Its attributes before the command was started.
    initial: Termios,
    child: Child,
    seen: String,
}

/// The size of a terminal's window.
fn window(rows: u16, columns: u16) -> Winsize {
    Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }
}

impl Terminal {
    /// Starts a command on a terminal of its own.
    ///
    /// # Panics
    /// When it cannot be started.
    #[track_caller]
    pub fn start(mut command: Command, rows: u16, columns: u16) -> Self {
        let pair = openpty(Some(&window(rows, columns)), None).expect("open a terminal");
        let stream = || Stdio::from(pair.slave.try_clone().expect("duplicate a descriptor"));
        command.stdin(stream()).stdout(stream()).stderr(stream());
        // SAFETY: the calls are safe between fork and exec, and touch no memory of others.
        unsafe {
            command.pre_exec(|| {
                libc::setsid();
                // Who runs the tests in the background of a shell ignores these.
                for signal in [libc::SIGINT, libc::SIGQUIT] {
                    libc::signal(signal, libc::SIG_DFL);
                }
                match libc::ioctl(0, libc::TIOCSCTTY, 0) {
                    -1 => Err(std::io::Error::last_os_error()),
                    _ => Ok(()),
                }
            })
        };
        let initial = tcgetattr(&pair.slave).expect("read the terminal's attributes");
        let child = command.spawn().expect("start a command on a terminal");
        Self { master: pair.master.into(), slave: pair.slave, initial, child, seen: String::new() }
    }

    /// The attributes that it had before the command was started.
    pub fn initial_attributes(&self) -> Termios {
        self.initial.clone()
    }

    /// Its attributes.
    ///
    /// # Panics
    /// When it has none.
    pub fn attributes(&self) -> Termios {
        tcgetattr(&self.slave).expect("read the terminal's attributes")
    }

    /// Types something.
    ///
    /// # Panics
    /// When the terminal takes no input.
    #[track_caller]
    pub fn write(&mut self, text: &str) {
        self.master.write_all(text.as_bytes()).expect("type");
    }

    /// Changes the size of the window.
    pub fn resize(&self, rows: u16, columns: u16) {
        // SAFETY: the size is valid, and the descriptor is a terminal's.
        unsafe { libc::ioctl(self.master.as_raw_fd(), libc::TIOCSWINSZ, &window(rows, columns)) };
    }

    /// Waits until this was printed, after what earlier calls have found, and returns what came before it.
    ///
    /// # Panics
    /// When it is not printed.
    #[track_caller]
    pub fn expect(&mut self, text: &str) -> String {
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            if let Some(at) = self.seen.find(text) {
                let before = self.seen[..at].to_owned();
                self.seen.drain(..at + text.len());
                return before;
            }
            assert!(Instant::now() < end, "{text:?} was not printed, but: {:?}", self.seen);
            assert!(self.read(100), "the terminal ended before {text:?}: {:?}", self.seen);
        }
    }

    /// Reads what is there within a time. `false` at the end.
    fn read(&mut self, milliseconds: i32) -> bool {
        let mut poll = libc::pollfd { fd: self.master.as_fd().as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: poll is a valid list of one.
        if unsafe { libc::poll(&mut poll, 1, milliseconds) } <= 0 {
            return true;
        }
        let mut buffer = [0; 4096];
        match self.master.read(&mut buffer) {
            Ok(n) if n > 0 => {
                self.seen.push_str(&String::from_utf8_lossy(&buffer[..n]));
                true
            }
            _ => false,
        }
    }

    /// The command's pid.
    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Waits for the command's end. Returns its exit code, and what it printed since the last look.
    ///
    /// # Panics
    /// When it does not end.
    #[track_caller]
    pub fn wait(&mut self) -> (i32, String) {
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            self.read(10);
            if let Some(status) = self.child.try_wait().expect("wait for a child") {
                while {
                    let before = self.seen.len();
                    self.read(20) && self.seen.len() > before
                } {}
                let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
                return (code, std::mem::take(&mut self.seen));
            }
            assert!(Instant::now() < end, "the command does not end: {:?}", self.seen);
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
