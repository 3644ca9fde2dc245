//! What a new process does between its clone and its last step, decided before the clone.
//!
//! A plan names descriptors by their place in a table that travels beside it, so the same plan works for
//! a child of this process and for one of the spawner. It holds no decision that could still fail for a
//! reason known in the parent.

use serde::{Deserialize, Serialize};

use crate::hooks::{Hook, HookState};
use crate::mount_options::BindAttributes;
use crate::sys::netlink::Address;

/// A place in the descriptor table that goes with a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fd(pub u32);

/// Everything a new process has to do.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Plan {
    /// Wait for the end of the conversation and do nothing: a process that only holds its namespaces.
    pub hold: bool,
    /// Namespaces to enter, in this order: a descriptor and its `CLONE_NEW*` flags.
    pub join: Vec<(Fd, i32)>,
    /// The user namespace that the process is in, unless it is the caller's.
    pub user_namespace: Option<UserNamespace>,
    /// Set for the first process of a container, absent for one that enters a running container.
    pub container: Option<ContainerPlan>,
    /// The process itself.
    pub process: ProcessPlan,
    /// When the program is executed.
    pub gate: Gate,
}

/// How a process came into its user namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum UserNamespace {
    /// It was born in a new one and waits until its ids are mapped.
    New,
    /// It is in one whose ids are mapped already.
    Joined,
}

/// When the last step is taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Gate {
    /// When the one who spawned the process says so, over the socket it was spawned with.
    #[default]
    Parent,
    /// When somebody connects to this listening socket and says so; the spawner may be long gone.
    Listener(Fd),
}

/// The first process of a container also makes what is around it.
#[derive(Debug, Serialize, Deserialize)]
pub struct ContainerPlan {
    /// A new cgroup namespace, entered once the process is in its cgroups.
    pub new_cgroup_namespace: bool,
    /// A new time namespace with these offsets: a clock as /proc/PID/timens_offsets calls it, seconds and
    /// nanoseconds.
    pub new_time_namespace: Option<Vec<(String, i64, u32)>>,
    /// What runs while the container is made.
    pub hooks: Option<HooksPlan>,
    /// The root filesystem, detached and private.
    pub rootfs: Fd,
    /// Whether the root directory's mount ends up read-only.
    pub rootfs_readonly: bool,
    /// `MS_*` propagation of the root directory, set last; 0 leaves it private.
    pub rootfs_propagation: u64,
    /// Move the root over `/` instead of pivoting, where `/` is an initramfs.
    pub no_pivot: bool,
    /// In the order of config.json.
    pub mounts: Vec<MountPlan>,
    /// Device nodes and the usual links; `None` when /dev is the host's.
    pub devices: Option<Vec<Device>>,
    /// A detached mount of the host's /dev/null, for masking files.
    pub null: Fd,
    /// Paths hidden behind something empty.
    pub masked_paths: Vec<String>,
    /// Paths made read-only with everything below them.
    pub readonly_paths: Vec<String>,
    /// For the new UTS namespace.
    pub hostname: Option<String>,
    /// For the new UTS namespace.
    pub domainname: Option<String>,
    /// Keys with dots, as sysctl(8) writes them.
    pub sysctl: Vec<(String, String)>,
    /// Bring the loopback interface of the new network namespace up.
    pub loopback: bool,
    /// Interfaces that come from the host, there once the process is in its cgroups.
    pub net_devices: Vec<NetDevice>,
}

/// A network interface that comes from the host, without its addresses and down.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NetDevice {
    /// Its name in the container.
    pub name: String,
    /// The addresses that it had.
    pub addresses: Vec<Address>,
}

/// Hooks that the new process runs, or for which it waits.
#[derive(Debug, Serialize, Deserialize)]
pub struct HooksPlan {
    /// The state that each hook reads from its standard input.
    pub state: HookState,
    /// Where the root filesystem is attached in a copy of the host's mounts while the hooks before
    /// pivot_root run, if there are such.
    pub host_rootfs: Option<String>,
    /// Run by this process before pivot_root, in the container's namespaces and with the host's paths.
    pub create_container: Vec<Hook>,
    /// Run by this process right before its program.
    pub start_container: Vec<Hook>,
}

/// One entry of config.json's `mounts`.
#[derive(Debug, Serialize, Deserialize)]
pub struct MountPlan {
    /// The absolute path in the container.
    pub destination: String,
    /// What is mounted there.
    pub source: MountSource,
    /// `MS_*` propagation flags, applied one after the other once it is attached.
    pub propagation: Vec<u64>,
}

/// What a mount shows.
#[derive(Debug, Serialize, Deserialize)]
pub enum MountSource {
    /// A tree that is ready but for attaching it.
    Tree {
        /// The detached tree.
        tree: Fd,
        /// Whether its root is a directory.
        directory: bool,
    },
    /// A bind mount whose source is in the container, where earlier mounts may have put it.
    Inside {
        /// The source's path in the container.
        path: String,
        /// With all that is mounted below it.
        recursive: bool,
        /// Of the mount alone.
        attributes: BindAttributes,
        /// `MOUNT_ATTR_*` to set and to clear then, on all below it too.
        below: (u64, u64),
        /// The user namespace that its ids are mapped by, and whether those of all below it are.
        id_map: Option<(Fd, bool)>,
    },
    /// A filesystem that must be made inside the new namespaces.
    New {
        /// The type, as in /proc/filesystems.
        kind: String,
        /// `MOUNT_ATTR_*`.
        attributes: u64,
        /// Options for the filesystem itself.
        data: Vec<(String, Option<String>)>,
        /// Fill it with what lies below, for a tmpfs.
        copy_up: bool,
    },
    /// The hierarchies of cgroup v1 below a tmpfs.
    CgroupV1 {
        /// `MOUNT_ATTR_*` of each hierarchy; the tmpfs gets its read-only one last.
        attributes: u64,
        /// Directory name below the mount, and what is there.
        hierarchies: Vec<(String, CgroupView)>,
        /// Link name and target, for controllers that share a hierarchy.
        links: Vec<(String, String)>,
    },
}

/// What a container sees of one cgroup v1 hierarchy.
#[derive(Debug, Serialize, Deserialize)]
pub enum CgroupView {
    /// The hierarchy mounted in the container's own cgroup namespace, with these options.
    Mounted(Vec<(String, Option<String>)>),
    /// The container's directory, bound: a tree that comes with the word that the process is in its cgroups, in the
    /// order of the plan.
    Bound,
}

/// A device node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// The absolute path in the container.
    pub path: String,
    /// Type (`S_IFCHR`, `S_IFBLK`, `S_IFIFO`) and permission bits.
    pub mode: u32,
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// A detached mount of the host's node, for user namespaces, where no node can be made.
    pub bound: Option<Fd>,
}

/// The process: config.json's `process`, resolved.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ProcessPlan {
    /// Names the session keyring; `None` keeps the caller's.
    pub keyring: Option<String>,
    /// The command line, at least one word.
    pub args: Vec<String>,
    /// `NAME=value`.
    pub env: Vec<String>,
    /// Working directory, absolute.
    pub cwd: String,
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// It keeps those of its creator, which nobody may change in this user namespace.
    pub keep_groups: bool,
    /// File mode creation mask.
    pub umask: Option<u32>,
    /// Capability sets; `None` leaves what the kernel gives the user.
    pub capabilities: Option<CapabilitySets>,
    /// Resource, soft, hard.
    pub rlimits: Vec<(u32, u64, u64)>,
    /// `PR_SET_NO_NEW_PRIVS`.
    pub no_new_privileges: bool,
    /// -1000 to 1000.
    pub oom_score_adj: Option<i32>,
    /// The filter program and the flags for `seccomp(2)`.
    pub seccomp: Option<(Fd, u64)>,
    /// The filter asks a listener: whoever starts the process fetches its descriptor.
    pub seccomp_listener: bool,
    /// A terminal of this many rows and columns (0: the kernel's default).
    pub terminal: Option<(u16, u16)>,
    /// Standard input, output and error; `None` keeps the caller's.
    pub stdio: Option<[Fd; 3]>,
    /// How many descriptors after the first three the program inherits.
    pub preserve_fds: u32,
    /// What is executed instead of a file of the root filesystem.
    pub program: Option<Fd>,
    /// The parent may know a WASM module of the program's name where there is no file of it.
    pub ask_for_module: bool,
    /// Working directories that are missing are made, for the first process of a container.
    pub make_cwd: bool,
    /// CPU and disk scheduling.
    pub scheduling: Scheduling,
    /// The execution domain, personality(2).
    pub personality: Option<u64>,
    /// NUMA memory policy.
    pub memory_policy: Option<MemoryPolicy>,
    /// Labels of security modules.
    pub labels: Option<Labels>,
}

/// CPU and disk scheduling of a process.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Scheduling {
    /// For sched_setattr(2).
    pub scheduler: Option<Scheduler>,
    /// For ioprio_set(2): class and priority in one number.
    pub io_priority: Option<i32>,
    /// The CPUs it may run on once it is in its cgroup, a bit each; `None`: all that the cgroup has.
    pub cpus: Option<Vec<u64>>,
}

/// `struct sched_attr`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scheduler {
    /// `SCHED_*`.
    pub policy: u32,
    /// `SCHED_FLAG_*`.
    pub flags: u64,
    /// -20 to 19.
    pub nice: i32,
    /// 1 to 99, for real-time policies.
    pub priority: u32,
    /// Nanoseconds, for the deadline policy.
    pub runtime: u64,
    /// Nanoseconds, for the deadline policy.
    pub deadline: u64,
    /// Nanoseconds, for the deadline policy.
    pub period: u64,
}

/// For set_mempolicy(2).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryPolicy {
    /// `MPOL_*`, with its `MPOL_F_*`.
    pub mode: i32,
    /// A bit for each node.
    pub nodes: Vec<u64>,
}

/// Labels that take effect with the exec.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Labels {
    /// A procfs of the spawner's PID namespace, attached nowhere: a label written to anything else might
    /// go nowhere (CVE-2019-16884).
    pub proc: Fd,
    /// The AppArmor profile.
    pub apparmor: Option<String>,
    /// The SELinux context.
    pub selinux: Option<String>,
}

impl ProcessPlan {
    /// The soft limit on its address space in bytes.
    pub fn address_space(&self) -> Option<u64> {
        let limit = self.rlimits.iter().find(|(resource, ..)| *resource == libc::RLIMIT_AS)?.1;
        (limit != libc::RLIM_INFINITY).then_some(limit)
    }
}

/// Capability sets as bit masks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CapabilitySets {
    /// What the process and its descendants can ever have.
    pub bounding: u64,
    /// In force.
    pub effective: u64,
    /// Kept over exec together with file capabilities.
    pub inheritable: u64,
    /// What may be put in force.
    pub permitted: u64,
    /// Kept over exec for ordinary users.
    pub ambient: u64,
}
