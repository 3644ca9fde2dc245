//! A machine for the node's installer: a directory that is the root of a mount namespace of its own, with a containerd that
//! runs in it. The installer sees it from outside, by `--root`, as a pod sees its node.

mod cluster;
mod configurations;
mod daemon;
mod pods;
mod steps;

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use k8s_cri::v1 as api;
use serde_json::Value;
use tempfile::TempDir;

use crate::command::{Done, eventually, run};
use crate::cri::Client;
use crate::dist;

pub use cluster::Cluster;
pub use configurations::{
    IMPORTS, configurations, every_package, head, newer_packages, one_package, serves, started, status, usual,
    usual_for_pods,
};
pub use daemon::Running;
pub use steps::{Killed, run_until};

/// Where containerd's main file is on an ordinary node.
pub const CONFIG: &str = "etc/containerd/config.toml";

/// The image of sandboxes.
pub const PAUSE: &str = "runx.test/pause:1";

/// The handler of runx.
pub const HANDLER: &str = "runx";

/// Directories of the machine that this is, which the other one has too.
const SHARED: [&str; 6] = ["usr/bin", "usr/sbin", "usr/lib", "proc", "sys", "dev"];

/// A containerd, as the packages have it.
#[derive(Clone, Debug)]
pub struct Package {
    /// The directory of its programs.
    pub directory: PathBuf,
    /// Its version: 1.6 is `(1, 6)`.
    pub version: (u32, u32),
}

/// The containerds to test with: the one that is first in `PATH`, and those in the directories of `RUNX_CONTAINERDS`
/// (separated by colons).
///
/// # Panics
/// When one does not tell its version.
pub fn packages() -> Vec<Package> {
    let installed =
        std::env::var_os("PATH").into_iter().flat_map(|path| std::env::split_paths(&path).collect::<Vec<_>>());
    let installed = installed.into_iter().find(|directory| directory.join("containerd").exists());
    let named = std::env::var_os("RUNX_CONTAINERDS").unwrap_or_default();
    let named: Vec<PathBuf> = std::env::split_paths(&named).filter(|path| !path.as_os_str().is_empty()).collect();
    let package = |directory: PathBuf| {
        let text = run(Command::new(directory.join("containerd")).arg("--version")).ok().stdout;
        let mut numbers = text
            .split_ascii_whitespace()
            .find_map(|word| {
                let word = word.trim_start_matches('v');
                word.starts_with(|c: char| c.is_ascii_digit()).then(|| word.split('.').map(|part| part.parse().ok()))
            })
            .expect("containerd tells its version");
        let mut next = || numbers.next().flatten().expect("a number");
        Package { directory, version: (next(), next()) }
    };
    installed.into_iter().chain(named).map(package).collect()
}

/// Why there can be no such machine here, if there cannot.
pub fn obstacle() -> Option<String> {
    if let Some(why) = crate::containerd::obstacle() {
        return Some(why);
    }
    ["unshare", "nsenter", "pivot_root", "flock", "setsid"].iter().find_map(|program| {
        let found = run(Command::new("sh").args(["-c", &format!("PATH=$PATH:/usr/sbin:/sbin command -v {program}")]));
        (found.code != 0).then(|| format!("it needs {program} (util-linux)"))
    })
}

/// The machine.
#[derive(Debug)]
pub struct Machine {
    directory: TempDir,
    /// The process that holds the mount namespace.
    holder: Child,
    package: Package,
}

fn write(path: &Path, text: &str, mode: u32) {
    fs::create_dir_all(path.parent().expect("it has a parent")).expect("make a directory");
    fs::write(path, text).expect("write a file");
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("set its mode");
}

/// Programs that say who they are and nothing else.
///
/// # Panics
/// When they cannot be written.
pub fn write_programs(directory: &Path, mark: &str) {
    let _ = fs::remove_dir_all(directory);
    let shim = format!("#!/bin/sh\n# {mark}\necho containerd-shim-runx-v1:\n");
    write(&directory.join("containerd-shim-runx-v1"), &shim, 0o755);
    write(&directory.join("runx"), mark, 0o755);
}

impl Machine {
    /// Makes one with a main file of containerd's, or without any, and starts containerd.
    ///
    /// # Panics
    /// When it does not come up.
    pub fn start(package: &Package, config: Option<&str>) -> Self {
        let this = Self::prepare(package, config);
        this.restart();
        this
    }

    /// Makes one whose containerd does not run yet.
    ///
    /// # Panics
    /// When it cannot be made.
    pub fn prepare(package: &Package, config: Option<&str>) -> Self {
        let directory = TempDir::with_prefix("runx-node-").expect("make a directory");
        let root = directory.path().join("root");
        for name in SHARED.iter().chain(&["run", "tmp", "var/lib", "etc", "opt", ".old", "usr/local/bin"]) {
            fs::create_dir_all(root.join(name)).expect("make a directory");
        }
        for name in ["bin", "sbin", "lib", "lib64"] {
            match fs::read_link(Path::new("/").join(name)) {
                Ok(target) => std::os::unix::fs::symlink(target, root.join(name)).expect("make a link"),
                Err(_) => fs::create_dir(root.join(name)).expect("make a directory"),
            }
        }
        for entry in fs::read_dir("/usr").expect("read /usr").flatten() {
            let name = entry.file_name();
            if name.to_string_lossy().starts_with("lib") {
                fs::create_dir_all(root.join("usr").join(&name)).expect("make a directory");
            }
        }
        for name in ["containerd", "ctr", "containerd-shim-runc-v2"] {
            fs::copy(package.directory.join(name), root.join("usr/local/bin").join(name)).expect("copy containerd");
        }
        let script = format!(
            "set -e; PATH=$PATH:/usr/sbin:/sbin; mount --bind '{0}' '{0}'; cd '{0}'\n\
             for name in usr/bin usr/sbin usr/lib* bin sbin lib lib64; do\n\
             if [ -d /$name ] && [ ! -L $name ]; then mount --bind /$name $name; fi; done\n\
             for name in proc sys dev; do mount --rbind /$name $name; done\n\
             pivot_root . .old; umount -l /.old; cd /; echo ready; exec sleep infinity",
            root.display()
        );
        let mut holder = Command::new("unshare")
            .args(["--mount", "--propagation", "private", "sh", "-c", &script])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("start unshare");
        let mut line = String::new();
        let _ = BufReader::new(holder.stdout.take().expect("it is piped")).read_line(&mut line);
        let this = Self { directory, holder, package: package.clone() };
        assert_eq!(line, "ready\n", "the machine's root is not made");
        // Pods get copies.
        for name in ["hosts", "resolv.conf"] {
            write(&this.root().join("etc").join(name), "", 0o644);
        }
        if let Some(config) = config {
            write(&this.root().join(CONFIG), config, 0o640);
        }
        this.write_restart();
        this
    }

    /// What restarts containerd: as a service, it goes alone, and its shims stay. `sabotage` beside it keeps a containerd
    /// whose files name runx from starting.
    fn write_restart(&self) {
        let at = self.path().display();
        let enter = self.enter().join(" ");
        let script = format!(
            r#"#!/bin/sh
exec 9>'{at}/restart.lock'
flock 9
echo restarted >>'{at}/restarts'
if [ -s '{at}/pid' ]; then
    pid=$(cat '{at}/pid')
    kill "$pid" 2>/dev/null
    while kill -0 "$pid" 2>/dev/null; do sleep 0.02; done
    : >'{at}/pid'
fi
rm -f '{at}/root/run/containerd/containerd.sock'
if [ -e '{at}/sabotage' ] && grep -qs 'runtimes.runx' '{at}/root/etc/containerd/config.toml' '{at}'/root/etc/containerd/*/*.toml; then
    exit 1
fi
config=
[ -e '{at}/config' ] && config="--config $(cat '{at}/config')"
setsid {enter} /usr/local/bin/containerd $config </dev/null >>'{at}/log' 2>&1 9>&- &
echo $! >'{at}/pid'
i=0
while [ $i -lt 600 ]; do
    kill -0 $! 2>/dev/null || exit 1
    [ -S '{at}/root/run/containerd/containerd.sock' ] && {enter} /usr/local/bin/ctr version >/dev/null 2>&1 9>&- && exit 0
    sleep 0.05
    i=$((i + 1))
done
exit 1
"#
        );
        write(&self.restart_script(), &script, 0o755);
    }

    fn restart_script(&self) -> PathBuf {
        self.path().join("restart.sh")
    }

    /// The command that what comes after it runs in the machine by.
    pub fn enter(&self) -> Vec<String> {
        let pid = self.holder.id().to_string();
        ["nsenter", "--target", &pid, "--mount", "--root", "--"].map(str::to_owned).to_vec()
    }

    /// A directory beside the root.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// The machine's root, from outside.
    pub fn root(&self) -> PathBuf {
        self.path().join("root")
    }

    /// The containerd that it has.
    pub fn package(&self) -> &Package {
        &self.package
    }

    /// A file of the machine; empty if there is none.
    pub fn read(&self, name: &str) -> String {
        fs::read_to_string(self.root().join(name)).unwrap_or_default()
    }

    /// Writes a file of the machine.
    ///
    /// # Panics
    /// When that is not possible.
    pub fn write(&self, name: &str, text: &str) {
        write(&self.root().join(name), text, 0o644);
    }

    /// Restarts containerd.
    ///
    /// # Panics
    /// When it does not come up.
    #[track_caller]
    pub fn restart(&self) {
        let done = Command::new("sh").arg(self.restart_script()).stdin(Stdio::null()).status().expect("start sh");
        assert!(done.success(), "containerd does not come up: {}", self.log());
        eventually("CRI is there", || self.handlers().is_some());
    }

    /// Stops containerd, as somebody who has forgotten to start it again.
    ///
    /// # Panics
    /// When it does not run.
    pub fn stop(&self) {
        let pid = fs::read_to_string(self.path().join("pid")).expect("it was started");
        let pid: i32 = pid.trim().parse().expect("it runs");
        // SAFETY: only a signal, to the containerd that the script has started.
        unsafe { libc::kill(pid, libc::SIGTERM) };
        eventually("containerd ends", || !self.processes().contains(&pid));
    }

    /// What containerd wrote.
    pub fn log(&self) -> String {
        fs::read_to_string(self.path().join("log")).unwrap_or_default()
    }

    /// How often containerd was started.
    pub fn restarts(&self) -> usize {
        fs::read_to_string(self.path().join("restarts")).unwrap_or_default().lines().count()
    }

    /// Lets containerd not start while its configuration has runx in it.
    ///
    /// # Panics
    /// When that cannot be noted.
    pub fn sabotage(&self, on: bool) {
        let path = self.path().join("sabotage");
        if on {
            fs::write(path, "").expect("write a file");
        } else {
            let _ = fs::remove_file(path);
        }
    }

    /// Connects to CRI.
    pub fn client(&self) -> Client {
        Client::connect(&self.root().join("run/containerd/containerd.sock"))
    }

    /// The handlers that containerd serves, if it is ready for pods.
    pub fn handlers(&self) -> Option<Vec<String>> {
        let socket = self.root().join("run/containerd/containerd.sock");
        let client = Client::try_connect(&socket)?;
        let status = client.status(api::StatusRequest { verbose: true }).ok()?;
        let conditions = status.status?.conditions;
        conditions.iter().find(|condition| condition.r#type == "RuntimeReady" && condition.status)?;
        let mut names: Vec<String> =
            status.runtime_handlers.into_iter().map(|handler| handler.name).filter(|name| !name.is_empty()).collect();
        if names.is_empty() {
            let config: Value = serde_json::from_str(status.info.get("config")?).ok()?;
            let runtimes = config.pointer("/containerd/runtimes")?.as_object()?;
            names = runtimes.keys().cloned().collect();
        }
        names.sort();
        Some(names)
    }

    /// The installer, with the flags for this machine.
    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(dist().join("runx-node"));
        command.args(&words[..1]).arg("--root").arg(self.root());
        command.arg("--restart-command").arg(self.restart_script()).arg("--enter").arg(self.enter().join(" "));
        if words[0] == "install" || words[0] == "run" {
            command.arg("--programs").arg(self.path().join("programs"));
        }
        command.args(&words[1..]);
        command
    }

    /// Runs the installer.
    #[track_caller]
    pub fn node(&self, words: &[&str]) -> Done {
        run(&mut self.command(words))
    }

    /// Puts programs where the installer takes them from.
    ///
    /// # Panics
    /// When that is not possible.
    pub fn set_programs(&self, mark: &str) {
        write_programs(&self.path().join("programs"), mark);
    }

    /// Puts the programs under test there.
    ///
    /// # Panics
    /// When that is not possible.
    pub fn set_real_programs(&self, mark: &str) {
        let directory = self.path().join("programs");
        let _ = fs::remove_dir_all(&directory);
        fs::create_dir_all(&directory).expect("make a directory");
        fs::copy(dist().join("containerd-shim-runx-v1"), directory.join("containerd-shim-runx-v1"))
            .expect("copy the shim");
        write(&directory.join("mark"), mark, 0o644);
    }

    /// Every file below a directory of the machine with its mode and content, links with where they lead.
    pub fn files(&self, below: &str) -> BTreeMap<PathBuf, (u32, Vec<u8>)> {
        fn walk(path: &Path, out: &mut BTreeMap<PathBuf, (u32, Vec<u8>)>) {
            for entry in fs::read_dir(path).into_iter().flatten().flatten() {
                let path = entry.path();
                let Ok(found) = fs::symlink_metadata(&path) else { continue };
                let content = if found.is_symlink() {
                    fs::read_link(&path).unwrap_or_default().into_os_string().into_encoded_bytes()
                } else {
                    fs::read(&path).unwrap_or_default()
                };
                out.insert(path.clone(), (found.permissions().mode(), content));
                if found.is_dir() {
                    walk(&path, out);
                }
            }
        }
        let mut out = BTreeMap::new();
        walk(&self.root().join(below), &mut out);
        out
    }

    /// All that an installer could change: containerd's files, and the places of programs and state.
    pub fn changeable(&self) -> BTreeMap<PathBuf, (u32, Vec<u8>)> {
        let mut all = self.files("etc");
        all.extend(self.files("opt"));
        all.extend(self.files("var/lib").into_iter().filter(|(path, _)| path.to_string_lossy().contains("runx/")));
        all
    }

    /// A name that nothing else has, for cgroups.
    pub fn name(&self) -> String {
        self.path().file_name().expect("it has a name").to_string_lossy().into_owned()
    }

    /// The processes in the machine, but for the one that holds it.
    fn processes(&self) -> Vec<i32> {
        let Ok(namespace) = fs::read_link(format!("/proc/{}/ns/mnt", self.holder.id())) else { return Vec::new() };
        let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        let within = |pid: &i32| fs::read_link(format!("/proc/{pid}/ns/mnt")).is_ok_and(|of| of == namespace);
        pids.filter(|pid| *pid != self.holder.id() as i32).filter(within).collect()
    }

    /// Fails the test if anything but containerd runs in the machine.
    ///
    /// # Panics
    /// With what does.
    #[track_caller]
    pub fn assert_only_containerd(&self) {
        eventually("only containerd runs", || self.processes().len() <= 1);
    }
}

/// Removes groups, and ends who is left in them: containers are in namespaces of their own.
fn remove_groups(group: &Path) {
    let members = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
    for pid in members.lines().filter_map(|line| line.parse().ok()) {
        // SAFETY: only a signal, to a process in a group whose name nothing else has.
        unsafe { libc::kill(pid, libc::SIGKILL) };
    }
    for entry in fs::read_dir(group).into_iter().flatten().flatten().filter(|it| it.path().is_dir()) {
        remove_groups(&entry.path());
    }
    for _ in 0..100 {
        match fs::remove_dir(group) {
            // Who was ended is in it for a moment still.
            Err(e) if e.kind() == std::io::ErrorKind::ResourceBusy => std::thread::sleep(Duration::from_millis(10)),
            _ => break,
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // What the script starts next would not be seen.
        let lock = fs::File::create(self.path().join("restart.lock")).ok();
        let _lock = lock.and_then(|file| nix::fcntl::Flock::lock(file, nix::fcntl::FlockArg::LockExclusive).ok());
        for _ in 0..100 {
            let processes = self.processes();
            if processes.is_empty() {
                break;
            }
            for pid in processes {
                // SAFETY: only a signal, to a process in the namespace that is ours alone.
                unsafe { libc::kill(pid, libc::SIGKILL) };
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = self.holder.kill();
        let _ = self.holder.wait();
        // Pods of a test that failed have some below.
        let root = Path::new("/sys/fs/cgroup");
        let hierarchies = fs::read_dir(root).into_iter().flatten().flatten().map(|entry| entry.path());
        hierarchies.chain([root.to_owned()]).for_each(|at| remove_groups(&at.join(self.name())));
    }
}

/// Returns from the test, aloud, if there can be no machine.
#[macro_export]
macro_rules! needs_machine {
    () => {
        if let Some(why) = $crate::machine::obstacle() {
            $crate::skip_outside_machine(&why);
            return;
        }
    };
}
