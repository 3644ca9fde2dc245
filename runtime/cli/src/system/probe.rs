//! What `runx check` finds out, by trying where trying costs nothing.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use runx_core::cgroup::Layout;
use runx_core::container::Runtime;
use runx_core::rootless::Ids;
use runx_core::spec::LinuxIdMappingBuilder;
use runx_core::sys::mount::{self, NewFilesystem};
use runx_core::sys::{self, capabilities, pidfd};
use runx_core::{lsm, rootless, seccomp};

use super::check::{Finding, State};
use crate::container_defaults::CAPABILITIES;
use crate::network::Settings;

/// Whether a kernel answered a call at all.
fn is_known<T>(result: io::Result<T>) -> bool {
    !result.is_err_and(|e| e.raw_os_error() == Some(libc::ENOSYS))
}

fn call(number: libc::c_long) -> io::Result<()> {
    // SAFETY: only used with calls that fail for arguments that are all zero, which are neither addresses nor descriptors of
    // anything that could change.
    if unsafe { libc::syscall(number, 0, 0, 0, 0, 0) } == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The kernel's calls that containers are made with.
pub(super) fn kernel(found: &mut Vec<Finding>) {
    let release = nix::sys::utsname::uname().ok().and_then(|name| name.release().to_str().map(str::to_owned));
    let release = release.unwrap_or_else(|| "unknown".to_owned());
    found.push(Finding::ok("kernel", "release", format!("{release} ({})", std::env::consts::ARCH)));
    let newer = |version: &str| format!("use Linux {version} or newer, or a seccomp profile that lets the call pass");
    let here = || fs::File::open("/");
    let calls: [(&str, &str, bool); 5] = [
        ("clone3", "5.5", is_known(call(libc::SYS_clone3))),
        ("pidfd_open", "5.3", is_known(pidfd::open(std::process::id() as i32))),
        ("openat2", "5.6", is_known(here().and_then(|root| sys::openat2(root.as_fd(), ".", libc::O_PATH, 0, 0)))),
        ("move_mount", "5.2", is_known(call(libc::SYS_move_mount))),
        ("mount_setattr", "5.12", is_known(call(libc::SYS_mount_setattr))),
    ];
    for (name, version, known) in calls {
        found.push(Finding::essential(
            "kernel",
            name,
            known,
            "there",
            "the kernel refuses to know it",
            &newer(version),
        ));
    }
}

/// Namespaces, of users and others.
pub(super) fn namespaces(found: &mut Vec<Finding>) {
    for (file, name, needed) in [
        ("mnt", "mount", true),
        ("pid", "pid", true),
        ("net", "network", true),
        ("ipc", "ipc", true),
        ("uts", "uts", true),
        ("cgroup", "cgroup", false),
        ("time", "time", false),
    ] {
        let there = Path::new("/proc/self/ns").join(file).exists();
        let advice = "use a kernel with all namespaces (CONFIG_NAMESPACES and those below it)";
        if needed {
            found.push(Finding::essential("namespaces", name, there, "there", "the kernel has none", advice));
        } else {
            let state = if there { State::Ok } else { State::Limited };
            let text = if there { "there" } else { "the kernel has none: containers that ask for one are refused" };
            found.push(Finding::new("namespaces", name, state, text).advise(advice));
        }
    }
    found.push(users());
}

fn number(path: &str) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn users() -> Finding {
    let finding = |state, text: &str| Finding::new("namespaces", "user", state, text);
    let ordinary = rootless::is_ordinary_user();
    let worse = if ordinary { State::Missing } else { State::Limited };
    if !Path::new("/proc/self/ns/user").exists() {
        return finding(worse, "the kernel has none").advise("use a kernel with CONFIG_USER_NS").needed_if(ordinary);
    }
    if number("/proc/sys/user/max_user_namespaces") == Some(0) {
        return finding(worse, "none may be made").advise("sysctl user.max_user_namespaces=15000").needed_if(ordinary);
    }
    if number("/proc/sys/kernel/unprivileged_userns_clone") == Some(0) {
        return finding(worse, "root only").advise("sysctl kernel.unprivileged_userns_clone=1").needed_if(ordinary);
    }
    if number("/proc/sys/kernel/apparmor_restrict_unprivileged_userns") == Some(1) {
        let advice =
            "sysctl kernel.apparmor_restrict_unprivileged_userns=0, or an AppArmor profile with \"userns,\" for runx";
        return finding(worse, "AppArmor lets root and named programs only").advise(advice).needed_if(ordinary);
    }
    finding(State::Ok, "there").needed_if(ordinary)
}

/// What an ordinary user needs for containers of his own.
pub(super) fn ordinary_users(found: &mut Vec<Finding>) {
    let group = "ordinary users";
    let ids = Ids::own();
    let further = ids.users.len() > 1 || ids.groups.len() > 1;
    let programs: Vec<_> = ["newuidmap", "newgidmap"].into_iter().filter(|name| which(name).is_none()).collect();
    let advice = "apt install uidmap, or dnf install shadow-utils";
    found.push(match programs[..] {
        [] => Finding::ok(group, "newuidmap, newgidmap", "there"),
        _ => {
            let text = if further { "missing, and your ids need them" } else { "missing: a container has one user id" };
            Finding::new(group, "newuidmap, newgidmap", State::Limited, text).advise(advice)
        }
    });
    for (file, mappings) in [("/etc/subuid", &ids.users), ("/etc/subgid", &ids.groups)] {
        let ranges: Vec<_> =
            mappings.iter().skip(1).map(|range| format!("{}:{}", range.host_id(), range.size())).collect();
        found.push(match ranges[..] {
            // Root has all ids, and needs no line.
            [] if nix::unistd::getuid().is_root() => Finding::ok(group, file, "not needed by root"),
            [] => Finding::new(group, file, State::Limited, "no ids for you: a container has one user id")
                .advise("usermod --add-subuids 100000-165535 --add-subgids 100000-165535 YOU"),
            _ => Finding::ok(group, file, ranges.join(", ")),
        });
    }
}

/// Cgroups, and what they limit.
pub(super) fn cgroups(found: &mut Vec<Finding>) {
    let layout = match Layout::detect() {
        Ok(layout) => layout,
        Err(e) => {
            let advice = "mount -t cgroup2 none /sys/fs/cgroup";
            found
                .push(Finding::new("cgroups", "version", State::Missing, e.to_string()).advise(advice).needed_if(true));
            return;
        }
    };
    let controllers: Vec<String> = match &layout {
        Layout::V2 { root, own } => {
            found.push(Finding::ok("cgroups", "version", "2"));
            // Those that a group made by us gets: for root all there are, for others what was delegated.
            let place = if rootless::is_ordinary_user() {
                root.join(own.strip_prefix("/").unwrap_or(own))
            } else {
                root.clone()
            };
            let text = fs::read_to_string(place.join("cgroup.controllers")).unwrap_or_default();
            text.split_ascii_whitespace().map(str::to_owned).collect()
        }
        Layout::V1 { hierarchies } => {
            let advice =
                "boot with systemd.unified_cgroup_hierarchy=1: version 1 has no longer all limits and no delegation";
            found.push(Finding::new("cgroups", "version", State::Limited, "1").advise(advice));
            hierarchies.iter().flat_map(|hierarchy| hierarchy.controllers.clone()).collect()
        }
    };
    let systemd = Path::new("/run/systemd/system").is_dir();
    found.push(Finding::ok(
        "cgroups",
        "systemd",
        if systemd { "manages them" } else { "is not the init: runx makes them itself" },
    ));
    for (names, limit) in [
        (&["memory"][..], "memory"),
        (&["pids"], "processes"),
        (&["cpu"], "processor time"),
        (&["cpuset"], "processors"),
        (&["io", "blkio"], "block I/O"),
    ] {
        let there = names.iter().any(|name| controllers.iter().any(|known| known == name));
        let advice = if rootless::is_ordinary_user() {
            "let systemd delegate it: Delegate=yes for user@.service"
        } else {
            "boot with it (cgroup_enable=NAME), or add it to cgroup.subtree_control"
        };
        found.push(if there {
            Finding::ok("cgroups", names[0], "there")
        } else {
            Finding::new("cgroups", names[0], State::Limited, format!("missing: {limit} is not limited")).advise(advice)
        });
    }
}

/// What confines programs.
pub(super) fn confinement(found: &mut Vec<Finding>) {
    let group = "confinement";
    let there = Path::new("/proc/sys/kernel/seccomp/actions_avail").exists();
    let version = seccomp::library_version().unwrap_or_else(|| "unknown".to_owned());
    let text = format!("there, libseccomp {version}");
    let advice = "use a kernel with CONFIG_SECCOMP_FILTER";
    found.push(Finding::essential(group, "seccomp", there, &text, "the kernel has no filters", advice));
    let modules = fs::read_to_string("/sys/kernel/security/lsm").ok();
    let (apparmor, selinux) = (lsm::apparmor_enabled(), lsm::selinux_enabled());
    let state = if apparmor || selinux { State::Ok } else { State::Limited };
    let active = [(apparmor, "AppArmor"), (selinux, "SELinux")]
        .iter()
        .filter(|(on, _)| *on)
        .map(|(_, name)| *name)
        .collect::<Vec<_>>();
    let text = match (active[..].is_empty(), modules) {
        (false, _) => active.join(", "),
        (true, Some(all)) => format!("neither AppArmor nor SELinux confines ({})", all.trim()),
        (true, None) => "neither AppArmor nor SELinux confines".to_owned(),
    };
    found.push(
        Finding::new(group, "security modules", state, text).advise("boot with security=apparmor or security=selinux"),
    );
    // Root of a user namespace has all of them in there.
    if !rootless::is_ordinary_user() {
        let permitted = capabilities::get().map(|(_, permitted, _)| permitted).unwrap_or(0);
        let names = runx_core::features::features()["linux"]["capabilities"].clone();
        let all: Vec<_> =
            names.as_array().into_iter().flatten().filter_map(|name| name.as_str().map(str::to_owned)).collect();
        let lacks = |number: usize| permitted & (1 << number) == 0;
        let missing: Vec<_> =
            all.iter().enumerate().filter(|(number, _)| lacks(*number)).map(|(_, name)| name.as_str()).collect();
        let needed: Vec<_> =
            missing.iter().filter(|name| CAPABILITIES.contains(name) || **name == "CAP_SYS_ADMIN").collect();
        found.push(match (missing.is_empty(), needed.is_empty()) {
            (true, _) => Finding::ok(group, "capabilities", "all"),
            (_, true) => {
                Finding::new(group, "capabilities", State::Limited, format!("you lack {}", missing.join(", ")))
                    .advise("containers do without them; start runx with them if one needs them")
            }
            _ => Finding::new(group, "capabilities", State::Missing, format!("you lack {}", missing.join(", ")))
                .advise("start runx as root of the machine, or as an ordinary user")
                .needed_if(true),
        });
    }
}

/// Whether the kernel has a filesystem; for root it is loaded if that is possible.
fn has_filesystem(kind: &str) -> bool {
    let listed = || fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let in_list = |text: String| text.lines().any(|line| line.split_ascii_whitespace().last() == Some(kind));
    in_list(listed()) || NewFilesystem::open(kind).is_ok()
}

/// Where images and root filesystems go.
pub(super) fn storage(found: &mut Vec<Finding>, runtime: &Runtime, storage_root: &Path) {
    let group = "storage";
    found.push(if has_filesystem("overlay") {
        Finding::ok(group, "overlay", "there")
    } else {
        Finding::new(group, "overlay", State::Limited, "missing: root filesystems are copied")
            .advise("modprobe overlay")
    });
    found.push(if has_filesystem("fuse") && Path::new("/dev/fuse").exists() {
        Finding::ok(group, "/dev/fuse", "there")
    } else {
        Finding::new(group, "/dev/fuse", State::Limited, "missing: containers cannot mount FUSE filesystems")
            .advise("modprobe fuse")
    });
    // Who is in a user namespace has one mapping for all mounts.
    if !rootless::is_ordinary_user() {
        let there = storage_root.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
        found.push(match map_ids(runtime, there) {
            Ok(()) => Finding::ok(group, "id-mapped mounts", format!("there, of {}", there.display())),
            Err(e) => Finding::new(group, "id-mapped mounts", State::Limited, format!("{}: {e:#}", there.display()))
                .advise(
                    "use Linux 5.12 or newer, and a filesystem such as ext4, xfs or btrfs; otherwise images are copied",
                ),
        });
    }
    for (name, directory) in [("state", runtime.root()), ("images", storage_root)] {
        found.push(place(group, name, directory));
    }
}

/// Makes an id-mapped mount of a directory, attached nowhere, and lets go of it.
fn map_ids(runtime: &Runtime, directory: &Path) -> anyhow::Result<()> {
    let all = LinuxIdMappingBuilder::default().host_id(100_000_u32).container_id(0_u32).size(65_536_u32).build()?;
    let users = runtime.user_namespace(&[all], &[all])?;
    let directory = sys::open(directory, libc::O_PATH | libc::O_DIRECTORY)?;
    let tree = mount::clone_tree(directory.as_fd(), "", false)?;
    Ok(mount::set_id_map(tree.as_fd(), users.as_fd(), false)?)
}

/// A directory that is made when it is first needed.
fn place(group: &'static str, name: &'static str, directory: &Path) -> Finding {
    let there = directory.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    let writable = there.is_dir() && nix::unistd::access(there, nix::unistd::AccessFlags::W_OK).is_ok();
    let shown = directory.display();
    if !writable {
        let flag = if name == "state" { "--root" } else { "--storage-root" };
        return Finding::new(group, name, State::Missing, format!("{shown}: {} cannot be written", there.display()))
            .advise(&format!("name another directory by {flag}, or in the config file"))
            .needed_if(true);
    }
    const TMPFS: i64 = 0x0102_1994;
    let free = nix::sys::statvfs::statvfs(there).map(|stat| stat.blocks_available() * stat.fragment_size());
    let free = free.unwrap_or(0) >> 20;
    let in_memory = sys::filesystem_magic(there).is_ok_and(|magic| magic == TMPFS);
    match (name, in_memory) {
        ("state", false) => Finding::new(group, name, State::Limited, format!("{shown}, on a disk"))
            .advise("use a directory on a tmpfs, such as /run: state of before a reboot is in the way"),
        ("state", true) => Finding::ok(group, name, format!("{shown}, on a tmpfs")),
        (_, true) => Finding::new(group, name, State::Limited, format!("{shown}, in memory: {free} MiB free"))
            .advise("use a directory on a disk: images are gone after a reboot"),
        (_, false) if free < 1024 => Finding::new(group, name, State::Limited, format!("{shown}: {free} MiB free"))
            .advise("make room, or name another directory by --storage-root"),
        (_, false) => Finding::ok(group, name, format!("{shown}: {free} MiB free")),
    }
}

/// What connects containers.
pub(super) fn network(found: &mut Vec<Finding>, settings: &Settings) {
    let group = "network";
    let find = |name: &str| settings.plugins.iter().map(|directory| directory.join(name)).find(|file| file.is_file());
    let missing: Vec<_> = ["bridge", "host-local", "portmap"].into_iter().filter(|name| find(name).is_none()).collect();
    found.push(match (find("bridge"), missing.is_empty()) {
        (Some(bridge), true) => {
            Finding::ok(group, "CNI plugins", bridge.parent().unwrap_or(Path::new("/")).display().to_string())
        }
        _ => Finding::new(group, "CNI plugins", State::Limited, format!("missing: {}", missing.join(", ")))
            .advise("apt install containernetworking-plugins; without them there is --network host and none"),
    });
    let iptables = which("iptables");
    found.push(match iptables {
        Some(path) => {
            Finding::ok(group, "iptables", first_line(&path, "--version").unwrap_or_else(|| "there".to_owned()))
        }
        None => Finding::new(group, "iptables", State::Limited, "missing: no bridges and no published ports")
            .advise("apt install iptables, or dnf install iptables-nft"),
    });
    let tun = Path::new("/dev/net/tun").exists();
    let text = if tun { "there" } else { "missing: containers cannot make tunnels" };
    let state = if tun { State::Ok } else { State::Limited };
    found.push(Finding::new(group, "/dev/net/tun", state, text).advise("modprobe tun"));
}

/// Programs beside this one, and of others.
pub(super) fn programs(found: &mut Vec<Finding>, beside: &Path) {
    for (name, what) in [
        ("runx-wasm-runner", "WASM modules"),
        ("runx-wasm-host", "WASM components, and modules without a container"),
        ("runx-wasm-compiler", "compiling WASM modules"),
        ("runx-image-client", "pulling and importing images"),
        ("runx-pool-server", "runx pool serve"),
        ("runx-agent", "runx agent"),
        ("containerd-shim-runx-v1", "containerd and Kubernetes"),
    ] {
        found.push(if beside.join(name).is_file() {
            Finding::ok("programs", name, format!("there: {what}"))
        } else {
            Finding::new("programs", name, State::Limited, format!("not in {}: no {what}", beside.display()))
                .advise("install all programs of runx into one directory")
        });
    }
    let version = which("containerd").and_then(|path| first_line(&path, "--version"));
    found.push(match version {
        Some(version) => Finding::ok("other programs", "containerd", version),
        None => {
            Finding::new("other programs", "containerd", State::Limited, "missing: it is for Kubernetes nodes only")
                .advise("apt install containerd")
        }
    });
    let version = which("criu").and_then(|path| first_line(&path, "--version"));
    found.push(match version {
        Some(version) => Finding::ok("other programs", "criu", version),
        None => {
            Finding::new("other programs", "criu", State::Limited, "missing: no checkpoints").advise("apt install criu")
        }
    });
}

/// A program on the PATH, or where the system's are.
fn which(name: &str) -> Option<PathBuf> {
    let mut path: OsString = std::env::var_os("PATH").unwrap_or_default();
    path.push(":/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin");
    std::env::split_paths(&path).map(|directory| directory.join(name)).find(|file| file.is_absolute() && file.is_file())
}

/// The first line of what a program says about itself.
fn first_line(program: &Path, flag: &str) -> Option<String> {
    let output = Command::new(program).arg(flag).stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).lines().next()?.trim().to_owned();
    Some(text).filter(|text| output.status.success() && !text.is_empty())
}
