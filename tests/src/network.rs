//! A host of a test's own: a network namespace in which bridges, rules and ports are nobody else's.

use std::fs::{self, File};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sched::{CloneFlags, setns, unshare};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::bundle::Bundle;
use crate::command::{Done, run};
use crate::dist;

/// Why bridges cannot be had here, if they cannot.
pub fn obstacle() -> Option<String> {
    if let Some(why) = crate::obstacle() {
        return Some(why);
    }
    let plugins = ["/usr/lib/cni", "/opt/cni/bin", "/usr/libexec/cni"];
    if !plugins.iter().any(|directory| Path::new(directory).join("bridge").exists()) {
        return Some("it needs the CNI plugins (package containernetworking-plugins)".into());
    }
    let programs = [("iptables", "iptables"), ("ip", "iproute2")];
    let found =
        |name: &str| ["/usr/sbin", "/sbin", "/usr/bin", "/bin"].iter().any(|bin| Path::new(bin).join(name).exists());
    programs.iter().find(|(name, _)| !found(name)).map(|(name, package)| format!("it needs {name} (package {package})"))
}

/// Returns from the test, aloud, where there can be no bridges.
#[macro_export]
macro_rules! needs_bridges {
    () => {
        if let Some(why) = $crate::network::obstacle() {
            $crate::skip_outside_machine(&why);
            return;
        }
    };
}

/// Calls something in a network namespace, on a thread of its own.
///
/// # Panics
/// When it does, or the namespace cannot be entered.
pub fn within<T: Send>(namespace: &Path, call: impl FnOnce() -> T + Send) -> T {
    let file = File::open(namespace).unwrap_or_else(|e| panic!("open {}: {e}", namespace.display()));
    std::thread::scope(|scope| {
        let inside = scope.spawn(|| {
            setns(&file, CloneFlags::CLONE_NEWNET).expect("enter the network namespace");
            call()
        });
        inside.join().expect("what is called in a namespace")
    })
}

/// One, with `runx` in it.
#[derive(Debug)]
pub struct Host {
    directory: TempDir,
    namespace: OwnedFd,
}

impl Host {
    /// A host without any interface but its loopback one.
    ///
    /// # Panics
    /// When it cannot be made.
    pub fn new() -> Self {
        Self::with("")
    }

    /// With further lines in the section `[network]` of its config file.
    ///
    /// # Panics
    /// When it cannot be made.
    pub fn with(settings: &str) -> Self {
        let directory = TempDir::with_prefix("runx-test-").expect("make a directory");
        let made = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("make a network namespace");
            File::open("/proc/thread-self/ns/net").expect("open the network namespace")
        });
        let host = Self { directory, namespace: made.join().expect("make a network namespace").into() };
        host.configure(settings);
        host.ip("link set lo up");
        host
    }

    /// Writes the config file anew.
    ///
    /// # Panics
    /// When it cannot be written.
    pub fn configure(&self, settings: &str) {
        let text = format!("root = {:?}\n[network]\nstate = {:?}\n{settings}\n", self.root(), self.state());
        let text = if settings.contains("keep") { text } else { text + "keep = false\n" };
        fs::write(self.directory.path().join("config.toml"), text).expect("write the config file");
    }

    /// Where the state of containers goes.
    pub fn root(&self) -> PathBuf {
        self.directory.path().join("root")
    }

    fn state(&self) -> PathBuf {
        self.directory.path().join("networks")
    }

    /// The network namespace, as a file that can be opened.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), self.namespace.as_raw_fd()))
    }

    /// A command of this host.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        let namespace = self.namespace.as_raw_fd();
        let enter = move || {
            // SAFETY: the descriptor is open as long as the host is, and the call takes nothing but integers.
            if unsafe { nix::libc::setns(namespace, nix::libc::CLONE_NEWNET) } != 0 {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        };
        // SAFETY: the closure makes one system call.
        unsafe { command.pre_exec(enter) };
        command
    }

    /// `runx` on this host.
    pub fn runx_command(&self, args: &[&str]) -> Command {
        let mut command = self.command(dist().join("runx"));
        command.arg("--config-file").arg(self.directory.path().join("config.toml")).args(args);
        command
    }

    /// Runs it.
    #[track_caller]
    pub fn runx(&self, args: &[&str]) -> Done {
        run(&mut self.runx_command(args))
    }

    /// `ip` of iproute2 on this host.
    ///
    /// # Panics
    /// When it fails.
    #[track_caller]
    pub fn ip(&self, words: &str) -> String {
        run(self.command("ip").args(words.split_ascii_whitespace())).ok().stdout
    }

    /// `runx network attach`.
    ///
    /// # Panics
    /// When it fails.
    #[track_caller]
    pub fn attach(&self, id: &str, more: &[&str]) -> Value {
        let done = self.runx(&[&["network", "attach", "--format", "json", id], more].concat()).ok();
        serde_json::from_str(&done.stdout).expect("it prints JSON")
    }

    /// A container that is attached, and runs a script.
    ///
    /// # Panics
    /// When it does not start.
    #[track_caller]
    pub fn container(&self, script: &str, more: &[&str]) -> (Bundle, Value) {
        let mut bundle = Bundle::script(script);
        bundle.config["root"]["readonly"] = json!(false);
        let attached = self.attach(bundle.id(), more);
        for namespace in bundle.config["linux"]["namespaces"].as_array_mut().expect("it has namespaces") {
            if namespace["type"] == "network" {
                namespace["path"] = attached["netns"].clone();
            }
        }
        bundle.begin();
        (bundle, attached)
    }

    /// Fails the test if anything of a network is left.
    ///
    /// # Panics
    /// With what is left.
    #[track_caller]
    pub fn assert_nothing_left(&self) {
        let links = self.ip("-oneline link show");
        for kind in ["veth", "runx"] {
            let left = links.lines().find(|line| line.contains(kind));
            assert!(left.is_none(), "{links}");
        }
        let rules = run(&mut self.command("iptables-save")).ok().stdout;
        let ours = |line: &&str| line.contains("RUNX") || line.contains("runx") || line.contains("DNAT --to");
        assert_eq!(rules.lines().find(ours), None, "{rules}");
        assert!(!self.root().join(".network").exists(), "records are left");
        for entry in fs::read_dir(self.state()).into_iter().flatten().flatten() {
            let names: Vec<_> = fs::read_dir(entry.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            assert_eq!(names, ["lock"], "below {}", entry.path().display());
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").expect("read the mounts");
        let own = self.directory.path().to_str().expect("it is UTF-8");
        assert_eq!(mounts.lines().find(|line| line.contains(own)), None);
    }
}

impl Default for Host {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        for entry in fs::read_dir(self.root().join(".network")).into_iter().flatten().flatten() {
            let _ = self.runx_command(&["network", "detach"]).arg(entry.file_name()).output();
            // Where that failed, the directory must still be removable.
            let _ = nix::mount::umount2(&entry.path().join("netns"), nix::mount::MntFlags::MNT_DETACH);
        }
    }
}
